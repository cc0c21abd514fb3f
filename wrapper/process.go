package wrapper

import "unsafe"

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
