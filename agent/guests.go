package agent

import (
	"container/list"
	"os"
	"sync"
)

// guests are connections that the agent waits for: senders that have not sent yet, and
// talkers that may send another control message. There is room for max of them. A new
// one takes the place of the one that came first: who opens ten thousand connections
// and says nothing closes its own with that, not the next one's.
type guests struct {
	max int

	mu      sync.Mutex
	byAge   list.List // of *guest, the oldest in front
	evicted int64
}

type guest struct {
	conn *os.File
	at   *list.Element
}

// enter gives conn a place and closes the oldest one where there was none. Reading from
// a closed connection returns os.ErrClosed.
func (g *guests) enter(conn *os.File) *guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.byAge.Len() >= max(g.max, 1) {
		oldest := g.byAge.Front()
		g.byAge.Remove(oldest)
		g.evicted++
		oldest.Value.(*guest).conn.Close()
	}
	v := &guest{conn: conn}
	v.at = g.byAge.PushBack(v)
	return v
}

// leave gives the place up; the connection stays open where it was not closed.
func (g *guests) leave(v *guest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.byAge.Remove(v.at) // does nothing for one that was removed
}
