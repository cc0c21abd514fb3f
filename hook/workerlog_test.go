package hook

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// workerLog is a Worker log as runner 2.336 writes it, with changes made to it. It
// was written by hand after src/Runner.Worker/Worker.cs and logs that people posted; it
// holds what an attacker can put into a job's message.
func workerLog(t testing.TB, changes map[string]string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "Worker.log"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for from, to := range changes {
		if !strings.Contains(text, from) {
			t.Fatalf("testdata/Worker.log does not hold %q", from)
		}
		text = strings.ReplaceAll(text, from, to)
	}
	return text
}

var wantJob = workerJob{
	Name:            `Build "all" (linux, 1.26)`,
	ID:              "90005817181",
	WorkflowRef:     "acme/workflows/.github/workflows/build.yml@refs/heads/v2",
	Repository:      "acme/shop",
	RunID:           "4711",
	RunAttempt:      "1",
	Job:             "build",
	OrchestrationID: "f4181416-0894-40ac-a92b-39fa46faed2a.build.linux.1_26",
}

func TestParseWorkerLog(t *testing.T) {
	with := func(f func(*workerJob)) workerJob { j := wantJob; f(&j); return j }
	for _, row := range []struct {
		name    string
		changes map[string]string
		want    workerJob
	}{
		{"as the runner writes it", nil, wantJob},
		{"with CRLF", map[string]string{"\n": "\r\n"}, wantJob},
		{"on one line", map[string]string{"\n  ": " "}, wantJob},
		{"id as an integer", map[string]string{"90005817181.0": "90005817181"}, wantJob},
		{"id as text", map[string]string{"90005817181.0": `"90005817181"`}, wantJob},
		{"value before key", map[string]string{"\"k\": \"check_run_id\",\n          \"v\": 90005817181.0": "\"v\": 90005817181.0,\n          \"k\": \"check_run_id\""}, wantJob},
		{"upper case names of .NET", map[string]string{`"jobDisplayName": "Build`: `"JobDisplayName": "Build`, `"contextData"`: `"ContextData"`}, wantJob},
		{"id masked", map[string]string{"90005817181.0": "***"}, with(func(j *workerJob) { j.ID = "" })},
		{"id as an object", map[string]string{"90005817181.0": `{"a":1}`}, with(func(j *workerJob) { j.ID = "" })},
		{"id in exponent form", map[string]string{"90005817181.0": "9.0005817181E10"}, with(func(j *workerJob) { j.ID = "" })},
		{"name masked", map[string]string{`Build \"all\" (linux, 1.26)`: "Build *** (linux)"}, with(func(j *workerJob) { j.Name = "" })},
		{"name with a line end and a colour", map[string]string{`Build \"all\" (linux, 1.26)`: `a\n::error::b\u001b[31m`}, with(func(j *workerJob) { j.Name = "a\uFFFD::error::b\uFFFD[31m" })},
		{"no job context, as before 2.323", map[string]string{"    \"job\": {\n": "    \"strategy\": {\n"}, with(func(j *workerJob) { j.ID, j.WorkflowRef = "", "" })},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, ok := parseWorkerLog([]byte(workerLog(t, row.changes)))
			if !ok || got != row.want {
				t.Errorf("got  %+v, %v\nwant %+v", got, ok, row.want)
			}
		})
	}
}

// A log that is read while the runner writes it, or is larger than what is read, can
// end anywhere. What is found is right or is not there.
func TestParseWorkerLogCutAnywhere(t *testing.T) {
	whole := []byte(workerLog(t, nil))
	found := 0
	for n := range len(whole) {
		got, ok := parseWorkerLog(whole[:n])
		if !ok {
			continue
		}
		found++
		for what, pair := range map[string][2]string{
			"name": {got.Name, wantJob.Name}, "repository": {got.Repository, wantJob.Repository},
			"workflow": {got.WorkflowRef, wantJob.WorkflowRef}, "job": {got.Job, wantJob.Job},
		} {
			if pair[0] != "" && pair[0] != pair[1] {
				t.Fatalf("cut at %d: %s is %q", n, what, pair[0])
			}
		}
	}
	if found == 0 {
		t.Error("no part of the log was of use")
	}
}

// Numbers have no end of their own: a cut one reads as another number.
func TestParseWorkerLogCutInANumber(t *testing.T) {
	whole := workerLog(t, nil)
	for n := range len("90005817181.0") {
		cut := whole[:strings.Index(whole, "90005817181.0")+n]
		if got, _ := parseWorkerLog([]byte(cut)); got.ID != "" {
			t.Errorf("cut after %d digits: id %q", n, got.ID)
		}
	}
}

func TestParseWorkerLogOfSomethingElse(t *testing.T) {
	for _, text := range []string{
		"", "\x00\x00", "Job message:", "Job message: null", "Job message:\n {", "Job message:\n [1,2", "Job message:\n {}\n",
		"Job message:\n {\"contextData\": \"no\"}", "Job message:\n {\"contextData\": {\"github\": []}}",
		"Job message:\n " + strings.Repeat("[", 1<<20), "Job message:\n " + strings.Repeat(`{"contextData":`, 1<<18),
		"Job message:\n {\"a\\",
	} {
		if got, ok := parseWorkerLog([]byte(text)); ok {
			t.Errorf("%.40q: found %+v", text, got)
		}
	}
}

func TestIsOf(t *testing.T) {
	ci := record.CI{RunID: "4711", RunAttempt: 1, Repository: "Acme/Shop", Job: "build", OrchestrationID: wantJob.OrchestrationID}
	for _, row := range []struct {
		name   string
		change func(*record.CI)
		want   bool
	}{
		{"the job itself", func(*record.CI) {}, true},
		{"an older runner tells no orchestration id", func(c *record.CI) { c.OrchestrationID = "" }, true},
		{"no attempt", func(c *record.CI) { c.RunAttempt = 0 }, true},
		{"the id is known and equal", func(c *record.CI) { c.JobID = "90005817181" }, true},
		{"another run", func(c *record.CI) { c.RunID = "4712" }, false},
		{"no run", func(c *record.CI) { c.RunID = "" }, false},
		{"another attempt", func(c *record.CI) { c.RunAttempt = 2 }, false},
		{"another repository", func(c *record.CI) { c.Repository = "acme/store" }, false},
		{"another job", func(c *record.CI) { c.Job = "test" }, false},
		{"another leg of the matrix", func(c *record.CI) { c.OrchestrationID += "x" }, false},
		{"another id", func(c *record.CI) { c.JobID = "1" }, false},
	} {
		c := ci
		row.change(&c)
		if got := wantJob.isOf(&c); got != row.want {
			t.Errorf("%s: %v, want %v", row.name, got, row.want)
		}
	}
}

func TestEnrich(t *testing.T) {
	now := time.Now().UTC()
	name := func(at time.Time) string { return "Worker_" + at.Format("20060102-150405") + "-utc.log" }
	same := workerLog(t, nil)
	otherLeg := workerLog(t, map[string]string{"build.linux.1_26": "build.linux.1_25", "90005817181.0": "7", "1.26)": "1.25)"})
	otherRun := workerLog(t, map[string]string{`"4711"`: `"4712"`})
	sealedID := wantJob.OrchestrationID
	for _, row := range []struct {
		name  string
		logs  map[string]string
		orch  string // what the environment says
		want  string // the job id
		setup func(dir string)
	}{
		{name: "its own log", logs: map[string]string{name(now): same}, orch: sealedID, want: "90005817181"},
		{name: "its own log, no orchestration id", logs: map[string]string{name(now): same}, want: "90005817181"},
		{name: "an older job's log beside it", logs: map[string]string{name(now): same, name(now.Add(-time.Hour)): otherRun}, want: "90005817181"},
		{name: "a newer log of another run", logs: map[string]string{name(now): otherRun, name(now.Add(-time.Minute)): same}, want: "90005817181"},
		{name: "only another leg of the matrix, by id", logs: map[string]string{name(now): otherLeg}, orch: sealedID},
		{name: "only another leg of the matrix, by time", logs: map[string]string{name(now.Add(-time.Hour)): otherLeg}},
		{name: "only another run", logs: map[string]string{name(now): otherRun}},
		{name: "no log"},
		{name: "not a log's name", logs: map[string]string{"Runner_20260101-000000-utc.log": same}},
		{name: "a FIFO in its place", setup: func(dir string) { mkfifo(t, filepath.Join(dir, name(now))) }},
		{name: "a link in its place", setup: func(dir string) {
			write(t, filepath.Join(dir, "secret"), same)
			if err := os.Symlink("secret", filepath.Join(dir, name(now))); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a directory in its place", setup: func(dir string) { _ = os.Mkdir(filepath.Join(dir, name(now)), 0o755) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, "_diag")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for file, text := range row.logs {
				write(t, filepath.Join(dir, file), text)
			}
			if row.setup != nil {
				row.setup(dir)
			}
			ci := record.CI{RunID: "4711", RunAttempt: 1, Repository: "acme/shop", Job: "build", OrchestrationID: row.orch,
				WorkflowRef: "acme/shop/.github/workflows/ci.yml@refs/heads/main"}
			if err := enrich(t.Context(), &ci, []string{"/nonexistent", root}, runnerProcess{}, "https://github.com"); err != nil {
				t.Fatal(err)
			}
			if ci.JobID != row.want || (ci.JobURL != "") != (row.want != "") {
				t.Errorf("job id %q (%s), want %q", ci.JobID, ci.JobURL, row.want)
			}
		})
	}
}

// What a user sets is not overwritten, and a job that is not reusable has no
// workflow of its own.
func TestEnrichKeepsWhatIsKnown(t *testing.T) {
	root := t.TempDir()
	_ = os.Mkdir(filepath.Join(root, "_diag"), 0o755)
	write(t, filepath.Join(root, "_diag", "Worker_"+time.Now().UTC().Format("20060102-150405")+"-utc.log"), workerLog(t, nil))
	ci := record.CI{RunID: "4711", WorkflowRef: wantJob.WorkflowRef}
	if err := enrich(t.Context(), &ci, []string{root}, runnerProcess{}, ""); err != nil {
		t.Fatal(err)
	}
	if ci.JobWorkflowRef != "" || ci.JobName != wantJob.Name || ci.OrchestrationID != wantJob.OrchestrationID {
		t.Errorf("got %+v", ci)
	}
}

// The properties: it ends, it does not panic, and every text is fit for a record.
func FuzzParseWorkerLog(f *testing.F) {
	whole := workerLog(f, nil)
	f.Add([]byte(whole))
	f.Add([]byte(whole[:len(whole)/2]))
	f.Add([]byte(`Job message: {"jobDisplayName":"a","contextData":{"github":{"d":[{"k":"run_id","v":"1"}]},"job":{"d":[{"v":2,"k":"check_run_id"}]}}}`))
	f.Add([]byte(`Job message: {"contextData":{"github":{"d":[{"k":"run_id","v":***}]}}}`))
	f.Add([]byte("Job message: {\"\\ud800\":\"\\"))
	f.Add([]byte(`Job message: {"variables":{"system.github.job":]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		j, _ := parseWorkerLog(data)
		for _, s := range []string{j.Name, j.WorkflowRef, j.OrchestrationID} {
			if s != clean(s) {
				t.Errorf("not clean: %q", s)
			}
		}
		if j.ID != "" && !isDigits(j.ID) {
			t.Errorf("id %q", j.ID)
		}
	})
}

// BenchmarkParseWorkerLog reads a message with a large event, as a push of many
// commits makes it.
func BenchmarkParseWorkerLog(b *testing.B) {
	var event bytes.Buffer
	for i := range 4000 {
		fmt.Fprintf(&event, "                    {\n                      \"k\": \"commit %d\",\n                      \"v\": \"text of a commit, as long as such texts are\"\n                    },\n", i)
	}
	text := []byte(workerLog(b, map[string]string{"                    {\n                      \"k\": \"title\",": event.String() + "                    {\n                      \"k\": \"title\","}))
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if j, ok := parseWorkerLog(text); !ok || j.ID == "" {
			b.Fatal("not found")
		}
	}
}
