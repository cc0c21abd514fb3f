package report

import (
	"errors"
	"fmt"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// line is what the report reads of one record. Its byte slices point into the
// line that was parsed (or, for strings with escapes, into the parser's buffer)
// and are good until the next parse: whatever is kept is copied.
//
// The report does not use recordjson, which builds the whole record and keeps
// unknown members for a round trip: the report answers from journals of millions
// of lines and needs a third of the fields. TestParseReadsEveryFieldItNames holds
// the names here against the record's own encoder.
type line struct {
	id, kind, by []byte
	ts           time.Time
	schema       int64
	host         []byte // its name
	outsideJob   bool
	claim        bool // the caller's environment disagreed with the sealed context
	ci           lineCI
	invocation   lineInvocation
	end          lineEnd
	event        lineEvent
	loss         lineLoss
	job          lineJob
}

type lineCI struct {
	repository, workflow, job, jobID, jobName, jobURL, runID, trackingID []byte
	runAttempt                                                           int64
}

// known says whether the record names a job. A repository is what every context
// has, whichever way it was found.
func (c *lineCI) known() bool { return len(c.repository) > 0 || len(c.runID) > 0 }

type lineInvocation struct {
	tool, command, execError []byte
	images                   [][]byte
	nested                   bool
}

type lineEnd struct {
	invocationID, tool, command, source []byte
	images                              [][]byte
	durationNS, signal                  int64
	exitCode                            int64
	exited                              bool // exitCode is known
}

type lineEvent struct {
	typ, action, actorID, image, container []byte
	received                               time.Time
	durationNS, signal                     int64
	exitCode                               int64
	exited                                 bool // exitCode is known
	oom, runnerMade, replayed              bool
}

type lineLoss struct {
	cause, source, detail []byte
	count                 int64
	from, to              time.Time
}

type lineJob struct {
	outcome []byte
}

// maxDepth bounds the nesting of members the report skips, so that a hostile line
// costs no stack. A record is three objects deep.
const maxDepth = 64

var (
	errTruncated = errors.New("the line ends inside a value")
	errSyntax    = errors.New("not valid JSON")
	errDepth     = errors.New("nested too deeply")
)

// parser reads lines one after the other; its buffers are used again for each.
type parser struct {
	data []byte
	i    int
	buf  []byte   // unescaped strings of the current line
	list [][]byte // arrays of strings of the current line
}

// parse fills l from one line of JSON. It fails on everything that is not exactly
// one JSON object, and on a known field of a wrong type; members it does not know
// are checked and skipped. As with recordjson, the last of two equal members wins
// and null is the zero value.
func (p *parser) parse(data []byte, l *line) error {
	p.data, p.i = data, 0
	p.buf, p.list = p.buf[:0], p.list[:0]
	*l = line{}
	p.space()
	if err := p.object(l, recordField); err != nil {
		return err
	}
	p.space()
	if p.i != len(p.data) {
		return fmt.Errorf("%w: more after the object", errSyntax)
	}
	return nil
}

// field reads the value of one member of an object into l.
type field func(p *parser, l *line, key []byte) error

func (p *parser) object(l *line, f field) error {
	if err := p.expect('{'); err != nil {
		return err
	}
	p.space()
	if p.peek() == '}' {
		p.i++
		return nil
	}
	for {
		p.space()
		key, err := p.str()
		if err != nil {
			return err
		}
		p.space()
		if err := p.expect(':'); err != nil {
			return err
		}
		p.space()
		if err := f(p, l, key); err != nil {
			return err
		}
		p.space()
		switch p.peek() {
		case ',':
			p.i++
		case '}':
			p.i++
			return nil
		default:
			return p.unexpected()
		}
	}
}

func recordField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "id":
		l.id, err = p.text()
	case "ts":
		l.ts, err = p.time()
	case "kind":
		l.kind, err = p.text()
	case "schema":
		l.schema, err = p.integer()
	case "by":
		l.by, err = p.text()
	case "outside_job":
		l.outsideJob, err = p.boolean()
	case "ci":
		if l.ci = (lineCI{}); p.null() {
			return nil
		}
		return p.object(l, ciField)
	case "host":
		if l.host = nil; p.null() {
			return nil
		}
		return p.object(l, hostField)
	case "claim":
		l.claim = p.peek() == '{'
		return p.skip(maxDepth)
	case "invocation":
		if l.invocation = (lineInvocation{}); p.null() {
			return nil
		}
		return p.object(l, invocationField)
	case "end":
		if l.end = (lineEnd{}); p.null() {
			return nil
		}
		return p.object(l, endField)
	case "event":
		if l.event = (lineEvent{}); p.null() {
			return nil
		}
		return p.object(l, eventField)
	case "loss":
		if l.loss = (lineLoss{}); p.null() {
			return nil
		}
		return p.object(l, lossField)
	case "job":
		if l.job = (lineJob{}); p.null() {
			return nil
		}
		return p.object(l, jobField)
	default:
		return p.skip(maxDepth)
	}
	return err
}

func ciField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "repository":
		l.ci.repository, err = p.text()
	case "workflow":
		l.ci.workflow, err = p.text()
	case "job":
		l.ci.job, err = p.text()
	case "job_id":
		l.ci.jobID, err = p.text()
	case "job_name":
		l.ci.jobName, err = p.text()
	case "job_url":
		l.ci.jobURL, err = p.text()
	case "run_id":
		l.ci.runID, err = p.text()
	case "run_attempt":
		l.ci.runAttempt, err = p.integer()
	case "tracking_id":
		l.ci.trackingID, err = p.text()
	default:
		return p.skip(maxDepth)
	}
	return err
}

func hostField(p *parser, l *line, key []byte) (err error) {
	if string(key) == "name" {
		l.host, err = p.text()
		return err
	}
	return p.skip(maxDepth)
}

func invocationField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "tool":
		l.invocation.tool, err = p.text()
	case "command":
		l.invocation.command, err = p.text()
	case "images":
		l.invocation.images, err = p.texts()
	case "nested":
		l.invocation.nested, err = p.boolean()
	case "exec_error":
		l.invocation.execError, err = p.text()
	default:
		return p.skip(maxDepth)
	}
	return err
}

func endField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "invocation_id":
		l.end.invocationID, err = p.text()
	case "tool":
		l.end.tool, err = p.text()
	case "command":
		l.end.command, err = p.text()
	case "images":
		l.end.images, err = p.texts()
	case "duration_ns":
		l.end.durationNS, err = p.integer()
	case "exit_code":
		l.end.exited = !p.atNull()
		l.end.exitCode, err = p.integer()
	case "signal":
		l.end.signal, err = p.integer()
	case "source":
		l.end.source, err = p.text()
	default:
		return p.skip(maxDepth)
	}
	return err
}

func eventField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "type":
		l.event.typ, err = p.text()
	case "action":
		l.event.action, err = p.text()
	case "actor_id":
		l.event.actorID, err = p.text()
	case "image":
		l.event.image, err = p.text()
	case "duration_ns":
		l.event.durationNS, err = p.integer()
	case "exit_code":
		l.event.exited = !p.atNull()
		l.event.exitCode, err = p.integer()
	case "signal":
		l.event.signal, err = p.integer()
	case "oom":
		l.event.oom, err = p.boolean()
	case "container":
		l.event.container, err = p.text()
	case "received":
		l.event.received, err = p.time()
	case "replayed":
		l.event.replayed, err = p.boolean()
	case "runner_made":
		l.event.runnerMade, err = p.boolean()
	default:
		return p.skip(maxDepth)
	}
	return err
}

func lossField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "cause":
		l.loss.cause, err = p.text()
	case "source":
		l.loss.source, err = p.text()
	case "detail":
		l.loss.detail, err = p.text()
	case "count":
		l.loss.count, err = p.integer()
	case "from":
		l.loss.from, err = p.time()
	case "to":
		l.loss.to, err = p.time()
	default:
		return p.skip(maxDepth)
	}
	return err
}

func jobField(p *parser, l *line, key []byte) (err error) {
	switch string(key) {
	case "outcome":
		l.job.outcome, err = p.text()
	default:
		return p.skip(maxDepth)
	}
	return err
}

// text reads a string, or null as the empty one.
func (p *parser) text() ([]byte, error) {
	if p.null() {
		return nil, nil
	}
	return p.str()
}

// texts reads an array of strings; null elements are empty strings.
func (p *parser) texts() ([][]byte, error) {
	if p.null() {
		return nil, nil
	}
	if err := p.expect('['); err != nil {
		return nil, err
	}
	p.space()
	if p.peek() == ']' {
		p.i++
		return nil, nil
	}
	start := len(p.list)
	for {
		p.space()
		s, err := p.text()
		if err != nil {
			return nil, err
		}
		p.list = append(p.list, s)
		p.space()
		switch p.peek() {
		case ',':
			p.i++
		case ']':
			p.i++
			return p.list[start:len(p.list):len(p.list)], nil
		default:
			return nil, p.unexpected()
		}
	}
}

func (p *parser) time() (time.Time, error) {
	s, err := p.text()
	if err != nil || s == nil {
		return time.Time{}, err
	}
	var t time.Time
	if err := t.UnmarshalText(s); err != nil {
		return time.Time{}, err
	}
	return t, nil
}

func (p *parser) boolean() (bool, error) {
	switch p.peek() {
	case 't':
		return true, p.word("true")
	case 'f':
		return false, p.word("false")
	case 'n':
		return false, p.word("null")
	}
	return false, p.unexpected()
}

// integer reads a number that fits an int64; a fraction or an exponent is an
// error, as it is for encoding/json.
func (p *parser) integer() (int64, error) {
	if p.null() {
		return 0, nil
	}
	start := p.i
	if err := p.number(); err != nil {
		return 0, err
	}
	digits := p.data[start:p.i]
	negative := digits[0] == '-'
	if negative {
		digits = digits[1:]
	}
	var n uint64
	for _, c := range digits {
		if c < '0' || c > '9' || n > (1<<63)/10 {
			return 0, fmt.Errorf("%w: %q is not a whole number of 64 bits", errSyntax, clip(p.data[start:p.i], 40))
		}
		n = n*10 + uint64(c-'0')
	}
	switch {
	case negative && n <= 1<<63:
		return -int64(n), nil
	case !negative && n < 1<<63:
		return int64(n), nil
	}
	return 0, fmt.Errorf("%w: %q is not a whole number of 64 bits", errSyntax, clip(p.data[start:p.i], 40))
}

// number steps over a number by the grammar of RFC 8259, section 6.
func (p *parser) number() error {
	if p.peek() == '-' {
		p.i++
	}
	switch c := p.peek(); {
	case c == '0':
		p.i++
	case c >= '1' && c <= '9':
		p.digits()
	default:
		return p.unexpected()
	}
	if p.peek() == '.' {
		p.i++
		if !p.digits() {
			return p.unexpected()
		}
	}
	if c := p.peek(); c == 'e' || c == 'E' {
		p.i++
		if c := p.peek(); c == '+' || c == '-' {
			p.i++
		}
		if !p.digits() {
			return p.unexpected()
		}
	}
	return nil
}

func (p *parser) digits() bool {
	start := p.i
	for p.i < len(p.data) && p.data[p.i] >= '0' && p.data[p.i] <= '9' {
		p.i++
	}
	return p.i > start
}

// str reads a string. One without escapes and in valid UTF-8 is a slice of the
// line; others are built in the parser's buffer, with U+FFFD for what is no
// Unicode, as encoding/json does.
func (p *parser) str() ([]byte, error) {
	if err := p.expect('"'); err != nil {
		return nil, err
	}
	start, ascii := p.i, true
	for p.i < len(p.data) {
		switch c := p.data[p.i]; {
		case c == '"':
			s := p.data[start:p.i]
			if !ascii && !utf8.Valid(s) {
				p.i = start
				return p.unescape()
			}
			p.i++
			return s, nil
		case c == '\\':
			p.i = start
			return p.unescape()
		case c < 0x20:
			return nil, fmt.Errorf("%w: control byte in a string", errSyntax)
		case c >= utf8.RuneSelf:
			ascii = false
		}
		p.i++
	}
	return nil, errTruncated
}

func (p *parser) unescape() ([]byte, error) {
	start := len(p.buf)
	for p.i < len(p.data) {
		c := p.data[p.i]
		switch {
		case c == '"':
			p.i++
			return p.buf[start:len(p.buf):len(p.buf)], nil
		case c == '\\':
			if err := p.escape(); err != nil {
				return nil, err
			}
		case c < 0x20:
			return nil, fmt.Errorf("%w: control byte in a string", errSyntax)
		case c < utf8.RuneSelf:
			p.buf = append(p.buf, c)
			p.i++
		default:
			r, n := utf8.DecodeRune(p.data[p.i:])
			p.buf = utf8.AppendRune(p.buf, r)
			p.i += n
		}
	}
	return nil, errTruncated
}

func (p *parser) escape() error {
	if p.i+1 >= len(p.data) {
		return errTruncated
	}
	c := p.data[p.i+1]
	p.i += 2
	switch c {
	case '"', '\\', '/':
		p.buf = append(p.buf, c)
	case 'b':
		p.buf = append(p.buf, '\b')
	case 'f':
		p.buf = append(p.buf, '\f')
	case 'n':
		p.buf = append(p.buf, '\n')
	case 'r':
		p.buf = append(p.buf, '\r')
	case 't':
		p.buf = append(p.buf, '\t')
	case 'u':
		r, ok := p.hex4()
		if !ok {
			return fmt.Errorf("%w: a bad \\u escape", errSyntax)
		}
		if utf16.IsSurrogate(r) {
			// A pair makes one rune; half a pair is U+FFFD, and what follows it is read for itself.
			whole := rune(utf8.RuneError)
			if p.i+1 < len(p.data) && p.data[p.i] == '\\' && p.data[p.i+1] == 'u' {
				at := p.i
				p.i += 2
				low, ok := p.hex4()
				if !ok {
					return fmt.Errorf("%w: a bad \\u escape", errSyntax)
				}
				if whole = utf16.DecodeRune(r, low); whole == utf8.RuneError {
					p.i = at
				}
			}
			r = whole
		}
		p.buf = utf8.AppendRune(p.buf, r)
	default:
		return fmt.Errorf("%w: a bad escape", errSyntax)
	}
	return nil
}

func (p *parser) hex4() (rune, bool) {
	if p.i+4 > len(p.data) {
		return 0, false
	}
	var r rune
	for _, c := range p.data[p.i : p.i+4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	p.i += 4
	return r, true
}

// skip steps over one value of any type and checks its grammar.
func (p *parser) skip(depth int) error {
	if depth == 0 {
		return errDepth
	}
	switch c := p.peek(); {
	case c == '"':
		_, err := p.str()
		return err
	case c == '{' || c == '[':
		return p.skipContainer(depth)
	case c == 't':
		return p.word("true")
	case c == 'f':
		return p.word("false")
	case c == 'n':
		return p.word("null")
	case c == '-' || c >= '0' && c <= '9':
		return p.number()
	}
	return p.unexpected()
}

func (p *parser) skipContainer(depth int) error {
	object := p.data[p.i] == '{'
	end := byte(']')
	if object {
		end = '}'
	}
	p.i++
	p.space()
	if p.peek() == end {
		p.i++
		return nil
	}
	for {
		p.space()
		if object {
			if _, err := p.str(); err != nil {
				return err
			}
			p.space()
			if err := p.expect(':'); err != nil {
				return err
			}
			p.space()
		}
		if err := p.skip(depth - 1); err != nil {
			return err
		}
		p.space()
		switch p.peek() {
		case ',':
			p.i++
		case end:
			p.i++
			return nil
		default:
			return p.unexpected()
		}
	}
}

func (p *parser) word(w string) error {
	if len(p.data)-p.i < len(w) || string(p.data[p.i:p.i+len(w)]) != w {
		return p.unexpected()
	}
	p.i += len(w)
	return nil
}

func (p *parser) atNull() bool { return p.peek() == 'n' }

// null steps over a null, if there is one.
func (p *parser) null() bool { return p.atNull() && p.word("null") == nil }

func (p *parser) space() {
	for p.i < len(p.data) {
		switch p.data[p.i] {
		case ' ', '\t', '\n', '\r':
			p.i++
		default:
			return
		}
	}
}

// peek returns the next byte, or 0 at the end (0 begins no JSON token).
func (p *parser) peek() byte {
	if p.i < len(p.data) {
		return p.data[p.i]
	}
	return 0
}

func (p *parser) expect(c byte) error {
	if p.peek() != c {
		return p.unexpected()
	}
	p.i++
	return nil
}

func (p *parser) unexpected() error {
	if p.i >= len(p.data) {
		return errTruncated
	}
	return fmt.Errorf("%w: unexpected %q at byte %d", errSyntax, p.data[p.i], p.i)
}

func clip(b []byte, n int) []byte {
	if len(b) > n {
		return b[:n]
	}
	return b
}
