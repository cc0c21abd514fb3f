package blame

import "slices"

// sizeShape is the shape of the gamma distribution that sizes of builds are drawn from,
// with mean 1: at 1, as many builds ask for nearly nothing as for a multiple.
const sizeShape = 1

// sized is the model with a size of its own for each build of some groups. A candidate's
// rate is that of its usual build, but one build asks thirty times and the next not at
// all. What a large burst has above the usual would be laid at the door of whoever else
// was building then.
type sized struct {
	intensity []float64     // in each cell
	builds    []sizedBuild  // by group, unit and time
	first     []int         // build of each group, and the end
	parts     [][]sizedPart // by group
}

type sizedBuild struct {
	unit           int32
	size           float64
	expected, seen float64          // requests: by the model at size 1, and its share of those there were
	by             [classes]float32 // seen, by the lag
}

type sizedPart struct {
	row, build int32
	v          float32 // at size 1
	class      uint8
}

// size finds the sizes by expectation-maximisation, with a gamma prior for them.
func (p *problem) size(m *model, groups [][]int, strong []int, intensity []float64) *sized {
	s := &sized{intensity: slices.Clone(intensity), parts: make([][]sizedPart, len(strong))}
	rest := slices.Clone(intensity)
	for i, g := range strong {
		s.first = append(s.first, len(s.builds))
		for _, u := range groups[g] {
			for b, start := range p.units[u].starts {
				build := sizedBuild{unit: int32(u), size: 1}
				for j := range classes {
					rho := m.rho[u*classes+j]
					from, to := p.span(start, p.units[u].ends[b], j)
					if rho <= 0 || from >= to {
						continue
					}
					build.expected += rho * (to - from)
					for n := searchRow(p.rows, from-p.width); n < len(p.rows) && p.rows[n].t < to; n++ {
						if w := min(to, p.rows[n].t+p.width) - max(from, p.rows[n].t); w > 0 {
							s.parts[i] = append(s.parts[i], sizedPart{int32(n), int32(len(s.builds)), float32(rho * w), uint8(j)})
						}
					}
				}
				s.builds = append(s.builds, build)
			}
		}
		for _, o := range s.parts[i] {
			for c, last := p.cellsOf(int(o.row)); c < last; c++ {
				rest[c] -= s.of(p, m, o, c)
			}
		}
	}
	s.first = append(s.first, len(s.builds))
	for c := range rest {
		rest[c] = max(rest[c], 1e-12)
	}
	total := func() {
		copy(s.intensity, rest)
		for i := range s.parts {
			for _, o := range s.parts[i] {
				s.add(p, m, s.intensity, o)
			}
		}
	}
	for range 12 {
		total()
		for b := range s.builds {
			s.builds[b].seen = 0
		}
		for i := range s.parts {
			for _, o := range s.parts[i] {
				for c, last := p.cellsOf(int(o.row)); c < last; c++ {
					s.builds[o.build].seen += p.cells[c].y * s.of(p, m, o, c) / s.intensity[c]
				}
			}
		}
		for b := range s.builds {
			x := &s.builds[b]
			x.size = (sizeShape + x.seen) / (sizeShape + x.expected)
		}
	}
	total()
	for i := range s.parts {
		for _, o := range s.parts[i] {
			for c, last := p.cellsOf(int(o.row)); c < last; c++ {
				s.builds[o.build].by[o.class] += float32(p.cells[c].y * s.of(p, m, o, c) / s.intensity[c])
			}
		}
	}
	return s
}

// of is what a part adds to a cell of its row.
func (s *sized) of(p *problem, m *model, o sizedPart, c int) float64 {
	b := &s.builds[o.build]
	return b.size * float64(o.v) * m.marks[int(b.unit)*p.marks+int(p.cells[c].mark)]
}

// add adds a part to the cells of its row.
func (s *sized) add(p *problem, m *model, to []float64, o sizedPart) {
	for c, last := p.cellsOf(int(o.row)); c < last; c++ {
		to[c] += s.of(p, m, o, c)
	}
}
