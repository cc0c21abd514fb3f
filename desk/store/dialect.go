package store

import (
	"regexp"
	"strings"
)

// rewrites turn the GoogleSQL of package bq's views into DuckDB's SQL. There is one
// text of each question, not two that grow apart; what the two dialects write alike is
// left alone, and what a macro can give DuckDB stands in macros.
var rewrites = []struct {
	pattern *regexp.Regexp
	with    string
}{
	// The store holds each record once: what removes doubles is left out. On ten million
	// records it is most of the time.
	{regexp.MustCompile(`(?m)(?:^WHERE TRUE\n)?^ *QUALIFY ROW_NUMBER\(\) OVER \(PARTITION BY (?:ts, )?id ORDER BY (?:ts|schema DESC)\) = 1$`), ``},
	{regexp.MustCompile("`([a-z_]+)`"), `"$1"`},
	// DuckDB's strings know no backslashes, so that all of them are raw.
	{regexp.MustCompile(`\br'`), `'`},
	{regexp.MustCompile(`\bTIMESTAMP_TRUNC\(((?:MIN\()?[a-z_.]+\)?), (HOUR|DAY)\)`), `DATE_TRUNC('$2', $1)`},
	{regexp.MustCompile(`\bAPPROX_QUANTILES\(([a-z_.]+), 100\)\[OFFSET\(([0-9])\)\]`), `QUANTILE_DISC($1, 0.0$2)`},
	{regexp.MustCompile(`\bAPPROX_QUANTILES\(([a-z_.]+), 100\)\[OFFSET\(([0-9]{2})\)\]`), `QUANTILE_DISC($1, 0.$2)`},
	{regexp.MustCompile(`\bDIV\(([a-z_.]+), ([0-9]+)\)`), `($1 // $2)`},
	// GoogleSQL gives the group, or NULL; DuckDB's own function the whole match, or ''.
	{regexp.MustCompile(`\bREGEXP_EXTRACT\(`), `tallyman.extract_group(`},
	{regexp.MustCompile(`\bREGEXP_CONTAINS\(`), `REGEXP_MATCHES(`},
	// GoogleSQL names the element, DuckDB a table of one column.
	{regexp.MustCompile(`(?m)(, UNNEST\(.*\)) AS ([a-z]+)$`), `$1 AS unnested($2)`},
	{regexp.MustCompile(`\bAS INT64\b`), `AS BIGINT`},
}

// macros give DuckDB functions of GoogleSQL.
const macros = `
CREATE MACRO tallyman.extract_group(s, p) AS CASE WHEN REGEXP_MATCHES(s, p) THEN REGEXP_EXTRACT(s, p, 1) END;
CREATE MACRO timestamp_add(t, i) AS t + i;
CREATE MACRO timestamp_sub(t, i) AS t - i;
`

// DuckDB writes a view's GoogleSQL for DuckDB.
func DuckDB(sql string) string {
	for _, r := range rewrites {
		sql = r.pattern.ReplaceAllString(sql, r.with)
	}
	return strings.TrimSpace(sql)
}
