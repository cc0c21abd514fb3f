package blame

import (
	"fmt"
	"math"
	"testing"
	"time"
)

// However many requests and marks there are, memory stays bounded and none is lost.
func TestRequestsStayBounded(t *testing.T) {
	q := NewRequests()
	q.maxCells = 2000
	begin := time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)
	const n = 60_000
	for i := range n {
		q.Add(begin.Add(time.Duration(i*7919%n)*time.Second), 1, Mark{UserAgent: fmt.Sprint("agent ", i%9000), Addr: fmt.Sprint("192.0.2.", i%3)})
	}
	q.compact()
	total := int64(0)
	for _, c := range q.cells {
		total += int64(c.n)
	}
	if total != n || q.Total() != n {
		t.Errorf("%d requests of %d", total, n)
	}
	if len(q.cells) > q.maxCells || cap(q.cells) > 8*q.maxCells || len(q.marks) > maxMarks {
		t.Errorf("%d cells (room for %d), %d marks", len(q.cells), cap(q.cells), len(q.marks))
	}
	if first, last, ok := q.Span(); !ok || !first.Equal(begin) || !last.Equal(begin.Add((n-1)*time.Second)) {
		t.Errorf("from %s to %s", first, last)
	}
}

// A step shares all requests among background and builds: none appears, none vanishes.

func TestStepsKeepTheSum(t *testing.T) {
	p := &problem{length: 3600, width: 1, block: 1800, blocks: 2, marks: 1, addr: []string{""}, overall: []float64{1}}
	for i := range 20 {
		p.rows = append(p.rows, row{t: float64(i * 150), cells: int32(i + 1)})
		p.cells = append(p.cells, obs{0, float64(1 + i%3)})
		p.total += float64(1 + i%3)
	}
	for u := range 3 {
		un := unit{candidate: u}
		for b := range 6 {
			start := float64(b*600 + u*170)
			un.starts, un.ends = append(un.starts, start), append(un.ends, start+120)
		}
		p.units = append(p.units, un)
	}
	p.prepare()
	m, s := p.start(), p.scratch()
	last := math.Inf(-1)
	for i := range 50 {
		p.step(m, nil, s)
		sum := 0.0
		for k, mu := range m.mu {
			sum += mu * p.blockLength(k)
		}
		for u := range p.units {
			sum += m.n[u]
			modelled := 0.0
			for j := range classes {
				modelled += m.rho[u*classes+j] * p.x[u*classes+j]
			}
			if math.Abs(modelled-m.n[u]) > 1e-6 {
				t.Fatalf("step %d: rates of unit %d mean %g requests, and %g are its own", i, u, modelled, m.n[u])
			}
		}
		if math.Abs(sum-p.total) > 1e-6 {
			t.Fatalf("step %d: %g requests of %g", i, sum, p.total)
		}
		last = m.ll
	}
	if math.IsNaN(last) || math.IsInf(last, 0) {
		t.Errorf("likelihood %g", last)
	}
}
