package journal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

// SP-02: a segment of 20 records cut at every byte. All whole records before the cut
// survive, the next append recovers, nothing is invented.
func TestCutAtEveryByte(t *testing.T) {
	faults.Case(t, "SP-02")
	dir := t.TempDir()
	j, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	appendNumbers(t, j, 0, 20, 0)
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, segmentName(1))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	headerEnd := bytes.IndexByte(whole, '\n') + 1
	memory := memoryDir(t)
	torn, withoutNewline := 0, 0
	for cut := range len(whole) + 1 {
		survivors, half := 0, 0
		if cut >= headerEnd {
			survivors = bytes.Count(whole[headerEnd:cut], []byte("\n"))
			half = cut - bytes.LastIndexByte(whole[:cut], '\n') - 1
		}
		if cut < len(whole) && cut > headerEnd && whole[cut] == '\n' {
			survivors++ // the record is whole, only its newline is not there
			half = 0
			withoutNewline++
		}
		dir := filepath.Join(memory, fmt.Sprint(cut))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, segmentName(1)), whole[:cut], 0o640); err != nil {
			t.Fatal(err)
		}
		var losses []record.Loss
		j, err := Open(dir, Options{OnLoss: func(l record.Loss) { losses = append(losses, l) }})
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		appendAll(t, j, line("next", 0))
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		r := reader(t, dir, Position{})
		equal(t, ids(t, r), append(numbered(0, survivors), "next"))
		wantTorn := int64(0)
		if half > 0 {
			wantTorn = 1
			torn++
		}
		if cut < headerEnd && cut > 0 {
			wantTorn = 1 // half a header
			if cut == headerEnd-1 {
				wantTorn = 0 // whole, without its newline
			}
		}
		if s := r.Stats(); s.TornLines != wantTorn {
			t.Fatalf("cut at %d: %d torn lines, want %d", cut, s.TornLines, wantTorn)
		}
		if half > 0 && (len(losses) != 1 || losses[0].Cause != "torn_line") {
			t.Fatalf("cut at %d: losses %+v", cut, losses)
		}
		_ = r.Close()
	}
	t.Logf("%d cuts: %d with half a record, %d with a record without its newline; all whole records found", len(whole)+1, torn, withoutNewline)
}

func TestTornLines(t *testing.T) {
	a, b, c := string(line("a", 0)), string(line("b", 0)), string(line("c", 0))
	for i, s := range []*string{&a, &b, &c} {
		*s = strings.TrimSuffix(*s, "\n")
		if i == 0 && !strings.Contains(a, `\"quoted\" {name}`) {
			t.Fatal("the record is too simple for this test")
		}
	}
	inString := a[:strings.Index(a, `{name}`)+1] // `..."workflow":"a \"quoted\" {`
	nested := `{"id":"n","ts":"x","by":"none","job":{"id":"inner"}`
	large := strings.Repeat("x", 3*MaxLine)
	for _, tt := range []struct {
		name, content string
		want          string
		torn          int64
		oversize      int64
		proves        string // a case of the catalogue
	}{
		{"a record behind half a record", a[:50] + b + "\n" + c + "\n", "b c", 1, 0, "SP-03"},
		{"half a record cut in a string with a brace", inString + b + "\n", "b", 1, 0, ""},
		{"half a record cut in an escape", a[:strings.Index(a, `\"`)+1] + b + "\n", "b", 1, 0, ""},
		{"two halves and a record", a[:60] + b[:90] + c + "\n", "c", 1, 0, ""},
		{"two records without a newline between", a + b + "\n" + c + "\n", "a b c", 0, 0, ""},
		{"a record, half a record, a record", a + b[:40] + c + "\n", "a c", 1, 0, ""},
		{"half a record and its newline", a[:50] + "\n" + b + "\n", "b", 1, 0, ""},
		{"a record and garbage behind it", a + "garbage\n" + b + "\n", "a b", 1, 0, ""},
		{"an object with an id in half a record is no record", nested + "\n" + b + "\n", "b", 1, 0, ""},
		{"zeros of a lost block before a record", strings.Repeat("\x00", 4096) + a + "\n", "a", 1, 0, ""},
		{"empty lines are no damage", "\n\n" + a + "\n\n" + b + "\n", "a b", 0, 0, ""},
		{"a segment's header in the middle", a + "\n" + `{"kind":"segment","id":"x","segment":9}` + "\n" + b + "\n", "a b", 0, 0, ""},
		{"a record of 10 MB", strings.Replace(a, "docker", strings.Repeat("x", 10<<20), 1) + "\n" + b + "\n", "b", 1, 1, "SP-26"},
		{"192 KiB of nothing, then a record on the same line", large + a + "\n" + b + "\n", "a b", 1, 1, "SP-26"},
		{"a record of 192 KiB", strings.Replace(a, "docker", large, 1) + "\n" + b + "\n", "b", 1, 1, "SP-26"},
		{"a line over the size with records in it", a + large + b + large + c + "\n", "a b c", 2, 2, ""},
		{"many starts of records", strings.Repeat(a[:len(marker)], 50_000) + a + "\n", "a", 1, 1, ""},
		{"deep nests of starts", strings.Repeat(a[:len(a)-1]+`,"x":`, 300) + "\n" + b + "\n", "b", 1, 1, ""},
		{"half a record at the end is waited for", a + "\n" + b[:40], "a", 0, 0, "SP-32"},
		{"a record without its newline at the end is waited for", a + "\n" + b, "a", 0, 0, "SP-32"},
		{"carriage returns are spaces of JSON, not of ours", a + "\r\n" + b + "\n", "a b", 1, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.proves != "" {
				faults.Case(t, tt.proves)
			}
			path := filepath.Join(t.TempDir(), "x.jsonl")
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			r := reader(t, path, Position{})
			start := time.Now()
			equal(t, ids(t, r), strings.Fields(tt.want))
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v", took)
			}
			if s := r.Stats(); s.TornLines != tt.torn || s.OversizeLines != tt.oversize {
				t.Errorf("%+v, want %d torn, %d oversize", s, tt.torn, tt.oversize)
			}
		})
	}
}

func TestTheEndOfAnEndedSegmentIsNotWaitedFor(t *testing.T) {
	faults.Case(t, "SP-32")
	a, b, c := line("a", 0), line("b", 0), line("c", 0)
	for _, tt := range []struct {
		name string
		tail []byte
		want []string
		torn int64
	}{
		{"half a record", b[:30], []string{"a", "c"}, 1},
		{"a record without its newline", b[:len(b)-1], []string{"a", "b", "c"}, 0},
		{"a byte", []byte("{"), []string{"a", "c"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write := func(n uint64, parts ...[]byte) {
				t.Helper()
				if err := os.WriteFile(filepath.Join(dir, segmentName(n)), bytes.Join(parts, nil), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write(1, a, tt.tail)
			r := reader(t, dir, Position{})
			equal(t, ids(t, r), []string{"a"})
			write(2, c)
			equal(t, append([]string{"a"}, ids(t, r)...), tt.want)
			if s := r.Stats(); s.TornLines != tt.torn {
				t.Errorf("%+v", s)
			}
		})
	}
}

func vacant(path string) string {
	_ = os.Remove(path) // where it is still there, the caller fails
	return path
}

// Whatever is in the directory, the journal opens within a second, takes records,
// and readers find them.
func TestAnyContentOfTheDirectoryOpens(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	head := appendHeader(nil, 3, 100, time.Now())
	for _, tt := range []struct {
		name string
		make func(dir string) error
	}{
		{"random bytes as the newest segment", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, segmentName(3)), noise(1<<20), 0o600)
		}},
		{"random bytes behind a good header", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, segmentName(3)), append(head, noise(1<<20)...), 0o600)
		}},
		{"an empty segment", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, segmentName(3)), nil, 0o600)
		}},
		{"a header of another segment", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, segmentName(4)), head, 0o600)
		}},
		{"a directory", func(dir string) error { return os.Mkdir(filepath.Join(dir, segmentName(3)), 0o700) }},
		{"a symlink", func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, segmentName(3))) }},
		{"a FIFO", func(dir string) error { return mkfifo(filepath.Join(dir, segmentName(3))) }},
		{"a FIFO as the current link", func(dir string) error { return mkfifo(vacant(filepath.Join(dir, linkName))) }},
		{"a directory as the current link", func(dir string) error { return os.Mkdir(vacant(filepath.Join(dir, linkName)), 0o700) }},
		{"noise in the lock", func(dir string) error { return os.WriteFile(filepath.Join(dir, lockName), noise(1000), 0o600) }},
		{"left over temporary files", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, tempPrefix+".new"), noise(1000), 0o600)
		}},
		{"the largest number", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, segmentName(maxSegment)), noise(100), 0o600)
		}},
		{"numbers out of any range", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "records-99999999999999999999.jsonl"), noise(100), 0o600)
		}},
		{"a header with an absurd count", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, segmentName(2)), []byte(`{"kind":"segment","id":"x","segment":2,"first":9223372036854775807}`+"\n"), 0o600)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			j, err := Open(dir, Options{MaxSegmentBytes: 10_000})
			if err != nil {
				t.Fatal(err)
			}
			appendNumbers(t, j, 0, 5, 0)
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			if err := tt.make(dir); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			for i := range 3 {
				j, err := Open(dir, Options{MaxSegmentBytes: 10_000})
				if err != nil {
					t.Fatal(err)
				}
				if took := time.Since(start); took > 30*time.Second {
					t.Errorf("opening took %v", took)
				}
				c, err := j.OpenCursor(filepath.Join(dir, "cursors"), "x")
				if err != nil {
					t.Fatal(err)
				}
				if n := c.Behind(); n < 0 {
					t.Errorf("behind by %d", n)
				}
				appendNumbers(t, j, 5+20*i, 20, 500)
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				if err := j.Close(); err != nil {
					t.Fatal(err)
				}
				start = time.Now()
			}
			equal(t, ids(t, reader(t, dir, Position{})), numbered(0, 65))
		})
	}
}

// FuzzReader puts arbitrary bytes into a segment in which records were written
// before, and appends records behind them. The reader must not fail, must return
// nothing but pieces of the file that are whole JSON and start as records start, and
// must find every record written before and after, in order.
func FuzzReader(f *testing.F) {
	a := line("evil", 0)
	f.Add([]byte{}, true)
	f.Add([]byte("\n"), false)
	f.Add(a, true)
	f.Add(a[:len(a)-1], true)
	f.Add(a[:len(a)/2], false)
	f.Add(a[:bytes.IndexByte(a, '\\')+1], true)
	f.Add(append(bytes.Repeat([]byte{0}, 5000), a...), true)
	f.Add(bytes.Repeat([]byte(`{"id":"x","ts":"y","kind":"z","o":[`), 3000), true)
	f.Add([]byte(`{"kind":"segment","id":"`), true)
	f.Add([]byte(`{"id":"a","ts":"b","kind":"c","n":-0.1e+5,"u":"\u12aF","l":[true,false,null,{}]}`), true)
	f.Fuzz(func(t *testing.T, noise []byte, sameLine bool) {
		dir := memoryDir(t)
		path := filepath.Join(dir, segmentName(1))
		content := appendHeader(nil, 1, 0, time.Now())
		content = append(append(content, line("before", 0)...), noise...)
		if !sameLine {
			content = append(content, '\n')
		}
		if err := os.WriteFile(path, append(content, line("behind", 0)...), 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		appendAll(t, j, line("after", 0))
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		r := reader(t, dir, Position{})
		found := map[string]int{}
		for n := 0; ; n++ {
			l, err := r.Next()
			if err != nil {
				break
			}
			found[string(l.ID())] = n + 1
			if !json.Valid(l.Data) || !bytes.HasPrefix(l.Data, marker) || !bytes.Equal(l.Data, file[l.Pos.Offset:l.Pos.Offset+int64(len(l.Data))]) {
				t.Fatalf("invented: %q", l.Data)
			}
			switch string(l.ID()) {
			case "before", "behind", "after":
				if want := bytes.TrimSuffix(line(string(l.ID()), 0), []byte("\n")); !bytes.Equal(l.Data, want) {
					t.Fatalf("got %q, want %q", l.Data, want)
				}
			}
		}
		if found["before"] != 1 || found["behind"] <= 1 || found["after"] <= found["behind"] {
			t.Fatalf("found %v in %q", found, file)
		}
		if r.Position().Offset != int64(len(file)) {
			t.Fatalf("stopped at %v of %d", r.Position(), len(file))
		}
	})
}

// FuzzScan compares the scanner with encoding/json: what Scan takes is valid JSON,
// and what is valid JSON and begins as a record begins is taken.
func FuzzScan(f *testing.F) {
	f.Add([]byte(`"a":1}`))
	f.Add([]byte(`"a":[1.5e-3,"\u00e9\\",{"b":{}},[]]}`))
	f.Add([]byte(`"a":"` + "\x7f\xff" + `"}`))
	f.Add([]byte(`"a":01}`))
	f.Add([]byte("\"a\" : [ ] \t}"))
	f.Fuzz(func(t *testing.T, rest []byte) {
		data := append([]byte(`{"id":"a","ts":"b","kind":"c",`), rest...)
		_, got := Scan(data)
		want := json.Valid(data) && len(data) <= MaxLine && data[len(data)-1] == '}'
		if got == want {
			return
		}
		if want && bytes.Count(data, []byte("["))+bytes.Count(data, []byte("{")) >= maxDepth {
			return // nested deeper than we go
		}
		t.Fatalf("Scan says %v, json.Valid %v: %q", got, json.Valid(data), data)
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{300, 1000, 10_000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			j := open(b, b.TempDir(), Options{MaxBytes: 64 << 20})
			l := line("0190a5c0-0000-7000-8000-000000000000", size)
			b.SetBytes(int64(len(l)))
			b.ReportAllocs()
			for b.Loop() {
				if err := j.Append(l); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReaderNext(b *testing.B) {
	dir := b.TempDir()
	j := open(b, dir, Options{})
	l := line("0190a5c0-0000-7000-8000-000000000000", 1000)
	lines := bytes.Repeat(l, 1000)
	for range 30 {
		if err := j.Append(lines); err != nil {
			b.Fatal(err)
		}
	}
	r := reader(b, dir, Position{})
	b.SetBytes(int64(len(l)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Next(); err != nil {
			if err := r.Seek(Position{Segment: 1}); err != nil {
				b.Fatal(err)
			}
		}
	}
}
