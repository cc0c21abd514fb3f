package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

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
	if !s.watches.enter(share) {
		s.drop(fd, p)
		s.a.recordEnd(r, &record.End{Source: sourceUnknown}, s.a.now())
		return
	}
	s.conns.Go(func() {
		defer s.watches.leave(share)
		if p.pidfd >= 0 {
			unix.Close(fd) // or each running command would hold two descriptors here
			s.a.watchPidfd(ctx, p.pidfd, r)
		} else {
			s.a.watchEOF(ctx, fd, r)
		}
	})
}

// watch watches the command of a record that came by an append file, where the
// command still runs.
func (s *spool) watch(r *record.Record, share string) {
	if s.ctx == nil || s.ctx.Err() != nil || !s.a.server.watches.enter(share) {
		return
	}
	pidfd, ok := find(r)
	if !ok {
		s.a.server.watches.leave(share)
		return
	}
	s.watching.Go(func() {
		defer s.a.server.watches.leave(share)
		s.a.watchPidfd(s.ctx, pidfd, r)
	})
}

// resume watches the commands that a dead agent saw begin and not end. Those that
// have ended meanwhile get an end that says no more.
func (s *spool) resume(ctx context.Context) {
	for id, r := range s.a.intake.takeRunning() {
		sameBoot := r.Host != nil && r.Host.BootID != "" && r.Host.BootID == s.a.o.Host.BootID
		if sameBoot && s.a.server.watches.enter("resumed") {
			if pidfd, ok := find(r); ok {
				s.watching.Go(func() {
					defer s.a.server.watches.leave("resumed")
					s.a.watchPidfd(ctx, pidfd, r)
				})
				continue
			}
			s.a.server.watches.leave("resumed")
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

// slim is what a watcher keeps of a record while its command runs.
func slim(r *record.Record) *record.Record {
	inv := r.Invocation
	return &record.Record{ID: r.ID, TS: r.TS, By: r.By, CI: r.CI, Claim: r.Claim, OutsideJob: r.OutsideJob, Host: r.Host,
		Invocation: &record.Invocation{Tool: inv.Tool, Command: inv.Command, Images: inv.Images, PID: inv.PID, UID: inv.UID, MonoNS: inv.MonoNS}}
}

// watches counts the commands whose end is waited for.
type watches struct {
	max int

	mu      sync.Mutex
	n       int
	byShare map[string]int
}

// enter takes a place. One job may have half of them: a thousand sleeping commands of
// one must not cost another the ends of its own.
func (w *watches) enter(share string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n >= w.max || w.byShare[share] >= max(w.max/2, 1) {
		return false
	}
	w.n++
	w.byShare[share]++
	return true
}

func (w *watches) leave(share string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n--
	if w.byShare[share]--; w.byShare[share] == 0 {
		delete(w.byShare, share)
	}
}

func (w *watches) count() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(w.n)
}

// process is what /proc/<pid>/stat tells (proc_pid_stat(5)).
type process struct {
	parent     int
	startTicks uint64 // since boot, in ticks of 10 ms (USER_HZ)
}

func readProcess(pid int) (process, error) {
	name := "/proc/" + strconv.Itoa(pid) + "/stat"
	b, err := os.ReadFile(name)
	if err != nil {
		return process{}, err
	}
	// The name, in parentheses, may hold anything; ppid is the 2nd field after it,
	// starttime the 20th.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return process{}, fmt.Errorf("%s is short", name)
	}
	var p process
	if p.parent, err = strconv.Atoi(fields[1]); err == nil {
		p.startTicks, err = strconv.ParseUint(fields[19], 10, 64)
	}
	return p, err
}

// processStart returns when a process started, on CLOCK_MONOTONIC in nanoseconds.
// The kernel counts from boot, suspended time included.
func processStart(pid int) (int64, bool) {
	p, err := readProcess(pid)
	if err != nil {
		return 0, false
	}
	var boot unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return int64(p.startTicks)*10e6 - (boot.Nano() - monotonic()), true
}

// recordEnd writes the invocation.end that belongs to r, seen at a time. Its id follows
// from the invocation's, because a record that came by socket and by file is watched
// twice.
func (a *Agent) recordEnd(r *record.Record, end *record.End, at time.Time) {
	inv := r.Invocation
	end.InvocationID, end.Tool, end.Command, end.Images = r.ID, inv.Tool, inv.Command, inv.Images
	a.intake.keep(&record.Record{
		ID: record.DeriveID(r.TS, "invocation.end", r.ID), TS: at, Kind: record.KindInvocationEnd,
		By: r.By, CI: r.CI, Claim: r.Claim, OutsideJob: r.OutsideJob, Host: r.Host, End: end,
	})
	if end.Source != sourceUnknown {
		a.intake.count(func(c *Counts) { c.Ends++ })
	}
}

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
	if err != nil || raw.Read(readable) != nil {
		return
	}
	end, at := &record.End{Source: sourcePoll, DurationNS: since(r.Invocation.MonoNS)}, a.now()
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
	end := &record.End{Source: sourceUnknown} // where the command wrote into it
	var b [1]byte
	switch _, err := f.Read(b[:]); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return
	case err != nil:
		end.Source, end.DurationNS = sourceEOF, since(r.Invocation.MonoNS)
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
