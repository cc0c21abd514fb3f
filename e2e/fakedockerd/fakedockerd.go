// Package fakedockerd is a Docker daemon for tests and benchmarks: it speaks the
// real HTTP API on a unix socket and has the event stream's traps, but no
// containers.
//
// It models, after moby's daemon/events: a buffer of 256 events; since, inclusive,
// with a replay that walks back and stops at the first older event; headers that
// are flushed before the subscription; no replay without since; an empty buffer
// after a restart. It does not model filters, until, the publisher's 100 ms wait
// for slow subscribers (a slow subscriber here loses nothing and slows nobody),
// swarm, or API versions before 1.41.
package fakedockerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// BufferSize is the number of events kept for a replay.
const BufferSize = 256

// Event is one event: the line as it is sent and its time.
type Event struct {
	Line []byte // without the newline
	Nano int64
}

// Daemon is one fake daemon. Its exported fields may be set before Start; all
// methods are safe for concurrent use.
type Daemon struct {
	Socket string // unix socket, made at Start
	Engine string // id in /info
	API    string // version in /_ping, default 1.41
	// Running are the ids of running containers with their starts.
	Running map[string]time.Time
	// Clock is the daemon's clock, default time.Now.
	Clock func() time.Time
	// Blast, if set, is sent on each new event stream as fast as the reader reads,
	// BlastCount times over. Then the stream stays open, or ends if it was asked
	// for with since=0: a reader that stops by itself must not read twice.
	Blast      []byte
	BlastCount int

	mu       sync.Mutex
	server   *http.Server
	listener net.Listener
	buffer   []Event
	subs     map[*subscriber]bool
	refuse   func(path string) int
	opened   int
}

type subscriber struct {
	mu      sync.Mutex
	pending [][]byte
	wake    chan struct{}
	deaf    bool
}

// Start listens. After Stop or Kill it is a restart: the buffer is empty.
func (d *Daemon) Start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.API == "" {
		d.API = "1.41"
	}
	if d.Clock == nil {
		d.Clock = time.Now
	}
	_ = os.Remove(d.Socket)
	l, err := net.Listen("unix", d.Socket)
	if err != nil {
		return fmt.Errorf("fake daemon: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // Stop removes it, Kill does not
	d.listener, d.buffer, d.subs = l, nil, make(map[*subscriber]bool)
	d.server = &http.Server{Handler: d, ReadHeaderTimeout: 10 * time.Second}
	go func(s *http.Server) { _ = s.Serve(l) }(d.server)
	return nil
}

// Kill ends the daemon like SIGKILL: streams end at once, the socket file stays.
func (d *Daemon) Kill() {
	d.mu.Lock()
	server := d.server
	d.mu.Unlock()
	if server != nil {
		_ = server.Close()
	}
}

// Stop ends the daemon like SIGTERM: the socket file is removed.
func (d *Daemon) Stop() {
	d.Kill()
	_ = os.Remove(d.Socket)
}

// Cut ends all open streams and nothing else, like a proxy that restarts.
func (d *Daemon) Cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.subs {
		delete(d.subs, s)
		close(s.wake)
	}
}

// Deafen makes all open streams half-open: they stay open and bring nothing more.
func (d *Daemon) Deafen() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.subs {
		s.mu.Lock()
		s.deaf = true
		s.mu.Unlock()
	}
}

// Publish logs events and sends them to all subscribers.
func (d *Daemon) Publish(events ...Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range events {
		if len(d.buffer) == BufferSize {
			d.buffer = append(d.buffer[:0], d.buffer[1:]...)
		}
		d.buffer = append(d.buffer, e)
		for s := range d.subs {
			s.send(e.Line)
		}
	}
}

// Refuse sets what answers requests instead of the daemon: a function that gets
// the path without the version and returns a status, or 0 to let it pass. nil
// refuses nothing.
func (d *Daemon) Refuse(f func(path string) int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refuse = f
}

// Forget empties the buffer, as if the events had never been.
func (d *Daemon) Forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.buffer = nil
}

// Streams returns how many event streams were opened so far.
func (d *Daemon) Streams() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.opened
}

// subscribers returns how many streams are open.
func (d *Daemon) subscribers() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.subs)
}

func (s *subscriber) send(line []byte) {
	s.mu.Lock()
	if s.deaf {
		s.mu.Unlock()
		return
	}
	s.pending = append(s.pending, line)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscriber) take() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := s.pending
	s.pending = nil
	return lines
}

// ServeHTTP serves the API, for a server other than the one of Start.
func (d *Daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Path
	if rest, ok := strings.CutPrefix(path, "/v1."); ok {
		_, after, _ := strings.Cut(rest, "/")
		path = "/" + after
	}
	w.Header().Set("Api-Version", d.API)
	w.Header().Set("Server", "Docker/fake (linux)")
	d.mu.Lock()
	refuse := d.refuse
	d.mu.Unlock()
	if refuse != nil {
		if code := refuse(path); code != 0 {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(map[string]string{"message": "refused by the test"})
			return
		}
	}
	answer := func(v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	switch {
	case path == "/_ping":
		_, _ = w.Write([]byte("OK"))
	case path == "/version":
		answer(map[string]string{"Version": "fake", "ApiVersion": d.API, "MinAPIVersion": "1.24", "Os": "linux", "Arch": "amd64"})
	case path == "/info":
		answer(map[string]any{"ID": d.Engine, "ServerVersion": "fake", "SystemTime": d.Clock().Format(time.RFC3339Nano)})
	case path == "/images/json":
		answer([]any{})
	case path == "/containers/json":
		list := []map[string]any{}
		for id := range d.Running {
			list = append(list, map[string]any{"Id": id, "State": "running"})
		}
		answer(list)
	case strings.HasPrefix(path, "/containers/") && strings.HasSuffix(path, "/json"):
		id := strings.TrimSuffix(strings.TrimPrefix(path, "/containers/"), "/json")
		answer(map[string]any{"Id": id, "State": map[string]any{"Running": true, "StartedAt": d.Running[id].UTC().Format(time.RFC3339Nano)}})
	case path == "/events":
		d.events(w, r)
	default:
		w.WriteHeader(http.StatusNotFound)
		answer(map[string]string{"message": "page not found"})
	}
}

func (d *Daemon) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	flusher, _ := w.(http.Flusher)
	flusher.Flush()
	d.mu.Lock()
	d.opened++
	d.mu.Unlock()
	if d.Blast != nil {
		for range d.BlastCount {
			if _, err := w.Write(d.Blast); err != nil {
				return
			}
		}
		if since, _ := parseSince(r.URL.Query().Get("since")); since != 0 {
			flusher.Flush()
			<-r.Context().Done()
		}
		return
	}
	since, ok := parseSince(r.URL.Query().Get("since"))
	s := &subscriber{wake: make(chan struct{}, 1)}
	d.mu.Lock()
	d.subs[s] = true
	if ok {
		first := len(d.buffer)
		for first > 0 && d.buffer[first-1].Nano >= since {
			first--
		}
		for _, e := range d.buffer[first:] {
			s.send(e.Line)
		}
	}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.subs, s)
		d.mu.Unlock()
	}()
	for {
		for _, line := range s.take() {
			if _, err := w.Write(append(line[:len(line):len(line)], '\n')); err != nil {
				return
			}
		}
		flusher.Flush()
		select {
		case _, open := <-s.wake:
			if !open {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

func parseSince(s string) (nano int64, ok bool) {
	if s == "" {
		return 0, false
	}
	whole, frac, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return 0, false
	}
	n, _ := strconv.ParseInt((frac + "000000000")[:9], 10, 64)
	return sec*1e9 + n, true
}

// WaitSubscribers waits until n streams are open.
func (d *Daemon) WaitSubscribers(ctx context.Context, n int) error {
	for d.subscribers() != n {
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), fmt.Errorf("%d streams open, want %d", d.subscribers(), n))
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}
