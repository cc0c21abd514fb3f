package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readBuffer is the reader's memory. It must hold more than one MaxLine.
const readBuffer = 256 << 10

// relistEvery is how often a reader at the end looks through the whole directory
// for a later segment, where the one with the next number is missing.
const relistEvery = time.Second

// ReadStats counts what a reader came across that was no record.
type ReadStats struct {
	Records         int64 // records read
	TornLines       int64 // lines of which a part was no whole record
	TornBytes       int64 // bytes in those parts
	OversizeLines   int64 // of the torn lines, those longer than MaxLine
	Truncations     int64 // times a file was shorter than what was read of it before
	MissingSegments int64 // numbers that were skipped because their segment was gone
}

// Reader reads the records of a journal or of a single file of JSON Lines in the
// order in which they were written. It takes no lock and may run beside a live
// writer, in another process too, and on the journal of a dead one.
//
// It returns whole records only. A half line at the end is waited for; a half line
// that another line follows is skipped, and where a whole record stands behind it
// on the same line, that record is found.
//
// A Reader is not safe for concurrent use.
type Reader struct {
	dir folder // zero for a single file
	f   *os.File
	seg uint64

	buf        []byte
	start, end int   // the bytes read and not yet used
	off        int64 // the file offset of buf[start]
	searched   int   // bytes from start that hold no newline
	damaged    bool  // in a line that was already counted as torn

	next    *os.File // the segment after f, once it is there: f is complete then
	nextSeg uint64
	listed  time.Time

	stats ReadStats
}

// OpenReader opens the journal in the directory path, or the single file path, for
// reading from a position. A position in a segment that is gone moves on to the
// next one that is there; one beyond the newest segment belongs to another
// journal, and reading starts at the oldest.
func OpenReader(path string, from Position) (*Reader, error) {
	d, err := openFolder(path)
	if errors.Is(err, unix.ENOTDIR) {
		return openFileReader(path, from)
	}
	if err != nil {
		return nil, err
	}
	return newReader(d, from)
}

func openFileReader(path string, from Position) (*Reader, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "read", Path: path, Err: errNotRegular}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &Reader{f: f, buf: make([]byte, readBuffer), off: max(from.Offset, 0)}, nil
}

// newReader takes over d.
func newReader(d folder, from Position) (*Reader, error) {
	r := &Reader{dir: d, buf: make([]byte, readBuffer)}
	if err := r.Seek(from); err != nil {
		_ = r.Close()
		return nil, err
	}
	return r, nil
}

// Seek goes on reading at p, under the rules of OpenReader.
func (r *Reader) Seek(p Position) error {
	if r.dir.f == nil {
		r.move(r.f, 0, max(p.Offset, 0))
		return nil
	}
	if p.Segment != 0 && p.Segment == r.seg && r.f != nil {
		r.move(r.f, r.seg, max(p.Offset, 0))
		return nil
	}
	numbers, err := r.dir.segments()
	if err != nil {
		return err
	}
	want, offset := p.Segment, max(p.Offset, 0)
	if len(numbers) > 0 && want > numbers[len(numbers)-1] {
		want = 0
	}
	for _, n := range numbers {
		if n < want {
			continue
		}
		if n != want {
			offset = 0
		}
		f, err := r.dir.open(segmentName(n), unix.O_RDONLY, 0)
		if skippable(err) {
			continue
		}
		if err != nil {
			return err
		}
		if want != 0 {
			r.stats.MissingSegments += int64(n - want)
		}
		r.move(f, n, offset)
		return nil
	}
	// Nothing there yet: the first segment that appears is the beginning.
	r.move(nil, 0, 0)
	return nil
}

// skippable says whether a segment that cannot be opened with this error is to be
// passed over: it was removed meanwhile, or it is a FIFO, a directory or a symlink
// that somebody put there.
func skippable(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotRegular) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO)
}

// move makes f at offset the place of reading.
func (r *Reader) move(f *os.File, seg uint64, offset int64) {
	if r.f != nil && r.f != f {
		_ = r.f.Close() // only read from
	}
	if r.next != nil && r.next != f {
		_ = r.next.Close() // only read from
	}
	r.f, r.seg, r.off = f, seg, offset
	r.next, r.nextSeg, r.listed = nil, 0, time.Time{}
	r.start, r.end, r.searched, r.damaged = 0, 0, 0, false
}

// Close closes the reader.
func (r *Reader) Close() error {
	r.move(nil, 0, 0)
	if r.dir.f != nil {
		return r.dir.f.Close()
	}
	return nil
}

// Position is where reading goes on. After io.EOF it is where the next line will
// begin.
func (r *Reader) Position() Position { return Position{r.seg, r.off} }

// Stats returns the counts so far.
func (r *Reader) Stats() ReadStats { return r.stats }

// Next returns the next record. io.EOF means that there is none now; a later call
// returns what was written meanwhile.
func (r *Reader) Next() (Line, error) {
	for {
		if l, ok := r.buffered(); ok {
			r.stats.Records++
			return l, nil
		}
		if r.f != nil {
			n, err := r.fill()
			if err != nil {
				return Line{}, fmt.Errorf("read %s at %d: %w", r.f.Name(), r.off, err)
			}
			if n > 0 {
				continue
			}
		}
		if l, ok, err := r.atEnd(); ok {
			r.stats.Records++
			return l, nil
		} else if err != nil {
			return Line{}, err
		}
	}
}

// buffered returns the next record of the lines that are whole in the buffer.
func (r *Reader) buffered() (Line, bool) {
	for r.start < r.end {
		w := r.buf[r.start:r.end]
		newline := bytes.IndexByte(w[r.searched:], '\n')
		if newline < 0 {
			if r.searched = len(w); len(w) <= MaxLine {
				return Line{}, false
			}
			// Too long for one record, but one may stand within.
			if l, ok := r.within(w, len(w)); ok {
				return l, true
			}
			continue
		}
		newline += r.searched
		r.searched = newline
		if l, ok := r.within(w[:newline], newline+1); ok {
			return l, true
		}
	}
	return Line{}, false
}

// within takes the next piece of a line: a record, which it returns, or bytes that
// are none. size is the length of the line with its newline; it equals len(line)
// where the line has no newline yet, or will never have one.
func (r *Reader) within(line []byte, size int) (Line, bool) {
	var l Line
	if n := l.scan(line); n > 0 {
		l.Pos = r.Position()
		if n == len(line) {
			n = size
		}
		r.use(n, size)
		l.Next = r.Position()
		r.damaged = false
		return l, true
	}
	if harmless(line) {
		r.use(size, size)
		return Line{}, false
	}
	if !r.damaged {
		r.damaged = true
		r.stats.TornLines++
		if len(line) > MaxLine {
			r.stats.OversizeLines++
		}
	}
	skip := 1 + bytes.Index(line[1:], marker)
	switch {
	case skip > 0:
		r.stats.TornBytes += int64(skip)
	case size > len(line): // the line ends here
		r.stats.TornBytes += int64(len(line))
		skip = size
	default: // a marker may be half there
		skip = max(len(line)-len(marker)+1, 1)
		r.stats.TornBytes += int64(skip)
	}
	r.use(skip, size)
	return Line{}, false
}

// use moves on by n bytes of a line of the given size.
func (r *Reader) use(n, size int) {
	r.start += n
	r.off += int64(n)
	r.searched = max(r.searched-n, 0)
	if n == size && r.start > 0 && r.buf[r.start-1] == '\n' {
		r.damaged = false
	}
}

// harmless says whether a line that is no record is none of a damage either: it is
// empty or the header of a segment.
func harmless(line []byte) bool {
	if len(line) == 0 {
		return true
	}
	if len(line) > 512 || !bytes.HasPrefix(line, headerMarker) {
		return false
	}
	return members(line, len(headerMarker), 1) == len(line)
}

// fill reads more of the file behind what the buffer holds.
func (r *Reader) fill() (int, error) {
	if r.start > 0 {
		r.end = copy(r.buf, r.buf[r.start:r.end])
		r.start = 0
	}
	if r.damaged {
		r.skipHole()
	}
	for {
		n, err := unix.Pread(int(r.f.Fd()), r.buf[r.end:], r.off+int64(r.end))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		r.end += n
		return n, nil
	}
}

// skipHole moves on to the next data of the file where a hole begins (lseek(2),
// SEEK_DATA): a damaged file can say that it has a terabyte of zeros. What the buffer
// holds is the end of a damaged line, which zeros cannot complete.
func (r *Reader) skipHole() {
	at := r.off + int64(r.end)
	data, err := unix.Seek(int(r.f.Fd()), at, unix.SEEK_DATA)
	if err == unix.ENXIO { // nothing but the hole
		if st, errStat := r.f.Stat(); errStat == nil {
			data, err = st.Size(), nil
		}
	}
	if err != nil || data <= at+readBuffer {
		return
	}
	r.stats.TornBytes += data - r.off
	r.off, r.start, r.end, r.searched = data, 0, 0, 0
}

// atEnd is called where the file has no more bytes. It returns io.EOF, or a record
// that stands at the end of a complete segment without its newline, or neither
// where reading goes on elsewhere.
func (r *Reader) atEnd() (Line, bool, error) {
	if r.f != nil {
		st, err := r.f.Stat()
		if err != nil {
			return Line{}, false, err
		}
		if st.Size() < r.off+int64(r.end-r.start) {
			// Somebody truncated the file. What is in it now is new.
			r.stats.Truncations++
			r.start, r.end, r.off, r.searched, r.damaged = 0, 0, 0, 0, false
			if st.Size() > 0 {
				return Line{}, false, nil
			}
			return Line{}, false, io.EOF
		}
		if st.Sys().(*syscall.Stat_t).Nlink == 0 {
			r.listed = time.Time{} // the bound took it: the next one may be gone as well
		}
	}
	if r.dir.f == nil {
		return Line{}, false, io.EOF
	}
	if r.next == nil {
		// The writer makes a segment only when the one before is complete. That it
		// is there now says nothing about the time of the read above: read again.
		found, err := r.successor()
		if err == nil && !found {
			err = io.EOF
		}
		return Line{}, false, err
	}
	if r.start < r.end {
		line := r.buf[r.start:r.end]
		l, ok := r.within(line, len(line))
		return l, ok, nil
	}
	if r.seg != 0 {
		r.stats.MissingSegments += int64(r.nextSeg - r.seg - 1)
	}
	r.move(r.next, r.nextSeg, 0)
	return Line{}, false, nil
}

// successor looks for the segment after the current one.
func (r *Reader) successor() (bool, error) {
	try := func(n uint64) (bool, error) {
		f, err := r.dir.open(segmentName(n), unix.O_RDONLY, 0)
		if skippable(err) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		r.next, r.nextSeg = f, n
		return true, nil
	}
	if r.seg != 0 {
		if found, err := try(r.seg + 1); found || err != nil {
			return found, err
		}
	}
	if r.seg != 0 && time.Since(r.listed) < relistEvery {
		return false, nil
	}
	numbers, err := r.dir.segments()
	if err != nil {
		return false, err
	}
	r.listed = time.Now()
	for _, n := range numbers {
		if n <= r.seg {
			continue
		}
		if found, err := try(n); found || err != nil {
			return found, err
		}
	}
	return false, nil
}
