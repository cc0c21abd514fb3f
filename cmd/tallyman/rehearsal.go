package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/figures"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/report"
	"github.com/tallyman-ci/tallyman/sinks"
)

// rehearse is replayTo without sending anything: it says what would be sent.
func (p *program) rehearse(c *cli.Context, url string, do func(*sinks.Target, sinks.Sink) (sinks.Replayed, error)) error {
	t, err := sinks.Parse(url, schemes()...)
	if err == nil {
		err = sinks.Check(url, schemes()...)
	}
	if err != nil {
		return err
	}
	s := &rehearsal{kinds: map[string]int64{}, reasons: map[string]int64{}}
	r, err := do(t, s)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "%s: %s would be sent to %s%s\n", t.Pump.Name, figures.Plural(r.Delivered, "record"), t.Pump.Target, s.span())
	for _, kind := range mostFirst(s.kinds) {
		fmt.Fprintf(p.stdout, "  %d %s\n", s.kinds[kind], report.Safe(kind))
	}
	for _, reason := range mostFirst(s.reasons) {
		fmt.Fprintf(p.stdout, "  %d refused before: %s\n", s.reasons[reason], report.Safe(reason))
	}
	if r.Unreadable > 0 {
		fmt.Fprintf(p.stdout, "  not readable as records: %s\n", figures.Plural(r.Unreadable, "line"))
	}
	return nil
}

// mostFirst are the keys of counts.
func mostFirst(counts map[string]int64) []string {
	return slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), strings.Compare(a, b))
	})
}

// rehearsal is the sink of a dry run. It counts what it is given.
type rehearsal struct {
	kinds       map[string]int64
	reasons     map[string]int64 // of the quarantine
	first, last time.Time
}

func (s *rehearsal) Write(_ context.Context, batch []sinks.Entry) error {
	for _, e := range batch {
		s.kinds[string(e.Kind)]++
		var r record.Record
		if recordjson.Unmarshal(e.Line, &r) != nil || r.TS.IsZero() {
			continue
		}
		if s.first.IsZero() || r.TS.Before(s.first) {
			s.first = r.TS
		}
		if r.TS.After(s.last) {
			s.last = r.TS
		}
	}
	return nil
}

func (s *rehearsal) Close(context.Context) error { return nil }

func (s *rehearsal) quarantine(ctx context.Context, path string) (r sinks.Replayed, err error) {
	r.Unreadable, err = sinks.Held(path, func(e sinks.Entry, reason string) error {
		r.Delivered++
		s.reasons[strings.TrimSpace(reason)]++
		return s.Write(ctx, []sinks.Entry{e})
	})
	return r, err
}

func (s *rehearsal) span() string {
	if s.first.IsZero() {
		return ""
	}
	const form = "2006-01-02 15:04:05"
	return fmt.Sprintf(", of %s to %s UTC", s.first.UTC().Format(form), s.last.UTC().Format(form))
}
