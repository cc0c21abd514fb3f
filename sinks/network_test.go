package sinks

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/journal"
)

// httpSink posts a batch as lines to a server. It is the smallest sink over a
// network that keeps the contract of Sink: what the server refuses for good (400) is
// found by halving the batch.
type httpSink struct {
	url    string
	client *http.Client
}

func (s *httpSink) Write(ctx context.Context, batch []Entry) error {
	var refused []Refused
	if err := s.post(ctx, batch, 0, &refused); err != nil {
		return err
	}
	if len(refused) > 0 {
		return &RefusedError{refused}
	}
	return nil
}

func (s *httpSink) post(ctx context.Context, batch []Entry, first int, refused *[]Refused) error {
	var body bytes.Buffer
	for _, e := range batch {
		body.Write(append(e.Line, '\n'))
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, &body)
	if err != nil {
		return err
	}
	response, err := s.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	switch {
	case response.StatusCode == http.StatusOK:
		return nil
	case response.StatusCode == http.StatusBadRequest && len(batch) == 1:
		*refused = append(*refused, Refused{first, string(answer)})
		return nil
	case response.StatusCode == http.StatusBadRequest:
		half := len(batch) / 2
		if err := s.post(ctx, batch[:half], first, refused); err != nil {
			return err
		}
		return s.post(ctx, batch[half:], first+half, refused)
	}
	err = fmt.Errorf("%s: %s", response.Status, answer)
	if after, errAfter := strconv.Atoi(response.Header.Get("Retry-After")); errAfter == nil {
		return &RetryAfterError{time.Duration(after) * time.Second, err}
	}
	return err
}

func (s *httpSink) Close(context.Context) error {
	s.client.CloseIdleConnections()
	return nil
}

// farSide is a server that remembers the ids it took.
type farSide struct {
	mu    sync.Mutex
	took  map[string]int
	calls []time.Time
	fail  func(call int, w http.ResponseWriter, body string) (failed bool)
}

func (f *farSide) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	f.mu.Lock()
	f.calls = append(f.calls, time.Now())
	call := len(f.calls)
	f.mu.Unlock()
	if f.fail != nil && f.fail(call, w, string(body)) {
		return
	}
	f.take(string(body))
}

func (f *farSide) take(body string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.took == nil {
		f.took = map[string]int{}
	}
	for l := range strings.Lines(body) {
		_, id, _ := strings.Cut(l, `"id":"`)
		id, _, _ = strings.Cut(id, `"`)
		f.took[id]++
	}
}

func (f *farSide) count() (ids, copies, calls int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.took {
		copies += n
	}
	return len(f.took), copies, len(f.calls)
}

func quick(o PumpOptions) PumpOptions {
	o.MinBackoff, o.MaxBackoff, o.MaxDelay = time.Millisecond, 20*time.Millisecond, time.Millisecond
	return o
}

// A server at the loopback interface goes wrong in the ways that servers do. All
// records arrive in the end, those that come twice have the same id, and only what
// the server refuses for good is in quarantine.
func TestServersThatGoWrong(t *testing.T) {
	cut := func(w http.ResponseWriter) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			conn.Close()
		}
	}
	const records = 20
	for _, tt := range []struct {
		name, id string
		timeout  time.Duration
		fail     func(f *farSide) func(call int, w http.ResponseWriter, body string) bool
		check    func(t *testing.T, f *farSide, s Status)
	}{
		{"accepts and never answers", "SP-13", 50 * time.Millisecond, func(*farSide) func(int, http.ResponseWriter, string) bool {
			return func(call int, w http.ResponseWriter, _ string) bool {
				if call <= 3 {
					conn, _, err := w.(http.Hijacker).Hijack()
					if err == nil {
						_, _ = io.Copy(io.Discard, conn) // until the sink gives up
						conn.Close()
					}
					return true
				}
				return false
			}
		}, func(t *testing.T, _ *farSide, s Status) {
			if s.Retries < 3 || !strings.Contains(s.LastError, "deadline") {
				t.Errorf("%+v", s)
			}
		}},
		{"refuses one record of a batch", "SP-14", 0, func(*farSide) func(int, http.ResponseWriter, string) bool {
			return func(_ int, w http.ResponseWriter, body string) bool {
				if strings.Contains(body, `"r000007"`) {
					http.Error(w, "no such field", http.StatusBadRequest)
					return true
				}
				return false
			}
		}, func(t *testing.T, f *farSide, s Status) {
			if s.Refused != 1 || s.Retries != 0 || f.took["r000007"] != 0 {
				t.Errorf("%+v", s)
			}
		}},
		{"takes the batch and dies before it answers", "SP-15", 0, func(f *farSide) func(int, http.ResponseWriter, string) bool {
			return func(call int, w http.ResponseWriter, body string) bool {
				if call == 1 {
					f.take(body)
					cut(w)
					return true
				}
				return false
			}
		}, func(t *testing.T, f *farSide, s Status) {
			ids, copies, _ := f.count()
			if s.Retries != 1 || s.Delivered != records || copies <= ids {
				t.Errorf("%d ids, %d copies, %+v", ids, copies, s)
			}
		}},
		{"asks to come back later", "SP-16", 0, func(*farSide) func(int, http.ResponseWriter, string) bool {
			return func(call int, w http.ResponseWriter, _ string) bool {
				if call <= 2 {
					w.Header().Set("Retry-After", "1")
					http.Error(w, "busy", []int{http.StatusTooManyRequests, http.StatusServiceUnavailable}[call-1])
					return true
				}
				return false
			}
		}, func(t *testing.T, f *farSide, s Status) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if s.Retries != 2 {
				t.Errorf("%+v", s)
			}
			for i := 1; i <= 2; i++ {
				if gap := f.calls[i].Sub(f.calls[i-1]); gap < time.Second {
					t.Errorf("request %d came after %v", i+1, gap)
				}
			}
		}},
		{"does not know the token any more", "SP-29", 0, func(*farSide) func(int, http.ResponseWriter, string) bool {
			return func(call int, w http.ResponseWriter, _ string) bool {
				if call <= 3 {
					http.Error(w, "token expired", http.StatusUnauthorized)
					return true
				}
				return false
			}
		}, func(t *testing.T, _ *farSide, s Status) {
			if s.Retries != 3 || s.Refused != 0 || !strings.Contains(s.LastError, "401 Unauthorized: token expired") {
				t.Errorf("%+v", s)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			faults.Case(t, tt.id)
			f := &farSide{}
			f.fail = tt.fail(f)
			server := httptest.NewServer(f)
			defer server.Close()
			b := newBench(t, t.TempDir(), journal.Options{})
			o := quick(b.options("http"))
			o.Timeout = tt.timeout
			if tt.id == "SP-16" {
				o.MaxBackoff = time.Minute
			}
			b.append(numbered(0, records)...)
			p, _ := b.pump(&httpSink{server.URL, &http.Client{Transport: &http.Transport{}}}, o)
			flushed, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			// Not Flush: it would ask for an attempt before the server wants one.
			for p.Status().BehindRecords > 0 && flushed.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			b.end()
			s := p.Status()
			ids, _, _ := f.count()
			if ids+int(s.Refused) != records || s.BehindRecords != 0 {
				t.Errorf("%d records arrived, %d refused, of %d: %+v", ids, s.Refused, records, s)
			}
			if q, err := os.ReadFile(filepath.Join(b.dir, "quarantine", "http.jsonl")); (s.Refused > 0) != (err == nil) || s.Refused > 0 && strings.Count(string(q), "\n") != int(s.Refused) {
				t.Errorf("the quarantine holds %q, %v", q, err)
			}
			tt.check(t, f, s)
		})
	}
}

// The name cannot be resolved, then the server's certificate is over; both are told,
// neither costs a record or sends it to quarantine, and delivery goes on when that
// is mended.
func TestServersThatCannotBeReached(t *testing.T) {
	faults.Case(t, "SP-29")
	f := &farSide{}
	server := httptest.NewUnstartedServer(f)
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // handshakes that fail
	expired, valid := certificate(t, time.Now().Add(-time.Hour)), certificate(t, time.Now().Add(time.Hour))
	pool := x509.NewCertPool()
	pool.AddCert(mustParse(t, expired))
	pool.AddCert(mustParse(t, valid))
	var mu sync.Mutex
	resolves, current := false, expired
	server.TLS = &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		c := current
		return &c, nil
	}}
	server.StartTLS()
	defer server.Close()
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	// The resolver's server is a port on which nobody listens.
	nobody, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", nobody.LocalAddr().String())
	}}
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "sink.example.org"},
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			mu.Lock()
			ok := resolves
			mu.Unlock()
			if !ok {
				return (&net.Dialer{Resolver: resolver}).DialContext(ctx, network, addr)
			}
			return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
		},
	}}
	b := newBench(t, t.TempDir(), journal.Options{})
	b.append(numbered(0, 20)...)
	p, _ := b.pump(&httpSink{"https://sink.example.org:" + port, client}, quick(b.options("https")))
	says := func(words string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !strings.Contains(p.Status().LastError, words); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the status does not say %q: %+v", words, p.Status())
			}
		}
		if s := p.Status(); s.State != StateRetrying && s.State != StateDelivering || s.BehindRecords != 20 || s.Refused != 0 {
			t.Errorf("%+v", s)
		}
	}
	says("lookup sink.example.org")
	mu.Lock()
	resolves = true
	mu.Unlock()
	says("certificate has expired")
	mu.Lock()
	current = valid
	mu.Unlock()
	b.flush(p)
	b.end()
	if ids, copies, _ := f.count(); ids != 20 || copies != 20 {
		t.Errorf("%d records arrived, %d copies", ids, copies)
	}
}

func mustParse(t *testing.T, c tls.Certificate) *x509.Certificate {
	t.Helper()
	parsed, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// certificate makes one that signs itself and ends at a time.
func certificate(t *testing.T, end time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(end.UnixNano()), Subject: pkix.Name{CommonName: "sink.example.org"}, DNSNames: []string{"sink.example.org"},
		NotBefore: end.Add(-24 * time.Hour), NotAfter: end, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
