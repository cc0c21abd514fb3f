package browser

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// desk is the program, built once.
var desk = sync.OnceValues(func() (string, error) {
	name := filepath.Join(scratch, "tallyman-desk")
	build := exec.Command("go", "build", "-o", name, "./cmd/tallyman-desk")
	build.Dir = filepath.Join("..", "..")
	build.Stderr = os.Stderr
	return name, build.Run()
})

func program(t *testing.T) string {
	t.Helper()
	name, err := desk()
	if err != nil {
		t.Fatal("build tallyman-desk:", err)
	}
	return name
}

func report(t *testing.T, args ...string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "page.html")
	cmd := exec.Command(program(t), append([]string{"report", "--html", name}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return name
}

var (
	repositories = []string{"acme/shop", "acme/billing", "acme/web", "acme/platform", "acme/data-pipelines", "acme/mobile-app", "acme/infra", "acme/docs", "acme/search", "acme/ml-training-and-evaluation", "acme/auth", "acme/a", "acme/b", "acme/c", "acme/d", "acme/e", "acme/f"}
	workflows    = []string{"CI: build, test", "Nightly", "Release", "Scan images"}
)

// The page of a fleet, at all widths, light and dark.
func TestReport(t *testing.T) {
	name := report(t, write(t, 600, repositories, workflows))
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(text) > 1_000_000 {
		t.Errorf("the page has %d bytes", len(text))
	}
	for _, want := range []string{"acme/shop", "CI: build, test", "docker pull"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("the page does not show %s", want)
		}
	}
	url := "file://" + name
	for _, l := range []look{looks[0], looks[2], looks[3], looks[4]} {
		t.Run(l.name, func(t *testing.T) {
			b := open(t)
			b.as(l)
			b.goTo(url)
			b.fits(l)
			if said := eval[[]string](b, `[...document.querySelectorAll(".alert")].map(e => e.textContent)`); len(said) > 0 {
				t.Errorf("answers that could not be had: %v", said)
			}
			b.shot("report-" + l.name)
			b.quiet(only(url))
		})
	}
	t.Run("widths", func(t *testing.T) {
		b := open(t)
		for _, width := range []int64{360, 545, 640, 768, 900, 960, 1024, 1440, 1920} {
			l := look{name: fmt.Sprint(width), width: width, height: 900}
			b.as(l)
			b.goTo(url)
			b.fits(l)
		}
		b.quiet(only(url))
	})
}

// One record is enough for a page: figures of one, one column in time, no division by nothing.
func TestOneRecord(t *testing.T) {
	name := filepath.Join(t.TempDir(), "one.jsonl")
	const one = `{"id":"01993000-0000-7000-8000-000000000002","ts":"2026-11-01T08:00:01.5Z","kind":"invocation","schema":1,"by":"sealed","ci":{"repository":"acme/shop","workflow":"CI","job":"test","run_id":"1"},"host":{"name":"r1"},"invocation":{"tool":"docker","command":"pull","images":["alpine"],"argc":3,"pid":1,"ppid":1,"uid":1}}`
	if err := os.WriteFile(name, []byte(one+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	url := "file://" + report(t, name)
	for _, l := range []look{looks[2], looks[3]} {
		b := open(t)
		b.as(l)
		b.goTo(url)
		b.fits(l)
		if text := eval[string](b, "document.body.innerText"); regexp.MustCompile(`\bNaN|\bInf\b`).MatchString(text) || !strings.Contains(text, "acme/shop") {
			t.Errorf("the page of one record: %s", text)
		}
		if n := eval[int](b, `document.querySelectorAll("#activity svg rect.s1, #activity svg rect.quiet").length`); n == 0 {
			t.Error("the one call is not in the chart")
		}
		b.shot("one-" + l.name)
		b.quiet(only(url))
	}
}

// Whoever caused imported requests is ranked on the page, with verdict, interval and evidence,
// and readable at all widths.
func TestSuspects(t *testing.T) {
	name := report(t, writeRequested(t, 900))
	url := "file://" + name
	for _, l := range []look{looks[1], looks[2], looks[3], {name: "tablet-light", width: 768, height: 1024}} {
		t.Run(l.name, func(t *testing.T) {
			b := open(t)
			b.as(l)
			b.goTo(url)
			b.fits(l)
			if first := eval[string](b, `document.querySelector("#suspects tbody th .main").textContent`); first != "acme/billing" {
				t.Errorf("the first suspect is %s", first)
			}
			if verdict := eval[string](b, `document.querySelector("#suspects .verdict").textContent`); strings.Contains(verdict, "Nobody") {
				t.Errorf("the verdict: %s", verdict)
			}
			b.shot("suspects-" + l.name)
			b.quiet(only(url))
		})
	}
}

// Names that others chose run nothing, fetch nothing and stay in their place.
func TestHostileReport(t *testing.T) {
	bad := []string{
		`</script><script>alert(1)</script>`, `"><img src=x onerror=alert(2)>`, `<svg onload=alert(3)>`, "a/\u202egnp.exe", "a/\u2066b", "\x1b[31mred\x00", `'); DROP TABLE records; --`, "javascript:alert(4)",
		strings.Repeat("wide/", 4000), strings.Repeat("W", 20000), "עברית/مثال", "{{.}}${x}", "https://evil.example/?" + strings.Repeat("a", 300),
	}
	name := report(t, write(t, 200, bad, bad))
	url := "file://" + name
	for _, l := range []look{looks[2], looks[4]} {
		b := open(t)
		b.as(l)
		b.goTo(url)
		b.fits(l)
		if n := eval[int](b, `document.querySelectorAll("script, img, iframe, object, embed, link, [onload], [onerror]").length`); n != 0 {
			t.Errorf("%d elements that the page does not make", n)
		}
		if turned := eval[bool](b, `/[\u202a-\u202e\u2066-\u2069]/.test(document.documentElement.outerHTML)`); turned {
			t.Error("a name can turn the direction of what stands around it")
		}
		b.shot("hostile-" + l.name)
		b.quiet(only(url))
	}
}

// A journal without records gives a page that says so, and what to do.
func TestEmptyReport(t *testing.T) {
	name := filepath.Join(t.TempDir(), "empty.jsonl")
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	url := "file://" + report(t, name)
	b := open(t)
	b.as(looks[3])
	b.goTo(url)
	n, all := eval[int](b, `document.querySelectorAll(".empty").length`), eval[int](b, `document.querySelectorAll("#content > .group > div > .panel").length`)
	if n == 0 || n < all-1 { // all but that of the trust
		t.Errorf("%d of %d panels say that nothing was recorded", n, all)
	}
	b.shot("empty-desk")
	b.quiet(only(url))
}
