package doctor_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/doctor"
	installer "github.com/tallyman-ci/tallyman/install"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/wrapper"
)

// go test ./doctor -update writes the golden files anew; read the diff.
var update = flag.Bool("update", false, "write the golden files of testdata anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var now = time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC)

// kernel is a kernel that knows what it is told.
type kernel struct {
	release           string
	peer, exits, open error
}

func (k kernel) Release() string  { return k.release }
func (k kernel) PeerPidfd() error { return k.peer }
func (k kernel) OpenPidfd() error { return k.open }
func (k kernel) ExitInfo() error  { return k.exits }

// install makes an installation with nothing wrong in a folder of its own.
func install(t *testing.T) (root string, in *doctor.Input) {
	t.Helper()
	root = t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(root, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(text), mode))
		must(t, os.Chmod(path, mode)) // whatever the umask
		return path
	}
	file("bin/docker", "\x7fELF "+strings.Repeat("x", 300<<10)+wrapper.Marker+"...", 0o755)
	file("bin/docker.original", "\x7fELF the real one", 0o755)
	file("tallyman.conf", "run_dir = "+root+"/run\nstate_dir = "+root+"/state\njournal_max_bytes = 1 MiB\n", 0o644)
	for _, dir := range []string{"run/spool", "state"} {
		must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	must(t, os.Chmod(filepath.Join(root, "run/spool"), 0o733|os.ModeSticky))
	j, err := journal.Open(filepath.Join(root, "state/journal"), journal.Options{})
	must(t, err)
	must(t, j.Append(record.Append(nil, &record.Record{ID: record.NewID(now), TS: now.Add(-3 * time.Minute), Kind: record.KindInvocation, By: record.ByNone})))
	must(t, j.Close())
	env := []string{
		"PATH=" + root + "/bin",
		"DOCKER_HOST=unix://" + root + "/docker.sock",
		"DD_DOGSTATSD_URL=unix://" + root + "/dsd.sock",
	}
	for variable, name := range map[string]string{"ACTIONS_RUNNER_HOOK_JOB_STARTED": "job-started.sh", "ACTIONS_RUNNER_HOOK_JOB_COMPLETED": "job-completed.sh"} {
		env = append(env, variable+"="+file("hooks/"+name, "#!/bin/bash\nexec tallyman hook "+strings.TrimSuffix(name, ".sh")+"\n", 0o755))
	}
	statsd, err := net.ListenPacket("unixgram", root+"/dsd.sock")
	must(t, err)
	t.Cleanup(func() { statsd.Close() })
	agent, err := net.Listen("unix", root+"/run/agent.sock")
	must(t, err)
	t.Cleanup(func() { agent.Close() })
	serveDocker(t, root+"/docker.sock", now)
	return root, &doctor.Input{
		Environ: env, ConfigPath: root + "/tallyman.conf", OffPath: root + "/off", Proc: root + "/proc", Root: root + "/system", Dpkg: root + "/dpkg", Sudoers: root + "/sudoers",
		Kernel: kernel{release: "6.18.0"},
		Agent: func(context.Context, string) (doctor.AgentState, error) {
			return doctor.AgentState{Summary: "tallyman 1.0, pid 7"}, nil
		},
		Sinks: func(urls []string) []error { return make([]error, len(urls)) },
		StatFS: func(string) (doctor.FileSystem, error) {
			return doctor.FileSystem{Type: "tmpfs", FreeBytes: 1 << 30}, nil
		},
		Timeout: 300 * time.Millisecond,
		Now:     func() time.Time { return now },
	}
}

// onDisk: run_dir is as tallyman install sets it in an image.
func onDisk(t *testing.T, root string, in *doctor.Input, free uint64) {
	t.Helper()
	f, err := os.OpenFile(root+"/tallyman.conf", os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("spool_on_disk = true\n")
	must(t, errors.Join(err, f.Close()))
	in.StatFS = func(string) (doctor.FileSystem, error) {
		return doctor.FileSystem{Type: "overlayfs", FreeBytes: free}, nil
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serveDocker answers the three requests that the check makes as a daemon does; it
// knows nothing else of the API.
func serveDocker(t *testing.T, socket string, clock time.Time) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	must(t, err)
	mux := http.NewServeMux()
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("API-Version", "1.41")
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v)
		}
	}
	mux.HandleFunc("/_ping", answer("OK"))
	mux.HandleFunc("/v1.41/version", answer(map[string]string{"Version": "28.5.2", "ApiVersion": "1.41"}))
	mux.HandleFunc("/v1.41/info", answer(map[string]string{"SystemTime": clock.Format(time.RFC3339Nano)}))
	s := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
}

func find(r *doctor.Report, name string) *doctor.Check {
	for i := range r.Checks {
		if r.Checks[i].Name == name {
			return &r.Checks[i]
		}
	}
	return nil
}

func setenv(in *doctor.Input, name, value string) {
	kept := in.Environ[:0:0]
	for _, kv := range in.Environ {
		if !strings.HasPrefix(kv, name+"=") {
			kept = append(kept, kv)
		}
	}
	in.Environ = append(kept, name+"="+value)
}

func configure(t *testing.T, root, text string) {
	t.Helper()
	f, err := os.OpenFile(root+"/tallyman.conf", os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString(text + "\n")
	must(t, errors.Join(err, f.Close()))
}

// arcHook puts a hook of ARC's older images in the place of ours, with ours as a drop-in of
// that mode.
func arcHook(mode os.FileMode) func(t *testing.T, root string, in *doctor.Input) {
	return func(t *testing.T, root string, _ *doctor.Input) {
		hook, dir := root+"/hooks/job-started.sh", root+"/hooks/job-started.d"
		must(t, os.Mkdir(dir, 0o755))
		must(t, os.WriteFile(dir+"/20-other", []byte("#!/bin/sh\n"), 0o755))
		must(t, os.Rename(hook, dir+"/50-tallyman"))
		must(t, os.Chmod(dir+"/50-tallyman", mode))
		must(t, os.WriteFile(hook, []byte("#!/bin/bash\nfor hook in "+dir+"/*; do \"$hook\" \"$@\"; done\n"), 0o755))
		must(t, os.Chmod(hook, 0o755))
	}
}

// staleSocket leaves a socket that nobody listens on, as a killed process does.
func staleSocket(t *testing.T, path string) {
	t.Helper()
	os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
}

func TestHealthyInstallation(t *testing.T) {
	root, in := install(t)
	r := doctor.Run(context.Background(), *in)
	for _, c := range r.Checks {
		owned := os.Getuid() == 0 || !strings.Contains(c.Finding, "can be replaced by a job") // our own files are not root's then
		if c.Result != doctor.OK && owned {
			t.Errorf("%+v", c)
		}
		if (c.Do == "") != (c.Result == doctor.OK) {
			t.Errorf("%+v: what is wrong comes with what to do, what is well does not", c)
		}
	}
	if os.Getuid() != 0 {
		return // the golden files are those of root
	}
	for name, write := range map[string]func(*bytes.Buffer) error{
		"healthy.txt":  func(b *bytes.Buffer) error { return r.Terminal(b) },
		"healthy.json": func(b *bytes.Buffer) error { return r.JSON(b) },
	} {
		var b bytes.Buffer
		must(t, write(&b))
		got := strings.ReplaceAll(b.String(), root, "/ROOT")
		path := filepath.Join("testdata", name)
		if *update {
			must(t, os.WriteFile(path, []byte(got), 0o644))
		}
		want, err := os.ReadFile(path)
		must(t, err)
		if got != string(want) {
			t.Errorf("%s differs; got:\n%s\n(go test ./doctor -update writes it anew)", path, got)
		}
	}
}

func TestFaults(t *testing.T) {
	for _, c := range []struct {
		fault  string
		inject func(t *testing.T, root string, in *doctor.Input)
		check  string
		result doctor.Result
		says   string // part of the finding
		do     string // part of what to do
	}{
		{"no docker at all", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "PATH", root) },
			"shim", doctor.Fail, "no docker in PATH", "install"},
		{"the shim was overwritten by an upgrade", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/bin/docker", []byte("real"), 0o755))
		}, "shim", doctor.Fail, "is not Tallyman's shim", "tallyman install"},
		{"another docker comes first", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Mkdir(root+"/first", 0o755))
			must(t, os.WriteFile(root+"/first/docker", []byte("real"), 0o755))
			setenv(in, "PATH", root+"/first:"+root+"/bin")
		}, "shim", doctor.Fail, "/first/docker comes before Tallyman's shim", "first in the runner's PATH"},
		{"a folder and a file that cannot run come first", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.MkdirAll(root+"/first/docker", 0o755))
			must(t, os.Mkdir(root+"/second", 0o755))
			must(t, os.WriteFile(root+"/second/docker", []byte("real"), 0o644))
			setenv(in, "PATH", root+"/first:"+root+"/second:"+root+"/bin")
		}, "shim", doctor.OK, "the first docker in PATH", ""},
		{"PATH looks into the working folder", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "PATH", ":"+root+"/bin") },
			"shim", doctor.Warn, "relative folder", "relative"},
		{"sudo finds another docker", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Mkdir(root+"/usr", 0o755))
			must(t, os.WriteFile(root+"/usr/docker", []byte("real"), 0o755))
			must(t, os.WriteFile(root+"/sudoers", []byte("# Defaults secure_path=/x\nDefaults\tsecure_path=\""+root+"/usr:"+root+"/bin\"\n"), 0o440))
		}, "sudo", doctor.Warn, "`sudo docker` runs", "secure_path"},
		{"a package owns the shim's place", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.MkdirAll(root+"/dpkg/info", 0o755))
			must(t, os.WriteFile(root+"/dpkg/info/docker-ce-cli.list", []byte("/.\n"+root+"/bin/docker\n"), 0o644))
		}, "package", doctor.Warn, "docker-ce-cli owns", "dpkg-divert --local"},
		{"a package's file is diverted", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.MkdirAll(root+"/dpkg/info", 0o755))
			must(t, os.WriteFile(root+"/dpkg/info/docker-ce-cli.list", []byte("/.\n"+root+"/bin/docker\n"), 0o644))
			must(t, os.WriteFile(root+"/dpkg/diversions", []byte("/a\n/b\n:\n"+root+"/bin/docker\n"+root+"/bin/docker.original\n:\n"), 0o644))
		}, "package", doctor.OK, "is diverted", ""},

		{"nothing is amiss with what was installed", func(t *testing.T, root string, in *doctor.Input) { installed(t, root, "docker", "podman") },
			"installation", doctor.OK, "shims: 2", ""},
		{"an upgrade took the second tool's place", func(t *testing.T, root string, in *doctor.Input) {
			system := installed(t, root, "docker", "podman")
			must(t, os.Remove(system+"/usr/bin/podman"))
			must(t, os.WriteFile(system+"/usr/bin/podman", []byte("real"), 0o755))
		}, "installation", doctor.Fail, "/usr/bin/podman is not the shim any more", "tallyman install"},
		{"the programs are newer than the shims", func(t *testing.T, root string, in *doctor.Input) {
			system := installed(t, root, "docker", "podman")
			data, err := os.ReadFile(root + "/bin/docker")
			must(t, err)
			must(t, os.WriteFile(system+"/opt/tallyman/bin/docker-shim", append(data, "newer"...), 0o755))
		}, "installation", doctor.Warn, "of another version", "tallyman install"},
		{"the account of the installation is torn", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Truncate(installed(t, root, "docker", "podman")+"/var/lib/tallyman-installed.json", 7))
		}, "installation", doctor.Warn, "cannot be used", "installed last"},
		{"another podman comes first", func(t *testing.T, root string, in *doctor.Input) {
			system := installed(t, root, "docker", "podman")
			must(t, os.WriteFile(root+"/bin/podman", []byte("real"), 0o755))
			setenv(in, "PATH", root+"/bin:"+system+"/usr/bin")
		}, "shim podman", doctor.Fail, "the first podman in PATH", "--tool"},
		{"podman is wrapped too", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "PATH", root+"/bin:"+installed(t, root, "docker", "podman")+"/usr/bin")
		}, "shim podman", doctor.OK, "the first podman in PATH", ""},

		{"podman alone is wrapped, and there is no docker", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "PATH", installed(t, root, "podman")+"/usr/bin")
			must(t, os.Remove(root+"/system/usr/bin/docker"))
		}, "shim podman", doctor.OK, "the first podman in PATH", ""},
		{"podman alone is wrapped, beside a docker", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "PATH", installed(t, root, "podman")+"/usr/bin")
		}, "shim", doctor.Warn, "those of other tools are", "--tool docker"},

		{"a pinned file was changed", func(t *testing.T, root string, in *doctor.Input) {
			configure(t, root, "pin = "+strings.Repeat("0", 64)+"  "+root+"/bin/docker")
		}, "pinned files", doctor.Fail, "/bin/docker", "install them again"},
		{"a job may replace the program", func(t *testing.T, root string, in *doctor.Input) {
			in.Program = root + "/bin/docker"
			must(t, os.Chmod(in.Program, 0o777))
		}, "program owner", doctor.Warn, "can be replaced by a job", "let root own it"},
		{"the real binary is gone", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Remove(root+"/bin/docker.original")) },
			"real docker", doctor.Fail, "exit code 127", "real.docker"},
		{"the shim's path is a link into another folder", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Mkdir(root+"/links", 0o755))
			must(t, os.Symlink(root+"/bin/docker", root+"/links/docker"))
			setenv(in, "PATH", root+"/links")
		}, "real docker", doctor.OK, "/bin/docker.original", ""},
		{"the real binary cannot run", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Chmod(root+"/bin/docker.original", 0o644))
		}, "real docker", doctor.Fail, "exit code 126", "chmod"},
		{"the real binary is a link to the shim", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Remove(root+"/bin/docker.original"))
			must(t, os.Symlink("docker", root+"/bin/docker.original"))
		}, "real docker", doctor.Fail, "is Tallyman's shim itself", "real.docker"},
		{"the real binary is a copy of the shim", func(t *testing.T, root string, in *doctor.Input) {
			data, err := os.ReadFile(root + "/bin/docker")
			must(t, err)
			must(t, os.WriteFile(root+"/bin/docker.original", data, 0o755))
		}, "real docker", doctor.Fail, "is Tallyman's shim itself", "real.docker"},
		{"the configuration names a real binary that is not there", func(t *testing.T, root string, in *doctor.Input) {
			configure(t, root, "real.docker = /nowhere/docker")
		}, "real docker", doctor.Fail, "/nowhere/docker (real.docker in the configuration) is not there", "001/tallyman.conf"}, // the file in force

		{"no configuration where one was named", func(t *testing.T, root string, in *doctor.Input) { in.ConfigPath = root + "/none.conf" },
			"configuration", doctor.Warn, "none.conf", "--config"},
		{"everybody may write the configuration", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Chmod(root+"/tallyman.conf", 0o666))
		}, "configuration", doctor.Fail, "not trusted", "chmod 0644"},
		{"a misspelt key", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "journal_max_byte = 1 GiB") },
			"configuration", doctor.Warn, "line 4, journal_max_byte: unknown key (did you mean journal_max_bytes?)", "the other lines are in force"},
		{"a key that is like no other", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "zzzzzzzzzzzz = 1") },
			"configuration", doctor.Warn, "zzzzzzzzzzzz: unknown key", "correct"},
		{"a bad value", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "summary = sometimes") },
			"configuration", doctor.Warn, "want off, auto or always", "correct"},

		{"shim and agent read different files", func(t *testing.T, root string, in *doctor.Input) {
			in.ConfigPath, in.AgentConfig = "", "/etc/tallyman/other.conf"
			must(t, os.Rename(root+"/tallyman.conf", root+"/bin/tallyman.conf"))
		}, "one configuration", doctor.Warn, "/bin/tallyman.conf, but the agent and the hooks read /etc/tallyman/other.conf", "one file"},

		{"recording is disabled", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "enabled = false") },
			"switch", doctor.Warn, "enabled = false", "remove the line"},
		{"the kill switch is set", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/off", nil, 0o644))
		}, "switch", doctor.Warn, "kill switch", "remove the file"},
		{"the hook left the off marker", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/run/off", []byte("off: canary 5 %\x1b[2J\n"), 0o644))
		}, "switch", doctor.Warn, "canary 5 %", "job-started hook"},
		{"the pod turns recording off", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "TALLYMAN", "off") },
			"switch", doctor.Warn, "TALLYMAN=off", "pod"},
		{"the pod turns recording off in capitals", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "TALLYMAN", "OFF") },
			"switch", doctor.Warn, "TALLYMAN=OFF", "pod"},
		{"the running runner is switched off", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.MkdirAll(root+"/proc/42", 0o755))
			must(t, os.WriteFile(root+"/proc/42/comm", []byte("Runner.Listener\n"), 0o644))
			must(t, os.WriteFile(root+"/proc/42/environ", []byte("TALLYMAN=off\x00"), 0o600))
		}, "switch", doctor.Warn, "TALLYMAN=off in the environment of Runner.Listener, pid 42", "pod"},
		{"a canary", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "canary = 5") },
			"switch", doctor.OK, "5 % of runners", ""},

		{"the hook variable is not set", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "ACTIONS_RUNNER_HOOK_JOB_STARTED", "") },
			"hook job-started", doctor.Warn, "ACTIONS_RUNNER_HOOK_JOB_STARTED is not set in this environment", ".env"},
		{"the hook's file is not there", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Remove(root+"/hooks/job-started.sh"))
		}, "hook job-started", doctor.Fail, "is not there: the runner fails every job", "install"},
		{"the hook has the wrong extension", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Rename(root+"/hooks/job-started.sh", root+"/hooks/job-started"))
			setenv(in, "ACTIONS_RUNNER_HOOK_JOB_STARTED", root+"/hooks/job-started")
		}, "hook job-started", doctor.Fail, "does not end in .sh", "rename"},
		{"the hook has Windows line ends", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/job-completed.sh", []byte("#!/bin/bash\r\ntallyman\r\n"), 0o755))
		}, "hook job-completed", doctor.Fail, "CR LF", "sed"},
		{"the hook cannot be read", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Chmod(root+"/hooks/job-started.sh", 0o700))
		},
			"hook job-started", doctor.Fail, "may not read it", "chmod"},
		{"the hook was cut", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Truncate(root+"/hooks/job-started.sh", 0))
		},
			"hook job-started", doctor.Fail, "does not begin with #!", "install"},
		{"somebody else's hook", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/job-started.sh", []byte("#!/bin/sh\nexit 0\n"), 0o755))
		}, "hook job-started", doctor.Fail, "is not Tallyman's hook", "chain_started"},
		{"our script is a drop-in of ARC", arcHook(0o755),
			"hook job-started", doctor.OK, "/hooks/job-started.sh", ""},
		{"a drop-in that may not run", arcHook(0o644),
			"hook job-started", doctor.Fail, "50-tallyman, which has mode", "chmod 0755"},
		{"ARC's hook without our drop-in", func(t *testing.T, root string, in *doctor.Input) {
			arcHook(0o755)(t, root, in)
			must(t, os.Remove(root+"/hooks/job-started.d/50-tallyman"))
		}, "hook job-started", doctor.Fail, "is not Tallyman's hook", "chain_started"},
		{"a job may write the hook", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Chmod(root+"/hooks/job-started.sh", 0o777))
		},
			"hook job-started", doctor.Warn, "can be replaced by a job", "let root own"},
		{"the running runner has no hook", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.MkdirAll(root+"/proc/42", 0o755))
			must(t, os.WriteFile(root+"/proc/42/comm", []byte("Runner.Worker\n"), 0o644))
			must(t, os.WriteFile(root+"/proc/42/environ", []byte("PATH=/bin\x00CI=true\x00"), 0o600))
		}, "hook job-started", doctor.Warn, "not set in the environment of Runner.Worker, pid 42", ".env"},
		{"the running runner has its hook from .env", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "ACTIONS_RUNNER_HOOK_JOB_COMPLETED", "")
			must(t, os.MkdirAll(root+"/proc/42", 0o755))
			must(t, os.MkdirAll(root+"/runner/bin", 0o755))
			must(t, os.WriteFile(root+"/proc/42/comm", []byte("Runner.Listener\n"), 0o644))
			must(t, os.WriteFile(root+"/proc/42/environ", []byte("PATH=/bin\x00"), 0o600))
			must(t, os.Symlink(root+"/runner/bin/Runner.Listener", root+"/proc/42/exe"))
			must(t, os.WriteFile(root+"/runner/.env", []byte("LANG=C\r\nACTIONS_RUNNER_HOOK_JOB_COMPLETED="+root+"/hooks/nowhere.sh\r\n"), 0o644))
		}, "hook job-completed", doctor.Fail, "/hooks/nowhere.sh is not there", "install"},

		{"a chained hook is not there", func(t *testing.T, root string, in *doctor.Input) {
			configure(t, root, "chain_started = "+root+"/hooks/old.sh")
		}, "chained job-started", doctor.Fail, "/hooks/old.sh (from chain_started) is not there: it fails every job", "chain_started"},
		{"a chained hook of the environment", func(t *testing.T, root string, in *doctor.Input) {
			configure(t, root, "chain_completed = /nowhere.sh")
			setenv(in, "TALLYMAN_CHAIN_JOB_COMPLETED", root+"/hooks/job-completed.sh")
		}, "chained job-completed", doctor.OK, "from TALLYMAN_CHAIN_JOB_COMPLETED", ""},
		{"a chained hook by a relative path", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "TALLYMAN_CHAIN_JOB_STARTED", "old.sh")
		}, "chained job-started", doctor.Warn, "no absolute path", "whole path"},
		{"a chained program that may not run", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/old.js", []byte("#!/usr/bin/env node"), 0o644))
			configure(t, root, "chain_started = "+root+"/hooks/old.js")
		}, "chained job-started", doctor.Fail, "may not run it", "chmod 0755"},
		{"a chained script of node's without a first line", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/old.js", []byte("console.log(1)"), 0o755))
			configure(t, root, "chain_started = "+root+"/hooks/old.js")
		}, "chained job-started", doctor.Fail, "without the node that the runner brings", "#!/usr/bin/env node"},
		{"a chained script of node's", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/old.js", []byte("#!/usr/bin/env node"), 0o755))
			configure(t, root, "chain_started = "+root+"/hooks/old.js")
		}, "chained job-started", doctor.OK, "old.js", ""},
		{"a chained script of PowerShell's without PowerShell", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/old.ps1", nil, 0o644))
			configure(t, root, "chain_completed = "+root+"/hooks/old.ps1")
		}, "chained job-completed", doctor.Fail, "needs pwsh", "install PowerShell"},
		{"a chained script needs no right to run", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/old.sh", nil, 0o644))
			must(t, os.Chmod(root+"/hooks/old.sh", 0o644))
			configure(t, root, "chain_started = "+root+"/hooks/old.sh")
		}, "chained job-started", doctor.OK, "old.sh", ""},
		{"a job may write a chained hook", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.WriteFile(root+"/hooks/old.sh", nil, 0o644))
			must(t, os.Chmod(root+"/hooks/old.sh", 0o666))
			configure(t, root, "chain_started = "+root+"/hooks/old.sh")
		}, "chained job-started", doctor.Warn, "can be replaced by a job", "let root own"},

		{"run_dir is too long for a socket", func(t *testing.T, root string, in *doctor.Input) {
			in.RunDir = root + "/" + strings.Repeat("x", 100)
		}, "run_dir", doctor.Fail, "the kernel takes 107", "shorter run_dir"},
		{"the running runner finds another docker", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Mkdir(root+"/first", 0o755))
			must(t, os.WriteFile(root+"/first/docker", []byte("real"), 0o755))
			must(t, os.MkdirAll(root+"/proc/42", 0o755))
			must(t, os.WriteFile(root+"/proc/42/comm", []byte("Runner.Listener\n"), 0o644))
			must(t, os.WriteFile(root+"/proc/42/environ", []byte("PATH="+root+"/first:"+root+"/bin\x00"), 0o600))
		}, "runner's PATH", doctor.Fail, "the first docker in the environment of Runner.Listener, pid 42", "--tool"},
		{"a runner in a container is another's", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Mkdir(root+"/first", 0o755))
			must(t, os.WriteFile(root+"/first/docker", []byte("real"), 0o755))
			must(t, os.MkdirAll(root+"/proc/42/ns", 0o755))
			must(t, os.MkdirAll(root+"/proc/self/ns", 0o755))
			must(t, os.Symlink("mnt:[1]", root+"/proc/self/ns/mnt"))
			must(t, os.Symlink("mnt:[2]", root+"/proc/42/ns/mnt"))
			must(t, os.WriteFile(root+"/proc/42/comm", []byte("Runner.Worker\n"), 0o644))
			must(t, os.WriteFile(root+"/proc/42/environ", []byte("PATH="+root+"/first:"+root+"/bin\x00"), 0o600))
		}, "hook job-started", doctor.OK, "no runner that can be looked into", ""},
		{"of several runners, the one whose job this is", func(t *testing.T, root string, in *doctor.Input) {
			for _, of := range []struct{ pid, comm, parent, environ string }{
				{"self", "tallyman", "99", ""},
				{"99", "bash", "42", ""},
				{"42", "Runner.Worker", "1", "PATH=/bin\x00"},
				{"1", "init", "0", ""},
				{"17", "Runner.Worker", "1", "PATH=/bin\x00ACTIONS_RUNNER_HOOK_JOB_STARTED=" + root + "/hooks/job-started.sh\x00"},
			} {
				must(t, os.MkdirAll(root+"/proc/"+of.pid, 0o755))
				stat := "5 (" + of.comm + ") S " + of.parent + strings.Repeat(" 0", 20)
				for name, content := range map[string]string{"comm": of.comm + "\n", "stat": stat, "environ": of.environ} {
					must(t, os.WriteFile(root+"/proc/"+of.pid+"/"+name, []byte(content), 0o600))
				}
			}
		}, "hook job-started", doctor.Warn, "not set in the environment of Runner.Worker, pid 42", ".env"},
		{"the running runner has a PATH of its own", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.MkdirAll(root+"/proc/42", 0o755))
			must(t, os.WriteFile(root+"/proc/42/comm", []byte("Runner.Listener\n"), 0o644))
			environ := "PATH=/nowhere:" + root + "/bin\x00ACTIONS_RUNNER_HOOK_JOB_STARTED=" + root + "/hooks/job-started.sh\x00ACTIONS_RUNNER_HOOK_JOB_COMPLETED=" + root + "/hooks/job-completed.sh\x00"
			must(t, os.WriteFile(root+"/proc/42/environ", []byte(environ), 0o600))
		}, "runner's PATH", doctor.OK, "the first docker in the environment of Runner.Listener", ""},

		{"run_dir is not there", func(t *testing.T, root string, in *doctor.Input) { must(t, os.RemoveAll(root+"/run")) },
			"run_dir", doctor.Warn, "is not there yet", ""},
		{"run_dir is a link", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Rename(root+"/run", root+"/elsewhere"))
			must(t, os.Symlink("elsewhere", root+"/run"))
		}, "run_dir", doctor.Fail, "symbolic link", "configuration"},
		{"everybody may write to run_dir", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Chmod(root+"/run", 0o777)) },
			"run_dir", doctor.Fail, "written to by everybody", "chmod 0755"},
		{"only its owner may enter run_dir", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Chmod(root+"/run", 0o700)) },
			"run_dir", doctor.Fail, "their calls are lost", "chmod 0755"},
		{"run_dir is a file", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.RemoveAll(root+"/run"))
			must(t, os.WriteFile(root+"/run", nil, 0o644))
		}, "run_dir", doctor.Fail, "is no folder", "remove"},
		{"run_dir is on NFS", func(t *testing.T, root string, in *doctor.Input) {
			in.StatFS = func(string) (doctor.FileSystem, error) {
				return doctor.FileSystem{Type: "nfs", FreeBytes: 1 << 40}, nil
			}
		}, "run_dir", doctor.Fail, "is on nfs", "tmpfs"},
		{"run_dir is on a disk", func(t *testing.T, root string, in *doctor.Input) {
			in.StatFS = func(string) (doctor.FileSystem, error) {
				return doctor.FileSystem{Type: "ext4", FreeBytes: 1 << 40}, nil
			}
		}, "run_dir", doctor.Warn, "records are lost", "spool_on_disk"},
		{"run_dir is on a disk by choice, and hooks start an agent", func(t *testing.T, root string, in *doctor.Input) {
			onDisk(t, root, in, 1<<40)
		}, "run_dir", doctor.OK, "is on overlayfs, 1 TiB free", ""},
		{"run_dir is on a disk by choice, and nothing starts an agent", func(t *testing.T, root string, in *doctor.Input) {
			onDisk(t, root, in, 1<<40)
			setenv(in, "ACTIONS_RUNNER_HOOK_JOB_STARTED", "")
		}, "run_dir", doctor.Warn, "no hook starts an agent", "set the hooks"},
		{"run_dir is on a full disk by choice", func(t *testing.T, root string, in *doctor.Input) {
			onDisk(t, root, in, 1<<19)
		}, "run_dir", doctor.Fail, "loses records", "free space"},
		{"the spool is not there", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Remove(root+"/run/spool")) },
			"spool", doctor.Warn, "is not there", "install -d -m 1733"},
		{"only its owner may write to the spool", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Chmod(root+"/run/spool", 0o755)) },
			"spool", doctor.Fail, "other users' calls", "chmod 1733"},
		{"the spool is not sticky", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Chmod(root+"/run/spool", 0o733)) },
			"spool", doctor.Fail, "removed by a job", "chmod 1733"},
		{"everybody may list the spool", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Chmod(root+"/run/spool", 0o777|os.ModeSticky))
		}, "spool", doctor.Warn, "listed by everybody", "chmod 1733"},
		{"the spool is full", func(t *testing.T, root string, in *doctor.Input) {
			configure(t, root, "spool_max_bytes = 1 KiB")
			must(t, os.WriteFile(root+"/run/spool/1001.jsonl", make([]byte, 1024), 0o600))
		}, "spool", doctor.Fail, "reached spool_max_bytes", "start the agent"},

		{"state_dir is not there", func(t *testing.T, root string, in *doctor.Input) { must(t, os.RemoveAll(root+"/state")) },
			"state_dir", doctor.Warn, "is not there yet", ""},
		{"everybody may write to state_dir", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Chmod(root+"/state", 0o777)) },
			"state_dir", doctor.Fail, "written to by everybody", "chmod 0755"},
		{"the disk is full", fillDisk, "state_dir", doctor.Fail, "full", "free space"},
		{"little room is left", func(t *testing.T, root string, in *doctor.Input) {
			in.StatFS = func(string) (doctor.FileSystem, error) {
				return doctor.FileSystem{Type: "ext4", FreeBytes: 1 << 20}, nil
			}
		}, "state_dir", doctor.Fail, "only 1 MiB left", "free space"},
		{"no inodes are left", func(t *testing.T, root string, in *doctor.Input) {
			in.StatFS = func(string) (doctor.FileSystem, error) {
				return doctor.FileSystem{Type: "ext4", FreeBytes: 1 << 30, TotalFiles: 1000, FreeFiles: 3}, nil
			}
		}, "state_dir", doctor.Fail, "only 3 inodes", "remove files"},
		{"less room than the journal may take", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "journal_max_bytes = 1000 GiB") },
			"state_dir", doctor.Warn, "less than journal_max_bytes", "lower"},
		{"no journal yet", func(t *testing.T, root string, in *doctor.Input) { must(t, os.RemoveAll(root+"/state/journal")) },
			"journal", doctor.Warn, "no agent has run here", "start a job"},
		{"an empty journal", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.RemoveAll(root+"/state/journal"))
			must(t, os.Mkdir(root+"/state/journal", 0o755))
		}, "journal", doctor.Warn, "no record was written yet", "call docker"},
		{"a journal of zeros, as a crash leaves it", func(t *testing.T, root string, in *doctor.Input) {
			names, err := filepath.Glob(root + "/state/journal/records-*.jsonl")
			must(t, err)
			must(t, os.WriteFile(names[0], make([]byte, 4096), 0o644))
		}, "journal", doctor.Warn, "hold no record", "call docker"},
		{"records from the future", func(t *testing.T, root string, in *doctor.Input) {
			in.Now = func() time.Time { return now.Add(-24 * time.Hour) }
		}, "journal time", doctor.Warn, "in the future", "clocks"},

		{"no agent", func(t *testing.T, root string, in *doctor.Input) { must(t, os.Remove(root+"/run/agent.sock")) },
			"agent", doctor.Warn, "calls go to the spool files, and events are not seen", "tallyman agent"},
		{"no agent and no spool", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Remove(root+"/run/agent.sock"))
			must(t, os.RemoveAll(root+"/run/spool"))
		}, "agent", doctor.Warn, "calls are lost (see run_dir and spool), and events are not seen", "tallyman agent"},
		{"no agent and a run_dir on a disk", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Remove(root+"/run/agent.sock"))
			in.StatFS = func(string) (doctor.FileSystem, error) {
				return doctor.FileSystem{Type: "ext4", FreeBytes: 10 << 30}, nil
			}
		}, "agent", doctor.Warn, "calls are lost (see run_dir and spool)", "tallyman agent"},
		{"a dead agent's socket", func(t *testing.T, root string, in *doctor.Input) {
			staleSocket(t, root+"/run/agent.sock")
			in.Agent = func(context.Context, string) (doctor.AgentState, error) {
				return doctor.AgentState{}, fmt.Errorf("connect: %w", unix.ECONNREFUSED)
			}
		}, "agent", doctor.Fail, "nobody listens", "tallyman agent"},
		{"an agent that hangs", func(t *testing.T, root string, in *doctor.Input) {
			in.Agent = func(ctx context.Context, _ string) (doctor.AgentState, error) {
				<-ctx.Done()
				return doctor.AgentState{}, ctx.Err()
			}
		}, "agent", doctor.Fail, "does not answer within 300ms", "agent.lock"},
		{"an agent with troubles of its own", func(t *testing.T, root string, in *doctor.Input) {
			in.Agent = func(context.Context, string) (doctor.AgentState, error) {
				return doctor.AgentState{Summary: "pid 7", Problems: []string{"disk full since 08:00"}}, nil
			}
		}, "agent", doctor.Warn, "disk full since 08:00", "tallyman status"},
		{"a file in the socket's place", func(t *testing.T, root string, in *doctor.Input) {
			must(t, os.Remove(root+"/run/agent.sock"))
			must(t, os.WriteFile(root+"/run/agent.sock", nil, 0o644))
		}, "agent", doctor.Fail, "is no socket", "remove"},

		{"no daemon", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DOCKER_HOST", "unix://"+root+"/none.sock")
		}, "daemon", doctor.Fail, "there is no such socket", "is the dind sidecar up"},
		{"no daemon, in Kubernetes mode", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DOCKER_HOST", "unix://"+root+"/none.sock")
			setenv(in, "ACTIONS_RUNNER_CONTAINER_HOOKS", "/home/runner/k8s/index.js")
		}, "daemon", doctor.Warn, "is not seen", "no job is hindered"},
		{"a dead daemon's socket", func(t *testing.T, root string, in *doctor.Input) {
			staleSocket(t, root+"/dead.sock")
			setenv(in, "DOCKER_HOST", "unix://"+root+"/dead.sock")
		}, "daemon", doctor.Fail, "nobody listens", "is the dind sidecar up"},
		{"a daemon that does not answer", func(t *testing.T, root string, in *doctor.Input) {
			l, err := net.Listen("unix", root+"/mute.sock")
			must(t, err)
			t.Cleanup(func() { l.Close() })
			setenv(in, "DOCKER_HOST", "unix://"+root+"/mute.sock")
		}, "daemon", doctor.Fail, "does not answer within 300ms", "dind"},
		{"a daemon over TCP that is not there", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DOCKER_HOST", "tcp://127.0.0.1:1")
		}, "daemon", doctor.Fail, "no Docker daemon at tcp://127.0.0.1:1", "dind"},
		{"an address that is none, with a password", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DOCKER_HOST", "tcp://u:hunter2@ho st:1")
		},
			"daemon", doctor.Fail, "write it as unix:///path or tcp://host:port", "now from DOCKER_HOST"},
		{"an address with a password", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DOCKER_HOST", "tcp://u:hunter2@127.0.0.1:1")
		},
			"daemon", doctor.Fail, "no Docker daemon at tcp://127.0.0.1:1:", "DOCKER_HOST"},
		{"a daemon over SSH", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "DOCKER_HOST", "ssh://build@host") },
			"daemon", doctor.Warn, "events are not read", "docker_host"},
		{"a daemon whose clock is an hour off", func(t *testing.T, root string, in *doctor.Input) {
			serveDocker(t, root+"/late.sock", now.Add(-time.Hour))
			setenv(in, "DOCKER_HOST", "unix://"+root+"/late.sock")
		}, "daemon clock", doctor.Warn, "differs by 1h", "clocks"},

		{"a kernel of 5.2", func(t *testing.T, root string, in *doctor.Input) {
			in.Kernel = kernel{"5.2.0-3-amd64", unix.ENOPROTOOPT, unix.ENOTTY, unix.ENOSYS}
		}, "durations", doctor.Warn, "5.2.0-3-amd64 gives no descriptors of processes", "5.3"},
		{"a kernel of 6.1", func(t *testing.T, root string, in *doctor.Input) {
			in.Kernel = kernel{"6.1.0-13-amd64", unix.ENOPROTOOPT, unix.ENOTTY, nil}
		}, "durations", doctor.OK, "in the same pid namespace", ""},
		{"exit codes on a kernel of 6.1", func(t *testing.T, root string, in *doctor.Input) {
			in.Kernel = kernel{"6.1.0-13-amd64", unix.ENOPROTOOPT, unix.ENOTTY, nil}
		}, "exit codes", doctor.Warn, "failed pulls and builds are not seen", "6.15"},
		{"a kernel of 6.8", func(t *testing.T, root string, in *doctor.Input) { in.Kernel = kernel{"6.8.0", nil, unix.ENOTTY, nil} },
			"exit codes", doctor.Warn, "failed pulls and builds are not seen", "6.15"},

		{"no DogStatsD address", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "DD_DOGSTATSD_URL", "") },
			"metrics", doctor.Warn, "no DogStatsD address", "DD_AGENT_HOST"},
		{"no DogStatsD socket", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DD_DOGSTATSD_URL", "unix://"+root+"/none.sock")
		}, "metrics", doctor.Warn, "no DogStatsD at", "Datadog agent"},
		{"nobody listens for DogStatsD on this host", func(t *testing.T, root string, in *doctor.Input) {
			setenv(in, "DD_DOGSTATSD_URL", "")
			setenv(in, "DD_AGENT_HOST", "127.0.0.1")
			setenv(in, "DD_DOGSTATSD_PORT", fmt.Sprint(closedUDPPort(t)))
		}, "metrics", doctor.Warn, "connection refused", "Datadog agent"},
		{"a DogStatsD address of another kind", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "statsd = http://127.0.0.1") },
			"metrics", doctor.Fail, "scheme \"http\" is none of udp", "statsd"},
		{"a DogStatsD URL that cannot be used", func(t *testing.T, root string, in *doctor.Input) { setenv(in, "DD_DOGSTATSD_URL", "http://x") },
			"metrics", doctor.Fail, "DD_DOGSTATSD_URL=http://x is no DogStatsD address", "udp://"},
		{"a tag that there is none of", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "statsd_tags = colour") },
			"metrics", doctor.Fail, "colour", "statsd_tags"},
		{"metrics are off", func(t *testing.T, root string, in *doctor.Input) { configure(t, root, "statsd = off") },
			"metrics", doctor.OK, "off", ""},
		{"a sink of an unknown kind", func(t *testing.T, root string, in *doctor.Input) {
			configure(t, root, "sinks = flie:///x stdout:")
			in.Sinks = func([]string) []error {
				return []error{errors.New("unknown sink flie: did you mean file?"), nil}
			}
		}, "sinks", doctor.Fail, "did you mean file?", "sinks line"},
		{"a clock at the beginning of time", func(t *testing.T, root string, in *doctor.Input) {
			in.Now = func() time.Time { return time.Unix(0, 0) }
		}, "clock", doctor.Fail, "1970-01-01", "chrony"},
	} {
		t.Run(c.fault, func(t *testing.T) {
			root, in := install(t)
			c.inject(t, root, in)
			r := doctor.Run(context.Background(), *in)
			got := find(r, c.check)
			if got == nil {
				t.Fatalf("no check %q in %+v", c.check, r.Checks)
			}
			if got.Result == doctor.Warn && c.result == doctor.OK && os.Getuid() != 0 {
				t.Fatalf("%+v", *got)
			}
			if got.Result != c.result || !strings.Contains(got.Finding, c.says) || !strings.Contains(got.Do, c.do) {
				t.Errorf("got %+v\nwant %s, %q, %q", *got, c.result, c.says, c.do)
			}
			if (got.Do == "") != (got.Result == doctor.OK) {
				t.Errorf("%+v: what is wrong comes with what to do", *got)
			}
			if c.result == doctor.OK && r.Failed > 0 {
				t.Errorf("something else failed: %+v", r.Checks)
			}
			var b bytes.Buffer
			must(t, r.Terminal(&b))
			if strings.ContainsAny(b.String(), "\x1b\x07\r") {
				t.Errorf("control characters reach the terminal: %q", b.String())
			}
		})
	}
}

// installed makes a file system with docker and podman, and installs for some of them.
func installed(t *testing.T, root string, tools ...string) (system string) {
	t.Helper()
	system = root + "/system"
	for _, dir := range []string{"/usr/bin", "/usr/local/bin", "/var/lib"} {
		must(t, os.MkdirAll(system+dir, 0o755))
	}
	for _, name := range []string{"docker", "podman"} {
		must(t, os.WriteFile(system+"/usr/bin/"+name, []byte("the real "+name), 0o755))
	}
	binaries := t.TempDir()
	shim, err := os.ReadFile(root + "/bin/docker")
	must(t, err)
	must(t, os.WriteFile(binaries+"/docker-shim", shim, 0o755))
	must(t, os.WriteFile(binaries+"/tallyman", []byte("tallyman"), 0o755))
	plan, err := installer.Install(installer.Options{Root: system, Tools: tools, Path: installer.SearchPath, Binaries: binaries, User: strconv.Itoa(os.Getuid())})
	must(t, err)
	must(t, plan.Run(t.Context(), func(string) {}))
	return system
}

// An emptyDir of Kubernetes is 0777: said, and no failure, because the values that we
// recommend mount one.
func TestStateOnAnEmptyDir(t *testing.T) {
	require.Root(t) // to mount
	root, in := install(t)
	state := root + "/state"
	must(t, unix.Mount("tmpfs", state, "tmpfs", 0, "size=1m,mode=777"))
	t.Cleanup(func() { must(t, unix.Unmount(state, 0)) })
	r := doctor.Run(context.Background(), *in)
	if c := find(r, "state_dir mode"); c == nil || c.Result != doctor.Warn || !strings.Contains(c.Do, "tallyman carry") {
		t.Errorf("%+v", c)
	}
	if c := find(r, "state_dir"); c == nil || c.Result != doctor.OK || r.Failed > 0 {
		t.Errorf("%+v", r.Checks)
	}
}

// fillDisk makes state_dir a small tmpfs and fills it, where the test may mount; a
// statfs(2) that says the same stands for it elsewhere.
func fillDisk(t *testing.T, root string, in *doctor.Input) {
	state := root + "/state"
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=64k,mode=755"); err != nil {
		t.Logf("no tmpfs can be mounted here (%v): the full disk is one that statfs tells of; run as root for a real one", err)
		in.StatFS = func(string) (doctor.FileSystem, error) { return doctor.FileSystem{Type: "full", FreeBytes: 0}, nil }
		return
	}
	t.Cleanup(func() { must(t, unix.Unmount(state, 0)) })
	f, err := os.Create(state + "/filler")
	must(t, err)
	defer f.Close()
	for {
		if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
			return
		} else {
			must(t, err)
		}
	}
}

func closedUDPPort(t *testing.T) int {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).Port
}

// What an unprivileged user may not do is said with what would help. Root may do
// everything, so that the checks run on a thread of another user.
func TestRightsOfAnotherUser(t *testing.T) {
	const uid = 54321
	for _, c := range []struct {
		fault  string
		inject func(t *testing.T, root string)
		check  string
		says   string
	}{
		{"run_dir belongs to root", func(t *testing.T, root string) {}, "run_dir", "may not write to"},
		{"state_dir belongs to root", func(t *testing.T, root string) {}, "state_dir", "may not write to"},
		{"state_dir is not there and cannot be made", func(t *testing.T, root string) { must(t, os.RemoveAll(root+"/state")) }, "state_dir", "may not make it"},
		{"the journal is private", func(t *testing.T, root string) { must(t, os.Chmod(root+"/state/journal", 0o700)) }, "journal", "may not read"},
		{"the configuration is private", func(t *testing.T, root string) { must(t, os.Chmod(root+"/tallyman.conf", 0o600)) }, "configuration", "may not read"},
		{"the daemon's socket is root's", func(t *testing.T, root string) { must(t, os.Chmod(root+"/docker.sock", 0o600)) }, "daemon", "may not use the Docker daemon"},
	} {
		t.Run(c.fault, func(t *testing.T) {
			require.Root(t) // to become another user
			root, in := install(t)
			for _, dir := range []string{root, filepath.Dir(root)} {
				must(t, os.Chmod(dir, 0o755))
			}
			c.inject(t, root)
			u := uid
			in.UID = &u
			var r *doctor.Report
			asUser(t, uid, func() { r = doctor.Run(context.Background(), *in) })
			got := find(r, c.check)
			if got == nil || got.Result != doctor.Fail || !strings.Contains(got.Finding, c.says) || !strings.Contains(got.Finding, "uid 54321") || got.Do == "" {
				t.Errorf("%+v", got)
			}
		})
	}
}

// asUser runs f on a thread of its own with another user's rights. The thread ends
// with its goroutine, because it is never unlocked.
func asUser(t *testing.T, uid int, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		// setresuid(2) by number: the library's own changes all threads.
		if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		f()
		done <- nil
	}()
	must(t, <-done)
}

// The real kernel is asked too; which answer it gives is its own.
func TestThisKernel(t *testing.T) {
	_, in := install(t)
	in.Kernel = nil
	r := doctor.Run(context.Background(), *in)
	durations := find(r, "durations")
	if durations == nil || !strings.Contains(durations.Finding, "Linux ") {
		t.Fatalf("%+v", durations)
	}
	if exits := find(r, "exit codes"); exits != nil {
		t.Log(exits.Finding)
		if exits.Result == doctor.Warn && strings.Contains(exits.Finding, "no exit code in the answer") {
			t.Errorf("the kernel answers, but not what is expected: %+v", exits)
		}
	}
}
