package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tallyman-ci/tallyman/bq"
)

// docs/desk.md lists each view with its question.
func TestDocumentedViews(t *testing.T) {
	doc, err := os.ReadFile("../../docs/desk.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range bq.Views() {
		if row := "| `tallyman." + v.Name + "` | " + v.Question + " |\n"; !strings.Contains(string(doc), row) {
			t.Errorf("docs/desk.md lacks %s", row)
		}
	}
}

// Each script in testdata/query is a session of a user.
func TestQuery(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "query"),
		Setup: func(e *testscript.Env) error {
			bin, temp := filepath.Join(e.WorkDir, "bin"), filepath.Join(e.WorkDir, "tmp")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			if err := os.Mkdir(temp, 0o755); err != nil {
				return err
			}
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv("TMPDIR", temp) // DuckDB's folder
			e.Setenv(asProgram, "1")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector lets each process wait a second at its end
			return os.Symlink(self, filepath.Join(bin, "tallyman-desk"))
		},
	})
}
