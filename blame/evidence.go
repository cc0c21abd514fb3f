package blame

import (
	"math"
	"math/rand/v2"
)

// evidence is how a unit's builds stand out among the same builds moved in time.
type evidence struct {
	z, p   float64
	mean   float64   // of moved builds, for one build
	sd     float64   // of the sum over moved builds
	score  []float64 // of each build where it really was
	starts []float64 // of the same builds, in seconds
}

// minMove is the least that builds are moved, in seconds: beyond it, the lag kernel and
// a burst of requests have nothing to do with each other.
const minMove = 600

// evidenceOf moves all builds of a candidate by the same random times, around the
// window's end to its start, and compares. Everything but the start times stays as it
// is: the requests with their bursts, the other candidates' rates, the background, and
// how the candidate's builds follow upon each other.
//
// The score of a build is log(1+s): s sums, over the requests at its lags, what the
// candidate would contribute to their rate over what all others do. The logarithm
// keeps one lucky burst from counting like many builds that each explain a little.
func (p *problem) evidenceOf(m *model, units []int, intensity []float64, moves int, r *rand.Rand) evidence {
	bins := int(p.length/p.width) + 1
	var starts []int
	totalN := 0.0
	for _, u := range units {
		totalN += m.n[u]
	}
	if totalN <= 0 {
		return evidence{p: 1}
	}
	// The field: for each bin, the sum over its requests of their mark's share by what
	// the others' rate is. Several units (egress addresses) have fields of their own.
	type field struct {
		value []float64
		from  int
	}
	var fields []field
	var ev evidence
	for _, u := range units {
		if m.n[u] <= 0 {
			continue
		}
		own := make([]float64, bins+1)
		mine := m.marks[u*p.marks : (u+1)*p.marks]
		c, e := 0, 0
		for i := range p.rows {
			row := &p.rows[i]
			v := 0.0
			for ; e < int(row.ents); e++ {
				if en := p.entries[e]; int(en.p>>4) == u {
					v += m.rho[en.p] * float64(en.w)
				}
			}
			sum := 0.0
			for ; c < int(row.cells); c++ {
				cell := p.cells[c]
				share := mine[cell.mark]
				others := max(intensity[c]-v*share, 1e-9+intensity[c]*1e-3)
				sum += cell.y * share * p.width / others
			}
			own[min(bins, int(row.t/p.width))] = sum
		}
		// Prefix sums make the sum over a class of lags two look-ups.
		prefix := make([]float64, bins+1)
		for i := range bins {
			prefix[i+1] = prefix[i] + own[i]
		}
		un := &p.units[u]
		var shape [classes]float64
		for j := range classes {
			width := 1000.0
			if j+1 < classes {
				width = lags[j+1] - lags[j]
			}
			if n := float64(len(un.starts)); n > 0 {
				shape[j] = m.rho[u*classes+j] * p.x[u*classes+j] / n / width
			}
		}
		value := make([]float64, bins)
		for t := range bins {
			sum := 0.0
			for j := range classes {
				if shape[j] == 0 {
					continue
				}
				to := lags[classes-1] + 1000
				if j+1 < classes {
					to = lags[j+1]
				}
				a := min(max(t+int(math.Floor(lags[j]/p.width)), 0), bins)
				b := min(max(t+int(math.Floor(to/p.width)), 0), bins)
				sum += shape[j] * (prefix[b] - prefix[a])
			}
			value[t] = math.Log1p(sum)
		}
		fields = append(fields, field{value, len(starts)})
		for _, s := range un.starts {
			starts = append(starts, min(max(int(s/p.width), 0), bins-1))
			ev.starts = append(ev.starts, s)
		}
	}
	at := func(move int, keep bool) float64 {
		sum := 0.0
		for f := range fields {
			to := len(starts)
			if f+1 < len(fields) {
				to = fields[f+1].from
			}
			for _, s := range starts[fields[f].from:to] {
				s += move
				if s >= bins {
					s -= bins
				}
				v := fields[f].value[s]
				sum += v
				if keep {
					ev.score = append(ev.score, v)
				}
			}
		}
		return sum
	}
	real := at(0, true)
	least := min(int(minMove/p.width), bins/4)
	sum, squares, above := 0.0, 0.0, 0
	for range moves {
		v := at(least+r.IntN(max(1, bins-2*least)), false)
		sum += v
		squares += v * v
		if v >= real {
			above++
		}
	}
	n := float64(moves)
	mean := sum / n
	ev.sd = math.Sqrt(max(squares/n-mean*mean, 1e-18))
	ev.mean = mean / float64(max(1, len(starts)))
	ev.z = (real - mean) / ev.sd
	ev.p = float64(1+above) / (n + 1)
	return ev
}

// intensities is what the model expects in each cell.
func (p *problem) intensities(m *model) []float64 {
	out := make([]float64, len(p.cells))
	c, e := 0, 0
	for i := range p.rows {
		r := &p.rows[i]
		ents := p.entries[e:r.ents]
		e = int(r.ents)
		base := m.mu[p.blockOf(r.t)] * p.width
		for ; c < int(r.cells); c++ {
			mk := int(p.cells[c].mark)
			sum := base * m.q[mk]
			for _, en := range ents {
				sum += m.rho[en.p] * float64(en.w) * m.marks[int(en.p>>4)*p.marks+mk]
			}
			out[c] = sum
		}
	}
	return out
}
