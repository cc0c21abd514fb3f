package serve

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// account is an account that notes what it is asked.
type account struct {
	mu      sync.Mutex
	state   string
	err     error
	asked   []panels.Filter
	kinds   []string
	now     int // pages being made
	most    int
	started chan struct{} // gets a value when a page is begun, where it is set
	hold    chan struct{} // pages wait for its end, where it is set
}

func (a *account) Refresh(context.Context) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state, a.err
}

func (a *account) Page(ctx context.Context, f panels.Filter, kind string) (page.Page, error) {
	a.mu.Lock()
	a.asked, a.kinds = append(a.asked, f), append(a.kinds, kind)
	a.now++
	a.most = max(a.most, a.now)
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.now--
		a.mu.Unlock()
	}()
	if a.started != nil {
		a.started <- struct{}{}
	}
	if a.hold != nil {
		select {
		case <-a.hold:
		case <-ctx.Done():
			return page.Page{}, ctx.Err()
		}
	}
	return page.Page{Title: "Account"}, nil
}

var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func handler(a *account) *Handler {
	return New(a, Options{Kinds: []string{"event", "invocation"}, Hosts: []string{"desk.example"}, Now: func() time.Time { return noon }})
}

func get(h http.Handler, host, target string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.Host = host
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// A page of another site cannot read the account through a name that it made
// resolve to this machine.
func TestHost(t *testing.T) {
	for host, want := range map[string]int{
		"127.0.0.1:8080": 200, "127.0.0.1": 200, "[::1]:8080": 200, "localhost:1": 200, "LOCALHOST": 200, "desk.example:80": 200, "192.0.2.7:8080": 200,
		"evil.example": 421, "evil.example:8080": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421, "": 421, "xlocalhost": 421, "desk.example.evil": 421,
	} {
		a := &account{}
		if w := get(handler(a), host, "/"); w.Code != want {
			t.Errorf("Host %q: %d, want %d", host, w.Code, want)
		} else if want != 200 && len(a.asked) != 0 {
			t.Errorf("Host %q: the account was asked", host)
		}
	}
}

func TestMethodsAndPaths(t *testing.T) {
	h := handler(&account{})
	for _, tt := range []struct {
		method, path string
		want         int
	}{{"GET", "/", 200}, {"HEAD", "/", 200}, {"POST", "/", 405}, {"DELETE", "/", 405}, {"OPTIONS", "/", 405}, {"GET", "/etc/passwd", 404}, {"GET", "//", 404}, {"GET", "/favicon.ico", 404}} {
		r := httptest.NewRequest(tt.method, "http://localhost"+tt.path, nil)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.want {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, w.Code, tt.want)
		}
		if tt.method == "HEAD" && w.Body.Len() != 0 {
			t.Error("HEAD has a body")
		}
		for _, name := range []string{"Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy", "Cross-Origin-Resource-Policy"} {
			if w.Header().Get(name) == "" {
				t.Errorf("%s %s: no %s", tt.method, tt.path, name)
			}
		}
		if w.Header().Get("Cache-Control") != "no-store" {
			t.Error("the account may be kept by others")
		}
	}
}

func TestFilters(t *testing.T) {
	day := func(n int) time.Time { return noon.Truncate(24*time.Hour).AddDate(0, 0, n) }
	for _, tt := range []struct {
		query string
		want  panels.Filter
		kind  string
		note  string
	}{
		{"", panels.Filter{}, "", ""},
		{"?from=2026-11-18&to=2026-11-19", panels.Filter{From: day(-2), To: day(-1)}, "", ""},
		{"?from=24h", panels.Filter{From: noon.Add(-24 * time.Hour)}, "", ""},
		{"?repository=acme%2Fshop&workflow=CI%3A+build%2C+test&image=alpine&kind=event", panels.Filter{Repository: "acme/shop", Workflow: "CI: build, test", Image: "alpine"}, "event", ""},
		{"?from=yesterday", panels.Filter{}, "", "is no time"},
		{"?from=2026-11-19&to=2026-11-18", panels.Filter{}, "", "time range is empty"},
		{"?kind=secrets", panels.Filter{}, "", "There is no kind secrets"},
		{"?repository=" + strings.Repeat("a", 301), panels.Filter{}, "", "holds more than names can hold"},
		{"?repository=a%00b", panels.Filter{}, "", "holds more than names can hold"},
		{"?workflow=%E2%80%AEgnp", panels.Filter{}, "", "holds more than names can hold"},
		{"?image=%ff", panels.Filter{}, "", "holds more than names can hold"},
		{"?image=%zz", panels.Filter{}, "", "cannot be read"},
		{"?other=1", panels.Filter{}, "", ""},
	} {
		a := &account{}
		w := get(handler(a), "localhost", "/"+tt.query)
		if w.Code != 200 || len(a.asked) != 1 || a.asked[0] != tt.want || a.kinds[0] != tt.kind {
			t.Errorf("%s: %d, asked %v of kind %q, want %v of kind %q", tt.query, w.Code, a.asked, a.kinds, tt.want, tt.kind)
		}
		if says := strings.Contains(w.Body.String(), `role="status"`); says != (tt.note != "") || !strings.Contains(w.Body.String(), tt.note) {
			t.Errorf("%s: the page does not say %q, or says more", tt.query, tt.note)
		}
	}
}

// A page that looks again gets a new text only where there is something new.
func TestTags(t *testing.T) {
	a := &account{state: "1"}
	h := handler(a)
	first := get(h, "localhost", "/?repository=a")
	tag := first.Header().Get("ETag")
	if tag == "" {
		t.Fatal("no tag")
	}
	if w := get(h, "localhost", "/?repository=a", "If-None-Match", tag); w.Code != http.StatusNotModified || w.Body.Len() != 0 {
		t.Errorf("nothing changed: %d", w.Code)
	}
	if w := get(h, "localhost", "/?repository=b", "If-None-Match", tag); w.Code != 200 {
		t.Errorf("another filter: %d", w.Code)
	}
	if len(a.asked) != 2 {
		t.Errorf("the account was asked %d times for two filters", len(a.asked))
	}
	a.state = "2"
	if w := get(h, "localhost", "/?repository=a", "If-None-Match", tag); w.Code != 200 || w.Header().Get("ETag") == tag {
		t.Errorf("something new: %d", w.Code)
	}
	for i := range 3 * maxKept {
		get(h, "localhost", "/?repository="+strings.Repeat("x", i+1))
	}
	if len(h.kept) > maxKept {
		t.Errorf("%d pages are kept", len(h.kept))
	}
	a.err = errors.New("disk\x1b[31m on fire")
	if w := get(h, "localhost", "/"); w.Code != 500 || !strings.Contains(w.Body.String(), `disk\x1b[31m on fire`) {
		t.Errorf("%d %q", w.Code, w.Body)
	}
}

// However many ask, two pages are made at a time, some wait, and the rest is told to come again.
func TestBusy(t *testing.T) {
	a := &account{started: make(chan struct{}, 100), hold: make(chan struct{})}
	h := handler(a)
	const asking = maxAtOnce + maxWaiting
	codes := make(chan int, asking)
	for i := range asking {
		go func() { codes <- get(h, "localhost", "/?repository="+strings.Repeat("x", i+1)).Code }()
	}
	for range maxAtOnce {
		<-a.started
	}
	for deadline := time.Now().Add(time.Minute); len(h.waiting) < asking; { // all of them wait now
		if time.Now().After(deadline) {
			t.Fatal("requests do not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	if w := get(h, "localhost", "/"); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("one more: %d", w.Code)
	}
	close(a.hold)
	for range asking {
		if code := <-codes; code != 200 {
			t.Errorf("who waited got %d", code)
		}
	}
	if a.most > maxAtOnce {
		t.Errorf("%d pages were made at once", a.most)
	}
}

func TestListen(t *testing.T) {
	for address, ok := range map[string]bool{
		"127.0.0.1:0": true, "localhost:0": true, "127.8.9.10:0": true,
		"0.0.0.0:0": false, ":0": false, "[::]:0": false, "192.0.2.1:0": false, "example.com:0": false, "127.0.0.1": false, "": false,
	} {
		l, err := Listen(t.Context(), address, false)
		if (err == nil) != ok {
			t.Errorf("Listen(%q): %v", address, err)
		}
		if err == nil {
			l.Close()
		}
	}
	if _, err := Listen(t.Context(), "0.0.0.0:0", false); !errors.Is(err, ErrNotLoopback) {
		t.Errorf("%v is not ErrNotLoopback", err)
	}
}

// A request that runs when the server is asked to stop gets its page; one that would
// take too long is cut, and so is its query.
func TestShutdown(t *testing.T) {
	for _, finishes := range []bool{true, false} {
		a := &account{started: make(chan struct{}, 1), hold: make(chan struct{})}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		grace := time.Minute
		if !finishes {
			grace = time.Millisecond
		}
		go func() { done <- run(ctx, l, handler(a), grace) }()
		body := make(chan string, 1)
		go func() {
			c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			r, err := c.Get("http://" + l.Addr().String())
			if err != nil {
				body <- ""
				return
			}
			defer r.Body.Close()
			text, _ := io.ReadAll(r.Body)
			body <- string(text)
		}()
		<-a.started
		stop()
		if finishes {
			close(a.hold)
		}
		if err := <-done; err != nil {
			t.Errorf("finishes %v: %v", finishes, err)
		}
		if got := <-body; strings.Contains(got, "</html>") != finishes {
			t.Errorf("finishes %v: %d bytes", finishes, len(got))
		}
	}
}

// Whatever stands behind the question mark, there is an answer, and its filters hold
// nothing that is not plain text.
func FuzzQuery(f *testing.F) {
	f.Add("from=24h&repository=a%2Fb&kind=event")
	f.Add("image=%E2%80%AE%00&workflow=%zz&to=2026-11-18;x=1")
	f.Fuzz(func(t *testing.T, query string) {
		a := parse(query, []string{"event"}, noon)
		for _, s := range []string{a.filter.Repository, a.filter.Workflow, a.filter.Image, a.kind} {
			if len(s) > maxText || slices.ContainsFunc([]rune(s), func(r rune) bool {
				return r < ' ' || r == 0xfffd && !strings.Contains(query, "%EF%BF%BD") && !strings.Contains(query, "\ufffd")
			}) {
				t.Errorf("%q gives the filter %q", query, s)
			}
		}
		again := parse(a.query.Encode(), []string{"event"}, noon)
		if again.filter != a.filter || again.kind != a.kind || len(again.notes) != 0 {
			t.Errorf("%q: what was understood is understood in another way", query)
		}
	})
}
