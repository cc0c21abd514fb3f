package bq

import (
	"io/fs"
	"regexp"
	"strings"
	"testing"
)

// Every view has a question, columns whose meaning is said, and comes after those it reads.
func TestViews(t *testing.T) {
	entries, err := fs.ReadDir(files, "views")
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(Views()) {
		t.Errorf("%d files and %d views: one is not listed", len(entries), len(Views()))
	}
	known := map[string]bool{"records": true, Owners: true}
	for _, v := range Views() {
		if !strings.HasSuffix(v.Question, "?") {
			t.Errorf("%s asks %q, which is no question", v.Name, v.Question)
		}
		if strings.Contains(v.SQL, "@only") || regexp.MustCompile(`@(hour|day|job_key|image|registry|quantile|div)\(`).MatchString(v.SQL) {
			t.Errorf("%s keeps a shorthand: %s", v.Name, v.SQL)
		}
		for _, m := range relation.FindAllStringSubmatch(v.SQL, -1) {
			if !known[m[1]] {
				t.Errorf("%s reads %s, which is not there before it", v.Name, m[1])
			}
		}
		if bounded := strings.Contains(v.SQL, "@from"); bounded != v.Table {
			t.Errorf("%s: only kept tables have bounds of time in their own SQL", v.Name)
		}
		known[v.Name] = true
		if len(v.Columns) == 0 {
			t.Errorf("%s has no columns: (cd bq/analyse && go test . -update)", v.Name)
		}
		for _, c := range v.Columns {
			if c.Meaning == "" {
				t.Errorf("%s: nobody says what %s means", v.Name, c.Name)
			}
		}
	}
	for name := range meanings {
		view, column, qualified := strings.Cut(name, ".")
		found := false
		for _, v := range Views() {
			for _, c := range v.Columns {
				found = found || qualified && v.Name == view && c.Name == column || !qualified && c.Name == name
			}
		}
		if !found {
			t.Errorf("the meaning of %s is of no column", name)
		}
	}
}

// Where the raw table is read, its partitions are bounded: BigQuery refuses it otherwise.
func TestRawTableIsReadWithinBounds(t *testing.T) {
	for _, v := range Views() {
		if v.Name == "records_unique" {
			continue // passes its reader's own filter on ts through
		}
		if got, want := strings.Count(v.SQL, "ts >= "), strings.Count(v.SQL, "FROM tallyman.records"); got < want {
			t.Errorf("%s reads the raw table %d times and bounds ts %d times", v.Name, want, got)
		}
	}
}

func TestIn(t *testing.T) {
	if got, want := In("SELECT c.id FROM tallyman.calls AS c", "p", "d"), "SELECT c.id FROM `p.d.calls` AS c"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
