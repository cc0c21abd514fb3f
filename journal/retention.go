package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/record"
)

// retain removes the oldest segments until the journal has room for one more
// segment within MaxBytes, and tells what that cost. It runs after each rotation,
// when the room is still there, so that the appends of others need not wait for it.
//
// The loss is counted and saved with the cursors first, then the segments go, then
// the loss is told: a process that is killed anywhere in between leaves a cursor that
// does not deliver what is counted as lost, and a loss that is told by the next.
func (j *Journal) retain() {
	behind := j.removeOldest()
	if len(behind) > 0 {
		j.report(behind)
	}
}

// removeOldest removes segments and returns the cursors that had not passed them.
func (j *Journal) removeOldest() (behind []*Cursor) {
	j.retaining.Lock()
	defer j.retaining.Unlock()
	j.mu.Lock()
	var victims []uint64
	left := j.bytes
	for i := 0; !j.closed && i < len(j.segments)-1 && left+j.o.MaxSegmentBytes > j.o.MaxBytes; i++ {
		victims = append(victims, j.segments[i].number)
		left -= j.segments[i].bytes
	}
	if len(victims) == 0 {
		j.mu.Unlock()
		return nil
	}
	floor := Position{Segment: j.segments[len(victims)].number}
	cursors := slices.Collect(maps.Values(j.cursors))
	j.mu.Unlock()

	for _, c := range cursors {
		lost, err := c.drop(floor)
		if err != nil {
			j.o.Logger.Error("what the bound of the journal cost could not be counted", "segments", victims, "cursor", c.name, "err", err)
		}
		if lost {
			behind = append(behind, c)
			j.save(c)
		}
	}
	for _, number := range victims {
		if err := j.removeSegment(number); err != nil {
			j.o.Logger.Error("an old segment was not removed: the journal grows over its bound", "err", err)
			break
		}
	}
	return behind
}

// drop moves the cursor's floor up to floor. It says whether that costs records that
// the cursor had not taken, and notes that loss as untold.
func (c *Cursor) drop(floor Position) (lost bool, err error) {
	// Held over the count: what the consumer takes meanwhile would be counted as
	// lost and delivered too.
	c.mu.Lock()
	defer c.mu.Unlock()
	from := c.taken
	if from.Before(c.floor) {
		from = c.floor
	}
	if !from.Before(floor) {
		return false, nil
	}
	records, loss, err := c.j.rangeOf(c.name, from, floor)
	c.floor, c.taken = floor, floor
	if records == 0 && err == nil {
		return false, nil
	}
	// The number of the first tells two losses of the same size apart.
	loss.Detail = fmt.Sprintf("records from number %d on", c.state.Seq+c.state.Lost+1)
	if loss.Count < 0 {
		loss.Detail += fmt.Sprintf(" (%d could be counted)", records)
	}
	loss.Detail += ": the journal reached its bound before the sink had taken them; raise journal_max_bytes or see why the sink is behind"
	c.state.Lost += records
	c.dropped += records
	c.state.LostTo = floor
	c.state.Untold = append(slices.Clone(c.state.Untold), loss)
	c.toTell = append(slices.Clone(c.toTell), loss)
	return true, err
}

// rangeOf counts the records from one position to another, and describes them as a
// loss of the cursor name, with their first and last time. A loss record among them
// stands for itself and for what it counted, or the account would have a hole that
// no record tells of.
func (j *Journal) rangeOf(name string, from, to Position) (records int64, loss record.Loss, err error) {
	loss = record.Loss{Cause: "disk_cap", Source: name}
	r, err := j.Reader(from)
	if err != nil {
		loss.Count = -1
		return 0, loss, err
	}
	defer r.Close()
	unknown := false
	for {
		l, err := r.Next()
		end := errors.Is(err, io.EOF) || err == nil && !l.Pos.Before(to)
		if unknown && end || err != nil && !end {
			loss.Count = -1
		}
		if end {
			return records, loss, nil
		}
		if err != nil {
			return records, loss, err
		}
		records++
		told := counted(l, name)
		unknown = unknown || told < 0
		loss.Count += 1 + max(told, 0)
		ts := l.TS()
		if loss.From.IsZero() || ts.Before(loss.From) {
			loss.From = ts
		}
		loss.To = latest(loss.To, ts)
	}
}

// counted is how many records a loss record says that the sink name did not get; -1
// where it says that nobody knows.
func counted(l Line, name string) int64 {
	if l.Kind() != record.KindLoss {
		return 0
	}
	var r struct{ Loss record.Loss }
	if json.Unmarshal(l.Data, &r) != nil || r.Loss.Cause == "disk_cap" && r.Loss.Source != name {
		return 0
	}
	return r.Loss.Count
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
