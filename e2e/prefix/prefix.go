// Package prefix lays Tallyman out in a folder of its own, for tests and for the
// demo: the shim beside the real docker, the tallyman command, a configuration that
// keeps socket, spool and journal inside the folder, and the runner's hooks.
package prefix

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Prefix is a folder with an installation.
type Prefix struct {
	Dir string // bin, hooks and state
	Run string // agent's socket and spool
	own string // a folder outside Dir to delete at the end
}

// Options say what to install.
type Options struct {
	// Built is the folder with docker-shim and tallyman, as `make build` leaves it.
	Built string
	// Hooks is the folder with job-started.sh and job-completed.sh.
	Hooks string
	// Real is the real docker; bin/docker.original becomes a link to it.
	Real string
	// Run is the folder of the agent's socket and of the spool; "" means Dir/run.
	Run string
	// Config are further lines of the configuration file.
	Config []string
}

// Install lays out an installation in dir. The caller calls Remove at the end.
func Install(dir string, o Options) (*Prefix, error) {
	p := &Prefix{Dir: dir, Run: o.Run}
	if p.Run == "" {
		p.Run = filepath.Join(dir, "run")
	}
	if len(p.Socket()) > 107 { // what the address of a unix socket holds (unix(7))
		short, err := os.MkdirTemp("/tmp", "tallyman-run-")
		if err != nil {
			return nil, fmt.Errorf("install: %w", err)
		}
		p.Run, p.own = short, short
	}
	for _, d := range []string{p.Bin(), p.hooks()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("install: %w", err)
		}
	}
	// As a package makes it: whoever calls docker may add a file, nobody may list or
	// remove those of others.
	if err := os.MkdirAll(p.Spool(), 0o755); err != nil {
		return nil, fmt.Errorf("install: %w", err)
	}
	if err := os.Chmod(p.Spool(), 0o733|os.ModeSticky); err != nil {
		return nil, fmt.Errorf("install: %w", err)
	}
	for _, file := range []struct{ from, to string }{
		{filepath.Join(o.Built, "docker-shim"), p.Shim()},
		{filepath.Join(o.Built, "tallyman"), p.Tallyman()},
		{filepath.Join(o.Hooks, "job-started.sh"), p.HookStarted()},
		{filepath.Join(o.Hooks, "job-completed.sh"), p.HookCompleted()},
	} {
		if err := copyFile(file.from, file.to); err != nil {
			return nil, fmt.Errorf("install: %w", err)
		}
	}
	if err := os.Symlink(o.Real, p.Shim()+".original"); err != nil {
		return nil, fmt.Errorf("install: %w", err)
	}
	return p, p.Configure(o.Config...)
}

// Config is the path of the configuration file.
func (p *Prefix) Config() string { return filepath.Join(p.Bin(), "tallyman.conf") }

// Configure writes the configuration file: the folders of this installation, and
// the lines given.
func (p *Prefix) Configure(lines ...string) error {
	content := "run_dir = " + p.Run + "\nstate_dir = " + p.State() + "\n" + strings.Join(lines, "\n") + "\n"
	if err := os.WriteFile(p.Config()+".new", []byte(content), 0o644); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	if err := os.Rename(p.Config()+".new", p.Config()); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	return nil
}

// copyFile copies a program. A hard link would do but for the shim, which asks by
// inode whether the real docker is the shim itself.
func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w (run make build)", err)
	}
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

// Bin is the folder to put first in PATH.
func (p *Prefix) Bin() string { return filepath.Join(p.Dir, "bin") }

// Shim is the path of the shim, Tallyman that of the tallyman command.
func (p *Prefix) Shim() string     { return filepath.Join(p.Bin(), "docker") }
func (p *Prefix) Tallyman() string { return filepath.Join(p.Bin(), "tallyman") }

// Socket is the agent's socket.
func (p *Prefix) Socket() string { return filepath.Join(p.Run, "agent.sock") }

// Spool is the folder of the shim's append files.
func (p *Prefix) Spool() string { return filepath.Join(p.Run, "spool") }

// State is the folder of what stays: journal, contexts, cursors.
func (p *Prefix) State() string { return filepath.Join(p.Dir, "state") }

// Journal is the folder of the journal.
func (p *Prefix) Journal() string { return filepath.Join(p.State(), "journal") }

func (p *Prefix) hooks() string { return filepath.Join(p.Dir, "hooks") }

// HookStarted and HookCompleted are the paths of the hooks.
func (p *Prefix) HookStarted() string   { return filepath.Join(p.hooks(), "job-started.sh") }
func (p *Prefix) HookCompleted() string { return filepath.Join(p.hooks(), "job-completed.sh") }

// Path is a PATH with the shim first.
func (p *Prefix) Path() string {
	return p.Bin() + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// Env are the variables by which the hooks and the tallyman command find this
// installation instead of one in /usr/local/bin and /etc.
func (p *Prefix) Env() []string {
	return []string{"TALLYMAN_BIN=" + p.Tallyman(), "TALLYMAN_CONFIG=" + p.Config()}
}

// Processes are the ids of the running processes of this installation's tallyman
// command: its agent, and hooks on their way.
func (p *Prefix) Processes() []int {
	var pids []int
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, link := range links {
		if exe, err := os.Readlink(link); err == nil && strings.TrimSuffix(exe, " (deleted)") == p.Tallyman() {
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// Stop ends the processes of this installation: SIGTERM, and SIGKILL for those that
// are still there after ten seconds, which is an error.
func (p *Prefix) Stop() error {
	for _, pid := range p.Processes() {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := p.Processes()
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			for _, pid := range left {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			return fmt.Errorf("processes %v of %s did not end on SIGTERM", left, p.Tallyman())
		}
	}
}

// Remove stops the processes and deletes what lies outside Dir.
func (p *Prefix) Remove() error {
	err := p.Stop()
	if p.own != "" {
		err = errors.Join(err, os.RemoveAll(p.own))
	}
	return err
}
