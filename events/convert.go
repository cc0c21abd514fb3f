package events

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/distribution/reference"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/wrapper"
)

// Other stands for every type and action that this build does not know, so that
// both are closed sets: they become tags of metrics.
const Other = "other"

// knownType returns the daemon's type as a constant.
func knownType(s string) (string, bool) {
	switch s {
	case "container":
		return "container", true
	case "image":
		return "image", true
	case "network":
		return "network", true
	case "volume":
		return "volume", true
	case "builder":
		return "builder", true
	case "daemon":
		return "daemon", true
	case "plugin":
		return "plugin", true
	}
	return Other, false
}

// actions are the actions of moby's api/types/events, all types together.
var actions = func() map[string]string {
	m := make(map[string]string)
	for _, a := range strings.Fields(`
		create start restart stop checkpoint pause unpause attach detach resize update rename kill die oom destroy
		remove commit top copy archive-path extract-to-dir export import save load tag untag push pull prune delete
		enable disable connect disconnect reload mount unmount
		exec_create exec_start exec_die exec_detach health_status`) {
		m[a] = a
	}
	return m
}()

// Types returns the closed set of Event.Type, Other included.
func Types() []string {
	return []string{"container", "image", "network", "volume", "builder", "daemon", "plugin", Other}
}

// Actions returns the closed set of Event.Action; see Types.
func Actions() []string {
	return append(slices.Sorted(maps.Keys(actions)), Other)
}

// knownAction returns an action, cut at its colon, as a constant.
func knownAction(s string) (string, bool) {
	if a, ok := actions[s]; ok {
		return a, true
	}
	return Other, false
}

// maxStarted is the number of containers whose start is remembered for the
// duration in die. At the limit one of them, no matter which, loses its duration.
const maxStarted = 4096

// maxReferences is the number of image references, and of names, whose check is
// remembered: it costs more than all the rest of an event.
const maxReferences = 512

// converter makes records of messages. It belongs to one goroutine.
type converter struct {
	started    map[string]run
	references map[string]string
	names      map[string]string // the same of names
	redact     wrapper.Redactor
}

// run is what is remembered of a running container until it dies.
type run struct {
	start int64 // the daemon's time of the start, 0 where unknown
	oom   bool
}

func newConverter() *converter {
	return &converter{started: make(map[string]run), references: make(map[string]string), names: make(map[string]string)}
}

// convert fills r and ev with the event of m.
func (c *converter) convert(m *message, r *record.Record, ev *record.Event) {
	at := m.nano
	if at <= 0 {
		at = m.received
	}
	*r = record.Record{
		ID:     record.DeriveID(time.Unix(0, at), m.daemon.Engine, strconv.FormatInt(m.nano, 10), m.typ, m.action, m.actor, m.execID),
		TS:     time.Unix(0, at).UTC(),
		Kind:   record.KindEvent,
		Schema: record.SchemaVersion,
		By:     record.ByNone,
		Event:  ev,
	}
	*ev = record.Event{
		Detail:   m.detail,
		ActorID:  text(m.actor),
		TimeNano: m.nano,
		Received: time.Unix(0, m.received).UTC(),
		Replayed: m.replayed,
		Engine:   text(m.daemon.Engine),
		WaitedNS: int64(m.waited),
	}
	ev.Type, _ = knownType(m.typ)
	ev.Action, _ = knownAction(m.action)
	if m.scope == "local" || m.scope == "swarm" {
		ev.Scope = m.scope
	}
	switch ev.Type {
	case "container":
		c.container(m, ev)
	case "image":
		c.image(m, ev)
	case "network":
		ev.Name, ev.Driver, ev.Container = c.name(m.name), text(m.driver), text(m.container)
		hex, ok := strings.CutPrefix(m.name, "github_network_")
		ev.RunnerMade = ok && len(hex) == 32 && isHex(hex)
	case "volume":
		ev.Name, ev.Driver, ev.Container = c.name(m.actor), text(m.driver), text(m.container)
		ev.ActorID = ev.Name // a volume has no other id
	case "daemon":
		ev.Name = c.name(m.name)
	case "plugin":
		ev.Name, ev.ActorID = c.name(m.name), c.name(m.actor)
	}
	if ev.Action == "prune" {
		ev.ReclaimedBytes = number(m.reclaimed, 0, 1<<62)
	}
}

func (c *converter) container(m *message, ev *record.Event) {
	ev.Image, ev.Name, ev.ExecID, ev.Labels = c.reference(m.image), c.name(m.name), text(m.execID), c.labels(m.labels)
	ev.RunnerMade = m.runnerLabel && runnerName(m.name)
	switch ev.Action {
	case "start":
		c.remember(m.actor, m.nano)
	case "oom":
		was := c.started[m.actor]
		was.oom = true
		c.put(m.actor, was)
	case "die":
		ev.ExitCode = exitCode(m.exitCode)
		was := c.started[m.actor]
		ev.OOM = was.oom
		switch {
		case was.start > 0 && m.nano >= was.start:
			ev.DurationNS = m.nano - was.start
		case m.execDuration != "":
			// Whole seconds, since Docker 23.0; better than nothing where the start
			// was not seen.
			ev.DurationNS = number(m.execDuration, 0, 1<<32) * int64(time.Second)
		}
		delete(c.started, m.actor)
	case "destroy":
		delete(c.started, m.actor)
	case "exec_die":
		ev.ExitCode = exitCode(m.exitCode)
	case "kill":
		ev.Signal = number(m.signal, 1, 64)
	}
}

func (c *converter) image(m *message, ev *record.Event) {
	ev.Labels = c.labels(m.labels)
	switch ev.Action {
	case "pull", "push":
		// Here the actor is the reference with its tag or digest, the attribute
		// name the repository alone. A text that is no reference is kept nowhere.
		ev.Image = c.reference(m.actor)
		ev.ActorID = ev.Image
	default:
		// The actor is the image's id. The name is the new reference of a tag, and
		// the id once more for untag, delete, save, load and import, except that
		// an untag of the containerd image store names the reference.
		if m.name != m.actor {
			ev.Image = c.reference(m.name)
		}
	}
	repository, id, ok := strings.Cut(ev.Image, ":")
	ev.RunnerMade = ok && len(repository) == 6 && isHex(repository) && len(id) == 32 && isHex(id)
}

// remember keeps the start of a container, from its event or from the list of
// running containers.
func (c *converter) remember(id string, start int64) { c.put(id, run{start: start}) }

func (c *converter) put(id string, r run) {
	if len(id) > 64 {
		return // no container id: 64 hexadecimal digits
	}
	if _, ok := c.started[id]; !ok && len(c.started) >= maxStarted {
		for old := range c.started {
			delete(c.started, old)
			break
		}
	}
	c.started[strings.Clone(id)] = r
}

// resync takes over the starts of containers that were running when they were
// listed. The later start counts: a container may have been restarted while no one
// was looking.
func (c *converter) resync(started map[string]int64) {
	for id, at := range started {
		if was := c.started[id]; at > was.start {
			c.put(id, run{start: at, oom: was.oom})
		}
	}
}

// reference returns s if it is an image reference or an image id, else "". What
// is no reference may be anything, such as an URL with a password in it, and what
// holds a token is kept no more than that.
func (c *converter) reference(s string) string {
	if s == "" {
		return ""
	}
	if good, ok := c.references[s]; ok {
		return good
	}
	if len(c.references) >= maxReferences {
		clear(c.references)
	}
	s = strings.Clone(s)
	good := s
	if _, err := reference.ParseAnyReference(s); err != nil || c.redact.Name(s) != s {
		good = ""
	}
	c.references[s] = good
	return good
}

// runnerName reports whether a container's name ends as the names do that the
// runner makes: <32 hex>_<image>_<6 hex> for services and job containers,
// <image>_<6 hex> for container actions.
func runnerName(s string) bool {
	i := strings.LastIndexByte(s, '_')
	return i > 0 && len(s)-i == 7 && isHex(s[i+1:])
}

// exitCode returns nil for what is no exit code.
func exitCode(s string) *int64 {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return nil
	}
	return &n
}

// number returns 0 for what is no number from low to high.
func number(s string, low, high int64) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < low || n > high {
		return 0
	}
	return n
}

// name returns the name of a container, network, volume or plugin: whoever gives it
// one may put a token in it.
func (c *converter) name(s string) string {
	if good, ok := c.names[s]; ok {
		return good
	}
	good := c.redact.Name(text(s))
	if len(s) > 256 { // no name that the daemon would take
		return good
	}
	if len(c.names) >= maxReferences {
		clear(c.names)
	}
	s = strings.Clone(s)
	good = strings.Clone(good)
	c.names[s] = good
	return good
}

// labels cleans the labels and leaves out those that no longer fit.
func (c *converter) labels(in []record.Attr) []record.Attr {
	kept, left := in[:0], maxLabelText
	for _, l := range in {
		l = record.Attr{Key: text(l.Key), Value: text(c.redact.Redact(text(l.Value)))}
		if size := len(l.Key) + len(l.Value); size <= left {
			kept, left = append(kept, l), left-size
		}
	}
	return kept
}

// text returns s fit for one line on a terminal: control characters, the line and
// paragraph separators, direction overrides and broken UTF-8 become U+FFFD, and
// s is cut to maxText bytes.
func text(s string) string {
	s = cutTo(s, maxText)
	plain := true
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			plain = false
			break
		}
	}
	if plain {
		return s
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case r < ' ', r >= 0x7f && r < 0xa0, r == 0x2028, r == 0x2029, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
			return utf8.RuneError
		}
		return r
	}, s)
	for len(s) > maxText { // a replacement takes three bytes
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}
