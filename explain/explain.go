// Package explain says of each event of a Docker daemon whether a recorded call can
// have caused it. What no call explains was done past the shim: by a job's own docker,
// by an SDK, by curl on the daemon's socket.
//
// Calls, their ends and events go into a Book in about the order of their times. A
// call explains events of the kinds that its command can cause, while it runs and a
// moment longer; and a container, network or volume that came by an explained event
// explains what later happens to it, when its call is long over. An event is settled
// once enough time has gone by that the record of its call must have come.
//
// The answer is a lower bound: what bypasses the shim while a fitting call runs is
// taken for that call's. Nothing here grows without bound, whatever a job sends.
package explain

import (
	"hash/maphash"
	"slices"
	"strings"
	"time"
)

// Event is what the book must know of an event.
type Event struct {
	At        time.Time // when it was seen, by the clock that calls are stamped with
	Type      string    // record.Event's Type, Action, ...
	Action    string
	Actor     string
	Container string
	Image     string
	// Counted is false for an event that only tells the book what there is.
	Counted bool
}

// Counts are what was settled.
type Counts struct {
	// Explained events have a recorded call behind them.
	Explained int64 `json:"explained"`
	// Unattributed events have none.
	Unattributed int64 `json:"unattributed"`
}

const (
	// before and after are how far an event's time may lie outside the time of its call:
	// the daemon stamps an event before it sends it, and a call is stamped when the
	// shim begins.
	before, after = time.Second, 5 * time.Second
	// window is how long an event waits for its call. A call that comes by an append
	// file comes half a second late.
	window = 15 * time.Second
	// endless is how long a call counts as running whose end is never known.
	endless = 10 * time.Minute

	maxHosts  = 4096
	maxCalls  = 1024  // of one host, running or over for less than the window
	maxWaits  = 4096  // events of one host that wait; a settled event is compared with all calls
	maxActors = 16384 // things of one host that came by an explained event
)

// Book matches the events of any number of hosts with their calls. It is not safe for
// concurrent use.
type Book struct {
	counts Counts
	seed   maphash.Seed
	hosts  map[hash]*host
}

// hash stands for an id, an image or the name of a host: jobs choose how long those
// are.
type hash uint64

type host struct {
	now    time.Time // the latest time seen
	calls  []call
	waits  []waiting
	actors map[hash]bool
}

type call struct {
	id         hash
	start, end time.Time // end is zero while it runs
	causes     kinds
	images     []hash // repositories; nil where any image fits
}

// waiting is an event that waits for its call.
type waiting struct {
	at               time.Time
	kind             kinds
	actor, container hash // 0 where there is none
	image            hash // that the call must name; 0 where any fits
	made, gone       bool // the event begins or ends the life of its actor
	counted          bool
}

// New returns an empty book.
func New() *Book { return &Book{seed: maphash.MakeSeed(), hosts: make(map[hash]*host)} }

func (b *Book) hash(s string) hash {
	if s == "" {
		return 0
	}
	return hash(maphash.String(b.seed, s)) | 1
}

// Counts returns what was settled so far.
func (b *Book) Counts() Counts { return b.counts }

func (b *Book) host(name string) *host {
	key := b.hash(name)
	h := b.hosts[key]
	if h == nil {
		if len(b.hosts) >= maxHosts { // a stream of the whole fleet
			for other := range b.hosts {
				b.settle(b.hosts[other], time.Time{})
				delete(b.hosts, other)
				break
			}
		}
		h = &host{actors: make(map[hash]bool)}
		b.hosts[key] = h
	}
	return h
}

// Call tells the book of a call that began at a time. A command that causes no events
// is not kept.
func (b *Book) Call(hostName, id string, at time.Time, tool, command string, images []string) {
	causes := causesOf(tool, command)
	if causes == 0 {
		return
	}
	h := b.host(hostName)
	if len(h.calls) >= maxCalls {
		h.prune()
	}
	c := call{id: b.hash(id), start: at, causes: causes}
	if namesItsImage(command) {
		for _, image := range images[:min(len(images), 16)] {
			c.images = append(c.images, b.hash(repository(image)))
		}
	}
	h.calls = append(h.calls, c)
	b.advance(h, at)
}

// End tells the book when the call with this id ended; known is false where nobody
// saw the end, and at is no more than the time of which that was said.
func (b *Book) End(hostName, id string, at time.Time, known bool) {
	h := b.hosts[b.hash(hostName)]
	if h == nil {
		return
	}
	key := b.hash(id)
	for i := len(h.calls) - 1; i >= 0; i-- {
		if h.calls[i].id == key {
			if known {
				h.calls[i].end = at
			} else {
				h.calls[i].end = h.calls[i].start.Add(endless)
			}
			break
		}
	}
	b.advance(h, at)
}

// Event tells the book of an event. Those of the daemon itself (a reload of its
// configuration) are nobody's call and not counted.
func (b *Book) Event(hostName string, e Event) {
	if e.Type == "daemon" {
		return
	}
	h := b.host(hostName)
	if len(h.waits) >= maxWaits {
		b.settleOne(h)
	}
	w := waiting{
		at: e.At, kind: kindOf(e.Type), container: b.hash(e.Container), made: e.Action == "create", counted: e.Counted,
		gone: e.Action == "destroy" || e.Action == "remove",
	}
	if e.Type != "image" { // an image is known by many names
		w.actor = b.hash(e.Actor)
	}
	if e.Type == "container" && w.made || e.Type == "image" && e.Action == "pull" {
		w.image = b.hash(repository(e.Image))
	}
	h.waits = append(h.waits, w)
	b.advance(h, e.At)
}

// Advance settles what was waiting for long enough at the time now.
func (b *Book) Advance(now time.Time) {
	for _, h := range b.hosts {
		b.advance(h, now)
	}
}

// Settle settles all that waits: nothing more comes.
func (b *Book) Settle() {
	for _, h := range b.hosts {
		b.settle(h, time.Time{})
	}
}

func (b *Book) advance(h *host, at time.Time) {
	if at.After(h.now) {
		h.now = at
	}
	b.settle(h, h.now.Add(-window))
}

// settle settles the events from before a time, all where it is zero.
func (b *Book) settle(h *host, until time.Time) {
	for len(h.waits) > 0 && (until.IsZero() || h.waits[0].at.Before(until)) {
		b.settleOne(h)
	}
}

// prune forgets calls that no later event can be of, and the oldest where that is not
// enough.
func (h *host) prune() {
	edge := h.now.Add(-window - after)
	h.calls = slices.DeleteFunc(h.calls, func(c call) bool { return !c.end.IsZero() && c.end.Before(edge) })
	if n := len(h.calls) - maxCalls*3/4; n > 0 {
		h.calls = slices.Delete(h.calls, 0, n)
	}
}

func (b *Book) settleOne(h *host) {
	w := h.waits[0]
	h.waits = h.waits[1:]
	explained := h.explains(&w)
	switch {
	case w.actor == 0:
	case w.gone:
		delete(h.actors, w.actor)
	case explained && !h.actors[w.actor]:
		if len(h.actors) >= maxActors {
			clear(h.actors)
		}
		h.actors[w.actor] = true
	}
	switch {
	case !w.counted:
	case explained:
		b.counts.Explained++
	default:
		b.counts.Unattributed++
	}
}

func (h *host) explains(w *waiting) bool {
	if !w.made && (w.actor != 0 && h.actors[w.actor] || w.container != 0 && h.actors[w.container]) {
		return true
	}
	for i := len(h.calls) - 1; i >= 0; i-- {
		c := &h.calls[i]
		if c.causes&w.kind == 0 || w.at.Before(c.start.Add(-before)) || !c.end.IsZero() && w.at.After(c.end.Add(after)) {
			continue
		}
		if w.image == 0 || c.images == nil || slices.Contains(c.images, w.image) {
			return true
		}
	}
	return false
}

// kinds is a set of types of events.
type kinds uint8

const (
	containers kinds = 1 << iota
	images
	networks
	volumes
	others // builder, plugin, other
	all    = containers | images | networks | volumes | others
)

func kindOf(typ string) kinds {
	switch typ {
	case "container":
		return containers
	case "image":
		return images
	case "network":
		return networks
	case "volume":
		return volumes
	}
	return others
}

// causesOf is what a command can make the daemon say. A tool or command that this
// build does not know may cause anything.
func causesOf(tool, command string) kinds {
	if tool != "docker" {
		return all
	}
	first, rest, _ := strings.Cut(command, " ")
	second, _, _ := strings.Cut(rest, " ")
	switch first {
	case "version", "info", "ps", "images", "inspect", "logs", "search", "login", "logout", "context", "events", "stats", "history",
		"port", "diff", "wait", "manifest", "trust", "completion", "help":
		return 0
	case "run", "create":
		return all // it pulls, and makes networks' connections and anonymous volumes
	case "start", "stop", "restart", "kill", "rm", "pause", "unpause", "rename", "update", "exec", "attach", "cp", "export", "top", "commit":
		return containers | images | networks | volumes // commit makes an image, rm -v removes volumes
	case "pull", "push", "tag", "rmi", "save", "load", "import":
		return images
	case "container":
		switch second {
		case "ls", "ps", "list", "inspect", "logs", "stats", "port", "diff", "wait":
			return 0
		}
		return all
	case "image":
		switch second {
		case "ls", "list", "inspect", "history":
			return 0
		}
		return images | others
	case "network":
		switch second {
		case "ls", "list", "inspect":
			return 0
		}
		return networks
	case "volume":
		switch second {
		case "ls", "list", "inspect":
			return 0
		}
		return volumes
	case "system":
		switch second {
		case "df", "events", "info", "dial-stdio":
			return 0
		}
	}
	return all
}

// namesItsImage says whether the images on a command line are the ones that its
// containers run, or that it pulls, and no others.
func namesItsImage(command string) bool {
	switch command {
	case "run", "create", "container run", "container create", "pull", "image pull":
		return true
	}
	return false
}

// repository is an image reference without tag and digest, and without the parts that
// docker adds where they are left out.
func repository(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if colon := strings.LastIndexByte(ref, ':'); colon > strings.LastIndexByte(ref, '/') {
		ref = ref[:colon]
	}
	ref = strings.TrimPrefix(ref, "index.")
	ref = strings.TrimPrefix(ref, "docker.io/")
	return strings.TrimPrefix(ref, "library/")
}
