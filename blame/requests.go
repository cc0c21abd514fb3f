package blame

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Mark is what a request shows besides its time. Requests of a candidate tend to share
// marks: the git in a base image names its version, a build asks for the same modules.
type Mark struct {
	UserAgent string
	Asked     string // the repository that was asked for
	Addr      string // the egress address, where records of builds name theirs
}

// Requests counts requests in bins of time. Its memory is bounded whatever their
// number: where there are too many bins, marks are put together and bins get wider.
// It is not safe for concurrent use.
type Requests struct {
	cells       []cell // sorted and merged up to sorted
	sorted      int
	width       int64 // seconds
	marks       []Mark
	index       map[Mark]uint32
	total       int64
	first, last int64 // Unix seconds
	maxCells    int
}

type cell struct {
	bin  int64 // Unix seconds, over width
	mark uint32
	n    uint32
}

const (
	maxCells = 1 << 20 // 16 MiB, twice that before they are merged
	maxMarks = 4096    // kept apart while reading
	topMarks = 24      // kept apart where memory is short, and in the end
)

// NewRequests returns an empty count.
func NewRequests() *Requests {
	return &Requests{width: 1, marks: []Mark{{}}, index: map[Mark]uint32{{}: 0}, maxCells: maxCells}
}

// Add counts n requests at t, by the server's clock.
func (q *Requests) Add(t time.Time, n int64, m Mark) {
	if n <= 0 {
		return
	}
	s := t.Unix()
	if q.total == 0 || s < q.first {
		q.first = s
	}
	if q.total == 0 || s > q.last {
		q.last = s
	}
	q.total += n
	mark, ok := q.index[m]
	if !ok && len(q.marks) < maxMarks {
		mark, ok = uint32(len(q.marks)), true
		q.marks = append(q.marks, m)
		q.index[m] = mark
	}
	if !ok {
		mark = q.index[Mark{Addr: m.Addr}] // 0 where even this is new
	}
	for n > 0 {
		part := min(n, 1<<30)
		q.cells = append(q.cells, cell{floorDiv(s, q.width), mark, uint32(part)})
		n -= part
	}
	if len(q.cells) >= 2*q.maxCells {
		q.compact()
	}
}

// Total is the number of requests that were added.
func (q *Requests) Total() int64 { return q.total }

// Span is the time of the first and the last request; ok is false where there is none.
func (q *Requests) Span() (first, last time.Time, ok bool) {
	return time.Unix(q.first, 0).UTC(), time.Unix(q.last, 0).UTC(), q.total > 0
}

// clone returns a copy that can be made coarser.
func (q *Requests) clone() *Requests {
	c := *q
	c.cells, c.marks, c.index = slices.Clone(q.cells), slices.Clone(q.marks), maps.Clone(q.index)
	c.merge()
	return &c
}

// move adds seconds to all times, a multiple of the bins' width.
func (q *Requests) move(seconds int64) {
	for i := range q.cells {
		q.cells[i].bin += seconds / q.width
	}
	q.first += seconds
	q.last += seconds
}

// middle keeps the part, as long as length, around the request in the middle of those
// between from and to, in seconds.
func (q *Requests) middle(from, to, length int64) {
	inside := int64(0)
	for _, c := range q.cells {
		if t := c.bin * q.width; t >= from && t < to {
			inside += int64(c.n)
		}
	}
	begin, passed := from, int64(0)
	for _, c := range q.cells {
		if t := c.bin * q.width; t >= from && t < to {
			if passed += int64(c.n); 2*passed >= inside {
				begin = t - length/2
				break
			}
		}
	}
	begin = max(from, min(begin, to-length))
	part := q.cells[:0]
	q.total, q.first, q.last = 0, begin, begin+length
	for _, c := range q.cells {
		if t := c.bin * q.width; t >= begin && t < begin+length {
			part = append(part, c)
			q.total += int64(c.n)
		}
	}
	q.cells, q.sorted = part, len(part)
}

// compact merges equal cells, and makes them fewer where that was not enough.
func (q *Requests) compact() {
	q.merge()
	if len(q.cells) > q.maxCells {
		q.fold(topMarks)
	}
	for len(q.cells) > q.maxCells {
		q.widen()
	}
}

func (q *Requests) merge() {
	if q.sorted == len(q.cells) {
		return
	}
	slices.SortFunc(q.cells, func(a, b cell) int { return cmp.Or(cmp.Compare(a.bin, b.bin), cmp.Compare(a.mark, b.mark)) })
	out := q.cells[:0]
	for _, c := range q.cells {
		if k := len(out) - 1; k >= 0 && out[k].bin == c.bin && out[k].mark == c.mark && out[k].n <= 1<<31 {
			out[k].n += c.n
			continue
		}
		out = append(out, c)
	}
	q.cells = out
	q.sorted = len(out)
}

// widen doubles the width of the bins.
func (q *Requests) widen() {
	q.width *= 2
	for i := range q.cells {
		q.cells[i].bin = floorDiv(q.cells[i].bin, 2)
	}
	q.sorted = 0
	q.merge()
}

// fold keeps the most frequent marks, and puts the others together by their address.
func (q *Requests) fold(keep int) {
	counts := make([]int64, len(q.marks))
	for _, c := range q.cells {
		counts[c.mark] += int64(c.n)
	}
	order := make([]uint32, 0, len(q.marks))
	for m := range q.marks {
		if counts[m] > 0 {
			order = append(order, uint32(m))
		}
	}
	slices.SortFunc(order, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	old := q.marks
	to := make([]uint32, len(old))
	q.marks, q.index = []Mark{{}}, map[Mark]uint32{{}: 0}
	add := func(m Mark) uint32 {
		n, ok := q.index[m]
		if !ok {
			n = uint32(len(q.marks))
			q.marks = append(q.marks, m)
			q.index[m] = n
		}
		return n
	}
	for i, m := range order {
		if i < keep {
			to[m] = add(old[m])
			continue
		}
		rest := Mark{Addr: old[m].Addr}
		if _, ok := q.index[rest]; !ok && len(q.marks) >= 4*keep {
			rest = Mark{}
		}
		to[m] = add(rest)
	}
	for i := range q.cells {
		q.cells[i].mark = to[q.cells[i].mark]
	}
	q.sorted = 0
	q.merge()
}

func floorDiv(a, b int64) int64 {
	d := a / b
	if a%b < 0 {
		d--
	}
	return d
}
