package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// The test's own binary is the program where this variable says so: what is tested is
// a process of its own, and nothing is built twice.
const asProgram = "TALLYMAN_DESK_TEST_PROGRAM"

func init() {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
}

// Each script in testdata/import is a session of a user.
func TestImport(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "import"),
		Setup: func(e *testscript.Env) error {
			bin := filepath.Join(e.WorkDir, "bin")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv(asProgram, "1")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector lets each process wait a second at its end
			// No copy and no script: a file that was just written cannot be executed while
			// a process that was forked meanwhile has it open.
			return os.Symlink(self, filepath.Join(bin, "tallyman-desk"))
		},
	})
}
