package report_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/report"
)

func fromPaths(t *testing.T, o report.Options, stdin string, paths ...string) *report.Report {
	t.Helper()
	sources, done, err := report.OpenPaths(paths, o.From, strings.NewReader(stdin))
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	r, err := report.Build(context.Background(), sources, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	j, err := journal.Open(filepath.Join(state, "journal"), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	text := append(bytes.Join(morning()[1:], []byte("\n")), '\n')
	if err := j.Append(text); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "copy.jsonl")
	if err := os.WriteFile(file, append(text, `{"id":"torn","kin`...), 0o600); err != nil {
		t.Fatal(err)
	}
	all := int64(len(morning()) - 1)
	for _, c := range []struct {
		name       string
		paths      []string
		duplicates int64
	}{
		{"a journal beside its writer", []string{filepath.Join(state, "journal")}, 0},
		{"the state folder", []string{state}, 0},
		{"a file that is being written", []string{file}, 0},
		{"stdin", []string{"-"}, 0},
		{"a journal and a copy of it", []string{state, file}, all},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := fromPaths(t, report.Options{}, string(text), c.paths...)
			if r.Read.Records != all || r.Read.Duplicates != c.duplicates || r.Read.Unreadable != 0 || r.Totals.Calls != 12 {
				t.Errorf("%+v, %d calls; want %d records", r.Read, r.Totals.Calls, all)
			}
		})
	}
	t.Run("a journal that is not there", func(t *testing.T) {
		_, _, err := report.OpenPaths([]string{filepath.Join(dir, "none")}, time.Time{}, nil)
		if err == nil || !strings.Contains(err.Error(), "tallyman doctor") {
			t.Errorf("%v", err)
		}
	})
	t.Run("a line longer than memory should hold", func(t *testing.T) {
		r := fromPaths(t, report.Options{}, strings.Repeat("x", 3<<20)+"\n"+string(text), "-")
		if r.Read.Records != all || r.Read.Unreadable != 1 {
			t.Errorf("%+v", r.Read)
		}
	})
}

// Old segments are passed over, and not one record of the range with them.
func TestSegmentsBeforeTheRangeAreNotRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	now := clock
	j, err := journal.Open(dir, journal.Options{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for i := range 100 { // one call every six minutes, so ten to a segment
		r := record.Record{ID: record.NewID(now), TS: now, Kind: record.KindInvocation, By: record.ByNone, Invocation: &record.Invocation{Tool: "docker", Argc: int64(i)}}
		if err := j.Append(record.Append(nil, &r)); err != nil {
			t.Fatal(err)
		}
		now = now.Add(6 * time.Minute)
	}
	r := fromPaths(t, report.Options{From: clock.Add(8 * time.Hour)}, "", dir)
	if r.Totals.Calls != 20 {
		t.Errorf("%d calls of the last two hours, want 20", r.Totals.Calls)
	}
	if r.Read.Records > 50 {
		t.Errorf("%d of 100 records were read for the last two hours", r.Read.Records)
	}
}
