package ranking

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/report"
)

const (
	// maxKept is how many ranges of time have their ranking kept.
	maxKept = 8
	// maxTime bounds one ranking.
	maxTime = 5 * time.Minute
	// pause is the shortest time between two rankings of one range, and share how many
	// times as long as a ranking took it is at least: the page is looked at while
	// records come in all the time, and a ranking takes a whole processor.
	pause = 30 * time.Second
	share = 10
)

// Live ranks in the background, one range of time after the other, and keeps what it
// found. A page is never kept waiting: until there is a ranking it says so, and while
// records come in it has the one from before. Its methods are safe for concurrent use.
type Live struct {
	src panels.Stream
	log *slog.Logger
	now func() time.Time

	ctx     context.Context
	end     context.CancelFunc
	workers sync.WaitGroup

	mu      sync.Mutex
	busy    bool
	changes int64
	kept    []*kept // oldest first
}

// kept is what is known of a range of time.
type kept struct {
	filter panels.Filter
	state  string         // of the records, when it was asked for last
	found  *page.Suspects // nil where nothing was imported, or while nothing is known
	failed bool           // it is no answer, and is tried again
	at     time.Time      // when that was, zero before the first
	took   time.Duration
}

// wait is how long what was found is good enough, whatever comes in.
func (k *kept) wait() time.Duration { return max(pause, share*k.took) }

// NewLive makes a Live that asks src until Close.
func NewLive(src panels.Stream, log *slog.Logger) *Live {
	l := &Live{src: src, log: log, now: time.Now}
	l.ctx, l.end = context.WithCancel(context.Background())
	return l
}

// Close ends what runs, and waits for it.
func (l *Live) Close() {
	l.mu.Lock()
	l.busy = true // for good
	l.mu.Unlock()
	l.end()
	l.workers.Wait()
}

// Changes counts up whenever Of would answer otherwise.
func (l *Live) Changes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changes
}

// Of is what is known of those behind the requests in a filter's time, nil where no
// requests are known. state is a text that changes with the records; where it did, a
// ranking begins, when it is time for one.
func (l *Live) Of(f panels.Filter, state string) *page.Suspects {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.find(f)
	if k == nil {
		k = &kept{filter: f}
		if len(l.kept) == maxKept {
			l.kept = slices.Delete(l.kept, 0, 1)
		}
		l.kept = append(l.kept, k)
	}
	old := k.at.IsZero() || (k.failed || k.state != state || k.filter != f) && l.now().Sub(k.at) >= k.wait()
	if old && !l.busy {
		l.busy, k.filter, k.state = true, f, state
		l.workers.Go(func() { l.work(k, f) })
	}
	return k.found
}

// find returns what is kept of this range, or of one that moved a little: "the last
// day" is another range at each look.
func (l *Live) find(f panels.Filter) *kept {
	for _, k := range slices.Backward(l.kept) {
		g := k.filter
		moved := max(f.From.Sub(g.From).Abs(), f.To.Sub(g.To).Abs())
		g.From, g.To = f.From, f.To
		if g == f && (moved == 0 || moved < 2*k.wait()) {
			return k
		}
	}
	return nil
}

// work makes one ranking.
func (l *Live) work(k *kept, f panels.Filter) {
	ctx, cancel := context.WithTimeout(l.ctx, maxTime)
	defer cancel()
	began := l.now()
	e, err := gather(ctx, l.src, f)
	var found *page.Suspects
	if err == nil && !e.none() {
		l.set(func() {
			if k.found == nil {
				k.found = page.Unranked("They are being ranked.", "The ranking comes by itself when it is done.")
			}
		})
		found, err = e.rank(ctx)
	}
	switch {
	case l.ctx.Err() != nil: // nobody looks any more
		return
	case errors.Is(err, context.DeadlineExceeded):
		found = page.Unranked("They were not ranked.", "It takes longer than the live page allows. tallyman-desk report --html and tallyman-desk blame have no bound.")
	case err != nil:
		l.log.Error("rank suspects", "error", err)
		found = page.Unranked("They could not be ranked.", report.Safe(err.Error()))
	}
	l.set(func() {
		k.found, k.failed = found, err != nil
		k.at, k.took, l.busy = l.now(), l.now().Sub(began), false
	})
}

func (l *Live) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	l.changes++
}
