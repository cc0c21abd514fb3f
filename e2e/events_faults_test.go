package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/fakedockerd"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// fakeDaemon starts a daemon that speaks the real API and sends what it is told.
func fakeDaemon(t testing.TB) *fakedockerd.Daemon {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tallyman-fake-") // short: a socket's address holds 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &fakedockerd.Daemon{Socket: filepath.Join(dir, "docker.sock"), Engine: "ENGINE-" + filepath.Base(dir)}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Kill)
	return d
}

// containerEvents makes n events of the size that real ones have, with the numbers
// from first on as their actors.
func containerEvents(first, n int) []fakedockerd.Event {
	var all []fakedockerd.Event
	for i := first; i < first+n; i++ {
		nano := time.Now().UnixNano() + int64(i-first)
		id := fmt.Sprintf("%064d", i)
		all = append(all, fakedockerd.Event{Nano: nano, Line: fmt.Appendf(nil,
			`{"status":"create","id":"%[1]s","from":"localhost:5000/tools/builder:1.26","Type":"container","Action":"create","Actor":{"ID":"%[1]s","Attributes":{`+
				`"com.docker.compose.config-hash":"9d1f5c2a","com.docker.compose.project":"shop","image":"localhost:5000/tools/builder:1.26",`+
				`"name":"storm-%[2]d","org.opencontainers.image.source":"https://github.com/acme/shop"}},"scope":"local","time":%[3]d,"timeNano":%[4]d}`,
			id, i, nano/1e9, nano)})
	}
	return all
}

// streamer is a running `tallyman events`.
type streamer struct {
	t      testing.TB
	cmd    *exec.Cmd
	out    string // the file of its sink
	stderr *logBuffer
	done   chan error
}

// logBuffer is written by a process while a test reads it.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// place is a folder with a configuration, for streamers that share it.
func place(t testing.TB) (dir, config string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tallyman-events-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	config = filepath.Join(dir, "tallyman.conf")
	if err := os.WriteFile(config, []byte("run_dir = "+dir+"/run\nstate_dir = "+dir+"/state\nstatsd = off\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir, config
}

// stream starts `tallyman events` against d; its records go to the file name in dir.
func stream(t testing.TB, d *fakedockerd.Daemon, dir, config, name string, more ...string) *streamer {
	t.Helper()
	s := &streamer{t: t, out: filepath.Join(dir, name), stderr: &logBuffer{}, done: make(chan error, 1)}
	args := append([]string{"events", "--config", config, "--host", "unix://" + d.Socket, "--sink", "file://" + s.out}, more...)
	s.cmd = exec.Command(filepath.Join(built, "tallyman"), args...)
	s.cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + dir}
	s.cmd.Stderr = s.stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { s.done <- s.cmd.Wait() }()
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		<-s.done
	})
	return s
}

// end waits for the process and returns its exit code.
func (s *streamer) end() int {
	s.t.Helper()
	select {
	case err := <-s.done:
		s.done <- err
	case <-time.After(30 * time.Second):
		s.t.Fatalf("tallyman events did not end:\n%s", s.stderr)
	}
	return s.cmd.ProcessState.ExitCode()
}

// stop ends it as a service manager does.
func (s *streamer) stop() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	if code := s.end(); code != 0 {
		s.t.Errorf("exit code %d after SIGTERM:\n%s", code, s.stderr)
	}
}

// got reads what the sink has: how often each container's event, and how many were
// told as lost.
func (s *streamer) got() (names map[string]int, lost int64) {
	s.t.Helper()
	names = map[string]int{}
	f, err := os.Open(s.out)
	if errors.Is(err, os.ErrNotExist) {
		return names, 0
	}
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r record.Record
		if err := recordjson.Unmarshal(in.Bytes(), &r); err != nil {
			continue // the end of what is being written
		}
		switch {
		case r.Event != nil:
			names[r.Event.Name]++
		case r.Loss != nil && r.Loss.Cause == "queue_full":
			lost += r.Loss.Count
		case r.Loss != nil:
			s.t.Errorf("loss %+v", *r.Loss)
		}
	}
	return names, lost
}

func waitStreams(t testing.TB, d *fakedockerd.Daemon, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := d.WaitSubscribers(ctx, n); err != nil {
		t.Fatal(err)
	}
}

// storm sends events at a rate for a time, and returns their number.
func sendStorm(d *fakedockerd.Daemon, perSecond int, long time.Duration) int {
	total := int(float64(perSecond) * long.Seconds())
	began := time.Now()
	for sent := 0; sent < total; {
		due := min(total, int(float64(perSecond)*time.Since(began).Seconds()))
		d.Publish(containerEvents(sent, due-sent)...)
		sent = due
		time.Sleep(5 * time.Millisecond)
	}
	return total
}

// highWater is the largest resident set of a process so far, in bytes (proc_pid_status(5)).
func highWater(t testing.TB, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

func stormFor(t testing.TB, long time.Duration) (total int, lost, peak int64) {
	d := fakeDaemon(t)
	dir, config := place(t)
	s := stream(t, d, dir, config, "out.jsonl")
	waitStreams(t, d, 1)
	total = sendStorm(d, 10000, long)
	seen := -1
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		// Reading all of it is the dearest part of this test: wait until no more comes.
		b, err := os.ReadFile(s.out)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if n := bytes.Count(b, []byte(`"kind":"event"`)); n != seen && n < total && time.Now().Before(deadline) {
			seen = n
			continue
		}
		var names map[string]int
		names, lost = s.got()
		if len(names)+int(lost) == total {
			for name, n := range names {
				if n != 1 {
					t.Fatalf("%s came %d times", name, n)
				}
			}
			break
		}
		if time.Now().After(deadline) || len(names)+int(lost) > total {
			t.Fatalf("%d events came and %d were counted as lost, of %d", len(names), lost, total)
		}
	}
	peak = highWater(t, s.cmd.Process.Pid)
	s.stop()
	return total, lost, peak
}

// EV-09: 10,000 events a second, into the real process, its journal and a file.
func TestStormOfEvents(t *testing.T) {
	faults.Case(t, "EV-09")
	total, lost, peak := stormFor(t, time.Second)
	t.Logf("%d events, %d counted as lost, %d MB at the peak", total, lost, peak>>20)
	if peak > 64<<20 {
		t.Errorf("%d MB at the peak, want at most 64", peak>>20)
	}
}

// BenchmarkStormOfEvents is the whole ten seconds of EV-09.
func BenchmarkStormOfEvents(b *testing.B) {
	for range b.N {
		total, lost, peak := stormFor(b, 10*time.Second)
		b.ReportMetric(float64(total), "events")
		b.ReportMetric(float64(lost), "lost")
		b.ReportMetric(float64(peak)/(1<<20), "MB-peak")
	}
}

// EV-19: `tallyman events` started twice on one daemon.
func TestEventsStartedTwice(t *testing.T) {
	faults.Case(t, "EV-19")
	d := fakeDaemon(t)
	dir, config := place(t)
	first := stream(t, d, dir, config, "first.jsonl")
	waitStreams(t, d, 1)
	second := stream(t, d, dir, config, "second.jsonl")
	if code := second.end(); code != 0 {
		t.Errorf("the second ended with %d, want 0:\n%s", code, second.stderr)
	}
	for _, want := range []string{"streamed already", fmt.Sprint("process ", first.cmd.Process.Pid), "--no-lock"} {
		if !strings.Contains(second.stderr.String(), want) {
			t.Errorf("the second does not say %q:\n%s", want, second.stderr)
		}
	}
	// The same state folder: the journal's lock comes first.
	state := filepath.Join(dir, "events")
	third := stream(t, fakeDaemon(t), dir, config, "third.jsonl", "--state-dir", state)
	await(t, func() error {
		if _, err := os.Stat(filepath.Join(state, "events.json")); err != nil {
			return err
		}
		return nil
	})
	fourth := stream(t, d, dir, config, "fourth.jsonl", "--state-dir", state)
	if code := fourth.end(); code != 0 || !strings.Contains(fourth.stderr.String(), "another process streams into") {
		t.Errorf("the fourth ended with %d:\n%s", code, fourth.stderr)
	}
	third.stop()

	both := stream(t, d, dir, config, "both.jsonl", "--no-lock")
	waitStreams(t, d, 2)
	d.Publish(containerEvents(0, 5)...)
	for _, s := range []*streamer{first, both} {
		await(t, func() error {
			if names, _ := s.got(); len(names) != 5 {
				return fmt.Errorf("%d events in %s, want 5", len(names), s.out)
			}
			return nil
		})
		s.stop()
	}
	if names, _ := second.got(); len(names) != 0 {
		t.Errorf("the second wrote %v", names)
	}
	// A streamer that is gone leaves no lock.
	again := stream(t, d, dir, config, "again.jsonl")
	waitStreams(t, d, 1)
	again.stop()
}

func await(t testing.TB, probe func() error) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// EV-19 and EV-20: the agent and a standalone streamer, in both orders, and the hook
// that is run again: one stream at a time.
func TestOneStreamForAgentAndEvents(t *testing.T) {
	faults.Case(t, "EV-19", "EV-20")
	d := fakeDaemon(t)
	r := newStubRig(t, "docker_host = unix://"+d.Socket)
	j := r.job(shopBuild)
	waitStreams(t, d, 1)
	env := append(append([]string(nil), r.runner.Env...), j.Context...)
	var hooks sync.WaitGroup
	for range 4 {
		hooks.Go(func() {
			cmd := exec.Command("bash", "-e", r.inst.HookStarted())
			cmd.Env, cmd.Dir = env, j.Workspace
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("job-started once more: %v: %s", err, out)
			}
		})
	}
	hooks.Wait()
	second := exec.Command(r.inst.Tallyman(), "agent")
	second.Env = r.runner.Env
	if out, err := second.CombinedOutput(); err != nil || !strings.Contains(string(out), "another agent is running") {
		t.Errorf("a second agent: %v: %s, want exit code 0 and a message", err, out)
	}
	standalone := stream(t, d, t.TempDir(), r.inst.Config(), "standalone.jsonl")
	if code := standalone.end(); code != 0 || !strings.Contains(standalone.stderr.String(), "streamed already") {
		t.Errorf("tallyman events beside the agent ended with %d:\n%s", code, standalone.stderr)
	}
	d.Publish(containerEvents(0, 5)...)
	eventually(t, 30*time.Second, func() error {
		if n := len(ofKind(r.records(), record.KindEvent)); n != 5 {
			return fmt.Errorf("%d events in the account, want 5", n)
		}
		return nil
	})
	if opened := d.Streams(); opened != 1 {
		t.Errorf("%d streams were opened, want one", opened)
	}

	// The other order: the agent keeps the rest of the account, says why it has no
	// events, and takes over.
	r.killAgent()
	waitStreams(t, d, 0)
	standalone = stream(t, d, t.TempDir(), r.inst.Config(), "standalone.jsonl")
	waitStreams(t, d, 1)
	r.startAgent()
	eventually(t, 30*time.Second, func() error {
		out, err := r.tallyman("status")
		if err == nil && !strings.Contains(out, "streamed already") {
			err = fmt.Errorf("tallyman status does not say why there are no events:\n%s", out)
		}
		return err
	})
	eventually(t, 30*time.Second, func() error { // a shim on a busy machine may give a record up, and counts it
		r.step(j, "__run", 0, "docker run code-0")
		if len(ofKind(r.records(), record.KindInvocation)) == 0 {
			return errors.New("no call is in the account of an agent without events")
		}
		return nil
	})
	d.Publish(containerEvents(5, 5)...)
	standalone.stop()
	eventually(t, 30*time.Second, func() error {
		if n := len(ofKind(r.records(), record.KindEvent)); n != 10 {
			return fmt.Errorf("%d events in the account, want 10", n)
		}
		return nil
	})
	for _, l := range ofKind(r.records(), record.KindLoss) {
		if l.Loss.Source == "events" {
			t.Errorf("loss %+v", *l.Loss)
		}
	}
}

// EV-21: SIGTERM in the middle of a busy stream, and a next process.
func TestSIGTERMInABusyStream(t *testing.T) {
	faults.Case(t, "EV-21")
	d := fakeDaemon(t)
	dir, config := place(t)
	state := filepath.Join(dir, "events")
	s := stream(t, d, dir, config, "out.jsonl", "--state-dir", state)
	waitStreams(t, d, 1)
	const total = 3000
	half := make(chan struct{})
	go func() {
		for sent := 0; sent < total/2; sent += 50 {
			d.Publish(containerEvents(sent, 50)...)
			time.Sleep(time.Millisecond)
			if sent == total/4 {
				close(half)
			}
		}
	}()
	<-half
	s.stop()
	if _, err := os.Stat(filepath.Join(state, "events.json")); err != nil {
		t.Errorf("no cursor after SIGTERM: %v", err)
	}
	before, _ := s.got()
	if len(before) == 0 {
		t.Error("nothing was flushed")
	}
	// What was sent meanwhile is more than the daemon's buffer, or less: either way the
	// next process has it, or says that it is missing.
	s = stream(t, d, dir, config, "out.jsonl", "--state-dir", state)
	waitStreams(t, d, 1)
	d.Publish(containerEvents(total/2, total/2)...)
	await(t, func() error {
		names, missing := readNames(t, s.out)
		for i := total / 2; i < total; i++ {
			if names[fmt.Sprintf("storm-%d", i)] == 0 {
				return fmt.Errorf("event %d is not there", i)
			}
		}
		if len(names) != total && !missing {
			return fmt.Errorf("%d of %d events, and no loss", len(names), total)
		}
		for name, n := range names {
			if n != 1 {
				t.Fatalf("%s came %d times", name, n)
			}
		}
		return nil
	})
	s.stop()
}

// readNames is got, where gaps are allowed and told.
func readNames(t testing.TB, path string) (names map[string]int, gap bool) {
	t.Helper()
	names = map[string]int{}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var r struct {
			Event *struct{ Name string }
			Loss  *struct{ Cause string }
		}
		if json.Unmarshal(line, &r) != nil {
			continue
		}
		if r.Event != nil {
			names[r.Event.Name]++
		}
		gap = gap || r.Loss != nil && r.Loss.Cause == "stream_gap"
	}
	return names, gap
}
