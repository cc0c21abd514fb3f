package importer_test

import (
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/record"
)

func TestJoin(t *testing.T) {
	at := func(clock string) time.Time {
		ts, err := time.Parse(time.DateTime, "2026-11-23 "+clock)
		if err != nil {
			t.Fatal(err)
		}
		return ts
	}
	run := func(clock, repository, job, command, image string) *record.Record {
		return &record.Record{TS: at(clock), Kind: record.KindInvocation, By: record.BySealed,
			CI:         &record.CI{Repository: repository, RunID: "1", JobID: job, Step: "build"},
			Invocation: &record.Invocation{Tool: "docker", Command: command, Images: []string{image}}}
	}
	j := importer.Join{Slack: 2 * time.Minute, Tokens: map[string][]string{"shop-token": {"acme/shop"}}}
	j.Add(run("10:05:00", "acme/shop", "1", "pull", "alpine:3.20"))
	j.Add(run("10:06:00", "acme/shop", "1", "run", "docker.io/library/alpine")) // the same job again
	j.Add(run("10:30:00", "acme/web", "2", "pull", "node:22"))
	j.Add(run("10:30:00", "acme/shop", "3", "container run", "node"))
	j.Add(run("10:59:30", "acme/web", "4", "pull", "redis"))
	j.Add(run("10:00:00", "acme/web", "5", "push", "busybox")) // pulls nothing
	j.Add(&record.Record{TS: at("10:10:00"), Kind: record.KindEvent, CI: &record.CI{Repository: "acme/db", RunID: "1", JobID: "6"},
		Event: &record.Event{Type: "image", Action: "pull", Image: "postgres:17"}})
	j.Add(&record.Record{TS: at("10:10:00"), Kind: record.KindEvent, Event: &record.Event{Type: "image", Action: "pull", Image: "mysql"}}) // of no job

	for _, row := range []struct {
		name, clock, image, token string
		candidates                int64
		job                       string
	}{
		{"one job asked twice", "10:00:00", "docker.io/library/alpine", "", 1, "1"},
		{"another hour", "12:00:00", "docker.io/library/alpine", "", 0, ""},
		{"two jobs", "10:00:00", "docker.io/library/node", "generated", 2, ""},
		{"two jobs, one of which can hold the token", "10:00:00", "docker.io/library/node", "shop-token", 1, "3"},
		{"the next hour by the other clock", "11:00:00", "docker.io/library/redis", "", 1, "4"},
		{"pushed", "10:00:00", "docker.io/library/busybox", "", 0, ""},
		{"an event of the daemon", "10:00:00", "docker.io/library/postgres", "", 1, "6"},
		{"an event of no job", "10:00:00", "docker.io/library/mysql", "", 0, ""},
	} {
		pulls, checks := int64(10), int64(5)
		r := &record.Record{TS: at(row.clock), Kind: record.KindHTTP, By: record.ByNone,
			HTTP: &record.HTTP{Image: row.image, TokenName: row.token, Pulls: &pulls, VersionChecks: &checks}}
		j.Explain(r)
		job := ""
		if r.CI != nil {
			job = r.CI.JobID
			if r.By != record.ByInferred || r.CI.Step != "" {
				t.Errorf("%s: by %s, step %q", row.name, r.By, r.CI.Step)
			}
		}
		if *r.HTTP.Candidates != row.candidates || job != row.job || (job == "") != (r.By == record.ByNone) {
			t.Errorf("%s: %d candidates, job %q", row.name, *r.HTTP.Candidates, job)
		}
	}
	want := importer.Totals{Rows: 8, One: 4, Several: 1, None: 3, Pulls: 80, PullsOne: 40, PullsSeveral: 10, PullsNone: 30, Checks: 40, ChecksOne: 20, ChecksSeveral: 5, ChecksNone: 15}
	if j.Totals() != want {
		t.Errorf("got %+v", j.Totals())
	}
	shares := j.Shares()
	if len(shares) != 5 || shares[4].CI.JobID != "2" || shares[4].Pulls != 0 || shares[4].MaybePulls != 10 {
		t.Errorf("shares %+v", shares)
	}
}
