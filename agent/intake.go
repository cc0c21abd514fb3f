package agent

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tallyman-ci/tallyman/explain"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

const (
	// seenMax is how many ids are remembered to drop the second copy of a record that
	// came by socket and by file. A copy follows within seconds.
	seenMax = 1 << 16
	// pendingMax is how many of the agent's own records (ends, job records, losses)
	// wait while the journal has no room. Then the oldest go, counted.
	pendingMax = 4096
	// retryEvery is how often the waiting records are tried again.
	retryEvery = time.Second
)

// intake is the one way into the journal: it drops doubles, holds back what is beyond a
// job's share, completes records, appends them and counts them.
type intake struct {
	a *Agent

	mu      sync.Mutex
	seen    map[string]sender
	order   []string // ring of the ids in seen
	next    int
	batch   batch
	line    []byte
	pending []*record.Record
	lost    record.Loss // of pending records, not yet told
	counts  Counts
	said    time.Time // when a trouble was last logged
	calls   *limiter
	events  *limiter
	book    *explain.Book
	running map[string]*record.Record // of a dead agent: calls without an end, newest maxWatched

	opened atomic.Bool  // losses go straight into the journal
	told   atomic.Int64 // those that did

	lossMu sync.Mutex
	losses []*record.Record // told by loss, not yet pending
}

// sender is what is remembered of where an id came from first.
type sender struct {
	pid    int32 // of the command that sent it, 0 where unknown or where nobody sent it
	byFile bool
}

// arrival is a record on its way into the journal, and what became of it.
type arrival struct {
	r       *record.Record
	share   string   // the bucket that it is charged to; "" for the agent's own records
	limiter *limiter // of the bucket
	size    int      // of the line that came, in bytes
	from    sender

	verdict verdict
	first   sender // of a duplicate: who sent the id first
}

type verdict uint8

const (
	waiting    verdict = iota // not decided, or the journal had no room
	journalled                // appended
	duplicate                 // its id was there already
	suppressed                // beyond its job's share; counted
	refused                   // nothing that the journal could give back
)

// Counts are what the intake did since the agent started.
type Counts struct {
	Records    int64 `json:"records"`    // appended to the journal
	Duplicates int64 `json:"duplicates"` // dropped, because their id was there already
	Rejected   int64 `json:"rejected"`   // not taken by the journal; the sender kept them
	Refused    int64 `json:"refused"`    // messages and lines that were no records of an invocation
	Suppressed int64 `json:"suppressed"` // records beyond the share of their job (rate_limited)
	Spooled    int64 `json:"spooled"`    // records that came by the shim's append files
	Socket     int64 `json:"socket"`     // records that came by the socket
	Ends       int64 `json:"ends"`       // ends of invocations that were seen
	Pending    int64 `json:"pending"`    // records of the agent's own that wait for room
	// Explained and Unattributed are the daemon's events that a recorded call explains,
	// and those that none does: the work of who went past the shim.
	Explained    int64 `json:"events_explained"`
	Unattributed int64 `json:"events_unattributed"`
}

func newIntake(a *Agent) *intake {
	c := &a.o.Config
	return &intake{
		a: a, seen: make(map[string]sender), order: make([]string, 0, 1024), book: explain.New(), running: make(map[string]*record.Record),
		calls:  newLimiter("agent", "calls of one job", c.JobRate, c.JobBurst, a.now),
		events: newLimiter("events", "events of one job", c.EventRate, c.EventBurst, a.now),
	}
}

// remember reads the end of the journal: the ids, so that what a dead agent took
// from an append file is not taken again, and the calls that had not ended.
func (in *intake) remember(j *journal.Journal) {
	end := j.End()
	const tail = 4 << 20
	from := journal.Position{Segment: end.Segment, Offset: max(0, end.Offset-tail)}
	if end.Offset < tail && end.Segment > 0 {
		from = journal.Position{Segment: end.Segment - 1}
	}
	r, err := j.Reader(from)
	if err != nil {
		return // doubles keep their id; the reader of the journal drops them too
	}
	defer r.Close()
	var calls []string // in their order
	for {
		line, err := r.Next()
		if err != nil {
			break
		}
		in.note(string(line.ID()), sender{})
		switch line.Kind() {
		case record.KindInvocation:
			rec := new(record.Record)
			if recordjson.Unmarshal(line.Data, rec) == nil && rec.Invocation != nil {
				in.running[rec.ID] = slim(rec, len(line.Data))
				calls = append(calls, rec.ID)
			}
		case record.KindInvocationEnd:
			rec := new(record.Record)
			if recordjson.Unmarshal(line.Data, rec) == nil && rec.End != nil {
				delete(in.running, rec.End.InvocationID)
			}
		}
		for len(in.running) > maxWatched { // each is looked for at the start
			delete(in.running, calls[0])
			calls = calls[1:]
		}
	}
}

// note remembers an id and tells who sent it first where it was known.
func (in *intake) note(id string, from sender) (first sender, known bool) {
	if first, known = in.seen[id]; known {
		return first, true
	}
	if len(in.order) < seenMax {
		in.order = append(in.order, id)
	} else {
		delete(in.seen, in.order[in.next])
		in.order[in.next] = id
		in.next = (in.next + 1) % seenMax
	}
	in.seen[id] = from
	return sender{}, false
}

func (in *intake) forget(id string) { delete(in.seen, id) }

// take brings records into the journal and says of each what became of it. Where it
// returns an error, those that are still waiting are not in the journal; whoever
// brought them keeps them.
func (in *intake) take(arrivals []arrival) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.takeLocked(arrivals)
}

// chunk is how much is written at once. The journal's segments may be as small.
func (in *intake) chunk() int {
	c := &in.a.o.Config
	return int(max(min(256<<10, c.SegmentMaxBytes, c.JournalMaxBytes/4), journal.MaxLine+1))
}

func (in *intake) takeLocked(arrivals []arrival) error {
	room := in.chunk()
	for i := range arrivals {
		a := &arrivals[i]
		if a.verdict != waiting {
			continue
		}
		var known bool
		if a.first, known = in.note(a.r.ID, a.from); known {
			a.verdict = duplicate
			in.counts.Duplicates++
			continue
		}
		if a.r.Host == nil {
			a.r.Host = &in.a.o.Host
		}
		if a.share != "" && !a.limiter.admit(a.share, a.r, a.size) {
			a.verdict = suppressed
			in.counts.Suppressed++
			continue
		}
		if a.r.Schema == 0 {
			a.r.Schema = record.SchemaVersion
		}
		in.line = record.Append(in.line[:0], a.r)
		if !storable(in.line) {
			in.refuseLocked(a)
			continue
		}
		if len(in.batch.lines)+len(in.line) > room {
			if err := in.appendLocked(); err != nil {
				in.forget(a.r.ID)
				return err
			}
		}
		in.batch.add(a, in.line)
	}
	return in.appendLocked()
}

// batch is what is written at once.
type batch struct {
	arrivals []*arrival
	lines    []byte
	ends     []int // of each arrival's line in lines
}

func (b *batch) add(a *arrival, line []byte) {
	b.arrivals, b.lines = append(b.arrivals, a), append(b.lines, line...)
	b.ends = append(b.ends, len(b.lines))
}

// remove takes arrival i out.
func (b *batch) remove(i int) {
	from, to := 0, b.ends[i]
	if i > 0 {
		from = b.ends[i-1]
	}
	b.arrivals, b.lines, b.ends = slices.Delete(b.arrivals, i, i+1), slices.Delete(b.lines, from, to), slices.Delete(b.ends, i, i+1)
	for k := i; k < len(b.ends); k++ {
		b.ends[k] -= to - from
	}
}

func (b *batch) reset() {
	clear(b.arrivals)
	b.arrivals, b.lines, b.ends = b.arrivals[:0], b.lines[:0], b.ends[:0]
}

// appendLocked writes the batch. Where it returns an error, what was not taken is
// waiting again.
func (in *intake) appendLocked() error {
	b := &in.batch
	defer b.reset()
	for len(b.arrivals) > 0 {
		err := in.a.journal.Append(b.lines)
		var line *journal.LineError
		if errors.As(err, &line) {
			// One that the journal does not take must not keep the others out.
			in.refuseLocked(b.arrivals[line.Index])
			b.remove(line.Index)
			continue
		}
		taken := len(b.arrivals)
		if err != nil {
			taken = 0
			var part *journal.AppendError
			if errors.As(err, &part) {
				for taken < len(b.ends) && b.ends[taken] <= part.Whole {
					taken++
				}
			}
			in.troubleLocked("append to the journal", err)
		}
		for i, a := range b.arrivals {
			if i >= taken {
				in.forget(a.r.ID)
				in.counts.Rejected++
				continue
			}
			a.verdict = journalled
			in.counts.Records++
			in.a.metrics.Observe(a.r)
			in.explainLocked(a.r)
		}
		return err
	}
	return nil
}

// storable says whether the journal and all its readers take the line: short enough,
// and without the start of another record within, which a reader could take for one
// where a line is torn. Only members that this build does not know can hold that.
func storable(line []byte) bool {
	return len(line)-1 <= journal.MaxLine && bytes.LastIndex(line, []byte(record.Marker)) == 0
}

func (in *intake) refuseLocked(a *arrival) {
	a.verdict = refused
	in.counts.Refused++
	in.forget(a.r.ID)
}

// explainLocked keeps the book of which calls explain which events.
func (in *intake) explainLocked(r *record.Record) {
	switch {
	case r.Invocation != nil:
		in.book.Call("", r.ID, r.TS, r.Invocation.Tool, r.Invocation.Command, r.Invocation.Images)
	case r.End != nil:
		in.book.End("", r.End.InvocationID, r.TS, r.End.Source != sourceUnknown)
	case r.Event != nil:
		e := r.Event
		at := r.TS
		if !e.Replayed && !e.Received.IsZero() {
			at = e.Received // the daemon's clock may be another machine's
		}
		in.book.Event("", explain.Event{At: at, Type: e.Type, Action: e.Action, Actor: e.ActorID, Container: e.Container, Image: e.Image, Counted: !r.OutsideJob})
	}
}

// writeLocked appends records of the agent's own.
func (in *intake) writeLocked(records []*record.Record) error {
	arrivals := make([]arrival, len(records))
	for i, r := range records {
		arrivals[i].r = r
	}
	return in.takeLocked(arrivals)
}

// takeRunning returns, once, the calls that a dead agent saw begin and not end.
func (in *intake) takeRunning() map[string]*record.Record {
	in.mu.Lock()
	defer in.mu.Unlock()
	running := in.running
	in.running = nil
	return running
}

// keep appends a record that the agent made itself. Where the journal has no room it
// waits in memory, bounded.
func (in *intake) keep(r *record.Record) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.pending = append(in.pending, r)
	in.retryLocked()
}

// loss records that something is missing. The journal calls it from inside an
// append, while mu is held, and counts on it that the loss is kept when it returns:
// the record goes into the journal past writeLocked. While the agent opens, or where
// there is no room, it waits for the next retry.
//
// The id is derived: a loss that the journal tells again after a kill is the same.
func (in *intake) loss(l record.Loss) {
	ts := l.To
	if ts.IsZero() {
		ts = in.a.now()
	}
	r := &record.Record{
		ID: record.DeriveID(ts, "loss", l.Cause, l.Source, l.Detail, strconv.FormatInt(l.Count, 10), strconv.FormatInt(l.From.UnixNano(), 10), strconv.FormatInt(ts.UnixNano(), 10)),
		TS: ts, Kind: record.KindLoss, Schema: record.SchemaVersion, By: record.ByNone, Loss: &l, Host: &in.a.o.Host,
	}
	in.a.stampByTime(r)
	in.a.log.Warn("records are missing", "cause", l.Cause, "count", l.Count, "source", l.Source, "detail", l.Detail)
	if in.opened.Load() && in.a.journal.Append(record.Append(nil, r)) == nil {
		in.told.Add(1)
		in.a.metrics.Observe(r)
		return
	}
	in.lossMu.Lock()
	defer in.lossMu.Unlock()
	in.losses = append(in.losses, r)
}

// begin ends the time in which losses wait: all cursors are open now.
func (in *intake) begin() {
	in.opened.Store(true)
	in.retry()
}

func (in *intake) retry() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.retryLocked()
}

func (in *intake) retryLocked() {
	in.lossMu.Lock()
	in.pending = append(in.pending, in.losses...)
	in.losses = nil
	in.lossMu.Unlock()
	in.pending = append(append(in.pending, in.calls.losses()...), in.events.losses()...)
	if over := len(in.pending) - pendingMax; over > 0 {
		first, last := in.pending[0].TS, in.pending[over-1].TS
		if in.lost.Count == 0 {
			in.lost = record.Loss{Cause: "disk_full", Source: "agent", From: first}
		}
		for _, r := range in.pending[:over] {
			in.lost.Count++
			if r.Loss != nil && r.Loss.Count > 0 { // what it told of is not told now
				in.lost.Count += r.Loss.Count - 1
			}
		}
		in.lost.To = last
		in.pending = in.pending[over:]
	}
	if len(in.pending) > 0 && in.writeLocked(in.pending) == nil {
		in.pending = nil
	}
	if in.lost.Count > 0 && len(in.pending) == 0 {
		l := in.lost
		r := &record.Record{ID: record.NewID(in.a.now()), TS: l.To, Kind: record.KindLoss, By: record.ByNone, Loss: &l}
		in.a.stampByTime(r)
		if in.writeLocked([]*record.Record{r}) == nil {
			in.lost = record.Loss{}
		}
	}
	in.counts.Pending = int64(len(in.pending))
}

// run tries waiting records again until ctx ends.
func (in *intake) run(ctx context.Context) {
	t := time.NewTicker(retryEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			in.retry()
			return
		case <-t.C:
			in.retry()
		}
	}
}

func (in *intake) trouble(doing string, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.troubleLocked(doing, err)
}

// troubleLocked logs an error that repeats with every record once a minute.
func (in *intake) troubleLocked(doing string, err error) {
	if now := in.a.now(); now.Sub(in.said) > time.Minute || now.Before(in.said) {
		in.said = now
		in.a.log.Error("cannot "+doing, "error", err)
	}
}

func (in *intake) count(f func(*Counts)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f(&in.counts)
}

func (in *intake) status() Counts {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.book.Advance(in.a.now())
	c, b := in.counts, in.book.Counts()
	c.Records += in.told.Load()
	c.Explained, c.Unattributed = b.Explained, b.Unattributed
	return c
}
