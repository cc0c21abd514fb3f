package faults

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/journal/handover"
)

// launchMark is the first argument of this test binary where it starts another program
// under a seccomp filter: launchMark, name=errno pairs, the program and its arguments.
const launchMark = "launch-under-seccomp"

// forbidden are the system calls that a filter can forbid by name.
var forbidden = map[string]uint32{
	"socket": unix.SYS_SOCKET, "connect": unix.SYS_CONNECT, "sendto": unix.SYS_SENDTO, "ppoll": unix.SYS_PPOLL,
	"openat2": unix.SYS_OPENAT2, "statfs": unix.SYS_STATFS, "faccessat": unix.SYS_FACCESSAT, "uname": unix.SYS_UNAME, "getppid": unix.SYS_GETPPID,
	"semget": unix.SYS_SEMGET, "semop": unix.SYS_SEMOP, "clock_gettime": unix.SYS_CLOCK_GETTIME, "ioctl": unix.SYS_IOCTL, "getcwd": unix.SYS_GETCWD,
	"fchown": unix.SYS_FCHOWN, "readlinkat": unix.SYS_READLINKAT,
}

// launch installs the filter on this thread and becomes the program.
func launch(args []string) {
	runtime.LockOSThread()
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // seccomp_data.nr
	for i, pair := range args {
		name, errno, ok := strings.Cut(pair, "=")
		if !ok {
			args = args[i:]
			break
		}
		value := map[string]unix.Errno{"EPERM": unix.EPERM, "ENOSYS": unix.ENOSYS, "EACCES": unix.EACCES}[errno]
		const seccompRetErrno = 0x00050000
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: forbidden[name], Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: seccompRetErrno | uint32(value)})
	}
	const seccompRetAllow = 0x7fff0000
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: seccompRetAllow})
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0)
	}
	if err == nil {
		err = syscall.Exec(args[0], args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, launchMark, err)
	os.Exit(99)
}

// TestSeccomp: a profile forbids what the shim uses. It takes the next way, and docker
// runs whatever is forbidden.
func TestSeccomp(t *testing.T) {
	require.Root(t)
	self, err := os.Executable()
	must(t, err)
	if out, err := exec.Command(self, launchMark, "semget=EPERM", "/bin/true").CombinedOutput(); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs seccomp filters: %v: %s", err, out))
	}
	for _, test := range []struct {
		forbid  string
		cases   []string
		spooled int
	}{
		{"socket=EPERM", []string{"SH-58"}, 1},
		{"socket=ENOSYS", []string{"SH-58"}, 1},
		{"socket=EACCES", []string{"SH-58"}, 1},
		{"openat2=EPERM", []string{"SH-58"}, 1},
		{"openat2=ENOSYS", []string{"SH-58"}, 1},
		{"openat2=EACCES", []string{"SH-58"}, 0},
		{"socket=EPERM openat2=EPERM", []string{"SH-58"}, 1},
		{"connect=EPERM", nil, 1},
		{"statfs=EPERM", nil, 0},
		{"faccessat=EPERM", nil, 1},
		{"uname=EPERM getppid=EPERM ioctl=EPERM getcwd=EPERM", nil, 1},
		{"clock_gettime=EPERM", nil, 1},
		{"semget=EPERM semop=EPERM openat2=EACCES", nil, 0},
		{"semget=ENOSYS statfs=EPERM", nil, 0},
		{"everything", nil, 0},
	} {
		t.Run(test.forbid, func(t *testing.T) {
			faults.Case(t, test.cases...)
			eachBuild(t, func(t *testing.T, r *rig) {
				under := append([]string{self, launchMark}, strings.Fields(test.forbid)...)
				if test.forbid == "everything" {
					under = under[:2]
					for name := range forbidden {
						under = append(under, name+"=EPERM")
					}
				}
				r.call(call{uid: 0, under: under})
				r.wantSpooled(0, test.spooled)
			})
		})
	}
	// With an agent there: sending, or waiting for its answer, is forbidden.
	for _, forbid := range []string{"sendto=EPERM", "ppoll=EPERM"} {
		t.Run(forbid, func(t *testing.T) {
			eachBuild(t, func(t *testing.T, r *rig) {
				serve(t, r.run+"/agent.sock", func(fd int) {
					receive(fd)
					unix.SendmsgN(fd, []byte{handover.AckClose}, nil, nil, unix.MSG_NOSIGNAL)
				})
				r.call(call{under: []string{self, launchMark, forbid}})
				r.wantSpooled(0, 1)
			})
		})
	}
}

// needStrace makes sure that strace can trace here.
func needStrace(t testing.TB) {
	t.Helper()
	err := exec.Command("strace", "-qq", "-o", "/dev/null", "-e", "inject=write:error=EIO:when=9999", "true").Run()
	if err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("strace cannot be used (%v): apt-get install strace, and allow ptrace", err)
	}
	faults.CannotRun(t, fmt.Sprintf("needs strace and ptrace: %v (apt-get install strace)", err))
}

// point is the n-th call of one kind that a shim makes.
type point struct {
	name string
	n    int
}

var straceLine = regexp.MustCompile(`(?m)^([a-z0-9_]+)\((.*)$`)

// points are the system calls that the shim's own code makes, from its look at its own
// file to its execve, and those of the runtime's start that read files. Without memory,
// threads and signals no Go program starts, docker neither. A close(2) that fails has
// closed all the same, which strace cannot do.
//
// strace follows no threads here: it counts for each thread alone, and would let the
// calls of those of docker fail too.
func (r *rig) points() (all []point) {
	r.t.Helper()
	trace := r.dir + "/trace"
	r.start(r.shim, call{under: []string{"strace", "-o", trace}})
	b, err := os.ReadFile(trace)
	must(r.t, err)
	must(r.t, os.Remove(trace))
	execs, own := 0, false
	count := map[string]int{}
	for _, m := range straceLine.FindAllStringSubmatch(string(b), -1) {
		name, rest := m[1], m[2]
		count[name]++
		if name == "execve" {
			if execs++; execs == 2 {
				break
			}
			continue
		}
		own = own || strings.Contains(rest, `"/proc/self/exe"`)
		switch name {
		case "mmap", "munmap", "madvise", "futex", "rt_sigprocmask", "clone", "clone3", "gettid", "sched_yield", "nanosleep", "tgkill", "rt_sigreturn", "getpid", "close":
		case "openat", "read", "prctl", "sched_getaffinity", "prlimit64", "pread64":
			all = append(all, point{name, count[name]})
		default:
			if own {
				all = append(all, point{name, count[name]})
			}
		}
	}
	if execs != 2 || len(all) < 20 {
		r.t.Fatalf("%d execve and %d points in the shim's trace:\n%s", execs, len(all), b)
	}
	return all
}

// TestEachSystemCallFails: each of the shim's system calls fails, one at a time, with
// several errors, without an agent and with one. docker starts each time.
func TestEachSystemCallFails(t *testing.T) {
	require.Root(t)
	needStrace(t)
	faults.Case(t, "SH-58")
	errnos := []string{"EPERM", "EINTR", "ENOMEM", "EMFILE", "ENOSPC", "EIO", "EAGAIN", "ENOSYS"}
	each := map[string]int{"lean": 3, "usual": 1} // of the errors at one call
	for _, build := range builds {
		for _, way := range []string{"file", "socket"} {
			t.Run(build+"/"+way, func(t *testing.T) {
				next := make(chan string)
				var wg sync.WaitGroup
				var points []point
				for i := range 3 {
					r := newRig(t, build)
					if way == "socket" {
						serve(t, r.run+"/agent.sock", func(fd int) {
							receive(fd)
							unix.SendmsgN(fd, []byte{handover.AckClose}, nil, nil, unix.MSG_NOSIGNAL)
						})
					}
					if i == 0 {
						points = r.points()
					}
					want := r.start(r.real, call{})
					wg.Go(func() {
						for inject := range next {
							// Each call makes the files anew, and so makes the same system calls.
							for _, ending := range []string{".jsonl", ".lost"} {
								os.Remove(r.spoolFile(0, ending))
							}
							trace := r.dir + "/injected"
							got := r.start(r.shim, call{under: []string{"strace", "-qq", "-o", trace, "-e", "inject=" + inject}})
							if got != want && !hitTheTool(trace) {
								t.Errorf("%s: through the shim %s\ndirectly %s", inject, got, want)
							}
						}
					})
				}
				tried := 0
				for i, p := range points {
					for j, errno := range errnos {
						// All errors at each call would be the same again and again.
						if os.Getenv("TALLYMAN_CRASH") != "all" && (i+j)%len(errnos) >= each[build] {
							continue
						}
						tried++
						next <- fmt.Sprintf("%s:error=%s:when=%d", p.name, errno, p.n)
					}
				}
				close(next)
				wg.Wait()
				t.Logf("%d system calls, %d errors", len(points), tried)
			})
		}
	}
}

// hitTheTool says that the error came behind the shim's execve: an answer that comes later
// than in the run that was counted changes the number of the shim's own calls.
func hitTheTool(trace string) bool {
	b, err := os.ReadFile(trace)
	return err == nil && bytes.LastIndex(b, []byte("(INJECTED)")) > bytes.LastIndex(b, []byte("\nexecve("))
}

// TestExecFails: the real docker is there and execve(2) fails all the same. One line,
// and 126; too long a command line is tried once more by descriptor.
func TestExecFails(t *testing.T) {
	require.Root(t)
	needStrace(t)
	faults.Case(t, "SH-64")
	eachBuild(t, func(t *testing.T, r *rig) {
		fail := func(errno string) outcome {
			return r.start(r.shim, call{under: []string{"strace", "-qq", "-o", "/dev/null", "-e", "inject=execve:error=" + errno + ":when=1"}})
		}
		for _, errno := range []string{"EACCES", "ENOEXEC", "ENOMEM", "EPERM", "ETXTBSY", "EIO", "EMFILE", "ENOENT"} {
			got := fail(errno)
			if got.status.ExitStatus() != 126 || got.stdout != "" || strings.Count(got.stderr, "\n") != 1 || !strings.Contains(got.stderr, r.real) {
				t.Errorf("%s: %s", errno, got)
			}
		}
		want := r.start(r.real, call{})
		if got := fail("E2BIG"); got != want {
			t.Errorf("E2BIG: %s, want %s", got, want)
		}
	})
}

// notGuarded are functions on the straight way to execve: where they fail, so does the
// start.
var notGuarded = regexp.MustCompile(`wrapper\.(Main|\(\*start\)\.(prepare|record)|execFilename|cString|execReal|execByDescriptor|refuse|exists|errno|Arguments|Environment|getAuxv)$|\.func\d|\.deferwrap|wrapper\.(execFilename|cString)`)

// counting are those without which nothing can be counted.
var counting = regexp.MustCompile(`handover\.(countInKernel|CountInternalError|LossKey)$|wrapper\.countInternalError$`)

// TestPanic: each function of the shim in turn is broken in the machine code of the
// built program, so that it dereferences nil. docker starts; the record is lost and
// counted; nothing of the command line or the environment appears anywhere.
func TestPanic(t *testing.T) {
	require.Root(t)
	fault := map[string][]byte{
		"amd64": {0x31, 0xc0, 0x48, 0x8b, 0x00},                   // xor eax, eax; mov rax, [rax]
		"arm64": {0xe0, 0x03, 0x1f, 0xaa, 0x00, 0x00, 0x40, 0xf9}, // mov x0, xzr; ldr x0, [x0]
	}[runtime.GOARCH]
	for _, build := range builds {
		t.Run(build, func(t *testing.T) {
			faults.Case(t, "SH-60", "SH-62", "SE-06")
			program, err := os.ReadFile(bin + "/" + build)
			must(t, err)
			file, err := elf.NewFile(bytes.NewReader(program))
			must(t, err)
			symbols, err := file.Symbols()
			must(t, err)
			text := file.Section(".text")
			r := newRig(t, build)
			cores := r.dir + "/cores"
			must(t, os.Mkdir(cores, 0o777))
			c := call{dir: cores, env: []string{"GOTRACEBACK=crash"}, under: []string{"sh", "-c", `ulimit -c unlimited; exec "$@"`, "sh"}}
			want := r.start(r.real, c)
			// What breaks before the configuration is known is counted for the default run_dir.
			byDefault := config.Default()
			counted := func() (n [2]int) {
				for i, spool := range []string{r.run + "/spool", byDefault.Spool()} {
					if _, _, errno := unix.Syscall(unix.SYS_SEMGET, uintptr(handover.LossKey(spool, 0)), 0, 0); errno == 0 {
						n[i] = kernelCounter(t, spool, 0, "internal error")
					}
				}
				return n
			}
			records := func() int {
				b, _ := os.ReadFile(r.spoolFile(0, ".jsonl"))
				return bytes.Count(b, []byte("\n"))
			}
			patch := func(at uint64, b []byte) {
				t.Helper()
				syscall.ForkLock.RLock() // see writeProgram
				defer syscall.ForkLock.RUnlock()
				f, err := os.OpenFile(r.shim, os.O_WRONLY, 0)
				must(t, err)
				_, err = f.WriteAt(b, int64(at))
				must(t, errors.Join(err, f.Close()))
			}
			broken, failed, lost := 0, 0, 0
			for _, s := range symbols {
				if elf.ST_TYPE(s.Info) != elf.STT_FUNC || !strings.HasPrefix(s.Name, "github.com/tallyman-ci/tallyman/") || int(s.Size) < len(fault) {
					continue
				}
				at := s.Value - text.Addr + text.Offset
				patch(at, fault)
				counts, lines := counted(), records()
				got := r.start(r.shim, c)
				patch(at, program[at:at+uint64(len(fault))])
				if strings.Contains(got.stdout+got.stderr, "secret-canary") {
					t.Errorf("%s: what it prints holds the command line: %s", s.Name, got)
				}
				broken++
				if notGuarded.MatchString(s.Name) {
					// A job that asks for a core of its own crash gets one.
					must(t, os.RemoveAll(cores))
					must(t, os.Mkdir(cores, 0o777))
					continue
				}
				if got != want {
					t.Errorf("%s: through the shim %s\ndirectly %s", s.Name, got, want)
				}
				if names, _ := filepath.Glob(cores + "/*"); len(names) != 0 {
					t.Errorf("%s: a core was dumped: %v", s.Name, names)
				}
				now := counted()
				panicked := now[0] > counts[0] || now[1] > counts[1]
				if panicked {
					failed++
				}
				if records() == lines {
					if lost++; !panicked && !counting.MatchString(s.Name) {
						t.Errorf("%s: no record, and no count of it", s.Name)
					}
				}
			}
			t.Logf("%d functions broken, %d of them panicked and were counted, %d cost the record", broken, failed, lost)
			if failed < 15 {
				t.Errorf("only %d of %d broken functions were run", failed, broken)
			}
		})
	}
}
