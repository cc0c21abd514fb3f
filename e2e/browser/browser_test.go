// Package browser opens the page of tallyman-desk in a headless Chromium and looks
// at it as people do: at widths of a phone and of a desk, light and dark, by keyboard,
// on paper. It is a module of its own, so that the browser's driver is no
// dependency of Tallyman.
//
// Chromium is Debian's or Ubuntu's; make setup installs it. Screenshots and PDFs stay in
// TALLYMAN_SCREENSHOTS where that is set.
package browser

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// patience is far above what anything here takes on a slow machine.
const patience = 2 * time.Minute

// scratch is a folder for the time of the tests.
var scratch string

// chromium is the one browser of all tests; each test has a tab of its own in it.
var chromium context.Context

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	path := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	if path == "" {
		const how = "no Chromium here: make setup installs it (apt-get install chromium)"
		if os.Getenv("CI") == "true" {
			fmt.Fprintln(os.Stderr, how)
			return 1
		}
		fmt.Fprintf(os.Stderr, "\n*** browser tests SKIPPED: %s ***\n\n", how)
		return 0
	}
	// The browser's profile and the program that is tested.
	var err error
	scratch, err = os.MkdirTemp("", "tallyman-browser-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path),
		chromedp.UserDataDir(filepath.Join(scratch, "profile")),
		// Containers and root have no user name spaces for Chromium's sandbox. The pages
		// are our own, and nothing is fetched.
		chromedp.NoSandbox,
		chromedp.Flag("disable-dev-shm-usage", true),
	)
	alloc, stopAlloc := chromedp.NewExecAllocator(context.Background(), options...)
	defer stopAlloc()
	ctx, stop := chromedp.NewContext(alloc)
	defer stop()
	if err := chromedp.Do(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "start Chromium:", err)
		return 1
	}
	chromium = ctx
	code := m.Run()
	// Cancel waits for the browser's end, so that nothing of it outlives the tests.
	if err := chromedp.Cancel(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "end Chromium:", err)
		code = 1
	}
	return code
}

// tab is a tab that keeps what the page said and asked for.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu       sync.Mutex
	said     []string // errors and warnings of the console, exceptions, dialogs
	requests []string // everything that was asked of any server or file
}

func open(t *testing.T) *tab {
	t.Helper()
	ctx, stop := chromedp.NewContext(chromium)
	t.Cleanup(stop)
	ctx, cancel := context.WithTimeout(ctx, patience)
	t.Cleanup(cancel)
	b := &tab{t: t, ctx: ctx}
	b.do() // makes the tab
	if err := chromedp.Listen(ctx, b.hear); err != nil {
		t.Fatal(err)
	}
	call(b, log.Enable, cdp.Empty{})
	call(b, network.Enable, network.EnableParams{})
	call(b, runtime.Enable, cdp.Empty{})
	return b
}

// hear keeps what the tab tells; it must not wait.
func (b *tab) hear(e any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e := e.(type) {
	case *runtime.EventConsoleAPICalled:
		words := []string{"console." + string(e.Type)}
		for _, a := range e.Args {
			words = append(words, string(a.Value), a.Description)
		}
		b.said = append(b.said, strings.Join(words, " "))
	case *runtime.EventExceptionThrown:
		b.said = append(b.said, "exception: "+e.ExceptionDetails.Text)
	case *log.EventEntryAdded:
		b.said = append(b.said, fmt.Sprintf("%s %s: %s %s", e.Entry.Source, e.Entry.Level, e.Entry.Text, e.Entry.URL))
	case *page.EventJavascriptDialogOpening:
		b.said = append(b.said, "dialog: "+e.Message)
	case *network.EventRequestWillBeSent:
		b.requests = append(b.requests, e.Request.URL)
	}
}

func (b *tab) do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, actions...); err != nil {
		b.t.Fatal(err)
	}
}

func call[P, R any](b *tab, c cdp.Command[P, R], params P) R {
	b.t.Helper()
	out, err := chromedp.Call(b.ctx, c, params)
	if err != nil {
		b.t.Fatalf("%s: %v", c.Method, err)
	}
	return out
}

// eval is the value of an expression on the page.
func eval[T any](b *tab, expression string) T {
	b.t.Helper()
	out, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		b.t.Fatalf("%s: %v", expression, err)
	}
	return out
}

// look is how the page is looked at.
type look struct {
	name   string
	width  int64
	height int64
	dark   bool
	phone  bool
}

var looks = []look{
	{"phone-light", 390, 844, false, true},
	{"phone-dark", 390, 844, true, true},
	{"small-light", 320, 568, false, true},
	{"desk-light", 1280, 900, false, false},
	{"desk-dark", 1280, 900, true, false},
}

func (b *tab) as(l look) {
	b.t.Helper()
	scheme := "light"
	if l.dark {
		scheme = "dark"
	}
	call(b, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: l.width, Height: l.height, DeviceScaleFactor: 1, Mobile: l.phone})
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
}

// goTo loads a page and waits for it.
func (b *tab) goTo(url string) {
	b.t.Helper()
	b.do(chromedp.Navigate(url))
	if state := eval[string](b, "document.readyState"); state != "complete" {
		b.t.Fatalf("%s: the page is %s", url, state)
	}
}

// shot keeps a picture of the whole page where pictures are wanted: they take longer
// than all the rest.
func (b *tab) shot(name string) {
	b.t.Helper()
	if os.Getenv("TALLYMAN_SCREENSHOTS") == "" {
		return
	}
	png, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	if err != nil {
		b.t.Fatal(err)
	}
	b.keep(name+".png", png)
}

func (b *tab) keep(name string, data []byte) {
	b.t.Helper()
	dir := os.Getenv("TALLYMAN_SCREENSHOTS")
	if dir == "" {
		dir = b.t.TempDir()
	}
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// quiet fails the test where the page said or asked anything that it was not to.
func (b *tab) quiet(allowed func(url string) bool) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.said {
		b.t.Error(s)
	}
	for _, r := range b.requests {
		if !allowed(r) {
			b.t.Errorf("the page asked for %s", r)
		}
	}
}
