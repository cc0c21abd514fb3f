package report

import (
	"container/heap"
	"sort"
)

// maxKeys bounds the distinct keys that one table counts. Below it every figure
// is exact. A journal with more (a tag made anew for each commit, say) goes on
// with the space-saving algorithm of Metwally, Agrawal and El Abbadi (2005): the
// rarest key gives its place to the new one, so that what is often is surely
// there, and a count shown is too low by at most `slack`.
const maxKeys = 10000

// maxKeyBytes cuts one part of a key. The record's own cap is 4 KiB a field; a
// table of hostile names must not cost forty megabytes.
const maxKeyBytes = 512

// top counts values of V by key, with bounded memory.
type top[V any] struct {
	entries map[string]*entry[V]
	heap    entryHeap[V] // by weight, least first; built when the table is full
	max     int
	slack   int64 // 0: the table is exact
}

type entry[V any] struct {
	key    string
	weight int64
	index  int
	v      V
}

func newTop[V any]() *top[V] {
	return &top[V]{entries: make(map[string]*entry[V]), max: maxKeys}
}

// at returns the value of key and adds one to the key's weight.
func (t *top[V]) at(key []byte) *V {
	if e, ok := t.entries[string(key)]; ok {
		e.weight++
		if t.heap != nil {
			heap.Fix(&t.heap, e.index)
		}
		return &e.v
	}
	if len(t.entries) < t.max {
		e := &entry[V]{key: string(key), weight: 1}
		t.entries[e.key] = e
		return &e.v
	}
	if t.heap == nil {
		t.heap = make(entryHeap[V], 0, len(t.entries))
		for _, e := range t.entries {
			e.index = len(t.heap)
			t.heap = append(t.heap, e)
		}
		heap.Init(&t.heap)
	}
	e := t.heap[0]
	delete(t.entries, e.key)
	t.slack = max(t.slack, e.weight)
	var zero V
	e.key, e.v = string(key), zero
	e.weight++
	t.entries[e.key] = e
	heap.Fix(&t.heap, 0)
	return &e.v
}

// sorted returns all entries in the order of less, ties by key.
func (t *top[V]) sorted(less func(a, b *V) int) []*entry[V] {
	out := make([]*entry[V], 0, len(t.entries))
	for _, e := range t.entries {
		out = append(out, e)
	}
	sort.Slice(out, func(i, j int) bool {
		if c := less(&out[i].v, &out[j].v); c != 0 {
			return c < 0
		}
		return out[i].key < out[j].key
	})
	return out
}

type entryHeap[V any] []*entry[V]

func (h entryHeap[V]) Len() int           { return len(h) }
func (h entryHeap[V]) Less(i, j int) bool { return h[i].weight < h[j].weight }
func (h entryHeap[V]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *entryHeap[V]) Push(any) {} // never grows after it was built
func (h *entryHeap[V]) Pop() any { return nil }

// appendKey appends one part of a key, cut and closed by a byte that no part contains.
func appendKey(dst, part []byte) []byte {
	if len(part) > maxKeyBytes {
		part = part[:maxKeyBytes]
	}
	for _, c := range part {
		if c == 0 {
			c = ' '
		}
		dst = append(dst, c)
	}
	return append(dst, 0)
}
