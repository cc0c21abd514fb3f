package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/runnertest"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

// given is the number of records that shims counted as lost because the machine was too busy
// to bring them on their way in time. One whose acknowledgement came late may be there all the same.
func given(records []record.Record) (n int) {
	for _, l := range ofKind(records, record.KindLoss) {
		if l.Loss.Cause == "shim" {
			n += int(l.Loss.Count)
		}
	}
	return n
}

// silent listens on a unix socket, and neither answers nor closes.
func silent(t *testing.T) (path string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tallyman-silent-")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "docker.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var held []net.Conn
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			held = append(held, c)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for _, c := range held {
			c.Close()
		}
		os.RemoveAll(dir)
	})
	return path
}

// HK-03 and EV-27: a daemon that accepts and never answers delays no hook, and costs
// the account nothing but its events. job and complete check the hooks.
func TestHooksBesideADaemonThatHangs(t *testing.T) {
	faults.Case(t, "HK-03", "EV-27")
	r := newStubRig(t, "docker_host = unix://"+silent(t))
	j := r.job(shopBuild)
	r.step(j, "__run", 0, "docker run code-0")
	r.step(j, "__run_2", 3, "docker run code-3")
	r.complete(j)
	records := r.records()
	if got := calls(records); len(got) != 2 || got[0].repository != "acme/shop" || got[1].by != record.BySealed {
		t.Errorf("calls:\n%v", lines(got))
	}
	if got, want := outcomes(records), "acme/shop completed"; got != want {
		t.Errorf("ends of jobs: %s; want %s", got, want)
	}
}

// HK-11: the pod is deleted while a job runs: SIGTERM to everything, and SIGKILL when
// the grace is over. One sink is dead, which must not keep the other's records.
func TestPodIsDeleted(t *testing.T) {
	for _, row := range []struct {
		name   string
		worker bool   // the runner's process is gone before the agent is asked to stop
		flush  string // the agent's --flush-timeout
		want   []string
	}{
		{"the agent first", false, "5s", []string{"acme/shop shutdown"}},                        // the default
		{"the runner first", true, "1s", []string{"acme/shop abandoned", "acme/shop shutdown"}}, // it may not be reaped yet
	} {
		t.Run(row.name, func(t *testing.T) {
			faults.Case(t, "HK-10", "HK-11")
			sinks := t.TempDir()
			full := mountTmpfs(t, filepath.Join(sinks, "full"), "64k")
			if err := os.WriteFile(filepath.Join(full, "filler"), make([]byte, 1<<20), 0o644); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("fill the dead sink's disk: %v", err)
			}
			live := filepath.Join(sinks, "live.jsonl")
			r := newStubRig(t, "sinks = file://"+full+"/dead.jsonl file://"+live)
			r.runner.Env = append(r.runner.Env, "TALLYMAN_FLUSH_TIMEOUT="+row.flush)
			j := r.job(shopBuild)
			for i := range 5 {
				r.step(j, "__run", 0, fmt.Sprintf("docker run step-%d code-0", i))
			}
			agent := r.agentPID()
			if row.worker {
				j.Kill()
			}
			if err := syscall.Kill(agent, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			// 5 s of flush, within a grace of 30 s; the rest is for a loaded machine.
			eventually(t, 25*time.Second, func() error {
				if slices.Contains(r.inst.Processes(), agent) {
					return errors.New("the agent is still there")
				}
				return nil
			})
			j.Kill()

			records := r.records()
			if got := outcomes(records); !slices.Contains(row.want, got) {
				t.Errorf("ends of jobs: %s; want one of %q", got, row.want)
			}
			if n := len(ofKind(records, record.KindInvocation)); n+given(records) < 5 {
				t.Errorf("%d calls in the journal, want 5", n)
			}
			data, err := os.ReadFile(live)
			if err != nil {
				t.Fatal(err)
			}
			for _, rec := range records {
				if !strings.Contains(string(data), rec.ID) && rec.Kind != record.KindLoss {
					t.Errorf("%s %s did not reach the live sink", rec.Kind, rec.ID)
				}
			}

			if !row.worker {
				return
			}
			// Where the state outlives the pod, the next job finds nothing open, and the
			// end is not told again.
			next := r.job(billingScan)
			r.step(next, "__run", 0, "docker run code-0")
			r.complete(next)
			if got := outcomes(r.records()); strings.Count(got, "acme/shop") != 1 || !strings.Contains(got, "acme/billing completed") {
				t.Errorf("ends of jobs: %s", got)
			}
		})
	}
}

// HK-17: a hostile job on a runner that lives on has changed the shim. Everybody who
// may look is told, and the job that comes after runs as it would have.
func TestChangedShim(t *testing.T) {
	faults.Case(t, "HK-17")
	r := newStubRig(t)
	pin := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(b)
		return "pin = " + hex.EncodeToString(sum[:]) + "  " + path
	}
	if err := r.inst.Configure("statsd = off", pin(r.inst.Shim()), pin(r.inst.Tallyman()), pin(r.inst.HookStarted())); err != nil {
		t.Fatal(err)
	}
	first := r.job(shopBuild)
	if out := first.Started.Stdout + first.Started.Stderr; out != "" {
		t.Errorf("an installation as it was made: the hook said %q", out)
	}
	r.step(first, "__run", 0, "docker run code-0")
	eventually(t, 30*time.Second, r.agentAnswers)
	if out, err := r.tallyman("status"); err != nil || strings.Contains(out, "was changed") {
		t.Errorf("status (%v):\n%s", err, out)
	}
	r.complete(first)
	if l := losses(r.records()); slices.Contains(l, "changed_file") {
		t.Errorf("losses %v", l)
	}

	shim, err := os.ReadFile(r.inst.Shim())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(r.inst.Shim()+".new", append(shim, "evil"...), 0o755), os.Rename(r.inst.Shim()+".new", r.inst.Shim())); err != nil {
		t.Fatal(err)
	}
	second := r.job(billingScan)
	// The hook says so where the check was over in its 400 ms; the others always do.
	if out := second.Started.Stdout; out != "" && !strings.Contains(out, r.inst.Shim()+" was changed") {
		t.Errorf("the hook said %q", out)
	}
	contexts := func() []hook.Context {
		all, _ := hook.Store{Dir: filepath.Join(r.inst.State(), "contexts")}.List()
		return all
	}
	eventually(t, 20*time.Second, func() error {
		if c := contexts(); len(c) != 2 || len(c[0].Problems) != 1 {
			return fmt.Errorf("the context does not tell: %+v", c)
		}
		return nil
	})
	r.step(second, "__run", 0, "docker run code-0")
	r.step(second, "__run_2", 7, "docker run code-7")
	eventually(t, 30*time.Second, r.agentAnswers)
	for _, command := range []string{"status", "doctor"} {
		if out, err := r.tallyman(command); !strings.Contains(out, "was changed") {
			t.Errorf("tallyman %s (%v) does not tell:\n%s", command, err, out)
		}
	}
	r.complete(second)
	var told []record.Record
	for _, l := range ofKind(r.records(), record.KindLoss) {
		if l.Loss.Cause == "changed_file" {
			told = append(told, l)
		}
	}
	if len(told) != 1 || told[0].CI == nil || told[0].CI.Repository != "acme/billing" || told[0].Loss.Count != -1 || !strings.Contains(told[0].Loss.Detail, r.inst.Shim()) {
		t.Errorf("losses %+v, want one of the changed shim in acme/billing", told)
	}
	if got := calls(r.records()); len(got)+given(r.records()) < 3 {
		t.Errorf("%d calls in the account, want 3: a changed file ends nothing", len(got))
	}
	log, err := os.ReadFile(filepath.Join(r.inst.State(), "agent.log"))
	if err != nil || !strings.Contains(string(log), "not what was installed") {
		t.Errorf("the agent's log does not tell (%v)", err)
	}
}

// HK-21: two runners on one machine, one installation, one agent.
func TestTwoRunnersOnOneMachine(t *testing.T) {
	faults.Case(t, "HK-21")
	r := newStubRig(t)
	one := r.job(shopBuild)
	other := *r.runner
	other.Name, other.Root = "runner-2", r.runner.Root+"-2"
	start := func(spec runnertest.Spec) *runnertest.Job {
		j, err := other.Start(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(j.Kill)
		r.checkHook("job-started", j.Started)
		return j
	}
	two := start(billingScan)
	r.step(one, "__run", 0, "docker run code-0")
	r.step(two, "__run", 0, "docker run code-0")
	r.complete(one)
	agent := r.agentPID()
	// Longer than the agent lingers after a job of its own.
	for deadline := time.Now().Add(4 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if !slices.Contains(r.inst.Processes(), agent) {
			t.Fatal("the end of one runner's job ended the agent under the other's")
		}
	}
	r.step(two, "__run_2", 5, "docker run code-5")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	end, orphans, err := two.Complete(ctx)
	if err != nil || len(orphans) > 0 {
		t.Fatalf("%v, killed %v", err, orphans)
	}
	r.checkHook("job-completed", end)
	got := map[string]int{}
	for _, c := range calls(r.records()) {
		if c.by != record.BySealed {
			t.Errorf("%v: want it sealed", c)
		}
		got[c.repository]++
	}
	if got["acme/shop"] != 1 || got["acme/billing"] != 2 || len(got) != 2 {
		t.Errorf("calls by repository: %v", got)
	}
	if got, want := outcomes(r.records()), "acme/billing completed, acme/shop completed"; got != want {
		t.Errorf("ends of jobs: %s; want %s", got, want)
	}
	eventually(t, 30*time.Second, func() error {
		if left := r.inst.Processes(); len(left) > 0 {
			return fmt.Errorf("processes %v are still there", left)
		}
		return nil
	})
}

// HK-16: the runner pulls the image of a job container after the hook, with none of
// the job's variables but the tracking id. The pull is the job's, and so is its event.
func TestJobContainerIsPulledUnderItsJob(t *testing.T) {
	faults.Case(t, "HK-16")
	r := newRig(t)
	j := r.job(shopBuild)
	if got, err := j.Internal(t.Context(), "docker", "pull", image); err != nil || got.Code != 0 {
		t.Fatalf("docker pull: %v, %+v", err, got)
	}
	r.complete(j)
	records := r.records()
	if got := calls(records); len(got) != 1 || got[0].repository != "acme/shop" || got[0].by != record.BySealed {
		t.Errorf("calls:\n%v\nwant one of acme/shop, sealed", lines(got))
	}
	pulls := 0
	for _, e := range ofKind(records, record.KindEvent) {
		if e.Event.Action == "pull" {
			pulls++
			if e.CI == nil || e.CI.Repository != "acme/shop" {
				t.Errorf("the pull's event is under %+v", e.CI)
			}
		}
	}
	if pulls != 1 {
		t.Errorf("%d events of the pull, want 1", pulls)
	}
}
