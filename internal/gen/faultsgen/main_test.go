package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

func TestJoin(t *testing.T) {
	catalogue := []faults.Fault{{ID: "SH-01"}, {ID: "SH-02"}, {ID: "SH-03"}, {ID: "SH-04"}, {ID: "SH-05"}}
	got := join(catalogue, []faults.Result{
		{ID: "SH-01", Package: "wrapper", Test: "TestA/x", Outcome: faults.Passed},
		{ID: "SH-01", Package: "wrapper", Test: "TestA/y", Outcome: faults.CouldNot, Why: "no cgroups"},
		{ID: "SH-02", Package: "e2e", Test: "TestB", Outcome: faults.CouldNot, Why: "no FUSE"},
		{ID: "SH-03", Package: "e2e", Test: "TestC", Outcome: faults.Passed},
		{ID: "SH-03", Package: "e2e", Test: "TestD", Outcome: faults.Failed},
		{ID: "SH-05", Package: "e2e", Test: "TestE", Outcome: faults.NotRunYet},
	})
	want := []struct{ outcome, tests string }{
		{faults.Passed, "`wrapper` TestA"},
		{faults.CouldNot, "`e2e` TestB"},
		{faults.Failed, "`e2e` TestC, `e2e` TestD"},
		{faults.NotRunYet, ""},
		{faults.Failed, "`e2e` TestE"},
	}
	for i, w := range want {
		if got[i].outcome != w.outcome || strings.Join(got[i].tests, ", ") != w.tests {
			t.Errorf("%s: %s %v, want %+v", got[i].ID, got[i].outcome, got[i].tests, w)
		}
	}
	err := summary(got)
	if err == nil || !strings.Contains(err.Error(), "SH-03 failed, SH-04 not run, SH-05 failed") {
		t.Errorf("the summary says %v", err)
	}
}

// The document is compared without what another machine may answer differently.
func TestStaleDocument(t *testing.T) {
	dir := t.TempDir()
	doc := filepath.Join(dir, "faults.md")
	e := entry{Fault: faults.Fault{ID: "SH-01", Injected: "a | b", Answer: "docker runs"}, tests: []string{"`wrapper` TestA"}, outcome: faults.Passed}
	if err := os.WriteFile(doc, document([]entry{e}), 0o644); err != nil {
		t.Fatal(err)
	}
	was, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	same := func(e entry) bool {
		return string(machineless(was)) == string(machineless(document([]entry{e})))
	}
	elsewhere := e
	elsewhere.outcome, elsewhere.why = faults.CouldNot, []string{"no a|b here"}
	if !same(elsewhere) {
		t.Error("another machine's result makes the document stale")
	}
	moved := e
	moved.tests = []string{"`e2e` TestA"}
	changed := e
	changed.Answer = "docker waits"
	if same(moved) || same(changed) {
		t.Error("a change of the case or of its test is not seen")
	}
}
