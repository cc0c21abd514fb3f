package panels

import (
	"regexp"
	"strings"
	"time"
)

// Dialect is the SQL that a panel's query is written out in.
type Dialect string

// The dialects.
const (
	GoogleSQL Dialect = "googlesql" // BigQuery
	DuckDB    Dialect = "duckdb"    // local journals
	Grafana   Dialect = "grafana"   // GoogleSQL with Grafana's macros and variables
)

var (
	placeholder = regexp.MustCompile(`@(from|to|repository|workflow|image)\b`)
	// condition is where a query is narrowed: AND @only(repository, workflow) becomes a
	// condition for each filter that is set.
	condition = regexp.MustCompile(`(\s*)AND @only\(([a-z., ]*)\)`)
	// quantile is the one thing that panels want and the dialects write differently:
	// @quantile(duration_ns, 95) is the value that 95 of 100 do not exceed.
	quantile = regexp.MustCompile(`@quantile\(([a-z_.]+), ([0-9]{1,2})\)`)
	// relation is a view as panels and view files write it. Nothing else in a panel's
	// query has this form.
	relation = regexp.MustCompile(`\btallyman\.([a-z_]+)\b`)
)

// Parameters writes a query with named parameters, @name for GoogleSQL and $name for
// DuckDB, and returns the values that it wants.
func Parameters(sql string, d Dialect, f Filter) (string, []Param) {
	seen := map[string]bool{}
	var params []Param
	sql = quantiles(narrow(sql, d, f), d)
	sql = placeholder.ReplaceAllStringFunc(sql, func(m string) string {
		name := m[1:]
		if !seen[name] {
			seen[name] = true
			params = append(params, Param{name, f.value(name)})
		}
		if d == DuckDB {
			return "$" + name
		}
		return m
	})
	return sql, params
}

// Literal writes a query that can be run as it stands, with the filter's values in it.
func Literal(sql string, d Dialect, f Filter) string {
	return placeholder.ReplaceAllStringFunc(quantiles(narrow(sql, d, f), d), func(m string) string {
		switch v := f.value(m[1:]).(type) {
		case time.Time:
			return "TIMESTAMP '" + v.UTC().Format("2006-01-02 15:04:05.999999") + "+00'"
		case string:
			return quote(d, v)
		}
		return "NULL"
	})
}

// Dashboard writes a query for Grafana's BigQuery data source: its macros give the
// time range, its variables the filters
// (https://grafana.com/docs/plugins/grafana-bigquery-datasource/latest/query-editor/).
func Dashboard(sql string) string {
	sql = condition.ReplaceAllStringFunc(sql, func(m string) string {
		parts := condition.FindStringSubmatch(m)
		out := ""
		for _, name := range strings.Split(parts[2], ",") {
			name = strings.TrimSpace(name)
			test := name + " = @" + filterOf(name)
			if many(name) {
				test = "@image IN UNNEST(" + name + ")"
			}
			out += parts[1] + "AND (@" + filterOf(name) + " = '' OR " + test + ")"
		}
		return out
	})
	return placeholder.ReplaceAllStringFunc(quantiles(sql, GoogleSQL), func(m string) string {
		switch m {
		case "@from":
			return "$__timeFrom()"
		case "@to":
			return "$__timeTo()"
		}
		return "${" + m[1:] + ":singlequote}"
	})
}

// narrow writes the conditions of the filters that are set. An asterisk at the end
// stands for any text.
func narrow(sql string, d Dialect, f Filter) string {
	return condition.ReplaceAllStringFunc(sql, func(m string) string {
		parts := condition.FindStringSubmatch(m)
		out := ""
		for _, column := range strings.Split(parts[2], ",") {
			column = strings.TrimSpace(column)
			name := filterOf(column)
			text := f.text(name)
			if text == "" {
				continue
			}
			test := column + " = @" + name
			start := strings.HasSuffix(text, "*")
			switch {
			case many(column) && d == DuckDB && start:
				test = "LEN(LIST_FILTER(" + column + ", lambda i: STARTS_WITH(i, @image))) > 0"
			case many(column) && d == DuckDB:
				test = "LIST_CONTAINS(" + column + ", @image)"
			case many(column) && start:
				test = "EXISTS (SELECT 1 FROM UNNEST(" + column + ") AS i WHERE STARTS_WITH(i, @image))"
			case many(column):
				test = "@image IN UNNEST(" + column + ")"
			case start:
				test = "STARTS_WITH(" + column + ", @" + name + ")"
			}
			out += parts[1] + "AND " + test
		}
		return out
	})
}

// filterOf is the filter that narrows a column: image for a list of images too.
func filterOf(column string) string {
	column = column[strings.LastIndexByte(column, '.')+1:]
	if column == "images" {
		return "image"
	}
	return column
}

// many says whether a column is a list.
func many(column string) bool { return strings.HasSuffix(column, "images") }

func quantiles(sql string, d Dialect) string {
	return quantile.ReplaceAllStringFunc(sql, func(m string) string {
		parts := quantile.FindStringSubmatch(m)
		if d == DuckDB {
			return "QUANTILE_DISC(" + parts[1] + ", 0." + ("0" + parts[2])[len(parts[2])-1:] + ")"
		}
		return "APPROX_QUANTILES(" + parts[1] + ", 100)[OFFSET(" + parts[2] + ")]"
	})
}

// In writes a query over the views of a data set of BigQuery.
func In(sql, project, dataset string) string {
	return relation.ReplaceAllStringFunc(sql, func(m string) string {
		return "`" + project + "." + dataset + strings.TrimPrefix(m, "tallyman") + "`"
	})
}

// Views are the names of the views that a query reads, each once, in the order of the text.
func Views(sql string) []string {
	var out []string
	seen := map[string]bool{}
	for _, m := range relation.FindAllStringSubmatch(sql, -1) {
		if !seen[m[1]] {
			seen[m[1]] = true
			out = append(out, m[1])
		}
	}
	return out
}

func (f Filter) value(name string) any {
	switch name {
	case "from":
		return f.From.UTC()
	case "to":
		return f.To.UTC()
	}
	return strings.TrimSuffix(f.text(name), "*")
}

func (f Filter) text(name string) string {
	switch name {
	case "repository":
		return f.Repository
	case "workflow":
		return f.Workflow
	case "image":
		return f.Image
	}
	return ""
}

// quote writes a string literal. GoogleSQL knows backslashes, DuckDB only two quotes
// for one.
func quote(d Dialect, s string) string {
	if d == DuckDB {
		return "'" + strings.ReplaceAll(s, "'", "''") + "'"
	}
	var b strings.Builder
	b.WriteByte('\'')
	for _, r := range s { // what is no UTF-8 becomes U+FFFD
		switch r {
		case '\'', '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case '\n':
			b.WriteString(`\n`)
		case '\r':
			b.WriteString(`\r`)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('\'')
	return b.String()
}
