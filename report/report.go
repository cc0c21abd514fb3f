// Package report answers the questions people ask of the account from the
// journals themselves: who called docker, with what, how did it end, what was
// pulled and run, and how far these answers can be trusted.
//
// Lines stream from one or more sources (Open) through one aggregation (Build)
// into a Report, which is written as text for a terminal, as Markdown or as JSON;
// Summary writes the few lines for a job's own page. Nothing is kept of a line
// but sixteen bytes of its id and what it adds to bounded tables, so that memory
// does not follow the size of the journal.
//
// Every string of a record is somebody else's: an image, a workflow or a label can
// hold any byte. The writers of this package let no control character reach a
// terminal and no markup reach a page.
package report

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Options say what a report is about.
type Options struct {
	// From and To bound the time of what is recorded: From is in, To is out; zero is open.
	From, To time.Time
	// Filter narrows the report.
	Filter Filter
	// Top is the number of rows of each table; 0 means DefaultTop, a negative number all.
	Top int
	// Now is the clock, time.Now when nil.
	Now func() time.Time
}

// DefaultTop is the number of rows of a table when Options.Top is 0.
const DefaultTop = 10

// Filter narrows a report. Within a list any value may match; all lists that are
// not empty must. In values of Repositories, Workflows, Jobs and Runs a * stands for any text.
type Filter struct {
	// Repositories are owner/name, upper and lower case alike, as on GitHub.
	Repositories []string `json:"repositories,omitempty"`
	// Workflows are names of workflows.
	Workflows []string `json:"workflows,omitempty"`
	// Jobs are keys, display names or numeric ids of jobs.
	Jobs []string `json:"jobs,omitempty"`
	// Runs are run ids, with an attempt (123/2) or without.
	Runs []string `json:"runs,omitempty"`
	// TrackingID is the runner's own id of one job (RUNNER_TRACKING_ID).
	TrackingID string `json:"tracking_id,omitempty"`
	// Kinds are kinds of records; an invocation brings its end along.
	Kinds []record.Kind `json:"kinds,omitempty"`
}

// ErrUnknownKind is returned by Build for a kind in the filter that no record has.
var ErrUnknownKind = errors.New("unknown kind of record")

// Kinds are the kinds that Filter.Kinds may name.
func Kinds() []record.Kind {
	return []record.Kind{record.KindInvocation, record.KindInvocationEnd, record.KindEvent, record.KindLoss, record.KindJobStart, record.KindJobEnd, record.KindHTTP}
}

// Source gives the lines of one journal or file.
type Source interface {
	// Name says where the lines come from, for people.
	Name() string
	// Next returns the next line without its newline, good until the next call,
	// and io.EOF at the end.
	Next() ([]byte, error)
}

// Build reads all sources to their ends, one after the other. The order of the
// sources is of no account: duplicates are removed over all of them, and an end
// finds its call wherever it stands.
func Build(ctx context.Context, sources []Source, o Options) (*Report, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	a := newAggregation(o)
	var names []string
	for _, s := range sources {
		names = append(names, s.Name())
		for n := 0; ; n++ {
			if n%1024 == 0 && ctx.Err() != nil {
				return nil, ctx.Err()
			}
			data, err := s.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", s.Name(), err)
			}
			a.line(data)
		}
		a.read.Torn += Torn(s)
	}
	r := a.result()
	r.Generated = o.Now().UTC()
	r.Sources = names
	r.From, r.To, r.Filter = o.From, o.To, o.Filter
	return r, nil
}

// Check says whether the options make sense, as Build does before it reads.
func (o *Options) Check() error {
	for _, k := range o.Filter.Kinds {
		if !slices.Contains(Kinds(), k) {
			return fmt.Errorf("%w: %q (there are %s)", ErrUnknownKind, k, kindList())
		}
	}
	if !o.From.IsZero() && !o.To.IsZero() && !o.From.Before(o.To) {
		return fmt.Errorf("the time range is empty: it starts at %s and ends at %s",
			o.From.Format(time.RFC3339), o.To.Format(time.RFC3339))
	}
	return nil
}

func kindList() string {
	var names []string
	for _, k := range Kinds() {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// matches says whether the filter on jobs lets a record of this context through.
func (f *Filter) matches(ci *lineCI) bool {
	if f.TrackingID != "" && f.TrackingID != string(ci.trackingID) {
		return false
	}
	return anyMatches(f.Repositories, true, string(ci.repository)) &&
		anyMatches(f.Workflows, false, string(ci.workflow)) &&
		anyMatches(f.Jobs, false, string(ci.job), string(ci.jobName), string(ci.jobID)) &&
		(len(f.Runs) == 0 || anyMatches(f.Runs, false, string(ci.runID), fmt.Sprintf("%s/%d", ci.runID, ci.runAttempt)))
}

// empty says whether the filter lets the records of all jobs through.
func (f *Filter) empty() bool {
	return len(f.Repositories) == 0 && len(f.Workflows) == 0 && len(f.Jobs) == 0 && len(f.Runs) == 0 && f.TrackingID == ""
}

func (f *Filter) kind(k record.Kind) bool {
	return len(f.Kinds) == 0 || slices.Contains(f.Kinds, k)
}

func anyMatches(patterns []string, fold bool, values ...string) bool {
	if len(patterns) == 0 {
		return true
	}
	for _, p := range patterns {
		for _, v := range values {
			if fold {
				p, v = strings.ToLower(p), strings.ToLower(v)
			}
			if glob(p, v) {
				return true
			}
		}
	}
	return false
}

// glob matches a pattern in which * stands for any text. Nothing else is special:
// workflow names contain brackets and question marks.
func glob(pattern, s string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == s
	}
	if !strings.HasPrefix(s, head) {
		return false
	}
	s = s[len(head):]
	for {
		var part string
		part, rest, star = strings.Cut(rest, "*")
		if !star {
			return strings.HasSuffix(s, part)
		}
		at := strings.Index(s, part)
		if at < 0 {
			return false
		}
		s = s[at+len(part):]
	}
}
