package hook

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tallyman-ci/tallyman/internal/statefile"
)

// MakeRunDir makes the run folder and the spool in it where they are missing. The
// hook does so before the job's first step, because the agent that it starts may
// come up after the first docker call: whose record then waits in the spool.
//
// Every user of the runner calls docker, whatever the umask of who makes the folders.
// In the spool each may make a file, and none may list it or remove another's (1733).
func MakeRunDir(runDir string) error {
	if err := os.MkdirAll(filepath.Dir(runDir), 0o755); err != nil {
		return fmt.Errorf("make the run folder: %w", err)
	}
	for _, dir := range []struct {
		path string
		mode fs.FileMode
	}{{runDir, 0o755}, {filepath.Join(runDir, "spool"), 0o733 | fs.ModeSticky}} {
		err := os.Mkdir(dir.path, 0o700)
		if st, errStat := os.Stat(dir.path); errors.Is(err, fs.ErrExist) && (errStat != nil || !st.IsDir()) {
			if statefile.SetAside(dir.path) == nil {
				err = os.Mkdir(dir.path, 0o700)
			}
		}
		switch {
		case err == nil:
			if err := os.Chmod(dir.path, dir.mode); err != nil {
				return fmt.Errorf("make the run folder: %w", err)
			}
		case !errors.Is(err, fs.ErrExist):
			return fmt.Errorf("make the run folder: %w (create %s, owned by the runner's user, or set run_dir in the configuration)", err, runDir)
		}
	}
	return nil
}
