package sinks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

// ErrAbandoned is returned by Pump.Run when the sink did not come back from a call
// long after its deadline: a goroutine is left in it.
var ErrAbandoned = errors.New("the sink did not come back from a call and was abandoned")

// LeftError says that a Flush ended before its sink had everything. What is left stays in
// the journal.
type LeftError struct {
	Sink      string
	Records   int64
	LastError string // of the sink, "" where it had none
	Err       error  // why the flush ended
}

func (e *LeftError) Error() string {
	text := fmt.Sprintf("flush sink %s: %v with %d records not delivered; they stay in the journal", e.Sink, e.Err, e.Records)
	if e.LastError != "" {
		text += " (last error: " + e.LastError + ")"
	}
	return text
}

// Unwrap returns why the flush ended.
func (e *LeftError) Unwrap() error { return e.Err }

// DefaultQuarantineBytes bounds a sink's quarantine file.
const DefaultQuarantineBytes = 16 << 20

// PumpOptions say where a pump keeps its state and how it makes batches. The zero
// value of all but Name, CursorDir and QuarantineDir gives the defaults.
type PumpOptions struct {
	Name          string // of the sink, in file names and messages
	Target        string // its URL without secrets, for people
	CursorDir     string // holds <name>.json
	QuarantineDir string // holds <name>.jsonl

	MaxRecords int           // in a batch; default 500
	MaxBytes   int64         // in a batch; default 1 MiB; a single record may be larger
	MaxDelay   time.Duration // that a record waits for its batch to fill; default 200 ms

	Timeout         time.Duration // of one attempt; default 30 s
	MinBackoff      time.Duration // before the second attempt; default 250 ms, doubled each time
	MaxBackoff      time.Duration // default 60 s; also bounds what a server asks for
	CloseTimeout    time.Duration // for the sink to end; default 2 s
	SaveEvery       time.Duration // between saves of the cursor under load; default 1 s
	QuarantineBytes int64         // bound of the quarantine file; default DefaultQuarantineBytes

	// OnLoss is told of refused records that the quarantine could not hold. It is
	// called from Run.
	OnLoss func(record.Loss)
	Now    func() time.Time // default time.Now
	Logger *slog.Logger     // default: silent
}

func (o *PumpOptions) defaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&o.MaxDelay, 200*time.Millisecond)
	set(&o.Timeout, 30*time.Second)
	set(&o.MinBackoff, 250*time.Millisecond)
	set(&o.MaxBackoff, time.Minute)
	set(&o.CloseTimeout, 2*time.Second)
	set(&o.SaveEvery, time.Second)
	if o.MaxRecords <= 0 {
		o.MaxRecords = 500
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = 1 << 20
	}
	if o.QuarantineBytes <= 0 {
		o.QuarantineBytes = DefaultQuarantineBytes
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

// State is what a pump is doing.
type State string

// The states of a pump.
const (
	StateIdle       State = "idle"       // everything is delivered
	StateDelivering State = "delivering" // a batch is being filled or is on its way
	StateRetrying   State = "retrying"   // the last attempt failed
	StateStuck      State = "stuck"      // the sink is over its deadline and does not come back
	StateStopped    State = "stopped"    // Run has ended, or not begun
)

// Status describes a pump for people and metrics.
type Status struct {
	Name          string           `json:"name"`
	Target        string           `json:"target,omitempty"`
	State         State            `json:"state"`
	Position      journal.Position `json:"position"`
	BehindRecords int64            `json:"behind_records"`
	BehindSeconds float64          `json:"behind_seconds"` // age of the oldest record that waits
	Delivered     int64            `json:"delivered"`
	Batches       int64            `json:"batches"`
	Refused       int64            `json:"refused"`
	Unkept        int64            `json:"unkept"` // refused, and the quarantine could not hold them
	// Dropped are the records that the sink will not get: those that the journal's bound
	// took before, and Unkept. A loss record tells of each.
	Dropped      int64             `json:"dropped"`
	Retries      int64             `json:"retries"`
	LastError    string            `json:"last_error,omitempty"`
	LastErrorAt  time.Time         `json:"last_error_at,omitzero"`
	NextTry      time.Time         `json:"next_try,omitzero"`
	LastDelivery time.Time         `json:"last_delivery,omitzero"`
	Read         journal.ReadStats `json:"read"` // what reading the journal came across
}

// Pump delivers a journal to one sink.
type Pump struct {
	o          PumpOptions
	j          *journal.Journal
	sink       Sink
	cursor     *journal.Cursor
	reader     *journal.Reader
	quarantine quarantine

	batch     batch
	unread    int              // times in a row that the journal could not be read
	idleAt    journal.Position // where idle waited last
	idleWoken bool             // and whether the journal woke it
	unsaved   bool             // the cursor moved since the last save
	savedAt   time.Time
	saveErr   bool // the last save failed, and that was logged
	loggedAt  time.Time
	logged    string // the error that was logged last, "" after a success

	poke chan struct{} // holds one token: a Flush began
	done chan struct{} // closed when Run ends

	mu      sync.Mutex
	status  Status
	oldest  time.Time     // time of the oldest record in the batch
	flushes int           // Flush calls that wait
	moved   chan struct{} // closed when the cursor moves; nil while nobody waits
}

// NewPump opens the sink's cursor in j and returns a pump that delivers from there.
// It must be called before j's first Append, or that append may let go of segments
// that this sink still needs. The pump owns s from here on; Run closes it.
func NewPump(j *journal.Journal, s Sink, o PumpOptions) (*Pump, error) {
	o.defaults()
	c, err := j.OpenCursor(o.CursorDir, o.Name)
	if errors.Is(err, journal.ErrCursorInUse) {
		return nil, sameName(o.Target, o.Name)
	}
	if err != nil {
		return nil, err
	}
	r, err := j.Reader(c.Position())
	if err != nil {
		_ = c.Close() // the first error counts
		return nil, fmt.Errorf("sink %s: %w", o.Name, err)
	}
	return &Pump{
		o: o, j: j, sink: s, cursor: c, reader: r,
		quarantine: quarantine{path: filepath.Join(o.QuarantineDir, o.Name+".jsonl"), sink: o.Name, maxBytes: o.QuarantineBytes},
		poke:       make(chan struct{}, 1),
		done:       make(chan struct{}),
		status:     Status{Name: o.Name, Target: o.Target, State: StateStopped},
	}, nil
}

// batch is the records being delivered, in memory that is used again.
type batch struct {
	entries []Entry
	data    []byte // holds the lines
	end     journal.Position
	oldest  time.Time
}

func (b *batch) reset() { b.entries, b.data = b.entries[:0], b.data[:0] }

// fits says whether one more line of any length can be added.
func (b *batch) fits(o *PumpOptions) bool {
	if len(b.entries) == 0 {
		return true
	}
	return len(b.entries) < o.MaxRecords && int64(len(b.data))+journal.MaxLine <= o.MaxBytes
}

func (b *batch) add(l journal.Line) {
	if len(b.entries) == 0 {
		b.oldest = l.TS()
	}
	start := len(b.data)
	b.data = append(b.data, l.Data...)
	b.entries = append(b.entries, Entry{ID: string(l.ID()), Kind: l.Kind(), Line: b.data[start:len(b.data):len(b.data)]})
	b.end = l.Next
}

// Run delivers until ctx ends or the journal is closed and all of it is delivered.
// It then saves the cursor and closes the sink. What is not delivered stays in the
// journal for the next start. Run is called once.
func (p *Pump) Run(ctx context.Context) error {
	defer close(p.done)
	var err error
	for err == nil {
		if err = p.collect(ctx); err == nil && len(p.batch.entries) > 0 {
			err = p.deliver(ctx)
		}
	}
	if errors.Is(err, journal.ErrClosed) || ctx.Err() != nil && !errors.Is(err, ErrAbandoned) {
		err = nil // the two ways to end
	}
	errs := []error{err}
	if !errors.Is(err, ErrAbandoned) {
		errs = append(errs, p.closeSink(ctx))
	}
	errs = append(errs, p.cursor.Close(), p.reader.Close(), p.quarantine.sync())
	p.mu.Lock()
	p.status.State, p.status.NextTry = StateStopped, time.Time{}
	p.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sink %s: %w", p.o.Name, err)
	}
	return nil
}

// collect fills the batch. It returns with an empty one where only the place moved.
func (p *Pump) collect(ctx context.Context) error {
	p.batch.reset()
	var full <-chan time.Time // fires when the first record has waited long enough
	late := false
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !p.batch.fits(&p.o) {
			return nil
		}
		l, err := p.reader.Next()
		switch {
		case err == nil:
			if at, ok := p.cursor.Take(l); !ok {
				err = p.reader.Seek(at)
				break
			}
			p.unread = 0
			p.batch.add(l)
			if len(p.batch.entries) == 1 {
				p.working()
				full = time.After(p.o.MaxDelay)
			}
			continue
		case errors.Is(err, io.EOF) && len(p.batch.entries) == 0:
			return p.idle(ctx)
		case errors.Is(err, io.EOF):
			if late || p.flushing() {
				return nil
			}
			// Not woken by each append, which would cost more than the delivery.
			select {
			case <-full:
				late = true
			case <-p.poke:
			case <-ctx.Done():
			}
			continue
		}
		if err != nil {
			// The disk under the journal fails. Nothing is passed over by itself.
			if len(p.batch.entries) > 0 {
				return nil
			}
			wait := p.backoff(p.unread, 0)
			p.unread++
			p.failed(fmt.Errorf("read the journal: %w", err), wait)
			if err := p.pause(ctx, wait); err != nil {
				return err
			}
		}
	}
}

// idle is called where everything is delivered. It waits for more.
func (p *Pump) idle(ctx context.Context) error {
	if at := p.reader.Position(); at != p.cursor.Position() {
		p.advance(at, 0) // over headers and damage, where no record stood
	}
	p.rest()
	changed, err := p.j.Changed(p.reader.Position())
	if err != nil {
		return err
	}
	if at := p.reader.Position(); at == p.idleAt && p.idleWoken {
		// The journal says that there is more, and it is not in the file: somebody cut
		// it. The journal notices with its next Sync.
		return p.pause(ctx, time.Second)
	}
	p.idleAt, p.idleWoken = p.reader.Position(), false
	var due <-chan time.Time
	if p.unsaved {
		t := time.NewTimer(p.o.SaveEvery - time.Since(p.savedAt))
		defer t.Stop()
		due = t.C
	}
	select {
	case <-changed:
		p.idleWoken = true
	case <-p.poke:
	case <-due:
		p.save()
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// deliver hands the batch to the sink until it is taken.
func (p *Pump) deliver(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		err := p.attempt(ctx)
		var refused *RefusedError
		if err == nil || errors.As(err, &refused) {
			p.taken(refused)
			return nil
		}
		if ctx.Err() != nil || errors.Is(err, ErrAbandoned) {
			return err
		}
		wait := p.backoff(attempt, retryAfter(err))
		p.failed(err, wait)
		if err := p.pause(ctx, wait); err != nil {
			return err
		}
	}
}

// attempt is one call of the sink's Write. A sink that does not keep its deadline
// is waited for, because it must not be called twice at once; only the end of the
// pump leaves it behind.
func (p *Pump) attempt(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, p.o.Timeout)
	defer cancel()
	entries := p.batch.entries
	result := begin(func() error { return p.sink.Write(within, entries) })
	err := p.await(within, result)
	if errors.Is(err, ErrAbandoned) && ctx.Err() == nil {
		p.stuck()
		err = p.await(ctx, result)
	}
	return err
}

func (p *Pump) closeSink(ctx context.Context) error {
	within, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.o.CloseTimeout)
	defer cancel()
	return p.await(within, begin(func() error { return p.sink.Close(within) }))
}

// begin calls a sink in a goroutine. One sink's panic is not the end of the others.
func begin(call func() error) <-chan error {
	result := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				result <- fmt.Errorf("the sink's code failed: %v\n%s", r, debug.Stack())
			}
		}()
		result <- call()
	}()
	return result
}

// await returns the result of a call that shall end with ctx, and ErrAbandoned where
// it has not come back a while after that.
func (p *Pump) await(ctx context.Context, result <-chan error) error {
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
	}
	grace := time.NewTimer(p.o.CloseTimeout)
	defer grace.Stop()
	select {
	case err := <-result:
		return err
	case <-grace.C:
		return ErrAbandoned
	}
}

// taken books a batch that the sink took, but for what it refused.
func (p *Pump) taken(refused *RefusedError) {
	n := len(p.batch.entries)
	unkept := 0
	var why error
	count := 0
	if refused != nil {
		seen := map[int]bool{}
		for _, r := range refused.Refused {
			if r.Index < 0 || r.Index >= n || seen[r.Index] {
				continue // a sink's mistake must not take others along
			}
			seen[r.Index] = true
			if err := p.quarantine.add(p.batch.entries[r.Index], r.Reason, p.o.Now()); err != nil {
				unkept++
				why = err
			}
		}
		count = len(seen)
		if err := p.quarantine.sync(); err != nil {
			p.o.Logger.Error("the quarantine is not durable", "sink", p.o.Name, "err", err)
		}
		p.o.Logger.Warn("the sink refused records for good", "sink", p.o.Name, "refused", count, "of", n, "first", refused.Error(), "quarantine", p.quarantine.path)
	}
	if unkept > 0 {
		p.o.OnLoss(record.Loss{Cause: "quarantine_full", Count: int64(unkept), Source: p.o.Name, From: p.batch.oldest, To: p.o.Now(),
			Detail: "refused by the sink, and not kept: " + why.Error()})
	}
	p.mu.Lock()
	if p.status.State == StateRetrying || p.status.State == StateStuck {
		p.o.Logger.Info("the sink takes records again", "sink", p.o.Name)
	}
	p.logged = ""
	p.status.State, p.status.NextTry = StateDelivering, time.Time{}
	p.status.Delivered += int64(n - count)
	p.status.Refused += int64(count)
	p.status.Unkept += int64(unkept)
	p.status.Batches++
	p.status.LastDelivery = p.o.Now()
	p.oldest = time.Time{}
	p.mu.Unlock()
	p.advance(p.batch.end, n)
	if time.Since(p.savedAt) >= p.o.SaveEvery {
		p.save()
	}
}

func (p *Pump) advance(at journal.Position, n int) {
	p.cursor.Advance(at, n)
	p.unsaved = true
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.Read = p.reader.Stats()
	if p.moved != nil {
		close(p.moved)
		p.moved = nil
	}
}

// save writes the cursor. Without it, delivery goes on; after a crash more records
// come twice.
func (p *Pump) save() {
	p.savedAt = time.Now()
	err := p.cursor.Save()
	p.unsaved = err != nil
	if err != nil && !p.saveErr {
		p.o.Logger.Warn("the place of the sink in the journal is not saved; after a crash it gets records again", "sink", p.o.Name, "err", err)
	}
	p.saveErr = err != nil
	if err != nil {
		p.mu.Lock()
		p.status.LastError, p.status.LastErrorAt = err.Error(), p.o.Now()
		p.mu.Unlock()
	}
}

// backoff is the time before the next attempt. The jitter keeps the agents of a
// fleet from coming back together.
func (p *Pump) backoff(attempt int, asked time.Duration) time.Duration {
	if asked > 0 {
		if asked >= p.o.MaxBackoff {
			return p.o.MaxBackoff - rand.N(p.o.MaxBackoff/10+1)
		}
		return min(asked+rand.N(asked/10+1), p.o.MaxBackoff)
	}
	d := p.o.MaxBackoff
	if attempt < 30 && p.o.MinBackoff<<attempt > 0 {
		d = min(p.o.MinBackoff<<attempt, d)
	}
	return d/2 + rand.N(d/2+1)
}

// pause waits, or until a Flush asks for an attempt now.
func (p *Pump) pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.poke:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// failed books a transient error. It is logged once, and again each minute.
func (p *Pump) failed(err error, wait time.Duration) {
	now := p.o.Now()
	p.mu.Lock()
	p.status.State = StateRetrying
	p.status.Retries++
	p.status.LastError, p.status.LastErrorAt, p.status.NextTry = err.Error(), now, now.Add(wait)
	p.mu.Unlock()
	if text := err.Error(); text != p.logged || time.Since(p.loggedAt) >= time.Minute {
		p.logged, p.loggedAt = text, time.Now()
		p.o.Logger.Warn("the sink does not take records; they stay in the journal", "sink", p.o.Name, "err", err, "behind", p.cursor.Behind(), "next", wait.Round(time.Millisecond))
	}
}

func (p *Pump) stuck() {
	p.mu.Lock()
	p.status.State = StateStuck
	p.status.LastError, p.status.LastErrorAt = fmt.Sprintf("no answer within %s", p.o.Timeout), p.o.Now()
	p.mu.Unlock()
	p.o.Logger.Error("the sink is over its deadline and does not come back", "sink", p.o.Name, "timeout", p.o.Timeout)
}

func (p *Pump) working() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.State = StateDelivering
	p.oldest = p.batch.oldest
}

func (p *Pump) rest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.State = StateIdle
	p.oldest = time.Time{}
}

func (p *Pump) flushing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.flushes > 0
}

// Flush delivers what is in the journal now, without waiting for batches to fill,
// and saves the cursor. A pump that waits after an error tries again at once. When
// ctx ends first, the error is a *LeftError.
func (p *Pump) Flush(ctx context.Context) error {
	target := p.j.End()
	p.mu.Lock()
	p.flushes++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.flushes--
		p.mu.Unlock()
	}()
	select {
	case p.poke <- struct{}{}:
	default: // a token is there
	}
	for {
		p.mu.Lock()
		if p.moved == nil {
			p.moved = make(chan struct{})
		}
		moved := p.moved
		p.mu.Unlock()
		if !p.cursor.Position().Before(target) {
			if err := p.cursor.Save(); err != nil {
				return fmt.Errorf("flush sink %s: everything is delivered: %w", p.o.Name, err)
			}
			return nil
		}
		why := error(nil)
		select {
		case <-moved:
			continue
		case <-ctx.Done():
			why = ctx.Err()
		case <-p.done:
			why = errors.New("the pump has stopped")
		}
		s := p.Status()
		return &LeftError{Sink: p.o.Name, Records: s.BehindRecords, LastError: s.LastError, Err: why}
	}
}

// Status tells what the pump is doing. It is safe to call at any time.
func (p *Pump) Status() Status {
	behind, at, dropped := p.cursor.Behind(), p.cursor.Position(), p.cursor.Dropped()
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	s.BehindRecords, s.Position = behind, at
	s.Dropped = dropped + s.Unkept
	if !p.oldest.IsZero() {
		s.BehindSeconds = max(p.o.Now().Sub(p.oldest).Seconds(), 0)
	}
	return s
}
