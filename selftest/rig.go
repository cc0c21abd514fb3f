package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// hang is when a call counts as one that does not come back. The promise is 50 ms; a
// machine that is busy must not look like a defect, so each process that waits for a
// processor adds to it.
func hang() time.Duration {
	const least, most = 5 * time.Second, time.Minute
	b, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(b), " ")
	load, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return least
	}
	return min(least+time.Duration(load/float64(runtime.NumCPU())*float64(time.Second)), most)
}

// patience is how long something of ours may take that no command waits for: an agent's
// start, a record's way into the journal.
const patience = time.Minute

// rig is the temporary installation.
type rig struct {
	o        Options
	dir      string // programs and state
	runs     string // sockets and spools: on tmpfs where there is one
	shim     string // the copy
	tallyman string // this program, or a copy of it
	sh       string // a shell
	off      string // why this machine records nothing, "" where it does
	env      []string
	next     int // number of the next place

	mu     sync.Mutex
	agents []*agentProcess
	gone   []string // folders to remove
	places []*place
}

// newRig lays the copy out. The caller calls close.
func newRig(o Options) (*rig, error) {
	r := &rig{o: o, env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LC_ALL=C"}}
	if _, err := os.Lstat(config.OffPath); err == nil {
		r.off = "the kill switch " + config.OffPath + " is there"
	}
	for _, sh := range []string{"/bin/sh", "/usr/bin/sh"} {
		if unix.Access(sh, unix.X_OK) == nil {
			r.sh = sh
			break
		}
	}
	if r.sh == "" {
		return nil, errors.New("there is no /bin/sh: the calls of the test need a shell")
	}
	err := r.makeFolders()
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// makeFolders finds places for programs and for sockets.
func (r *rig) makeFolders() error {
	places := []string{r.o.Dir}
	if r.o.Dir == "" {
		places = []string{os.TempDir(), "/tmp", "/var/tmp", "/dev/shm"}
	}
	var why []error
	for _, place := range places {
		dir, err := r.folder(place)
		if err == nil {
			err = copyProgram(r.o.Shim, filepath.Join(dir, "docker-shim"))
		}
		if err == nil {
			err = r.ownTallyman(dir)
		}
		if err == nil {
			r.dir, r.shim = dir, filepath.Join(dir, "docker-shim")
			break
		}
		why = append(why, err)
	}
	if r.dir == "" {
		return fmt.Errorf("no folder for a copy of the shim that can be executed (set TMPDIR, or name one with --dir): %w", errors.Join(why...))
	}
	// The socket's address holds 107 bytes (unix(7)), and the agent makes it under a
	// longer name first.
	fits := func(dir string) bool { return len(filepath.Join(dir, "99-x", "run", "agent.sock.new")) < 100 }
	if r.runs = r.dir; fsType(r.dir) != "tmpfs" || !fits(r.dir) {
		for _, place := range []string{os.Getenv("XDG_RUNTIME_DIR"), "/dev/shm", "/run", "/tmp"} {
			if place == "" || place != "/tmp" && fsType(place) != "tmpfs" || place == "/tmp" && fits(r.dir) {
				continue
			}
			if dir, err := r.folder(place); err == nil && fits(dir) {
				r.runs = dir
				break
			}
		}
	}
	if !fits(r.runs) {
		return fmt.Errorf("the name of %s is too long for the agent's socket: name a shorter folder with --dir", r.runs)
	}
	return nil
}

// ownTallyman sees to a program that trusts our configuration: it takes one only from
// root or from the program's own owner.
func (r *rig) ownTallyman(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(r.o.Tallyman, &st); err != nil {
		return err
	}
	r.tallyman = r.o.Tallyman
	if uid := os.Getuid(); uid == 0 || uid == int(st.Uid) {
		return nil
	}
	r.tallyman = filepath.Join(dir, "tallyman")
	return copyProgram(r.o.Tallyman, r.tallyman)
}

// folder makes a folder of our own in place, without a symbolic link in its path: the
// shim follows none.
func (r *rig) folder(place string) (string, error) {
	place, err := filepath.Abs(place)
	if err == nil {
		place, err = filepath.EvalSymlinks(place)
	}
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(place, "tallyman-selftest-")
	if err != nil {
		return "", err
	}
	r.mu.Lock()
	r.gone = append(r.gone, dir)
	r.mu.Unlock()
	return dir, os.Chmod(dir, 0o755)
}

func copyProgram(from, to string) error {
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o755)
	}
	if err == nil {
		err = os.Chmod(to, 0o755) // whatever the umask is
	}
	if err == nil && unix.Access(to, unix.X_OK) != nil {
		err = fmt.Errorf("%s: programs may not be executed there (noexec)", filepath.Dir(to))
	}
	return err
}

// close ends what was started and removes what was made. It may be called again.
func (r *rig) close() error {
	r.mu.Lock()
	agents, gone, places := r.agents, r.gone, r.places
	r.agents, r.gone, r.places = nil, nil, nil
	r.mu.Unlock()
	var errs []error
	for _, a := range agents {
		errs = append(errs, a.stop())
	}
	for _, dir := range gone {
		errs = append(errs, removeAll(dir))
	}
	for _, p := range places {
		errs = append(errs, p.release())
	}
	return errors.Join(errs...)
}

// removeAll also removes folders that a case has made unwritable. An agent that a hook
// started may make a last file meanwhile.
func removeAll(dir string) (err error) {
	for range 20 {
		filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				os.Chmod(path, 0o700)
			}
			return nil
		})
		if err = os.RemoveAll(dir); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("remove the temporary installation: %w", err)
}

// place is one installation: a name for the shim, a configuration, a run folder and a
// state folder.
type place struct {
	r           *rig
	dir         string
	docker      string // the shim
	conf        string
	run, state  string
	real        string // the real tool
	spool, file string // folder of the append files, and ours
}

// newPlace makes an installation with real behind the shim; "" means the shell. Further
// lines go into the configuration.
func (r *rig) newPlace(real string, lines ...string) (*place, error) {
	if real == "" {
		real = r.sh
	}
	r.next++
	name := strconv.Itoa(r.next)
	p := &place{r: r, dir: filepath.Join(r.dir, name), real: real, run: filepath.Join(r.runs, name+"-x", "run")}
	p.docker, p.conf, p.state = filepath.Join(p.dir, "bin", "docker"), filepath.Join(p.dir, "bin", config.FileName), filepath.Join(p.dir, "state")
	p.spool = filepath.Join(p.run, "spool")
	p.file = filepath.Join(p.spool, strconv.Itoa(os.Getuid())+".jsonl")
	r.mu.Lock()
	r.places = append(r.places, p)
	r.mu.Unlock()
	for _, d := range []struct {
		path string
		mode fs.FileMode
	}{{filepath.Dir(p.docker), 0o755}, {p.state, 0o755}, {filepath.Dir(p.run), 0o755}, {p.run, 0o755}, {p.spool, 0o733 | fs.ModeSticky}} {
		if err := errors.Join(os.MkdirAll(d.path, 0o755), os.Chmod(d.path, d.mode)); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(p.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Symlink(r.shim, p.docker); err != nil {
		return nil, err
	}
	return p, p.configure(append([]string{"real.docker = " + real}, lines...)...)
}

func (p *place) configure(lines ...string) error {
	text := "run_dir = " + p.run + "\nstate_dir = " + p.state + "\nstatsd = off\n" + strings.Join(lines, "\n") + "\n"
	if fsType(p.r.runs) != "tmpfs" {
		text += "spool_on_disk = true\n"
	}
	return errors.Join(os.WriteFile(p.conf, []byte(text), 0o644), os.Chmod(p.conf, 0o644))
}

// spooled reads what the shim appended. A file that is not there is an empty one.
func (p *place) spooled() ([]record.Record, error) {
	b, err := os.ReadFile(p.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []record.Record
	for line := range bytes.Lines(b) {
		var rec record.Record
		if err := recordjson.Unmarshal(line, &rec); err != nil {
			return all, fmt.Errorf("the append file has a line that is no record: %w", err)
		}
		all = append(all, rec)
	}
	return all, nil
}

// journaled reads what the agent journaled.
func (p *place) journaled() ([]record.Record, error) {
	reader, err := journal.OpenReader(filepath.Join(p.state, "journal"), journal.Position{})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	var all []record.Record
	for {
		line, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		var rec record.Record
		if err := recordjson.Unmarshal(line.Data, &rec); err != nil {
			return all, err
		}
		all = append(all, rec)
	}
}

// call is one start of a program.
type call struct {
	path  string
	args  []string // argv, argv[0] too
	env   []string // beside the rig's own
	dir   string
	stdin string
	uid   int  // 0: the caller's own
	ipc   bool // with a System V namespace of its own
}

// outcome is all that a caller sees of a command.
type outcome struct {
	status         syscall.WaitStatus
	stdout, stderr string
	took           time.Duration
	pid            int
}

func (o outcome) String() string {
	text := fmt.Sprintf("exit %d", o.status.ExitStatus())
	if o.status.Signaled() {
		text = "ended by signal " + strconv.Itoa(int(o.status.Signal()))
	}
	return fmt.Sprintf("%s, stdout %s, stderr %s", text, short(o.stdout), short(o.stderr))
}

// short is a text for a line of the page.
func short(s string) string {
	if len(s) > 200 {
		s = s[:200] + "..."
	}
	return strconv.Quote(s)
}

// same compares two outcomes without their times.
func (o outcome) same(other outcome) bool {
	return o.status == other.status && o.stdout == other.stdout && o.stderr == other.stderr
}

// do runs a call to its end. A call that does not end within hang() is killed, and an error.
func (r *rig) do(ctx context.Context, c call) (outcome, error) {
	limit := hang()
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(limited, c.path)
	cmd.Args = c.args
	cmd.Env = append(r.env[:len(r.env):len(r.env)], c.env...)
	if cmd.Dir = c.dir; cmd.Dir == "" {
		cmd.Dir = r.dir
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Stdin = &stdout, &stderr, strings.NewReader(c.stdin)
	cmd.WaitDelay = time.Second
	switch {
	case c.ipc && os.Getuid() == 0:
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWIPC}
	case c.ipc:
		id := []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWIPC, UidMappings: id}
	case c.uid != 0:
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.uid)}}
	}
	start := time.Now()
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return outcome{}, fmt.Errorf("start %s: %w", c.path, err)
	}
	o := outcome{cmd.ProcessState.Sys().(syscall.WaitStatus), stdout.String(), stderr.String(), time.Since(start), cmd.Process.Pid}
	switch {
	case ctx.Err() != nil:
		return o, ctx.Err()
	case limited.Err() != nil:
		return o, fmt.Errorf("the command did not end within %v", limit.Round(time.Second))
	}
	return o, nil
}

// agentProcess is a running temporary agent.
type agentProcess struct {
	pid  int
	done chan struct{} // closed when it has ended
	log  string
}

// agent starts the agent of a place and waits until it listens.
func (p *place) agent(ctx context.Context) (*agentProcess, error) {
	a := &agentProcess{done: make(chan struct{}), log: filepath.Join(p.state, "agent.log")}
	cmd := exec.Command(p.r.tallyman, "agent", "--no-events", "--config", p.conf, "--log", a.log, "--log-level", "debug")
	cmd.Env, cmd.Dir = p.r.env, "/"
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// The signal at the parent's death is tied to the thread that forked (prctl(2)): that
	// thread stays until the agent has ended. Setsid: Ctrl-C is for us, who end it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(a.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start the temporary agent: %w", err)
	}
	a.pid = cmd.Process.Pid
	p.r.mu.Lock()
	p.r.agents = append(p.r.agents, a)
	p.r.mu.Unlock()
	return a, wait(ctx, func() error {
		select {
		case <-a.done:
			log, _ := os.ReadFile(a.log)
			return fatal{fmt.Errorf("the temporary agent ended: %s %s", short(stderr.String()), short(string(log)))}
		default:
		}
		_, err := os.Lstat(filepath.Join(p.run, "agent.sock"))
		return err
	})
}

// stop ends the agent: SIGTERM, and SIGKILL where that does not help. It may be called
// again.
func (a *agentProcess) stop() error {
	select {
	case <-a.done:
		return nil
	default:
	}
	syscall.Kill(a.pid, syscall.SIGTERM)
	syscall.Kill(a.pid, syscall.SIGCONT)
	select {
	case <-a.done:
		return nil
	case <-time.After(patience):
	}
	syscall.Kill(a.pid, syscall.SIGKILL)
	<-a.done
	return errors.New("the temporary agent did not end on SIGTERM")
}

// fatal ends a wait.
type fatal struct{ error }

// wait asks until there is no error, for at most patience.
func wait(ctx context.Context, ask func() error) error {
	for deadline := time.Now().Add(patience); ; {
		err := ask()
		var f fatal
		switch {
		case err == nil:
			return nil
		case errors.As(err, &f):
			return f.error
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("after %v: %w", patience, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
