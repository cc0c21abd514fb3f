// Package forwardtest runs a server of the Forward protocol that is not ours: that of
// the npm package @fluent-org/logger, in a process of its own that tests kill, stop and
// start again.
package forwardtest

import (
	"bufio"
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/require"
)

//go:embed server
var server embed.FS

// Receiver is a Forward server. It keeps its address over restarts. The fields can be
// set before Start.
type Receiver struct {
	Listen            string        // "0" for a free port, or the path of a unix socket
	Delay             time.Duration // that it lets each event wait
	CertFile, KeyFile string        // of its TLS; empty for none

	t   testing.TB
	out string
	cmd *exec.Cmd
}

// New makes a receiver that is not started; it ends with the test. Without npm and
// node the test is skipped, and fails where CI=true.
func New(t testing.TB, listen string) *Receiver {
	t.Helper()
	if _, err := installed(); err != nil {
		require.Missing(t, "a Forward server: "+err.Error())
	}
	r := &Receiver{Listen: listen, t: t, out: filepath.Join(t.TempDir(), "out.jsonl")}
	t.Cleanup(r.Kill)
	return r
}

// installed is the folder that holds the server and its packages.
var installed = sync.OnceValues(install)

func install() (dir string, err error) {
	if dir, err = cache(); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Tests of several packages may come at the same time.
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", dir, err)
	}
	modules := filepath.Join(dir, "node_modules")
	for _, name := range []string{"package.json", "package-lock.json", "server.js"} {
		want, err := server.ReadFile("server/" + name)
		if err != nil {
			return "", err
		}
		path := filepath.Join(dir, name)
		if got, err := os.ReadFile(path); err == nil && bytes.Equal(got, want) {
			continue
		}
		if name != "server.js" { // other packages, or others' versions
			if err := os.RemoveAll(modules); err != nil {
				return "", err
			}
		}
		// A rename, because a server of another test may be reading it.
		if err := errors.Join(os.WriteFile(path+".new", want, 0o644), os.Rename(path+".new", path)); err != nil {
			return "", err
		}
	}
	if _, err := os.Stat(filepath.Join(modules, "@fluent-org", "logger")); err == nil {
		return dir, nil
	}
	if out, err := exec.Command("npm", "ci", "--prefix", dir, "--no-audit", "--no-fund").CombinedOutput(); err != nil {
		return "", fmt.Errorf("npm ci of internal/forwardtest/server: %w: %s(install npm, and node)", err, out)
	}
	return dir, nil
}

// cache is the repository's folder for downloads, whichever package is being tested.
func cache() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".cache", "fluent-server"), nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod above the folder of the test: %w", fs.ErrNotExist)
		}
		dir = up
	}
}

// Start runs the server and waits until it listens.
func (r *Receiver) Start() {
	r.t.Helper()
	dir, err := installed()
	if err != nil {
		r.t.Fatal(err)
	}
	args := []string{filepath.Join(dir, "server.js"), r.Listen, r.out, strconv.FormatInt(r.Delay.Milliseconds(), 10)}
	if r.CertFile != "" {
		args = append(args, r.CertFile, r.KeyFile)
	}
	if strings.HasPrefix(r.Listen, "/") {
		_ = os.Remove(r.Listen) // a killed server leaves it
	}
	r.cmd = exec.Command("node", args...)
	r.cmd.Env = append(os.Environ(), "NODE_PATH="+filepath.Join(dir, "node_modules"))
	r.cmd.Stderr = os.Stderr
	stdout, err := r.cmd.StdoutPipe()
	if err == nil {
		err = r.cmd.Start()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		r.t.Fatalf("the Forward server did not start: %v", err)
	}
	if r.Listen == "0" {
		r.Listen = strings.TrimSpace(line)
	}
}

// Kill ends the server by SIGKILL.
func (r *Receiver) Kill() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill() // it may have ended
		_ = r.cmd.Wait()         // killed
		r.cmd = nil
	}
}

// Signal sends s to the server, such as SIGSTOP to make it stall.
func (r *Receiver) Signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Error(err)
	}
}

// URL is the sink's URL of the receiver, with a query.
func (r *Receiver) URL(query string) string {
	if strings.HasPrefix(r.Listen, "/") {
		return "fluent://" + r.Listen + "?" + query
	}
	return "fluent://127.0.0.1:" + r.Listen + "?" + query
}

// Event is an event that the server acknowledged, or was about to.
type Event struct {
	Tag  string
	Time struct{ Seconds, Nanoseconds int64 }
	// Record is kept as it is: numbers must have arrived as numbers.
	Record json.RawMessage
}

// ID is the id of the event's record.
func (e Event) ID() string {
	var m struct{ ID string }
	_ = json.Unmarshal(e.Record, &m) // "" then, which no record has
	return m.ID
}

// Received are the events of all lives of the server, in their order.
func (r *Receiver) Received() []Event {
	r.t.Helper()
	b, err := os.ReadFile(r.out)
	if err != nil {
		r.t.Fatal(err)
	}
	var all []Event
	for line := range bytes.Lines(b) {
		if line[len(line)-1] != '\n' {
			continue // the kill cut it, before the acknowledgement
		}
		var one Event
		if err := json.Unmarshal(line, &one); err != nil {
			// A kill cut the line before this one, and this one follows on it.
			at := bytes.LastIndex(line, []byte(`{"tag":`))
			if at <= 0 || json.Unmarshal(line[at:], &one) != nil {
				r.t.Fatalf("%v in %q", err, line)
			}
		}
		all = append(all, one)
	}
	return all
}
