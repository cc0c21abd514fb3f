package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// lone is an agent without hooks, shim and daemon, in a folder of its own, with a
// file as its sink.
type lone struct {
	dir string
}

// newLone makes the folder and its configuration.
func newLone(dir string, config ...string) (*lone, error) {
	l := &lone{dir}
	if err := os.MkdirAll(l.spool(), 0o755); err != nil {
		return nil, err
	}
	lines := append([]string{"run_dir = " + l.run(), "state_dir = " + l.state(), "statsd = off"}, config...)
	return l, os.WriteFile(filepath.Join(dir, "tallyman.conf"), []byte(strings.Join(lines, "\n")+"\n"), 0o644)
}

func (l *lone) run() string     { return filepath.Join(l.dir, "run") }
func (l *lone) spool() string   { return filepath.Join(l.run(), "spool") }
func (l *lone) socket() string  { return filepath.Join(l.run(), "agent.sock") }
func (l *lone) state() string   { return filepath.Join(l.dir, "state") }
func (l *lone) journal() string { return filepath.Join(l.state(), "journal") }
func (l *lone) out() string     { return filepath.Join(l.dir, "out.jsonl") }
func (l *lone) log() string     { return filepath.Join(l.dir, "log") }

// command is the agent, not started.
func (l *lone) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(built, "tallyman"), append([]string{"agent", "--no-events", "--log", l.log()}, args...)...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + l.dir, "TALLYMAN_CONFIG=" + filepath.Join(l.dir, "tallyman.conf")}
	if os.Geteuid() == 0 {
		// Without the counters of losses that other shims of the machine keep in the kernel.
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWIPC}
	}
	return cmd
}

// process is a running agent, or strace around one.
type process struct {
	l      *lone
	cmd    *exec.Cmd
	output bytes.Buffer
	pid    int // of the agent; 0 where it ended before it said so
	done   chan struct{}
	err    error // once done
}

// start starts the agent and waits until it answers or ends.
func (l *lone) start(cmd *exec.Cmd) (*process, error) {
	p := &process{l: l, cmd: cmd, done: make(chan struct{})}
	cmd.Stderr = &p.output
	if cmd.Stdout == nil {
		cmd.Stdout = &p.output
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if p.ended() {
			return p, nil
		}
		if client, err := agent.Dial(context.Background(), l.socket()); err == nil {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			st, err := client.Status(ctx)
			cancel()
			client.Close()
			if err == nil {
				p.pid = st.PID
				return p, nil
			}
		}
		if time.Now().After(deadline) {
			p.kill()
			return nil, errors.New("the agent neither answers nor ends")
		}
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) kill() {
	if p.pid != 0 {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	}
	_ = p.cmd.Process.Kill()
	<-p.done
}

// stop ends the agent by SIGTERM.
func (p *process) stop() error {
	if !p.ended() && p.pid != 0 {
		_ = syscall.Kill(p.pid, syscall.SIGTERM)
	}
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		p.kill()
		return errors.New("the agent did not end on SIGTERM")
	}
	if p.err != nil {
		log, _ := os.ReadFile(p.l.log())
		return fmt.Errorf("the agent: %w: %s%s", p.err, p.output.String(), log)
	}
	return nil
}

// flush asks the agent to deliver everything.
func (l *lone) flush(limit time.Duration) error {
	client, err := agent.Dial(context.Background(), l.socket())
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return client.Flush(ctx)
}

func (l *lone) status() (agent.Status, error) {
	client, err := agent.Dial(context.Background(), l.socket())
	if err != nil {
		return agent.Status{}, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return client.Status(ctx)
}

// send does what the shim does, but waits long for the answer: strace is slow. It
// says how the record was kept: acked, spooled, or "" where neither.
func (l *lone) send(line []byte) string {
	conn, err := net.Dial("unixpacket", l.socket())
	if err == nil {
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		var ack [1]byte
		if _, err = conn.Write(line); err == nil {
			if n, err := conn.Read(ack[:]); err == nil && n == 1 && (ack[0] == handover.AckClose || ack[0] == handover.AckKeep) {
				return "acked"
			}
		}
	}
	return l.toSpool(line)
}

func (l *lone) toSpool(line []byte) string {
	if handover.Deliver(handover.Target{Spool: l.spool(), SpoolMaxBytes: 64 << 20}, line, os.Getuid(), os.Geteuid()) == handover.Spooled {
		return "spooled"
	}
	return ""
}

// callRecord is the record of a call that can be told from all others.
func callRecord(name string) (id string, line []byte) {
	r := record.Record{ID: record.NewID(time.Now()), TS: time.Now(), Kind: record.KindInvocation, Schema: record.SchemaVersion, By: record.ByNone,
		Invocation: &record.Invocation{Tool: "docker", Command: "pull", Images: []string{"example.org/" + name + ":1"}, Cwd: strings.Repeat("x", 400)}}
	return r.ID, record.Append(nil, &r)
}

// readAll reads the records of a journal or of files, by id, and counts those that
// come again. Two that have one id must be the same.
func readAll(paths ...string) (byID map[string]record.Record, again int, err error) {
	byID = map[string]record.Record{}
	lines := map[string][]byte{}
	for _, path := range paths {
		r, err := journal.OpenReader(path, journal.Position{})
		if err != nil {
			return nil, 0, err
		}
		defer r.Close()
		for {
			l, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, 0, err
			}
			var rec record.Record
			if err := recordjson.Unmarshal(l.Data, &rec); err != nil {
				return nil, 0, err
			}
			if before, ok := lines[rec.ID]; ok {
				again++
				if !sameButWay(before, l.Data) {
					return nil, 0, fmt.Errorf("two records have one id:\n%s\n%s", before, l.Data)
				}
			}
			lines[rec.ID], byID[rec.ID] = bytes.Clone(l.Data), rec
		}
	}
	return byID, again, nil
}

// sameButWay says whether two records are one, which may have come twice: by the
// socket and by the file.
func sameButWay(a, b []byte) bool {
	return bytes.Equal(withoutWay(a), withoutWay(b))
}

func withoutWay(line []byte) []byte {
	var r record.Record
	if err := recordjson.Unmarshal(line, &r); err != nil {
		return line
	}
	if r.Invocation != nil {
		r.Invocation.Path, r.Invocation.PID, r.Invocation.UID = "", 0, 0
	}
	return record.Append(nil, &r)
}

// delivered reads what the file sink wrote.
func (l *lone) delivered() (map[string]record.Record, int, error) {
	paths, err := filepath.Glob(l.out() + "*")
	if err != nil {
		return nil, 0, err
	}
	return readAll(paths...)
}

// crashRun is one life of an agent, which wrap may end, and the next one. It returns
// whether the first was killed, and how many records came twice. Where a call failed
// in place of a kill, a full disk may have cost the journal what its sink had taken,
// and what could not be read is said to be lost.
func crashRun(dir string, failing bool, wrap func(*exec.Cmd) *exec.Cmd) (killed bool, twice int, err error) {
	l, err := newLone(dir, "segment_max_bytes = 4KiB", "sinks = file://"+dir+"/out.jsonl?fsync=true&keep=100&max_bytes=6KiB&batch_delay=5ms&batch_records=4")
	if err != nil {
		return false, 0, err
	}
	kept := map[string]string{} // name of the call by its id
	for i := range 3 {
		name := fmt.Sprintf("before-%d", i)
		id, line := callRecord(name)
		if l.toSpool(line) == "" {
			return false, 0, errors.New("the spool does not take a record")
		}
		kept[id] = name
	}
	cmd := l.command()
	if wrap != nil {
		cmd = wrap(cmd)
	}
	first, err := l.start(cmd)
	if err != nil {
		return false, 0, err
	}
	defer first.kill()
	for i := range 12 {
		name := fmt.Sprintf("call-%d", i)
		id, line := callRecord(name)
		if l.send(line) == "" {
			return false, 0, fmt.Errorf("%s: neither the agent nor the spool took it", name)
		}
		kept[id] = name
		if i == 5 {
			_ = l.flush(20 * time.Second) // the kill may come here
		}
	}
	_ = first.stop() // killed, perhaps
	killed = first.err != nil

	second, err := l.start(l.command())
	if err != nil {
		return killed, 0, err
	}
	defer second.kill()
	if second.ended() {
		return killed, 0, fmt.Errorf("the next agent ended: %w", second.stop())
	}
	id, line := callRecord("after")
	if l.send(line) != "acked" {
		return killed, 0, errors.New("the next agent acknowledges nothing")
	}
	kept[id] = "after"
	if err := l.flush(time.Minute); err != nil {
		return killed, 0, fmt.Errorf("the next agent: %w", err)
	}
	if err := second.stop(); err != nil {
		return killed, 0, err
	}

	got, twice, err := l.delivered()
	if err != nil {
		return killed, 0, err
	}
	held, _, err := readAll(l.journal())
	if err != nil {
		return killed, 0, err
	}
	for id, name := range kept {
		r, ok := got[id]
		if !ok || len(r.Invocation.Images) != 1 || r.Invocation.Images[0] != "example.org/"+name+":1" {
			return killed, 0, fmt.Errorf("%s was kept and is not delivered as it was", name)
		}
	}
	for id, r := range got {
		if _, ok := held[id]; !ok && !failing {
			return killed, 0, fmt.Errorf("delivered and not in the journal: %+v", r)
		}
		if r.Kind == record.KindInvocation && kept[id] == "" {
			return killed, 0, fmt.Errorf("invented: %+v", r)
		}
		if r.Kind == record.KindLoss && r.Loss.Cause != "shim" && !(failing && r.Loss.Count < 0) { // shim: other shims of this machine
			return killed, 0, fmt.Errorf("nothing is missing, and a loss says so: %+v", *r.Loss)
		}
	}
	if len(held) > len(got) || len(held) < len(got) && !failing {
		return killed, 0, fmt.Errorf("%d records in the journal, %d delivered", len(held), len(got))
	}
	return killed, twice, nil
}

// The built agent is killed at its N-th system call of a kind, for every N that the
// kind gets to, while calls come by its socket and by the spool and a sink takes
// them. What was acknowledged, and what lay in the spool, is delivered by the next
// agent, as it was and under its id; the journal holds nothing else.
func TestCrashOfTheAgentAtEverySystemCall(t *testing.T) {
	faults.Case(t, "SP-01")
	inject.Require(t)
	memory := shm(t)
	kinds := []string{"write", "fsync", "renameat", "renameat2", "unlinkat", "ftruncate", "sendmsg", "sendto", "openat", "linkat", "symlinkat", "mkdirat", "bind", "listen"}
	var count inject.Count
	if killed, _, err := crashRun(filepath.Join(memory, "count"), false, func(cmd *exec.Cmd) *exec.Cmd {
		count = inject.Counting(t, cmd, slices.Concat(kinds, []string{"pread64", "recvfrom", "accept4", "getdents64", "fcntl"})...)
		return count.Cmd
	}); err != nil || killed {
		t.Fatalf("the run that shall be killed: %v", err)
	}
	calls, all := count.Calls(t)
	points := inject.Points(calls, inject.Kill, kinds...)
	var failing []inject.Point
	for call, errnos := range map[string][]string{
		"write": {"ENOSPC", "EIO"}, "fsync": {"EIO", "ENOSPC"}, "renameat": {"ENOSPC"}, "renameat2": {"EIO"}, "unlinkat": {"EIO"}, "openat": {"EMFILE", "EINTR"},
		"sendmsg": {"EPIPE"}, "pread64": {"EIO"}, "recvfrom": {"ECONNRESET"}, "accept4": {"EMFILE", "EINTR"}, "getdents64": {"EIO"}, "fcntl": {"EMFILE"},
	} {
		for _, errno := range errnos {
			failing = append(failing, inject.Points(calls, inject.Error(errno), call)...)
		}
	}
	if all["write"] < 12 || all["renameat"] < 2 || all["unlinkat"] < 2 || all["fsync"] < 4 {
		t.Fatalf("the run that shall be killed does too little: %v", all)
	}
	var kills, survived, twice, dirs atomic.Int64
	inject.Explore(append(inject.Sample(points, 30), inject.Sample(failing, 20)...), func(p inject.Point) {
		dir := filepath.Join(memory, fmt.Sprint(dirs.Add(1)))
		defer os.RemoveAll(dir)
		killed, again, err := crashRun(dir, p.Fault != inject.Kill, p.Command)
		if err != nil {
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Errorf("%v: %v\n%s", p, err, log)
		}
		switch {
		case p.Fault == inject.Kill && killed:
			kills.Add(1)
		case p.Fault != inject.Kill && !killed:
			survived.Add(1)
		}
		twice.Add(int64(again))
	})
	if t.Failed() {
		return
	}
	// Not all are reached: a point is of one thread, and this program has several.
	t.Logf("crash exploration: %d kill points (of %d), %d failing calls (of %d), 0 acknowledged records lost; %d records came twice",
		kills.Load(), len(points), survived.Load(), len(failing), twice.Load())
}

// shm is a folder in memory with a short name: it holds sockets.
func shm(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "tallyman-")
	if err != nil {
		dir, err = os.MkdirTemp("/tmp", "tallyman-")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
