package agent

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/procfs"
	"github.com/tallyman-ci/tallyman/record"
)

// How the end of a command was seen, from best to worst (record.End's Source).
const (
	sourceInfo    = "pidfd_info"
	sourcePoll    = "pidfd_poll"
	sourceEOF     = "socket_eof"
	sourceUnknown = "unknown"
)

// watch waits for the end of the command that sent r and records it. The command is
// nobody's child here: its pidfd, which the socket gave, becomes readable when it
// ends, and from Linux 6.15 on tells the exit status too. Where there is no pidfd, the
// socket that the shim left open in the command closes with it and with the last of
// its children that inherited it, which is no earlier.
func (s *server) watch(ctx context.Context, r *record.Record, fd int, p peer, share string) {
	switch s.watches.enter(r.ID, share) {
	case full:
		s.drop(fd, p)
		s.a.recordEnd(r, &record.End{Source: sourceUnknown}, s.a.now())
		return
	case watched:
		s.drop(fd, p)
		return
	}
	if p.known && p.cred.Pid > 0 {
		s.watches.at(int(p.cred.Pid), r.ID)
	}
	s.conns.Go(func() {
		defer s.watches.leave(r.ID, share)
		switch {
		case p.pidfd >= 0:
			unix.Close(fd) // or each running command would hold two descriptors here
			s.a.watchPidfd(ctx, p.pidfd, r)
		case p.left:
			unix.Close(fd)
			s.a.recordEnd(r, &record.End{Source: sourceUnknown}, s.a.now())
		default:
			s.a.watchEOF(ctx, fd, r)
		}
	})
}

// watch watches the command of a record that came by an append file, where the
// command still runs.
func (s *spool) watch(r *record.Record, share string) {
	w := &s.a.server.watches
	if s.ctx == nil || s.ctx.Err() != nil || w.enter(r.ID, share) != entered {
		return
	}
	pidfd, ok := find(r)
	if !ok {
		w.leave(r.ID, share)
		s.gone.add(r)
		return
	}
	w.at(int(r.Invocation.PID), r.ID)
	s.watching.Go(func() {
		defer w.leave(r.ID, share)
		s.a.watchPidfd(s.ctx, pidfd, r)
	})
}

// gone are commands whose record came by file when they were not to be found any more.
// If their record comes by the socket too (the agent was stopped), that way tells how
// they ended; else nobody does.
type gone struct {
	mu   sync.Mutex
	byID map[string]departed
}

type departed struct {
	r  *record.Record
	at time.Time
}

// maxGone bounds the commands that wait to be told as gone; more of them have no end.
const maxGone = 4096

func (g *gone) add(r *record.Record) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byID == nil {
		g.byID = make(map[string]departed)
	}
	if len(g.byID) < maxGone {
		g.byID[r.ID] = departed{r, time.Now()}
	}
}

// tell records the ends, unknown, of those that went before a time. Of one that had its
// end told by the socket's way, this one is a double.
func (g *gone) tell(a *Agent, before time.Time) {
	g.mu.Lock()
	var all []*record.Record
	for id, d := range g.byID {
		if d.at.Before(before) {
			all = append(all, d.r)
			delete(g.byID, id)
		}
	}
	g.mu.Unlock()
	for _, r := range all {
		if !a.server.watches.has(r.ID) {
			a.recordEnd(r, &record.End{Source: sourceUnknown}, a.now())
		}
	}
}

// resume watches the commands that a dead agent saw begin and not end. Those that
// have ended meanwhile get an end that says no more.
func (s *spool) resume(ctx context.Context) {
	for id, r := range s.a.intake.takeRunning() {
		sameBoot := r.Host != nil && r.Host.BootID != "" && r.Host.BootID == s.a.o.Host.BootID
		w := &s.a.server.watches
		if sameBoot && w.enter(id, "resumed") == entered {
			if pidfd, ok := find(r); ok {
				w.at(int(r.Invocation.PID), id)
				s.watching.Go(func() {
					defer w.leave(id, "resumed")
					s.a.watchPidfd(ctx, pidfd, r)
				})
				continue
			}
			w.leave(id, "resumed")
		}
		s.a.log.Debug("a command ended while no agent was here", "invocation", id)
		s.a.recordEnd(r, &record.End{Source: sourceUnknown}, s.a.now())
	}
}

// find opens the process that sent r: the one of its pid and uid that was there before
// the record. A pid is used again only by a process that starts later.
func find(r *record.Record) (pidfd int, ok bool) {
	inv := r.Invocation
	if inv.PID <= 0 || inv.PID > 1<<30 || inv.MonoNS <= 0 {
		return -1, false
	}
	pidfd, err := unix.PidfdOpen(int(inv.PID), 0)
	if err != nil {
		return -1, false // it has ended, or lives in another pid namespace
	}
	// Asked after it was opened: what is said now is said of the process of pidfd, or
	// that one has ended and poll tells it at once.
	var st unix.Stat_t
	started, ok := processStart(int(inv.PID))
	if !ok || started > inv.MonoNS || unix.Stat("/proc/"+strconv.Itoa(int(inv.PID)), &st) != nil || int64(st.Uid) != inv.UID {
		unix.Close(pidfd)
		return -1, false
	}
	return pidfd, true
}

// slim is what a watcher keeps of a record, whose line had size bytes, while its command
// runs. Of a long one it is less: two thousand commands may run, and the end says by its
// invocation's id where the rest is.
func slim(r *record.Record, size int) *record.Record {
	inv := r.Invocation
	kept := &record.Record{ID: r.ID, TS: r.TS, By: r.By, CI: r.CI, Claim: r.Claim, OutsideJob: r.OutsideJob, Host: r.Host,
		Invocation: &record.Invocation{Tool: inv.Tool, Command: inv.Command, Images: inv.Images, PID: inv.PID, UID: inv.UID, MonoNS: inv.MonoNS}}
	if size > longLine {
		const most = 128
		kept.Claim, kept.Invocation.Images = nil, nil
		kept.Invocation.Tool, kept.Invocation.Command = strings.Clone(record.Clean(inv.Tool, most)), strings.Clone(record.Clean(inv.Command, most))
		if c := r.CI; c != nil {
			kept.CI = &record.CI{}
			for _, f := range []struct{ to, from *string }{
				{&kept.CI.Repository, &c.Repository}, {&kept.CI.Workflow, &c.Workflow}, {&kept.CI.Job, &c.Job}, {&kept.CI.JobID, &c.JobID},
				{&kept.CI.RunID, &c.RunID}, {&kept.CI.Step, &c.Step}, {&kept.CI.TrackingID, &c.TrackingID},
			} {
				*f.to = strings.Clone(record.Clean(*f.from, most))
			}
			kept.CI.RunAttempt = c.RunAttempt
		}
	}
	return kept
}

// watches counts the commands whose end is waited for.
type watches struct {
	max int

	mu      sync.Mutex
	byID    map[string]int // of the calls, with their process; 0 where it is not known
	byPID   map[int]string // the other way round
	byShare map[string]int
}

func newWatches(most int) watches {
	return watches{max: most, byID: make(map[string]int), byPID: make(map[int]string), byShare: make(map[string]int)}
}

// What came of entering.
type entry uint8

const (
	entered entry = iota
	watched       // already: its record came by socket and by file
	full
)

// enter takes a place for a call. One job may have three quarters of them: its sleeping
// commands must not cost another job the ends of its own.
func (w *watches) enter(id, share string) entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch _, known := w.byID[id]; {
	case known:
		return watched
	case len(w.byID) >= w.max || w.byShare[share] >= max(w.max*3/4, 1):
		return full
	}
	w.byID[id] = 0
	w.byShare[share]++
	return entered
}

// at says that the process of a watched call is pid, as the kernel told.
func (w *watches) at(pid int, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, known := w.byID[id]; known {
		w.byID[id], w.byPID[pid] = pid, id
	}
}

// parentOf returns the watched call whose process is the nearest ancestor of pid, or "".
// That process is still there, or its end would have been seen: its pid is no other's.
func (w *watches) parentOf(pid int) string {
	for range 16 { // docker, its plugin, and what that calls docker by
		p, err := procfs.Read(pid)
		if err != nil || p.Parent <= 1 {
			return ""
		}
		pid = p.Parent
		w.mu.Lock()
		id := w.byPID[pid]
		w.mu.Unlock()
		if id != "" {
			return id
		}
	}
	return ""
}

func (w *watches) leave(id, share string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if pid := w.byID[id]; w.byPID[pid] == id {
		delete(w.byPID, pid)
	}
	delete(w.byID, id)
	if w.byShare[share]--; w.byShare[share] == 0 {
		delete(w.byShare, share)
	}
}

func (w *watches) has(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, known := w.byID[id]
	return known
}

func (w *watches) count() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(len(w.byID))
}

// processStart returns when a process started, on CLOCK_MONOTONIC in nanoseconds.
// The kernel counts from boot, suspended time included.
func processStart(pid int) (int64, bool) {
	p, err := procfs.Read(pid)
	if err != nil {
		return 0, false
	}
	var boot unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return int64(p.Start)*10e6 - (boot.Nano() - monotonic()), true
}

// recordEnd writes the invocation.end that belongs to r, seen at a time. Its id follows
// from the invocation's, because a record that came by socket and by file is watched
// twice.
func (a *Agent) recordEnd(r *record.Record, end *record.End, at time.Time) {
	inv := r.Invocation
	end.InvocationID, end.Tool, end.Command, end.Images = r.ID, inv.Tool, inv.Command, inv.Images
	a.intake.keep(&record.Record{
		ID: record.DeriveID(idTime(r.ID), "invocation.end", r.ID), TS: at, Kind: record.KindInvocationEnd,
		By: r.By, CI: r.CI, Claim: r.Claim, OutsideJob: r.OutsideJob, Host: r.Host, End: end,
	})
	if end.Source != sourceUnknown {
		a.intake.count(func(c *Counts) { c.Ends++ })
	}
}

// idTime is the time in an invocation's id. Its ts is no part of the id of its end: of
// a record that comes twice, the agent may have to correct one.
func idTime(id string) time.Time {
	ms, err := strconv.ParseInt(id[:8]+id[9:13], 16, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// mostLate bounds the error of a duration: a command that had ended when the agent
// first looked, longer than this after it began, gets none.
const mostLate = 10 * time.Second

// watchPidfd waits until the process of pidfd has ended, records that, and closes
// pidfd. Where ctx ends before, nothing is recorded: the command still runs, and the
// next agent finds it.
func (a *Agent) watchPidfd(ctx context.Context, pidfd int, r *record.Record) {
	// The runtime's poller takes it as a non-blocking file: a waiting goroutine, no
	// thread, for each running command.
	unix.SetNonblock(pidfd, true)
	f := os.NewFile(uintptr(pidfd), "pidfd")
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Now()) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	late := false // it had ended before the agent looked for the first time
	raw.Control(func(fd uintptr) { late = readable(fd) })
	if !late && raw.Read(readable) != nil {
		return
	}
	end, at := &record.End{Source: sourcePoll, DurationNS: since(r.Invocation.MonoNS)}, a.now()
	if late {
		end.AtMost = true
		if end.DurationNS > int64(mostLate) {
			end.DurationNS = 0 // of an agent that was stopped meanwhile: this is the stop's
		}
	}
	raw.Control(func(fd uintptr) {
		status, ok := exitStatus(ctx, fd)
		switch {
		case !ok:
			return
		case status.Signaled():
			end.Signal = int64(status.Signal())
		default:
			code := int64(status.ExitStatus())
			end.ExitCode = &code
		}
		end.Source = sourceInfo
	})
	a.recordEnd(r, end, at)
}

// readable polls once without waiting.
func readable(fd uintptr) bool {
	pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(pfd, 0)
	return err == nil && n == 1
}

// watchEOF waits until every copy of the other end is closed, records that, and
// closes fd. Where ctx ends before, nothing is recorded.
func (a *Agent) watchEOF(ctx context.Context, fd int, r *record.Record) {
	unix.SetNonblock(fd, true)
	f := os.NewFile(uintptr(fd), "command")
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Now()) })
	defer stop()
	end := &record.End{Source: sourceUnknown}
	var b [1]byte
	switch _, err := f.Read(b[:]); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return
	case err == nil, errors.Is(err, unix.ECONNRESET):
		// The command wrote into it; or the shim closed it without reading the answer, which
		// came while it went on, and it was never the command's.
	default:
		end.Source, end.DurationNS, end.AtMost = sourceEOF, since(r.Invocation.MonoNS), true
	}
	a.recordEnd(r, end, a.now())
}

// since is the time from started, a reading of CLOCK_MONOTONIC in the caller; 0 where
// that is no reading of this boot's clock.
func since(started int64) int64 {
	if started <= 0 {
		return 0
	}
	return max(monotonic()-started, 0)
}

// pidfdInfo is struct pidfd_info of linux/pidfd.h in its first form of 64 bytes.
type pidfdInfo struct {
	mask, cgroupID                                   uint64
	pid, tgid, ppid                                  uint32
	ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid uint32
	exitCode                                         int32
}

const (
	pidfdGetInfo  = 0xC040FF0B // PIDFD_GET_INFO = _IOWR(0xFF, 11, struct pidfd_info), Linux 6.13
	pidfdInfoExit = 1 << 3     // PIDFD_INFO_EXIT, Linux 6.15
)

// lateReap is how long an exit status is asked for. A parent that does not wait for its
// child leaves it a zombie, of which the kernel tells the end at once and the status
// only when it is reaped.
const lateReap = time.Minute

// exitStatus asks for the wait status of an ended process. The kernel has it only
// after the parent has reaped the process, some tenths of a millisecond after its end
// for a shell, never for a parent that does not wait: then it is given up. The first
// pause is longer than that, because each wake-up here takes processor time from the
// job.
func exitStatus(ctx context.Context, pidfd uintptr) (unix.WaitStatus, bool) {
	// A process that is just being reaped gives ESRCH for a moment, and so does one
	// in another pid namespace on kernels before 6.18 for ever.
	const longestESRCH = 100 * time.Millisecond
	start := time.Now()
	for pause := time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		info := pidfdInfo{mask: pidfdInfoExit}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, pidfd, pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
		switch {
		case errno == 0 && info.mask&pidfdInfoExit != 0:
			return unix.WaitStatus(info.exitCode), true
		case errno == unix.EREMOTE || errno == unix.ENOTTY || errno == unix.EINVAL:
			return 0, false // another pid namespace, or an older kernel
		case errno == unix.ESRCH && time.Since(start) > longestESRCH, time.Since(start) > lateReap:
			return 0, false
		}
		select {
		case <-ctx.Done():
			return 0, false
		case <-time.After(pause):
		}
	}
}

func monotonic() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}
