package journal

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// MaxLine is the longest line, without its newline, that is a record. The shim
// keeps its records under 16 KiB; what is longer than this comes from a hostile or
// broken writer, and readers skip it.
const MaxLine = 64 << 10

// maxDepth is how deep the objects and arrays of a record may nest. The schema
// needs four levels. The bound keeps the search for a record in a hostile line
// linear: only this many starts of records can be open at once.
const maxDepth = 32

var (
	marker       = []byte(record.Marker)
	headerMarker = []byte(`{"kind":"segment"`)
)

// Line is one record as it stands in the journal.
type Line struct {
	// Data is the record's JSON without the newline. It is valid until the next
	// call of the reader's Next.
	Data []byte
	// Pos is where the line begins, Next where reading goes on after it.
	Pos, Next Position

	tsAt, tsEnd, kindAt, kindEnd int
}

// Scan reads data, which must be one whole record without its newline, as a Line
// without positions. It says false where data is not: the check is of the whole
// syntax, so that half a record is never taken for one.
func Scan(data []byte) (Line, bool) {
	var l Line
	n := l.scan(data)
	return l, n > 0 && n == len(data)
}

// ID is the record's id. It is a part of Data.
func (l Line) ID() []byte { return l.Data[len(marker) : l.tsAt-len(`","ts":"`)] }

// Kind is the record's kind. It does not allocate for the kinds that this build knows.
func (l Line) Kind() record.Kind {
	switch k := l.Data[l.kindAt:l.kindEnd]; record.Kind(k) {
	case record.KindInvocation:
		return record.KindInvocation
	case record.KindInvocationEnd:
		return record.KindInvocationEnd
	case record.KindEvent:
		return record.KindEvent
	case record.KindLoss:
		return record.KindLoss
	case record.KindJobStart:
		return record.KindJobStart
	case record.KindJobEnd:
		return record.KindJobEnd
	case record.KindHTTP:
		return record.KindHTTP
	default:
		return record.Kind(k)
	}
}

// TS is the record's own time, and the zero time where the record has none that
// can be read.
func (l Line) TS() time.Time {
	var t time.Time
	if t.UnmarshalText(l.Data[l.tsAt:l.tsEnd]) != nil {
		return time.Time{}
	}
	return t
}

// scan reads the record at the start of b and returns its length, or 0 where b
// does not start with a whole record of at most MaxLine bytes.
//
// A record starts with id, ts and kind in this order (record.Append promises
// that), and is one JSON object. The whole grammar is checked, not only the
// balance of its braces: where a torn record ends inside a string, the quotes of
// the record that follows on the line change their sides, and a brace inside one
// of its values could close the torn one.
func (l *Line) scan(b []byte) int {
	if len(b) > MaxLine {
		b = b[:MaxLine]
	}
	if !bytes.HasPrefix(b, marker) {
		return 0
	}
	i := word(b, len(marker), 64)
	if i < 0 || !bytes.HasPrefix(b[i:], []byte(`","ts":"`)) {
		return 0
	}
	l.tsAt = i + len(`","ts":"`)
	if l.tsEnd = word(b, l.tsAt, 64); l.tsEnd < 0 || !bytes.HasPrefix(b[l.tsEnd:], []byte(`","kind":"`)) {
		return 0
	}
	l.kindAt = l.tsEnd + len(`","kind":"`)
	if l.kindEnd = word(b, l.kindAt, 64); l.kindEnd < 0 {
		return 0
	}
	n := members(b, l.kindEnd+1, 1)
	if n < 0 {
		return 0
	}
	l.Data = b[:n:n]
	return n
}

// word returns the end of the run of 1 to max harmless characters at i, which must
// be followed by a quote; -1 where there is none.
func word(b []byte, i, max int) int {
	for n := i; n < len(b) && n <= i+max; n++ {
		switch c := b[n]; {
		case c == '"':
			if n == i {
				return -1
			}
			return n
		case c <= ' ' || c >= 0x7f || c == '\\':
			return -1
		}
	}
	return -1
}

// members walks over the rest of an object, from after one of its members, and
// returns the index after its closing brace; -1 where the syntax is wrong or b
// ends before.
func members(b []byte, i, depth int) int {
	for {
		i = space(b, i)
		if i == len(b) {
			return -1
		}
		switch b[i] {
		case '}':
			return i + 1
		case ',':
			if i = member(b, space(b, i+1), depth); i < 0 {
				return -1
			}
		default:
			return -1
		}
	}
}

func member(b []byte, i, depth int) int {
	if i == len(b) || b[i] != '"' {
		return -1
	}
	if i = text(b, i+1); i < 0 {
		return -1
	}
	if i = space(b, i); i == len(b) || b[i] != ':' {
		return -1
	}
	return value(b, space(b, i+1), depth)
}

// value walks over one JSON value (RFC 8259) at i.
func value(b []byte, i, depth int) int {
	if i == len(b) {
		return -1
	}
	switch c := b[i]; c {
	case '"':
		return text(b, i+1)
	case '{':
		if depth == maxDepth {
			return -1
		}
		if i = space(b, i+1); i < len(b) && b[i] == '}' {
			return i + 1
		}
		if i = member(b, i, depth+1); i < 0 {
			return -1
		}
		return members(b, i, depth+1)
	case '[':
		if depth == maxDepth {
			return -1
		}
		return array(b, space(b, i+1), depth+1)
	case 't':
		return literal(b, i, "true")
	case 'f':
		return literal(b, i, "false")
	case 'n':
		return literal(b, i, "null")
	default:
		return number(b, i)
	}
}

func array(b []byte, i, depth int) int {
	if i < len(b) && b[i] == ']' {
		return i + 1
	}
	for {
		if i = value(b, i, depth); i < 0 {
			return -1
		}
		if i = space(b, i); i == len(b) {
			return -1
		}
		switch b[i] {
		case ']':
			return i + 1
		case ',':
			i = space(b, i+1)
		default:
			return -1
		}
	}
}

// text walks over the rest of a string, from after its opening quote.
func text(b []byte, i int) int {
	for i < len(b) {
		// Eight bytes at once while none of them is a quote, a backslash or a control
		// character (the zero-byte trick of Bit Twiddling Hacks: the lowest byte that it
		// marks is always a true one).
		for len(b)-i >= 8 {
			const ones, tops = 0x0101010101010101, 0x8080808080808080
			x := binary.LittleEndian.Uint64(b[i:])
			quote, slash := x^ones*'"', x^ones*'\\'
			marked := ((quote-ones)&^quote | (slash-ones)&^slash | (x-ones*' ')&^x) & tops
			if marked != 0 {
				i += bits.TrailingZeros64(marked) / 8
				break
			}
			i += 8
		}
		if i == len(b) {
			return -1
		}
		switch c := b[i]; {
		case c == '"':
			return i + 1
		case c < ' ':
			return -1
		case c != '\\':
			i++
			continue
		}
		if i++; i == len(b) {
			return -1
		}
		switch b[i] {
		case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			i++
		case 'u':
			for n := 0; n < 4; n++ {
				if i++; i == len(b) || !hex(b[i]) {
					return -1
				}
			}
			i++
		default:
			return -1
		}
	}
	return -1
}

func hex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func number(b []byte, i int) int {
	if i < len(b) && b[i] == '-' {
		i++
	}
	switch {
	case i == len(b):
		return -1
	case b[i] == '0':
		i++
	default:
		if i = digits(b, i); i < 0 {
			return -1
		}
	}
	if i < len(b) && b[i] == '.' {
		if i = digits(b, i+1); i < 0 {
			return -1
		}
	}
	if i < len(b) && (b[i] == 'e' || b[i] == 'E') {
		if i++; i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		return digits(b, i)
	}
	return i
}

func digits(b []byte, i int) int {
	start := i
	for i < len(b) && b[i] >= '0' && b[i] <= '9' {
		i++
	}
	if i == start {
		return -1
	}
	return i
}

func literal(b []byte, i int, word string) int {
	if len(b)-i < len(word) || string(b[i:i+len(word)]) != word {
		return -1
	}
	return i + len(word)
}

func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\r' || b[i] == '\n') {
		i++
	}
	return i
}
