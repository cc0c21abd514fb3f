package page

import (
	"html/template"
	"net/url"
	"strings"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

// listView is a table whose rows have names and numbers. The names of a row stand
// below each other, so that the table is narrow enough for a phone.
type listView struct {
	Names string
	Heads []headView
	Rows  []rowView
	Cut   int // rows that are not shown
}

type headView struct {
	Title, Note string
	Number      bool
}

type rowView struct {
	Names []nameView
	Bar   template.HTML
	Cells []cellView
}

type nameView struct {
	Text, Href string
	Out        bool // leads away from the page
}

type cellView struct {
	Text, Title, Tone string
	Class             string // n for numbers, t for times, w for words
}

func list(r panels.Result, live *Live) *listView {
	v := &listView{}
	rows := r.Table.Rows
	if len(rows) > MaxRows {
		v.Cut = len(rows) - MaxRows
		rows = rows[:MaxRows]
	}
	names := 0 // text columns in front name the row
	for names < len(r.Columns) && r.Columns[names].Unit == panels.Text {
		names++
	}
	var titles []string
	most, bars := 0.0, []int(nil)
	for i, c := range r.Columns {
		switch {
		case i < names:
			titles = append(titles, c.Title)
		case c.Unit != panels.URL:
			v.Heads = append(v.Heads, headView{Title: c.Title, Note: c.Note, Number: isNumber(c.Unit)})
		}
		if c.Bar {
			bars = append(bars, i)
			for _, row := range rows {
				most = max(most, number(row[i]))
			}
			if c.Unit == panels.Share {
				most = 1 // more than the whole is cut there
			}
		}
	}
	v.Names = strings.Join(titles, " · ")
	for _, row := range rows {
		var out rowView
		link := ""
		for i, c := range r.Columns {
			if s, ok := row[i].(string); ok && c.Unit == panels.URL && link == "" {
				link = webURL(s)
			}
		}
		for i, c := range r.Columns {
			s := value(c.Unit, row[i])
			switch {
			case c.Unit == panels.URL:
			case i < names:
				raw, _ := row[i].(string)
				if raw == "" {
					if i == 0 {
						out.Names = append(out.Names, nameView{Text: "(none)"})
					}
					continue
				}
				n := nameView{Text: s}
				switch {
				case live != nil && c.Sets != "" && len(raw) <= maxFilter:
					n.Href = live.with(c.Sets, raw)
				case i == names-1 && link != "":
					n.Href, n.Out = link, true
				}
				out.Names = append(out.Names, n)
			default:
				cell := cellView{Text: s, Title: c.Title, Class: "w"}
				switch {
				case isNumber(c.Unit):
					cell.Class = "n"
				case c.Unit == panels.Time || c.Unit == panels.Days:
					cell.Class = "t"
				}
				cell.Tone = tone(c, row[i])
				out.Cells = append(out.Cells, cell)
			}
		}
		out.Bar = bar(r.Columns, row, bars, most)
		v.Rows = append(v.Rows, out)
	}
	return v
}

// tone is the colour of a number: none where there is nothing that it warns of.
func tone(c panels.Column, v any) string {
	if n := number(v); n <= 0 || n < c.ToneFrom {
		return ""
	}
	return string(c.Tone)
}

// maxFilter bounds the text of a filter in a link.
const maxFilter = maxText

// with is the live page's address with one filter set.
func (l *Live) with(name, value string) string {
	q, err := url.ParseQuery(l.Query)
	if err != nil {
		q = url.Values{}
	}
	q.Set(name, value)
	return "?" + q.Encode()
}

func isNumber(u panels.Unit) bool {
	switch u {
	case panels.Count, panels.Duration, panels.Share, panels.Number:
		return true
	}
	return false
}

// bar draws the row's numbers over each other, the largest below: of a duration the
// slow one pale and the usual one full.
func bar(columns []panels.Column, row []any, bars []int, most float64) template.HTML {
	if len(bars) == 0 || most <= 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString(`<svg class="bar" aria-hidden="true" focusable="false"><rect class="rail" width="100%" height="100%"/>`)
	for i := len(bars) - 1; i >= 0; i-- {
		n := number(row[bars[i]])
		if n <= 0 {
			continue
		}
		class := "fill"
		if tone := tone(columns[bars[i]], row[bars[i]]); tone != "" {
			class += " " + tone
		}
		if i > 0 {
			class += " pale"
		}
		b.WriteString(`<rect class="` + class + `" width="` + percent(max(n/most, 0.004)) + `" height="100%"/>`)
	}
	b.WriteString(`</svg>`)
	return template.HTML(b.String()) // made of numbers and our own words
}
