// Package probe tells all that a program can see of how it was started, so that a
// direct start and one through the shim can be compared: run a program that calls
// Collect in the place of docker, once directly and once behind the shim, and give
// both states to Compare.
//
// A State holds no value of an environment variable. Of the environment there are the
// number of variables, the size and a digest; arguments are spelled out while they
// are short.
//
// Go's runtime changes some things before main, in every program: it catches signals
// that were ignored, unblocks some, and opens /dev/null in the place of closed standard
// descriptors. A probe built as usual does not see those, and neither does docker,
// which is a Go program too. One built with internal/leanbuild sees nearly all of them.
package probe

import (
	"crypto/sha256"
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

// A State is what a program sees of its start: names of properties, as they can stand in
// a table, and their values. A property that cannot be seen here (no /proc, an old
// kernel) is left out.
type State map[string]string

// A Difference is one property that is not the same. A side that does not have it at all
// is Absent.
type Difference struct {
	Name    string `json:"name"`
	Direct  string `json:"direct"`
	Through string `json:"through"`
}

// Absent stands for a property that one side does not have.
const Absent = "(absent)"

// Properties that differ between any two runs and are not compared. Where the caller
// knows what they have to be, it can look for itself.
var volatile = []string{"pid", "parent pid", "process group", "session"}

// Compare returns what is not the same, by name.
func Compare(direct, through State) []Difference {
	names := map[string]bool{}
	for name := range direct {
		names[name] = true
	}
	for name := range through {
		names[name] = true
	}
	var all []Difference
	for name := range names {
		if slices.Contains(volatile, name) {
			continue
		}
		d, dok := direct[name]
		t, tok := through[name]
		if !dok {
			d = Absent
		}
		if !tok {
			t = Absent
		}
		if d != t {
			all = append(all, Difference{name, d, t})
		}
	}
	slices.SortFunc(all, func(a, b Difference) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// Collect returns the state of this process. Call it first in main, before anything is
// opened, and with the main goroutine locked to its thread (runtime.LockOSThread in an
// init function) where the program is built as usual: capabilities, priority and the
// like belong to threads.
func Collect() State {
	s := State{}
	s.descriptors() // first: what follows opens files
	s.start()
	s.identity()
	s.limits()
	s.processStatus()
	s.scheduling()
	s.attributes()
	s.terminal()
	return s
}

func (s State) set(name string, format string, args ...any) {
	s[name] = fmt.Sprintf(format, args...)
}

// start is what execve(2) was given, and where.
func (s State) start() {
	s.set("number of arguments", "%d", len(os.Args))
	s["arguments"] = short(os.Args)
	if b, ok := read("/proc/self/environ"); ok {
		n := strings.Count(b, "\x00")
		s.set("environment", "%d variables, %d bytes, %s", n, len(b), digest(b))
	} else {
		all := runtimeEnvirons()
		b := strings.Join(all, "\x00")
		s.set("environment", "%d variables, %s", len(all), digest(b))
	}
	if wd, err := os.Readlink("/proc/self/cwd"); err == nil {
		s["working directory"] = strconv.Quote(wd)
	} else if wd, err := syscall.Getwd(); err == nil {
		s["working directory"] = strconv.Quote(wd)
	} else {
		s["working directory"] = err.Error()
	}
	var st syscall.Stat_t
	if err := syscall.Stat(".", &st); err == nil {
		s.set("working directory's inode", "%d:%d", st.Dev, st.Ino)
	} else {
		s["working directory's inode"] = err.Error()
	}
	if err := syscall.Stat("/", &st); err == nil {
		s.set("root directory", "%d:%d", st.Dev, st.Ino)
	}
	if exe, err := os.Readlink("/proc/self/exe"); err == nil {
		s["executable (/proc/self/exe)"] = strconv.Quote(exe)
	}
	var name [16]byte
	if unix.Prctl(unix.PR_GET_NAME, uintptr(unsafe.Pointer(&name)), 0, 0, 0) == nil {
		s["process name (comm)"] = strconv.Quote(unix.ByteSliceToString(name[:]))
	}
	for name, v := range auxiliary() {
		s[name] = v
	}
}

// auxiliary returns what the auxiliary vector says beside addresses, getauxval(3).
func auxiliary() map[string]string {
	all := map[string]string{}
	vector := auxv()
	for i := 0; i+1 < len(vector); i += 2 {
		switch v := vector[i+1]; vector[i] {
		case 31:
			all["path that was executed (AT_EXECFN)"] = strconv.Quote(cString(v))
		case 23:
			all["secure mode (AT_SECURE)"] = strconv.Itoa(int(v))
		}
	}
	return all
}

func cString(p uintptr) string {
	return unix.BytePtrToString(*(**byte)(unsafe.Pointer(&p))) // the kernel put it above the stack
}

func (s State) identity() {
	s.set("pid", "%d", os.Getpid())
	s.set("parent pid", "%d", os.Getppid())
	pgid, _ := unix.Getpgid(0)
	sid, _ := unix.Getsid(0)
	s.set("process group", "%d", pgid)
	s.set("session", "%d", sid)
	s.set("leads its process group", "%v", pgid == os.Getpid())
	s.set("leads its session", "%v", sid == os.Getpid())
	r, e, v := unix.Getresuid()
	s.set("user ids", "%d %d %d", r, e, v)
	r, e, v = unix.Getresgid()
	s.set("group ids", "%d %d %d", r, e, v)
	if groups, err := unix.Getgroups(); err == nil {
		s.set("supplementary groups", "%v", groups)
	}
}

var limitNames = []string{"CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"}

func (s State) limits() {
	for i, name := range limitNames {
		var l unix.Rlimit
		if unix.Prlimit(0, i, nil, &l) != nil {
			continue
		}
		if name == "NOFILE" {
			l.Cur, l.Max = entry.OpenFiles, entry.OpenFilesMax
		}
		s["limit "+name] = limit(l.Cur) + " " + limit(l.Max)
	}
}

func limit(v uint64) string {
	if v == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strconv.FormatUint(v, 10)
}

// statusNames are the lines of /proc/self/status that are compared, and what they are.
var statusNames = map[string]string{
	"Umask": "umask", "Groups": "", "CapInh": "capabilities, inheritable", "CapPrm": "capabilities, permitted", "CapEff": "capabilities, effective",
	"CapBnd": "capabilities, bounding", "CapAmb": "capabilities, ambient", "NoNewPrivs": "no_new_privs", "Seccomp": "seccomp mode",
	"Seccomp_filters": "seccomp filters", "Speculation_Store_Bypass": "speculation, store bypass", "SpeculationIndirectBranch": "speculation, indirect branch",
	"SigPnd": "signals pending, thread", "ShdPnd": "signals pending, process", "SigBlk": "signals blocked", "SigIgn": "signals ignored",
	"SigCgt": "signals caught", "Cpus_allowed": "processor affinity", "Mems_allowed": "memory nodes", "THP_enabled": "transparent huge pages",
	"TracerPid": "traced by", "Threads": "",
}

func (s State) processStatus() {
	status, ok := read("/proc/self/status")
	if !ok {
		mask := syscall.Umask(0)
		syscall.Umask(mask)
		s.set("umask", "%04o", mask)
		return
	}
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		if name := statusNames[key]; name != "" {
			s[name] = strings.TrimSpace(value)
		}
	}
}

func (s State) scheduling() {
	if prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil {
		s.set("nice", "%d", 20-prio)
	}
	const ioprioWhoProcess = 1
	if v, _, errno := unix.RawSyscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, 0, 0); errno == 0 {
		s.set("I/O priority", "%#x", v)
	}
	if a, err := unix.SchedGetAttr(0, 0); err == nil {
		s.set("scheduling", "policy %d, flags %#x, priority %d, runtime %d, deadline %d, period %d", a.Policy, a.Flags, a.Priority, a.Runtime, a.Deadline, a.Period)
	}
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) == nil {
		var cpus []int
		for i := range len(set) * int(unsafe.Sizeof(set[0])) * 8 {
			if set.IsSet(i) {
				cpus = append(cpus, i)
			}
		}
		s.set("processors", "%v", cpus)
	}
	var mode int32
	if _, _, errno := unix.RawSyscall6(unix.SYS_GET_MEMPOLICY, uintptr(unsafe.Pointer(&mode)), 0, 0, 0, 0, 0); errno == 0 {
		s.set("memory policy", "%d", mode)
	}
	for i, name := range []string{"real", "virtual", "profiling"} {
		if it, err := unix.Getitimer(unix.ItimerWhich(i)); err == nil {
			// The rest of the first period passes by itself.
			s.set("interval timer, "+name, "armed %v, interval %d us", it.Value.Sec != 0 || it.Value.Usec != 0, it.Interval.Nano()/1e3)
		}
	}
	s.set("timer slack", "%d ns", entry.TimerSlack)
}

// attributes are those of prctl(2), of /proc/self and of personality(2).
func (s State) attributes() {
	s.set("parent-death signal", "%d", entry.ParentDeathSignal)
	for name, option := range map[string]int{"dumpable": unix.PR_GET_DUMPABLE, "keep capabilities": unix.PR_GET_KEEPCAPS, "secure bits": unix.PR_GET_SECUREBITS,
		"transparent huge pages disabled": unix.PR_GET_THP_DISABLE, "I/O flusher": unix.PR_GET_IO_FLUSHER, "machine check policy": unix.PR_MCE_KILL_GET,
		"deny write and execute": unix.PR_GET_MDWE} {
		if v, err := unix.PrctlRetInt(option, 0, 0, 0, 0); err == nil {
			s.set(name, "%d", v)
		}
	}
	for name, option := range map[string]int{"child subreaper": unix.PR_GET_CHILD_SUBREAPER, "time stamp counter": unix.PR_GET_TSC} {
		var v int32
		if unix.Prctl(option, uintptr(unsafe.Pointer(&v)), 0, 0, 0) == nil {
			s.set(name, "%d", v)
		}
	}
	if v, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0); errno == 0 {
		s.set("personality", "%#x", v)
	}
	for name, path := range map[string]string{"out-of-memory score": "oom_score_adj", "core dump filter": "coredump_filter", "control groups": "cgroup",
		"login uid": "loginuid", "security label": "attr/current"} {
		if v, ok := read("/proc/self/" + path); ok {
			s[name] = strconv.Quote(strings.TrimRight(v, "\n\x00"))
		}
	}
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"} {
		if v, err := os.Readlink("/proc/self/ns/" + ns); err == nil {
			s["namespace "+ns] = v
		}
	}
}

// terminal is the controlling one and what standard input is.
func (s State) terminal() {
	if stat, ok := read("/proc/self/stat"); ok {
		// pid (comm) state ppid pgrp session tty_nr tpgid; comm may hold anything.
		f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
		s["controlling terminal"] = f[4]
		s.set("in the terminal's foreground", "%v", f[2] == f[5])
	}
	for fd := range 3 {
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			continue
		}
		s.set(fmt.Sprintf("terminal settings of descriptor %d", fd), "%x %x %x %x %x %x", t.Iflag, t.Oflag, t.Cflag, t.Lflag, t.Line, t.Cc)
		if ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil {
			s.set(fmt.Sprintf("window size of descriptor %d", fd), "%d x %d", ws.Col, ws.Row)
		}
	}
}

// read returns a file of /proc whole.
func read(path string) (string, bool) {
	b, err := os.ReadFile(path)
	return string(b), err == nil
}

// short spells arguments out, or says how long they are.
func short(args []string) string {
	if q := fmt.Sprintf("%q", args); len(q) <= 4096 {
		return q
	}
	all := strings.Join(args, "\x00")
	return fmt.Sprintf("%d bytes, %s", len(all), digest(all))
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return fmt.Sprintf("sha256 %x", sum[:8])
}

// auxv is the auxiliary vector as the kernel passed it.
//
//go:linkname auxv runtime.getAuxv
func auxv() []uintptr

// runtimeEnvirons is the environment as the kernel passed it, where there is no /proc.
//
//go:linkname runtimeEnvirons syscall.runtime_envs
func runtimeEnvirons() []string
