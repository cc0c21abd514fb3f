package blame

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
)

// evidence is how a unit's builds stand out among the same builds moved in time.
type evidence struct {
	z, p   float64
	mean   float64   // of moved builds, for one build
	sd     float64   // of the sum over moved builds
	skew   float64   // of the same
	score  []float64 // of each build where it really was
	starts []float64 // of the same builds, in seconds
}

// minMove is the least that builds are moved, in seconds: beyond it, the lag kernel and
// a burst of requests have nothing to do with each other.
const minMove = 600

// maxMove is the most: by day there is more of everything, and builds of the day must be
// compared with the day.
const maxMove = 5400

// evidenceOf moves all builds of a candidate by the same random times, around the
// window's end to its start, and compares. Everything but the start times stays as it
// is: the requests with their bursts, the other candidates' rates, the background, and
// how the candidate's builds follow upon each other.
//
// The score of a build is log(1+s): s sums, over the requests at its lags, what the
// candidate would contribute to their rate over what all others do. The logarithm
// keeps one lucky burst from counting like many builds that each explain a little.
//
// intensity is what the model expects in each cell, own the candidate's part of it.
func (p *problem) evidenceOf(m *model, flocks []flock, intensity, own []float64, moves int, r *rand.Rand) evidence {
	bins := int(p.length/p.width) + 1
	var starts []int
	// The field: for each bin, the sum over its requests of their mark's share by what
	// the others' rate is. Several units (egress addresses) have fields of their own.
	type field struct {
		value []float64
		from  int
	}
	var fields []field
	var ev evidence
	var prefix []float64 // sums make the sum over a class of lags two look-ups
	of := -1             // the unit that they are of
	for _, f := range flocks {
		if of != f.unit {
			of = f.unit
			ratio := make([]float64, bins+1)
			mine := m.marks[f.unit*p.marks : (f.unit+1)*p.marks]
			c := 0
			for i := range p.rows {
				row := &p.rows[i]
				sum := 0.0
				for ; c < int(row.cells); c++ {
					cell := p.cells[c]
					others := max(intensity[c]-own[c], 1e-9+intensity[c]*1e-3)
					sum += cell.y * mine[cell.mark] * p.width / others
				}
				ratio[min(bins, int(row.t/p.width))] = sum
			}
			prefix = make([]float64, bins+1)
			for i := range bins {
				prefix[i+1] = prefix[i] + ratio[i]
			}
		}
		value := make([]float64, bins)
		for j := range classes {
			if f.shape[j] <= 0 {
				continue
			}
			to := lags[classes-1] + lastLag
			if j+1 < classes {
				to = lags[j+1]
			}
			first, last := int(math.Floor(lags[j]/p.width)), int(math.Floor(to/p.width))
			for t := range value {
				value[t] += f.shape[j] * (prefix[min(max(t+last, 0), bins)] - prefix[min(max(t+first, 0), bins)])
			}
		}
		for t := range value {
			value[t] = math.Log1p(value[t])
		}
		fields = append(fields, field{value, len(starts)})
		for _, s := range f.starts {
			starts = append(starts, min(max(int(s/p.width), 0), bins-1))
			ev.starts = append(ev.starts, s)
		}
	}
	if len(starts) == 0 {
		return evidence{p: 1}
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
	most := max(least+1, min(int(maxMove/p.width), bins/2))
	sum, squares, above := 0.0, 0.0, 0
	for range moves {
		move := least + r.IntN(most-least)
		if r.IntN(2) == 0 {
			move = bins - move
		}
		v := at(move, false)
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
	// The sum over few builds is skewed: most of them meet nothing, wherever they are moved
	// to, and one lucky burst is many standard deviations. Builds that come in flocks are
	// worth fewer.
	variance, third := 0.0, 0.0
	for f := range fields {
		to := len(starts)
		if f+1 < len(fields) {
			to = fields[f+1].from
		}
		n := float64(to - fields[f].from)
		v, t := centralMoments(fields[f].value)
		variance += n * v
		third += n * t
	}
	if variance > 0 {
		ev.skew = third / math.Pow(variance, 1.5) * math.Sqrt(max(1, ev.sd*ev.sd/variance))
	}
	ev.z = ev.deviate((real - mean) / ev.sd)
	ev.p = float64(1+above) / (n + 1)
	return ev
}

// flock is builds of a unit that are looked at with one rate by the lag.
type flock struct {
	unit   int
	starts []float64
	shape  [classes]float64 // requests for each second of a build
}

// lastLag is how many seconds the last class of lags is taken to last.
const lastLag = 1000

// whole is all builds of units, with the rates of the fit.
func (p *problem) whole(m *model, units []int) (list []flock) {
	for _, u := range units {
		if m.n[u] <= 0 {
			continue
		}
		f := flock{unit: u, starts: p.units[u].starts}
		for j := range classes {
			f.shape[j] = m.rho[u*classes+j] * p.x[u*classes+j] / float64(len(f.starts)) / classWidth(j)
		}
		list = append(list, f)
	}
	return list
}

func classWidth(j int) float64 {
	if j+1 < classes {
		return lags[j+1] - lags[j]
	}
	return lastLag
}

// folds are the builds of a group's units in parts of time, each with the rates that the
// other parts have. The rates of the fit are made to meet what happened: the fewer builds
// one has, the better they seem to explain it.
//
// keep, where it is not nil, says which builds of the group are looked at.
func (p *problem) folds(m *model, s *sized, group int, keep []bool) (list []flock) {
	from := s.first[group]
	for from < s.first[group+1] {
		u := int(s.builds[from].unit)
		builds := s.builds[from : from+len(p.units[u].starts)]
		kept := keep
		if keep != nil {
			kept = keep[from-s.first[group]:]
		}
		from += len(builds)
		parts := min(foldParts, len(builds))
		for part := range parts {
			low, high := part*len(builds)/parts, (part+1)*len(builds)/parts
			f := flock{unit: u}
			var seen, usual [classes]float64
			n, sum, others := 0.0, 0.0, 0.0
			for b := range builds {
				if kept != nil && !kept[b] {
					continue
				}
				if b >= low && b < high {
					f.starts = append(f.starts, p.units[u].starts[b])
					continue
				}
				others++
				for j := range classes {
					seen[j] += float64(builds[b].by[j])
					n += float64(builds[b].by[j])
					x, y := p.span(p.units[u].starts[b], p.units[u].ends[b], j)
					usual[j] += m.kernel[j] * max(0, y-x)
				}
			}
			for j := range classes {
				sum += usual[j]
			}
			if others > 0 && sum > 0 {
				for j := range classes {
					f.shape[j] = n / (n + kernelPrior) * (seen[j] + kernelPrior*usual[j]/sum) / others / classWidth(j)
				}
			}
			list = append(list, f)
		}
	}
	return list
}

// evidences finds the evidence against each group of units. A second look, at those who
// have some, gives each build of the strongest a size of its own, and judges builds by
// what others of the same candidate do.
func (p *problem) evidences(m *model, groups [][]int, r *rand.Rand) []evidence {
	intensity := p.intensities(m)
	own := make([]float64, len(p.cells))
	out := make([]evidence, len(groups))
	owns := p.ownEntries(groups)
	for g, units := range groups {
		clear(own)
		for _, o := range owns[g] {
			en := p.entries[o.entry]
			u := int(en.p >> 4)
			for c, last := p.cellsOf(int(o.row)); c < last; c++ {
				own[c] += m.rho[en.p] * float64(en.w) * m.marks[u*p.marks+int(p.cells[c].mark)]
			}
		}
		out[g] = p.evidenceOf(m, p.whole(m, units), intensity, own, moves, r)
	}
	var strong []int
	for g := range groups {
		if out[g].z > weakZ {
			strong = append(strong, g)
		}
	}
	slices.SortStableFunc(strong, func(a, b int) int { return cmp.Compare(out[b].z, out[a].z) })
	strong = strong[:min(maxSized, len(strong))]
	s := p.size(m, groups, strong, intensity)
	for i, g := range strong {
		clear(own)
		for _, o := range s.parts[i] {
			s.add(p, m, own, o)
		}
		out[g] = p.evidenceOf(m, p.folds(m, s, i, p.accompanied(groups, strong[:i], g, out)), s.intensity, own, moves, r)
	}
	return out
}

const (
	// nearby is how many seconds apart the builds of jobs start that one push starts.
	nearby = 45
	// company is how many builds of the other must be near each build, on average and
	// beyond chance, for the two to be companions; crowd is what is wanted besides, as a
	// part of chance, where many start all the time.
	company, crowd = 0.25, 0.25
	// dominance is how much stronger the evidence against a companion is.
	dominance = 1.5
)

// accompanied says which builds of a group have one of a companion near them: of somebody
// with much stronger evidence whose builds start when its do. It is nil where there is no
// companion. A companion's builds that were not recorded leave requests that fit the group, and
// it would be judged by those. Where the companion is there, it takes what is its own.
func (p *problem) accompanied(groups [][]int, stronger []int, group int, ev []evidence) []bool {
	var starts []float64
	for _, u := range groups[group] {
		starts = append(starts, p.units[u].starts...)
	}
	var all []bool
	for _, g := range stronger {
		if ev[g].z < dominance*ev[group].z {
			continue
		}
		var others []float64
		for _, u := range groups[g] {
			others = append(others, p.units[u].starts...)
		}
		slices.Sort(others)
		// pairs is how many builds of the other are near each build, on average.
		pairs := func(move float64, hit []bool) (n float64) {
			for i, s := range starts {
				first, _ := slices.BinarySearch(others, s+move-nearby)
				last, _ := slices.BinarySearch(others, s+move+nearby)
				n += float64(last-first) / float64(len(starts))
				if hit != nil {
					hit[i] = last > first
				}
			}
			return n
		}
		hit := make([]bool, len(starts))
		share := pairs(0, hit)
		// Whole hours: what a timetable starts is no company.
		chance, hours := 0.0, max(1, min(3, int(p.length/3600)-1))
		for h := 1; h <= hours; h++ {
			chance += (pairs(float64(-3600*h), nil) + pairs(float64(3600*h), nil)) / float64(2*hours)
		}
		if share < company+(1+crowd)*chance {
			continue
		}
		if all == nil {
			all = hit
			continue
		}
		for i := range all {
			all[i] = all[i] && hit[i]
		}
	}
	return all
}

func centralMoments(values []float64) (second, third float64) {
	n, mean := float64(len(values)), 0.0
	for _, v := range values {
		mean += v / n
	}
	for _, v := range values {
		d := v - mean
		second += d * d / n
		third += d * d * d / n
	}
	return second, third
}

// deviate is the standard normal deviate that is as rare as z is for a sum over so few
// builds. Such sums are skewed: Pearson's type III, as for other statistics of
// permutations, by the cube root of Wilson and Hilferty (1931).
func (ev *evidence) deviate(z float64) float64 {
	if ev.skew < 0.01 {
		return z
	}
	return 6/ev.skew*(math.Cbrt(max(0, ev.skew*z/2+1))-1) + ev.skew/6
}

const (
	// weakZ is the evidence below which nobody is looked at again.
	weakZ = 1
	// maxSized bounds how many are, and how many of them have builds with sizes.
	maxSized = 40
	// foldParts is in how many parts the builds of one candidate are judged.
	foldParts = 5
)

// ownEntry is an entry of a group.
type ownEntry struct{ row, entry int32 }

// ownEntries are the entries of each group.
func (p *problem) ownEntries(groups [][]int) [][]ownEntry {
	of := make([]int32, len(p.units))
	for u := range of {
		of[u] = -1
	}
	for g, units := range groups {
		for _, u := range units {
			of[u] = int32(g)
		}
	}
	out := make([][]ownEntry, len(groups))
	e := int32(0)
	for i := range p.rows {
		for ; e < p.rows[i].ents; e++ {
			if g := of[p.entries[e].p>>4]; g >= 0 {
				out[g] = append(out[g], ownEntry{int32(i), e})
			}
		}
	}
	return out
}

// cellsOf is where the cells of a row begin and end.
func (p *problem) cellsOf(row int) (first, last int) {
	if row > 0 {
		first = int(p.rows[row-1].cells)
	}
	return first, int(p.rows[row].cells)
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
