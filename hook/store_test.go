package hook

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
)

var t0 = time.Date(2026, 11, 23, 10, 0, 0, 123456789, time.UTC)

func mkfifo(t *testing.T, path string) {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
}

// aContext is a job's context as the hook makes it.
func aContext(run, tracking, runner string, started time.Time) Context {
	return Context{
		CI: record.CI{Repository: "acme/shop", Job: "build", RunID: run, RunAttempt: 1, TrackingID: tracking,
			Runner: &record.Runner{Name: runner}},
		Workspace: "/w", Started: started,
	}
}

func seal(t *testing.T, s Store, c Context) Context {
	t.Helper()
	c, err := s.Seal(c)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func list(t *testing.T, s Store) Contexts {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestSealedContextReadsBackWhole(t *testing.T) {
	s := Store{Dir: filepath.Join(t.TempDir(), "state", "contexts")}
	c := aContext("4711", "github_a", "r1", t0)
	c.CI.Workflow = "a | b, c <d> \"e\" ünï"
	c.Host = record.Host{Name: "h", Pod: "p", Namespace: "n", Node: "o", BootID: "b"}
	c.RunnerPID, c.RunnerStart, c.Version = 12, 34, "v1"
	sealed := seal(t, s, c)
	got, err := s.Active()
	if err != nil || got == nil || !reflect.DeepEqual(*got, sealed) {
		t.Fatalf("read   %+v (%v)\nsealed %+v", got, err, sealed)
	}
	if !got.Started.Equal(t0) || got.CI.Workflow != c.CI.Workflow {
		t.Errorf("started %v and workflow %q changed", got.Started, got.CI.Workflow)
	}
	for path, want := range map[string]fs.FileMode{s.Dir: 0o700, s.path(sealed.Key): 0o600} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v (%v), want %v", path, fi.Mode().Perm(), err, want)
		}
	}
	end := t0.Add(time.Minute + 1)
	if err := s.End(sealed.Key, Completed, end); err != nil {
		t.Fatal(err)
	}
	ended := list(t, s)[0]
	if ended.Open() || !ended.Ended.Equal(end) || ended.Outcome != Completed {
		t.Errorf("ended %v %q, want %v completed", ended.Ended, ended.Outcome, end)
	}
	// The first end counts.
	if err := s.End(sealed.Key, Abandoned, end.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if again := list(t, s)[0]; !reflect.DeepEqual(again, ended) {
		t.Errorf("a second end changed %+v to %+v", ended, again)
	}
	if a, err := s.Active(); a != nil || err != nil {
		t.Errorf("active %+v (%v) after the end", a, err)
	}
}

// HK-06: run twice for one job.
func TestHK06SealTwice(t *testing.T) {
	faults.Case(t, "HK-06")
	for _, row := range []struct {
		name   string
		change func(*Context)
		again  bool // the same context comes back
	}{
		{"the same", func(*Context) {}, true},
		{"later", func(c *Context) { c.Started = t0.Add(time.Hour) }, true},
		{"with what only the Worker log knows", func(c *Context) { c.CI.JobID, c.CI.JobName, c.CI.OrchestrationID = "1", "x", "y" }, true},
		{"another run", func(c *Context) { c.CI.RunID = "2" }, false},
		{"another attempt", func(c *Context) { c.CI.RunAttempt = 2 }, false},
		{"another job", func(c *Context) { c.CI.Job = "test" }, false},
		{"another leg of a matrix", func(c *Context) { c.CI.TrackingID = "github_b" }, false},
		{"another runner", func(c *Context) { c.CI.Runner = &record.Runner{Name: "r2"} }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := Store{Dir: t.TempDir()}
			first := seal(t, s, aContext("1", "github_a", "r1", t0))
			c := aContext("1", "github_a", "r1", t0.Add(time.Millisecond))
			row.change(&c)
			second := seal(t, s, c)
			if again := second.Key == first.Key; again != row.again {
				t.Errorf("the same context: %v, want %v", again, row.again)
			}
			if row.again && !second.Started.Equal(first.Started) {
				t.Errorf("started %v, want that of the first call, %v", second.Started, first.Started)
			}
		})
	}
}

// act gives every run the id 1 and sets no tracking id.
func TestSealWithoutATrackingID(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	first := seal(t, s, aContext("1", "", "", t0))
	if again := seal(t, s, aContext("1", "", "", t0.Add(time.Second))); again.Key != first.Key {
		t.Errorf("a second later: %s, want %s", again.Key, first.Key)
	}
	second := seal(t, s, aContext("1", "", "", t0.Add(time.Hour)))
	if second.Key == first.Key {
		t.Error("an hour later the job is still the same")
	}
	if err := s.End(second.Key, Completed, t0.Add(time.Hour+time.Second)); err != nil {
		t.Fatal(err)
	}
	third := seal(t, s, aContext("1", "", "", t0.Add(time.Hour+2*time.Second)))
	all := list(t, s)
	if len(all) != 3 || all[0].Key != third.Key || all[2].Outcome != Superseded || all[1].Outcome != Completed {
		t.Errorf("contexts %+v", all)
	}
	if c, match := all.Find("", t0.Add(time.Minute)); c == nil || c.Key != first.Key || match != MatchTime {
		t.Errorf("a record of the first run went to %+v by %q", c, match)
	}
}

// Two hooks of one job, and hooks of many runners, at the same moment.
func TestSealAtTheSameTime(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	var wg sync.WaitGroup
	keys := make([]string, 16)
	for i := range keys {
		wg.Go(func() {
			c, err := s.Seal(aContext("1", "github_a", "r1", t0.Add(time.Duration(i))))
			if err != nil {
				t.Error(err)
			}
			keys[i] = c.Key
		})
		wg.Go(func() {
			runner := fmt.Sprint("other-", i)
			if _, err := s.Seal(aContext("2", "github_"+runner, runner, t0)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	slices.Sort(keys)
	if n := len(slices.Compact(keys)); n != 1 {
		t.Errorf("one job was sealed %d times", n)
	}
	all := list(t, s)
	if len(all) != 17 {
		t.Errorf("%d contexts, want 17", len(all))
	}
	for _, c := range all {
		if !c.Open() {
			t.Errorf("%s was closed as %s by another runner's job", c.Key, c.Outcome)
		}
	}
}

func TestFind(t *testing.T) {
	at := func(minute int) time.Time { return t0.Add(time.Duration(minute) * time.Minute) }
	job := func(run, id, runner string, from, to int) Context {
		c := aContext(run, id, runner, at(from))
		if to > 0 {
			c.Ended, c.Outcome = at(to), Completed
		}
		return c
	}
	one := Contexts{job("3", "github_c", "r1", 20, 0), job("2", "github_b", "r1", 10, 15), job("1", "github_a", "r1", 0, 10)}
	two := append(Contexts{job("9", "github_z", "r2", 5, 12)}, one...)
	bare := Contexts{job("1", "", "", 0, 0)}
	for _, row := range []struct {
		name  string
		in    Contexts
		id    string
		at    time.Time
		run   string
		match Match
	}{
		{"the id of the running job", one, "github_c", at(21), "3", MatchID},
		{"the id of an ended job, long after", one, "github_a", at(99), "1", MatchID},
		{"the id of a job, before it was sealed", one, "github_c", at(19), "3", MatchID},
		{"no id, during a job", one, "", at(12), "2", MatchTime},
		{"no id, at the last nanosecond of a job", one, "", at(15), "2", MatchTime},
		{"no id, at the first nanosecond of a job", one, "", at(20), "3", MatchTime},
		{"no id, one nanosecond before a job", one, "", at(20).Add(-1), "", MatchNone},
		{"no id, between two jobs", one, "", at(17), "", MatchNone},
		{"no id, before all jobs", one, "", at(-1), "", MatchNone},
		{"an id that the user made up", one, "0", at(12), "2", MatchTime},
		{"a job that was never sealed", one, "github_x", at(12), "", MatchNone},
		{"no id, two runners at work", two, "", at(11), "", MatchNone},
		{"no id, one of two runners at work", two, "", at(13), "2", MatchTime},
		{"the id, two runners at work", two, "github_z", at(11), "9", MatchID},
		{"a runner's id, where the hook saw none", bare, "github_x", at(1), "1", MatchTime},
		{"nothing sealed", nil, "github_x", at(1), "", MatchNone},
	} {
		c, match := row.in.Find(row.id, row.at)
		run := ""
		if c != nil {
			run = c.CI.RunID
		}
		if run != row.run || match != row.match {
			t.Errorf("%s: run %q by %q, want %q by %q", row.name, run, match, row.run, row.match)
		}
	}
}

// A job whose end was never seen leaves its context open; two jobs of one runner meet
// in a nanosecond at most.
func TestSupersededWindowsDoNotOverlap(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	seal(t, s, aContext("1", "github_a", "r1", t0))
	seal(t, s, aContext("2", "github_b", "r1", t0.Add(time.Hour)))
	for _, d := range []time.Duration{-1, 1} {
		if c, match, err := s.Find("", t0.Add(time.Hour+d)); c == nil || match != MatchTime || err != nil {
			t.Errorf("%v from the change: %+v %q %v", d, c, match, err)
		}
	}
}

func TestDamagedAndForeignFilesAreNoJobsProblem(t *testing.T) {
	good := aContext("1", "github_a", "r1", t0)
	foreign := "passed over"
	if os.Geteuid() != 0 {
		foreign = "damaged"
	}
	for _, row := range []struct {
		name string
		do   func(t *testing.T, dir, file, text string)
		says string
	}{
		{"cut", func(t *testing.T, _, file, text string) { write600(t, file, text[:len(text)/2]) }, "damaged"},
		{"empty", func(t *testing.T, _, file, _ string) { write600(t, file, "") }, "damaged"},
		{"zeros", func(t *testing.T, _, file, text string) { write600(t, file, strings.Repeat("\x00", len(text))) }, "damaged"},
		{"another form", func(t *testing.T, _, file, _ string) { write600(t, file, `[1]`) }, "damaged"},
		{"nothing in it", func(t *testing.T, _, file, _ string) { write600(t, file, `{}`) }, "damaged"},
		{"huge", func(t *testing.T, _, file, text string) { write600(t, file, text+strings.Repeat(" ", maxContextSize)) }, "more than"},
		{"under another name", func(t *testing.T, dir, file, text string) { write600(t, filepath.Join(dir, "b.json"), text) }, "holds the context"},
		{"a FIFO", func(t *testing.T, dir, _, _ string) { mkfifo(t, filepath.Join(dir, "c.json")) }, "not a regular file"},
		{"a link", func(t *testing.T, dir, file, _ string) { _ = os.Symlink(file, filepath.Join(dir, "d.json")) }, "too many levels"},
		{"a directory", func(t *testing.T, dir, _, _ string) { _ = os.Mkdir(filepath.Join(dir, "e.json"), 0o700) }, "not a regular file"},
		{"writable for all", func(t *testing.T, _, file, _ string) { _ = os.Chmod(file, 0o666) }, "passed over"},
		{"another user's", func(t *testing.T, _, file, _ string) {
			if os.Geteuid() != 0 {
				t.Log("NOT TESTED: giving a file to another user needs root")
				write600(t, file, "")
				return
			}
			_ = os.Chown(file, 12345, 12345)
		}, foreign},
		{"a stranger's name", func(t *testing.T, dir, _, text string) { write600(t, filepath.Join(dir, "..x.json"), text) }, ""},
		{"another ending", func(t *testing.T, dir, file, text string) { write600(t, strings.TrimSuffix(file, "json")+"bak", text) }, "not a name of ours"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := Store{Dir: t.TempDir()}
			c := seal(t, s, good)
			b, err := os.ReadFile(s.path(c.Key))
			if err != nil {
				t.Fatal(err)
			}
			row.do(t, s.Dir, s.path(c.Key), string(b))
			_, err = s.List()
			if row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
				t.Errorf("List said %v, want %q", err, row.says)
			}
			next := seal(t, s, aContext("2", "github_b", "r1", t0.Add(time.Hour)))
			if a, _ := s.Active(); a == nil || a.Key != next.Key {
				t.Errorf("active %+v, want the next job", a)
			}
			if found, match, _ := s.Find("github_b", t0.Add(time.Hour)); found == nil || match != MatchID {
				t.Errorf("found %+v by %q", found, match)
			}
			if err := s.End(next.Key, Completed, t0.Add(2*time.Hour)); err != nil {
				t.Error(err)
			}
		})
	}
}

func write600(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEndOfNoContext(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	for _, key := range []string{"run1-1-abc", "", "../../etc/passwd", "a/b", ".tmp-1", "A"} {
		if err := s.End(key, Completed, t0); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("End(%q) = %v, want fs.ErrNotExist", key, err)
		}
	}
	c := seal(t, s, aContext("1", "github_a", "r1", t0))
	if err := s.End(c.Key, "exploded", t0); err == nil {
		t.Error("an unknown outcome was accepted")
	}
}

func TestPrune(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	old := seal(t, s, aContext("1", "github_old", "r1", t0.Add(-31*24*time.Hour)))
	open := seal(t, s, aContext("2", "github_open", "r2", t0))
	for i := range 70 {
		seal(t, s, aContext(fmt.Sprint(100+i), fmt.Sprint("github_", i), "r1", t0.Add(time.Duration(i)*time.Minute)))
	}
	now := t0.Add(80 * time.Minute)
	damagedOld, damagedNew, temp := filepath.Join(s.Dir, "x.json"), filepath.Join(s.Dir, "y.json"), filepath.Join(s.Dir, tempPrefix+"1")
	for path, age := range map[string]time.Duration{damagedOld: 31 * 24 * time.Hour, damagedNew: time.Hour, temp: 2 * time.Hour} {
		write600(t, path, "damaged")
		if err := os.Chtimes(path, now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	last := seal(t, s, aContext("999", "github_last", "r1", now))
	all, _ := s.List()
	if len(all) > maxContexts+1 {
		t.Errorf("%d contexts kept, want at most %d and an open one", len(all), maxContexts)
	}
	has := func(key string) bool {
		return slices.ContainsFunc(all, func(c Context) bool { return c.Key == key })
	}
	if has(old.Key) || !has(open.Key) || !has(last.Key) {
		t.Errorf("old kept: %v, open kept: %v, last kept: %v; want false, true, true", has(old.Key), has(open.Key), has(last.Key))
	}
	for path, want := range map[string]bool{damagedOld: false, damagedNew: true, temp: false} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", filepath.Base(path), err == nil, want)
		}
	}
}

// smallDisk mounts a tmpfs that the test can fill.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tallyman-test", dir, "tmpfs", 0, "size=64k,nr_inodes=64"); err != nil {
		require.Missing(t, fmt.Sprintf("a small tmpfs to fill, which root or CAP_SYS_ADMIN mounts: %v", err))
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 4096)
	for range 1000 {
		if _, err := f.Write(b); err != nil {
			return
		}
	}
	t.Fatal("the disk does not fill")
}

// A disk that is full when the job changes: nothing can be written, and still the
// old job gets none of the new one's records.
func TestFullDiskDoesNotLendTheOldContext(t *testing.T) {
	s := Store{Dir: filepath.Join(smallDisk(t), "contexts")}
	first := seal(t, s, aContext("1", "github_a", "r1", t0))
	fill(t, filepath.Dir(s.Dir))
	next := t0.Add(time.Hour)
	if _, err := s.Seal(aContext("2", "github_b", "r1", next)); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("Seal on a full disk: %v, want ENOSPC", err)
	}
	all, err := s.List()
	if err != nil || len(all) != 1 || all[0].Outcome != Superseded || !all[0].Ended.Equal(next) {
		t.Fatalf("contexts %+v (%v), want the first one superseded at %v", all, err, next)
	}
	if c, match := all.Find("", next.Add(time.Second)); c != nil {
		t.Errorf("a record of the new job went to %s by %q", c.Key, match)
	}
	if c, match := all.Find("", t0.Add(time.Minute)); c == nil || match != MatchTime {
		t.Errorf("a record of the old job went to %+v by %q", c, match)
	}
	if err := s.End(first.Key, Completed, next); err != nil {
		t.Errorf("End of what was closed by name: %v", err)
	}
	// With room again, sealing works, also under the closed one's identity.
	if err := os.Remove(filepath.Join(filepath.Dir(s.Dir), "ballast")); err != nil {
		t.Fatal(err)
	}
	if c := seal(t, s, aContext("1", "github_a", "r1", next)); c.Key == first.Key {
		t.Error("a closed context was opened again")
	}
}

// The properties: reading never panics; what is accepted has a usable key and start
// and clean texts, and can be written and read again unchanged.
func FuzzParseContext(f *testing.F) {
	c := aContext("4711", "github_a", "r1", t0)
	c.Schema, c.Key = contextVersion, c.baseKey()
	c.CI.Runner.Labels = []string{"a", "b"}
	b, _ := json.Marshal(c)
	f.Add(b)
	f.Add(b[:len(b)-20])
	f.Add([]byte(`{"schema":1,"key":"a","started":"2026-01-01T00:00:00Z","ended":"2025-01-01T00:00:00.000000001+23:59","ci":{"workflow":"\u2028\ud800"}}`))
	f.Add([]byte(`{"schema":1e0,"key":"../x","started":"0001-01-01T00:00:01Z"}`))
	f.Add([]byte(`{"SCHEMA":9,"Key":"k","STARTED":"9999-12-31T23:59:59.999999999Z","runner_pid":-1,"ci":{"runner":{"labels":[null,"\u0000"]}}}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseContext(data)
		if err != nil {
			return
		}
		if !validKey(c.Key) || c.Started.IsZero() {
			t.Fatalf("accepted key %q, start %v", c.Key, c.Started)
		}
		eachText(&c.CI, func(s *string) {
			if *s != clean(*s) {
				t.Fatalf("not clean: %q", *s)
			}
		})
		_ = Contexts{c}.Active()
		_, _ = Contexts{c}.Find(c.CI.TrackingID, c.Started)
		_ = c.identity()
		out, err := json.Marshal(c)
		if err != nil {
			t.Fatalf("cannot be written again: %v", err)
		}
		again, err := parseContext(out)
		if err != nil {
			t.Fatalf("cannot be read again: %v\n%s", err, out)
		}
		if again.identity() != c.identity() || !again.Started.Equal(c.Started) || !again.Ended.Equal(c.Ended) {
			t.Fatalf("read %+v, then %+v", c, again)
		}
	})
}

// Every text of a job's identity is cleaned; a new field of record.CI must be, too.
func TestEachTextReachesEveryField(t *testing.T) {
	ci := record.CI{Runner: &record.Runner{Labels: []string{"x"}}}
	set := func(v reflect.Value) (n int) {
		for i := range v.NumField() {
			if f := v.Field(i); f.Kind() == reflect.String {
				f.SetString("\x01")
				n++
			}
		}
		return n
	}
	n := set(reflect.ValueOf(&ci).Elem()) + set(reflect.ValueOf(ci.Runner).Elem()) + 1
	reached := 0
	eachText(&ci, func(*string) { reached++ })
	if reached != n {
		t.Errorf("eachText reaches %d of %d texts", reached, n)
	}
}

func TestRunFolderIsOpenToAllWhateverTheUmask(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "run")
	for range 2 { // the second time everything is there
		if err := MakeRunDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]os.FileMode{dir: 0o755 | os.ModeDir, dir + "/spool": 0o733 | os.ModeDir | os.ModeSticky} {
		info, err := os.Stat(path)
		if err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
	blocked := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := MakeRunDir(blocked + "/run"); err == nil {
		t.Error("no error below a file")
	}
}
