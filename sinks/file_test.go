package sinks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

func openURL(t testing.TB, rawURL string) Sink {
	t.Helper()
	s, err := Open(t.Context(), rawURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func fileURL(path, query string) string {
	return (&url.URL{Scheme: "file", Path: path, RawQuery: query}).String()
}

func write(t testing.TB, s Sink, ids ...string) {
	t.Helper()
	if err := s.Write(t.Context(), entries(ids...)); err != nil {
		t.Fatal(err)
	}
}

// fileIDs are the ids of the lines of files, each of which must be whole.
func fileIDs(t testing.TB, paths ...string) []string {
	t.Helper()
	var got []string
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(data)) {
			if !strings.HasSuffix(l, "}\n") {
				t.Fatalf("half a line: %q", l)
			}
			got = append(got, idOf(t, []byte(l)))
		}
	}
	return got
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "with space.jsonl")
	s := openURL(t, fileURL(path, "fsync=true&mode=0600"))
	write(t, s, "a", "b")
	write(t, s, "c")
	write(t, s)
	equal(t, fileIDs(t, path), []string{"a", "b", "c"})
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}

	// logrotate, its create way and its copytruncate way
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	write(t, s, "d")
	equal(t, fileIDs(t, path), []string{"d"})
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	write(t, s, "e")
	equal(t, fileIDs(t, path), []string{"e"})
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write(t, s, "f")
	equal(t, fileIDs(t, path), []string{"f"})
	equal(t, fileIDs(t, path+".old"), []string{"a", "b", "c"})
}

func TestFileGoesOnBehindAHalfLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.jsonl")
	if err := os.WriteFile(path, []byte(`{"id":"torn`), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, openURL(t, fileURL(path, "")), "a")
	data, err := os.ReadFile(path)
	if err != nil || !strings.HasPrefix(string(data), "{\"id\":\"torn\n{\"id\":\"a\"") {
		t.Errorf("%q, %v", data, err)
	}
}

func TestFileRenamesWhenFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.jsonl")
	s := openURL(t, fileURL(path, "max_bytes=1000&keep=2"))
	for _, id := range numbered(0, 30) {
		write(t, s, id)
	}
	left, err := filepath.Glob(path + "*")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, left, []string{path, path + ".1", path + ".2"})
	for _, p := range left {
		if st, err := os.Stat(p); err != nil || st.Size() > 1000 {
			t.Errorf("%s has %d bytes (%v)", p, st.Size(), err)
		}
	}
	got := fileIDs(t, path+".2", path+".1", path)
	equal(t, got, numbered(30-len(got), len(got)))
	if len(got) < 6 {
		t.Errorf("only %d records are left", len(got))
	}
	big := openURL(t, fileURL(path, "max_bytes=1&keep=0"))
	write(t, big, numbered(30, 20)...) // keep=0: others rename
	equal(t, fileIDs(t, path)[len(fileIDs(t, path))-20:], numbered(30, 20))
}

func TestFileErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "missing", "x.jsonl"): "make the directory " + filepath.Join(dir, "missing"),
		fifo:                                     "not a regular file",
		dir:                                      "is a directory",
	} {
		s := openURL(t, fileURL(path, ""))
		if err := s.Write(t.Context(), entries("a")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
	// and it works as soon as that was done
	late := filepath.Join(dir, "late", "x.jsonl")
	s := openURL(t, fileURL(late, ""))
	if err := s.Write(t.Context(), entries("a")); err == nil {
		t.Fatal("written to a missing directory")
	}
	if err := os.Mkdir(filepath.Dir(late), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, s, "a")
	equal(t, fileIDs(t, late), []string{"a"})
}

// A batch that a full disk cut is completed by the next attempt, not repeated.
func TestFileOnAFullDisk(t *testing.T) {
	faults.Case(t, "SP-06")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs a small tmpfs: %v (run as root)", err))
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 40<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "x.jsonl")
	s := openURL(t, fileURL(path, ""))
	batch := entries(numbered(0, 150)...)
	for range 5 {
		if err := s.Write(t.Context(), batch); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("on the full disk: %v", err)
		}
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := s.Write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	torn := 0
	for l := range strings.Lines(string(data)) {
		if strings.HasSuffix(l, "}\n") {
			count[idOf(t, []byte(l))]++
		} else {
			torn++
		}
	}
	if len(count) != 150 || torn > 1 {
		t.Errorf("%d of 150 records, %d torn lines", len(count), torn)
	}
	for id, n := range count {
		if n != 1 {
			t.Errorf("%s is there %d times", id, n)
		}
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = r.Close(), w.Close() })
	return r, w
}

func TestStdout(t *testing.T) {
	r, w := pipe(t)
	s, err := newWriterSink(int(w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, "a", "b")
	write(t, s, "c")
	if err := errors.Join(s.Close(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil || strings.Count(string(data), "\n") != 3 {
		t.Errorf("%q, %v", data, err)
	}
}

// A reader that stops reading costs an attempt its deadline, and no record twice.
func TestStdoutWithASlowReader(t *testing.T) {
	r, w := pipe(t)
	s, err := newWriterSink(int(w.Fd())) // a blocking pipe, as in a container
	if err != nil {
		t.Fatal(err)
	}
	batch := entries(numbered(0, 2000)...) // more than a pipe holds
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Write(ctx, batch); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("nobody reads: %v", err)
	}
	read := make(chan map[string]int)
	go func() {
		got := map[string]int{}
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			if l := lines.Text(); strings.HasSuffix(l, "}") && strings.HasPrefix(l, "{") {
				got[l]++
			}
		}
		read <- got
	}()
	if err := s.Write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	got := <-read
	for _, e := range batch {
		if n := got[string(e.Line)]; n != 1 {
			t.Fatalf("%s came %d times", e.ID, n)
		}
	}
}

// The end of the agent ends a write to a reader that does not read.
func TestStdoutHeedsTheEndOfTheAgent(t *testing.T) {
	_, w := pipe(t)
	s, err := newWriterSink(int(w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	time.AfterFunc(10*time.Millisecond, cancel)
	if err := s.Write(ctx, entries(numbered(0, 2000)...)); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func writeToClosedStdout() {
	s, err := Open(context.Background(), "stdout:")
	if err != nil {
		os.Exit(3)
	}
	for range 3 {
		if err := s.Write(context.Background(), entries("a")); !errors.Is(err, unix.EPIPE) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(4)
		}
	}
	os.Exit(0)
}

// A log collector that goes away must not end the agent with SIGPIPE.
func TestStdoutClosedByItsReader(t *testing.T) {
	r, w := pipe(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "SINKS_TEST_STDOUT=1")
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Run(); err != nil {
		t.Fatalf("the process ended: %v", err)
	}
}
