package store

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
)

// TestQuestionsOfAFleet prints how long each question takes on as many records as
// TALLYMAN_DESK_RECORDS says, and how much memory was used at the most. make bench-desk runs
// it with ten million; in the usual tests it answers on a few thousand.
func TestQuestionsOfAFleet(t *testing.T) {
	n := int64(5000)
	if s := os.Getenv("TALLYMAN_DESK_RECORDS"); s != "" {
		var err error
		if n, err = strconv.ParseInt(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "records.jsonl")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	start := at("00:00:00")
	want, err := write(w, 1, n, start)
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Seek(0, 1)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	kept := Options{Database: filepath.Join(filepath.Dir(path), "kept.db")}
	began := time.Now()
	s, err := Open(t.Context(), []string{path}, kept)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("| %d records, %.1f GB of JSON | %.1f s to read and join, once |\n| --- | --- |\n", want.records, float64(size)/1e9, time.Since(began).Seconds())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	}
	more, err := write(f, 2, 1000, want.last)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	if s, err = Open(t.Context(), []string{path}, kept); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := os.Stat(kept.Database)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("| %d records more | %.1f s with the database that was kept, %.1f GB |\n", more.records, time.Since(began).Seconds(), float64(st.Size())/1e9)
	ask := func(name, sql string, params ...panels.Param) {
		began := time.Now()
		table, err := s.Query(t.Context(), sql, params...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		fmt.Printf("| %s | %.2f s, %d rows |\n", name, time.Since(began).Seconds(), len(table.Rows))
	}
	for _, v := range bq.Views() {
		switch {
		case v.Table, v.Name == "records_unique":
			ask(v.Name, "SELECT COUNT(*) FROM tallyman."+v.Name)
		default:
			ask(v.Name, "SELECT * FROM tallyman."+v.Name)
		}
	}
	filter := panels.Filter{From: start, To: start.AddDate(1, 0, 0)}
	for _, p := range append(panels.All(), panels.Trust()) {
		sql, params := panels.Parameters(p.SQL, panels.DuckDB, filter)
		ask("panel "+p.ID, sql, params...)
	}
	if got := rows(t, s, "SELECT COUNT(*) FROM tallyman.calls")[0]; got != fmt.Sprint(want.calls+more.calls) {
		t.Errorf("%s calls, want %d", got, want.calls+more.calls)
	}
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("| memory at the most | %.0f MiB |\n", float64(usage.Maxrss)/1024)
}
