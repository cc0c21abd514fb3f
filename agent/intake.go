package agent

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
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

// intake is the one way into the journal: it drops doubles, completes records,
// appends them and counts them.
type intake struct {
	a *Agent

	mu      sync.Mutex
	seen    map[string]struct{}
	order   []string // ring of the ids in seen
	next    int
	buf     []byte
	pending []*record.Record
	lost    record.Loss // of pending records, not yet told
	counts  Counts
	said    time.Time // when a trouble was last logged

	opened atomic.Bool  // losses go straight into the journal
	told   atomic.Int64 // those that did

	lossMu sync.Mutex
	losses []*record.Record // told by loss, not yet pending
}

// Counts are what the intake did since the agent started.
type Counts struct {
	Records    int64 `json:"records"`    // appended to the journal
	Duplicates int64 `json:"duplicates"` // dropped, because their id was there already
	Rejected   int64 `json:"rejected"`   // not taken by the journal; the sender kept them
	Refused    int64 `json:"refused"`    // messages that were no records of an invocation
	Spooled    int64 `json:"spooled"`    // records that came by the shim's append files
	Socket     int64 `json:"socket"`     // records that came by the socket
	Ends       int64 `json:"ends"`       // ends of invocations that were seen
	Pending    int64 `json:"pending"`    // records of the agent's own that wait for room
}

func newIntake(a *Agent) *intake {
	return &intake{a: a, seen: make(map[string]struct{}), order: make([]string, 0, seenMax)}
}

// remember reads the ids at the end of the journal, so that what a dead agent took
// from an append file is not taken again.
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
	for {
		line, err := r.Next()
		if err != nil {
			return
		}
		in.note(string(line.ID()))
	}
}

// note remembers an id and tells whether it was known.
func (in *intake) note(id string) (known bool) {
	if _, known = in.seen[id]; known {
		return true
	}
	if len(in.order) < seenMax {
		in.order = append(in.order, id)
	} else {
		delete(in.seen, in.order[in.next])
		in.order[in.next] = id
		in.next = (in.next + 1) % seenMax
	}
	in.seen[id] = struct{}{}
	return false
}

func (in *intake) forget(id string) { delete(in.seen, id) }

// write appends records; all are in the journal where it returns nil, and none
// otherwise, as far as the caller needs to know: what was taken in part is known by
// its id when it comes again.
func (in *intake) write(records []*record.Record) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.writeLocked(records)
}

func (in *intake) writeLocked(records []*record.Record) error {
	in.buf = in.buf[:0]
	fresh := records[:0:0]
	ends := make([]int, 0, len(records))
	for _, r := range records {
		if in.note(r.ID) {
			in.counts.Duplicates++
			continue
		}
		if r.Schema == 0 {
			r.Schema = record.SchemaVersion
		}
		if r.Host == nil {
			r.Host = &in.a.o.Host
		}
		in.buf = record.Append(in.buf, r)
		fresh = append(fresh, r)
		ends = append(ends, len(in.buf))
	}
	if len(fresh) == 0 {
		return nil
	}
	err := in.a.journal.Append(in.buf)
	taken := len(fresh)
	if err != nil {
		taken = 0
		var part *journal.AppendError
		if errors.As(err, &part) {
			for taken < len(ends) && ends[taken] <= part.Whole {
				taken++
			}
		}
		for _, r := range fresh[taken:] {
			in.forget(r.ID)
		}
		in.counts.Rejected += int64(len(fresh) - taken)
		in.troubleLocked("append to the journal", err)
	}
	in.counts.Records += int64(taken)
	for _, r := range fresh[:taken] {
		in.a.metrics.Observe(r)
	}
	return err
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
	if over := len(in.pending) - pendingMax; over > 0 {
		first, last := in.pending[0].TS, in.pending[over-1].TS
		if in.lost.Count == 0 {
			in.lost = record.Loss{Cause: "disk_full", Source: "agent", From: first}
		}
		in.lost.Count += int64(over)
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
	c := in.counts
	c.Records += in.told.Load()
	return c
}
