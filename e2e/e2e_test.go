// Package e2e tests Tallyman as it is installed: the built shim and the built
// tallyman command, called the way a runner calls them, on a real Docker daemon,
// with faults that are real (killed processes, full file systems, stopped peers).
//
// Each test asserts what a user would see: docker behaves as without us, and the
// account holds each call once, under its job.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/e2e/dockertest"
	"github.com/tallyman-ci/tallyman/e2e/prefix"
	"github.com/tallyman-ci/tallyman/e2e/runnertest"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/report"
)

// built is the folder with the programs under test.
var built = "../bin"

// TestMain builds the programs first, so that no test runs a stale one. With
// TALLYMAN_E2E_BIN the tests take those of that folder instead, of a package for
// example.
func TestMain(m *testing.M) {
	if dir := os.Getenv("TALLYMAN_E2E_BIN"); dir != "" {
		built = dir
	} else if out, err := exec.Command("make", "-C", "..", "build").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "make build: %v\n%s", err, out)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// rig is one machine of the fleet: an installation, a runner, and mostly a daemon.
type rig struct {
	t      *testing.T
	daemon *dockertest.Daemon // nil where the test needs none
	inst   *prefix.Prefix
	runner *runnertest.Runner
	begun  int // calls, to tell them apart
}

// image is in the private registry of every rig with a daemon.
const image = dockertest.Registry + "/tools/busybox:1"

// newRig installs Tallyman before a real daemon.
func newRig(t *testing.T, config ...string) *rig {
	t.Helper()
	d := dockertest.Require(t)
	if err := d.Publish(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	return install(t, d, d.CLI(), d.Host(), config...)
}

// newStubRig installs Tallyman before a stub instead of docker: it prints its
// arguments and exits with the number behind the last one. There is no daemon.
func newStubRig(t *testing.T, config ...string) *rig {
	t.Helper()
	stub := filepath.Join(t.TempDir(), "docker-stub")
	script := "#!/bin/sh\necho \"$@\"\nfor last; do :; done\nexit \"${last#code-}\"\n"
	if err := os.WriteFile(stub, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return install(t, nil, stub, "unix:///nonexistent/docker.sock", config...)
}

func install(t *testing.T, d *dockertest.Daemon, real, host string, config ...string) *rig {
	t.Helper()
	// Not t.TempDir: the name of the test in it is too long for a socket's address.
	dir, err := os.MkdirTemp("/tmp", "tallyman-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	inst, err := prefix.Install(dir, prefix.Options{
		Built: built, Hooks: "../runner-image/hooks", Real: real,
		Run:    mountTmpfs(t, filepath.Join(dir, "run"), "64m"), // as /run is everywhere
		Config: append([]string{"statsd = off"}, config...),
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, daemon: d, inst: inst}
	r.runner = &runnertest.Runner{
		Name:          "runner-1",
		Root:          filepath.Join(dir, "runner"),
		Env:           append(inst.Env(), "PATH="+inst.Path(), "HOME="+dir, "DOCKER_HOST="+host, "DOCKER_BUILDKIT=0"),
		HookStarted:   inst.HookStarted(),
		HookCompleted: inst.HookCompleted(),
	}
	t.Cleanup(func() {
		if t.Failed() {
			if log, err := os.ReadFile(filepath.Join(inst.State(), "agent.log")); err == nil {
				t.Logf("end of the agent's log:\n%s", log[max(0, len(log)-4000):])
			}
		}
		if err := inst.Remove(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// mountTmpfs mounts a tmpfs of a size at dir until the test's end.
func mountTmpfs(t *testing.T, dir, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		require.Missing(t, "root, to mount file systems of a given size")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=755"); err != nil {
		t.Fatalf("mount a tmpfs of %s at %s: %v", size, dir, err)
	}
	t.Cleanup(func() {
		// Detached: what still has a file open in it is somebody else's failure.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// job starts a job and checks what the runner would see of the hook.
func (r *rig) job(spec runnertest.Spec) *runnertest.Job {
	r.t.Helper()
	j, err := r.runner.Start(r.t.Context(), spec)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(j.Kill)
	r.checkHook("job-started", j.Started)
	return j
}

// complete ends a job and returns its summary.
func (r *rig) complete(j *runnertest.Job) string {
	r.t.Helper()
	hook, orphans, err := j.Complete(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	r.checkHook("job-completed", hook)
	if len(orphans) > 0 {
		r.t.Errorf("the runner killed %v: started without leaving RUNNER_TRACKING_ID behind", orphans)
	}
	summary, err := os.ReadFile(j.Summary)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(summary)
}

func (r *rig) checkHook(name string, hook runnertest.Result) {
	r.t.Helper()
	if hook.Code != 0 || hook.Held {
		r.t.Errorf("%s: exit code %d, output held %v; want 0 and not held. Output: %s%s", name, hook.Code, hook.Held, hook.Stdout, hook.Stderr)
	}
	if lines := strings.Count(hook.Stdout+hook.Stderr, "\n"); lines > 1 {
		r.t.Errorf("%s printed %d lines, want one at most:\n%s%s", name, lines, hook.Stdout, hook.Stderr)
	}
	// The promise is 500 ms for the first hook; the stand-in, the race detector and two
	// busy cores are in this figure too.
	if limit := 5 * time.Second; hook.Took > limit {
		r.t.Errorf("%s took %v", name, hook.Took)
	}
}

// step runs a script as a step and fails the test when its exit code is not want.
func (r *rig) step(j *runnertest.Job, id string, want int, script string, env ...string) runnertest.Result {
	r.t.Helper()
	result, err := j.Step(r.t.Context(), id, script, env...)
	if err != nil {
		r.t.Fatal(err)
	}
	if result.Code != want {
		r.t.Fatalf("step %s: exit code %d, want %d: %s%s", id, result.Code, want, result.Stdout, result.Stderr)
	}
	return result
}

// tallyman runs the installed command and returns its standard output.
func (r *rig) tallyman(args ...string) (string, error) {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), r.inst.Tallyman(), args...)
	cmd.Env = r.runner.Env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String() + stderr.String(), fmt.Errorf("tallyman %s: %w: %s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// report asks the installed command.
func (r *rig) report(args ...string) report.Report {
	r.t.Helper()
	out, err := r.tallyman(append([]string{"report", "--json"}, args...)...)
	if err != nil {
		r.t.Fatal(err)
	}
	var answer report.Report
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		r.t.Fatalf("tallyman report --json: %v: %s", err, out)
	}
	return answer
}

// records reads the journal and leaves duplicates out, after it has made sure that
// records with one id are the same.
func (r *rig) records() []record.Record {
	r.t.Helper()
	all, err := r.inst.Records()
	for range 50 { // the agent may be in the middle of its last line
		if err == nil || !strings.Contains(err.Error(), "has no end") {
			break
		}
		time.Sleep(10 * time.Millisecond)
		all, err = r.inst.Records()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return distinct(r.t, all)
}

// readable are the records that the product's own reader finds, which passes over
// the torn lines that a full disk leaves.
func (r *rig) readable() []record.Record {
	r.t.Helper()
	reader, err := journal.OpenReader(r.inst.Journal(), journal.Position{})
	if err != nil {
		r.t.Fatal(err)
	}
	defer reader.Close()
	var all []record.Record
	for {
		line, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return distinct(r.t, all)
		}
		if err != nil {
			r.t.Fatal(err)
		}
		var rec record.Record
		if err := recordjson.Unmarshal(line.Data, &rec); err != nil {
			r.t.Fatal(err)
		}
		all = append(all, rec)
	}
}

func distinct(t *testing.T, all []record.Record) []record.Record {
	t.Helper()
	seen := map[string]record.Record{}
	var kept []record.Record
	for _, rec := range all {
		before, twice := seen[rec.ID]
		if !twice {
			seen[rec.ID] = rec
			kept = append(kept, rec)
		} else if before.Kind != rec.Kind || !before.TS.Equal(rec.TS) {
			t.Errorf("two different records have the id %s: %+v and %+v", rec.ID, before, rec)
		}
	}
	return kept
}

// ofKind are the records of a kind.
func ofKind(records []record.Record, kind record.Kind) []record.Record {
	return slices.DeleteFunc(slices.Clone(records), func(r record.Record) bool { return r.Kind != kind })
}

// losses are the causes of the loss records.
func losses(records []record.Record) []string {
	var causes []string
	for _, r := range ofKind(records, record.KindLoss) {
		causes = append(causes, r.Loss.Cause)
	}
	return causes
}

// ownCounters keeps losses that other tests caused out of this one. What shims cannot write
// to any file is counted in System V semaphores that all installations share. All must
// be started from this thread, which ends with the test.
func ownCounters(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWIPC); err != nil {
		t.Fatal(err)
	}
}

// eventually calls probe until it returns nil, for at most as long as limit.
func eventually(t *testing.T, limit time.Duration, probe func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// startAgent runs the agent in the foreground, outside any hook, and waits until it
// listens. It returns its process.
func (r *rig) startAgent() *os.Process {
	r.t.Helper()
	cmd := exec.Command(r.inst.Tallyman(), "agent")
	cmd.Env = r.runner.Env
	cmd.Dir = "/"
	awayFromOtherShims(cmd)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	r.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGCONT)
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			cmd.Process.Kill()
			r.t.Error("the agent did not end on SIGTERM")
		}
	})
	eventually(r.t, 10*time.Second, func() error {
		select {
		case err := <-done:
			done <- err
			return fmt.Errorf("the agent ended: %v: %s", err, output.String())
		default:
		}
		return r.agentAnswers()
	})
	return cmd.Process
}

func (r *rig) agentAnswers() error {
	if _, err := os.Stat(r.inst.Socket()); err != nil {
		return err
	}
	_, err := r.tallyman("status")
	return err
}

// agentPID is the process id of the agent that a hook started.
func (r *rig) agentPID() int {
	r.t.Helper()
	for _, pid := range r.inst.Processes() {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && slices.Contains(strings.Split(string(cmdline), "\x00"), "agent") {
			return pid
		}
	}
	r.t.Fatal("no agent is running")
	return 0
}

// killAgent ends the agent with SIGKILL and waits for the end.
func (r *rig) killAgent() {
	r.t.Helper()
	fd, err := unix.PidfdOpen(r.agentPID(), 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		r.t.Fatal(err)
	}
	// Readable when its files are closed, its lock among them: it has left /proc's list of
	// commands before that, and with a thousand sockets long before.
	for deadline := time.Now().Add(30 * time.Second); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
		switch {
		case n > 0:
			return
		case err != nil && err != unix.EINTR, time.Now().After(deadline):
			r.t.Fatalf("the killed agent is still there: %v", err)
		}
	}
}

// docker runs docker the way a script on the runner would, with the shim first in
// PATH, and returns what came of it.
func (r *rig) docker(args ...string) outcome { return r.run(r.inst.Shim(), "docker", args...) }

// direct runs the real docker with the same arguments and the same name.
func (r *rig) direct(args ...string) outcome {
	return r.run(r.inst.Shim()+".original", "docker", args...)
}

// outcome is all that a caller sees of a command.
type outcome struct {
	code           int // -n where signal n ended it
	stdout, stderr string
}

func (r *rig) run(path, name string, args ...string) outcome {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Args[0] = name
	cmd.Env = r.runner.Env
	cmd.Dir = "/"
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); cmd.ProcessState == nil {
		r.t.Fatalf("%s: %v", path, err)
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	code := status.ExitStatus()
	if status.Signaled() {
		code = -int(status.Signal())
	}
	return outcome{code, stdout.String(), stderr.String()}
}
