package sinks

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

type sinkFunc func(ctx context.Context, batch []Entry) error

func (f sinkFunc) Write(ctx context.Context, batch []Entry) error { return f(ctx, batch) }
func (sinkFunc) Close(context.Context) error                      { return nil }

// memory is a sink that keeps what it took.
type memory struct {
	mu      sync.Mutex
	got     []string
	batches [][]string
	calls   []time.Time
	fail    func(call int, ids []string) error // nil takes all
}

func (m *memory) Write(_ context.Context, batch []Entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, time.Now())
	var ids []string
	for _, e := range batch {
		if !json.Valid(e.Line) || !bytes.Contains(e.Line, []byte(`{"id":"`+e.ID+`"`)) || bytes.IndexByte(e.Line, '\n') >= 0 || e.Kind == "" {
			return fmt.Errorf("a wrong entry: %+v", e)
		}
		ids = append(ids, e.ID)
	}
	if m.fail != nil {
		err := m.fail(len(m.calls), ids)
		var refused *RefusedError
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		if refused != nil {
			for i, id := range ids {
				if !slices.ContainsFunc(refused.Refused, func(r Refused) bool { return r.Index == i }) {
					m.got = append(m.got, id)
				}
			}
			return err
		}
	}
	m.got = append(m.got, ids...)
	m.batches = append(m.batches, ids)
	return nil
}

func (*memory) Close(context.Context) error { return nil }

func (m *memory) ids() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.got)
}

func (m *memory) attempts() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.calls)
}

// bench is a journal with pumps.
type bench struct {
	t    testing.TB
	dir  string
	j    *journal.Journal
	ends []func() error
}

func newBench(t testing.TB, dir string, o journal.Options) *bench {
	t.Helper()
	j, err := journal.Open(filepath.Join(dir, "journal"), o)
	if err != nil {
		t.Fatal(err)
	}
	return &bench{t: t, dir: dir, j: j}
}

func (b *bench) options(name string) PumpOptions {
	return PumpOptions{Name: name, CursorDir: filepath.Join(b.dir, "cursors"), QuarantineDir: filepath.Join(b.dir, "quarantine")}
}

// pump starts a pump; stop ends it.
func (b *bench) pump(s Sink, o PumpOptions) (p *Pump, stop func() error) {
	b.t.Helper()
	p, err := NewPump(b.j, s, o)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	b.ends = append(b.ends, stop)
	return p, stop
}

func (b *bench) append(ids ...string) {
	b.t.Helper()
	for _, id := range ids {
		if err := b.j.Append(line(id, 300)); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) flush(p *Pump) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := p.Flush(ctx); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) end() {
	b.t.Helper()
	for _, stop := range b.ends {
		if err := stop(); err != nil {
			b.t.Error(err)
		}
	}
	if err := b.j.Close(); err != nil {
		b.t.Error(err)
	}
}

func TestPumpDeliversInOrderAndGoesOnAfterARestart(t *testing.T) {
	dir := t.TempDir()
	m := &memory{}
	for round := range 4 {
		b := newBench(t, dir, journal.Options{MaxSegmentBytes: 20_000})
		p, _ := b.pump(m, b.options("m"))
		b.append(numbered(round*500, 500)...)
		b.flush(p)
		s := p.Status()
		if s.Delivered != 500 || s.BehindRecords != 0 || s.LastError != "" || s.Position != b.j.End() {
			t.Errorf("round %d: %+v", round, s)
		}
		b.end()
		if s := p.Status(); s.State != StateStopped {
			t.Errorf("state %s after the end", s.State)
		}
	}
	equal(t, m.ids(), numbered(0, 2000))
}

func TestPumpBoundsBatches(t *testing.T) {
	for _, tt := range []struct {
		name        string
		o           PumpOptions
		size        int
		largest     int
		wantBatches int
	}{
		{"by records", PumpOptions{MaxRecords: 7}, 100, 7, 15},
		{"by bytes", PumpOptions{MaxBytes: 200_000}, 50_000, 3, 34},
		{"a record larger than a batch", PumpOptions{MaxBytes: 1000}, 50_000, 1, 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, t.TempDir(), journal.Options{})
			defer b.end()
			for _, id := range numbered(0, 100) {
				if err := b.j.Append(line(id, tt.size)); err != nil {
					t.Fatal(err)
				}
			}
			o := b.options("m")
			o.MaxRecords, o.MaxBytes, o.MaxDelay = tt.o.MaxRecords, tt.o.MaxBytes, time.Hour
			m := &memory{}
			p, _ := b.pump(m, o)
			b.flush(p)
			equal(t, m.ids(), numbered(0, 100))
			for _, ids := range m.batches {
				if len(ids) > tt.largest {
					t.Errorf("a batch of %d", len(ids))
				}
			}
			if len(m.batches) != tt.wantBatches {
				t.Errorf("%d batches, want %d", len(m.batches), tt.wantBatches)
			}
		})
	}
}

func TestPumpWaitsForABatchToFillButNotLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, t.TempDir(), journal.Options{})
		m := &memory{}
		o := b.options("m")
		o.MaxDelay = 300 * time.Millisecond
		b.pump(m, o)
		for i := range 10 {
			b.append(numbered(i, 1)...)
			time.Sleep(50 * time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		equal(t, m.ids(), numbered(0, 10))
		if len(m.batches) != 2 {
			t.Errorf("batches %v, want two", m.batches)
		}
		b.end()
	})
}

// A sink that fails at random, refuses some records and takes others: each record is
// delivered or in quarantine, in order, and those that the sink took twice were
// taken by attempts that failed.
func TestPumpWithAFlakySink(t *testing.T) {
	faults.Case(t, "SP-14")
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, t.TempDir(), journal.Options{MaxSegmentBytes: 50_000})
		random := rand.New(rand.NewPCG(3, 4))
		refuse := func(id string) bool { return strings.HasSuffix(id, "7") }
		m := &memory{fail: func(_ int, ids []string) error {
			if random.IntN(3) > 0 {
				return errors.New("try again")
			}
			var r []Refused
			for i, id := range ids {
				if refuse(id) {
					r = append(r, Refused{i, "ends in 7: \"\x1b[31m"})
				}
			}
			if len(r) > 0 {
				return fmt.Errorf("partly: %w", &RefusedError{append(r, Refused{-1, "nonsense"}, Refused{1000, "nonsense"}, r[0])})
			}
			return nil
		}}
		o := b.options("m")
		o.MaxRecords = 20
		p, _ := b.pump(m, o)
		all := numbered(0, 1000)
		b.append(all...)
		time.Sleep(time.Hour)
		synctest.Wait()
		var taken, quarantined []string
		for _, id := range all {
			if refuse(id) {
				quarantined = append(quarantined, id)
			} else {
				taken = append(taken, id)
			}
		}
		equal(t, m.ids(), taken)
		data, err := os.ReadFile(filepath.Join(b.dir, "quarantine", "m.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for l := range strings.Lines(string(data)) {
			var q Quarantined
			if err := json.Unmarshal([]byte(l), &q); err != nil {
				t.Fatal(err)
			}
			if q.Sink != "m" || q.Reason != "ends in 7: \"\x1b[31m" || q.At.IsZero() || string(q.Record)+"\n" != string(line(idOf(t, q.Record), 300)) {
				t.Fatalf("quarantined %s", l)
			}
			got = append(got, idOf(t, q.Record))
		}
		equal(t, got, quarantined)
		s := p.Status()
		if s.Delivered != 900 || s.Refused != 100 || s.Unkept != 0 || s.Retries == 0 || s.BehindRecords != 0 || s.State != StateIdle {
			t.Errorf("%+v", s)
		}
		b.end()
	})
}

func TestQuarantineIsBounded(t *testing.T) {
	faults.Case(t, "SP-14")
	b := newBench(t, t.TempDir(), journal.Options{})
	m := &memory{fail: func(_ int, ids []string) error {
		var r []Refused
		for i := range ids {
			r = append(r, Refused{i, strings.Repeat("no", 5000)})
		}
		return &RefusedError{r}
	}}
	var losses []record.Loss
	o := b.options("m")
	o.QuarantineBytes = 20_000
	o.OnLoss = func(l record.Loss) { losses = append(losses, l) }
	b.append(numbered(0, 100)...)
	p, _ := b.pump(m, o)
	b.flush(p)
	s := p.Status()
	b.end()
	st, err := os.Stat(filepath.Join(b.dir, "quarantine", "m.jsonl"))
	if err != nil || st.Size() > 20_000 {
		t.Fatalf("%d bytes, %v", st.Size(), err)
	}
	kept := len(strings.Split(strings.TrimSpace(readString(t, filepath.Join(b.dir, "quarantine", "m.jsonl"))), "\n"))
	var lost int64
	for _, l := range losses {
		if l.Cause != "quarantine_full" || l.Source != "m" || !l.From.Equal(ts) {
			t.Errorf("loss %+v", l)
		}
		lost += l.Count
	}
	if s.Refused != 100 || int64(kept)+lost != 100 || s.Unkept != lost || kept == 0 || lost == 0 {
		t.Errorf("%d kept, %d lost, %+v", kept, lost, s)
	}
}

func readString(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// A sink is down for hours. The attempts become rare, what the server
// asks for is kept, and all is delivered in the end.
func TestPumpBacksOff(t *testing.T) {
	faults.Case(t, "SP-16")
	for _, tt := range []struct {
		name             string
		err              error
		low, high        time.Duration // between late attempts
		fewest, mostHour int
	}{
		{"an error", errors.New("down"), 30 * time.Second, time.Minute, 50, 150},
		{"come back in 10 s", &RetryAfterError{10 * time.Second, errors.New("429")}, 10 * time.Second, 11 * time.Second, 320, 361},
		{"come back in an hour: bounded", fmt.Errorf("503: %w", &RetryAfterError{time.Hour, errors.New("503")}), 54 * time.Second, time.Minute, 59, 68},
		{"come back at once: our own pace", &RetryAfterError{0, errors.New("503")}, 30 * time.Second, time.Minute, 50, 150},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, t.TempDir(), journal.Options{})
				start := time.Now()
				m := &memory{fail: func(int, []string) error {
					if time.Since(start) < time.Hour {
						return tt.err
					}
					return nil
				}}
				var log bytes.Buffer
				o := b.options("m")
				o.Logger = slog.New(slog.NewTextHandler(&log, nil))
				p, _ := b.pump(m, o)
				b.append(numbered(0, 1000)...)
				time.Sleep(30 * time.Minute)
				s := p.Status()
				if s.State != StateRetrying || s.BehindRecords != 1000 || s.LastError != tt.err.Error() || !s.NextTry.After(time.Now().Add(-time.Second)) {
					t.Errorf("%+v", s)
				}
				time.Sleep(32 * time.Minute)
				synctest.Wait()
				equal(t, m.ids(), numbered(0, 1000))
				calls := m.calls[:slices.IndexFunc(m.calls, func(at time.Time) bool { return at.Sub(start) >= time.Hour })]
				if len(calls) < tt.fewest || len(calls) > tt.mostHour {
					t.Errorf("%d attempts in an hour, want %d to %d", len(calls), tt.fewest, tt.mostHour)
				}
				for i := 20; i < len(calls); i++ {
					if gap := calls[i].Sub(calls[i-1]); gap < tt.low || gap > tt.high {
						t.Errorf("attempt %d came after %v, want %v to %v", i, gap, tt.low, tt.high)
					}
				}
				b.end()
				if n := strings.Count(log.String(), "level=WARN"); n < 30 || n > 62 {
					t.Errorf("%d warnings in an hour, want about one a minute", n)
				}
			})
		})
	}
}

// A sink hangs. One that heeds its deadline is tried again; one that does not
// is called stuck; neither delays another sink, and the end comes in time.
func TestHangingSinksDelayNobodyElse(t *testing.T) {
	faults.Case(t, "SP-13")
	b := newBench(t, t.TempDir(), journal.Options{})
	polite, o := 0, b.options("polite")
	o.Timeout, o.MinBackoff = 20*time.Millisecond, time.Millisecond
	politePump, politeStop := b.pump(sinkFunc(func(ctx context.Context, _ []Entry) error {
		if polite++; polite > 3 {
			return nil
		}
		<-ctx.Done()
		return ctx.Err()
	}), o)

	release := make(chan struct{})
	o = b.options("deaf")
	o.Timeout, o.CloseTimeout = 20*time.Millisecond, 50*time.Millisecond
	deaf, deafStop := b.pump(sinkFunc(func(context.Context, []Entry) error {
		<-release
		return nil
	}), o)

	m := &memory{}
	healthy, healthyStop := b.pump(m, b.options("healthy"))
	start := time.Now()
	b.append(numbered(0, 100)...)
	b.flush(healthy)
	equal(t, m.ids(), numbered(0, 100))
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("the healthy sink took %v", took)
	}
	b.flush(politePump)
	if s := politePump.Status(); s.Retries != 3 || s.Delivered != 100 || !strings.Contains(s.LastError, "deadline") {
		t.Errorf("%+v", s)
	}
	for deadline := time.Now().Add(10 * time.Second); deaf.Status().State != StateStuck; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", deaf.Status())
		}
	}
	if s := deaf.Status(); s.BehindRecords != 100 || s.BehindSeconds <= 0 || s.LastError == "" {
		t.Errorf("%+v", s)
	}
	start = time.Now()
	if err := deafStop(); !errors.Is(err, ErrAbandoned) {
		t.Errorf("the deaf sink: %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("the end took %v", took)
	}
	close(release)
	if err := errors.Join(politeStop(), healthyStop(), b.j.Close()); err != nil {
		t.Error(err)
	}
}

func TestASinkThatComesBackLateCountsAsDelivered(t *testing.T) {
	b := newBench(t, t.TempDir(), journal.Options{})
	defer b.end()
	o := b.options("late")
	o.Timeout, o.CloseTimeout = 10*time.Millisecond, 20*time.Millisecond
	calls := 0
	p, _ := b.pump(sinkFunc(func(context.Context, []Entry) error {
		calls++
		time.Sleep(100 * time.Millisecond)
		return nil
	}), o)
	b.append("a")
	b.flush(p)
	if s := p.Status(); calls != 1 || s.Delivered != 1 {
		t.Errorf("%d calls, %+v", calls, s)
	}
}

func TestASinkThatPanicsIsTriedAgain(t *testing.T) {
	b := newBench(t, t.TempDir(), journal.Options{})
	defer b.end()
	o := b.options("m")
	o.MinBackoff = time.Millisecond
	calls := 0
	p, _ := b.pump(sinkFunc(func(_ context.Context, batch []Entry) error {
		if calls++; calls < 3 {
			_ = batch[1000]
		}
		return nil
	}), o)
	b.append("a")
	b.flush(p)
	if s := p.Status(); s.Delivered != 1 || !strings.Contains(s.LastError, "index out of range") {
		t.Errorf("%+v", s)
	}
}

func TestFlush(t *testing.T) {
	faults.Case(t, "SP-27")
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, t.TempDir(), journal.Options{})
		down := true
		m := &memory{fail: func(int, []string) error {
			if down {
				return errors.New("connection refused")
			}
			return nil
		}}
		o := b.options("m")
		o.MaxDelay = 24 * time.Hour
		p, stop := b.pump(m, o)
		b.append(numbered(0, 42)...)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err := p.Flush(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "42 records not delivered") || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("flush of a dead sink: %v", err)
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("flush took %v", took)
		}
		time.Sleep(time.Hour) // the pump waits long between attempts now
		m.mu.Lock()
		down = false
		m.mu.Unlock()
		start = time.Now()
		b.flush(p)
		if took := time.Since(start); took > time.Millisecond {
			t.Errorf("the flush waited %v for the next attempt", took)
		}
		equal(t, m.ids(), numbered(0, 42))
		b.flush(p) // nothing to do
		saved, err := journal.LoadCursor(filepath.Join(b.dir, "cursors"), "m")
		if err != nil || saved.Position != b.j.End() {
			t.Errorf("the cursor is saved at %v (%v), want %v", saved.Position, err, b.j.End())
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		b.append("r000042")
		if err := p.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "stopped") {
			t.Errorf("flush of a stopped pump: %v", err)
		}
		b.end()
	})
}

// A sink is down for longer than the bound of the journal allows. What it
// lost is told exactly, and the journal keeps to its bound.
func TestDeadSinkAndTheBoundOfTheJournal(t *testing.T) {
	faults.Case(t, "SP-11")
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		lost := map[string]int64{}
		b := newBench(t, t.TempDir(), journal.Options{MaxSegmentBytes: 10_000, MaxBytes: 60_000, OnLoss: func(l record.Loss) {
			mu.Lock()
			defer mu.Unlock()
			lost[l.Source] += l.Count
		}})
		down := true
		dead := &memory{fail: func(int, []string) error {
			if down {
				return errors.New("down")
			}
			return nil
		}}
		alive := &memory{}
		o := b.options("dead")
		o.MaxRecords = 10
		p, _ := b.pump(dead, o)
		q, _ := b.pump(alive, b.options("alive"))
		for i := range 1000 {
			b.append(numbered(i, 1)...)
			time.Sleep(20 * time.Millisecond)
		}
		if s := p.Status(); s.BehindRecords <= 0 || s.BehindRecords >= 1000 {
			t.Errorf("%+v", s)
		}
		dead.mu.Lock()
		down = false
		dead.mu.Unlock()
		b.flush(p)
		b.flush(q)
		equal(t, alive.ids(), numbered(0, 1000))
		got := dead.ids()
		if int64(len(got))+lost["dead"] != 1000 || lost["alive"] != 0 || lost["dead"] == 0 || !slices.IsSorted(got) {
			t.Errorf("%d delivered, lost %v", len(got), lost)
		}
		if s := p.Status(); s.BehindRecords != 0 || s.Delivered != int64(len(got)) || s.Dropped != lost["dead"] {
			t.Errorf("%+v, lost %v", s, lost)
		}
		if s := q.Status(); s.Dropped != 0 {
			t.Errorf("%+v", s)
		}
		b.end()
	})
}

// Somebody cuts the segment under an idle pump: it must not spin (the clock of the
// test would stand still then), and goes on when there are records again.
func TestPumpAfterSomebodyCutTheJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var causes []string
		b := newBench(t, t.TempDir(), journal.Options{OnLoss: func(l record.Loss) { causes = append(causes, l.Cause) }})
		m := &memory{}
		p, _ := b.pump(m, b.options("m"))
		b.append("a", "b")
		b.flush(p)
		synctest.Wait() // the pump is idle
		if err := os.Truncate(filepath.Join(b.dir, "journal", "records.jsonl"), 10); err != nil {
			t.Fatal(err)
		}
		// As a Flush makes it look, but without waiting: until the journal notices the
		// cut, the pump stands before the journal's end.
		p.poke <- struct{}{}
		time.Sleep(time.Minute)
		if err := b.j.Sync(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		b.append("c")
		b.flush(p)
		equal(t, m.ids(), []string{"a", "b", "c"})
		equal(t, causes, []string{"truncated_file"})
		b.end()
	})
}

// deliverUntilKilled is an agent in small: it appends, prints what was taken, and
// delivers to a file.
func deliverUntilKilled(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	j, err := journal.Open(filepath.Join(dir, "journal"), journal.Options{MaxSegmentBytes: 100_000})
	if err != nil {
		fail(err)
	}
	target, err := Parse(fileURL(filepath.Join(dir, "out.jsonl"), "keep=0&batch_delay=2ms&batch_records=20"))
	if err != nil {
		fail(err)
	}
	s, err := target.Open(context.Background())
	if err != nil {
		fail(err)
	}
	o := target.Pump
	o.CursorDir, o.QuarantineDir, o.SaveEvery = filepath.Join(dir, "cursors"), filepath.Join(dir, "quarantine"), 30*time.Millisecond
	p, err := NewPump(j, s, o)
	if err != nil {
		fail(err)
	}
	go func() { fail(p.Run(context.Background())) }()
	if os.Getenv("SINKS_TEST_LAST") != "" {
		if err := p.Flush(context.Background()); err != nil {
			fail(err)
		}
		os.Exit(0)
	}
	for i := 0; ; i++ {
		id := fmt.Sprintf("%d-%d", os.Getpid(), i)
		if err := j.Append(line(id, 500+rand.IntN(3000))); err != nil {
			fail(err)
		}
		if _, err := os.Stdout.WriteString(id + "\n"); err != nil {
			fail(err)
		}
	}
}

// The process is killed at random moments. What the journal took reaches the
// sink; what comes twice has the same id; nothing else comes.
func TestKilledWhileDelivering(t *testing.T) {
	faults.Case(t, "SP-01")
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := func(env ...string) (*exec.Cmd, *bufio.Reader) {
		cmd := exec.Command(self)
		cmd.Env = append(append(os.Environ(), "SINKS_TEST_AGENT="+dir), env...)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, bufio.NewReader(out)
	}
	acked, pids := map[string]bool{}, map[string]bool{}
	const rounds = 20
	for range rounds {
		cmd, out := start()
		pids[fmt.Sprint(cmd.Process.Pid)] = true
		for n := 0; ; n++ {
			id, err := out.ReadString('\n')
			if err != nil {
				break
			}
			if n == 0 {
				kill := time.AfterFunc(time.Duration(rand.IntN(150))*time.Millisecond, func() { _ = cmd.Process.Kill() })
				defer kill.Stop()
			}
			acked[strings.TrimSuffix(id, "\n")] = true
		}
		_ = cmd.Wait() // killed
	}
	cmd, _ := start("SINKS_TEST_LAST=1")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	r, err := journal.OpenReader(filepath.Join(dir, "out.jsonl"), journal.Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	delivered, twice := map[string][]byte{}, 0
	for {
		l, err := r.Next()
		if err != nil {
			break
		}
		id := string(l.ID())
		pid, _, _ := strings.Cut(id, "-")
		if before, ok := delivered[id]; ok {
			twice++
			if !bytes.Equal(before, l.Data) {
				t.Fatalf("%s came twice, and not the same", id)
			}
		}
		if !pids[pid] {
			t.Fatalf("invented: %s", l.Data)
		}
		delivered[id] = bytes.Clone(l.Data)
	}
	for id := range acked {
		if delivered[id] == nil {
			t.Errorf("%s was taken and not delivered", id)
		}
	}
	if len(acked) < rounds {
		t.Errorf("only %d records", len(acked))
	}
	t.Logf("%d kills: %d records taken, %d delivered, %d twice", rounds, len(acked), len(delivered), twice)
}

// BenchmarkPumpToFile measures journal -> batch -> file, from a full journal.
func BenchmarkPumpToFile(b *testing.B) {
	dir := b.TempDir()
	j, err := journal.Open(filepath.Join(dir, "journal"), journal.Options{MaxBytes: 4 << 30})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = j.Close() }()
	s, err := Open(b.Context(), fileURL(filepath.Join(dir, "out.jsonl"), "max_bytes=64MiB&keep=1"))
	if err != nil {
		b.Fatal(err)
	}
	p, err := NewPump(j, s, PumpOptions{Name: "file", CursorDir: dir, QuarantineDir: dir})
	if err != nil {
		b.Fatal(err)
	}
	l := line("0190a5c0-0000-7000-8000-000000000000", 800)
	block := bytes.Repeat(l, 500)
	for n := 0; n < b.N; n += 500 {
		if err := j.Append(block); err != nil {
			b.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	b.SetBytes(int64(len(l)))
	b.ReportAllocs()
	b.ResetTimer()
	go func() { ended <- p.Run(ctx) }()
	if err := p.Flush(ctx); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	cancel()
	if err := <-ended; err != nil {
		b.Fatal(err)
	}
}
