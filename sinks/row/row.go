// Package row is the form that a record has as a row of the BigQuery table: the
// data of a Pub/Sub message that a BigQuery subscription with use_table_schema
// writes to the table, member by column. Cloud Logging gets the same members as
// jsonPayload, so that a question is asked in the same words in both places.
//
// Columns and the encoder are both derived from the struct record.Record, so a row
// has the table's columns and no others. It differs from the record's own line in
// four places, each because of BigQuery or Pub/Sub:
//
//   - repository and workflow stand at the top too, copied from ci, because a table
//     can be clustered by top-level columns only;
//   - times have six digits behind the second: TIMESTAMP holds microseconds;
//   - time_nano and mono_ns are strings: they pass 2^53, above which a reader of JSON
//     may round a number;
//   - members that this build does not know are left out. One of them, sent by a
//     hostile job or a newer shim, could carry the name of a column with another
//     type, and the whole row would go to the dead-letter topic.
//
// The package imports no library, so that whoever makes the table can use it too.
package row

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Type is the type of a column, as BigQuery's table schemas name it.
type Type string

// The types of columns.
const (
	String    Type = "STRING"
	Integer   Type = "INTEGER" // 64 bits
	Boolean   Type = "BOOLEAN"
	Timestamp Type = "TIMESTAMP"
	Record    Type = "RECORD"
)

// Mode says how often a column's value occurs in a row.
type Mode string

// The modes of columns.
const (
	Required Mode = "REQUIRED"
	Nullable Mode = "NULLABLE"
	Repeated Mode = "REPEATED"
)

// Column is a column of the table, or a field of a RECORD.
type Column struct {
	Name   string   `json:"name"`
	Type   Type     `json:"type"`
	Mode   Mode     `json:"mode"`
	Fields []Column `json:"fields,omitempty"`
}

// required are the columns that each row has. Everything else may be missing, so
// that the schema can grow.
var required = []string{"id", "ts", "kind"}

// promoted are the members of ci that are copied to the top.
var promoted = []string{"repository", "workflow"}

// asText are the integers that pass 2^53.
var asText = []string{"time_nano", "mono_ns"}

// TimeForm is the form of times in rows, always in UTC.
const TimeForm = "2006-01-02T15:04:05.000000Z"

// Columns returns the columns of the table, in the order of the record's struct.
func Columns() []Column {
	return columnsOf(table())
}

// Append appends the row of r to dst: one JSON object without a newline. The error
// is for people; a record with one will never be a row.
func Append(dst []byte, r *record.Record) ([]byte, error) {
	switch {
	case r.ID == "":
		return dst, fmt.Errorf("a row needs an id")
	case r.Kind == "":
		return dst, fmt.Errorf("a row needs a kind")
	}
	dst = appendObject(dst, reflect.ValueOf(r).Elem(), table())
	if r.CI == nil {
		return dst, nil
	}
	dst = dst[:len(dst)-1]
	ci := reflect.ValueOf(r.CI).Elem()
	for _, c := range promotedColumns() {
		if v := ci.Field(c.index); !v.IsZero() {
			dst = append(append(append(dst, ','), c.key...), ':')
			dst = record.AppendString(dst, v.String())
		}
	}
	return append(dst, '}'), nil
}

// column is a member of a struct on its way into a row.
type column struct {
	Column
	key     string // the name in quotes
	index   int    // of the field in its struct
	omit    bool   // where the value is zero
	columns []column
}

// The table is derived from the struct once, when it is first wanted: not at the
// start of the program, which is also that of the hooks. Nothing changes it later.
var (
	table           = sync.OnceValue(func() []column { return columns(reflect.TypeFor[record.Record](), required) })
	promotedColumns = sync.OnceValue(func() []column {
		return slices.DeleteFunc(columns(reflect.TypeFor[record.CI](), nil), func(c column) bool {
			return !slices.Contains(promoted, c.Name)
		})
	})
)

// columns panics for a type of field that it does not know: the record's struct
// then has one that no row can hold yet, and every test fails.
func columns(t reflect.Type, required []string) []column {
	var all []column
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		c := column{Column: Column{Name: name, Mode: Nullable}, key: strconv.Quote(name), index: i, omit: options != ""}
		if slices.Contains(required, name) {
			c.Mode = Required
		}
		ft := f.Type
		if ft.Kind() == reflect.Slice {
			c.Mode, ft = Repeated, ft.Elem()
		}
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		switch {
		case ft == reflect.TypeFor[time.Time]():
			c.Type = Timestamp
		case ft.Kind() == reflect.Struct:
			c.Type, c.columns = Record, columns(ft, nil)
		case ft.Kind() == reflect.String:
			c.Type = String
		case ft.Kind() == reflect.Int64 && slices.Contains(asText, name):
			c.Type = String
		case ft.Kind() == reflect.Int64:
			c.Type = Integer
		case ft.Kind() == reflect.Bool:
			c.Type = Boolean
		default:
			panic(fmt.Sprintf("row: %s.%s has type %s, for which there is no column", t, f.Name, f.Type))
		}
		all = append(all, c)
	}
	return all
}

func columnsOf(all []column) []Column {
	var out []Column
	for _, c := range all {
		c.Column.Fields = columnsOf(c.columns)
		out = append(out, c.Column)
		if c.Name == "by" {
			for _, p := range promotedColumns() {
				out = append(out, p.Column)
			}
		}
	}
	return out
}

func appendObject(dst []byte, v reflect.Value, all []column) []byte {
	dst = append(dst, '{')
	for i := range all {
		c := &all[i]
		f := v.Field(c.index)
		switch {
		case c.omit && (f.IsZero() || c.Type == Timestamp && f.Interface().(time.Time).IsZero()):
			continue
		case c.Mode == Repeated && f.Len() == 0:
			continue
		}
		if dst[len(dst)-1] != '{' {
			dst = append(dst, ',')
		}
		dst = append(append(dst, c.key...), ':')
		if c.Mode != Repeated {
			dst = appendValue(dst, f, c)
			continue
		}
		dst = append(dst, '[')
		for j := range f.Len() {
			if j > 0 {
				dst = append(dst, ',')
			}
			dst = appendValue(dst, f.Index(j), c)
		}
		dst = append(dst, ']')
	}
	return append(dst, '}')
}

func appendValue(dst []byte, f reflect.Value, c *column) []byte {
	if f.Kind() == reflect.Pointer {
		f = f.Elem()
	}
	switch f.Kind() {
	case reflect.String:
		return record.AppendString(dst, f.String())
	case reflect.Bool:
		return strconv.AppendBool(dst, f.Bool())
	case reflect.Int64:
		if c.Type == String {
			return append(strconv.AppendInt(append(dst, '"'), f.Int(), 10), '"')
		}
		return strconv.AppendInt(dst, f.Int(), 10)
	}
	if c.Type == Record {
		return appendObject(dst, f, c.columns)
	}
	t := f.Interface().(time.Time).UTC()
	if y := t.Year(); y < 1 || y > 9999 {
		t = time.Time{} // as the record's own encoder does; also the first moment that TIMESTAMP knows
	}
	return append(t.AppendFormat(append(dst, '"'), TimeForm), '"')
}
