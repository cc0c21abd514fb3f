package hook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxContexts    = 50                  // contexts kept
	maxContextAge  = 30 * 24 * time.Hour // and how long
	maxContextSize = 512 << 10           // of a file: 40 values of 4 KiB, escaped
	maxContextDir  = 2000                // names looked at: others can write here too, the job among them
	tempPrefix     = ".tmp-"
)

// Store keeps sealed contexts, one file each, in Dir (mode 0700, files 0600).
//
// Files appear and change whole: each is written beside, synced and moved to its
// place. Readers need no lock. A file that is damaged or another user's is passed over
// and reported, and never keeps a job from being sealed. Jobs run as the user that
// owns the store and can forge a context; the record says so (by: sealed is as
// trustworthy as the runner's user).
//
// A context that cannot be rewritten when it ends (a full disk) is closed by
// its file's name and mtime: <key>.superseded. Neither needs space, and the next job
// does not inherit it.
type Store struct {
	Dir string
}

// Seal closes the open contexts of the same runner (as Superseded, at c.Started)
// and of runners that are gone, writes c, and removes what is too old. It returns c as
// stored: sealing the same job again returns its first context. A context that has
// ended already closes no other.
func (s Store) Seal(c Context) (Context, error) {
	c.Schema = contextVersion
	c.Started = c.Started.UTC().Round(0)
	if c.Open() {
		c.Outcome = ""
	}
	fit(&c.CI)
	c.Key = c.baseKey()
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return c, fmt.Errorf("create the directory of job contexts: %w", err)
	}
	all, err := s.List()
	if err != nil && all == nil {
		return c, err
	}
	for i := range all {
		if all[i].sameJob(&c) {
			return all[i], nil
		}
	}
	// The old ones first: should the new one fail, no record may go to them.
	var superseded error
	if c.Open() {
		_, superseded = s.supersede(all, &c)
	}
	sealed, err := s.create(c)
	if err == nil {
		s.prune(all, c.Started)
	}
	return sealed, errors.Join(err, superseded)
}

// Supersede closes the open contexts of the runner that next names, and those whose
// runner is gone, without opening a new one. It returns those it closed.
func (s Store) Supersede(next Context) (Contexts, error) {
	all, err := s.List()
	if all == nil {
		return nil, err
	}
	return s.supersede(all, &next)
}

func (s Store) supersede(all Contexts, next *Context) (closed Contexts, err error) {
	var errs []error
	for i := range all {
		c := &all[i]
		if !c.Open() || c.runnerName() != next.runnerName() && !c.RunnerGone() {
			continue
		}
		if err := s.end(c, Superseded, next.Started); err != nil {
			errs = append(errs, err)
			continue
		}
		closed = append(closed, *c)
	}
	return closed, errors.Join(errs...)
}

// create writes c under a key that no file has. link(2) never replaces a file, so
// that of two hooks at the same moment one wins and the other finds its context.
func (s Store) create(c Context) (Context, error) {
	base := c.baseKey()
	for n := 1; n <= maxContexts+1; n++ {
		c.Key = base
		if n > 1 {
			c.Key = base + "-" + strconv.Itoa(n)
		}
		if s.closedByName(c.Key) {
			continue
		}
		temp, err := s.writeTemp(&c)
		if err != nil {
			return c, fmt.Errorf("seal the job context: %w", err)
		}
		err = os.Link(temp, s.path(c.Key))
		if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EPERM) {
			err = renameNew(temp, s.path(c.Key)) // a file system without hard links
		}
		_ = os.Remove(temp) // prune removes what stays
		if err == nil {
			return c, s.syncDir()
		}
		if !errors.Is(err, fs.ErrExist) {
			return c, fmt.Errorf("seal the job context: %w", err)
		}
		if there, err := s.read(filepath.Base(s.path(c.Key)), s.owner()); err == nil && there.sameJob(&c) {
			return there, nil
		}
	}
	return c, fmt.Errorf("seal the job context: %d files named %s in %s", maxContexts, base, s.Dir)
}

// renameNew moves a file to a name that no file has. Without link(2) there is a
// moment between look and move; two hooks of one job would write the same then.
func renameNew(from, to string) error {
	if _, err := os.Lstat(to); err == nil {
		return fs.ErrExist
	}
	return os.Rename(from, to)
}

// closedByName is true when the context was closed by renaming its file.
func (s Store) closedByName(key string) bool {
	for _, outcome := range []string{Completed, Superseded, Abandoned, Shutdown} {
		if _, err := os.Lstat(filepath.Join(s.Dir, key+"."+outcome)); err == nil {
			return true
		}
	}
	return false
}

// End closes the context with this key. A context that was closed already stays as
// it is. It returns fs.ErrNotExist when there is none.
func (s Store) End(key, outcome string, at time.Time) error {
	if !validKey(key) {
		return fmt.Errorf("end job context %q: %w", key, fs.ErrNotExist)
	}
	if s.closedByName(key) {
		return nil
	}
	c, err := s.read(key+".json", s.owner())
	if err != nil {
		return fmt.Errorf("end job context: %w", err)
	}
	return s.end(&c, outcome, at)
}

// note keeps the problems of a context that is still open.
func (s Store) note(c Context) error {
	kept, err := s.read(c.Key+".json", s.owner())
	if err != nil || !kept.Open() {
		return err
	}
	kept.Problems = c.Problems
	temp, err := s.writeTemp(&kept)
	if err == nil {
		if err = os.Rename(temp, s.path(c.Key)); err != nil {
			_ = os.Remove(temp)
		}
	}
	if err != nil {
		return fmt.Errorf("note problems in job context %s: %w", c.Key, err)
	}
	return nil
}

func (s Store) end(c *Context, outcome string, at time.Time) error {
	if !c.Open() {
		return nil
	}
	if !slices.Contains([]string{Completed, Superseded, Abandoned, Shutdown}, outcome) {
		return fmt.Errorf("end job context %s: %q is no outcome", c.Key, outcome)
	}
	if at.Before(c.Started) { // the clock was set back
		at = c.Started
	}
	c.Ended, c.Outcome = at.UTC().Round(0), outcome
	temp, err := s.writeTemp(c)
	if err == nil {
		if err = os.Rename(temp, s.path(c.Key)); err == nil {
			return s.syncDir()
		}
		_ = os.Remove(temp)
	}
	if os.Chtimes(s.path(c.Key), at, at) == nil &&
		os.Rename(s.path(c.Key), filepath.Join(s.Dir, c.Key+"."+outcome)) == nil {
		return nil
	}
	return fmt.Errorf("end job context %s: %w", c.Key, err)
}

// Active returns the newest context that was not closed, or nil when there is none.
// The error tells of files passed over; the answer is good all the same.
func (s Store) Active() (*Context, error) {
	all, err := s.List()
	return all.Active(), err
}

// Find is List and Contexts.Find in one; who looks up many records keeps the list.
func (s Store) Find(trackingID string, t time.Time) (*Context, Match, error) {
	all, err := s.List()
	c, match := all.Find(trackingID, t)
	return c, match, err
}

// List returns all contexts, newest first. The error tells of files passed over; the
// list is good all the same, and nil only when the directory could not be read. No
// directory yet is an empty list.
func (s Store) List() (Contexts, error) {
	names, err := s.names()
	if errors.Is(err, fs.ErrNotExist) {
		return Contexts{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list job contexts: %w", err)
	}
	owner := s.owner()
	all, errs := Contexts{}, []error(nil)
	for _, name := range names {
		if strings.HasPrefix(name, ".") {
			continue
		}
		c, err := s.read(name, owner)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed or pruned by somebody else meanwhile
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b Context) int {
		if d := b.Started.Compare(a.Started); d != 0 {
			return d
		}
		return strings.Compare(b.Key, a.Key)
	})
	if len(errs) > 5 {
		errs = append(errs[:5], fmt.Errorf("and %d more files passed over", len(errs)-5))
	}
	return all, errors.Join(errs...)
}

func (s Store) names() ([]string, error) {
	// A FIFO in its place would keep a plain open for ever.
	d, err := os.OpenFile(s.Dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(maxContextDir)
	if err == io.EOF {
		err = nil
	}
	return names, err
}

// read reads one context file. Its name gives the key, and the outcome where the
// context was closed by renaming.
func (s Store) read(name string, owner uint32) (Context, error) {
	key, ext, _ := strings.Cut(name, ".")
	if !validKey(key) {
		return Context{}, fmt.Errorf("job context %q: not a name of ours", name)
	}
	f, fi, err := openRegular(filepath.Join(s.Dir, name))
	if err != nil {
		return Context{}, fmt.Errorf("job context %s: %w", name, err)
	}
	defer f.Close()
	st := fi.Sys().(*syscall.Stat_t)
	if st.Uid != owner && st.Uid != 0 || fi.Mode().Perm()&0o022 != 0 {
		return Context{}, fmt.Errorf("job context %s: owned by uid %d with mode %v, passed over", name, st.Uid, fi.Mode().Perm())
	}
	data, err := io.ReadAll(io.LimitReader(f, maxContextSize+1))
	if err != nil {
		return Context{}, fmt.Errorf("job context %s: %w", name, err)
	}
	c, err := parseContext(data)
	if err != nil {
		return Context{}, fmt.Errorf("job context %s: %w", name, err)
	}
	if c.Key != key {
		return Context{}, fmt.Errorf("job context %s: holds the context %q", name, c.Key)
	}
	switch ext {
	case "json":
	case Completed, Superseded, Abandoned, Shutdown:
		if c.Open() {
			c.Outcome, c.Ended = ext, fi.ModTime().UTC()
		}
	default:
		return Context{}, fmt.Errorf("job context %q: not a name of ours", name)
	}
	return c, nil
}

// parseContext reads what a context file holds. Whoever wrote it, the texts of the
// result are clean.
func parseContext(data []byte) (Context, error) {
	if len(data) > maxContextSize {
		return Context{}, fmt.Errorf("more than %d bytes", maxContextSize)
	}
	var c Context
	if err := json.Unmarshal(data, &c); err != nil {
		return Context{}, fmt.Errorf("damaged: %w", err)
	}
	if c.Schema < 1 || !validKey(c.Key) || c.Started.IsZero() {
		return Context{}, errors.New("damaged: no version, key or start")
	}
	if c.CI.Runner != nil && len(c.CI.Runner.Labels) > maxLabels {
		c.CI.Runner.Labels = c.CI.Runner.Labels[:maxLabels]
	}
	eachText(&c.CI, func(s *string) { *s = clean(*s) })
	fit(&c.CI)
	if len(c.Problems) > maxProblems {
		c.Problems = c.Problems[:maxProblems]
	}
	for i := range c.Problems {
		c.Problems[i] = clean(c.Problems[i])
	}
	for _, s := range []*string{
		&c.Host.Name, &c.Host.Pod, &c.Host.Namespace, &c.Host.Node, &c.Host.BootID, &c.Workspace, &c.Outcome, &c.Version,
	} {
		*s = clean(*s)
	}
	return c, nil
}

// writeTemp writes c to a synced file of its own beside the others.
func (s Store) writeTemp(c *Context) (name string, err error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(c); err != nil {
		return "", fmt.Errorf("encode: %w", err)
	}
	name = filepath.Join(s.Dir, fmt.Sprintf("%s%d-%x", tempPrefix, os.Getpid(), rand.Uint64()))
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.Write(b.Bytes())
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = os.Remove(name)
		return "", err
	}
	return name, nil
}

// syncDir makes a rename durable.
func (s Store) syncDir() error {
	d, err := os.Open(s.Dir)
	if err != nil {
		return fmt.Errorf("sync the directory of job contexts: %w", err)
	}
	defer d.Close()
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		return nil // file systems that know no such thing
	}
	if err != nil {
		return fmt.Errorf("sync the directory of job contexts: %w", err)
	}
	return nil
}

// prune removes closed contexts beyond the newest maxContexts, everything older
// than maxContextAge, and temporary files of writers that died. What cannot be
// removed is tried again with the next job.
func (s Store) prune(all Contexts, now time.Time) {
	keep := make(map[string]bool, len(all))
	for i := range all {
		c := &all[i]
		last := c.Started
		if c.Ended.After(last) {
			last = c.Ended
		}
		fresh := now.Sub(last) < maxContextAge
		keep[c.Key] = fresh && (c.Open() || i < maxContexts-1) // the one just sealed is not in all
	}
	names, err := s.names()
	if err != nil {
		return
	}
	for _, name := range names {
		path := filepath.Join(s.Dir, name)
		key, _, _ := strings.Cut(name, ".")
		if kept, listed := keep[key]; listed {
			if !kept {
				_ = os.Remove(path)
			}
			continue
		}
		limit := maxContextAge // damaged or foreign: somebody may want to look at it
		if strings.HasPrefix(name, tempPrefix) {
			limit = time.Hour
		}
		if fi, err := os.Lstat(path); err == nil && fi.Mode().IsRegular() && now.Sub(fi.ModTime()) > limit {
			_ = os.Remove(path)
		}
	}
}

func (s Store) path(key string) string { return filepath.Join(s.Dir, key+".json") }

// owner is the user whose files count beside root's: the directory's. A report that
// root reads counts the files of the runner's user, too.
func (s Store) owner() uint32 {
	if fi, err := os.Stat(s.Dir); err == nil {
		return fi.Sys().(*syscall.Stat_t).Uid
	}
	return uint32(os.Geteuid())
}

// validKey is true for what baseKey makes, and false for anything that is not a
// plain file name.
func validKey(key string) bool {
	if key == "" || len(key) > 100 {
		return false
	}
	for i := range len(key) {
		c := key[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// openRegular opens a regular file for reading: no link, and no FIFO or device that
// would block the reader.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, fi, nil
}

// readRegular reads up to limit bytes of a regular file.
func readRegular(path string, limit int64) ([]byte, error) {
	f, _, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
