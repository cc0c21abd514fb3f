package blame

import (
	"context"
	"math"
	"slices"
)

// The lags, in seconds after a build's start, at which the classes of the lag kernel
// begin. They are fine where builds begin to fetch, and the first is before the start,
// because clocks are off and logs have whole seconds. The last ends with the build.
var lags = [...]float64{-6, -2, 2, 6, 10, 15, 21, 28, 37, 50, 70, 100, 150, 240, 400, 700}

const (
	classes = len(lags) // 16: the class is the lower four bits of an entry
	// endPad is how many seconds after its end a build may still explain requests.
	endPad = 5
	// kernelPrior is how many requests of a candidate weigh as much as what all builds
	// together say about the lag; markPrior the same for marks.
	kernelPrior = 10
	markPrior   = 10
)

// problem is what the model is fitted to. Time is in seconds since the window's start,
// by the server's clock.
type problem struct {
	length  float64 // of the window
	width   float64 // of a bin
	rows    []row   // bins with at least one request
	cells   []obs
	entries []entry
	units   []unit    // what has rates of its own
	x       []float64 // exposure in seconds, by unit and class
	marks   int
	addr    []string  // of each mark
	overall []float64 // share of each mark
	blocks  int       // of the background
	block   float64   // length of one
	total   float64   // requests
}

// unit is the builds of a candidate from one egress address.
type unit struct {
	candidate int
	addr      string
	starts    []float64
	ends      []float64
}

type row struct {
	t           float64
	cells, ents int32 // where those of the row end
}

type obs struct {
	mark uint32
	y    float64
}

// entry says that builds of a unit are, for w seconds of a bin, at a class of lags.
type entry struct {
	p uint32 // unit<<4 | class
	w float32
}

// model are the parameters.
type model struct {
	rho    []float64 // requests per second of exposure, by unit and class
	marks  []float64 // share of each mark, by unit
	mu     []float64 // background per second, by block
	q      []float64 // share of each mark in the background
	kernel [classes]float64
	n      []float64 // requests explained, by unit
	ll     float64   // of the parameters before the last step, but for a constant
}

// span returns the bounds of a class for a build, cut at its end and the window.
func (p *problem) span(start, end float64, j int) (from, to float64) {
	from = start + lags[j]
	to = end + endPad
	if j+1 < classes {
		to = min(to, start+lags[j+1])
	}
	return max(from, 0), min(to, p.length)
}

// prepare makes the rows' entries and the exposures. Rows are sorted by time.
func (p *problem) prepare() {
	p.x = make([]float64, len(p.units)*classes)
	counts := make([]int32, len(p.rows)+1)
	p.entries = nil
	for pass := range 2 {
		var at []int32
		var ents []entry
		if pass == 1 {
			at = make([]int32, len(p.rows)+1)
			for i := range p.rows {
				at[i+1] = at[i] + counts[i]
			}
			ents = make([]entry, at[len(p.rows)])
		}
		for u := range p.units {
			un := &p.units[u]
			for b, start := range un.starts {
				first := -1
				for j := range classes {
					from, to := p.span(start, un.ends[b], j)
					if from >= to {
						continue
					}
					if pass == 0 {
						p.x[u*classes+j] += to - from
					}
					// A class begins where the one before it ends, so one search is enough.
					if first < 0 {
						first = searchRow(p.rows, from-p.width)
					}
					for first < len(p.rows) && p.rows[first].t <= from-p.width {
						first++
					}
					i := first
					for ; i < len(p.rows) && p.rows[i].t < to; i++ {
						w := min(to, p.rows[i].t+p.width) - max(from, p.rows[i].t)
						if w <= 0 {
							continue
						}
						if pass == 0 {
							counts[i]++
							continue
						}
						ents[at[i]] = entry{uint32(u<<4 | j), float32(w)}
						at[i]++
					}
				}
			}
		}
		if pass == 1 {
			// Several builds of a unit at the same lag are one entry.
			from := int32(0)
			for i := range p.rows {
				part := ents[from:at[i]]
				from = at[i]
				slices.SortFunc(part, func(a, b entry) int { return int(a.p) - int(b.p) })
				begin := len(p.entries)
				for _, e := range part {
					if k := len(p.entries) - 1; k >= begin && p.entries[k].p == e.p {
						p.entries[k].w += e.w
						continue
					}
					p.entries = append(p.entries, e)
				}
				p.rows[i].ents = int32(len(p.entries))
			}
		}
	}
}

// searchRow is the first row that begins after t.
func searchRow(rows []row, t float64) int {
	lo, hi := 0, len(rows)
	for lo < hi {
		if mid := (lo + hi) / 2; rows[mid].t > t {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// start is the model before the first step: half of the requests are background, and
// every second of every build is as good as any other.
func (p *problem) start() *model {
	m := &model{
		rho: make([]float64, len(p.x)), marks: make([]float64, len(p.units)*p.marks),
		mu: make([]float64, p.blocks), q: slices.Clone(p.overall), n: make([]float64, len(p.units)),
	}
	all := 0.0
	for _, x := range p.x {
		all += x
	}
	for i := range m.rho {
		m.rho[i] = p.total / 2 / max(all, 1)
	}
	for k := range m.mu {
		m.mu[k] = p.total / 2 / p.length
	}
	for j := range m.kernel {
		m.kernel[j] = 1
	}
	for u := range p.units {
		p.smoothMarks(m, u, make([]float64, p.marks), 0)
	}
	return m
}

func (m *model) clone() *model {
	c := *m
	c.rho, c.marks, c.mu, c.q, c.n = slices.Clone(m.rho), slices.Clone(m.marks), slices.Clone(m.mu), slices.Clone(m.q), slices.Clone(m.n)
	return &c
}

// smoothMarks sets the marks' shares of a unit from counts, drawn towards those of all.
func (p *problem) smoothMarks(m *model, u int, counts []float64, n float64) {
	to := m.marks[u*p.marks : (u+1)*p.marks]
	sum := 0.0
	for k := range to {
		to[k] = counts[k] + markPrior*p.overall[k]
		if a := p.units[u].addr; a != "" && p.addr[k] != "" && p.addr[k] != a {
			to[k] = 0
		}
		sum += to[k]
	}
	for k := range to {
		if sum > 0 {
			to[k] /= sum
		}
	}
}

// weights are those of a resample: how often each block of time is there, and the
// exposures that follow. nil: each once.
type weights struct {
	row []float64
	x   []float64
	len []float64 // of each block of the background
}

// step is one step of EM: the requests of each cell are shared among the background and
// the builds in proportion to what the model expects of them, and the shares become the
// new rates.
func (p *problem) step(m *model, w *weights, s *scratch) {
	s.clear()
	x := p.x
	if w != nil {
		x = w.x
	}
	ll := 0.0
	c, e := 0, 0
	for i := range p.rows {
		r := &p.rows[i]
		ents := p.entries[e:r.ents]
		e = int(r.ents)
		cells := p.cells[c:r.cells]
		c = int(r.cells)
		weight := 1.0
		if w != nil {
			if weight = w.row[i]; weight == 0 {
				continue
			}
		}
		k := p.blockOf(r.t)
		base := m.mu[k] * p.width
		v := s.v[:len(ents)]
		for a, en := range ents {
			v[a] = m.rho[en.p] * float64(en.w)
		}
		for _, cell := range cells {
			mk := int(cell.mark)
			y := cell.y * weight
			background := base * m.q[mk]
			sum := background
			if p.marks == 1 {
				for _, f := range v {
					sum += f
				}
			} else {
				for a, en := range ents {
					f := v[a] * m.marks[int(en.p>>4)*p.marks+mk]
					s.f[a] = f
					sum += f
				}
			}
			if sum <= 0 {
				s.mu[k] += y // nothing else can have been it
				s.q[mk] += y
				continue
			}
			ll += y * math.Log(sum)
			scale := y / sum
			s.mu[k] += background * scale
			s.q[mk] += background * scale
			if p.marks == 1 {
				for a, en := range ents {
					s.rho[en.p] += v[a] * scale
				}
				continue
			}
			for a, en := range ents {
				n := s.f[a] * scale
				s.rho[en.p] += n
				s.marks[int(en.p>>4)*p.marks+mk] += n
			}
		}
	}
	m.ll = ll
	for k := range m.mu {
		length := p.blockLength(k)
		if w != nil {
			length = w.len[k]
		}
		if length > 0 {
			m.mu[k] = s.mu[k] / length
		}
	}
	all := 0.0
	for _, n := range s.q {
		all += n
	}
	for k := range m.q {
		m.q[k] = (s.q[k] + markPrior*p.overall[k]) / (all + markPrior)
	}
	p.rates(m, s, x)
}

// rates is the second half of a step. The lags of a candidate with few requests are
// drawn towards those of all.
func (p *problem) rates(m *model, s *scratch, x []float64) {
	var num, den [classes]float64
	for u := range p.units {
		n, expected := 0.0, 0.0
		for j := range classes {
			n += s.rho[u*classes+j]
			expected += m.kernel[j] * x[u*classes+j]
		}
		m.n[u] = n
		share := s.share[u*classes:]
		for j := range classes {
			share[j] = 0
			if expected > 0 {
				share[j] = m.kernel[j] * x[u*classes+j] / expected
			}
		}
		for j := range classes {
			num[j] += s.rho[u*classes+j]
			if expected > 0 {
				den[j] += n / expected * x[u*classes+j]
			}
		}
	}
	for u := range p.units {
		n := m.n[u]
		for j := range classes {
			i := u*classes + j
			if x[i] <= 0 {
				m.rho[i] = 0
				continue
			}
			m.rho[i] = n / (n + kernelPrior) * (s.rho[i] + kernelPrior*s.share[i]) / x[i]
		}
		if p.marks > 1 {
			p.smoothMarks(m, u, s.marks[u*p.marks:(u+1)*p.marks], n)
		}
	}
	sum := 0.0
	for j := range classes {
		if den[j] > 0 {
			// Half a request keeps a class alive that nothing was found in.
			m.kernel[j] = (num[j] + 0.5) / (den[j] + 0.5)
			sum += m.kernel[j]
		}
	}
	for j := range classes {
		m.kernel[j] /= max(sum, 1e-300)
	}
}

func (p *problem) blockOf(t float64) int {
	return min(max(int(t/p.block), 0), p.blocks-1)
}

func (p *problem) blockLength(k int) float64 {
	return min(p.length, float64(k+1)*p.block) - float64(k)*p.block
}

// scratch is room for a step.
type scratch struct {
	v, f, rho, share, marks, mu, q []float64
}

func (p *problem) scratch() *scratch {
	widest, at := int32(0), int32(0)
	for _, r := range p.rows {
		widest = max(widest, r.ents-at)
		at = r.ents
	}
	return &scratch{
		v: make([]float64, widest), f: make([]float64, widest), rho: make([]float64, len(p.x)), share: make([]float64, len(p.x)),
		marks: make([]float64, len(p.units)*p.marks), mu: make([]float64, p.blocks), q: make([]float64, p.marks),
	}
}

func (s *scratch) clear() {
	clear(s.rho)
	clear(s.marks)
	clear(s.mu)
	clear(s.q)
}

// fit steps until the likelihood hardly grows. It drops units that explain nothing,
// which makes the rest quick.
func (p *problem) fit(ctx context.Context, m *model, steps int) error {
	s := p.scratch()
	last := math.Inf(-1)
	for i := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.step(m, nil, s)
		if i == 15 || i == 40 {
			p.prune(m, 0.02)
		}
		if i > 20 && m.ll-last < 1e-7*p.total {
			break
		}
		last = m.ll
	}
	return nil
}

// prune takes the entries of units out that explain fewer requests than least.
func (p *problem) prune(m *model, least float64) {
	dead := make([]bool, len(p.units))
	some := false
	for u := range p.units {
		if m.n[u] < least {
			dead[u], some = true, true
			m.n[u] = 0
			clear(m.rho[u*classes : (u+1)*classes])
		}
	}
	if some {
		p.drop(func(e entry) bool { return dead[e.p>>4] })
	}
}

// drop takes entries out.
func (p *problem) drop(gone func(entry) bool) {
	out := p.entries[:0]
	from := int32(0)
	for i := range p.rows {
		part := p.entries[from:p.rows[i].ents]
		from = p.rows[i].ents
		for _, e := range part {
			if !gone(e) {
				out = append(out, e)
			}
		}
		p.rows[i].ents = int32(len(out))
	}
	p.entries = out
}
