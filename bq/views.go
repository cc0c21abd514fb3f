// Package bq holds the questions of the account in GoogleSQL: what BigQuery answers for
// a fleet, and, written for DuckDB by package desk/store, a desk for one journal.
package bq

import (
	"embed"
	"fmt"
	"regexp"
	"strings"
)

// View is one question with the SQL that answers it.
type View struct {
	Name     string // of the view, or of the table where Table is set
	Question string // one sentence
	Note     string // what its reader must know; may be empty

	// SQL is the query in GoogleSQL. Tables and views are written tallyman.NAME, see In.
	// Where Table is set it has the parameters @from and @to, the time from which on and
	// up to which records are read.
	SQL string

	// Table says that the answer is kept in a table, partitioned by day of ts, which
	// RefreshSQL brings up to date: views that join or count records would read all of
	// them for every look at a dashboard, 55 million rows a day on a fleet of 5,000 runners.
	Table bool

	Columns []Column // of the answer, in order
}

// tables are the kept answers in the order of their making; views read them.
var tables = []string{"calls", "pulls", "containers", "jobs", "losses", "requests", "explained"}

var views = []string{
	"records_unique", "traffic", "activity", "commands", "pulls_by_image", "dockerhub_limit", "containers_per_job", "failures",
	"failed_pulls", "slow_pulls", "heavy_workflows", "unattributed", "lost", "coverage", "recording", "golden_images", "teams",
	"traffic_by_team",
}

// Owners is the table that says which team owns which repositories: pattern STRING, team
// STRING and line INT64, its order. Its rows are the installation's own.
const Owners = "owners"

//go:embed views/*.sql
var files embed.FS

// Views returns all questions, each after those that it reads.
func Views() []View {
	var out []View
	for i, name := range append(append([]string{}, tables...), views...) {
		text, err := files.ReadFile("views/" + name + ".sql")
		if err != nil {
			panic(err) // the lists above and the folder are of one build
		}
		v := View{Name: name, Table: i < len(tables)}
		v.Question, v.Note, v.SQL = split(string(text))
		v.SQL = expand(v.SQL)
		v.Columns = columns()[name]
		out = append(out, v)
	}
	return out
}

// split takes the comment at the top, question and note, from a file's query.
func split(text string) (question, note, sql string) {
	var comment []string
	for strings.HasPrefix(text, "--") {
		var line string
		line, text, _ = strings.Cut(text, "\n")
		comment = append(comment, strings.TrimSpace(strings.TrimPrefix(line, "--")))
	}
	if len(comment) > 0 {
		question, note = comment[0], strings.Join(comment[1:], " ")
	}
	return question, note, strings.TrimSpace(text)
}

// short is an image reference without Docker Hub's own names.
const short = `REGEXP_REPLACE(REGEXP_REPLACE(%[1]s, r'^(index\.)?docker\.io/', ''), r'^library/', '')`

// shorthands are what files write shorter than SQL has it. Their arguments are columns.
var shorthands = []struct {
	pattern *regexp.Regexp
	sql     string // %[1]s is the argument
}{
	{shorthand("hour"), `TIMESTAMP_TRUNC(%[1]s, HOUR)`},
	{shorthand("day"), `TIMESTAMP_TRUNC(%[1]s, DAY)`},
	// A job is told by its run, the attempt, its id in the workflow and, where legs of a
	// matrix share that, by the runner's tracking id.
	{shorthand("job_key"), `CASE WHEN %[1]s.run_id <> '' THEN %[1]s.run_id || '/' || CAST(COALESCE(%[1]s.run_attempt, 1) AS STRING) || '/' || COALESCE(%[1]s.job, '') || '/' || COALESCE(%[1]s.tracking_id, '') END`},
	// alpine, docker.io/library/alpine and alpine:latest are one image.
	{shorthand("image"), `CASE WHEN REGEXP_CONTAINS(%[1]s, r'^(sha256:)?[0-9a-f]{64}$') THEN '(by id)' WHEN REGEXP_CONTAINS(%[1]s, r'(:[^/:]+|@[^/]+)$') THEN ` + short +
		` ELSE ` + short + ` || ':latest' END`},
	{shorthand("registry"), `CASE WHEN REGEXP_CONTAINS(%[1]s, r'^(sha256:)?[0-9a-f]{64}$') THEN '' ELSE COALESCE(REGEXP_EXTRACT(` + short + `, r'^([^/]*[.:][^/]*|localhost)/'), 'docker.io') END`},
}

var (
	quantileCall = regexp.MustCompile(`@quantile\(([a-z_.]+), ([0-9]{1,2})\)`)
	divCall      = regexp.MustCompile(`@div\(([a-z_.]+), ([0-9]+)\)`)
	relation     = regexp.MustCompile(`\btallyman\.([a-z_]+)\b`)
)

func shorthand(name string) *regexp.Regexp {
	return regexp.MustCompile(`@` + name + `\(((?:MIN\()?[a-z_.]+\)?)\)`)
}

func expand(sql string) string {
	for _, s := range shorthands {
		sql = s.pattern.ReplaceAllStringFunc(sql, func(m string) string {
			return fmt.Sprintf(s.sql, s.pattern.FindStringSubmatch(m)[1])
		})
	}
	sql = quantileCall.ReplaceAllString(sql, "APPROX_QUANTILES($1, 100)[OFFSET($2)]")
	return divCall.ReplaceAllString(sql, "DIV($1, $2)")
}

// In writes SQL for a data set: tallyman.calls becomes `project.dataset.calls`.
func In(sql, project, dataset string) string {
	return relation.ReplaceAllString(sql, "`"+project+"."+dataset+".$1`")
}
