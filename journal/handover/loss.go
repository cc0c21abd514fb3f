package handover

import (
	"syscall"
	"unsafe"
)

// A Cause says why a record was lost. Its letter stands for one record in a *.lost
// file, and its place in Causes is that of its counter in the kernel.
type Cause struct {
	Letter byte
	Text   string // for people, behind "records of uid 1001 were lost: "
}

// Causes are all causes. Their order is part of what shims and agents of different
// versions agree on: new ones go to the end.
var Causes = [...]Cause{
	{'x', "the spool could not be written"},
	{'n', "there is no spool folder"},
	{'a', "the spool may not be written by this user"},
	{'r', "the spool is on a read-only file system"},
	{'s', "the file system of the spool is full"},
	{'f', "the spool file is at its bound"},
	{'d', "no file descriptor was free"},
	{'l', "something else than a plain file stands in the spool file's place"},
	{'b', "the spool is on a disk, which could make a command wait (spool_on_disk)"},
	{'h', "run_dir is on a file system that can hang, or behind a link"},
	{'p', "the shim had an internal error"},
}

// Places in Causes.
const (
	causeOther = iota
	causeNoFolder
	causeForbidden
	causeReadOnly
	causeFull
	causeBound
	causeDescriptors
	causeNoFile
	causeDisk
	causeRemote
	causeInternal
)

// causeOf returns the place in Causes for an error of the append file.
func causeOf(err error) int {
	switch err {
	case syscall.ENOENT, syscall.ENOTDIR:
		return causeNoFolder
	case syscall.EACCES, syscall.EPERM:
		return causeForbidden
	case syscall.EROFS:
		return causeReadOnly
	case syscall.ENOSPC, syscall.EDQUOT:
		return causeFull
	case syscall.EFBIG:
		return causeBound
	case syscall.EMFILE, syscall.ENFILE:
		return causeDescriptors
	case syscall.ELOOP, syscall.ENXIO, syscall.EISDIR, errNoFile:
		return causeNoFile
	case errDisk:
		return causeDisk
	case errRemote:
		return causeRemote
	}
	return causeOther
}

// CountInternalError counts a record that was lost to a defect of the shim itself.
func CountInternalError(spool string) { countInKernel(spool, causeInternal) }

// CountNoDescriptor counts a record that was lost because no descriptor was free.
func CountNoDescriptor(spool string) { countInKernel(spool, causeDescriptors) }

// The counters in the kernel are for losses that no file can hold: no folder, a
// read-only or full file system, no free descriptor. They are a set of System V
// semaphores for each uid, one for each of Causes; semget(2) and semop(2) need neither a
// file system nor a descriptor, never wait with IPC_NOWAIT, and the counts live until
// the machine or the container ends. A counter stops at 32,767 (SEMVMX).
const (
	ipcCreate = 0o1000
	ipcNoWait = 0o4000
	// LossMode are the permissions of a set: its creator counts, everybody may read.
	LossMode = 0o644
)

// LossKey is the key of the counters of uid for losses of this spool folder, so that
// several installations on one machine have counters of their own. The agent looks
// for it in /proc/sysvipc/sem, where the kernel also says who made a set: uid is the
// effective one.
func LossKey(spool string, uid int) int32 {
	const offset, prime = 2166136261, 16777619 // FNV-1a
	h := uint32(offset)
	for i := range len(spool) {
		h = (h ^ uint32(spool[i])) * prime
	}
	for u := uint32(uid); u != 0; u >>= 8 {
		h = (h ^ u&0xff) * prime
	}
	return int32(h&0x7fffffff | 1) // 0 would be IPC_PRIVATE
}

func countInKernel(spool string, cause int) {
	id, _, errno := syscall.RawSyscall(syscall.SYS_SEMGET, uintptr(LossKey(spool, syscall.Geteuid())), uintptr(len(Causes)), ipcCreate|LossMode)
	if errno != 0 {
		return // the one loss that nobody hears of
	}
	op := struct {
		num     uint16
		op, flg int16
	}{uint16(cause), 1, ipcNoWait}
	syscall.RawSyscall(syscall.SYS_SEMOP, id, uintptr(unsafe.Pointer(&op)), 1)
}
