package wrapper

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/probe"
	"github.com/tallyman-ci/tallyman/internal/ptytest"
)

// nobody is a user id that no process of this machine has.
const nobody = "54321"

// signals that the kernel lets a program ignore or block.
var allSignals = func() (all []int) {
	for n := 1; n <= 64; n++ {
		if n != int(unix.SIGKILL) && n != int(unix.SIGSTOP) {
			all = append(all, n)
		}
	}
	return all
}()

// cases are all ways of starting docker that are compared.
func (st *stage) cases() []*transparencyCase {
	all := []*transparencyCase{
		{name: "plainly", ways: []way{lean, leanAgent, usual, usualAgent}},
		{name: "with an agent on Linux before 5.3", ways: []way{leanOldAgent}, run: runUntilAnswered},

		{name: "odd arguments", ids: []string{"SH-21"}, args: []string{"", "a b", "\xff\xfe\x80", "*", "--", "\n", "-", "=", "\u2028", "\x01\x1b[2J"}, run: runForArguments},
		{name: "no argument but the name", sees: map[string]string{"number of arguments": "1"}},
		{name: "an empty argument vector", setup: []string{"argc=0"}, sees: map[string]string{"arguments": `[""]`}},
		{name: "an empty argv[0]", setup: []string{"argv0="}, sees: map[string]string{"arguments": `[""]`}},
		{name: "another argv[0]", setup: []string{"argv0=-odd/name \xff"}, sees: map[string]string{"arguments": `["-odd/name \xff"]`}},
		{name: "the longest argument", setup: []string{"longest="}, sees: map[string]string{"number of arguments": "2"}},
		{name: "10,000 arguments", setup: slices.Repeat([]string{"arg="}, 10000), sees: map[string]string{"number of arguments": "10001"}},
		{name: "1 MB of arguments", setup: []string{"fill=1000000"}, sees: map[string]string{"number of arguments": "11"}},

		{name: "odd variables", ids: []string{"SH-21"}, setup: []string{"env=A=1", "env=A=2", "env=EMPTY=", "env=NOEQUALS", "env=", "env=BIN=\xff\xfe", "env=GITHUB_WORKFLOW=\xff\n\x1b[2J", "env==x", "env=A=1"}},
		{name: "no variables", setup: []string{"noenv="}, sees: map[string]string{"environment": "0 variables, 0 bytes, " + emptyDigest}},
		{name: "variables of the Go runtime", setup: []string{"env=GODEBUG=panicnil=1,asyncpreemptoff=1", "env=GOGC=off", "env=GOMAXPROCS=1", "env=GOTRACEBACK=crash", "env=GOMEMLIMIT=1MiB"}},
		{name: "a long variable", setup: []string{"env=GITHUB_WORKFLOW=" + strings.Repeat("w", 60000)}},

		{name: "umask 0", ids: []string{"SH-42"}, setup: []string{"umask=0"}, sees: map[string]string{"umask": "0000"}},
		{name: "umask 0777", ids: []string{"SH-42"}, setup: []string{"umask=0777"}, sees: map[string]string{"umask": "0777"}},
		{name: "in another folder", setup: []string{"cwd=/usr"}, sees: map[string]string{"working directory": `"/usr"`}},
		{name: "in a folder that is gone", ids: []string{"SH-42"}, setup: []string{"goneCwd=STAGE/gone"}, sees: map[string]string{"working directory": `"/dev/shm/` + filepath.Base(st.dir) + `/gone (deleted)"`}, varies: []string{"working directory's inode"}},
		{name: "in a folder that cannot be read", root: true, setup: []string{"lockedCwd=STAGE/locked", "ids=" + nobody + ":" + nobody + ":5"},
			after: func(t *testing.T, st *stage) { os.Chmod(st.dir+"/locked", 0o755) }},

		{name: "open files 3 of 3", ids: []string{"SH-32"}, setup: []string{"limit=NOFILE:3:3"}, sees: map[string]string{"limit NOFILE": "3 3"}, lost: true},
		{name: "open files 3 of 4096", ids: []string{"SH-31"}, setup: []string{"limit=NOFILE:3:4096"}, sees: map[string]string{"limit NOFILE": "3 4096"}},
		{name: "open files 1024 of 4096", ids: []string{"SH-31"}, setup: []string{"limit=NOFILE:1024:4096"}, sees: map[string]string{"limit NOFILE": "1024 4096"}},
		{name: "open files 1024 of 1024", ids: []string{"SH-31"}, setup: []string{"limit=NOFILE:1024:1024"}, sees: map[string]string{"limit NOFILE": "1024 1024"}},
		{name: "open files 4096 of 4096", ids: []string{"SH-31"}, setup: []string{"limit=NOFILE:4096:4096"}, sees: map[string]string{"limit NOFILE": "4096 4096"}},
		{name: "file size 0", ids: []string{"SH-30"}, setup: []string{"limit=FSIZE:0:0"}, sees: map[string]string{"limit FSIZE": "0 0"}, lost: true},
		{name: "file size 0 and SIGXFSZ blocked", ids: []string{"SH-30"}, setup: []string{"limit=FSIZE:0:0", "block=25"}, sees: map[string]string{"signals blocked": "0000000001000000"}, lost: true},
		{name: "file size 0 and SIGXFSZ ignored", ids: []string{"SH-30"}, setup: []string{"limit=FSIZE:0:0", "ignore=25"}, sees: map[string]string{"signals ignored": "0000000001000000"}, lost: true},
		{name: "stack of 256 KB", setup: []string{"limit=STACK:262144:262144"}, sees: map[string]string{"limit STACK": "262144 262144"}},
		{name: "stack without limit", setup: []string{"limit=STACK:unlimited:hard"}},
		{name: "all other limits", setup: []string{"limit=CPU:100:200", "limit=DATA:2000000000:3000000000", "limit=CORE:0:5", "limit=RSS:70000:80000", "limit=NPROC:9000:9001",
			"limit=MEMLOCK:1:2", "limit=LOCKS:10:20", "limit=SIGPENDING:50:60", "limit=MSGQUEUE:1000:2000", "limit=NICE:0:0", "limit=RTPRIO:0:0", "limit=RTTIME:300000:400000"},
			sees: map[string]string{"limit CPU": "100 200", "limit RTTIME": "300000 400000"}},

		{name: "more descriptors", setup: []string{"open=5:0:3:/etc/passwd", "open=9:02101:0:STAGE/appended", "pipe=7", "open=63:0:0:/", "open=400:0:0:/dev/null"}},
		{name: "descriptors that close", setup: []string{"open=5:0:3:/etc/passwd", "open=6:0:0:/etc/passwd", "cloexec=5"}},
		{name: "descriptors that do not wait", setup: []string{"pipe=0", "pipe=8", "nonblock=0", "nonblock=8", "nonblock=1"}},

		{name: "a session of its own", setup: []string{"setpgid=", "setsid="}, can: nil, sees: nil, run: runLeader},
		{name: "a process group of its own", setup: []string{"setpgid="}, sees: map[string]string{"leads its process group": "true", "leads its session": "false"}},
		{name: "a parent-death signal", ids: []string{"SH-40"}, setup: []string{fmt.Sprintf("prctl=%d:12", unix.PR_SET_PDEATHSIG)}, sees: map[string]string{"parent-death signal": "12"}},
		{name: "another user and groups", root: true, setup: []string{"ids=" + nobody + ":54322:5,7,54399"}, sees: map[string]string{"user ids": "54321 54321 54321", "supplementary groups": "[5 7 54399]"}},
		{name: "no new privileges", ids: []string{"SH-42"}, setup: []string{fmt.Sprintf("prctl=%d:1", unix.PR_SET_NO_NEW_PRIVS)}, sees: map[string]string{"no_new_privs": "1"}},
		{name: "secure bits", root: true, setup: []string{fmt.Sprintf("prctl=%d:4", unix.PR_SET_SECUREBITS)}, sees: map[string]string{"secure bits": "4"}},
		{name: "ambient capabilities", root: true, setup: []string{"inheritable=10", "prctl=28:4", "ids=" + nobody + ":5:5", "inheritable=13"}, can: nil, run: runAmbient},
		{name: "a seccomp filter", ids: []string{"SH-42"}, setup: []string{"seccomp="}, sees: map[string]string{"seccomp mode": "2"}},
		{name: "child subreaper and no huge pages", setup: []string{fmt.Sprintf("prctl=%d:1", unix.PR_SET_CHILD_SUBREAPER), fmt.Sprintf("prctl=%d:1", unix.PR_SET_THP_DISABLE)},
			sees: map[string]string{"child subreaper": "1", "transparent huge pages disabled": "1"}},
		{name: "not dumpable before", setup: []string{fmt.Sprintf("prctl=%d:0", unix.PR_SET_DUMPABLE)}},
		{name: "timer slack", setup: []string{fmt.Sprintf("prctl=%d:77000", unix.PR_SET_TIMERSLACK)}, sees: map[string]string{"timer slack": "77000 ns"}},
		{name: "core dump filter and out-of-memory score", setup: []string{"write=/proc/self/coredump_filter:0x11", "write=/proc/self/oom_score_adj:321"}, sees: map[string]string{"out-of-memory score": `"321"`}},

		{name: "nice", ids: []string{"SH-42"}, setup: []string{"nice=7"}, sees: map[string]string{"nice": "7"}},
		{name: "I/O priority", ids: []string{"SH-42"}, setup: []string{"ioprio=0x4005"}, sees: map[string]string{"I/O priority": "0x4005"}},
		{name: "idle I/O priority", ids: []string{"SH-42"}, setup: []string{"ioprio=0x6007"}, sees: map[string]string{"I/O priority": "0x6007"}},
		{name: "batch scheduling", setup: []string{"policy=3:0"}},
		{name: "idle scheduling", setup: []string{"policy=5:0"}},
		{name: "real-time scheduling", root: true, setup: []string{"policy=2:3"}},
		{name: "one processor", ids: []string{"SH-42"}, setup: []string{"cpu=" + firstProcessor()}, sees: map[string]string{"processors": "[" + firstProcessor() + "]"}},
		{name: "local memory policy", setup: []string{"mempolicy=4"}, sees: map[string]string{"memory policy": "4"}},
		{name: "personality", setup: []string{"personality=0x0040000"}, sees: map[string]string{"personality": "0x40000"}},
		{name: "interval timers", setup: []string{"itimer=0", "itimer=1", "itimer=2"}, sees: map[string]string{"interval timer, real": "armed true, interval 700000000 us"}},
		{name: "name spaces", root: true, setup: []string{fmt.Sprintf("unshare=%d", unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWNET|unix.CLONE_NEWNS)}, run: runNamespaces},

		{name: "called by a relative path", path: "../bin/docker"},
		{name: "called by a descriptor", setup: []string{"open=5:0x80000:0:STAGE/bin/docker"}, path: "/dev/fd/5", can: needsDevFd, varies: []string{"descriptor 5"}},
		{name: "called through a link in a folder", path: "STAGE/link/docker"},
		{name: "PATH with a dot and a stranger's docker.original here", ids: []string{"SH-52"}, setup: []string{"cwd=STAGE/strange", "env=PATH=.:"}, path: "../bin/docker"},

		{name: "exit codes", ids: []string{"SH-36"}, run: runExitCodes},
		{name: "death by signals", ids: []string{"SH-37"}, run: runDeaths},
		{name: "job control in a terminal", ids: []string{"SH-39"}, can: func(t *testing.T) { ptytest.Require(t) }, run: runTerminal},
		{name: "ignored signals", ids: []string{"SH-41"}, run: signalCase("ignore", "SigIgn")},
		{name: "blocked signals", ids: []string{"SH-41"}, run: signalCase("block", "SigBlk")},
		{name: "pending signals", ids: []string{"SH-41"}, run: signalCase("pending", "ShdPnd")},
	}
	for mask := 1; mask < 8; mask++ {
		c := &transparencyCase{file: true, sees: map[string]string{}, setup: []string{"env=CLOSED=1"}, ways: []way{lean, leanAgent, usual}}
		for fd := range 3 {
			if mask>>fd&1 == 1 {
				c.setup = append(c.setup, fmt.Sprintf("close=%d", fd))
				c.sees[fmt.Sprintf("descriptor %d", fd)] = "closed"
				c.name += fmt.Sprintf(" and %d", fd)
			}
		}
		c.name = "closed descriptors" + strings.TrimPrefix(c.name, " and")
		all = append(all, c)
	}
	return append(append(all, st.limitCases()...), st.starvedCases()...)
}

var emptyDigest = fmt.Sprintf("sha256 %x", sha256.Sum256(nil))[:7+16]

// firstProcessor is one that this process may use.
func firstProcessor() string {
	var set unix.CPUSet
	unix.SchedGetaffinity(0, &set)
	for i := 0; ; i++ {
		if set.IsSet(i) || i == 1023 {
			return strconv.Itoa(i)
		}
	}
}

func needsDevFd(t *testing.T) {
	if _, err := os.Stat("/dev/fd/0"); errors.Is(err, os.ErrNotExist) {
		faults.CannotRun(t, "needs /dev/fd")
	}
}

// runForArguments gives odd arguments to the probe, which would take some for commands.
func runForArguments(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	plain := *c
	plain.run, plain.args, plain.setup = nil, nil, nil
	for _, arg := range c.args {
		plain.setup = append(plain.setup, "arg="+arg)
	}
	s := st.start(t, &plain)
	if want := fmt.Sprintf("%q", append([]string{st.docker}, c.args...)); s["arguments"] != want {
		t.Errorf("%s: arguments %s, want %s", w.name, s["arguments"], want)
	}
	return s
}

// runLeader starts docker as the leader of a session; a leader of a group cannot become
// one by setsid(2), so the parent does it.
func runLeader(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	s := st.startAs(t, nil, &syscall.SysProcAttr{Setsid: true})
	if s["leads its session"] != "true" {
		t.Errorf("%s: leads its session: %s", w.name, s["leads its session"])
	}
	return s
}

// runAmbient starts docker as an unprivileged user with one ambient capability.
func runAmbient(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	s := st.startAs(t, nil, &syscall.SysProcAttr{AmbientCaps: []uintptr{unix.CAP_NET_BIND_SERVICE}, Credential: &syscall.Credential{Uid: 54321, Gid: 54321}})
	if s["capabilities, ambient"] != "0000000000000400" {
		t.Errorf("%s: ambient capabilities %s", w.name, s["capabilities, ambient"])
	}
	return s
}

// runNamespaces unshares once for all ways, because each unshare makes other ones.
func runNamespaces(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	plain := *c
	plain.run = nil
	s := st.start(t, &plain)
	own := st.start(t, &transparencyCase{})
	for _, ns := range []string{"uts", "ipc", "net", "mnt"} {
		if s["namespace "+ns] == own["namespace "+ns] {
			t.Errorf("%s: the %s name space was not left", w.name, ns)
		}
		delete(s, "namespace "+ns)
	}
	return s
}

// startAs starts docker without the launcher's setup, by attributes that Go's own fork
// knows.
func (st *stage) startAs(t *testing.T, setup []string, attr *syscall.SysProcAttr) probe.State {
	t.Helper()
	cmd := st.command(setup, st.docker)
	cmd.SysProcAttr = attr
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); errors.Is(err, syscall.EPERM) {
		faults.CannotRun(t, "cannot be set up: "+err.Error())
	} else if err != nil {
		t.Fatalf("%v: %s", err, out.Bytes())
	}
	return parseState(t, out.Bytes())
}

// runUntilAnswered repeats the start until the agent answered in the 3 ms that the shim
// waits, which on a busy machine it does not always.
func runUntilAnswered(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	plain := *c
	plain.run = nil
	var s probe.State
	for deadline := time.Now().Add(time.Minute); ; {
		s = st.start(t, &plain)
		if w.agent == 0 || strings.HasPrefix(s["descriptor 3"]+s["descriptor 4"], "socket") || time.Now().After(deadline) {
			return s
		}
	}
}

// inParallel calls f for each number, two at a time.
func inParallel(numbers []int, f func(n int)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, 2)
	for _, n := range numbers {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			f(n)
		})
	}
	wg.Wait()
}

// states collects properties of concurrent runs.
type states struct {
	sync.Mutex
	probe.State
}

func (s *states) put(name, value string) {
	s.Lock()
	defer s.Unlock()
	s.State[name] = value
}

func runExitCodes(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	all := states{State: probe.State{}}
	codes := make([]int, 256)
	for i := range codes {
		codes[i] = i
	}
	inParallel(codes, func(n int) {
		cmd := exec.Command(st.docker, "exit", strconv.Itoa(n))
		cmd.Run()
		if cmd.ProcessState.ExitCode() != n {
			t.Errorf("%s: exit code %d became %v", w.name, n, cmd.ProcessState)
		}
		all.put(fmt.Sprintf("exit code %d", n), fmt.Sprintf("%#x", cmd.ProcessState.Sys().(syscall.WaitStatus)))
	})
	return all.State
}

// runDeaths lets docker die by each signal that does not stop. The wait status holds
// whether a core was dumped.
func runDeaths(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	all := states{State: probe.State{}}
	var numbers []int
	for n := 1; n <= 64; n++ {
		if n < int(unix.SIGSTOP) || n > int(unix.SIGTTOU) {
			numbers = append(numbers, n)
		}
	}
	inParallel(numbers, func(n int) {
		dir, err := os.MkdirTemp(st.dir, "death") // where a core may be dumped
		if err != nil {
			t.Error(err)
			return
		}
		defer os.RemoveAll(dir)
		cmd := st.command([]string{"limit=CORE:hard:hard", "cwd=" + dir}, st.docker, "kill", strconv.Itoa(n))
		if out, _ := cmd.CombinedOutput(); len(out) > 0 {
			t.Errorf("%s: signal %d: %s", w.name, n, out)
		}
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		switch unix.Signal(n) {
		case unix.SIGCHLD, unix.SIGCONT, unix.SIGURG, unix.SIGWINCH:
		default:
			if !status.Signaled() || int(status.Signal()) != n {
				t.Errorf("%s: signal %d became %v", w.name, n, cmd.ProcessState)
			}
		}
		all.put(fmt.Sprintf("signal %d", n), fmt.Sprintf("%#x", status))
	})
	return all.State
}

// signalCase sets up each signal alone, and all at once, and reads what came of it in
// /proc/self/status by cat, which has no runtime that could change it. It returns the
// signals that are as they were set up.
func signalCase(setup, field string) func(*testing.T, *stage, *transparencyCase, way) probe.State {
	return func(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
		t.Helper()
		st.place(t, w, "cat")
		see := func(signals ...int) uint64 {
			var setups []string
			for _, n := range signals {
				setups = append(setups, fmt.Sprintf("%s=%d", setup, n))
			}
			cmd := st.command(setups, st.docker, "/proc/self/status")
			out, err := cmd.Output()
			if err != nil {
				// A signal that was pending struck: that is an answer too.
				return 0
			}
			for line := range strings.Lines(string(out)) {
				if key, value, _ := strings.Cut(line, ":"); key == field {
					mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
					if err != nil {
						t.Error(err)
					}
					return mask
				}
			}
			t.Errorf("no %s in %q", field, out)
			return 0
		}
		none := see()
		all := states{State: probe.State{}}
		var changed []int
		inParallel(allSignals, func(n int) {
			if mask := see(n); mask&^none == 1<<(n-1) || mask == none && none>>(n-1)&1 == 1 {
				all.Lock()
				changed = append(changed, n)
				all.Unlock()
			}
		})
		slices.Sort(changed)
		if w.build == "" && len(changed) < len(allSignals)-3 { // SIGCONT and ignored ones do not stay pending
			t.Fatalf("%s is set up for %v only", setup, changed)
		}
		all.put("each signal", fmt.Sprint(changed))
		all.put("all signals", fmt.Sprintf("%#x", see(allSignals...)))
		return all.State
	}
}

// limitCases are about the size of arguments and environment, which the kernel limits
// together with the path: docker.original is longer than docker.
func (st *stage) limitCases() []*transparencyCase {
	around := func(stack, path string, sizes []int, setup ...string) func(*testing.T, *stage, *transparencyCase, way) probe.State {
		most := 0 // that works directly; found once
		return func(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
			t.Helper()
			path := strings.ReplaceAll(path, "STAGE", st.dir)
			see := func(size int) string {
				cmd := st.command(append(append([]string{"limit=STACK:" + stack + ":hard", "cwd=" + st.dir + "/bin"}, setup...), fmt.Sprintf("fill=%d", size)), path)
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				out, err := cmd.Output()
				if err != nil {
					return strings.TrimSpace(stderr.String())
				}
				return parseState(t, out)["arguments"]
			}
			const refused = "launch: execve: E2BIG"
			if most == 0 {
				// A quarter of the stack, at least 128 KB and at most 6 MB (execve(2)).
				high := 6 << 20
				if n, err := strconv.Atoi(stack); err == nil {
					high = max(n/4, 128<<10)
				}
				low := high - 8192
				for _, s := range setup {
					low -= len(s) + 8
				}
				at := see(low)
				mustBeSetUp(t, at)
				if at == refused || see(high) != refused {
					t.Fatalf("the limit of arguments is not between %d and %d", low, high)
				}
				for high-low > 1 {
					if middle := (low + high) / 2; see(middle) == refused {
						high = middle
					} else {
						low = middle
					}
				}
				most = low
			}
			all := states{State: probe.State{}}
			inParallel(sizes, func(d int) { all.put(fmt.Sprintf("%+d bytes", d), see(most+d)) })
			if all.State["+0 bytes"] == refused || all.State["+1 bytes"] != refused {
				t.Fatalf("%s: the limit of %d bytes moved: %v", w.name, most, all.State)
			}
			return all.State
		}
	}
	var each []int
	for d := -12; d <= 2; d++ {
		each = append(each, d)
	}
	some := []int{-10, -9, -1, 0, 1}
	return []*transparencyCase{
		{name: "arguments up to the limit", ids: []string{"SH-19"}, run: around("8388608", "STAGE/bin/docker", each)},
		{name: "arguments up to the limit of a small stack", ids: []string{"SH-19"}, run: around("262144", "STAGE/bin/docker", each)},
		{name: "arguments up to the limit of a stack without limit", ids: []string{"SH-19"}, run: around("unlimited", "STAGE/bin/docker", some)},
		{name: "arguments and variables up to the limit", ids: []string{"SH-19"}, run: around("8388608", "STAGE/bin/docker", some, slices.Repeat([]string{"env=X=" + strings.Repeat("v", 100000)}, 12)...)},
		{name: "arguments up to the limit, called by ./docker", ids: []string{"SH-19"}, run: around("262144", "./docker", each)},
	}
}

// starvedCases are those in which a usual Go program, as docker is, cannot even start.
// The probe, built as usual, shows how docker
// fares; cat shows how a tool in C does.
func (st *stage) starvedCases() []*transparencyCase {
	jail := []string{"chroot=" + st.dir + "/jail"}
	all := []*transparencyCase{
		{name: "no /proc", ids: []string{"SH-27"}, root: true, setup: jail, path: "/bin/docker", sees: map[string]string{"root directory": inode(st.dir + "/jail")}},
		{name: "no /proc, called by a relative path", ids: []string{"SH-27"}, root: true, setup: append(jail, "cwd=/run"), path: "../bin/docker"},
	}
	for _, c := range []transparencyCase{
		{name: "no /dev/null and standard input closed", ids: []string{"SH-29"}, root: true, setup: append(jail, "close=0"), path: "/bin/docker"},
		{name: "200 MB of address space", ids: []string{"SH-33"}, setup: []string{"limit=AS:200000000:200000000"}, lost: true},
		{name: "one process for a user", ids: []string{"SH-34"}, root: true, setup: []string{"limit=NPROC:1:1", "ids=" + nobody + ":" + nobody + ":5"}, lost: true},
		{name: "a control group with one process", ids: []string{"SH-35"}, root: true, setup: []string{"write=CGROUP/cgroup.procs:0"}, lost: true, run: runInCgroup("pids", "pids.max", "pids.max", "1")},
		{name: "a control group with 16 MB", ids: []string{"SH-35"}, root: true, setup: []string{"write=CGROUP/cgroup.procs:0"}, lost: true, run: runInCgroup("memory", "memory.max", "memory.limit_in_bytes", "16777216")},
	} {
		goTool, cTool := c, c
		goTool.tool = "probe-usual"
		goTool.name += ", tool in Go"
		goTool.run = exitOnly(c.run)
		goTool.lost = true // where the usual shim cannot start, no more than the tool can
		cTool.name += ", tool in C"
		if !slices.ContainsFunc(c.setup, func(s string) bool { return strings.HasPrefix(s, "chroot=") }) {
			cTool.tool, cTool.args = "cat", []string{"/proc/self/limits"}
		} // else there is no libc, and the lean probe starts as a tool in C does
		all = append(all, &goTool, &cTool)
	}
	return all
}

// exitOnly compares how docker ended: where a Go program cannot start it prints the stack
// of its threads, which is never the same twice.
func exitOnly(run func(*testing.T, *stage, *transparencyCase, way) probe.State) func(*testing.T, *stage, *transparencyCase, way) probe.State {
	return func(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
		t.Helper()
		plain := *c
		plain.run = nil
		plain.args = []string{"exit", "9"}
		see := st.start
		if run != nil {
			see = func(t *testing.T, c *transparencyCase) probe.State { return run(t, st, c, w) }
		}
		s := see(t, &plain)
		return probe.State{"exit status": s["exit status"]}
	}
}

// runInCgroup starts docker in a control group of its own with one limit.
func runInCgroup(controller, fileV2, fileV1, limit string) func(*testing.T, *stage, *transparencyCase, way) probe.State {
	return func(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
		t.Helper()
		dir, err := makeCgroup(controller, fileV2, fileV1, limit)
		if err != nil {
			faults.CannotRun(t, "needs a control group with "+controller+": "+err.Error())
		}
		defer func() {
			// A process that was waited for may be in the group for a moment more.
			err := os.Remove(dir)
			for deadline := time.Now().Add(time.Minute); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = os.Remove(dir) {
				time.Sleep(5 * time.Millisecond)
			}
			if err != nil {
				t.Error(err)
			}
		}()
		plain := *c
		plain.run = nil
		plain.setup = []string{"write=" + dir + "/cgroup.procs:0"}
		s := st.start(t, &plain)
		return s
	}
}

// makeCgroup makes a group below the one of this process, in the hierarchy that has the
// controller.
func makeCgroup(controller, fileV2, fileV1, limit string) (string, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	err = errors.New("no hierarchy has it")
	for line := range strings.Lines(string(own)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		root, file := "/sys/fs/cgroup/"+controller, fileV1
		if f[1] == "" {
			root, file = "/sys/fs/cgroup", fileV2
			if _, err := os.Stat(root + "/unified"); err == nil {
				root += "/unified"
			}
		} else if !slices.Contains(strings.Split(f[1], ","), controller) {
			continue
		}
		for _, parent := range []string{root + f[2], root} { // in a container, the path may be the host's
			dir := filepath.Join(parent, "shim-"+strconv.Itoa(os.Getpid()))
			if err = os.Mkdir(dir, 0o755); err != nil {
				continue
			}
			// Not os.WriteFile, which would make the file where there is no such limit.
			var f *os.File
			if f, err = os.OpenFile(dir+"/"+file, os.O_WRONLY, 0); err == nil {
				_, err = f.WriteString(limit)
				f.Close()
			}
			if err == nil {
				return dir, nil
			}
			os.Remove(dir)
		}
	}
	return "", err
}

func inode(path string) string {
	var st syscall.Stat_t
	syscall.Stat(path, &st)
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
