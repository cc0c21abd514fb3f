package sinks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

func TestMain(m *testing.M) {
	if os.Getenv("SINKS_TEST_STDOUT") != "" {
		writeToClosedStdout()
	}
	if dir := os.Getenv("SINKS_TEST_AGENT"); dir != "" {
		deliverUntilKilled(dir)
	}
	if dir := os.Getenv("SINKS_TEST_CRASH"); dir != "" {
		crashScript(dir)
	}
	goleak.VerifyTestMain(m)
}

var ts = time.Unix(1_700_000_000, 0)

// line is a record with this id and at least this size.
func line(id string, size int) []byte {
	return record.Append(nil, &record.Record{ID: id, TS: ts, Kind: record.KindInvocation, Schema: 1,
		Invocation: &record.Invocation{Tool: "docker", Cwd: strings.Repeat("x", size)}})
}

func entries(ids ...string) []Entry {
	var batch []Entry
	for _, id := range ids {
		l := line(id, 100)
		batch = append(batch, Entry{id, record.KindInvocation, l[:len(l)-1]})
	}
	return batch
}

func numbered(from, n int) []string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprintf("r%06d", from+i))
	}
	return s
}

func idOf(t testing.TB, line []byte) string {
	t.Helper()
	var r struct{ ID string }
	if err := json.Unmarshal(line, &r); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return r.ID
}

func equal(t testing.TB, got, want []string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %d, want %d: %.300q, want %.300q", len(got), len(want), got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("at %d got %q, want %q", i, got[i], want[i])
		}
	}
}

// A later kind of sink is its client code and one Scheme.
func TestOpen(t *testing.T) {
	other := Scheme{Name: "fluent", Form: "fluent://host:24224", Params: []Param{{"tag", "tallyman", "the tag"}},
		Open: func(_ context.Context, t *Target) (Sink, error) {
			if t.String("tag", "") == "bad" {
				return nil, errors.New("a bad tag")
			}
			return sinkFunc(nil), nil
		}}
	for _, tt := range []struct {
		url  string
		want string // part of the error; "" for none
	}{
		{"file:///tmp/x.jsonl", ""},
		{"file:///tmp/x.jsonl?max_bytes=1MiB&keep=2&fsync=true&mode=0600&batch_records=10&batch_bytes=64KiB&batch_delay=1s&timeout=5s&name=audit", ""},
		{"stdout:", ""},
		{" stdout: ", ""},
		{"fluent://host:24224?tag=ci", ""},
		{"fluent://host:24224?tag=bad", "open sink fluent-"},
		{"flie:///tmp/x", `unknown kind "flie", did you mean "file"? (known: file:///path/records.jsonl, stdout:, fluent://host:24224)`},
		{"STDOUT:", ""}, // RFC 3986: the scheme has no case
		{"stdot:", `did you mean "stdout"?`},
		{"/var/log/x.jsonl", "a URL is wanted: file:///path/records.jsonl"},
		{"", "a URL is wanted"},
		{"file:///tmp/x?max_byte=1", `unknown parameter "max_byte", did you mean "max_bytes"?`},
		{"file:///tmp/x?bach_delay=1", `did you mean "batch_delay"?`},
		{"stdout:?tga=1", `unknown parameter "tga"`},
		{"fluent://h?tga=1", `did you mean "tag"?`},
		{"file:///tmp/x?keep=1&keep=2", `"keep" is given 2 times`},
		{"file:///tmp/x?keep=-1", "parameter keep: want a number from 0 to 1000"},
		{"file:///tmp/x?max_bytes=1MB", "parameter max_bytes: want a size such as"},
		{"file:///tmp/x?max_bytes=9999999GiB", "parameter max_bytes: want a size"},
		{"file:///tmp/x?fsync=maybe", "parameter fsync: want true or false"},
		{"file:///tmp/x?mode=rw", "parameter mode: want permissions in octal"},
		{"file:///tmp/x?timeout=5", "parameter timeout: want a duration such as"},
		{"file:///tmp/x?timeout=999999h", "no more than 1h"},
		{"file:///tmp/x?batch_records=0", "parameter batch_records: want a number from 1"},
		{"file:///tmp/x?%zz=1", "cannot be read"},
		{"file://tmp/x.jsonl", "behind three slashes"},
		{"file:x.jsonl", "behind three slashes"},
		{"file:///tmp/", "behind three slashes"},
		{"stdout:///x", "want stdout: and nothing behind it"},
		{"stdout://host", "want stdout: and nothing behind it"},
		{"fluent://user:secret@h?tga=secret", `unknown parameter "tga"`},
		{"flu://user:secret@h?x=secret", `did you mean "fluent"`},
		{"fluent://user:secret@h%zz/?token=secret", "not a URL"},
		// The parser's own words quote a piece of these.
		{"fluent://user:7secret#x@h", "before the @"},
		{"fluent://user:7secret/x@h", "before the @"},
		{"fluent://user:7secret?x@h", "before the @"},
		{"fluent://user:x%secret@h", "before the @"},
		{"fluent://user:7secret", "sink: not a URL: invalid port after host"},
		{"user:secret@h:24224", "unknown kind"},
		{"flu:user:secret@h:24224", `did you mean "fluent"`},
		{"fluent:user:secret@h:24224?tga=1", `did you mean "tag"`},
		{"fluent:/user:secret@h:24224?tga=1", `did you mean "tag"`},
		{"//user:secret@h:24224", `sink "//h:24224": a URL is wanted`},
		{"/user:secret@h", "a URL is wanted"},
	} {
		t.Run(tt.url, func(t *testing.T) {
			s, err := Open(t.Context(), tt.url, other)
			if checked := Check(tt.url, other); (checked == nil) != (err == nil) || err != nil && checked.Error() != err.Error() {
				t.Errorf("Check says %v, and Open %v", checked, err)
			}
			if err == nil && tt.want == "" {
				if err := s.Close(t.Context()); err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || tt.want == "" || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the error tells a secret: %v", err)
			}
		})
	}
}

// Two sinks of one name would share a cursor, and each would lack what the other took.
func TestCheckAll(t *testing.T) {
	errs := CheckAll([]string{"file:///a.jsonl", "file:///b.jsonl", "flie:///c", "file:///a.jsonl?keep=0", "stdout:?name=x", "file:///d.jsonl?name=x", "file:///e.jsonl?name=../x"})
	for i, want := range []string{"", "", "did you mean", "file:///a.jsonl: another sink has the name file-", "", "another sink has the name x", "parameter name: want up to 100"} {
		if err := errs[i]; (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("sink %d: %v, want %q", i, err, want)
		}
	}
	b := newBench(t, t.TempDir(), journal.Options{})
	defer b.end()
	b.pump(sinkFunc(nil), b.options("x"))
	if _, err := NewPump(b.j, sinkFunc(nil), b.options("x")); err == nil || !strings.Contains(err.Error(), "another sink has the name x") {
		t.Errorf("two pumps: %v", err)
	}
}

func TestNames(t *testing.T) {
	name := func(url string) string {
		t.Helper()
		target, err := Parse(url)
		if err != nil {
			t.Fatal(err)
		}
		return target.Pump.Name
	}
	if a, b := name("file:///a.jsonl"), name("file:///a.jsonl?keep=5"); a != b {
		t.Errorf("a parameter changed the name from %s to %s: the sink would begin anew", a, b)
	}
	if a, b := name("file:///a.jsonl"), name("file:///b.jsonl"); a == b {
		t.Errorf("two files have the name %s", a)
	}
	if got := name("stdout:"); got != "stdout" {
		t.Errorf("stdout is called %s", got)
	}
	if got := name("file:///a.jsonl?name=audit"); got != "audit" {
		t.Errorf("name=audit gives %s", got)
	}
	if target, err := Parse("file:///var/log/a@b.jsonl"); err != nil || target.Pump.Target != "file:///var/log/a@b.jsonl" {
		t.Errorf("%+v, %v", target, err)
	}
	target, err := Parse("file:///a.jsonl?batch_records=10&batch_bytes=64KiB&batch_delay=1s&timeout=5s")
	if err != nil {
		t.Fatal(err)
	}
	if p := target.Pump; p.MaxRecords != 10 || p.MaxBytes != 65536 || p.MaxDelay != time.Second || p.Timeout != 5*time.Second {
		t.Errorf("%+v", p)
	}
	for _, p := range CommonParams() {
		if p.Doc == "" || p.Default == "" {
			t.Errorf("parameter %+v is not documented", p)
		}
	}
}
