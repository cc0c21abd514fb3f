package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Where requests were imported into the records, the page ranks who caused them.
func TestPictureOfSuspects(t *testing.T) {
	dir := t.TempDir()
	fleet := writeFleet(t, dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), self, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), asProgram+"=1", "TMPDIR="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	run("import", "github-csv", "--to", "requests.jsonl", "requests.csv")
	run("report", "--html", "page.html", "records.jsonl", "requests.jsonl")
	text, err := os.ReadFile(filepath.Join(dir, "page.html"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), `<section id="suspects"`)
	if !found {
		t.Fatal("the page has no suspects")
	}
	section, _, _ = strings.Cut(section, "</section>")
	for _, w := range fleet.Workflows {
		if w.Rate > 0 && !strings.Contains(section, ">"+w.Repository+"<") {
			t.Errorf("%s is guilty and not among the suspects", w.Repository)
		}
	}
	for _, want := range []string{"believed to be recorded", "up to", "at least", `href="#query-suspects"`} {
		if !strings.Contains(section, want) {
			t.Errorf("the ranking does not say %q", want)
		}
	}
	run("report", "--html", "without.html", "records.jsonl")
	if text, err = os.ReadFile(filepath.Join(dir, "without.html")); err != nil || bytes.Contains(text, []byte(`id="suspects"`)) {
		t.Errorf("suspects without requests: %v", err)
	}
}
