package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// Each script in testdata/picture is a session of a user.
func TestPicture(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "picture"),
		Setup: func(e *testscript.Env) error {
			bin := filepath.Join(e.WorkDir, "bin")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv("TMPDIR", e.WorkDir) // DuckDB's folder
			e.Setenv(asProgram, "1")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector lets each process wait a second at its end
			return os.Symlink(self, filepath.Join(bin, "tallyman-desk"))
		},
	})
}
