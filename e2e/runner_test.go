package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

// A workflow's name with a comma and a pipe goes to a DogStatsD agent as one tag.
func TestCountersReachDogStatsD(t *testing.T) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			mu.Lock()
			got = append(got, strings.Split(strings.TrimSpace(string(buf[:n])), "\n")...)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })

	r := newRig(t, "statsd = "+conn.LocalAddr().String())
	spec := shopBuild
	spec.Workflow = "Build, test | deploy #1"
	j := r.job(spec)
	r.step(j, "net", 0, "docker network create n && docker network rm n")
	r.complete(j)
	eventually(t, 15*time.Second, func() error {
		mu.Lock()
		defer mu.Unlock()
		for _, want := range []string{"docker.invocations:", "docker.events:"} {
			found := false
			for _, line := range got {
				metric, tags, _ := strings.Cut(line, "|#")
				found = found || strings.HasPrefix(metric, want) && strings.HasSuffix(metric, "|c") &&
					strings.Contains(tags, "repo:acme/shop") && strings.Contains(tags, "workflow:build_test_deploy_1")
			}
			if !found {
				return fmt.Errorf("no counter %s with repo and workflow among\n%s", want, strings.Join(got, "\n"))
			}
		}
		return nil
	})
}

// Where there is no DogStatsD agent, nothing is slower and nothing is missing.
func TestNoDogStatsDAgent(t *testing.T) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := conn.LocalAddr().String()
	conn.Close()
	r := newStubRig(t, "statsd = "+nobody)
	r.startAgent()
	for range 50 {
		r.wantCode(0)
	}
	r.wantAll(50)
}

// The pod's environment turns everything off without a new image, and the next pod
// without it has it on again.
func TestTheKillSwitchOfThePod(t *testing.T) {
	r := newRig(t)
	env := r.runner.Env
	r.runner.Env = append(env[:len(env):len(env)], "TALLYMAN=off")
	j := r.job(shopBuild)
	if left := r.inst.Processes(); len(left) > 0 {
		t.Errorf("processes %v run in spite of TALLYMAN=off", left)
	}
	r.step(j, "__run", 0, "docker version")
	if summary := r.complete(j); summary != "" {
		t.Errorf("summary %q in spite of TALLYMAN=off", summary)
	}
	if records, err := r.inst.Records(); err != nil || len(records) > 0 {
		t.Errorf("%d records in spite of TALLYMAN=off (%v)", len(records), err)
	}

	r.runner.Env = env
	j = r.job(billingScan)
	r.step(j, "__run", 0, "docker version")
	r.complete(j)
	got := calls(r.records())
	if len(got) != 1 || got[0].repository != "acme/billing" {
		t.Errorf("calls after the switch was turned back: %v, want one of acme/billing", got)
	}
}

// A runner that is killed runs no job-completed hook (actions/runner#2595). Its next
// job must not inherit the context.
func TestTheNextJobAfterAKilledRunner(t *testing.T) {
	faults.Case(t, "HK-07", "HK-10")
	r := newRig(t)
	first := r.job(shopBuild)
	r.step(first, "__run", 0, "docker version")
	first.Kill()
	second := r.job(billingScan)
	r.step(second, "__run", 0, "docker version")
	r.step(second, "sudo", 0, `env -i PATH="$PATH" DOCKER_HOST="$DOCKER_HOST" docker version`)
	r.complete(second)

	records := r.records()
	got := calls(records)
	if len(got) != 3 || got[0].repository != "acme/shop" || got[1].repository != "acme/billing" || got[2].repository != "acme/billing" {
		t.Errorf("calls:\n%v\nwant one of acme/shop, two of acme/billing", lines(got))
	}
	if got, want := outcomes(records), "acme/billing completed, acme/shop superseded"; got != want {
		t.Errorf("ends of jobs: %s; want %s", got, want)
	}
}

// Where no job follows, the agent sees the end of the runner's process, closes the
// job and ends.
func TestTheAgentOutlivesAKilledRunnerForAMomentOnly(t *testing.T) {
	faults.Case(t, "HK-10")
	r := newRig(t)
	j := r.job(shopBuild)
	r.step(j, "__run", 0, "docker version")
	j.Kill()
	eventually(t, 20*time.Second, func() error {
		if left := r.inst.Processes(); len(left) > 0 {
			return fmt.Errorf("processes %v are still there", left)
		}
		return nil
	})
	if got, want := outcomes(r.records()), "acme/shop abandoned"; got != want {
		t.Errorf("ends of jobs: %s; want %s", got, want)
	}
}

// outcomes are the repositories whose jobs ended, and how.
func outcomes(records []record.Record) string {
	var all []string
	for _, end := range ofKind(records, record.KindJobEnd) {
		all = append(all, end.CI.Repository+" "+end.Job.Outcome)
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// The numeric id of the job, by which every figure opens the job's log, stands in no
// variable, but in the log of the runner's Worker.
func TestTheJobIDComesFromTheWorkerLog(t *testing.T) {
	r := newRig(t)
	spec := shopBuild
	spec.JobID, spec.DisplayName = 61234567890, "build (linux, 1.26)"
	j := r.job(spec)
	r.step(j, "__run", 0, "docker version")
	r.complete(j)
	for _, inv := range ofKind(r.records(), record.KindInvocation) {
		const url = "https://github.com/acme/shop/actions/runs/7001/job/61234567890"
		if inv.CI.JobID != "61234567890" || inv.CI.JobName != spec.DisplayName || inv.CI.JobURL != url {
			t.Errorf("job id %q, name %q, URL %q; want %d, %q, %q", inv.CI.JobID, inv.CI.JobName, inv.CI.JobURL, spec.JobID, spec.DisplayName, url)
		}
	}
}

// A runner that runs the hook twice for one job has one job in the account.
func TestTheHookIsIdempotent(t *testing.T) {
	faults.Case(t, "HK-06", "EV-20")
	r := newRig(t)
	j := r.job(shopBuild)
	env := append(append([]string(nil), r.runner.Env...), j.Context...)
	again := exec.CommandContext(t.Context(), "bash", "-e", r.inst.HookStarted())
	again.Env, again.Dir = env, j.Workspace
	if out, err := again.CombinedOutput(); err != nil {
		t.Fatalf("second job-started: %v: %s", err, out)
	}
	r.step(j, "__run", 0, "docker version")
	r.complete(j)
	records := r.records()
	for _, kind := range []record.Kind{record.KindJobStart, record.KindJobEnd, record.KindInvocation} {
		if n := len(ofKind(records, kind)); n != 1 {
			t.Errorf("%d records of kind %s, want 1", n, kind)
		}
	}
}

// An agent that was killed in the middle of a job: the job goes on, and what comes
// after is in the account too.
func TestAnAgentThatDiesInAJob(t *testing.T) {
	r := newRig(t)
	j := r.job(shopBuild)
	r.step(j, "one", 0, "docker version")
	r.killAgent()
	r.step(j, "two", 0, "docker network create late && docker network rm late")
	r.complete(j)
	eventually(t, 15*time.Second, func() error {
		if got := calls(r.records()); len(got) != 3 {
			return fmt.Errorf("%d calls in the account, want 3:\n%v", len(got), lines(got))
		}
		return nil
	})
	for _, c := range calls(r.records()) {
		if c.repository != "acme/shop" || c.by != record.BySealed {
			t.Errorf("%v: want it under acme/shop, sealed", c)
		}
	}
}

// tallyman events needs no runner, no hook and no installation.
func TestEventsAlone(t *testing.T) {
	r := newRig(t)
	cmd := exec.CommandContext(t.Context(), r.inst.Tallyman(), "events")
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + t.TempDir(), "DOCKER_HOST=" + r.daemon.Host(), "DD_AGENT_HOST="}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	found := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var event struct {
				Kind  string
				Event struct{ Type, Action, Name string }
			}
			if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
				found <- fmt.Errorf("%w: %s", err, lines.Bytes())
				return
			}
			if event.Event.Type == "network" && event.Event.Action == "create" && strings.HasPrefix(event.Event.Name, "alone") {
				found <- nil
				return
			}
		}
		found <- errors.New("the output ended: " + stderr.String())
	}()
	// The stream begins when tallyman is connected, which nobody can see from here.
	for i := 0; ; i++ {
		name := fmt.Sprintf("alone-%d", i)
		if _, err := r.daemon.Docker(t.Context(), "network", "create", name); err != nil {
			t.Fatal(err)
		}
		select {
		case err = <-found:
		case <-time.After(500 * time.Millisecond):
			if i < 20 {
				continue
			}
			err = errors.New("no event of the network")
		}
		break
	}
	if err != nil {
		t.Error(err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("tallyman events after SIGTERM: %v: %s", err, stderr.String())
	}
}

// A sound installation has nothing for the doctor to complain of.
func TestDoctorIsContentWithASoundInstallation(t *testing.T) {
	r := newRig(t)
	r.runner.Env = append(r.runner.Env,
		"ACTIONS_RUNNER_HOOK_JOB_STARTED="+r.inst.HookStarted(), "ACTIONS_RUNNER_HOOK_JOB_COMPLETED="+r.inst.HookCompleted())
	j := r.job(shopBuild)
	r.step(j, "__run", 0, "docker version")
	r.step(j, "doctor", 0, r.inst.Tallyman()+" doctor") // in a job: beside it other tests' runners run
	status, err := r.tallyman("status")
	if err != nil || !strings.Contains(status, "acme/shop") {
		t.Errorf("tallyman status does not name the job (%v):\n%s", err, status)
	}
	r.complete(j)
}

// The file sink of the configuration gets what the journal has.
func TestAFileSink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "records.jsonl")
	r := newStubRig(t, "sinks = file://"+path)
	r.startAgent()
	for range 30 {
		r.wantCode(0)
	}
	r.wantAll(30)
	eventually(t, 15*time.Second, func() error {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if n := strings.Count(string(data), `"kind":"invocation"`); n != 30 {
			return fmt.Errorf("%d invocations in the sink's file, want 30", n)
		}
		return nil
	})
}

// A matrix runs its legs one after the other on one runner with the same run, job
// and attempt; only the tracking id tells them apart.
func TestTheLegsOfAMatrixAreDifferentJobs(t *testing.T) {
	r := newRig(t)
	for range 2 {
		j := r.job(shopBuild)
		r.step(j, "__run", 0, "docker version")
		summary := r.complete(j)
		if !strings.Contains(summary, "1") || strings.Contains(summary, "| 2 |") {
			t.Errorf("the summary of a leg counts another leg's call:\n%s", summary)
		}
	}
	ids := map[string]bool{}
	for _, inv := range ofKind(r.records(), record.KindInvocation) {
		ids[inv.CI.TrackingID] = true
	}
	if len(ids) != 2 {
		t.Errorf("calls of %d jobs in the account, want 2", len(ids))
	}
	if n := r.report().Totals.Jobs; n != 2 {
		t.Errorf("the report has %d jobs, want 2", n)
	}
}
