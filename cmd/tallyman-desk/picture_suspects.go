package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/record"
)

// suspects ranks whose builds explain the imported git requests among the records. It is
// nil where there are none. Of a filter only the time counts.
func suspects(ctx context.Context, src panels.Stream, f panels.Filter) (*page.Suspects, error) {
	f = always(f)
	asked, built := panels.Suspects()
	requests, builds := blame.NewRequests(), blame.NewBuilds()
	err := each(ctx, src, asked, f, func(r fields) {
		requests.Add(r.time("ts"), r.int("n"), blame.Mark{UserAgent: r.text("user_agent"), Asked: r.text("asked"), Addr: r.text("addr")})
	})
	if err != nil || requests.Total() == 0 {
		return nil, err
	}
	if err := each(ctx, src, built, f, func(r fields) { builds.Add(r.record()) }); err != nil {
		return nil, err
	}
	r := &blame.Result{Verdict: blame.CannotTell, Coverage: blame.Coverage{Share: -1}, Requests: requests.Total()}
	if builds.Len() == 0 {
		r.Reasons = []string{"No docker build was recorded in this time: is the shim installed where builds run?"}
		return page.Blamed(*r), nil
	}
	ranked, err := blame.Rank(ctx, requests, builds, blame.Options{Top: page.MaxRows})
	var apart *blame.NoOverlapError
	switch {
	case errors.As(err, &apart):
		r.Builds = builds.Len()
		r.Reasons = []string{"The requests and the recorded builds have no time in common: is the table of another time zone, or of other days?"}
		return page.Blamed(*r), nil
	case err != nil:
		return nil, err
	}
	return page.Blamed(*ranked), nil
}

// each asks one of the queries of the ranking.
func each(ctx context.Context, src panels.Stream, p panels.Panel, f panels.Filter, row func(fields)) error {
	r := fields{at: map[string]int{}}
	sql, params := panels.Parameters(strings.TrimSpace(p.SQL), src.Dialect(), f)
	err := src.Each(ctx, sql, func(columns []string) error {
		for i, name := range columns {
			r.at[name] = i
		}
		return nil
	}, func(values []any) error {
		r.values = values
		row(r)
		return nil
	}, params...)
	if err != nil {
		return fmt.Errorf("%s: %w", p.ID, err)
	}
	return nil
}

// fields is a row by the names of its columns. What is NULL is the zero value.
type fields struct {
	at     map[string]int
	values []any
}

func (f fields) value(name string) any {
	if i, ok := f.at[name]; ok {
		return f.values[i]
	}
	return nil
}

func (f fields) text(name string) string    { s, _ := f.value(name).(string); return s }
func (f fields) int(name string) int64      { n, _ := f.value(name).(int64); return n }
func (f fields) bool(name string) bool      { b, _ := f.value(name).(bool); return b }
func (f fields) time(name string) time.Time { t, _ := f.value(name).(time.Time); return t }

// record is a row of the builds, as far as blame.Builds looks at it.
func (f fields) record() *record.Record {
	r := &record.Record{
		ID: f.text("id"), TS: f.time("ts"), Kind: record.Kind(f.text("kind")), By: record.ByNone,
		Host: &record.Host{Name: f.text("host"), Pod: f.text("pod")},
	}
	if f.text("repository") != "" {
		r.By = record.ByEnvironment // any that is not none
		r.CI = &record.CI{
			Repository: f.text("repository"), Workflow: f.text("workflow"), Job: f.text("job"), Step: f.text("step"),
			RunID: f.text("run_id"), JobURL: f.text("job_url"), RunNumber: f.int("run_number"), Runner: &record.Runner{Name: f.text("runner")},
		}
	}
	switch r.Kind {
	case record.KindInvocation:
		r.Invocation = &record.Invocation{
			Command: f.text("command"), Images: strings.Fields(f.text("images")), Flags: strings.Fields(f.text("flags")),
			Target: f.text("target"), Nested: f.bool("nested"), ExecError: f.text("exec_error"),
		}
	case record.KindInvocationEnd:
		r.End = &record.End{InvocationID: f.text("invocation_id"), Command: f.text("command"), DurationNS: f.int("duration_ns"), AtMost: f.bool("at_most")}
	case record.KindLoss:
		r.Loss = &record.Loss{Cause: f.text("cause"), Source: f.text("source"), Count: f.int("lost")}
	}
	return r
}
