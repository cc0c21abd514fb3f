package ranking

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/blame/sim"
	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source answers the two queries of a ranking. Each waits for a word on gate, if there is one.
type source struct {
	panels.Source
	gate chan struct{}

	mu    sync.Mutex
	named int64
	fleet *sim.Fleet
	err   error
	asked int // rankings that began
}

func (s *source) Dialect() panels.Dialect { return panels.DuckDB }

func (s *source) Each(ctx context.Context, sql string, head func([]string) error, row func([]any) error, _ ...panels.Param) error {
	if s.gate != nil {
		select {
		case <-s.gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	var rows [][]any
	columns := []string{"anonymous", "ts", "n"}
	if strings.Contains(sql, "user_agent") {
		s.asked++
		if s.named > 0 {
			rows = append(rows, []any{false, nil, s.named})
		}
		if s.fleet != nil {
			for _, q := range s.fleet.Requests {
				rows = append(rows, []any{true, q.Time, int64(1)})
			}
		}
	} else {
		columns = []string{"ts", "id", "kind", "repository", "workflow", "job", "command"}
		for _, b := range s.fleet.Builds {
			repository, workflow, job := s.fleet.Candidate(b.Workflow)
			rows = append(rows, []any{b.Start, b.Start.String() + repository, "invocation", repository, workflow, job, "build"})
		}
	}
	if err := head(columns); err != nil {
		return err
	}
	for _, r := range rows {
		if err := row(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *source) rankings() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// clock is a time that the test moves.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) forth(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

func newLive(t *testing.T, s *source) (*Live, *clock) {
	t.Helper()
	c := &clock{t: sim.Begin}
	l := NewLive(s, slog.New(slog.DiscardHandler))
	l.now = c.now
	t.Cleanup(l.Close)
	return l, c
}

// settled waits until nothing is being ranked.
func (l *Live) settled(t *testing.T) {
	t.Helper()
	for range 6000 {
		l.mu.Lock()
		busy := l.busy
		l.mu.Unlock()
		if !busy {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it is still ranking after a minute")
}

func verdict(s *page.Suspects) string {
	if s == nil {
		return ""
	}
	return s.Verdict
}

// What a page has from its first look on.
func TestOf(t *testing.T) {
	fleet := sim.Run(sim.Config{Seed: 3, Hours: 2, Jobs: 20, Workflows: 8, Guilty: 1})
	for name, row := range map[string]struct {
		src  *source
		want string
	}{
		"nothing was imported":      {&source{}, ""},
		"nobody was anonymous":      {&source{named: 3}, "There is nobody to look for."},
		"a fleet":                   {&source{fleet: fleet}, "There are indications, and no more than that."},
		"a fleet without builds":    {&source{fleet: &sim.Fleet{Requests: fleet.Requests}}, "Nobody can be named."},
		"records that are not read": {&source{err: errors.New("no room")}, "They could not be ranked."},
	} {
		t.Run(name, func(t *testing.T) {
			l, _ := newLive(t, row.src)
			if s := l.Of(panels.Filter{}, "1"); s != nil && s.Verdict == row.want {
				t.Errorf("the first look waited: %+v", s)
			}
			before := l.Changes()
			l.settled(t)
			if got := verdict(l.Of(panels.Filter{}, "1")); got != row.want {
				t.Errorf("%q, want %q", got, row.want)
			}
			if l.Changes() == 0 || l.Changes() < before {
				t.Error("nobody is told that there is an answer now")
			}
		})
	}
}

// While records come in the last ranking stays, and a new one is made now and then only.
func TestRankedNowAndThen(t *testing.T) {
	src := &source{named: 1}
	l, clock := newLive(t, src)
	look := func(from time.Time, state string, want int) {
		t.Helper()
		l.Of(panels.Filter{From: from}, state)
		l.settled(t)
		if n := src.rankings(); n != want {
			t.Errorf("%d rankings, want %d", n, want)
		}
	}
	look(sim.Begin, "1", 1)
	look(sim.Begin, "1", 1) // the same records
	look(sim.Begin, "2", 1) // too early
	clock.forth(pause / 2)
	look(sim.Begin.Add(pause/2), "3", 1) // the same range, which moves with the clock
	clock.forth(pause)
	look(sim.Begin.Add(3*pause/2), "3", 2)
	look(sim.Begin.Add(-time.Hour), "3", 3) // another range
	if got := verdict(l.Of(panels.Filter{From: sim.Begin.Add(3 * pause / 2)}, "4")); got == "" {
		t.Error("the ranking from before is gone")
	}
}

// One ranking at a time, and a page that nobody looks at any more keeps nobody waiting.
func TestOneAtATime(t *testing.T) {
	src := &source{named: 1, gate: make(chan struct{})}
	l, _ := newLive(t, src)
	for hour := range 3 * maxKept {
		if s := l.Of(panels.Filter{From: sim.Begin.Add(time.Duration(hour) * time.Hour)}, "1"); s != nil {
			t.Errorf("%+v", s)
		}
	}
	src.gate <- struct{}{}
	l.settled(t)
	if n := src.rankings(); n != 1 {
		t.Errorf("%d rankings at once", n)
	}
	l.Of(panels.Filter{}, "1")
	l.Close() // while a query waits
	if s := l.Of(panels.Filter{To: sim.Begin}, "1"); s != nil {
		t.Errorf("ranked after the end: %+v", s)
	}
}
