// Package importer makes records of what others know of the same traffic: the request
// tables that GitHub's support hands out, Docker Hub's usage export, any other table in
// CSV or JSON Lines, and the Worker logs of jobs that ran before Tallyman was
// installed.
//
// A value flows one way: Requests decodes a file (gzip, UTF-16, byte order marks),
// splits it into rows, finds out from the first of them which column is which, and
// yields a record, or a *BadRow, for each row. Join gives rows of Docker Hub's export
// to the jobs that explain them, and WorkerLog reads the logs of runners.
//
// What the package promises:
//
//   - Each row of data gives exactly one record or one *BadRow; nothing is dropped
//     in silence. What is no row (a byte order mark, a heading, empty lines) is counted.
//   - Memory does not follow the length of the input: a row longer than MaxRow is bad.
//   - The same file, read again with the same options, gives the same ids.
//   - No query, fragment, user or password of a URL, and nothing that looks like a
//     secret, reaches a record or an error. Errors never quote a cell.
package importer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// MaxRow is the longest row, in bytes of UTF-8, that is read. A longer one is bad, and
// so is a quoted cell that is not closed within it.
const MaxRow = 256 << 10

// Format names what a file is. It becomes the source of its records.
type Format string

// The formats that Requests reads.
const (
	GitHubCSV    Format = "github-csv"
	DockerHubCSV Format = "dockerhub-csv"
	CSV          Format = "csv"
	JSONL        Format = "jsonl"
)

// Options say how a file is read. Only Format is needed.
type Options struct {
	Format Format
	// Columns names the column of a field (Fields), and comes before what is detected: a
	// heading, a number after # (#1 is the first column), or in JSON Lines a path with dots.
	// An empty name says that the file has no column for the field.
	Columns map[string]string
	// TimeFormat is rfc3339, unix, unix-ms, unix-us, unix-ns, a layout of Go's package time
	// or one of strftime with percent signs; empty: detected.
	TimeFormat string
	// Location is the zone of times that do not name one; nil: UTC.
	Location *time.Location
	// Delimiter is the character between cells; 0: detected.
	Delimiter rune
	// Host is the host of requests whose row names none.
	Host string
	// OnLayout, if set, is told once how the columns were understood.
	OnLayout func(Layout)
}

// Layout is how a file was understood.
type Layout struct {
	// Columns maps fields to the names of their columns (#n in a file without headings).
	Columns map[string]string
	// Ignored are the headings that became nothing.
	Ignored []string
	// Skipped is the number of lines before the heading.
	Skipped int
	// Delimiter is the character between cells, 0 for JSON Lines.
	Delimiter rune
	// TimeFormat is the form of the first time.
	TimeFormat string
}

// BadRow is the error of one row; the rows after it are read all the same. Its text
// holds nothing of the row.
type BadRow struct {
	Row    int64 // the first row of data is 1
	Line   int64 // the line of the decoded text on which the row begins, from 1
	Reason string
}

func (e *BadRow) Error() string {
	return fmt.Sprintf("row %d (line %d): %s", e.Row, e.Line, e.Reason)
}

// ErrLayout is what a file fails with whose columns cannot be understood.
var ErrLayout = errors.New("the columns are not understood")

// Requests reads rows from r and yields for each a record of kind http, or nil and a
// *BadRow. Any other error is the last value: ErrLayout, an error of r, or that of ctx.
// The record is the caller's. Iterations read on in r, so the sequence is good for one.
func Requests(ctx context.Context, r io.Reader, o Options) iter.Seq2[*record.Record, error] {
	return func(yield func(*record.Record, error) bool) {
		text, err := decode(r)
		if err != nil {
			yield(nil, err)
			return
		}
		defer text.Close()
		in := &input{r: bufio.NewReaderSize(text, 64<<10)}
		var rows rowReader
		if o.Format == JSONL {
			rows = &jsonRows{in: in}
		} else {
			rows = &csvRows{in: in, delimiter: o.Delimiter}
		}
		x, err := newTable(rows, o)
		if err != nil {
			yield(nil, err)
			return
		}
		for n := 0; ; n++ {
			if n&255 == 0 && ctx.Err() != nil {
				yield(nil, ctx.Err())
				return
			}
			rec, err := x.next()
			var bad *BadRow
			switch {
			case err == io.EOF:
				return
			case errors.As(err, &bad):
				if !yield(nil, bad) {
					return
				}
			case err != nil:
				yield(nil, err)
				return
			default:
				if !yield(rec, nil) {
					return
				}
			}
		}
	}
}

// rowReader gives the rows of a file one after the other. A row is good until the next
// call. err is a *BadRow for a row that cannot be split; only Line and Reason are set.
type rowReader interface {
	next() (row, error)
}

// row is one row before its cells have a meaning.
type row struct {
	line  int64
	raw   []byte   // the bytes of the row, by which its id is made
	cells []string // CSV
	get   func(path string) (string, bool)
}

// table turns rows into records.
type table struct {
	rows    rowReader
	o       Options
	pending []pendingRow // the sample by which the columns were found
	at      int64        // number of the last row
	cells   map[field]column
	heads   int // headings of CSV; 0: there are none
	width   int // cells that a row of CSV needs: one with fewer was cut
	times   timeParser
	safe    *sanitizer
}

type pendingRow struct {
	row row
	err error
}

// sampleRows is how many rows are read before the columns are decided.
const sampleRows = 200

func newTable(rows rowReader, o Options) (*table, error) {
	x := &table{rows: rows, o: o, safe: newSanitizer()}
	for f := range o.Columns {
		if !isField(f) {
			return nil, fmt.Errorf("%w: no field is called %s (known: %s)", ErrLayout, strconv.Quote(x.safe.text(f)), fieldList())
		}
	}
	bytesRead := 0
	for len(x.pending) < sampleRows && bytesRead < 4*MaxRow {
		r, err := rows.next()
		if err == io.EOF {
			break
		}
		var bad *BadRow
		if err != nil && !errors.As(err, &bad) {
			return nil, err
		}
		bytesRead += len(r.raw)
		r.raw = bytes.Clone(r.raw)
		r.cells = append([]string(nil), r.cells...)
		x.pending = append(x.pending, pendingRow{r, err})
	}
	if err := x.layout(); err != nil {
		return nil, err
	}
	return x, nil
}

// next returns the record of the next row.
func (x *table) next() (*record.Record, error) {
	var p pendingRow
	if len(x.pending) > 0 {
		p, x.pending = x.pending[0], x.pending[1:]
	} else {
		x.pending = nil
		p.row, p.err = x.rows.next()
	}
	var bad *BadRow
	if p.err != nil && !errors.As(p.err, &bad) {
		return nil, p.err
	}
	x.at++
	if bad != nil {
		return nil, &BadRow{Row: x.at, Line: bad.Line, Reason: bad.Reason}
	}
	rec, reason := x.record(&p.row)
	if reason != "" {
		return nil, &BadRow{Row: x.at, Line: p.row.line, Reason: reason}
	}
	return rec, nil
}
