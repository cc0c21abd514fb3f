package agent

import (
	"container/list"
	"os"
	"sync"
)

// guests are connections that the agent waits for: senders that have not sent yet, and
// talkers that may send another control message. There is room for max of them, and for
// perProcess of one process: a shim has one. A new one takes the place of the one that
// came first: who opens ten thousand connections and says nothing closes its own with
// that, not the next one's.
type guests struct {
	max int

	mu    sync.Mutex
	byAge list.List // of *guest, the oldest in front
	of    map[int32]int
}

// perProcess bounds the connections of one process, where its id is known.
const perProcess = 8

type guest struct {
	conn *os.File
	pid  int32
	at   *list.Element // nil when it has left
}

// enter gives conn, of process pid (0 where unknown), a place, and closes the oldest one
// where there was none. Reading from a closed connection returns os.ErrClosed.
func (g *guests) enter(conn *os.File, pid int32) *guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case pid != 0 && g.of[pid] >= perProcess:
		g.evict(func(v *guest) bool { return v.pid == pid })
	case g.byAge.Len() >= max(g.max, 1):
		g.evict(func(*guest) bool { return true })
	}
	v := &guest{conn: conn, pid: pid}
	v.at = g.byAge.PushBack(v)
	if g.of == nil {
		g.of = make(map[int32]int)
	}
	g.of[pid]++
	return v
}

// evict closes the oldest connection that matches.
func (g *guests) evict(match func(*guest) bool) {
	for e := g.byAge.Front(); e != nil; e = e.Next() {
		if v := e.Value.(*guest); match(v) {
			g.remove(v)
			v.conn.Close()
			return
		}
	}
}

func (g *guests) remove(v *guest) {
	if v.at == nil {
		return
	}
	g.byAge.Remove(v.at)
	v.at = nil
	if g.of[v.pid]--; g.of[v.pid] == 0 {
		delete(g.of, v.pid)
	}
}

// leave gives the place up; the connection stays open where it was not closed.
func (g *guests) leave(v *guest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.remove(v)
}

func (g *guests) len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.byAge.Len()
}
