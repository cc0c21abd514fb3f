package report

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/internal/figures"
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

// share writes part of whole in percent.
func share(part, whole int64) string {
	if whole <= 0 {
		return "-"
	}
	return figures.Share(float64(part) / float64(whole))
}

// length writes a duration in nanoseconds.
func length(ns int64) string { return figures.Length(time.Duration(ns)) }

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
