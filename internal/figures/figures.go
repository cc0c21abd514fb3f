// Package figures writes numbers for people, in one way on every page and terminal.
package figures

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Count writes 1234567 as 1,234,567.
func Count[N int | int64](n N) string {
	s := strconv.FormatInt(int64(n), 10)
	head := ""
	if n < 0 {
		head, s = "-", s[1:]
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return head + s
}

// Plural writes "1 call", "2 calls".
func Plural[N int | int64](n N, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return Count(n) + " " + noun + "s"
}

// Share writes 0.423 as 42 %, and never 0 % or 100 % for what is not.
func Share(f float64) string {
	switch p := math.Round(f * 100); {
	case f > 0 && p == 0:
		return "<1 %"
	case f < 1 && p == 100:
		return ">99 %"
	default:
		return strconv.FormatFloat(p, 'f', 0, 64) + " %"
	}
}

// Length writes a duration with the two units that matter.
func Length(d time.Duration) string {
	switch {
	case d <= 0:
		return "0 s"
	case d < time.Millisecond:
		return "<1 ms"
	case d < time.Second:
		return strconv.FormatInt(d.Milliseconds(), 10) + " ms"
	case d < time.Minute:
		return strconv.FormatFloat(d.Truncate(100*time.Millisecond).Seconds(), 'f', 1, 64) + " s"
	case d < time.Hour:
		return fmt.Sprintf("%dm %02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 100*time.Hour:
		return fmt.Sprintf("%dh %02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd %02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

// Bytes writes a size: 1 byte, 512 bytes, 64 KiB, 1.5 GiB.
func Bytes[N int64 | uint64](n N) string {
	if n < 1<<10 {
		return Plural(int64(n), "byte")
	}
	units := []string{"KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n)/(1<<10), 0
	for f >= 1<<10 && i < len(units)-1 {
		f, i = f/(1<<10), i+1
	}
	return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[i]
}
