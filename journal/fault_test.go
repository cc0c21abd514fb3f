package journal

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

func mkfifo(path string) error { return unix.Mkfifo(path, 0o600) }

// rerun starts this test binary as a writer of its own.
func rerun(t *testing.T, env ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// padded is the record of an id that tells its size, so that a reader can know what
// was written.
func padded(id string) []byte {
	_, size, _ := strings.Cut(id, "_")
	n, _ := strconv.Atoi(size)
	return line(id, n)
}

// writeUntilKilled appends from several goroutines and prints each id after its
// Append returned.
func writeUntilKilled(dir string) {
	j, err := Open(dir, Options{MaxSegmentBytes: 300_000})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	for g := range 4 {
		go func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%d-%d-%d_%d", os.Getpid(), g, i, 300+rand.IntN(9000))
				if err := j.Append(padded(id)); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(4)
				}
				// One write of less than a page: whole in the pipe or not there.
				if _, err := os.Stdout.WriteString(id + "\n"); err != nil {
					os.Exit(5)
				}
			}
		}()
	}
	for {
		time.Sleep(3 * time.Millisecond)
		if err := j.Sync(); err != nil {
			os.Exit(6)
		}
	}
}

// A writer is killed at random moments, again and again. Every record whose
// Append returned is read, none is read that was not written, none twice.
func TestKilledWriter(t *testing.T) {
	faults.Case(t, "SP-01")
	dir := t.TempDir()
	acked := map[string]bool{}
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	for range rounds {
		cmd := rerun(t, "JOURNAL_TEST_WRITER="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		first, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			var once sync.Once
			lines := bufio.NewReader(out)
			for {
				id, err := lines.ReadString('\n')
				if err != nil {
					once.Do(func() { close(first) })
					return
				}
				acked[strings.TrimSuffix(id, "\n")] = true
				once.Do(func() { close(first) })
			}
		}()
		<-first
		time.Sleep(time.Duration(rand.IntN(30_000)) * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-done
		_ = cmd.Wait() // killed
	}
	r := reader(t, dir, Position{})
	read := map[string]bool{}
	for {
		l, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		id := string(l.ID())
		if read[id] {
			t.Fatalf("%s is read twice", id)
		}
		if !bytes.Equal(append(l.Data, '\n'), padded(id)) {
			t.Fatalf("%s is not as it was written", id)
		}
		read[id] = true
	}
	for id := range acked {
		if !read[id] {
			t.Errorf("%s was taken and is not there", id)
		}
	}
	if len(acked) < rounds {
		t.Errorf("only %d records in %d rounds", len(acked), rounds)
	}
	t.Logf("%d kills: %d records taken, %d read, %d torn lines", rounds, len(acked), len(read), r.Stats().TornLines)
}

// tmpfs mounts a small file system, where the tests may.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs a tmpfs of %s: %v (run as root)", size, err))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// The disk fills up and is freed again. Append says ErrDiskFull and how much
// it took, goes on when there is room, and all that it took is read, once.
func TestFullDisk(t *testing.T) {
	for _, size := range []int{300, 1000, 4096, 10_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			faults.Case(t, "SP-06")
			mount := tmpfs(t, "256k")
			dir := filepath.Join(mount, "journal")
			j := open(t, dir, Options{})
			var took []string
			fill := func(name string) {
				t.Helper()
				for i := 0; ; i++ {
					ids := []string{fmt.Sprintf("%s%da", name, i), fmt.Sprintf("%s%db", name, i)}
					first, second := line(ids[0], size), line(ids[1], size)
					err := j.Append(append(append([]byte{}, first...), second...))
					if err == nil {
						took = append(took, ids...)
						continue
					}
					var e *AppendError
					if !errors.Is(err, ErrDiskFull) || !errors.Is(err, unix.ENOSPC) || !errors.As(err, &e) {
						t.Fatalf("got %v", err)
					}
					if e.Whole != 0 && e.Whole != len(first) {
						t.Fatalf("%d bytes were taken of lines of %d", e.Whole, len(first))
					}
					if e.Whole > 0 {
						took = append(took, ids[0])
					}
					return
				}
			}
			ballast := filepath.Join(mount, "ballast")
			if err := os.WriteFile(ballast, make([]byte, 100<<10), 0o600); err != nil {
				t.Fatal(err)
			}
			fill("full")
			n := len(took)
			fill("still")
			r := reader(t, dir, Position{})
			equal(t, ids(t, r), took)
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			fill("freed")
			if len(took) < n+5 {
				t.Errorf("only %d records more after the disk was freed", len(took)-n)
			}
			equal(t, ids(t, reader(t, dir, Position{})), took)
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			// A full disk does not keep the next agent from starting.
			k := open(t, dir, Options{})
			if err := k.Append(line("again", size)); !errors.Is(err, ErrDiskFull) {
				t.Errorf("append after reopening on the full disk: %v", err)
			}
			equal(t, ids(t, reader(t, dir, Position{})), took)
		})
	}
}

func TestOpenOnAFullDisk(t *testing.T) {
	mount := tmpfs(t, "64k")
	ballast := filepath.Join(mount, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk does not fill up: %v", err)
	}
	dir := filepath.Join(mount, "journal")
	j := open(t, dir, Options{})
	if err := j.Append(line("a", 0)); !errors.Is(err, ErrDiskFull) {
		t.Fatalf("append on a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	appendAll(t, j, line("b", 0))
	equal(t, ids(t, reader(t, dir, Position{})), []string{"b"})
}

// Where all sinks have the oldest segments, a full disk costs these and no record.
func TestFullDiskGivesUpWhatAllSinksHave(t *testing.T) {
	mount := tmpfs(t, "128k")
	dir := filepath.Join(mount, "journal")
	j := open(t, dir, Options{MaxSegmentBytes: 20_000})
	c, err := j.OpenCursor(filepath.Join(mount, "cursors"), "stdout")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if err := j.Append(line(fmt.Sprint(i), 1000)); err != nil {
			t.Fatalf("record %d: %v", i, err)
		}
		c.Advance(j.End(), 1)
	}
	got := ids(t, reader(t, dir, Position{}))
	if len(got) < 50 || got[len(got)-1] != "299" {
		t.Errorf("%d records, the last is %s", len(got), got[len(got)-1])
	}
}

// writeUnderLimit appends with a limit of file sizes that is smaller than a segment.
func writeUnderLimit(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	limit := unix.Rlimit{Cur: 5000, Max: 5000}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		fail(err)
	}
	j, err := Open(dir, Options{})
	if err != nil {
		fail(err)
	}
	for i := range 50 {
		if err := j.Append(line(fmt.Sprintf("r%05d", i), 700)); err != nil {
			fail(err)
		}
	}
	if err := j.Append(line("large", 6000)); !errors.Is(err, ErrDiskFull) || !errors.Is(err, unix.EFBIG) {
		fail(fmt.Errorf("a record over the limit: %w", err))
	}
	if err := j.Append(line("r00050", 700)); err != nil {
		fail(err)
	}
	os.Exit(0)
}

// RLIMIT_FSIZE cuts a write like a full disk does. A new segment gives room.
func TestLimitOfFileSizes(t *testing.T) {
	dir := t.TempDir()
	if err := rerun(t, "JOURNAL_TEST_FSIZE="+dir).Run(); err != nil {
		t.Fatal(err)
	}
	r := reader(t, dir, Position{})
	equal(t, ids(t, r), numbered(0, 51))
	t.Logf("%+v", r.Stats())
	if r.Stats().TornLines == 0 {
		t.Error("no write was cut: the limit had no effect")
	}
}
