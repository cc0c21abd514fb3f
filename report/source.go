package report

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"

	"github.com/tallyman-ci/tallyman/journal"
)

// skew is how far a record's time may lie after the time it was journaled: events
// carry the daemon's clock, which can be another machine's.
const skew = time.Hour

// OpenPaths opens journals (folders) and files of JSON Lines; "-" is stdin. Of a
// journal it passes over the segments that end before from. The function it
// returns closes what was opened.
func OpenPaths(paths []string, from time.Time, stdin io.Reader) (sources []Source, closeAll func(), err error) {
	closeAll = func() {
		for _, s := range sources {
			if c, ok := s.(io.Closer); ok {
				_ = c.Close() // only read from
			}
		}
	}
	for _, p := range paths {
		s, err := openPath(p, from, stdin)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		sources = append(sources, s)
	}
	return sources, closeAll, nil
}

func openPath(path string, from time.Time, stdin io.Reader) (Source, error) {
	if path == "-" {
		return Lines("stdin", stdin), nil
	}
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("no journal at %s: has an agent run here? (tallyman doctor tells what is wrong)", path)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open journal %s: %w (read it as the user the agent runs as, or as root)", path, fs.ErrPermission)
	case err != nil:
		return nil, fmt.Errorf("open journal: %w", err)
	}
	var at journal.Position
	if st.IsDir() {
		if inner := filepath.Join(path, "journal"); isDir(inner) { // the state folder itself was named
			path = inner
		}
		at = firstSegment(path, from)
	}
	r, err := journal.OpenReader(path, at)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("open journal %s: %w (read it as the user the agent runs as, or as root)", path, fs.ErrPermission)
	}
	if err != nil {
		return nil, fmt.Errorf("open journal %s: %w", path, err)
	}
	return &journalSource{name: path, r: r}, nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

type journalSource struct {
	name string
	r    *journal.Reader
}

func (s *journalSource) Name() string { return s.name }

func (s *journalSource) Next() ([]byte, error) {
	l, err := s.r.Next()
	return l.Data, err
}

func (s *journalSource) Close() error { return s.r.Close() }

// Torn is the number of lines that a source has passed over as damaged so far.
func Torn(s Source) int64 {
	if j, ok := s.(*journalSource); ok {
		return j.r.Stats().TornLines
	}
	return 0
}

// firstSegment is where reading must begin to see everything from a time on. A
// segment's header bears the time it was made, which is when the one before it got
// its last record. What cannot be read is not passed over.
func firstSegment(dir string, from time.Time) journal.Position {
	if from.IsZero() {
		return journal.Position{}
	}
	names, err := filepath.Glob(filepath.Join(dir, "records-*.jsonl"))
	if err != nil || len(names) < 2 {
		return journal.Position{}
	}
	sort.Strings(names) // twenty digits: the order of numbers is that of names
	edge := from.Add(-skew)
	for i := len(names) - 1; i > 0; i-- {
		number, made, ok := segmentHeader(names[i])
		if ok && !made.After(edge) {
			return journal.Position{Segment: number}
		}
	}
	return journal.Position{}
}

func segmentHeader(path string) (number uint64, made time.Time, ok bool) {
	var n uint64
	if _, err := fmt.Sscanf(filepath.Base(path), "records-%d.jsonl", &n); err != nil {
		return 0, time.Time{}, false
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, time.Time{}, false
	}
	defer f.Close()
	head := make([]byte, 1024)
	k, _ := io.ReadFull(f, head)
	first, _, whole := bytes.Cut(head[:k], []byte("\n"))
	var p parser
	var l line
	if !whole || p.parse(first, &l) != nil || string(l.kind) != "segment" || l.ts.IsZero() {
		return 0, time.Time{}, false
	}
	return n, l.ts, true
}

// maxLine is the longest line that Lines returns; the rest of a longer one is
// dropped, and the line counts as unreadable.
const maxLine = 1 << 20

// Lines is the source of the lines of r.
func Lines(name string, r io.Reader) Source {
	return &lineSource{name: name, r: bufio.NewReaderSize(r, 64<<10)}
}

type lineSource struct {
	name string
	r    *bufio.Reader
	buf  []byte
}

func (s *lineSource) Name() string { return s.name }

func (s *lineSource) Next() ([]byte, error) {
	for {
		s.buf = s.buf[:0]
		for {
			part, err := s.r.ReadSlice('\n')
			if len(s.buf)+len(part) <= maxLine {
				s.buf = append(s.buf, part...)
			}
			if err == nil || errors.Is(err, io.EOF) && len(s.buf) > 0 {
				break
			}
			if !errors.Is(err, bufio.ErrBufferFull) {
				return nil, err
			}
		}
		if line := bytes.TrimRight(s.buf, "\r\n"); len(bytes.TrimSpace(line)) > 0 {
			return line, nil
		}
	}
}
