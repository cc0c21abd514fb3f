package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/internal/statefile"
	"github.com/tallyman-ci/tallyman/record"
)

var (
	// ErrCursorLost is returned by LoadCursor where files of the cursor are there
	// and none of them can be read.
	ErrCursorLost = errors.New("the cursor's files are damaged")
	// ErrCursorInUse is returned by OpenCursor for a name that is open already.
	ErrCursorInUse = errors.New("a cursor of this name is open")
)

// CursorState is what a cursor file holds.
type CursorState struct {
	Position
	// SegmentID is the id in the header of the position's segment, where known.
	SegmentID string `json:"segment_id,omitempty"`
	// Seq is the number of records that the journal took before the position.
	Seq int64 `json:"seq"`
	// Lost is how many records after the position are gone, and LostTo where the
	// last of them ended: delivery goes on there.
	Lost   int64    `json:"lost,omitempty"`
	LostTo Position `json:"lost_to,omitzero"`
	// Untold are losses in Lost that OnLoss may not have been told of yet.
	Untold []record.Loss `json:"untold,omitempty"`
	// Generation grows by one with each save.
	Generation uint64    `json:"generation"`
	Saved      time.Time `json:"saved"`
}

// cursorFile is a cursor file: the state with a check sum, because a damaged number
// is still a number.
type cursorFile struct {
	Cursor json.RawMessage `json:"cursor"`
	CRC32C string          `json:"crc32c"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func cursorPaths(dir, name string) (current, previous, temp string) {
	base := filepath.Join(dir, name)
	return base + ".json", base + ".previous.json", base + ".tmp"
}

// IsCursorName tells whether name may be a cursor's: it becomes the name of files.
func IsCursorName(name string) bool {
	return name != "" && len(name) <= 100 && name[0] != '.' && strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == ""
}

func checkCursorName(name string) error {
	if !IsCursorName(name) {
		return fmt.Errorf("cursor name %q: use up to 100 letters, digits and ._-", name)
	}
	return nil
}

// LoadCursor reads the cursor name in dir, or its previous generation where the
// newest file is missing or damaged. The error is fs.ErrNotExist where the cursor
// was never saved, and ErrCursorLost where no generation of it can be read.
func LoadCursor(dir, name string) (CursorState, error) {
	if err := checkCursorName(name); err != nil {
		return CursorState{}, err
	}
	current, previous, _ := cursorPaths(dir, name)
	s, err := readCursor(current)
	if err == nil {
		return s, nil
	}
	s, errPrevious := readCursor(previous)
	if errPrevious == nil {
		return s, nil
	}
	if errors.Is(err, fs.ErrNotExist) && errors.Is(errPrevious, fs.ErrNotExist) {
		return CursorState{}, fmt.Errorf("load cursor %s: %w", name, fs.ErrNotExist)
	}
	return CursorState{}, fmt.Errorf("load cursor %s: %w (%w)", name, ErrCursorLost, errors.Join(err, errPrevious))
}

func readCursor(path string) (CursorState, error) {
	var s CursorState
	data, err := statefile.Read(path, 64<<10)
	if err != nil {
		return s, err
	}
	var c cursorFile
	if err := json.Unmarshal(data, &c); err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	if c.CRC32C != checksum(c.Cursor) {
		return s, fmt.Errorf("%s: wrong check sum", path)
	}
	if err := json.Unmarshal(c.Cursor, &s); err != nil || s.Offset < 0 || s.Seq < 0 || s.Lost < 0 {
		return CursorState{}, fmt.Errorf("%s: not a cursor", path)
	}
	return s, nil
}

func checksum(b []byte) string { return fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli)) }

// SaveCursor writes the cursor name in dir durably. A failure at any point, a full
// disk for one, leaves a generation that can be loaded.
func SaveCursor(dir, name string, s CursorState) error {
	if err := checkCursorName(name); err != nil {
		return err
	}
	if err := saveCursor(dir, name, s); err != nil {
		return fmt.Errorf("save cursor %s: %w", name, err)
	}
	return nil
}

func saveCursor(dir, name string, s CursorState) error {
	current, previous, temp := cursorPaths(dir, name)
	old, oldErr := readCursor(current)
	if oldErr == nil {
		s.Generation = max(s.Generation, old.Generation+1)
	}
	state, err := json.Marshal(s)
	if err != nil {
		return err
	}
	data, err := json.Marshal(cursorFile{state, checksum(state)})
	if err != nil {
		return err
	}
	if err := statefile.MakeDir(dir, 0o750); err != nil {
		return err
	}
	if err := statefile.Vacate(temp); err != nil {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(temp) // the next save does it too
		return err
	}
	if oldErr == nil { // a damaged file must not replace a good previous one
		if err := statefile.Rename(current, previous); err != nil {
			return err
		}
	}
	return statefile.Rename(temp, current)
}

// Cursor is the place of one consumer in the journal. The journal's bound respects
// it: what is removed before the consumer took it is counted and reported as a
// loss, each record once.
//
// A cursor has one user at a time; the journal may look at it meanwhile.
type Cursor struct {
	j         *Journal
	dir, name string

	saving sync.Mutex // held over a save; before mu

	mu      sync.Mutex
	state   CursorState // Position: everything before it is delivered
	dropped int64       // see Dropped
	taken   Position    // everything before it was given out by Take
	floor   Position    // everything before it is gone from the journal
	saved   CursorState
	toTell  []record.Loss // of state.Untold, those that nobody is telling yet
}

// OpenCursor opens the cursor name, whose file is in dir, and registers it with the
// journal. A cursor that was never saved begins at the oldest record. So does one
// whose files are damaged or belong to another journal; OnLoss is told then
// (cursor_lost): consumers will see records again, under the same ids. OnLoss is
// also told of records that were removed while the cursor was not registered, and
// again, word for word, of those that a process told of right before it was killed.
func (j *Journal) OpenCursor(dir, name string) (*Cursor, error) {
	state, err := LoadCursor(dir, name)
	c := &Cursor{j: j, dir: dir, name: name}
	switch {
	case errors.Is(err, ErrCursorLost):
		j.lose(record.Loss{Cause: "cursor_lost", Count: -1, Source: name, Detail: err.Error() + "; records are delivered again from the oldest"})
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		c.saved = state
		if state, err = j.adopt(name, state); err != nil {
			return nil, fmt.Errorf("open cursor %s: %w", name, err)
		}
	}
	left, err := j.after(state.Position)
	if err != nil {
		return nil, fmt.Errorf("open cursor %s: %w", name, err)
	}
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return nil, ErrClosed
	}
	if j.cursors[name] != nil {
		j.mu.Unlock()
		return nil, fmt.Errorf("open cursor %s: %w", name, ErrCursorInUse)
	}
	state.Seq = max(j.total-left, 0)
	c.state, c.taken, c.toTell = state, state.Position, state.Untold
	j.cursors[name] = c
	j.mu.Unlock()
	if len(state.Untold) > 0 {
		j.save(c)
		j.report([]*Cursor{c})
	}
	j.tell()
	return c, nil
}

// save saves a cursor before its losses are told.
func (j *Journal) save(c *Cursor) {
	if err := c.Save(); err != nil {
		j.o.Logger.Warn("after a crash this loss may be counted a second time", "cursor", c.name, "err", err)
	}
}

// report tells of the untold losses of cursors. They stay in the cursor's file until
// the next save: a process that is killed before leaves them to the next one, which
// tells them word for word.
func (j *Journal) report(cursors []*Cursor) {
	told := make([][]record.Loss, len(cursors))
	for i, c := range cursors {
		c.mu.Lock()
		told[i], c.toTell = c.toTell, nil // two appenders may be here at once
		c.mu.Unlock()
		for _, l := range told[i] {
			j.lose(l)
		}
	}
	j.tell()
	for i, c := range cursors {
		c.mu.Lock()
		c.state.Untold = slices.DeleteFunc(slices.Clone(c.state.Untold), func(l record.Loss) bool {
			return slices.ContainsFunc(told[i], func(t record.Loss) bool { return sameLoss(l, t) })
		})
		c.mu.Unlock()
	}
}

func sameLoss(a, b record.Loss) bool {
	return a.Cause == b.Cause && a.Count == b.Count && a.Detail == b.Detail && a.From.Equal(b.From) && a.To.Equal(b.To)
}

// adopt checks a loaded cursor against the segments that are there and returns
// where it goes on.
func (j *Journal) adopt(name string, s CursorState) (CursorState, error) {
	if s.Segment == 0 && s.LostTo.Segment == 0 {
		return s, nil
	}
	goesOn := s.Position
	if goesOn.Before(s.LostTo) {
		goesOn = s.LostTo
	}
	j.mu.Lock()
	var here, next *segment
	for i := range j.segments {
		if seg := j.segments[i]; seg.number == goesOn.Segment {
			here = &seg
		} else if seg.number > goesOn.Segment && next == nil {
			next = &seg
		}
	}
	last := j.lastNumber
	j.mu.Unlock()

	why := ""
	switch {
	case goesOn.Segment > last:
		why = fmt.Sprintf("the cursor stands in segment %d, the newest is %d", goesOn.Segment, last)
	case here != nil && goesOn == s.Position:
		h, ok := j.dir.header(s.Segment)
		switch {
		case ok && s.SegmentID != "" && h.ID != s.SegmentID:
			why = fmt.Sprintf("segment %d is not the one the cursor stood in", s.Segment)
		case s.Offset > here.bytes:
			why = fmt.Sprintf("the cursor stands at byte %d of segment %d, which has %d", s.Offset, s.Segment, here.bytes)
		default:
			return s, nil
		}
	}
	if why != "" {
		j.lose(record.Loss{Cause: "cursor_lost", Count: -1, Source: name, From: s.Saved, Detail: why + "; records are delivered again from the oldest"})
		return CursorState{Generation: s.Generation, Untold: s.Untold}, nil
	}
	// The segment is gone: the bound took it while nobody had the cursor open, or
	// the process died before the cursor moved on.
	to := j.End()
	loss := record.Loss{Cause: "disk_cap", Count: -1, Source: name, From: s.Saved, To: j.o.Now()}
	if here != nil {
		next = here
	}
	if next != nil {
		to = Position{Segment: next.number}
		if h, ok := j.dir.header(next.number); ok {
			loss.To = h.TS
		}
	}
	left, err := j.after(to)
	if err != nil {
		return s, err
	}
	j.mu.Lock()
	lost := j.total - left - s.Seq - s.Lost
	j.mu.Unlock()
	untold := s.Untold
	if lost > 0 {
		loss.Count = lost
	}
	if lost != 0 {
		loss.Detail = fmt.Sprintf("segment %d, where the cursor stood after record %d, is gone", s.Segment, s.Seq)
		untold = append(slices.Clone(untold), loss)
	}
	return CursorState{Position: to, Generation: s.Generation, Untold: untold}, nil
}

// lose keeps a loss for OnLoss.
func (j *Journal) lose(l record.Loss) {
	j.mu.Lock()
	j.losses = append(j.losses, l)
	j.mu.Unlock()
}

// after returns how many records stand after p now. It reads the rest of p's
// segment and takes the others from the headers.
func (j *Journal) after(p Position) (int64, error) {
	j.mu.Lock()
	total, end := j.total, j.end
	j.mu.Unlock()
	r, err := j.Reader(p)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	var n int64
	at := uint64(0) // the segment of the last record
	for {
		l, err := r.Next()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		if !l.Pos.Before(end) {
			return n, nil
		}
		if at != 0 && l.Pos.Segment != at || at == 0 && l.Pos.Segment != p.Segment {
			if h, ok := j.dir.header(l.Pos.Segment); ok && h.First <= total {
				return n + total - h.First, nil
			}
		}
		at = l.Pos.Segment
		n++
	}
}

// Position is where delivery goes on: everything before it is delivered.
func (c *Cursor) Position() Position {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.Position
}

// Take says that the consumer has l in its hands now. It returns false where l was
// removed from the journal and reported as lost before: the consumer drops it and
// goes on reading at the position that Take returns.
func (c *Cursor) Take(l Line) (Position, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.Pos.Before(c.floor) {
		return c.floor, false
	}
	c.taken = l.Next
	return l.Next, true
}

// Advance says that everything before p is delivered, which were n more records.
func (c *Cursor) Advance(p Position, n int) {
	c.j.mu.Lock()
	total, end := c.j.total, c.j.end
	c.j.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.Position = p
	c.state.Seq += int64(n)
	if !p.Before(c.floor) {
		c.state.Seq += c.state.Lost
		c.state.Lost, c.state.LostTo = 0, Position{}
	}
	if !p.Before(end) {
		// Nothing is left, whatever damage did to the count on the way.
		c.state.Seq = total
	}
	if c.taken.Before(p) {
		c.taken = p
	}
}

// Behind is the number of records that are not delivered yet.
func (c *Cursor) Behind() int64 {
	c.j.mu.Lock()
	total := c.j.total
	c.j.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(total-c.state.Seq-c.state.Lost, 0)
}

// Dropped is the number of records that the journal's bound took since the cursor was
// opened, before the consumer had them.
func (c *Cursor) Dropped() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dropped
}

// Save writes the cursor's file, where it moved since the last time.
func (c *Cursor) Save() error {
	c.saving.Lock()
	defer c.saving.Unlock()
	c.mu.Lock()
	s, saved := c.state, c.saved
	c.mu.Unlock()
	if s.Position == saved.Position && s.Lost == saved.Lost && s.LostTo == saved.LostTo && slices.EqualFunc(s.Untold, saved.Untold, sameLoss) {
		return nil
	}
	s.SegmentID = saved.SegmentID
	if s.Segment != saved.Segment || s.SegmentID == "" {
		h, _ := c.j.dir.header(s.Segment) // empty where it cannot be read
		s.SegmentID = h.ID
	}
	s.Saved = c.j.o.Now().UTC()
	s.Generation = saved.Generation + 1
	if err := SaveCursor(c.dir, c.name, s); err != nil {
		return err
	}
	c.mu.Lock()
	c.saved = s
	c.mu.Unlock()
	return nil
}

// Close saves the cursor and takes its name out of the journal: what it has not
// passed may be removed then.
func (c *Cursor) Close() error {
	err := c.Save()
	c.j.mu.Lock()
	delete(c.j.cursors, c.name)
	c.j.mu.Unlock()
	return err
}
