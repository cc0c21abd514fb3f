package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// storm makes the daemon tell n events, as fast as it can: each network comes and
// goes.
func (r *rig) storm(n int) {
	r.t.Helper()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", r.daemon.Socket())
		},
	}}
	defer client.CloseIdleConnections()
	for i := range (n + 1) / 2 {
		name := fmt.Sprintf("storm-%d", i)
		for _, call := range []struct{ method, url, body string }{
			// A null network costs the daemon no bridge, and its events are like any other's.
			{http.MethodPost, "http://docker/v1.41/volumes/create", `{"Name":"` + name + `"}`},
			{http.MethodDelete, "http://docker/v1.41/volumes/" + name, ""},
		} {
			request, err := http.NewRequestWithContext(r.t.Context(), call.method, call.url, strings.NewReader(call.body))
			if err != nil {
				r.t.Fatal(err)
			}
			request.Header.Set("Content-Type", "application/json")
			response, err := client.Do(request)
			if err != nil {
				r.t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode >= 300 {
				r.t.Fatalf("%s %s: %s", call.method, call.url, response.Status)
			}
		}
	}
}

// volumes are the names of the volumes whose end the account knows.
func volumes(records []record.Record) map[string]bool {
	names := map[string]bool{}
	for _, e := range ofKind(records, record.KindEvent) {
		if e.Event.Type == "volume" && e.Event.Action == "destroy" {
			names[e.Event.Name] = true
		}
	}
	return names
}

func TestEventsMissedWhileTheAgentWasDead(t *testing.T) {
	for _, row := range []struct {
		name   string
		events int
		gap    bool
	}{
		{"fewer than the daemon remembers come late, and whole", 200, false},
		{"more than the 256 that the daemon remembers leave a loss record", 400, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t)
			r.job(shopBuild)
			r.storm(2)
			eventually(t, 10*time.Second, func() error {
				if n := len(volumes(r.records())); n != 1 {
					return fmt.Errorf("%d volumes in the account, want 1", n)
				}
				return nil
			})
			r.killAgent()
			died := time.Now()
			r.storm(row.events)
			r.startAgent()
			back := time.Now()

			last := fmt.Sprintf("storm-%d", row.events/2-1)
			eventually(t, 15*time.Second, func() error {
				if !volumes(r.records())[last] {
					return errors.New("the last event is not in the account")
				}
				return nil
			})
			records := r.records()
			gaps := slices.DeleteFunc(ofKind(records, record.KindLoss), func(l record.Record) bool { return l.Loss.Source != "events" })
			missing := row.events/2 - len(volumes(records))
			if !row.gap {
				if len(gaps) > 0 || missing != 0 {
					t.Errorf("%d volumes are missing and losses are %v, want 0 and none", missing, lossLines(gaps))
				}
				return
			}
			if missing < (row.events-256)/2-1 {
				t.Fatalf("only %d volumes are missing: the daemon remembers more than 256 events, and this test shows nothing", missing)
			}
			if len(gaps) == 0 {
				t.Fatalf("%d volumes are missing and no loss record says so", missing)
			}
			for _, g := range gaps {
				if g.Loss.From.IsZero() || g.Loss.To.IsZero() || g.Loss.From.After(died) || g.Loss.To.After(back) || g.Loss.To.Before(died) {
					t.Errorf("loss %s from %v to %v, want one that begins before %v and ends between it and %v", g.Loss.Cause, g.Loss.From, g.Loss.To, died, back)
				}
			}
		})
	}
}

func TestADaemonThatIsKilledLeavesALossRecord(t *testing.T) {
	r := newRig(t)
	j := r.job(shopBuild)
	r.step(j, "before", 0, "docker volume create before; docker volume rm before")
	eventually(t, 10*time.Second, func() error {
		if !volumes(r.records())["before"] {
			return errors.New("the events do not flow")
		}
		return nil
	})
	r.daemon.Kill()
	died := time.Now()
	// Docker fails as it does without us, and the call is in the account.
	r.step(j, "meanwhile", 1, "docker volume ls")
	if err := r.daemon.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, 15*time.Second, func() error {
		r.step(j, "after", 0, "docker volume create after; docker volume rm after")
		if !volumes(r.records())["after"] {
			return errors.New("no event of the new daemon is in the account")
		}
		return nil
	})
	r.complete(j)
	// The agent lingers for a moment to see whether the replay joins up.
	eventually(t, 15*time.Second, func() error {
		if len(losses(r.records())) == 0 {
			return errors.New("no loss record")
		}
		return nil
	})
	records := r.records()
	var told bool
	for _, l := range ofKind(records, record.KindLoss) {
		if l.Loss.Source != "events" {
			t.Errorf("a loss of %s (%s): want losses of events only", l.Loss.Source, l.Loss.Cause)
			continue
		}
		told = told || !l.Loss.From.After(died) && !l.Loss.To.Before(died)
	}
	if !told {
		t.Errorf("no loss record spans the moment at which the daemon died: %v", lossLines(ofKind(records, record.KindLoss)))
	}
	for _, c := range calls(records) {
		if c.repository != "acme/shop" || c.by != record.BySealed {
			t.Errorf("%v: want it under acme/shop, sealed", c)
		}
	}
}

func lossLines(records []record.Record) []string {
	var all []string
	for _, r := range records {
		all = append(all, fmt.Sprintf("%s/%s %d from %v to %v: %s", r.Loss.Source, r.Loss.Cause, r.Loss.Count, r.Loss.From, r.Loss.To, r.Loss.Detail))
	}
	return all
}

// An agent that dies at any moment loses nothing: a call is either acknowledged, and
// then it is in the journal, or it is in the append file.
func TestNothingIsLostWhenTheAgentIsKilled(t *testing.T) {
	r := newStubRig(t)
	var made atomic.Int64
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got := r.docker("run", "--rm", "some/image", "code-5"); got.code != 5 {
					t.Errorf("exit code %d, want 5", got.code)
					return
				}
				made.Add(1)
			}
		})
	}
	for range 5 {
		r.startAgent()
		time.Sleep(300 * time.Millisecond)
		r.killAgent()
	}
	close(stop)
	callers.Wait()
	r.startAgent()
	n := int(made.Load())
	t.Logf("%d calls", n)
	r.wantAll(n)
}

// A full disk costs docker nothing and the account at most what a loss record tells.
func TestAFullDisk(t *testing.T) {
	r := newStubRig(t)
	mountTmpfs(t, r.inst.State(), "2m")
	agent := r.startAgent()
	for range 20 {
		r.wantCode(0)
	}
	r.wantAll(20)
	free := fill(t, r.inst.State())
	const during = 600 // more than the journal's page can still hold
	for range during {
		r.wantCode(3)
	}
	if err := agent.Signal(syscall.Signal(0)); err != nil {
		t.Fatalf("the agent died of a full disk: %v", err)
	}
	if out, err := r.tallyman("doctor"); !strings.Contains(strings.ToLower(out), "no space left") && !strings.Contains(strings.ToLower(out), "full") {
		t.Errorf("tallyman doctor does not name the full disk (%v):\n%s", err, out)
	}
	free()
	for range 20 {
		r.wantCode(0)
	}
	eventually(t, 30*time.Second, func() error {
		records := r.readable()
		got := len(ofKind(records, record.KindInvocation))
		var lost int64
		for _, l := range ofKind(records, record.KindLoss) {
			lost += l.Loss.Count
		}
		if got+int(lost) < during+40 {
			return fmt.Errorf("%d invocations in the account and %d said to be lost, of %d made", got, lost, during+40)
		}
		return nil
	})
}

func (r *rig) wantCode(code int) {
	r.t.Helper()
	if got := r.docker("run", "--rm", "some/image", fmt.Sprintf("code-%d", code)); got.code != code || got.stderr != "" {
		r.t.Fatalf("docker through the shim: %+v, want code %d and nothing on standard error", got, code)
	}
}

// The doctor, asked on a runner where one thing is wrong, has a complaint that names
// it, which it does not have where all is well.
func TestDoctorNamesTheCause(t *testing.T) {
	for _, row := range []struct {
		name  string
		apply func(t *testing.T, r *rig)
		want  string // in the complaint
	}{
		{"real binary is missing", func(t *testing.T, r *rig) {
			if err := os.Remove(r.inst.Shim() + ".original"); err != nil {
				t.Fatal(err)
			}
		}, "docker.original"},
		{"shim is not first in PATH", func(t *testing.T, r *rig) {
			other := filepath.Join(r.inst.Dir, "other")
			if err := os.Mkdir(other, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(r.daemon.CLI(), filepath.Join(other, "docker")); err != nil {
				t.Fatal(err)
			}
			r.runner.Env = append(r.runner.Env, "PATH="+other+":"+r.inst.Path())
		}, "other/docker"},
		{"hooks are not set", func(t *testing.T, r *rig) {
			r.runner.Env = append(r.runner.Env, "ACTIONS_RUNNER_HOOK_JOB_STARTED=")
		}, "ACTIONS_RUNNER_HOOK_JOB_STARTED"},
		{"no daemon", func(t *testing.T, r *rig) { r.daemon.Kill() }, "daemon"},
		{"a daemon that hangs", func(t *testing.T, r *rig) {
			if err := r.daemon.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		}, "daemon"},
		{"run folder is missing", func(t *testing.T, r *rig) {
			r.configure(t, filepath.Join(r.inst.Dir, "nosuch", "run"), r.inst.State())
		}, "nosuch/run"},
		{"run folder is full", func(t *testing.T, r *rig) { fill(t, r.inst.Run) }, "space"},
		{"state folder is a file", func(t *testing.T, r *rig) {
			file := filepath.Join(r.inst.Dir, "state-file")
			if err := os.WriteFile(file, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			r.configure(t, r.inst.Run, file)
		}, "state-file"},
		{"state folder is full", func(t *testing.T, r *rig) {
			dir := mountTmpfs(t, filepath.Join(r.inst.Dir, "small"), "1m")
			fill(t, dir)
			r.configure(t, r.inst.Run, dir)
		}, "space"},
		{"configuration that anybody may write", func(t *testing.T, r *rig) {
			if err := os.Chmod(r.inst.Config(), 0o666); err != nil {
				t.Fatal(err)
			}
		}, "tallyman.conf"},
		{"a key that is misspelt", func(t *testing.T, r *rig) {
			if err := r.inst.Configure("stat_dir = /x"); err != nil {
				t.Fatal(err)
			}
		}, "stat_dir"},
		{"no DogStatsD agent at the configured address", func(t *testing.T, r *rig) {
			if err := r.inst.Configure("statsd = unix:///nonexistent/dsd.socket"); err != nil {
				t.Fatal(err)
			}
		}, "dsd.socket"},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t)
			r.runner.Env = append(r.runner.Env,
				"ACTIONS_RUNNER_HOOK_JOB_STARTED="+r.inst.HookStarted(), "ACTIONS_RUNNER_HOOK_JOB_COMPLETED="+r.inst.HookCompleted())
			if before := r.complaints(); strings.Contains(before, row.want) {
				t.Fatalf("complaints before anything is wrong: %s", before)
			}
			row.apply(t, r)
			if after := r.complaints(); !strings.Contains(after, row.want) {
				t.Errorf("no complaint names %q:\n%s", row.want, after)
			}
		})
	}
}

// complaints is what the doctor finds fault with.
func (r *rig) complaints() string {
	r.t.Helper()
	out, _ := r.tallyman("doctor", "--json", "--timeout", "2s")
	var answer struct {
		Checks []struct{ Name, Result, Finding, Do string }
	}
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&answer); err != nil {
		r.t.Fatalf("tallyman doctor --json: %v: %s", err, out)
	}
	var all []string
	for _, c := range answer.Checks {
		if c.Result != "ok" {
			all = append(all, c.Result+" "+c.Name+": "+c.Finding+" "+c.Do)
		}
	}
	return strings.Join(all, "\n")
}
