package page

import (
	"bytes"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

func render(t testing.TB, p Page) string {
	t.Helper()
	var b bytes.Buffer
	if err := Render(&b, p); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

var (
	tag       = regexp.MustCompile(`<[a-zA-Z/!][^>]*>`)
	attribute = regexp.MustCompile(`="[^"]*"`)
)

// skeleton is a page without its texts: tags and the names of their attributes.
func skeleton(page string) string {
	var b strings.Builder
	for _, t := range tag.FindAllString(page, -1) {
		b.WriteString(attribute.ReplaceAllString(t, "") + "\n")
	}
	return b.String()
}

// withText is a page that shows one text wherever a text of others can stand.
func withText(s string, live bool) Page {
	p := sample()
	p.Title, p.Sources = s, []string{s, s}
	p.Filter = panels.Filter{Repository: s, Workflow: s, Image: s}
	for i := range p.Results {
		for _, row := range p.Results[i].Table.Rows {
			for j := range row {
				if _, ok := row[j].(string); ok && p.Results[i].Columns[j].Unit == panels.Text {
					row[j] = s
				}
			}
		}
		p.Results[i].Query = "SELECT '" + s + "'"
	}
	p.Suspects = &Suspects{Title: "Suspects", Question: "Who?", Verdict: "v", Why: s, Notes: []string{s}, Method: []string{s}, Ranking: repositories([]string{s, s})}
	if live {
		p.Live = &Live{Every: 5 * time.Second, Query: "repository=" + "x", Form: []Field{{Name: "repository", Label: "Repository", Value: s, Hint: "any"}}, Notes: []string{s}}
	}
	return p
}

// What others wrote changes texts of the page and never its structure, turns no text
// around and is cut.
func TestHostile(t *testing.T) {
	for _, live := range []bool{false, true} {
		for _, s := range hostile {
			plain := "plain"
			if len(s) > maxFilter {
				plain = strings.Repeat(plain, 100) // makes no link that sets a filter
			}
			want := skeleton(render(t, withText(plain, live)))
			got := render(t, withText(s, live))
			if skeleton(got) != want {
				t.Errorf("%.60q changes the page's structure", s)
			}
			if !utf8.ValidString(got) {
				t.Errorf("%.60q: the page is no UTF-8", s)
			}
			if i := strings.IndexAny(got, "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x00\x1b"); i >= 0 {
				t.Errorf("%.60q: the page has a character that changes others: %q", s, got[i:i+8])
			}
		}
	}
}

func FuzzHostile(f *testing.F) {
	for _, s := range hostile {
		if len(s) < 1000 {
			f.Add(s)
		}
	}
	want := skeleton(render(f, withText("plain", true)))
	f.Fuzz(func(t *testing.T, s string) {
		if s == "" || len(s) > maxFilter {
			t.Skip() // those have other structures: no name, no link
		}
		if got := render(t, withText(s, true)); skeleton(got) != want {
			t.Errorf("%q changes the page's structure", s)
		}
	})
}

// Only links of the web lead out of the page.
func TestLinks(t *testing.T) {
	for in, want := range map[string]string{
		"https://github.com/acme/shop/actions/runs/1": "https://github.com/acme/shop/actions/runs/1",
		"http://ghes.example/x":                       "http://ghes.example/x",
		"javascript:alert(1)":                         "",
		"data:text/html,x":                            "",
		"//host/x":                                    "",
		"https://user:secret@host/":                   "",
		"https:///nohost":                             "",
		" https://x":                                  "",
		"https://x/" + strings.Repeat("a", 2000):      "",
	} {
		if got := webURL(in); got != want {
			t.Errorf("webURL(%.40q) = %q, want %q", in, got, want)
		}
	}
}

// The browser runs and paints only what the policy names by its hash.
func TestPolicy(t *testing.T) {
	for _, live := range []bool{false, true} {
		got := render(t, withText("plain", live))
		for _, element := range []string{"style", "script"} {
			_, rest, found := strings.Cut(got, "<"+element+">")
			if element == "script" && !live {
				if strings.Contains(got, "<script") {
					t.Error("a page that stands alone has a script")
				}
				continue
			}
			inner, _, _ := strings.Cut(rest, "</"+element+">")
			// The policy stands in an attribute, where + is written as a reference.
			if !found || !strings.Contains(strings.ReplaceAll(got, "&#43;", "+"), strings.ReplaceAll("&#39;"+hash(inner)+"&#39;", "&#43;", "+")) {
				t.Errorf("live %v: the policy does not name the %s", live, element)
			}
		}
		for _, no := range []string{"unsafe-", " style=\"", " onclick", "http-equiv=\"refresh\"><", "@import", "url("} {
			if strings.Contains(got, no) {
				t.Errorf("live %v: the page has %s", live, no)
			}
		}
	}
}

// Each figure leads to its query, and each anchor leads somewhere.
func TestAnchors(t *testing.T) {
	got := render(t, withText("plain", false))
	ids := map[string]int{}
	for _, m := range regexp.MustCompile(` id="([^"]*)"`).FindAllStringSubmatch(got, -1) {
		ids[m[1]]++
	}
	for id, n := range ids {
		if n > 1 {
			t.Errorf("%d elements have the id %s", n, id)
		}
	}
	links := map[string]bool{}
	for _, m := range regexp.MustCompile(` href="#([^"]*)"`).FindAllStringSubmatch(got, -1) {
		links[m[1]] = true
		if ids[m[1]] == 0 {
			t.Errorf("nothing has the id %s", m[1])
		}
	}
	for _, r := range sample().Results {
		if !links["query-"+r.ID] || !links[r.ID] {
			t.Errorf("panel %s and its query do not lead to each other", r.ID)
		}
	}
}

// Whatever is shown of a panel, its line of trust stands beside it.
func TestTrust(t *testing.T) {
	p := sample()
	got := render(t, p)
	line := "8,942 of 9,120 jobs recorded · &gt;99 % of records have a job · 12 lost and 1 hole of unknown size"
	if n := strings.Count(got, line); n != len(p.Results)+1 {
		t.Errorf("the line of trust stands %d times on a page of %d panels", n, len(p.Results))
	}
	p.Trust = Trust{Known: true, Jobs: 710, Environment: 900}
	if got := render(t, p); !strings.Contains(got, "710 jobs known by records alone, none by the runner&#39;s hook · 100 % of records have a job") {
		t.Error("a fleet without the hook reads as if nothing of it were recorded")
	}
	p.Trust = Trust{Known: true}
	if got := render(t, p); !strings.Contains(got, "nothing recorded") || strings.Contains(got, "nothing lost") {
		t.Error("an empty account reads as if all of it were there")
	}
	p.Trust = Trust{}
	if got := render(t, p); !strings.Contains(got, "coverage unknown") {
		t.Error("a page that knows nothing of its coverage does not say so")
	}
}

// Regrouping hours into wider columns keeps every number, whatever the range.
func TestActivitySums(t *testing.T) {
	for _, hours := range []int{1, 2, 24, 59, 60, 61, 168, 720, 2160, 9000, 90000} {
		r := over()
		r.Table.Rows = nil
		want := []float64{0, 0, 0}
		for i := range 200 {
			at := noon.Add(-time.Duration(i*hours/200) * time.Hour)
			row := []any{at, int64(i), int64(i % 3), int64(i % 7)}
			for j := range want {
				want[j] += number(row[j+1])
			}
			r.Table.Rows = append(r.Table.Rows, row)
		}
		v := activity(r, noon.Add(-time.Duration(hours)*time.Hour), noon.Add(time.Hour))
		got := []float64{0, 0, 0}
		for _, row := range v.Rows {
			for j := range got {
				n, err := strconv.ParseFloat(strings.ReplaceAll(row[j+1], ",", ""), 64)
				if err != nil {
					t.Fatal(err)
				}
				got[j] += n
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d hours: the columns hold %v, the rows %v", hours, got, want)
		}
		if n := strings.Count(string(v.Plot), `class="hit"`); n > maxColumns {
			t.Errorf("%d hours: %d columns", hours, n)
		}
		if n := strings.Count(string(v.Plot), "<text"); n > 6 {
			t.Errorf("%d hours: %d labels", hours, n)
		}
	}
}

// A thousand rows with the longest names there can be make a list of this size at
// most; the number of records has no part in it.
func TestSize(t *testing.T) {
	long := strings.Repeat(`"`, 10_000) // five bytes in HTML
	p := sample()
	base := len(render(t, p))
	names := make([]string, 1000)
	for i := range names {
		names[i] = long
	}
	big := repositories(names)
	for _, row := range big.Table.Rows {
		row[1], row[2] = long, long
	}
	p.Results = append(p.Results, big)
	if one := len(render(t, p)) - base; one > 48_000 {
		t.Errorf("one list can take %d bytes", one)
	}
}

func TestValues(t *testing.T) {
	for _, tt := range []struct {
		unit panels.Unit
		in   any
		want string
	}{
		{panels.Count, int64(1234567), "1,234,567"},
		{panels.Count, 12.0, "12"},
		{panels.Count, nil, "–"},
		{panels.Duration, int64(5_400_000_000_000), "1h 30m"},
		{panels.Duration, 0.0, "0 s"},
		{panels.Duration, math.Inf(1), "0 s"},
		{panels.Share, 0.004, "<1 %"},
		{panels.Share, 0.9999, ">99 %"},
		{panels.Share, 1.0, "100 %"},
		{panels.Share, math.NaN(), "0 %"},
		{panels.Time, noon, "2026-11-20 12:00"},
		{panels.Days, noon, "2026-11-20"},
		{panels.Text, "a\u202eb", `a\u202eb`},
	} {
		if got := value(tt.unit, tt.in); got != tt.want {
			t.Errorf("value(%s, %v) = %q, want %q", tt.unit, tt.in, got, tt.want)
		}
	}
}

func TestScale(t *testing.T) {
	for _, most := range []float64{0, 1, 2, 3, 5, 7, 10, 11, 24, 99, 100, 101, 2400, 1e6 + 1, 1e12} {
		top, ticks := scale(most)
		if top < most || most > 1 && top > 2.6*most {
			t.Errorf("scale(%v) = %v", most, top)
		}
		for _, tick := range ticks {
			if tick != math.Trunc(tick) {
				t.Errorf("scale(%v) has a tick at %v", most, tick)
			}
		}
		if ticks[0] != 0 || most > 0 && ticks[len(ticks)-1] != top {
			t.Errorf("scale(%v): ticks %v", most, ticks)
		}
	}
}

// Text can be read and bars can be seen, light, dark and on paper: WCAG 2.2 asks for a contrast
// of 4.5 for text (1.4.3) and of 3 for what a picture says (1.4.11).
func TestContrast(t *testing.T) {
	variable := regexp.MustCompile(`--([a-z0-9-]+): (#[0-9a-f]{3,6})\b`)
	blocks := regexp.MustCompile(`:root \{[^}]*\}`).FindAllString(pageCSS, -1)
	if len(blocks) != 3 {
		t.Fatalf("%d palettes, want light, dark and paper", len(blocks))
	}
	base := map[string]string{}
	for i, name := range []string{"light", "dark", "paper"} {
		colours := map[string]string{}
		for k, v := range base {
			colours[k] = v
		}
		for _, m := range variable.FindAllStringSubmatch(blocks[i], -1) {
			colours[m[1]] = m[2]
		}
		if i == 0 {
			base = colours
		}
		for _, back := range []string{"paper", "card", "soft"} {
			for _, text := range []string{"ink", "quiet", "link", "bad-ink", "warn-ink", "good-ink"} {
				if c := contrast(t, colours[text], colours[back]); c < 4.5 {
					t.Errorf("%s: %s on %s has a contrast of %.2f", name, text, back, c)
				}
			}
		}
		for _, fill := range []string{"s1", "s2", "s3", "s4", "s5", "bad"} {
			if c := contrast(t, colours[fill], colours["card"]); c < 3 {
				t.Errorf("%s: %s on card has a contrast of %.2f", name, fill, c)
			}
		}
	}
}

// contrast is that of WCAG 2.2 (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio).
func contrast(t *testing.T, a, b string) float64 {
	l := func(s string) float64 {
		s = strings.TrimPrefix(s, "#")
		if len(s) == 3 {
			s = string([]byte{s[0], s[0], s[1], s[1], s[2], s[2]})
		}
		n, err := strconv.ParseUint(s, 16, 32)
		if err != nil || len(s) != 6 {
			t.Fatalf("%q is no colour", s)
		}
		sum := 0.0
		for i, w := range []float64{0.2126, 0.7152, 0.0722} {
			c := float64(n>>(16-8*i)&255) / 255
			if c <= 0.04045 {
				c /= 12.92
			} else {
				c = math.Pow((c+0.055)/1.055, 2.4)
			}
			sum += w * c
		}
		return sum
	}
	x, y := l(a), l(b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}
