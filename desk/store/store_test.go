package store

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

func TestRefreshReadsWhatWasAppended(t *testing.T) {
	path := filepath.Join(t.TempDir(), "records.jsonl")
	half := 9 // behind the end of a2: a3's end comes with the second half
	if err := os.WriteFile(path, []byte(strings.Join(small[:half+1], "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), []string{path}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	before, err := s.Refresh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := rows(t, s, "SELECT outcome FROM tallyman.calls WHERE id = 'a3'"); len(got) != 1 || got[0] != "unknown" {
		t.Errorf("before its end: %v", got)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(strings.Join(small[half+1:], "\n") + "\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	after, err := s.Refresh(t.Context())
	if err != nil || after == before {
		t.Fatalf("state %q, then %q, %v", before, after, err)
	}
	if again, err := s.Refresh(t.Context()); err != nil || again != after {
		t.Errorf("state %q without anything new, %v; want %q", again, err, after)
	}
	for _, view := range []string{"calls", "containers", "jobs", "explained", "recording"} {
		want := strings.Join(answers[view], "\n")
		for _, row := range rows(t, s, "SELECT * FROM tallyman."+view) {
			if !strings.Contains(want, row) {
				t.Errorf("%s: row %s is not in the answer for the whole day", view, row)
			}
		}
	}
}

func TestDamagedAndHostileLines(t *testing.T) {
	deep := `{"id":"d","ts":"2026-11-23T10:00:00Z","kind":"invocation","schema":1,"ci":` + strings.Repeat(`{"x":`, 200) + "1" + strings.Repeat("}", 200) + "}"
	lines := []string{
		small[0],
		`{"id":"torn","ts":"2026-11-2`,
		"not JSON at all",
		`[1,2,3]`,
		`{"kind":"invocation"}`,
		`{"id":"no-time","kind":"invocation","ts":"yesterday"}`,
		`{"kind":"segment","id":"x","segment":1}`,
		deep,
		line("new", at("10:00:01"), "teapot", `"later":{"a":[1,{"b":2}]}`),
		line("types", at("10:00:02"), "invocation", `"invocation":{"pid":"many","images":"alpine"}`),
		line("nul", at("10:00:03"), "invocation", `"invocation":{"command":"a\u0000b'; DROP TABLE tallyman.records; --"}`),
		line("far", at("10:00:03").AddDate(7000, 0, 0), "invocation", `"invocation":{"command":"ps"}`),
		small[1],
	}
	s, err := Open(t.Context(), []string{journalOf(t, lines...)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := strings.Join(rows(t, s, "SELECT id FROM tallyman.records"), " ")
	for _, id := range []string{"a-start", "a1", "new", "nul"} {
		if !strings.Contains(got, id) {
			t.Errorf("record %s is not among %s", id, got)
		}
	}
	stats := s.Stats()
	if sum := stats.Records + stats.Unread; sum != int64(len(lines)-1) || stats.Unread < 5 {
		t.Errorf("%d records and %d unread lines of %d", stats.Records, stats.Unread, len(lines)-1)
	}
	t.Logf("read: %s; unread %d", got, stats.Unread)
}

// A query of somebody's own must reach the account and nothing else.
func TestQueriesReachNothingElse(t *testing.T) {
	s, err := Open(t.Context(), []string{journalOf(t, small...)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out := filepath.Join(t.TempDir(), "out.csv")
	for _, q := range []string{
		"SELECT * FROM read_text('/etc/passwd')",
		"SELECT * FROM read_csv('http://127.0.0.1:1/x')",
		"COPY tallyman.calls TO '" + out + "'",
		"ATTACH '" + out + "' AS other",
		"INSTALL httpfs",
		"SET enable_external_access = true",
		"SET memory_limit = '64GB'",
	} {
		if _, err := s.Query(t.Context(), q); err == nil {
			t.Errorf("allowed: %s", q)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Errorf("%s was written", out)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	for name, open := range map[string]func() (*Store, error){
		"no journal": func() (*Store, error) {
			return Open(t.Context(), []string{filepath.Join(t.TempDir(), "none")}, Options{})
		},
		"no path": func() (*Store, error) { return Open(t.Context(), nil, Options{}) },
		"line 2": func() (*Store, error) {
			return Open(t.Context(), []string{journalOf(t, small...)}, Options{Owners: strings.NewReader("\nacme/*\n")})
		},
	} {
		s, err := open()
		if err == nil {
			s.Close()
			t.Errorf("%s: no error", name)
		} else if name != "no path" && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An account without losses has none, and not an unknown number of them.
func TestCountOfNothing(t *testing.T) {
	s, err := Open(t.Context(), []string{journalOf(t, small[:4]...)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := rows(t, s, "SELECT COUNTIF(lost IS NULL), COUNT(*) FROM tallyman.losses"); got[0] != "0|0" {
		t.Errorf("of no losses COUNTIF and COUNT are %s", got[0])
	}
	for _, p := range append(panels.All(), panels.Trust()) {
		sql, params := panels.Parameters(p.SQL, panels.DuckDB, panels.Filter{From: at("00:00:00"), To: at("00:00:00").Add(time.Second)})
		table, err := s.Query(t.Context(), sql, params...)
		if err != nil {
			t.Fatalf("%s: %v", p.ID, err)
		}
		for _, row := range table.Rows {
			for i, v := range row {
				if c := p.Columns[i]; v == nil && c.Unit == panels.Count {
					t.Errorf("panel %s of no records: %s is NULL", p.ID, c.Name)
				}
			}
		}
	}
}

// Calls that no job is known for are no run.
func TestCallsWithoutAJobAreNoRun(t *testing.T) {
	s, err := Open(t.Context(), []string{journalOf(t,
		line("1", at("10:00:00"), "invocation", `"by":"none","invocation":{"tool":"docker","command":"pull"}`),
		line("2", at("10:00:01"), "invocation", billing+`,"invocation":{"tool":"docker","command":"pull"}`),
	)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := rows(t, s, "SELECT repository, calls, runs FROM tallyman.traffic ORDER BY 1")
	if want := []string{"acme/billing|1|1", "|1|0"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCloseRemovesTheDatabase(t *testing.T) {
	temp := t.TempDir()
	s, err := Open(t.Context(), []string{journalOf(t, small...)}, Options{Temp: temp})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
