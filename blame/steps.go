package blame

import (
	"cmp"
	"context"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"
)

// tryShifts are how far ahead of the runners the server's clock is tried, in seconds.
// Up to a few seconds the lag kernel makes it up by itself.
var tryShifts = []float64{0, -90, -60, -40, -25, -15, -8, 15, 30, 60, 90}

// shift finds how much the server's clock is ahead: the shift of the likeliest quick fit.
func (k *ranking) shift(ctx context.Context, b *Builds) (float64, error) {
	if k.Shift != nil {
		return k.Shift.Seconds(), nil
	}
	part := k
	if k.result.To.Sub(k.result.From) > shiftHours*time.Hour*4/3 {
		// A part of the time says it, and sooner. It is one that requests are in.
		q := k.q.clone()
		q.middle(k.result.From.Unix(), k.result.To.Unix(), shiftHours*3600)
		t := &ranking{Options: k.Options, q: q, result: &Result{}}
		if q.total > 0 && t.prepare(b) == nil {
			t.gather()
			part = t
		}
	}
	ll, err := part.quickFits(ctx, tryShifts)
	if err != nil {
		return 0, err
	}
	best := 0
	for i := range ll {
		if ll[i] > ll[best] {
			best = i
		}
	}
	// What is hardly likelier than no shift is none.
	if ll[best]-ll[0] < 25+0.01*float64(part.q.total) {
		return 0, nil
	}
	return tryShifts[best], nil
}

// shiftHours is how much time the difference of the clocks is estimated from.
const shiftHours = 6

// quickFits returns the log likelihood of short fits in wide bins for each shift.
func (k *ranking) quickFits(ctx context.Context, shifts []float64) ([]float64, error) {
	wide := k.q.clone()
	wide.fold(0)
	for wide.width < 4 {
		wide.widen()
	}
	out := make([]float64, len(shifts))
	for i, s := range shifts {
		p := k.problem(wide, s)
		if p.total == 0 {
			return out, nil
		}
		m := p.start()
		if err := p.fit(ctx, m, 12); err != nil {
			return nil, err
		}
		out[i] = m.ll
	}
	return out, nil
}

// alike is the correlation of start times above which candidates are one lead.
const alike = 0.9

// lead makes leads of the candidates that explain at least a request, with those beside
// them that start at the same times: the likelihood does not care which of them has the
// requests, so neither may the ranking.
func (k *ranking) lead() {
	order := make([]int, 0, len(k.candidates))
	for i := range k.candidates {
		c := &k.candidates[i]
		c.n = 0
		for _, u := range c.units {
			c.n += k.m.n[u]
		}
		if c.n >= 1 {
			order = append(order, i)
		}
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(k.candidates[b].n, k.candidates[a].n), cmp.Compare(a, b))
	})
	// Starts are counted in slots, and those of neighbouring slots are half alike. Slots are
	// as fine as the classes of lags: jobs that one push starts, half a minute apart and
	// in either order, are told apart by the lag.
	starts := make([]map[int]float64, len(k.candidates))
	norm := make([]float64, len(k.candidates))
	const slot = 4.0
	slots := max(1, k.p.length/slot)
	common := func(a, b map[int]float64) float64 {
		dot := 0.0
		for s, v := range a {
			dot += v * (b[s] + (b[s-1]+b[s+1])/2)
		}
		return dot
	}
	for i := range k.candidates {
		starts[i] = map[int]float64{}
		n := 0.0
		for _, u := range k.candidates[i].units {
			for _, s := range k.p.units[u].starts {
				starts[i][int(math.Floor(s/slot))]++
				n++
			}
		}
		norm[i] = math.Sqrt(max(common(starts[i], starts[i])-2*n*n/slots, 1e-9))
	}
	taken := make([]bool, len(k.candidates))
	for at, i := range order {
		if taken[i] {
			continue
		}
		taken[i] = true
		l := &lead{members: []int{i}}
		n := float64(len(k.candidates[i].builds))
		for j := range k.candidates {
			other := float64(len(k.candidates[j].builds))
			if at >= 40 || taken[j] || n < 3 || other < 3 || min(n, other)/max(n, other) < 0.5 {
				continue
			}
			if (common(starts[i], starts[j])-2*n*other/slots)/norm[i]/norm[j] > alike {
				taken[j] = true
				l.members = append(l.members, j)
			}
		}
		for _, j := range l.members {
			l.units = append(l.units, k.candidates[j].units...)
			l.n += k.candidates[j].n
		}
		k.leads = append(k.leads, l)
	}
}

// convict finds the evidence against each lead, and by placebos how much of it chance
// alone would bring forth: all builds are moved by the same time, around the window's
// end, the model is fitted anew, and what is found then is nobody's guilt. Those are
// named whose evidence is beyond the strongest of any candidate in any placebo, as by
// the maximum statistic of Westfall and Young (1993).
func (k *ranking) convict(ctx context.Context, shift float64) error {
	groups := make([][]int, len(k.leads))
	for i, l := range k.leads {
		groups[i] = l.units
	}
	for i, ev := range k.p.evidences(k.m, groups, k.r) {
		k.leads[i].ev = ev
	}
	slices.SortStableFunc(k.leads, func(a, b *lead) int { return cmp.Compare(b.ev.z, a.ev.z) })
	if k.Placebos == 0 {
		for _, l := range k.leads {
			l.p, l.lean = 1, true
			k.result.Explained.Value += l.n
		}
		return nil
	}
	var chance []float64                 // evidence in all placebos
	all, strongest := 0, float64(leastZ) // beyond which somebody is named
	for i, part := range k.r.Perm(k.Placebos) {
		if i >= fewPlacebos && (len(k.leads) == 0 || k.leads[0].ev.z <= strongest) {
			break // nobody will be named: more would only say so again
		}
		// Away from 0 and from the whole, by parts that do not fall on full hours.
		move := math.Floor(k.p.length * (0.13 + 0.74*(float64(part)+k.r.Float64())/float64(k.Placebos)))
		p := k.moved(move, shift)
		m := p.start()
		if err := p.fit(ctx, m, fitSteps); err != nil {
			return err
		}
		groups = groups[:0]
		for c := range k.candidates {
			all++
			n := 0.0
			for _, u := range k.candidates[c].units {
				n += m.n[u]
			}
			if n >= 2 {
				groups = append(groups, k.candidates[c].units)
			}
		}
		for _, ev := range p.evidences(m, groups, k.r) {
			chance, strongest = append(chance, ev.z), max(strongest, ev.z)
		}
	}
	slices.SortFunc(chance, func(a, b float64) int { return cmp.Compare(b, a) })
	above := func(z float64) int {
		n, _ := slices.BinarySearchFunc(chance, z, func(c, z float64) int { return cmp.Compare(z, c) })
		for n < len(chance) && chance[n] >= z {
			n++
		}
		return n
	}
	for _, l := range k.leads {
		n := float64(above(l.ev.z))
		l.p = (1 + n) / float64(1+all)
		l.lean = n <= leanShare*float64(all)
	}
	if err := k.lean(ctx); err != nil {
		return err
	}
	for _, l := range k.leads {
		// Who explains no request any more is better explained by bursts of others.
		l.named = l.ev.z > strongest && l.n >= 1 && len(k.candidates[l.members[0]].builds) >= 5
	}
	return nil
}

// fewPlacebos are enough to say how often chance is as strong, where it is at all.
const fewPlacebos = 9

// leastZ is the evidence below which nobody is named, whatever the placebos say.
const leastZ = 3

// leanShare is the share of candidates in placebos with as strong evidence up to which a
// lead takes part in the last fit.
const leanShare = 0.02

// lean fits again, with those only that stand out at all: in the first fit the many
// innocent each take a few requests that happen to fit, and the guilty lack them.
func (k *ranking) lean(ctx context.Context) error {
	for _, l := range k.leads {
		if l.lean {
			continue
		}
		for _, u := range l.units {
			k.m.n[u] = 0
		}
	}
	k.p.prune(k.m, 0.02)
	s := k.p.scratch()
	for i := range 40 {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if i == 20 {
			k.p.calm(k.m)
		}
		k.p.step(k.m, nil, s)
	}
	for _, l := range k.leads {
		if !l.lean {
			continue
		}
		l.n = 0
		for _, u := range l.units {
			l.n += k.m.n[u]
		}
	}
	return nil
}

// leastExcess is by how many standard deviations the requests of a class must exceed
// what chance brings there.
const leastExcess = 2

// calm takes the rates away that chance explains. No rate is less than nothing, so that
// the classes in which a candidate asks for nothing do not even out: each takes what
// bursts of others happen to bring, and gives nothing back where they bring less.
func (p *problem) calm(m *model) {
	rate, dispersion := p.total/p.length, p.dispersion()
	for i, x := range p.x {
		if m.rho[i]*x < leastExcess*math.Sqrt(dispersion*rate*x) {
			m.rho[i], p.x[i] = 0, 0
		}
	}
	p.drop(func(e entry) bool { return p.x[e.p] == 0 })
}

// dispersion is the variance of the number of requests in a quarter of a minute over its
// mean, which is 1 for Poisson's law and the size of bursts where requests come in those.
func (p *problem) dispersion() float64 {
	const slot = 15.0
	counts := make([]float64, int(p.length/slot)+1)
	for i, r := range p.rows {
		first, last := p.cellsOf(i)
		for _, c := range p.cells[first:last] {
			counts[min(max(int(r.t/slot), 0), len(counts)-1)] += c.y
		}
	}
	mean := p.total / float64(len(counts))
	sum := 0.0
	for _, c := range counts {
		sum += (c - mean) * (c - mean)
	}
	return max(1, sum/float64(len(counts))/mean)
}

// moved is the problem with all requests moved around the window's end.
func (k *ranking) moved(by, shift float64) *problem {
	q := k.q.clone()
	length := int64(k.p.length)
	for i := range q.cells {
		t := q.cells[i].bin*q.width - k.origin
		if t < 0 || t >= length {
			continue
		}
		q.cells[i].bin = floorDiv((t+int64(by))%length+k.origin, q.width)
	}
	q.sorted = 0
	q.merge()
	return k.problem(q, shift)
}

// resample fits the model to resamples of the time: blocks of ten minutes get random
// weights (Rubin's Bayesian bootstrap, 1981), and the spread of what the builds explain
// is the uncertainty. Requests come in bursts, so single requests must not be resampled.
func (k *ranking) resample(ctx context.Context) error {
	p := k.p
	p.prune(k.m, 0.5)
	size := 600.0
	if p.length < 24*size {
		size = max(30, p.length/24)
	}
	blocks := int(p.length/size) + 1
	// Exposures by block, of what is alive.
	type part struct {
		i, block int32
		x        float64
	}
	var parts []part
	for u := range p.units {
		if k.m.n[u] <= 0 {
			continue
		}
		for b, start := range p.units[u].starts {
			for j := range classes {
				from, to := p.span(start, p.units[u].ends[b], j)
				for from < to && p.x[u*classes+j] > 0 {
					block := int(from / size)
					end := min(to, float64(block+1)*size)
					if end <= from { // a rounding at the block's end
						break
					}
					parts = append(parts, part{int32(u*classes + j), int32(block), end - from})
					from = end
				}
			}
		}
	}
	type sample struct {
		n   []float64 // by lead
		all float64
		z   []float64
	}
	samples := make([]sample, k.Resamples)
	seeds := make([]uint64, k.Resamples)
	for i := range seeds {
		seeds[i] = k.r.Uint64()
	}
	one := func(i int, s *scratch) {
		r := rand.New(rand.NewPCG(seeds[i], 1))
		block := make([]float64, blocks)
		sum := 0.0
		for b := range block {
			block[b] = r.ExpFloat64()
			sum += block[b]
		}
		for b := range block {
			block[b] *= float64(blocks) / sum
		}
		w := &weights{row: make([]float64, len(p.rows)), x: make([]float64, len(p.x)), len: make([]float64, p.blocks)}
		for r := range p.rows {
			w.row[r] = block[min(max(int(p.rows[r].t/size), 0), blocks-1)]
		}
		for _, part := range parts {
			w.x[part.i] += block[min(int(part.block), blocks-1)] * part.x
		}
		for b := range block {
			from, to := float64(b)*size, min(float64(b+1)*size, p.length)
			for from < to {
				at := p.blockOf(from)
				end := min(to, float64(at+1)*p.block)
				if end <= from {
					break
				}
				w.len[at] += block[b] * (end - from)
				from = end
			}
		}
		m := k.m.clone()
		for range 20 {
			p.step(m, w, s)
		}
		out := sample{n: make([]float64, len(k.leads)), z: make([]float64, len(k.leads))}
		for l, ld := range k.leads {
			for _, u := range ld.units {
				for j := range classes {
					out.n[l] += m.rho[u*classes+j] * p.x[u*classes+j]
				}
			}
			out.all += out.n[l]
			n := 0.0
			for b, start := range ld.ev.starts {
				weight := block[min(max(int(start/size), 0), blocks-1)]
				out.z[l] += weight * ld.ev.score[b]
				n += weight
			}
			out.z[l] = ld.ev.deviate((out.z[l] - n*ld.ev.mean) / max(ld.ev.sd, 1e-9))
		}
		samples[i] = out
	}
	workers := min(runtime.GOMAXPROCS(0), k.Resamples)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			s := p.scratch()
			for i := w; i < k.Resamples && ctx.Err() == nil; i += workers {
				one(i, s)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var all []float64
	order := make([]int, len(k.leads))
	for _, s := range samples {
		all = append(all, s.all)
		for l := range order {
			order[l] = l
		}
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(s.z[b], s.z[a]) })
		for rank, l := range order {
			k.leads[l].ranks = append(k.leads[l].ranks, rank+1)
			k.leads[l].samples = append(k.leads[l].samples, s.n[l])
		}
	}
	total := 0.0
	for _, l := range k.leads {
		if l.lean {
			total += l.n
		}
	}
	k.result.Explained = k.interval(total, all)
	return nil
}

// widening is by how much the distance of the bounds from a value is made larger.
// Resamples hold what is random in time, and not that candidates who build at the same
// times take requests from each other, which is the larger part. So wide, about nine in
// ten intervals hold the truth in fleets that are played (blamebench prints how many).
const widening = 2.0

// interval is a value with bounds of 90 %: the 5th and the 95th percentile of its
// resamples, widened, and the more so the fewer builds are recorded.
func (k *ranking) interval(v float64, samples []float64) Estimate {
	if len(samples) == 0 {
		return Estimate{v, v, v}
	}
	s := slices.Clone(samples)
	slices.Sort(s)
	at := func(q float64) float64 { return s[int(math.Round(q*float64(len(s)-1)))] }
	wide := widening
	if share := k.result.Coverage.Share; share > 0 {
		wide /= max(share, 0.3)
	}
	return Estimate{Value: v, Low: max(0, v-wide*max(0, v-at(0.05))), High: min(k.p.total, v+wide*max(0, at(0.95)-v))}
}

// zone says by how many hours the times of the requests are ahead, if builds fit far
// better without them.
func (k *ranking) zone(ctx context.Context, b *Builds) (hours int, err error) {
	wide := k.q.clone()
	wide.fold(0)
	for wide.width < 4 {
		wide.widen()
	}
	best, most, sum, squares, n := 0, 0.0, 0.0, 0.0, 0.0
	var gains []float64
	for h := -14; h <= 14; h++ {
		q := wide.clone()
		q.move(-int64(h) * 3600)
		gain, err := k.gain(ctx, q, b)
		if err != nil {
			return 0, err
		}
		gains = append(gains, gain)
		if gain > most {
			best, most = h, gain
		}
	}
	for i, g := range gains {
		if i-14 != best && g > 0 {
			sum, squares, n = sum+g, squares+g*g, n+1
		}
	}
	if n == 0 || best == 0 {
		return 0, nil
	}
	mean := sum / n
	if sd := math.Sqrt(max(squares/n-mean*mean, 1)); most < mean+4*sd || most < 2*gains[14] {
		return 0, nil
	}
	return best, nil
}

// gain is how much likelier the requests are with builds than by the background alone,
// after a short fit, in logarithms.
func (k *ranking) gain(ctx context.Context, q *Requests, b *Builds) (float64, error) {
	t := &ranking{Options: k.Options, q: q, result: &Result{}}
	if t.prepare(b) != nil || len(t.builds) == 0 {
		return 0, nil // nothing in common
	}
	t.gather()
	p := t.problem(q, 0)
	if p.total == 0 {
		return 0, nil
	}
	m := p.start()
	if err := p.fit(ctx, m, 12); err != nil {
		return 0, err
	}
	alone := 0.0
	counts := make([]float64, p.blocks)
	c := 0
	for pass := range 2 {
		c = 0
		for _, r := range p.rows {
			block := p.blockOf(r.t)
			for ; c < int(r.cells); c++ {
				if pass == 0 {
					counts[block] += p.cells[c].y
				} else {
					alone += p.cells[c].y * math.Log(counts[block]/p.blockLength(block)*p.width)
				}
			}
		}
	}
	return m.ll - alone, nil
}
