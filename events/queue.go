package events

import (
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// maxQueuedLosses bounds the losses that wait in a queue whose taker is stuck;
// beyond it they are merged.
const maxQueuedLosses = 64

// patience is how long a push to a full queue waits for the taker to come by, once
// for each time it came. It lets a taker that only lacks a CPU keep up with a burst;
// a taker that is stuck costs the reader one patience in all. The reader is never
// slower than one batch in this time, 5,000 events a second, where a real daemon
// makes about 1,000; in it the daemon's own 1024 places for us do not fill.
const patience = 50 * time.Millisecond

// queue stands between the goroutine that reads the daemon's stream and the one
// that hands records on. The reader must not wait for that one, because when a
// subscriber's 1024 events are full the daemon waits 100 ms for each further one,
// and every docker command with it (moby, daemon/events and pkg/pubsub). So the
// queue is bounded, and when it is full the oldest message is dropped and counted.
type queue struct {
	max int // messages

	// room holds a token when something was taken.
	room chan struct{}

	// wake holds a token when there is something to take.
	wake chan struct{}

	mu      sync.Mutex
	ring    []message // grows to max
	head, n int
	dropped int64 // messages dropped since the last take...
	from    int64 // ...with the daemon's times of the oldest
	to      int64 // ...and of the newest
	losses  []record.Loss
	after   cursor // where the cursor moves without an event
	closed  bool
	waited  bool // patience was spent since the last take
}

func newQueue(max int) *queue {
	return &queue{max: max, wake: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

// push adds m. The taker is not woken, unless the queue is full: see ready.
func (q *queue) push(m *message) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.n == q.max && !q.waited {
		q.await()
	}
	if q.n == len(q.ring) && q.n < q.max {
		q.grow()
	}
	if q.n == q.max {
		old := &q.ring[q.head]
		if q.dropped == 0 {
			q.from = old.nano
		}
		q.to = old.nano
		q.dropped++
		q.head = (q.head + 1) % len(q.ring)
		q.n--
	}
	q.ring[(q.head+q.n)%len(q.ring)] = *m
	q.n++
}

// await lets go of the lock until something is taken or patience ends.
func (q *queue) await() {
	q.waited = true
	select {
	case <-q.room: // of an earlier take
	default:
	}
	q.mu.Unlock()
	defer q.mu.Lock()
	q.ready()
	over := time.NewTimer(patience)
	defer over.Stop()
	select {
	case <-q.room:
	case <-over.C:
	}
}

func (q *queue) grow() {
	ring := make([]message, min(max(2*len(q.ring), 64), q.max))
	for i := range q.n {
		ring[i] = q.ring[(q.head+i)%len(q.ring)]
	}
	q.ring, q.head = ring, 0
}

// lose adds a loss. Losses are never dropped; equal ones that can be counted
// together are.
func (q *queue) lose(l record.Loss) {
	q.loseLater(l)
	q.ready()
}

// loseLater is lose for many in a row: the taker is woken by the next ready.
func (q *queue) loseLater(l record.Loss) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.losses)
	if n > 0 {
		switch last := &q.losses[n-1]; {
		case last.Cause == l.Cause && last.Count > 0 && l.Count > 0:
			last.To, last.Count = l.To, last.Count+l.Count
			return
		case n == maxQueuedLosses:
			last.To, last.Count = l.To, -1
			return
		}
	}
	q.losses = append(q.losses, l)
}

// move sets the cursor without an event.
func (q *queue) move(at cursor) {
	q.mu.Lock()
	q.after = at
	q.mu.Unlock()
	q.ready()
}

// ready wakes the taker. The reader calls it when it has pushed all that has
// arrived, once for many messages.
func (q *queue) ready() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// close lets take report the end once the queue is empty.
func (q *queue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.ready()
}

// take moves up to len(dst) messages into dst and returns their number, the losses
// that were added, that of dropped messages included, where the cursor moved, and
// whether the queue is closed and now empty. It does not wait.
func (q *queue) take(dst []message) (n int, losses []record.Loss, after cursor, done bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	losses, q.losses = q.losses, nil
	after, q.after = q.after, cursor{}
	if q.dropped > 0 {
		losses = append(losses, record.Loss{
			Cause: "queue_full", Count: q.dropped, Source: source,
			From: time.Unix(0, q.from).UTC(), To: time.Unix(0, q.to).UTC(),
			Detail: "events arrived faster than they were taken",
		})
		q.dropped = 0
	}
	n = min(len(dst), q.n)
	for i := range n {
		at := (q.head + i) % len(q.ring)
		dst[i] = q.ring[at]
		q.ring[at] = message{} // let its strings go
	}
	if n > 0 {
		q.head = (q.head + n) % len(q.ring)
		q.n -= n
		q.waited = false
		select {
		case q.room <- struct{}{}:
		default:
		}
	}
	return n, losses, after, q.closed && q.n == 0
}

func (q *queue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.n
}
