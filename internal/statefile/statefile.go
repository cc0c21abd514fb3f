// Package statefile reads and replaces small files of the state folder, in which
// anything may stand: others can write there, and disks lose their minds. Nothing
// here hangs on a FIFO, follows a link, or reads without end. What stands in the way
// of a file or folder of ours is renamed, never deleted, so that no start needs help.
package statefile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotRegular is returned by Read for what is not a regular file.
var ErrNotRegular = errors.New("not a regular file")

// Read reads the regular file at path, of at most limit bytes.
func Read(path string, limit int64) ([]byte, error) {
	// Non-blocking, because the open of a FIFO without a writer would wait for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: ErrNotRegular}
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("larger than the %d bytes that it may have", limit)}
	}
	return data, err
}

// Replace writes a file whole: temp first, which becomes path. It does not sync.
func Replace(path, temp string, data []byte) error {
	if err := Vacate(temp); err != nil {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp) // the next one does it too
	}
	return err
}

// Rename renames a file of ours. A folder that has the new name is set aside.
func Rename(from, to string) error {
	err := unix.Rename(from, to)
	if err == unix.EISDIR || err == unix.EEXIST || err == unix.ENOTEMPTY {
		if err := SetAside(to); err != nil {
			return err
		}
		err = unix.Rename(from, to)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// Vacate removes the file at path. A folder there is set aside.
func Vacate(path string) error {
	err := unix.Unlink(path)
	if err == unix.EISDIR || err == unix.EPERM {
		return SetAside(path)
	}
	if err != nil && err != unix.ENOENT {
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// MakeDir makes the folder at path with those above it. What stands there and is no
// folder, nor a link to one, is set aside.
func MakeDir(path string, perm fs.FileMode) error {
	err := os.MkdirAll(path, perm)
	if err == nil {
		return nil
	}
	if st, errStat := os.Stat(path); errStat == nil && st.IsDir() {
		return err
	}
	if _, errStat := os.Lstat(path); errStat != nil {
		return err // it is not path that stands in the way
	}
	if err := SetAside(path); err != nil {
		return err
	}
	return os.MkdirAll(path, perm)
}

// Aside is a name for what stood at name and does not belong there.
func Aside(name string) string {
	return "set-aside-" + strconv.FormatInt(time.Now().UnixNano(), 10) + "-" + name
}

// SetAside renames what stands at path.
func SetAside(path string) error {
	return os.Rename(path, filepath.Join(filepath.Dir(path), Aside(filepath.Base(path))))
}
