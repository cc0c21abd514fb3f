package bq

import (
	"fmt"
	"strings"
	"time"
)

// DDL is the statement that makes the view, or the table that keeps its answer, in a data
// set where it is not there yet. A kept table is empty at first; expiration is how long
// its rows stay, 0 for ever.
func (v View) DDL(project, dataset string, expiration time.Duration) string {
	target := In("tallyman."+v.Name, project, dataset)
	options := []string{"description = " + literal(v.Question)}
	if !v.Table {
		return fmt.Sprintf("CREATE OR REPLACE VIEW %s\nOPTIONS (%s)\nAS\n%s", target, options[0], In(v.SQL, project, dataset))
	}
	if expiration > 0 {
		options = append(options, fmt.Sprintf("partition_expiration_days = %g", expiration.Hours()/24))
	}
	cluster := "\nCLUSTER BY repository, workflow"
	if v.Name == "losses" {
		cluster = "" // it has no repository and few rows
	}
	const never = "TIMESTAMP '1970-01-01 00:00:00+00'"
	return fmt.Sprintf("CREATE TABLE IF NOT EXISTS %s\nPARTITION BY TIMESTAMP_TRUNC(ts, DAY)%s\nOPTIONS (%s)\nAS\n%s\nLIMIT 0",
		target, cluster, strings.Join(options, ", "), In(between(v.SQL, never, never), project, dataset))
}

// RefreshSQL are the statements that bring the kept answers up to date for the records from
// @from on and before @to, each with these two parameters; they run in their order, in one
// transaction. A scheduled query runs them with the last two days: a call's end, and what
// Pub/Sub delivers late, come after its start.
func RefreshSQL(project, dataset string) []string {
	var out []string
	for _, v := range Views() {
		if v.Table {
			out = append(out,
				In("DELETE FROM tallyman."+v.Name+" WHERE ts >= @from AND ts < @to", project, dataset),
				In("INSERT INTO tallyman."+v.Name+" ("+names(v.Columns)+")\n"+v.SQL, project, dataset))
		}
	}
	return out
}

// names lists columns for an INSERT: without them it goes by the table's order, in which
// columns of later releases are at the end.
func names(columns []Column) string {
	var out []string
	for _, c := range columns {
		out = append(out, "`"+c.Name+"`")
	}
	return strings.Join(out, ", ")
}

// RefreshScript is RefreshSQL as one script for a scheduled query, which has no parameters:
// it takes the days before the time of its run.
func RefreshScript(project, dataset string, days int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "DECLARE refresh_to TIMESTAMP DEFAULT CURRENT_TIMESTAMP();\nDECLARE refresh_from TIMESTAMP DEFAULT TIMESTAMP_TRUNC(TIMESTAMP_SUB(refresh_to, INTERVAL %d DAY), DAY);\nBEGIN TRANSACTION;\n", days)
	for _, s := range RefreshSQL(project, dataset) {
		b.WriteString(between(s, "refresh_from", "refresh_to") + ";\n")
	}
	b.WriteString("COMMIT TRANSACTION;\n")
	return b.String()
}

func between(sql, from, to string) string {
	return strings.NewReplacer("@from", from, "@to", to).Replace(sql)
}

// literal writes a string in GoogleSQL.
func literal(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}
