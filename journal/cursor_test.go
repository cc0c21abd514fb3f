package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

func TestCursorFiles(t *testing.T) {
	faults.Case(t, "SP-23")
	one, two := CursorState{Position: Position{3, 500}, Seq: 7}, CursorState{Position: Position{4, 900}, Seq: 9}
	current, previous := "stdout.json", "stdout.previous.json"
	for _, tt := range []struct {
		name   string
		damage func(dir string) error
		want   CursorState
		err    error
	}{
		{"untouched", func(string) error { return nil }, two, nil},
		{"the newest is missing", func(dir string) error { return os.Remove(filepath.Join(dir, current)) }, one, nil},
		{"the newest is empty", func(dir string) error { return os.Truncate(filepath.Join(dir, current), 0) }, one, nil},
		{"the newest is cut", func(dir string) error { return os.Truncate(filepath.Join(dir, current), 40) }, one, nil},
		{"a digit of the newest changed", func(dir string) error {
			path := filepath.Join(dir, current)
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, bytes.Replace(data, []byte("900"), []byte("800"), 1), 0o600)
		}, one, nil},
		{"the newest is a FIFO", func(dir string) error { return mkfifo(vacant(filepath.Join(dir, current))) }, one, nil},
		{"both are damaged", func(dir string) error {
			return errors.Join(os.Truncate(filepath.Join(dir, current), 10), os.Truncate(filepath.Join(dir, previous), 10))
		}, CursorState{}, ErrCursorLost},
		{"both are gone", func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, current)), os.Remove(filepath.Join(dir, previous)))
		}, CursorState{}, fs.ErrNotExist},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "cursors")
			for _, s := range []CursorState{{}, one, two} {
				if err := SaveCursor(dir, "stdout", s); err != nil {
					t.Fatal(err)
				}
			}
			if err := tt.damage(dir); err != nil {
				t.Fatal(err)
			}
			got, err := LoadCursor(dir, "stdout")
			if !errors.Is(err, tt.err) || got.Position != tt.want.Position || got.Seq != tt.want.Seq {
				t.Fatalf("got %+v, %v, want %+v, %v", got, err, tt.want, tt.err)
			}
			// A save on top of the damage heals it, and what was good stays.
			if err := SaveCursor(dir, "stdout", CursorState{Position: Position{5, 5}}); err != nil && tt.name != "the newest is a FIFO" {
				t.Fatal(err)
			}
			if got, err := LoadCursor(dir, "stdout"); err != nil || got.Position != (Position{5, 5}) {
				t.Fatalf("after the next save: %+v, %v", got, err)
			}
		})
	}
	for _, name := range []string{"", "..", "a/b", ".hidden", "a b", string(make([]byte, 101))} {
		if err := SaveCursor(t.TempDir(), name, one); err == nil {
			t.Errorf("a cursor of the name %q was saved", name)
		}
	}
}

func TestCursorOnAFullDisk(t *testing.T) {
	faults.Case(t, "SP-07")
	dir := tmpfs(t, "64k")
	good := CursorState{Position: Position{3, 500}}
	if err := SaveCursor(dir, "x", good); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk does not fill up: %v", err)
	}
	for range 3 {
		if err := SaveCursor(dir, "x", CursorState{Position: Position{4, 0}}); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("save on a full disk: %v", err)
		}
		if got, err := LoadCursor(dir, "x"); err != nil || got.Position != good.Position {
			t.Fatalf("after it: %+v, %v", got, err)
		}
	}
}

// consumer reads through a cursor as a pump does.
type consumer struct {
	t *testing.T
	c *Cursor
	r *Reader
}

func consume(t *testing.T, j *Journal, dir, name string) *consumer {
	t.Helper()
	c, err := j.OpenCursor(dir, name)
	if err != nil {
		t.Fatal(err)
	}
	r, err := j.Reader(c.Position())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return &consumer{t, c, r}
}

// take takes up to n records and returns their ids.
func (c *consumer) take(n int) []string {
	c.t.Helper()
	var got []string
	for len(got) < n {
		l, err := c.r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			c.t.Fatal(err)
		}
		if at, ok := c.c.Take(l); !ok {
			if err := c.r.Seek(at); err != nil {
				c.t.Fatal(err)
			}
			continue
		}
		got = append(got, string(l.ID()))
	}
	return got
}

func (c *consumer) deliver(n int) []string {
	c.t.Helper()
	got := c.take(n)
	c.c.Advance(c.r.Position(), len(got))
	return got
}

func TestCursorSurvivesRestarts(t *testing.T) {
	dir := t.TempDir()
	cursors := filepath.Join(dir, "cursors")
	for i := range 6 {
		j, err := Open(filepath.Join(dir, "journal"), Options{MaxSegmentBytes: 4000})
		if err != nil {
			t.Fatal(err)
		}
		appendNumbers(t, j, i*10, 10, 500)
		a, b := consume(t, j, cursors, "a"), consume(t, j, cursors, "b")
		if _, err := j.OpenCursor(cursors, "a"); !errors.Is(err, ErrCursorInUse) {
			t.Fatalf("the same name twice: %v", err)
		}
		if n := b.c.Behind(); n != int64(10+3*i) {
			t.Fatalf("round %d: b is behind by %d, want %d", i, n, 10+3*i)
		}
		equal(t, a.deliver(1000), numbered(i*10, 10))
		equal(t, b.deliver(7), numbered(i*7, 7))
		if n := a.c.Behind(); n != 0 {
			t.Fatalf("a is behind by %d", n)
		}
		if n := b.c.Behind(); n != int64(3+3*i) {
			t.Fatalf("b is behind by %d, want %d", n, 3+3*i)
		}
		for _, c := range []*Cursor{a.c, b.c} {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLostCursorsBeginAtTheOldest(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(journal, cursors string) error
		want   []string
		causes []string
	}{
		{"the cursor was never saved", func(_, cursors string) error { return os.RemoveAll(cursors) }, numbered(0, 20), nil},
		{"its files are damaged", func(_, cursors string) error {
			return os.WriteFile(filepath.Join(cursors, "a.json"), []byte("x"), 0o600)
		}, numbered(0, 20), []string{"cursor_lost"}},
		{"the journal was wiped", func(journal, _ string) error { return os.RemoveAll(journal) }, numbered(0, 0), []string{"cursor_lost"}},
		{"the segment is shorter than the cursor says", func(journal, _ string) error {
			return os.Truncate(filepath.Join(journal, segmentName(3)), 700)
		}, slices.Concat(numbered(0, 12), numbered(12, 1), numbered(18, 2)), []string{"cursor_lost"}},
		{"the segment is another one of the same number", func(journal, _ string) error {
			data := appendHeader(nil, 3, 12, time.Now())
			return os.WriteFile(filepath.Join(journal, segmentName(3)), append(data, bytes.Repeat(line("other", 500), 6)...), 0o600)
		}, slices.Concat(numbered(0, 12), []string{"other", "other", "other", "other", "other", "other"}, numbered(18, 2)), []string{"cursor_lost"}},
		{"the segment is gone", func(journal, _ string) error {
			return os.Remove(filepath.Join(journal, segmentName(3)))
		}, numbered(18, 2), []string{"disk_cap"}},
		{"the header of the segment is damaged", func(journal, _ string) error {
			f, err := os.OpenFile(filepath.Join(journal, segmentName(3)), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte("#####"), 0)
			return errors.Join(err, f.Close())
		}, numbered(15, 5), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Contains(tt.name, "another one of the same number") {
				faults.Case(t, "SP-17") // os.WriteFile keeps the inode
			}
			dir := t.TempDir()
			journal, cursors := filepath.Join(dir, "journal"), filepath.Join(dir, "cursors")
			j, err := Open(journal, Options{MaxSegmentBytes: 3400})
			if err != nil {
				t.Fatal(err)
			}
			appendNumbers(t, j, 0, 20, 500) // six in each segment
			a := consume(t, j, cursors, "a")
			a.deliver(15) // three of the third segment
			if err := errors.Join(a.c.Close(), j.Close(), tt.damage(journal, cursors)); err != nil {
				t.Fatal(err)
			}
			var losses []record.Loss
			k := open(t, journal, Options{OnLoss: func(l record.Loss) { losses = append(losses, l) }})
			a = consume(t, k, cursors, "a")
			equal(t, a.deliver(1000), tt.want)
			if n := a.c.Behind(); n != 0 {
				t.Errorf("behind by %d", n)
			}
			var causes []string
			for _, l := range losses {
				causes = append(causes, l.Cause)
				if l.Source != "a" || l.Detail == "" {
					t.Errorf("loss %+v", l)
				}
				if l.Cause == "disk_cap" && l.Count != 3 {
					t.Errorf("three records of the segment were not delivered, the loss says %+v", l)
				}
			}
			equal(t, causes, tt.causes)
		})
	}
}

// The journal stays under its bound; what a cursor had not taken is reported
// once for each cursor with its count, what all had passed goes silently.
func TestBound(t *testing.T) {
	faults.Case(t, "SP-11")
	now := time.Unix(1_800_000_000, 0)
	for _, tt := range []struct {
		name     string
		cursors  map[string]int // name and how many records it delivers before the journal overflows
		reported bool
	}{
		{"nobody reads", nil, false},
		{"all have passed", map[string]int{"a": 1000, "b": 1000}, false},
		{"one has passed, one has not begun, one is in the middle", map[string]int{"a": 1000, "b": 0, "c": 7}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			lost := map[string]int64{}
			var j *Journal
			extra := 0
			j = open(t, filepath.Join(dir, "journal"), Options{MaxSegmentBytes: 10_000, MaxBytes: 50_000, Now: func() time.Time { return now }, OnLoss: func(l record.Loss) {
				lost[l.Source] += l.Count
				if l.Cause != "disk_cap" || l.Count <= 0 || l.From.IsZero() || l.To.Before(l.From) {
					t.Errorf("loss %+v", l)
				}
				extra++ // the agent journals the loss from here
				if err := j.Append(line(fmt.Sprintf("loss%d", extra), 0)); err != nil {
					t.Error(err)
				}
			}})
			consumers := map[string]*consumer{}
			for name := range tt.cursors {
				consumers[name] = consume(t, j, filepath.Join(dir, "cursors"), name)
			}
			appendNumbers(t, j, 0, 20, 1000)
			delivered := map[string]int{}
			for name, n := range tt.cursors {
				delivered[name] = len(consumers[name].deliver(n))
			}
			for i := range 200 {
				appendNumbers(t, j, 20+i, 1, 1000)
				for name, n := range tt.cursors {
					if n == 1000 {
						delivered[name] += len(consumers[name].deliver(n))
					}
				}
				if s := j.Status(); s.Bytes > s.MaxBytes {
					t.Fatalf("%d bytes, the bound is %d", s.Bytes, s.MaxBytes)
				}
			}
			if onDisk := diskUse(t, filepath.Join(dir, "journal")); onDisk != j.Status().Bytes {
				t.Errorf("%d bytes on disk, %d in the books", onDisk, j.Status().Bytes)
			}
			if (len(lost) > 0) != tt.reported {
				t.Errorf("lost %v", lost)
			}
			for name := range tt.cursors {
				delivered[name] += len(consumers[name].deliver(10_000))
				if got := int64(delivered[name]) + lost[name]; got != int64(220+extra) {
					t.Errorf("%s: %d delivered and %d lost of %d", name, delivered[name], lost[name], 220+extra)
				}
				if n := consumers[name].c.Behind(); n != 0 {
					t.Errorf("%s is behind by %d at the end", name, n)
				}
			}
			if got := ids(t, reader(t, filepath.Join(dir, "journal"), Position{})); !slices.Contains(got, "r00219") || slices.Contains(got, "r00000") {
				t.Errorf("the newest must stay and the oldest go: %v", got)
			}
		})
	}
}

// Several append while the bound takes segments: each loss is told once, and the
// books balance, with the loss records that the listener appends.
func TestBoundWithManyAppenders(t *testing.T) {
	faults.Case(t, "SP-11")
	dir := t.TempDir()
	var j *Journal
	var mu sync.Mutex
	told := map[string]bool{}
	id := 0
	j = open(t, filepath.Join(dir, "journal"), Options{MaxSegmentBytes: 3000, MaxBytes: 30_000, OnLoss: func(l record.Loss) {
		mu.Lock()
		if told[l.Detail] {
			t.Errorf("told twice: %+v", l)
		}
		told[l.Detail] = true
		id++
		r := record.Record{ID: fmt.Sprintf("loss-%d", id), TS: l.To, Kind: record.KindLoss, Loss: &l}
		mu.Unlock()
		if err := j.Append(record.Append(nil, &r)); err != nil {
			t.Error(err)
		}
	}})
	a := consume(t, j, filepath.Join(dir, "cursors"), "a")
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 80 {
				if err := j.Append(line(fmt.Sprintf("w%d-%d", w, i), 500)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	written := make(chan struct{})
	go func() {
		wg.Wait()
		close(written)
	}()
	var delivered, lost int64
	for {
		over := false
		select {
		case <-written:
			over = a.c.Behind() == 0
		default:
		}
		l, err := a.r.Next()
		if errors.Is(err, io.EOF) {
			if over {
				break
			}
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if at, ok := a.c.Take(l); !ok {
			if err := a.r.Seek(at); err != nil {
				t.Fatal(err)
			}
			continue
		}
		delivered++
		if l.Kind() == record.KindLoss {
			lost += counted(l, "a")
		}
		a.c.Advance(l.Next, 1)
		if delivered%7 == 0 {
			time.Sleep(2 * time.Millisecond) // too slow for the writers
		}
	}
	if total := j.Status().Records; delivered+lost != total || lost == 0 {
		t.Errorf("%d delivered and %d lost of %d", delivered, lost, total)
	}
}

func diskUse(t *testing.T, dir string) (n int64) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, segmentPrefix+"*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		n += st.Size()
	}
	return n
}

// A loss that was reported is not counted again after a crash, though the last one
// may be told again word for word; what a sink had in hand at the crash is counted.
func TestLossesAreReportedOnceOverARestart(t *testing.T) {
	dir := t.TempDir()
	journal, cursors := filepath.Join(dir, "journal"), filepath.Join(dir, "cursors")
	var first, second []record.Loss
	j, err := Open(journal, Options{MaxSegmentBytes: 10_000, MaxBytes: 50_000, OnLoss: func(l record.Loss) { first = append(first, l) }})
	if err != nil {
		t.Fatal(err)
	}
	a := consume(t, j, cursors, "a")
	appendNumbers(t, j, 0, 5, 1000)
	equal(t, a.deliver(3), numbered(0, 3))
	if err := a.c.Save(); err != nil {
		t.Fatal(err)
	}
	equal(t, a.take(1), numbered(3, 1)) // in hand, not delivered
	appendNumbers(t, j, 5, 100, 1000)
	sum := func(losses []record.Loss) (n int64) {
		for _, l := range losses {
			n += l.Count
		}
		return n
	}
	if err := j.Close(); err != nil { // and the cursor is never saved: a crash
		t.Fatal(err)
	}
	k := open(t, journal, Options{OnLoss: func(l record.Loss) { second = append(second, l) }})
	a = consume(t, k, cursors, "a")
	rest := a.deliver(1000)
	second = slices.DeleteFunc(second, func(l record.Loss) bool {
		return slices.ContainsFunc(first, func(before record.Loss) bool { return sameLoss(l, before) })
	})
	if got := 3 + sum(first) + sum(second) + int64(len(rest)); got != 105 || sum(second) != 1 {
		t.Errorf("3 delivered, %d lost before the crash, %d more found after, %d delivered: %d of 105", sum(first), sum(second), len(rest), got)
	}
}

// The bound takes segments while a consumer reads in them: each record is delivered
// or lost, never both, never neither.
func TestBoundBesideAReadingConsumer(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	var lost int64
	j := open(t, filepath.Join(dir, "journal"), Options{MaxSegmentBytes: 10_000, MaxBytes: 40_000, OnLoss: func(l record.Loss) {
		mu.Lock()
		defer mu.Unlock()
		lost += l.Count
	}})
	a := consume(t, j, filepath.Join(dir, "cursors"), "a")
	const total = 3000
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range total {
			if err := j.Append(line(numbered(i, 1)[0], 1000)); err != nil {
				t.Error(err)
			}
		}
	})
	delivered, last := 0, ""
	for last != fmt.Sprintf("r%05d", total-1) {
		for _, id := range a.deliver(5) {
			if id <= last {
				t.Fatalf("%s after %s", id, last)
			}
			last = id
			delivered++
		}
		time.Sleep(200 * time.Microsecond)
	}
	wg.Wait()
	if int64(delivered)+lost != total {
		t.Errorf("%d delivered and %d lost of %d", delivered, lost, total)
	}
	t.Logf("%d delivered, %d lost", delivered, lost)
}
