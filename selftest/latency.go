package selftest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Method says how the figures of Latency come about.
const Method = "Each round starts the command alone, alone once more, through a shell wrapper, and through the shim in each mode, one right " +
	"after the other, in an order that rotates, and times each from fork to wait. Added is the difference to the command alone of the same " +
	"round. The command alone, once more, shows the noise of this machine: a smaller figure than its own says nothing. " +
	"Processor time is user and system time of the process from fork to exit, the shim and the command; what is between it and the whole is waiting: for a processor, or for the agent's answer (3 ms at most)."

// Promised is what the shim may add: at the 99th percentile, and ever.
const (
	PromisedP99 = 5 * time.Millisecond
	PromisedMax = 50 * time.Millisecond
)

// Way is one way to start the command.
type Way struct {
	Name string
	Path string
	Args []string // argv, argv[0] too
}

// Added is what one way adds to the command alone, in microseconds.
type Added struct {
	Name  string  `json:"name"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	Max   float64 `json:"max_us"`
	Ratio float64 `json:"ratio"` // of p50 to that of the shell wrapper
	// The same of processor time, user and system: what a busy machine stretches less.
	CPU50  float64 `json:"cpu_p50_us"`
	CPU99  float64 `json:"cpu_p99_us"`
	CPUMax float64 `json:"cpu_max_us"`
}

// Latency is the outcome of a measurement.
type Latency struct {
	Command string   `json:"command"`
	Rounds  int      `json:"rounds"`
	Plain   Added    `json:"plain"` // the command alone: whole times, not differences
	Added   []Added  `json:"added"`
	Method  string   `json:"method"`
	Load    string   `json:"load"`   // load averages before and after
	Met     bool     `json:"met"`    // the bound of 5 ms at p99 and 50 ms ever, in each mode of the shim
	Missed  []string `json:"missed"` // by how much not, and what the noise was
	Notes   []string `json:"notes,omitempty"`
}

// Measure says what is measured.
type Measure struct {
	// Duration bounds the measuring, which makes at least ten rounds; default 10 s.
	Duration time.Duration
	// Rounds ends the measuring earlier; 0 means 10,000.
	Rounds int
	// Command is the command to put the shim in front of; none means true.
	Command []string
}

// The names of the ways.
const (
	wayNoise = "the command alone, once more"
	wayShell = "shell wrapper"
	wayAgent = "shim, agent answers"
	wayFile  = "shim, append file"
	wayOff   = "shim, switched off"
)

// Bench measures what a copy of the shim adds, and leaves nothing behind.
func Bench(ctx context.Context, o Options, m Measure) (*Latency, error) {
	if _, err := examineShim(o.Shim); err != nil {
		return nil, err
	}
	r, err := newRig(o)
	if err != nil {
		return nil, err
	}
	defer r.close()
	l, err := r.latency(ctx, m)
	return l, errors.Join(err, r.close())
}

func (r *rig) latency(ctx context.Context, m Measure) (*Latency, error) {
	if m.Duration <= 0 {
		m.Duration = 10 * time.Second
	}
	if m.Rounds <= 0 {
		m.Rounds = 10000
	}
	plain, err := trivial(m.Command)
	if err != nil {
		return nil, err
	}
	ways, notes, err := r.ways(ctx, plain)
	if err != nil {
		return nil, err
	}
	l := &Latency{Command: strings.Join(plain.Args, " "), Method: Method, Notes: notes, Missed: []string{}}
	before := r.machine().Load
	sample, err := Interleave(ctx, plain, ways, m.Duration, m.Rounds)
	if err != nil {
		return nil, err
	}
	l.Load = before + " before, " + r.machine().Load + " after"
	l.Rounds = len(sample.Plain)
	l.Plain = Summarise(plain.Name, sample.Plain, sample.PlainCPU)
	for i, w := range ways {
		l.Added = append(l.Added, Summarise(w.Name, sample.Added[i], sample.AddedCPU[i]))
	}
	shell, noise := l.Added[1].P50, l.Added[0]
	for i := range l.Added {
		a := &l.Added[i]
		if shell > 0 {
			a.Ratio = a.P50 / shell
		}
		if !strings.HasPrefix(a.Name, "shim") {
			continue
		}
		l.Missed = append(l.Missed, a.Over(noise)...)
	}
	l.Met = len(l.Missed) == 0
	return l, nil
}

// Over says by how much a way is over what the shim promises, and what of it is the
// machine's: noise is the command alone, once more.
func (a Added) Over(noise Added) (said []string) {
	if over := a.P99 - micro(PromisedP99); over > 0 {
		said = append(said, fmt.Sprintf("%s: p99 is %s over the promised 5 ms; of its %s the processor worked %s (noise: p99 %s)",
			a.Name, ms(over), ms(a.P99), ms(a.CPU99), ms(noise.P99)))
	}
	if over := a.Max - micro(PromisedMax); over > 0 {
		said = append(said, fmt.Sprintf("%s: the maximum is %s over the promised 50 ms; of its %s the processor worked %s at most (noise: maximum %s)",
			a.Name, ms(over), ms(a.Max), ms(a.CPUMax), ms(noise.Max)))
	}
	return said
}

func micro(d time.Duration) float64 { return float64(d) / 1e3 }

func ms(us float64) string { return fmt.Sprintf("%.1f ms", us/1e3) }

// trivial is the command that is measured. argv[0] is its own name also behind the
// shim: a busybox acts by it.
func trivial(command []string) (Way, error) {
	if len(command) == 0 {
		for _, path := range []string{"/bin/true", "/usr/bin/true"} {
			if _, err := os.Stat(path); err == nil {
				return Way{"alone", path, []string{"true", "build", "-t", "app:1", "--build-arg", "A=1", "."}}, nil
			}
		}
		return Way{"alone", "/bin/sh", []string{"sh", "-c", ":"}}, nil
	}
	path, err := exec.LookPath(command[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return Way{}, fmt.Errorf("find the command to measure: %w", err)
	}
	return Way{"alone", path, command}, nil
}

// ways lays out what is measured beside the command alone.
func (r *rig) ways(ctx context.Context, plain Way) (ways []Way, notes []string, err error) {
	shell, err := r.newPlace(plain.Path)
	if err != nil {
		return nil, nil, err
	}
	wrapper := filepath.Join(shell.dir, "wrapper.sh")
	script := fmt.Sprintf("#!%s\necho \"$(date) $GITHUB_REPOSITORY docker $*\" >> %s/shell.log\nexec %s \"$@\"\n", r.sh, shell.run, plain.Path)
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		return nil, nil, err
	}
	ways = []Way{{wayNoise, plain.Path, plain.Args}, {wayShell, wrapper, plain.Args}}
	for _, name := range []string{wayAgent, wayFile, wayOff} {
		p, err := r.newPlace(plain.Path)
		if err != nil {
			return nil, nil, err
		}
		switch name {
		case wayAgent:
			_, err = p.agent(ctx)
		case wayOff:
			err = os.WriteFile(filepath.Join(p.run, "off"), nil, 0o644)
		}
		if err != nil {
			return nil, nil, err
		}
		ways = append(ways, Way{name, p.docker, plain.Args})
	}
	if r.off != "" {
		notes = append(notes, r.off+": the shim records nothing on this machine, and all its lines are those of the switched-off one")
	}
	return ways, notes, nil
}

// Sample are the raw times of a measurement in microseconds, one a round.
type Sample struct {
	Plain, PlainCPU []float64
	Added, AddedCPU [][]float64 // by way; differences to the plain command of the same round
}

// Interleave measures ways beside the plain command, as Method says, for at most
// duration or rounds, whichever ends first, but ten rounds at least. The exit code of
// a command does not matter; it is an error where one cannot be started.
func Interleave(ctx context.Context, plain Way, ways []Way, duration time.Duration, rounds int) (Sample, error) {
	const warmUp, least = 5, 10
	all := append([]Way{plain}, ways...)
	s := Sample{Added: make([][]float64, len(ways)), AddedCPU: make([][]float64, len(ways))}
	times, cpu := make([]float64, len(all)), make([]float64, len(all))
	start := time.Now()
	for round := 0; len(s.Plain) < rounds && (len(s.Plain) < least || time.Since(start) < duration); round++ {
		for i := range all {
			k := (i + round) % len(all)
			cmd := exec.CommandContext(ctx, all[k].Path)
			cmd.Args = all[k].Args
			began := time.Now()
			err := cmd.Run()
			times[k] = micro(time.Since(began))
			if ctx.Err() != nil {
				return s, ctx.Err()
			}
			if cmd.ProcessState == nil {
				return s, fmt.Errorf("%s: %w", all[k].Name, err)
			}
			cpu[k] = micro(cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime())
		}
		if round < warmUp {
			continue
		}
		s.Plain, s.PlainCPU = append(s.Plain, times[0]), append(s.PlainCPU, cpu[0])
		for i := range ways {
			s.Added[i] = append(s.Added[i], times[i+1]-times[0])
			s.AddedCPU[i] = append(s.AddedCPU[i], cpu[i+1]-cpu[0])
		}
	}
	return s, nil
}

// Summarise makes the figures of times and processor times in microseconds.
func Summarise(name string, times, cpu []float64) Added {
	a := Added{Name: name}
	a.P50, a.P99, a.Max = quantiles(times)
	a.CPU50, a.CPU99, a.CPUMax = quantiles(cpu)
	return a
}

func quantiles(xs []float64) (p50, p99, max float64) {
	if len(xs) == 0 {
		return 0, 0, 0
	}
	sorted := slices.Sorted(slices.Values(xs))
	at := func(q float64) float64 { return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)] }
	return at(0.5), at(0.99), at(1)
}
