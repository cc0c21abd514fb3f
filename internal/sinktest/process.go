package sinktest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The environment of a test binary that is a server.
const (
	serveVariable = "SINKTEST_SERVE"
	addrVariable  = "SINKTEST_ADDR"
	tookVariable  = "SINKTEST_TOOK"
)

// Serve makes the process a server where its parent is a Process; otherwise it
// returns at once. It is called first in TestMain, with the servers by name. A
// server listens at addr, calls ready, and notes with took what it takes before it
// answers: what is noted outlives a SIGKILL.
func Serve(servers map[string]func(addr string, took *Took, ready func(addr string)) error) {
	name := os.Getenv(serveVariable)
	if name == "" {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the parent
		os.Exit(1)
	}()
	f, err := os.OpenFile(os.Getenv(tookVariable), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err == nil {
		serve := servers[name]
		if serve == nil {
			err = fmt.Errorf("no server is called %q", name)
		} else {
			err = serve(os.Getenv(addrVariable), &Took{f: f}, func(addr string) { fmt.Println(addr) })
		}
	}
	fmt.Fprintln(os.Stderr, "server:", err)
	os.Exit(1)
}

// Took is the book of what a server took.
type Took struct {
	mu  sync.Mutex
	f   *os.File
	buf []byte
}

// Note adds a record to the request that is being taken.
func (k *Took) Note(id string, payload []byte) {
	k.buf = fmt.Appendf(k.buf, "%s %016x\n", id, Sum(payload))
}

// Request notes the records of one request, by calls of Note in fill. Either all of
// them are in the book then or, when the process is killed, none.
func (k *Took) Request(fill func()) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.buf = k.buf[:0]
	fill()
	_, err := k.f.Write(k.buf)
	return err
}

// Process is the test binary, started again as a server.
type Process struct {
	Addr string // the same after each Start

	t    testing.TB
	name string
	took string
	cmd  *exec.Cmd
}

// Launch starts the server that is called name in Serve. It ends with the test.
func Launch(t testing.TB, name string) *Process {
	t.Helper()
	p := &Process{t: t, name: name, Addr: "127.0.0.1:0", took: filepath.Join(t.TempDir(), "took")}
	t.Cleanup(p.Kill)
	p.Start()
	return p
}

// Start starts the server again.
func (p *Process) Start() {
	p.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		p.t.Fatal(err)
	}
	// Another process may have the port for a moment: the ports of connections come from
	// the same range.
	for deadline := time.Now().Add(time.Minute); ; {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), serveVariable+"="+p.name, addrVariable+"="+p.Addr, tookVariable+"="+p.took)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			p.t.Fatal(err)
		}
		if _, err := cmd.StdinPipe(); err != nil { // open as long as we live
			p.t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			p.t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if lines.Scan() {
			p.Addr, p.cmd = lines.Text(), cmd
			return
		}
		_ = cmd.Wait() // it has ended, and stderr says why
		if time.Now().After(deadline) {
			p.t.Fatalf("the server %s does not start: %s", p.name, stderr.String())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Kill ends the server by SIGKILL.
func (p *Process) Kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	_ = p.cmd.Wait()         // killed
	p.cmd = nil
}

// Signal sends s to the server, such as SIGSTOP to make it stall.
func (p *Process) Signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// Tell tells the oracle of everything that the server took, over all its lives.
func (p *Process) Tell(o *Oracle) {
	p.t.Helper()
	f, err := os.Open(p.took)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		id, sum, _ := strings.Cut(lines.Text(), " ")
		n, err := strconv.ParseUint(sum, 16, 64)
		if err != nil {
			p.t.Fatalf("the book of the server has the line %q", lines.Text())
		}
		o.Saw(id, n)
	}
	if err := lines.Err(); err != nil {
		p.t.Fatal(err)
	}
}
