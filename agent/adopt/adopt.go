// Package adopt delivers the journals that dead runners left on a node.
//
// Runner pods keep their state folder on a volume of the node, one sub-folder each,
// and die with their job. An adopter (a DaemonSet) looks for journals that no agent
// has open and that have been quiet for a while, takes each away from its runner's
// folder by a rename, delivers it to the sinks from where the runner's own agent had
// come to, and removes it.
//
//	DIR/<runner>/journal             of a runner; its agent holds the lock
//	DIR/.adopted/<runner>-<t>/journal  taken away
//	DIR/.adopted/<runner>-<t>/own      the adopter's cursors and quarantine for it
//	DIR/.quarantine/                 what sinks refused, for tallyman replay
//
// Two never deliver one journal at the same time: the journal's lock goes with the
// file through the rename, and whoever does not get it leaves the journal alone. A
// runner's folder is written by jobs, so nothing in it is followed or overwritten:
// cursors are copied out of it, and no path through it is opened.
package adopt

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

const (
	adoptedDir    = ".adopted"
	quarantineDir = ".quarantine"
	goneDir       = ".gone"   // delivered, and being removed
	journalDir    = "journal" // of a runner's state folder, see config.Config.Journal
	ownDir        = "own"
	// maxCursor bounds a cursor file, which is a line of JSON.
	maxCursor = 64 << 10
	// quarantineBytes is what all that was refused may take, of all runners.
	quarantineBytes = 1 << 30
)

// Options say what is adopted and where it goes. Dir and Sinks must be set.
type Options struct {
	Dir     string   // holds one folder for each runner
	Sinks   []string // URLs, the same as the runners': a sink goes on where the runner's stopped
	Schemes []sinks.Scheme

	Quiet    time.Duration // since the last change of a journal before it is adopted; default 1 min
	Forget   time.Duration // since the last change of a runner's folder before it is removed; default 7 days
	Every    time.Duration // between two looks at Dir; default 5 s
	Parallel int           // journals at the same time; default 8
	Patience time.Duration // with sinks that fail and take nothing, while other journals may wait; default 10 s

	// QuarantineBytes bounds what sinks refused of all dead runners; default 1 GiB. The
	// first refusals are kept. Journals that are in work at the same time may each
	// take what is left.
	QuarantineBytes int64

	Host   record.Host // names this machine in loss records
	Logger *slog.Logger
	Now    func() time.Time // default time.Now
}

// Adopter delivers dead journals. Its methods are safe for concurrent use.
type Adopter struct {
	o    Options
	slot chan struct{} // holds one token for each journal in work

	mu     sync.Mutex
	work   map[string]*adoption // by the name in .adopted
	failed map[string]time.Time // journals that were tried before, and when to try again
	queued int                  // journals that wait for a slot
	done   Counts
}

// Counts are what an adopter did since it started.
type Counts struct {
	Adopted   int64 `json:"adopted"`   // journals delivered and removed
	Delivered int64 `json:"delivered"` // records that sinks took, counted for each sink
	Refused   int64 `json:"refused"`   // records that sinks refused
	Unkept    int64 `json:"unkept"`    // of them, those that the quarantine had no room for, and a loss record tells of
	Removed   int64 `json:"removed"`   // what stood in a journal's place and was none
	Errors    int64 `json:"errors"`    // attempts that failed; they are tried again
}

// Status is what an adopter is doing.
type Status struct {
	Counts
	Journals []Journal `json:"journals"` // in work
	Waiting  int       `json:"waiting"`  // journals that wait for their turn
}

// Journal is one journal in work.
type Journal struct {
	Name  string         `json:"name"`
	Sinks []sinks.Status `json:"sinks"`
}

// New checks the options.
func New(o Options) (*Adopter, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Quiet <= 0 {
		o.Quiet = time.Minute
	}
	if o.Forget <= 0 {
		o.Forget = 7 * 24 * time.Hour
	}
	if o.Every <= 0 {
		o.Every = 5 * time.Second
	}
	if o.Parallel <= 0 {
		o.Parallel = 8
	}
	if o.Patience <= 0 {
		o.Patience = 10 * time.Second
	}
	if o.QuarantineBytes <= 0 {
		o.QuarantineBytes = quarantineBytes
	}
	if len(o.Sinks) == 0 {
		return nil, errors.New("adopt: no sinks are configured, so there is nowhere to deliver to (set sinks, as on the runners)")
	}
	if err := errors.Join(sinks.CheckAll(o.Sinks, o.Schemes...)...); err != nil {
		return nil, fmt.Errorf("adopt: %w", err)
	}
	for _, name := range []string{adoptedDir, quarantineDir, goneDir} {
		dir := filepath.Join(o.Dir, name)
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("adopt: %w (mount the runners' volume there, writable)", err)
		}
		if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
			return nil, errors.Join(fmt.Errorf("adopt: %s is no folder", dir), err)
		}
	}
	// What is in it and not the folder itself, which another adopter may be using.
	left, err := os.ReadDir(filepath.Join(o.Dir, goneDir))
	for _, e := range left {
		err = errors.Join(err, os.RemoveAll(filepath.Join(o.Dir, goneDir, e.Name())))
	}
	if err != nil {
		return nil, fmt.Errorf("adopt: %w", err)
	}
	return &Adopter{o: o, slot: make(chan struct{}, o.Parallel), work: map[string]*adoption{}, failed: map[string]time.Time{}}, nil
}

// Status returns a snapshot.
func (a *Adopter) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Status{Counts: a.done, Journals: []Journal{}, Waiting: a.queued}
	for name, w := range a.work {
		j := Journal{Name: name, Sinks: []sinks.Status{}}
		for _, p := range w.pumps {
			j.Sinks = append(j.Sinks, p.Status())
		}
		s.Journals = append(s.Journals, j)
	}
	slices.SortFunc(s.Journals, func(a, b Journal) int { return strings.Compare(a.Name, b.Name) })
	return s
}

// Run adopts until ctx ends. What is not delivered then stays for the next Run.
func (a *Adopter) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	tick := time.NewTicker(a.o.Every)
	defer tick.Stop()
	freed := make(chan struct{}, 1) // holds one token: a slot came free
	for look := true; ; {
		if look {
			if err := a.take(); err != nil {
				a.o.Logger.Error("looking for journals", "error", err)
			}
		}
		names, err := a.waiting()
		if err != nil {
			a.o.Logger.Error("looking for adopted journals", "error", err)
		}
		for len(names) > 0 && a.free() {
			a.begin(ctx, names[0], &running, freed)
			names = names[1:]
		}
		a.mu.Lock()
		a.queued = len(names)
		a.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			look = true
		case <-freed: // the next one may be one that was never tried, which goes first
			look = false
		}
	}
}

// begin works on a journal in the slot that was taken for it.
func (a *Adopter) begin(ctx context.Context, name string, running *sync.WaitGroup, freed chan<- struct{}) {
	w := &adoption{a: a, name: name, dir: filepath.Join(a.o.Dir, adoptedDir, name), log: a.o.Logger.With("journal", name)}
	a.mu.Lock()
	a.work[name] = w
	a.mu.Unlock()
	running.Go(func() {
		a.book(w, w.run(ctx))
		<-a.slot
		select {
		case freed <- struct{}{}:
		default: // a token is there
		}
	})
}

// free takes a slot where there is one.
func (a *Adopter) free() bool {
	select {
	case a.slot <- struct{}{}:
		return true
	default:
		return false
	}
}

// take moves the journals of dead agents out of their runners' folders.
func (a *Adopter) take() error {
	entries, err := os.ReadDir(a.o.Dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		dir := filepath.Join(a.o.Dir, e.Name(), journalDir)
		if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
			errs = append(errs, a.forget(filepath.Join(a.o.Dir, e.Name())))
			continue
		}
		last, err := lastChange(dir)
		// A time in the future is one of a clock that was wrong, and says nothing.
		if err == nil && a.o.Now().Sub(last).Abs() < a.o.Quiet {
			continue
		}
		locked := false
		if err == nil {
			locked, err = journal.Locked(dir)
		}
		if err == nil && !locked {
			err = a.move(e.Name(), dir)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // else another adopter was faster
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// forget removes the folder of a runner that left no journal and has not been touched
// for long. Not at once: an idle runner may have it mounted and wait for its job.
func (a *Adopter) forget(dir string) error {
	last, err := lastChange(dir)
	if err != nil || a.o.Now().Sub(last) < a.o.Forget {
		return err
	}
	return os.RemoveAll(dir)
}

// move takes one journal. An agent that starts at this very moment keeps its lock and
// writes on in the moved folder; it is adopted when that agent has ended.
func (a *Adopter) move(runner, dir string) error {
	name := fmt.Sprintf("%s-%d", runner, a.o.Now().UnixNano())
	to := filepath.Join(a.o.Dir, adoptedDir, name)
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(to, journalDir)); err != nil {
		_ = os.Remove(to) // it is empty
		return err
	}
	a.o.Logger.Info("adopting a journal", "journal", name)
	return nil
}

// lastChange is the newest time of a journal's folder and of the files in it.
func lastChange(dir string) (time.Time, error) {
	st, err := os.Lstat(dir)
	if err != nil {
		return time.Time{}, err
	}
	last := st.ModTime()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return time.Time{}, err
	}
	for _, e := range entries {
		if st, err := e.Info(); err == nil && st.ModTime().After(last) {
			last = st.ModTime()
		}
	}
	return last, nil
}

// waiting lists the adopted journals that nobody in this process works on, those first
// that were not tried, or not for the longest time.
func (a *Adopter) waiting() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(a.o.Dir, adoptedDir))
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var names []string
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name()] = true
		if a.work[e.Name()] == nil && e.IsDir() && !a.o.Now().Before(a.failed[e.Name()]) {
			names = append(names, e.Name())
		}
	}
	maps.DeleteFunc(a.failed, func(name string, _ time.Time) bool { return !there[name] })
	slices.SortStableFunc(names, func(x, y string) int { return a.failed[x].Compare(a.failed[y]) })
	return names, nil
}

// book notes how an adoption ended.
func (a *Adopter) book(w *adoption, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.work, w.name)
	delete(a.failed, w.name)
	for _, p := range w.pumps {
		s := p.Status()
		a.done.Delivered += s.Delivered
		a.done.Refused += s.Refused
		a.done.Unkept += s.Unkept
	}
	a.done.Unkept += w.unkept
	switch {
	case errors.Is(err, errNoJournal):
		a.done.Removed++
		w.log.Warn("what was taken from a runner's folder is no journal, and is removed", "is", err)
	case err == nil:
		a.done.Adopted++
		w.log.Info("a journal is delivered and removed")
	case w.gone():
		// What this one's look at it left behind. Where the other one is not done with
		// it either, that one removes it.
		_ = os.RemoveAll(filepath.Join(a.o.Dir, goneDir, w.name))
	case errors.Is(err, errYielded):
		a.failed[w.name] = a.o.Now()
		w.log.Info("a journal waits for a sink and lets others go first", "left", err)
	case errors.Is(err, journal.ErrLocked):
		// Another adopter has it, or its own agent still does.
		a.failed[w.name] = a.o.Now().Add(a.o.Every)
	case errors.Is(err, context.Canceled): // this one ends
	default:
		a.done.Errors++
		a.failed[w.name] = a.o.Now().Add(time.Minute)
		w.log.Error("a journal is not delivered yet; it is tried again", "error", err)
	}
}

// adoption is the delivery of one journal.
type adoption struct {
	a     *Adopter
	name  string
	dir   string
	log   *slog.Logger
	pumps []*sinks.Pump // set once, before the first Status may see it

	unkept int64 // records of the dead agent's quarantine that found no room

	mu     sync.Mutex
	losses []record.Loss
}

// run delivers and removes the journal. An error leaves it for the next time.
func (w *adoption) run(ctx context.Context) (err error) {
	own, dead := filepath.Join(w.dir, ownDir), filepath.Join(w.dir, journalDir)
	st, err := os.Lstat(dead)
	switch {
	case errors.Is(err, fs.ErrNotExist): // an adopter ended between two steps
		return cmp.Or(os.Remove(w.dir), fmt.Errorf("%w: an empty folder", errNoJournal))
	case err != nil:
		return err
	case !st.IsDir():
		// A job put it there between the look at the runner's folder and the rename. No job
		// reaches it here any more.
		return cmp.Or(os.RemoveAll(w.dir), fmt.Errorf("%w: no folder (%v)", errNoJournal, st.Mode().Type()))
	}
	// No bound: a smaller one than the runner's would drop what the runner kept.
	j, err := journal.Open(dead, journal.Options{MaxBytes: 1 << 50, OnLoss: w.lost, Logger: w.log, Now: w.a.o.Now})
	if err != nil {
		return err
	}
	defer func() {
		if j != nil {
			err = errors.Join(err, j.Close())
		}
	}()
	if w.gone() {
		return errGone
	}
	if err := inherit(dead, own); err != nil {
		return fmt.Errorf("take over the cursors: %w", err)
	}
	// Before the delivery, because a loss record tells of what finds no room.
	if err := w.keepDead(dead, j); err != nil {
		return fmt.Errorf("keep what sinks refused of the runner's agent: %w", err)
	}
	pumps, err := w.open(ctx, j, own)
	if err != nil {
		return err
	}
	w.a.mu.Lock()
	w.pumps = pumps
	w.a.mu.Unlock()
	if err := w.append(j); err != nil {
		return errors.Join(err, w.deliver(ctx, nil))
	}
	if err := w.deliver(ctx, j); err != nil {
		return err
	}
	if err := w.keepOwn(own); err != nil {
		return fmt.Errorf("keep what sinks refused: %w", err)
	}
	// Out of the others' sight while the lock is held, then away.
	gone := filepath.Join(w.a.o.Dir, goneDir, w.name)
	if err := os.Rename(w.dir, gone); err != nil {
		return err
	}
	err = j.Close()
	j = nil
	return errors.Join(err, os.RemoveAll(gone))
}

// errNoJournal is the end of an adoption of something else.
var errNoJournal = errors.New("no journal")

// errGone is the end of an adoption that another adopter finished.
var errGone = errors.New("another adopter has delivered it")

// gone says that another adopter has delivered the journal meanwhile.
func (w *adoption) gone() bool {
	_, err := os.Lstat(w.dir)
	return errors.Is(err, fs.ErrNotExist)
}

func (w *adoption) lost(l record.Loss) {
	w.log.Warn("records are missing", "cause", l.Cause, "count", l.Count, "source", l.Source, "detail", l.Detail)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.losses = append(w.losses, l)
}

// append writes what was found missing into the journal, so that it is delivered too.
func (w *adoption) append(j *journal.Journal) error {
	w.mu.Lock()
	losses := w.losses
	w.losses = nil
	w.mu.Unlock()
	for _, l := range losses {
		ts := l.To
		if ts.IsZero() {
			ts = w.a.o.Now()
		}
		l.Detail = strings.TrimPrefix(l.Detail+"; found when "+w.name+" was adopted", "; ")
		r := record.Record{ID: record.NewID(w.a.o.Now()), TS: ts, Kind: record.KindLoss, Schema: record.SchemaVersion, By: record.ByNone, Host: &w.a.o.Host, Loss: &l}
		if err := j.Append(record.Append(nil, &r)); err != nil {
			return fmt.Errorf("append a loss record: %w", err)
		}
	}
	return nil
}

// open makes a pump for each sink.
func (w *adoption) open(ctx context.Context, j *journal.Journal, own string) (pumps []*sinks.Pump, err error) {
	for _, url := range w.a.o.Sinks {
		t, err := sinks.Parse(url, w.a.o.Schemes...)
		if err != nil {
			return nil, err
		}
		s, err := t.Open(ctx)
		if err != nil {
			return nil, err
		}
		t.Pump.QuarantineBytes = min(sinks.DefaultQuarantineBytes, max(1, w.a.room()))
		p, err := t.NewPump(j, s, own, w.lost, w.log)
		if err != nil {
			return nil, errors.Join(err, s.Close(ctx))
		}
		pumps = append(pumps, p)
	}
	return pumps, nil
}

// deliver runs the pumps until all is taken, or ctx ends; with no journal, only to
// end them.
func (w *adoption) deliver(whole context.Context, j *journal.Journal) error {
	ctx, yield := context.WithCancelCause(whole)
	defer yield(nil)
	running, stop := context.WithCancel(ctx)
	defer stop()
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() { w.watch(running, yield) })
	ended := make(chan error, len(w.pumps))
	for _, p := range w.pumps {
		go func() { ended <- p.Run(running) }()
	}
	var errs []error
	flushed := make(chan error, len(w.pumps))
	if j != nil {
		for _, p := range w.pumps {
			go func() { flushed <- p.Flush(ctx) }()
		}
		for range w.pumps {
			errs = append(errs, <-flushed)
		}
		// What the pumps themselves lost is not in the journal yet.
		if errs = append(errs, w.append(j)); errors.Join(errs...) == nil {
			for _, p := range w.pumps {
				errs = append(errs, p.Flush(ctx))
			}
		}
	}
	stop()
	for range w.pumps {
		errs = append(errs, <-ended)
	}
	if whole.Err() != nil {
		return context.Canceled
	}
	if cause := context.Cause(ctx); errors.Is(cause, errYielded) {
		return cause
	}
	return errors.Join(errs...)
}

// errYielded is the end of an adoption that waits for dead sinks only, and holds up
// other journals, of which the sinks that are well could have the records.
var errYielded = errors.New("sinks that fail")

// watch yields when no sink takes anything any more, and all slots are taken.
func (w *adoption) watch(ctx context.Context, yield context.CancelCauseFunc) {
	var before int64 = -1
	since := time.Now()
	tick := time.NewTicker(w.a.o.Patience / 10)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var taken int64
		var left []string
		for _, p := range w.pumps {
			s := p.Status()
			taken += s.Delivered + s.Refused
			switch {
			case s.BehindRecords == 0:
			case s.State == sinks.StateRetrying || s.State == sinks.StateStuck:
				left = append(left, fmt.Sprintf("%s: %s", s.Name, s.LastError))
			default:
				before = -1 // an attempt is on its way, which has its own time
			}
		}
		if taken != before || len(w.a.slot) < cap(w.a.slot) {
			before, since = taken, time.Now()
		}
		if len(left) > 0 && time.Since(since) >= w.a.o.Patience {
			yield(fmt.Errorf("%w: %s", errYielded, strings.Join(left, ", ")))
			return
		}
	}
}

// inherit copies the dead agent's cursors, once. They are read through os.Root, which
// follows no link out of the journal.
func inherit(dead, own string) error {
	cursors := filepath.Join(own, "cursors")
	if _, err := os.Lstat(cursors); err == nil {
		return nil
	}
	temp := own + ".new"
	if err := errors.Join(os.RemoveAll(temp), os.MkdirAll(filepath.Join(temp, "cursors"), 0o700)); err != nil {
		return err
	}
	root, err := os.OpenRoot(dead)
	if err != nil {
		return err
	}
	defer root.Close()
	err = eachFile(root, "cursors", func(name string, f *os.File, _ int64) error {
		b, err := io.ReadAll(io.LimitReader(f, maxCursor+1))
		if err != nil || len(b) > maxCursor {
			return nil // none of ours: its sink begins anew
		}
		return os.WriteFile(filepath.Join(temp, "cursors", name), b, 0o600)
	})
	if err != nil {
		return err
	}
	// A rename, because half of the cursors would mean a delivery from the beginning.
	return os.Rename(temp, own)
}

// eachFile opens the regular files of a folder. Others are passed over: nothing of ours
// looks like that.
func eachFile(root *os.Root, dir string, do func(name string, f *os.File, size int64) error) error {
	folder, err := root.Open(dir)
	if err != nil {
		return nil // there is none
	}
	defer folder.Close()
	entries, err := folder.ReadDir(-1)
	if err != nil {
		return nil // no folder
	}
	open := func(name string) error {
		// Non-blocking, because it may be a FIFO by now.
		f, err := root.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil || !st.Mode().IsRegular() {
			return nil
		}
		return do(name, f, st.Size())
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if err := open(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// room is what the quarantine may still take.
func (a *Adopter) room() int64 {
	left := a.o.QuarantineBytes
	entries, err := os.ReadDir(filepath.Join(a.o.Dir, quarantineDir))
	if err != nil {
		return 0
	}
	for _, e := range entries {
		if st, err := e.Info(); err == nil {
			left -= st.Size()
		}
	}
	return max(0, left)
}

// keepDead takes the quarantine of the runner's agent out of its journal, file by file,
// to where it outlives the journal.
func (w *adoption) keepDead(dead string, j *journal.Journal) error {
	return eachQuarantine(dead, func(root *os.Root, name, sink string, f *os.File, size int64) error {
		var err error
		if room := w.a.room(); size > room {
			n := lines(io.LimitReader(f, w.a.o.QuarantineBytes)) // a sparse file may say that it has any size
			w.unkept += n
			w.lost(record.Loss{Cause: "quarantine_full", Count: n, Source: sink, To: w.a.o.Now(),
				Detail: fmt.Sprintf("refused by the sink while the runner lived, and not kept: the adopter's quarantine has room for %d bytes (send again or remove what is in %s)", room, filepath.Join(w.a.o.Dir, quarantineDir))})
			err = w.append(j)
		} else {
			err = w.keep(sink, f)
		}
		if err != nil {
			return err
		}
		return root.Remove(filepath.Join("quarantine", name)) // a next attempt must not take it again
	})
}

// lines counts the lines that r gives before its end or an error.
func lines(r io.Reader) (n int64) {
	buf := make([]byte, 64<<10)
	for {
		got, err := r.Read(buf)
		n += int64(bytes.Count(buf[:got], []byte{'\n'}))
		if err != nil {
			return n
		}
	}
}

// keepOwn does the same with what sinks refused of the adopter, which bounds itself.
func (w *adoption) keepOwn(own string) error {
	return eachQuarantine(own, func(_ *os.Root, _, sink string, f *os.File, _ int64) error { return w.keep(sink, f) })
}

// keep writes what a sink refused to the adopter's quarantine: all of it, or nothing.
func (w *adoption) keep(sink string, refused *os.File) error {
	to := filepath.Join(w.a.o.Dir, quarantineDir, w.name+"-"+sink+".jsonl")
	w.log.Warn("sinks refused records of this journal; tallyman replay sends them again", "quarantine", to)
	f, err := os.OpenFile(to, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	before, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, refused)
	if err == nil && n > 0 {
		var last [1]byte
		if _, err = f.ReadAt(last[:], before+n-1); err == nil && last[0] != '\n' {
			_, err = f.WriteString("\n") // torn; the next line must not follow on it
		}
	}
	if err = errors.Join(err, f.Sync()); err != nil {
		return errors.Join(err, f.Truncate(before)) // or the next attempt would add it twice
	}
	return nil
}

// eachQuarantine opens the quarantine files of a journal's folder.
func eachQuarantine(dir string, do func(root *os.Root, name, sink string, f *os.File, size int64) error) error {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	return eachFile(root, "quarantine", func(name string, f *os.File, size int64) error {
		// Not the locks beside it. A replay that was killed left what it had in hand.
		sink, ok := strings.CutSuffix(strings.TrimSuffix(name, ".replay"), ".jsonl")
		if size == 0 || !ok {
			return nil
		}
		return do(root, name, sink, f, size)
	})
}
