package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/statefile"
	"github.com/tallyman-ci/tallyman/record"
)

const (
	segmentPrefix = "records-"
	segmentSuffix = ".jsonl"
	linkName      = "records.jsonl" // the symlink to the newest segment
	lockName      = "lock"
	tempPrefix    = ".records"

	// maxSegment bounds the numbers that are taken for segments, so that a file
	// with an absurd name cannot leave the journal without a next number.
	maxSegment = 1_000_000_000_000_000
)

// Position is a place in the journal: Offset bytes into a segment. The zero
// Position is before everything that is still there. In a single file Segment is 0.
type Position struct {
	Segment uint64 `json:"segment"`
	Offset  int64  `json:"offset"`
}

// Before says whether p comes before q.
func (p Position) Before(q Position) bool {
	return p.Segment < q.Segment || p.Segment == q.Segment && p.Offset < q.Offset
}

// File is the name of the segment's file in its folder.
func (p Position) File() string { return segmentName(p.Segment) }

func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Segment, p.Offset) }

func segmentName(n uint64) string {
	digits := strconv.FormatUint(n, 10)
	return segmentPrefix + strings.Repeat("0", 20-len(digits)) + digits + segmentSuffix
}

func segmentNumber(name string) (uint64, bool) {
	s, ok := strings.CutPrefix(name, segmentPrefix)
	if !ok {
		return 0, false
	}
	if s, ok = strings.CutSuffix(s, segmentSuffix); !ok || len(s) != 20 {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && n > 0 && n <= maxSegment
}

// folder is the journal's directory. It is opened once; every file in it is
// reached through this descriptor, so that a directory swapped for a symlink
// redirects nothing.
type folder struct{ f *os.File }

func openFolder(path string) (folder, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return folder{}, &fs.PathError{Op: "open journal", Path: path, Err: err}
	}
	return folder{os.NewFile(uintptr(fd), path)}, nil
}

func (d folder) dup() (folder, error) {
	fd, err := unix.FcntlInt(d.f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return folder{}, &fs.PathError{Op: "duplicate descriptor of", Path: d.f.Name(), Err: err}
	}
	return folder{os.NewFile(uintptr(fd), d.f.Name())}, nil
}

func (d folder) path(name string) string { return d.f.Name() + "/" + name }

// open opens a regular file in d. O_NOFOLLOW, because nothing of ours in there is
// a symlink but the link for people; O_NONBLOCK, because of FIFOs.
func (d folder) open(name string, flags int, perm uint32) (*os.File, error) {
	fd, err := unix.Openat(int(d.f.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, perm)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: d.path(name), Err: err}
	}
	f := os.NewFile(uintptr(fd), d.path(name))
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: d.path(name), Err: errNotRegular}
	}
	if err != nil {
		_ = f.Close() // nothing was written through it
		return nil, err
	}
	return f, nil
}

func (d folder) remove(name string) error {
	if err := unix.Unlinkat(int(d.f.Fd()), name, 0); err != nil {
		return &fs.PathError{Op: "remove", Path: d.path(name), Err: err}
	}
	return nil
}

// vacate removes the file name. What cannot be removed, a directory, is renamed.
func (d folder) vacate(name string) error {
	err := d.remove(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM):
		return d.rename(name, statefile.Aside(name), 0)
	}
	return err
}

func (d folder) rename(from, to string, flags uint) error {
	if err := unix.Renameat2(int(d.f.Fd()), from, int(d.f.Fd()), to, flags); err != nil {
		return &os.LinkError{Op: "rename", Old: d.path(from), New: d.path(to), Err: err}
	}
	return nil
}

func (d folder) stat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return st, &fs.PathError{Op: "stat", Path: d.path(name), Err: err}
	}
	return st, nil
}

// names lists the directory through a descriptor of its own, because the position
// of a directory descriptor is shared.
func (d folder) names() ([]string, error) {
	fd, err := unix.Openat(int(d.f.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: d.f.Name(), Err: err}
	}
	f := os.NewFile(uintptr(fd), d.f.Name())
	defer f.Close()
	return f.Readdirnames(-1)
}

// segments lists the numbers of the segments in ascending order. That they are
// regular files is not checked.
//
// A directory is not listed at one moment: of two segments that are made meanwhile,
// the later one may be in the list and the earlier one not, and a reader would pass
// over it. Segments are made in the order of their numbers. So what comes before the
// last one of a list was there when the next list was begun, which therefore has it.
func (d folder) segments() ([]uint64, error) {
	for {
		before, err := d.list()
		if err != nil || len(before) == 0 {
			return nil, err
		}
		numbers, err := d.list()
		if err != nil {
			return nil, err
		}
		last := before[len(before)-1]
		numbers = slices.DeleteFunc(numbers, func(n uint64) bool { return n > last })
		if len(numbers) > 0 {
			return numbers, nil
		}
		// All of them were removed meanwhile.
	}
}

func (d folder) list() ([]uint64, error) {
	names, err := d.names()
	if err != nil {
		return nil, fmt.Errorf("list segments: %w", err)
	}
	return segmentNumbers(names), nil
}

func segmentNumbers(names []string) []uint64 {
	var numbers []uint64
	for _, name := range names {
		if n, ok := segmentNumber(name); ok {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers
}

// header is the first line of a segment. Its id tells a segment from another one
// of the same number, from a journal that was wiped and begun anew: inode numbers
// do not, file systems use them again at once.
type header struct {
	Kind    string    `json:"kind"`
	ID      string    `json:"id"`
	Schema  int       `json:"schema"`
	Segment uint64    `json:"segment"`
	TS      time.Time `json:"ts"`
	// First is the number of records that the journal had ever taken before this
	// segment. By it the distance of a cursor from the end is known without a scan
	// of everything between.
	First int64 `json:"first"`
}

func appendHeader(dst []byte, number uint64, first int64, now time.Time) []byte {
	dst = append(append(dst, `{"kind":"segment","id":"`...), record.NewID(now)...)
	dst = strconv.AppendInt(append(dst, `","schema":`...), record.SchemaVersion, 10)
	dst = strconv.AppendUint(append(dst, `,"segment":`...), number, 10)
	dst = now.UTC().AppendFormat(append(dst, `,"ts":"`...), "2006-01-02T15:04:05.000000000Z")
	dst = strconv.AppendInt(append(dst, `","first":`...), first, 10)
	return append(dst, '}', '\n')
}

// readHeader reads the header of a segment. ok is false where the file does not
// begin with one for this number; err tells of the file only.
func readHeader(f *os.File, number uint64) (h header, ok bool, err error) {
	var buf [512]byte
	n, err := f.ReadAt(buf[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return h, false, fmt.Errorf("read header: %w", err)
	}
	line, _, found := bytes.Cut(buf[:n], []byte("\n"))
	if !found || json.Unmarshal(line, &h) != nil || h.Kind != "segment" || h.Segment != number || h.First < 0 {
		return header{}, false, nil
	}
	return h, true, nil
}

// header reads the header of segment number by name. It is not ok for a segment
// that is missing or damaged.
func (d folder) header(number uint64) (header, bool) {
	f, err := d.open(segmentName(number), unix.O_RDONLY, 0)
	if err != nil {
		return header{}, false
	}
	defer f.Close()
	h, ok, err := readHeader(f, number)
	return h, ok && err == nil
}

// create makes segment number with its header. It gets its name last, when nothing
// can go wrong any more: a reader that sees the next segment knows by it that
// nothing more comes in the one before.
func (d folder) create(number uint64, first int64, now time.Time) (*LineFile, int64, error) {
	temp := tempPrefix + ".new"
	if err := d.vacate(temp); err != nil {
		return nil, 0, err
	}
	// Readable for the group: log collectors are let in by it.
	f, err := d.open(temp, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_EXCL, 0o640)
	if err != nil {
		return nil, 0, err
	}
	l, err := newLineFile(f)
	if err != nil {
		return nil, 0, err
	}
	line := appendHeader(nil, number, first, now)
	if _, err = l.Append(line); err == nil {
		err = d.rename(temp, segmentName(number), unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) {
			// The file system does not know RENAME_NOREPLACE. The lock keeps other
			// writers away.
			err = d.rename(temp, segmentName(number), 0)
		}
	}
	if err != nil {
		_ = l.Close()      // it holds the header at most
		_ = d.remove(temp) // the next try removes it too
		return nil, 0, err
	}
	l.name = d.path(segmentName(number))
	return l, int64(len(line)), nil
}

// link points records.jsonl at segment number, for people and for tail -F.
func (d folder) link(number uint64) error {
	if st, err := d.stat(linkName); err == nil && st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return &fs.PathError{Op: "replace", Path: d.path(linkName), Err: errors.New("it is not a symlink: move it away")}
	}
	temp := tempPrefix + ".link"
	if err := d.vacate(temp); err != nil {
		return err
	}
	if err := unix.Symlinkat(segmentName(number), int(d.f.Fd()), temp); err != nil {
		return &fs.PathError{Op: "symlink", Path: d.path(temp), Err: err}
	}
	return d.rename(temp, linkName, 0)
}

// lock takes the journal's lock, an open file description lock (Linux, fcntl(2)):
// it ends with the last descriptor, so a killed process leaves none behind.
func (d folder) lock() (*os.File, error) {
	for {
		f, err := d.open(lockName, unix.O_RDWR|unix.O_CREAT, 0o640)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, err // the directory was removed: nothing can be made in it any more
		}
		if skippable(err) || errors.Is(err, unix.EISDIR) {
			// No file, so no writer holds it.
			if err := d.rename(lockName, statefile.Aside(lockName), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		whole := unix.Flock_t{Type: unix.F_WRLCK}
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &whole)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			pid := make([]byte, 20)
			n, _ := f.ReadAt(pid, 0) // only for the message
			_ = f.Close()
			return nil, fmt.Errorf("%s: %w (process %s writes it)", d.f.Name(), ErrLocked, cleanPID(pid[:n]))
		}
		if err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		// A lock on a file that was removed meanwhile keeps nobody away.
		var held unix.Stat_t
		named, err := d.stat(lockName)
		if err != nil || unix.Fstat(int(f.Fd()), &held) != nil || held.Ino != named.Ino || held.Dev != named.Dev {
			_ = f.Close()
			continue
		}
		if f.Truncate(0) == nil {
			// A full disk costs the pid in the message above, no more.
			_, _ = f.WriteAt(strconv.AppendInt(nil, int64(os.Getpid()), 10), 0)
		}
		return f, nil
	}
}

func cleanPID(b []byte) string {
	if n, err := strconv.Atoi(string(b)); err == nil && n > 0 {
		return strconv.Itoa(n)
	}
	return "unknown"
}
