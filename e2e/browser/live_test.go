package browser

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// live starts the live server on a journal and returns its address.
func live(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(program(t), append([]string{"serve", "--every", "1s"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server did not end well: %v", err)
		}
	})
	url, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("no address: %v", err)
	}
	return strings.TrimSpace(url)
}

// until waits for an expression to be true.
func (b *tab) until(what, expression string) {
	b.t.Helper()
	for deadline := time.Now().Add(patience); !eval[bool](b, expression); {
		if time.Now().After(deadline) {
			b.t.Fatalf("%s: not within %s", what, patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

const figure = `[...document.querySelectorAll("#totals dl > div")].find(e => e.querySelector("dt").textContent === "docker calls")?.querySelector("dd").textContent`

// What is recorded while the page is open comes onto it by itself, without a new load,
// and leaves alone what its reader opened.
func TestLive(t *testing.T) {
	journal := write(t, 60, repositories, workflows)
	address := live(t, journal)
	b := open(t)
	b.as(looks[3])
	b.goTo(address)
	before := eval[string](b, figure)
	eval[any](b, `window.stays = true; document.querySelector("details").open = true; document.querySelector("#activity .query").focus()`)

	more, err := os.Open(write(t, 61, repositories, workflows)) // the same 60 jobs, and one more
	if err != nil {
		t.Fatal(err)
	}
	defer more.Close()
	f, err := os.OpenFile(journal, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, more); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b.until("the new job's calls", fmt.Sprintf("%s !== %q", figure, before))
	for what, expression := range map[string]string{
		"the page was loaded again":     "window.stays === true",
		"an open table was closed":      `document.querySelector("details").open`,
		"the focus was lost":            `document.activeElement.matches("#activity .query")`,
		"an answer could not be had":    `!document.querySelector(".alert")`,
		"records were counted twice":    fmt.Sprintf(`Number(%s.replaceAll(",", "")) < 1.5 * Number(%q.replaceAll(",", ""))`, figure, before),
		"the address of a live page":    `location.search === ""`,
		"the filters are not there":     `document.querySelectorAll("form.filters input").length === 5`,
		"the kinds are not to choose":   `document.querySelectorAll("form.filters option").length > 3`,
		"the script is not the page's":  `document.scripts.length === 1`,
		"a table of the phone is there": `getComputedStyle(document.querySelector(".rows thead")).position !== "absolute"`,
	} {
		if !eval[bool](b, expression) {
			t.Error(what)
		}
	}
	b.shot("live-desk")
	b.quiet(func(u string) bool { return strings.HasPrefix(u, address) })
}

// Filters stand in the address, by a click on a name and by the form.
func TestLiveFilters(t *testing.T) {
	address := live(t, write(t, 60, repositories, workflows))
	b := open(t)
	b.as(looks[0])
	b.goTo(address)
	all := eval[string](b, figure)
	click := func(expression string) {
		t.Helper()
		// The answer comes with the next page, so it is waited for there.
		eval[any](b, "window.old = true; "+expression+"; null")
		b.until("the next page", `window.old === undefined && document.readyState === "complete"`)
	}
	click(`[...document.querySelectorAll("#repositories th a")].find(a => a.textContent === "acme/shop").click()`)
	if search := eval[string](b, "location.search"); search != "?repository=acme%2Fshop" {
		t.Errorf("a click on a name leads to %s", search)
	}
	one := eval[string](b, figure)
	if one == all || one == "0" {
		t.Errorf("%s calls of one repository, %s of all", one, all)
	}
	if got := eval[[]string](b, `[...document.querySelectorAll("#repositories tbody th .main")].map(e => e.textContent)`); len(got) != 1 || got[0] != "acme/shop" {
		t.Errorf("the page of one repository shows %v", got)
	}
	click(`document.querySelector("input[name=workflow]").value = "Night*"; document.querySelector("select[name=kind]").value = "invocation"; document.querySelector("form.filters").requestSubmit()`)
	for name, want := range map[string]string{"repository": "acme/shop", "workflow": "Night*", "kind": "invocation"} {
		if got := eval[string](b, fmt.Sprintf(`new URLSearchParams(location.search).get(%q)`, name)); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
		if got := eval[string](b, fmt.Sprintf(`document.querySelector("[name=%s]").value`, name)); got != want {
			t.Errorf("the form shows %q for %s", got, name)
		}
	}
	if eval[bool](b, `!!document.querySelector("#pulled-images")`) {
		t.Error("a page of calls shows events")
	}
	b.fits(looks[0])
	b.shot("live-phone")
	eval[any](b, "history.back(); null")
	b.until("the page before", `location.search === "?repository=acme%2Fshop"`)
	click(`document.querySelector(".reset").click()`)
	if got := eval[string](b, figure); got != all {
		t.Errorf("%s calls without filters, %s at first", got, all)
	}
	b.quiet(func(u string) bool { return strings.HasPrefix(u, address) })
}
