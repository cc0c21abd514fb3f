package report

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// fill sets every exported field of a record to a value of its own.
func fill(v reflect.Value, n *int) {
	*n++
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Date(2026, 3, 1, 8, 0, *n%60, *n, time.UTC)))
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).Tag.Get("json") != "-" {
				fill(v.Field(i), n)
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n)
		fill(v.Index(1), n)
	case reflect.String:
		v.SetString("text \"" + strings.Repeat("x", *n%7) + "\u2028 ä " + string(rune('a'+*n%26)))
	case reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Bool:
		v.SetBool(true)
	}
}

// asLine is the reading of a record that parse promises.
func asLine(r *record.Record) line {
	l := line{
		id: []byte(r.ID), kind: []byte(r.Kind), by: []byte(r.By), ts: r.TS, schema: r.Schema,
		outsideJob: r.OutsideJob, claim: r.Claim != nil,
	}
	if c := r.CI; c != nil {
		l.ci = lineCI{repository: []byte(c.Repository), workflow: []byte(c.Workflow), job: []byte(c.Job), jobID: []byte(c.JobID),
			jobName: []byte(c.JobName), jobURL: []byte(c.JobURL), runID: []byte(c.RunID), trackingID: []byte(c.TrackingID), runAttempt: c.RunAttempt}
	}
	if h := r.Host; h != nil {
		l.host = []byte(h.Name)
	}
	if i := r.Invocation; i != nil {
		l.invocation = lineInvocation{tool: []byte(i.Tool), command: []byte(i.Command), execError: []byte(i.ExecError), images: asTexts(i.Images), nested: i.Nested}
	}
	if e := r.End; e != nil {
		l.end = lineEnd{invocationID: []byte(e.InvocationID), tool: []byte(e.Tool), command: []byte(e.Command), source: []byte(e.Source),
			images: asTexts(e.Images), durationNS: e.DurationNS, signal: e.Signal}
		if e.ExitCode != nil {
			l.end.exitCode, l.end.exited = *e.ExitCode, true
		}
	}
	if e := r.Event; e != nil {
		l.event = lineEvent{typ: []byte(e.Type), action: []byte(e.Action), actorID: []byte(e.ActorID), image: []byte(e.Image),
			container: []byte(e.Container), received: e.Received, replayed: e.Replayed, durationNS: e.DurationNS, signal: e.Signal, oom: e.OOM, runnerMade: e.RunnerMade}
		if e.ExitCode != nil {
			l.event.exitCode, l.event.exited = *e.ExitCode, true
		}
	}
	if x := r.Loss; x != nil {
		l.loss = lineLoss{cause: []byte(x.Cause), source: []byte(x.Source), detail: []byte(x.Detail), count: x.Count, from: x.From, to: x.To}
	}
	if j := r.Job; j != nil {
		l.job = lineJob{outcome: []byte(j.Outcome)}
	}
	return l
}

func asTexts(list []string) [][]byte {
	var out [][]byte
	for _, s := range list {
		out = append(out, []byte(s))
	}
	return out
}

// same compares lines, where nil and empty slices are one.
func same(a, b line) bool {
	return reflect.DeepEqual(normal(a), normal(b))
}

func normal(l line) line {
	var walk func(v reflect.Value)
	walk = func(v reflect.Value) {
		switch {
		case v.Kind() == reflect.Slice && v.Len() == 0:
			v.SetZero()
		case v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Slice:
			for i := range v.Len() {
				walk(v.Index(i))
			}
		case v.Kind() == reflect.Struct:
			for i := range v.NumField() {
				f := reflect.NewAt(v.Field(i).Type(), v.Field(i).Addr().UnsafePointer()).Elem()
				if f.Type() == reflect.TypeFor[time.Time]() {
					f.Set(reflect.ValueOf(f.Interface().(time.Time).UTC()))
				} else {
					walk(f)
				}
			}
		}
	}
	walk(reflect.ValueOf(&l).Elem())
	return l
}

func TestParseReadsEveryFieldItNames(t *testing.T) {
	var r record.Record
	n := 0
	fill(reflect.ValueOf(&r).Elem(), &n)
	var p parser
	var got line
	if err := p.parse(record.Append(nil, &r), &got); err != nil {
		t.Fatal(err)
	}
	if want := asLine(&r); !same(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
	// Every field was set, so that a field that is zero was not read.
	var zero func(v reflect.Value, path string)
	zero = func(v reflect.Value, path string) {
		if v.Kind() == reflect.Struct && v.Type() != reflect.TypeFor[time.Time]() {
			for i := range v.NumField() {
				zero(v.Field(i), path+"."+v.Type().Field(i).Name)
			}
		} else if v.IsZero() {
			t.Errorf("%s was not read", path)
		}
	}
	zero(reflect.ValueOf(got), "line")
}

// The parser never panics; what it accepts is valid JSON; and it reads every line
// as the project's own decoder does: the same lines, the same values. It may be
// stricter (depth, wrong types), never laxer. Of bytes that are no UTF-8 the two
// make a different number of U+FFFD, which is of no account.
func FuzzParse(f *testing.F) {
	var r record.Record
	n := 0
	fill(reflect.ValueOf(&r).Elem(), &n)
	f.Add(bytes.TrimSpace(record.Append(nil, &r)))
	for _, seed := range []string{
		`{}`, ` { } `, `{"id":null,"ts":null,"ci":null,"end":{"exit_code":null,"images":null}}`,
		`{"id":"a","id":"b","ci":{"job":"x"},"ci":{"workflow":"y"}}`,
		`{"id":"\u0061\ud83d\ude00\ud83d\u00e9\udc00\"\\\/\b\f\n\r\t"}`,
		"{\"id\":\"\xff\xc3\x28\"}", `{"loss":{"count":-9223372036854775808}}`, `{"loss":{"count":9223372036854775808}}`,
		`{"loss":{"count":1e3}}`, `{"schema":01}`, `{"x":[1,2.5,-0,1E+9,{"a":[]},"\u12"]}`, `{"x":[[[[[[]]]]]]}`,
		`{"invocation":{"images":["a",null,"b"]}}`, `{"ts":"2026-03-01T08:00:00.123456789+02:00"}`, `{"ts":"2026-03-01 08:00:00"}`,
		`{"id":"a"`, `{"id":"a"}{"id":"b"}`, `{"ID":"a"}`, `{"outside_job":nul}`, `{"claim":{}}`, `{"claim":[]}`, `{"":""}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var p parser
		var l line
		if err := p.parse(data, &l); err != nil {
			return
		}
		if !json.Valid(data) {
			t.Fatalf("accepted what is no JSON: %q", data)
		}
		if !utf8.Valid(data) {
			return
		}
		var want record.Record
		if err := recordjson.Unmarshal(data, &want); err != nil {
			// The decoder also reads fields that the report skips, and may find a wrong type there.
			return
		}
		w := asLine(&want)
		if !same(l, w) {
			t.Fatalf("%q\n got %+v\nwant %+v", data, normal(l), normal(w))
		}
	})
}

// Safe and code let nothing through that acts on a terminal or a page, whatever the bytes.
func FuzzText(f *testing.F) {
	for _, s := range []string{"", "alpine:3.20", "\x1b[2J", "a|b`c`<d>&e;\\", "\u202e", "\xff", " x ", "日本", "</code>"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		safe := Safe(s)
		for _, r := range safe {
			if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u202e' || r == '\u2028' {
				t.Fatalf("%U in %q", r, safe)
			}
		}
		c := code(s)
		if strings.HasPrefix(c, "`") {
			if strings.Count(c, "`") != 2 || strings.ContainsAny(c, "|<>\\&\n") {
				t.Fatalf("%q", c)
			}
		} else if inner := strings.TrimSuffix(strings.TrimPrefix(c, "<code>"), "</code>"); strings.ContainsAny(inner, "`|<>\\*_[]@\n") {
			t.Fatalf("%q", c)
		}
		_ = fit(safe, 10)
	})
}

func TestIDSet(t *testing.T) {
	s := newIDSet()
	now := time.Now()
	ids := make([]string, 20000)
	for i := range ids {
		ids[i] = record.NewID(now)
		m := s.at(s.key([]byte(ids[i])))
		if *m&markRecord != 0 {
			t.Fatal("a new id is there already")
		}
		*m |= markRecord
	}
	for _, id := range ids {
		if m := s.at(s.key([]byte(strings.ToUpper(id)))); *m&markRecord == 0 {
			t.Fatalf("%s is forgotten", id)
		}
	}
	if s.n != len(ids) {
		t.Errorf("%d ids, want %d", s.n, len(ids))
	}
	if s.key([]byte("a")) == s.key([]byte("b")) {
		t.Error("two ids that are no UUIDs are one")
	}
	bytes := 0
	for i := range s.shards {
		bytes += cap(s.shards[i].ids)*16 + cap(s.shards[i].marks)
	}
	if per := bytes / len(ids); per > 28 {
		t.Errorf("%d bytes an id", per)
	}
}
