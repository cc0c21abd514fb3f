package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// alone makes an agent's folder for the time of the test.
func alone(t *testing.T, dir string, config ...string) *lone {
	t.Helper()
	l, err := newLone(dir, append([]string{"job_rate = 0"}, config...)...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// run starts the agent for the time of the test.
func (l *lone) mustStart(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p, err := l.start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			log, _ := os.ReadFile(l.log())
			t.Logf("the agent's log:\n%s", log[max(0, len(log)-4000):])
		}
	})
	if p.ended() {
		t.Fatalf("the agent ended: %v", p.stop())
	}
	return p
}

func (l *lone) mustFlush(t *testing.T) {
	t.Helper()
	if err := l.flush(time.Minute); err != nil {
		t.Fatal(err)
	}
}

// sum is the loss that records tell of, by cause. Losses of cause shim can be those of
// other shims of the machine, which count in the kernel where they have no file.
func sum(records map[string]record.Record) map[string]int64 {
	lost := map[string]int64{}
	for _, r := range records {
		if r.Kind == record.KindLoss {
			lost[r.Loss.Cause] += r.Loss.Count
		}
	}
	return lost
}

func count(records map[string]record.Record, kind record.Kind) (n int) {
	for _, r := range records {
		if r.Kind == kind {
			n++
		}
	}
	return n
}

// The disk of the state is full for a while. The agent stays; calls go to the spool,
// and what the spool has no room for is counted by who lost it. When there is room
// again, the account is complete: each call is delivered or counted.
func TestFullDiskBalances(t *testing.T) {
	faults.Case(t, "SP-06")
	dir := shm(t)
	l := alone(t, dir, "segment_max_bytes = 64KiB", "sinks = file://"+dir+"/out.jsonl?keep=0")
	mountTmpfs(t, l.state(), "1m")
	p := l.mustStart(t, l.command())
	l.mustFlush(t)
	others, _, err := l.delivered()
	if err != nil {
		t.Fatal(err)
	}
	made, kept := 0, 0
	call := func(line []byte) {
		made++
		if l.send(line) != "" {
			kept++
		}
	}
	for i := range 20 {
		_, line := callRecord(fmt.Sprintf("before-%d", i))
		call(line)
	}
	free := fill(t, l.state())
	spooled := 0
	for i := 0; i < 2000 && made == kept; i++ { // until the spool is full, too
		_, line := callRecord(fmt.Sprintf("during-%d", i))
		if st, err := os.Stat(filepath.Join(l.spool(), fmt.Sprintf("%d.jsonl", os.Getuid()))); err == nil && st.Size() > 64<<10 {
			break
		}
		call(line)
		spooled++
	}
	if p.ended() {
		t.Fatalf("the agent ended of a full disk: %v", p.stop())
	}
	if spooled < 50 {
		t.Fatalf("%d calls only: the disk was not full, or the spool was", spooled)
	}
	free()
	for i := range 20 {
		_, line := callRecord(fmt.Sprintf("after-%d", i))
		call(line)
	}
	l.mustFlush(t)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	got, _, err := l.delivered()
	if err != nil {
		t.Fatal(err)
	}
	lost := sum(got)
	if n := count(got, record.KindInvocation); n != kept || int64(made-kept) != lost["shim"]-sum(others)["shim"] {
		t.Errorf("%d calls, %d kept, %d delivered; losses %v", made, kept, n, lost)
		for _, r := range got {
			if r.Kind == record.KindLoss {
				t.Logf("%+v", *r.Loss)
			}
		}
	}
	for cause, n := range lost {
		// Half a record that the full disk cut is told; it came again from the spool.
		if cause != "shim" && cause != "torn_line" {
			t.Errorf("a loss of %d by %s", n, cause)
		}
	}
}

// Ten records come for each one that the sink takes. Memory keeps to its bound, and
// what the journal's bound costs is counted exactly.
func TestOverload(t *testing.T) {
	faults.Case(t, "SP-19")
	records := 6_000
	if os.Getenv(inject.AllVariable) == "all" {
		records = 300_000 // 5,000 a second for a minute
	}
	l := alone(t, shm(t), "journal_max_bytes = 1MiB", "segment_max_bytes = 64KiB", "sinks = stdout:?batch_records=50&batch_delay=5ms&name=slow")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := l.command()
	cmd.Stdout = w
	p := l.mustStart(t, cmd)
	w.Close()

	got := map[string]record.Record{}
	turns := make(chan bool, records) // one for each line that the reader may take; closed: all
	read := make(chan error, 1)
	go func() {
		lines := bufio.NewReader(r)
		for {
			<-turns
			line, err := lines.ReadBytes('\n')
			if err != nil {
				read <- nil
				return
			}
			var rec record.Record
			if err := recordjson.Unmarshal(bytes.TrimSuffix(line, []byte("\n")), &rec); err != nil {
				read <- fmt.Errorf("%w: %s", err, line)
				return
			}
			if _, twice := got[rec.ID]; twice {
				read <- fmt.Errorf("%s came twice", rec.ID)
				return
			}
			got[rec.ID] = rec
		}
	}()
	var acked, spooled atomic.Int64
	var senders sync.WaitGroup
	for s := range 4 {
		senders.Go(func() {
			for i := range records / 4 {
				_, line := callRecord(fmt.Sprintf("s%d-%d", s, i))
				switch l.send(line) {
				case "acked":
					acked.Add(1)
				case "spooled":
					spooled.Add(1)
				default:
					t.Error("a record was not kept")
				}
				if i%10 == 0 {
					turns <- true
				}
			}
		})
	}
	senders.Wait()
	close(turns)
	l.mustFlush(t)
	peak := peakMemory(t, p.pid)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(l.journal(), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	journalled := j.Status().Records // the ends of the calls among them
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	lost := sum(got)
	if lost["disk_cap"] == 0 {
		t.Fatal("nothing was dropped: this was no overload")
	}
	t.Logf("%d calls acknowledged, %d by the spool, %d records journalled, %d delivered, lost %v, peak of memory %d KB", acked.Load(), spooled.Load(), journalled, len(got), lost, peak)
	if journalled != int64(len(got))+lost["disk_cap"] || acked.Load()+spooled.Load() != int64(records) || journalled < int64(records) {
		t.Errorf("the books do not balance: %d in the journal, %d delivered, %d dropped", journalled, len(got), lost["disk_cap"])
	}
	if peak > 64<<10 {
		t.Errorf("%d KB of memory at the peak", peak)
	}
}

// peakMemory is VmHWM of a process in KB.
func peakMemory(t *testing.T, pid int) (kb int) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "VmHWM:")
	if _, err := fmt.Sscan(rest, &kb); err != nil {
		t.Fatal(err)
	}
	return kb
}

// A second agent on the same state sees the lock of the first, says so and ends well;
// it delivers nothing. The lock dies with its process.
func TestTwoAgentsOnOneSpool(t *testing.T) {
	faults.Case(t, "SP-22")
	dir := shm(t)
	l := alone(t, dir, "sinks = file://"+dir+"/out.jsonl?keep=0")
	p := l.mustStart(t, l.command())
	ids := map[string]bool{}
	add := func(name string) {
		id, line := callRecord(name)
		if l.toSpool(line) == "" {
			t.Fatal("the spool does not take a record")
		}
		ids[id] = true
	}
	for i := range 20 {
		add(fmt.Sprintf("call-%d", i))
		if i%5 == 0 {
			cmd := l.command()
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "another agent is running") {
				t.Fatalf("the second agent: %v: %s", err, out.String())
			}
		}
	}
	l.mustFlush(t)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	got, twice, err := l.delivered()
	if err != nil || twice != 0 {
		t.Fatalf("%d records came twice (%v)", twice, err)
	}
	for id := range ids {
		if _, ok := got[id]; !ok {
			t.Errorf("%s is not delivered", id)
		}
	}
	p = l.mustStart(t, l.command())
	p.kill()
	l.mustStart(t, l.command()) // at once
}

// The agent is asked to end while one sink hangs and another cannot be written. It
// ends, says how much is left, and the next one delivers it.
func TestEndWithDeadSinks(t *testing.T) {
	faults.Case(t, "SP-27")
	dir := shm(t)
	l := alone(t, dir, "sinks = stdout:?name=hangs&batch_records=2000 file://"+dir+"/missing/out.jsonl?name=dead")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := l.command("--flush-timeout", "1s")
	cmd.Stdout = w
	p := l.mustStart(t, cmd)
	w.Close()
	ids := map[string]bool{}
	for i := range 300 { // more than a pipe holds
		id, line := callRecord(fmt.Sprintf("call-%d", i))
		if l.send(line) == "" {
			t.Fatal("a record was not kept")
		}
		ids[id] = true
	}
	start := time.Now()
	err = p.stop()
	took := time.Since(start)
	if took > 30*time.Second {
		t.Errorf("the end took %v", took)
	}
	t.Logf("ended after %v: %v", took.Round(time.Millisecond), err)
	log, _ := os.ReadFile(l.log())
	for _, want := range []string{"sink=hangs left=", "sink=dead left=", "records for hangs", "records for dead; they stay in the journal"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	// What the pipe took before it was full is delivered.
	piped, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "piped"), piped, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "missing"), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(dir, "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd = l.command()
	cmd.Stdout = out
	p = l.mustStart(t, cmd)
	l.mustFlush(t)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	dead, _, err := readAll(filepath.Join(dir, "missing", "out.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	hung, _, err := readAll(filepath.Join(dir, "piped"), filepath.Join(dir, "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	for id := range ids {
		if _, ok := dead[id]; !ok {
			t.Fatalf("%s is lost to the sink that could not be written", id)
		}
	}
	if count(hung, record.KindInvocation) != len(ids) {
		t.Errorf("the sink that hung has got %d of %d records", count(hung, record.KindInvocation), len(ids))
	}
}

// Files of the spool that are not what they were, or hold what no shim of this
// version writes.
func TestSpoolFiles(t *testing.T) {
	own := fmt.Sprintf("%d.jsonl", os.Getuid())
	for _, tt := range []struct {
		name, proves string
		do           func(t *testing.T, l *lone, p *process) (after *process, want []string)
		losses       map[string]int64
	}{
		{"another file gets the inode of one that was read", "SP-17", func(t *testing.T, l *lone, p *process) (*process, []string) {
			first, line := callRecord("first")
			l.toSpool(line)
			l.mustFlush(t)
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			want := []string{first}
			var lines []byte
			for i := range 3 {
				id, line := callRecord(fmt.Sprintf("second-%d", i))
				want, lines = append(want, id), append(lines, line...)
			}
			path := filepath.Join(l.spool(), own)
			before, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, lines, 0o600); err != nil {
				t.Fatal(err)
			}
			if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
				t.Fatal("the inode is another one")
			}
			return l.mustStart(t, l.command()), want
		}, nil},
		{"a newer shim", "SP-21", func(t *testing.T, l *lone, p *process) (*process, []string) {
			id, line := callRecord("newer")
			line = bytes.Replace(line, []byte(`"schema":1`), []byte(`"schema":2`), 1)
			line = bytes.Replace(line, []byte(`"invocation":{`), []byte(`"quorum":{"n":[1,2.5]},"invocation":{"colour":"red",`), 1)
			l.toSpool(line)
			l.mustFlush(t)
			out, err := os.ReadFile(l.out())
			if err != nil || !bytes.Contains(out, []byte(`"quorum":{"n":[1,2.5]}`)) || !bytes.Contains(out, []byte(`"colour":"red"`)) || !bytes.Contains(out, []byte(`"schema":2`)) {
				t.Errorf("what this version does not know is gone: %s %v", out, err)
			}
			return p, []string{id}
		}, nil},
		{"a record of 10 MB", "SP-26", func(t *testing.T, l *lone, p *process) (*process, []string) {
			a, before := callRecord("before")
			_, huge := callRecord("huge")
			b, after := callRecord("after")
			huge = bytes.Replace(huge, []byte("xxxx"), bytes.Repeat([]byte("x"), 10<<20), 1)
			f, err := os.OpenFile(filepath.Join(l.spool(), own), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for _, line := range [][]byte{before, huge, after} {
				if _, err := f.Write(line); err != nil {
					t.Fatal(err)
				}
			}
			l.mustFlush(t)
			if peak := peakMemory(t, p.pid); peak > 64<<10 {
				t.Errorf("%d KB of memory", peak)
			}
			return p, []string{a, b}
		}, map[string]int64{"torn_line": 1}},
		{"a torn record before a whole one", "SP-03", func(t *testing.T, l *lone, p *process) (*process, []string) {
			_, torn := callRecord("torn")
			id, whole := callRecord("whole")
			if err := os.WriteFile(filepath.Join(l.spool(), own), append(torn[:len(torn)/2:len(torn)/2], whole...), 0o600); err != nil {
				t.Fatal(err)
			}
			l.mustFlush(t)
			return p, []string{id}
		}, map[string]int64{"torn_line": 1}},
		{"half a record, and later the rest", "SP-32", func(t *testing.T, l *lone, p *process) (*process, []string) {
			id, line := callRecord("late")
			f, err := os.OpenFile(filepath.Join(l.spool(), own), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for _, part := range [][]byte{line[:100], line[100:]} {
				if _, err := f.Write(part); err != nil {
					t.Fatal(err)
				}
				l.mustFlush(t)
			}
			return p, []string{id}
		}, nil},
		{"the folder becomes a link to another one", "SP-30", func(t *testing.T, l *lone, p *process) (*process, []string) {
			victim := filepath.Join(l.dir, "victim")
			if err := os.Mkdir(victim, 0o755); err != nil {
				t.Fatal(err)
			}
			_, line := callRecord("not-ours")
			file := filepath.Join(victim, own)
			if err := os.WriteFile(file, line, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Rename(l.spool(), l.spool()+".away"), os.Symlink(victim, l.spool())); err != nil {
				t.Fatal(err)
			}
			l.mustFlush(t)
			time.Sleep(3 * time.Second) // a file at rest is put away after two
			l.mustFlush(t)
			if names, err := os.ReadDir(victim); err != nil || len(names) != 1 || names[0].Name() != own {
				t.Errorf("the other folder was changed: %v %v", names, err)
			}
			if err := errors.Join(os.Remove(l.spool()), os.Rename(l.spool()+".away", l.spool())); err != nil {
				t.Fatal(err)
			}
			id, line := callRecord("ours")
			l.toSpool(line)
			l.mustFlush(t)
			return p, []string{id}
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			faults.Case(t, tt.proves)
			dir := shm(t)
			l := alone(t, dir, "sinks = file://"+dir+"/out.jsonl?keep=0")
			p, want := tt.do(t, l, l.mustStart(t, l.command()))
			l.mustFlush(t)
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			got, twice, err := l.delivered()
			if err != nil || twice != 0 {
				t.Fatalf("%d came twice: %v", twice, err)
			}
			if n := count(got, record.KindInvocation); n != len(want) {
				t.Errorf("%d calls delivered, want %d", n, len(want))
			}
			for _, id := range want {
				if _, ok := got[id]; !ok {
					t.Errorf("%s is not delivered", id)
				}
			}
			lost := sum(got)
			delete(lost, "shim")
			if !maps.Equal(lost, tt.losses) {
				t.Errorf("losses %v, want %v", lost, tt.losses)
			}
		})
	}
}

// A large backlog meets a small control group: the agent delivers it all.
func TestBacklogInASmallControlGroup(t *testing.T) {
	faults.Case(t, "SP-31")
	dir, err := os.MkdirTemp("/tmp", "tallyman-") // on the disk: memory would count
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	size := int64(100 << 20)
	if os.Getenv(inject.AllVariable) == "all" {
		size = 1 << 30
	}
	l := alone(t, dir, "journal_max_bytes = 4GiB", "sinks = file://"+dir+"/out.jsonl?keep=1&max_bytes=64MiB")
	j, err := journal.Open(l.journal(), journal.Options{MaxBytes: 4 << 30})
	if err != nil {
		t.Fatal(err)
	}
	var block []byte
	written, blocks := int64(0), 0
	for ; written < size; blocks++ {
		block = block[:0]
		for i := range 1000 {
			_, line := callRecord(fmt.Sprintf("b%d-%d", blocks, i))
			block = append(block, line...)
		}
		if err := j.Append(block); err != nil {
			t.Fatal(err)
		}
		written += int64(len(block))
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	group := memoryGroup(t, 32<<20)
	agent := l.command()
	cmd := exec.Command("/bin/sh", append([]string{"-c", `echo $$ >"$0"/cgroup.procs && exec "$@"`, group, agent.Path}, agent.Args[1:]...)...)
	cmd.Env, cmd.SysProcAttr = agent.Env, agent.SysProcAttr
	p := l.mustStart(t, cmd)
	if err := l.flush(5 * time.Minute); err != nil {
		t.Fatal(err)
	}
	st, err := l.status()
	if err != nil {
		t.Fatal(err)
	}
	if p.ended() || st.Sinks[0].Delivered < int64(blocks*1000) || st.Sinks[0].BehindRecords != 0 {
		t.Errorf("%+v", st.Sinks[0])
	}
	t.Logf("%d MB, %d records delivered in a control group of 32 MB; %d KB at the peak", written>>20, st.Sinks[0].Delivered, peakMemory(t, p.pid))
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
}

// memoryGroup makes a control group with a limit of memory (cgroups(7)).
func memoryGroup(t *testing.T, limit int64) string {
	t.Helper()
	root, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(root); err != nil {
		root, file = "/sys/fs/cgroup", "memory.max"
	}
	dir := filepath.Join(root, fmt.Sprintf("tallyman-%d", os.Getpid()))
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		t.Cleanup(func() {
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				err := unix.Rmdir(dir)
				if err == nil {
					return
				}
				if time.Now().After(deadline) {
					t.Errorf("remove the control group: %v", err)
					return
				}
			}
		})
		err = os.WriteFile(filepath.Join(dir, file), fmt.Append(nil, limit), 0)
	}
	if err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs a control group with a limit of memory: %v", err))
	}
	return dir
}
