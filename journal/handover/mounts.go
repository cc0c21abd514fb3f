package handover

import (
	"strings"
	"syscall"
	"unsafe"
)

// MayHang tells of each path whether a system call on it may wait for a server: one on
// the network, or a process that serves FUSE. A hung one cannot be asked, not even for
// its type: statfs(2) waits for the server like open(2), and no signal but SIGKILL
// ends the wait. So the answer comes from the kernel's list of mounts and from
// openat2(2) of parent, which must not lead through a symbolic link; paths lie in it.
//
// The root file system never counts as one that may hang: without it, docker could
// not start either.
func MayHang(parent string, paths ...string) []bool {
	hang := make([]bool, len(paths))
	mountTypes("/proc/self/mounts", paths, hang)
	for _, h := range hang {
		if h {
			return hang
		}
	}
	const oPath = 0x200000
	if fd, err := openAt2(parent, oPath|syscall.O_CLOEXEC, 0); err == nil {
		syscall.Close(fd)
	} else if err == syscall.ELOOP {
		// The link may lead anywhere.
		for i := range hang {
			hang[i] = true
		}
	}
	return hang
}

// maxMounts bounds how much of the list of mounts is read: the kernel takes about a
// microsecond for each mount, some 40 bytes and more. Behind it, a hung file system is
// not recognised.
const maxMounts = 64 << 10

// mountTypes sets hang[i] where the mount that paths[i] lies in has a remote type, by
// the list of mounts in file.
func mountTypes(file string, paths []string, hang []bool) {
	fd, err := syscall.Open(file, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer syscall.Close(fd)
	longest := make([]int, len(paths))
	buf := make([]byte, 16<<10)
	for have, total := 0, 0; total < maxMounts; {
		n, err := syscall.Read(fd, buf[have:])
		if err == syscall.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		total += n
		have += n
		start := 0
		for i := range have {
			if buf[i] == '\n' {
				oneMount(buf[start:i], paths, longest, hang)
				start = i + 1
			}
		}
		have = copy(buf, buf[start:have])
		if have == len(buf) {
			have = 0 // a line longer than any path: its rest is read as a line that names none
		}
	}
}

// oneMount takes one line: device, mount point, type, options. Of mounts at the same
// place the later one is on top.
func oneMount(line []byte, paths []string, longest []int, hang []bool) {
	_, rest, _ := strings.Cut(unsafe.String(unsafe.SliceData(line), len(line)), " ")
	point, rest, _ := strings.Cut(rest, " ")
	kind, _, ok := strings.Cut(rest, " ")
	if !ok {
		return
	}
	if strings.IndexByte(point, '\\') >= 0 {
		point = unescape(point)
	}
	for i, path := range paths {
		if len(point) >= longest[i] && inside(path, point) {
			longest[i] = len(point)
			hang[i] = point != "/" && remoteType(kind)
		}
	}
}

func inside(path, point string) bool {
	rest, ok := strings.CutPrefix(path, point)
	return ok && (rest == "" || rest[0] == '/' || point == "/")
}

// unescape undoes the octal escapes of space, tab, newline and backslash.
func unescape(s string) string {
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			b = append(b, (s[i+1]-'0')<<6|(s[i+2]-'0')<<3|(s[i+3]-'0'))
			i += 3
			continue
		}
		b = append(b, s[i])
	}
	return string(b)
}

func remoteType(kind string) bool {
	switch kind {
	case "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "afs", "coda", "autofs", "lustre", "beegfs", "gpfs", "ocfs2", "gfs2", "orangefs", "fuse", "fuseblk":
		return true
	}
	return strings.HasPrefix(kind, "fuse.")
}
