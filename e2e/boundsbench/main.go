// Command boundsbench measures what Tallyman takes when it is not well: what the shim
// adds to a command with a full disk, a frozen one, a stopped agent; what memory and
// disk the agent takes at ten times the load it is made for; and what the Docker
// daemon's API notices of an agent whose sinks are all dead.
//
// Run it as root, in a clone of the repository, with: make bench-bounds
//
// It runs in a mount namespace of its own, so that its file systems end with it. Latency
// is measured as selftest.Method says: all ways in one rotating round. The daemon's API
// is measured in blocks that alternate between with and without the agent, while a
// client makes and removes volumes, so that there are events all the time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/prefix"
	"github.com/tallyman-ci/tallyman/selftest"
)

// privateMounts says to a second start of this program that its mounts are its own.
const privateMounts = "BOUNDSBENCH_PRIVATE_MOUNTS"

func main() {
	bin := flag.String("bin", "bin", "folder of the built programs")
	hooks := flag.String("hooks", "runner-image/hooks", "folder of the hooks' scripts")
	duration := flag.Duration("duration", time.Minute, "how long to measure latency")
	overload := flag.Duration("overload", 30*time.Second, "how long to overload the agent")
	only := flag.String("only", "", "latency, overload or api; all where empty")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if os.Getenv(privateMounts) == "" {
		os.Exit(again(ctx))
	}
	b := &bench{ctx: ctx, hooks: *hooks, bin: *bin}
	var errs []error
	for _, part := range []struct {
		name string
		run  func() error
	}{{"latency", func() error { return b.latency(*duration) }}, {"overload", func() error { return b.overload(*overload) }}, {"api", b.api}} {
		if ctx.Err() == nil && (*only == "" || *only == part.name) {
			errs = append(errs, b.part(part.run))
		}
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, "boundsbench:", err)
		os.Exit(1)
	}
}

// again runs this program in a mount namespace of its own. The child gets the
// terminal's signals itself.
func again(ctx context.Context) int {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), privateMounts+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	err := cmd.Run()
	if cmd.ProcessState == nil {
		fmt.Fprintf(os.Stderr, "boundsbench: make a mount namespace: %v (run it as root)\n", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// bench is one part's file systems and processes.
type bench struct {
	ctx        context.Context
	bin, hooks string
	dir        string
	undo       []func() error
}

// part runs one part and undoes what it did, the last first.
func (b *bench) part(run func() error) (err error) {
	if b.dir, err = os.MkdirTemp("/tmp", "boundsbench-"); err != nil {
		return err
	}
	b.undo = []func() error{func() error { return os.RemoveAll(b.dir) }}
	defer func() {
		for i := len(b.undo) - 1; i >= 0; i-- {
			err = errors.Join(err, b.undo[i]())
		}
	}()
	return errors.Join(os.Chmod(b.dir, 0o755), run())
}

func (b *bench) later(f func() error) { b.undo = append(b.undo, f) }

// tmpfs mounts one of a size.
func (b *bench) tmpfs(name, size string) (string, error) {
	dir := filepath.Join(b.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+size); err != nil {
		return "", fmt.Errorf("mount a tmpfs: %w", err)
	}
	b.later(func() error { return syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir, nil
}

// ext4 mounts a new one of 32 MiB from a file.
func (b *bench) ext4(name string) (string, error) {
	dir, image := filepath.Join(b.dir, name), filepath.Join(b.dir, name+".img")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	for _, args := range [][]string{
		{"truncate", "--size", "32M", image}, {"mkfs.ext4", "-q", "-F", image}, {"mount", "-o", "loop", image, dir},
	} {
		if out, err := exec.CommandContext(b.ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	b.later(func() error { return syscall.Unmount(dir, 0) })
	return dir, nil
}

// FIFREEZE and FITHAW of linux/fs.h.
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// freeze freezes a file system until the part's end.
func (b *bench) freeze(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), fiFreeze, 0); errno != 0 {
		f.Close()
		return fmt.Errorf("freeze %s: %w", dir, errno)
	}
	b.later(func() error {
		defer f.Close()
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), fiThaw, 0); errno != 0 {
			return fmt.Errorf("thaw %s: %w", dir, errno)
		}
		return nil
	})
	return nil
}

// fill takes the last byte of a file system.
func fill(dir string) error {
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		return err
	}
	defer f.Close()
	for chunk := make([]byte, 1<<20); len(chunk) > 0; {
		if _, err := f.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	return f.Sync()
}

// install lays an installation out with its run folder in run.
func (b *bench) install(name, run, real string, config ...string) (*prefix.Prefix, error) {
	p, err := prefix.Install(filepath.Join(b.dir, name), prefix.Options{
		Built: b.bin, Hooks: b.hooks, Real: real, Run: filepath.Join(run, name),
		Config: append([]string{"statsd = off"}, config...),
	})
	if err == nil {
		b.later(p.Remove)
	}
	return p, err
}

// agent starts the agent of an installation and waits for its socket.
func (b *bench) agent(p *prefix.Prefix, args ...string) (*os.Process, error) {
	cmd := exec.Command(p.Tallyman(), append([]string{"agent"}, args...)...)
	cmd.Env = append(p.Env(), "PATH="+p.Path())
	cmd.Dir = "/"
	log, err := os.Create(filepath.Join(p.Dir, "agent.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who end it in order
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	b.later(func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Process.Signal(syscall.SIGCONT)
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			cmd.Process.Kill()
			<-done
		}
		return nil
	})
	for range 1000 {
		if _, err := os.Lstat(p.Socket()); err == nil {
			return cmd.Process, nil
		}
		select {
		case <-done:
			text, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("the agent ended: %s", text)
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil, errors.New("the agent does not listen")
}

// latency prints what the shim adds in each state.
func (b *bench) latency(duration time.Duration) error {
	plain := selftest.Way{Name: "alone", Path: "/bin/true", Args: []string{"true", "build", "-t", "app:1", "--build-arg", "A=1", "."}}
	ways := []selftest.Way{{Name: "the command alone, once more", Path: plain.Path, Args: plain.Args}}
	ram, err := b.tmpfs("ram", "256m")
	if err != nil {
		return err
	}
	wrapper := filepath.Join(b.dir, "wrapper.sh")
	script := fmt.Sprintf("#!/bin/sh\necho \"$(date) $GITHUB_REPOSITORY docker $*\" >> %s/shell.log\nexec %s \"$@\"\n", ram, plain.Path)
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		return err
	}
	ways = append(ways, selftest.Way{Name: "shell wrapper", Path: wrapper, Args: plain.Args})
	fullRAM, err1 := b.tmpfs("fullram", "1m")
	fullDisk, err2 := b.ext4("fulldisk")
	frozen, err3 := b.ext4("frozen")
	disk, err4 := b.ext4("disk")
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	for i, state := range []struct {
		name  string
		run   string
		disk  bool // spool_on_disk
		agent bool
		spoil func(p *prefix.Prefix, agent *os.Process) error
	}{
		{"socket: agent answers", ram, false, true, nil},
		{"file: agent absent, tmpfs", ram, false, false, nil},
		{"agent stalled (SIGSTOP)", ram, false, true, func(_ *prefix.Prefix, a *os.Process) error { return a.Signal(syscall.SIGSTOP) }},
		{"tmpfs full, agent absent", fullRAM, false, false, func(*prefix.Prefix, *os.Process) error { return fill(fullRAM) }},
		{"tmpfs full, agent stalled", fullRAM, false, true, func(_ *prefix.Prefix, a *os.Process) error { return a.Signal(syscall.SIGSTOP) }},
		{"agent absent, ext4 allowed (spool_on_disk)", disk, true, false, nil},
		{"ext4 full, agent absent, allowed", fullDisk, true, false, func(*prefix.Prefix, *os.Process) error { return fill(fullDisk) }},
		{"ext4 frozen, agent answers", frozen, false, true, nil},
		{"ext4 frozen, agent stalled", frozen, false, true, func(_ *prefix.Prefix, a *os.Process) error { return a.Signal(syscall.SIGSTOP) }},
		{"ext4 frozen, agent absent", frozen, false, false, nil},
	} {
		var config []string
		if state.disk {
			config = append(config, "spool_on_disk = true")
		}
		p, err := b.install(fmt.Sprint("i", i), state.run, plain.Path, config...)
		if err != nil {
			return err
		}
		var agent *os.Process
		if state.agent {
			if agent, err = b.agent(p, "--no-events"); err != nil {
				return fmt.Errorf("%s: %w", state.name, err)
			}
		}
		if state.spoil != nil {
			// The append file is there before the disk is full.
			exec.Command(p.Shim(), plain.Args[1:]...).Run()
			if err := state.spoil(p, agent); err != nil {
				return fmt.Errorf("%s: %w", state.name, err)
			}
		}
		ways = append(ways, selftest.Way{Name: state.name, Path: p.Shim(), Args: plain.Args})
	}
	if err := b.freeze(frozen); err != nil {
		return err
	}
	before := load()
	sample, err := selftest.Interleave(b.ctx, plain, ways, duration, 3000)
	if err != nil {
		return err
	}
	var rows []selftest.Added
	for i, w := range ways {
		rows = append(rows, selftest.Summarise(w.Name, sample.Added[i], sample.AddedCPU[i]))
	}
	for i := range rows {
		rows[i].Ratio = rows[i].P50 / rows[1].P50
	}
	alone := selftest.Summarise("", sample.Plain, sample.PlainCPU)
	fmt.Printf("Latency added to `%s`, %d rounds, microseconds\n%s", strings.Join(plain.Args, " "), len(sample.Plain), selftest.Table(rows, "ratio of p50 to the shell wrapper's"))
	fmt.Printf("  (the command alone: p50 %.0f, p99 %.0f, max %.0f; load %s before, %s after)\n", alone.P50, alone.P99, alone.Max, before, load())
	for _, r := range rows[2:] {
		for _, said := range r.Over(rows[0]) {
			fmt.Println("  " + said)
		}
	}
	fmt.Println()
	return nil
}

// load is the first two averages of /proc/loadavg.
func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(b))
	return strings.Join(f[:min(2, len(f))], " ")
}
