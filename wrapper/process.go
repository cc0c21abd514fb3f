package wrapper

import (
	"strings"
	"syscall"
	"unsafe"
)

// What the kernel passed to this process, as the runtime copied it. The shim does
// without package os, whose start-up each docker command would pay for, and without
// syscall.Environ, which drops empty and repeated variables: the real tool must get
// what the caller gave.

// Arguments returns argv.
//
//go:linkname Arguments os.runtime_args
func Arguments() []string

// Environment returns envp, byte for byte.
//
//go:linkname Environment syscall.runtime_envs
func Environment() []string

// getAuxv is the auxiliary vector, which golang.org/x/sys/cpu reads in the same way.
//
//go:linkname getAuxv runtime.getAuxv
func getAuxv() []uintptr

// executedPath returns the absolute path by which this program was called. Links in it
// stay: by a link's name one shim can stand for several tools, and the real tool stands
// beside the link, however the caller wrote the path.
func executedPath(args []string) string {
	path := execFilename()
	if path == "" && len(args) > 0 {
		path = args[0]
	}
	if strings.HasPrefix(path, "/") {
		// fexecve(3) calls by a descriptor. That is no place where a tool stands.
		if !strings.HasPrefix(path, "/dev/fd/") && !strings.HasPrefix(path, "/proc/") {
			return path
		}
	} else if wd, err := syscall.Getwd(); err == nil {
		for strings.HasPrefix(path, "./") {
			path = strings.TrimLeft(path[1:], "/")
		}
		return strings.TrimRight(wd, "/") + "/" + path
	}
	var buf [4096]byte
	if n, err := syscall.Readlink("/proc/self/exe", buf[:]); err == nil && n > 0 {
		return string(buf[:n])
	}
	return path
}

// execFilename returns AT_EXECFN, the path that execve(2) was called with.
func execFilename() string {
	const atExecfn = 31
	auxv := getAuxv()
	for i := 0; i+1 < len(auxv); i += 2 {
		if auxv[i] == atExecfn {
			return cString(auxv[i+1])
		}
	}
	return ""
}

// cString copies the NUL-terminated string at p, which the kernel placed above the
// stack.
func cString(p uintptr) string {
	start := *(*unsafe.Pointer)(unsafe.Pointer(&p)) // no Go pointer, and vet knows no other way to say so
	n := 0
	for *(*byte)(unsafe.Add(start, n)) != 0 {
		n++
	}
	return string(unsafe.Slice((*byte)(start), n))
}
