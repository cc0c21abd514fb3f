package page

import (
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/figures"
	"github.com/tallyman-ci/tallyman/report"
)

// maxText bounds one text of a record on the page, in runes.
const maxText = 160

// text is a record's text as the page may show it.
func text(s string) string {
	if len(s) > 4*maxText { // do not write out a megabyte to throw it away
		s = strings.ToValidUTF8(s[:4*maxText], "")
		if utf8.RuneCountInString(s) <= maxText {
			return report.Safe(s) + "…"
		}
	}
	s = report.Safe(s)
	if utf8.RuneCountInString(s) > maxText {
		return string([]rune(s)[:maxText]) + "…"
	}
	return s
}

// maxLines bounds what may have lines, in bytes: queries and explanations.
const maxLines = 8 << 10

// lines is text that keeps its lines.
func lines(s string) string {
	if len(s) > maxLines {
		s = strings.ToValidUTF8(s[:maxLines], "") + "…"
	}
	parts := strings.Split(s, "\n")
	for i := range parts {
		parts[i] = report.Safe(parts[i])
	}
	return strings.Join(parts, "\n")
}

// value is a cell as text.
func value(u panels.Unit, v any) string {
	if v == nil {
		return "–"
	}
	switch v := v.(type) {
	case string:
		return text(v)
	case bool:
		if v {
			return "yes"
		}
		return "no"
	case time.Time:
		if u == panels.Days {
			return v.UTC().Format(time.DateOnly)
		}
		return stamp(v)
	}
	n := number(v)
	switch u {
	case panels.Duration:
		return length(n)
	case panels.Share:
		return figures.Share(n)
	case panels.Number:
		return strconv.FormatFloat(n, 'f', 1, 64)
	}
	return figures.Count(int64(math.Round(n)))
}

// number is a cell as a number; 0 where it is none.
func number(v any) float64 {
	switch v := v.(type) {
	case int64:
		return float64(v)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return 0
		}
		return v
	case bool:
		if v {
			return 1
		}
	}
	return 0
}

// length writes a duration in nanoseconds.
func length(ns float64) string {
	return figures.Length(time.Duration(math.Min(ns, math.MaxInt64/2)))
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04")
}

func rangeText(from, to time.Time) string {
	switch {
	case from.IsZero() && to.IsZero():
		return ""
	case from.IsZero():
		return "until " + stamp(to)
	case to.IsZero():
		return "since " + stamp(from)
	}
	return stamp(from) + " to " + stamp(to)
}

// percent is a length in SVG.
func percent(f float64) string {
	if math.IsNaN(f) || math.IsInf(f, 0) || f < 0 {
		f = 0
	}
	return strconv.FormatFloat(math.Round(f*10000)/100, 'f', -1, 64) + "%"
}

// slug is a heading as part of an anchor.
func slug(s string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		}
		return '-'
	}, s), "-")
}

// webURL is s where a browser may follow it, or nothing.
func webURL(s string) string {
	u, err := url.Parse(s)
	if err != nil || len(s) > 1000 || u.Host == "" || u.User != nil || u.Scheme != "https" && u.Scheme != "http" {
		return ""
	}
	return u.String()
}
