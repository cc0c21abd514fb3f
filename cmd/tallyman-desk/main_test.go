package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/commandline/clitest"
)

func TestEveryCommand(t *testing.T) { clitest.Walk(t, "TALLYMAN_DESK_", app) }

// What a user types wrongly ends with 2 and says what was meant; bash completes.
func TestCommandLine(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, "tallyman-desk")); err != nil {
		t.Fatal(err)
	}
	complete := `source <(tallyman-desk completion bash); COMP_WORDS=(tallyman-desk "$@"); COMP_CWORD=$#; _tallyman-desk; echo "${COMPREPLY[@]}"`
	for _, row := range []struct {
		name string
		args []string
		env  string
		code int
		says string
	}{
		{"a wrong command", []string{"tallyman-desk", "blaem"}, "", 2, `there is no command "blaem": did you mean blame?`},
		{"a wrong option", []string{"tallyman-desk", "blame", "--cvs", "x"}, "", 2, "there is no option --cvs: did you mean --csv?"},
		{"a wrong variable", []string{"tallyman-desk", "query", "--list"}, "TALLYMAN_DESK_QUERY_THREADS=many", 2, `"many"`},
		{"a variable for an option", []string{"tallyman-desk", "query", "--list"}, "TALLYMAN_DESK_QUERY_FORMAT=json", 0, "failed_pulls"},
		{"an option behind an argument", []string{"tallyman-desk", "serve", "journal", "--title", "x"}, "", 2, "options come before JOURNAL: --title"},
		{"a comment in SQL is no option", []string{"tallyman-desk", "query", "--", "-- a comment\nFROM tallyman.calls", "none"}, "", 1, "none"},
		{"nothing to work on", []string{"tallyman-desk", "serve"}, "", 2, "serve wants a journal"},
		{"no requests", []string{"tallyman-desk", "blame", "journal"}, "", 2, "blame wants --csv FILE"},
		{"no file", []string{"tallyman-desk", "import", "worker-log"}, "", 2, "import worker-log wants a file"},
		{"a value out of range", []string{"tallyman-desk", "blame", "--csv", "x", "--status", "9xx", "journal"}, "", 2, "not \"9xx\""},
		{"the version", []string{"tallyman-desk", "--version"}, "", 0, "(commit "},
		{"bash completes a command", []string{"bash", "-c", complete, "", "ser"}, "", 0, "serve"},
		{"bash completes a subcommand", []string{"bash", "-c", complete, "", "import", "work"}, "", 0, "worker-log"},
		{"bash completes an option", []string{"bash", "-c", complete, "", "blame", "--eg"}, "", 0, "--egress"},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := exec.Command(row.args[0], row.args[1:]...)
			if row.args[0] == "tallyman-desk" {
				c.Path, c.Err = filepath.Join(bin, "tallyman-desk"), nil
			}
			c.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), asProgram+"=1", "GORACE=atexit_sleep_ms=0", row.env)
			out, err := c.CombinedOutput()
			if c.ProcessState == nil || c.ProcessState.ExitCode() != row.code {
				t.Errorf("%v, want exit code %d", err, row.code)
			}
			if !strings.Contains(string(out), row.says) {
				t.Errorf("it says %q, want %q", out, row.says)
			}
		})
	}
}
