// Package analysed lists the SQL that BigQuery is given, and tells by a file of hashes
// that the analyser of GoogleSQL has seen all of it as it is now.
//
// The analyser takes minutes and gigabytes to compile (see bq/analyse), too much for each
// run of the tests. So make sql analyses the list and compares hashes, and this package's
// own test compares them again, in milliseconds, in each run: SQL that changed and was not
// analysed fails it.
package analysed

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/sinks/row"
)

// Project and Dataset are those that the SQL is written for.
const Project, Dataset = "a-project", "tallyman"

// Statement is one statement of GoogleSQL.
type Statement struct{ Name, SQL string }

// Statements returns all SQL: the queries of the views, the statements that make them and
// fill their tables and that of the owners, and the queries of the panels without and with each filter.
func Statements() []Statement {
	var out []Statement
	for _, v := range bq.Views() {
		out = append(out, Statement{"view " + v.Name, bq.In(v.SQL, Project, Dataset)},
			Statement{"statement " + v.Name, v.DDL(Project, Dataset, 90*24*time.Hour)})
	}
	for i, sql := range bq.RefreshSQL(Project, Dataset) {
		out = append(out, Statement{fmt.Sprint("refresh ", i+1), sql})
	}
	for i, sql := range bq.OwnersSQL(Project, Dataset, []bq.Owner{{Pattern: "acme/*", Team: `a "team" of \ ours`, Line: 1}}) {
		out = append(out, Statement{fmt.Sprint("owners ", i+1), sql})
	}
	requests, builds := panels.Suspects()
	for _, p := range append(panels.All(), panels.Trust(), panels.Bounds(), requests, builds) {
		for name, f := range map[string]panels.Filter{"panel ": {}, "filtered panel ": {Repository: "acme/shop", Workflow: "CI*", Image: "alpine:3"}} {
			sql, _ := panels.Parameters(p.SQL, panels.GoogleSQL, f)
			out = append(out, Statement{name + p.ID, bq.In(sql, Project, Dataset)})
		}
	}
	return out
}

// Sums are lines of a name and a hash, sorted: of each statement, and of the columns of
// the table that they are analysed over.
func Sums() []string {
	out := []string{sum("columns of records", fmt.Sprint(row.Columns()))}
	for _, s := range Statements() {
		out = append(out, sum(s.Name, s.SQL))
	}
	slices.Sort(out)
	return out
}

func sum(name, text string) string {
	return fmt.Sprintf("%s %x", strings.ReplaceAll(name, " ", "/"), sha256.Sum256([]byte(text)))
}
