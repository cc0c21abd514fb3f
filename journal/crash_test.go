package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/record"
)

// crashScript is a writer and a consumer that go through everything the journal
// does: append, rotate, remove by the bound with and without a loss, sync, save a
// cursor, tell a loss by a record in the journal itself. It prints what it tries,
// what was taken and what was delivered. The last run of a directory delivers all
// that is left. No error ends it: a caller goes on too.
func crashScript(dir string) {
	fmt.Println("round starts")
	runtime.LockOSThread() // strace counts the calls of each thread
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
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
				say("error", what+" "+strings.ReplaceAll(err.Error(), "\n", " "))
				err = do()
			}
		}
		if err != nil {
			fail(fmt.Errorf("%s: %w", what, err))
		}
	}
	round := os.Getenv("JOURNAL_TEST_ROUND")
	var j *Journal
	lossID := func(l record.Loss) string {
		return record.DeriveID(time.Unix(1_800_000_000, 0), l.Cause, l.Source, l.Detail, fmt.Sprint(l.Count))
	}
	again("open", func() (err error) {
		j, err = Open(filepath.Join(dir, "journal"), Options{MaxSegmentBytes: 2000, MaxBytes: 8000, Now: func() time.Time { return time.Unix(1_800_000_000, 0) }, OnLoss: func(l record.Loss) {
			r := record.Record{ID: lossID(l), TS: time.Unix(1_800_000_000, 0), Kind: record.KindLoss, Schema: 1, By: record.ByNone, Loss: &l}
			say("trying", r.ID)
			again("append a loss", func() error { return j.Append(record.Append(nil, &r)) })
			say("taken", r.ID)
		}})
		return err
	})
	var c *Cursor
	again("open the cursor", func() (err error) {
		c, err = j.OpenCursor(filepath.Join(dir, "cursors"), "x")
		return err
	})
	var r *Reader
	again("open a reader", func() (err error) {
		r, err = j.Reader(c.Position())
		return err
	})
	save := func() {
		if err := c.Save(); err != nil {
			say("error", "save "+strings.ReplaceAll(err.Error(), "\n", " "))
			return
		}
		say("saved", "cursor")
	}
	deliver := func() {
		n := 0
		for failed := 0; ; {
			l, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				if failed++; failed > 2 {
					fail(err)
				}
				continue
			}
			if at, ok := c.Take(l); !ok {
				again("seek", func() error { return r.Seek(at) })
				continue
			}
			say("delivered", string(bytes.Clone(l.Data)))
			n++
		}
		c.Advance(r.Position(), n)
		save()
	}
	for i := range 30 {
		id := fmt.Sprintf("%s-%d", round, i)
		say("trying", id)
		err := j.Append(line(id, 500))
		if err != nil {
			say("error", "append "+strings.ReplaceAll(err.Error(), "\n", " "))
			continue // not acknowledged
		}
		say("taken", id)
		if i%7 == 6 {
			if err := j.Sync(); err != nil {
				say("error", "sync "+strings.ReplaceAll(err.Error(), "\n", " "))
			}
		}
		if i%4 == 3 && i < 8 { // then the consumer is away until the bound bites
			deliver()
		}
	}
	deliver()
	if round == "last" {
		say("trying", "the-end")
		if err := j.Append(line("the-end", 0)); err != nil {
			fail(err)
		}
		say("taken", "the-end")
		if deliver(); c.Behind() != 0 {
			fail(fmt.Errorf("behind by %d at the end", c.Behind()))
		}
	}
	if err := errors.Join(c.Close(), j.Close()); err != nil {
		say("error", "close "+strings.ReplaceAll(err.Error(), "\n", " "))
	}
	os.Exit(0)
}

// runCrashScript runs one round of the script as a process of its own.
func runCrashScript(dir, round string, out io.Writer, wrap func(*exec.Cmd) *exec.Cmd) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "JOURNAL_TEST_CRASH="+dir, "JOURNAL_TEST_ROUND="+round)
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

// books is what a run, or several over one directory, said.
type books struct {
	tried, taken map[string]bool
	delivered    map[string][]byte // by id
	twice        int               // records that were delivered a second time
	lost         int64             // by distinct loss records that were delivered
	uncounted    bool              // one of them says that its count cannot be known
	inHand       int64             // delivered, or counted by what was, when a round ended without a save
}

func readBooks(out []byte) (b books, err error) {
	b = books{tried: map[string]bool{}, taken: map[string]bool{}, delivered: map[string][]byte{}}
	var unsaved int64
	for l := range bytes.Lines(out) {
		what, rest, ok := bytes.Cut(bytes.TrimSuffix(l, []byte("\n")), []byte(" "))
		if !ok || !bytes.HasSuffix(l, []byte("\n")) {
			continue // the kill cut it
		}
		switch string(what) {
		case "round":
			b.inHand += unsaved
			unsaved = 0
		case "saved":
			unsaved = 0
		case "trying":
			b.tried[string(rest)] = true
		case "taken":
			b.taken[string(rest)] = true
		case "delivered":
			var r struct {
				ID   string
				Loss *record.Loss
			}
			if err := json.Unmarshal(rest, &r); err != nil {
				return b, fmt.Errorf("delivered %s: %w", rest, err)
			}
			unsaved++
			if r.Loss != nil {
				unsaved += r.Loss.Count
			}
			if before, there := b.delivered[r.ID]; there {
				if !bytes.Equal(before, rest) {
					return b, fmt.Errorf("%s came twice, and not the same", r.ID)
				}
				b.twice++
				continue
			}
			b.delivered[r.ID] = bytes.Clone(rest)
			if r.Loss == nil {
				if !bytes.Equal(append(bytes.Clone(rest), '\n'), line(r.ID, map[bool]int{true: 0, false: 500}[r.ID == "the-end"])) {
					return b, fmt.Errorf("invented: %s", rest)
				}
			} else if r.Loss.Cause == "disk_cap" {
				if r.Loss.Count <= 0 {
					b.uncounted = true
				}
				b.lost += max(r.Loss.Count, 0)
			}
		}
	}
	return b, nil
}

// check is the oracle. Where a call failed while the journal counted a loss, the loss
// record may say that its count is not known. What was tried and not said to be taken may be there: the
// kill came before the saying, or the error after the write.
func (b books) check(mayBeUncounted bool) error {
	missing, unsaid := 0, 0
	for id := range b.taken {
		if b.delivered[id] == nil {
			missing++
		}
	}
	for id := range b.delivered {
		if !b.taken[id] && b.tried[id] {
			unsaid++
		}
		if !b.tried[id] {
			return fmt.Errorf("%s was delivered and nobody wrote it", id)
		}
	}
	// What was tried and neither taken nor delivered may be among the lost.
	// The same goes for what was delivered right before the kill, of which no cursor
	// knows: the bound may take it before it is delivered again.
	unknown := int64(len(b.tried)-len(b.taken)-unsaid) + b.inHand
	if b.uncounted && mayBeUncounted {
		return nil
	}
	if over := b.lost - int64(missing); over < 0 || over > unknown || b.uncounted {
		return fmt.Errorf("%d taken, %d delivered (%d not said to be taken), so %d are missing; but %d are said to be lost (%d with an unknown end)",
			len(b.taken), len(b.delivered), unsaid, missing, b.lost, unknown)
	}
	return nil
}

// changing are the system calls by which the journal changes what a next start
// finds, and the write by which the script says so.
var changing = []string{"write", "pwrite64", "openat", "renameat2", "renameat", "fsync", "unlinkat", "symlinkat", "mkdirat", "ftruncate"}

// The process is killed at its N-th system call of a kind, for every N, or that
// call fails. Then it is started again and runs to its end: each record that was
// taken is delivered or counted in a loss record that is delivered, none is
// invented, and the books balance.
func TestCrashAtEverySystemCall(t *testing.T) {
	faults.Case(t, "SP-01")
	inject.Require(t)
	memory := memoryDir(t)
	var count inject.Count
	var out bytes.Buffer
	if err := runCrashScript(filepath.Join(memory, "count"), "first", &out, func(cmd *exec.Cmd) *exec.Cmd {
		count = inject.Counting(t, cmd, slices.Concat(changing, []string{"pread64", "fcntl", "fstat", "newfstatat", "getdents64"})...)
		return count.Cmd
	}); err != nil {
		t.Fatal(err)
	}
	calls, all := count.Calls(t)
	if b, err := readBooks(out.Bytes()); err != nil || b.lost == 0 || all["unlinkat"] == 0 || all["renameat2"] < 3 {
		t.Fatalf("the run that shall be killed does too little: %v, lost %d, calls %v", err, b.lost, all)
	}
	kills := inject.Points(calls, inject.Kill, changing...)
	var errs []inject.Point
	for call, errnos := range map[string][]string{
		"write": {"ENOSPC", "EIO", "EINTR"}, "openat": {"EMFILE", "ENOSPC", "EINTR"}, "renameat2": {"ENOSPC", "EIO"}, "renameat": {"ENOSPC", "EIO"},
		"fsync": {"EIO", "ENOSPC", "EINTR"}, "unlinkat": {"EIO", "EBUSY"}, "symlinkat": {"ENOSPC"}, "mkdirat": {"ENOSPC"}, "ftruncate": {"EIO"},
		"pwrite64": {"ENOSPC"}, "pread64": {"EIO", "EINTR"}, "fcntl": {"EMFILE"}, "fstat": {"EIO"}, "newfstatat": {"EIO"}, "getdents64": {"EIO"},
	} {
		for _, errno := range errnos {
			errs = append(errs, inject.Points(calls, inject.Error(errno), call)...)
		}
	}
	var killed, failed, twice atomic.Int64
	var dirs atomic.Int64
	var mu sync.Mutex // t.Errorf in order
	visit := func(p inject.Point) {
		dir := filepath.Join(memory, fmt.Sprint(dirs.Add(1)))
		defer os.RemoveAll(dir)
		var out bytes.Buffer
		err := runCrashScript(dir, "first", &out, p.Command)
		switch {
		case p.Fault == inject.Kill && err != nil:
			killed.Add(1)
		case p.Fault != inject.Kill && err == nil:
			failed.Add(1)
		case p.Fault != inject.Kill && !strings.Contains(err.Error(), "exit status"):
			mu.Lock()
			t.Errorf("%v ended the process: %v", p, err)
			mu.Unlock()
		}
		if err := runCrashScript(dir, "last", &out, nil); err != nil {
			mu.Lock()
			t.Errorf("%v, the next start: %v", p, err)
			mu.Unlock()
			return
		}
		b, err := readBooks(out.Bytes())
		if err == nil {
			err = b.check(p.Fault != inject.Kill)
		}
		if err != nil {
			mu.Lock()
			t.Errorf("%v: %v", p, err)
			if testing.Verbose() && os.Getenv("CRASH_OUTPUT") != "" {
				t.Logf("%s", out.Bytes())
			}
			mu.Unlock()
		}
		twice.Add(int64(b.twice))
	}
	inject.Explore(append(inject.SampleOfSelf(kills, 40), inject.SampleOfSelf(errs, 40)...), visit)
	if t.Failed() {
		return
	}
	t.Logf("crash exploration of the journal: %d of %d kill points, %d of %d failing calls, 0 acknowledged records lost; %d records came twice",
		killed.Load(), len(kills), failed.Load(), len(errs), twice.Load())
}
