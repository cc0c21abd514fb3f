package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
)

// How the end of a command was seen (record.End's Source), from best to worst.
const (
	byInfo    = "pidfd_info"
	byPoll    = "pidfd_poll"
	byEOF     = "socket_eof"
	byNothing = "unknown"
)

// agentProcess is an agent that a test starts, stops and kills as it likes.
type agentProcess struct {
	r    *rig
	cmd  *exec.Cmd
	done chan struct{}
}

// newAgent starts the agent with what change does to its command, and waits until it
// listens.
func (r *rig) newAgent(change func(cmd *exec.Cmd)) *agentProcess {
	r.t.Helper()
	cmd := exec.Command(r.inst.Tallyman(), "agent", "--no-events")
	cmd.Env = r.runner.Env
	cmd.Dir = "/"
	if change != nil {
		change(cmd)
	}
	awayFromOtherShims(cmd)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	a := &agentProcess{r: r, cmd: cmd, done: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(a.done)
	}()
	r.t.Cleanup(func() { a.stop() })
	eventually(r.t, time.Minute, func() error {
		select {
		case <-a.done:
			return fmt.Errorf("the agent ended: %s", output.String())
		default:
			return r.agentAnswers()
		}
	})
	return a
}

// awayFromOtherShims keeps an agent from the counters of losses that all shims of the
// machine, those of other tests too, keep in the kernel.
func awayFromOtherShims(cmd *exec.Cmd) {
	if os.Geteuid() == 0 {
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.Unshareflags |= syscall.CLONE_NEWIPC
	}
}

func (a *agentProcess) stop() {
	select {
	case <-a.done:
		return
	default:
	}
	a.cmd.Process.Signal(syscall.SIGCONT)
	a.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-a.done:
	case <-time.After(time.Minute):
		a.kill()
		a.r.t.Error("the agent did not end on SIGTERM")
	}
}

func (a *agentProcess) kill() {
	a.cmd.Process.Kill()
	<-a.done
}

// tool makes a script the real docker of the rig.
func (r *rig) tool(script string) {
	r.t.Helper()
	stub, err := os.Readlink(r.inst.Shim() + ".original")
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(stub, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

// aCall is a running call of the shim.
type aCall struct {
	r     *rig
	cmd   *exec.Cmd
	image string // by which its record is known
	begun time.Time
	done  chan struct{} // closed when it was reaped
}

// begin starts a call of `docker run` with further arguments, and reaps it when it ends.
func (r *rig) begin(change func(cmd *exec.Cmd), args ...string) *aCall {
	r.t.Helper()
	c := r.beginUnreaped(change, args...)
	go c.reap()
	return c
}

func (r *rig) beginUnreaped(change func(cmd *exec.Cmd), args ...string) *aCall {
	r.t.Helper()
	r.begun++
	c := &aCall{r: r, image: fmt.Sprintf("call/number-%d", r.begun), begun: time.Now(), done: make(chan struct{})}
	c.cmd = exec.Command(r.inst.Shim(), append([]string{"run", "--rm", c.image}, args...)...)
	c.cmd.Args[0] = "docker"
	c.cmd.Env = r.runner.Env
	c.cmd.Dir = "/"
	if change != nil {
		change(c.cmd)
	}
	if err := c.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		select {
		case <-c.done:
		default:
			c.cmd.Process.Kill()
		}
	})
	return c
}

func (c *aCall) reap() {
	c.cmd.Wait()
	close(c.done)
}

// record waits for the call's record.
func (c *aCall) record() record.Record {
	c.r.t.Helper()
	var found record.Record
	eventually(c.r.t, time.Minute, func() error {
		for _, inv := range ofKind(c.r.records(), record.KindInvocation) {
			if slices.Contains(inv.Invocation.Images, c.image) {
				found = inv
				return nil
			}
		}
		return errors.New("the call is not in the account")
	})
	return found
}

func (r *rig) endsOf(id string) []record.Record {
	r.t.Helper()
	return slices.DeleteFunc(ofKind(r.records(), record.KindInvocationEnd), func(e record.Record) bool { return e.End.InvocationID != id })
}

// told is what an end says, in one line.
func told(e *record.End) string {
	code := "unknown"
	if e.ExitCode != nil {
		code = strconv.FormatInt(*e.ExitCode, 10)
	}
	return fmt.Sprintf("%s: exit code %s, signal %d, %v", e.Source, code, e.Signal, time.Duration(e.DurationNS))
}

// ending is what a test knows of the end of a call.
type ending struct {
	source  string
	code    int64 // exit code; not asked for where the source tells none
	signal  int64
	atLeast time.Duration
	atMost  time.Duration // 0 is no bound
	bound   bool          // the duration is an upper bound
}

// want waits for the one end of the call.
func (c *aCall) want(w ending) {
	c.r.t.Helper()
	e := c.end()
	d := time.Duration(e.DurationNS)
	ok := e.Source == w.source && (d > 0) == (w.source != byNothing) && (!w.bound || e.AtMost) && d >= w.atLeast && (w.atMost == 0 || d <= w.atMost)
	if w.source != byInfo {
		ok = ok && e.ExitCode == nil && e.Signal == 0
	} else if w.signal != 0 {
		ok = ok && e.ExitCode == nil && e.Signal == w.signal
	} else {
		ok = ok && e.ExitCode != nil && *e.ExitCode == w.code && e.Signal == 0
	}
	if !ok {
		c.r.t.Errorf("%s\n got %s\nwant %+v", c.image, told(e), w)
	}
}

// end waits for the one end of the call.
func (c *aCall) end() (e *record.End) {
	c.r.t.Helper()
	id := c.record().ID
	eventually(c.r.t, time.Minute, func() error {
		found := c.r.endsOf(id)
		if len(found) == 0 {
			return errors.New("the call has no end in the account")
		}
		if len(found) > 1 {
			c.r.t.Fatalf("%d ends of one call", len(found))
		}
		e = found[0].End
		return nil
	})
	return e
}

// best is what this kernel tells an agent in the same pid namespace.
func best(t *testing.T) string {
	t.Helper()
	if exitCodesKnown(t) {
		return byInfo
	}
	fmt.Fprintf(os.Stderr, "\n*** %s: this kernel tells no exit codes (they need Linux 6.15); they are not asserted ***\n\n", t.Name())
	return byPoll
}

func TestEndBySignal(t *testing.T) {
	faults.Case(t, "EN-03")
	r := newStubRig(t)
	// The shell kills itself; the last argument is the signal.
	r.tool(`for last; do :; done; kill -"$last" $$; while :; do sleep 1; done`)
	r.newAgent(nil)
	var limit unix.Rlimit // no core files, here and in the children
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		t.Fatal(err)
	}
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 0, Max: limit.Max})
	defer unix.Setrlimit(unix.RLIMIT_CORE, &limit)
	calls := map[int]*aCall{}
	for sig := 1; sig <= 64; sig++ {
		switch syscall.Signal(sig) {
		case syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGURG, syscall.SIGWINCH, // ignored
			syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, // stop
			32, 33: // the C library's own, which no shell sends
			continue
		}
		c := r.begin(nil, strconv.Itoa(sig))
		<-c.done
		if got := c.cmd.ProcessState.Sys().(syscall.WaitStatus); !got.Signaled() || got.Signal() != syscall.Signal(sig) {
			t.Fatalf("signal %d: docker ended with %v", sig, c.cmd.ProcessState)
		}
		calls[sig] = c
	}
	source := best(t)
	for sig, c := range calls {
		c.want(ending{source: source, signal: int64(sig)})
	}
}

// A plugin, or whatever else docker started, that goes on after docker: the end is
// docker's, though the child holds every descriptor that docker had.
func TestEndIsNotThatOfWhatDockerLeftBehind(t *testing.T) {
	faults.Case(t, "EN-02")
	r := newStubRig(t)
	child := r.leavesAChild(4)
	r.newAgent(nil)
	c := r.begin(nil)
	<-c.done
	defer child()
	c.want(ending{source: best(t), code: 4}) // comes, while the child is there
}

// leavesAChild makes docker start a child that stays, and exit with a code. What it
// returns ends the child.
func (r *rig) leavesAChild(code int) (end func()) {
	file := filepath.Join(r.inst.Dir, "child")
	r.tool(fmt.Sprintf(`sleep 3600 >/dev/null 2>&1 & echo $! >%s; exit %d`, file, code))
	end = func() {
		if b, err := os.ReadFile(file); err == nil {
			os.Remove(file)
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	r.t.Cleanup(end)
	return end
}

// A parent that does not wait for docker: the end is known when docker ends, its exit
// code when the parent has waited.
func TestEndOfAZombie(t *testing.T) {
	faults.Case(t, "EN-04")
	t.Parallel()
	r := newStubRig(t)
	agent := r.newAgent(nil)
	late, never := r.beginUnreaped(nil, "code-5"), r.beginUnreaped(nil, "code-6")
	defer never.reap()
	var ended time.Duration
	eventually(t, time.Minute, func() error {
		for _, c := range []*aCall{late, never} {
			if state := processState(c.cmd.Process.Pid); state != "Z" {
				return fmt.Errorf("docker is in state %q", state)
			}
		}
		ended = time.Since(late.begun)
		return nil
	})
	late.record()
	never.record()
	const reapedAfter = 4 * time.Second
	time.Sleep(reapedAfter) // this is the fault
	late.reap()
	late.want(ending{source: best(t), code: 5, atMost: ended + reapedAfter})
	agent.stop()
	never.want(ending{source: byPoll, atMost: ended + reapedAfter})
}

func processState(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return string(b[bytes.LastIndexByte(b, ')')+2:][:1])
}

// The kernel tells the exit code to the process's own pid namespace and to those above
// it, and the end to everybody.
func TestEndAcrossPidNamespaces(t *testing.T) {
	faults.Case(t, "EN-05")
	if os.Geteuid() != 0 {
		require.Missing(t, "root, to make pid namespaces")
	}
	own := func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID} }
	for _, row := range []struct {
		name        string
		agent, call func(cmd *exec.Cmd)
		source      string
	}{
		{"docker below the agent's", nil, own, best(t)},
		{"docker above the agent's", own, nil, byPoll},
		{"docker and agent beside each other", own, own, byPoll},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newStubRig(t)
			r.newAgent(row.agent)
			r.begin(row.call, "code-6").want(ending{source: row.source, code: 6})
		})
	}
}

// deny are system calls that an older kernel does not have, with its answer.
type deny struct {
	info, peer, open syscall.Errno // PIDFD_GET_INFO, SO_PEERPIDFD, pidfd_open; 0 lets the call through
}

// linux52 knows no pidfds.
var linux52 = deny{info: syscall.ENOTTY, peer: syscall.ENOPROTOOPT, open: syscall.ENOSYS}

const denyVariable = "TALLYMAN_E2E_DENY"

func (d deny) change(cmd *exec.Cmd) {
	cmd.Args = append([]string{os.Args[0], "-test.run=^TestHelperOlderKernel$", "--", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = os.Args[0]
	cmd.Env = append(slices.Clone(cmd.Env), "TALLYMAN_E2E_BIN="+built, fmt.Sprintf("%s=%d,%d,%d", denyVariable, d.info, d.peer, d.open))
	if !filepath.IsAbs(cmd.Path) {
		if abs, err := filepath.Abs(cmd.Path); err == nil {
			cmd.Path = abs
		}
	}
}

// TestHelperOlderKernel is no test: it becomes the program behind "--", which then runs
// as on an older kernel.
func TestHelperOlderKernel(t *testing.T) {
	var d deny
	if n, err := fmt.Sscanf(os.Getenv(denyVariable), "%d,%d,%d", &d.info, &d.peer, &d.open); n != 3 || err != nil {
		return // among the tests
	}
	runtime.LockOSThread()
	if err := d.install(); err != nil {
		fmt.Fprintln(os.Stderr, "seccomp:", err)
		os.Exit(1)
	}
	os.Unsetenv(denyVariable)
	args := os.Args[slices.Index(os.Args, "--")+1:]
	fmt.Fprintln(os.Stderr, args, syscall.Exec(args[0], args, os.Environ()))
	os.Exit(1)
}

// install makes a seccomp filter (seccomp(2)) for this process and those it becomes.
func (d deny) install() error {
	const (
		number, argument1, argument2 = 0, 16 + 8, 16 + 16 // offsets in struct seccomp_data; the lower half of an argument on little-endian machines
		load, equal, answer          = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
		allow, fail                  = 0x7fff0000, 0x00050000 // SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
		getInfo, soPeerPIDFD         = 0xC040FF0B, 77
	)
	var p []unix.SockFilter
	step := func(code uint16, k uint32, no uint8) { p = append(p, unix.SockFilter{Code: code, Jf: no, K: k}) }
	if d.info != 0 {
		step(load, number, 0)
		step(equal, unix.SYS_IOCTL, 3)
		step(load, argument1, 0)
		step(equal, getInfo, 1)
		step(answer, fail|uint32(d.info), 0)
	}
	if d.peer != 0 {
		step(load, number, 0)
		step(equal, unix.SYS_GETSOCKOPT, 5)
		step(load, argument1, 0)
		step(equal, unix.SOL_SOCKET, 3)
		step(load, argument2, 0)
		step(equal, soPeerPIDFD, 1)
		step(answer, fail|uint32(d.peer), 0)
	}
	if d.open != 0 {
		step(load, number, 0)
		step(equal, unix.SYS_PIDFD_OPEN, 1)
		step(answer, fail|uint32(d.open), 0)
	}
	step(answer, allow, 0)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	const setModeFilter, tsync = 1, 1
	program := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, tsync, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return errno
	}
	return nil
}

// Each rung of the ladder, as a kernel gives it that has not what is above.
func TestEndOnOlderKernels(t *testing.T) {
	faults.Case(t, "EN-06")
	for _, row := range []struct {
		name   string
		deny   deny
		source string
	}{
		{"Linux 6.14 knows PIDFD_GET_INFO and no exit code", deny{info: syscall.EINVAL}, byPoll},
		{"Linux 6.12 does not know PIDFD_GET_INFO", deny{info: syscall.ENOTTY}, byPoll},
		{"Linux 6.4 does not know SO_PEERPIDFD", deny{info: syscall.ENOTTY, peer: syscall.ENOPROTOOPT}, byPoll},
		{"Linux 5.2 does not know pidfds", linux52, byEOF},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newStubRig(t)
			child := r.leavesAChild(3)
			r.newAgent(row.deny.change)
			for try := 1; ; try++ {
				c := r.begin(nil)
				<-c.done
				if row.source == byPoll {
					c.want(ending{source: byPoll}) // comes, while the child is there
					break
				}
				// The child holds the socket: the duration is an upper bound, and no less.
				gone := time.Now()
				c.record()
				time.Sleep(time.Second)
				held := time.Since(gone)
				child()
				if e := c.end(); e.Source == byNothing && try < 20 {
					continue // a busy machine: the answer came too late, and the socket was not kept
				}
				c.want(ending{source: byEOF, atLeast: held, bound: true})
				break
			}
		})
	}
}

// The agent needs no privilege: it is nobody's parent and traces nobody.
func TestEndForAnUnprivilegedAgent(t *testing.T) {
	faults.Case(t, "EN-07")
	if os.Geteuid() != 0 {
		require.Missing(t, "root, to become other users")
	}
	as := func(uid uint32) func(cmd *exec.Cmd) {
		return func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		}
	}
	r := newStubRig(t)
	if err := os.MkdirAll(r.inst.State(), 0o755); err != nil {
		t.Fatal(err)
	}
	stub, err := os.Readlink(r.inst.Shim() + ".original")
	if err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(stub); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{r.inst.Run, r.inst.Spool(), r.inst.State()} {
		if err := os.Chown(dir, 2000, 2000); err != nil {
			t.Fatal(err)
		}
	}
	agent := r.newAgent(as(2000))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agent.cmd.Process.Pid))
	if err != nil || !strings.Contains(string(status), "CapEff:\t0000000000000000\n") {
		t.Fatalf("the agent has privileges: %v\n%s", err, status)
	}
	for i, uid := range []uint32{0, 1001, 2000} {
		c := r.begin(as(uid), fmt.Sprintf("code-%d", 10+i))
		c.want(ending{source: best(t), code: int64(10 + i)})
		if got := c.record().Invocation.UID; got != int64(uid) {
			t.Errorf("uid %d, want %d", got, uid)
		}
	}
}

// A call from before the agent, by the append file: its end is seen where it still runs.
func TestEndOfACallBeforeTheAgent(t *testing.T) {
	faults.Case(t, "EN-08")
	t.Parallel() // it waits for most of its time
	r := newStubRig(t)
	r.tool(`for last; do :; done; [ "$last" = stays ] || exit 3; trap 'exit 7' TERM; while :; do sleep 0.05; done`)
	gone, running := r.begin(nil), r.begin(nil, "stays")
	<-gone.done
	eventually(t, time.Minute, func() error { // both are in the file
		b, err := os.ReadFile(filepath.Join(r.inst.Spool(), strconv.Itoa(os.Getuid())+".jsonl"))
		if n := bytes.Count(b, []byte("\n")); err != nil || n != 2 {
			return fmt.Errorf("%d records in the append file: %v", n, err)
		}
		return nil
	})
	r.newAgent(nil)
	running.record()
	running.cmd.Process.Signal(syscall.SIGTERM)
	running.want(ending{source: best(t), code: 7})
	gone.want(ending{source: byNothing})
}

// An agent that is killed, or stopped, in the middle of a command: the next one, or the
// same, tells its end.
func TestEndWhileTheAgentIsAway(t *testing.T) {
	faults.Case(t, "EN-09")
	// It ends when it is told to.
	const tool = `trap 'exit 7' TERM; while :; do sleep 0.05; done`
	for _, row := range []struct {
		name string
		end  func(a *agentProcess)
	}{
		{"killed", (*agentProcess).kill},
		{"asked to end", (*agentProcess).stop},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newStubRig(t)
			r.tool(tool)
			agent := r.newAgent(nil)
			outlives, ends := r.begin(nil), r.begin(nil)
			outlives.record()
			ends.record()
			begun := time.Now()
			row.end(agent)
			ends.cmd.Process.Signal(syscall.SIGTERM)
			<-ends.done
			away := time.Since(begun)
			r.newAgent(nil)
			ends.want(ending{source: byNothing})
			outlives.cmd.Process.Signal(syscall.SIGTERM)
			outlives.want(ending{source: best(t), code: 7, atLeast: away})
		})
	}
	stopped := func(t *testing.T, change func(*exec.Cmd)) (known, unknown *aCall) {
		r := newStubRig(t)
		r.tool(tool)
		agent := r.newAgent(change)
		known = r.begin(nil)
		known.record()
		agent.cmd.Process.Signal(syscall.SIGSTOP)
		defer agent.cmd.Process.Signal(syscall.SIGCONT)
		eventually(t, time.Minute, func() error {
			if state := processState(agent.cmd.Process.Pid); state != "T" {
				return fmt.Errorf("the agent is in state %q", state)
			}
			return nil
		})
		unknown = r.begin(nil) // its record waits in the socket, and in the file
		eventually(t, time.Minute, func() error {
			b, err := os.ReadFile(filepath.Join(r.inst.Spool(), strconv.Itoa(os.Getuid())+".jsonl"))
			if err != nil || !bytes.Contains(b, []byte(unknown.image)) {
				return fmt.Errorf("no second copy in the append file: %v", err)
			}
			return nil
		})
		for _, c := range []*aCall{known, unknown} {
			c.cmd.Process.Signal(syscall.SIGTERM)
			<-c.done
		}
		agent.cmd.Process.Signal(syscall.SIGCONT)
		return known, unknown
	}
	t.Run("stopped and continued", func(t *testing.T) {
		known, unknown := stopped(t, nil)
		known.want(ending{source: best(t), code: 7})
		// SO_PEERPIDFD gives the pidfd of a reaped process from Linux 6.16 on.
		if kernelAtLeast(t, 6, 16) {
			unknown.want(ending{source: byInfo, code: 7, bound: true})
		}
	})
	// The shim closed the socket when it waited no longer: nobody's end.
	t.Run("stopped and continued on Linux 5.2", func(t *testing.T) {
		_, unknown := stopped(t, linux52.change)
		unknown.want(ending{source: byNothing})
	})
}
