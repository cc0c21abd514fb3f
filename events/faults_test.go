package events

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/fakedockerd"
	"github.com/tallyman-ci/tallyman/internal/faults"
)

// EV-19 and EV-20: two streamers on one daemon. The lock goes by the engine's id: the
// second one comes by another address.
func TestTwoStreamers(t *testing.T) {
	faults.Case(t, "EV-19", "EV-20")
	d := fake(t, &fakedockerd.Daemon{})
	p := newProxy(t, d.Socket, false)
	m := maker{t: t}
	locks := t.TempDir()
	first := start(t, d, Options{LockDir: locks, Yield: true})
	subscribed(t, d)
	other := Options{LockDir: locks, Host: "tcp://" + p.l.Addr().String()}

	yields := other
	yields.Yield = true
	second := New(yields)
	second.timing = quick
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err := second.Run(ctx, first.out)
	if !errors.Is(err, ErrStreamed) || !strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) {
		t.Fatalf("the second one ended with %v, want ErrStreamed and the process", err)
	}

	// One that does not yield waits, says why, and takes over where the first one ends.
	waits := start(t, d, other)
	eventually(t, "the reason in the status", func() bool { return strings.Contains(waits.s.Status().Error, ErrStreamed.Error()) })
	d.Publish(m.next(5)...)
	first.wantActors(5)
	time.Sleep(10 * quick.retryMax) // for further attempts
	if n := strings.Count(waits.logs.String(), "trying again"); n != 1 {
		t.Errorf("%d log lines about waiting, want 1:\n%s", n, waits.logs)
	}
	// The first keeps the lock while it has no session, or the two would take turns.
	d.Refuse(func(string) int { return 503 })
	d.Cut()
	eventually(t, "no session", func() bool { return !first.s.Status().Connected })
	d.Refuse(nil)
	eventually(t, "a session", func() bool { return first.s.Status().Connected })
	if waits.s.Status().Sessions != 0 {
		t.Error("the second one took over from a streamer that lives")
	}
	if err := first.stop(); err != nil {
		t.Error(err)
	}
	d.Publish(m.next(5)...)
	waits.wantActors(10) // from its own beginning: the first one's records went elsewhere
	waits.wantNoLoss()
}

// Another daemon has another lock; a lock that cannot be made stops nothing.
func TestTheLockIsNoObstacle(t *testing.T) {
	locks := t.TempDir()
	for name, o := range map[string]Options{
		"another daemon":        {LockDir: locks, Yield: true},
		"the same":              {LockDir: locks, Yield: true},
		"a folder that is none": {LockDir: "/dev/null/x", Yield: true},
		"no folder":             {LockDir: filepath.Join(locks, "missing"), Yield: true},
	} {
		t.Run(name, func(t *testing.T) {
			d := fake(t, &fakedockerd.Daemon{Engine: "E-" + name})
			r := start(t, d, o)
			subscribed(t, d)
			m := maker{t: t}
			d.Publish(m.next(1)...)
			r.wantActors(1)
		})
	}
	// A link in the lock's place is not followed, and a process that was killed leaves none.
	target := filepath.Join(locks, "target")
	if err := os.WriteFile(target, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	l := streamLock{dir: locks, log: New(Options{}).log}
	if err := l.acquire("E", ""); err != nil || l.file == nil {
		t.Fatalf("%v", err)
	}
	name := l.file.Name()
	l.release()
	if err := errors.Join(os.Remove(name), os.Symlink(target, name)); err != nil {
		t.Fatal(err)
	}
	if err := l.acquire("E", ""); err != nil || l.file != nil {
		t.Errorf("%v, locked %v", err, l.file != nil)
	}
	if b, _ := os.ReadFile(target); string(b) != "kept" {
		t.Errorf("written through a link: %q", b)
	}
}

// The kernel gives a killed process's lock to the next.
func TestTheLockEndsWithItsProcess(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestHoldTheLock$")
	cmd.Env = append(os.Environ(), "TALLYMAN_TEST_LOCK="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if b := make([]byte, 1); true {
		if _, err := io.ReadFull(out, b); err != nil {
			t.Fatal(err)
		}
	}
	l := streamLock{dir: dir, log: New(Options{}).log}
	defer l.release()
	if err := l.acquire("E", ""); !errors.Is(err, ErrStreamed) || !strings.Contains(err.Error(), fmt.Sprint("process ", cmd.Process.Pid, " ")) {
		t.Errorf("beside a living process: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if err := l.acquire("E", ""); err != nil || l.file == nil {
		t.Errorf("after its end: %v", err)
	}
}

// TestHoldTheLock is the other process of TestTheLockEndsWithItsProcess.
func TestHoldTheLock(t *testing.T) {
	dir := os.Getenv("TALLYMAN_TEST_LOCK")
	if dir == "" {
		return // called with the others
	}
	l := streamLock{dir: dir, log: New(Options{}).log}
	if err := l.acquire("E", ""); err != nil {
		t.Fatal(err)
	}
	fmt.Print("x")
	select {}
}

// between starts a server that answers in place of the daemon's /events while answer
// returns true.
func between(t *testing.T, d *fakedockerd.Daemon, answer func(http.ResponseWriter) bool) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/events") && answer(w) {
			return
		}
		d.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return "tcp://" + s.Listener.Addr().String()
}

// EV-22: what stands between us and the daemon answers 200, and it is no stream.
func TestAProxyAnswersForTheDaemon(t *testing.T) {
	page := "<!DOCTYPE html>\n<html><body>\n" + strings.Repeat("<p>Log in</p>\n", 50) + "</body></html>\n"
	for _, row := range []struct {
		name   string
		answer func(http.ResponseWriter)
		want   string
	}{
		{"a web page", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			io.WriteString(w, page)
		}, "a web page"},
		{"gzip", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			io.WriteString(z, `{"Type":"image","Action":"pull","timeNano":1}`+"\n")
			z.Close()
		}, "must not compress"},
	} {
		t.Run(row.name, func(t *testing.T) {
			faults.Case(t, "EV-22")
			d := fake(t, &fakedockerd.Daemon{})
			var through atomic.Bool
			r := start(t, d, Options{Host: between(t, d, func(w http.ResponseWriter) bool {
				if !through.Load() {
					row.answer(w)
				}
				return !through.Load()
			})})
			eventually(t, "the error", func() bool { return strings.Contains(r.s.Status().Error, row.want) })
			time.Sleep(5 * quick.refusedMax) // for further attempts
			if n := strings.Count(r.logs.String(), "trying again"); n != 1 {
				t.Errorf("logged %d times, want once:\n%s", n, r.logs)
			}
			through.Store(true)
			m := maker{t: t}
			d.Publish(m.next(2)...)
			r.wantActors(2)
			r.wantNoLoss()
		})
	}
}

// EV-23: a stream that is nothing but garbage is asked for as seldom as a daemon that
// refuses, and its lines are one loss at a time.
func TestOnlyGarbage(t *testing.T) {
	faults.Case(t, "EV-23")
	d := fake(t, &fakedockerd.Daemon{})
	var asked atomic.Int64
	var through atomic.Bool
	r := start(t, d, Options{Host: between(t, d, func(w http.ResponseWriter) bool {
		if through.Load() {
			return false
		}
		asked.Add(1)
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, strings.Repeat("\x1f\x8b garbage\n", 1000)+`{"Type":"ima`)
		return true
	})}, func(r *running) { r.s.timing.refusedMax = time.Hour }) // for which it would wait after some attempts
	eventually(t, "attempts", func() bool { return asked.Load() >= 3 })
	eventually(t, "the reason in the status", func() bool { return strings.Contains(r.s.Status().Error, "none was an event") })
	lost := int64(0)
	eventually(t, "the garbage to be counted", func() bool {
		lost = 0
		for _, l := range r.losses() {
			lost += l.Count
		}
		return lost >= 3000 && lost == r.s.Status().Unreadable
	})
	if n := len(r.losses()); int64(n) > lost/10 {
		t.Errorf("%d losses for %d lines", n, lost)
	}
	through.Store(true)
	m := maker{t: t}
	d.Publish(m.next(1)...)
	r.wantActors(1)
}

// EV-24: addresses that cannot be used. The streamer stays, and says once what to set.
func TestUnusableAddresses(t *testing.T) {
	faults.Case(t, "EV-24")
	for host, want := range map[string]string{
		"ssh://ci@host":               "over ssh://: write its address as unix:///path or tcp://host:port",
		"npipe:////./pipe/docker":     "over npipe://",
		"nonsense":                    "write it as unix:///path or tcp://host:port",
		"tcp://u:hunter2@ho st:1":     "write it as unix:///path or tcp://host:port",
		"tcp://127.0.0.1:1":           "reach the Docker daemon",
		"unix:///nonexistent/d.sock":  "reach the Docker daemon",
		"unix://" + os.TempDir():      "reach the Docker daemon",
		"tcp://[::1":                  "",
		"unix:///a\nb\x1b[31m/d.sock": "",
	} {
		t.Run(host, func(t *testing.T) {
			r := start(t, nil, Options{Host: host})
			eventually(t, "the error", func() bool {
				e := r.s.Status().Error
				return e != "" && strings.Contains(e, want) && !strings.Contains(e, "hunter2")
			})
			time.Sleep(3 * quick.retryMax)
			if n := strings.Count(r.logs.String(), "trying again"); n != 1 {
				t.Errorf("logged %d times, want once:\n%s", n, r.logs)
			}
			if err := r.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// authority signs certificates for 127.0.0.1.
type authority struct {
	t   *testing.T
	key *ecdsa.PrivateKey
	ca  *x509.Certificate
	pem []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-72 * time.Hour), NotAfter: time.Now().Add(72 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, key, ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a *authority) sign(from, to time.Time) (pair tls.Certificate, certPEM, keyPEM []byte) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(from.UnixNano()), NotBefore: from, NotAfter: to, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.ca, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	if pair, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		a.t.Fatal(err)
	}
	return pair, certPEM, keyPEM
}

// EV-25: the daemon's certificate has expired, and is renewed while we wait.
func TestExpiredCertificate(t *testing.T) {
	faults.Case(t, "EV-25")
	d := fake(t, &fakedockerd.Daemon{})
	ca := newAuthority(t)
	old, oldPEM, oldKey := ca.sign(time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour))
	renewed, renewedPEM, renewedKey := ca.sign(time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour))
	var current atomic.Pointer[tls.Certificate]
	current.Store(&old)
	server := httptest.NewUnstartedServer(d)
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshakes that the client ends
	server.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*current.Load()}}, nil
	}}
	server.StartTLS()
	t.Cleanup(server.Close)
	dir := t.TempDir()
	put := func(certPEM, keyPEM []byte) {
		for name, data := range map[string][]byte{"ca.pem": ca.pem, "cert.pem": certPEM, "key.pem": keyPEM} {
			temp := filepath.Join(dir, name+".new")
			if err := errors.Join(os.WriteFile(temp, data, 0o600), os.Rename(temp, filepath.Join(dir, name))); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(oldPEM, oldKey)
	t.Setenv("DOCKER_CERT_PATH", dir)
	t.Setenv("DOCKER_TLS_VERIFY", "1")
	t.Setenv("DOCKER_HOST", "tcp://"+server.Listener.Addr().String())
	r := start(t, d, Options{}, func(r *running) { r.s.opts.Host = "" })
	eventually(t, "the expiry in the status", func() bool { return strings.Contains(r.s.Status().Error, "expired") })
	put(renewedPEM, renewedKey)
	current.Store(&renewed)
	subscribed(t, d)
	m := maker{t: t}
	d.Publish(m.next(2)...)
	r.wantActors(2)
	if err := r.stop(); err != nil { // before the server, which waits for the stream's end
		t.Error(err)
	}
}

// EV-26: a daemon whose data root was wiped is another engine on the same socket.
func TestAnotherEngine(t *testing.T) {
	faults.Case(t, "EV-26", "EV-04")
	d := fake(t, &fakedockerd.Daemon{Engine: "FIRST"})
	m := maker{t: t}
	r := start(t, d, Options{LockDir: t.TempDir(), Yield: true})
	subscribed(t, d)
	d.Publish(m.next(3)...)
	r.wantActors(3)
	d.Kill()
	eventually(t, "disconnected", func() bool { return !r.s.Status().Connected })
	d.Engine = "SECOND"
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	subscribed(t, d)
	d.Publish(m.next(2)...)
	r.wantActors(5)
	r.wantLoss("daemon_restarted")
	r.set(func() {
		for _, rec := range r.records {
			if rec.Event == nil {
				continue
			}
			want := "FIRST"
			if rec.Event.ActorID >= "e4" {
				want = "SECOND"
			}
			if rec.Event.Engine != want {
				t.Errorf("%s is of engine %s, want %s", rec.Event.ActorID, rec.Event.Engine, want)
			}
		}
	})
}

// EV-16: a path that swallows everything, as a firewall does that forgot a connection:
// nothing is closed, nothing is answered, new connections go the same way. With the
// real waits it is noticed in less than a minute.
func TestSilentNetwork(t *testing.T) {
	faults.Case(t, "EV-16")
	w := defaultTiming
	if longest := w.idle + w.open + 2*w.probe; longest >= time.Minute {
		t.Errorf("a half-open stream may go unnoticed for %v", longest)
	}
	for _, row := range []struct {
		name string
		all  bool // new connections are swallowed as well
	}{{"the old connection alone", false}, {"every connection", true}} {
		t.Run(row.name, func(t *testing.T) {
			d := fake(t, &fakedockerd.Daemon{})
			p := newHole(t, d.Socket)
			m := maker{t: t}
			r := start(t, d, Options{Host: "tcp://" + p.l.Addr().String()}, probed, func(r *running) { r.s.timing.open = 2 * time.Second })
			subscribed(t, d)
			d.Publish(m.next(3)...)
			r.wantActors(3)
			leftAlone(t, d)
			if n := r.s.Status().Sessions; n != 1 {
				t.Fatalf("%d sessions, want 1: a quiet stream was taken for a dead one", n)
			}
			p.swallow(row.all)
			d.Publish(m.next(4)...)
			if row.all {
				eventually(t, "the dead stream to be noticed", func() bool { return !r.s.Status().Connected })
				p.heal()
			}
			r.wantActors(7)
			r.wantNoLoss()
		})
	}
}

// EV-17: an older daemon than the client is asked in its own version.
func TestNegotiatedVersion(t *testing.T) {
	faults.Case(t, "EV-17")
	for daemon, want := range map[string]string{"1.24": "1.24", "1.41": "1.41", "1.99": ""} {
		d := fake(t, &fakedockerd.Daemon{API: daemon})
		r := start(t, d, Options{})
		eventually(t, "a session", func() bool { return r.s.Status().Connected })
		got := r.s.Status().APIVersion
		if want != "" && got != want || want == "" && (got == "" || got >= daemon) {
			t.Errorf("a daemon of version %s is asked in version %s", daemon, got)
		}
		m := maker{t: t}
		d.Publish(m.next(1)...)
		r.wantActors(1)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	}
}

// EV-21: the end is bounded when out is stuck, and says what was left.
func TestTheEndIsBounded(t *testing.T) {
	faults.Case(t, "EV-21")
	if defaultTiming.drain != time.Second {
		t.Errorf("the rest is handed out for %v, want a second", defaultTiming.drain)
	}
	d := fake(t, &fakedockerd.Daemon{})
	m := maker{t: t}
	state := filepath.Join(t.TempDir(), "events.json")
	r := start(t, d, Options{StatePath: state})
	subscribed(t, d)
	d.Publish(m.next(10)...)
	r.wantActors(10)
	// A journal without room refuses everything from here on.
	full := errors.New("no space left on device")
	r.set(func() { r.fail = full })
	d.Publish(m.next(5)...)
	eventually(t, "a refusal", func() bool { return strings.Contains(r.logs.String(), "were not taken") })
	if err := r.stop(); !errors.Is(err, full) { // stop fails the test after 5 s
		t.Errorf("Run returned %v", err)
	}
	c, err := loadCursor(state)
	if err != nil || c.TimeNano != r.records[9].Event.TimeNano {
		t.Errorf("cursor %+v (%v), want it behind the tenth event", c, err)
	}
	r = start(t, d, Options{StatePath: state})
	r.wantActors(5)
	r.wantNoLoss()
}

func TestLineReader(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	in := newLineReader(strings.NewReader("a\n\n" + long[:100<<10] + "\n" + long + "\n" + long + "y\nb\nrest"))
	for i, want := range []int{2, 1, 100<<10 + 1, -1, -1, 2} {
		line, err := in.next()
		if want < 0 {
			if !errors.Is(err, errTooLong) {
				t.Errorf("line %d: %d bytes, %v; want it too long", i+1, len(line), err)
			}
		} else if err != nil || len(line) != want || !bytes.HasSuffix(line, []byte("\n")) {
			t.Errorf("line %d: %d bytes, %v; want %d", i+1, len(line), err, want)
		}
	}
	if _, err := in.next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}
