package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// LineFile appends whole lines to one file of JSON Lines. It knows whether the
// file ends in half a line (a full disk, a killed writer), and then begins with a
// newline, so that the half line spoils nothing but itself.
//
// It is not safe for concurrent use.
type LineFile struct {
	f       *os.File
	name    string // for errors
	size    int64
	whole   int64 // where the last line that was appended here ends
	torn    bool
	scratch []byte
}

// OpenLineFile opens the regular file at path for appending, and creates it with
// perm where it is missing.
func OpenLineFile(path string, perm fs.FileMode) (*LineFile, error) {
	// Non-blocking, because the open of a FIFO without a reader would wait for ever.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NONBLOCK, uint32(perm.Perm()))
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return newLineFile(os.NewFile(uintptr(fd), path))
}

// newLineFile takes over f, which is open for reading and appending.
func newLineFile(f *os.File) (*LineFile, error) {
	l := &LineFile{f: f, name: f.Name()}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "append to", Path: f.Name(), Err: errNotRegular}
	}
	if err == nil && st.Size() > 0 {
		l.size = st.Size()
		var last [1]byte
		_, err = f.ReadAt(last[:], l.size-1)
		l.torn = last[0] != '\n'
	}
	if err != nil {
		_ = f.Close() // nothing was written through it
		return nil, err
	}
	return l, nil
}

var errNotRegular = errors.New("not a regular file")

// Append writes lines, one or more lines each with its newline, by one write(2).
// It returns how many bytes from the start of lines stand in the file as whole
// lines; that is len(lines) where err is nil. Where the kernel took only a part
// and gave no reason, err is io.ErrShortWrite: the reason comes with the next
// call.
//
// The rest is not written by a second call here, as os.File.Write would: between
// the two another writer of the file could come.
func (l *LineFile) Append(lines []byte) (whole int, err error) {
	buf, lead := lines, 0
	if l.torn {
		l.scratch = append(append(l.scratch[:0], '\n'), lines...)
		buf, lead = l.scratch, 1
	}
	n, err := writeOnce(l.f, buf)
	if cap(l.scratch) > 1<<20 {
		l.scratch = nil
	}
	if n > 0 {
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			l.whole = l.size + int64(i) + 1
		}
		l.size += int64(n)
		l.torn = buf[n-1] != '\n'
	}
	if n == len(buf) {
		return len(lines), nil
	}
	if err == nil {
		err = io.ErrShortWrite
	}
	if n > lead {
		whole = bytes.LastIndexByte(lines[:n-lead], '\n') + 1
	}
	return whole, fmt.Errorf("append to %s: %w", l.name, err)
}

func writeOnce(f *os.File, b []byte) (int, error) {
	for {
		n, err := unix.Write(int(f.Fd()), b)
		if err == unix.EINTR {
			continue // nothing was written
		}
		return max(n, 0), err
	}
}

// closeTorn ends the half line at the end of the file, if there is one.
func (l *LineFile) closeTorn() {
	if l.torn {
		// An error leaves torn set, and the next Append tries again.
		_, _ = l.Append(nil)
	}
}

// Size is the size of the file, as far as this LineFile wrote it or found it.
func (l *LineFile) Size() int64 { return l.size }

// Stat describes the open file, wherever its name went.
func (l *LineFile) Stat() (fs.FileInfo, error) { return l.f.Stat() }

// Sync makes what was appended durable.
func (l *LineFile) Sync() error { return l.f.Sync() }

// Close closes the file. It does not sync.
func (l *LineFile) Close() error { return l.f.Close() }
