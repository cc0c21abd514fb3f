// Package faults runs the built shim with faults that are real: full and frozen file
// systems, servers that hang, calls that fail, agents that are hostile or stopped. Its
// tests name the cases of the catalogue that they prove (internal/faults).
//
// Whatever the fault, the shim answers for three things, which rig.call checks each
// time beside what the case states:
//
//	T0  the tool gets and gives what a direct start would
//	T1  it starts within a bound; the tests look for hangs, with generous limits
//	T2  nothing on standard output, and on standard error at most one line, where the
//	    tool cannot be started
package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// bin holds the programs under test: lean and usual (the shim with either runtime),
// real, tallyman.
var bin string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == launchMark {
		launch(os.Args[2:])
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tallyman-faults-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// build makes the programs. Under sudo, the caller does: what root builds would lie
// in the caller's build cache as root's.
func build(dir string) error {
	var as *syscall.Credential
	if uid, err := strconv.Atoi(os.Getenv("SUDO_UID")); err == nil && os.Getuid() == 0 && uid != 0 {
		gid, _ := strconv.Atoi(os.Getenv("SUDO_GID"))
		as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			return err
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	// The symbols stay in the shims: one test breaks their functions by name.
	for _, args := range [][]string{
		{"run", "../../internal/leanbuild", "-require", "-ldflags", "", "-o", dir + "/lean", "../../cmd/docker-shim"},
		{"build", "-o", dir + "/usual", "../../cmd/docker-shim"},
		{"build", "-o", dir + "/real", "./testdata/real"},
		{"build", "-o", dir + "/tallyman", "../../cmd/tallyman"},
	} {
		if built := os.Getenv("TALLYMAN_E2E_BIN"); built != "" && filepath.Base(args[len(args)-1]) == "tallyman" {
			if err := os.Symlink(filepath.Join(built, "tallyman"), dir+"/tallyman"); err != nil {
				return err
			}
			continue
		}
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// builds are the two ways in which the shim is made.
var builds = []string{"lean", "usual"}

// job is a uid other than root, as jobs have.
const job = 1001

// rig is an installation before a stand-in for docker.
type rig struct {
	t               testing.TB
	dir, shim, real string // on a tmpfs that is the rig's own
	run             string // run_dir
}

// newRig installs one build of the shim. lines are added to its configuration.
func newRig(t testing.TB, build string, lines ...string) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "faults")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	r := &rig{t: t, dir: dir, shim: dir + "/docker", real: dir + "/docker.original", run: dir + "/run"}
	byDefault := config.Default() // for what fails before the configuration is read
	t.Cleanup(func() { removeCounters(t, r.run+"/spool"); removeCounters(t, byDefault.Spool()) })
	must(t, os.Chmod(dir, 0o755))
	copyFile(t, bin+"/"+build, r.shim)
	copyFile(t, bin+"/real", r.real)
	r.makeSpool()
	r.configure(lines...)
	return r
}

// removeCounters removes what shims counted in the kernel of losses of this spool.
func removeCounters(t testing.TB, spool string) {
	t.Helper()
	b, err := os.ReadFile("/proc/sysvipc/sem")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		var key, id, mode, n, uid, gid, creator int
		if _, err := fmt.Sscan(line, &key, &id, &mode, &n, &uid, &gid, &creator); err == nil && int32(key) == handover.LossKey(spool, creator) {
			if _, _, errno := syscall.Syscall(syscall.SYS_SEMCTL, uintptr(id), 0, 0); errno != 0 && errno != syscall.EINVAL { // IPC_RMID
				t.Errorf("remove the counters of uid %d: %v", creator, errno)
			}
		}
	}
}

// makeSpool makes the folders below run_dir as an installation does.
func (r *rig) makeSpool() {
	r.t.Helper()
	must(r.t, os.MkdirAll(r.run, 0o755))
	must(r.t, os.Mkdir(r.run+"/spool", 0o755))
	must(r.t, os.Chmod(r.run+"/spool", 0o733|os.ModeSticky))
}

func (r *rig) configure(lines ...string) {
	r.t.Helper()
	text := "run_dir = " + r.run + "\nstate_dir = " + r.dir + "/state\nstatsd = off\n" + strings.Join(lines, "\n") + "\n"
	must(r.t, os.WriteFile(r.dir+"/tallyman.conf", []byte(text), 0o644))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	writeProgram(t, to, b)
}

// writeProgram writes a program that is to be executed. A process that another test
// starts meanwhile would hold the file open for writing (ETXTBSY).
func writeProgram(t testing.TB, path string, b []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	must(t, os.WriteFile(path, b, 0o755))
}

// eachBuild runs f with both builds of the shim.
func eachBuild(t *testing.T, f func(t *testing.T, r *rig)) {
	for _, build := range builds {
		t.Run(build, func(t *testing.T) { f(t, newRig(t, build)) })
	}
}

// call is a call of docker.
type call struct {
	args  []string // default: some call with an exit code
	env   []string // added to a small environment
	uid   int
	dir   string   // default: the rig's
	under []string // program and arguments that start docker: strace, a seccomp filter
	path  string   // of the shim where it is not the rig's
	root  string   // chroot(2), under which the rig has the same path
}

// outcome is what the caller of docker sees.
type outcome struct {
	status         syscall.WaitStatus
	stdout, stderr string
}

// hung is how long a call may take until it counts as hanging: the shim's bound is
// 50 ms, and the machine may be very busy.
const hung = 60 * time.Second

var defaultArgs = []string{"run", "--rm", "-e", "X=secret-canary", "some/image:1", "sh", "-c", "secret-canary", "code-37"}

// call calls docker directly and through the shim, and checks that nobody can tell the
// difference (T0, T1, T2).
func (r *rig) call(c call) {
	r.t.Helper()
	direct := r.start(r.real, c)
	path := c.path
	if path == "" {
		path = r.shim
	}
	if shimmed := r.start(path, c); shimmed != direct {
		r.t.Errorf("through the shim: %s\ndirectly: %s", shimmed, direct)
	}
}

// refused calls the shim where docker cannot be started.
func (r *rig) refused(path string, code int, says string) {
	r.t.Helper()
	got := r.start(path, call{})
	if !got.status.Exited() || got.status.ExitStatus() != code || got.stdout != "" ||
		strings.Count(got.stderr, "\n") != 1 || !strings.Contains(got.stderr, says) || strings.Contains(got.stderr, "secret-canary") {
		r.t.Errorf("%s, want exit %d and one line with %q", got, code, says)
	}
}

func (o outcome) String() string {
	return fmt.Sprintf("status %#x, stdout %q, stderr %q", int(o.status), o.stdout, o.stderr)
}

// start runs one program for a call.
func (r *rig) start(path string, c call) outcome {
	r.t.Helper()
	args := c.args
	if args == nil {
		args = defaultArgs
	}
	argv := append(append([]string{}, c.under...), append([]string{path}, args...)...)
	cmd := exec.Command(argv[0], argv[1:]...)
	if len(c.under) == 0 {
		cmd.Args[0] = "docker"
	}
	cmd.Dir = r.dir
	if c.dir != "" {
		cmd.Dir = c.dir
	}
	cmd.Env = append([]string{"PATH=/usr/bin:/bin", "MY_TOKEN=secret-canary", "GITHUB_REPOSITORY=octo/shop", "GITHUB_RUN_ID=42"}, c.env...)
	cmd.Stdin = strings.NewReader("some input")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.SysProcAttr.Chroot = c.root
	if c.uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.uid)}
	}
	if err := cmd.Start(); err != nil {
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			return outcome{stderr: errno.Error()}
		}
		r.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(hung):
		where := ""
		for _, f := range []string{"stack", "syscall", "wchan"} {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, f))
			where += string(b) + "\n"
		}
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		r.t.Fatalf("%s hangs:\n%s", strings.Join(argv, " "), where)
	}
	return outcome{cmd.ProcessState.Sys().(syscall.WaitStatus), stdout.String(), stderr.String()}
}

// spoolFile is the append file, or with another ending the counter, of a uid.
func (r *rig) spoolFile(uid int, ending string) string {
	return fmt.Sprintf("%s/spool/%d%s", r.run, uid, ending)
}

// spooled reads the records of a uid's append file as the agent does.
func (r *rig) spooled(uid int) []record.Record {
	r.t.Helper()
	b, err := os.ReadFile(r.spoolFile(uid, ".jsonl"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.t.Fatal(err)
	}
	all, _ := parse(r.t, b)
	return all
}

// parse returns the records of an append file and the number of torn ones. It finds
// a whole record behind a torn one by the marker, as every reader of ours does.
func parse(t testing.TB, b []byte) (all []record.Record, torn int) {
	t.Helper()
	for _, line := range bytes.SplitAfter(b, []byte("\n")) {
		if len(line) == 0 {
			continue
		}
		at := bytes.LastIndex(line, []byte(record.Marker))
		if at != 0 {
			torn++
		}
		var r record.Record
		if at < 0 || line[len(line)-1] != '\n' {
			continue
		}
		if err := recordjson.Unmarshal(line[at:len(line)-1], &r); err != nil {
			t.Errorf("%v in %.200q", err, line)
			continue
		}
		all = append(all, r)
	}
	return all, torn
}

// wantSpooled checks the number of records in the file of uid.
func (r *rig) wantSpooled(uid, n int) {
	r.t.Helper()
	if got := len(r.spooled(uid)); got != n {
		r.t.Errorf("%d records in the spool of uid %d, want %d", got, uid, n)
	}
}

// wantLost checks that a loss record of the agent tells of each call that was lost,
// with its user and this cause, when an agent comes.
func (r *rig) wantLost(uid, n int, cause string) {
	r.t.Helper()
	want := fmt.Sprintf("records of uid %d were lost: %s", uid, text(r.t, cause))
	r.withAgent(func(a *agent) {
		a.eventually(func() error {
			var count int64
			var others []string
			for _, l := range a.records() {
				switch {
				case l.Kind != record.KindLoss:
				case l.Loss.Detail == want && l.Loss.Cause == "shim":
					count += l.Loss.Count
				default:
					others = append(others, l.Loss.Detail)
				}
			}
			if count != int64(n) {
				return fmt.Errorf("%d are said to be lost with %q, want %d; other losses: %q", count, want, n, others)
			}
			return nil
		})
	})
}

// text is the cause whose text has this in it.
func text(t testing.TB, part string) string {
	t.Helper()
	for _, c := range handover.Causes {
		if strings.Contains(c.Text, part) {
			return c.Text
		}
	}
	t.Fatalf("no cause says %q", part)
	return ""
}

// agent is a running agent of the installation.
type agent struct {
	r    *rig
	cmd  *exec.Cmd
	done chan struct{}
	log  *lockedBuffer
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// withAgent runs an agent for the time of f. It reads the spool of this installation
// from the rig's folders and keeps its state there.
func (r *rig) withAgent(f func(a *agent)) {
	r.t.Helper()
	a := &agent{r: r, done: make(chan struct{}), log: &lockedBuffer{}}
	a.cmd = exec.Command(bin+"/tallyman", "agent", "--no-events", "--config", r.dir+"/tallyman.conf")
	a.cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + r.dir}
	a.cmd.Dir = r.dir
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	must(r.t, a.cmd.Start())
	go func() { a.cmd.Wait(); close(a.done) }()
	defer func() {
		a.cmd.Process.Signal(syscall.SIGCONT)
		a.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-a.done:
		case <-time.After(hung):
			a.cmd.Process.Kill()
			<-a.done
			r.t.Error("the agent did not end on SIGTERM")
		}
		if r.t.Failed() {
			r.t.Logf("the agent's log:\n%s", a.log)
		}
		if strings.Contains(a.log.String(), "secret-canary") {
			r.t.Errorf("a secret is in the agent's log:\n%s", a.log)
		}
	}()
	a.eventually(func() error {
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer syscall.Close(fd)
		return syscall.Connect(fd, &syscall.SockaddrUnix{Name: r.run + "/agent.sock"})
	})
	f(a)
}

// eventually waits until check is content.
func (a *agent) eventually(check func() error) {
	a.r.t.Helper()
	if err := eventually(a.r.t.Context(), func() error {
		select {
		case <-a.done:
			a.r.t.Fatalf("the agent ended:\n%s", a.log)
		default:
		}
		return check()
	}); err != nil {
		a.r.t.Error(err)
	}
}

func eventually(ctx context.Context, check func() error) error {
	for deadline := time.Now().Add(hung); ; {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// records are those of the agent's journal.
func (a *agent) records() []record.Record {
	a.r.t.Helper()
	names, err := filepath.Glob(a.r.dir + "/state/journal/records-*.jsonl")
	must(a.r.t, err)
	var all []record.Record
	for _, name := range names {
		b, err := os.ReadFile(name)
		must(a.r.t, err)
		if end := bytes.LastIndexByte(b, '\n') + 1; end > 0 {
			for _, line := range bytes.Split(bytes.TrimRight(b[:end], "\n\x00"), []byte("\n")) {
				var rec record.Record
				if recordjson.Unmarshal(line, &rec) == nil && rec.Kind != "" {
					all = append(all, rec)
				}
			}
		}
	}
	return all
}

// invocations are the journal's records of calls.
func (a *agent) invocations() []record.Record {
	var all []record.Record
	for _, r := range a.records() {
		if r.Kind == record.KindInvocation {
			all = append(all, r)
		}
	}
	return all
}
