package report

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Safe returns s with everything that is not plainly visible written out: control
// characters (\x1b), invisible and direction-changing ones (\u202e) and bytes that
// are no UTF-8. What it returns can be printed on a terminal as one line.
func Safe(s string) string {
	if isPlain(s) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\r':
			b.WriteString(`\r`)
		case r < utf8.RuneSelf:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

func isPlain(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// maxCode bounds one value on a Markdown page, in runes.
const maxCode = 200

// code is s as Markdown that shows s in code type and can be nothing else, in a
// line of text as in a cell of a table. What holds no markup goes between
// backticks; everything else into <code> with character references, because
// between backticks a table cell has no way to write a backslash before a pipe.
func code(s string) string {
	s = Safe(s)
	if utf8.RuneCountInString(s) > maxCode {
		s = string([]rune(s)[:maxCode]) + "..."
	}
	if s == "" {
		return ""
	}
	if strings.Trim(s, " ") == s && strings.IndexFunc(s, func(r rune) bool { return !codeSafe(r) }) < 0 {
		return "`" + s + "`"
	}
	var b strings.Builder
	b.WriteString("<code>")
	for _, r := range s {
		if codeSafe(r) && r != '@' && r != ':' && r != '_' && r != '.' && r != '/' {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "&#%d;", r)
		}
	}
	b.WriteString("</code>")
	return b.String()
}

func codeSafe(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(" ._/:@-+=,", r)
}

// count writes 1234567 as 1,234,567.
func count(n int64) string {
	s := strconv.FormatInt(n, 10)
	head := ""
	if n < 0 {
		head, s = "-", s[1:]
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return head + s
}

// plural writes "1 call", "2 calls".
func plural(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return count(n) + " " + noun + "s"
}

// share writes part of whole in percent, and never 0 % or 100 % for what is not.
func share(part, whole int64) string {
	if whole <= 0 {
		return "-"
	}
	switch p := (part*200 + whole) / (2 * whole); {
	case part > 0 && p == 0:
		return "<1 %"
	case part < whole && p == 100:
		return ">99 %"
	default:
		return strconv.FormatInt(p, 10) + " %"
	}
}

// length writes a duration with the two units that matter.
func length(ns int64) string {
	d := time.Duration(ns)
	switch {
	case d <= 0:
		return "0 s"
	case d < time.Millisecond:
		return "<1 ms"
	case d < time.Second:
		return strconv.FormatInt(d.Milliseconds(), 10) + " ms"
	case d < time.Minute:
		return strconv.FormatFloat(float64(d.Truncate(100*time.Millisecond))/float64(time.Second), 'f', 1, 64) + " s"
	case d < time.Hour:
		return fmt.Sprintf("%dm %02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 100*time.Hour:
		return fmt.Sprintf("%dh %02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd %02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05")
}

// exit writes how a process ended.
func exit(code int64, signal int64) string {
	if signal != 0 {
		return "signal " + strconv.FormatInt(signal, 10)
	}
	return strconv.FormatInt(code, 10)
}

// cells is the number of terminal columns that s takes.
func cells(s string) int {
	n := 0
	for _, r := range s {
		n += runeCells(r)
	}
	return n
}

func runeCells(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me):
		return 0
	case r >= 0x1100 && r <= 0x115f, r >= 0x2e80 && r <= 0xa4cf, r >= 0xac00 && r <= 0xd7a3,
		r >= 0xf900 && r <= 0xfaff, r >= 0xfe30 && r <= 0xfe6f, r >= 0xff00 && r <= 0xff60,
		r >= 0xffe0 && r <= 0xffe6, r >= 0x1f300 && r <= 0x1faff, r >= 0x20000 && r <= 0x3fffd:
		return 2 // East Asian wide and full-width, and pictures (Unicode Standard Annex 11)
	}
	return 1
}

// fit cuts s to n terminal columns and says so with three dots.
func fit(s string, n int) string {
	if n <= 3 || cells(s) <= n {
		return s
	}
	width := 0
	for i, r := range s {
		if width += runeCells(r); width > n-3 {
			return s[:i] + "..."
		}
	}
	return s
}
