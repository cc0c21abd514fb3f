package explain

import (
	"fmt"
	"runtime"
	"testing"
	"time"
)

var start = time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }

func event(seconds float64, typ, action, actor, image string) Event {
	return Event{At: at(seconds), Type: typ, Action: action, Actor: actor, Image: image, Counted: true}
}

func TestWhatACallExplains(t *testing.T) {
	for _, row := range []struct {
		name string
		tell func(b *Book)
		want Counts
	}{
		{"a run, and what its container does when the call is long over", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "run", []string{"alpine:3"})
			b.Event("h", event(0.1, "container", "create", "c1", "docker.io/library/alpine:3"))
			b.Event("h", event(0.2, "container", "start", "c1", "alpine:3"))
			b.Event("h", Event{At: at(0.2), Type: "network", Action: "connect", Actor: "bridge", Container: "c1", Counted: true})
			b.End("h", "1", at(0.3), true)
			b.Event("h", event(500, "container", "die", "c1", "alpine:3"))
			b.Event("h", event(501, "container", "destroy", "c1", "alpine:3"))
		}, Counts{Explained: 5}},
		{"a container made by curl on the socket", func(b *Book) {
			b.Event("h", event(0, "container", "create", "c1", "alpine:3"))
			b.Event("h", event(1, "container", "start", "c1", "alpine:3"))
			b.Event("h", event(2, "container", "die", "c1", "alpine:3"))
		}, Counts{Unattributed: 3}},
		{"the same beside calls that only look", func(b *Book) {
			for i, command := range []string{"version", "ps", "image ls", "logs", "system df", "events"} {
				b.Call("h", fmt.Sprint(i), at(0), "docker", command, nil)
			}
			b.Event("h", event(1, "container", "create", "c1", "alpine:3"))
		}, Counts{Unattributed: 1}},
		{"the same beside a run of another image", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "run", []string{"debian"})
			b.Event("h", event(1, "container", "create", "c1", "alpine:3"))
		}, Counts{Unattributed: 1}},
		{"the same beside a pull", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "pull", []string{"alpine:3"})
			b.Event("h", event(0.5, "image", "pull", "alpine:3", "alpine:3"))
			b.Event("h", event(1, "container", "create", "c1", "alpine:3"))
		}, Counts{Explained: 1, Unattributed: 1}},
		{"the same when the call was over", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "run", []string{"alpine:3"})
			b.End("h", "1", at(1), true)
			b.Event("h", event(60, "container", "create", "c1", "alpine:3"))
		}, Counts{Unattributed: 1}},
		{"a call of another machine explains nothing here", func(b *Book) {
			b.Call("other", "1", at(0), "docker", "run", nil)
			b.Event("h", event(1, "container", "create", "c1", "alpine:3"))
		}, Counts{Unattributed: 1}},
		{"a call whose record comes after the event, by file", func(b *Book) {
			b.Event("h", event(0.5, "container", "create", "c1", "alpine:3"))
			b.Call("h", "1", at(0), "docker", "run", []string{"alpine"})
		}, Counts{Explained: 1}},
		{"compose names no image", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "compose up", nil)
			b.Event("h", event(0.5, "container", "create", "c1", "alpine:3"))
		}, Counts{Explained: 1}},
		{"a call whose end nobody saw, for a while", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "compose up", nil)
			b.End("h", "1", at(1), false)
			b.Event("h", event(300, "container", "create", "c1", "alpine:3"))
			b.Event("h", event(3000, "container", "create", "c2", "alpine:3"))
		}, Counts{Explained: 1, Unattributed: 1}},
		{"the daemon's own events are nobody's", func(b *Book) {
			b.Event("h", event(0, "daemon", "reload", "d", ""))
		}, Counts{}},
		{"what is outside any job is known but not counted", func(b *Book) {
			b.Call("h", "1", at(0), "docker", "run", []string{"alpine"})
			e := event(0.5, "container", "create", "c1", "alpine")
			e.Counted = false
			b.Event("h", e)
			b.End("h", "1", at(1), true)
			b.Event("h", event(300, "container", "die", "c1", "alpine"))
		}, Counts{Explained: 1}},
	} {
		t.Run(row.name, func(t *testing.T) {
			b := New()
			row.tell(b)
			b.Settle()
			if got := b.Counts(); got != row.want {
				t.Errorf("got %+v, want %+v", got, row.want)
			}
		})
	}
}

// A live book settles by itself, with the time.
func TestEventsSettleWithTime(t *testing.T) {
	b := New()
	b.Event("h", event(0, "container", "create", "c1", "alpine"))
	if got := b.Counts(); got != (Counts{}) {
		t.Errorf("settled at once: %+v", got)
	}
	b.Advance(at(60))
	if got := b.Counts(); got.Unattributed != 1 {
		t.Errorf("after a minute: %+v", got)
	}
}

// Whatever a job sends, the book stays small.
func TestAFloodDoesNotGrowTheBook(t *testing.T) {
	b := New()
	for i := range 20_000 {
		id := fmt.Sprint(i)
		b.Call("h", id, at(0), "docker", "run", []string{"alpine" + id})
		b.Event("h", event(0, "container", "create", id, "alpine"+id))
		b.End("h", fmt.Sprint(i-100), at(0), true)
		b.Event("host"+id, event(0, "container", "create", id, "x"))
	}
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 64<<20 {
		t.Errorf("%d MiB of heap", m.HeapAlloc>>20)
	}
	runtime.KeepAlive(b)
}

func TestRepository(t *testing.T) {
	for ref, want := range map[string]string{
		"alpine": "alpine", "alpine:3": "alpine", "docker.io/library/alpine": "alpine", "index.docker.io/library/alpine:3": "alpine",
		"localhost:5000/a/b": "localhost:5000/a/b", "localhost:5000/a/b:1@sha256:00": "localhost:5000/a/b", "": "",
	} {
		if got := repository(ref); got != want {
			t.Errorf("%q: %q, want %q", ref, got, want)
		}
	}
}
