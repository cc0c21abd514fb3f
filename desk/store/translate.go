package store

import (
	"regexp"
	"strings"
)

// The views are written once, in GoogleSQL, and kept to what these rules can write for
// DuckDB: a second file for each view would be a second truth.
var rules = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile("`([a-z_]+)`"), `"$1"`},
	{regexp.MustCompile(`\br'`), `'`}, // no string of DuckDB knows backslashes
	{regexp.MustCompile(`\bTIMESTAMP_TRUNC\(([^,]+), ([A-Z]+)\)`), `DATE_TRUNC('$2', $1)`},
	{regexp.MustCompile(`\bTIMESTAMP_SUB\(([^,]+), INTERVAL (.+?) (DAY|HOUR|SECOND)\)`), `($1 - TO_${3}S($2))`},
	{regexp.MustCompile(`\bTIMESTAMP_ADD\(([^,]+), INTERVAL (.+?) (DAY|HOUR|SECOND|MICROSECOND)\)`), `($1 + TO_${3}S($2))`},
	{regexp.MustCompile(`\bDIV\(([^,]+), ([0-9]+)\)`), `($1 // $2)`},
	{regexp.MustCompile(`\bREGEXP_CONTAINS\(`), `REGEXP_MATCHES(`},
	{regexp.MustCompile(`\bREGEXP_EXTRACT\(`), `tallyman.FIRST_GROUP(`},
	// Both are the value that so many of a hundred do not exceed; BigQuery's is approximate.
	{regexp.MustCompile(`\bAPPROX_QUANTILES\(([a-z_.]+), 100\)\[OFFSET\(([0-9]{2})\)\]`), `QUANTILE_DISC($1, 0.$2)`},
	{regexp.MustCompile(`\bUNNEST\((.+)\) AS ([a-z_]+)`), `UNNEST($1) AS one($2)`},
	{regexp.MustCompile(`\bAS INT64\)`), `AS BIGINT)`},
	{regexp.MustCompile(`\bAS STRING\)`), `AS VARCHAR)`},
}

// macros are functions of GoogleSQL that DuckDB knows under no name, or knows otherwise: its
// own COUNTIF of no rows is NULL, and GoogleSQL's is 0.
var macros = []string{
	`CREATE MACRO tallyman.FIRST_GROUP(s, pattern) AS NULLIF(REGEXP_EXTRACT(s, pattern, 1), '')`,
	`CREATE MACRO COUNTIF(condition) AS COUNT(*) FILTER (WHERE condition)`,
}

// Translate writes a query of package bq for DuckDB.
func Translate(sql string) string {
	for _, r := range rules {
		sql = r.pattern.ReplaceAllString(sql, r.with)
	}
	sql = strings.ReplaceAll(sql, "@from", "$from")
	return strings.ReplaceAll(sql, "@to", "$to")
}
