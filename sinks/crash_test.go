package sinks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/journal"
)

// crashScript appends records and delivers them with a real pump to a real file that
// is renamed when it is full; the cursor is saved after each batch. It prints what
// was tried and taken. The last run of a directory delivers all that is left.
func crashScript(dir string) {
	say := func(what, id string) {
		for range 3 {
			// The injected error may hit this very call, which then did nothing.
			if _, err := os.Stdout.WriteString(what + " " + id + "\n"); err == nil {
				return
			}
		}
	}
	// again tries what the injected error hit, as the next start would.
	again := func(what string, do func() error) {
		err := do()
		for range 2 {
			if err != nil {
				err = do()
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, what, err)
			os.Exit(3)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	round := os.Getenv("SINKS_TEST_ROUND")
	var j *journal.Journal
	again("open", func() (err error) {
		j, err = journal.Open(filepath.Join(dir, "journal"), journal.Options{MaxSegmentBytes: 2000})
		return err
	})
	var p *Pump
	again("make the pump", func() error {
		target, err := Parse(fileURL(filepath.Join(dir, "out.jsonl"), "fsync=true&max_bytes=1500&keep=100&batch_delay=1h&batch_records=3"))
		if err != nil {
			return err
		}
		s, err := target.Open(ctx)
		if err != nil {
			return err
		}
		o := target.Pump
		o.CursorDir, o.QuarantineDir = filepath.Join(dir, "cursors"), filepath.Join(dir, "quarantine")
		o.SaveEvery, o.MinBackoff, o.MaxBackoff = 1, time.Millisecond, 10*time.Millisecond
		p, err = NewPump(j, s, o)
		return err
	})
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- p.Run(running) }()
	for i := range 12 {
		id := fmt.Sprintf("%s-%d", round, i)
		say("trying", id)
		if err := j.Append(line(id, 300)); err != nil {
			continue // not acknowledged
		}
		say("taken", id)
		if i%4 == 3 {
			again("flush", func() error { return p.Flush(ctx) })
		}
	}
	again("flush", func() error { return p.Flush(ctx) })
	stop()
	if err := errors.Join(<-ended, j.Close()); err != nil && round == "last" {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	os.Exit(0)
}

func runCrashScript(dir, round string, out io.Writer, wrap func(*exec.Cmd) *exec.Cmd) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	// One processor: strace counts the calls of each thread.
	cmd.Env = append(os.Environ(), "SINKS_TEST_CRASH="+dir, "SINKS_TEST_ROUND="+round, "GOMAXPROCS=1")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &stderr
	if wrap != nil {
		cmd = wrap(cmd)
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, stderr.String())
	}
	return nil
}

// checkDelivery compares what a script said with the files that the sink wrote.
func checkDelivery(dir string, out []byte) (twice int, err error) {
	tried, taken := map[string]bool{}, map[string]bool{}
	for l := range strings.Lines(string(out)) {
		switch what, id, _ := strings.Cut(strings.TrimSpace(l), " "); what {
		case "trying":
			tried[id] = true
		case "taken":
			taken[id] = true
		}
	}
	paths, err := filepath.Glob(filepath.Join(dir, "out.jsonl*"))
	if err != nil {
		return 0, err
	}
	delivered := map[string]bool{}
	for _, path := range paths {
		r, err := journal.OpenReader(path, journal.Position{})
		if err != nil {
			return 0, err
		}
		for {
			l, err := r.Next()
			if err != nil {
				break
			}
			id := string(l.ID())
			if !tried[id] || !bytes.Equal(append(bytes.Clone(l.Data), '\n'), line(id, 300)) {
				return 0, fmt.Errorf("invented: %s", l.Data)
			}
			if delivered[id] {
				twice++
			}
			delivered[id] = true
		}
		if err := r.Close(); err != nil {
			return 0, err
		}
	}
	for id := range taken {
		if !delivered[id] {
			return 0, fmt.Errorf("%s was taken and not delivered", id)
		}
	}
	if len(delivered) > len(tried) || len(taken) < 12 {
		return 0, fmt.Errorf("%d tried, %d taken, %d delivered", len(tried), len(taken), len(delivered))
	}
	return twice, nil
}

// The process is killed at its N-th system call of a kind, for every N, or that call
// fails, while a pump delivers. Then it is started again: all that the journal took
// is in the sink's files, as it was written, and nothing else.
func TestCrashAtEverySystemCall(t *testing.T) {
	faults.Case(t, "SP-01")
	inject.Require(t)
	memory, err := os.MkdirTemp("/dev/shm", "sinks-test-")
	if err != nil {
		memory = t.TempDir()
	}
	defer os.RemoveAll(memory)
	changing := []string{"write", "openat", "renameat", "renameat2", "fsync", "unlinkat", "mkdirat", "symlinkat"}
	var count inject.Count
	var out bytes.Buffer
	if err := runCrashScript(filepath.Join(memory, "count"), "first", &out, func(cmd *exec.Cmd) *exec.Cmd {
		count = inject.Counting(t, cmd, changing...)
		return count.Cmd
	}); err != nil {
		t.Fatal(err)
	}
	calls, _ := count.Calls(t)
	kills := inject.Points(calls, inject.Kill, changing...)
	var errs []inject.Point
	for call, errnos := range map[string][]string{
		"write": {"ENOSPC", "EIO", "EINTR"}, "openat": {"EMFILE", "ENOSPC", "EINTR"}, "renameat2": {"ENOSPC"},
		"renameat": {"ENOSPC", "EIO"}, "fsync": {"EIO", "ENOSPC"}, "unlinkat": {"EIO"}, "mkdirat": {"ENOSPC"},
	} {
		for _, errno := range errnos {
			errs = append(errs, inject.Points(calls, inject.Error(errno), call)...)
		}
	}
	var killed, failed, twice, dirs atomic.Int64
	inject.Explore(append(inject.SampleOfSelf(kills, 40), inject.SampleOfSelf(errs, 40)...), func(p inject.Point) {
		dir := filepath.Join(memory, fmt.Sprint(dirs.Add(1)))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Error(err)
			return
		}
		defer os.RemoveAll(dir)
		var out bytes.Buffer
		err := runCrashScript(dir, "first", &out, p.Command)
		switch {
		case p.Fault == inject.Kill && err != nil:
			killed.Add(1)
		case p.Fault != inject.Kill && err == nil:
			failed.Add(1)
		case p.Fault != inject.Kill && !strings.Contains(err.Error(), "exit status"):
			t.Errorf("%v ended the process: %v", p, err)
		}
		if err := runCrashScript(dir, "last", &out, nil); err != nil {
			t.Errorf("%v, the next start: %v", p, err)
			return
		}
		again, err := checkDelivery(dir, out.Bytes())
		if err != nil {
			t.Errorf("%v: %v", p, err)
		}
		twice.Add(int64(again))
	})
	if t.Failed() {
		return
	}
	t.Logf("crash exploration of delivery: %d of %d kill points, %d of %d failing calls, 0 acknowledged records lost; %d records came twice",
		killed.Load(), len(kills), failed.Load(), len(errs), twice.Load())
}
