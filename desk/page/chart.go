package page

import (
	"fmt"
	"html/template"
	"math"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/figures"
)

// chartView is columns over time, with the table that holds the same numbers.
type chartView struct {
	Axis, Plot template.HTML
	Summary    string
	Legend     []legendView
	Heads      []string
	Rows       [][]string
	Step       string
}

type legendView struct{ Title, Class, Total string }

// steps are the widths of columns. Each is a multiple of the one before or begins
// days, so that hourly rows never straddle two columns.
var steps = []time.Duration{
	time.Minute, 5 * time.Minute, 10 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 3 * time.Hour, 6 * time.Hour, 12 * time.Hour,
	24 * time.Hour, 2 * 24 * time.Hour, 7 * 24 * time.Hour, 14 * 24 * time.Hour, 28 * 24 * time.Hour, 91 * 24 * time.Hour, 364 * 24 * time.Hour,
}

// maxColumns is how many columns still have a visible width on a phone.
const maxColumns = 60

// plotHeight is the height of the columns' place in pixels, below it the labels.
const (
	plotTop    = 10
	plotHeight = 150
	axisHeight = 24
)

func activity(r panels.Result, from, to time.Time) *chartView {
	first, last := from, to
	for _, row := range r.Table.Rows {
		t, ok := row[0].(time.Time)
		if !ok {
			continue
		}
		if first.IsZero() || t.Before(first) {
			first = t
		}
		if !t.Before(last) {
			last = t.Add(time.Nanosecond)
		}
	}
	// The rows' own grain: a column must not be narrower.
	grain := time.Duration(0)
	for _, s := range steps {
		fits := true
		for _, row := range r.Table.Rows {
			if t, ok := row[0].(time.Time); ok && !t.UTC().Truncate(s).Equal(t) {
				fits = false
				break
			}
		}
		if !fits || s > time.Hour {
			break
		}
		grain = s
	}
	step := steps[len(steps)-1]
	for _, s := range steps {
		if s >= grain && last.Sub(first.UTC().Truncate(s)) <= maxColumns*s {
			step = s
			break
		}
	}
	start := first.UTC().Truncate(step)
	n := min(max(int((last.Sub(start)+step-1)/step), 1), maxColumns)
	layers := []int(nil)
	for i, c := range r.Columns {
		if i > 0 && isNumber(c.Unit) {
			layers = append(layers, i)
		}
	}
	sums := make([][]float64, n)
	for i := range sums {
		sums[i] = make([]float64, len(layers))
	}
	for _, row := range r.Table.Rows {
		t, ok := row[0].(time.Time)
		if !ok {
			continue
		}
		at := int(t.Sub(start) / step)
		if at < 0 || at >= n {
			continue
		}
		for l, col := range layers {
			sums[at][l] += number(row[col])
		}
	}
	v := &chartView{Step: stepName(step), Heads: []string{"from (UTC)"}}
	totals := make([]float64, len(layers))
	most, peak := 0.0, 0
	for i, s := range sums {
		sum := 0.0
		for l := range s {
			sum += s[l]
			totals[l] += s[l]
		}
		if sum > most {
			most, peak = sum, i
		}
	}
	top, ticks := scale(most)
	for l, col := range layers {
		c := r.Columns[col]
		v.Heads = append(v.Heads, c.Title)
		v.Legend = append(v.Legend, legendView{Title: c.Title, Class: layerClass(c, l), Total: value(c.Unit, totals[l])})
	}
	v.Summary = fmt.Sprintf("%s: columns of %s each; the highest is %s, from %s (UTC)", r.Title, v.Step, figures.Count(int64(math.Round(most))), stamp(start.Add(time.Duration(peak)*step)))
	v.Axis, v.Plot = v.draw(r, layers, sums, start, step, top, ticks)
	for i := range sums {
		line := []string{stamp(start.Add(time.Duration(i) * step))}
		any := false
		for l, col := range layers {
			line = append(line, value(r.Columns[col].Unit, sums[i][l]))
			any = any || sums[i][l] != 0
		}
		if any {
			v.Rows = append(v.Rows, line)
		}
	}
	return v
}

// layerClass is the colour of a layer: its meaning, or its place.
func layerClass(c panels.Column, at int) string {
	if c.Tone != panels.Plain {
		return string(c.Tone)
	}
	return "s" + strconv.Itoa(min(at, 4)+1)
}

func (v *chartView) draw(r panels.Result, layers []int, sums [][]float64, start time.Time, step time.Duration, top float64, ticks []float64) (axis, plot template.HTML) {
	y := func(n float64) string {
		return strconv.FormatFloat(math.Round((plotTop+plotHeight*(1-n/top))*10)/10, 'f', -1, 64)
	}
	var a, b strings.Builder
	height := plotTop + plotHeight + axisHeight
	fmt.Fprintf(&a, `<svg class="y-axis" height="%d" aria-hidden="true" focusable="false">`, height)
	fmt.Fprintf(&b, `<svg class="plot" height="%d" role="img" aria-label="%s" focusable="false">`, height, template.HTMLEscapeString(v.Summary))
	for _, t := range ticks {
		fmt.Fprintf(&a, `<text x="100%%" y="%s" dy="4" text-anchor="end">%s</text>`, y(t), short(t))
		class := "grid"
		if t == 0 {
			class = "base"
		}
		fmt.Fprintf(&b, `<line class="%s" x1="0" x2="100%%" y1="%s" y2="%s"/>`, class, y(t), y(t))
	}
	n := float64(len(sums))
	wide := min(0.8/n, 0.08) // one hour alone is no wall
	for i, s := range sums {
		sum := 0.0
		for l, col := range layers {
			if s[l] <= 0 {
				continue
			}
			h := math.Max(plotHeight*s[l]/top, 1)
			fmt.Fprintf(&b, `<rect class="%s" x="%s" width="%s" y="%s" height="%s"/>`, layerClass(r.Columns[col], l),
				percent(float64(i)/n+wide/8), percent(wide), y(sum+s[l]), strconv.FormatFloat(math.Round(h*10)/10, 'f', -1, 64))
			sum += s[l]
		}
		if sum == 0 {
			continue
		}
		// A column of its whole height shows its numbers to a pointer.
		fmt.Fprintf(&b, `<rect class="hit" x="%s" width="%s" y="%d" height="%d"><title>%s`, percent(float64(i)/n), percent(1/n), plotTop, plotHeight, stamp(start.Add(time.Duration(i)*step)))
		for l, col := range layers {
			fmt.Fprintf(&b, "\n%s: %s", template.HTMLEscapeString(r.Columns[col].Title), value(r.Columns[col].Unit, s[l]))
		}
		b.WriteString(`</title></rect>`)
	}
	for _, l := range labels(start, step, len(sums)) {
		fmt.Fprintf(&b, `<text class="x%s" x="%s" y="%d" text-anchor="%s">%s</text>`, l.class, percent(l.at), height-5, l.anchor, l.text)
	}
	a.WriteString(`</svg>`)
	b.WriteString(`</svg>`)
	return template.HTML(a.String()), template.HTML(b.String()) // numbers, our own words and escaped titles
}

type label struct {
	at                  float64
	text, anchor, class string
}

// labels are the times below a plot, at most six and never over each other.
func labels(start time.Time, step time.Duration, n int) []label {
	whole := time.Duration(n) * step
	every := step
	for _, s := range []time.Duration{
		time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute, time.Hour, 2 * time.Hour, 3 * time.Hour, 6 * time.Hour, 12 * time.Hour,
		24 * time.Hour, 2 * 24 * time.Hour, 7 * 24 * time.Hour, 14 * 24 * time.Hour, 28 * 24 * time.Hour, 91 * 24 * time.Hour, 364 * 24 * time.Hour, 5 * 364 * 24 * time.Hour,
	} {
		every = s
		if s >= step && whole/s <= 5 {
			break
		}
	}
	var out []label
	for t := start.Truncate(every); t.Before(start.Add(whole)); t = t.Add(every) {
		if t.Before(start) {
			continue
		}
		l := label{at: float64(t.Sub(start)) / float64(whole), anchor: "middle"}
		switch {
		case every >= 364*24*time.Hour:
			l.text = t.Format("Jan 2006")
		case every >= 24*time.Hour || t.Hour() == 0 && t.Minute() == 0:
			l.text = t.Format("Jan 2")
		default:
			l.text = t.Format("15:04")
		}
		switch {
		case l.at < 0.04:
			l.anchor = "start"
		case l.at > 0.96:
			l.anchor = "end"
		}
		out = append(out, l)
	}
	for i := range out {
		if len(out) > 4 && i%2 == 1 {
			out[i].class = " spare" // not on narrow screens
		}
	}
	return out
}

// scale is a round number at or above most, and the ticks up to it.
func scale(most float64) (top float64, ticks []float64) {
	if most <= 0 {
		return 1, []float64{0}
	}
	unit := math.Pow(10, math.Floor(math.Log10(most)))
	options := []float64{1, 2, 2.5, 5, 10}
	if unit <= 1 { // there is no half of a call
		options = []float64{1, 2, 5, 10}
	}
	i := sort.SearchFloat64s(options, most/unit)
	top = options[min(i, len(options)-1)] * unit
	parts := 5.0
	switch {
	case top <= 1:
		return 1, []float64{0, 1}
	case top == 2:
		parts = 2
	case top/unit == 2:
		parts = 4
	}
	for t := 0.0; t <= parts; t++ {
		ticks = append(ticks, top*t/parts)
	}
	return top, ticks
}

// short writes 12500 as 12.5k.
func short(n float64) string {
	for _, u := range []struct {
		at   float64
		name string
	}{{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if n >= u.at {
			return strconv.FormatFloat(math.Round(n/u.at*100)/100, 'f', -1, 64) + u.name
		}
	}
	return strconv.FormatFloat(math.Round(n*100)/100, 'f', -1, 64)
}

func stepName(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return strconv.Itoa(int(d/(24*time.Hour))) + " days"
	case d == 24*time.Hour:
		return "a day"
	case d == time.Hour:
		return "an hour"
	case d > time.Hour:
		return strconv.Itoa(int(d/time.Hour)) + " hours"
	case d == time.Minute:
		return "a minute"
	}
	return strconv.Itoa(int(d/time.Minute)) + " minutes"
}
