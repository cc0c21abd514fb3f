package doctor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kernel asks the running kernel for the two ways in which the end of a call is
// seen by an agent that is not its parent.
type Kernel interface {
	// Release is the kernel's release, for people.
	Release() string
	// PeerPidfd is nil where a socket gives a descriptor of the peer's process
	// (SO_PEERPIDFD, Linux 6.5).
	PeerPidfd() error
	// OpenPidfd is nil where such a descriptor can be had by a number of a process
	// (pidfd_open, Linux 5.3), which means the same process in one pid namespace only.
	OpenPidfd() error
	// ExitInfo is nil where such a descriptor tells the exit code (PIDFD_GET_INFO
	// with PIDFD_INFO_EXIT, Linux 6.15).
	ExitInfo() error
}

func (x *examination) kernel() {
	release := x.in.Kernel.Release()
	switch err := x.in.Kernel.PeerPidfd(); {
	case err == nil:
		x.ok("durations", "Linux %s tells when a call ended", release)
	case x.in.Kernel.OpenPidfd() == nil:
		x.ok("durations", "Linux %s tells when a call ended, to an agent in the same pid namespace", release)
	default:
		x.add(Warn, "durations", fmt.Sprintf("Linux %s gives no descriptors of processes (%v): durations of calls are upper bounds, exit codes are unknown", release, err),
			"use Linux 5.3 or later for durations, 6.15 or later for exit codes")
		return
	}
	if err := x.in.Kernel.ExitInfo(); err != nil {
		x.add(Warn, "exit codes", fmt.Sprintf("Linux %s does not tell the exit code of another's process (%v): failed pulls and builds are not seen", release, err),
			"use Linux 6.15 or later")
		return
	}
	x.ok("exit codes", "Linux %s tells how a call ended, to an agent in the same pid namespace", release)
}

type realKernel struct{}

func (realKernel) Release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "(unknown release)"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// soPeerPidfd is SO_PEERPIDFD of <asm-generic/socket.h>.
const soPeerPidfd = 77

func (realKernel) PeerPidfd() error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	fd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, soPeerPidfd)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func (realKernel) OpenPidfd() error {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

const (
	pidfdGetInfo  = 0xc040ff0b // _IOWR(0xff, 11, struct pidfd_info of 64 bytes), <linux/pidfd.h>
	pidfdInfoExit = 1 << 3
)

var errNoExit = errors.New("no exit code in the answer")

// ExitInfo ends a child with a code of its own and asks a descriptor of it. The
// code is there once the child was reaped.
func (realKernel) ExitInfo() error {
	const code = 37
	fd := -1
	cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf("exit %d", code))
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &fd}
	cmd.Env = []string{}
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("start a child to ask about: %w", err)
	}
	if fd < 0 {
		return errors.New("no descriptor of a child (pidfd, Linux 5.4)")
	}
	defer unix.Close(fd)
	var info [64]byte
	binary.NativeEndian.PutUint64(info[:], pidfdInfoExit)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pidfdGetInfo, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return os.NewSyscallError("PIDFD_GET_INFO", errno)
	}
	status := unix.WaitStatus(binary.NativeEndian.Uint32(info[60:]))
	if binary.NativeEndian.Uint64(info[:])&pidfdInfoExit == 0 || status.ExitStatus() != code {
		return errNoExit
	}
	return nil
}
