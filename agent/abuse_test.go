package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
)

// send sends one message the way a shim does, from this process, and says whether it
// was acknowledged.
func (r *running) send(msg []byte) bool {
	r.t.Helper()
	conn, err := net.Dial("unixpacket", r.opts.Config.Socket())
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(msg); err != nil {
		r.t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	var ack [1]byte
	n, err := conn.Read(ack[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatal("the agent did not answer within a minute")
	}
	return n == 1
}

// claims is an invocation as a process of a job would send it.
func claims(trackingID, repository string, at time.Time) *record.Record {
	r := invocation(at)
	r.By = record.ByEnvironment
	r.CI = &record.CI{Repository: repository, RunID: "42", RunAttempt: 1, Job: "build", TrackingID: trackingID}
	return r
}

// isLoss says whether a record is a loss of this agent's own making. What shims of the
// whole machine counted in the kernel, those of other tests too, is told by every agent.
func isLoss(r *record.Record) bool { return r.Loss != nil && r.Loss.Cause != "shim" }

func sealAt(t *testing.T, o Options, c hook.Context) hook.Context {
	t.Helper()
	if c.CI.Runner == nil {
		c.CI.Runner = &record.Runner{Name: "runner-" + c.CI.TrackingID}
	}
	sealed, err := o.Store.Seal(c)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

// of waits for the record with an id.
func (r *running) of(id string) record.Record {
	r.t.Helper()
	return r.waitFor(1, id, func(rec *record.Record) bool { return rec.ID == id })[0]
}

// TestForgedContext: a job cannot have its calls counted as another job's. What it says
// stays its own word (claim, or by environment).
func TestForgedContext(t *testing.T) {
	faults.Case(t, "AB-01")
	o := options(t)
	now := time.Now()
	before := sealAt(t, o, hook.Context{CI: record.CI{Repository: "victim/before", RunID: "1", TrackingID: "github_before"}, Started: now.Add(-2 * time.Hour)})
	if err := o.Store.End(before.Key, hook.Completed, now.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	sealAt(t, o, hook.Context{CI: record.CI{Repository: "octo/mine", RunID: "42", RunAttempt: 1, Job: "build", TrackingID: "github_mine"}, Started: now.Add(-time.Minute)})
	r := start(t, o)
	defer r.end()
	for _, row := range []struct {
		name       string
		rec        *record.Record
		by         record.By
		repository string
		claim      string // repository of the claim
	}{
		{"another repository", claims("github_mine", "victim/repo", now), record.BySealed, "octo/mine", "victim/repo"},
		{"no name, in the time of the job before", func() *record.Record {
			rec := invocation(now.Add(-90 * time.Minute))
			return rec
		}(), record.ByInferred, "octo/mine", ""},
		{"the id of the job before, now", claims("github_before", "victim/before", now), record.ByEnvironment, "victim/before", ""},
		{"the id of the job before, in its time", claims("github_before", "victim/before", now.Add(-90*time.Minute)), record.ByEnvironment, "victim/before", ""},
		{"an id that nobody sealed", claims("github_invented", "victim/other", now), record.ByEnvironment, "victim/other", ""},
		{"a time to come", claims("github_mine", "octo/mine", now.Add(1000*time.Hour)), record.BySealed, "octo/mine", ""},
		{"says that it is sealed, and by whom", func() *record.Record {
			rec := claims("", "victim/repo", now)
			rec.By, rec.OutsideJob = record.BySealed, true
			rec.Host = &record.Host{Name: "victim-host", BootID: "victim-boot"}
			rec.Invocation.UID, rec.Invocation.PID, rec.Invocation.Path = 4711, 1, "file"
			return rec
		}(), record.ByInferred, "octo/mine", "victim/repo"},
	} {
		if !r.send(record.Append(nil, row.rec)) {
			t.Errorf("%s: refused; a claim is kept, and visible", row.name)
			continue
		}
		got := r.of(row.rec.ID)
		claim := ""
		if got.Claim != nil {
			claim = got.Claim.Repository
		}
		if got.By != row.by || got.CI == nil || got.CI.Repository != row.repository || claim != row.claim || got.OutsideJob {
			t.Errorf("%s: %s", row.name, record.Append(nil, &got))
		}
		if d := time.Since(got.TS); d < -time.Minute || d > 10*time.Minute {
			t.Errorf("%s: at %v, and it came just now", row.name, got.TS)
		}
		if got.Host.Name != o.Host.Name || got.Host.BootID != o.Host.BootID || got.Invocation.UID != int64(os.Getuid()) || got.Invocation.PID != int64(os.Getpid()) || got.Invocation.Path != "socket" {
			t.Errorf("%s: what the kernel knows of the sender is not what the record says: %s", row.name, record.Append(nil, &got))
		}
	}
}

// The last calls of a job come after its end was written down, and none an hour later:
// whoever then says its id is another.
func TestTheLastCallsOfAJob(t *testing.T) {
	for _, row := range []struct {
		name  string
		since time.Duration
		by    record.By
	}{
		{"just now", 10 * time.Second, record.BySealed},
		{"minutes ago", 5 * time.Minute, record.ByEnvironment},
	} {
		o := options(t)
		now := time.Now()
		c := sealAt(t, o, hook.Context{CI: record.CI{Repository: "octo/mine", RunID: "42", TrackingID: "github_mine"}, Started: now.Add(-time.Hour)})
		if err := o.Store.End(c.Key, hook.Completed, now.Add(-row.since)); err != nil {
			t.Fatal(err)
		}
		r := start(t, o)
		rec := claims("github_mine", "octo/mine", now)
		if !r.send(record.Append(nil, rec)) {
			t.Errorf("%s: refused", row.name)
		} else if got := r.of(rec.ID); got.By != row.by {
			t.Errorf("the job ended %s: %s", row.name, record.Append(nil, &got))
		}
		r.end()
	}
}

// TestTheCallersAncestorsDecide: with two jobs on one machine, who takes the other's
// tracking id is still a child of its own Worker.
func TestTheCallersAncestorsDecide(t *testing.T) {
	faults.Case(t, "AB-01")
	o := options(t)
	// Stands for the Worker: it starts the command when it is told to, and is the parent.
	worker := exec.Command("/bin/sh", "-c", `read line; "$0" 0; read line`, os.Args[0])
	worker.Env = []string{"AGENT_TEST_COMMAND=" + o.Config.RunDir, "RUNNER_TRACKING_ID=github_victim", "GITHUB_REPOSITORY=victim/repo", "GITHUB_RUN_ID=1"}
	tell, err := worker.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := worker.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	defer worker.Wait()
	defer tell.Close()
	sealAt(t, o, hook.Context{CI: record.CI{Repository: "victim/repo", RunID: "1", TrackingID: "github_victim"}, Started: time.Now(), RunnerPID: 1, RunnerStart: startTicks(t, 1)})
	sealAt(t, o, hook.Context{CI: record.CI{Repository: "octo/mine", RunID: "42", TrackingID: "github_mine"}, Started: time.Now(), RunnerPID: worker.Process.Pid, RunnerStart: startTicks(t, worker.Process.Pid)})
	r := start(t, o)
	defer r.end()
	fmt.Fprintln(tell)
	var id string
	if _, err := fmt.Fscan(out, &id); err != nil {
		t.Fatal(err)
	}
	if got := r.of(id); got.By != record.ByInferred || got.CI == nil || got.CI.Repository != "octo/mine" || got.Claim == nil || got.Claim.Repository != "victim/repo" {
		t.Errorf("%s", record.Append(nil, &got))
	}
	// This process is nobody's child here: what it says is its word.
	orphan := claims("github_victim", "victim/repo", time.Now())
	r.send(record.Append(nil, orphan))
	if got := r.of(orphan.ID); got.By != record.ByEnvironment {
		t.Errorf("an orphan was believed: %s", record.Append(nil, &got))
	}
}

// TestForgedSpool: the append files are the callers' own. What they write there is held
// to what is known of the file.
func TestForgedSpool(t *testing.T) {
	faults.Case(t, "AB-02")
	o := options(t)
	now := time.Now()
	before := sealAt(t, o, hook.Context{CI: record.CI{Repository: "victim/before", RunID: "1", TrackingID: "github_before"}, Started: now.Add(-2 * time.Hour)})
	if err := o.Store.End(before.Key, hook.Completed, now.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	sealAt(t, o, hook.Context{CI: record.CI{Repository: "octo/mine", RunID: "42", TrackingID: "github_mine"}, Started: now.Add(-time.Minute)})
	if err := hook.MakeRunDir(o.Config.RunDir); err != nil {
		t.Fatal(err)
	}
	uid := strconv.Itoa(os.Getuid())
	forged := invocation(now.Add(-90 * time.Minute))
	forged.Invocation.UID = 4711
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	linked, strange := invocation(now), invocation(now)
	for path, lines := range map[string][]byte{
		filepath.Join(o.Config.Spool(), uid+".jsonl"): record.Append(nil, forged),
		elsewhere: record.Append(nil, linked),
		filepath.Join(o.Config.Spool(), "4711.jsonl"): record.Append(nil, strange), // made by this uid, not by 4711
	} {
		if err := os.WriteFile(path, lines, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Where fs.protected_hardlinks is 0, anybody can give another's file a second name.
	hard := filepath.Join(o.Config.RunDir, "hard")
	if err := os.WriteFile(hard, record.Append(nil, linked), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.Symlink(elsewhere, filepath.Join(o.Config.Spool(), uid+".jsonl.1.done")),
		os.Link(hard, filepath.Join(o.Config.Spool(), uid+".jsonl.2.done")),
		unix.Mkfifo(filepath.Join(o.Config.Spool(), uid+".jsonl.3.done"), 0o600),
		os.Symlink("/etc/passwd", filepath.Join(o.Config.Spool(), uid+".lost")),
		os.Mkdir(filepath.Join(o.Config.Spool(), uid+".jsonl.4.done"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	r := start(t, o)
	got := r.of(forged.ID)
	if got.By != record.ByInferred || got.CI.Repository != "octo/mine" || got.Invocation.UID != int64(os.Getuid()) || time.Since(got.TS) > 10*time.Minute {
		t.Errorf("%s", record.Append(nil, &got))
	}
	r.end()
	for _, rec := range r.records() {
		if rec.ID == linked.ID || rec.ID == strange.ID {
			t.Errorf("read through a link, or from a file of another name: %s", record.Append(nil, &rec))
		}
		if isLoss(&rec) {
			t.Errorf("a loss: %s", record.Append(nil, &rec))
		}
	}
	for _, path := range []string{elsewhere, hard} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("the file behind a link was removed: %v", err)
		}
	}
}

// poison are messages that a hostile job may send, by what is wrong with them, and
// whether they are records of an invocation in spite of it.
func poison() map[string]struct {
	msg   string
	taken bool
} {
	good := string(record.Append(nil, invocation(time.Now())))
	fresh := func() string { return string(record.Append(nil, invocation(time.Now()))) }
	with := func(member string) string {
		return strings.Replace(fresh(), `"invocation":`, member+`,"invocation":`, 1)
	}
	in := func(member string) string {
		return strings.Replace(fresh(), `"invocation":{`, `"invocation":{`+member+`,`, 1)
	}
	nested := strings.Repeat(`{"a":`, 30) + `1` + strings.Repeat(`}`, 30)
	smuggled := `{"id":"018f0000-0000-7000-8000-00000000000a","ts":"2026-01-01T00:00:00Z","kind":"job.end","schema":1,"by":"sealed"}`
	ofKind := func(kind string) string {
		return strings.Replace(fresh(), `"kind":"invocation"`, `"kind":"`+kind+`"`, 1)
	}
	id := func(id string) string { return strings.Replace(good, good[7:43], id, 1) }
	return map[string]struct {
		msg   string
		taken bool
	}{
		"a loss":                                 {`{"id":"018f0000-0000-7000-8000-000000000001","ts":"2026-01-01T00:00:00Z","kind":"loss","schema":1,"by":"none","loss":{"cause":"disk_full","count":1000000}}` + "\n", false},
		"a job.start":                            {ofKind("job.start"), false},
		"a job.end":                              {ofKind("job.end"), false},
		"an invocation.end":                      {ofKind("invocation.end"), false},
		"an event":                               {ofKind("event"), false},
		"the header of a segment":                {`{"id":"018f0000-0000-7000-8000-000000000001","kind":"segment"}`, false},
		"a loss within":                          {with(`"loss":{"cause":"x","count":-5}`), false},
		"an end within":                          {with(`"end":{}`), false},
		"a job within":                           {with(`"job":{}`), false},
		"an event within":                        {with(`"event":{}`), false},
		"a claim of its own":                     {with(`"claim":{"repository":"a/b"}`), false},
		"nested 100 deep":                        {with(`"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100)), false},
		"nested 30,000 deep":                     {with(`"x":` + strings.Repeat("[", 30000) + strings.Repeat("]", 30000)), false},
		"nested deeper than a journal takes":     {in(`"x":` + nested), false},
		"another record within":                  {with(`"x":` + smuggled), false},
		"another record within its invocation":   {in(`"x":` + smuggled), false},
		"another record, well hidden":            {strings.Replace(fresh(), `"kind":`, `"ci":{ "id":"018f0000-0000-7000-8000-00000000000a","ts":"2026-01-01T00:00:00Z","kind":"loss"},"kind":`, 1), false},
		"more than 64 KiB":                       {in(`"x":"` + strings.Repeat("x", 64<<10) + `"`), false},
		"64 KiB of what grows when it is stored": {in(`"target":"` + strings.Repeat("\x7f", 20000) + `"`), false},
		"a number beyond 64 bits":                {in(`"argc":99999999999999999999`), false},
		"a number with 10,000 digits":            {in(`"argc":` + strings.Repeat("9", 10000)), false},
		"a fraction":                             {in(`"argc":1e3`), false},
		"a wrong type":                           {in(`"images":"x"`), false},
		"a time that is none":                    {strings.Replace(fresh(), `"ts":"2`, `"ts":"x`, 1), false},
		"an id in capitals":                      {id("018F0000-0000-7000-8000-00000000ABCD"), false},
		"an id with a quote":                     {id(`018f0000-0000-7000-8000-0000000000\"`), false},
		"an id with a newline":                   {id(`018f0000-0000-7000-8000-0000000000\n`), false},
		"an id of another version":               {id("018f0000-0000-4000-8000-000000000001"), false},
		"two objects":                            {strings.TrimSpace(fresh()) + fresh(), false},
		"a record and noise":                     {strings.TrimSpace(fresh()) + "noise", false},
		"half a record":                          {fresh()[:100], false},
		"a NUL":                                  {strings.Replace(fresh(), `"tool":"d`, "\"tool\":\"\x00", 1), false},

		"nearly 64 KiB":                   {in(`"x":"` + strings.Repeat("x", 64000) + `"`), true},
		"a key that looks like another":   {in(`"Tool":"evil","TOOL":"evil"`), true},
		"the same key twice":              {in(`"command":"first"`), true},
		"invalid UTF-8":                   {in("\"x\":\"\xff\xfe\""), true},
		"a time in the year 9999":         {strings.Replace(fresh(), good[51:81], "9999-12-31T23:59:59.000000000Z", 1), true},
		"a time in the year 0":            {strings.Replace(fresh(), good[51:81], "0000-01-01T00:00:00.000000000Z", 1), true},
		"a pid that is none":              {in(`"pid":-1`), true},
		"the largest clock":               {in(`"mono_ns":9223372036854775807`), true},
		"a member of a version to come":   {in(`"next":{"a":[1,2]}`), true},
		"escapes in a key that is known":  {strings.Replace(fresh(), `"tool"`, `"\u0074ool"`, 1), true},
		"control characters, written out": {in(`"target":"\u001b[31m\u0000\n"`), true},
	}
}

// TestPoison: whatever comes by socket or by file, the next record is taken, and the
// journal holds invocations that every reader takes.
func TestPoison(t *testing.T) {
	faults.Case(t, "AB-03")
	for _, way := range []string{"socket", "file"} {
		t.Run(way, func(t *testing.T) {
			o := options(t)
			r := start(t, o)
			want, file := map[string]bool{}, []byte(nil)
			for name, p := range poison() {
				honest := invocation(time.Now())
				want[honest.ID] = true
				if way == "socket" {
					if got := r.send([]byte(p.msg)); got != p.taken {
						t.Errorf("%s: taken is %v", name, got)
					}
					if !r.send(record.Append(nil, honest)) {
						t.Errorf("the next record after %s was refused", name)
					}
					continue
				}
				file = append(append(file, strings.TrimSuffix(p.msg, "\n")...), '\n')
				file = append(file, record.Append(nil, honest)...)
			}
			if way == "file" {
				if err := os.WriteFile(filepath.Join(o.Config.Spool(), strconv.Itoa(os.Getuid())+".jsonl"), file, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for id := range want {
				r.of(id)
			}
			r.end()
			rd, err := journal.OpenReader(o.Config.Journal(), journal.Position{})
			if err != nil {
				t.Fatal(err)
			}
			defer rd.Close()
			for {
				line, err := rd.Next()
				if err != nil {
					break
				}
				var anything map[string]any
				if err := json.Unmarshal(line.Data, &anything); err != nil {
					t.Errorf("the journal holds what encoding/json does not take: %v: %.200q", err, line.Data)
				}
				switch line.Kind() {
				case record.KindJobStart, record.KindJobEnd, record.KindEvent:
					t.Errorf("forged: %s", line.Data)
				case record.KindLoss:
					if cause := `"cause":"torn_line"`; !strings.Contains(string(line.Data), `"cause":"shim"`) && (way == "socket" || !strings.Contains(string(line.Data), cause)) {
						t.Errorf("forged: %s", line.Data)
					}
				}
			}
			if n := rd.Stats().TornLines; n > 0 {
				t.Errorf("%d torn lines in the journal", n)
			}
		})
	}
}

// TestNoiseInTheSpool: a file of noise, however large, keeps nobody waiting and becomes
// few losses.
func TestNoiseInTheSpool(t *testing.T) {
	faults.Case(t, "AB-11")
	o := options(t)
	o.Config.SpoolMaxBytes = 1 << 20
	if err := hook.MakeRunDir(o.Config.RunDir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(o.Config.Spool(), strconv.Itoa(os.Getuid())+".jsonl")
	if err := os.WriteFile(path, []byte(strings.Repeat("x\n", 500_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<40); err != nil { // a hole of a terabyte
		t.Fatal(err)
	}
	for i := range 3 * maxOpen { // names that say nothing, and more files than are open at once
		if err := os.WriteFile(filepath.Join(o.Config.Spool(), fmt.Sprintf("%d.jsonl.%d.done", os.Getuid(), i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(o.Config.Spool(), fmt.Sprintf("junk-%d.jsonl", i)), []byte("x\n"), 0o600)
	}
	r := start(t, o)
	r.waitFor(1, "the loss of the rest of the file", func(rec *record.Record) bool {
		return rec.Loss != nil && rec.Loss.Cause == "unreadable_file"
	})
	honest := invocation(time.Now()) // of a shim that now makes the file again
	if err := os.WriteFile(path, record.Append(nil, honest), 0o600); err != nil {
		t.Fatal(err)
	}
	r.of(honest.ID)
	r.end()
	var losses int
	var lines int64
	for _, rec := range r.records() {
		if rec.Loss != nil {
			losses++
			if rec.Loss.Cause == "torn_line" && rec.Loss.Count > lines {
				lines = rec.Loss.Count
			}
		}
	}
	if losses > 200 || lines < 100_000 {
		t.Errorf("%d losses, the largest of %d lines; want few, and every line counted", losses, lines)
	}
}

// TestNobodyTakesAnothersID: neither the ids that the agent derives nor those of
// commands that are running can be taken to make what is true look like a double.
func TestNobodyTakesAnothersID(t *testing.T) {
	faults.Case(t, "AB-04")
	o := options(t)
	c := seal(t, o, "github_a", "octo/shop", "42")
	r := start(t, o)
	defer r.end()

	// A command that runs, and somebody who sends its id again and ends at once.
	cmd := exec.Command(os.Args[0], "sleep:2s")
	cmd.Env = []string{"AGENT_TEST_COMMAND=" + o.Config.RunDir}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	if _, err := fmt.Fscan(out, &id); err != nil {
		t.Fatal(err)
	}
	victim := r.of(id)
	thief := victim
	thief.CI, thief.Claim, thief.By = nil, nil, record.ByNone
	line := record.Append(nil, &thief)
	again := exec.Command(os.Args[0], "0")
	again.Env = []string{"AGENT_TEST_COMMAND=" + o.Config.RunDir, "AGENT_TEST_LINE=" + string(line)}
	if err := again.Run(); err != nil {
		t.Fatal(err)
	}
	ended := time.Now()
	cmd.Wait()
	ends := r.waitFor(1, "the end", func(rec *record.Record) bool { return rec.End != nil && rec.End.InvocationID == id })
	if len(ends) != 1 || ends[0].TS.Before(ended) || ends[0].End.DurationNS < int64(2*time.Second) {
		t.Errorf("the thief's end counts: %s", record.Append(nil, &ends[0]))
	}

	// The ids of what the agent itself is going to say.
	for _, derived := range []string{record.DeriveID(c.Started, "job.end", c.Key), record.DeriveID(c.Started, "job.start", c.Key)} {
		forged := invocation(time.Now())
		forged.ID = derived
		if !r.send(record.Append(nil, forged)) {
			t.Error("an invocation with the id of another kind was refused, and not kept under its own")
		}
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
	r.waitFor(1, "job.end", kind(record.KindJobEnd))
}

// TestFlood: of what one job sends, so much is kept as its bucket has; the rest is
// acknowledged, counted exactly, and costs neither another job nor the daemon's events.
func TestFlood(t *testing.T) {
	faults.Case(t, "AB-05")
	o := options(t)
	o.Config.JobRate, o.Config.JobBurst = 1, 100
	o.Config.EventRate, o.Config.EventBurst = 1, 50
	seal(t, o, "github_flood", "octo/flood", "42")
	sealAt(t, o, hook.Context{CI: record.CI{Repository: "octo/quiet", RunID: "43", TrackingID: "github_quiet"}, Started: time.Now()})
	r := start(t, o)
	const sent = 2000
	for range sent {
		rec := claims("github_flood", "octo/flood", time.Now())
		line := record.Append(nil, rec)
		if !r.send(line) {
			t.Fatal("a suppressed record was not acknowledged: the shim would wait, and write it to its file")
		}
	}
	// The same job under names that nobody sealed has one bucket more, its user's.
	for i := range sent {
		rec := claims(fmt.Sprintf("github_%d", i), fmt.Sprintf("octo/%d", i), time.Now())
		if !r.send(record.Append(nil, rec)) {
			t.Fatal("not acknowledged")
		}
	}
	const quiet = 50
	for range quiet {
		r.send(record.Append(nil, claims("github_quiet", "octo/quiet", time.Now())))
	}
	events := make([]*record.Record, 500)
	for i := range events {
		events[i] = &record.Record{ID: record.DeriveID(time.Now(), "event", strconv.Itoa(i)), TS: time.Now(), Kind: record.KindEvent, By: record.ByNone, Event: &record.Event{Type: "container", Action: "create"}}
	}
	if err := r.agent.takeEvents(events); err != nil {
		t.Fatal(err)
	}
	client, err := Dial(t.Context(), o.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.end()
	kept, lost := map[string]int64{}, map[string]int64{}
	ends := 0
	for _, rec := range r.records() {
		switch {
		case rec.Invocation != nil && rec.By == record.ByEnvironment:
			kept["claimed"]++
		case rec.Invocation != nil:
			kept[rec.CI.Repository]++
		case rec.Event != nil:
			kept["events"]++
		case rec.End != nil:
			ends++
		case isLoss(&rec):
			l := rec.Loss
			if l.Cause != "rate_limited" || l.From.IsZero() || l.To.Before(l.From) {
				t.Errorf("%s", record.Append(nil, &rec))
			}
			switch {
			case l.Source == "events":
				lost["events"] += l.Count
			case rec.By == record.ByEnvironment:
				lost["claimed"] += l.Count
			default:
				lost[rec.CI.Repository] += l.Count
			}
		}
	}
	for what, produced := range map[string]int64{"octo/flood": sent, "claimed": sent, "octo/quiet": quiet, "events": int64(len(events))} {
		if kept[what]+lost[what] != produced {
			t.Errorf("%s: %d kept and %d told as lost, of %d", what, kept[what], lost[what], produced)
		}
	}
	if kept["octo/quiet"] != quiet || kept["octo/flood"] < 100 || kept["octo/flood"] > sent/2 || kept["claimed"] > sent/2 || kept["events"] < 50 || kept["events"] > 250 {
		t.Errorf("kept %v", kept)
	}
	if want := lost["octo/flood"] + lost["claimed"] + lost["events"]; st.Counts.Suppressed != want {
		t.Errorf("status says %d suppressed, the losses %d", st.Counts.Suppressed, want)
	}
	if ends > int(kept["octo/flood"]+kept["claimed"]+kept["octo/quiet"]) {
		t.Errorf("%d ends: those of suppressed calls too", ends)
	}
}

// TestASuppressedRecordIsCountedOnce: its second copy, by file, is the same record.
func TestASuppressedRecordIsCountedOnce(t *testing.T) {
	o := options(t)
	o.Config.JobRate, o.Config.JobBurst = 1, 1
	r := start(t, o)
	var lines []byte
	for range 100 {
		line := record.Append(nil, invocation(time.Now()))
		r.send(line)
		lines = append(lines, line...)
	}
	if err := os.WriteFile(filepath.Join(o.Config.Spool(), strconv.Itoa(os.Getuid())+".jsonl"), lines, 0o600); err != nil {
		t.Fatal(err)
	}
	last := invocation(time.Now())
	for deadline := time.Now().Add(20 * time.Second); r.agent.intake.status().Duplicates < 100; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v of 100 doubles", r.agent.intake.status())
		}
	}
	r.send(record.Append(nil, last))
	r.end()
	var kept, lost int64
	for _, rec := range r.records() {
		if rec.Invocation != nil {
			kept++
		} else if isLoss(&rec) {
			lost += rec.Loss.Count
		}
	}
	if kept+lost != 101 {
		t.Errorf("%d kept and %d lost, of 101", kept, lost)
	}
}

func TestBuckets(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	l := newLimiter("agent", "calls", 10, 100, func() time.Time { return now })
	rec := invocation(now)
	take := func(key string, n int) (admitted int) {
		for range n {
			if l.admit(key, rec, 1000) {
				admitted++
			}
		}
		return admitted
	}
	for _, step := range []struct {
		name  string
		after time.Duration
		key   string
		take  int
		want  int
	}{
		{"the burst", 0, "a", 150, 100},
		{"another's is untouched", 0, "b", 150, 100},
		{"one second fills ten", time.Second, "a", 50, 10},
		{"a clock that goes back fills nothing", -time.Hour, "a", 10, 0},
		{"and then goes on", time.Second, "a", 50, 10},
		{"a day fills no more than the burst", 24 * time.Hour, "a", 1000, 100},
	} {
		now = now.Add(step.after)
		if got := take(step.key, step.take); got != step.want {
			t.Errorf("%s: %d, want %d", step.name, got, step.want)
		}
	}
	now = now.Add(time.Hour)
	large := 0
	for l.admit("large", rec, 64<<10) {
		large++
	}
	if large != 100/17+1 && large != 100/17 {
		t.Errorf("%d records of 64 KiB, each 17 tokens of 100", large)
	}
	var told int64
	for _, loss := range l.losses() {
		told += loss.Loss.Count
	}
	if told != l.suppressed || told == 0 || len(l.losses()) != 0 {
		t.Errorf("told %d of %d", told, l.suppressed)
	}
	// Who takes on thousands of users gets no thousand buckets.
	for i := range 4 * maxBuckets {
		take("uid "+strconv.Itoa(i), 200)
	}
	if n := len(l.buckets); n > maxBuckets+1 {
		t.Errorf("%d buckets", n)
	}
	if off := newLimiter("agent", "calls", 0, 0, time.Now); !off.admit("a", rec, 1) || len(off.buckets) != 0 {
		t.Error("a rate of 0 is no bound")
	}
}

// TestSilentConnections: who opens connections and sends nothing, or talks slowly,
// keeps neither a command nor a hook from being served.
func TestSilentConnections(t *testing.T) {
	faults.Case(t, "AB-06")
	o := options(t)
	c := seal(t, o, "github_a", "octo/shop", "42")
	r := start(t, o)
	defer r.end()
	many := 2000
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && int(limit.Cur) < 3*many {
		many = int(limit.Cur) / 3 // both ends are in this process
	}
	for i := range many {
		conn, err := net.Dial("unixpacket", o.Config.Socket())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if i%2 == 0 {
			if _, err := conn.Write([]byte(`{"control":"status"}`)); err != nil && !errors.Is(err, syscall.EPIPE) {
				t.Fatal(err)
			}
		}
	}
	if id, result, _ := r.call(nil, "0"); result != handover.Acked && result != handover.QueuedToo {
		t.Errorf("the command's record: %d", result)
	} else {
		r.of(id)
	}
	if err := o.Store.End(c.Key, hook.Completed, time.Now()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client, err := Dial(ctx, o.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.JobEnd(ctx, c.Key, hook.Completed); err != nil {
		t.Errorf("the hook's word: %v", err)
	}
	if err := client.Flush(ctx); err != nil {
		t.Errorf("the hook's flush: %v", err)
	}
	s := r.agent.server
	if slow, own := s.slow.len(), s.own.len(); slow > perProcess || own > perProcess {
		t.Errorf("%d silent and %d talking connections of one process are held", slow, own)
	}
}

// TestGuests: many processes with a connection each push the oldest out, and one process
// with many its own.
func TestGuests(t *testing.T) {
	g := guests{max: 20}
	conns := map[*guest]*os.File{}
	enter := func(pid int32) *guest {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		v := g.enter(r, pid)
		conns[v] = r
		return v
	}
	open := func(v *guest) bool { return v.conn.SetDeadline(time.Time{}) == nil }
	first := enter(1)
	for range 100 {
		enter(2)
	}
	if !open(first) || g.len() != 1+perProcess {
		t.Errorf("one process has %d places, and pushed another out: %v", g.len()-1, !open(first))
	}
	for pid := range int32(100) {
		enter(1000 + pid)
	}
	if open(first) || g.len() != 20 {
		t.Errorf("%d places of 20; the first is open: %v", g.len(), open(first))
	}
	for v, r := range conns {
		g.leave(v)
		r.Close()
	}
	if g.len() != 0 || len(g.of) != 0 {
		t.Errorf("%d are left, %v", g.len(), g.of)
	}
}

// TestAFakeEndOfTheJob: that the hook has closed a context is to be seen in the store;
// saying so is not enough.
func TestAFakeEndOfTheJob(t *testing.T) {
	faults.Case(t, "AB-07")
	o := options(t)
	o.ExitOnJobEnd = true
	c := seal(t, o, "github_a", "octo/shop", "42")
	r := start(t, o)
	defer r.end()
	client, err := Dial(t.Context(), o.Config.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.JobEnd(t.Context(), c.Key, hook.Completed); err == nil || !strings.Contains(err.Error(), "is not closed") {
		t.Errorf("a fake end: %v", err)
	}
	id, _, _ := r.call([]string{"RUNNER_TRACKING_ID=github_a"}, "0")
	if rec := r.of(id); rec.By != record.BySealed {
		t.Errorf("%s", record.Append(nil, &rec))
	}
	for _, rec := range r.records() {
		if rec.Kind == record.KindJobEnd {
			t.Errorf("%s", record.Append(nil, &rec))
		}
	}
}

// TestWatchesAreShared: one job's sleeping commands leave the others places.
func TestWatchesAreShared(t *testing.T) {
	w := newWatches(12)
	var greedy, modest int
	for i := range 100 {
		if w.enter(fmt.Sprint("greedy", i), "greedy") == entered {
			greedy++
		}
	}
	for i := range 2 {
		if w.enter(fmt.Sprint("modest", i), "modest") == entered {
			modest++
		}
	}
	if greedy != 9 || modest != 2 || w.count() != 11 || w.enter("modest0", "modest") != watched {
		t.Errorf("%d and %d places, %d in all", greedy, modest, w.count())
	}
	for i := range greedy {
		w.leave(fmt.Sprint("greedy", i), "greedy")
	}
	if w.count() != 2 || len(w.byShare) != 1 {
		t.Errorf("after leaving: %+v", &w)
	}
}

// TestARestartFindsTheRunning: what the last agent saw begin, the next one sees end.
func TestARestartFindsTheRunning(t *testing.T) {
	faults.Case(t, "EN-09")
	o := options(t)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	o.Host.BootID = strings.TrimSpace(string(boot))
	r := start(t, o)
	begin := func(how string) (string, *exec.Cmd) {
		cmd := exec.Command(os.Args[0], how)
		cmd.Env = []string{"AGENT_TEST_COMMAND=" + o.Config.RunDir}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var id string
		if _, err := fmt.Fscan(out, &id); err != nil {
			t.Fatal(err)
		}
		r.of(id)
		return id, cmd
	}
	long, longCmd := begin("sleep:1h")
	short, shortCmd := begin("sleep:1h")
	r.end()
	for _, rec := range r.records() {
		if rec.End != nil {
			t.Errorf("both still run: %s", record.Append(nil, &rec))
		}
	}
	shortCmd.Process.Kill() // while no agent is there
	shortCmd.Wait()
	r = start(t, o)
	defer r.end()
	end := r.waitFor(1, "end of the one that nobody saw", func(rec *record.Record) bool { return rec.End != nil && rec.End.InvocationID == short })[0].End
	if end.Source != sourceUnknown || end.DurationNS != 0 || end.ExitCode != nil {
		t.Errorf("%+v", end)
	}
	longCmd.Process.Signal(syscall.SIGTERM)
	longCmd.Wait()
	end = r.waitFor(1, "end of the other", func(rec *record.Record) bool { return rec.End != nil && rec.End.InvocationID == long })[0].End
	if end.DurationNS <= 0 || kernelAtLeast(6, 15) && (end.Source != sourceInfo || end.Signal != int64(syscall.SIGTERM)) {
		t.Errorf("%+v", end)
	}
}

// TestFindTheProcessOfARecord: a record by file says its own pid, which may be anybody's.
func TestFindTheProcessOfARecord(t *testing.T) {
	own := func() *record.Record {
		r := invocation(time.Now())
		r.Invocation.MonoNS = monotonic()
		return r
	}
	for _, row := range []struct {
		name string
		make func(r *record.Record)
		want bool
	}{
		{"its own", func(*record.Record) {}, true},
		{"a process of another user", func(r *record.Record) { r.Invocation.UID = 4711 }, false},
		{"a process that started after the record", func(r *record.Record) { r.Invocation.MonoNS = 1 }, false},
		{"no time", func(r *record.Record) { r.Invocation.MonoNS = 0 }, false},
		{"no process", func(r *record.Record) { r.Invocation.PID = 1<<22 + 1 }, false}, // beyond the largest pid_max
		{"a group of processes", func(r *record.Record) { r.Invocation.PID = -1 }, false},
		{"a pid that no int holds", func(r *record.Record) { r.Invocation.PID = 1<<62 + int64(os.Getpid()) }, false},
	} {
		r := own()
		row.make(r)
		pidfd, ok := find(r)
		if ok {
			unix.Close(pidfd)
		}
		if ok != row.want {
			t.Errorf("%s: found is %v", row.name, ok)
		}
	}
}
