package report_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/report"
)

// go test ./report -update writes the golden files anew; read the diff.
var update = flag.Bool("update", false, "write the golden files of testdata anew")

// memory is a source of lines that are there already.
type memory struct {
	name  string
	lines [][]byte
}

func (m *memory) Name() string { return m.name }

func (m *memory) Next() ([]byte, error) {
	if len(m.lines) == 0 {
		return nil, io.EOF
	}
	l := m.lines[0]
	m.lines = m.lines[1:]
	return l, nil
}

// clock is the time at which the story of these tests begins.
var clock = time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC)

// story writes records with ids and times that follow each other.
type story struct {
	n     int
	lines [][]byte
	ci    *record.CI
	by    record.By
}

func (s *story) id() string {
	s.n++
	return fmt.Sprintf("019507d4-0000-7000-8000-%012x", s.n)
}

func (s *story) add(r *record.Record) string {
	if r.ID == "" {
		r.ID = s.id()
	}
	if r.TS.IsZero() {
		r.TS = clock.Add(time.Duration(s.n) * time.Second)
	}
	r.Schema = record.SchemaVersion
	if r.By == "" {
		r.By, r.CI = s.by, s.ci
	}
	s.lines = append(s.lines, bytes.TrimSuffix(record.Append(nil, r), []byte("\n")))
	return r.ID
}

func (s *story) job(by record.By, repository, workflow, job, run string) {
	s.by = by
	s.ci = &record.CI{Repository: repository, Workflow: workflow, Job: job, RunID: run, RunAttempt: 1,
		TrackingID: "github_" + run + job, JobURL: "https://github.com/" + repository + "/actions/runs/" + run + "/job/1"}
	if by == record.ByNone {
		s.ci = nil
	}
}

func (s *story) call(command string, images ...string) string {
	return s.add(&record.Record{Kind: record.KindInvocation, Invocation: &record.Invocation{Tool: "docker", Command: command, Images: images}})
}

func code(n int64) *int64 { return &n }

func (s *story) end(call, command string, took time.Duration, exit *int64, images ...string) {
	s.add(&record.Record{Kind: record.KindInvocationEnd, End: &record.End{InvocationID: call, Tool: "docker", Command: command, Images: images,
		DurationNS: int64(took), ExitCode: exit, Source: "pidfd_info"}})
}

func (s *story) run(command string, took time.Duration, exit int64, images ...string) {
	s.end(s.call(command, images...), command, took, code(exit), images...)
}

func (s *story) event(typ, action, actor, image string, more ...func(*record.Event)) {
	e := &record.Event{Type: typ, Action: action, ActorID: actor, Image: image}
	for _, f := range more {
		f(e)
	}
	s.add(&record.Record{Kind: record.KindEvent, Event: e})
}

func died(exit int64, took time.Duration) func(*record.Event) {
	return func(e *record.Event) { e.ExitCode, e.DurationNS = &exit, int64(took) }
}

func oom(e *record.Event)        { e.OOM = true }
func runnerMade(e *record.Event) { e.RunnerMade = true }
func signal(n int64) func(*record.Event) {
	return func(e *record.Event) { e.Signal = n }
}

// morning is two hours of a small fleet, with one of everything the report answers.
func morning() [][]byte {
	s := &story{}
	s.by = record.ByNone
	s.add(&record.Record{Kind: record.KindInvocation, OutsideJob: true, By: record.ByNone,
		Invocation: &record.Invocation{Tool: "docker", Command: "ps"}})

	s.job(record.BySealed, "acme/web", "Build & test", "image", "4711")
	s.add(&record.Record{Kind: record.KindJobStart, Job: &record.Job{}})
	s.run("pull", 4*time.Second, 0, "alpine:3.20")
	s.event("image", "pull", "alpine:3.20", "alpine:3.20")
	s.run("pull", 900*time.Millisecond, 1, "registry.example:5000/base:gone")
	s.run("pull", 700*time.Millisecond, 1, "registry.example:5000/base:gone")
	s.run("build", 3*time.Minute+5*time.Second, 0, "acme/web:1")
	nested := s.add(&record.Record{Kind: record.KindInvocation, Invocation: &record.Invocation{Tool: "docker", Command: "system dial-stdio", Nested: true}})
	s.end(nested, "system dial-stdio", 10*time.Minute, code(0))
	s.run("run", 12*time.Second, 3, "docker.io/library/alpine:3.20")
	s.event("container", "create", "c1", "alpine:3.20")
	s.event("container", "start", "c1", "alpine:3.20")
	s.event("container", "die", "c1", "alpine:3.20", died(3, 11*time.Second))
	s.run("run", 200*time.Millisecond, 125, "ghcr.io/acme/missing:2")
	s.add(&record.Record{Kind: record.KindInvocation, Invocation: &record.Invocation{Tool: "docker", Command: "run", Images: []string{"alpine"}, ExecError: "EACCES"}})
	s.event("container", "create", "pg", "postgres:16", runnerMade)
	s.event("container", "start", "pg", "postgres:16", runnerMade)
	s.event("container", "kill", "pg", "postgres:16", runnerMade, signal(9))
	s.event("container", "die", "pg", "postgres:16", runnerMade, died(137, 5*time.Minute))
	s.add(&record.Record{Kind: record.KindJobEnd, Job: &record.Job{Outcome: "completed"}})

	s.job(record.ByEnvironment, "acme/api", "CI | nightly `main`", "test", "4712")
	s.run("compose up", time.Hour+2*time.Minute, 0)
	s.run("compose pull", 3*time.Second, 18)
	s.event("image", "pull", "ghcr.io/acme/tool:7", "ghcr.io/acme/tool:7")
	s.event("container", "start", "m", "ghcr.io/acme/tool:7")
	s.event("container", "die", "m", "ghcr.io/acme/tool:7", oom, died(137, 90*time.Second))
	killed := s.call("run", "alpine")
	s.add(&record.Record{Kind: record.KindInvocationEnd, End: &record.End{InvocationID: killed, Tool: "docker", Command: "run",
		Images: []string{"alpine"}, DurationNS: int64(8 * time.Second), Signal: 15, Source: "pidfd_info"}})

	s.job(record.ByInferred, "acme/web", "Build & test", "lint", "4711")
	s.run("run", 2*time.Second, 0, "alpine")

	s.job(record.ByNone, "", "", "", "")
	s.call("images")
	s.add(&record.Record{Kind: record.KindLoss, By: record.ByNone, Loss: &record.Loss{Cause: "stream_gap", Source: "events", Count: -1,
		From: clock.Add(10 * time.Minute), To: clock.Add(11 * time.Minute), Detail: "more than 256 events missed"}})
	s.add(&record.Record{Kind: record.KindLoss, By: record.ByNone, Loss: &record.Loss{Cause: "disk_full", Source: "journal", Count: 7,
		From: clock.Add(20 * time.Minute), To: clock.Add(25 * time.Minute)}})
	s.add(&record.Record{Kind: record.KindLoss, By: record.ByNone, Loss: &record.Loss{Cause: "metrics_dropped", Source: "metrics", Count: 1000}})
	header := []byte(`{"kind":"segment","id":"019507d4-ffff-7000-8000-000000000000","schema":1,"segment":1,"ts":"2026-03-01T08:00:00Z"}`)
	return append([][]byte{header}, s.lines...)
}

func build(t *testing.T, o report.Options, lines ...[]byte) *report.Report {
	t.Helper()
	if o.Now == nil {
		o.Now = func() time.Time { return clock.Add(2 * time.Hour) }
	}
	r, err := report.Build(context.Background(), []report.Source{&memory{name: "journal", lines: lines}}, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got:\n%s\n(go test ./report -update writes it anew)", path, got)
	}
}

func TestOutputs(t *testing.T) {
	r := build(t, report.Options{}, morning()...)
	for _, c := range []struct {
		file  string
		write func(io.Writer) error
	}{
		{"morning.txt", func(w io.Writer) error { return r.Terminal(w, report.TerminalOptions{}) }},
		{"morning.tty.txt", func(w io.Writer) error { return r.Terminal(w, report.TerminalOptions{Width: 120}) }},
		{"morning.md", r.Markdown},
		{"morning.json", r.JSON},
		{"morning.summary.md", func(w io.Writer) error { return report.Summary(w, r) }},
	} {
		t.Run(c.file, func(t *testing.T) {
			var buf bytes.Buffer
			if err := c.write(&buf); err != nil {
				t.Fatal(err)
			}
			golden(t, c.file, buf.Bytes())
			if strings.HasSuffix(c.file, ".tty.txt") {
				for line := range strings.Lines(buf.String()) {
					if n := len([]rune(line)) - 1; n > 120 && !strings.HasPrefix(line, "  [") && !strings.Contains(line, ": ") {
						t.Errorf("%d columns on a terminal of 120: %s", n, line)
					}
				}
			}
		})
	}
}

func TestTotals(t *testing.T) {
	got := build(t, report.Options{}, morning()...).Totals
	want := report.Totals{
		Runs: 2, Jobs: 3, Calls: 12, Nested: 1, OutsideJob: 1, Ended: 10, NoEnd: 2, ExitKnown: 10, Failed: 6, NotExecuted: 1,
		DurationNS: got.DurationNS, FailedPulls: 3, CouldNotStart: 1,
		Events: 11, ImagesPulled: 2, ContainersCreated: 2, ContainersStarted: 3, ContainersEnded: 3, ContainersFailed: 2,
		ContainersStopped: 1, ContainersOOM: 1, ContainersRunner: 1, ContainerDurationNS: int64(11*time.Second + 5*time.Minute + 90*time.Second),
	}
	if got != want {
		t.Errorf("totals\n got %+v\nwant %+v", got, want)
	}
}

func TestCoverage(t *testing.T) {
	got := build(t, report.Options{}, morning()...).Coverage
	want := report.CoverageByBasis{
		Calls:  report.Coverage{Records: 12, WithJob: 11, Sealed: 7, Environment: 3, Inferred: 1, None: 1, OutsideJob: 1, Lost: 7},
		Events: report.Coverage{Records: 11, WithJob: 11, Sealed: 8, Environment: 3, Explained: 10, Unattributed: 1, Lost: 7, LostUnknown: 1},
	}
	if got != want {
		t.Errorf("coverage\n got %+v\nwant %+v", got, want)
	}
	narrowed := build(t, report.Options{Filter: report.Filter{Repositories: []string{"acme/api"}}}, morning()...)
	if narrowed.Coverage != want {
		t.Error("a filter on jobs changed the coverage, but a record without a job could be anybody's")
	}
}

func TestOrderOfLinesIsOfNoAccount(t *testing.T) {
	lines := morning()
	want := build(t, report.Options{}, lines...)
	backwards := make([][]byte, 0, 2*len(lines))
	for i := range lines {
		backwards = append(backwards, lines[len(lines)-1-i])
	}
	for _, c := range []struct {
		name  string
		lines [][]byte
		dups  int64
	}{
		{"ends before their calls", backwards, 0},
		{"each line twice", append(append([][]byte{}, lines...), lines...), int64(len(lines) - 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := build(t, report.Options{}, c.lines...)
			if got.Read.Duplicates != c.dups {
				t.Errorf("%d duplicates, want %d", got.Read.Duplicates, c.dups)
			}
			// Which container was told to stop does depend on the order of its events.
			got.Totals.ContainersFailed, got.Totals.ContainersStopped = want.Totals.ContainersFailed, want.Totals.ContainersStopped
			if got.Totals != want.Totals {
				t.Errorf("totals\n got %+v\nwant %+v", got.Totals, want.Totals)
			}
		})
	}
}

func TestFilters(t *testing.T) {
	at := func(d time.Duration) time.Time { return clock.Add(d) }
	for _, c := range []struct {
		name         string
		o            report.Options
		calls, pulls int64
	}{
		{"nothing asked", report.Options{}, 12, 2},
		{"one repository, in capitals", report.Options{Filter: report.Filter{Repositories: []string{"ACME/Web"}}}, 8, 1},
		{"all of an owner", report.Options{Filter: report.Filter{Repositories: []string{"acme/*"}}}, 11, 2},
		{"another owner", report.Options{Filter: report.Filter{Repositories: []string{"acm/*"}}}, 0, 0},
		{"a workflow with a pipe", report.Options{Filter: report.Filter{Workflows: []string{"CI | nightly `main`"}}}, 3, 1},
		{"a job", report.Options{Filter: report.Filter{Jobs: []string{"lint"}}}, 1, 0},
		{"two jobs", report.Options{Filter: report.Filter{Jobs: []string{"lint", "test"}}}, 4, 1},
		{"a job and another repository", report.Options{Filter: report.Filter{Jobs: []string{"lint"}, Repositories: []string{"acme/api"}}}, 0, 0},
		{"a run", report.Options{Filter: report.Filter{Runs: []string{"4711"}}}, 8, 1},
		{"a run's attempt", report.Options{Filter: report.Filter{Runs: []string{"4711/1"}}}, 8, 1},
		{"a run's other attempt", report.Options{Filter: report.Filter{Runs: []string{"4711/2"}}}, 0, 0},
		{"one job by its tracking id", report.Options{Filter: report.Filter{TrackingID: "github_4711lint"}}, 1, 0},
		{"only events", report.Options{Filter: report.Filter{Kinds: []record.Kind{record.KindEvent}}}, 0, 2},
		{"only invocations", report.Options{Filter: report.Filter{Kinds: []record.Kind{record.KindInvocation}}}, 12, 0},
		{"from the middle of the morning", report.Options{From: at(27 * time.Second)}, 5, 1},
		{"until then", report.Options{To: at(27 * time.Second)}, 7, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := build(t, c.o, morning()...)
			if r.Totals.Calls != c.calls || r.Totals.ImagesPulled != c.pulls {
				t.Errorf("%d calls and %d pulls, want %d and %d", r.Totals.Calls, r.Totals.ImagesPulled, c.calls, c.pulls)
			}
			if r.Totals.Ended > r.Totals.Calls {
				t.Errorf("%d calls ended of %d", r.Totals.Ended, r.Totals.Calls)
			}
		})
	}
}

// The end of a call belongs to the call, and the call to the time it began.
func TestEndAcrossTheEdgeOfTheRange(t *testing.T) {
	s := &story{}
	s.job(record.BySealed, "acme/web", "CI", "test", "1")
	early := s.call("build")                       // 08:00:01
	late := s.call("run")                          // 08:00:02
	s.end(early, "build", 10*time.Second, code(1)) // 08:00:03, began before it was called: the clock is the daemon's
	s.end(late, "run", time.Second, code(0))
	s.end("019507d4-0000-7000-8000-aaaaaaaaaaaa", "pull", 500*time.Millisecond, code(1), "alpine") // its call is gone
	s.end("019507d4-0000-7000-8000-bbbbbbbbbbbb", "pull", time.Hour, code(1), "alpine")            // began before the range

	r := build(t, report.Options{From: clock.Add(2 * time.Second)}, s.lines...)
	if r.Totals.Calls != 1 || r.Totals.Ended != 1 || r.Totals.EndsAlone != 1 || r.Totals.FailedPulls != 1 || r.Totals.Failed != 1 {
		t.Errorf("%+v", r.Totals)
	}
}

func TestHostileLines(t *testing.T) {
	for _, c := range []struct {
		name string
		line string
	}{
		{"nothing", ""},
		{"not JSON", "docker pull alpine"},
		{"cut short", `{"id":"019507d4-0000-7000-8000-000000000001","ts":"2026-03-01T0`},
		{"an array", `[]`},
		{"no id", `{"kind":"event","ts":"2026-03-01T08:00:00Z"}`},
		{"no time", `{"kind":"event","id":"x"}`},
		{"a number for an id", `{"kind":"event","id":7,"ts":"2026-03-01T08:00:00Z"}`},
		{"two objects", `{"kind":"event","id":"x","ts":"2026-03-01T08:00:00Z"}{}`},
		{"a count out of range", `{"kind":"loss","id":"x","ts":"2026-03-01T08:00:00Z","loss":{"count":99999999999999999999}}`},
		{"deeper than the stack should go", `{"x":` + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + `}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := build(t, report.Options{}, []byte(c.line))
			if r.Read.Unreadable != 1 || r.Read.Records != 0 {
				t.Errorf("%+v", r.Read)
			}
		})
	}
	t.Run("a kind of a later version is read and counted", func(t *testing.T) {
		r := build(t, report.Options{}, []byte(`{"kind":"egress","id":"x","ts":"2026-03-01T08:00:00Z","schema":9,"egress":{"host":[{"a":null}]}}`))
		if r.Read.Records != 1 || r.Read.Newer != 1 || r.Read.Unreadable != 0 {
			t.Errorf("%+v", r.Read)
		}
	})
}

// nasty are values that have been used against terminals and pages.
var nasty = []string{
	"\x1b]0;owned\x07", "\x1b[2J", "\u009b31m", "\u202egnp.exe", "a\nb", "a\r\nb", "\u2028", "\x00", "\xff\xfe", "\x7f",
	"a|b", "`a`", "``", "\\", "a\\|b", "<script>alert(1)</script>", "<img src=x>", "![x](http://e/x)", "[x](javascript:y)", "@everyone", "#1", "**b**",
	"</code>", "&lt;", "https://evil.example/", "::add-mask::x", "\u200b", strings.Repeat("x", 100000), strings.Repeat("日本", 5000),
}

// Whatever a record holds, no output has a character that a terminal acts on, and
// a page has no markup but ours.
func TestNothingHostileGetsOut(t *testing.T) {
	s := &story{}
	for i, bad := range nasty {
		s.by = record.BySealed
		s.ci = &record.CI{Repository: bad, Workflow: bad, Job: bad, RunID: fmt.Sprint(i), JobURL: bad}
		c := s.add(&record.Record{Kind: record.KindInvocation, Invocation: &record.Invocation{Tool: bad, Command: bad, Images: []string{bad}}})
		s.add(&record.Record{Kind: record.KindInvocationEnd, End: &record.End{InvocationID: c, Tool: bad, Command: bad, Images: []string{bad}, DurationNS: int64(i), ExitCode: code(1)}})
		s.run("pull", time.Second, 1, bad)
		s.event("image", "pull", bad, bad)
		s.event("container", "start", bad, bad)
		s.add(&record.Record{Kind: record.KindLoss, Loss: &record.Loss{Cause: bad, Source: bad, Detail: bad, Count: 1}})
	}
	f := report.Filter{Kinds: []record.Kind{record.KindInvocation, record.KindEvent, record.KindLoss}}
	r := build(t, report.Options{Top: -1, Filter: f}, s.lines...)
	r.Sources = nasty
	r.Filter.Workflows = nasty
	for name, write := range map[string]func(io.Writer) error{
		"terminal": func(w io.Writer) error { return r.Terminal(w, report.TerminalOptions{}) },
		"tty":      func(w io.Writer) error { return r.Terminal(w, report.TerminalOptions{Width: 80}) },
		"markdown": r.Markdown,
		"json":     r.JSON,
		"summary":  func(w io.Writer) error { return report.Summary(w, r) },
	} {
		t.Run(name, func(t *testing.T) {
			var buf bytes.Buffer
			if err := write(&buf); err != nil {
				t.Fatal(err)
			}
			for i, line := range strings.Split(buf.String(), "\n") {
				for _, c := range line {
					if c == unicode.ReplacementChar && name != "json" && !strings.Contains(line, "\ufffd") || !unicode.IsPrint(c) {
						t.Fatalf("line %d has %U: %.200q", i+1, c, line)
					}
				}
			}
			switch name {
			case "json":
				var back report.Report
				if err := json.Unmarshal(buf.Bytes(), &back); err != nil {
					t.Fatal(err)
				}
			case "markdown", "summary":
				checkMarkdown(t, buf.String())
			}
		})
	}
}

// checkMarkdown takes away the only constructs that our pages are made of (tables,
// headings, lists, <sub>, code) and fails on anything left that Markdown or a
// browser would act on.
func checkMarkdown(t *testing.T, page string) {
	t.Helper()
	columns := 0
	for line := range strings.Lines(page) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "|") {
			n := strings.Count(line, "|")
			if columns == 0 {
				columns = n
			}
			if n != columns {
				t.Fatalf("%d bars in a table of %d: %.300s", n, columns, line)
			}
		} else {
			columns = 0
		}
		rest := line
		for _, ours := range []string{"<sub>", "</sub>", "&lt;"} {
			rest = strings.ReplaceAll(rest, ours, "")
		}
		for { // <code>...</code>: only letters, digits and character references inside
			i := strings.Index(rest, "<code>")
			if i < 0 {
				break
			}
			j := strings.Index(rest, "</code>")
			if j < i || strings.ContainsAny(rest[i+6:j], "<>`|\\[]*_@") {
				t.Fatalf("bad code: %.300s", line)
			}
			rest = rest[:i] + rest[j+7:]
		}
		for { // `...`
			i := strings.IndexByte(rest, '`')
			if i < 0 {
				break
			}
			j := strings.IndexByte(rest[i+1:], '`')
			if j <= 0 {
				t.Fatalf("bad code: %.300s", line)
			}
			rest = rest[:i] + rest[i+j+2:]
		}
		if !strings.HasPrefix(line, "#") && strings.ContainsAny(rest, "<>\\[]@#`") {
			t.Fatalf("markup that is not ours: %.300s", rest)
		}
	}
}

func TestSummaryIsSilentWithoutDocker(t *testing.T) {
	s := &story{}
	s.job(record.BySealed, "acme/web", "CI", "docs", "1")
	s.add(&record.Record{Kind: record.KindJobStart, Job: &record.Job{}})
	s.add(&record.Record{Kind: record.KindInvocation, OutsideJob: true, By: record.ByNone, Invocation: &record.Invocation{Tool: "docker", Command: "ps"}})
	s.event("network", "create", "n", "")
	s.add(&record.Record{Kind: record.KindJobEnd, Job: &record.Job{Outcome: "completed"}})
	var buf bytes.Buffer
	if err := report.Summary(&buf, build(t, report.Options{}, s.lines...)); err != nil || buf.Len() != 0 {
		t.Errorf("wrote %q, %v", buf.String(), err)
	}
}

func TestNothingToReport(t *testing.T) {
	for _, c := range []struct {
		name  string
		lines [][]byte
		want  string
	}{
		{"an empty journal", nil, "tallyman doctor"},
		{"a range without records", morning(), "No record in this time range"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var buf bytes.Buffer
			r := build(t, report.Options{From: clock.Add(240 * time.Hour)}, c.lines...)
			if err := r.Terminal(&buf, report.TerminalOptions{}); err != nil || !strings.Contains(buf.String(), c.want) {
				t.Errorf("%v\n%s", err, buf.String())
			}
		})
	}
}

func TestBadOptions(t *testing.T) {
	for _, c := range []struct {
		name string
		o    report.Options
		want string
	}{
		{"an unknown kind", report.Options{Filter: report.Filter{Kinds: []record.Kind{"events"}}}, "there are invocation,"},
		{"an empty range", report.Options{From: clock, To: clock}, "the time range is empty"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := report.Build(context.Background(), nil, c.o)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestMoreKeysThanMemory(t *testing.T) {
	s := &story{}
	s.job(record.BySealed, "acme/web", "CI", "test", "1")
	for i := range 30000 {
		s.call("push", fmt.Sprintf("acme/web:%d", i))
		if i%3 == 0 {
			s.call("run", "alpine")
		}
	}
	r := build(t, report.Options{Top: 1}, s.lines...)
	got := r.ImagesNamed
	if got.Rows[0].Image != "docker.io/library/alpine:latest" || got.Rows[0].Count+got.Slack < 10000 || got.Rows[0].Count > 10000 || got.Slack == 0 {
		t.Errorf("%+v: alpine was named 10,000 times", got)
	}
	if c := r.Commands.Rows[0]; c.Command != "push" || c.Calls != 30000 {
		t.Errorf("%+v: exact tables must stay exact", c)
	}
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 3, 10, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct{ text, want string }{
		{"", "0001-01-01T00:00:00Z"},
		{"2h", "2026-03-10T10:00:00Z"},
		{"1h30m", "2026-03-10T10:30:00Z"},
		{"7d", "2026-03-03T12:00:00Z"},
		{"2w", "2026-02-24T12:00:00Z"},
		{"2026-03-01", "2026-03-01T00:00:00Z"},
		{"2026-03-01T08:00:00+02:00", "2026-03-01T06:00:00Z"},
		{"yesterday", ""},
		{"-2h", ""},
		{"d", ""},
		{"99999999d", ""},
	} {
		t.Run(c.text, func(t *testing.T) {
			got, err := report.ParseTime(c.text, now)
			if (err != nil) != (c.want == "") || err == nil && got.Format(time.RFC3339) != c.want {
				t.Errorf("%v, %v; want %s", got, err, c.want)
			}
		})
	}
}
