// Package events turns the event stream of a Docker daemon into records.
//
// An event flows one way. A reader goroutine takes lines from the daemon's stream,
// decodes them (decode.go), drops what it has seen before, and puts them into a
// bounded queue (queue.go); it waits for nothing but the daemon. The goroutine of
// Run takes them from the queue, makes records of them (convert.go) and hands them
// out in batches. Only then does the cursor move (cursor.go), from which the next
// process, or the next session after the daemon was away, asks for a replay.
//
// The package promises that each event comes out once, with the same id if it must
// come twice, and that what cannot come out is a record of kind loss: the daemon
// keeps 256 events for a replay and nothing over a restart (session.go), and the
// queue drops its oldest when the taker is stuck. It never keeps the command line
// of an exec, and of labels only those that are asked for.
//
// Only docker.go knows the Docker client.
package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// source is the part named in losses.
const source = "events"

// maxBatch is the number of events handed out at once.
const maxBatch = 256

// Options say where the daemon is and what to keep. The zero value reads from the
// default daemon and starts now.
type Options struct {
	// Host is the daemon's address in the form of DOCKER_HOST (unix:// or tcp://).
	// Empty means the environment's DOCKER_HOST, else the default socket.
	Host string
	// StatePath is the file that keeps the cursor; empty means none is kept, and
	// events between two processes are missing without a record.
	StatePath string
	// Since is where a first start, with no cursor yet, begins: the time the
	// job-started hook ran. The daemon's buffer of 256 events bounds how far back
	// it reaches. Zero means the time of Run.
	Since time.Time
	// Labels are the names of the container and image labels to keep.
	Labels []string
	// LockDir is a folder for the lock that lets one process of this machine stream
	// the events of a daemon, however it is addressed; empty means no lock. A lock
	// that cannot be made is logged, and the events are streamed all the same.
	LockDir string
	// Yield makes Run return ErrStreamed where another process has the lock.
	// Otherwise it waits, and goes on from its own cursor when the other one ends.
	Yield bool
	// QueueSize is the number of events that wait at most when out is slow; then
	// the oldest are dropped, counted, and reported as a loss. Default 8192, about
	// 6 MB when full.
	QueueSize int
	// Logger gets what an operator may want to know. Default: slog.Default.
	Logger *slog.Logger
	// Now is the clock. Default: time.Now.
	Now func() time.Time
}

// Status is what a Streamer is doing. Times are the daemon's unless said.
type Status struct {
	Host          string        `json:"host"`                     // the daemon's address
	Connected     bool          `json:"connected"`                // a stream is open
	Engine        string        `json:"engine,omitempty"`         // the daemon's id
	ServerVersion string        `json:"server_version,omitempty"` // the daemon's version
	APIVersion    string        `json:"api_version,omitempty"`    // the negotiated API version
	Waited        time.Duration `json:"waited_ns,omitempty"`      // how long the first connection had to wait for the daemon
	Sessions      int64         `json:"sessions"`                 // streams opened
	Events        int64         `json:"events"`                   // events handed out
	Replayed      int64         `json:"replayed"`                 // of these, read again from the daemon's buffer
	Duplicates    int64         `json:"duplicates"`               // events of a replay that were known already
	Unreadable    int64         `json:"unreadable"`               // lines that were no event
	Dropped       int64         `json:"dropped"`                  // events dropped because the queue was full
	Gaps          int64         `json:"gaps"`                     // losses reported because a replay did not reach back
	Queued        int           `json:"queued"`                   // events waiting now
	LastEvent     time.Time     `json:"last_event,omitzero"`      // time of the last event handed out
	Error         string        `json:"error,omitempty"`          // why it is not connected
}

// Streamer reads the events of one daemon. Run it once; Status may be called at
// any time from any goroutine.
type Streamer struct {
	opts   Options
	timing timing
	log    *slog.Logger
	now    func() time.Time
	queue  *queue
	// resyncs carries lists of running containers to the converter.
	resyncs chan map[string]int64

	mu     sync.Mutex
	status Status
}

// timing holds the waits, so that tests need not wait as long.
type timing struct {
	retryMin, retryMax, refusedMax time.Duration // between connection attempts
	stable                         time.Duration // a session this long resets the wait
	open                           time.Duration // for each call that opens a stream
	settle                         time.Duration // for the replay to reach the cursor
	idle                           time.Duration // silence after which the stream is probed
	probe                          time.Duration // for the answer to a probe
	save                           time.Duration // between two saves of the cursor
	drain                          time.Duration // for handing out the rest at the end
}

var defaultTiming = timing{
	retryMin: 100 * time.Millisecond, retryMax: 2 * time.Second, refusedMax: 30 * time.Second,
	stable: 5 * time.Second, open: 2 * callTimeout, settle: 5 * time.Second,
	idle: 20 * time.Second, probe: 10 * time.Second,
	save: 200 * time.Millisecond, drain: time.Second,
}

// New makes a Streamer. Nothing is dialled before Run.
func New(o Options) *Streamer {
	if o.QueueSize <= 0 {
		o.QueueSize = 8192
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Streamer{
		opts: o, timing: defaultTiming, log: o.Logger, now: o.Now,
		queue: newQueue(o.QueueSize), resyncs: make(chan map[string]int64, 1),
	}
}

// Status returns a snapshot.
func (s *Streamer) Status() Status {
	queued := s.queue.len()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Queued = queued
	return st
}

func (s *Streamer) update(f func(*Status)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.status)
}

// Run streams until ctx ends, waiting for a daemon that is not up for as long as
// that takes, and hands the records to out in the daemon's order, in batches of at
// most 256 events, from one goroutine. The records have their id, time, kind,
// schema, By=none and the event or loss set; the rest is the caller's to add. out
// may keep them.
//
// While out blocks, events queue up and then drop; the daemon is read all the
// same. When out returns an error the same batch is tried again, with waits up to
// 5 s, until ctx ends.
//
// When ctx ends, what was read is handed out for at most a second, and the cursor
// is saved. Run returns nil then, or out's error if records were left, which a
// next Run will read again. It returns before that with ErrStreamed, see Options.Yield.
func (s *Streamer) Run(ctx context.Context, out func([]*record.Record) error) error {
	begin := s.start()
	// The first stream's connection may hang in a call; it ends with ctx.
	var reader sync.WaitGroup
	var yielded error
	reader.Go(func() {
		defer s.queue.close()
		yielded = s.read(ctx, begin)
	})
	err := s.convert(ctx, begin, out)
	reader.Wait()
	return errors.Join(yielded, err)
}

// start returns where to begin: the cursor of the process before, else Since.
func (s *Streamer) start() cursor {
	first := s.opts.Since
	if first.IsZero() || first.After(s.now()) {
		first = s.now()
	}
	begin := cursor{TimeNano: first.UnixNano()}
	if s.opts.StatePath == "" {
		return begin
	}
	saved, err := loadCursor(s.opts.StatePath)
	switch {
	case err != nil:
		s.log.Warn("event cursor lost, starting over", "error", err, "since", first)
		s.queue.lose(record.Loss{Cause: "cursor_lost", Count: -1, Source: source, To: s.now().UTC(),
			Detail: "the file of the event cursor was damaged: events before this may be missing"})
	case saved.TimeNano > 0:
		return saved
	}
	return begin
}

// convert is the second half of Run: from the queue to out.
func (s *Streamer) convert(ctx context.Context, at cursor, out func([]*record.Record) error) error {
	h := handout{s: s, ctx: ctx, out: out, converter: newConverter(), at: at}
	for _, key := range at.Recent {
		h.recent.add(key)
	}
	defer h.save(true)
	save := time.NewTicker(s.timing.save)
	defer save.Stop()
	for {
		select {
		case <-s.queue.wake:
		case started := <-s.resyncs:
			h.converter.resync(started)
			continue
		case <-save.C:
			h.save(false)
			continue
		}
		for {
			n, losses, after, done := s.queue.take(h.messages[:])
			if err := h.batch(h.messages[:n], losses, after); err != nil {
				return err
			}
			if done {
				return nil
			}
			if n == 0 {
				break
			}
			h.save(false)
			if left := s.queue.len(); left > 0 && h.late() {
				return fmt.Errorf("stopped with %d events not handed out: they will be read again", left)
			}
		}
	}
}

// handout carries batches to out and moves the cursor behind them.
type handout struct {
	s         *Streamer
	ctx       context.Context
	out       func([]*record.Record) error
	converter *converter
	messages  [maxBatch]message

	at     cursor
	recent recent
	dirty  bool
	saved  time.Time
	failed bool // the last save failed, and this was logged
	ended  time.Time
}

// late reports whether ctx ended timing.drain ago or before.
func (h *handout) late() bool {
	if h.ctx.Err() == nil {
		return false
	}
	if h.ended.IsZero() {
		h.ended = time.Now()
	}
	return time.Since(h.ended) >= h.s.timing.drain
}

// batch hands out the records of messages and losses. It returns out's error when
// ctx ended before out took them.
func (h *handout) batch(messages []message, losses []record.Loss, after cursor) error {
	if len(messages)+len(losses) == 0 {
		if after.TimeNano != 0 {
			h.at, h.dirty = after, true
		}
		return nil
	}
	// One allocation for all records of the batch and one for their events.
	records := make([]record.Record, len(messages)+len(losses))
	events := make([]record.Event, len(messages))
	batch := make([]*record.Record, 0, len(records))
	replayed, dropped := int64(0), int64(0)
	for i := range losses {
		if losses[i].Cause == "queue_full" {
			dropped += losses[i].Count
		}
		now := h.s.now()
		r := &records[len(batch)]
		*r = record.Record{ID: record.NewID(now), TS: now.UTC(), Kind: record.KindLoss, Schema: record.SchemaVersion, By: record.ByNone, Loss: &losses[i]}
		batch = append(batch, r)
	}
	for i := range messages {
		r := &records[len(batch)]
		h.converter.convert(&messages[i], r, &events[i])
		batch = append(batch, r)
		if messages[i].replayed {
			replayed++
		}
	}
	if err := h.deliver(batch); err != nil {
		return err
	}
	if after.TimeNano != 0 {
		h.at, h.dirty = after, true
	}
	for i := range messages {
		h.recent.add(messages[i].key)
	}
	if n := len(messages); n > 0 {
		m := &messages[n-1]
		h.at = cursor{TimeNano: m.nano, Key: m.key, Engine: m.daemon.Engine, Life: m.daemon.Life}
		h.dirty = true
	}
	h.s.update(func(st *Status) {
		st.Events += int64(len(messages))
		st.Replayed += replayed
		st.Dropped += dropped
		if len(messages) > 0 {
			st.LastEvent = time.Unix(0, h.at.TimeNano).UTC()
		}
	})
	return nil
}

// deliver calls out until it takes the batch, or ctx ended timing.drain ago.
func (h *handout) deliver(batch []*record.Record) error {
	wait := h.s.timing.retryMin
	for attempt := 1; ; attempt++ {
		err := h.out(batch)
		switch {
		case err == nil && attempt > 1:
			h.s.log.Info("events are taken again", "attempts", attempt)
			return nil
		case err == nil:
			return nil
		case h.late():
			return fmt.Errorf("hand out the last %d records: %w", len(batch), err)
		case attempt == 1:
			h.s.log.Warn("events were not taken, trying again", "error", err, "records", len(batch))
		}
		if h.ctx.Err() != nil {
			time.Sleep(h.s.timing.drain / 10)
			continue
		}
		select {
		case <-h.ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// save writes the cursor if it moved, at most every timing.save unless last.
func (h *handout) save(last bool) {
	if !h.dirty || h.s.opts.StatePath == "" || !last && time.Since(h.saved) < h.s.timing.save {
		return
	}
	h.saved = time.Now()
	h.at.Recent = h.recent.newest(bufferedEvents)
	if err := saveCursor(h.s.opts.StatePath, h.at); err != nil {
		if !h.failed {
			h.s.log.Warn("event cursor not saved: events may come twice after a restart", "error", err)
		}
		h.failed = true
		return
	}
	h.dirty, h.failed = false, false
}
