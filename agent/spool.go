package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/internal/statefile"
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
	// maxNames is how many names of the folder are looked at, and maxOpen how many files
	// are open at once: every user can make files here.
	maxNames = 4096
	maxOpen  = 64
	// spoolAtOnce is how much is read of one file before it is another's turn, and
	// spoolOver how much longer than spool_max_bytes a file may be: each of many shims
	// may write one record after it saw a file that was not full.
	spoolAtOnce = 8 << 20
	spoolOver   = 32 << 20
	// maxWarned bounds what is remembered of warnings.
	maxWarned = 1024
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
	losses []record.Loss // of this scan

	gone     gone
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

// maxSpoolState bounds what is read of the file with these.
const maxSpoolState = 16 << 20

const headLength = len(record.Marker) + 36

type spoolFile struct {
	f     *os.File
	pos   spoolPosition
	grown time.Time // when there was something new
	done  bool      // renamed

	endless bool      // in a line that was told to be too long
	uid     int       // of the file's owner
	born    time.Time // when the file was made; zero where the file system does not say
	read    time.Time // when it was last read to its end; zero before
	more    bool      // the last look did not reach the end
}

// witness is what is known of who wrote the lines from here on: the file's owner, and
// a time that the writer cannot choose. What lies behind the last look was written
// after it, and nothing in a file is older than the file.
func (f *spoolFile) witness(now time.Time) witness {
	w := witness{uid: f.uid, earliest: f.born, latest: now}
	if !f.read.IsZero() {
		w.earliest = now.Add(-now.Sub(f.read))
	}
	return w
}

func openSpool(a *Agent) *spool {
	s := &spool{
		a: a, dir: a.o.Config.Spool(), statePath: filepath.Join(a.o.Config.StateDir, "spool.json"),
		files: map[string]*spoolFile{}, warned: map[string]bool{},
		state: spoolState{Read: map[string]spoolPosition{}, Lost: map[string]int64{}},
	}
	if b, err := statefile.Read(s.statePath, maxSpoolState); err == nil {
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
	s.resume(ctx)
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
	names, err := s.names()
	if err != nil {
		s.warn(s.dir, err)
		if changed {
			s.save()
		}
		return
	}
	there := map[string]bool{}
	// What shims write to comes first: anybody can make any number of the others.
	slices.SortStableFunc(names, func(a, b string) int {
		return cmp.Compare(strings.Count(a, "."), strings.Count(b, "."))
	})
	for _, name := range names {
		there[name] = true
		switch _, kind := spoolName(name); kind {
		case ".lost":
			changed = s.takeLost(name) || changed
		case ".jsonl", ".done":
			changed = s.takeFile(name) || changed
		}
	}
	for name, file := range s.files {
		// Renamed or removed by its owner: a shim that had it open may still write.
		if !there[name] && len(names) < maxNames {
			before := file.pos.Offset
			if s.read(name, file) == nil && file.pos.Offset == before && time.Since(file.grown) > spoolGrace {
				s.drop(name)
			} else if file.pos.Offset != before {
				file.grown = time.Now()
			}
		}
	}
	for name := range s.state.Read {
		if !there[name] && s.files[name] == nil {
			delete(s.state.Read, name)
			changed = true
		}
	}
	s.tell()
	s.gone.tell(s.a, time.Now().Add(-spoolGrace))
	if changed {
		s.save()
	}
}

// lose counts what is missing until the end of the scan, so that a file full of noise
// becomes one loss and not one for each line.
func (s *spool) lose(cause, detail string, count int64) {
	for i := range s.losses {
		if l := &s.losses[i]; l.Cause == cause && l.Detail == detail {
			if l.Count >= 0 && count >= 0 {
				l.Count += count
			}
			return
		}
	}
	s.losses = append(s.losses, record.Loss{Cause: cause, Detail: detail, Count: count, Source: "spool"})
}

func (s *spool) tell() {
	now := s.a.now()
	for _, l := range s.losses {
		l.To = now
		s.a.intake.loss(l)
	}
	s.losses = nil
}

// names are the names in the folder. Of a folder that somebody filled with names only
// some are looked at, but those of root and of the agent's own user always.
func (s *spool) names() ([]string, error) {
	// Not through a link, as the shim: whoever put it there chooses what is read and
	// removed. A FIFO would keep a plain open for ever.
	d, err := os.OpenFile(s.dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(maxNames)
	if err == io.EOF {
		err = nil
	}
	if len(names) == maxNames {
		s.warn(s.dir, fmt.Errorf("more than %d names: some files are not read", maxNames))
		for _, uid := range []int{0, os.Geteuid()} {
			if name := strconv.Itoa(uid) + ".jsonl"; !slices.Contains(names, name) {
				if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
					names = append(names, name)
				}
			}
		}
	}
	return names, err
}

// spoolName takes a name of the shim apart: <uid>.jsonl, <uid>.lost, and
// <uid>.jsonl.<number>.done for one that was put away. kind is empty for all others.
func spoolName(name string) (uid int, kind string) {
	number, rest, _ := strings.Cut(name, ".")
	uid, err := strconv.Atoi(number)
	if err != nil || uid < 0 || strconv.Itoa(uid) != number {
		return 0, ""
	}
	if rest == "jsonl" || rest == "lost" {
		return uid, "." + rest
	}
	if middle, ok := strings.CutSuffix(rest, ".done"); ok && strings.HasPrefix(middle, "jsonl.") {
		return uid, ".done"
	}
	return 0, ""
}

// ours says whether a file can be what a shim made: regular, of one name, and of the
// user that its own name says. Root's belong to the folder's owner, because the agent
// must be able to read them. Whoever could link another's file here would have its
// lines read as records.
func (s *spool) ours(name string, st *syscall.Stat_t) error {
	uid, _ := spoolName(name)
	switch {
	case st.Mode&syscall.S_IFMT != syscall.S_IFREG:
		return errors.New("not a regular file")
	case st.Nlink > 1:
		return errors.New("it has a second name")
	case int(st.Uid) == uid:
		return nil
	case uid == 0:
		var folder syscall.Stat_t
		if syscall.Stat(s.dir, &folder) == nil && folder.Uid == st.Uid {
			return nil
		}
	}
	return fmt.Errorf("it belongs to uid %d", st.Uid)
}

// takeFile reads what is new in one file and puts it away when it rests.
func (s *spool) takeFile(name string) (changed bool) {
	path := filepath.Join(s.dir, name)
	file := s.files[name]
	if file == nil {
		if file = s.openFile(name); file == nil {
			return false
		}
		s.files[name] = file
	}
	var st syscall.Stat_t
	err := syscall.Fstat(int(file.f.Fd()), &st)
	if err == nil && st.Nlink == 0 {
		// Removed, and made again: that one is next, and this one is read to its end.
		s.files[fmt.Sprintf("%s (removed, inode %d)", name, st.Ino)] = file
		delete(s.files, name)
		return false
	}
	if err == nil {
		err = s.ours(name, &st)
	}
	if err != nil {
		s.warn(path, err)
		s.drop(name)
		return false
	}
	s.place(name, file, &st)
	before := file.pos.Offset
	if file.pos.Offset > s.a.o.Config.SpoolMaxBytes+spoolOver {
		// No shim goes on for so long. Who does must not keep the others waiting.
		s.lose("unreadable_file", name+" is longer than any shim makes it", -1)
		if err := os.Remove(path); err != nil {
			s.warn(path, err)
		}
		s.drop(name)
		return true
	}
	now := time.Now() // what is written from here on is not in this look
	if err := s.read(name, file); err != nil {
		return file.pos.Offset != before // the journal has no room; the file keeps the rest
	}
	if file.more {
		file.more = false
	} else {
		file.read = now
	}
	if file.pos.Offset != before {
		file.grown = now
	}
	s.state.Read[name] = file.pos
	s.putAway(name, file, st.Size, now)
	return true
}

// openFile opens one file. It returns nil where that is not possible, or not now.
func (s *spool) openFile(name string) *spoolFile {
	done := strings.HasSuffix(name, ".done")
	if n := len(s.files); n >= maxOpen || n >= maxOpen/2 && done {
		return nil // at the next scan, when others are done
	}
	path := filepath.Join(s.dir, name)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		var st syscall.Stat_t
		if !s.warned[path] && errors.Is(err, os.ErrPermission) && syscall.Lstat(path, &st) == nil && s.ours(name, &st) == nil {
			// The file of a uid that is neither the agent's nor root's: only root
			// can read it.
			s.lose("unreadable_file", name+" belongs to another user; run the agent as root to read it", -1)
		}
		s.warn(path, err)
		return nil
	}
	return &spoolFile{f: f, grown: time.Now(), done: done}
}

// place finds out whose an open file is and where to go on reading it.
func (s *spool) place(name string, file *spoolFile, st *syscall.Stat_t) {
	if file.born.IsZero() && file.read.IsZero() {
		file.uid = int(st.Uid)
		if uid, _ := spoolName(name); uid == 0 {
			file.uid = 0
		}
		var sx unix.Statx_t
		if unix.Statx(int(file.f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &sx) == nil && sx.Mask&unix.STATX_BTIME != 0 {
			file.born = time.Unix(sx.Btime.Sec, int64(sx.Btime.Nsec))
		}
	}
	if file.pos.Inode == 0 && st.Size > 0 {
		file.pos = spoolPosition{Inode: st.Ino, Head: s.head(file.f)}
		if old := s.state.Read[name]; old.Inode == st.Ino && old.Head == file.pos.Head && old.Offset <= st.Size {
			file.pos.Offset = old.Offset
		}
	}
	if file.pos.Offset > 0 && (st.Size < file.pos.Offset || !strings.HasPrefix(s.head(file.f), file.pos.Head)) {
		// Cut, or cut and grown again beyond the place of reading: no shim does that.
		s.lose("truncated_file", name+" was cut by someone; what was not read of it before is missing", -1)
		file.pos = spoolPosition{Inode: st.Ino, Head: s.head(file.f)}
	}
}

// putAway renames a file that rests, so that no shim opens it any more, and removes
// a renamed one to which those that had it open have not written for long. size is
// what the file had before it was read.
func (s *spool) putAway(name string, file *spoolFile, size int64, now time.Time) {
	path := filepath.Join(s.dir, name)
	switch {
	case file.done && now.Sub(file.grown) > spoolGrace:
		if file.pos.Offset < size {
			s.lose("torn_line", "the end of "+name, 1)
		}
		if err := os.Remove(path); err != nil {
			s.warn(path, err)
			return
		}
		s.drop(name)
	case !file.done && file.pos.Offset > 0 && now.Sub(file.grown) > spoolIdle:
		done := fmt.Sprintf("%s.%d.done", name, now.UnixNano())
		if err := os.Rename(path, filepath.Join(s.dir, done)); err != nil {
			s.warn(path, err)
			return
		}
		file.done, file.grown = true, now
		s.files[done] = file
		s.state.Read[done] = file.pos
		delete(s.files, name)
		delete(s.state.Read, name)
	}
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
	for stop := file.pos.Offset + spoolAtOnce; file.pos.Offset < stop; {
		n, err := file.f.ReadAt(buf, file.pos.Offset)
		if n == 0 || err != nil && err != io.EOF {
			return nil
		}
		end := bytes.LastIndexByte(buf[:n], '\n') + 1
		if end > 0 {
			if err := s.takeLines(name, file, buf[:end]); err != nil {
				return err
			}
			continue
		}
		if n < len(buf) {
			return nil // half a line; the rest may come
		}
		s.skipEndless(name, file, n)
	}
	file.more = true
	return nil
}

// skipEndless passes over n bytes without the end of a line, and the hole of the file
// behind them. No shim writes lines this long.
func (s *spool) skipEndless(name string, file *spoolFile, n int) {
	if !file.endless {
		s.lose("torn_line", "an endless line in "+name, 1)
		file.endless = true
	}
	file.pos.Offset += int64(n)
	// A file can say that it has a terabyte of zeros (lseek(2), SEEK_DATA).
	if data, err := unix.Seek(int(file.f.Fd()), file.pos.Offset, unix.SEEK_DATA); err == nil {
		file.pos.Offset = data
	} else if st, errStat := file.f.Stat(); err == unix.ENXIO && errStat == nil {
		file.pos.Offset = st.Size()
	}
}

// takeLines brings whole lines, which stand at the file's position, into the journal.
// The position moves behind those that it has.
func (s *spool) takeLines(name string, file *spoolFile, lines []byte) error {
	var batch []arrival
	taken := 0
	w := file.witness(time.Now())
	for at := 0; at < len(lines); {
		length := bytes.IndexByte(lines[at:], '\n')
		line := lines[at : at+length]
		if file.endless { // its end, and perhaps a record behind it
			line = line[max(bytes.LastIndex(line, []byte(record.Marker)), 0):]
			if !bytes.HasPrefix(line, []byte(record.Marker)) {
				line = nil
			}
			file.endless = false
		}
		if r := s.decode(name, line, file); r != nil {
			share := s.a.stamp(r, w)
			batch = append(batch, arrival{r: r, share: share, limiter: s.a.intake.calls, size: length, from: sender{pid: int32(r.Invocation.PID), byFile: true}})
		}
		at += length + 1
		if len(batch) == spoolBatch || at == len(lines) {
			if err := s.takeBatch(batch); err != nil {
				return err
			}
			batch = batch[:0]
			file.pos.Offset += int64(at - taken)
			taken = at
		}
	}
	return nil
}

// takeBatch brings records into the journal, and has the ends of those that it took
// watched for.
func (s *spool) takeBatch(batch []arrival) error {
	if len(batch) == 0 {
		return nil
	}
	err := s.a.intake.take(batch)
	for i := range batch {
		if b := &batch[i]; b.verdict == journalled {
			s.a.intake.count(func(c *Counts) { c.Spooled++ })
			s.watch(slim(b.r, b.size), b.share)
		}
	}
	return err
}

// decode reads one line. A line with a torn record before a whole one gives the
// whole one (FAULTS: SP-03): its marker cannot occur inside a value.
func (s *spool) decode(name string, line []byte, file *spoolFile) *record.Record {
	if len(line) == 0 {
		return nil
	}
	r := new(record.Record)
	start := bytes.LastIndex(line, []byte(record.Marker))
	if start != 0 {
		s.lose("torn_line", "in "+name, 1)
	}
	if start < 0 {
		return nil
	}
	if len(line)-start > journal.MaxLine || s.a.decodeInvocation(line[start:], r) != nil {
		s.a.intake.count(func(c *Counts) { c.Refused++ })
		return nil
	}
	r.Invocation.Path = "file"
	r.Invocation.UID = int64(file.uid)
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
	if err == nil {
		err = s.ours(name, info.Sys().(*syscall.Stat_t))
	}
	if err != nil {
		s.warn(path, err)
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
	b, err := os.ReadFile(s.a.kernelCounters)
	if err != nil {
		return false // a kernel without System V semaphores
	}
	byDefault := config.Default()
	there := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		var key, id, mode, n, uid, gid, creator int
		if _, err := fmt.Sscan(line, &key, &id, &mode, &n, &uid, &gid, &creator); err != nil {
			continue // the heading
		}
		// A shim that could not read its configuration counts for the default run_dir.
		// mode is printed in octal digits.
		if n != len(handover.Causes) || strconv.Itoa(mode) != strconv.FormatInt(handover.LossMode, 8) ||
			int32(key) != handover.LossKey(s.dir, creator) && int32(key) != handover.LossKey(byDefault.Spool(), creator) {
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
	if err := statefile.Replace(s.statePath, s.statePath+".new", b); err != nil {
		s.warn(s.statePath, err)
	}
}

// warn says once what is wrong with a file.
func (s *spool) warn(path string, err error) {
	if !s.warned[path] && len(s.warned) < maxWarned {
		s.warned[path] = true
		s.a.log.Warn("cannot use a spool file", "path", path, "error", err)
	}
}
