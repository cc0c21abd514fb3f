package bq

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tallyman-ci/tallyman/sinks/row"
)

// Records is the table of records, one row for each delivery of a record.
const Records = "records"

// PartitionBy is the column by whose day the table of records is partitioned.
const PartitionBy = "ts"

// ClusterBy returns the columns by which each day is sorted, in the order in which
// questions filter.
func ClusterBy() []string { return []string{"kind", "repository", "workflow"} }

// Field is a column of a table, or a field of a RECORD, in the form of BigQuery's table
// schemas (https://cloud.google.com/bigquery/docs/reference/rest/v2/tables#TableFieldSchema).
type Field struct {
	Name        string  `json:"name"`
	Type        string  `json:"type"`
	Mode        string  `json:"mode"`
	Description string  `json:"description,omitempty"`
	Fields      []Field `json:"fields,omitempty"`
}

// Schema returns the columns of the table of records: those of the rows that are sent to
// Pub/Sub, described by the comments of the record's fields.
func Schema() []Field { return describe(row.Columns(), descriptions(), "") }

func describe(columns []row.Column, descriptions map[string]string, prefix string) []Field {
	var out []Field
	for _, c := range columns {
		f := Field{Name: c.Name, Type: string(c.Type), Mode: string(c.Mode), Description: descriptions[prefix+c.Name]}
		if f.Description == "" && prefix == "" {
			f.Description = descriptions["ci."+c.Name] + " The same as ci." + c.Name + ": a table is clustered by columns at its top only."
		}
		if c.Type == row.Timestamp {
			f.Description += " In tables with microseconds."
		}
		f.Fields = describe(c.Fields, descriptions, prefix+c.Name+".")
		out = append(out, f)
	}
	return out
}

// Kind says what a Change does to a column.
type Kind string

// What an evolution does to columns.
const (
	Added     Kind = "add"      // a column that the table lacks
	Relaxed   Kind = "relax"    // REQUIRED becomes NULLABLE
	Described Kind = "describe" // another description
	Foreign   Kind = "keep"     // a column that only the table has
)

// Change is one step of a table's evolution.
type Change struct {
	Kind Kind
	Path string // of the column, as ci.runner.name
}

// Evolve returns the schema that a table with have must get to take rows of want, in the
// only ways in which BigQuery lets a table evolve: columns are added at the end, and
// NULLABLE or REPEATED; REQUIRED columns become NULLABLE
// (https://cloud.google.com/bigquery/docs/managing-table-schemas). A column that only
// the table has stays where it is, because it may be of a newer release or somebody's own. The
// error names everything that BigQuery would refuse.
func Evolve(have, want []Field) (merged []Field, changes []Change, err error) {
	var e evolution
	merged = e.merge(have, want, "")
	return merged, e.changes, errors.Join(append(e.refused, Valid(merged))...)
}

type evolution struct {
	changes []Change
	refused []error
}

func (e *evolution) merge(have, want []Field, prefix string) []Field {
	var out []Field
	for _, h := range have {
		path := prefix + h.Name
		i := slices.IndexFunc(want, func(w Field) bool { return strings.EqualFold(w.Name, h.Name) })
		if i < 0 {
			e.changes = append(e.changes, Change{Foreign, path})
			if mode(h) == string(row.Required) { // no row of ours has it
				h.Mode = string(row.Nullable)
				e.changes = append(e.changes, Change{Relaxed, path})
			}
			out = append(out, h)
			continue
		}
		out = append(out, e.both(h, want[i], path))
	}
	for _, w := range want {
		if slices.ContainsFunc(have, func(h Field) bool { return strings.EqualFold(w.Name, h.Name) }) {
			continue
		}
		e.changes = append(e.changes, Change{Added, prefix + w.Name})
		if path := requiredIn(w, prefix); path != "" {
			e.refuse("%s: a REQUIRED column cannot be added to a table with rows; make it NULLABLE", path)
		}
		out = append(out, w)
	}
	return out
}

// requiredIn finds the first REQUIRED column in f.
func requiredIn(f Field, prefix string) string {
	if mode(f) == string(row.Required) {
		return prefix + f.Name
	}
	for _, g := range f.Fields {
		if path := requiredIn(g, prefix+f.Name+"."); path != "" {
			return path
		}
	}
	return ""
}

func (e *evolution) refuse(format string, args ...any) {
	e.refused = append(e.refused, fmt.Errorf(format, args...))
}

// both merges a column that the table has and the rows have.
func (e *evolution) both(h, w Field, path string) Field {
	if h.Name != w.Name {
		e.refuse("%s: cannot become %s: BigQuery's names are the same in any case, and a column keeps its own", path, w.Name)
	}
	if kind(h) != kind(w) {
		e.refuse("%s: the type %s cannot become %s", path, kind(h), kind(w))
		return h
	}
	switch have, want := mode(h), mode(w); {
	case have == want:
	case have == string(row.Required) && want == string(row.Nullable):
		h.Mode = want
		e.changes = append(e.changes, Change{Relaxed, path})
	case have == string(row.Nullable) && want == string(row.Required):
		e.refuse("%s: a NULLABLE column cannot become REQUIRED", path)
	default:
		e.refuse("%s: a %s column cannot become %s", path, have, want)
	}
	if h.Description != w.Description {
		h.Description = w.Description
		e.changes = append(e.changes, Change{Described, path})
	}
	h.Fields = e.merge(h.Fields, w.Fields, path+".")
	return h
}

// mode is f's, which BigQuery leaves out where it is NULLABLE.
func mode(f Field) string {
	if f.Mode == "" {
		return string(row.Nullable)
	}
	return f.Mode
}

// kind is f's type by the name that BigQuery's API answers with, which takes those of
// SQL too.
func kind(f Field) string {
	switch f.Type {
	case "INT64":
		return "INTEGER"
	case "BOOL":
		return "BOOLEAN"
	case "FLOAT64":
		return "FLOAT"
	case "STRUCT":
		return "RECORD"
	}
	return f.Type
}

// The limits of tables (https://cloud.google.com/bigquery/quotas#all_tables) and of
// columns' names (https://cloud.google.com/bigquery/docs/schemas#column_names).
const (
	maxColumns     = 10_000
	maxNesting     = 15
	maxDescription = 1024 // characters
)

var (
	reserved = []string{"_TABLE_", "_FILE_", "_PARTITION", "_ROW_TIMESTAMP", "__ROOT__", "_COLIDENTIFIER"}
	types    = []string{"STRING", "BYTES", "INTEGER", "FLOAT", "BOOLEAN", "TIMESTAMP", "DATE", "TIME", "DATETIME", "NUMERIC",
		"BIGNUMERIC", "GEOGRAPHY", "JSON", "INTERVAL", "RANGE", "RECORD"}
)

func isColumnName(s string) bool {
	foreign := func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}
	return s != "" && len(s) <= 300 && (s[0] < '0' || s[0] > '9') && !strings.ContainsFunc(s, foreign)
}

// Valid returns what BigQuery would refuse in a new table with these columns, or nil.
func Valid(fields []Field) error {
	var refused []error
	refuse := func(format string, args ...any) { refused = append(refused, fmt.Errorf(format, args...)) }
	columns := 0
	var look func(fields []Field, prefix string, depth int)
	look = func(fields []Field, prefix string, depth int) {
		seen := map[string]string{}
		for _, f := range fields {
			path := prefix + f.Name
			columns++
			switch upper := strings.ToUpper(f.Name); {
			case !isColumnName(f.Name):
				refuse("%s: a column's name has letters, digits and underscores, begins with no digit, and has 300 characters at most", path)
			case slices.ContainsFunc(reserved, func(p string) bool { return strings.HasPrefix(upper, p) }):
				refuse("%s: the beginning of this name is BigQuery's own", path)
			case seen[upper] != "":
				refuse("%s: the same name as %s, in any case", path, seen[upper])
			default:
				seen[upper] = path
			}
			if !slices.Contains(types, kind(f)) {
				refuse("%s: there is no type %q", path, f.Type)
			}
			if m := mode(f); m != string(row.Nullable) && m != string(row.Required) && m != string(row.Repeated) {
				refuse("%s: there is no mode %q", path, f.Mode)
			}
			if n := len([]rune(f.Description)); n > maxDescription {
				refuse("%s: the description has %d characters, and %d are allowed", path, n, maxDescription)
			}
			if isRecord := kind(f) == string(row.Record); isRecord != (len(f.Fields) > 0) {
				refuse("%s: a RECORD has fields, and nothing else has", path)
			} else if isRecord && depth >= maxNesting {
				refuse("%s: RECORDs are nested deeper than %d", path, maxNesting)
			} else if isRecord {
				look(f.Fields, path+".", depth+1)
			}
		}
	}
	look(fields, "", 0)
	if columns > maxColumns {
		refuse("%d columns, and %d are allowed", columns, maxColumns)
	}
	return errors.Join(refused...)
}
