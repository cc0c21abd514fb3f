package events

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

const (
	// lookBack is how far before the last event a replay begins. The daemon takes
	// an event's time before it takes the lock that orders events, so neighbours
	// may be out of order (moby, daemon/events/events.go).
	lookBack = 2 * time.Second
	// maxLine bounds one event; labels are the only thing that can make one long.
	maxLine = 8 << 20
)

// ErrStreamed is why a stream is not opened where another process of this machine has
// one from the same daemon: every event would be counted twice.
var ErrStreamed = errors.New("the events of this daemon are streamed already")

var (
	errHalfOpen = errors.New("the stream is dead: the daemon has events that did not come through it")
	errFrozen   = errors.New("the daemon does not answer")
	errNoStream = errors.New("the answer is no event stream")
)

// read keeps a session with the daemon until ctx ends, or with Options.Yield until
// another process turns out to have one.
func (s *Streamer) read(ctx context.Context, at cursor) error {
	r := reader{s: s, at: at, began: time.Now(), lock: streamLock{dir: s.opts.LockDir, log: s.log}}
	defer r.lock.release()
	r.decoder.labels = make(map[string]bool, len(s.opts.Labels))
	for _, l := range s.opts.Labels {
		r.decoder.labels[l] = true
	}
	for _, key := range at.Recent {
		r.recent.add(key)
	}
	r.at.Recent = nil
	wait := s.timing.retryMin
	logged := ""
	for ctx.Err() == nil {
		opened := time.Now()
		err := r.session(ctx)
		s.update(func(st *Status) { st.Connected, st.Error = false, err.Error() })
		if ctx.Err() != nil {
			return nil
		}
		if s.opts.Yield && errors.Is(err, ErrStreamed) {
			return err
		}
		r.failed = true
		limit := s.timing.retryMax
		var refused *statusError
		if errors.As(err, &refused) || errors.Is(err, errNoStream) {
			limit = s.timing.refusedMax
		}
		if time.Since(opened) >= s.timing.stable {
			wait, logged = s.timing.retryMin, ""
		}
		// A daemon that is away is asked up to ten times a second: once is enough.
		if text := err.Error(); text != logged {
			s.log.Info("no event stream, trying again", "error", err)
			logged = text
		}
		if errors.Is(err, errHalfOpen) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, limit)
	}
	return nil
}

// reader is the state of the reading goroutine across sessions.
type reader struct {
	s       *Streamer
	decoder decoder
	at      cursor // the last event read, not yet handed out
	recent  recent
	began   time.Time
	opened  bool          // a session was open before
	failed  bool          // an attempt to open one failed
	waited  time.Duration // for the daemon, to be told with the first event
	lock    streamLock
}

// session connects, reads the stream to its end and returns why it ended.
func (r *reader) session(ctx context.Context) error {
	s := r.s
	d, err := openDaemon(s.opts.Host)
	if err != nil {
		return err
	}
	defer d.close()
	d.opening = s.timing.open
	s.update(func(st *Status) { st.Host = d.host() })
	id, err := d.identify(ctx)
	if err != nil {
		return err
	}
	if err := r.lock.acquire(id.Engine, d.host()); err != nil {
		return err
	}
	now := s.now() // after the daemon read its clock, so that since errs to the early side
	if id.Now.IsZero() {
		id.Now = now
	}
	since := r.since(id, now)
	stream, err := d.events(ctx, since)
	if err != nil {
		return err
	}
	r.announce(d, id, since)

	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	closed := make(chan struct{})
	context.AfterFunc(ctx, func() {
		stream.Close() // ends a Read
		close(closed)
	})
	ss := &session{reader: r, daemon: &id, since: since, known: r.known(), joint: newJoint(r.at, since, id, r.opened), resync: make(chan struct{}, 1)}
	ss.heard.Store(time.Now().UnixNano())
	if !r.opened {
		ss.resync <- struct{}{} // for the containers that run already
	}
	r.opened = true
	var watch sync.WaitGroup
	watch.Go(func() { ss.watch(ctx, d, end) })
	watch.Go(func() { ss.list(ctx, d) })

	err = ss.lines(stream)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	end(nil)
	<-closed
	watch.Wait()
	ss.finish()
	switch {
	case errors.Is(err, io.EOF) && ss.count == 0 && ss.bad > 0:
		return fmt.Errorf("%w: %d lines were read, and none was an event", errNoStream, ss.bad)
	case errors.Is(err, io.EOF):
		return errors.New("the daemon closed the event stream")
	}
	return err
}

// since is where the replay of the next session begins, in the daemon's time.
func (r *reader) since(id identity, now time.Time) int64 {
	if r.at.Key != 0 {
		return max(r.at.TimeNano-int64(lookBack), 1)
	}
	// A time of our clock, not of an event. It is put on the daemon's clock where
	// the two differ by more than the call can have taken.
	if skew := id.Now.Sub(now); r.at.Engine == "" && (skew > lookBack || skew < -lookBack) {
		return max(r.at.TimeNano+int64(skew), 1)
	}
	return max(r.at.TimeNano, 1)
}

func (r *reader) announce(d *daemon, id identity, since int64) {
	s := r.s
	waited := time.Duration(0)
	if !r.opened {
		waited = time.Since(r.began)
		if r.failed {
			r.waited = waited
		}
	}
	s.update(func(st *Status) {
		st.Connected, st.Error = true, ""
		st.Engine, st.ServerVersion, st.APIVersion = id.Engine, id.Version, id.API
		st.Sessions++
		if !r.opened {
			st.Waited = waited
		}
	})
	said := []any{"host", d.host(), "version", id.Version, "api", id.API, "since", time.Unix(0, since).UTC()}
	if waited > 0 { // it is measured for the first session alone
		said = append(said, "waited", waited.Round(time.Millisecond))
	}
	s.log.Info("event stream open", said...)
}

// known returns the keys of the events that a replay may bring again.
func (r *reader) known() map[uint64]bool {
	set := make(map[uint64]bool)
	for _, k := range r.recent.newest(len(r.recent.keys)) {
		set[k] = true
	}
	return set
}

// session is one open stream.
type session struct {
	reader *reader
	daemon *identity
	since  int64           // where the replay began
	known  map[uint64]bool // keys read before; nil when the replay is over
	count  int             // events read
	bad    int             // lines that were none
	now    int64           // our time of the last Read

	// heard is the time of the last Read that brought something; reached is the
	// daemon's time of the last event, 0 before the first. Both are for the watch.
	heard, reached atomic.Int64
	// resync asks the watch to list the running containers.
	resync chan struct{}

	mu    sync.Mutex // guards joint: the watch settles it when nothing comes
	joint joint
}

// input is the stream as bufio reads it: before each Read, which may wait, the
// taker is woken for what came so far, and after it the clock is read, once for
// the some hundred events of a full buffer.
type input struct {
	ss     *session
	stream io.Reader
}

func (in input) Read(p []byte) (int, error) {
	ss := in.ss
	ss.reader.s.queue.ready()
	if ss.count > 0 {
		ss.reached.Store(ss.reader.at.TimeNano)
	}
	n, err := in.stream.Read(p)
	ss.now = ss.reader.s.now().UnixNano()
	if n > 0 {
		ss.heard.Store(time.Now().UnixNano())
	}
	return n, err
}

// errTooLong is returned for a line of more than maxLine bytes, which is passed over.
var errTooLong = fmt.Errorf("an event of more than %d bytes", maxLine)

// lineReader reads lines of any length in bounded memory.
type lineReader struct {
	in   *bufio.Reader
	long []byte // of a line that is longer than the buffer
}

func newLineReader(r io.Reader) *lineReader {
	return &lineReader{in: bufio.NewReaderSize(r, 64<<10)}
}

// next returns the next whole line, which holds until the next call, or errTooLong.
// The rest of a stream that has no newline is no event: the replay brings it whole.
func (l *lineReader) next() ([]byte, error) {
	l.long = l.long[:0]
	skip := false
	for {
		part, err := l.in.ReadSlice('\n')
		skip = skip || len(l.long)+len(part) > maxLine
		switch {
		case err == nil && skip:
			l.long = nil
			return nil, errTooLong
		case err == nil && len(l.long) == 0:
			return part, nil
		case err == nil:
			line := append(l.long, part...)
			l.long = nil
			return line, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		case skip:
			l.long = nil
		default:
			l.long = append(l.long, part...)
		}
	}
}

// lines reads the stream until it ends.
func (ss *session) lines(stream io.Reader) error {
	in := newLineReader(input{ss, stream})
	for {
		switch line, err := in.next(); {
		case err == nil:
			ss.line(line)
		case errors.Is(err, errTooLong):
			ss.unreadable(err.Error())
		default:
			return err
		}
	}
}

func (ss *session) unreadable(detail string) {
	ss.bad++
	now := ss.reader.s.now().UTC()
	ss.reader.s.update(func(st *Status) { st.Unreadable++ })
	ss.reader.s.queue.loseLater(record.Loss{Cause: "torn_line", Count: 1, Source: source, From: now, To: now, Detail: detail})
}

// line takes one line of the stream.
func (ss *session) line(line []byte) {
	if line = bytes.TrimSpace(line); len(line) == 0 {
		return
	}
	r := ss.reader
	m, err := r.decoder.decode(line)
	if err != nil {
		ss.unreadable("a line of the event stream that is no event")
		return
	}
	m.received, m.daemon, m.key = ss.now, ss.daemon, m.hash()
	ss.count++
	if ss.known != nil {
		known := ss.known[m.key]
		ss.mu.Lock()
		ss.joint.see(&m, known)
		m.replayed = ss.joint.again && ss.count <= bufferedEvents && m.nano <= ss.joint.opened
		full := ss.joint.lines >= bufferedEvents
		ss.mu.Unlock()
		if known {
			r.s.update(func(st *Status) { st.Duplicates++ })
			return
		}
		if full {
			ss.settle()
		}
		if ss.count > len(r.recent.keys) {
			ss.known = nil
		}
	}
	m.waited, r.waited = r.waited, 0
	r.recent.add(m.key)
	r.at = cursor{TimeNano: m.nano, Key: m.key, Engine: ss.daemon.Engine, Life: ss.daemon.Life}
	r.s.queue.push(&m)
}

// settle decides whether the replay joined, and reports a gap if not.
func (ss *session) settle() {
	ss.mu.Lock()
	loss, at := ss.joint.settle()
	ss.mu.Unlock()
	s := ss.reader.s
	if loss != nil {
		s.log.Warn("events are missing", "cause", loss.Cause, "from", loss.From, "to", loss.To, "detail", loss.Detail)
		s.update(func(st *Status) { st.Gaps++ })
		s.queue.lose(*loss)
		select {
		case ss.resync <- struct{}{}:
		default:
		}
	}
	if at.TimeNano != 0 {
		s.queue.move(at)
	}
}

// finish ends a session in which nothing reads or watches any more.
func (ss *session) finish() {
	j, r := &ss.joint, ss.reader
	if j.certain() {
		ss.settle()
	}
	if j.settled && !j.joined && r.at.Key == j.from.Key && r.at.TimeNano == j.from.TimeNano {
		r.at = j.end()
	}
	r.s.queue.ready()
}

// watch settles the replay and probes the stream when it is silent.
func (ss *session) watch(ctx context.Context, d *daemon, end context.CancelCauseFunc) {
	t := ss.reader.s.timing
	settle := time.NewTimer(t.settle)
	defer settle.Stop()
	silence := time.NewTimer(t.idle)
	defer silence.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-settle.C:
			ss.settle()
		case <-silence.C:
			silent := time.Since(time.Unix(0, ss.heard.Load()))
			if silent >= t.idle {
				if err := ss.probe(ctx, d); err != nil && ctx.Err() == nil {
					end(err)
					return
				}
				silent = 0
			}
			silence.Reset(t.idle - silent)
		}
	}
}

// probe asks on a second connection whether the daemon has events that this stream
// did not bring. A quiet stream and a dead one look the same: the protocol has no
// heartbeat, and keepalives reach only as far as the next proxy.
func (ss *session) probe(ctx context.Context, d *daemon) error {
	wait := ss.reader.s.timing.probe
	before, reached := ss.heard.Load(), ss.reached.Load()
	since := reached
	if reached == 0 {
		since = ss.since
	}
	stream, err := d.events(ctx, since)
	if err != nil {
		return fmt.Errorf("%w: %w", errFrozen, err)
	}
	defer stream.Close()
	// The replay comes at once, then the stream stays open.
	stop := time.AfterFunc(wait, func() { stream.Close() })
	defer stop.Stop()
	in := newLineReader(stream)
	var dec decoder
	seen, newer := false, false
	for !newer {
		line, err := in.next()
		if err != nil && !errors.Is(err, errTooLong) {
			break
		}
		if m, err := dec.decode(line); err == nil {
			seen = true
			newer = m.nano > reached
		}
	}
	if newer {
		// The same event must come through the stream as well.
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	// since is inclusive: a daemon that no longer has the last event at all is
	// another daemon than the one at the other end of the stream.
	if (newer || !seen && reached != 0) && ss.heard.Load() == before {
		return errHalfOpen
	}
	return nil
}

// list looks up the starts of the running containers whenever it is asked to, so
// that the end of each has a duration although its start was not seen.
func (ss *session) list(ctx context.Context, d *daemon) {
	s := ss.reader.s
	for {
		select {
		case <-ctx.Done():
			return
		case <-ss.resync:
		}
		started, images, err := d.running(ctx)
		if ctx.Err() != nil {
			return
		}
		select {
		case s.resyncs <- started:
		case <-ctx.Done():
			return
		}
		if err != nil {
			s.log.Warn("containers and images not listed: some containers will end without a duration", "error", err)
		} else {
			s.log.Info("containers and images listed", "running", len(started), "images", images)
		}
	}
}
