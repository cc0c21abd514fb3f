package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/record"
)

// hookCases call this program as the two hooks of a job that does not exist, in an
// installation of its own.
var hookCases = []fault{
	{"HK-01", "state folder, run folder and configuration are unusable, one after the other", "exit 0 each time", hookFailures},
	{"HK-03", "the Docker daemon's socket hangs", "the hook does not wait for it (promised: 500 ms)", hookHangs},
	{"HK-04", "the hook starts the agent", "nothing holds the hook's output open", hookOutput},
	{"HK-05", "RUNNER_TRACKING_ID and secrets are in the hook's environment", "they are not in the agent's", hookEnvironment},
	{"HK-06", "the hook runs twice for one job", "one job.start record, one agent", hookTwice},
	{"HK-13", "GITHUB_ENV, GITHUB_PATH, GITHUB_OUTPUT and GITHUB_STATE are there", "no hook writes to them", hookFiles},
	{"HK-15", "workflow commands in every variable, and a hook that has to complain", "one plain line at most, which is no workflow command", hookCommands},
}

// hookJob is a place with a job's environment.
type hookJob struct {
	*place
	env []string
}

func (r *rig) newJob(lines ...string) (*hookJob, error) {
	p, err := r.newPlace("", lines...)
	if err != nil {
		return nil, err
	}
	j := &hookJob{place: p}
	j.env = []string{"TALLYMAN_CONFIG=" + p.conf, "GITHUB_REPOSITORY=selftest/selftest", "GITHUB_RUN_ID=42", "GITHUB_RUN_ATTEMPT=1", "GITHUB_JOB=selftest",
		"GITHUB_WORKFLOW=selftest", "GITHUB_ACTION=__run", "RUNNER_NAME=selftest", "RUNNER_TRACKING_ID=selftest_" + filepath.Base(p.dir), "GITHUB_WORKSPACE=" + p.dir,
		// No daemon is asked for its events.
		"DOCKER_HOST=unix://" + filepath.Join(p.dir, "no-daemon.sock")}
	for _, name := range []string{"ENV", "PATH", "OUTPUT", "STATE", "STEP_SUMMARY"} {
		file := filepath.Join(p.dir, "github_"+strings.ToLower(name))
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			return nil, err
		}
		j.env = append(j.env, "GITHUB_"+name+"="+file)
	}
	return j, nil
}

// hook runs one of the hooks, which must exit 0 with one line at most.
func (j *hookJob) hook(ctx context.Context, name string, env ...string) (outcome, error) {
	o, err := j.r.do(ctx, call{path: j.r.tallyman, args: []string{"tallyman", "hook", name}, env: append(j.env[:len(j.env):len(j.env)], env...), dir: "/"})
	if err == nil && o.status != 0 {
		err = fmt.Errorf("%s: %s", name, o)
	}
	if out := o.stdout + o.stderr; err == nil && (strings.Count(out, "\n") > 1 || strings.Contains(out, "::") || out != "" && !strings.HasPrefix(out, "tallyman: ")) {
		err = fmt.Errorf("%s wrote %s", name, short(out))
	}
	return o, err
}

// start calls job-started until its agent answers, and returns the agent's process. On a
// machine so busy that the hook's time is up before its worker runs, no agent comes: that
// is the hook's bound, and the runner's next hook tries again.
func (j *hookJob) start(ctx context.Context, env ...string) (o outcome, pid int, err error) {
	for range 4 {
		if o, err = j.hook(ctx, "job-started", env...); err != nil {
			return o, 0, err
		}
		limited, cancel := context.WithTimeout(ctx, patience/4)
		pid, err = j.pid(limited)
		cancel()
		if err == nil || ctx.Err() != nil {
			return o, pid, err
		}
	}
	return o, 0, err
}

// pid asks the agent for its process.
func (j *hookJob) pid(ctx context.Context) (pid int, err error) {
	var last error
	err = wait(ctx, func() error {
		limited, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		client, err := agent.Dial(limited, filepath.Join(j.run, "agent.sock"))
		if err == nil {
			defer client.Close()
			var s agent.Status
			s, err = client.Status(limited)
			pid = s.PID
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		return err
	})
	if err != nil && last != nil {
		err = fmt.Errorf("the agent that the hook starts: %w", last)
	}
	return pid, err
}

// end closes the job and waits until the agent is gone: it was started detached, so it
// is nobody's child.
func (j *hookJob) end() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		left := j.agents()
		if len(left) == 0 || ctx.Err() != nil {
			break
		}
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGTERM)
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, pid := range j.agents() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// agents are the processes that were started with the configuration of this place.
func (j *hookJob) agents() (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && bytes.Contains(b, []byte("\x00"+j.state+"\x00")) {
			var pid int
			if _, err := fmt.Sscanf(name, "/proc/%d/", &pid); err == nil && pid != os.Getpid() {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func hookFailures(ctx context.Context, r *rig) (string, error) {
	tried := 0
	for name, spoil := range map[string]func(*hookJob) error{
		"the state folder is a file": func(j *hookJob) error { return errors.Join(os.RemoveAll(j.state), os.WriteFile(j.state, nil, 0o644)) },
		"the run folder is a file":   func(j *hookJob) error { return errors.Join(os.RemoveAll(j.run), os.WriteFile(j.run, nil, 0o644)) },
		"the configuration is garbage": func(j *hookJob) error {
			return os.WriteFile(j.conf, []byte("\x00\xff===\n[run]\nrun_dir\n= x\nrun_dir = "+j.run+"\nstate_dir = "+j.state+"\nstatsd = off\n"), 0o644)
		},
		"the configuration is not there": func(j *hookJob) error {
			// The folders come from the environment then, not from an installed configuration.
			j.env = append(j.env, "TALLYMAN_RUN_DIR="+j.run, "TALLYMAN_STATE_DIR="+j.state)
			return os.Remove(j.conf)
		},
		"the configuration is anybody's": func(j *hookJob) error {
			j.env = append(j.env, "TALLYMAN_RUN_DIR="+j.run, "TALLYMAN_STATE_DIR="+j.state)
			return os.Chmod(j.conf, 0o666)
		},
	} {
		j, err := r.newJob()
		if err != nil {
			return "", err
		}
		defer j.end()
		if err := spoil(j); err != nil {
			return "", err
		}
		for _, hook := range []string{"job-started", "job-completed"} {
			o, err := r.do(ctx, call{path: r.tallyman, args: []string{"tallyman", "hook", hook}, env: j.env, dir: "/"})
			if err == nil && o.status != 0 {
				err = errors.New(o.String())
			}
			if err != nil {
				return "", fmt.Errorf("%s: %s: %w", name, hook, err)
			}
			tried++
		}
	}
	return fmt.Sprintf("exit 0 in %d of %d", tried, tried), nil
}

func hookHangs(ctx context.Context, r *rig) (string, error) {
	j, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer j.end()
	socket := filepath.Join(filepath.Dir(j.run), "d.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return "", err
	}
	defer l.Close() // it accepts nothing: the kernel's queue does
	o, err := j.hook(ctx, "job-started", "DOCKER_HOST=unix://"+socket)
	return fmt.Sprintf("exit 0 after %d ms", o.took.Milliseconds()), err
}

func hookOutput(ctx context.Context, r *rig) (string, error) {
	if r.off != "" {
		return "", cannot("%s", r.off)
	}
	j, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer j.end()
	// call's output is a pipe, and its end comes only when nobody holds it any more:
	// os/exec says so where it had to give up waiting.
	o, pid, err := j.start(ctx)
	if err != nil {
		return "", err
	}
	for fd := range 3 {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err == nil && link != os.DevNull {
			return "", fmt.Errorf("descriptor %d of the agent is %s", fd, link)
		}
	}
	return fmt.Sprintf("the hook and its output ended after %d ms, the agent runs on", o.took.Milliseconds()), nil
}

func hookEnvironment(ctx context.Context, r *rig) (string, error) {
	if r.off != "" {
		return "", cannot("%s", r.off)
	}
	j, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer j.end()
	secret, forms := canary()
	_, pid, err := j.start(ctx, "GITHUB_TOKEN="+secret, "DD_API_KEY="+secret, "TALLYMAN_TOKEN="+secret, "ACTIONS_RUNTIME_TOKEN="+secret, "X="+secret)
	if err != nil {
		return "", err
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", cannot("%v", err)
	}
	if bytes.Contains(env, []byte("RUNNER_TRACKING_ID")) || contains(env, forms) {
		return "", errors.New("the agent's environment has RUNNER_TRACKING_ID or a secret")
	}
	return "neither is there", nil
}

func hookTwice(ctx context.Context, r *rig) (string, error) {
	if r.off != "" {
		return "", cannot("%s", r.off)
	}
	j, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer j.end()
	var pids [2]int
	for i := range pids {
		if _, pids[i], err = j.start(ctx); err != nil {
			return "", err
		}
	}
	if pids[0] != pids[1] {
		return "", errors.New("a second agent took over")
	}
	if _, err := j.hook(ctx, "job-completed"); err != nil {
		return "", err
	}
	return "one record, one agent", wait(ctx, func() error {
		all, err := j.journaled()
		ids, ends := map[string]bool{}, 0
		for _, rec := range all {
			switch rec.Kind {
			case record.KindJobStart:
				ids[rec.ID] = true
			case record.KindJobEnd:
				ends++
			}
		}
		if err == nil && len(ids) > 1 {
			return fatal{fmt.Errorf("%d different job.start records", len(ids))}
		}
		if err == nil && (len(ids) != 1 || ends == 0) {
			err = fmt.Errorf("%d job.start records, %d job.end", len(ids), ends)
		}
		return err
	})
}

func hookFiles(ctx context.Context, r *rig) (string, error) {
	j, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer j.end()
	for _, hook := range []string{"job-started", "job-completed"} {
		if _, err := j.hook(ctx, hook); err != nil {
			return "", err
		}
		for _, name := range []string{"env", "path", "output", "state"} {
			b, err := os.ReadFile(filepath.Join(j.dir, "github_"+name))
			if err != nil || len(b) > 0 {
				return "", errors.Join(err, fmt.Errorf("%s wrote %s to GITHUB_%s", hook, short(string(b)), strings.ToUpper(name)))
			}
		}
	}
	return "all four files are empty", nil
}

func hookCommands(ctx context.Context, r *rig) (string, error) {
	j, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer j.end()
	const nasty = "x\n::set-output name=a::b\n::add-mask::y\r::error::z"
	env := []string{"GITHUB_WORKFLOW=" + nasty, "GITHUB_JOB=" + nasty, "GITHUB_REPOSITORY=" + nasty, "GITHUB_REF=" + nasty, "RUNNER_NAME=" + nasty, "GITHUB_ACTOR=" + nasty}
	for _, hook := range []string{"job-started", "job-completed"} {
		if _, err := j.hook(ctx, hook, env...); err != nil {
			return "", err
		}
	}
	// And where it has something to say: the state folder is a file with such a name.
	bad, err := r.newJob()
	if err != nil {
		return "", err
	}
	defer bad.end()
	file := filepath.Join(bad.dir, "::set-output name=a::b")
	if err := errors.Join(os.WriteFile(file, nil, 0o644), bad.configure("state_dir = "+file)); err != nil {
		return "", err
	}
	for _, hook := range []string{"job-started", "job-completed"} {
		o, err := r.do(ctx, call{path: r.tallyman, args: []string{"tallyman", "hook", hook}, env: append(bad.env[:len(bad.env):len(bad.env)], env...), dir: "/"})
		out := o.stdout + o.stderr
		if err == nil && (o.status != 0 || strings.Count(out, "\n") > 1 || strings.HasPrefix(out, "::") || strings.Contains(out, "\r")) {
			err = fmt.Errorf("%s: %s", hook, o)
		}
		if err != nil {
			return "", err
		}
	}
	return "one plain line at most", nil
}
