package selftest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/probe"
)

// Transparency is what a program sees, directly and through the shim.
type Transparency struct {
	Ways        []string     `json:"ways"`       // of starting that were compared
	Properties  int          `json:"properties"` // compared in all ways together
	Differences []Difference `json:"differences"`
}

// Difference is one property that is not the same.
type Difference struct {
	Way string `json:"way"`
	probe.Difference
	// Reason says why a difference is to be expected; "" where it is a defect.
	Reason string `json:"reason,omitempty"`
}

// usualRuntime is why a shim built without internal/leanbuild changes two things.
const usualRuntime = "this shim was built with Go's usual runtime, which does that before main; build it with internal/leanbuild (make build)"

// start is one way of starting a program.
type start struct {
	name   string
	argv0  string
	args   []string
	env    []string
	launch string // set by launch before the program is started
	attr   syscall.SysProcAttr
	files  func(dir string) ([]*os.File, error) // descriptors from 0 on; nil gives /dev/null
}

// starts are compared with the probe as the real tool. A Go program cannot see all:
// see shellStarts.
func starts() []start {
	all := []start{
		{name: "plain", argv0: "docker", args: []string{"ps"}},
		{name: "odd arguments and argv[0]", argv0: "odd name", args: []string{"run", "-it", "", "a b", "\xff\xfe", "*", "--", "--help", "\n"}},
		{name: "odd environment", argv0: "docker", env: []string{"A=1", "A=2", "EMPTY=", "NOEQUALS", "", "BIN=\xff", "=x", "GODEBUG=x=1"}},
		{name: "no environment", argv0: "docker", env: []string{}},
		{name: "1.5 MB of arguments", argv0: "docker", args: strings.Split(strings.Repeat(strings.Repeat("x", 100_000)+" ", 15), " ")},
		{name: "umask, limits, nice, affinity, timer slack, no_new_privs", argv0: "docker", launch: "attributes"},
		{name: "a working folder that is gone", argv0: "docker", launch: "gone", files: goneFolder},
		{name: "a session of its own", argv0: "docker", attr: syscall.SysProcAttr{Setsid: true}},
		{name: "a process group of its own", argv0: "docker", attr: syscall.SysProcAttr{Setpgid: true}},
		{name: "parent-death signal", argv0: "docker", attr: syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}},
		{name: "open descriptors", argv0: "docker", files: openDescriptors},
		{name: "a terminal", argv0: "docker", attr: syscall.SysProcAttr{Setsid: true, Setctty: true}, files: terminal},
	}
	return all
}

// openDescriptors leaves 3 and 5 closed, and has a file in the middle of reading at 6.
func openDescriptors(dir string) ([]*os.File, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "open")
	if err := os.WriteFile(path, make([]byte, 100), 0o644); err != nil {
		return nil, err
	}
	file, err := os.Open(path)
	if err == nil {
		_, err = file.Seek(42, 0)
	}
	return []*os.File{null, null, null, nil, null, nil, file}, err
}

// goneFolder has a removed folder at 3.
func goneFolder(dir string) ([]*os.File, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	gone := filepath.Join(dir, "gone")
	if err := os.Mkdir(gone, 0o755); err != nil {
		return []*os.File{null}, err
	}
	folder, err := os.Open(gone)
	return []*os.File{null, null, null, folder}, errors.Join(err, os.Remove(gone))
}

// terminal is a new pseudo terminal; its other side is the last file, which the probe
// does not get.
func terminal(string) ([]*os.File, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, impossible{"no pseudo terminal: " + err.Error()}
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	var slave *os.File
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, impossible{"no pseudo terminal: " + err.Error()}
	}
	return []*os.File{slave, slave, slave, master}, nil
}

// shellStarts print what only a shell can see: Go programs, docker too, change it
// before their main.
var shellStarts = []struct {
	name, property string
	launch, script string
	reason         string
}{
	{"ignored and blocked signals", "SigBlk and SigIgn", `trap '' HUP PIPE USR1 TERM XFSZ; exec "$0" "$@"`,
		`while read -r key value; do case $key in SigIgn:|SigBlk:) echo "$key $value";; esac; done < /proc/$$/status`, usualRuntime},
	{"standard descriptors closed in each of 8 ways", "which of 0, 1, 2 are open", `for mask in 0 1 2 3 4 5 6 7; do
 out=$OUT/$mask
 case $mask in
 0) "$0" "$@" "$out" ;; 1) "$0" "$@" "$out" <&- ;; 2) "$0" "$@" "$out" >&- ;; 3) "$0" "$@" "$out" <&- >&- ;;
 4) "$0" "$@" "$out" 2>&- ;; 5) "$0" "$@" "$out" <&- 2>&- ;; 6) "$0" "$@" "$out" >&- 2>&- ;; 7) "$0" "$@" "$out" <&- >&- 2>&- ;;
 esac; done; for mask in 0 1 2 3 4 5 6 7; do read -r line < "$OUT/$mask"; echo "$line"; done`,
		`seen=; for fd in 0 1 2; do if [ -e /proc/$$/fd/$fd ]; then seen="$seen $fd"; fi; done; echo "open:$seen" > "$1"`, usualRuntime},
}

// transparency makes the table.
func (r *rig) transparency(ctx context.Context) (Transparency, Check) {
	t := Transparency{Ways: []string{}, Differences: []Difference{}}
	c := Check{ID: "transparency", Injected: "a probe, started in many ways, directly and through the shim", Promised: "it sees the same: SH-31, SH-40, SH-41, SH-42 and more"}
	c.run(func() (string, error) {
		p, err := r.newPlace(r.tallyman)
		if err != nil {
			return "", err
		}
		var left []string
		for _, s := range starts() {
			direct, through, err := r.both(ctx, p, s)
			var no impossible
			if errors.As(err, &no) {
				left = append(left, s.name+": "+no.why)
				continue
			}
			if err != nil {
				return "", fmt.Errorf("%s: %w", s.name, err)
			}
			t.Ways = append(t.Ways, s.name)
			t.Properties += len(direct)
			for _, d := range probe.Compare(direct, through) {
				t.Differences = append(t.Differences, Difference{s.name, d, ""})
			}
		}
		if err := r.shellTransparency(ctx, &t); err != nil {
			return "", err
		}
		defects := 0
		for _, d := range t.Differences {
			if d.Reason == "" {
				defects++
			}
		}
		detail := fmt.Sprintf("%d properties in %d ways, %d differences", t.Properties, len(t.Ways), len(t.Differences))
		if len(left) > 0 {
			detail += "; not possible here: " + strings.Join(left, "; ")
		}
		if defects > 0 {
			return "", fmt.Errorf("%s, %d of them without a reason", detail, defects)
		}
		return detail, nil
	})
	return t, c
}

func (r *rig) shellTransparency(ctx context.Context, t *Transparency) error {
	p, err := r.newPlace("")
	if err != nil {
		return err
	}
	for _, s := range shellStarts {
		see := func(path string) (string, error) {
			o, err := r.do(ctx, call{path: r.sh, args: []string{"sh", "-c", s.launch, path, "-c", s.script, "sh"}, env: []string{"OUT=" + p.dir}})
			if err == nil && (o.status != 0 || o.stdout == "") {
				err = fmt.Errorf("%s: %s", s.name, o)
			}
			return strings.TrimSpace(o.stdout), err
		}
		direct, err := see(p.real)
		if err != nil {
			return err
		}
		through, err := see(p.docker)
		if err != nil {
			through = err.Error()
		}
		t.Ways = append(t.Ways, s.name)
		t.Properties += strings.Count(direct, "\n") + 1
		if through != direct {
			reason := s.reason
			if err != nil {
				reason = ""
			}
			t.Differences = append(t.Differences, Difference{s.name, probe.Difference{Name: s.property, Direct: direct, Through: through}, reason})
		}
	}
	return nil
}

// both starts the probe directly and through the shim, with the same descriptors.
func (r *rig) both(ctx context.Context, p *place, s start) (direct, through probe.State, err error) {
	open := s.files
	if open == nil {
		open = func(string) ([]*os.File, error) {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			return []*os.File{null, null, null}, err
		}
	}
	files, err := open(p.dir)
	defer func() {
		for _, f := range files {
			if f != nil {
				f.Close() // some stand there more than once
			}
		}
	}()
	if err != nil {
		return nil, nil, err
	}
	if s.attr.Setctty {
		files = files[:3:3]
	}
	if direct, err = r.see(ctx, p, p.real, s, files); err == nil {
		through, err = r.see(ctx, p, p.docker, s, files)
	}
	return direct, through, err
}

// see starts the probe by path and returns what it saw. Not by os/exec, which drops
// repeated variables.
func (r *rig) see(ctx context.Context, p *place, path string, s start, files []*os.File) (probe.State, error) {
	out := filepath.Join(p.dir, "seen")
	os.Remove(out)
	argv := append(append([]string{s.argv0}, r.o.Probe...), append([]string{"state", out}, s.args...)...)
	program := path
	if s.launch != "" {
		argv = append(append([]string{"launcher"}, r.o.Probe...), append([]string{"launch", s.launch, path}, argv...)...)
		program = r.tallyman
	}
	attr := &os.ProcAttr{Dir: p.dir, Env: s.env, Sys: &s.attr, Files: files}
	if s.env == nil {
		attr.Env = r.env
	}
	// The signal at the parent's death belongs to this thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	process, err := os.StartProcess(program, argv, attr)
	if errors.Is(err, syscall.E2BIG) {
		return nil, impossible{err.Error()}
	}
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { process.Kill() })
	defer stop()
	late := time.AfterFunc(hang(), func() { process.Kill() })
	defer late.Stop()
	state, err := process.Wait()
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	b, err := os.ReadFile(out)
	if err != nil || state.ExitCode() != 0 {
		return nil, fmt.Errorf("the probe at %s: %v, no state", path, state)
	}
	var seen probe.State
	if err := json.Unmarshal(b, &seen); err != nil {
		return nil, fmt.Errorf("the probe at %s: %w", path, err)
	}
	return seen, nil
}

// ProbeMain is this program in the place of the real tool. It must be called first in
// main. It returns the exit code.
func ProbeMain(args []string) int {
	runtime.LockOSThread() // what follows belongs to threads
	var err error
	switch {
	case len(args) >= 2 && args[0] == "exit":
		code, _ := strconv.Atoi(args[1])
		return code
	case len(args) >= 2 && args[0] == "state":
		var b []byte
		if b, err = json.Marshal(probe.Collect()); err == nil {
			err = os.WriteFile(args[1], b, 0o644)
		}
	case len(args) >= 3 && args[0] == "launch":
		err = launch(args[1], args[2], args[3:])
	default:
		err = errors.New("this command is for tallyman selftest")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tallyman:", err)
		return 1
	}
	return 0
}

// launch changes this process and becomes the program at path.
func launch(what, path string, argv []string) error {
	switch what {
	case "attributes":
		syscall.Umask(0o137)
		// What a machine does not allow is not changed, and so the same on both sides.
		unix.Setpriority(unix.PRIO_PROCESS, 0, 7)
		unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		unix.Prctl(unix.PR_SET_TIMERSLACK, 123456, 0, 0, 0)
		var allowed unix.CPUSet
		if unix.SchedGetaffinity(0, &allowed) == nil {
			for cpu := range 1024 {
				if allowed.IsSet(cpu) {
					var one unix.CPUSet
					one.Set(cpu)
					unix.SchedSetaffinity(0, &one)
					break
				}
			}
		}
		for resource, max := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: 123, unix.RLIMIT_FSIZE: 100 << 20} {
			var now syscall.Rlimit
			if syscall.Getrlimit(resource, &now) == nil {
				now.Cur = min(max, now.Max)
				syscall.Setrlimit(resource, &now)
			}
		}
	case "gone":
		if err := unix.Fchdir(3); err != nil {
			return err
		}
		unix.CloseOnExec(3)
	}
	return syscall.Exec(path, argv, os.Environ())
}
