package wrapper

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/probe"
)

// A terminal is the other end of an interactive shell's.
type terminal struct {
	t      *testing.T
	master *os.File
	fd     int // of master; its method Fd would make it blocking
	shell  *exec.Cmd

	sync.Mutex
	said []byte // all that was printed
	read int    // how much of it waitFor has gone past
}

// patience is far beyond what a busy machine needs.
const patience = 60 * time.Second

func needsTerminal(t *testing.T) {
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		faults.CannotRun(t, "needs a pseudo-terminal: "+err.Error())
	}
	f.Close()
}

// openTerminal starts an interactive shell on a terminal of its own.
func openTerminal(t *testing.T, st *stage) *terminal {
	t.Helper()
	// Non-blocking, so that closing it ends the read below and hangs up.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	master := os.NewFile(uintptr(fd), "/dev/ptmx")
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
	term := &terminal{t: t, master: master, fd: fd, shell: exec.Command("bash", "--norc", "--noprofile", "-i")}
	term.shell.Dir = st.dir + "/work"
	term.shell.Env = []string{"PATH=" + os.Getenv("PATH"), "TERM=dumb", "PS1=prompt> ", "HISTFILE=", "DOCKER=" + st.docker}
	term.shell.Stdin, term.shell.Stdout, term.shell.Stderr = slave, slave, slave
	term.shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := term.shell.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			term.Lock()
			term.said = append(term.said, buf[:n]...)
			term.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return term
}

// hangUp closes the terminal, which ends the shell and what runs in it.
func (term *terminal) hangUp() {
	term.master.Close()
	late := time.AfterFunc(patience, func() { term.shell.Process.Kill() })
	defer late.Stop()
	term.shell.Wait()
}

func (term *terminal) write(s string) {
	term.t.Helper()
	if _, err := term.master.WriteString(s); err != nil {
		term.t.Fatal(err)
	}
}

// waitFor waits until the pattern is printed after what was waited for before, and returns
// its groups.
func (term *terminal) waitFor(pattern string) [][]byte {
	term.t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		term.Lock()
		rest := bytes.Clone(term.said[term.read:])
		if at := re.FindSubmatchIndex(rest); at != nil {
			term.read += at[1]
			term.Unlock()
			return re.FindSubmatch(rest)
		}
		term.Unlock()
	}
	term.t.Fatalf("no %q after %q", pattern, term.said)
	return nil
}

// until waits for a condition.
func (term *terminal) until(what string, f func() bool) {
	term.t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			term.t.Fatalf("%s did not come: %q", what, term.said)
		}
	}
}

// foreground waits until a process group has the terminal.
func (term *terminal) foreground(pgid int) {
	term.t.Helper()
	term.until(fmt.Sprintf("group %d in the foreground", pgid), func() bool {
		got, err := unix.IoctlGetInt(term.fd, unix.TIOCGPGRP)
		return err == nil && got == pgid
	})
}

// state asks the probe what it sees.
func (term *terminal) state() probe.State {
	term.t.Helper()
	term.write("state\n")
	var s probe.State
	if err := json.Unmarshal(term.waitFor(`state (\{.*\})\r\n`)[1], &s); err != nil {
		term.t.Fatal(err)
	}
	return s
}

// stopped waits until a process is stopped.
func (term *terminal) stopped(pid int) {
	term.t.Helper()
	term.until("the stop", func() bool {
		b, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
		i := bytes.LastIndexByte(b, ')')
		return i > 0 && len(b) > i+2 && b[i+2] == 'T'
	})
}

// runTerminal does with docker what a user at a terminal can do, and returns what docker
// and the shell saw of it.
func runTerminal(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	term := openTerminal(t, st)
	ended := false
	defer func() {
		if !ended {
			term.hangUp()
		}
	}()
	all := probe.State{}
	note := func(when string, s probe.State) {
		for name, value := range s {
			if strings.Contains(name, "terminal") || strings.Contains(name, "window") || strings.Contains(name, "leads") || strings.HasPrefix(name, "signals") {
				if name == "controlling terminal" {
					value = strconv.FormatBool(value != "0") // each has its own number
				}
				all[when+", "+name] = value
			}
		}
	}
	start := func() int {
		term.waitFor("prompt> $")
		term.write("$DOCKER tty\n")
		pid, _ := strconv.Atoi(string(term.waitFor(`ready ([0-9]+)\r\n`)[1]))
		term.foreground(pid) // the shell gave it a process group of its own
		return pid
	}
	code := func(when string) {
		term.foreground(term.shell.Process.Pid)
		term.waitFor("prompt> $")
		term.write("echo code $?\n")
		all[when] = string(term.waitFor(`code ([0-9]+)\r\n`)[1])
	}

	pid := start()
	note("at first", term.state())
	if err := unix.IoctlSetWinsize(term.fd, unix.TIOCSWINSZ, &unix.Winsize{Col: 123, Row: 45}); err != nil {
		t.Fatal(err)
	}
	note("after a resize", term.state())
	term.write("\x1a") // Ctrl-Z
	term.stopped(pid)
	term.foreground(term.shell.Process.Pid)
	term.waitFor("Stopped")
	term.waitFor("prompt> $")
	term.write("bg\n") // and it reads from the terminal: SIGTTIN
	term.waitFor("prompt> $")
	term.until("the stop for input", func() bool {
		term.write("jobs -l\n")
		return bytes.Contains(term.waitFor(`\[1\][^\r]*\r\n`)[0], []byte("tty input"))
	})
	term.stopped(pid)
	term.waitFor("prompt> $")
	term.write("fg\n")
	term.foreground(pid)
	note("after a stop, the background and the foreground", term.state())
	term.write("\x03") // Ctrl-C
	code("exit code after Ctrl-C")
	start()
	term.write("\x1c") // Ctrl-\
	code("exit code after Ctrl-backslash")
	start()
	term.write("bye\n")
	code("exit code")
	start()
	term.write("\x04") // Ctrl-D
	code("exit code at the end of the input")
	pid = start()
	term.hangUp()
	ended = true
	term.until("the end by SIGHUP", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
	if want := "130 131 5 6"; want != strings.Join([]string{all["exit code after Ctrl-C"], all["exit code after Ctrl-backslash"], all["exit code"], all["exit code at the end of the input"]}, " ") ||
		all["after a resize, window size of descriptor 0"] != "123 x 45" || all["after a stop, the background and the foreground, in the terminal's foreground"] != "true" {
		t.Errorf("%s: %v", w.name, all)
	}
	return all
}
