package bq

import (
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/sinks/row"
)

// KeptExpiration is how long a new table of kept answers keeps rows: long enough to
// compare with the year before, in a hundredth of the records' space.
const KeptExpiration = 400 * 24 * time.Hour

// Table is a table that apply makes.
type Table struct {
	Name, Description string
	Fields            []Field
	PartitionBy       string        // the column by whose day it is partitioned, or ""
	ClusterBy         []string      // at most four
	RequireFilter     bool          // a query must name days
	Expiration        time.Duration // of a new table's days; 0 is never
}

// Tables returns the tables that are made for these views, the records' first.
func Tables(views []View) []Table {
	out := []Table{
		{Name: Records, Description: "Every record of Tallyman, one row for each delivery of it; records_unique has each once.",
			Fields: Schema(), PartitionBy: PartitionBy, ClusterBy: ClusterBy(), RequireFilter: true, Expiration: DefaultExpiration},
		{Name: Owners, Description: "Which team owns which repositories: your own rules, of which the last that fits counts.", Fields: []Field{
			{Name: "pattern", Type: "STRING", Mode: "NULLABLE", Description: "owner/name of a repository, or the beginning of such names and an asterisk."},
			{Name: "team", Type: "STRING", Mode: "NULLABLE", Description: "The team that owns them."},
			{Name: "line", Type: "INTEGER", Mode: "NULLABLE", Description: "The order of the rules."},
		}},
	}
	for _, v := range views {
		if !v.Table {
			continue
		}
		t := Table{Name: v.Name, Description: v.Description(), PartitionBy: PartitionBy, Expiration: KeptExpiration}
		for _, c := range v.Columns {
			f := Field{Name: c.Name, Mode: string(row.Nullable), Description: c.Meaning}
			element, repeated := strings.CutPrefix(c.Type, "ARRAY<")
			if repeated {
				element, f.Mode = strings.TrimSuffix(element, ">"), string(row.Repeated)
			}
			f.Type = kind(Field{Type: element})
			t.Fields = append(t.Fields, f)
			if c.Name == "repository" || c.Name == "workflow" {
				t.ClusterBy = append(t.ClusterBy, c.Name)
			}
		}
		out = append(out, t)
	}
	return out
}

// Description is what BigQuery shows beside the view.
func (v View) Description() string { return strings.TrimSpace(v.Question + " " + v.Note) }
