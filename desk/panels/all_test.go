package panels

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

func everything() []Panel { return append(All(), Trust(), Bounds()) }

// The list holds what pages and dashboards take for granted.
func TestAll(t *testing.T) {
	ids, sections := map[string]bool{}, []string{}
	for _, p := range everything() {
		if !regexp.MustCompile(`^[a-z][a-z-]*$`).MatchString(p.ID) || ids[p.ID] {
			t.Errorf("the id %q is no word, or not the only one", p.ID)
		}
		ids[p.ID] = true
		if p.Section != "" && (len(sections) == 0 || sections[len(sections)-1] != p.Section) {
			if slices.Contains(sections, p.Section) {
				t.Errorf("%s: the section %s comes twice", p.ID, p.Section)
			}
			sections = append(sections, p.Section)
		}
		if !strings.Contains(p.SQL, "@from") || !strings.Contains(p.SQL, "@to") {
			t.Errorf("%s asks for all time, and so for the whole table", p.ID)
		}
		// A page stays small because lists end.
		if list := p.Chart == Bars || p.Chart == Spread; list && p.ID != "bounds" && !strings.HasSuffix(p.SQL, "LIMIT 10") {
			t.Errorf("%s has no end", p.ID)
		}
		if p.Chart == Activity && (p.Columns[0].Unit != Time || !strings.Contains(p.SQL, "GROUP BY hour")) {
			t.Errorf("%s does not begin with the time", p.ID)
		}
		bars := 0
		for _, c := range p.Columns {
			if c.Bar {
				bars++
			}
			if c.Title == "" && c.Unit != URL && p.ID != "bounds" {
				t.Errorf("%s: the column %s has no title", p.ID, c.Name)
			}
		}
		if want := map[Chart]int{Bars: 1, Spread: 2}[p.Chart]; bars != want && p.ID != "bounds" {
			t.Errorf("%s: %d columns have bars, want %d", p.ID, bars, want)
		}
		// Ties are broken, so that an account gives the same page each time.
		if strings.Contains(p.SQL, "LIMIT") && strings.Count(p.SQL[strings.LastIndex(p.SQL, "ORDER BY"):], ",") < 1 {
			t.Errorf("%s: rows of the same number come in any order", p.ID)
		}
	}
	for _, kind := range Kinds() {
		if n := len(Of(kind)); n == 0 || n >= len(All()) {
			t.Errorf("%d panels are about %s", n, kind)
		}
	}
}
