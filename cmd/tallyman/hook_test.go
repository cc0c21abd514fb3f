package main

import (
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

// The summary of a job tells of its own calls, its coverage included: the job before
// it on the same runner ended a moment ago.
func TestSummaryIsOfItsJobAlone(t *testing.T) {
	cfg := config.Default()
	cfg.StateDir = t.TempDir()
	began := time.Now().Add(-time.Minute)
	j, err := journal.Open(cfg.Journal(), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	jobs := []hook.Context{
		{CI: record.CI{Repository: "acme/web", RunID: "7", Job: "build", TrackingID: "github_1"}, Started: began},
		{CI: record.CI{Repository: "acme/web", RunID: "7", Job: "test", TrackingID: "github_2"}, Started: began.Add(2 * time.Second)},
	}
	for i, calls := range []int{3, 1} {
		for n := range calls {
			at := jobs[i].Started.Add(time.Duration(n) * 100 * time.Millisecond)
			r := record.Record{ID: record.NewID(at), TS: at, Kind: record.KindInvocation, Schema: 1, By: record.BySealed, CI: &jobs[i].CI,
				Invocation: &record.Invocation{Tool: "docker", Command: "pull"}}
			if err := j.Append(record.Append(nil, &r)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := jobSummary(t.Context(), cfg, jobs[1])
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text, "1 docker call,") || !strings.Contains(text, "coverage: 1 of 1 calls") {
		t.Errorf("the summary is not of one call:\n%s", text)
	}
}
