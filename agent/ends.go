package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
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
func (s *server) watch(ctx context.Context, r *record.Record, fd int, p peer) {
	end := &record.End{Source: sourceUnknown}
	if s.watched.Add(1) <= maxWatched {
		if p.pidfd >= 0 {
			unix.Close(fd) // or each running command would hold two descriptors here
			watchPidfd(ctx, p.pidfd, r.Invocation.MonoNS, end)
		} else {
			watchEOF(ctx, fd, r.Invocation.MonoNS, end)
		}
	} else {
		s.drop(fd, p)
	}
	s.watched.Add(-1)
	s.a.recordEnd(r, end)
}

// watch watches the command of a record that came by an append file, where the
// command still runs. Its process is the one of that pid that was there before the
// record: a pid is used again only by a process that starts later.
func (s *spool) watch(r *record.Record) {
	inv, watched := r.Invocation, &s.a.server.watched
	if s.ctx == nil || s.ctx.Err() != nil || inv.PID <= 0 || inv.MonoNS <= 0 || watched.Load() >= maxWatched {
		return
	}
	pidfd, err := unix.PidfdOpen(int(inv.PID), 0)
	if err != nil {
		return // it has ended, or lives in another pid namespace
	}
	started, ok := processStart(int(inv.PID))
	if !ok || started > inv.MonoNS {
		unix.Close(pidfd)
		return
	}
	watched.Add(1)
	s.watching.Go(func() {
		defer watched.Add(-1)
		end := &record.End{Source: sourceUnknown}
		watchPidfd(s.ctx, pidfd, inv.MonoNS, end)
		s.a.recordEnd(r, end)
	})
}

// processStart returns when a process started, on CLOCK_MONOTONIC in nanoseconds.
// /proc/<pid>/stat counts from boot in ticks of 10 ms (USER_HZ), suspended time
// included.
func processStart(pid int) (int64, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// The name, in parentheses, may hold anything; starttime is the 20th field after it.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return 0, false
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return 0, false
	}
	var boot unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return ticks*10e6 - (boot.Nano() - monotonic()), true
}

// recordEnd writes the invocation.end that belongs to r. Its id follows from the
// invocation's, because a record that came by socket and by file is watched twice.
func (a *Agent) recordEnd(r *record.Record, end *record.End) {
	inv := r.Invocation
	end.InvocationID, end.Tool, end.Command, end.Images = r.ID, inv.Tool, inv.Command, inv.Images
	now := a.now()
	a.intake.keep(&record.Record{
		ID: record.DeriveID(r.TS, "invocation.end", r.ID), TS: now, Kind: record.KindInvocationEnd,
		By: r.By, CI: r.CI, Claim: r.Claim, OutsideJob: r.OutsideJob, Host: r.Host, End: end,
	})
	if end.Source != sourceUnknown {
		a.intake.count(func(c *Counts) { c.Ends++ })
	}
}

// watchPidfd waits until the process of pidfd has ended, and closes pidfd. Where ctx
// ends before, the end stays unknown.
func watchPidfd(ctx context.Context, pidfd int, started int64, end *record.End) {
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
	end.Source, end.DurationNS = sourcePoll, since(started)
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
}

// readable polls once without waiting.
func readable(fd uintptr) bool {
	pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(pfd, 0)
	return err == nil && n == 1
}

// watchEOF waits until every copy of the other end is closed, and closes fd.
func watchEOF(ctx context.Context, fd int, started int64, end *record.End) {
	unix.SetNonblock(fd, true)
	f := os.NewFile(uintptr(fd), "command")
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Now()) })
	defer stop()
	var b [1]byte
	if _, err := f.Read(b[:]); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		end.Source, end.DurationNS = sourceEOF, since(started)
	}
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

// exitStatus asks for the wait status of an ended process. The kernel has it only
// after the parent has reaped the process, some tenths of a millisecond after its end
// for a shell, never for a parent that does not wait: then it is given up. The first
// pause is longer than that, because each wake-up here takes processor time from the
// job.
func exitStatus(ctx context.Context, pidfd uintptr) (unix.WaitStatus, bool) {
	const (
		longest = 2 * time.Second
		// A process that is just being reaped gives ESRCH for a moment, and so does one
		// in another pid namespace on kernels before 6.18 for ever.
		longestESRCH = 100 * time.Millisecond
	)
	start := time.Now()
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		info := pidfdInfo{mask: pidfdInfoExit}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, pidfd, pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
		switch {
		case errno == 0 && info.mask&pidfdInfoExit != 0:
			return unix.WaitStatus(info.exitCode), true
		case errno == unix.EREMOTE || errno == unix.ENOTTY || errno == unix.EINVAL:
			return 0, false // another pid namespace, or an older kernel
		case errno == unix.ESRCH && time.Since(start) > longestESRCH, time.Since(start) > longest:
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
