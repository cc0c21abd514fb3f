package row

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

var update = flag.Bool("update", false, "write the golden files again")

func int64p(n int64) *int64 { return &n }

// samples is a record of each kind.
func samples() []*record.Record {
	ts := time.Date(2026, 11, 23, 14, 5, 6, 123_456_789, time.UTC)
	ci := &record.CI{Repository: "acme/app", RepositoryID: "42", Owner: "acme", Workflow: "build & test", Job: "unit", JobID: "70000000001",
		RunID: "17000000001", RunNumber: 12, RunAttempt: 1, Actor: "octocat", Runner: &record.Runner{Name: "runner-1", OS: "Linux", Labels: []string{"self-hosted", "linux"}}}
	host := &record.Host{Name: "runner-1", Pod: "runner-1", Namespace: "ci", Node: "node-7"}
	return []*record.Record{
		{ID: "01980000-0000-7000-8000-000000000001", TS: ts, Kind: record.KindInvocation, Schema: 1, By: record.BySealed, CI: ci, Host: host,
			Claim:      &record.CI{Repository: "evil/other"},
			Invocation: &record.Invocation{Tool: "docker", Command: "run", Images: []string{"alpine:3", "busybox"}, Flags: []string{"--rm"}, Argc: 5, PID: 77, UID: 0, Sudo: true, MonoNS: 1<<53 + 1}},
		{ID: "01980000-0000-7000-8000-000000000002", TS: ts, Kind: record.KindInvocationEnd, Schema: 1, By: record.BySealed, CI: ci, Host: host,
			End: &record.End{InvocationID: "01980000-0000-7000-8000-000000000001", Tool: "docker", Command: "run", DurationNS: 2_000_000_001, ExitCode: int64p(0), Source: "pidfd_info"}},
		{ID: "01980000-0000-7000-8000-000000000003", TS: ts, Kind: record.KindEvent, Schema: 1, By: record.ByInferred, CI: ci,
			Event: &record.Event{Type: "container", Action: "die", Image: "alpine:3", TimeNano: 1_763_906_706_123_456_789, Received: ts.Add(time.Millisecond), ExitCode: int64p(137), OOM: true,
				Labels: []record.Attr{{Key: "team", Value: "\"ü\"\n"}, {Key: "empty"}}}},
		{ID: "01980000-0000-7000-8000-000000000004", TS: ts, Kind: record.KindLoss, Schema: 1, By: record.ByNone, OutsideJob: true,
			Loss: &record.Loss{Cause: "stream_gap", Count: -1, From: ts.Add(-time.Minute), To: ts, Source: "events"}},
		{ID: "01980000-0000-7000-8000-000000000005", TS: ts, Kind: record.KindJobEnd, Schema: 1, By: record.BySealed, CI: ci,
			Job: &record.Job{Outcome: "completed", Started: ts.Add(-time.Hour), DurationNS: 3_600_000_000_000, Version: "1.0"}},
		{ID: "01980000-0000-7000-8000-000000000006", TS: ts, Kind: record.KindHTTP, Schema: 1, By: record.ByNone,
			HTTP: &record.HTTP{Source: "github-csv", Row: 1, Count: 1, Method: "GET", Host: "github.com", Path: "/acme/app.git/info/refs", Class: "git-refs",
				Repository: "acme/app", Status: 401, Bytes: int64p(0), UserAgent: "git/2.43.0", RemoteAddr: "203.0.113.7", Anonymous: true}},
	}
}

// The rows of one record of each kind, as they are sent.
func TestRows(t *testing.T) {
	var got []byte
	for _, r := range samples() {
		line, err := Append(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		got = append(append(got, line...), '\n')
	}
	const golden = "testdata/rows.jsonl"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the rows are not those of %s (go test ./sinks/row -update writes it again):\n%s", golden, got)
	}
}

// A row has columns of the table only, each with a value of its type, and says what
// the record says. The oracle is made by encoding/json from the record's own line.
func TestRowsAreRecords(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		var r record.Record
		fill(random, reflect.ValueOf(&r).Elem())
		r.ID, r.Kind = strconv.Itoa(n), record.KindEvent
		line, err := Append([]byte("before"), &r)
		if err != nil {
			t.Fatal(err)
		}
		line, ok := bytes.CutPrefix(line, []byte("before"))
		if !ok {
			t.Fatalf("what was there is gone: %.100s", line)
		}
		if err := matches(decode(t, line), Columns(), ""); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		if want := transformed(t, &r); !reflect.DeepEqual(decode(t, line), want) {
			t.Fatalf("got %s, want %v", line, want)
		}
	}
}

// Unknown members cannot come in the place of columns, nor beside them.
func TestUnknownMembersAreLeftOut(t *testing.T) {
	var r record.Record
	line := `{"id":"a","ts":"2026-11-23T14:05:06.000000000Z","kind":"event","schema":2,"by":"none","repository":"victim/app","publish_time":"x","message_id":1,` +
		`"ci":{"repository":"acme/app","future":{"a":1}},"event":{"type":"container","news":[1]}}`
	if err := recordjson.Unmarshal([]byte(line), &r); err != nil {
		t.Fatal(err)
	}
	got, err := Append(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"id":"a","ts":"2026-11-23T14:05:06.000000Z","kind":"event","schema":2,"by":"none","ci":{"repository":"acme/app"},"event":{"type":"container"},"repository":"acme/app"}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestWhatIsNoRow(t *testing.T) {
	for _, r := range []record.Record{{Kind: "event"}, {ID: "a"}} {
		if got, err := Append(nil, &r); err == nil {
			t.Errorf("%+v became %s: a REQUIRED column is empty", r, got)
		}
	}
	// BigQuery's TIMESTAMP begins with the year 1.
	for _, ts := range []time.Time{{}, time.Date(-5, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(10_001, 1, 1, 0, 0, 0, 0, time.UTC)} {
		got, err := Append(nil, &record.Record{ID: "a", Kind: "event", TS: ts})
		if err != nil || !bytes.Contains(got, []byte(`"ts":"0001-01-01T00:00:00.000000Z"`)) {
			t.Errorf("%v became %s, %v", ts, got, err)
		}
	}
}

// What BigQuery asks of a table's columns, and Tallyman of the views over them.
func TestColumns(t *testing.T) {
	top := map[string]Column{}
	for _, c := range Columns() {
		top[c.Name] = c
	}
	for name, want := range map[string]Column{
		"id": {Type: String, Mode: Required}, "ts": {Type: Timestamp, Mode: Required}, "kind": {Type: String, Mode: Required},
		"schema": {Type: Integer, Mode: Nullable}, "outside_job": {Type: Boolean, Mode: Nullable},
		// A table is clustered by these, and BigQuery takes only columns of the top there.
		"repository": {Type: String, Mode: Nullable}, "workflow": {Type: String, Mode: Nullable},
	} {
		if got := top[name]; got.Type != want.Type || got.Mode != want.Mode || got.Fields != nil {
			t.Errorf("column %s is %+v, want %+v", name, got, want)
		}
	}
	form := regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	var walk func(columns []Column, path string, depth int)
	walk = func(columns []Column, path string, depth int) {
		seen := map[string]bool{}
		for _, c := range columns {
			at := path + c.Name
			switch {
			case !form.MatchString(c.Name) || seen[c.Name]:
				t.Errorf("%s: a bad name, or one that is there twice", at)
			case c.Mode == Required && depth > 0:
				t.Errorf("%s is REQUIRED: a record without it would be refused", at)
			case (c.Type == Record) != (len(c.Fields) > 0):
				t.Errorf("%s: %s with %d fields", at, c.Type, len(c.Fields))
			case depth > 14:
				t.Errorf("%s: BigQuery nests 15 deep", at)
			}
			seen[c.Name] = true
			walk(c.Fields, at+".", depth+1)
		}
	}
	walk(Columns(), "", 0)
}

func decode(t testing.TB, data []byte) map[string]any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	return m
}

var timeForm = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`)

// matches checks members against columns as strictly as BigQuery may.
func matches(members map[string]any, columns []Column, path string) error {
	for name, value := range members {
		i := slices.IndexFunc(columns, func(c Column) bool { return c.Name == name })
		if i < 0 {
			return fmt.Errorf("%s%s is no column", path, name)
		}
		values := []any{value}
		if columns[i].Mode == Repeated {
			list, ok := value.([]any)
			if !ok {
				return fmt.Errorf("%s%s is not repeated", path, name)
			}
			values = list
		}
		for _, v := range values {
			good := false
			switch columns[i].Type {
			case String:
				_, good = v.(string)
			case Boolean:
				_, good = v.(bool)
			case Integer:
				n, ok := v.(json.Number)
				_, err := strconv.ParseInt(string(n), 10, 64)
				good = ok && err == nil
			case Timestamp:
				s, ok := v.(string)
				good = ok && timeForm.MatchString(s)
			case Record:
				m, ok := v.(map[string]any)
				if ok {
					if err := matches(m, columns[i].Fields, path+name+"."); err != nil {
						return err
					}
				}
				good = ok
			}
			if !good {
				return fmt.Errorf("%s%s: %v is no %s", path, name, v, columns[i].Type)
			}
		}
	}
	for _, c := range columns {
		if _, there := members[c.Name]; c.Mode == Required && !there {
			return fmt.Errorf("%s%s is missing", path, c.Name)
		}
	}
	return nil
}

// transformed is what the row of r must say.
func transformed(t testing.TB, r *record.Record) map[string]any {
	t.Helper()
	m := decode(t, record.Append(nil, r))
	long := regexp.MustCompile(`^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6})\d{3}Z$`)
	var walk func(members map[string]any)
	walk = func(members map[string]any) {
		for name, value := range members {
			switch v := value.(type) {
			case string:
				members[name] = long.ReplaceAllString(v, "${1}Z")
			case json.Number:
				if name == "time_nano" || name == "mono_ns" {
					members[name] = v.String()
				}
			case map[string]any:
				walk(v)
			case []any:
				for _, e := range v {
					if m, ok := e.(map[string]any); ok {
						walk(m)
					}
				}
			}
		}
	}
	walk(m)
	if ci, ok := m["ci"].(map[string]any); ok {
		for _, name := range []string{"repository", "workflow"} {
			if v, ok := ci[name]; ok {
				m[name] = v
			}
		}
	}
	return m
}

// fill gives v a random value, zero ones often.
func fill(random *rand.Rand, v reflect.Value) {
	if random.IntN(3) == 0 {
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(strings.Repeat([]string{"a", "ü", "\"", "\n", "\u2028", "\x00"}[random.IntN(6)], random.IntN(5)))
	case reflect.Int64:
		v.SetInt(random.Int64() >> random.IntN(64))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(random, v.Elem())
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return // Unknown
		}
		v.Set(reflect.MakeSlice(v.Type(), random.IntN(4), 4))
		for i := range v.Len() {
			fill(random, v.Index(i))
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(random.Int64N(4e9), random.Int64N(1e9))))
			return
		}
		for i := range v.NumField() {
			fill(random, v.Field(i))
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	r := samples()[0]
	var buf []byte
	for b.Loop() {
		buf, _ = Append(buf[:0], r)
	}
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
}
