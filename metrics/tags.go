package metrics

import (
	_ "embed"
	"fmt"
	"hash/fnv"
	"math"
	"strings"

	"github.com/distribution/reference"

	"github.com/tallyman-ci/tallyman/record"
)

// The names of the tags there are, by what they describe.
var (
	eventTags      = []string{"event_type", "action", "image", "exit"}
	containerTags  = []string{"image", "exit"}
	invocationTags = []string{"tool", "command"}
	endTags        = []string{"tool", "command", "exit"}
	lossTags       = []string{"cause", "source"}
	jobTags        = []string{"repo", "owner", "workflow", "job", "run_id", "event_name", "runner", "by"}
)

const (
	// none is the value of a tag where the record says nothing.
	none = "none"
	// other is the value of what is outside a closed set.
	other = "other"
	// overflow is the value of what is beyond the cardinality cap.
	overflow = "__other__"
	// maxTag is the length of a tag, name and value, that Datadog keeps.
	maxTag = 200
	// forgetAfter is how long a value keeps its place without being seen. Datadog
	// counts custom metrics by the hour.
	forgetAfter = 3600 // seconds
)

// The closed sets. eventTypes and eventActions are those of package events; a test
// holds them against it.
var (
	eventTypes   = words("container image network volume builder daemon plugin other")
	eventActions = words(`
		create start restart stop checkpoint pause unpause attach detach resize update rename kill die oom destroy
		remove commit top copy archive-path extract-to-dir export import save load tag untag push pull prune delete
		enable disable connect disconnect reload mount unmount
		exec_create exec_start exec_die exec_detach health_status other`)
	// tools are what a tag calls by its name besides Options.Tools. A job can call the
	// shim by any name, through a link of its own.
	tools = words(`
		docker docker-buildx docker-compose podman podman-compose nerdctl buildah buildctl skopeo crane regctl oras ctr
		crictl helm kubectl git other`)
	// commands are docker's command paths and the words in them (docker-compose up is
	// recorded as up): anything else on a command line may be a secret typed in the
	// wrong place.
	commands = commandPaths()
)

//go:embed commands.txt
var commandList string

func commandPaths() map[string]bool {
	m := map[string]bool{"": true, other: true}
	for path := range strings.Lines(commandList) {
		if path = strings.TrimSpace(path); strings.HasPrefix(path, "#") {
			continue
		}
		m[path] = true
		for word := range strings.FieldsSeq(path) {
			m[word] = true
		}
	}
	return m
}

func words(s string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(s) {
		m[w] = true
	}
	return m
}

// tagger makes tags of records, and keeps the number of values of each bounded.
type tagger struct {
	max   int
	tools map[string]bool // beside the set that is known to all
	now   int64           // seconds since 1970, set by the caller
	keys  map[string]*values
}

// values are the values of one tag.
type values struct {
	// raw finds the value of a text that was seen before without cleaning it again.
	raw map[string]*value
	// clean are the values that have a place, by their text in the tag.
	clean    map[string]*value
	overflow string
}

type value struct {
	tag  string // name:value, as it is sent
	seen int64
}

func newTagger(max int, tools []string) tagger {
	t := tagger{max: max, tools: make(map[string]bool, len(tools)), keys: make(map[string]*values)}
	for _, tool := range tools {
		t.tools[tool] = true
	}
	return t
}

// tag returns the tag of r by its name, ready to send.
func (t *tagger) tag(r *record.Record, name string) string {
	text := raw(r, name)
	v := t.keys[name]
	if v == nil {
		v = &values{raw: make(map[string]*value), clean: make(map[string]*value), overflow: name + ":" + overflow}
		t.keys[name] = v
	}
	if known := v.raw[text]; known != nil {
		known.seen = t.now
		return known.tag
	}
	refined, closed := t.refine(name, text)
	cleaned := clean(refined, maxTag-len(name)-1)
	known := v.clean[cleaned]
	if known == nil {
		places := t.max
		if closed {
			places = math.MaxInt // or a job that makes use of all of them would make the others nameless
		} else if r.By == record.ByEnvironment {
			// Names that nobody has sealed are any that a job likes to give: they must not
			// take the places of the names that are known.
			places = (t.max + 1) / 2
		}
		if len(v.clean) >= places && (!v.forget(t.now) || len(v.clean) >= places) {
			return v.overflow
		}
		known = &value{tag: name + ":" + cleaned}
		v.clean[cleaned] = known
	}
	known.seen = t.now
	if len(v.raw) >= 4*t.max {
		clear(v.raw)
	}
	if len(text) <= 1024 {
		v.raw[strings.Clone(text)] = known
	}
	return known.tag
}

// forget gives up the places of values that were not seen for an hour, and reports
// whether there were any.
func (v *values) forget(now int64) bool {
	found := false
	for text, known := range v.clean {
		if now-known.seen > forgetAfter {
			delete(v.clean, text)
			found = true
		}
	}
	if found {
		clear(v.raw) // it points at those that went
	}
	return found
}

// raw returns the text that a tag of this name is made from.
func raw(r *record.Record, name string) string {
	ci := r.CI
	if ci == nil {
		ci = &record.CI{}
	}
	switch name {
	case "event_type":
		return r.Event.Type
	case "action":
		return r.Event.Action
	case "image":
		return r.Event.Image
	case "exit":
		if r.Event != nil {
			if r.Event.Action != "die" && r.Event.Action != "exec_die" {
				return none
			}
			return exitClass(r.Event.ExitCode, 0, r.Event.OOM)
		}
		return exitClass(r.End.ExitCode, r.End.Signal, false)
	case "tool":
		if r.End != nil {
			return r.End.Tool
		}
		return r.Invocation.Tool
	case "command":
		if r.End != nil {
			return r.End.Command
		}
		return r.Invocation.Command
	case "cause":
		return r.Loss.Cause
	case "source":
		return r.Loss.Source
	case "repo":
		return ci.Repository
	case "owner":
		return ci.Owner
	case "workflow":
		return ci.Workflow
	case "job":
		return ci.Job
	case "run_id":
		return ci.RunID
	case "event_name":
		return ci.EventName
	case "runner":
		if ci.Runner != nil {
			return ci.Runner.Name
		}
		return ""
	case "by":
		return string(r.By)
	}
	panic("metrics: no tag " + name) // New checks the names
}

// refine maps the text of a tag with a closed set, or with more in it than a tag
// may have, to what may be said, and reports whether that is of a closed set.
func (t *tagger) refine(name, text string) (value string, closed bool) {
	switch name {
	case "event_type":
		return in(eventTypes, text), true
	case "action":
		return in(eventActions, text), true
	case "exit":
		return text, true // exitClass made it
	case "tool":
		if text == "" || t.tools[text] {
			return text, true
		}
		return in(tools, text), true
	case "command":
		return in(commands, text), true
	case "image":
		return repository(text), false
	}
	return text, false
}

func in(set map[string]bool, s string) string {
	if set[s] {
		return s
	}
	return other
}

// repository returns an image reference without tag and digest, as docker shows it:
// alpine for docker.io/library/alpine:3.
func repository(image string) string {
	if image == "" {
		return none
	}
	if strings.HasPrefix(image, "sha256:") {
		return "image_id" // named by its id alone
	}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return other
	}
	return reference.FamiliarName(named)
}

// exitClass sorts ends into few classes: docker run gives 125 for an error of the
// daemon or the CLI, 126 and 127 where the command could not be started.
func exitClass(code *int64, signal int64, oom bool) string {
	switch {
	case oom:
		return "oom"
	case signal > 0:
		return "signal"
	case code == nil:
		return "unknown"
	case *code == 0:
		return "ok"
	case *code >= 125 && *code <= 127:
		return "not_started"
	case *code > 128:
		return "signal"
	}
	return "error"
}

// clean returns s as a tag's value: lower case, of letters, digits and _-:./ only,
// each run of others one underscore, none at the ends, at most max bytes. Datadog's
// agent would do the same to what it receives, except that it first takes the line
// apart at , | # and newlines. A text of which nothing is left gets a hash, so that
// two workflows with Chinese names stay two.
func clean(s string, max int) string {
	if s == "" {
		return none
	}
	b := make([]byte, 0, min(len(s), max))
	for i := 0; i < len(s) && len(b) < max; i++ {
		c := s[i]
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == ':', c == '.', c == '/':
		default:
			c = '_'
		}
		if c == '_' && (len(b) == 0 || b[len(b)-1] == '_') {
			continue
		}
		b = append(b, c)
	}
	out := strings.TrimRight(string(b), "_")
	if strings.Trim(out, "-:./") == "" {
		h := fnv.New32a()
		h.Write([]byte(s))
		return fmt.Sprintf("unnamed_%08x", h.Sum32())
	}
	return out
}
