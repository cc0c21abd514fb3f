package journal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("JOURNAL_TEST_WRITER"); dir != "" {
		writeUntilKilled(dir)
	}
	if dir := os.Getenv("JOURNAL_TEST_CRASH"); dir != "" {
		crashScript(dir)
	}
	if dir := os.Getenv("JOURNAL_TEST_POWER"); dir != "" {
		writeUntilPowerCut(dir)
	}
	if dir := os.Getenv("JOURNAL_TEST_FSIZE"); dir != "" {
		writeUnderLimit(dir)
	}
	goleak.VerifyTestMain(m)
}

// line is a record with this id, as record.Append makes it, padded to size
// bytes, its newline included, where it is shorter.
func line(id string, size int) []byte {
	r := record.Record{
		ID: id, TS: time.Unix(1_800_000_000, 0), Kind: record.KindInvocation, Schema: 1, By: record.BySealed,
		CI:         &record.CI{Repository: "octo/demo", Workflow: `a "quoted" {name}`, Job: "build"},
		Invocation: &record.Invocation{Tool: "docker", Command: "image pull", Images: []string{"alpine:3"}},
	}
	if size > 0 {
		r.Invocation.Cwd = "x"
		r.Invocation.Cwd = strings.Repeat("x", max(size-len(record.Append(nil, &r)), 0)+1)
	}
	return record.Append(nil, &r)
}

// memoryDir is a temporary directory in memory where there is one, for tests that
// make thousands of files: what they test does not depend on the file system.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "journal-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func open(t testing.TB, dir string, o Options) *Journal {
	t.Helper()
	j, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

func reader(t testing.TB, path string, from Position) *Reader {
	t.Helper()
	r, err := OpenReader(path, from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// ids reads until io.EOF.
func ids(t testing.TB, r *Reader) []string {
	t.Helper()
	var got []string
	for {
		l, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(l.Data) {
			t.Fatalf("not JSON: %q", l.Data)
		}
		if !l.Pos.Before(l.Next) {
			t.Fatalf("a line from %v to %v", l.Pos, l.Next)
		}
		got = append(got, string(l.ID()))
	}
}

func appendAll(t testing.TB, j *Journal, lines ...[]byte) {
	t.Helper()
	for _, l := range lines {
		if err := j.Append(l); err != nil {
			t.Fatal(err)
		}
	}
}

func numbered(from, n int) []string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprintf("r%05d", from+i))
	}
	return s
}

func appendNumbers(t testing.TB, j *Journal, from, n, size int) {
	t.Helper()
	for _, id := range numbered(from, n) {
		appendAll(t, j, line(id, size))
	}
}

func equal(t testing.TB, got, want []string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %d records, want %d: %.300q ..., want %.300q ...", len(got), len(want), got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("record %d is %q, want %q", i, got[i], want[i])
		}
	}
}

func TestWhatIsAppendedIsRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "journal")
	j := open(t, dir, Options{})
	r := reader(t, dir, Position{})
	equal(t, ids(t, r), nil)
	appendNumbers(t, j, 0, 10, 300)
	appendAll(t, j, append(append(line("r00010", 0), line("r00011", 0)...), line("r00012", 60_000)...))
	equal(t, ids(t, r), numbered(0, 13))
	if got, want := r.Position(), j.End(); got != want {
		t.Errorf("the reader stands at %v, the journal ends at %v", got, want)
	}
	if s := r.Stats(); s != (ReadStats{Records: 13}) {
		t.Errorf("damage in an undamaged journal: %+v", s)
	}
}

func TestLineTellsIDKindAndTimeWithoutDecoding(t *testing.T) {
	for _, kind := range []record.Kind{record.KindInvocation, record.KindInvocationEnd, record.KindEvent, record.KindLoss, record.KindJobStart, record.KindJobEnd, "of.the.future"} {
		ts := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
		data := record.Append(nil, &record.Record{ID: record.NewID(ts), TS: ts, Kind: kind})
		l, ok := Scan(data[:len(data)-1])
		if !ok || l.Kind() != kind || !l.TS().Equal(ts) || len(l.ID()) != 36 {
			t.Errorf("%s: ok %v, kind %s, ts %s, id %s", kind, ok, l.Kind(), l.TS(), l.ID())
		}
	}
}

func TestAppendRefusesWhatCouldNotBeReadAgain(t *testing.T) {
	good := string(line("a", 0))
	for _, tt := range []struct {
		name, lines string
		index       int
	}{
		{"no newline", strings.TrimSuffix(good, "\n"), 0},
		{"an empty line", "\n", 0},
		{"not JSON, second line", good + "hello\n", 1},
		{"kind before id", `{"kind":"loss","id":"a"}` + "\n", 0},
		{"half a record", good[:len(good)/2] + "\n", 0},
		{"two records on a line", strings.TrimSuffix(good, "\n") + good, 0},
		{"too long", string(line("a", MaxLine+2)), 0},
		{"a control character", strings.Replace(good, "docker", "doc\x00ker", 1), 0},
		{"nested too deep", strings.Replace(good, `"schema":1`, `"schema":`+strings.Repeat("[", 100)+strings.Repeat("]", 100), 1), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := open(t, t.TempDir(), Options{})
			var e *LineError
			if err := j.Append([]byte(tt.lines)); !errors.As(err, &e) || e.Index != tt.index {
				t.Fatalf("got %v, want a LineError for line %d", err, tt.index)
			}
			equal(t, ids(t, reader(t, j.dir.f.Name(), Position{})), nil)
		})
	}
	t.Run("the longest record", func(t *testing.T) {
		j := open(t, t.TempDir(), Options{})
		appendAll(t, j, line("a", MaxLine+1), line("b", 0))
		equal(t, ids(t, reader(t, j.dir.f.Name(), Position{})), []string{"a", "b"})
	})
}

func TestSegments(t *testing.T) {
	dir := t.TempDir()
	now := time.Unix(1_800_000_000, 0)
	j := open(t, dir, Options{MaxSegmentBytes: 10_000, Now: func() time.Time { return now }})
	newest := func() string {
		t.Helper()
		name, err := os.Readlink(filepath.Join(dir, linkName))
		if err != nil {
			t.Fatal(err)
		}
		return name
	}

	appendNumbers(t, j, 0, 9, 1000)
	if got := newest(); got != "records-00000000000000000001.jsonl" {
		t.Errorf("newest segment %s", got)
	}
	appendNumbers(t, j, 9, 1, 1000) // header and ten records are over the size
	if got := newest(); got != "records-00000000000000000002.jsonl" {
		t.Errorf("newest segment by size %s", got)
	}
	now = now.Add(time.Hour)
	appendNumbers(t, j, 10, 1, 0)
	if got := newest(); got != "records-00000000000000000003.jsonl" {
		t.Errorf("newest segment by age %s", got)
	}
	now = now.Add(-24 * time.Hour) // somebody sets the clock back
	appendNumbers(t, j, 11, 1, 0)
	if got := newest(); got != "records-00000000000000000003.jsonl" {
		t.Errorf("newest segment after the clock went back %s", got)
	}

	data, err := os.ReadFile(filepath.Join(dir, linkName))
	if err != nil {
		t.Fatal(err)
	}
	var h header
	first, rest, _ := strings.Cut(string(data), "\n")
	if err := json.Unmarshal([]byte(first), &h); err != nil || h.Kind != "segment" || h.Segment != 3 || h.First != 10 || len(h.ID) != 36 {
		t.Errorf("header %s: %v", first, err)
	}
	if n := strings.Count(rest, "\n"); n != 2 {
		t.Errorf("%d lines behind the header, want 2", n)
	}
	equal(t, ids(t, reader(t, dir, Position{})), numbered(0, 12))
	equal(t, ids(t, reader(t, filepath.Join(dir, linkName), Position{})), numbered(10, 2))
	if st, err := os.Stat(filepath.Join(dir, linkName)); err != nil || st.Mode().Perm()&0o007 != 0 {
		t.Errorf("mode %v (%v): others can read the account", st.Mode(), err)
	}
}

func TestReopenGoesOnInTheSameSegment(t *testing.T) {
	dir := t.TempDir()
	for i := range 5 {
		j, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		appendNumbers(t, j, i*3, 3, 0)
		if s := j.Status(); s.Segments != 1 || s.Records != int64(i+1)*3 {
			t.Fatalf("open %d: %+v", i, s)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if err := j.Append(line("late", 0)); !errors.Is(err, ErrClosed) {
			t.Fatalf("append after close: %v", err)
		}
	}
	equal(t, ids(t, reader(t, dir, Position{})), numbered(0, 15))
}

func TestPositionsResumeReading(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{MaxSegmentBytes: 3000})
	appendNumbers(t, j, 0, 30, 500)
	r := reader(t, dir, Position{})
	for i := range 30 {
		l, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		equal(t, ids(t, reader(t, dir, l.Pos)), numbered(i, 30-i))
		equal(t, ids(t, reader(t, dir, l.Next)), numbered(i+1, 29-i))
		if n, err := j.after(l.Next); err != nil || n != int64(29-i) {
			t.Fatalf("after %v: %d records (%v), want %d", l.Next, n, err, 29-i)
		}
	}
}

func TestReaderPositions(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{MaxSegmentBytes: 3000})
	appendNumbers(t, j, 0, 30, 500) // five in each segment
	for _, n := range []uint64{1, 4} {
		if err := os.Remove(filepath.Join(dir, segmentName(n))); err != nil {
			t.Fatal(err)
		}
	}
	all := append(numbered(5, 10), numbered(20, 10)...)
	for _, tt := range []struct {
		name    string
		from    Position
		want    []string
		missing int64
	}{
		{"zero is the oldest there is", Position{}, all, 1},
		{"in a removed segment: the next one", Position{1, 2000}, all, 2},
		{"in a gap", Position{4, 1}, numbered(20, 10), 1},
		{"beyond the newest: of another journal, so from the oldest", Position{1000, 5}, all, 1},
		{"beyond the end of a segment: it was cut, so from its start", Position{5, 1 << 40}, numbered(20, 10), 0},
		{"a negative offset", Position{5, -1}, numbered(20, 10), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := reader(t, dir, tt.from)
			equal(t, ids(t, r), tt.want)
			if got := r.Stats().MissingSegments; got != tt.missing {
				t.Errorf("%d segments missing, want %d", got, tt.missing)
			}
		})
	}
}

// A reader follows the writer while it appends and rotates; all that the writer took
// arrives once, in order of each appender.
func TestConcurrentAppendsWithATailingReader(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{MaxSegmentBytes: 50_000})
	const writers, each = 8, 400
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				lines := line(fmt.Sprintf("w%d-%d", w, i), 200+i*7%900)
				if i%10 == 0 {
					lines = append(lines, line(fmt.Sprintf("w%d-%d-twin", w, i), 0)...)
				}
				if err := j.Append(lines); err != nil {
					t.Error(err)
				}
				if i%50 == 0 {
					if err := j.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r := reader(t, dir, Position{})
	next := map[string]int{}
	for n := 0; n < writers*each*11/10; {
		l, err := r.Next()
		if errors.Is(err, io.EOF) {
			if err := j.Wait(ctx, r.Position()); err != nil {
				t.Fatalf("after %d records: %v", n, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
		id := string(l.ID())
		if strings.HasSuffix(id, "-twin") {
			continue
		}
		writer, seq, _ := strings.Cut(id, "-")
		if fmt.Sprint(next[writer]) != seq {
			t.Fatalf("%s came, want %s-%d", id, writer, next[writer])
		}
		next[writer]++
	}
	wg.Wait()
	equal(t, ids(t, r), nil)
	if s := r.Stats(); s.TornLines != 0 || s.MissingSegments != 0 {
		t.Errorf("damage: %+v", s)
	}
	if err := j.Wait(ctx, Position{}); err != nil {
		t.Error(err)
	}
}

func TestWait(t *testing.T) {
	j := open(t, t.TempDir(), Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := j.Wait(ctx, j.End()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait at the end: %v", err)
	}
	woken := make(chan error)
	for range 3 {
		go func(p Position) { woken <- j.Wait(t.Context(), p) }(j.End())
	}
	appendAll(t, j, line("a", 0))
	for range 3 {
		if err := <-woken; err != nil {
			t.Error(err)
		}
	}
	go func(p Position) { woken <- j.Wait(t.Context(), p) }(j.End())
	time.Sleep(time.Millisecond)
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	if err := <-woken; !errors.Is(err, ErrClosed) {
		t.Errorf("wait over a close: %v", err)
	}
}

func TestOneWriterAtATime(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{})
	appendAll(t, j, line("a", 0))
	_, err := Open(dir, Options{})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Fatalf("second writer: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, lockName)); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	k := open(t, dir, Options{})
	appendAll(t, k, line("b", 0))
	equal(t, ids(t, reader(t, dir, Position{})), []string{"a", "b"})
}

func TestTheDirectoryIsOpenedOnce(t *testing.T) {
	faults.Case(t, "SP-30")
	parent := t.TempDir()
	dir, victim := filepath.Join(parent, "journal"), t.TempDir()
	j := open(t, dir, Options{MaxSegmentBytes: 2000})
	appendNumbers(t, j, 0, 1, 500)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, dir); err != nil {
		t.Fatal(err)
	}
	appendNumbers(t, j, 1, 20, 500)
	if left, err := os.ReadDir(victim); err != nil || len(left) != 0 {
		t.Errorf("written through the symlink: %v %v", left, err)
	}
	r, err := j.Reader(Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	equal(t, ids(t, r), numbered(0, 21))
}

func TestASegmentRemovedOrCutBySomebodyElseIsALoss(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(path string) error
		want   []string
	}{
		{"removed", os.Remove, []string{"b"}},
		{"cut to nothing", func(path string) error { return os.Truncate(path, 0) }, []string{"b"}},
		{"cut in a record", func(path string) error {
			st, err := os.Stat(path)
			if err != nil {
				return err
			}
			return os.Truncate(path, st.Size()-5)
		}, []string{"b"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			var losses []record.Loss
			j := open(t, dir, Options{OnLoss: func(l record.Loss) { losses = append(losses, l) }})
			appendAll(t, j, line("a", 0))
			if err := tt.damage(filepath.Join(dir, segmentName(1))); err != nil {
				t.Fatal(err)
			}
			if err := j.Sync(); err != nil {
				t.Fatal(err)
			}
			if len(losses) != 1 || losses[0].Cause != "truncated_file" {
				t.Errorf("losses %+v", losses)
			}
			appendAll(t, j, line("b", 0))
			equal(t, ids(t, reader(t, dir, Position{})), tt.want)
		})
	}
}

// One that was ended is missed by whoever is behind: it is told once, and what the
// journal's own bound removes is not told as that.
func TestAnEndedSegmentRemovedBySomebodyElseIsALoss(t *testing.T) {
	dir := t.TempDir()
	var losses []record.Loss
	j := open(t, dir, Options{MaxSegmentBytes: 1000, MaxBytes: 10_000, OnLoss: func(l record.Loss) { losses = append(losses, l) }})
	sync := func() {
		t.Helper()
		if err := j.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	appendNumbers(t, j, 0, 100, 500)
	sync()
	if s := j.Status(); s.Oldest == 1 || len(losses) != 0 {
		t.Fatalf("%+v, losses %+v", s, losses)
	}
	before := j.Status()
	victim := before.Oldest + 2
	st, err := os.Stat(filepath.Join(dir, segmentName(victim)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, segmentName(victim))); err != nil {
		t.Fatal(err)
	}
	sync()
	sync()
	if len(losses) != 1 || losses[0].Cause != "truncated_file" || losses[0].Count != -1 || losses[0].Detail != fmt.Sprintf("segment %d was removed by somebody else", victim) {
		t.Errorf("losses %+v", losses)
	}
	if s := j.Status(); s.Segments != before.Segments-1 || s.Bytes != before.Bytes-st.Size() {
		t.Errorf("%+v, before %+v, one of %d bytes is gone", s, before, st.Size())
	}
}

func TestTenThousandSegmentsOpenFast(t *testing.T) {
	faults.Case(t, "SP-25")
	dir := memoryDir(t)
	for n := range 10_000 {
		data := appendHeader(nil, uint64(n+1), int64(n), time.Now())
		data = append(data, line(numbered(n, 1)[0], 0)...)
		if err := os.WriteFile(filepath.Join(dir, segmentName(uint64(n+1))), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before, start := bytesRead(t), time.Now()
	j := open(t, dir, Options{})
	took, read := time.Since(start), bytesRead(t)-before
	t.Logf("opened in %v, %d bytes read", took, read)
	// The promise is a second; a busy machine may take longer, but not read all.
	if took > 30*time.Second || read > 1<<20 {
		t.Errorf("opening took %v and %d bytes", took, read)
	}
	appendNumbers(t, j, 10_000, 1, 0)
	if s := j.Status(); s.Segments != 10_000 || s.Records != 10_001 {
		t.Errorf("%+v", s)
	}
	start = time.Now()
	n, err := j.after(Position{5000, 0})
	if err != nil || n != 5002 || time.Since(start) > 30*time.Second {
		t.Errorf("%d records after the middle (%v) in %v", n, err, time.Since(start))
	}
	equal(t, ids(t, reader(t, dir, Position{})), numbered(0, 10_001))
}

// bytesRead is how much this process has read by read(2) and its like (proc(5),
// /proc/pid/io, rchar).
func bytesRead(t *testing.T) (n int64) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Logf("NOT MEASURED: %v", err)
		return 0
	}
	if _, err := fmt.Sscanf(string(data), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestASingleFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "1000.jsonl")
	if _, err := OpenReader(path, Position{}); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("missing file: %v", err)
	}
	write := func(flags int, data []byte) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND|flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	write(0, line("a", 0))
	r := reader(t, path, Position{})
	equal(t, ids(t, r), []string{"a"})
	half := line("b", 0)
	write(0, half[:20])
	equal(t, ids(t, r), nil)
	write(0, half[20:])
	equal(t, ids(t, r), []string{"b"})
	if got := r.Position(); got != (Position{0, int64(2 * len(half))}) {
		t.Errorf("position %v", got)
	}
	write(os.O_TRUNC, line("c", 0)) // copytruncate
	equal(t, ids(t, r), []string{"c"})
	if s := r.Stats(); s.Truncations != 1 || s.TornLines != 0 {
		t.Errorf("%+v", s)
	}
	if _, err := OpenReader("/dev/null", Position{}); err == nil {
		t.Error("a device was opened as a file of records")
	}
}
