// Package journal keeps the account on disk: a directory of JSON Lines segments to
// which one writer appends and from which any number of readers read.
//
// A record's line goes through Append by one write(2) into the newest segment. A
// segment ends by size or age; the next one gets the next number, and the symlink
// records.jsonl follows, so that `tail -F records.jsonl | jq` shows the live
// account. Each consumer reads at its own pace with a Reader and remembers its
// place in a Cursor. When the directory reaches its bound, the oldest whole
// segments go, and what a cursor had not passed yet is reported as a loss.
//
// What the journal promises:
//
//   - What Append took is found by every reader, also after the process was killed
//     at any moment; after a power cut, what Sync had covered (ext4 loses seconds of
//     the rest).
//   - No reader ever gets a record that was not written, or a part of one. A torn
//     line (full disk, killed writer) costs itself alone.
//   - Any content of the directory, random bytes included, opens without help, and
//     without reading more than one segment.
//   - One writer at a time. Readers need no lock and disturb nobody.
package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/statefile"
	"github.com/tallyman-ci/tallyman/record"
)

var (
	// ErrLocked is returned by Open while another process writes the journal.
	ErrLocked = errors.New("the journal has a writer already")
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("the journal is closed")
	// ErrDiskFull is returned by Append and Open where the file system, a quota or
	// a limit of file sizes has no room. Append may be tried again at any time.
	ErrDiskFull = errors.New("no room for the journal")
)

// LineError is returned by Append for lines that are not records. Nothing was
// written; the caller takes the line out and appends the rest.
type LineError struct {
	Index  int // of the line, from 0
	Reason string
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %s", e.Index, e.Reason) }

// AppendError is returned by Append where the kernel did not take all. It is
// ErrDiskFull where there was no room.
type AppendError struct {
	// Whole is how many bytes from the start of the lines are in the journal as
	// whole lines. The caller keeps the rest.
	Whole int
	Err   error
}

func (e *AppendError) Error() string { return e.Err.Error() }

// Unwrap returns the kernel's error.
func (e *AppendError) Unwrap() error { return e.Err }

// Is says that an error for want of room is ErrDiskFull.
func (e *AppendError) Is(target error) bool { return target == ErrDiskFull && noRoom(e.Err) }

func noRoom(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

// Options are the bounds of a journal. The zero value gives the defaults.
type Options struct {
	MaxSegmentBytes int64         // a segment ends before it would be larger; default 16 MiB, at most a quarter of MaxBytes
	MaxSegmentAge   time.Duration // a segment ends at the first append after this time; default 1 h
	MaxBytes        int64         // bound of all segments together; default 512 MiB

	// OnLoss is told of losses as they are found: records that the bound cost a
	// cursor (disk_cap, one call for each cursor, named in Source), a place that a
	// cursor file did not give (cursor_lost), a torn line that a killed writer left
	// (torn_line), a segment that somebody else cut or removed (truncated_file).
	// It is called by Append, Sync and OpenCursor in their caller's goroutine, without
	// locks held, and may call Append.
	OnLoss func(record.Loss)

	Now    func() time.Time // default time.Now
	Logger *slog.Logger     // default: silent
}

func (o *Options) defaults() {
	if o.MaxBytes <= 0 {
		o.MaxBytes = 512 << 20
	}
	if o.MaxSegmentBytes <= 0 {
		o.MaxSegmentBytes = 16 << 20
	}
	o.MaxSegmentBytes = min(o.MaxSegmentBytes, o.MaxBytes/4)
	if o.MaxSegmentAge <= 0 {
		o.MaxSegmentAge = time.Hour
	}
	if o.OnLoss == nil {
		o.OnLoss = func(record.Loss) {}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// rotateRetry is how many appends go by before a rotation that failed is tried
// again. They are counted, not timed, because clocks are set.
const rotateRetry = 100

// retiredLimit bounds the segments that were ended and wait for the next Sync.
const retiredLimit = 4

// Journal is the writer of a journal. It is safe for concurrent use.
type Journal struct {
	o        Options
	dir      folder
	lockFile *os.File

	// syncing is held over the fsyncs of one Sync, retaining over the choice and
	// the removal of old segments. Order of locking: these two, mu, Cursor.mu.
	syncing   sync.Mutex
	retaining sync.Mutex
	looked    time.Time // change of the folder at checkEnded; under syncing

	mu         sync.Mutex
	closed     bool
	cur        *LineFile // nil where no segment could be made yet
	curStart   time.Time
	curRecords int64
	curHeader  int64     // size of its header, 0 where it was resumed
	segments   []segment // ascending; the last is cur where cur is set
	lastNumber uint64
	bytes      int64    // in all segments
	total      int64    // records ever taken
	end        Position // after the last whole line
	retired    []*LineFile
	dirty      bool // appended since the last Sync
	dirDirty   bool // a name was made since the last Sync
	rotateSkip int  // appends until a rotation that failed is tried again
	cursors    map[string]*Cursor
	losses     []record.Loss // to be told
	wake       chan struct{} // closed by the next Append; nil while nobody waits
}

type segment struct {
	number uint64
	bytes  int64
}

// Open opens the journal in dir for writing, and makes the directory where it is
// missing. It returns ErrLocked while another process has it open. A full disk is
// no error here but of the later Appends.
//
// Cursors must be registered with OpenCursor before the first Append: a cursor that
// is not registered holds no segment, and loses without being told.
func Open(dir string, o Options) (*Journal, error) {
	o.defaults()
	if err := statefile.MakeDir(dir, 0o750); err != nil {
		return nil, fmt.Errorf("make journal directory: %w", err)
	}
	d, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	lock, err := d.lock()
	if err != nil {
		_ = d.f.Close() // nothing was written through it
		if noRoom(err) {
			err = fmt.Errorf("%w: %w", ErrDiskFull, err)
		}
		return nil, err
	}
	j := &Journal{o: o, dir: d, lockFile: lock, cursors: map[string]*Cursor{}}
	if err := j.load(); err != nil {
		_ = j.Close() // the first error counts
		return nil, err
	}
	return j, nil
}

// load finds out where the last writer stopped. It goes on in its segment where
// that is in order, and begins a new one where it is not.
func (j *Journal) load() error {
	names, err := j.dir.names()
	if err != nil {
		return fmt.Errorf("list segments: %w", err)
	}
	numbers := segmentNumbers(names)
	for len(numbers) > 0 && numbers[len(numbers)-1] == maxSegment {
		// Nothing of ours: no journal lives long enough to count that far.
		name := segmentName(maxSegment)
		if err := j.dir.rename(name, "set-aside-"+name, 0); err != nil {
			return err
		}
		numbers = numbers[:len(numbers)-1]
	}
	for _, n := range numbers {
		j.lastNumber = n
		st, err := j.dir.stat(segmentName(n))
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue // gone meanwhile, or nothing of ours
		}
		j.segments = append(j.segments, segment{n, st.Size})
		j.bytes += st.Size
	}
	resumed, err := j.resume()
	if err == nil && !resumed {
		j.total = j.recount()
		err = j.rotate()
		if noRoom(err) {
			j.o.Logger.Error("no room for a journal segment: records cannot be kept until there is", "dir", j.dir.f.Name(), "err", err)
			err = nil
		}
	}
	return err
}

// resume goes on in the newest segment. It says false where that cannot be done.
func (j *Journal) resume() (bool, error) {
	if len(j.segments) == 0 || j.segments[len(j.segments)-1].number != j.lastNumber {
		return false, nil
	}
	seg := &j.segments[len(j.segments)-1]
	if seg.bytes > j.o.MaxSegmentBytes*2 {
		return false, nil // not of this size by us: do not read it all
	}
	f, err := j.dir.open(segmentName(seg.number), unix.O_RDWR|unix.O_APPEND, 0)
	if skippable(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	h, ok, err := readHeader(f, seg.number)
	if err != nil || !ok {
		_ = f.Close() // only read from
		return false, err
	}
	l, err := newLineFile(f)
	if err != nil {
		return false, err
	}
	records, whole, err := j.count(Position{Segment: seg.number}, Position{Segment: seg.number + 1})
	if err != nil {
		_ = l.Close() // only read from
		return false, err
	}
	if l.torn {
		// The last writer was killed in a write, or had no room. The newline makes
		// readers go on. Half a record was never acknowledged, but may be missed.
		if tail, err := readTail(f, whole.Offset); err == nil {
			if _, ok := Scan(tail); ok {
				records++
			} else {
				j.losses = append(j.losses, record.Loss{Cause: "torn_line", Count: 1, Source: "journal",
					Detail: fmt.Sprintf("segment %d ended in half a record of %d bytes; it was never acknowledged", seg.number, len(tail))})
			}
		}
		l.closeTorn()
	}
	j.bytes += l.Size() - seg.bytes
	seg.bytes = l.Size()
	j.cur, j.curStart, j.curRecords, j.curHeader = l, h.TS, records, 0
	j.total = h.First + records
	j.end = Position{seg.number, l.Size()}
	if l.torn {
		j.end = whole
	}
	if err := j.dir.link(seg.number); err != nil {
		j.o.Logger.Warn("the link to the newest segment was not made", "err", err)
	}
	return true, nil
}

func readTail(f *os.File, from int64) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, from, MaxLine+1))
}

// recount returns how many records the journal has taken before a new segment,
// from the newest header that can be read. Where the newest segments are damaged it
// looks at a few and then starts at 0: only the figures of Behind suffer.
func (j *Journal) recount() int64 {
	for i, tries := len(j.segments)-1, 0; i >= 0 && tries < 4; i, tries = i-1, tries+1 {
		if h, ok := j.dir.header(j.segments[i].number); ok {
			n, _, err := j.count(Position{Segment: h.Segment}, Position{Segment: maxSegment + 1})
			if err != nil {
				break
			}
			return h.First + n
		}
	}
	return 0
}

// count counts the records from one position to another and returns where it
// stopped: at the end of what is there where that comes first.
func (j *Journal) count(from, to Position) (int64, Position, error) {
	r, err := j.Reader(from)
	if err != nil {
		return 0, from, err
	}
	defer r.Close()
	var n int64
	for {
		l, err := r.Next()
		if errors.Is(err, io.EOF) {
			return n, r.Position(), nil
		}
		if err != nil {
			return n, r.Position(), err
		}
		if !l.Pos.Before(to) {
			return n, l.Pos, nil
		}
		n++
	}
}

// rotate ends the current segment and begins the next. On an error the current one
// stays. The caller holds mu, or is Open.
func (j *Journal) rotate() error {
	now := j.o.Now()
	number := j.lastNumber + 1
	l, size, err := j.dir.create(number, j.total, now)
	if err != nil {
		return fmt.Errorf("begin segment %d: %w", number, err)
	}
	if j.cur != nil {
		j.retired = append(j.retired, j.cur)
	}
	if len(j.retired) > retiredLimit {
		// Nobody calls Sync. The bound of open files is kept, at the price of a wait.
		if err := errors.Join(j.retired[0].Sync(), j.retired[0].Close()); err != nil {
			j.o.Logger.Error("an ended segment was not made durable", "err", err)
		}
		j.retired = j.retired[1:]
	}
	j.cur, j.curStart, j.curRecords, j.curHeader = l, now, 0, size
	j.lastNumber = number
	j.segments = append(j.segments, segment{number, size})
	j.bytes += size
	j.end = Position{number, size}
	j.dirty, j.dirDirty = true, true
	if err := j.dir.link(number); err != nil {
		j.o.Logger.Warn("the link to the newest segment was not made", "err", err)
	}
	return nil
}

// rotateIfDue rotates by size and age. A segment that cannot be ended for want of
// room or descriptors goes on, up to the bound of the whole journal.
func (j *Journal) rotateIfDue(more int64) (bool, error) {
	if j.cur == nil {
		return true, j.rotate()
	}
	size := j.cur.Size() + more
	due := size > j.o.MaxSegmentBytes || j.o.Now().Sub(j.curStart) >= j.o.MaxSegmentAge
	if !due || j.curRecords == 0 {
		return false, nil
	}
	tooLarge := size > j.o.MaxBytes/2
	if j.rotateSkip > 0 && !tooLarge {
		j.rotateSkip--
		return false, nil
	}
	err := j.rotate()
	if err == nil {
		return true, nil
	}
	if tooLarge {
		return false, err
	}
	j.o.Logger.Warn("the segment goes on, the next one cannot be begun", "err", err)
	j.rotateSkip = rotateRetry
	return false, nil
}

// Append appends one or more whole records, each a line as record.Append makes it,
// by one write(2). When it returns nil, all of them will be read.
//
// It returns a *LineError where a line is not a record of at most MaxLine bytes,
// and an *AppendError, which says how much was taken, where there is no room
// (ErrDiskFull) or the file system fails. Together the lines must fit a segment.
func (j *Journal) Append(lines []byte) error {
	if len(lines) == 0 {
		return nil
	}
	if err := checkLines(lines, j.o.MaxSegmentBytes); err != nil {
		return fmt.Errorf("append to journal: %w", err)
	}
	j.mu.Lock()
	whole, rotated, err := j.append(lines)
	losses := len(j.losses) > 0
	j.mu.Unlock()
	if rotated {
		j.retain()
	}
	if rotated || losses {
		j.tell()
	}
	if err != nil && !errors.Is(err, ErrClosed) {
		return &AppendError{whole, fmt.Errorf("append to journal: %w", err)}
	}
	return err
}

// checkLines makes sure that what is taken can be read again.
func checkLines(lines []byte, maxSegment int64) error {
	if limit := max(maxSegment, MaxLine+1); int64(len(lines)) > limit {
		return fmt.Errorf("%d bytes at once, a segment is %d: append fewer lines", len(lines), limit)
	}
	for i := 0; len(lines) > 0; i++ {
		n := bytes.IndexByte(lines, '\n')
		if n < 0 {
			return &LineError{i, "no newline at its end"}
		}
		if n > MaxLine {
			return &LineError{i, fmt.Sprintf("%d bytes, the longest record is %d", n, MaxLine)}
		}
		if _, ok := Scan(lines[:n]); !ok {
			return &LineError{i, "not a record that starts with id, ts and kind"}
		}
		lines = lines[n+1:]
	}
	return nil
}

func (j *Journal) append(lines []byte) (whole int, rotated bool, err error) {
	if j.closed {
		return 0, false, ErrClosed
	}
	if rotated, err = j.rotateIfDue(int64(len(lines))); err != nil {
		return 0, false, err
	}
	// One write is the rule. Further ones come only after the kernel took a part:
	// to learn why, and to get the rest in where room can be made.
	for try := 0; ; try++ {
		n, err := j.write(lines[whole:])
		whole += n
		if err == nil {
			return whole, rotated, nil
		}
		switch {
		case try == 3:
			return whole, rotated, err
		case errors.Is(err, io.ErrShortWrite):
		case errors.Is(err, unix.EFBIG) && !rotated && j.cur.Size() > j.curHeader:
			// RLIMIT_FSIZE is smaller than a segment.
			if j.rotate() != nil {
				return whole, rotated, err
			}
			rotated = true
		case noRoom(err) && j.freePassed():
		default:
			return whole, rotated, err
		}
	}
}

func (j *Journal) write(lines []byte) (int, error) {
	before := j.cur.Size()
	n, err := j.cur.Append(lines)
	grown := j.cur.Size() - before
	j.bytes += grown
	j.segments[len(j.segments)-1].bytes += grown
	if grown > 0 {
		j.dirty = true
	}
	if n > 0 {
		count := int64(bytes.Count(lines[:n], []byte{'\n'}))
		j.curRecords += count
		j.total += count
		j.end.Offset = j.cur.whole
		if j.wake != nil {
			close(j.wake)
			j.wake = nil
		}
	}
	return n, err
}

// tell hands the losses found meanwhile to OnLoss.
func (j *Journal) tell() {
	j.mu.Lock()
	losses := j.losses
	j.losses = nil
	j.mu.Unlock()
	for _, l := range losses {
		j.o.OnLoss(l)
	}
}

// Sync makes all that was appended before durable. Appends go on meanwhile.
func (j *Journal) Sync() error {
	err := j.sync()
	j.tell()
	return err
}

func (j *Journal) sync() error {
	j.syncing.Lock()
	defer j.syncing.Unlock()
	j.mu.Lock()
	retired, cur := j.retired, j.cur
	dirty, dirDirty := j.dirty, j.dirDirty
	j.retired, j.dirty, j.dirDirty = nil, false, false
	j.mu.Unlock()

	var errs []error
	for _, l := range retired {
		errs = append(errs, l.Sync(), l.Close())
	}
	if dirty && cur != nil {
		// It may be ended meanwhile, and closed where that happens many times: then
		// it was synced.
		if err := cur.Sync(); !errors.Is(err, fs.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if cur != nil {
		j.checkCurrent(cur)
	}
	j.checkEnded()
	if dirDirty {
		errs = append(errs, j.dir.f.Sync())
	}
	err := errors.Join(errs...)
	if err != nil {
		j.mu.Lock()
		j.dirty, j.dirDirty = true, true
		j.mu.Unlock()
		return fmt.Errorf("sync journal: %w", err)
	}
	return nil
}

// checkCurrent looks whether somebody else removed or cut the segment that is being
// written. Appends to a file without a name would be lost without an error.
func (j *Journal) checkCurrent(cur *LineFile) {
	j.mu.Lock()
	defer j.mu.Unlock()
	st, err := cur.Stat()
	if err != nil || j.cur != cur {
		return // ended meanwhile, and its readers have it
	}
	seg := &j.segments[len(j.segments)-1]
	removed := st.Sys().(*syscall.Stat_t).Nlink == 0
	if !removed && st.Size() >= cur.Size() {
		return
	}
	loss := record.Loss{Cause: "truncated_file", Count: -1, Source: "journal", From: j.curStart, To: j.o.Now()}
	if removed {
		loss.Detail = fmt.Sprintf("segment %d was removed by somebody else", seg.number)
		j.bytes -= seg.bytes
		j.segments = j.segments[:len(j.segments)-1]
	} else {
		loss.Detail = fmt.Sprintf("segment %d was cut to %d bytes by somebody else", seg.number, st.Size())
		j.bytes -= seg.bytes - st.Size()
		seg.bytes = st.Size()
	}
	j.o.Logger.Error("the journal was changed by somebody else", "what", loss.Detail)
	j.losses = append(j.losses, loss)
	j.cur = nil // the next append begins a segment
	j.end.Offset = 0
	_ = cur.Close() // its name or its content is gone
}

// checkEnded looks whether somebody else removed a segment that was ended: readers pass
// over it. The caller holds syncing.
func (j *Journal) checkEnded() {
	st, err := j.dir.f.Stat()
	if err != nil || st.ModTime().Equal(j.looked) || !j.retaining.TryLock() { // else we remove some ourselves
		return
	}
	defer j.retaining.Unlock()
	j.mu.Lock()
	segments := slices.Clone(j.segments)
	if j.cur != nil {
		segments = segments[:len(segments)-1] // see checkCurrent
	}
	j.mu.Unlock()
	gone := map[uint64]bool{}
	for _, s := range segments {
		if _, err := j.dir.stat(segmentName(s.number)); errors.Is(err, fs.ErrNotExist) {
			gone[s.number] = true
		}
	}
	if time.Since(st.ModTime()) > time.Second { // or one more name may go within the same tick
		j.looked = st.ModTime()
	}
	if len(gone) == 0 {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.segments = slices.DeleteFunc(j.segments, func(s segment) bool {
		if !gone[s.number] {
			return false
		}
		j.bytes -= s.bytes
		loss := record.Loss{Cause: "truncated_file", Count: -1, Source: "journal", To: j.o.Now(),
			Detail: fmt.Sprintf("segment %d was removed by somebody else", s.number)}
		j.o.Logger.Error("the journal was changed by somebody else", "what", loss.Detail)
		j.losses = append(j.losses, loss)
		return true
	})
}

// Close makes the journal durable, closes it and lets go of the lock. Readers may
// outlive it; cursors are closed before.
func (j *Journal) Close() error {
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return nil
	}
	j.closed = true
	if j.wake != nil {
		close(j.wake)
		j.wake = nil
	}
	j.mu.Unlock()
	errs := []error{j.sync()}
	j.syncing.Lock()
	defer j.syncing.Unlock()
	j.retaining.Lock()
	defer j.retaining.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.cur != nil {
		errs = append(errs, j.cur.Close())
	}
	return errors.Join(append(errs, j.dir.f.Close(), j.lockFile.Close())...)
}

// Reader returns a reader of this journal. It does not look up the directory's
// path again.
func (j *Journal) Reader(from Position) (*Reader, error) {
	d, err := j.dir.dup()
	if err != nil {
		return nil, err
	}
	return newReader(d, from)
}

// End is the position after the last whole line.
func (j *Journal) End() Position {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.end
}

// Changed returns a channel that is closed as soon as there is something after p.
// It returns ErrClosed where nothing will come any more.
func (j *Journal) Changed(p Position) (<-chan struct{}, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case p.Before(j.end):
		done := make(chan struct{})
		close(done)
		return done, nil
	case j.closed:
		return nil, ErrClosed
	case j.wake == nil:
		j.wake = make(chan struct{})
	}
	return j.wake, nil
}

// Wait waits until there is something after p. It returns ctx's error, or ErrClosed
// where nothing will come any more.
func (j *Journal) Wait(ctx context.Context, p Position) error {
	for {
		changed, err := j.Changed(p)
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
		if p.Before(j.End()) {
			return nil
		}
	}
}

// Status describes the journal for people.
type Status struct {
	Segments int      `json:"segments"`
	Bytes    int64    `json:"bytes"`
	MaxBytes int64    `json:"max_bytes"`
	Records  int64    `json:"records"` // ever taken, as far as the headers of the segments tell
	Oldest   uint64   `json:"oldest_segment"`
	End      Position `json:"end"`
}

// Status returns the state of the journal.
func (j *Journal) Status() Status {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := Status{Segments: len(j.segments), Bytes: j.bytes, MaxBytes: j.o.MaxBytes, Records: j.total, End: j.end}
	if len(j.segments) > 0 {
		s.Oldest = j.segments[0].number
	}
	return s
}
