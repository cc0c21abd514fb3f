package browser

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// sample is the page that desk/page keeps as its golden file.
func sample(t *testing.T) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "desk", "page", "testdata", "sample.html"))
	if err != nil {
		t.Fatal(err)
	}
	return "file://" + p
}

func only(url string) func(string) bool {
	return func(asked string) bool { return asked == url || strings.HasPrefix(asked, url+"#") }
}

// fits fails the test where a page must be scrolled sideways or a text is cut off.
func (b *tab) fits(l look) {
	b.t.Helper()
	if wide := eval[int64](b, "document.documentElement.scrollWidth"); wide > l.width {
		b.t.Errorf("%s: the page is %d pixels wide on a screen of %d", l.name, wide, l.width)
	}
	out := eval[[]string](b, `[...document.querySelectorAll("main *, header *")].filter(e => {
		if (e.closest("svg, .scroll, .skip, thead")) return false;
		const r = e.getBoundingClientRect();
		const panel = e.closest(".panel")?.getBoundingClientRect() ?? { left: 0, right: innerWidth };
		return r.width > 0 && (r.right > panel.right + 1 || r.left < panel.left - 1);
	}).map(e => e.tagName + "." + e.className + " " + e.textContent.slice(0, 40))`)
	for _, s := range out {
		b.t.Errorf("%s: outside of its panel or the screen: %s", l.name, s)
	}
	// A link of one word in the corner of a panel is one line.
	for _, s := range eval[[]string](b, `[...document.querySelectorAll("article header a")].filter(e =>
		e.offsetHeight > 2 * parseFloat(getComputedStyle(e).fontSize)
	).map(e => e.getAttribute("aria-label") ?? e.textContent)`) {
		b.t.Errorf("%s: broken within a word: %s", l.name, s)
	}
}

func TestLooks(t *testing.T) {
	url := sample(t)
	for _, l := range looks {
		t.Run(l.name, func(t *testing.T) {
			b := open(t)
			b.as(l)
			b.goTo(url)
			b.fits(l)
			background := eval[string](b, "getComputedStyle(document.body).backgroundColor")
			if dark := background == "rgb(18, 20, 23)"; dark != l.dark {
				t.Errorf("the background is %s", background)
			}
			b.shot("sample-" + l.name)
			b.quiet(only(url))
		})
	}
}

// All that can be used by a mouse can be used by the keyboard, in the order in which it is
// read, and one sees where one is.
func TestKeyboard(t *testing.T) {
	url := sample(t)
	b := open(t)
	b.as(looks[3])
	b.goTo(url)
	b.do(chromedp.KeyEvent(kb.Tab))
	if class := eval[string](b, "document.activeElement.className"); class != "skip" {
		t.Errorf("the first stop is %q, not the way past the navigation", class)
	}
	if left := eval[float64](b, "document.activeElement.getBoundingClientRect().left"); left < 0 {
		t.Error("the link past the navigation stays outside of the screen")
	}
	b.do(chromedp.KeyEvent(kb.Enter))
	if id := eval[string](b, "document.activeElement.id"); id != "content" {
		t.Errorf("it leads to %q", id)
	}
	const focusable = `[...document.querySelectorAll("main a[href], main summary, main [tabindex='0'], main input, main button")].filter(e => e.checkVisibility())`
	want := eval[int](b, focusable+".length")
	if want < 20 {
		t.Fatalf("only %d places to go to", want)
	}
	for i := range want {
		b.do(chromedp.KeyEvent(kb.Tab))
		at := eval[int](b, focusable+".indexOf(document.activeElement)")
		if at != i {
			t.Fatalf("stop %d is element %d", i, at)
		}
		if style := eval[string](b, "getComputedStyle(document.activeElement).outlineStyle"); style == "none" {
			t.Errorf("stop %d: nothing shows where one is", i)
		}
	}
	eval[any](b, "document.querySelector('summary').focus()")
	b.do(chromedp.KeyEvent(kb.Enter))
	if !eval[bool](b, "document.querySelector('details').open") {
		t.Error("the table behind the chart does not open by the keyboard")
	}
	b.quiet(only(url))
}

// Each answer leads to its query, which is then on the screen, and back.
func TestQueryLinks(t *testing.T) {
	url := sample(t)
	b := open(t)
	b.as(looks[0])
	b.goTo(url)
	n := eval[int](b, "document.querySelectorAll('.panel a.query').length")
	if n < 5 {
		t.Fatalf("%d links to queries", n)
	}
	for i := range n {
		got := eval[string](b, fmt.Sprintf(`(() => {
			const link = document.querySelectorAll(".panel a.query")[%d];
			link.click();
			const target = document.querySelector(":target");
			if (!target?.querySelector("pre")?.textContent.startsWith("SELECT")) return "no query at " + link.hash;
			const box = target.getBoundingClientRect();
			if (box.top < 0 || box.top > innerHeight) return link.hash + " is not on the screen";
			target.querySelector("a").click();
			return document.querySelector(":target") === link.closest(".panel") ? "" : link.hash + " does not lead back";
		})()`, i))
		if got != "" {
			t.Error(got)
		}
	}
}

// What a screen reader is told at the width of a phone, where tables are drawn as
// lines: they are tables all the same, and charts say what they show.
func TestScreenReader(t *testing.T) {
	b := open(t)
	b.as(looks[0])
	b.goTo(sample(t))
	call(b, accessibility.Enable, cdp.Empty{})
	roles := map[string]int{}
	unnamed := map[string]int{}
	for _, n := range call(b, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{}).Nodes {
		if n.Ignored || n.Role == nil {
			continue
		}
		role := strings.Trim(string(n.Role.Value), `"`)
		roles[role]++
		if n.Name == nil || strings.Trim(string(n.Name.Value), `" `) == "" {
			unnamed[role]++
		}
	}
	for _, role := range []string{"table", "row", "rowheader", "cell", "heading", "main", "navigation", "banner", "contentinfo", "link"} {
		if roles[role] == 0 {
			t.Errorf("there is no %s: %v", role, roles)
		}
	}
	for _, role := range []string{"link", "image", "img", "heading", "region", "rowheader", "columnheader"} {
		if unnamed[role] > 0 {
			t.Errorf("%d elements of role %s have no name", unnamed[role], role)
		}
	}
	levels := eval[[]int](b, `[...document.querySelectorAll("h1, h2, h3")].map(e => Number(e.tagName[1]))`)
	for i, l := range levels {
		if i == 0 && l != 1 || i > 0 && l > levels[i-1]+1 || i > 0 && l == 1 {
			t.Errorf("headings %v: one is left out", levels)
			break
		}
	}
	if lang := eval[string](b, "document.documentElement.lang"); lang != "en" {
		t.Errorf("language %q", lang)
	}
}

func TestPaper(t *testing.T) {
	url := sample(t)
	b := open(t)
	b.goTo(url)
	pdf, err := chromedp.Run(b.ctx, chromedp.PrintToPDF(chromedp.PDFPreferCSSPageSize(), chromedp.PDFOutlineAndTagged()))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(pdf), "%PDF-") || len(pdf) < 10_000 {
		t.Errorf("%d bytes that are no document", len(pdf))
	}
	b.keep("sample.pdf", pdf)
	// On paper there is nothing to click, and everything is on white, in a dark room too.
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Media: "print", Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}}})
	call(b, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: 690, Height: 1000, DeviceScaleFactor: 1})
	b.fits(look{name: "paper", width: 690})
	if got := eval[string](b, "getComputedStyle(document.body).backgroundColor"); got != "rgb(255, 255, 255)" {
		t.Errorf("paper is %s", got)
	}
	hidden := eval[[]bool](b, `[".sections", ".query", "details"].map(s => document.querySelector(s).checkVisibility())`)
	if slices.Contains(hidden, true) {
		t.Errorf("what can only be clicked is printed: %v", hidden)
	}
	b.shot("sample-paper")
	b.quiet(only(url))
}
