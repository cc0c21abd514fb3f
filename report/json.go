package report

import (
	"fmt"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// SafeJSON returns a JSON text with \u escapes for all characters that are not
// plainly visible. encoding/json leaves DEL, the C1 controls (0x9b starts a
// terminal's control sequence) and direction marks as they are. Beyond ASCII a
// JSON text has characters in strings only, where an escape means the same.
func SafeJSON(data []byte) []byte {
	out := make([]byte, 0, len(data))
	for i := 0; i < len(data); {
		if c := data[i]; c < utf8.RuneSelf && c != 0x7f {
			out = append(out, c)
			i++
			continue
		}
		r, n := utf8.DecodeRune(data[i:])
		switch {
		case unicode.IsPrint(r):
			out = append(out, data[i:i+n]...)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
		i += n
	}
	return out
}
