package report

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"

	"github.com/tallyman-ci/tallyman/journal"
)

// Mark is how far a journal or a file was read, for a process that comes later.
type Mark struct {
	Path string // absolute, without symbolic links
	At   journal.Position
	// Head is the SHA-256 of how the file that At lies in begins: another file can have
	// come in its place.
	Head string
}

// maxHead is how much of a file's beginning tells it from others, in bytes: the header
// of a segment, or the first record, both with an id of their own.
const maxHead = 1024

// MarkOf says how far s was read. It is false for what cannot be read on, such as
// standard input, and where nothing was read.
func MarkOf(s Source) (Mark, bool) {
	j, ok := s.(*journalSource)
	if !ok {
		return Mark{}, false
	}
	m := Mark{Path: resolved(j.name), At: j.r.Position()}
	if m.At.Offset == 0 {
		return Mark{}, false
	}
	var err error
	if m.Head, err = beginning(m); err != nil {
		return Mark{}, false // the segment is gone already
	}
	return m, true
}

// Resume goes on reading s at m, which MarkOf gave for the same path. It is false, and s
// is read from its beginning, where another file stands there now.
func Resume(s Source, m Mark) bool {
	j, ok := s.(*journalSource)
	if !ok {
		return false
	}
	now, err := beginning(m)
	// A segment that is gone made room for later ones: the reader knows what to do.
	if err == nil && now != m.Head || err != nil && !os.IsNotExist(err) {
		return false
	}
	return j.r.Seek(m.At) == nil
}

// PathOf is the path of s in its Mark, "" for what has none.
func PathOf(s Source) string {
	if j, ok := s.(*journalSource); ok {
		return resolved(j.name)
	}
	return ""
}

func resolved(path string) string {
	if p, err := filepath.Abs(path); err == nil {
		path = p
	}
	if p, err := filepath.EvalSymlinks(path); err == nil {
		path = p
	}
	return path
}

// beginning is the hash of how the file begins that m lies in. A file that is shorter than
// what was read of it is another one.
func beginning(m Mark) (string, error) {
	path := m.Path
	if isDir(path) {
		path = filepath.Join(path, m.At.File())
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	if st.Size() < m.At.Offset {
		return "", nil
	}
	h := sha256.New()
	if _, err := io.CopyN(h, f, min(m.At.Offset, maxHead)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
