// Command shimbench measures what the shim adds to a command, beside what the usual
// shell wrapper adds:
//
//	#!/bin/sh
//	echo "$(date) $GITHUB_REPOSITORY docker $*" >> log
//	exec docker.original "$@"
//
// Method: one run takes the command alone, through the shell wrapper and through the
// shim in each of its modes, one after the other, in an order that rotates; each start
// is timed from fork to wait. Added time is the paired difference to the command alone
// of the same round. A machine that is busy slows all of a round's members alike, so
// the ratio of the medians is steadier than any of the times.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

func main() {
	shim := flag.String("shim", "bin/docker-shim", "the shim")
	tallyman := flag.String("tallyman", "bin/tallyman", "the agent's binary")
	rounds := flag.Int("rounds", 500, "rounds per command")
	flag.Parse()
	if err := run(os.Stdout, *shim, *tallyman, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "shimbench:", err)
		os.Exit(1)
	}
}

// way is one way to start the command.
type way struct {
	name  string
	path  string
	added []float64 // microseconds, one a round
}

func run(w io.Writer, shim, tallyman string, rounds int) error {
	// On tmpfs, as an installation's run folder is.
	dir, err := os.MkdirTemp("/dev/shm", "shimbench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	commands := []struct {
		name, real string
		args       []string
	}{{"true", "/bin/true", []string{"build", "-t", "app:1", "--build-arg", "A=1", "."}}}
	if docker, err := exec.LookPath("docker"); err == nil {
		commands = append(commands, struct {
			name, real string
			args       []string
		}{"docker --version", docker, []string{"--version"}})
	}
	for i, c := range commands {
		sub := filepath.Join(dir, fmt.Sprint(i))
		alone, ways, stop, err := prepare(sub, c.real, shim, tallyman)
		if err != nil {
			return err
		}
		err = measure(alone, ways, c.args, rounds)
		stop()
		if err != nil {
			return err
		}
		print(w, c.name, rounds, ways)
	}
	return nil
}

// prepare lays out the wrappers of one real command and starts the agents.
func prepare(dir, real, shim, tallyman string) (alone string, ways []*way, stop func(), err error) {
	var agents []*exec.Cmd
	kill := func() {
		for _, a := range agents {
			a.Process.Kill()
			a.Wait()
		}
	}
	stop = kill
	defer func() {
		if err != nil {
			kill()
		}
	}()
	real, err = filepath.EvalSymlinks(real)
	if err != nil {
		return "", nil, nil, err
	}
	install := func(name, config string) (string, error) {
		bin := filepath.Join(dir, name)
		if err := os.MkdirAll(bin, 0o755); err != nil {
			return "", err
		}
		data, err := os.ReadFile(shim)
		if err != nil {
			return "", fmt.Errorf("%w: run `make build` first", err)
		}
		path := filepath.Join(bin, "docker")
		return path, errorsJoin(os.WriteFile(path, data, 0o755), os.Symlink(real, path+".original"),
			os.WriteFile(filepath.Join(bin, "tallyman.conf"), []byte(config), 0o644))
	}
	shell := filepath.Join(dir, "shell.sh")
	if err = os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, nil, err
	}
	script := fmt.Sprintf("#!/bin/sh\necho \"$(date) $GITHUB_REPOSITORY docker $*\" >> %s/shell.log\nexec %s \"$@\"\n", dir, real)
	if err = os.WriteFile(shell, []byte(script), 0o755); err != nil {
		return "", nil, nil, err
	}
	ways = []*way{{name: "shell wrapper", path: shell}}
	for _, m := range []struct{ name, run string }{
		{"shim, agent answers", "agent"},
		{"shim, append file", "file"},
		{"shim, switched off", "off"},
	} {
		run := filepath.Join(dir, "run-"+m.run)
		config := fmt.Sprintf("run_dir = %s\nstate_dir = %s/state-%s\nstatsd = off\n", run, dir, m.run)
		path, err := install("bin-"+m.run, config)
		if err != nil {
			return "", nil, nil, err
		}
		if err := os.MkdirAll(filepath.Join(run, "spool"), 0o733); err != nil {
			return "", nil, nil, err
		}
		switch m.run {
		case "off":
			err = os.WriteFile(filepath.Join(run, "off"), nil, 0o644)
		case "agent":
			agent := exec.Command(tallyman, "agent", "--no-events", "--config", filepath.Join(filepath.Dir(path), "tallyman.conf"))
			agent.Stderr = os.Stderr
			if err = agent.Start(); err == nil {
				agents = append(agents, agent)
				err = waitFor(filepath.Join(run, "agent.sock"))
			}
		}
		if err != nil {
			return "", nil, nil, err
		}
		ways = append(ways, &way{name: m.name, path: path})
	}
	return real, ways, stop, nil
}

func errorsJoin(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func waitFor(path string) error {
	for range 500 {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("no %s after 5 s", path)
}

func measure(alone string, ways []*way, args []string, rounds int) error {
	one := func(path string) (float64, error) {
		cmd := exec.Command(path, args...)
		start := time.Now()
		err := cmd.Run()
		return float64(time.Since(start)) / 1e3, err
	}
	const warmUp = 20
	for round := range rounds + warmUp {
		times := make([]float64, len(ways)+1)
		for i := range times {
			k := (i + round) % len(times)
			path := alone
			if k > 0 {
				path = ways[k-1].path
			}
			t, err := one(path)
			if err != nil {
				return fmt.Errorf("%s %s: %w", path, strings.Join(args, " "), err)
			}
			times[k] = t
		}
		if round >= warmUp {
			for k, w := range ways {
				w.added = append(w.added, times[k+1]-times[0])
			}
		}
	}
	return nil
}

func print(w io.Writer, name string, rounds int, ways []*way) {
	shell := quantile(ways[0].added, 0.5)
	fmt.Fprintf(w, "%s: added to the command alone, %d interleaved rounds, microseconds\n", name, rounds)
	var table bytes.Buffer
	t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "p50\tp90\tp99\tratio of p50 to the shell wrapper's\t ")
	for _, x := range ways {
		p50 := quantile(x.added, 0.5)
		fmt.Fprintf(t, "%.0f\t%.0f\t%.0f\t%.2f\t  %s\n", p50, quantile(x.added, 0.9), quantile(x.added, 0.99), p50/shell, x.name)
	}
	t.Flush()
	io.Copy(w, &table)
	fmt.Fprintln(w)
}

func quantile(xs []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(xs))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}
