// Package ranking asks a source of records whose builds explain the git requests that
// were imported into them, by package blame, for a page: at once for a page that stands
// alone, and in the background for a live one.
package ranking

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

// Ask ranks those whose builds explain the imported git requests among the records. It
// is nil where there are none. Of a filter only the time counts.
func Ask(ctx context.Context, src panels.Stream, f panels.Filter) (*page.Suspects, error) {
	e, err := gather(ctx, src, f)
	if err != nil || e.none() {
		return nil, err
	}
	return e.rank(ctx)
}

// evidence is what a ranking is made from.
type evidence struct {
	requests *blame.Requests
	builds   *blame.Builds
	named    int64 // git requests that named an account
	narrowed bool  // the page has a filter that the ranking does not follow
}

func (e *evidence) none() bool { return e.requests.Total() == 0 && e.named == 0 }

// gather reads the records.
func gather(ctx context.Context, src panels.Stream, f panels.Filter) (*evidence, error) {
	e := &evidence{requests: blame.NewRequests(), builds: blame.NewBuilds(), narrowed: f.Repository+f.Workflow+f.Image != ""}
	f = f.Always()
	asked, built := panels.Suspects()
	err := each(ctx, src, asked, f, func(r fields) {
		if r.bool("anonymous") {
			e.requests.Add(r.time("ts"), r.int("n"), blame.Mark{UserAgent: r.text("user_agent"), Asked: r.text("asked"), Addr: r.text("addr")})
		} else {
			e.named += r.int("n")
		}
	})
	if err != nil || e.requests.Total() == 0 {
		return e, err
	}
	return e, each(ctx, src, built, f, func(r fields) { e.builds.Add(r.record()) })
}

// rank is the answer. There is one for every evidence; an error is that of ctx.
func (e *evidence) rank(ctx context.Context) (*page.Suspects, error) {
	if e.requests.Total() == 0 {
		return page.Unsuspected(e.named), nil
	}
	r := &blame.Result{Verdict: blame.CannotTell, Coverage: blame.Coverage{Share: -1}, Requests: e.requests.Total(), Builds: e.builds.Len()}
	if r.Builds == 0 {
		r.Reasons = []string{"No docker build was recorded in this time: is the shim installed where builds run?"}
		return page.Blamed(*r), nil
	}
	ranked, err := blame.Rank(ctx, e.requests, e.builds, blame.Options{Top: page.MaxRows})
	var apart *blame.NoOverlapError
	switch {
	case errors.As(err, &apart):
		r.Reasons = []string{"The requests and the recorded builds have no time in common: is the table of another time zone, or of other days?"}
		return page.Blamed(*r), nil
	case err != nil:
		return nil, err
	}
	s := page.Blamed(*ranked)
	if e.narrowed {
		s.Notes = append(s.Notes, "It is about the whole fleet: the page’s repository, workflow and image do not narrow it, because that would take the others’ part in the requests away.")
	}
	return s, nil
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
