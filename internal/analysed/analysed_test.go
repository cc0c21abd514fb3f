package analysed

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// All SQL that BigQuery is given is what the analyser of GoogleSQL took last.
func TestAllSQLWasAnalysed(t *testing.T) {
	data, err := os.ReadFile("../../bq/analyse/analysed.sum")
	if err != nil {
		t.Fatal(err)
	}
	was, is := strings.Split(strings.TrimSpace(string(data)), "\n"), Sums()
	for _, s := range is {
		if !slices.Contains(was, s) {
			name, _, _ := strings.Cut(s, " ")
			t.Errorf("%s was not analysed as it is now", name)
		}
	}
	for _, s := range was {
		if !slices.Contains(is, s) && !t.Failed() {
			t.Errorf("%s was analysed, and is no more", s)
		}
	}
	if t.Failed() {
		t.Error("have it analysed: make sql UPDATE=1 (the first time takes minutes to compile)")
	}
}

// Every view is among what is analysed, with the statement that makes it, and each statement has
// a name of its own.
func TestStatements(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range Statements() {
		if seen[s.Name] {
			t.Errorf("%s is there twice", s.Name)
		}
		seen[s.Name] = true
		if strings.Contains(s.SQL, " tallyman.") {
			t.Errorf("%s names no data set: %s", s.Name, s.SQL)
		}
	}
	views, err := os.ReadDir("../../bq/views")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range views {
		name := strings.TrimSuffix(v.Name(), ".sql")
		if !seen["view "+name] || !seen["statement "+name] {
			t.Errorf("%s is not analysed", name)
		}
	}
	if len(views) < 20 {
		t.Errorf("only %d views were looked at", len(views))
	}
}
