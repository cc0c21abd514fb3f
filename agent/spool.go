package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
)

const (
	// spoolEvery is how often the append files are looked at. They are the way of
	// records that the socket did not take, so there is no hurry.
	spoolEvery = 500 * time.Millisecond
	// spoolIdle is how long a file must not have grown before it is put away.
	spoolIdle = 2 * time.Second
	// spoolGrace is how long a file that was put away is still read: a shim that was
	// stopped between opening it and writing to it may still write.
	spoolGrace = 10 * time.Second
	// spoolBatch is how many records are journalled at once, and readChunk how much is
	// read at once.
	spoolBatch = 256
	readChunk  = 256 << 10
)

// spool takes the records from the shim's append files, one file for each uid, and
// the shim's counts of records that it could not write anywhere.
//
// A file that was read to its end and rests is renamed to *.done, read for a while
// longer, and removed. Where reading stopped is kept in the state folder, so that an
// agent that is killed goes on there; what it read twice has the same ids.
type spool struct {
	a         *Agent
	dir       string
	statePath string

	mu     sync.Mutex
	ctx    context.Context       // of run, for the commands that are watched
	files  map[string]*spoolFile // by name
	state  spoolState
	warned map[string]bool

	watching sync.WaitGroup // commands whose end is waited for; none is added after ctx ended
}

// spoolState is what a next agent needs to know.
type spoolState struct {
	Read map[string]spoolPosition `json:"read"`
	Lost map[string]int64         `json:"lost"` // bytes of *.lost files that were told
}

// spoolPosition is a place in a file. Inode numbers are used again at once by some
// file systems; the first bytes of the file, which hold its first record's id, tell
// whether it is the same.
type spoolPosition struct {
	Inode  uint64 `json:"inode"`
	Head   string `json:"head"`
	Offset int64  `json:"offset"`
}

const headLength = len(record.Marker) + 36

type spoolFile struct {
	f     *os.File
	pos   spoolPosition
	grown time.Time // when there was something new
	done  bool      // renamed
}

func openSpool(a *Agent) *spool {
	s := &spool{
		a: a, dir: a.o.Config.Spool(), statePath: filepath.Join(a.o.Config.StateDir, "spool.json"),
		files: map[string]*spoolFile{}, warned: map[string]bool{},
		state: spoolState{Read: map[string]spoolPosition{}, Lost: map[string]int64{}},
	}
	if b, err := os.ReadFile(s.statePath); err == nil {
		// A damaged file costs doubles, which have the same ids.
		var st spoolState
		if json.Unmarshal(b, &st) == nil && st.Read != nil && st.Lost != nil {
			s.state = st
		}
	}
	return s
}

func (s *spool) run(ctx context.Context) {
	s.mu.Lock()
	s.ctx = ctx
	s.mu.Unlock()
	t := time.NewTicker(spoolEvery)
	defer t.Stop()
	for {
		s.scan()
		select {
		case <-ctx.Done():
			s.scan()
			s.watching.Wait()
			return
		case <-t.C:
		}
	}
}

func (s *spool) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		f.f.Close()
	}
	return nil
}

// scan takes what is new in all files.
func (s *spool) scan() {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.takeKernelCounters()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		s.warn(s.dir, err)
		if changed {
			s.save()
		}
		return
	}
	there := map[string]bool{}
	for _, e := range entries {
		name := e.Name()
		there[name] = true
		switch {
		case strings.HasSuffix(name, ".lost"):
			changed = s.takeLost(name) || changed
		case strings.HasSuffix(name, ".jsonl") || strings.HasSuffix(name, ".done"):
			changed = s.takeFile(name) || changed
		}
	}
	for name := range s.state.Read {
		if !there[name] {
			delete(s.state.Read, name)
			changed = true
		}
	}
	if changed {
		s.save()
	}
}

// takeFile reads what is new in one file and puts it away when it rests.
func (s *spool) takeFile(name string) (changed bool) {
	path := filepath.Join(s.dir, name)
	file := s.files[name]
	if file == nil {
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		if err != nil {
			if !s.warned[path] && errors.Is(err, os.ErrPermission) {
				// The file of a uid that is neither the agent's nor root's: only root
				// can read it.
				s.a.intake.loss(record.Loss{Cause: "unreadable_file", Count: -1, Source: "spool", To: s.a.now(), Detail: name + " belongs to another user; run the agent as root to read it"})
			}
			s.warn(path, err)
			return false
		}
		file = &spoolFile{f: f, grown: time.Now(), done: strings.HasSuffix(name, ".done")}
		s.files[name] = file
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(file.f.Fd()), &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		s.warn(path, errors.New("not a regular file"))
		s.drop(name)
		return false
	}
	if file.pos.Inode == 0 && st.Size > 0 {
		file.pos = spoolPosition{Inode: st.Ino, Head: s.head(file.f)}
		if old := s.state.Read[name]; old.Inode == st.Ino && old.Head == file.pos.Head && old.Offset <= st.Size {
			file.pos.Offset = old.Offset
		}
	}
	if file.pos.Offset > 0 && (st.Size < file.pos.Offset || !strings.HasPrefix(s.head(file.f), file.pos.Head)) {
		// Cut, or cut and grown again beyond the place of reading: no shim does that.
		s.a.intake.loss(record.Loss{Cause: "truncated_file", Count: -1, Source: "spool", To: s.a.now(), Detail: name + " was cut by someone; what was not read of it before is missing"})
		file.pos = spoolPosition{Inode: st.Ino, Head: s.head(file.f)}
	}
	before := file.pos.Offset
	if err := s.read(name, file); err != nil {
		return file.pos.Offset != before // the journal has no room; the file keeps the rest
	}
	now := time.Now()
	if file.pos.Offset != before {
		file.grown = now
	}
	s.state.Read[name] = file.pos
	switch {
	case file.done && now.Sub(file.grown) > spoolGrace:
		if file.pos.Offset < st.Size {
			s.a.intake.loss(record.Loss{Cause: "torn_line", Count: 1, Source: "spool", To: s.a.now(), Detail: "the end of " + name})
		}
		if err := os.Remove(path); err != nil {
			s.warn(path, err)
			break
		}
		s.drop(name)
	case !file.done && file.pos.Offset > 0 && now.Sub(file.grown) > spoolIdle:
		done := fmt.Sprintf("%s.%d.done", name, now.UnixNano())
		if err := os.Rename(path, filepath.Join(s.dir, done)); err != nil {
			s.warn(path, err)
			break
		}
		file.done, file.grown = true, now
		s.files[done] = file
		s.state.Read[done] = file.pos
		delete(s.files, name)
		delete(s.state.Read, name)
	}
	return true
}

func (s *spool) head(f *os.File) string {
	b := make([]byte, headLength)
	n, _ := f.ReadAt(b, 0)
	return strings.ToValidUTF8(string(b[:n]), "?")
}

func (s *spool) drop(name string) {
	s.files[name].f.Close()
	delete(s.files, name)
	delete(s.state.Read, name)
}

// read takes the whole lines after the file's position. It returns an error where
// the journal did not take them; the position is then before them.
func (s *spool) read(name string, file *spoolFile) error {
	buf := make([]byte, readChunk)
	for {
		n, err := file.f.ReadAt(buf, file.pos.Offset)
		if n == 0 || err != nil && err != io.EOF {
			return nil
		}
		end := bytes.LastIndexByte(buf[:n], '\n') + 1
		if end == 0 {
			if n < len(buf) {
				return nil // half a line; the rest may come
			}
			// No shim writes lines this long.
			s.a.intake.loss(record.Loss{Cause: "torn_line", Count: 1, Source: "spool", To: s.a.now(), Detail: "an endless line in " + name})
			file.pos.Offset += int64(n)
			continue
		}
		var batch []*record.Record
		taken := 0
		flush := func(upto int) error {
			if len(batch) > 0 {
				if err := s.a.intake.write(batch); err != nil {
					return err
				}
				s.a.intake.count(func(c *Counts) { c.Spooled += int64(len(batch)) })
				for _, r := range batch {
					s.watch(r)
				}
				batch = batch[:0:0]
			}
			file.pos.Offset += int64(upto - taken)
			taken = upto
			return nil
		}
		for at := 0; at < end; {
			length := bytes.IndexByte(buf[at:end], '\n')
			if r := s.decode(name, buf[at:at+length]); r != nil {
				batch = append(batch, r)
			}
			at += length + 1
			if len(batch) == spoolBatch || at == end {
				if err := flush(at); err != nil {
					return err
				}
			}
		}
	}
}

// decode reads one line. A line with a torn record before a whole one gives the
// whole one (FAULTS: SP-03): its marker cannot occur inside a value.
func (s *spool) decode(name string, line []byte) *record.Record {
	if len(line) == 0 {
		return nil
	}
	r := new(record.Record)
	start := bytes.LastIndex(line, []byte(record.Marker))
	if start != 0 {
		s.a.intake.loss(record.Loss{Cause: "torn_line", Count: 1, Source: "spool", To: s.a.now(), Detail: "in " + name})
	}
	if start < 0 {
		return nil
	}
	if len(line)-start > journal.MaxLine || s.a.decodeInvocation(line[start:], r) != nil {
		s.a.intake.count(func(c *Counts) { c.Refused++ })
		return nil
	}
	r.Invocation.Path = "file"
	s.a.stamp(r)
	return r
}

// takeLost tells of records that shims could not write anywhere: they leave the
// letter of the cause for each (handover.Causes).
func (s *spool) takeLost(name string) (changed bool) {
	path := filepath.Join(s.dir, name)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		s.warn(path, err)
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	seen := s.state.Lost[name]
	if info.Size() < seen {
		seen = 0
	}
	if info.Size() == seen {
		return false
	}
	b := make([]byte, min(info.Size()-seen, 1<<20))
	n, _ := f.ReadAt(b, seen)
	for _, cause := range handover.Causes {
		s.shimLoss(int64(bytes.Count(b[:n], []byte{cause.Letter})), strings.TrimSuffix(name, ".lost"), cause)
	}
	s.state.Lost[name] = seen + int64(n)
	return true
}

func (s *spool) shimLoss(count int64, uid string, cause handover.Cause) {
	if count > 0 {
		s.a.intake.loss(record.Loss{
			Cause: "shim", Count: count, Source: "shim", To: s.a.now(),
			Detail: "records of uid " + uid + " were lost: " + cause.Text,
		})
	}
}

// takeKernelCounters tells of records that shims could not even count in a file: see
// handover.LossKey. They are not set back, which only their creator could do; what was
// told is remembered.
func (s *spool) takeKernelCounters() (changed bool) {
	b, err := os.ReadFile("/proc/sysvipc/sem")
	if err != nil {
		return false // a kernel without System V semaphores
	}
	there := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		var key, id, mode, n, uid, gid, creator int
		if _, err := fmt.Sscan(line, &key, &id, &mode, &n, &uid, &gid, &creator); err != nil {
			continue // the heading
		}
		// mode is printed in octal digits.
		if n != len(handover.Causes) || strconv.Itoa(mode) != strconv.FormatInt(handover.LossMode, 8) || int32(key) != handover.LossKey(s.dir, creator) {
			continue
		}
		const getAll = 13 // GETALL of semctl(2)
		var values [len(handover.Causes)]uint16
		if _, _, errno := unix.Syscall6(unix.SYS_SEMCTL, uintptr(id), 0, getAll, uintptr(unsafe.Pointer(&values)), 0, 0); errno != 0 {
			continue
		}
		for i, value := range values {
			// The boot is part of the name: after it, ids are used again.
			name := fmt.Sprintf("sem/%s/%d/%d", s.a.o.Host.BootID, id, i)
			there[name] = true
			seen := s.state.Lost[name]
			if int64(value) == seen {
				continue
			}
			if int64(value) < seen {
				seen = 0
			}
			s.shimLoss(int64(value)-seen, strconv.Itoa(creator), handover.Causes[i])
			s.state.Lost[name] = int64(value)
			changed = true
		}
	}
	for name := range s.state.Lost {
		if strings.HasPrefix(name, "sem/") && !there[name] {
			delete(s.state.Lost, name)
			changed = true
		}
	}
	return changed
}

// save keeps the positions. A write that fails costs doubles after a restart.
func (s *spool) save() {
	b, err := json.Marshal(s.state)
	if err != nil {
		return
	}
	temp := s.statePath + ".new"
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		s.warn(temp, err)
		return
	}
	if err := unix.Rename(temp, s.statePath); err != nil {
		s.warn(s.statePath, err)
	}
}

// warn says once what is wrong with a file.
func (s *spool) warn(path string, err error) {
	if !s.warned[path] {
		s.warned[path] = true
		s.a.log.Warn("cannot use a spool file", "path", path, "error", err)
	}
}
