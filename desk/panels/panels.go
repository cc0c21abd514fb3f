// Package panels is the one list of what a picture of the account shows: each panel
// is a question, the query that answers it, and how the answer is drawn.
//
// The page of tallyman-desk, its live server, the Grafana dashboard and the links for
// Looker Studio are all made of All; none of them holds a query of its own. A query
// is written once, over views, in what GoogleSQL and DuckDB have in common, with the
// placeholders that Render replaces for each of them.
package panels

import (
	"context"
	"time"
)

// Chart is how an answer is drawn.
type Chart string

// The ways of drawing.
const (
	// Figures is one row: each column is a figure of its own.
	Figures Chart = "figures"
	// Bars is a list: text columns name a row, one number has a bar.
	Bars Chart = "bars"
	// Activity is columns over time: the first column is the time, each number a layer.
	Activity Chart = "activity"
	// Spread is a list of durations: a bar from the usual (p50) to the slow (p95).
	Spread Chart = "spread"
)

// Unit is what the values of a column are.
type Unit string

// The units of columns.
const (
	Text     Unit = "text"
	Count    Unit = "count"
	Duration Unit = "ns"    // nanoseconds
	Share    Unit = "share" // 0 to 1
	Time     Unit = "time"
	Days     Unit = "day"
	URL      Unit = "url"   // not shown: where the row's name leads
	Number   Unit = "float" // a number with decimals
)

// Tone is what a number means to the reader, and so its colour.
type Tone string

// The tones of numbers.
const (
	Plain Tone = ""
	Bad   Tone = "bad"
	Warn  Tone = "warn"
	Good  Tone = "good"
	Quiet Tone = "quiet"
)

// Column is one column of an answer, in the query's order.
type Column struct {
	Name     string // in the query
	Title    string // for people
	Unit     Unit
	Tone     Tone
	ToneFrom float64 // the least number that has the tone; 0: any above 0
	Bar      bool    // the list's bars show this number; those of a share end at the whole
	Sets     string  // the filter that a click on the value sets: repository, workflow or image
	Note     string  // a few words for those who do not know what is counted
}

// Panel is one question with its answer's form.
type Panel struct {
	ID       string // a word of a-z, 0-9 and dashes, unique; anchors and dashboards use it
	Section  string // heading under which it stands
	Title    string
	Question string
	Kind     string   // the kind of records that it is about; empty: several
	Views    []string // the views that the query reads, found in it
	SQL      string   // with placeholders, see Render
	Chart    Chart
	Columns  []Column
	Wide     bool   // takes the page's whole width
	Note     string // what the reader must know to read it right
	Empty    string // what to do where nothing was recorded
}

// Filter is what an account is narrowed to. Empty text filters nothing.
type Filter struct {
	From, To   time.Time // From is in, To is out; both are set when a query runs
	Repository string
	Workflow   string
	Image      string
}

// Always is f with every time that a record can have on its open sides.
func (f Filter) Always() Filter {
	if f.From.IsZero() {
		f.From = time.Unix(0, 0)
	}
	if f.To.IsZero() {
		f.To = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	return f
}

// Table is the answer of a query. Values are nil, string, int64, float64, bool or time.Time.
type Table struct {
	Columns []string
	Rows    [][]any
}

// Source answers queries: local journals or BigQuery.
type Source interface {
	// Dialect is the SQL that Query wants.
	Dialect() Dialect
	// Query runs one query with named parameters.
	Query(ctx context.Context, sql string, params ...Param) (Table, error)
}

// Param is a named parameter of a query: a string or a time.Time.
type Param struct {
	Name  string
	Value any
}

// Result is a panel with its answer, or with the reason why there is none.
type Result struct {
	Panel
	Query string // as it was run
	Table Table
	Err   error
}
