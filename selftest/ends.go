package selftest

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/record"
)

// Ends says what this kernel tells of the end of a command that is not our child.
type Ends struct {
	// Rung is the way in which the ends of real commands were seen: pidfd_info (exit code
	// and duration), pidfd_poll (duration), socket_eof (an upper bound of the duration),
	// unknown.
	Rung     string `json:"rung"`
	ExitCode bool   `json:"exit_code"` // true exit codes and signals
	Duration bool   `json:"duration"`
	Detail   string `json:"detail"`
}

// The rungs of the ladder, from the top.
var rungs = []struct{ name, gives, wants string }{
	{"pidfd_info", "exit code and duration", "Linux 6.15 and the agent in the shim's pid namespace"},
	{"pidfd_poll", "duration, no exit code", "Linux 5.3 (6.5 for an agent in another pid namespace)"},
	{"socket_eof", "an upper bound of the duration, no exit code", "any Linux"},
	{"unknown", "neither", ""},
}

// ends runs commands with known ends through the shim and looks at what the agent
// wrote of them.
func (r *rig) ends(ctx context.Context) (Ends, Check) {
	c := Check{ID: "ends", Injected: "commands that exit with 0, 37 and 255, and one that a signal ends", Promised: "the agent records each true end, or says unknown"}
	e := Ends{Rung: "unknown"}
	c.run(func() (string, error) {
		if r.off != "" {
			return "", cannot("%s", r.off)
		}
		p, err := r.newPlace("")
		if err != nil {
			return "", err
		}
		a, err := p.agent(ctx)
		if err != nil {
			return "", err
		}
		defer a.stop()
		want := map[int]outcome{}
		for _, script := range []string{"exit 0", "exit 37", "exit 255", "kill -TERM $$"} {
			o, err := r.do(ctx, call{path: p.docker, args: []string{"sh", "-c", "sleep 0.05; " + script}})
			if err != nil {
				return "", err
			}
			want[o.pid] = o
		}
		var ended map[int]*record.End
		if err := wait(ctx, func() error {
			ended, err = endsByPID(p)
			if err == nil && len(ended) < len(want) {
				err = fmt.Errorf("the journal has the ends of %d of %d commands", len(ended), len(want))
			}
			return err
		}); err != nil {
			return "", err
		}
		for pid, o := range want {
			end := ended[pid]
			e.Rung = end.Source
			known := end.ExitCode != nil || end.Signal != 0
			e.ExitCode = e.ExitCode || known
			if known && (end.Signal != 0) != o.status.Signaled() ||
				end.ExitCode != nil && int(*end.ExitCode) != o.status.ExitStatus() ||
				end.Signal != 0 && int(end.Signal) != int(o.status.Signal()) {
				return "", fmt.Errorf("a command ended with %s, and the record says exit code %v, signal %d", o, end.ExitCode, end.Signal)
			}
			if d := time.Duration(end.DurationNS); end.Source != "unknown" && (d < 50*time.Millisecond || d > o.took+patience) {
				return "", fmt.Errorf("a command that took %v is recorded with %v", o.took, d)
			}
			e.Duration = e.Duration || end.DurationNS > 0
		}
		for _, rung := range rungs {
			if rung.name == e.Rung {
				e.Detail = rung.gives
			}
		}
		return fmt.Sprintf("4 of 4 by %s: %s", e.Rung, e.Detail), nil
	})
	if e.Detail == "" {
		e.Detail = c.Detail
	}
	return e, c
}

// endsByPID pairs the ends in the journal with the processes of their invocations.
func endsByPID(p *place) (map[int]*record.End, error) {
	all, err := p.journaled()
	if err != nil {
		return nil, err
	}
	pids, ends := map[string]int{}, map[int]*record.End{}
	for _, rec := range all {
		if rec.Invocation != nil {
			pids[rec.ID] = int(rec.Invocation.PID)
		}
	}
	for _, rec := range all {
		if rec.End == nil {
			continue
		}
		if pid, ok := pids[rec.End.InvocationID]; ok {
			ends[pid] = rec.End
		}
	}
	return ends, nil
}

// degraded lists what this machine does not give, and why.
func (r *rig) degraded(e Ends) (all []Degraded) {
	add := func(what, why string, args ...any) { all = append(all, Degraded{what, fmt.Sprintf(why, args...)}) }
	if r.off != "" {
		add("everything", "%s: nothing is recorded on this machine, so no record could be looked at", r.off)
	}
	for i, rung := range rungs {
		if rung.name == e.Rung && i > 0 && r.off == "" {
			add(rungs[i-1].gives, "seen only on %s; here ends are seen by %s (%s)", rungs[i-1].wants, rung.name, rung.gives)
		}
	}
	if err := openat2(); err != nil {
		add("links in the middle of the spool's path are not refused", "openat2: %v (Linux 5.6, or a seccomp profile forbids it); the last part is checked all the same", err)
	}
	if err := unix.Access("/proc/self/exe", unix.F_OK); err != nil {
		add("the shim finds itself by the path it was called by", "/proc: %v", err)
	}
	if runDir := r.o.RunDir; runDir != "" {
		var st unix.Statfs_t
		switch err := unix.Statfs(runDir, &st); {
		case err != nil:
			add("it is not known what file system the installation's run folder will be on", "%s: %v (the job-started hook or the agent makes it)", runDir, err)
		case fsType(runDir) == "tmpfs":
		case r.o.SpoolOnDisk:
			add("a disk that freezes or stalls holds commands up while no agent runs", "run_dir %s is on %s, not on tmpfs, and spool_on_disk is set", runDir, fsType(runDir))
		default:
			add("calls while no agent runs are counted, but not recorded", "run_dir %s is on %s, not on tmpfs, and spool_on_disk is not set", runDir, fsType(runDir))
		}
	}
	return all
}

// openat2 tells whether the shim can refuse symbolic links in the whole of a path.
func openat2() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return err
	}
	return unix.Close(fd)
}
