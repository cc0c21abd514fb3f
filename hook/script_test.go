package hook

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

// scripts runs the two hook scripts with a stand-in for tallyman.
type scripts struct {
	t     *testing.T
	dir   string
	shell string
	env   []string
}

func newScripts(t *testing.T, shell string) *scripts {
	s := &scripts{t: t, dir: t.TempDir(), shell: shell}
	write(t, s.path("tallyman"), "#!/bin/sh\necho \"tallyman $*\" >>"+s.path("called")+"\necho noise >&2\n")
	s.env = []string{"PATH=/usr/bin:/bin", "TALLYMAN_BIN=" + s.path("tallyman"), "TALLYMAN_CONFIG=" + s.path("tallyman.conf")}
	return s
}

func (s *scripts) path(name string) string { return filepath.Join(s.dir, name) }

// run starts a script as the runner does and returns its exit code and output.
func (s *scripts) run(script string, more ...string) (int, string) {
	s.t.Helper()
	cmd := exec.Command(s.shell, "-e", script)
	cmd.Env = append(append([]string(nil), s.env...), more...)
	cmd.Dir = s.dir
	out, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(out)
}

func (s *scripts) called() string {
	b, _ := os.ReadFile(s.path("called"))
	return string(b)
}

var shells = []string{"bash", "dash"}

func TestChainedHook(t *testing.T) {
	const started, completed = "job-started", "job-completed"
	chains := map[string]string{"ok": "echo chained; exit 0", "fails": "echo chained; exit 7", "stops": "echo chained; false; echo not reached",
		"killed": "kill -TERM $$", "pipe": "cat", "env": `echo "$TALLYMAN_CHAINED"`}
	for _, shell := range shells {
		for _, row := range []struct {
			name    string
			chain   string // the chained hook
			conf    string // the configuration; {started} and so on are replaced
			env     string
			code    int
			out     string
			nothing bool // our hook is not there
		}{
			{name: "none", out: ""},
			{name: "exit 0", chain: "ok", out: "chained\n"},
			{name: "exit 7", chain: "fails", code: 7, out: "chained\n"},
			{name: "bash -e", chain: "stops", code: 1, out: "chained\n"},
			{name: "ended by a signal", chain: "killed", code: 128 + 15},
			{name: "from the configuration", conf: "# a comment\nenabled = true\n{key} = {dir}/ok.sh\n", out: "chained\n"},
			{name: "without spaces", conf: "{key}={dir}/fails.sh", code: 7, out: "chained\n"},
			{name: "with tabs", conf: "\t{key}\t=\t{dir}/ok.sh\t\n", out: "chained\n"},
			{name: "with Windows line ends", conf: "enabled = true\r\n{key} = {dir}/ok.sh\r\n", out: "chained\n"},
			{name: "switched off with Windows line ends", conf: "{key} = {dir}/fails.sh\r\n{key} =\r\n"},
			{name: "the last line counts", conf: "{key} = /nonexistent.sh\n{key} = {dir}/ok.sh\n", out: "chained\n"},
			{name: "switched off again", conf: "{key} = {dir}/ok.sh\n{key} =\n"},
			{name: "a comment is none", conf: "#{key} = {dir}/fails.sh\n# {key} = {dir}/fails.sh\n"},
			{name: "another key", conf: "x{key} = {dir}/fails.sh\n{key}x = {dir}/fails.sh\n"},
			{name: "a key without a value", conf: "{key}\n"},
			{name: "a relative path is the job's", conf: "{key} = ok.sh\n"},
			{name: "the environment goes first", conf: "{key} = {dir}/fails.sh\n", env: "ok", out: "chained\n"},
			{name: "told once", chain: "env", out: "1\n"},
			{name: "without ours", chain: "fails", code: 7, out: "chained\n", nothing: true},
		} {
			for _, hook := range []string{started, completed} {
				t.Run(shell+"/"+hook+"/"+row.name, func(t *testing.T) {
					s := newScripts(t, shell)
					for name, text := range chains {
						write(t, s.path(name+".sh"), text+"\n")
					}
					upper := strings.ToUpper(strings.ReplaceAll(hook, "-", "_"))
					key := "chain_" + strings.TrimPrefix(hook, "job-")
					if row.chain != "" {
						s.env = append(s.env, "TALLYMAN_CHAIN_"+upper+"="+s.path(row.chain+".sh"))
					}
					if row.env != "" {
						s.env = append(s.env, "TALLYMAN_CHAIN_"+upper+"="+s.path(row.env+".sh"))
					}
					if row.conf != "" {
						write(t, s.path("tallyman.conf"), strings.NewReplacer("{key}", key, "{dir}", s.dir).Replace(row.conf))
					}
					if row.nothing {
						_ = os.Remove(s.path("tallyman"))
					}
					code, out := s.run(hookScript(hook + ".sh"))
					if code == -1 {
						code = 128 + 15 // as a shell would say of an exec'd hook
					}
					if row.chain == "killed" {
						out = "" // a shell reports it of its child
					}
					if code != row.code || out != row.out {
						t.Errorf("exit code %d, output %q; want %d, %q", code, out, row.code, row.out)
					}
					want := "tallyman hook " + hook + "\n"
					if row.nothing {
						want = ""
					}
					if got := s.called(); got != want {
						t.Errorf("our own hook was called %q, want %q", got, want)
					}
				})
			}
		}
	}
}

// A hook of PowerShell's is started as the runner starts it (a stand-in for pwsh says
// with what), and a program by itself.
func TestChainedHookByItsExtension(t *testing.T) {
	for _, shell := range shells {
		for _, hook := range []string{"job-started", "job-completed"} {
			for name, want := range map[string]string{"old.ps1": "pwsh -command . '%s'\n", "old": "%s\n"} {
				t.Run(shell+"/"+hook+"/"+name, func(t *testing.T) {
					s := newScripts(t, shell)
					write(t, s.path("pwsh"), "#!/bin/sh\necho \"pwsh $*\"; exit 3\n")
					write(t, s.path("old"), "#!/bin/sh\necho \"$0\"; exit 3\n")
					s.env = append(s.env, "PATH="+s.dir+":/usr/bin:/bin",
						"TALLYMAN_CHAIN_"+strings.ToUpper(strings.ReplaceAll(hook, "-", "_"))+"="+s.path(name))
					if code, out := s.run(hookScript(hook + ".sh")); code != 3 || out != fmt.Sprintf(want, s.path(name)) {
						t.Errorf("exit code %d, output %q", code, out)
					}
				})
			}
		}
	}
}

// tallyman looks for its configuration beside itself, and not beside a link to it: the
// scripts find the chained hook in the same file.
func TestChainedHookOfALinkedBinary(t *testing.T) {
	for _, shell := range shells {
		for _, hook := range []string{"started", "completed"} {
			t.Run(shell+"/"+hook, func(t *testing.T) {
				s := newScripts(t, shell)
				elsewhere := t.TempDir()
				if err := os.Symlink(s.path("tallyman"), filepath.Join(elsewhere, "tallyman")); err != nil {
					t.Fatal(err)
				}
				write(t, s.path("chain.sh"), "echo chained\n")
				write(t, s.path("tallyman.conf"), "chain_"+hook+" = "+s.path("chain.sh")+"\n")
				s.env = []string{"PATH=/usr/bin:/bin", "TALLYMAN_BIN=" + filepath.Join(elsewhere, "tallyman")}
				if code, out := s.run(hookScript("job-" + hook + ".sh")); code != 0 || out != "chained\n" {
					t.Errorf("exit code %d, output %q", code, out)
				}
			})
		}
	}
}

// A chained hook that is missing fails the job, as it would without us.
func TestMissingChainedHook(t *testing.T) {
	for _, shell := range shells {
		s := newScripts(t, shell)
		code, out := s.run(hookScript("job-started.sh"), "TALLYMAN_CHAIN_JOB_STARTED=/nonexistent/hook.sh")
		if code == 0 || !strings.Contains(out, "/nonexistent/hook.sh") {
			t.Errorf("%s: exit code %d, output %q", shell, code, out)
		}
	}
}

// A hook that chains itself runs twice and ends.
func TestHookThatChainsItself(t *testing.T) {
	for _, shell := range shells {
		for hook, key := range map[string]string{"job-started": "STARTED", "job-completed": "COMPLETED"} {
			s := newScripts(t, shell)
			path := hookScript(hook + ".sh")
			code, _ := s.run(path, "TALLYMAN_CHAIN_JOB_"+key+"="+path)
			if want := strings.Repeat("tallyman hook "+hook+"\n", 2); code != 0 || s.called() != want {
				t.Errorf("%s: exit code %d, called %q", shell, code, s.called())
			}
		}
	}
}

// Order: the context is sealed before a chained hook can call docker, and ends after
// one has called it.
func TestOrderOfChainedHooks(t *testing.T) {
	for hook, want := range map[string]string{"job-started": "tallyman hook job-started\nchained\n", "job-completed": "chained\ntallyman hook job-completed\n"} {
		s := newScripts(t, "bash")
		write(t, s.path("chain.sh"), "echo chained >>"+s.path("called")+"\n")
		key := strings.ToUpper(strings.TrimPrefix(hook, "job-"))
		if code, out := s.run(hookScript(hook+".sh"), "TALLYMAN_CHAIN_JOB_"+key+"="+s.path("chain.sh")); code != 0 || out != "" {
			t.Errorf("%s: exit code %d, output %q", hook, code, out)
		}
		if got := s.called(); got != want {
			t.Errorf("%s: order %q, want %q", hook, got, want)
		}
	}
}

// ARC's job-started.sh runs every file of job-started.d under set -Eeuo pipefail.
func TestAsADropInOfARC(t *testing.T) {
	s := newScripts(t, "bash")
	for _, hook := range []string{"job-started", "job-completed"} {
		dir := s.path(hook + ".d")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(hookScript(hook + ".sh"))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "50-tallyman"), string(b))
		write(t, s.path(hook+".sh"), "#!/usr/bin/env bash\nset -Eeuo pipefail\nfor hook in "+dir+"/*; do\n  \"$hook\" \"$@\"\ndone\necho all\n")
		if code, out := s.run(s.path(hook + ".sh")); code != 0 || out != "all\n" {
			t.Errorf("%s: exit code %d, output %q", hook, code, out)
		}
	}
	if want := "tallyman hook job-started\ntallyman hook job-completed\n"; s.called() != want {
		t.Errorf("called %q, want %q", s.called(), want)
	}
}

// HK-12: bash -e with a failing command. Each command of each script is replaced by
// `false` in turn, and then all tools at once.
func TestHK12EveryCommandFails(t *testing.T) {
	faults.Case(t, "HK-12")
	command := regexp.MustCompile(`(?m)(^|; |\|\| |&& |then |do |\) )(\t*)(trap|set|\[|tallyman=\$\(|export|exec|read|break|continue|TALLYMAN_CHAINED=1|\$limit|exit)( |$|command)`)
	for _, shell := range shells {
		for _, hook := range []string{"job-started", "job-completed"} {
			b, err := os.ReadFile(hookScript(hook + ".sh"))
			if err != nil {
				t.Fatal(err)
			}
			text, n := string(b), 0
			for _, at := range command.FindAllStringSubmatchIndex(text, -1) {
				line := text[strings.LastIndexByte(text[:at[6]], '\n')+1:]
				if strings.HasPrefix(strings.TrimSpace(line), "#") {
					continue
				}
				word := text[at[6]:at[7]]
				with := "false"
				if word == "tallyman=$(" {
					with = "tallyman=$(false "
				}
				changed := text[:at[6]] + with + text[at[7]:]
				if word == "read" || word == "break" { // an endless loop is a hang, not a failure
					changed = text[:at[6]] + with + " " + text[at[7]:]
				}
				s := newScripts(t, shell)
				script := s.path(hook + ".sh")
				write(t, script, changed)
				if exec.Command(shell, "-n", script).Run() != nil {
					t.Fatalf("%s: replacing %q at %d does not parse", hook, word, at[6])
				}
				n++
				if code, out := s.run(script); code != 0 || strings.Count(out, "\n") > 1 {
					t.Errorf("%s %s with %q replaced in %q: exit code %d, output %q", shell, hook, word, strings.SplitN(line, "\n", 2)[0], code, out)
				}
			}
			if n < 15 {
				t.Errorf("%s: only %d commands were replaced", hook, n)
			}
			t.Logf("%s %s: %d commands replaced", shell, hook, n)

			s := newScripts(t, shell)
			tools := s.path("tools")
			_ = os.Mkdir(tools, 0o755)
			for _, name := range []string{"tallyman", "timeout", "bash", "sh", "cat", "env", "true", "test", "[", "printf"} {
				_ = os.Symlink("/bin/false", filepath.Join(tools, name))
			}
			for _, env := range [][]string{
				{"PATH=" + tools, "TALLYMAN_BIN=" + filepath.Join(tools, "tallyman")},
				{"PATH=" + tools, "TALLYMAN_BIN="}, {"PATH=", "TALLYMAN_BIN="}, {"PATH=/nonexistent", "TALLYMAN_BIN=/nonexistent"},
				{"TALLYMAN_CONFIG=/proc/self/mem"}, {"TALLYMAN_CONFIG=" + s.dir}, {"TALLYMAN_CHAINED=1", "TALLYMAN_CHAIN_JOB_STARTED=/bin/false"},
			} {
				cmd := exec.Command(shell, "-e", hookScript(hook+".sh"))
				cmd.Env, cmd.Dir = append(append([]string(nil), s.env...), env...), s.dir
				if out, err := cmd.CombinedOutput(); err != nil || len(out) != 0 {
					t.Errorf("%s %s with %q: %v, output %q", shell, hook, env, err, out)
				}
			}
		}
	}
}

// The runner signals the shell alone. It ends when tallyman does, with 0.
func TestSignalToTheScript(t *testing.T) {
	faults.Case(t, "HK-09")
	for _, shell := range shells {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
			s := newScripts(t, shell)
			write(t, s.path("tallyman"), fmt.Sprintf("#!/bin/sh\necho up >%s\nsleep 0.5\necho done >%s\n", s.path("up"), s.path("called")))
			cmd := exec.Command(shell, "-e", hookScript("job-completed.sh"))
			cmd.Env = s.env
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for range 1000 {
				if _, err := os.Stat(s.path("up")); err == nil {
					break
				}
				time.Sleep(5 * time.Millisecond)
			}
			_ = cmd.Process.Signal(sig)
			if err := cmd.Wait(); err != nil || s.called() != "done\n" {
				t.Errorf("%s after %v: %v, tallyman finished %q", shell, sig, err, s.called())
			}
		}
	}
}

// A tallyman that hangs before it can bound itself is ended by timeout(1).
func TestHangingBinary(t *testing.T) {
	faults.Case(t, "HK-20")
	s := newScripts(t, "bash")
	write(t, s.path("tallyman"), "#!/bin/sh\nexec sleep 30\n")
	began := time.Now()
	if code, out := s.run(hookScript("job-started.sh")); code != 0 || out != "" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	if took := time.Since(began); took > 20*time.Second { // 2 s, and not the 30 of the binary
		t.Errorf("took %v", took)
	}
}
