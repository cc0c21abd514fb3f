package statefile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadAndReplaceOverAnything(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"nothing":           func(string) error { return nil },
		"a file":            func(path string) error { return os.WriteFile(path, []byte("old"), 0o600) },
		"a file too large":  func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<40)) },
		"a FIFO":            func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a folder":          func(path string) error { return os.Mkdir(path, 0o700) },
		"a full folder":     func(path string) error { return os.MkdirAll(filepath.Join(path, "a"), 0o700) },
		"a link to a file":  func(path string) error { return os.Symlink("/etc/passwd", path) },
		"a link to itself":  func(path string) error { return os.Symlink(filepath.Base(path), path) },
		"a link to /dev/..": func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path, temp := filepath.Join(dir, "x.json"), filepath.Join(dir, "x.json.new")
			if err := errors.Join(put(path), put(temp)); err != nil {
				t.Fatal(err)
			}
			got, err := Read(path, 100)
			if name == "a file" && string(got) != "old" || name != "a file" && err == nil {
				t.Errorf("read %q, %v", got, err)
			}
			if err := Replace(path, temp, []byte("new")); err != nil {
				t.Fatal(err)
			}
			if got, err := Read(path, 100); err != nil || string(got) != "new" {
				t.Errorf("after the replacement: %q, %v", got, err)
			}
			if name == "a full folder" {
				if kept, _ := filepath.Glob(filepath.Join(dir, "set-aside-*", "a")); len(kept) != 2 {
					t.Errorf("the folders were not kept: %v", kept)
				}
			}
			// And a folder of ours in its place.
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := put(path); err != nil {
				t.Fatal(err)
			}
			if err := MakeDir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			if st, err := os.Lstat(path); err != nil || !st.IsDir() {
				t.Errorf("no folder: %v, %v", st, err)
			}
		})
	}
}

func TestMakeDirKeepsALinkToAFolder(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if err := MakeDir(link, 0o700); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(link); err != nil || st.Mode()&os.ModeSymlink == 0 {
		t.Errorf("an administrator's link was moved: %v, %v", st, err)
	}
	if err := MakeDir("/proc/nonexistent/x", 0o700); err == nil || strings.Contains(err.Error(), "set-aside") {
		t.Errorf("got %v", err)
	}
}
