package record

import (
	"strconv"
	"time"
	"unicode/utf8"
)

// Append encodes r as exactly one line of JSON, a newline at its end, appends it
// to dst and returns the result. It uses no reflection. What encoding/json reads
// from the line into a Record is r again, with two exceptions that hold for
// encoding/json too: invalid UTF-8 becomes U+FFFD, and times lose their zone.
//
// The line starts with `{"id":"`, then `ts`, then `kind`: readers resynchronise a
// torn journal at that start, and find id and kind without decoding the rest.
// Because quotes inside strings are escaped, the start cannot occur in a value.
func Append(dst []byte, r *Record) []byte {
	return append(appendRecord(dst, r), '\n')
}

// Marker is how each line that Append writes begins.
const Marker = `{"id":"`

// appendKey appends a quoted key with its colon, after a comma where the object
// already has a member. No value ends in an open brace, so the last byte tells.
func appendKey(dst []byte, quoted string) []byte {
	if dst[len(dst)-1] != '{' {
		dst = append(dst, ',')
	}
	return append(dst, quoted...)
}

// appendUnknown appends the members kept from an unknown schema. They start with
// a comma, which goes where they are the object's first.
func appendUnknown(dst, members []byte) []byte {
	if len(members) > 0 && dst[len(dst)-1] == '{' {
		members = members[1:]
	}
	return append(dst, members...)
}

func appendInt(dst []byte, v int64) []byte { return strconv.AppendInt(dst, v, 10) }

func appendBool(dst []byte, v bool) []byte { return strconv.AppendBool(dst, v) }

func appendStrings(dst []byte, v []string) []byte {
	dst = append(dst, '[')
	for i, s := range v {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendString(dst, s)
	}
	return append(dst, ']')
}

// appendTime appends t in UTC with all nine digits of its nanoseconds, so that
// times sort as text. RFC 3339 has no years beyond 9999; such a time, which only a
// broken clock gives, becomes the zero time.
func appendTime(dst []byte, t time.Time) []byte {
	t = t.UTC()
	if y := t.Year(); y < 0 || y > 9999 {
		t = time.Time{}
	}
	return t.AppendFormat(dst, `"2006-01-02T15:04:05.000000000Z"`)
}

const hexDigits = "0123456789abcdef"

// AppendString appends s as a JSON string, escaped as Append does, for encoders of
// other forms of the record.
func AppendString(dst []byte, s string) []byte { return appendString(dst, s) }

// appendString appends s as a JSON string (RFC 8259). Beyond what JSON asks for it
// escapes U+2028 and U+2029, which some line readers take for line ends, and DEL.
func appendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < 0x7f && c != '"' && c != '\\' {
			i++
			continue
		}
		if c < utf8.RuneSelf {
			dst = append(dst, s[start:i]...)
			switch c {
			case '"', '\\':
				dst = append(dst, '\\', c)
			case '\n':
				dst = append(dst, '\\', 'n')
			case '\r':
				dst = append(dst, '\\', 'r')
			case '\t':
				dst = append(dst, '\\', 't')
			default:
				dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			dst = append(append(dst, s[start:i]...), `\ufffd`...)
			start = i + size
		case r == '\u2028' || r == '\u2029':
			dst = append(append(dst, s[start:i]...), `\u202`...)
			dst = append(dst, hexDigits[r&15])
			start = i + size
		}
		i += size
	}
	return append(append(dst, s[start:]...), '"')
}
