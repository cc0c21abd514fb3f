package journal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/record"
)

// retain removes the oldest segments until the journal has room for one more
// segment within MaxBytes, and tells what that cost. It runs after each rotation,
// when the room is still there, so that the appends of others need not wait for it.
func (j *Journal) retain() {
	cursors := j.removeOldest()
	j.tell()
	// Saved last: a crash before it makes OpenCursor report the loss a second time,
	// which is better than never.
	for _, c := range cursors {
		if err := c.Save(); err != nil {
			j.o.Logger.Warn("after a crash this loss may be reported a second time", "err", err)
		}
	}
}

// removeOldest removes segments and returns the cursors that had not passed them.
// The records that a cursor had not taken are counted before the removal; where the
// process dies between the two, OpenCursor makes the count from the headers.
func (j *Journal) removeOldest() (behind []*Cursor) {
	j.retaining.Lock()
	defer j.retaining.Unlock()
	lost := map[string]*record.Loss{}
	for {
		j.mu.Lock()
		if j.closed || len(j.segments) < 2 || j.bytes+j.o.MaxSegmentBytes <= j.o.MaxBytes {
			j.mu.Unlock()
			break
		}
		victim := j.segments[0].number
		floor := Position{Segment: j.segments[1].number}
		cursors := make([]*Cursor, 0, len(j.cursors))
		for _, c := range j.cursors {
			cursors = append(cursors, c)
		}
		j.mu.Unlock()

		for _, c := range cursors {
			loss, err := c.drop(floor)
			if err != nil {
				j.o.Logger.Error("what the bound of the journal cost could not be counted", "segment", victim, "cursor", c.name, "err", err)
			}
			if loss.Count != 0 {
				merge(lost, c.name, loss)
				behind = append(behind, c)
			}
		}
		if err := j.removeSegment(victim); err != nil {
			j.o.Logger.Error("an old segment was not removed: the journal grows over its bound", "err", err)
			break
		}
	}
	for _, l := range lost {
		j.lose(*l)
	}
	return behind
}

func merge(lost map[string]*record.Loss, name string, l record.Loss) {
	l.Cause, l.Source = "disk_cap", name
	l.Detail = "the journal reached its bound before the sink had taken these records; raise journal_max_bytes or see why the sink is behind"
	old := lost[name]
	if old == nil {
		lost[name] = &l
		return
	}
	if old.Count < 0 || l.Count < 0 {
		old.Count = -1
	} else {
		old.Count += l.Count
	}
	if old.From.IsZero() || !l.From.IsZero() && l.From.Before(old.From) {
		old.From = l.From
	}
	if l.To.After(old.To) {
		old.To = l.To
	}
}

// drop moves the cursor's floor up to floor and returns the loss of what it had not
// taken before, with the range of the records' own times.
func (c *Cursor) drop(floor Position) (record.Loss, error) {
	// Held over the count: what the consumer takes meanwhile would be counted as
	// lost and delivered too.
	c.mu.Lock()
	defer c.mu.Unlock()
	from := c.taken
	if from.Before(c.floor) {
		from = c.floor
	}
	if !from.Before(floor) {
		return record.Loss{}, nil
	}
	loss, err := c.j.rangeOf(from, floor)
	c.floor, c.taken = floor, floor
	if loss.Count > 0 {
		c.state.Lost += loss.Count
	}
	return loss, err
}

// rangeOf counts the records from one position to another, and finds their first
// and last time.
func (j *Journal) rangeOf(from, to Position) (record.Loss, error) {
	r, err := j.Reader(from)
	if err != nil {
		return record.Loss{Count: -1}, err
	}
	defer r.Close()
	var loss record.Loss
	for {
		l, err := r.Next()
		if errors.Is(err, io.EOF) || err == nil && !l.Pos.Before(to) {
			return loss, nil
		}
		if err != nil {
			loss.Count = -1
			return loss, err
		}
		loss.Count++
		ts := l.TS()
		if loss.From.IsZero() || ts.Before(loss.From) {
			loss.From = ts
		}
		loss.To = latest(loss.To, ts)
	}
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func (j *Journal) removeSegment(number uint64) error {
	if err := j.dir.remove(segmentName(number)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EISDIR) {
		return fmt.Errorf("remove segment %d: %w", number, err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.forget(number)
	return nil
}

// forget takes a removed segment out of the books. The caller holds mu.
func (j *Journal) forget(number uint64) {
	j.segments = slices.DeleteFunc(j.segments, func(s segment) bool {
		if s.number == number {
			j.bytes -= s.bytes
		}
		return s.number == number
	})
}

// freePassed removes the oldest segment when the disk is full and every cursor has
// passed it. Without a cursor the journal is the only copy, and its past is not
// given up for its present. The caller holds mu.
func (j *Journal) freePassed() bool {
	if len(j.segments) < 2 || len(j.cursors) == 0 {
		return false
	}
	next := Position{Segment: j.segments[1].number}
	for _, c := range j.cursors {
		if c.Position().Before(next) {
			return false
		}
	}
	number := j.segments[0].number
	if err := j.dir.remove(segmentName(number)); err != nil {
		return false
	}
	j.o.Logger.Warn("the disk is full: a segment that all sinks had taken was removed", "segment", number)
	j.forget(number)
	return true
}
