package hook

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Pin is a file that must be what it was when it was installed.
type Pin struct {
	Path   string
	SHA256 string // in hex
}

// checkPins compares each pinned file and its ownership. It protects the jobs after a
// hostile one on a runner that lives on: such a job can replace what its user may write.
func checkPins(pins []Pin) error {
	for _, p := range pins {
		if err := CheckOwned(p.Path); err != nil {
			return fmt.Errorf("agent not started: %w", err)
		}
		f, err := os.Open(p.Path)
		if err != nil {
			return fmt.Errorf("agent not started: check %w", err)
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("agent not started: check %s: %w", p.Path, err)
		}
		if got := hex.EncodeToString(h.Sum(nil)); !strings.EqualFold(got, p.SHA256) {
			return fmt.Errorf("agent not started: %s has SHA-256 %s, not the pinned %s: install it again", p.Path, got, p.SHA256)
		}
	}
	return nil
}

// CheckOwned returns an error when somebody other than root can replace the file: by
// writing to it, to a directory above it, or to the target of a link on the way.
func CheckOwned(path string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("check %s: %w", path, err)
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return fmt.Errorf("check %w", err)
	}
	for _, p := range []string{real, abs} { // abs too: whoever may replace the link chooses the target
		for ; ; p = filepath.Dir(p) {
			if err := checkRootOnly(p, path); err != nil {
				return err
			}
			if p == "/" {
				break
			}
		}
	}
	return nil
}

func checkRootOnly(p, path string) error {
	fi, err := os.Lstat(p)
	if err != nil {
		return fmt.Errorf("check %s: %w", path, err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("check ownership: not a Unix file system")
	}
	switch {
	case st.Uid != 0:
		return fmt.Errorf("%s can be replaced by a job: %s belongs to uid %d (chown root)", path, p, st.Uid)
	case fi.Mode()&os.ModeSymlink == 0 && fi.Mode().Perm()&0o022 != 0 && fi.Mode()&os.ModeSticky == 0:
		return fmt.Errorf("%s can be replaced by a job: %s is writable for others (chmod go-w)", path, p)
	}
	return nil
}
