package store

import (
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/journal"
)

// kept is a database that stays, and the journal that it reads.
type kept struct {
	t             *testing.T
	path, journal string
}

func newKept(t *testing.T) *kept {
	dir := t.TempDir()
	return &kept{t: t, path: filepath.Join(dir, "fleet.db"), journal: filepath.Join(dir, "records.jsonl")}
}

func (k *kept) write(lines ...string) {
	k.t.Helper()
	if err := os.WriteFile(k.journal, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) open(paths ...string) *Store {
	k.t.Helper()
	s, err := Open(k.t.Context(), paths, Options{Database: k.path, Temp: filepath.Dir(k.path), Owners: strings.NewReader(owners)})
	if err != nil {
		k.t.Fatal(err)
	}
	return s
}

// has checks the answers of the small day.
func (k *kept) has(s *Store) {
	k.t.Helper()
	for view, want := range answers {
		if got := rows(k.t, s, "SELECT * FROM tallyman."+view); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
			k.t.Errorf("%s:\n%s\nwant:\n%s", view, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	if err := s.Close(); err != nil {
		k.t.Error(err)
	}
}

// A database that stays reads only what is new, whatever was cut into two, and has the
// same answers as one that read all at once.
func TestKeptDatabase(t *testing.T) {
	for _, half := range []int{9, len(small) - 1} {
		k := newKept(t)
		k.write(append(slices.Clone(small[:half]), "no record")...)
		s := k.open(k.journal)
		if st := s.Stats(); st.Records != int64(half) || st.Unread != 1 {
			t.Errorf("%+v, want %d records", st, half)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		k.write(append(append(slices.Clone(small[:half]), "no record"), small[half:]...)...)
		s = k.open(k.journal)
		if st := s.Stats(); st.Records != int64(len(small)) || st.Unread != 1 || len(st.Replaced) != 0 {
			t.Errorf("%+v, want %d records, each read once", st, len(small))
		}
		k.has(s)
		k.has(k.open()) // without any journal
		if st, err := os.Stat(k.path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v: others may read it", st.Mode(), err)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(k.path), "*")); len(left) != 2 {
			t.Errorf("left over: %v", left)
		}
	}
}

// A file in the place of the one that was read is read too, and that is said. Records that
// both have count once.
func TestKeptDatabaseOfAnotherFile(t *testing.T) {
	k := newKept(t)
	k.write(small...)
	if err := k.open(k.journal).Close(); err != nil {
		t.Fatal(err)
	}
	for name, lines := range map[string][]string{"shorter": small[:5], "another beginning": append([]string{small[len(small)-1]}, small...)} {
		k.write(lines...)
		s := k.open(k.journal)
		if st := s.Stats(); len(st.Replaced) != 1 || st.Replaced[0] != k.journal {
			t.Errorf("%s: %+v", name, st)
		}
		k.has(s)
	}
}

// Nothing that a query says changes a database that stays.
func TestKeptDatabaseIsOnlyRead(t *testing.T) {
	k := newKept(t)
	k.write(small...)
	s := k.open(k.journal)
	for _, q := range []string{
		"DELETE FROM tallyman.records", "DROP TABLE tallyman.records", "COMMIT; DELETE FROM tallyman.calls", "CREATE TABLE x (i INT)",
		"UPDATE desk.database SET unread = 7", "ATTACH '" + k.path + "2' AS other", "SET enable_external_access = true",
		"SELECT * FROM read_csv('" + k.journal + "')", "COPY tallyman.records TO '" + k.path + ".csv'",
	} {
		if _, err := s.Query(t.Context(), q); err == nil {
			t.Errorf("%s: no error", q)
		}
	}
	k.has(s)
	k.has(k.open(k.journal))
}

// Where a process ended before the kept answers had what it had read, the next one makes
// up for it.
func TestKeptDatabaseAfterAKill(t *testing.T) {
	k := newKept(t)
	k.write(small[:5]...)
	if err := k.open(k.journal).Close(); err != nil {
		t.Fatal(err)
	}
	k.write(small...)
	s, err := Open(t.Context(), nil, Options{Database: k.path, Follow: true, Temp: filepath.Dir(k.path)})
	if err != nil {
		t.Fatal(err)
	}
	other, err := Open(t.Context(), []string{k.journal}, Options{Database: filepath.Join(filepath.Dir(k.path), "other.db"), Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	s.sources, other.sources = other.sources, nil
	if err := s.resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.dir, "new.jsonl")
	lines, _, err := s.copy(path)
	if err == nil {
		err = s.load(t.Context(), path, lines)
	}
	if err := errors.Join(err, s.Close(), other.Close()); err != nil {
		t.Fatal(err)
	}
	s = k.open(k.journal)
	if st := s.Stats(); st.Records != int64(len(small)) {
		t.Errorf("%+v", st)
	}
	k.has(s)
}

// What cannot be a database is refused, and left as it was.
func TestKeptDatabaseThatIsNone(t *testing.T) {
	for name, row := range map[string]struct {
		make func(k *kept) error
		says string
	}{
		"a text":   {func(k *kept) error { return os.WriteFile(k.path, []byte(`{"dear":"diary"}`), 0o600) }, "is no database: "},
		"a folder": {func(k *kept) error { return os.Mkdir(k.path, 0o700) }, "is no file"},
		"garbage": {func(k *kept) error {
			return os.WriteFile(k.path, []byte("checksumDUCK"+strings.Repeat("\x00\xff\x7f", 30_000)), 0o600)
		}, "no database that can be read"},
		"no folder": {func(k *kept) error { k.path = filepath.Join(k.path, "x", "y"); return nil }, "no database that can be read"},
		"of others": {func(k *kept) error {
			err := k.open(k.journal).Close()
			db, openErr := sql.Open("duckdb", k.path)
			if err = errors.Join(err, openErr); err != nil {
				return err
			}
			_, err = db.Exec("UPDATE desk.database SET stamp = 'older'")
			return errors.Join(err, db.Close())
		}, "another version of this one"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			k.write(small...)
			if err := row.make(k); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(k.path)
			s, err := Open(t.Context(), []string{k.journal}, Options{Database: k.path, Temp: t.TempDir()})
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("%v, want %q", err, row.says)
			}
			if after, _ := os.ReadFile(k.path); string(after) != string(before) {
				t.Error("the file was changed")
			}
		})
	}
	if _, err := Open(t.Context(), nil, Options{Database: newKept(t).path}); err == nil || !strings.Contains(err.Error(), "name the journals") {
		t.Errorf("a new database without a journal: %v", err)
	}
}

// A journal is gone on with where its segment and its place in it were left.
func TestKeptDatabaseOfAJournal(t *testing.T) {
	k := newKept(t)
	state := filepath.Join(filepath.Dir(k.journal), "state")
	journalIn(t, state, small[:9]...)
	if err := k.open(state).Close(); err != nil {
		t.Fatal(err)
	}
	journalIn(t, state, small[9:]...)
	s := k.open(state)
	if st := s.Stats(); st.Records != int64(len(small)) || len(st.Replaced) != 0 {
		t.Errorf("%+v, want %d records", st, len(small))
	}
	k.has(s)
	// Another journal in its place, whose segments have the same numbers.
	if err := os.RemoveAll(state); err != nil {
		t.Fatal(err)
	}
	journalIn(t, state, small...)
	s = k.open(state)
	if st := s.Stats(); len(st.Replaced) != 1 {
		t.Errorf("%+v", st)
	}
	k.has(s)
}

// journalIn appends to a journal.
func journalIn(t *testing.T, dir string, lines ...string) {
	t.Helper()
	j, err := journal.Open(filepath.Join(dir, "journal"), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if err := j.Append([]byte(l + "\n")); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}
