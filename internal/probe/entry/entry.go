// Package entry keeps what Go's own start changes or hides before main runs: package
// syscall raises the limit of open files when it is initialised, and a parent-death
// signal can be read on the main thread only, which init functions run on and main
// may not. It imports nothing, so that it is initialised before package syscall.
package entry

import "unsafe"

// OpenFiles is the soft limit of open files (RLIMIT_NOFILE) with which the process was
// started; OpenFilesMax is the hard one.
var OpenFiles, OpenFilesMax uint64

// ParentDeathSignal is the signal of PR_SET_PDEATHSIG.
var ParentDeathSignal int32

// TimerSlack is the main thread's timer slack in nanoseconds.
var TimerSlack uintptr

func init() {
	var limit [2]uint64
	const nofile = 7
	rawSyscall6(sysPrlimit64, 0, nofile, 0, uintptr(unsafe.Pointer(&limit)), 0, 0)
	OpenFiles, OpenFilesMax = limit[0], limit[1]
	const getPdeathsig, getTimerslack = 2, 30
	rawSyscall6(sysPrctl, getPdeathsig, uintptr(unsafe.Pointer(&ParentDeathSignal)), 0, 0, 0, 0)
	TimerSlack, _, _ = rawSyscall6(sysPrctl, getTimerslack, 0, 0, 0, 0, 0)
}

// rawSyscall6 is linked by name, because importing package syscall initialises it first.
//
//go:linkname rawSyscall6 syscall.RawSyscall6
//go:noescape
func rawSyscall6(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2, errno uintptr)
