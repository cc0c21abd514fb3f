package wrapper

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/probe"
	"github.com/tallyman-ci/tallyman/internal/ptytest"
)

// runTerminal does with docker what a user at a terminal can do, and returns what docker
// and the shell saw of it.
func runTerminal(t *testing.T, st *stage, c *transparencyCase, w way) probe.State {
	t.Helper()
	term := ptytest.Open(t, st.dir+"/work", "DOCKER="+st.docker)
	defer term.HangUp()
	all := probe.State{}
	note := func(when string) {
		term.Write("state\n")
		var s probe.State
		if err := json.Unmarshal(term.WaitFor(`state (\{.*\})\r\n`)[1], &s); err != nil {
			t.Fatal(err)
		}
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
		term.WaitFor(ptytest.Prompt)
		term.Write("$DOCKER tty\n")
		pid, _ := strconv.Atoi(string(term.WaitFor(`ready ([0-9]+)\r\n`)[1]))
		term.Foreground(pid) // the shell gave it a process group of its own
		return pid
	}
	stopped := func(pid int) {
		term.Until("the stop", func() bool {
			b, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
			i := bytes.LastIndexByte(b, ')')
			return i > 0 && len(b) > i+2 && b[i+2] == 'T'
		})
	}

	pid := start()
	note("at first")
	term.Resize(123, 45)
	note("after a resize")
	term.Write("\x1a") // Ctrl-Z
	stopped(pid)
	term.Foreground(term.Shell)
	term.WaitFor("Stopped")
	term.WaitFor(ptytest.Prompt)
	term.Write("bg\n") // and it reads from the terminal: SIGTTIN
	term.WaitFor(ptytest.Prompt)
	term.Until("the stop for input", func() bool {
		term.Write("jobs -l\n")
		return bytes.Contains(term.WaitFor(`\[1\][^\r]*\r\n`)[0], []byte("tty input"))
	})
	stopped(pid)
	term.WaitFor(ptytest.Prompt)
	term.Write("fg\n")
	term.Foreground(pid)
	note("after a stop, the background and the foreground")
	term.Write("\x03")
	codes := []string{term.ExitCode()}
	for _, typed := range []string{"\x1c", "bye\n", "\x04"} { // Ctrl-backslash, a word, Ctrl-D
		start()
		term.Write(typed)
		codes = append(codes, term.ExitCode())
	}
	all["exit codes after Ctrl-C, Ctrl-backslash, a word, Ctrl-D"] = strings.Join(codes, " ")
	pid = start()
	term.HangUp()
	term.Until("the end by SIGHUP", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
	if strings.Join(codes, " ") != "130 131 5 6" || all["after a resize, window size of descriptor 0"] != "123 x 45" ||
		all["after a stop, the background and the foreground, in the terminal's foreground"] != "true" {
		t.Errorf("%s: %v", w.name, all)
	}
	return all
}
