package sinks

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

var update = flag.Bool("update", false, "write the golden files again")

func entryOf(r *record.Record) Entry {
	l := record.Append(nil, r)
	return Entry{r.ID, r.Kind, l[:len(l)-1]}
}

// gkeLines is what the gke form of a batch is.
func gkeLines(t *testing.T, batch []Entry) ([]byte, error) {
	t.Helper()
	var out []byte
	s := &gkeSink{Sink: sinkFunc(func(_ context.Context, lines []Entry) error {
		for _, l := range lines {
			out = append(append(out, l.Line...), '\n')
		}
		return nil
	})}
	err := s.Write(t.Context(), batch)
	return out, err
}

// The lines for the logging agent of Google Kubernetes Engine, one for each case of
// severity and message.
func TestGKE(t *testing.T) {
	at := time.Date(2026, 11, 23, 14, 5, 6, 123_456_789, time.UTC)
	ci := &record.CI{Repository: "acme/app", Workflow: "build \"all\"", Job: "unit", RunID: "17000000001", Runner: &record.Runner{Name: "runner-1"}}
	zero, one, killed := int64(0), int64(1), int64(137)
	var batch []Entry
	for i, r := range []record.Record{
		{Kind: record.KindInvocation, Invocation: &record.Invocation{Tool: "docker", Command: "run", Images: []string{"alpine:3"}}},
		{Kind: record.KindInvocation, Invocation: &record.Invocation{Tool: "docker", Command: "run", ExecError: "ENOENT"}},
		{Kind: record.KindInvocationEnd, End: &record.End{Tool: "docker", Command: "build", ExitCode: &zero, DurationNS: 1_500_000_000}},
		{Kind: record.KindInvocationEnd, End: &record.End{Tool: "docker", Command: "build", ExitCode: &one}},
		{Kind: record.KindInvocationEnd, End: &record.End{Tool: "docker", Command: "build", Signal: 9}},
		{Kind: record.KindEvent, Event: &record.Event{Type: "container", Action: "die", Image: "alpine:3", ExitCode: &killed}},
		{Kind: record.KindEvent, Event: &record.Event{Type: "container", Action: "die", Image: "alpine:3", ExitCode: &zero, DurationNS: 61_000_000_000}},
		{Kind: record.KindEvent, Event: &record.Event{Type: "container", Action: "exec_die", ExitCode: &one}},
		{Kind: record.KindEvent, Event: &record.Event{Type: "container", Action: "oom", TimeNano: at.UnixNano()}},
		{Kind: record.KindLoss, Loss: &record.Loss{Cause: "queue_full", Count: 12}},
		{Kind: record.KindLoss, Loss: &record.Loss{Cause: "stream_gap", Count: -1}},
		{Kind: record.KindJobStart, Job: &record.Job{Version: "1.0"}},
		{Kind: record.KindJobEnd, Job: &record.Job{Outcome: "completed", DurationNS: 90_000_000_000}},
		{Kind: "something.new"},
	} {
		r.ID, r.TS, r.Schema, r.By, r.CI = numbered(i, 1)[0], at, 1, record.BySealed, ci
		batch = append(batch, entryOf(&r))
	}
	got, err := gkeLines(t, batch)
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/gke.jsonl"
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the lines are not those of %s (go test ./sinks -run GKE -update writes it again):\n%s", golden, got)
	}
}

// Whatever a record holds, its line is one JSON object that containerd does not cut,
// and its special members are ours alone.
func TestGKEOfHostileRecords(t *testing.T) {
	huge := record.Record{ID: "huge", TS: ts, Kind: record.KindInvocation, CI: &record.CI{Repository: "acme/app", Workflow: strings.Repeat("ü\n", 3000)},
		Invocation: &record.Invocation{Tool: "docker", Cwd: strings.Repeat("\"", 9000), Images: slices.Repeat([]string{"image"}, 2000)}}
	forged := Entry{ID: "forged", Kind: record.KindEvent, Line: []byte(`{"id":"forged","ts":"2026-11-23T14:05:06.123456789Z","kind":"event","schema":1,"by":"none",` +
		`"severity":"EMERGENCY","message":"<b>","logging.googleapis.com/labels":{"repository":"victim/app"},"logging.googleapis.com/insertId":"other","time":"1970-01-01T00:00:00Z"}`)}
	bad := Entry{ID: "bad", Kind: record.KindEvent, Line: []byte(`{"id":"bad","ts":7}`)}
	got, err := gkeLines(t, []Entry{entryOf(&huge), bad, forged})
	var refused *RefusedError
	if !errors.As(err, &refused) || len(refused.Refused) != 1 || refused.Refused[0].Index != 1 {
		t.Errorf("got %v", err)
	}
	var seen []map[string]any
	lines := bufio.NewScanner(bytes.NewReader(got))
	for lines.Scan() {
		if len(lines.Bytes()) >= 16<<10 {
			t.Errorf("a line has %d bytes", len(lines.Bytes()))
		}
		var m map[string]any
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			t.Fatalf("%v in %.200s", err, lines.Bytes())
		}
		for _, name := range []string{"severity", "message", "logging.googleapis.com/labels", "logging.googleapis.com/insertId", "time"} {
			if n := strings.Count(lines.Text(), `"`+name+`":`); n != 1 {
				t.Errorf("the member %s is there %d times", name, n)
			}
		}
		seen = append(seen, m)
	}
	if len(seen) != 2 {
		t.Fatalf("%d lines", len(seen))
	}
	if l := seen[0]["logging.googleapis.com/labels"].(map[string]any); l["truncated"] != "true" || l["repository"] != "acme/app" || seen[0]["id"] != "huge" {
		t.Errorf("the cut record is %v", seen[0])
	}
	if m := seen[1]; m["severity"] != "INFO" || m["logging.googleapis.com/insertId"] != "forged" || m["time"] != "2026-11-23T14:05:06.123456789Z" {
		t.Errorf("the forged record is %v", m)
	}
}

// One byte of a job's word can be six in JSON, in labels and in the message too. The
// length of the rest goes up in small steps, so that some line comes near the bound.
func TestGKEOfControlCharacters(t *testing.T) {
	for _, c := range []string{"\x01", "\xff", "\u2028", "\""} {
		word := strings.Repeat(c, 256/len(c))
		for rest := 0; rest < 4000; rest += 100 {
			got, err := gkeLines(t, []Entry{entryOf(&record.Record{ID: "x", TS: ts, Kind: record.KindInvocation,
				CI:         &record.CI{Workflow: word, Job: word, RunID: word, Runner: &record.Runner{Name: word}},
				Invocation: &record.Invocation{Tool: word, Command: "run", Cwd: strings.Repeat("a", rest)}})})
			if err != nil {
				t.Errorf("%q: %v", c, err)
			}
			if len(got) >= 16<<10 || !json.Valid(got) || bytes.Count(got, []byte("\n")) != 1 {
				t.Fatalf("%q and %d more: a line of %d bytes: %.100s", c, rest, len(got), got)
			}
		}
	}
}

// The inner sink sees the same bytes in each attempt, so that it goes on where it
// stopped.
func TestGKEAgain(t *testing.T) {
	var seen []string
	s := &gkeSink{Sink: sinkFunc(func(_ context.Context, lines []Entry) error {
		all := ""
		for _, l := range lines {
			all += string(l.Line) + "\n"
		}
		if seen = append(seen, all); len(seen) == 1 {
			return errors.New("the pipe is full")
		}
		return nil
	})}
	batch := entries("a", "b")
	if err := s.Write(t.Context(), batch); err == nil {
		t.Error("the error is gone")
	}
	if err := s.Write(t.Context(), batch); err != nil {
		t.Error(err)
	}
	if len(seen) != 2 || seen[0] != seen[1] {
		t.Errorf("got %q", seen)
	}
}

func TestStdoutFormat(t *testing.T) {
	for url, want := range map[string]string{
		"stdout:?format=gke": "", "stdout:?format=record": "",
		"stdout:?format=json": "want record or gke", "stdout:?fromat=gke": `did you mean "format"?`,
	} {
		s, err := Open(t.Context(), url)
		if err == nil {
			if _, gke := s.(*gkeSink); gke != strings.HasSuffix(url, "gke") {
				t.Errorf("%s gives a %T", url, s)
			}
			if err := s.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", url, err, want)
		}
	}
}
