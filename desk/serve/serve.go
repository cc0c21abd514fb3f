// Package serve shows the account live on this machine: the same page as a report, made
// again from what was recorded since, with its filters in the URL.
//
// The account names people's repositories and images, so only this machine may look: the
// server listens on loopback, and asks for a Host header that no web page on
// another site can make a browser send. (A name of theirs that suddenly resolves to
// 127.0.0.1 is the usual way in: DNS rebinding.) It only reads, and has no state of its
// own but the last pages.
package serve

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/report"
)

// Account makes pages. Its methods are called by several requests at once.
type Account interface {
	// Refresh takes in what was recorded since the last call, and returns a text
	// that is another one whenever answers could be other ones.
	Refresh(ctx context.Context) (string, error)
	// Page answers the panels of a kind (all where it is empty) for a filter.
	Page(ctx context.Context, f panels.Filter, kind string) (page.Page, error)
}

// Options of a server.
type Options struct {
	// Every is the time between two looks of a page that is open.
	Every time.Duration
	// Hosts are names besides localhost by which the server may be called.
	Hosts []string
	// Kinds are the kinds that can be chosen.
	Kinds []string
	Log   *slog.Logger
	Now   func() time.Time
}

const (
	// maxAtOnce is how many pages are made at the same time: a query uses all cores.
	maxAtOnce = 2
	// maxWaiting is how many requests wait for that; more are sent away.
	maxWaiting = 16
	// maxKept is how many pages are kept for those who ask again before anything changed.
	maxKept = 8
	// maxText bounds the text of a filter, in bytes.
	maxText = 300
)

// Handler serves pages.
type Handler struct {
	account Account
	o       Options
	making  chan struct{}
	waiting chan struct{}

	mu   sync.Mutex
	kept []kept // oldest first
}

type kept struct {
	tag  string
	html []byte
}

// New makes a handler.
func New(a Account, o Options) *Handler {
	if o.Every <= 0 {
		o.Every = 5 * time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Handler{account: a, o: o, making: make(chan struct{}, maxAtOnce), waiting: make(chan struct{}, maxAtOnce+maxWaiting)}
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	head := w.Header()
	head.Set("Cache-Control", "no-store")
	head.Set("Content-Security-Policy", page.Policy(true)+"; frame-ancestors 'none'")
	head.Set("Cross-Origin-Opener-Policy", "same-origin")
	head.Set("Cross-Origin-Resource-Policy", "same-origin")
	head.Set("Referrer-Policy", "no-referrer")
	head.Set("X-Content-Type-Options", "nosniff")
	switch {
	case !h.knownHost(r.Host):
		http.Error(w, "This server does not answer to that name. Call it by its address, or by localhost (--host NAME allows more names).", http.StatusMisdirectedRequest)
		return
	case r.URL.Path != "/":
		http.NotFound(w, r)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		head.Set("Allow", "GET, HEAD")
		http.Error(w, "This server only answers GET and HEAD.", http.StatusMethodNotAllowed)
		return
	}
	html, tag, err := h.inTurn(r.Context(), r.URL.RawQuery)
	switch {
	case r.Context().Err() != nil:
		return // nobody listens any more
	case errors.Is(err, errBusy):
		head.Set("Retry-After", "2")
		http.Error(w, "Too many are asking at once; try again in a moment.", http.StatusServiceUnavailable)
		return
	case err != nil:
		h.o.Log.Error("make a page", "error", err)
		http.Error(w, "The account could not be read: "+report.Safe(err.Error()), http.StatusInternalServerError)
		return
	}
	head.Set("ETag", tag)
	if r.Header.Get("If-None-Match") == tag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	head.Set("Content-Type", "text/html; charset=utf-8")
	if r.Method == http.MethodHead {
		return
	}
	if _, err := w.Write(html); err != nil {
		h.o.Log.Debug("send a page", "error", err)
	}
}

var errBusy = errors.New("too many requests")

// inTurn makes a page when its turn has come.
func (h *Handler) inTurn(ctx context.Context, query string) (html []byte, tag string, err error) {
	select {
	case h.waiting <- struct{}{}:
		defer func() { <-h.waiting }()
	default:
		return nil, "", errBusy
	}
	select {
	case h.making <- struct{}{}:
		defer func() { <-h.making }()
	case <-ctx.Done():
		return nil, "", ctx.Err()
	}
	return h.page(ctx, query)
}

// knownHost says whether a Host header names this server: an address (which
// cannot be rebound), localhost, or a name that was allowed.
func (h *Handler) knownHost(host string) bool {
	name := host
	if n, _, err := net.SplitHostPort(host); err == nil {
		name = n
	}
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return true
	}
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	return name == "localhost" || slices.ContainsFunc(h.o.Hosts, func(s string) bool { return strings.EqualFold(s, name) })
}

// page is the page for a URL's query, kept or made.
func (h *Handler) page(ctx context.Context, query string) (html []byte, tag string, err error) {
	state, err := h.account.Refresh(ctx)
	if err != nil {
		return nil, "", err
	}
	now := h.o.Now().UTC()
	ask := parse(query, h.o.Kinds, now)
	if ask.moving { // a range that ends now moves, but not faster than the page looks
		state += now.Truncate(h.o.Every).String()
	}
	sum := sha256.Sum256([]byte(state + "\x00" + query))
	tag = `"` + hex.EncodeToString(sum[:16]) + `"`
	h.mu.Lock()
	for _, k := range h.kept {
		if k.tag == tag {
			h.mu.Unlock()
			return k.html, tag, nil
		}
	}
	h.mu.Unlock()
	p, err := h.account.Page(ctx, ask.filter, ask.kind)
	if err != nil {
		return nil, "", err
	}
	p.Generated = now
	p.Filter = ask.filter
	p.Live = &page.Live{Every: h.o.Every, Query: ask.query.Encode(), Form: ask.form(h.o.Kinds), Notes: ask.notes}
	var b bytes.Buffer
	if err := page.Render(&b, p); err != nil {
		return nil, "", err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.kept) == maxKept {
		h.kept = slices.Delete(h.kept, 0, 1)
	}
	h.kept = append(h.kept, kept{tag, b.Bytes()})
	return b.Bytes(), tag, nil
}

// ask is what a URL asks for.
type ask struct {
	filter panels.Filter
	kind   string
	query  url.Values // only what was understood
	notes  []string   // what was not
	moving bool       // the range depends on the time of asking
}

// parse reads a URL's query. What it does not understand it says and leaves out.
func parse(raw string, kinds []string, now time.Time) ask {
	a := ask{query: url.Values{}}
	values, err := url.ParseQuery(raw)
	if err != nil {
		a.notes = append(a.notes, "A part of the address cannot be read and was left out.")
	}
	take := func(name string) string {
		v := strings.TrimSpace(values.Get(name))
		switch {
		case v == "":
			return ""
		case len(v) > maxText || !utf8.ValidString(v) || strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }):
			a.notes = append(a.notes, "The filter "+name+" holds more than names can hold, and was left out.")
			return ""
		}
		return v
	}
	for name, field := range map[string]*time.Time{"from": &a.filter.From, "to": &a.filter.To} {
		v := take(name)
		t, err := report.ParseTime(v, now)
		if err != nil {
			a.notes = append(a.notes, "The filter "+name+" was left out: "+err.Error()+".")
			continue
		}
		*field = t
		if v != "" {
			a.query.Set(name, v)
			_, long := time.Parse(time.RFC3339, v)
			_, day := time.Parse(time.DateOnly, v)
			a.moving = a.moving || long != nil && day != nil
		}
	}
	if f := a.filter; !f.From.IsZero() && !f.To.IsZero() && !f.From.Before(f.To) {
		a.notes = append(a.notes, "The time range is empty, and was left out.")
		a.filter.From, a.filter.To = time.Time{}, time.Time{}
		a.query.Del("from")
		a.query.Del("to")
	}
	for name, field := range map[string]*string{"repository": &a.filter.Repository, "workflow": &a.filter.Workflow, "image": &a.filter.Image} {
		if v := take(name); v != "" {
			*field = v
			a.query.Set(name, v)
		}
	}
	if v := take("kind"); v != "" {
		if !slices.Contains(kinds, v) {
			a.notes = append(a.notes, "There is no kind "+v+": it is one of "+strings.Join(kinds, ", ")+".")
		} else {
			a.kind = v
			a.query.Set("kind", v)
		}
	}
	slices.Sort(a.notes)
	return a
}

func (a *ask) form(kinds []string) []page.Field {
	return []page.Field{
		{Name: "from", Label: "From (UTC)", Value: a.query.Get("from"), Hint: "24h, 7d, 2026-03-01"},
		{Name: "to", Label: "To (UTC)", Value: a.query.Get("to"), Hint: "now"},
		{Name: "repository", Label: "Repository", Value: a.query.Get("repository"), Hint: "owner/name"},
		{Name: "workflow", Label: "Workflow", Value: a.query.Get("workflow"), Hint: "any"},
		{Name: "image", Label: "Image", Value: a.query.Get("image"), Hint: "any"},
		{Name: "kind", Label: "Kind", Value: a.query.Get("kind"), Options: append([]string{""}, kinds...)},
	}
}

// ErrNotLoopback is returned by Listen for an address that others can reach.
var ErrNotLoopback = errors.New("others could read the account there")

// Listen opens the server's port. Unless remote is set, only loopback addresses will do.
func Listen(ctx context.Context, address string, remote bool) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w (write 127.0.0.1:8080; port 0 takes a free one)", address, err)
	}
	if host == "localhost" {
		host = "127.0.0.1" // without asking a resolver
	}
	if !remote {
		ip, err := netip.ParseAddr(host)
		if err != nil || !ip.Unmap().IsLoopback() {
			return nil, fmt.Errorf("listen on %q: %w; it names repositories, workflows and images, and the server asks nobody who they are (--allow-remote does it all the same)", address, ErrNotLoopback)
		}
	}
	var lc net.ListenConfig
	return lc.Listen(ctx, "tcp", net.JoinHostPort(host, port))
}

// Run serves until ctx ends, and then gives requests a moment to finish.
func Run(ctx context.Context, l net.Listener, h http.Handler) error {
	return run(ctx, l, h, 5*time.Second)
}

func run(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration) error {
	// Queries of requests that are cut off in the end must end too.
	base, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	server := &http.Server{
		Handler: h, BaseContext: func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 2 * time.Minute, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	wait, done := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer done()
	err := server.Shutdown(wait)
	if err != nil { // a query takes longer than we wait
		cut()
		err = server.Close()
	}
	<-failed
	return err
}
