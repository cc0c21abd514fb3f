package events

import (
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/tallyman-ci/tallyman/e2e/fakedockerd"
)

// proxy forwards TCP connections to a unix socket. With hold set it keeps the
// client's side open when the daemon's ends, as some load balancers do.
type proxy struct {
	l    net.Listener
	hold bool

	mu    sync.Mutex
	conns []net.Conn
	wg    sync.WaitGroup
}

func newProxy(t *testing.T, socket string, hold bool) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l, hold: hold}
	p.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			p.keep(in)
			out, err := net.Dial("unix", socket)
			if err != nil {
				in.Close()
				continue
			}
			p.keep(out)
			p.wg.Go(func() { io.Copy(out, in); out.Close() })
			p.wg.Go(func() {
				io.Copy(in, out)
				if !p.hold {
					in.Close()
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, c)
}

// Over TCP no socket file tells of a restart; behind a proxy that holds its side
// open not even the end of the stream does.
func TestRestartBehindAProxy(t *testing.T) {
	for _, hold := range []bool{false, true} {
		d := fake(t, &fakedockerd.Daemon{})
		p := newProxy(t, d.Socket, hold)
		m := maker{t: t}
		r := start(t, d, Options{Host: "tcp://" + p.l.Addr().String()}, probed)
		subscribed(t, d)
		d.Publish(m.next(3)...)
		r.wantActors(3)
		d.Kill()
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
		r.wantLoss("daemon_restarted")
		subscribed(t, d)
		d.Publish(m.next(3)...)
		r.wantActors(6)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	}
}

func TestTLS(t *testing.T) {
	d := fake(t, &fakedockerd.Daemon{})
	server := httptest.NewUnstartedServer(d)
	server.StartTLS()
	defer server.Close()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert := server.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write("ca.pem", "CERTIFICATE", cert.Certificate[0])
	write("cert.pem", "CERTIFICATE", cert.Certificate[0])
	write("key.pem", "PRIVATE KEY", key)
	t.Setenv("DOCKER_CERT_PATH", dir)
	t.Setenv("DOCKER_TLS_VERIFY", "1")
	t.Setenv("DOCKER_HOST", "tcp://"+strings.TrimPrefix(server.URL, "https://"))

	r := start(t, d, Options{}, func(r *running) { r.s.opts.Host = "" }) // all from the environment
	subscribed(t, d)
	m := maker{t: t}
	d.Publish(m.next(2)...)
	r.wantActors(2)
	r.stop()
}

// hole is a way for TCP connections to a unix socket that can swallow what goes
// through it, in both directions, without a sign to either end.
type hole struct {
	*proxy
	gone chan struct{} // closed when connections made so far are swallowed

	mu  sync.Mutex
	all bool // new ones are too
}

func newHole(t *testing.T, socket string) *hole {
	t.Helper()
	h := &hole{proxy: &proxy{}, gone: make(chan struct{})}
	var err error
	if h.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	h.wg.Go(func() {
		for {
			in, err := h.l.Accept()
			if err != nil {
				return
			}
			h.keep(in)
			h.mu.Lock()
			gone, all := h.gone, h.all
			h.mu.Unlock()
			if all {
				continue // open, and nobody reads or writes
			}
			out, err := net.Dial("unix", socket)
			if err != nil {
				in.Close()
				continue
			}
			h.keep(out)
			through := func(to, from net.Conn) {
				defer func() {
					select {
					case <-gone: // the end is swallowed too
					default:
						to.Close()
					}
				}()
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					if err != nil {
						return
					}
					select {
					case <-gone:
						continue
					default:
					}
					if _, err := to.Write(buf[:n]); err != nil {
						return
					}
				}
			}
			h.wg.Go(func() { through(in, out) })
			h.wg.Go(func() { through(out, in) })
		}
	})
	t.Cleanup(func() {
		h.l.Close()
		h.proxy.mu.Lock()
		for _, c := range h.conns {
			c.Close()
		}
		h.proxy.mu.Unlock()
		h.wg.Wait()
	})
	return h
}

func (h *hole) swallow(all bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.gone)
	h.gone, h.all = make(chan struct{}), all
}

func (h *hole) heal() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = false
}
