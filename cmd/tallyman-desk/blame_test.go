package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/blame/sim"
)

// smallFleet has two guilty workflows of thirty. Nothing random is left in it.
func smallFleet() *sim.Fleet {
	return sim.Run(sim.Config{Seed: 3, Hours: 4, Jobs: 30, Workflows: 12, Guilty: 2, Missing: 0.05, Skew: 2 * time.Second, UserAgents: true})
}

// writeFleet writes records.jsonl, requests.csv and berlin.csv, which has the same times
// by the clocks of Berlin.
func writeFleet(t testing.TB, dir string) *sim.Fleet {
	t.Helper()
	f := smallFleet()
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	var records, csv, other bytes.Buffer
	for _, err := range []error{f.WriteRecords(&records), f.WriteCSV(&csv, time.UTC), f.WriteCSV(&other, berlin)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, data := range map[string][]byte{"records.jsonl": records.Bytes(), "requests.csv": csv.Bytes(), "berlin.csv": other.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// What a user gets who has a table of requests and the journals of the fleet: the guilty
// on top, in text and in JSON.
func TestBlameNamesTheGuilty(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f := writeFleet(t, dir)
	guilty := map[blame.Candidate]bool{}
	for i := range f.Workflows {
		if f.Workflows[i].Guilty() {
			var c blame.Candidate
			c.Repository, c.Workflow, c.Job = f.Candidate(i)
			guilty[c] = true
		}
	}
	program := func(args ...string) string {
		cmd := exec.Command(self, append([]string{"blame", "--csv", "requests.csv", "--resamples", "20", "--placebos", "4"}, args...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), asProgram+"=1", "GORACE=atexit_sleep_ms=0")
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("blame %v: %v\n%s", args, err, stderr.String())
		}
		return string(out)
	}
	text := program("--format", "json", "records.jsonl")
	var r blame.Result
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	if r.Verdict != blame.Named {
		t.Errorf("verdict %s: %v", r.Verdict, r.Reasons)
	}
	if len(r.Suspects) < len(guilty) {
		t.Fatalf("only %d suspects", len(r.Suspects))
	}
	for _, s := range r.Suspects[:len(guilty)] {
		if len(s.Members) != 1 || !guilty[s.Members[0]] || !s.Named {
			t.Errorf("rank %d is %v, named %v", s.Rank, s.Members, s.Named)
		}
		if len(s.Examples) == 0 || s.Examples[0].JobURL == "" || len(s.Steps) == 0 || len(s.UserAgents) == 0 || len(s.Asked) == 0 {
			t.Errorf("rank %d has nothing to look at: %+v", s.Rank, s)
		}
	}
	table := program("records.jsonl")
	for _, want := range []string{"These stand out.", "coverage", "Suspects, by evidence", r.Suspects[0].Members[0].String(), "plain count of overlaps"} {
		if !strings.Contains(table, want) {
			t.Errorf("the table lacks %q:\n%s", want, table)
		}
	}
	// Only answers 401: fewer requests, the same guilty on top.
	var narrow blame.Result
	if err := json.Unmarshal([]byte(program("--status", "401", "--format", "json", "records.jsonl")), &narrow); err != nil {
		t.Fatal(err)
	}
	if narrow.Requests >= r.Requests || narrow.Requests == 0 || len(narrow.Suspects) == 0 || !guilty[narrow.Suspects[0].Members[0]] {
		t.Errorf("with --status 401: %d of %d requests, suspects %+v", narrow.Requests, r.Requests, narrow.Suspects)
	}
}

// Each script in testdata/blame is a session of a user.
func TestBlame(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "blame"),
		Setup: func(e *testscript.Env) error {
			bin := filepath.Join(e.WorkDir, "bin")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			f := smallFleet()
			var records bytes.Buffer
			if err := f.WriteRecords(&records); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(e.WorkDir, "records.jsonl"), records.Bytes(), 0o644); err != nil {
				return err
			}
			var csv bytes.Buffer
			if err := f.WriteCSV(&csv, time.FixedZone("", 3*3600)); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(e.WorkDir, "three-hours-late.csv"), csv.Bytes(), 0o644); err != nil {
				return err
			}
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv(asProgram, "1")
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			e.Setenv("BEGIN", fmt.Sprint(sim.Begin.Format(time.DateOnly)))
			return os.Symlink(self, filepath.Join(bin, "tallyman-desk"))
		},
	})
}
