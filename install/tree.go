package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/wrapper"
)

// tree is the folder that is taken as the root of a file system: "" for this one's,
// else the folder of an image or of a test. Paths given to its methods are those
// inside; links in it are followed inside.
type tree string

func newTree(root string) tree {
	if root = filepath.Clean(root); root == "/" || root == "." {
		return ""
	}
	return tree(root)
}

// at is where a path inside lies outside. Links on the way stay inside; the last part is
// not followed.
func (t tree) at(p string) string {
	if t != "" {
		if dir, err := t.resolve(path.Dir(p)); err == nil {
			p = path.Join(dir, path.Base(p))
		}
	}
	return string(t) + p
}

// errForeignLink: root follows no link that a job may have made.
var errForeignLink = errors.New("a symbolic link that is not root's")

// resolve follows the links in a path, the last part too, and returns the path
// inside. What does not exist is returned as it is written.
func (t tree) resolve(p string) (string, error) {
	done, rest := "/", strings.Split(strings.Trim(path.Clean(p), "/"), "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == "" || name == "." {
			continue
		}
		if name == ".." {
			done = path.Dir(done)
			continue
		}
		next := path.Join(done, name)
		st, err := os.Lstat(string(t) + next)
		if err != nil || st.Mode()&os.ModeSymlink == 0 {
			done = next
			continue
		}
		if links++; links > 40 {
			return "", fmt.Errorf("%s: %w", p, unix.ELOOP)
		}
		if !ours(st) {
			return "", fmt.Errorf("%s is %w", next, errForeignLink)
		}
		target, err := os.Readlink(string(t) + next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			done = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return done, nil
}

// ours: it belongs to root, or to who runs this.
func ours(st fs.FileInfo) bool {
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && (sys.Uid == 0 || int(sys.Uid) == os.Geteuid())
}

// trustedDir: nobody but root can put another file there.
func (t tree) trustedDir(dir string) bool {
	for ; ; dir = path.Dir(dir) {
		st, err := os.Lstat(t.at(dir))
		if err != nil || !ours(st) || st.Mode().Perm()&0o022 != 0 && st.Mode()&os.ModeSticky == 0 {
			return false
		}
		if dir == "/" {
			return true
		}
	}
}

func (t tree) lstat(p string) (fs.FileInfo, error) { return os.Lstat(t.at(p)) }

func (t tree) exists(p string) bool {
	_, err := t.lstat(p)
	return err == nil
}

func sameFile(a, b fs.FileInfo) bool { return a != nil && b != nil && os.SameFile(a, b) }

// digest is the SHA-256 of a regular file, or "" where it cannot be read.
func digest(outside string) string {
	f, err := os.OpenFile(outside, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// maxShim is what no shim reaches, and any real docker exceeds: it need not be read.
const maxShim = 8 << 20

// IsShim recognises our shim, of whatever version and through links, by the marker
// that is part of its binary.
func IsShim(file string) bool {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxShim {
		return false
	}
	data, err := io.ReadAll(io.LimitReader(f, maxShim))
	return err == nil && bytes.Contains(data, []byte(wrapper.Marker))
}

// copyFile makes dst, which must not exist, from the regular file src: whole, with
// this owner and mode, and on the disk when it returns.
func copyFile(src, dst string, uid, gid int, mode fs.FileMode) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(dst, in, uid, gid, mode)
}

func writeFile(dst string, from io.Reader, uid, gid int, mode fs.FileMode) (err error) {
	// Executable for nobody while it is half a program.
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			_ = os.Remove(dst)
		}
	}()
	if _, err := io.Copy(out, from); err != nil {
		return err
	}
	if st, err := out.Stat(); err != nil {
		return err
	} else if sys, ok := st.Sys().(*syscall.Stat_t); ok && (int(sys.Uid) != uid || int(sys.Gid) != gid) {
		if err := out.Chown(uid, gid); err != nil {
			return err
		}
	}
	if err := out.Chmod(mode); err != nil { // after chown, which clears bits
		return err
	}
	return out.Sync()
}

// temporary is the name under which a file is made before it takes its place. It is
// always the same, so that what a killed run left is replaced by the next.
func temporary(outside string) string {
	return filepath.Join(filepath.Dir(outside), ".tallyman-new-"+filepath.Base(outside))
}

// replace puts what make makes in the place of a file, in one step. At no moment is
// there no file, or half of one.
func replace(outside string, make func(temp string) error) error {
	temp := temporary(outside)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := make(temp)
	if err == nil {
		err = os.Rename(temp, outside)
	}
	if err != nil {
		_ = os.Remove(temp)
		return err
	}
	return syncDir(filepath.Dir(outside))
}

// syncDir makes the names of a folder survive a power cut. File systems that cannot
// say EINVAL.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EROFS) {
		return err
	}
	return nil
}

// second gives a file a second name: a hard link, or where the file system has none,
// a copy that is equal in all but the inode.
func second(old, name string) error {
	err := os.Link(old, name)
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS),
		errors.Is(err, unix.EMLINK), errors.Is(err, unix.EXDEV):
		return replace(name, func(temp string) error { return twin(old, temp) })
	}
	return err
}

// twin copies a file or link with its owner, mode, times and extended attributes,
// file capabilities among them.
func twin(src, dst string) error {
	st, err := os.Lstat(src)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("not a Unix file system")
	}
	if st.Mode()&os.ModeSymlink != 0 {
		target, err := os.Readlink(src)
		if err == nil {
			err = os.Symlink(target, dst)
		}
		if err == nil {
			err = os.Lchown(dst, int(sys.Uid), int(sys.Gid))
		}
		if err != nil {
			return err
		}
	} else if err := copyFile(src, dst, int(sys.Uid), int(sys.Gid), st.Mode()); err != nil {
		return err
	}
	if err := copyAttributes(src, dst); err != nil {
		return err
	}
	times := []unix.Timespec{{Sec: sys.Atim.Sec, Nsec: sys.Atim.Nsec}, {Sec: sys.Mtim.Sec, Nsec: sys.Mtim.Nsec}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dst, times, unix.AT_SYMLINK_NOFOLLOW)
}

func copyAttributes(src, dst string) error {
	n, err := unix.Llistxattr(src, nil)
	if errors.Is(err, unix.EOPNOTSUPP) || n == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	names := make([]byte, n)
	if n, err = unix.Llistxattr(src, names); err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.Trim(string(names[:n]), "\x00"), "\x00") {
		size, err := unix.Lgetxattr(src, name, nil)
		if err != nil {
			return err
		}
		value := make([]byte, size)
		if size, err = unix.Lgetxattr(src, name, value); err == nil {
			err = unix.Lsetxattr(dst, name, value[:size], 0)
		}
		if err != nil {
			return fmt.Errorf("keep the attribute %s: %w", name, err)
		}
	}
	return nil
}

// openDir opens a folder inside, following no link at all.
func (t tree) openDir(p string) (fd int, err error) {
	root := t.at("/")
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	fd, err = unix.Open(root, flags, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: root, Err: err}
	}
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if name == "" {
			continue
		}
		next, err := unix.Openat(fd, name, flags|unix.O_NOFOLLOW, 0)
		unix.Close(fd)
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: t.at(p), Err: err}
		}
		fd = next
	}
	return fd, nil
}

// makeDir makes a folder, or corrects the owner and mode of one. Others may write to the
// folders above it, so it goes by descriptors: a link in the way is an error.
func (t tree) makeDir(p string, uid, gid int, mode uint32) error {
	above, err := t.openDir(path.Dir(p))
	if err != nil {
		return err
	}
	defer unix.Close(above)
	if err := unix.Mkdirat(above, path.Base(p), 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return &fs.PathError{Op: "mkdir", Path: t.at(p), Err: err}
	}
	fd, err := unix.Openat(above, path.Base(p), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: t.at(p), Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if int(st.Uid) != uid || int(st.Gid) != gid {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return &fs.PathError{Op: "chown", Path: t.at(p), Err: err}
		}
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return &fs.PathError{Op: "chmod", Path: t.at(p), Err: err}
	}
	return nil
}

// removeDir removes an empty folder; removed is false where it is not empty, and true
// where there is none.
func (t tree) removeDir(p string) (removed bool, err error) {
	above, err := t.openDir(path.Dir(p))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(above)
	err = unix.Unlinkat(above, path.Base(p), unix.AT_REMOVEDIR)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return true, nil
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EBUSY):
		return false, nil // EBUSY: a mount
	}
	return false, &fs.PathError{Op: "rmdir", Path: t.at(p), Err: err}
}

func ids(st fs.FileInfo) (uid, gid int) {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid), int(sys.Gid)
	}
	return -1, -1
}
