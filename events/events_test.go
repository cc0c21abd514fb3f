package events

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/e2e/fakedockerd"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick are waits for tests with a fake daemon. None of its streams is probed, but
// those of probed: on a busy machine a live stream can be late for the probe, and would
// be opened anew in the middle of any test.
var quick = timing{
	retryMin: 5 * time.Millisecond, retryMax: 20 * time.Millisecond, refusedMax: 40 * time.Millisecond,
	stable: time.Second, open: 10 * time.Second, settle: 300 * time.Millisecond,
	idle: time.Hour, probe: time.Second,
	save: 10 * time.Millisecond, drain: 300 * time.Millisecond,
}

// probed has the stream probed after a short silence.
func probed(r *running) { r.s.timing.idle = 100 * time.Millisecond }

// fake starts a fake daemon that ends with the test.
func fake(t *testing.T, d *fakedockerd.Daemon) *fakedockerd.Daemon {
	t.Helper()
	if d.Socket == "" {
		d.Socket = filepath.Join(t.TempDir(), "docker.sock")
	}
	if d.Engine == "" {
		d.Engine = "ENGINE"
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Kill)
	return d
}

// running is a Streamer at work and what it handed out.
type running struct {
	t    *testing.T
	s    *Streamer
	stop func() error
	logs *lockedBuffer

	mu      sync.Mutex
	records []*record.Record
	block   chan struct{} // out waits for it to close when set
	fail    error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t *testing.T, d *fakedockerd.Daemon, o Options, change ...func(*running)) *running {
	t.Helper()
	logs := &lockedBuffer{}
	if o.Host == "" {
		o.Host = "unix://" + d.Socket
	}
	o.Logger = slog.New(slog.NewTextHandler(io.MultiWriter(logs, testWriter{t}), nil))
	r := &running{t: t, s: New(o), logs: logs}
	r.s.timing = quick
	for _, c := range change {
		c(r)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.s.Run(ctx, r.out) }()
	var once sync.Once
	var err error
	r.stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(20 * time.Second):
				t.Error("Run did not end within 20 s of its context")
			}
		})
		return err
	}
	t.Cleanup(func() { r.stop() })
	return r
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

func (r *running) out(batch []*record.Record) error {
	r.mu.Lock()
	block, fail := r.block, r.fail
	r.mu.Unlock()
	if block != nil {
		<-block
	}
	if fail != nil {
		return fail
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records = append(r.records, batch...)
	return nil
}

func (r *running) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(3 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 30 s for: %s", what)
		}
	}
}

// actors returns the actor ids of the events handed out, in order.
func (r *running) actors() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for _, rec := range r.records {
		if rec.Event != nil {
			ids = append(ids, rec.Event.ActorID)
		}
	}
	return ids
}

func (r *running) losses() []*record.Loss {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ls []*record.Loss
	for _, rec := range r.records {
		if rec.Loss != nil {
			ls = append(ls, rec.Loss)
		}
	}
	return ls
}

func (r *running) wantActors(n int) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%d events", n), func() bool { return len(r.actors()) >= n })
	got := r.actors()
	seen := map[string]bool{}
	for _, id := range got {
		if seen[id] {
			r.t.Errorf("event %s came twice", id)
		}
		seen[id] = true
	}
	if len(got) != n {
		r.t.Errorf("%d events, want %d", len(got), n)
	}
}

func (r *running) wantLoss(cause string) *record.Loss {
	r.t.Helper()
	eventually(r.t, "loss "+cause, func() bool { return len(r.losses()) > 0 })
	time.Sleep(2 * quick.settle) // a second one would come by now
	ls := r.losses()
	if len(ls) != 1 || ls[0].Cause != cause {
		r.t.Fatalf("losses %+v, want one %s", ls, cause)
	}
	return ls[0]
}

func (r *running) wantNoLoss() {
	r.t.Helper()
	time.Sleep(2 * quick.settle)
	for _, l := range r.losses() {
		r.t.Errorf("unexpected loss: %+v", l)
	}
}

// maker makes events with rising times and distinct actors e1, e2, ...
type maker struct {
	t *testing.T
	n int
	// offset is added to our clock.
	offset time.Duration
}

func (m *maker) next(count int) []fakedockerd.Event {
	var es []fakedockerd.Event
	for range count {
		m.n++
		time.Sleep(time.Microsecond) // times must differ and rise
		nano := time.Now().Add(m.offset).UnixNano()
		es = append(es, fakedockerd.Event{Nano: nano, Line: event(m.t, "image", "tag", fmt.Sprintf("e%d", m.n), nano, map[string]string{"name": "app:1"})})
	}
	return es
}

func subscribed(t *testing.T, d *fakedockerd.Daemon) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := d.WaitSubscribers(ctx, 1); err != nil {
		t.Fatal(err)
	}
}

// EV-01
func TestWaitsForTheDaemon(t *testing.T) {
	faults.Case(t, "EV-01")
	d := &fakedockerd.Daemon{Socket: filepath.Join(t.TempDir(), "docker.sock"), Engine: "E"}
	r := start(t, d, Options{})
	eventually(t, "an error in the status", func() bool { return r.s.Status().Error != "" })
	time.Sleep(100 * time.Millisecond)
	m := maker{t: t}
	fake(t, d)
	d.Publish(m.next(3)...) // perhaps before the stream is open
	r.wantActors(3)
	r.wantNoLoss()
	if st := r.s.Status(); !st.Connected || st.Waited < 100*time.Millisecond || st.APIVersion != "1.41" || st.Engine != "E" {
		t.Errorf("status %+v", st)
	}
	if n := strings.Count(r.logs.String(), "trying again"); n != 1 {
		t.Errorf("%d log lines about waiting, want 1:\n%s", n, r.logs)
	}
	if !strings.Contains(r.logs.String(), "waited=") {
		t.Error("no log line says how long it waited")
	}
	// The first record says so too, and no other.
	r.set(func() {
		for i, rec := range r.records {
			if waited := time.Duration(rec.Event.WaitedNS); (i == 0) != (waited != 0) || i == 0 && waited != r.s.Status().Waited {
				t.Errorf("record %d says that the daemon was waited for %v", i+1, waited)
			}
		}
	})
	if w := defaultTiming; w.retryMin != 100*time.Millisecond || w.retryMax != 2*time.Second {
		t.Errorf("it is tried again after %v to %v", w.retryMin, w.retryMax)
	}
}

// A first start begins at Since, on the daemon's clock even where that is an hour
// off (EV-14).
func TestFirstStart(t *testing.T) {
	faults.Case(t, "EV-14")
	for _, skew := range []time.Duration{0, time.Hour, -time.Hour} {
		t.Run(skew.String(), func(t *testing.T) {
			d := fake(t, &fakedockerd.Daemon{Clock: func() time.Time { return time.Now().Add(skew) }})
			m := maker{t: t, offset: skew}
			d.Publish(m.next(2)...)
			time.Sleep(5 * time.Millisecond)
			since := time.Now()
			d.Publish(m.next(2)...)
			state := filepath.Join(t.TempDir(), "events.json")
			r := start(t, d, Options{Since: since, StatePath: state})
			eventually(t, "e4", func() bool { return slices.Contains(r.actors(), "e4") })
			d.Publish(m.next(1)...)
			want := "[e3 e4 e5]"
			if skew != 0 {
				// The clocks are compared over a call, so the start is blurred.
				eventually(t, "e5", func() bool { return slices.Contains(r.actors(), "e5") })
			} else {
				r.wantActors(3)
				if got := fmt.Sprint(r.actors()); got != want {
					t.Errorf("got %s, want %s", got, want)
				}
			}
			r.wantNoLoss()
			r.set(func() {
				for _, rec := range r.records {
					off := rec.Event.Received.Sub(rec.TS) + skew
					if off < -time.Second || off > 5*time.Second || rec.Event.Replayed {
						t.Errorf("received %v after the event's time, skew %v, replayed %v", off, skew, rec.Event.Replayed)
					}
				}
			})
			// The cursor is the last event's time by the daemon's clock, to the nanosecond.
			if err := r.stop(); err != nil {
				t.Error(err)
			}
			last := r.records[len(r.records)-1].Event.TimeNano
			if c, err := loadCursor(state); err != nil || c.TimeNano != last || last-time.Now().Add(skew).UnixNano() > 0 {
				t.Errorf("cursor at %d (%v), want the daemon's time %d", c.TimeNano, err, last)
			}
		})
	}
}

// EV-05: a stream that breaks loses nothing and brings nothing twice.
func TestReplayAfterACut(t *testing.T) {
	faults.Case(t, "EV-05")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{})
	subscribed(t, d)
	d.Publish(m.next(10)...)
	r.wantActors(10)
	d.Refuse(func(string) int { return 503 }) // while it is away
	d.Cut()
	d.Publish(m.next(200)...)
	d.Refuse(nil)
	r.wantActors(210)
	subscribed(t, d)
	d.Publish(m.next(5)...)
	r.wantActors(215)
	r.wantNoLoss()
	st := r.s.Status()
	if st.Sessions != 2 || st.Duplicates == 0 || st.Replayed != 200 || st.Events != 215 {
		t.Errorf("status %+v", st)
	}
	r.set(func() {
		for i, rec := range r.records {
			if want := i >= 10 && i < 210; rec.Event.Replayed != want {
				t.Errorf("event %d: replayed %v", i+1, rec.Event.Replayed)
			}
		}
	})
}

// Neighbours out of order: an event that is older than the last one read, but was
// logged after it, is not lost in a replay.
func TestReplayOutOfOrder(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{})
	subscribed(t, d)
	es := m.next(4)
	d.Publish(es[0], es[2])
	r.wantActors(2)
	d.Refuse(func(string) int { return 503 })
	d.Cut()
	d.Publish(es[1], es[3])
	d.Refuse(nil)
	r.wantActors(4)
	r.wantNoLoss()
}

// EV-06
func TestGapBeyondTheBuffer(t *testing.T) {
	faults.Case(t, "EV-06")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{})
	subscribed(t, d)
	first := m.next(5)
	d.Publish(first...)
	r.wantActors(5)
	d.Refuse(func(string) int { return 503 })
	d.Cut()
	missed := m.next(600)
	d.Publish(missed...)
	d.Refuse(nil)
	r.wantActors(5 + 256)
	l := r.wantLoss("stream_gap")
	if l.Count != -1 || l.From.UnixNano() != first[4].Nano || l.To.UnixNano() != missed[600-256].Nano || l.Source != "events" || !strings.Contains(l.Detail, "256") {
		t.Errorf("loss %+v, want it from %d to %d", l, first[4].Nano, missed[600-256].Nano)
	}
	eventually(t, "a resync", func() bool { return strings.Contains(r.logs.String(), "containers and images listed") })
	d.Publish(m.next(1)...)
	r.wantActors(5 + 256 + 1)
}

// EV-02, EV-03, EV-04, EV-07
func TestDaemonRestarts(t *testing.T) {
	faults.Case(t, "EV-02", "EV-03", "EV-04", "EV-07")
	rows := []struct {
		name   string
		end    func(*fakedockerd.Daemon)
		before int // events before it
		after  int // events of the new daemon before we are back
	}{
		{"killed", (*fakedockerd.Daemon).Kill, 5, 0},
		{"stopped", (*fakedockerd.Daemon).Stop, 5, 0},
		{"killed, and busy at once", (*fakedockerd.Daemon).Kill, 5, 100},
		{"killed, and busy beyond its buffer", (*fakedockerd.Daemon).Kill, 5, 300},
		{"killed before any event", (*fakedockerd.Daemon).Kill, 0, 3},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			d := fake(t, &fakedockerd.Daemon{})
			m := maker{t: t}
			r := start(t, d, Options{})
			subscribed(t, d)
			time.Sleep(2 * quick.settle)
			d.Publish(m.next(row.before)...)
			r.wantActors(row.before)
			row.end(d)
			eventually(t, "disconnected", func() bool { return !r.s.Status().Connected })
			d.Refuse(func(string) int { return 503 })
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			d.Publish(m.next(row.after)...)
			d.Refuse(nil)
			r.wantActors(row.before + min(row.after, 256))
			r.wantLoss("daemon_restarted")
			subscribed(t, d)
			d.Publish(m.next(2)...)
			r.wantActors(row.before + min(row.after, 256) + 2)
			// Once more cut: no second report of the same gap.
			d.Cut()
			d.Publish(m.next(2)...)
			r.wantActors(row.before + min(row.after, 256) + 4)
			r.wantLoss("daemon_restarted")
		})
	}
}

// Behind a proxy or socket activation nothing tells that the daemon restarted but
// its empty buffer.
func TestBufferGoneWithoutASign(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{})
	subscribed(t, d)
	d.Publish(m.next(3)...)
	r.wantActors(3)
	d.Forget()
	d.Cut()
	if l := r.wantLoss("stream_gap"); l.To.Before(l.From) || time.Since(l.To) > 5*time.Second {
		t.Errorf("loss %+v", l)
	}
	d.Cut() // not reported again
	subscribed(t, d)
	d.Publish(m.next(3)...)
	r.wantActors(6)
	if n := len(r.losses()); n != 1 {
		t.Errorf("%d losses, want 1", n)
	}
}

// EV-15: the replay stops at the first older entry, so after a step back of the
// daemon's clock it brings nothing of what was missed before the step.
func TestClockStepsBack(t *testing.T) {
	faults.Case(t, "EV-15")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{})
	subscribed(t, d)
	d.Publish(m.next(3)...)
	r.wantActors(3)
	d.Refuse(func(string) int { return 503 })
	d.Cut()
	d.Publish(m.next(3)...)
	m.offset = -time.Hour
	d.Publish(m.next(3)...)
	d.Refuse(nil)
	l := r.wantLoss("stream_gap")
	if l.To.Before(l.From) || l.Count != -1 {
		t.Errorf("a loss that ends before it begins, or claims a count: %+v", l)
	}
	d.Publish(m.next(2)...)
	eventually(t, "e11", func() bool { return slices.Contains(r.actors(), "e11") })
}

// leftAlone waits until a probe of the one stream has ended and another has begun:
// what the first one thought of the stream has been done.
func leftAlone(t *testing.T, d *fakedockerd.Daemon) {
	t.Helper()
	eventually(t, "two probes", func() bool { return d.Streams() >= 3 })
}

// EV-16: a stream that is open but dead is noticed because the daemon has events
// that did not come through it.
func TestHalfOpen(t *testing.T) {
	faults.Case(t, "EV-16")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{}, probed)
	subscribed(t, d)
	d.Publish(m.next(3)...)
	r.wantActors(3)
	leftAlone(t, d)
	if n := r.s.Status().Sessions; n != 1 {
		t.Fatalf("%d sessions, want 1: a quiet stream was taken for a dead one", n)
	}
	d.Deafen()
	d.Publish(m.next(4)...)
	r.wantActors(7)
	r.wantNoLoss()
	if n := r.s.Status().Sessions; n != 2 {
		t.Errorf("%d sessions, want 2", n)
	}
}

// EV-17
func TestRefused(t *testing.T) {
	faults.Case(t, "EV-17")
	for _, row := range []struct {
		path string
		code int
		want string
	}{
		{"/events", 403, "a proxy before the socket must allow GET /events"},
		{"/events", 400, "DOCKER_API_VERSION"},
		{"/events", 500, "500 Internal Server Error: refused by the test"},
		{"/info", 500, "who it is"},
		{"/_ping", 500, "reach the Docker daemon"},
	} {
		t.Run(fmt.Sprint(row.path, row.code), func(t *testing.T) {
			d := fake(t, &fakedockerd.Daemon{})
			d.Refuse(func(path string) int {
				if path == row.path {
					return row.code
				}
				return 0
			})
			r := start(t, d, Options{})
			eventually(t, "the error", func() bool { return strings.Contains(r.s.Status().Error, row.want) })
			time.Sleep(100 * time.Millisecond)
			if n := strings.Count(r.logs.String(), "trying again"); n != 1 {
				t.Errorf("logged %d times, want once:\n%s", n, r.logs)
			}
			d.Refuse(nil)
			subscribed(t, d)
			m := maker{t: t}
			d.Publish(m.next(1)...)
			r.wantActors(1)
		})
	}
	t.Run("info forbidden is no obstacle", func(t *testing.T) {
		d := fake(t, &fakedockerd.Daemon{})
		d.Refuse(func(p string) int {
			if p == "/info" || strings.HasPrefix(p, "/containers") {
				return http.StatusForbidden
			}
			return 0
		})
		r := start(t, d, Options{})
		subscribed(t, d)
		m := maker{t: t}
		d.Publish(m.next(1)...)
		r.wantActors(1)
	})
	t.Run("ssh", func(t *testing.T) {
		r := start(t, nil, Options{Host: "ssh://ci@host"})
		eventually(t, "the error", func() bool { return strings.Contains(r.s.Status().Error, "unix:///path or tcp://") })
	})
}

// EV-08: while out is stuck the stream is read on, and what does not fit is
// counted exactly.
func TestStuckOut(t *testing.T) {
	faults.Case(t, "EV-08")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	block := make(chan struct{})
	r := start(t, d, Options{QueueSize: 1000}, func(r *running) { r.block = block })
	subscribed(t, d)
	es := m.next(5000)
	d.Publish(es...)
	eventually(t, "a full queue", func() bool { return r.s.Status().Queued == 1000 })
	time.Sleep(200 * time.Millisecond) // the rest is read meanwhile
	if st := r.s.Status(); st.Events != 0 || !st.Connected {
		t.Errorf("status %+v", st)
	}
	close(block)
	r.set(func() { r.block = nil })
	eventually(t, "the last event", func() bool { a := r.actors(); return len(a) > 0 && a[len(a)-1] == "e5000" })
	got := map[string]bool{}
	for _, a := range r.actors() {
		got[a] = true
	}
	lost := int64(0)
	for _, l := range r.losses() {
		if l.Cause != "queue_full" {
			t.Fatalf("loss %+v", l)
		}
		lost += l.Count
		// All that is missing lies in the range of a loss, and nothing else does.
		inside := int64(0)
		for i, e := range es {
			if e.Nano >= l.From.UnixNano() && e.Nano <= l.To.UnixNano() && !got[fmt.Sprintf("e%d", i+1)] {
				inside++
			}
		}
		if inside != l.Count {
			t.Errorf("%d events are missing from %v to %v, the loss counts %d", inside, l.From, l.To, l.Count)
		}
	}
	if lost == 0 || int64(len(got))+lost != 5000 {
		t.Errorf("%d handed out and %d lost of 5000", len(got), lost)
	}
	if st := r.s.Status(); st.Dropped != lost || st.Events != int64(len(got)) {
		t.Errorf("status %+v", st)
	}
}

// About 10,000 events a second, all read. (EV-09 with the real process and its memory
// is in e2e; the benchmark in intakebench sends as fast as it can.)
func TestStorm(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	r := start(t, d, Options{})
	subscribed(t, d)
	const total = 10000
	es := m.next(total)
	for i := 0; i < total; i += 100 {
		d.Publish(es[i : i+100]...)
		time.Sleep(5 * time.Millisecond)
	}
	r.wantActors(total)
	r.wantNoLoss()
}

// EV-21: at the end what was read is handed out and the cursor saved; the next
// process goes on there.
func TestNextProcess(t *testing.T) {
	faults.Case(t, "EV-21")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	state := filepath.Join(t.TempDir(), "events.json")
	r := start(t, d, Options{StatePath: state})
	subscribed(t, d)
	d.Publish(m.next(20)...)
	r.wantActors(20)
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	d.Publish(m.next(30)...)
	r = start(t, d, Options{StatePath: state})
	r.wantActors(30)
	r.wantNoLoss()
	if got := r.actors()[0]; got != "e21" {
		t.Errorf("the next process begins with %s, want e21", got)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}

	d.Publish(m.next(300)...) // more than the buffer
	r = start(t, d, Options{StatePath: state})
	r.wantActors(256)
	r.wantLoss("stream_gap")
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}

	d.Kill() // a restart between two processes
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	r = start(t, d, Options{StatePath: state})
	r.wantLoss("daemon_restarted")
	r.stop()
	r = start(t, d, Options{StatePath: state}) // reported once
	subscribed(t, d)
	d.Publish(m.next(1)...)
	r.wantActors(1)
	r.wantNoLoss()
	r.stop()

	// A process that is killed before it ever saw an event leaves its place too.
	if err := os.Remove(state); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Millisecond)
	r = start(t, d, Options{StatePath: state})
	subscribed(t, d)
	eventually(t, "a cursor", func() bool { _, err := os.Stat(state); return err == nil })
	r.stop()
	d.Publish(m.next(2)...)
	r = start(t, d, Options{StatePath: state})
	r.wantActors(2)
}

// A process that dies before its cursor is saved reads events again: with the same
// ids.
func TestKilledProcess(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	dir := t.TempDir()
	state := filepath.Join(dir, "events.json")
	r := start(t, d, Options{StatePath: state})
	subscribed(t, d)
	d.Publish(m.next(5)...)
	r.wantActors(5)
	eventually(t, "a cursor", func() bool { c, _ := loadCursor(state); return len(c.Recent) == 5 })
	old, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	d.Publish(m.next(5)...)
	r.wantActors(10)
	r.stop()
	if err := os.WriteFile(state, old, 0o600); err != nil { // as if the save had not happened
		t.Fatal(err)
	}
	again := start(t, d, Options{StatePath: state})
	again.wantActors(5)
	again.wantNoLoss()
	for i := range 5 {
		if a, b := r.records[5+i], again.records[i]; a.ID != b.ID || !b.Event.Replayed {
			t.Errorf("event %s: id %s, then %s, replayed %v", a.Event.ActorID, a.ID, b.ID, b.Event.Replayed)
		}
	}
}

func TestDamagedCursor(t *testing.T) {
	for name, content := range map[string]string{"empty": "", "cut": `{"time_nano":17954`, "no time": `{}`, "other": `[1]`} {
		t.Run(name, func(t *testing.T) {
			d := fake(t, &fakedockerd.Daemon{})
			state := filepath.Join(t.TempDir(), "events.json")
			if err := os.WriteFile(state, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			r := start(t, d, Options{StatePath: state})
			subscribed(t, d)
			r.wantLoss("cursor_lost")
			m := maker{t: t}
			d.Publish(m.next(1)...)
			r.wantActors(1)
			r.stop()
			if _, err := loadCursor(state); err != nil {
				t.Error(err)
			}
		})
	}
}

// While out fails, the same records are offered again and the cursor stays.
func TestOutFails(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	state := filepath.Join(t.TempDir(), "events.json")
	full := errors.New("no space left on device")
	r := start(t, d, Options{StatePath: state}, func(r *running) { r.fail = full })
	subscribed(t, d)
	d.Publish(m.next(3)...)
	time.Sleep(100 * time.Millisecond)
	if c, _ := loadCursor(state); c.Key != 0 {
		t.Errorf("the cursor moved although nothing was taken: %+v", c)
	}
	r.set(func() { r.fail = nil })
	r.wantActors(3)

	r.set(func() { r.fail = full })
	d.Publish(m.next(2)...)
	eventually(t, "a failure", func() bool { return strings.Count(r.logs.String(), "were not taken") == 2 })
	if err := r.stop(); !errors.Is(err, full) {
		t.Errorf("Run returned %v", err)
	}
	r = start(t, d, Options{StatePath: state})
	r.wantActors(2)
	r.wantNoLoss()
}

// At the end the rest of the queue is handed out.
func TestSlowOutAtTheEnd(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	state := filepath.Join(t.TempDir(), "events.json")
	block := make(chan struct{})
	r := start(t, d, Options{StatePath: state}, func(r *running) { r.block = block })
	subscribed(t, d)
	d.Publish(m.next(600)...)
	eventually(t, "all of them read", func() bool {
		q := r.s.queue
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.n > 0 && q.ring[(q.head+q.n-1)%len(q.ring)].actor == "e600"
	})
	time.AfterFunc(100*time.Millisecond, func() { close(block) })
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	n := len(r.actors())
	r = start(t, d, Options{StatePath: state})
	if n != 600 {
		t.Errorf("%d of 600 events handed out before the end", n)
	}
	d.Publish(m.next(1)...)
	r.wantActors(1)
	r.wantNoLoss()
}

func TestHostileLines(t *testing.T) {
	faults.Case(t, "EV-23")
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	// An endless line is silence to the probe, and takes long on a busy machine.
	r := start(t, d, Options{})
	subscribed(t, d)
	line := func(s string) fakedockerd.Event {
		return fakedockerd.Event{Line: []byte(s), Nano: time.Now().UnixNano()}
	}
	big := func(size int) fakedockerd.Event {
		m.n++
		nano := time.Now().UnixNano()
		return fakedockerd.Event{Nano: nano, Line: event(t, "container", "create", fmt.Sprintf("e%d", m.n), nano, map[string]string{"x": strings.Repeat("v", size)})}
	}
	d.Publish(m.next(1)...)
	d.Publish(line("garbage"), line(""), line("  "), line(`{"message":"x"}`))
	d.Publish(big(70<<10), big(1<<20)) // e2, e3
	d.Publish(line(`{"Type":"` + strings.Repeat("x", maxLine) + `"}`))
	d.Publish(m.next(1)...) // e4
	r.wantActors(4)
	lost := int64(0)
	for _, l := range r.losses() {
		if l.Cause != "torn_line" {
			t.Errorf("loss %+v", l)
		}
		lost += l.Count
	}
	if lost != 3 || r.s.Status().Unreadable != 3 {
		t.Errorf("%d lines counted unreadable, want 3", lost)
	}
	if n := r.s.Status().Sessions; n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
}

// A line without an end costs no more memory than the longest event may.
func TestEndlessLine(t *testing.T) {
	faults.Case(t, "EV-23")
	ss := &session{reader: &reader{s: New(Options{})}, daemon: &identity{}}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := ss.lines(io.MultiReader(io.LimitReader(letters{}, 1<<30), strings.NewReader("\n"+`{"Type":"image","Action":"pull","timeNano":1}`+"\n")))
	runtime.ReadMemStats(&after)
	if !errors.Is(err, io.EOF) || ss.count != 1 || ss.reader.s.Status().Unreadable != 1 {
		t.Errorf("%v, %d events, %+v", err, ss.count, ss.reader.s.Status())
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 12*maxLine {
		t.Errorf("%d MB allocated", grown>>20)
	}
}

type letters struct{}

func (letters) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// A container that ran before the stream opened has a duration all the same.
func TestResync(t *testing.T) {
	id := strings.Repeat("ab", 32)
	d := fake(t, &fakedockerd.Daemon{Running: map[string]time.Time{id: time.Now().Add(-time.Hour)}})
	r := start(t, d, Options{})
	subscribed(t, d)
	eventually(t, "the list to be taken over", func() bool {
		return strings.Contains(r.logs.String(), "containers and images listed") && len(r.s.resyncs) == 0
	})
	nano := time.Now().UnixNano()
	d.Publish(fakedockerd.Event{Nano: nano, Line: event(t, "container", "die", id, nano, map[string]string{"exitCode": "1"})})
	r.wantActors(1)
	if got := time.Duration(r.records[0].Event.DurationNS); got < time.Hour || got > time.Hour+time.Minute {
		t.Errorf("duration %v, want an hour", got)
	}
}

func TestQueueLossesAreBounded(t *testing.T) {
	q := newQueue(10)
	for i := range 1000 {
		q.lose(record.Loss{Cause: fmt.Sprint("c", i%2), Count: -1})
	}
	_, losses, _, _ := q.take(nil)
	if len(losses) != maxQueuedLosses {
		t.Errorf("%d losses, want %d", len(losses), maxQueuedLosses)
	}
}
