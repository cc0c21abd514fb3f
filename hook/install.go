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

// CheckPins compares each pinned file's content and looks who can replace it. It
// returns what is wrong, one sentence for each file, or nothing. It protects the jobs
// after a hostile one on a runner that lives on: such a job can replace what its user
// may write.
func CheckPins(pins []Pin) (problems []string) {
	for _, p := range pins {
		if err := p.check(); err != nil {
			problems = append(problems, clean(err.Error()))
		}
	}
	return problems[:min(len(problems), maxProblems)]
}

func (p Pin) check() error {
	if err := CheckOwned(p.Path); err != nil {
		return err
	}
	f, _, err := openRegular(p.Path)
	if errors.Is(err, syscall.ELOOP) { // the link's folder is root's, or CheckOwned had said so
		f, err = os.Open(p.Path)
	}
	if err != nil {
		return fmt.Errorf("check %s: %w", p.Path, err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("check %s: %w", p.Path, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); !strings.EqualFold(got, p.SHA256) {
		return fmt.Errorf("%s was changed: its SHA-256 is %s, not the pinned %s (install it again, or pin the new one)", p.Path, got, p.SHA256)
	}
	return nil
}

// maxProblems bounds what a context keeps of them.
const maxProblems = 16

// CheckOwned returns an error when somebody other than root can replace the file: by
// writing to it, to a directory above it, or to the target of a link on the way.
func CheckOwned(path string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("check %s: %w", path, err)
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return fmt.Errorf("check %s: %w", path, err)
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
