package main

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/probe/entry"
)

// failedToLaunch is the exit code of a launch that did not come to pass.
const failedToLaunch = 98

// setups are what can be changed before the start, by name; each gets the text behind
// "NAME=".
var setups = map[string]func(l *start, v string) error{
	"argv0": func(l *start, v string) error { l.args[0] = v; return nil },
	"argc":  func(l *start, v string) error { l.args = l.args[:number(v)]; return nil },
	// fill=N adds arguments until they, their terminators and their pointers are N bytes.
	"fill":    func(l *start, v string) error { l.fill(number(v)); return nil },
	"arg":     func(l *start, v string) error { l.args = append(l.args, v); return nil },
	"longest": func(l *start, v string) error { l.args = append(l.args, strings.Repeat("x", 131071)); return nil },
	"noenv":   func(l *start, v string) error { l.env = nil; return nil },
	"env":     func(l *start, v string) error { l.env = append(l.env, v); return nil },

	"umask":  func(_ *start, v string) error { syscall.Umask(octal(v)); return nil },
	"cwd":    func(_ *start, v string) error { return os.Chdir(v) },
	"chroot": func(_ *start, v string) error { return first(syscall.Chroot(v), syscall.Chdir("/")) },
	"goneCwd": func(_ *start, v string) error {
		return first(os.Mkdir(v, 0o755), os.Chdir(v), os.Remove(v))
	},
	"lockedCwd": func(_ *start, v string) error { // a parent may no longer be read
		return first(os.MkdirAll(v+"/below", 0o755), os.Chdir(v+"/below"), os.Chmod(v, 0))
	},
	// limit=NOFILE:soft:hard, where "hard" is the hard one as it is
	"limit": func(_ *start, v string) error {
		f := strings.Split(v, ":")
		resource := slices.Index(limits, f[0])
		var now unix.Rlimit
		err := unix.Prlimit(0, resource, nil, &now)
		return first(err, unix.Prlimit(0, resource, &unix.Rlimit{Cur: limitValue(f[1], now.Max), Max: limitValue(f[2], now.Max)}, nil))
	},

	"close": func(l *start, v string) error { l.closed = append(l.closed, number(v)); return nil },
	// open=FD:FLAGS:OFFSET:PATH
	"open": func(_ *start, v string) error {
		f := strings.SplitN(v, ":", 4)
		fd, err := unix.Open(f[3], number(f[1])|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		unix.Seek(fd, int64(number(f[2])), 0)
		return become(fd, number(f[0]))
	},
	"cloexec":  func(_ *start, v string) error { unix.CloseOnExec(number(v)); return nil },
	"nonblock": func(_ *start, v string) error { return unix.SetNonblock(number(v), true) },
	"pipe": func(_ *start, v string) error { // whose other end is closed
		var p [2]int
		return first(unix.Pipe2(p[:], unix.O_CLOEXEC), become(p[0], number(v)))
	},

	"ignore": func(_ *start, v string) error { return action(number(v), 1) },
	"block":  func(_ *start, v string) error { return block(number(v)) },
	"pending": func(_ *start, v string) error {
		return first(block(number(v)), unix.Kill(unix.Getpid(), syscall.Signal(number(v))))
	},
	"itimer": func(_ *start, v string) error {
		_, err := unix.Setitimer(unix.ItimerWhich(number(v)), unix.Itimerval{Interval: unix.Timeval{Sec: 700}, Value: unix.Timeval{Sec: 900}})
		return err
	},

	"setsid":  func(*start, string) error { _, err := unix.Setsid(); return err },
	"setpgid": func(*start, string) error { return unix.Setpgid(0, 0) },
	// ids=uid:gid:group,group
	"ids": func(_ *start, v string) error {
		f := strings.Split(v, ":")
		var groups []int
		for _, g := range strings.Split(f[2], ",") {
			groups = append(groups, number(g))
		}
		gid, uid := number(f[1]), number(f[0])
		return first(raw(unix.SYS_SETGROUPS, uintptr(len(groups)), pointer(int32s(groups))),
			raw(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)), raw(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)))
	},
	// prctl=OPTION:VALUE
	"prctl": func(_ *start, v string) error {
		f := strings.Split(v, ":")
		return unix.Prctl(number(f[0]), uintptr(number(f[1])), 0, 0, 0)
	},
	"inheritable": func(_ *start, v string) error { // for ambient capabilities
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		err := unix.Capget(&h, &d[0])
		d[0].Inheritable |= 1 << number(v)
		return first(err, unix.Capset(&h, &d[0]), unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(number(v)), 0, 0))
	},
	"seccomp": func(*start, string) error { // personality(2) gets EPERM, everything else is let through
		filter := []unix.SockFilter{
			{Code: 0x20, K: 0}, {Code: 0x15, K: unix.SYS_SETHOSTNAME, Jf: 1},
			{Code: 0x06, K: unix.SECCOMP_RET_ERRNO | 1}, {Code: 0x06, K: unix.SECCOMP_RET_ALLOW},
		}
		p := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		return first(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&p)), 0, 0))
	},
	"nice":   func(_ *start, v string) error { return unix.Setpriority(unix.PRIO_PROCESS, 0, number(v)) },
	"ioprio": func(_ *start, v string) error { return raw(unix.SYS_IOPRIO_SET, 1, 0, uintptr(number(v))) },
	// policy=POLICY:PRIORITY
	"policy": func(_ *start, v string) error {
		f := strings.Split(v, ":")
		return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: uint32(number(f[0])), Priority: uint32(number(f[1]))}, 0)
	},
	"cpu": func(_ *start, v string) error {
		var set unix.CPUSet
		set.Set(number(v))
		return unix.SchedSetaffinity(0, &set)
	},
	"mempolicy":   func(_ *start, v string) error { return raw(unix.SYS_SET_MEMPOLICY, uintptr(number(v)), 0, 0) },
	"personality": func(_ *start, v string) error { return raw(unix.SYS_PERSONALITY, uintptr(number(v)), 0, 0) },
	"unshare":     func(_ *start, v string) error { return unix.Unshare(number(v)) },
	// write=PATH:TEXT
	"write": func(_ *start, v string) error {
		path, text, _ := strings.Cut(v, ":")
		return os.WriteFile(path, []byte(text), 0)
	},
}

var limits = []string{"CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"}

// A start is what execve(2) will get.
type start struct {
	path      string
	args, env []string
	closed    []int
}

func launch(args []string) int {
	sep := slices.Index(args, "--")
	l := &start{path: args[sep+1], args: slices.Clone(args[sep+1:]), env: environ()}
	// Package syscall raised this one when it was initialised.
	unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: entry.OpenFiles, Max: entry.OpenFilesMax}, nil)
	// The same start everywhere: a test's parent may ignore or block signals.
	for n := 1; n <= 64; n++ {
		action(n, 0)
	}
	var none uint64
	const setMask = 2
	raw6(unix.SYS_RT_SIGPROCMASK, setMask, uintptr(unsafe.Pointer(&none)), 0, 8)
	for _, setup := range args[:sep] {
		name, value, _ := strings.Cut(setup, "=")
		if err := setups[name](l, value); err != nil {
			fmt.Fprintf(os.Stderr, "launch: %s: %v\n", setup, err)
			return failedToLaunch
		}
	}
	path, _ := syscall.BytePtrFromString(l.path)
	argv, _ := syscall.SlicePtrFromStrings(l.args)
	envv, _ := syscall.SlicePtrFromStrings(l.env)
	kept := -1
	for _, fd := range l.closed { // last: what is above opens files
		if fd == 2 {
			kept, _ = unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 1000)
		}
		unix.Close(fd)
	}
	// Not syscall.Exec, which changes the limit of open files once more.
	_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
	if kept >= 0 {
		unix.Dup3(kept, 2, 0)
	}
	fmt.Fprintf(os.Stderr, "launch: execve: %s\n", unix.ErrnoName(errno))
	return failedToLaunch
}

// environ is the environment as it is: os.Environ drops empty and repeated variables.
func environ() []string {
	b, _ := os.ReadFile("/proc/self/environ")
	var all []string
	for entry := range bytes.SplitSeq(bytes.TrimSuffix(b, []byte{0}), []byte{0}) {
		all = append(all, string(entry))
	}
	return all
}

func (l *start) fill(size int) {
	const pointer = 8
	for _, arg := range l.args {
		size -= len(arg) + 1 + pointer
	}
	for size > 0 {
		n := min(size, 100<<10) - 1 - pointer
		if rest := size - n - 1 - pointer; rest > 0 && rest <= 1+pointer {
			n -= 1 + pointer + 1 // leave room for one more
		}
		if n < 0 {
			break
		}
		l.args = append(l.args, strings.Repeat("y", n))
		size -= n + 1 + pointer
	}
}

// become makes fd the descriptor to, which execve(2) leaves open.
func become(fd, to int) error {
	if fd == to {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
		return err
	}
	return unix.Dup3(fd, to, 0)
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func number(s string) int {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		panic(err)
	}
	return int(n)
}

func octal(s string) int {
	n, _ := strconv.ParseInt(s, 8, 32)
	return int(n)
}

func limitValue(s string, hard uint64) uint64 {
	switch s {
	case "unlimited":
		return unix.RLIM_INFINITY
	case "hard":
		return hard
	}
	return uint64(number(s))
}

func raw(trap uintptr, args ...uintptr) error {
	args = append(args, 0, 0, 0)
	// A raw call concerns this thread alone, which is the only one.
	if _, _, errno := unix.RawSyscall(trap, args[0], args[1], args[2]); errno != 0 {
		return errno
	}
	return nil
}

func int32s(all []int) []int32 {
	var out []int32
	for _, v := range all {
		out = append(out, int32(v))
	}
	return out
}

func pointer(v []int32) uintptr { return uintptr(unsafe.Pointer(&v[0])) }

func block(sig int) error {
	set := uint64(1) << (sig - 1)
	const sigBlock = 0
	return raw6(unix.SYS_RT_SIGPROCMASK, sigBlock, uintptr(unsafe.Pointer(&set)), 0, 8)
}

func action(sig int, handler uint64) error {
	a := [4]uint64{handler}
	return raw6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&a)), 0, 8)
}

func raw6(trap, a, b, c, d uintptr) error {
	if _, _, errno := unix.RawSyscall6(trap, a, b, c, d, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
