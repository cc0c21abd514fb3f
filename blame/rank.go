package blame

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Options say how Rank works. The zero value is good.
type Options struct {
	// Level says which builds are one candidate; empty: ByJob.
	Level Level
	// Top is how many suspects and baselines are returned; 0: 20.
	Top int
	// Resamples is the number of bootstrap resamples; 0: 100; negative: none, and no intervals.
	Resamples int
	// Placebos is the largest number of fits to moved requests; 0: 19, so that chance
	// names somebody in one of twenty fleets where nobody is guilty; negative: none, and
	// then nobody is named. The ranking needs neither.
	Placebos int
	// Seed makes resamples and moves repeatable; the same input and seed give the same result.
	Seed uint64
	// Shift is how much the server's clock is ahead of the runners'; nil: estimated.
	Shift *time.Duration
}

// NoOverlapError is what Rank fails with where requests and builds have no time in common.
type NoOverlapError struct {
	RequestsFrom, RequestsTo time.Time
	BuildsFrom, BuildsTo     time.Time
}

func (e *NoOverlapError) Error() string {
	const form = "2006-01-02 15:04:05"
	return fmt.Sprintf("the requests cover %s to %s and the builds %s to %s (UTC): they have no time in common",
		e.RequestsFrom.UTC().Format(form), e.RequestsTo.UTC().Format(form), e.BuildsFrom.UTC().Format(form), e.BuildsTo.UTC().Format(form))
}

// ranking is what Rank works on.
type ranking struct {
	Options
	q          *Requests
	p          *problem
	m          *model
	result     *Result
	builds     []Build // in the window
	candidates []candidate
	leads      []*lead
	origin     int64 // Unix seconds of the window's start
	r          *rand.Rand
}

// lead is one candidate, or several that cannot be told apart, that explains requests.
type lead struct {
	members []int // into candidates
	units   []int
	n       float64
	ev      evidence
	p       float64
	named   bool
	lean    bool      // takes part in the last fit
	samples []float64 // n in the resamples
	ranks   []int
}

// candidate is a Candidate with what was found of it.
type candidate struct {
	Candidate
	builds   []int
	units    []int
	n        float64
	overlaps int64
	active   float64
	lift     float64
	byCount  int
	byLift   int
}

const (
	defaultEnd = 5 * time.Minute
	longestEnd = 6 * time.Hour
	fitSteps   = 60
	moves      = 200 // random moves of a candidate's builds
	maxPairs   = 6 << 20
)

// Rank says whose builds explain the requests. It fails with a *NoOverlapError where
// they have no time in common, with ErrNoRequests or ErrNoBuilds where there are none,
// and with the error of ctx. That nobody can be named is no error but a verdict.
func Rank(ctx context.Context, q *Requests, b *Builds, o Options) (*Result, error) {
	o.Level = cmp.Or(o.Level, ByJob)
	o.Top = cmp.Or(o.Top, 20)
	o.Resamples = max(0, cmp.Or(o.Resamples, 100))
	o.Placebos = max(0, cmp.Or(o.Placebos, 19))
	switch {
	case q.Total() == 0:
		return nil, ErrNoRequests
	case b.Len() == 0:
		return nil, ErrNoBuilds
	}
	k := &ranking{Options: o, q: q.clone(), result: &Result{Coverage: b.coverage()}, r: rand.New(rand.NewPCG(o.Seed, 0x5eed))}
	k.q.fold(topMarks)
	if err := k.prepare(b); err != nil {
		return nil, err
	}
	k.gather()
	k.coarsen()
	shift, err := k.shift(ctx, b)
	if err != nil {
		return nil, err
	}
	k.result.Shift = time.Duration(shift * float64(time.Second))
	k.p = k.problem(k.q, shift)
	k.result.Bin = time.Duration(k.p.width) * time.Second
	k.result.Requests = int64(k.p.total)
	k.result.Outside = q.Total() - k.result.Requests
	if k.p.total == 0 {
		return nil, ErrNoRequests
	}
	k.baseline()
	k.m = k.p.start()
	if err := k.p.fit(ctx, k.m, fitSteps); err != nil {
		return nil, err
	}
	k.lead()
	if err := k.convict(ctx, shift); err != nil {
		return nil, err
	}
	if k.Resamples > 0 {
		if err := k.resample(ctx); err != nil {
			return nil, err
		}
	}
	k.tell()
	return k.result, k.conclude(ctx, b)
}

// ErrNoRequests and ErrNoBuilds: there is nothing to explain, or nothing to explain it.
var (
	ErrNoRequests = errors.New("there are no requests")
	ErrNoBuilds   = errors.New("there are no builds")
)

// prepare cuts requests and builds to the time they have in common.
func (k *ranking) prepare(b *Builds) error {
	q := k.q
	all := b.all()
	assumed := assumeEnds(all)
	first, last, _ := q.Span()
	var from, to time.Time
	for i, x := range all {
		if i == 0 || x.Start.Before(from) {
			from = x.Start
		}
		if i == 0 || x.End.After(to) {
			to = x.End
		}
	}
	margin := time.Minute
	begin, end := maxTime(first, from.Add(-margin)), minTime(last.Add(time.Second), to.Add(margin))
	if !begin.Before(end) {
		return &NoOverlapError{RequestsFrom: first, RequestsTo: last, BuildsFrom: from, BuildsTo: to}
	}
	k.result.From, k.result.To = begin.UTC(), end.UTC()
	k.origin = begin.Unix()
	for i, x := range all {
		if x.End.After(begin.Add(-time.Minute)) && x.Start.Before(end.Add(time.Minute)) {
			k.builds = append(k.builds, x)
			if assumed[i] {
				k.result.AssumedEnds++
			}
		}
	}
	k.result.Builds = len(k.builds)
	return nil
}

// assumeEnds gives builds without an end the median duration of their candidate, or of
// all, and says which these were.
func assumeEnds(builds []Build) (assumed []bool) {
	assumed = make([]bool, len(builds))
	known := map[Candidate][]time.Duration{}
	var every []time.Duration
	for i := range builds {
		b := &builds[i]
		if d := b.End.Sub(b.Start); !b.End.IsZero() && d >= 0 {
			b.End = b.Start.Add(min(d, longestEnd))
			c := ByJob.of(b.Candidate)
			known[c] = append(known[c], d)
			every = append(every, d)
		}
	}
	usual := defaultEnd
	if len(every) > 0 {
		usual = median(every)
	}
	// Once for each candidate: journals without any ends are as long as others.
	usually := make(map[Candidate]time.Duration, len(known))
	for c, of := range known {
		if len(of) >= 3 {
			usually[c] = median(of)
		}
	}
	for i := range builds {
		b := &builds[i]
		if !b.End.IsZero() && !b.End.Before(b.Start) {
			continue
		}
		assumed[i] = true
		d, ok := usually[ByJob.of(b.Candidate)]
		if !ok {
			d = usual
		}
		b.End = b.Start.Add(d)
	}
	return assumed
}

func median(d []time.Duration) time.Duration {
	s := slices.Clone(d)
	slices.Sort(s)
	return min(s[len(s)/2], longestEnd)
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// problem makes the problem of the window with the server's clock ahead by shift.
func (k *ranking) problem(q *Requests, shift float64) *problem {
	length := k.result.To.Sub(k.result.From).Seconds()
	p := &problem{length: math.Ceil(length)}
	p.block = blockSeconds
	if p.length < 2*blockSeconds {
		p.block = max(p.length/2, 60)
	}
	p.blocks = max(1, int(math.Ceil(p.length/p.block)))
	p.marks = len(q.marks)
	p.addr = make([]string, p.marks)
	for i, m := range q.marks {
		p.addr[i] = m.Addr
	}
	p.overall = make([]float64, p.marks)
	p.width = float64(q.width)
	for _, c := range q.cells {
		t := float64(c.bin*q.width - k.origin)
		if t+p.width <= 0 || t >= p.length {
			continue
		}
		if n := len(p.rows); n == 0 || p.rows[n-1].t != t {
			p.rows = append(p.rows, row{t: t})
		}
		p.cells = append(p.cells, obs{c.mark, float64(c.n)})
		p.rows[len(p.rows)-1].cells = int32(len(p.cells))
		p.overall[c.mark] += float64(c.n)
		p.total += float64(c.n)
	}
	for i := range p.overall {
		p.overall[i] /= max(p.total, 1)
	}
	for i := range k.candidates {
		c := &k.candidates[i]
		c.units = c.units[:0]
		byAddr := map[string]int{}
		for _, n := range c.builds {
			b := &k.builds[n]
			u, ok := byAddr[b.Addr]
			if !ok {
				u = len(p.units)
				byAddr[b.Addr] = u
				c.units = append(c.units, u)
				p.units = append(p.units, unit{candidate: i, addr: b.Addr})
			}
			un := &p.units[u]
			un.starts = append(un.starts, b.Start.Sub(time.Unix(k.origin, 0)).Seconds()+shift)
			un.ends = append(un.ends, b.End.Sub(time.Unix(k.origin, 0)).Seconds()+shift)
		}
	}
	p.prepare()
	return p
}

const blockSeconds = 1800

// gather makes the candidates.
func (k *ranking) gather() {
	index := map[Candidate]int{}
	for i, b := range k.builds {
		c := k.Level.of(b.Candidate)
		n, ok := index[c]
		if !ok {
			n = len(k.candidates)
			index[c] = n
			k.candidates = append(k.candidates, candidate{Candidate: c})
		}
		k.candidates[n].builds = append(k.candidates[n].builds, i)
	}
	k.result.Candidates = len(k.candidates)
}

// coarsen makes bins wider where requests and builds are so many that the fit would
// need too much memory.
func (k *ranking) coarsen() {
	busy := 0.0
	for _, b := range k.builds {
		busy += b.End.Sub(b.Start).Seconds() + endPad - lags[0]
	}
	length := k.result.To.Sub(k.result.From).Seconds()
	for k.q.width < 64 {
		rows := 0
		for i, c := range k.q.cells {
			if i == 0 || k.q.cells[i-1].bin != c.bin {
				rows++
			}
		}
		if float64(rows)*busy/length <= maxPairs {
			return
		}
		k.q.widen()
	}
}

// baseline counts overlaps.
func (k *ranking) baseline() {
	p := k.p
	prefix := make([]float64, len(p.rows)+1)
	c := 0
	for i, r := range p.rows {
		prefix[i+1] = prefix[i]
		for ; c < int(r.cells); c++ {
			prefix[i+1] += p.cells[c].y
		}
	}
	type span struct{ from, to float64 }
	for i := range k.candidates {
		cand := &k.candidates[i]
		var spans []span
		for _, u := range cand.units {
			for b, s := range p.units[u].starts {
				from, to := max(s, 0), min(p.units[u].ends[b], p.length)
				if from < to {
					spans = append(spans, span{from, to})
				}
			}
		}
		slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.from, b.from) })
		count, active, until := 0.0, 0.0, math.Inf(-1)
		for _, s := range spans {
			from := max(s.from, until)
			if from >= s.to {
				continue
			}
			until = s.to
			active += s.to - from
			count += prefix[searchRow(p.rows, s.to-p.width/2)] - prefix[searchRow(p.rows, from-p.width/2)]
		}
		cand.overlaps = int64(count)
		cand.active = active / p.length
		if rest := p.length - active; rest > 1 && active > 0 && p.total > count {
			cand.lift = count / active / ((p.total - count) / rest)
		}
	}
}
