package panels

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Run answers panels from a source, a few at the same time. An answer that could not be had
// bears its error; the others are there all the same. The filter's From and To must be set.
func Run(ctx context.Context, src Source, f Filter, list []Panel, atOnce int) []Result {
	out := make([]Result, len(list))
	turn := make(chan struct{}, max(atOnce, 1))
	var wg sync.WaitGroup
	for i, p := range list {
		wg.Add(1)
		turn <- struct{}{}
		go func() {
			defer func() { <-turn; wg.Done() }()
			out[i] = Ask(ctx, src, f, p)
		}()
	}
	wg.Wait()
	return out
}

// Ask answers one panel.
func Ask(ctx context.Context, src Source, f Filter, p Panel) Result {
	sql := strings.TrimSpace(p.SQL)
	r := Result{Panel: p, Query: Literal(sql, src.Dialect(), f)}
	if s, ok := src.(interface{ Shown(string) string }); ok {
		r.Query = s.Shown(r.Query)
	}
	if r.Err = ctx.Err(); r.Err != nil {
		return r
	}
	sql, params := Parameters(sql, src.Dialect(), f)
	r.Table, r.Err = src.Query(ctx, sql, params...)
	if r.Err == nil {
		var want []string
		for _, c := range p.Columns {
			want = append(want, c.Name)
		}
		if !slices.EqualFunc(r.Table.Columns, want, strings.EqualFold) {
			r.Err = fmt.Errorf("the answer has the columns %v, and should have %v: are the views of another version?", r.Table.Columns, want)
		}
	}
	return r
}
