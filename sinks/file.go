package sinks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/tallyman-ci/tallyman/journal"
)

// fileScheme is a copy of the records in a file of JSON Lines elsewhere. (The
// journal itself is one already: records.jsonl in its directory.)
func fileScheme() Scheme {
	return Scheme{
		Name: "file",
		Form: "file:///path/records.jsonl",
		Params: []Param{
			{"max_bytes", "100MiB", "size at which the file is renamed to records.jsonl.1 and begun anew"},
			{"keep", "3", "how many renamed files are kept; 0 leaves renaming to others, logrotate for one"},
			{"fsync", "false", "true makes each batch durable before it counts as delivered"},
			{"mode", "0640", "permissions of a file that is made"},
		},
		Open: openFile,
	}
}

func openFile(_ context.Context, t *Target) (Sink, error) {
	path := t.URL.Path
	if t.URL.Host != "" || t.URL.Opaque != "" || path == "" || path[len(path)-1] == '/' {
		return nil, fmt.Errorf("want the absolute path of a file behind three slashes, as in file:///var/log/tallyman/records.jsonl")
	}
	s := &fileSink{
		path:     filepath.Clean(path),
		maxBytes: t.Bytes("max_bytes", 100<<20),
		keep:     int(t.Int("keep", 3, 0, 1000)),
		fsync:    t.Bool("fsync", false),
	}
	mode, err := strconv.ParseUint(t.String("mode", "0640"), 8, 32)
	if err != nil || mode > 0o777 {
		t.fail("mode", "permissions in octal, such as 0640")
	}
	s.mode = fs.FileMode(mode)
	return s, nil
}

type fileSink struct {
	path     string
	maxBytes int64
	keep     int
	fsync    bool
	mode     fs.FileMode

	f   *journal.LineFile // nil before the first write and after an error
	enc encoder
}

func (s *fileSink) Write(ctx context.Context, batch []Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	lines := s.enc.encode(batch)
	if err := s.ready(int64(len(lines))); err != nil {
		return err
	}
	// After a part the kernel is asked once more, for the reason.
	for range 2 {
		n, err := s.f.Append(lines)
		s.enc.done += n
		if err == nil {
			break
		}
		if lines = lines[n:]; !errors.Is(err, io.ErrShortWrite) {
			return err
		}
	}
	if s.fsync {
		if err := s.f.Sync(); err != nil {
			s.enc.done = 0 // what the kernel took may be gone
			return fmt.Errorf("sync %s: %w", s.path, err)
		}
	}
	s.enc.reset()
	return nil
}

// ready opens the file, anew where logrotate or somebody else moved it, and renames
// it where it is full.
func (s *fileSink) ready(more int64) error {
	if s.f != nil {
		named, err := os.Stat(s.path)
		opened, errOpened := s.f.Stat()
		if err != nil || errOpened != nil || !os.SameFile(named, opened) {
			if err := s.close(); err != nil {
				return err
			}
		}
	}
	if err := s.open(); err != nil {
		return err
	}
	if s.keep == 0 || s.f.Size() == 0 || s.f.Size()+more <= s.maxBytes {
		return nil
	}
	if err := s.close(); err != nil {
		return err
	}
	for i := s.keep; i > 0; i-- {
		from := s.path
		if i > 1 {
			from += "." + strconv.Itoa(i-1)
		}
		if err := os.Rename(from, s.path+"."+strconv.Itoa(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the file is full: %w (make the directory writable, or set keep=0)", err)
		}
	}
	return s.open()
}

func (s *fileSink) open() (err error) {
	if s.f != nil {
		return nil
	}
	s.f, err = journal.OpenLineFile(s.path, s.mode)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (make the directory %s)", err, filepath.Dir(s.path))
	}
	return err
}

func (s *fileSink) close() error {
	if s.f == nil {
		return nil
	}
	f := s.f
	s.f = nil
	if s.fsync {
		return errors.Join(f.Sync(), f.Close())
	}
	return f.Close()
}

func (s *fileSink) Close(context.Context) error { return s.close() }

// encoder makes lines of a batch. It remembers how much of a batch went out before
// an error, so that the next attempt does not repeat it.
type encoder struct {
	buf         []byte
	first, last string
	n, done     int
}

// encode returns what is left of the batch as lines.
func (e *encoder) encode(batch []Entry) []byte {
	if len(batch) == 0 {
		return nil
	}
	first, last := batch[0].ID, batch[len(batch)-1].ID
	if e.n != len(batch) || e.first != first || e.last != last {
		e.first, e.last, e.n, e.done = first, last, len(batch), 0
	}
	e.buf = e.buf[:0]
	for _, entry := range batch {
		e.buf = append(append(e.buf, entry.Line...), '\n')
	}
	return e.buf[e.done:]
}

func (e *encoder) reset() { e.first, e.last, e.n, e.done = "", "", 0, 0 }
