package importer

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// layouts are the forms of time that are tried, those first that occur most. Go's
// parser accepts a fraction of the second where the layout has none. A form that a
// slash makes ambiguous is in slashed.
var layouts = []string{
	time.RFC3339,
	"2006-01-02 15:04:05",
	"2006-01-02T15:04:05",
	"2006-01-02 15:04:05 MST",
	"2006-01-02 15:04:05Z07:00",
	"2006-01-02 15:04:05 Z07:00",
	"2006-01-02 15:04:05 -0700",
	"2006-01-02 15:04:05-0700",
	"2006-01-02 15:04:05 -0700 MST",
	"2006-01-02T15:04:05-0700",
	"2006-01-02 15:04:05-07",
	"2006-01-02T15:04Z07:00",
	"2006-01-02 15:04",
	"2006-01-02T15:04",
	"2006/01/02/15", // Docker Hub
	"2006-01-02/15",
	"2006-01-02 15",
	"2006-01-02T15",
	"2006/01/02 15:04:05 -0700",
	"2006/01/02 15:04:05",
	"2006/01/02 15:04",
	"02/Jan/2006:15:04:05 -0700", // Common Log Format
	time.RFC1123, time.RFC1123Z, time.RFC850, time.ANSIC, time.UnixDate,
	"Jan 2, 2006 3:04:05 PM",
	"Jan 2, 2006, 3:04:05 PM",
	"Jan 2, 2006 15:04:05",
	"Jan 2, 2006 @ 15:04:05", // Kibana
	"2 Jan 2006 15:04:05",
	"20060102T150405Z0700",
	"20060102T150405",
	"20060102150405",
	"2006-01-02",
}

// slashed are the forms that read as another day where day and month change places.
var slashed = [][2]string{ // month first, day first
	{"1/2/2006 15:04:05", "2/1/2006 15:04:05"},
	{"1/2/2006 15:04", "2/1/2006 15:04"},
	{"1/2/2006 3:04:05 PM", "2/1/2006 3:04:05 PM"},
	{"1/2/2006, 3:04:05 PM", "2/1/2006, 3:04:05 PM"},
	{"1/2/2006, 15:04:05", "2/1/2006, 15:04:05"},
	{"1/2/2006 3:04 PM", "2/1/2006 3:04 PM"},
}

// epochs are the forms of seconds since 1970 and their length in nanoseconds.
var epochs = map[string]int64{"unix": 1e9, "unix-ms": 1e6, "unix-us": 1e3, "unix-ns": 1}

// earliest and latest bound what is taken for a time of a request: a number of
// milliseconds read as seconds would be in another age.
var (
	earliest = time.Date(2005, 1, 1, 0, 0, 0, 0, time.UTC)
	latest   = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

var (
	errNoTime = errors.New("the time is missing")
	errTime   = errors.New("the time is not understood")
)

// timeParser reads times in the form that was found in the first rows.
type timeParser struct {
	loc   *time.Location
	fixed string // the only form, given by the caller
	last  string // the form that fitted last
	day   bool   // slashed times have the day first
	slash bool   // slashed times may be read
}

func (p *timeParser) name() string {
	if p.fixed != "" {
		return p.fixed
	}
	return p.last
}

// choose decides on the form from a sample.
func (p *timeParser) choose(format string, sample []string) error {
	if p.loc == nil {
		p.loc = time.UTC
	}
	switch {
	case format == "rfc3339":
		p.fixed = time.RFC3339
	case strings.Contains(format, "%"):
		layout, err := strftime(format)
		if err != nil {
			return err
		}
		p.fixed = layout
	case format != "":
		p.fixed = format
		if epochs[format] == 0 && !strings.Contains(format, "06") {
			return fmt.Errorf("%w: --time-format is neither rfc3339, unix, unix-ms, unix-us, unix-ns, a Go layout such as 2006-01-02 15:04:05, nor one with %%Y-%%m-%%d", ErrLayout)
		}
	}
	if p.fixed != "" {
		return nil
	}
	day, month, any := false, false, false
	for _, s := range sample {
		a, b, ok := slashDate(s)
		if !ok {
			continue
		}
		any = true
		day, month = day || a > 12, month || b > 12
	}
	if any && day == month {
		return fmt.Errorf("%w: times such as 1/2/2006 may begin with the day or the month, and the first rows do not tell which; say --time-format '%%d/%%m/%%Y %%H:%%M:%%S' or '%%m/%%d/%%Y %%H:%%M:%%S'", ErrLayout)
	}
	p.slash, p.day = any, day
	for _, s := range sample {
		if _, err := p.parse(s); err == nil {
			break
		}
	}
	return nil
}

// slashDate returns the first two numbers of a date such as 1/2/2006.
func slashDate(s string) (a, b int, ok bool) {
	parts := strings.SplitN(s, "/", 3)
	if len(parts) < 3 || len(parts[0]) > 2 || len(parts[1]) > 2 || len(parts[2]) < 4 {
		return 0, 0, false
	}
	a, err1 := strconv.Atoi(parts[0])
	b, err2 := strconv.Atoi(parts[1])
	return a, b, err1 == nil && err2 == nil
}

// parse reads one time. The errors do not quote it.
func (p *timeParser) parse(s string) (time.Time, error) {
	s = strings.Trim(strings.TrimSpace(s), "[]")
	if s == "" || s == "-" {
		return time.Time{}, errNoTime
	}
	if p.fixed != "" {
		return p.as(p.fixed, s)
	}
	if p.last != "" {
		if t, err := p.as(p.last, s); err == nil {
			return t, nil
		}
	}
	if t, form, ok := epoch(s); ok {
		p.last = form
		return t, nil
	}
	if strings.HasPrefix(s, "20") || strings.HasPrefix(s, "19") || strings.ContainsAny(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		for _, layout := range layouts {
			if t, err := p.as(layout, s); err == nil {
				p.last = layout
				return t, nil
			}
		}
	}
	if p.slash {
		for _, pair := range slashed {
			layout := pair[0]
			if p.day {
				layout = pair[1]
			}
			if t, err := p.as(layout, s); err == nil {
				p.last = layout
				return t, nil
			}
		}
	}
	return time.Time{}, errTime
}

func (p *timeParser) as(form, s string) (time.Time, error) {
	var t time.Time
	if unit := epochs[form]; unit != 0 {
		var ok bool
		if t, ok = since1970(s, unit); !ok {
			return time.Time{}, errTime
		}
	} else {
		// Kibana, Java and Python write a comma before the fraction; Go reads both.
		var err error
		if t, err = time.ParseInLocation(form, s, p.loc); err != nil {
			return time.Time{}, errTime
		}
		// Go gives an abbreviation that it does not know the offset 0: EST would be read as UTC.
		if name, offset := t.Zone(); strings.Contains(form, "MST") && offset == 0 && name != "UTC" && name != "GMT" && name != "Z" && name != "WET" && t.Location() != p.loc && !strings.Contains(form, "-0700") {
			return time.Time{}, errTime
		}
	}
	if t = t.UTC(); t.Before(earliest) || t.After(latest) {
		return time.Time{}, errTime
	}
	return t, nil
}

// epoch reads a number of seconds, milliseconds, microseconds or nanoseconds: which, its
// size tells.
func epoch(s string) (time.Time, string, bool) {
	if len(s) < 9 || strings.Trim(s, "0123456789.") != "" {
		return time.Time{}, "", false
	}
	for _, form := range []string{"unix", "unix-ms", "unix-us", "unix-ns"} {
		if t, ok := since1970(s, epochs[form]); ok && !t.Before(earliest) && t.Before(latest) {
			return t, form, true
		}
	}
	return time.Time{}, "", false
}

// since1970 reads a decimal number of units without rounding it.
func since1970(s string, unit int64) (time.Time, bool) {
	whole, fraction, _ := strings.Cut(s, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return time.Time{}, false
	}
	ns := n * unit
	if fraction != "" {
		if len(fraction) > 9 {
			fraction = fraction[:9]
		}
		f, err := strconv.ParseInt((fraction + "000000000")[:9], 10, 64)
		if err != nil || f < 0 || ns > math.MaxInt64-f {
			return time.Time{}, false
		}
		ns += f * unit / 1e9
	}
	return time.Unix(0, ns).UTC(), true
}

func isTime(s string) bool {
	for _, day := range []bool{false, true} {
		p := timeParser{loc: time.UTC, slash: true, day: day}
		if _, err := p.parse(s); err == nil {
			return true
		}
	}
	return false
}

// strftime makes a Go layout of one with percent signs.
func strftime(format string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(format); i++ {
		if format[i] != '%' || i+1 == len(format) {
			b.WriteByte(format[i])
			continue
		}
		i++
		layout, ok := map[byte]string{'Y': "2006", 'm': "01", 'd': "02", 'H': "15", 'I': "03", 'M': "04", 'S': "05", 'p': "PM", 'z': "-0700", 'Z': "MST",
			'b': "Jan", 'B': "January", 'y': "06", 'e': "_2", 'j': "002", 'T': "15:04:05", 'F': "2006-01-02", 'f': "000000", 'a': "Mon", 'A': "Monday", '%': "%"}[format[i]]
		if !ok {
			return "", fmt.Errorf("%w: --time-format has %%%c, which is not known", ErrLayout, format[i])
		}
		if format[i] == 'f' && !strings.HasSuffix(b.String(), ".") {
			return "", fmt.Errorf("%w: %%f in --time-format needs a point before it", ErrLayout)
		}
		b.WriteString(layout)
	}
	return b.String(), nil
}
