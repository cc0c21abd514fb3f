package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// TestMain also plays the command that the shim becomes: it hands a record over and
// then ends as it is told.
func TestMain(m *testing.M) {
	if dir := os.Getenv("AGENT_TEST_COMMAND"); dir != "" {
		os.Exit(command(dir))
	}
	goleak.VerifyTestMain(m)
}

// command delivers one record to the agent in dir and ends like os.Args[1] says: an
// exit code, sleep:<duration>, held for as long as its standard input is, signal:<number>,
// or plugin:<argument> to start another such command as docker's plugins do.
func command(dir string) int {
	how := os.Args[1]
	r := invocation(time.Now())
	r.Invocation.MonoNS = monotonic()
	r.CI = record.CIFromEnviron(os.Environ(), record.MaxField)
	r.Invocation.Nested = os.Getenv("DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND") != ""
	r.Invocation.ParentID = os.Getenv("AGENT_TEST_PARENT")
	line := record.Append(nil, r)
	if other := os.Getenv("AGENT_TEST_LINE"); other != "" {
		line = []byte(other)
	}
	result := handover.Deliver(handover.Target{Socket: dir + "/agent.sock", Spool: dir + "/spool", SpoolMaxBytes: 1 << 20}, line, os.Getuid(), os.Geteuid())
	fmt.Println(r.ID, result)
	if inner, ok := strings.CutPrefix(how, "plugin:"); ok {
		plugin := exec.Command("/bin/sh", "-c", `"$0" "$1"; exit $?`, os.Args[0], inner)
		plugin.Env = append(os.Environ(), "DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND=docker")
		plugin.Stdout = os.Stdout
		plugin.Run()
		return plugin.ProcessState.ExitCode()
	}
	os.Stdout.Close()
	if d, ok := strings.CutPrefix(how, "sleep:"); ok {
		pause, _ := time.ParseDuration(d)
		time.Sleep(pause)
		return 0
	}
	if how == "held" {
		io.Copy(io.Discard, os.Stdin)
		return 0
	}
	if n, ok := strings.CutPrefix(how, "signal:"); ok {
		sig, _ := strconv.Atoi(n)
		syscall.Kill(os.Getpid(), syscall.Signal(sig))
		select {}
	}
	code, _ := strconv.Atoi(how)
	return code
}

func invocation(ts time.Time) *record.Record {
	return &record.Record{ID: record.NewID(ts), TS: ts.UTC(), Kind: record.KindInvocation, Schema: 1, By: record.ByNone,
		Invocation: &record.Invocation{Tool: "docker", Command: "pull", Images: []string{"alpine:3"}, PID: int64(os.Getpid()), UID: int64(os.Getuid())}}
}

// running is an agent under test.
type running struct {
	t     *testing.T
	agent *Agent
	opts  Options
	stop  context.CancelFunc
	done  chan error
}

func options(t testing.TB) Options {
	t.Helper()
	run, err := os.MkdirTemp("/dev/shm", "agent")
	if err != nil {
		t.Fatalf("the tests need a tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	cfg := config.Default()
	cfg.RunDir, cfg.StateDir, cfg.Statsd = run, t.TempDir(), "off"
	return Options{Config: cfg, Store: hook.Store{Dir: cfg.Contexts()}, NoEvents: true, Host: record.Host{Name: "runner-1", BootID: "boot"},
		Version: "test", Logger: slog.New(slog.DiscardHandler), FlushTimeout: 2 * time.Second}
}

func start(t *testing.T, o Options) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: t, agent: New(o), opts: o, stop: cancel, done: make(chan error, 1)}
	r.agent.kernelCounters = ""
	go func() { r.done <- r.agent.Run(ctx) }()
	t.Cleanup(func() { cancel() })
	deadline := time.Now().Add(30 * time.Second)
	for {
		c, err := Dial(ctx, o.Config.Socket())
		if err == nil {
			c.Close()
			if r.agent.opened.Load() { // its queue takes connections before it is there for them
				return r
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not answer: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (r *running) end() {
	r.t.Helper()
	r.stop()
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("the agent ended with %v", err)
		}
	case <-time.After(30 * time.Second):
		r.t.Fatal("the agent does not end")
	}
}

// records reads the journal.
func (r *running) records() []record.Record {
	r.t.Helper()
	rd, err := journal.OpenReader(r.opts.Config.Journal(), journal.Position{})
	if err != nil {
		r.t.Fatal(err)
	}
	defer rd.Close()
	var all []record.Record
	for {
		line, err := rd.Next()
		if err != nil {
			return all
		}
		var rec record.Record
		if err := recordjson.Unmarshal(line.Data, &rec); err != nil {
			r.t.Fatalf("%v in %s", err, line.Data)
		}
		all = append(all, rec)
	}
}

// waitFor waits until the journal holds n records that match.
func (r *running) waitFor(n int, what string, match func(*record.Record) bool) []record.Record {
	r.t.Helper()
	var found []record.Record
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		found = found[:0]
		for _, rec := range r.records() {
			if match(&rec) {
				found = append(found, rec)
			}
		}
		if len(found) >= n {
			return found
		}
	}
	r.t.Fatalf("%d records of %s, want %d", len(found), what, n)
	return nil
}

func kind(k record.Kind) func(*record.Record) bool {
	return func(r *record.Record) bool { return r.Kind == k }
}

// call runs the test's command and returns the id of its record and the result of
// its delivery.
func (r *running) call(env []string, how string) (id string, result handover.Result, cmd *exec.Cmd) {
	r.t.Helper()
	cmd = exec.Command(os.Args[0], how)
	cmd.Env = append([]string{"AGENT_TEST_COMMAND=" + r.opts.Config.RunDir}, env...)
	out, _ := cmd.Output()
	var n int
	if _, err := fmt.Sscan(string(out), &id, &n); err != nil {
		r.t.Fatalf("the command said %q: %v", out, err)
	}
	return id, handover.Result(n), cmd
}

func seal(t *testing.T, o Options, tracking, repository, run string) hook.Context {
	t.Helper()
	c, err := o.Store.Seal(hook.Context{
		CI:   record.CI{Repository: repository, Workflow: "CI", Job: "build", RunID: run, RunAttempt: 1, TrackingID: tracking, Runner: &record.Runner{Name: "runner-1"}},
		Host: record.Host{Name: "runner-1"}, Started: time.Now(), Workspace: "/w",
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// kernelAtLeast tells what the ladder of ends can give here.
func kernelAtLeast(major, minor int) bool {
	var uts syscall.Utsname
	syscall.Uname(&uts)
	var b []byte
	for _, c := range uts.Release {
		b = append(b, byte(c))
	}
	var a, i int
	fmt.Sscanf(string(b), "%d.%d", &a, &i)
	return a > major || a == major && i >= minor
}

// TestParentOfANestedCall: a docker that a plugin of docker calls names the call that the
// plugin is of, which the agent finds among the ancestors of the caller's process. What
// a caller itself says of its parent is not heard.
func TestParentOfANestedCall(t *testing.T) {
	faults.Case(t, "SH-55")
	o := options(t)
	r := start(t, o)
	defer r.end()
	cmd := exec.Command(os.Args[0], "plugin:7")
	cmd.Env = []string{"AGENT_TEST_COMMAND=" + o.Config.RunDir, "AGENT_TEST_PARENT=" + record.NewID(time.Now())}
	out, _ := cmd.Output()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		t.Fatalf("exit code %d: %s", code, out)
	}
	words := strings.Fields(string(out)) // id and result of each
	if len(words) != 4 {
		t.Fatalf("the commands said %q", out)
	}
	outer, inner := r.of(words[0]), r.of(words[2])
	if outer.Invocation.Nested || outer.Invocation.ParentID != "" {
		t.Errorf("the outer call: %s", record.Append(nil, &outer))
	}
	if !inner.Invocation.Nested || inner.Invocation.ParentID != outer.ID {
		t.Errorf("the nested call of %s: %s", outer.ID, record.Append(nil, &inner))
	}
	// Without a call among its ancestors it has none, whatever it says.
	id, _, _ := r.call([]string{"DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND=docker", "AGENT_TEST_PARENT=" + outer.ID}, "0")
	if alone := r.of(id); !alone.Invocation.Nested || alone.Invocation.ParentID != "" {
		t.Errorf("a call that says whose it is: %s", record.Append(nil, &alone))
	}
}

func TestEndsOfCommands(t *testing.T) {
	r := start(t, options(t))
	defer r.end()
	for how, check := range map[string]func(e *record.End) bool{
		"0":           func(e *record.End) bool { return e.ExitCode != nil && *e.ExitCode == 0 && e.Signal == 0 },
		"37":          func(e *record.End) bool { return e.ExitCode != nil && *e.ExitCode == 37 },
		"255":         func(e *record.End) bool { return e.ExitCode != nil && *e.ExitCode == 255 },
		"signal:9":    func(e *record.End) bool { return e.ExitCode == nil && e.Signal == 9 },
		"signal:15":   func(e *record.End) bool { return e.ExitCode == nil && e.Signal == 15 },
		"sleep:300ms": func(e *record.End) bool { return e.DurationNS >= 300e6 && e.DurationNS < 5e9 },
	} {
		id, result, _ := r.call(nil, how)
		if result != handover.Acked && result != handover.QueuedToo { // a busy machine may answer late
			t.Errorf("%s: result %d", how, result)
		}
		end := r.waitFor(1, how, func(rec *record.Record) bool { return rec.End != nil && rec.End.InvocationID == id })[0].End
		if end.Command != "pull" || !slices.Equal(end.Images, []string{"alpine:3"}) || end.DurationNS <= 0 {
			t.Errorf("%s: end %+v", how, end)
		}
		switch {
		case kernelAtLeast(6, 15):
			if end.Source != sourceInfo || !check(end) {
				t.Errorf("%s: end %+v, exit code %v", how, end, end.ExitCode)
			}
		default:
			t.Logf("NOT RUN: exit codes need Linux 6.15; this end was seen by %s", end.Source)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	r := start(t, options(t))
	defer r.end()
	const calls = 300 // e2e takes a thousand, with the built binaries
	want, late := make(map[string]int), make(map[string]bool)
	var mu sync.Mutex
	var wg sync.WaitGroup
	limit := make(chan struct{}, 100)
	for i := range calls {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			id, result, cmd := r.call(nil, strconv.Itoa(i%256))
			if cmd.ProcessState.ExitCode() != i%256 || result == handover.Lost {
				t.Errorf("call %d: exit %d, result %d", i, cmd.ProcessState.ExitCode(), result)
			}
			mu.Lock()
			want[id] = i % 256
			// On a machine so busy that the agent did not answer in time, the record is in the
			// file too, and may be read there when the process is gone.
			late[id] = result != handover.Acked
			mu.Unlock()
		})
	}
	wg.Wait()
	r.waitFor(calls, "invocations", kind(record.KindInvocation))
	ends := r.waitFor(calls, "ends", kind(record.KindInvocationEnd))
	ids := map[string]int{}
	for _, rec := range r.records() {
		ids[rec.ID]++
	}
	for id := range want {
		if ids[id] != 1 {
			t.Errorf("invocation %s is there %d times", id, ids[id])
		}
	}
	wrong := 0
	for _, e := range ends {
		if kernelAtLeast(6, 15) && !(late[e.End.InvocationID] && e.End.Source == sourceUnknown) && (e.End.ExitCode == nil || int(*e.End.ExitCode) != want[e.End.InvocationID]) {
			wrong++
			call := r.of(e.End.InvocationID)
			t.Logf("%+v, want exit code %d; the record came by %s", *e.End, want[e.End.InvocationID], call.Invocation.Path)
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d exit codes are wrong", wrong, len(ends))
	}
}

func TestWhoseCallItIs(t *testing.T) {
	o := options(t)
	outside := invocation(time.Now())
	os.Mkdir(o.Config.Spool(), 0o733)
	if err := os.WriteFile(o.Config.Spool()+"/0.jsonl", record.Append(nil, outside), 0o600); err != nil {
		t.Fatal(err)
	}
	c := seal(t, o, "github_a", "octo/shop", "42")
	r := start(t, o)
	defer r.end()
	for _, test := range []struct {
		name  string
		env   []string
		by    record.By
		claim bool
		step  string
	}{
		{"a step", []string{"RUNNER_TRACKING_ID=github_a", "GITHUB_REPOSITORY=octo/shop", "GITHUB_RUN_ID=42", "GITHUB_ACTION=__run_3"}, record.BySealed, false, "__run_3"},
		{"the runner itself", []string{"RUNNER_TRACKING_ID=github_a", "CI=true"}, record.BySealed, false, ""},
		{"sudo hides everything", nil, record.ByInferred, false, ""},
		{"the run's id without tracking id", []string{"GITHUB_REPOSITORY=octo/shop", "GITHUB_RUN_ID=42"}, record.BySealed, false, ""},
		{"a forged repository stays a claim", []string{"RUNNER_TRACKING_ID=github_a", "GITHUB_REPOSITORY=victim/repo", "GITHUB_RUN_ID=42"}, record.BySealed, true, ""},
	} {
		id, _, _ := r.call(test.env, "0")
		rec := r.waitFor(1, test.name, func(rec *record.Record) bool { return rec.ID == id })[0]
		if rec.By != test.by || rec.CI == nil || rec.CI.Repository != "octo/shop" || rec.CI.RunID != "42" || rec.CI.Step != test.step || (rec.Claim != nil) != test.claim || rec.OutsideJob {
			t.Errorf("%s: %s", test.name, record.Append(nil, &rec))
		}
		if rec.Invocation.Path != "socket" || rec.Host.Name != "runner-1" {
			t.Errorf("%s: path %q host %+v", test.name, rec.Invocation.Path, rec.Host)
		}
		end := r.waitFor(1, "end of "+test.name, func(rec *record.Record) bool { return rec.End != nil && rec.End.InvocationID == id })[0]
		if end.By != test.by || end.CI == nil || end.CI.Repository != "octo/shop" {
			t.Errorf("%s: the end is by %s of %+v", test.name, end.By, end.CI)
		}
	}
	rec := r.waitFor(1, "the call before the job", func(rec *record.Record) bool { return rec.ID == outside.ID })[0]
	if !rec.OutsideJob || rec.CI != nil || rec.By != record.ByNone || rec.Invocation.Path != "file" {
		t.Errorf("the runner's wait loop: %s", record.Append(nil, &rec))
	}
	// A job that was never sealed keeps the caller's word.
	id, _, _ := r.call([]string{"RUNNER_TRACKING_ID=github_other", "GITHUB_REPOSITORY=octo/other", "GITHUB_RUN_ID=7"}, "0")
	if rec := r.waitFor(1, "a job that was never sealed", func(rec *record.Record) bool { return rec.ID == id })[0]; rec.CI.Repository != "octo/other" {
		t.Errorf("%s", record.Append(nil, &rec))
	}
	if n := len(r.waitFor(1, "job.start", kind(record.KindJobStart))); n != 1 {
		t.Errorf("%d job.start", n)
	}
	if err := o.Store.End(c.Key, hook.Completed, time.Now()); err != nil {
		t.Fatal(err)
	}
	client, err := Dial(t.Context(), o.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.JobEnd(t.Context(), c.Key, hook.Completed); err != nil {
		t.Fatal(err)
	}
	if err := client.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	end := r.waitFor(1, "job.end", kind(record.KindJobEnd))[0]
	if end.Job.Outcome != hook.Completed || end.CI.Repository != "octo/shop" {
		t.Errorf("%s", record.Append(nil, &end))
	}
	// The next call belongs to no job any more.
	id, _, _ = r.call(nil, "0")
	if rec := r.waitFor(1, "after the job", func(rec *record.Record) bool { return rec.ID == id })[0]; !rec.OutsideJob || rec.CI != nil {
		t.Errorf("after the job: %s", record.Append(nil, &rec))
	}
	st, err := client.Status(t.Context())
	if err != nil || st.Counts.Socket < 7 || st.Counts.Spooled < 1 || st.PID != os.Getpid() || st.Job != "" {
		t.Errorf("status %+v, %v", st, err)
	}
}

// A loss is a job's only where all of its time is. What was lost before the job, or
// since nobody knows when, is charged to none.
func TestWhoseLossItIs(t *testing.T) {
	o := options(t)
	job := seal(t, o, "github_1", "octo/a", "1")
	r := start(t, o)
	began := job.Started
	for _, row := range []struct {
		name     string
		from, to time.Time
		by       record.By
	}{
		{"within the job", began.Add(time.Millisecond), began.Add(2 * time.Millisecond), record.ByInferred},
		{"since before the job", began.Add(-time.Hour), began.Add(time.Millisecond), record.ByNone},
		{"since nobody knows when", time.Time{}, began.Add(time.Millisecond), record.ByNone},
		{"before the job", began.Add(-2 * time.Hour), began.Add(-time.Hour), record.ByNone},
	} {
		loss := &record.Record{Kind: record.KindLoss, TS: row.to, Loss: &record.Loss{Cause: "shim", Count: 1, From: row.from, To: row.to}}
		r.agent.stampByTime(loss)
		if loss.By != row.by || (loss.CI != nil) != (row.by == record.ByInferred) {
			t.Errorf("%s: by %q, of %+v", row.name, loss.By, loss.CI)
		}
	}
}

// TestTwoJobsAtOnce: with two runners on one machine, what names no job could be
// either's; it is nobody's, and counts as unattributed.
func TestTwoJobsAtOnce(t *testing.T) {
	o := options(t)
	seal(t, o, "github_a", "octo/shop", "42")
	if _, err := o.Store.Seal(hook.Context{CI: record.CI{Repository: "octo/web", RunID: "43", TrackingID: "github_b", Runner: &record.Runner{Name: "runner-2"}}, Started: time.Now()}); err != nil {
		t.Fatal(err)
	}
	r := start(t, o)
	defer r.end()
	id, _, _ := r.call(nil, "0")
	if rec := r.waitFor(1, "a call that names no job", func(rec *record.Record) bool { return rec.ID == id })[0]; rec.OutsideJob || rec.CI != nil || rec.By != record.ByNone {
		t.Errorf("%s", record.Append(nil, &rec))
	}
	id, _, _ = r.call([]string{"RUNNER_TRACKING_ID=github_b"}, "0")
	if rec := r.waitFor(1, "a call of the second job", func(rec *record.Record) bool { return rec.ID == id })[0]; rec.By != record.BySealed || rec.CI.Repository != "octo/web" {
		t.Errorf("%s", record.Append(nil, &rec))
	}
}

// TestTheNextJobSupersedes: a job whose end nobody told is closed when the next one
// of its runner begins, and its records stay its own (HK-07).
func TestTheNextJobSupersedes(t *testing.T) {
	o := options(t)
	seal(t, o, "github_a", "octo/shop", "42")
	r := start(t, o)
	defer r.end()
	r.waitFor(1, "job.start", kind(record.KindJobStart))
	c := seal(t, o, "github_b", "octo/web", "43")
	client, err := Dial(t.Context(), o.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.JobStart(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	end := r.waitFor(1, "job.end", kind(record.KindJobEnd))[0]
	if end.Job.Outcome != hook.Superseded || end.CI.Repository != "octo/shop" || !end.TS.Equal(c.Started) {
		t.Errorf("%s", record.Append(nil, &end))
	}
	id, _, _ := r.call(nil, "0")
	if rec := r.waitFor(1, "a call of the next job", func(rec *record.Record) bool { return rec.ID == id })[0]; rec.CI == nil || rec.CI.Repository != "octo/web" {
		t.Errorf("%s", record.Append(nil, &rec))
	}
}

// TestStoppedAgent: records that the agent did not answer in time come by socket and
// by file, and are counted once.
func TestStoppedAgent(t *testing.T) {
	o := options(t)
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: o.Config.Socket(), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	os.Mkdir(o.Config.Spool(), 0o733)
	r := &running{t: t, opts: o}
	ids := map[string]bool{}
	for range 20 {
		id, result, _ := r.call(nil, "0")
		if result != handover.QueuedToo {
			t.Fatalf("result %d", result)
		}
		ids[id] = true
	}
	ln.Close()
	r = start(t, o)
	got := r.waitFor(len(ids), "invocations", kind(record.KindInvocation))
	// The files are put away once they rest.
	deadline := time.Now().Add(10 * time.Second)
	for {
		left, _ := filepath.Glob(o.Config.Spool() + "/*.jsonl")
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v are not put away", left)
		}
		time.Sleep(50 * time.Millisecond)
	}
	r.end()
	for _, rec := range got {
		if !ids[rec.ID] {
			t.Errorf("%s was invented", rec.ID)
		}
		delete(ids, rec.ID)
	}
	if len(ids) != 0 {
		t.Errorf("%d records are missing", len(ids))
	}
}

// TestEndOfASpooledCommand: a command whose record came by file, because it began
// before the agent, has its end seen too while it still runs.
func TestEndOfASpooledCommand(t *testing.T) {
	o := options(t)
	os.Mkdir(o.Config.Spool(), 0o733)
	cmd := exec.Command(os.Args[0], "held")
	cmd.Env = []string{"AGENT_TEST_COMMAND=" + o.Config.RunDir}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	var result handover.Result
	if _, err := fmt.Fscan(out, &id, &result); err != nil || result != handover.Spooled {
		t.Fatalf("the command said %q %d, %v", id, result, err)
	}
	began := time.Now()
	r := start(t, o)
	defer r.end()
	for deadline := began.Add(30 * time.Second); r.agent.Status().Running == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody waits for the command's end")
		}
	}
	held := time.Since(began)
	in.Close()
	cmd.Wait()
	end := r.waitFor(1, "end", kind(record.KindInvocationEnd))[0].End
	if end.InvocationID != id || end.DurationNS < held.Nanoseconds() {
		t.Errorf("end %+v after %v", end, held)
	}
	if kernelAtLeast(6, 15) && (end.ExitCode == nil || *end.ExitCode != 0) {
		t.Errorf("exit code %v by %s", end.ExitCode, end.Source)
	}
	if started, ok := processStart(os.Getpid()); !ok || started > monotonic() || started < 0 {
		t.Errorf("this process started at %d, it is %d now", started, monotonic())
	}
}

// TestSpoolAfterAKill: an agent that starts over a spool and a journal of a dead one
// takes each record once, and what shims could not write is a loss.
func TestSpoolAfterAKill(t *testing.T) {
	o := options(t)
	os.Mkdir(o.Config.Spool(), 0o733)
	var lines []byte
	ids := map[string]bool{}
	for i := range 10 {
		rec := invocation(time.Now())
		ids[rec.ID] = true
		line := record.Append(nil, rec)
		lines = append(lines, line...)
		if i == 4 {
			lines = append(lines, line[:len(line)/2]...) // a killed writer's torn line, then the next record behind it
		}
	}
	lines = append(lines, `{"id":"018f0000-0000-7000-8000-000000000000","ts":"2026-01-01T00:00:00Z","kind":"job.end","schema":1,"by":"sealed"}`+"\nnoise\n"...)
	file := o.Config.Spool() + "/0.jsonl"
	os.WriteFile(file, lines, 0o600)
	os.WriteFile(o.Config.Spool()+"/0.lost", []byte("\nxxx"), 0o600)
	r := start(t, o)
	r.waitFor(10, "invocations", kind(record.KindInvocation))
	r.end()
	os.Remove(o.Config.StateDir + "/spool.json") // as if killed before it was written
	os.WriteFile(o.Config.Spool()+"/0.lost", []byte("\nxxxx"), 0o600)
	r = start(t, o)
	time.Sleep(3 * spoolEvery)
	r.end()
	count := map[string]int{}
	losses := map[string]int64{}
	for _, rec := range r.records() {
		switch rec.Kind {
		case record.KindInvocation:
			count[rec.ID]++
		case record.KindLoss:
			losses[rec.Loss.Cause] += rec.Loss.Count
		case record.KindJobEnd:
			t.Error("a spool file forged the end of a job")
		}
	}
	for id := range ids {
		if count[id] != 1 {
			t.Errorf("%s is there %d times", id, count[id])
		}
	}
	if len(count) != len(ids) || losses["shim"] < 4 || losses["torn_line"] < 2 {
		t.Errorf("%d invocations, losses %v", len(count), losses)
	}

	// One that ended in peace told all of it, and the next one tells none of it again.
	before := len(r.records())
	r = start(t, o)
	r.end()
	if again := r.records()[before:]; len(again) != 0 {
		t.Errorf("told again: %s", record.Append(nil, &again[0]))
	}
}

func TestWhatTheSocketRefuses(t *testing.T) {
	r := start(t, options(t))
	defer r.end()
	good := string(record.Append(nil, invocation(time.Now())))
	for name, msg := range map[string]string{
		"an event":           strings.Replace(good, `"kind":"invocation"`, `"kind":"event"`, 1),
		"a loss inside":      strings.Replace(good, `"invocation":`, `"loss":{"cause":"x"},"invocation":`, 1),
		"an end inside":      strings.Replace(good, `"invocation":`, `"end":{},"invocation":`, 1),
		"half a record":      good[:len(good)/2],
		"a short id":         `{"id":"x","ts":"2026-01-01T00:00:00Z","kind":"invocation","schema":1,"by":"none","invocation":{"uid":0}}`,
		"a message too long": `{"id":"` + strings.Repeat("x", handover.MaxMessage+10),
		"nothing":            "",
	} {
		conn, err := net.Dial("unixpacket", r.opts.Config.Socket())
		if err != nil {
			t.Fatal(err)
		}
		if msg != "" {
			conn.Write([]byte(msg))
		}
		conn.SetReadDeadline(time.Now().Add(slowTimeout + 5*time.Second))
		var ack [1]byte
		if n, err := conn.Read(ack[:]); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: answered %q, %v", name, ack[:n], err)
		}
		conn.Close()
	}
	for _, rec := range r.records() {
		if rec.Loss == nil || isLoss(&rec) {
			t.Errorf("journalled %s", record.Append(nil, &rec))
		}
	}
	client, err := Dial(t.Context(), r.opts.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.ask(t.Context(), request{Control: "shutdown"}); err == nil || !strings.Contains(err.Error(), `unknown control message "shutdown"`) {
		t.Errorf("unknown control: %v", err)
	}
	if err := client.JobEnd(t.Context(), "no-such-key", ""); err == nil {
		t.Error("ended a job that never was")
	}
}

// The kill switch keeps an agent from beginning, and ends one that runs: a service is
// ended by no job.
func TestSwitchedOff(t *testing.T) {
	require.Root(t) // only its file is a switch
	o := options(t)
	o.OffFile = filepath.Join(t.TempDir(), "off")
	r := start(t, o)
	if err := os.WriteFile(o.OffFile, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-r.done:
		if err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	case <-time.After(watchRunner + 20*time.Second):
		t.Fatal("the agent goes on")
	}
	if err := New(o).Run(t.Context()); !errors.Is(err, ErrOff) || !strings.Contains(err.Error(), o.OffFile) {
		t.Errorf("a new agent: %v", err)
	}
	if err := os.Chown(o.OffFile, 12345, 12345); err != nil { // a job's
		t.Fatal(err)
	}
	start(t, o).end()
	o.OffFile, o.Config.Enabled = "", false
	if err := New(o).Run(t.Context()); !errors.Is(err, ErrOff) || !strings.Contains(err.Error(), "enabled = false") {
		t.Errorf("a new agent with enabled = false: %v", err)
	}
}

func TestOneAgentAtATime(t *testing.T) {
	o := options(t)
	r := start(t, o)
	if err := New(o).Run(t.Context()); !errors.Is(err, ErrRunning) {
		t.Errorf("a second agent: %v", err)
	}
	if id, result, _ := r.call(nil, "0"); result != handover.Acked && result != handover.QueuedToo || id == "" {
		t.Errorf("the second agent broke the first: result %d", result)
	}
	r.end()
}

func TestEndsWithItsJob(t *testing.T) {
	o := options(t)
	o.ExitOnJobEnd = true
	c := seal(t, o, "github_a", "octo/shop", "42")
	r := start(t, o)
	client, err := Dial(t.Context(), o.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	o.Store.End(c.Key, hook.Completed, time.Now())
	if err := client.JobEnd(t.Context(), c.Key, hook.Completed); err != nil {
		t.Fatal(err)
	}
	client.Close()
	select {
	case err := <-r.done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(lingerAfterJob + 20*time.Second):
		t.Error("the agent stays after its job")
	}
	if _, err := os.Stat(o.Config.Socket()); err == nil {
		t.Error("the socket stays after the agent")
	}
}

// TestRunnerGone: the job-completed hook does not run when the runner is killed; the
// agent closes the context by itself (HK-10).
func TestRunnerGone(t *testing.T) {
	o := options(t)
	runner := exec.Command("sleep", "60")
	if err := runner.Start(); err != nil {
		t.Fatal(err)
	}
	c := hook.Context{CI: record.CI{Repository: "octo/shop", RunID: "42", TrackingID: "github_a"}, Started: time.Now(), RunnerPID: runner.Process.Pid, RunnerStart: startTicks(t, runner.Process.Pid)}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		c.Host.BootID = strings.TrimSpace(string(b))
	}
	if host, err := os.Hostname(); err == nil {
		c.Host.Name = host
	}
	if _, err := o.Store.Seal(c); err != nil {
		t.Fatal(err)
	}
	r := start(t, o)
	defer r.end()
	r.waitFor(1, "job.start", kind(record.KindJobStart))
	runner.Process.Kill()
	runner.Wait()
	end := r.waitFor(1, "job.end", kind(record.KindJobEnd))[0]
	if end.Job.Outcome != hook.Abandoned {
		t.Errorf("outcome %q", end.Job.Outcome)
	}
}

func startTicks(t *testing.T, pid int) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+2:]))
	ticks, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return ticks
}

// TestEndByTheSocket: on a kernel without pidfds of peers, the command's end is the
// end of file of the socket that it and its children hold.
func TestEndByTheSocket(t *testing.T) {
	faults.Case(t, "AB-12")
	r := start(t, options(t))
	defer r.end()
	for _, row := range []struct {
		name   string
		with   func(theirs int)
		source string
	}{
		{"all copies are closed", func(theirs int) { unix.Close(theirs) }, sourceEOF},
		{"the command writes into it", func(theirs int) { unix.Write(theirs, []byte("x")); unix.Close(theirs) }, sourceUnknown},
	} {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		call := invocation(time.Now())
		call.Invocation.MonoNS = monotonic()
		time.AfterFunc(50*time.Millisecond, func() { row.with(fds[1]) })
		r.agent.watchEOF(t.Context(), fds[0], call)
		end := r.waitFor(1, row.name, func(rec *record.Record) bool { return rec.End != nil && rec.End.InvocationID == call.ID })[0].End
		if end.Source != row.source || end.ExitCode != nil || (end.DurationNS >= 50e6) != (row.source == sourceEOF) {
			t.Errorf("%s: end %+v", row.name, end)
		}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	call := invocation(time.Now())
	r.agent.watchEOF(ctx, fds[0], call)
	for _, rec := range r.records() {
		if rec.End != nil && rec.End.InvocationID == call.ID {
			t.Errorf("the agent ended first, and said of the command: %+v", rec.End)
		}
	}
}
