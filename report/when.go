package report

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ParseTime reads one end of a time range: an RFC 3339 time, a date (its midnight
// in UTC), or a length of time before now: 90s, 45m, 2h, 1h30m, 7d, 2w. Empty text
// is the zero time, which leaves that end open.
func ParseTime(text string, now time.Time) (time.Time, error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t.UTC(), nil
	}
	if t, err := time.Parse(time.DateOnly, text); err == nil {
		return t.UTC(), nil
	}
	if d, err := parseLength(text); err == nil {
		return now.Add(-d).UTC(), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: use RFC 3339 (2026-03-01T08:00:00Z), a date (2026-03-01), or a length of time before now (90m, 2h, 7d)", text)
}

// parseLength is time.ParseDuration with days and weeks, which have no meaning
// beyond 24 hours and 7 days here.
func parseLength(text string) (time.Duration, error) {
	unit := time.Duration(0)
	switch {
	case strings.HasSuffix(text, "d"):
		unit = 24 * time.Hour
	case strings.HasSuffix(text, "w"):
		unit = 7 * 24 * time.Hour
	}
	if unit != 0 {
		n, err := strconv.ParseUint(text[:len(text)-1], 10, 16)
		if err != nil {
			return 0, err
		}
		return time.Duration(n) * unit, nil
	}
	d, err := time.ParseDuration(text)
	if err == nil && d < 0 {
		err = fmt.Errorf("negative duration %s", text)
	}
	return d, err
}
