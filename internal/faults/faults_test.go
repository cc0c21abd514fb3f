package faults

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestCatalogue(t *testing.T) {
	all := Catalogue()
	seen := map[string]bool{}
	for _, f := range all {
		if !regexp.MustCompile(`^(SH|SP|EV|HK|SE|EN|AB)-\d\d$`).MatchString(f.ID) || seen[f.ID] {
			t.Errorf("%q is no id, or is there twice", f.ID)
		}
		seen[f.ID] = true
		if f.Injected == "" || f.Answer == "" {
			t.Errorf("%s does not say what happens", f.ID)
		}
	}
	if len(all) < 100 {
		t.Errorf("%d cases; were some lost?", len(all))
	}
}

func TestResults(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(DirVariable, dir)
	t.Run("runs", func(t *testing.T) { Case(t, "SH-01", "SH-02") })
	t.Run("cannot", func(t *testing.T) {
		Case(t, "SH-03")
		CannotRun(t, "because of the test")
	})
	t.Run("skips in silence", func(t *testing.T) {
		Case(t, "SH-04")
		t.Skip()
	})
	got, err := Results(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(got, func(a, b Result) int { return strings.Compare(a.ID, b.ID) })
	want := []Result{
		{ID: "SH-01", Test: "TestResults/runs", Outcome: Passed, Package: "internal/faults"},
		{ID: "SH-02", Test: "TestResults/runs", Outcome: Passed, Package: "internal/faults"},
		{ID: "SH-03", Test: "TestResults/cannot", Outcome: CouldNot, Why: "because of the test", Package: "internal/faults"},
		{ID: "SH-04", Test: "TestResults/skips_in_silence", Outcome: NotRunYet, Package: "internal/faults"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if err := os.WriteFile(dir+"/broken.json", []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Results(dir); err == nil {
		t.Error("a broken result is no error")
	}
}
