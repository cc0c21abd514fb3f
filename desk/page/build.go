package page

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

// Build asks a source all that a page shows. Where the filter leaves an end of time
// open, the page is about all that was recorded. An answer that could not be had is
// on the page as an error; Failed lists them.
func Build(ctx context.Context, src panels.Source, f panels.Filter, list []panels.Panel, atOnce int) (Page, error) {
	p := Page{Filter: f}
	whole := f
	if f.From.IsZero() || f.To.IsZero() {
		first, last, err := bounds(ctx, src, f)
		if err != nil {
			return Page{}, err
		}
		if whole.From.IsZero() {
			whole.From = first
		}
		if whole.To.IsZero() {
			whole.To = last
		}
		if whole.To.Before(whole.From) { // nothing was recorded on the open side
			whole.To = whole.From
		}
	}
	p.From, p.To = whole.From, whole.To
	// The panel of trust is asked with the others, and stands beside each of them.
	for _, r := range panels.Run(ctx, src, whole, append(slices.Clone(list), panels.Trust()), atOnce) {
		if r.ID != panels.Trust().ID {
			p.Results = append(p.Results, r)
			continue
		}
		p.Asked = &r
		p.Trust = trust(r)
	}
	return p, ctx.Err()
}

// Failed lists the answers that could not be had.
func (p *Page) Failed() []error {
	var out []error
	for _, r := range p.Results {
		if r.Err != nil {
			out = append(out, fmt.Errorf("%s: %w", r.ID, r.Err))
		}
	}
	if p.Asked != nil && p.Asked.Err != nil {
		out = append(out, fmt.Errorf("%s: %w", p.Asked.ID, p.Asked.Err))
	}
	return out
}

// bounds is the time of the first record, and a moment after that of the last.
func bounds(ctx context.Context, src panels.Source, f panels.Filter) (first, last time.Time, err error) {
	f.From, f.To = time.Unix(0, 0), time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
	r := panels.Ask(ctx, src, f, panels.Bounds())
	if r.Err != nil {
		return first, last, fmt.Errorf("find the time of the records: %w", r.Err)
	}
	if len(r.Table.Rows) == 1 && len(r.Table.Rows[0]) == 2 {
		first, _ = r.Table.Rows[0][0].(time.Time)
		last, _ = r.Table.Rows[0][1].(time.Time)
	}
	if first.IsZero() || last.IsZero() {
		return time.Unix(0, 0).UTC(), time.Unix(0, 0).UTC(), nil
	}
	// Microseconds are the finest that BigQuery has.
	return first.UTC().Truncate(time.Microsecond), last.UTC().Truncate(time.Microsecond).Add(time.Microsecond), nil
}

// trust reads the answer of the panel of trust.
func trust(r panels.Result) Trust {
	var t Trust
	if r.Err != nil || len(r.Table.Rows) != 1 {
		return t
	}
	t.Known = true
	for i, c := range r.Columns {
		n := int64(number(r.Table.Rows[0][i]))
		switch strings.ToLower(c.Name) {
		case "jobs":
			t.Jobs = n
		case "recorded":
			t.Recorded = n
		case "sealed":
			t.Sealed = n
		case "environment":
			t.Environment = n
		case "inferred":
			t.Inferred = n
		case "none":
			t.None = n
		case "lost":
			t.Lost = n
		case "holes":
			t.Holes = n
		}
	}
	return t
}
