package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/internal/commandline/clitest"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/sinks"
)

// go test ./cmd/tallyman -update writes the golden parts of the scripts anew; read the diff.
var update = flag.Bool("update", false, "write the golden parts of testdata/script anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"tallyman": main})
}

// The scripts are the command line's behaviour, and examples of its use.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			program, err := exec.LookPath("tallyman")
			if err != nil {
				return err
			}
			env.Setenv("PROGRAM", program) // for scripts that change PATH
			// Nothing of the machine's own Docker, runner or Datadog agent.
			for _, name := range []string{"DOCKER_HOST", "DOCKER_CONTEXT", "DD_DOGSTATSD_URL", "DD_AGENT_HOST"} {
				env.Setenv(name, "")
			}
			env.Setenv("TALLYMAN_RUN_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("TALLYMAN_STATE_DIR", filepath.Join(env.WorkDir, "state"))
			env.Setenv("TALLYMAN", "")
			env.Setenv("DOCKER_HOST", "unix://"+filepath.Join(env.WorkDir, "docker.sock"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits,
			"await": await,
		},
	})
}

// exits CODE COMMAND... runs a command that must end with this exit code; what it
// wrote is matched by stdout and stderr as after exec.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// await PATH waits until a path is there.
func await(ts *testscript.TestScript, _ bool, args []string) {
	for range 500 {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	ts.Fatalf("%s did not appear", args[0])
}

func TestEveryCommand(t *testing.T) {
	clitest.Walk(t, "TALLYMAN_", func() *cli.App {
		p := program{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard}
		return p.app()
	})
}

// fakeDaemon speaks what the event stream asks of a daemon: ping, version, info,
// the list of containers, and one stream of events. It replays nothing.
func fakeDaemon(t *testing.T, events ...string) (host string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("API-Version", "1.41")
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", answer("OK"))
	mux.HandleFunc("/v1.41/version", answer(map[string]string{"Version": "20.10.24", "ApiVersion": "1.41"}))
	mux.HandleFunc("/v1.41/info", answer(map[string]any{"ID": "engine", "ServerVersion": "20.10.24", "SystemTime": time.Now().Format(time.RFC3339Nano)}))
	mux.HandleFunc("/v1.41/containers/json", answer([]any{}))
	mux.HandleFunc("/v1.41/events", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		for _, e := range events {
			fmt.Fprintln(w, e)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	s := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return "unix://" + socket
}

func TestEventsAlone(t *testing.T) {
	now := time.Now().UnixNano()
	event := func(n int64, action string) string {
		return fmt.Sprintf(`{"Type":"container","Action":%q,"Actor":{"ID":"c1","Attributes":{"image":"alpine","name":"x"}},"scope":"local","time":%d,"timeNano":%d}`, action, (now+n)/1e9, now+n)
	}
	host := fakeDaemon(t, event(1, "create"), event(2, "start"), event(3, "exec_create: sh -c 'secret'"))
	dir := t.TempDir()
	out := filepath.Join(dir, "events.jsonl")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var stderr strings.Builder
	p := program{stdin: strings.NewReader(""), stdout: io.Discard, stderr: &stderr, environ: []string{"POD_NAME=pod-1"}}
	code := make(chan int, 1)
	go func() {
		code <- p.run(ctx, []string{"tallyman", "events", "--host", host, "--sink", "file://" + out, "--state-dir", filepath.Join(dir, "state"), "--statsd", "off"})
	}()
	var records []record.Record
	for deadline := time.Now().Add(10 * time.Second); len(records) < 3 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		records = records[:0]
		data, _ := os.ReadFile(out) // there once the first batch is delivered
		for line := range strings.Lines(string(data)) {
			var r record.Record
			if err := recordjson.Unmarshal([]byte(line), &r); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			if r.Kind == record.KindEvent {
				records = append(records, r)
			}
		}
	}
	cancel()
	if c := <-code; c != exitOK {
		t.Fatalf("exit code %d: %s", c, stderr.String())
	}
	if len(records) != 3 {
		t.Fatalf("%d events: %+v\n%s", len(records), records, stderr.String())
	}
	for i, want := range []string{"create", "start", "exec_create"} {
		if e := records[i].Event; e.Action != want || e.Image != "alpine" {
			t.Errorf("event %d: %+v", i, e)
		}
	}
	if h := records[0].Host; h == nil || h.Pod != "pod-1" || !records[0].OutsideJob {
		t.Errorf("%+v", records[0])
	}
	if data, _ := os.ReadFile(out); strings.Contains(string(data), "secret") {
		t.Error("the command line of an exec got out")
	}
}

type brokenPipe struct{ err error }

func (b brokenPipe) Write(context.Context, []sinks.Entry) error { return b.err }
func (b brokenPipe) Close(context.Context) error                { return nil }

// `tallyman events | head` ends with head; a sink with another trouble is tried again.
func TestStreamEndsWithItsReader(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		ends bool
	}{
		{"the reader went away", &os.PathError{Op: "write", Path: "|1", Err: syscall.EPIPE}, true},
		{"the disk is full", &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, false},
		{"all is well", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			stopped := false
			s := &endsWithReader{Sink: brokenPipe{c.err}, stop: func() { stopped = true }}
			if err := s.Write(t.Context(), nil); err != c.err {
				t.Errorf("%v", err)
			}
			if stopped != c.ends || s.gone.Load() != c.ends {
				t.Errorf("stopped %v, gone %v; want %v", stopped, s.gone.Load(), c.ends)
			}
		})
	}
}

func TestTerminalWidth(t *testing.T) {
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	for _, c := range []struct{ columns, want int }{{120, 120}, {0, 80}} {
		if err := unix.IoctlSetWinsize(int(pty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(c.columns)}); err != nil {
			t.Fatal(err)
		}
		if got := terminalWidth(pty); got != c.want {
			t.Errorf("a terminal of %d columns has the width %d, want %d", c.columns, got, c.want)
		}
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if got := terminalWidth(file) + terminalWidth(io.Discard); got != 0 {
		t.Errorf("what is no terminal has the width %d", got)
	}
}

func TestOpenLogPutsAFullOneAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.log")
	if err := os.WriteFile(path, make([]byte, maxLog+1), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() != 0 {
		t.Errorf("%v, %v", st.Size(), err)
	}
	if old, err := os.Stat(path + ".1"); err != nil || old.Size() != maxLog+1 {
		t.Errorf("%v, %v", old, err)
	}
}

// A person reads sizes, not numbers of bytes, and why there are no events once.
func TestStatusReadsWell(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	st := agent.Status{Version: "1", PID: 7, Started: now.Add(-time.Minute), Running: 1, Events: &events.Status{Host: "unix:///x.sock", Error: "nobody listens"}}
	st.Journal.Segments, st.Journal.Bytes, st.Journal.MaxBytes = 1, 563, 512<<20
	want := `agent     version 1, pid 7, up 1m0s
job       none
records   0 journaled (0 by socket, 0 by spool file, 0 ends); 0 duplicates, 0 refused, 0 beyond a job's share
running   1 call whose end is waited for
journal   1 segment, 563 bytes of at most 512 MiB
events    none: no daemon at unix:///x.sock (see the problem below)
metrics   off ()
problem   no Docker daemon: events are not seen (nobody listens)
`
	if got := describe(st, now); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A person tells sinks of one kind apart by where they deliver, whatever their state is.
func TestStatusOfSinks(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	st := agent.Status{Version: "1", Started: now.Add(-time.Hour), Sinks: []sinks.Status{
		{Name: "fluent-5e56e5ff", Target: "fluent://a:24224", State: sinks.StateIdle, Delivered: 7},
		{Name: "fluent-11111111", Target: "fluent://b:24224", State: sinks.StateRetrying, BehindRecords: 4, BehindSeconds: 1.5, LastError: "refused\x1b[2J", LastErrorAt: now.Add(-2 * time.Second)},
		{Name: "c", Target: "pubsub://p/t", State: sinks.StateStuck, BehindRecords: 1, Refused: 2, Dropped: 3, LastError: "no answer within 30s", LastErrorAt: now},
		{Name: "of another version", State: "resting"},
	}}
	out := describe(st, now)
	for _, want := range []string{
		"sink      fluent-5e56e5ff: idle, 0 records and 0.0 s behind; 7 delivered, 0 refused, 0 dropped\n          to fluent://a:24224\n",
		"sink      fluent-11111111: retrying, 4 records and 1.5 s behind; 0 delivered, 0 refused, 0 dropped\n          to fluent://b:24224\n          last error 2s ago: refused",
		"sink      c: stuck, 1 records and 0.0 s behind; 0 delivered, 2 refused, 3 dropped\n          to pubsub://p/t\n          last error 0s ago: no answer within 30s\n",
		"sink      of another version: resting, 0 records and 0.0 s behind; 0 delivered, 0 refused, 0 dropped\nproblem ",
		"problem   sink c is stuck, 1 records behind (no answer within 30s)\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the status does not say %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") || strings.Contains(out, "sink fluent-5e56e5ff is") {
		t.Errorf("%q", out)
	}
}
