// Package dockertest runs a real Docker daemon and a real registry for tests and
// for the demo, private to the caller and gone without a trace afterwards.
//
// The daemon, its containerd, its registry and all containers live in namespaces
// of their own, with dockerd as process 1:
//
//   - pid: killing that one process ends all of them, whatever state they are in,
//     and the kernel does so by itself when the process that started it dies;
//   - net: the bridge docker0, the addresses, the forwarding switch and the
//     registry's port exist in there alone. Two daemons never collide, the
//     machine's network is not touched, and nothing in there can reach out;
//   - mount: overlay mounts end with the processes, and /run is an empty tmpfs at
//     each boot, as it is in a restarted dind sidecar.
//
// What is left on the machine is one directory under the temporary directory (the
// daemon's data and its socket) and one cgroup; Stop removes both.
package dockertest

import (
	"bufio"
	"context"
	"crypto/rand"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Registry is the registry of every Daemon as its own clients write it. It is
// reachable through that daemon only.
const Registry = "localhost:5000"

// ErrUnavailable is wrapped by the errors that say that this machine cannot run a
// private daemon, and what to do about it.
var ErrUnavailable = errors.New("no private Docker daemon here")

// Daemon is a running, or killed, private Docker daemon. Its methods are not safe
// for concurrent use; Host and Socket are.
type Daemon struct {
	dir    string
	cgroup string
	tools  tools

	proc   *process
	logged int // size of the daemon's log at its last boot
}

// tools are the programs a Daemon is made of.
type tools struct {
	dockerd, registry, busybox, cli string
}

// Start boots a private daemon with an empty data directory and waits until the
// daemon and the registry answer. The caller must call Stop. The error wraps
// ErrUnavailable where the machine lacks what it takes.
func Start(ctx context.Context) (*Daemon, error) {
	found, err := findTools()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(baseDir(), "tallyman-dockerd-")
	if err != nil {
		return nil, fmt.Errorf("make the daemon's directory: %w", err)
	}
	id := make([]byte, 4)
	rand.Read(id)
	d := &Daemon{dir: dir, cgroup: "tallyman-test-" + hex.EncodeToString(id), tools: found}
	if err := os.WriteFile(d.path("registry.yml"), []byte(registryConfig(d.path("registry"))), 0o644); err != nil {
		return nil, errors.Join(err, d.Stop())
	}
	if err := d.Boot(ctx); err != nil {
		return nil, errors.Join(err, d.Stop())
	}
	return d, nil
}

// baseDir is the temporary directory, or /tmp where its name is too long: the
// address of a unix socket holds 107 bytes.
func baseDir() string {
	if dir := os.TempDir(); len(dir) < 60 {
		return dir
	}
	return "/tmp"
}

func findTools() (tools, error) {
	if os.Geteuid() != 0 {
		return tools{}, fmt.Errorf("%w: it needs root; run the command again as root, for example with sudo env \"PATH=$PATH\"", ErrUnavailable)
	}
	var t tools
	for _, want := range []struct {
		path *string
		name string
		pkg  string
	}{
		{&t.dockerd, "dockerd", "docker.io"},
		{&t.registry, "docker-registry", "docker-registry"},
		{&t.busybox, "busybox", "busybox-static"},
		{&t.cli, "docker", "docker.io"},
	} {
		path, err := find(want.name)
		if err != nil {
			return tools{}, fmt.Errorf("%w: %s is not installed; run make setup, or apt-get install %s", ErrUnavailable, want.name, want.pkg)
		}
		*want.path = path
	}
	if !static(t.busybox) {
		return tools{}, fmt.Errorf("%w: %s is linked dynamically and cannot live in an image FROM scratch; run make setup, or apt-get install busybox-static", ErrUnavailable, t.busybox)
	}
	return t, nil
}

// static reports whether the program runs without a dynamic loader.
func static(path string) bool {
	file, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer file.Close()
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

// find looks in PATH and then in the sbin folders, which are often not in it.
func find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", exec.ErrNotFound
}

func registryConfig(dir string) string {
	return "version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: " + dir + "}, delete: {enabled: true}}\nhttp: {addr: ':5000'}\n"
}

// Host is the daemon's address as DOCKER_HOST wants it.
func (d *Daemon) Host() string { return "unix://" + d.Socket() }

// Socket is the path of the daemon's unix socket. The file stays when the daemon
// is killed, as it does on any machine.
func (d *Daemon) Socket() string { return d.path("docker.sock") }

// CLI is the real docker command line client.
func (d *Daemon) CLI() string { return d.tools.cli }

// Busybox is the static busybox that the published images hold.
func (d *Daemon) Busybox() string { return d.tools.busybox }

// Grant lets a user other than root talk to the daemon, as membership in the docker
// group does. It must be called again after Boot.
func (d *Daemon) Grant(uid uint32) error {
	if err := errors.Join(os.Chmod(d.dir, 0o711), os.Chown(d.Socket(), int(uid), int(uid))); err != nil {
		return fmt.Errorf("give the daemon's socket to uid %d: %w", uid, err)
	}
	return nil
}

func (d *Daemon) path(name string) string { return filepath.Join(d.dir, name) }

// boot is run by busybox as process 1 of the new namespaces, and becomes dockerd.
// $1 is busybox, $2 the registry, $3 its configuration, $4 its log.
const boot = `
"$1" mount -t proc proc /proc
"$1" mount -t tmpfs -o mode=755 tmpfs /run
"$1" ifconfig lo up
"$2" serve "$3" >"$4" 2>&1 &
shift 4
exec "$@"
`

// Boot starts the daemon again after Kill, on the same socket and data, and waits
// until it answers. The error carries the end of the daemon's log.
func (d *Daemon) Boot(ctx context.Context) error {
	if d.proc != nil && d.proc.alive() {
		return errors.New("boot the daemon: it is running")
	}
	log, err := os.OpenFile(d.path("dockerd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("open the daemon's log: %w", err)
	}
	defer log.Close()
	if info, err := log.Stat(); err == nil {
		d.logged = int(info.Size())
	}

	cmd := exec.Command(d.tools.busybox, "sh", "-e", "-c", boot, "sh",
		d.tools.busybox, d.tools.registry, d.path("registry.yml"), d.path("registry.log"),
		d.tools.dockerd,
		"--config-file", d.path("no-daemon.json"), // never the machine's own /etc/docker/daemon.json
		"--data-root", d.path("data"),
		"--host", d.Host(),
		// No rule of a packet filter is needed in a network namespace that leads nowhere.
		"--iptables=false", "--ip6tables=false",
		"--cgroup-parent", "/"+d.cgroup, "--exec-opt", "native.cgroupdriver=cgroupfs",
	)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	if err := os.WriteFile(d.path("no-daemon.json"), []byte("{}"), 0o644); err != nil {
		return err
	}
	d.proc, err = startOwned(cmd)
	if err != nil {
		if errors.Is(err, syscall.EPERM) {
			return fmt.Errorf("%w: this root may not make namespaces; run on a machine of its own or in a privileged container", ErrUnavailable)
		}
		return fmt.Errorf("start dockerd: %w", err)
	}
	return d.wait(ctx)
}

// wait returns when the daemon answers a ping and the registry listens.
func (d *Daemon) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if d.ping(ctx) == nil && listening(d.proc.pid(), 5000) {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.proc.done:
			return fmt.Errorf("dockerd ended (%v):\n%s", d.proc.err, d.tail())
		case <-ctx.Done():
			return fmt.Errorf("wait for dockerd: %w:\n%s", ctx.Err(), d.tail())
		}
	}
}

func (d *Daemon) ping(ctx context.Context) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.Socket())
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// listening reports whether something listens on the TCP port in the network
// namespace of the process. From outside there is no way to connect to it.
func listening(pid, port int) bool {
	needle := fmt.Sprintf(":%04X ", port)
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			// "0: local:port remote:0000 0A ...": 0A is LISTEN (proc(5)).
			fields := strings.Fields(lines.Text())
			if len(fields) > 3 && strings.HasSuffix(fields[1]+" ", needle) && fields[3] == "0A" {
				file.Close()
				return true
			}
		}
		file.Close()
	}
	return false
}

// tail is the end of what the daemon logged since its last boot, for errors,
// without what it says when all is well.
func (d *Daemon) tail() string {
	data, err := os.ReadFile(d.path("dockerd.log"))
	if err != nil {
		return err.Error()
	}
	var lines []string
	for line := range strings.Lines(string(data[min(d.logged, len(data)):])) {
		if !strings.Contains(line, " level=info ") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-20):], "")
}

// Kill ends the daemon, the registry and all containers with SIGKILL, as a crash
// or a node's end does. Socket and data stay.
func (d *Daemon) Kill() {
	if d.proc != nil {
		d.proc.kill()
	}
}

// Signal sends a signal to dockerd: SIGTERM asks it to stop, SIGSTOP makes it hang
// with its socket still accepting connections.
func (d *Daemon) Signal(sig syscall.Signal) error {
	if err := syscall.Kill(d.proc.pid(), sig); err != nil {
		return fmt.Errorf("signal dockerd: %w", err)
	}
	return nil
}

// Done is closed when the daemon's process has ended.
func (d *Daemon) Done() <-chan struct{} { return d.proc.done }

// Stop kills the daemon and removes all it left on the machine. It may be called
// more than once.
func (d *Daemon) Stop() error {
	d.Kill()
	removeCgroups(d.cgroup)
	if err := os.RemoveAll(d.dir); err != nil {
		return fmt.Errorf("remove the daemon's directory: %w", err)
	}
	return nil
}

// removeCgroups removes the daemon's cgroups from every hierarchy, leaves first.
// They hold no process any more, or rmdir refuses; what stays behind costs nothing.
func removeCgroups(name string) {
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	for _, root := range append(hierarchies, "/sys/fs/cgroup/"+name) {
		var dirs []string
		filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			os.Remove(dirs[i])
		}
	}
}

// Docker runs the real docker client against this daemon and returns what it
// printed on both streams. The error names the command and holds the output.
func (d *Daemon) Docker(ctx context.Context, args ...string) (string, error) {
	return d.docker(ctx, nil, args...)
}

func (d *Daemon) docker(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.tools.cli, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + d.dir, "DOCKER_HOST=" + d.Host()}
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// applets are the commands that every published image has.
var applets = []string{"sh", "echo", "true", "false", "sleep", "cat", "ls", "env", "sha256sum"}

// Publish makes an image FROM scratch (busybox and a file that names the image),
// pushes it to the private registry and removes it from the daemon again, so that
// it takes a real pull to run it. The reference must start with Registry.
func (d *Daemon) Publish(ctx context.Context, ref string) error {
	src, err := os.MkdirTemp(d.dir, "image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(src)
	if err := WriteImage(src, d.tools.busybox, ref); err != nil {
		return fmt.Errorf("write the files of image %s: %w", ref, err)
	}
	for _, args := range [][]string{{"build", "--quiet", "--tag", ref, src}, {"push", "--quiet", ref}, {"rmi", ref}} {
		if _, err := d.Docker(ctx, args...); err != nil {
			return fmt.Errorf("publish image %s: %w", ref, err)
		}
	}
	return nil
}

// WriteImage writes a Dockerfile and its files into dir: an image FROM scratch with
// busybox under the names of a few commands, and /image, which holds the note.
func WriteImage(dir, busybox, note string) error {
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bin, "busybox"), program, 0o755); err != nil {
		return err
	}
	for _, name := range applets {
		if err := os.Symlink("busybox", filepath.Join(bin, name)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "image"), []byte(note+"\n"), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nCOPY bin /bin\nCOPY image /image\nCMD [\"/bin/sh\"]\n"), 0o644)
}

// process is a child in its own namespaces that dies with this process.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; read it after done is closed
	once sync.Once
}

// startOwned starts cmd as process 1 of new pid, network and mount namespaces. The
// goroutine that starts it keeps its thread until the child has ended, because
// PR_SET_PDEATHSIG is tied to the thread that forked, not to the process (prctl(2)).
func startOwned(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET,
		// As an "unshare" flag, Go makes the mounts private first, so that none of ours leak out.
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
		Setpgid:      true, // Ctrl-C is for the caller, who ends the daemon in order
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	return p, <-started
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the process and with it its pid namespace, and waits for the end.
func (p *process) kill() {
	p.once.Do(func() {
		if p.cmd.Process == nil {
			close(p.done)
			return
		}
		p.cmd.Process.Kill()
	})
	<-p.done
}
