// Package ptytest runs an interactive shell on a terminal of its own, for tests of what
// a user at a terminal sees.
package ptytest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

// A Terminal is the user's end of an interactive shell's terminal.
type Terminal struct {
	// Shell is the process id of the shell, and its process group.
	Shell int

	t      testing.TB
	master *os.File
	fd     int // of master, whose method Fd would make it blocking
	cmd    *exec.Cmd
	hungUp sync.Once

	mu   sync.Mutex
	said []byte // all that was printed
	past int    // how much of it WaitFor has gone past
}

// Prompt is what the shell prints when it waits for a command, as a pattern.
const Prompt = "prompt> $"

// patience is far beyond what a busy machine needs.
const patience = 60 * time.Second

// Require makes sure that there are terminals. The fault cases of the test could not run
// otherwise.
func Require(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		faults.CannotRun(t, "needs a pseudo-terminal: "+err.Error())
	}
	f.Close()
}

// Open starts bash on a new terminal, in dir and with these variables besides those it
// needs. The end of the test hangs up.
func Open(t testing.TB, dir string, env ...string) *Terminal {
	t.Helper()
	// Non-blocking, so that closing it ends the read below and hangs up.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	term := &Terminal{t: t, fd: fd, master: os.NewFile(uintptr(fd), "/dev/ptmx")}
	t.Cleanup(term.HangUp)
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	cmd := exec.Command("bash", "--norc", "--noprofile", "-i")
	cmd.Dir = dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "TERM=dumb", "PS1=prompt> ", "HISTFILE="}, env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	// Where the test was started with these ignored (nohup, a background job), the shell
	// would ignore them for good. What Go handles is a default one after execve.
	handled := make(chan os.Signal, 1)
	signal.Notify(handled, syscall.SIGHUP, syscall.SIGINT)
	err = cmd.Start()
	signal.Stop(handled)
	if err != nil {
		t.Fatal(err)
	}
	term.cmd, term.Shell = cmd, cmd.Process.Pid
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := term.master.Read(buf)
			term.mu.Lock()
			term.said = append(term.said, buf[:n]...)
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return term
}

// HangUp closes the terminal, by which the shell and what runs in it get SIGHUP, and
// waits for the shell's end.
func (term *Terminal) HangUp() {
	term.hungUp.Do(func() {
		term.master.Close()
		if term.cmd != nil {
			late := time.AfterFunc(patience, func() { term.cmd.Process.Kill() })
			defer late.Stop()
			term.cmd.Wait()
		}
	})
}

// Write types s; "\x03" is Ctrl-C.
func (term *Terminal) Write(s string) {
	term.t.Helper()
	if _, err := term.master.WriteString(s); err != nil {
		term.t.Fatal(err)
	}
}

// WaitFor waits until the pattern is printed after what was waited for before, and returns
// its groups.
func (term *Terminal) WaitFor(pattern string) [][]byte {
	term.t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		term.mu.Lock()
		rest := bytes.Clone(term.said[term.past:])
		if at := re.FindSubmatchIndex(rest); at != nil {
			term.past += at[1]
			term.mu.Unlock()
			return re.FindSubmatch(rest)
		}
		term.mu.Unlock()
	}
	term.t.Fatalf("no %q after %q", pattern, term.transcript())
	return nil
}

// Until waits for a condition, which what names.
func (term *Terminal) Until(what string, f func() bool) {
	term.t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			term.t.Fatalf("%s did not come: %q", what, term.transcript())
		}
	}
}

// transcript is the end of what was printed.
func (term *Terminal) transcript() []byte {
	term.mu.Lock()
	defer term.mu.Unlock()
	return bytes.Clone(term.said[max(0, len(term.said)-2000):])
}

// Foreground waits until a process group has the terminal.
func (term *Terminal) Foreground(pgid int) {
	term.t.Helper()
	term.Until(fmt.Sprintf("group %d in the foreground", pgid), func() bool {
		got, err := unix.IoctlGetInt(term.fd, unix.TIOCGPGRP)
		return err == nil && got == pgid
	})
}

// Resize changes the size of the window.
func (term *Terminal) Resize(columns, rows uint16) {
	term.t.Helper()
	if err := unix.IoctlSetWinsize(term.fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		term.t.Fatal(err)
	}
}

// Settings are those of stty(1).
func (term *Terminal) Settings() unix.Termios {
	term.t.Helper()
	settings, err := unix.IoctlGetTermios(term.fd, unix.TCGETS)
	if err != nil {
		term.t.Fatal(err)
	}
	return *settings
}

// ExitCode waits for the shell's prompt and asks for the exit code of the last command.
func (term *Terminal) ExitCode() string {
	term.t.Helper()
	term.Foreground(term.Shell)
	term.WaitFor(Prompt)
	term.Write("echo code $?\n")
	return string(term.WaitFor(`code ([0-9]+)\r\n`)[1])
}
