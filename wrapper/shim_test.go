package wrapper

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// The tests of this file run the built shim, both as leanbuild makes it and with the
// usual runtime, in the place of testdata/probe, which tells what it sees.

func TestMain(m *testing.M) {
	// Descriptors that the caller left open, as make -j and flock do, would be in every
	// process that the tests start, where numbers of descriptors are compared.
	_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC) // before Linux 5.11 they stay
	code := m.Run()
	if shims.dir != "" {
		os.RemoveAll(shims.dir)
	}
	os.Exit(code)
}

// shims are the two builds, made once.
var shims struct {
	once sync.Once
	dir  string
	path map[string]string
	err  error
}

func builtShims(t testing.TB) map[string]string {
	t.Helper()
	shims.once.Do(func() {
		dir, err := os.MkdirTemp("", "shim")
		if err != nil {
			shims.err = err
			return
		}
		shims.dir = dir
		shims.path = map[string]string{"lean": dir + "/lean", "usual": dir + "/usual"}
		for _, args := range [][]string{
			{"run", "../internal/leanbuild", "-require", "-o", dir + "/lean", "../cmd/docker-shim"},
			{"build", "-o", dir + "/usual", "../cmd/docker-shim"},
			// Lean, the probe sees what a usual Go program changes before it can look.
			{"run", "../internal/leanbuild", "-require", "-o", dir + "/probe", "./testdata/probe"},
			{"build", "-o", dir + "/probe-usual", "./testdata/probe"},
		} {
			cmd := exec.Command("go", args...)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				shims.err = fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, out)
				return
			}
		}
	})
	if shims.err != nil {
		t.Fatal(shims.err)
	}
	return shims.path
}

// installation is a folder with a shim and the probe as the real docker behind it.
type installation struct {
	dir, shim, real, run string
}

func install(t testing.TB, build string) installation {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "shim")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	in := installation{dir: dir, shim: dir + "/docker", real: dir + "/docker.original", run: dir + "/run"}
	copyFile(t, builtShims(t)[build], in.shim)
	copyFile(t, shims.dir+"/probe", in.real)
	if err := os.MkdirAll(in.run+"/spool", 0o733); err != nil {
		t.Fatal(err)
	}
	in.config(t, "")
	return in
}

func (in installation) config(t testing.TB, more string) {
	t.Helper()
	if err := os.WriteFile(in.dir+"/tallyman.conf", []byte("run_dir = "+in.run+"\n"+more), 0o644); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// records reads what the shim wrote to the spool.
func (in installation) records(t testing.TB) []record.Record {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("%s/spool/%d.jsonl", in.run, os.Getuid()))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var all []record.Record
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		var r record.Record
		if err := recordjson.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("%v in %q", err, lines.Bytes())
		}
		all = append(all, r)
	}
	return all
}

func eachBuild(t *testing.T, f func(t *testing.T, in installation)) {
	for _, build := range []string{"lean", "usual"} {
		t.Run(build, func(t *testing.T) { f(t, install(t, build)) })
	}
}

func TestWhereTheRealBinaryIs(t *testing.T) {
	eachBuild(t, func(t *testing.T, in installation) {
		run := func(path string, args ...string) (code int, stdout, stderr string) {
			cmd := exec.Command(path, args...)
			cmd.Dir = in.dir
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			cmd.Run()
			return cmd.ProcessState.ExitCode(), out.String(), errs.String()
		}
		expect := func(t *testing.T, path string, code int, message string) {
			t.Helper()
			got, stdout, stderr := run(path, "exit", "3")
			if got != code || stdout != "" || message == "" != (stderr == "") || !strings.Contains(stderr, message) || strings.Count(stderr, "\n") > 1 {
				t.Errorf("exit %d, stdout %q, stderr %q; want exit %d and %q", got, stdout, stderr, code, message)
			}
		}
		t.Run("beside the shim", func(t *testing.T) { expect(t, in.shim, 3, "") })
		t.Run("called by a relative path", func(t *testing.T) { expect(t, "./docker", 3, "") })
		t.Run("another tool by a link to the shim", func(t *testing.T) {
			os.Symlink("docker", in.dir+"/podman")
			os.Symlink("docker.original", in.dir+"/podman.original")
			expect(t, in.dir+"/podman", 3, "")
			all := in.records(t)
			if tool := all[len(all)-1].Invocation.Tool; tool != "podman" {
				t.Errorf("recorded as %q", tool)
			}
			os.Remove(in.dir + "/podman.original")
			for _, path := range []string{in.dir + "/podman", "./podman", ".//./podman"} {
				expect(t, path, 127, in.dir+"/podman.original")
			}
		})
		t.Run("named by the configuration", func(t *testing.T) {
			os.Mkdir(in.dir+"/elsewhere", 0o755)
			os.Rename(in.real, in.dir+"/elsewhere/docker")
			in.config(t, "real.docker = "+in.dir+"/elsewhere/docker\n")
			expect(t, in.shim, 3, "")
			os.Rename(in.dir+"/elsewhere/docker", in.real)
			in.config(t, "")
		})
		t.Run("SH-25 not executable", func(t *testing.T) {
			os.Chmod(in.real, 0o644)
			expect(t, in.shim, 126, "cannot start the real docker")
			os.Chmod(in.real, 0o755)
		})
		t.Run("SH-25 no program", func(t *testing.T) {
			os.Rename(in.real, in.real+".kept")
			os.WriteFile(in.real, []byte("\x00\x01 no program"), 0o755)
			expect(t, in.shim, 126, "cannot start the real docker")
			os.Rename(in.real+".kept", in.real)
		})
		for name, link := range map[string]func(string, string) error{"link": os.Symlink, "hard link": os.Link, "copy": func(from, to string) error {
			copyFile(t, from, to)
			return nil
		}} {
			t.Run("SH-26 the shim itself, a "+name, func(t *testing.T) {
				os.Rename(in.real, in.real+".kept")
				if err := link(in.shim, in.real); err != nil {
					t.Fatal(err)
				}
				expect(t, in.shim, 126, "shim itself")
				os.Remove(in.real)
				os.Rename(in.real+".kept", in.real)
			})
		}
		t.Run("SH-24 missing", func(t *testing.T) {
			os.Remove(in.real)
			expect(t, in.shim, 127, in.real)
			all := in.records(t)
			if e := all[len(all)-1].Invocation.ExecError; e != "ENOENT" {
				t.Errorf("exec_error %q", e)
			}
		})
	})
}

// TestWhoDecides: root-owned files and the shim's own path do; the job does not.
func TestWhoDecides(t *testing.T) {
	eachBuild(t, func(t *testing.T, in installation) {
		call := func(env ...string) {
			t.Helper()
			cmd := exec.Command(in.shim, "exit", "0")
			cmd.Env = append(os.Environ(), env...)
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
		}
		count := 0
		expect := func(name string, recorded bool, env ...string) {
			t.Helper()
			call(env...)
			if recorded {
				count++
			}
			if n := len(in.records(t)); n != count {
				t.Errorf("%s: %d records, want %d", name, n, count)
				count = n
			}
		}
		expect("as installed", true)
		expect("SH-56 variables of the job", true, "TALLYMAN=off", "TALLYMAN_RUN_DIR=/tmp", "TALLYMAN_CONFIG=/dev/null", "TALLYMAN_SOCKET=/etc/x", "GODEBUG=x=y", "GOMAXPROCS=9")
		os.WriteFile(in.run+"/off", nil, 0o644)
		expect("the off marker", false)
		os.Remove(in.run + "/off")
		in.config(t, "enabled = false\n")
		expect("switched off", false)
		in.config(t, "no_such_key = 1\nenabled maybe\n")
		expect("a typing error", true)
		os.Chmod(in.dir+"/tallyman.conf", 0o666)
		expect("a file that everybody could have written", false)
		os.Chmod(in.dir+"/tallyman.conf", 0o644)
		if os.Getuid() == 0 {
			os.Chown(in.dir+"/tallyman.conf", 1001, 0)
			expect("a file of another user", false)
			os.Chown(in.dir+"/tallyman.conf", 0, 0)
		}
		expect("as before", true)
	})
}

// TestDefaultsDecideNothing: where the configuration cannot be trusted, the call is not
// recorded by the defaults either; and /etc/tallyman/off is a switch. The folders of the
// machine are hidden from the shim, in a mount name space of its own.
func TestDefaultsDecideNothing(t *testing.T) {
	require.Root(t)
	const hidden = `mount -t tmpfs none /run && mkdir -p -m 733 /run/tallyman/spool && mount -t tmpfs none /etc && mkdir /etc/tallyman || exit 77
`
	const conf = `/etc/tallyman/tallyman.conf`
	for _, row := range []struct {
		name, setup string
		records     int
	}{
		{"no configuration", "", 1},
		{"root's configuration", "echo spool_max_bytes = 1MiB > " + conf, 1},
		{"a configuration that everybody can write", "echo > " + conf + "; chmod 666 " + conf, 0},
		{"a configuration of another user", "echo > " + conf + "; chown 1001 " + conf, 0},
		{"one beside the shim that everybody can write", `echo > "$1"/tallyman.conf; chmod 666 "$1"/tallyman.conf`, 0},
		{"one beside the shim of another user", `echo > "$1"/tallyman.conf; chown 1001 "$1"/tallyman.conf`, 0},
		{"root's off file", "touch /etc/tallyman/off", 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			eachBuild(t, func(t *testing.T, in installation) {
				if err := os.Remove(in.dir + "/tallyman.conf"); err != nil {
					t.Fatal(err)
				}
				script := hidden + row.setup + "\n\"$1\"/docker exit 0 || exit\nfor f in /run/tallyman/spool/*.jsonl; do test ! -f \"$f\" || cat \"$f\"; done"
				cmd := exec.Command("/bin/sh", "-c", script, "sh", in.dir)
				cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
				var out, said bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &said
				if err := cmd.Run(); err != nil {
					if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == 77 {
						require.Missing(t, fmt.Sprintf("mounts in a name space of its own (CAP_SYS_ADMIN): %v: %s", err, &said))
					}
					t.Fatalf("%v: %s", err, &said)
				}
				if n := strings.Count(out.String(), record.Marker); n != row.records || n != bytes.Count(out.Bytes(), []byte("\n")) {
					t.Errorf("%d records, want %d:\n%s", n, row.records, &out)
				}
			})
		})
	}
}

// TestManyAtOnce: 1,000 calls at the same time and no agent give 1,000 whole records.
func TestManyAtOnce(t *testing.T) {
	in := install(t, "lean")
	const calls = 1000
	limit := make(chan struct{}, 100)
	var wg sync.WaitGroup
	for i := range calls {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			cmd := exec.Command(in.shim, "exit", strconv.Itoa(i%256), strings.Repeat("-x ", i))
			cmd.Args = cmd.Args[:3]
			cmd.Env = append(os.Environ(), "GITHUB_WORKFLOW="+strings.Repeat("w", i*4))
			cmd.Run()
			if cmd.ProcessState.ExitCode() != i%256 {
				t.Errorf("call %d: exit code %d", i, cmd.ProcessState.ExitCode())
			}
		})
	}
	wg.Wait()
	ids := map[string]bool{}
	for _, r := range in.records(t) {
		ids[r.ID] = true
	}
	if len(ids) != calls {
		t.Errorf("%d records of %d calls", len(ids), calls)
	}
}

func TestRecordOfACall(t *testing.T) {
	in := install(t, "lean")
	work := t.TempDir()
	os.Mkdir(work+"/deploy", 0o755)
	cmd := exec.Command(in.shim, "exit", "0")
	cmd.Dir = work + "/deploy"
	cmd.Env = []string{"GITHUB_REPOSITORY=octo/shop", "GITHUB_RUN_ID=42", "GITHUB_RUN_ATTEMPT=2", "GITHUB_WORKFLOW=Build, test | deploy", "GITHUB_JOB=build",
		"GITHUB_ACTION=__run_2", "RUNNER_TRACKING_ID=github_x", "GITHUB_WORKSPACE=" + work, "DOCKER_HOST=tcp://10.1.2.3:2376", "GITHUB_TOKEN=ghs_secret",
		"ACTIONS_RUNTIME_TOKEN=secret2", "SUDO_UID=1001", "DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND=docker", "RUNNER_NAME=r1", "NODE_NAME=node-7"}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	got := in.records(t)[0]
	inv := got.Invocation
	if inv.PID != int64(cmd.Process.Pid) || inv.PPID != int64(os.Getpid()) || inv.MonoNS == 0 {
		t.Errorf("pid %d, ppid %d, mono %d", inv.PID, inv.PPID, inv.MonoNS)
	}
	inv.PID, inv.PPID, inv.MonoNS = 0, 0, 0
	host := got.Host.Name
	want := record.Record{ID: got.ID, TS: got.TS, Kind: record.KindInvocation, Schema: 1, By: record.ByEnvironment,
		CI: &record.CI{Repository: "octo/shop", RunID: "42", RunAttempt: 2, Workflow: "Build, test | deploy", Job: "build", Step: "__run_2",
			TrackingID: "github_x", Runner: &record.Runner{Name: "r1"}},
		Host:       &record.Host{Name: host, Node: "node-7"},
		Invocation: &record.Invocation{Tool: "docker", Command: "exit", Argc: 3, UID: int64(os.Getuid()), Sudo: true, Cwd: "deploy", Daemon: "tcp", Nested: true},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %s\nwant %s", record.Append(nil, &got), record.Append(nil, &want))
	}
	b, _ := os.ReadFile(filepath.Join(in.run, "spool", strconv.Itoa(os.Getuid())+".jsonl"))
	if bytes.Contains(b, []byte("secret")) || bytes.Contains(b, []byte("10.1.2.3")) {
		t.Errorf("a secret or an address leaked: %s", b)
	}
}
