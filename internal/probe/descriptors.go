package probe

import (
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// highestLooked is the first descriptor that is not looked at.
const highestLooked = 1024

// descriptors tells of each open descriptor what it is, its flags and its offset. It asks
// by fcntl(2) and fstat(2), which open nothing.
func (s State) descriptors() {
	for fd := range highestLooked {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			if fd < 3 {
				s.set(name(fd), "closed")
			}
			continue
		}
		cloexec, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		var st syscall.Stat_t
		if syscall.Fstat(fd, &st) != nil || ownedByRuntime(fd, st.Mode, cloexec) {
			continue
		}
		what := kind(st.Mode)
		if st.Mode&syscall.S_IFMT == syscall.S_IFREG || st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
			offset, _ := unix.Seek(fd, 0, 1)
			what += fmt.Sprintf(" %d:%d at %d", st.Dev, st.Ino, offset)
		} else if st.Rdev != 0 {
			what += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		owner, _ := unix.FcntlInt(uintptr(fd), unix.F_GETSIG, 0)
		s.set(name(fd), "%s, flags %#o, close-on-exec %d, signal %d", what, flags, cloexec, owner)
	}
}

func name(fd int) string { return "descriptor " + strconv.Itoa(fd) }

// ownedByRuntime tells the poller's descriptors, which a Go program opens itself. What
// was inherited is never close-on-exec.
func ownedByRuntime(fd int, mode uint32, cloexec int) bool {
	if cloexec == 0 {
		return false
	}
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	return mode&syscall.S_IFMT == 0 || err == nil && strings.HasPrefix(link, "anon_inode:")
}

func kind(mode uint32) string {
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return "file"
	case syscall.S_IFDIR:
		return "folder"
	case syscall.S_IFIFO:
		return "pipe"
	case syscall.S_IFSOCK:
		return "socket"
	case syscall.S_IFCHR:
		return "device"
	}
	return fs.FileMode(mode).String()
}
