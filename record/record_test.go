package record

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

var uuid7Shape = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

func TestIDsAreUniqueAndOrderedByTime(t *testing.T) {
	seen := map[string]bool{}
	now := time.Unix(1763900000, 0)
	last := ""
	for i := range 100000 {
		id := NewID(now.Add(time.Duration(i) * 500 * time.Microsecond))
		if !uuid7Shape.MatchString(id) {
			t.Fatalf("%s is not a UUIDv7", id)
		}
		if seen[id] {
			t.Fatalf("%s was made twice", id)
		}
		if id <= last {
			t.Fatalf("%s does not sort after %s", id, last)
		}
		seen[id], last = true, id
	}
	same := map[string]bool{}
	for range 100000 {
		same[NewID(now)] = true
	}
	if len(same) != 100000 {
		t.Errorf("%d different ids of 100000 made at one moment", len(same))
	}
}

// The time part is what RFC 9562 says it is: section A.6 gives this example for
// 2022-02-22 14:22:22.00 GMT-05:00.
func TestIDHoldsTheTime(t *testing.T) {
	id := NewID(time.UnixMilli(0x017F22E279B0))
	if id[:18] != "017f22e2-79b0-7000" {
		t.Errorf("got %s", id)
	}
}

func TestDerivedIDsFollowTheirParts(t *testing.T) {
	ts := time.Unix(1763900000, 123456789)
	base := DeriveID(ts, "engine", "container", "start", "abc")
	if !uuid7Shape.MatchString(base) {
		t.Fatalf("%s is not a UUIDv7", base)
	}
	if base != DeriveID(ts, "engine", "container", "start", "abc") {
		t.Error("the same event got another id")
	}
	for _, other := range []string{
		DeriveID(ts, "engine", "container", "start", "abd"),
		DeriveID(ts, "engine", "container", "starta", "bc"),
		DeriveID(ts, "engine", "container", "start"),
		DeriveID(ts.Add(time.Millisecond), "engine", "container", "start", "abc"),
	} {
		if other == base {
			t.Errorf("another event got the same id %s", base)
		}
	}
}

func TestTimesBeyondTheFormatBecomeZero(t *testing.T) {
	for _, ts := range []time.Time{time.Unix(1<<40, 0), time.Unix(-1<<40, 0)} {
		if got := string(appendTime(nil, ts)); got != `"0001-01-01T00:00:00.000000000Z"` {
			t.Errorf("%v: got %s", ts, got)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	r := Record{ID: NewID(time.Now()), TS: time.Now(), Kind: KindInvocation, Schema: 1, By: BySealed,
		CI:         &CI{Repository: "octo-org/octo-repo", Workflow: "Build and test", Job: "build", RunID: "123456789"},
		Invocation: &Invocation{Tool: "docker", Command: "build", Images: []string{"app:1"}, Flags: []string{"-t", "--build-arg"}}}
	buf := make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		buf = Append(buf[:0], &r)
	}
	b.SetBytes(int64(len(buf)))
}

// A job that knows how ids are derived must not be able to send an invocation that
// takes the id of one of the agent's own records.
func TestAnInvocationNeverHasADerivedID(t *testing.T) {
	now := time.Unix(1763900000, 0)
	for i := range 1000 {
		ts := now.Add(time.Duration(i) * time.Second)
		own, derived := NewID(ts), DeriveID(ts, "job.end", "key")
		if kept, ok := InvocationID(own); !ok || kept != own {
			t.Fatalf("%s became %s, %v", own, kept, ok)
		}
		kept, ok := InvocationID(derived)
		if !ok || kept == derived {
			t.Fatalf("%s became %s, %v", derived, kept, ok)
		}
		if again, _ := InvocationID(kept); again != kept {
			t.Fatalf("%s became %s and then %s", derived, kept, again)
		}
	}
	good := NewID(now)
	for _, id := range []string{
		"", "x", good[:35], good + "0", strings.ToUpper(good), strings.Replace(good, "-", "0", 1), good[:35] + "\"", good[:35] + "\n",
		good[:14] + "4" + good[15:], good[:19] + "c" + good[20:], good[:8] + "0" + good[9:],
	} {
		if kept, ok := InvocationID(id); ok && id != good {
			t.Errorf("%q was taken as %s", id, kept)
		}
	}
}
