package recordjson

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/record"
)

// fill sets every field of the struct at v to a value drawn from rng and text, so
// that a field that the generator forgot shows as a difference.
func fill(v reflect.Value, rng *rand.Rand, text string) {
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(rng.Int64N(4e9), rng.Int64N(1e9)).UTC()))
		return
	case []byte: // Unknown is filled by the tests that are about it
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), rng, text)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), rng, text)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1+rng.IntN(3), 4))
		for i := range v.Len() {
			fill(v.Index(i), rng, text)
		}
	case reflect.String:
		v.SetString(text[rng.IntN(len(text)+1):] + string(rune('a'+rng.IntN(26))))
	case reflect.Int64:
		v.SetInt(rng.Int64() - rng.Int64())
	case reflect.Bool:
		v.SetBool(true)
	default:
		panic("fill: " + v.Type().String())
	}
}

// valid replaces what JSON cannot carry, as the encoder does, in all strings of v.
func valid(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			valid(v.Field(i))
		}
	case reflect.Pointer:
		if !v.IsNil() {
			valid(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			valid(v.Index(i))
		}
	case reflect.String:
		v.SetString(toValid(v.String()))
	}
}

// toValid replaces each invalid byte by U+FFFD, like encoding/json, where
// strings.ToValidUTF8 would replace a run of them by one.
func toValid(s string) string {
	var b strings.Builder
	for _, r := range s {
		b.WriteRune(r)
	}
	return b.String()
}

// FuzzRoundTrip: whatever the strings hold, Append writes exactly one line of
// valid JSON, without bytes that a terminal or a line reader acts on, and both this
// package and encoding/json read the same record from it again.
func FuzzRoundTrip(f *testing.F) {
	for _, text := range []string{
		"", "plain", "\xff\xfe invalid \xc3", "controls \x00\x01\x1b[31m\r\n\t\x7f", "line\u2028and\u2029paragraph",
		`quotes " and \ and {"id":"`, "<html>&amp;", strings.Repeat("huge ", 20000), "\xed\xa0\x80 surrogate", "🐳 𝕕",
	} {
		f.Add(text, uint64(1))
	}
	f.Fuzz(func(t *testing.T, text string, seed uint64) {
		var want record.Record
		fill(reflect.ValueOf(&want).Elem(), rand.New(rand.NewPCG(seed, 0)), text)
		line := record.Append(nil, &want)
		if n := bytes.IndexByte(line, '\n'); n != len(line)-1 {
			t.Fatalf("newline at %d of %d: not exactly one line", n, len(line))
		}
		if i := bytes.IndexFunc(line[:len(line)-1], func(r rune) bool { return r < ' ' || r == 0x7f || r == '\u2028' || r == '\u2029' }); i >= 0 {
			t.Fatalf("raw control byte at %d", i)
		}
		if !utf8.Valid(line) || !bytes.HasPrefix(line, []byte(record.Marker)) || bytes.LastIndex(line, []byte(record.Marker)) != 0 {
			t.Fatal("not UTF-8, or the marker is not at the start alone")
		}
		valid(reflect.ValueOf(&want).Elem())
		var got, std record.Record
		if err := Unmarshal(line, &got); err != nil {
			t.Fatalf("Unmarshal: %v\n%s", err, line)
		}
		if err := json.Unmarshal(line, &std); err != nil {
			t.Fatalf("encoding/json: %v\n%s", err, line)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("round trip changed the record\n got %+v\nwant %+v", got, want)
		}
		if !reflect.DeepEqual(std, want) {
			t.Fatalf("encoding/json reads another record\n got %+v\nwant %+v", std, want)
		}
	})
}

// FuzzUnmarshal: any input gives a record or an error, never a panic; and what was
// decoded once encodes to a line that decodes to the same record.
func FuzzUnmarshal(f *testing.F) {
	for _, s := range []string{
		`{"id":"a","ts":"2026-11-23T10:00:00Z","kind":"event","schema":1,"by":"none","event":{"labels":[{"key":"a"},null]}}`,
		`{}`, `null`, `[]`, `{"ci":null,"x":{"y":[1,2,{"z":"]}"}]}}`, `{"ts":5}`, `{"schema":1e3}`, `{"id":"\ud800\u0000"}`, ` { "id" : "a" } `,
		`{"\u0069d":"x","ID":"y"}`, `{"end":{"exit_code":0}}`, `{"":1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var first, second record.Record
		if Unmarshal(line, &first) != nil {
			return
		}
		again := record.Append(nil, &first)
		if err := Unmarshal(again, &second); err != nil {
			t.Fatalf("%q became undecodable %q: %v", line, again, err)
		}
		if !reflect.DeepEqual(first, second) {
			t.Fatalf("unstable:\n%+v\n%+v", first, second)
		}
	})
}

func TestUnknownMembersSurvive(t *testing.T) {
	const line = `{"id":"a","ts":"2026-11-23T10:00:00.000000001Z","kind":"invocation","schema":2,"by":"none",` +
		`"ci":{"repository":"o/r","queue":{"name":"q"}},"invocation":{"uid":0,"args":[1,2]},"later":"ü","x":null}` + "\n"
	var r record.Record
	if err := Unmarshal([]byte(line), &r); err != nil {
		t.Fatal(err)
	}
	if got := string(record.Append(nil, &r)); got != line {
		t.Errorf("got  %swant %s", got, line)
	}
}

func TestHostileMembers(t *testing.T) {
	for _, test := range []struct{ name, line, want string }{
		{"a second key in other case does not replace the first", `{"id":"a","ID":"b","Id":"c"}`, `{"id":"a",`},
		{"an escaped key is the key", `{"\u0069d":"a"}`, `{"id":"a",`},
		{"an unknown key in other case than a known one is dropped", `{"id":"a","CI":{"repository":"forged"}}`, `{"id":"a",`},
		{"the last of two equal keys counts", `{"id":"a","id":"b"}`, `{"id":"b",`},
		{"a list given twice is not joined", `{"id":"a","invocation":{"images":["x"],"images":["y"]}}`, `{"id":"a",`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var r record.Record
			if err := Unmarshal([]byte(test.line), &r); err != nil {
				t.Fatal(err)
			}
			got := string(record.Append(nil, &r))
			if !strings.HasPrefix(got, test.want) || strings.Contains(got, "forged") || strings.Contains(got, "ID") || strings.Contains(got, `"x"`) {
				t.Errorf("got %s", got)
			}
		})
	}
}

func TestErrorsNameTheMember(t *testing.T) {
	for _, test := range []struct{ line, want string }{
		{`{"id":5}`, `member "id": want a string`},
		{`{"ts":"yesterday"}`, `member "ts": want a time in RFC 3339`},
		{`{"ci":[]}`, `member "ci": want an object`},
		{`{"invocation":{"uid":"root"}}`, `member "uid": want an integer`},
		{`{"outside_job":1}`, `member "outside_job": want true or false`},
		{`{"invocation":{"images":"a"}}`, `member "images": want an array`},
		{`{"schema":1.5}`, `member "schema": want an integer of 64 bits`},
		{`[]`, "not a JSON object"},
		{`{"id":"a"`, "not a JSON object"},
		{``, "not a JSON object"},
	} {
		var r record.Record
		if err := Unmarshal([]byte(test.line), &r); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got error %v, want %q", test.line, err, test.want)
		}
	}
}

func TestGeneratedFilesAreCurrent(t *testing.T) {
	cmd := exec.Command("go", "run", "../../internal/gen/recordgen", "-root", "../..", "-check")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func BenchmarkUnmarshal(b *testing.B) {
	var r record.Record
	fill(reflect.ValueOf(&r).Elem(), rand.New(rand.NewPCG(1, 1)), "octo-org/octo-repo")
	r.Event, r.Loss, r.Job, r.End, r.Claim = nil, nil, nil, nil, nil
	line := record.Append(nil, &r)
	b.SetBytes(int64(len(line)))
	b.ReportAllocs()
	b.Run("recordjson", func(b *testing.B) {
		for b.Loop() {
			if err := Unmarshal(line, &r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encoding-json", func(b *testing.B) {
		for b.Loop() {
			if err := json.Unmarshal(line, &r); err != nil {
				b.Fatal(err)
			}
		}
	})
}
