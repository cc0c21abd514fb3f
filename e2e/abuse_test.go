package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
)

// attacker runs one of the attacks below in a process of its own, as a user, and waits
// until it says that it is under way. The attack ends with the test.
func (r *rig) attacker(uid uint32, attack string, arguments ...string) *exec.Cmd {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	// Where another user can run it.
	program := filepath.Join(r.inst.Dir, "attacker")
	if err := copyProgram(self, program); err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(program, append([]string{"-test.run=^TestHelperAttack$", "--", attack, r.inst.Socket()}, arguments...)...)
	cmd.Env = []string{"TALLYMAN_E2E_BIN=" + built, attackVariable + "=1"}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	end, err := cmd.StdinPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		end.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	ready := make([]byte, 6)
	if _, err := out.Read(ready); err != nil || string(ready) != "ready\n" {
		r.t.Fatalf("the attack %s said %q: %v", attack, ready, err)
	}
	return cmd
}

func copyProgram(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

const attackVariable = "TALLYMAN_E2E_ATTACK"

// TestHelperAttack is no test: it is the process of an attack.
func TestHelperAttack(t *testing.T) {
	if os.Getenv(attackVariable) == "" {
		return // among the tests
	}
	args := os.Args[slices.Index(os.Args, "--")+1:]
	attack, socket := args[0], args[1]
	dial := func() net.Conn {
		for {
			conn, err := net.Dial("unixpacket", socket)
			if err == nil {
				return conn
			}
			if !errors.Is(err, syscall.EAGAIN) {
				fmt.Fprintln(os.Stderr, "attack:", err)
				os.Exit(1)
			}
			time.Sleep(time.Millisecond)
		}
	}
	switch attack {
	case "silent": // many connections, half of which begin to talk
		n, _ := strconv.Atoi(args[2])
		conns := make([]net.Conn, n)
		for i := range conns {
			conns[i] = dial()
			if i%2 == 0 {
				conns[i].Write([]byte(`{"control":"status"}`))
			}
		}
		defer runtime.KeepAlive(conns)
		fmt.Println("ready")
	case "flood": // records of a size, as fast as can be, from a number of connections at a time
		size, _ := strconv.Atoi(args[2])
		fmt.Println("ready")
		for range 4 {
			go func() {
				for {
					rec := &record.Record{ID: record.NewID(time.Now()), TS: time.Now().UTC(), Kind: record.KindInvocation, Schema: 1, By: record.ByNone,
						Invocation: &record.Invocation{Tool: "docker", Command: "run", Images: []string{"flood/" + strings.Repeat("x", size)}, MonoNS: 1}}
					conn := dial()
					conn.Write(record.Append(nil, rec))
					conn.Read(make([]byte, 1))
					conn.Close()
				}
			}()
		}
	default:
		fmt.Fprintln(os.Stderr, "no attack", attack)
		os.Exit(1)
	}
	os.Stdin.Read(make([]byte, 1)) // until the test ends
	os.Exit(0)
}

func (r *rig) status() agent.Status {
	r.t.Helper()
	out, err := r.tallyman("status", "--json", "--timeout", "1m")
	if err != nil {
		r.t.Fatal(err)
	}
	var st agent.Status
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		r.t.Fatal(err)
	}
	return st
}

// Ten times what a job may have recorded, in long records, beside hundreds of commands
// that run: the agent stays small, and its books balance.
func TestMemoryUnderTenTimesOverload(t *testing.T) {
	faults.Case(t, "AB-08")
	const rate = 100
	r := newStubRig(t, fmt.Sprintf("job_rate = %d", rate), "job_burst = 2000", "journal_max_bytes = 64 MiB")
	// They run until the agent is killed, which closes nothing of theirs: the test ends them.
	r.tool(`exec sleep 3600`)
	a := r.newAgent(nil)
	const running = 600
	var calls []*aCall
	for range running {
		calls = append(calls, r.begin(nil))
	}
	t.Cleanup(func() {
		for _, c := range calls {
			c.cmd.Process.Kill()
		}
	})
	eventually(t, 2*time.Minute, func() error {
		if st := r.status(); st.Running < running*9/10 {
			return fmt.Errorf("%d of %d commands are watched", st.Running, running)
		}
		return nil
	})
	before := r.status().Counts
	for range 3 {
		r.attacker(1001, "flood", "10000")
	}
	began := time.Now()
	eventually(t, 5*time.Minute, func() error {
		c := r.status().Counts
		allowed := 2000 + rate*time.Since(began).Seconds()
		if got := c.Suppressed + c.Records - before.Records; float64(got) < 10*allowed && got < 20_000 {
			return fmt.Errorf("%d records came, which is not yet ten times the %.0f that may", got, allowed)
		}
		return nil
	})
	peak := peakMemory(t, a.cmd.Process.Pid)
	st := r.status()
	t.Logf("%d records came, %d were suppressed; %d commands watched; at most %.1f MiB", st.Counts.Records-before.Records+st.Counts.Suppressed, st.Counts.Suppressed, st.Running, float64(peak)/(1<<10))
	if peak > 64<<10 {
		t.Errorf("the agent took %d MiB, want 64 at most", peak>>10)
	}
}

// Who opens ten thousand connections and sends nothing keeps neither docker nor the hooks
// from being served, also where the agent may open few files.
func TestTenThousandSilentConnections(t *testing.T) {
	faults.Case(t, "AB-06", "AB-09")
	for _, row := range []struct {
		name  string
		files string
	}{{"20,000 files", "20000"}, {"256 files", "256"}} {
		t.Run(row.name, func(t *testing.T) {
			r := newStubRig(t)
			r.newAgent(func(cmd *exec.Cmd) {
				cmd.Args = append([]string{"prlimit", "--nofile=" + row.files + ":" + row.files, cmd.Path}, cmd.Args[1:]...)
				path, err := exec.LookPath("prlimit")
				if err != nil {
					require.Missing(t, "prlimit (util-linux)")
				}
				cmd.Path = path
			})
			for _, uid := range []uint32{0, 1001} { // the agent's own user and another
				r.attacker(uid, "silent", "5000")
			}
			if row.files == "256" {
				r.tool(`for last; do :; done; case $last in code-*) exit "${last#code-}";; esac; exec sleep 3600`)
				for range 400 { // more running commands than the agent may open files
					r.begin(nil)
				}
			}
			for i := range 20 {
				c := r.begin(nil, fmt.Sprintf("code-%d", i))
				select {
				case <-c.done:
				case <-time.After(time.Minute):
					t.Fatal("docker waits")
				}
				if got := c.cmd.ProcessState.ExitCode(); got != i {
					t.Errorf("exit code %d, want %d", got, i)
				}
				c.record()
			}
			st := r.status() // is answered
			t.Logf("%+v, %d running", st.Counts, st.Running)
			for _, rec := range ofKind(r.records(), record.KindLoss) {
				if rec.Loss.Cause != "rate_limited" {
					t.Errorf("a loss: %+v", rec.Loss)
				}
			}
		})
	}
}

// What tells the agent of jobs, or makes it work, is not heard from other users.
func TestControlByAnotherUser(t *testing.T) {
	faults.Case(t, "AB-07")
	if os.Geteuid() != 0 {
		require.Missing(t, "root, to become another user")
	}
	r := newStubRig(t)
	r.newAgent(nil)
	store := hook.Store{Dir: filepath.Join(r.inst.State(), "contexts")}
	job, err := store.Seal(hook.Context{CI: record.CI{Repository: "octo/shop", RunID: "42", TrackingID: "github_a"}, Started: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if err := store.End(job.Key, hook.Completed, time.Now()); err != nil { // closed: the end would be taken from the hook
		t.Fatal(err)
	}
	asNobody(t, func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for what, ask := range map[string]func(c *agent.Client) error{
			"job-start": func(c *agent.Client) error {
				return c.JobStart(ctx, hook.Context{Key: "forged", CI: record.CI{Repository: "victim/repo", TrackingID: "github_b"}, Started: time.Now()})
			},
			"job-end": func(c *agent.Client) error { return c.JobEnd(ctx, job.Key, hook.Completed) },
			"flush":   func(c *agent.Client) error { return c.Flush(ctx) },
		} {
			c, err := agent.Dial(ctx, r.inst.Socket())
			if err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			if err := ask(c); err == nil || !strings.Contains(err.Error(), "only root and the agent's own user") {
				t.Errorf("%s by another user: %v", what, err)
			}
			if st, err := c.Status(ctx); err != nil || st.PID == 0 { // anybody may look
				t.Errorf("status: %v", err)
			}
			c.Close()
		}
	})
	for _, rec := range r.records() {
		if rec.Kind == record.KindJobStart || rec.Kind == record.KindJobEnd {
			t.Errorf("forged: %s", record.Append(nil, &rec))
		}
	}
}

// asNobody does something on a thread of another user. The kernel takes the
// credentials of a socket's peer from the thread that connects.
func asNobody(t *testing.T, do func()) {
	t.Helper()
	var done sync.WaitGroup
	done.Go(func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			t.Error(errno)
			return
		}
		do()
	})
	done.Wait()
}

// A flood by one user costs another user's calls nothing, through the built shim.
func TestFloodBesideAnotherUser(t *testing.T) {
	faults.Case(t, "AB-05")
	if os.Geteuid() != 0 {
		require.Missing(t, "root, to become another user")
	}
	r := newStubRig(t, "job_rate = 10", "job_burst = 100")
	r.newAgent(nil)
	r.attacker(1001, "flood", "10")
	eventually(t, time.Minute, func() error {
		if n := r.status().Counts.Suppressed; n < 1000 {
			return fmt.Errorf("%d records are suppressed", n)
		}
		return nil
	})
	var wrong atomic.Int64
	for i := range 50 {
		c := r.begin(nil, fmt.Sprintf("code-%d", i))
		<-c.done
		if c.cmd.ProcessState.ExitCode() != i {
			wrong.Add(1)
		}
		c.record()
	}
	if n := wrong.Load(); n > 0 {
		t.Errorf("%d wrong exit codes", n)
	}
	eventually(t, time.Minute, func() error {
		var lost int64
		for _, rec := range ofKind(r.records(), record.KindLoss) {
			if rec.Loss.Cause != "rate_limited" || rec.Loss.Source != "agent" {
				return fmt.Errorf("a loss: %+v", rec.Loss)
			}
			lost += rec.Loss.Count
		}
		if lost < 1000 {
			return fmt.Errorf("%d are told as lost", lost)
		}
		return nil
	})
}
