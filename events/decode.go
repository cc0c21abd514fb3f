package events

import (
	"encoding/json"
	"errors"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Names and labels are what a job typed. The bounds keep the record of one event,
// with the job's context and every quote escaped, below the 64 KiB that the journal
// takes of a record: one that it refused would be offered again for ever, and all
// events after it would wait.
const (
	maxName      = 1 << 10 // bytes of a name, an id or a reference; docker allows 255
	maxText      = 4 << 10 // bytes of a label's value
	maxLabels    = 64      // allow-listed labels kept of one event,
	maxLabelText = 8 << 10 // and the bytes of all their names and values
)

// message is one event as it waits in the queue: what the record needs of the
// line and nothing else. Above all nothing of an exec's command line.
type message struct {
	typ    string // as the daemon wrote it, known types as constants
	action string // cut at the first colon, known actions as constants
	detail string // the health state
	scope  string
	actor  string
	nano   int64 // the daemon's time

	image     string
	name      string
	execID    string
	container string
	driver    string // attribute driver (volumes) or type (networks)

	exitCode     string
	signal       string
	reclaimed    string
	execDuration string

	labels      []record.Attr
	runnerLabel bool // has the empty label that the runner puts on its containers

	waited   time.Duration // how long the streamer had waited for the daemon
	key      uint64        // identity in a replay, see message.hash
	received int64         // our time, nanoseconds since 1970
	daemon   *identity     // who sent it
	replayed bool
}

// errNotEvent is returned for a line that is not one JSON object that could be an
// event.
var errNotEvent = errors.New("not a JSON object with an event's type, action or time")

// decoder turns lines of the event stream into messages. The zero value keeps no
// labels. It is not safe for concurrent use.
type decoder struct {
	labels map[string]bool // the label allow-list
}

// decode decodes one line. Lines of the shape that every dockerd since 1.10 writes
// take the scanner below, which costs a tenth of encoding/json; any other goes to
// encoding/json, so the scanner needs to be right only about what it accepts.
// FuzzDecode holds the two against each other.
func (d *decoder) decode(line []byte) (message, error) {
	if m, ok := d.scan(string(line)); ok {
		return m, nil
	}
	return d.decodeAny(line)
}

// scan decodes s if it is one flat event of known members. ok is false for all
// else, which need not be wrong: member names in another case, twice the same
// member, unknown members, numbers with fractions.
func (d *decoder) scan(s string) (m message, ok bool) {
	c := scanner{s: s}
	if !c.take('{') {
		return m, false
	}
	// A bit for each member, to leave doubles to encoding/json: they merge there.
	const (
		bitType = 1 << iota
		bitAction
		bitActor
		bitScope
		bitTime
		bitNano
	)
	var have uint
	var seconds int64
	for first := true; !c.take('}'); first = false {
		if !first && !c.take(',') {
			return m, false
		}
		key, ok := c.str()
		if !ok || !c.take(':') {
			return m, false
		}
		var bit uint
		switch key {
		case "Type":
			bit = bitType
			m.typ, ok = c.str()
		case "Action":
			bit = bitAction
			m.action, m.detail, ok = c.action()
		case "Actor":
			bit = bitActor
			ok = d.scanActor(&c, &m)
		case "scope":
			bit = bitScope
			m.scope, ok = c.str()
		case "time":
			bit = bitTime
			seconds, ok = c.integer()
		case "timeNano":
			bit = bitNano
			m.nano, ok = c.integer()
		case "status", "id", "from":
			// Repeats of Action, Actor.ID and the image, until API 1.52.
			_, ok = c.str()
		default:
			return m, false
		}
		if !ok || have&bit != 0 {
			return m, false
		}
		have |= bit
	}
	if !c.end() {
		return m, false
	}
	return m, m.finish(seconds, len(s))
}

func (d *decoder) scanActor(c *scanner, m *message) bool {
	if !c.take('{') {
		return false
	}
	var haveID, haveAttributes bool
	for first := true; !c.take('}'); first = false {
		if !first && !c.take(',') {
			return false
		}
		key, ok := c.str()
		if !ok || !c.take(':') {
			return false
		}
		switch key {
		case "ID":
			if m.actor, ok = c.str(); !ok || haveID {
				return false
			}
			haveID = true
		case "Attributes":
			if haveAttributes || !d.scanAttributes(c, m) {
				return false
			}
			haveAttributes = true
		default:
			return false
		}
	}
	return true
}

func (d *decoder) scanAttributes(c *scanner, m *message) bool {
	if c.null() {
		return true
	}
	if !c.take('{') {
		return false
	}
	last := ""
	for first := true; !c.take('}'); first = false {
		if !first && !c.take(',') {
			return false
		}
		key, ok := c.str()
		if !ok || !c.take(':') {
			return false
		}
		// The daemon encodes a map, so keys come sorted; where they do not, one
		// may come twice.
		if !first && key <= last {
			return false
		}
		last = key
		value, ok := c.str()
		if !ok {
			return false
		}
		d.attribute(m, key, value)
	}
	return true
}

// attribute takes one attribute of the actor. Labels, the daemon's own attributes
// and the image's labels arrive in one flat map, and a label overwrites an
// attribute of the same name (moby, daemon/events.go): exitCode, signal and
// execDuration are therefore only as true as the job wants them to be. image and
// name are written last by the daemon and cannot be overwritten.
func (d *decoder) attribute(m *message, key, value string) {
	switch key {
	case "image":
		m.image = value
	case "name":
		m.name = value
	case "execID":
		m.execID = value
	case "exitCode":
		m.exitCode = value
	case "signal":
		m.signal = value
	case "container":
		m.container = value
	case "driver":
		m.driver = value
	case "type":
		if m.driver == "" {
			m.driver = value
		}
	case "reclaimed":
		m.reclaimed = value
	case "execDuration":
		m.execDuration = value
	default:
		// The runner labels what it creates with the first six hexadecimal digits
		// of a hash and no value (actions/runner, DockerCommandManager.cs).
		if len(key) == 6 && value == "" && isHex(key) {
			m.runnerLabel = true
		}
	}
	if d.labels[key] && len(m.labels) < maxLabels {
		m.labels = append(m.labels, record.Attr{Key: key, Value: cutTo(value, maxText)})
	}
}

// finish completes a message; false means that it is no event at all.
func (m *message) finish(seconds int64, size int) bool {
	if m.nano == 0 && seconds > 0 && seconds < 1<<33 {
		m.nano = seconds * 1e9
	}
	if m.typ == "" && m.action == "" && m.nano == 0 {
		return false
	}
	for _, s := range []*string{&m.typ, &m.scope, &m.actor, &m.image, &m.name, &m.execID, &m.container, &m.driver} {
		*s = cutTo(*s, maxName)
	}
	// Numbers: what is longer is none.
	for _, s := range []*string{&m.exitCode, &m.signal, &m.reclaimed, &m.execDuration} {
		if len(*s) > 20 {
			*s = ""
		}
	}
	if t, ok := knownType(m.typ); ok {
		m.typ = t
	}
	if size > maxText {
		m.release()
	}
	return true
}

// release copies the message's strings out of a long line, which would otherwise
// stay in memory as long as the shortest of them.
func (m *message) release() {
	for _, s := range []*string{&m.typ, &m.action, &m.scope, &m.actor, &m.image, &m.name, &m.execID, &m.container, &m.driver,
		&m.exitCode, &m.signal, &m.reclaimed, &m.execDuration} {
		*s = strings.Clone(*s)
	}
	for i := range m.labels {
		m.labels[i].Key = strings.Clone(m.labels[i].Key)
		m.labels[i].Value = strings.Clone(m.labels[i].Value)
	}
}

// decodeAny decodes a line of any shape, as forgiving as can be: what has a wrong
// type is left out, what is not known is passed over.
func (d *decoder) decodeAny(line []byte) (message, error) {
	var in struct {
		Type, Action     any
		Actor            json.RawMessage
		Scope            any
		Time, TimeNano   json.RawMessage
		Status, ID, From any // known, so that they do not fall on Actor.ID by case
	}
	if err := json.Unmarshal(line, &in); err != nil {
		return message{}, errors.Join(errNotEvent, err)
	}
	var actor struct {
		ID         any
		Attributes json.RawMessage
	}
	if len(in.Actor) > 0 {
		_ = json.Unmarshal(in.Actor, &actor) // an actor that is no object is no actor
	}
	var attributes map[string]any
	if len(actor.Attributes) > 0 {
		_ = json.Unmarshal(actor.Attributes, &attributes)
	}
	text := func(v any) string { s, _ := v.(string); return s }
	integer := func(raw json.RawMessage) int64 {
		n, _ := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
		return n
	}
	m := message{
		typ:   text(in.Type),
		scope: text(in.Scope),
		actor: text(actor.ID),
		nano:  integer(in.TimeNano),
	}
	m.action, m.detail = cutAction(text(in.Action))
	keys := make([]string, 0, len(attributes))
	for k := range attributes {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		if v, ok := attributes[k].(string); ok {
			d.attribute(&m, k, v)
		}
	}
	if !m.finish(integer(in.Time), len(line)) {
		return message{}, errNotEvent
	}
	return m, nil
}

// cutAction splits an action at its first colon. What follows is a command line
// for exec_create and exec_start, with the secrets that were typed there, and
// free text of the health check for health_status; only its fixed words are kept.
func cutAction(s string) (action, detail string) {
	action, rest, found := strings.Cut(s, ":")
	if a, ok := knownAction(action); ok {
		action = a
	} else {
		action = strings.Clone(cutTo(action, maxName))
	}
	if found && action == "health_status" {
		switch rest = strings.TrimSpace(rest); rest {
		case "healthy":
			detail = "healthy"
		case "unhealthy":
			detail = "unhealthy"
		case "starting":
			detail = "starting"
		case "running":
			detail = "running"
		}
	}
	return action, detail
}

// cutTo cuts s to max bytes. A rune that this splits becomes U+FFFD later.
func cutTo(s string, max int) string {
	if len(s) > max {
		return s[:max]
	}
	return s
}

func isHex(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// hash is the message's identity in a replay: the daemon's time, type, action,
// actor and exec id (FNV-1a, 64 bits). It is the same in every process, because
// the cursor file keeps it.
func (m *message) hash() uint64 {
	const prime = 1099511628211
	h := uint64(14695981039346656037)
	h = (h ^ uint64(m.nano)) * prime
	h = (h ^ h>>32 ^ uint64(m.nano)>>32) * prime
	for _, s := range [...]string{m.typ, m.action, m.actor, m.execID} {
		for i := 0; i < len(s); i++ {
			h = (h ^ uint64(s[i])) * prime
		}
		h = (h ^ 0xff) * prime
	}
	if h == 0 {
		return 1 // 0 means "no key"
	}
	return h
}

// scanner walks over one line of JSON.
type scanner struct {
	s string
	i int
}

func (c *scanner) space() {
	for c.i < len(c.s) && (c.s[c.i] == ' ' || c.s[c.i] == '\t' || c.s[c.i] == '\r' || c.s[c.i] == '\n') {
		c.i++
	}
}

// take steps over b if it comes next.
func (c *scanner) take(b byte) bool {
	if c.i >= len(c.s) || c.s[c.i] != b {
		c.space()
		if c.i >= len(c.s) || c.s[c.i] != b {
			return false
		}
	}
	c.i++
	return true
}

func (c *scanner) end() bool {
	c.space()
	return c.i == len(c.s)
}

func (c *scanner) null() bool {
	c.space()
	if strings.HasPrefix(c.s[c.i:], "null") {
		c.i += 4
		return true
	}
	return false
}

// token finds the end of the string that starts here. It returns the text between
// the quotes, still escaped.
func (c *scanner) token() (raw string, escaped, ok bool) {
	if !c.take('"') {
		return "", false, false
	}
	start := c.i
	for i := start; i < len(c.s); i++ {
		switch b := c.s[i]; {
		case b == '"':
			c.i = i + 1
			return c.s[start:i], escaped, true
		case b == '\\':
			escaped = true
			i++
		case b < ' ':
			return "", false, false // not JSON; encoding/json will say so
		}
	}
	return "", false, false
}

func (c *scanner) str() (string, bool) {
	raw, escaped, ok := c.token()
	if !ok || !escaped {
		return raw, ok
	}
	return unescape(raw)
}

// action reads the Action member. A command line is escaped often (the daemon
// writes < > & as \u003c...), the part before its colon never.
func (c *scanner) action() (action, detail string, ok bool) {
	raw, escaped, ok := c.token()
	if !ok {
		return "", "", false
	}
	if escaped {
		if raw, ok = unescape(raw); !ok {
			return "", "", false
		}
	}
	action, detail = cutAction(raw)
	return action, detail, true
}

func unescape(raw string) (string, bool) {
	var s string
	err := json.Unmarshal([]byte(`"`+raw+`"`), &s)
	return s, err == nil
}

// integer reads a whole number; a fraction, an exponent or an overflow is not ok.
func (c *scanner) integer() (int64, bool) {
	c.space()
	start := c.i
	for c.i < len(c.s) && (c.s[c.i] >= '0' && c.s[c.i] <= '9' || c.s[c.i] == '-') {
		c.i++
	}
	text := c.s[start:c.i]
	if len(text) > 1 && text[0] == '0' {
		return 0, false
	}
	n, err := strconv.ParseInt(text, 10, 64)
	return n, err == nil
}
