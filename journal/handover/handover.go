// Package handover is the shim's half of the journal: it brings one record to the
// agent's socket or, where no agent takes it in time, into the append file of the
// caller's uid, and does nothing else. It is linked into every docker command, so
// it calls the kernel directly and imports little but syscall.
//
// Nothing here blocks for longer than AckWait: the socket is non-blocking, and a file
// is opened only on a file system that cannot hang (see spool and MayHang). What
// nobody took is counted, with its cause, where the agent finds it (see Causes).
package handover

import (
	"errors"
	"strconv"
	"syscall"
	"unsafe"
)

// Result says what became of a record.
type Result uint8

// The ways of a record.
const (
	Lost      Result = iota // neither agent nor file took it
	Acked                   // the agent has it in its journal
	Queued                  // it lies in the agent's socket, not yet acknowledged, and no file took it
	Spooled                 // it is in the append file
	QueuedToo               // it lies in the socket and in the append file; the agent removes the double by its id
)

// AckWait is how long the shim waits for the agent's acknowledgement, in
// milliseconds. An agent with a processor to itself answers in a tenth of one; the
// rest of the 5 ms that the shim may add at the 99th percentile is for the start of
// the process.
const AckWait = 3

// MaxMessage is the longest message that the agent takes: the shim keeps its records
// under 16 KiB, and control messages of the hooks stay below it too.
const MaxMessage = 64 << 10

// The agent's answers to a record, one byte each.
const (
	// AckClose: the record is in the journal, close the socket.
	AckClose = '1'
	// AckKeep: the same, but leave the socket open in the command, because this
	// kernel has no pidfd of a socket's peer and the agent sees the end of the
	// command by the socket's end of file.
	AckKeep = '2'
)

// Target says where records go.
type Target struct {
	Socket        string // path of the agent's SOCK_SEQPACKET socket
	Spool         string // folder of the append files
	SpoolMaxBytes int64  // an append file of this size takes no more
	SpoolOnDisk   bool   // append on a local disk too, which can freeze or stall
	NoSocket      bool   // the socket is on a file system that may hang: leave it alone
	NoSpool       bool   // the same of the spool
}

// Deliver brings one line, which ends in a newline, on its way. uid names the append
// file; euid is the user the process acts as.
func Deliver(t Target, line []byte, uid, euid int) Result {
	switch send(t, line) {
	case acked:
		return Acked
	case queued:
		// The queue holds it: what a file cannot take now is not lost yet.
		if spool(t, line, uid, euid, true) == nil {
			return QueuedToo
		}
		return Queued
	}
	err := spool(t, line, uid, euid, false)
	if err == nil {
		return Spooled
	}
	cause := causeOf(err)
	if cause == causeRemote || cause == causeDisk || !t.files(uid, euid).countLoss(cause) {
		countInKernel(t.Spool, cause)
	}
	return Lost
}

type sent uint8

const (
	notSent sent = iota
	queued
	acked
)

// send writes the line to the agent as one message and waits for its one-byte
// answer. A full backlog (EAGAIN), a missing, stale or foreign socket are told at
// once by connect(2).
func send(t Target, line []byte) sent {
	if t.NoSocket || t.Socket == "" || len(t.Socket) > 107 { // sun_path
		return notSent
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return notSent
	}
	if err := connect(fd, t.Socket); err != nil {
		syscall.Close(fd)
		return notSent
	}
	// MSG_NOSIGNAL: an agent that dies now must not kill docker with SIGPIPE.
	if err := sendto(fd, line); err != nil {
		syscall.Close(fd)
		return notSent
	}
	result := queued
	if pollIn(fd, AckWait) {
		var ack [1]byte
		n, err := syscall.Read(fd, ack[:])
		switch {
		case n == 1 && ack[0] == AckClose:
			result = acked
		case n == 1 && ack[0] == AckKeep:
			result = acked
			// A copy survives execve and closes when the command and all its
			// children are gone. It is above the standard descriptors, one of
			// which this socket may have got where the caller left it closed.
			syscall.RawSyscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_DUPFD, 3)
		case err != syscall.EAGAIN:
			result = notSent // the agent closed the connection, or it is no agent of ours
		}
	}
	// Closing drops nothing: what lies in the agent's queue stays readable there.
	syscall.Close(fd)
	return result
}

func connect(fd int, path string) error {
	return syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
}

func sendto(fd int, line []byte) error {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(line))),
		uintptr(len(line)), syscall.MSG_NOSIGNAL|syscall.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// pollIn waits at most ms milliseconds for fd to become readable.
func pollIn(fd, ms int) bool {
	pfd := struct {
		fd              int32
		events, revents int16
	}{fd: int32(fd), events: 1} // POLLIN
	timeout := syscall.Timespec{Nsec: int64(ms) * 1e6}
	for {
		n, _, errno := syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&pfd)), 1, uintptr(unsafe.Pointer(&timeout)), 0, 8, 0)
		if errno == syscall.EINTR {
			continue // Linux leaves the remaining time in timeout
		}
		return errno == 0 && n == 1
	}
}

// File systems by the type that statfs(2) gives (linux/magic.h).
const (
	tmpfsMagic = 0x01021994
	ramfsMagic = 0x858458f6
	nfsMagic   = 0x6969
	smbMagic   = 0x517b
	smb2Magic  = 0xfe534d42
	cifsMagic  = 0xff534d42
	fuseMagic  = 0x65735546
	v9fsMagic  = 0x01021997
	cephMagic  = 0x00c36400
	afsMagic   = 0x5346414f
)

// Why spool writes nothing.
var (
	errDisk   = errors.New("on a disk")
	errRemote = errors.New("on a file system that can hang")
	errNoFile = errors.New("not a regular file with one name, of this user or root")
)

// spool appends the line to the append file of uid with one write(2). It returns an
// error unless all of the line was taken. agentThere says that the agent's queue
// holds the line already.
func spool(t Target, line []byte, uid, euid int, agentThere bool) error {
	if t.NoSpool {
		return errRemote
	}
	// O_APPEND is not atomic on network file systems (open(2)). On a disk, open(2) and
	// write(2) wait while it is frozen (fsfreeze(8), an LVM snapshot) or stalls in
	// writeback, and nothing ends that wait; statfs(2) does not wait.
	var fs syscall.Statfs_t
	if err := syscall.Statfs(t.Spool, &fs); err != nil {
		return err
	}
	switch uint32(fs.Type) {
	case tmpfsMagic, ramfsMagic:
	case nfsMagic, smbMagic, smb2Magic, cifsMagic, fuseMagic, v9fsMagic, cephMagic, afsMagic:
		return errRemote
	default:
		// Where an agent is, its queue is the better place.
		if agentThere || !t.SpoolOnDisk {
			return errDisk
		}
	}
	return t.files(uid, euid).append(line, t.SpoolMaxBytes)
}

// files names the append files of uid.
func (t Target) files(uid, euid int) files {
	f := files{name: t.Spool + "/" + strconv.Itoa(uid), euid: euid, owner: euid}
	if euid == 0 && !t.NoSpool {
		// The agent may run as another user than root, and the folder is its own:
		// what root writes there must be the agent's to read.
		var st syscall.Stat_t
		if syscall.Stat(t.Spool, &st) == nil {
			f.owner = int(st.Uid)
		}
	}
	return f
}

// files are the two append files of one uid.
type files struct {
	name  string // path without its ending
	euid  int    // who writes
	owner int    // who shall own what is made
}

// append writes line with one write(2). A short write leaves a torn line, which
// readers resynchronise at the record's marker: going on could put another
// process's record in the middle.
func (f files) append(line []byte, maxBytes int64) error {
	fd, created, err := f.open(".jsonl")
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	if created {
		// The counter of losses gets its first page while there still is one.
		if lfd, _, err := f.open(".lost"); err == nil {
			writeNoSignal(lfd, []byte{'\n'})
			syscall.Close(lfd)
		}
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Size >= maxBytes {
		return syscall.EFBIG
	}
	n, err := writeNoSignal(fd, line)
	if err == nil && n != len(line) {
		err = syscall.ENOSPC
	}
	return err
}

// countLoss appends one byte, the cause's letter, so that the size of the file tells
// how many records of this uid were lost. A tmpfs that is full still has room in a
// page it gave before.
func (f files) countLoss(cause int) bool {
	fd, _, err := f.open(".lost")
	if err != nil {
		return false
	}
	n, err := writeNoSignal(fd, []byte{Causes[cause].Letter})
	syscall.Close(fd)
	return n == 1 && err == nil
}

const (
	sysOpenat2        = 437
	resolveNoSymlinks = 0x04
	openFlags         = syscall.O_WRONLY | syscall.O_APPEND | syscall.O_NONBLOCK | syscall.O_NOFOLLOW | syscall.O_CLOEXEC | syscall.O_NOCTTY
)

// open opens a file that cannot lead elsewhere: regular, one name, owned by root, the
// caller or, for root, the folder's owner. It first tries without O_CREAT: with
// fs.protected_regular set even root gets EACCES when it opens another user's file
// in a sticky folder with O_CREAT (proc_sys_fs(5)).
func (f files) open(ending string) (fd int, created bool, err error) {
	path := f.name + ending
	fd, err = openNoLinks(path, openFlags, 0)
	if err == syscall.ENOENT {
		created = true
		fd, err = openNoLinks(path, openFlags|syscall.O_CREAT, 0o600)
	}
	if err != nil {
		return -1, false, err
	}
	if created && f.owner != f.euid {
		syscall.Fchown(fd, f.owner, -1)
	}
	var st syscall.Stat_t
	if err = syscall.Fstat(fd, &st); err == nil &&
		(st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Nlink != 1 || st.Uid != 0 && int(st.Uid) != f.euid && int(st.Uid) != f.owner) {
		err = errNoFile
	}
	if err != nil {
		syscall.Close(fd)
		return -1, false, err
	}
	return fd, created, nil
}

// openNoLinks opens path without following a symbolic link in any part of it
// (openat2(2), Linux 5.6), and on older kernels or under a seccomp profile that
// forbids openat2 not in the last part.
func openNoLinks(path string, flags int, mode uint32) (int, error) {
	fd, err := openAt2(path, flags, mode)
	if err == syscall.ENOSYS || err == syscall.EPERM {
		return syscall.Open(path, flags, mode)
	}
	return fd, err
}

func openAt2(path string, flags int, mode uint32) (int, error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	how := struct{ flags, mode, resolve uint64 }{uint64(flags), uint64(mode), resolveNoSymlinks}
	const atFdcwd = -100
	dirfd := atFdcwd
	fd, _, errno := syscall.RawSyscall6(sysOpenat2, uintptr(dirfd), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// writeNoSignal writes with SIGXFSZ ignored: at RLIMIT_FSIZE the kernel sends it to
// the writer, and it kills by default. The disposition is put back before exec. To
// ignore a signal also drops one that is pending: a caller's own stays, and is why
// nothing is touched then (it is blocked, and kills nobody); one that comes of the
// write while the caller blocks it is dropped afterwards.
func writeNoSignal(fd int, b []byte) (int, error) {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit) == nil && limit.Cur == ^uint64(0) || isPending(syscall.SIGXFSZ) {
		return syscall.Write(fd, b)
	}
	var ignore, old sigaction
	ignore.handler = 1 // SIG_IGN
	rtSigaction(syscall.SIGXFSZ, &ignore, &old)
	n, err := syscall.Write(fd, b)
	rtSigaction(syscall.SIGXFSZ, &ignore, nil)
	rtSigaction(syscall.SIGXFSZ, &old, nil)
	return n, err
}

func isPending(sig syscall.Signal) bool {
	var set uint64
	_, _, errno := syscall.RawSyscall(syscall.SYS_RT_SIGPENDING, uintptr(unsafe.Pointer(&set)), 8, 0)
	return errno == 0 && set>>(sig-1)&1 == 1
}

// sigaction is the kernel's struct on amd64; on arm64, which has no restorer, the
// kernel's is a prefix with the mask in the restorer's place. Only a round trip and
// SIG_IGN are needed of it, for which both readings agree.
type sigaction struct {
	handler, flags, restorer, mask uint64
}

func rtSigaction(sig syscall.Signal, new, old *sigaction) {
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(new)), uintptr(unsafe.Pointer(old)), 8, 0, 0)
}
