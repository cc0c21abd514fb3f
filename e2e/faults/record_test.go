package faults

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
)

// last is the newest record of root's append file, and its line.
func (r *rig) last() (record.Record, string) {
	r.t.Helper()
	b, err := os.ReadFile(r.spoolFile(0, ".jsonl"))
	must(r.t, err)
	all, _ := parse(r.t, b)
	if len(all) == 0 {
		r.t.Fatal("no record")
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	return all[len(all)-1], lines[len(lines)-1]
}

// TestCommandLineAtTheLimit: whatever command line a direct start takes, the shim takes,
// byte for byte, though the real tool's path is longer; what is too long directly is too
// long through it. The record stays under its bound and says that it was cut.
func TestCommandLineAtTheLimit(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-19")
	eachBuild(t, func(t *testing.T, r *rig) {
		// The longest command line that the kernel takes directly, to the byte.
		args := func(bytes int) []string {
			const one = 100_000 // a single string has less than 128 KiB
			list := []string{"pull"}
			for bytes -= 64; bytes > one; bytes -= one + 1 {
				list = append(list, strings.Repeat("i", one))
			}
			return append(list, strings.Repeat("i", bytes), "code-37")
		}
		// One rig has one length of path: the shim's, by which a direct start is measured.
		direct := r.dir + "/direct"
		copyFile(t, bin+"/real", direct)
		low, high := 1_000_000, 3_000_000
		for low+1 < high {
			middle := (low + high) / 2
			got := r.start(direct[:len(r.shim)], call{args: args(middle)})
			if got.stderr == syscall.E2BIG.Error() {
				high = middle
			} else if got.status.ExitStatus() == 37 {
				low = middle
			} else {
				t.Fatal(got)
			}
		}
		for _, size := range []int{low - 100_000, low - 9, low - 1, low} {
			want := r.start(direct[:len(r.shim)], call{args: args(size)})
			if got := r.start(r.shim, call{args: args(size)}); got != want {
				t.Errorf("%d bytes: through the shim %s\ndirectly %s", size, got, want)
			}
			rec, line := r.last()
			if len(line) > 16<<10 {
				t.Errorf("%d bytes give a record of %d bytes", size, len(line))
			}
			if rec.Invocation.Argc < 10 {
				t.Errorf("argc %d", rec.Invocation.Argc)
			}
		}
		if got := r.start(r.shim, call{args: args(low + 1)}); got.stderr != syscall.E2BIG.Error() {
			t.Errorf("%d bytes: %s, want E2BIG from the start of the shim", low+1, got)
		}
		// Many images: the record would be too long.
		many := []string{"rmi"}
		for i := range 400 {
			many = append(many, fmt.Sprintf("registry.example.com/team/image-%d:%d", i, i))
		}
		r.call(call{args: append(many, "code-3"), env: bigRecord()})
		rec, line := r.last()
		if !rec.Invocation.Truncated || len(line) > 16<<10 || len(rec.Invocation.Images) == 0 {
			t.Errorf("truncated %v, %d bytes, %d images, redaction %q", rec.Invocation.Truncated, len(line), len(rec.Invocation.Images), rec.Invocation.Redaction)
		}
	})
}

// TestHostileEnvironment: control bytes, line ends, terminal escapes and bytes that are
// no UTF-8 in the job's variables. The record is one line, and no decoded string in it
// can do anything to a terminal or end a line.
func TestHostileEnvironment(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-22", "SH-21")
	eachBuild(t, func(t *testing.T, r *rig) {
		var hostile strings.Builder
		for c := 1; c < 256; c++ {
			hostile.WriteByte(byte(c))
		}
		hostile.WriteString("\u2028\u2029\u0085\u009b31m\x1b]0;title\a\r\n{\"id\":\"forged\"}\n\ufeff\u202e")
		var env []string
		for _, name := range []string{"REPOSITORY", "WORKFLOW", "REF", "ACTOR", "JOB", "SHA", "ACTION", "HEAD_REF", "EVENT_NAME", "WORKSPACE", "RUN_ID", "TRIGGERING_ACTOR"} {
			env = append(env, "GITHUB_"+name+"="+hostile.String())
		}
		env = append(env, "RUNNER_NAME="+hostile.String(), "RUNNER_TRACKING_ID="+hostile.String(), "NODE_NAME="+hostile.String(), hostile.String())
		r.call(call{env: env, args: []string{"run", hostile.String(), "--" + hostile.String(), "code-9"}})
		r.wantSpooled(0, 1)
		b, err := os.ReadFile(r.spoolFile(0, ".jsonl"))
		must(t, err)
		if bytes.Count(b, []byte("\n")) != 1 {
			t.Errorf("%d line ends in one record", bytes.Count(b, []byte("\n")))
		}
		rec, _ := r.last()
		for name, s := range map[string]string{"repository": rec.CI.Repository, "workflow": rec.CI.Workflow, "ref": rec.CI.Ref, "actor": rec.CI.Actor, "job": rec.CI.Job,
			"step": rec.CI.Step, "runner": rec.CI.Runner.Name, "tracking id": rec.CI.TrackingID, "node": rec.Host.Node, "cwd": rec.Invocation.Cwd,
			"images": strings.Join(rec.Invocation.Images, ""), "flags": strings.Join(rec.Invocation.Flags, "")} {
			for _, c := range s {
				if c < 0x20 || c >= 0x7f && c < 0xa0 || c == 0x2028 || c == 0x2029 {
					t.Errorf("%s holds %U", name, c)
				}
			}
		}
	})
}

// TestOddEnvironment: variables of the job that are missing, empty or as long as the
// kernel allows.
func TestOddEnvironment(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-23")
	eachBuild(t, func(t *testing.T, r *rig) {
		for _, test := range []struct {
			name  string
			env   []string
			check func(rec record.Record) bool
		}{
			{"none of the job's", []string{"GITHUB_REPOSITORY=", "GITHUB_RUN_ID="}, func(rec record.Record) bool { return rec.CI == nil && rec.By == record.ByNone }},
			{"empty", []string{"GITHUB_REPOSITORY=", "GITHUB_RUN_ID=", "GITHUB_RUN_ATTEMPT=", "GITHUB_WORKFLOW=", "RUNNER_NAME=", "GITHUB_ACTION="},
				func(rec record.Record) bool { return rec.CI == nil }},
			{"numbers that are none", []string{"GITHUB_RUN_ATTEMPT=many", "GITHUB_RUN_NUMBER=-99999999999999999999"},
				func(rec record.Record) bool { return rec.CI.RunAttempt == 0 && rec.CI.RunNumber == 0 }},
			{"one megabyte in all", func() (env []string) {
				for _, name := range []string{"REPOSITORY", "WORKFLOW", "REF", "ACTOR", "JOB", "SHA", "HEAD_REF", "EVENT_NAME"} {
					env = append(env, "GITHUB_"+name+"="+strings.Repeat("x", 131_000-20))
				}
				return env
			}(), func(rec record.Record) bool {
				for _, s := range []string{rec.CI.Repository, rec.CI.Workflow, rec.CI.Ref, rec.CI.Actor, rec.CI.Job, rec.CI.SHA} {
					if len(s) == 0 || len(s) > record.MaxField {
						return false
					}
				}
				return true
			}},
		} {
			r.call(call{env: test.env})
			if rec, line := r.last(); !test.check(rec) || len(line) > 16<<10 {
				t.Errorf("%s: %.300s (%d bytes)", test.name, line, len(line))
			}
		}
	})
}

// TestRealBinary: what can be wrong with the real docker. One line that names it, the
// exit code of a shell, and a record.
func TestRealBinary(t *testing.T) {
	require.Root(t)
	otherMachine := func(path string) error {
		b, err := os.ReadFile(bin + "/real")
		if err != nil {
			return err
		}
		b[18], b[19] = byte(elf.EM_S390), byte(elf.EM_S390>>8) // e_machine
		return os.WriteFile(path, b, 0o755)
	}
	script := func(text string) func(string) error {
		return func(path string) error { return os.WriteFile(path, []byte(text), 0o755) }
	}
	for _, test := range []struct {
		name, id string
		make     func(path string) error // at the place of the real docker, which is empty
		code     int
		says     string
		record   string // exec_error
	}{
		{"missing", "SH-24", func(string) error { return nil }, 127, "/docker.original", "ENOENT"},
		{"behind a missing folder", "SH-24", func(path string) error { return os.Symlink("/nonexistent/docker", path) }, 127, "/docker.original", "ENOENT"},
		{"below a file", "SH-24", func(path string) error { return os.Symlink("/proc/version/docker", path) }, 127, "/docker.original", "ENOTDIR"},
		{"not executable", "SH-25", func(path string) error { return os.WriteFile(path, []byte("#!/bin/sh\n"), 0o644) }, 126, "permission denied", "EACCES"},
		{"a folder", "SH-25", func(path string) error { return os.Mkdir(path, 0o755) }, 126, "permission denied", "EACCES"},
		{"a FIFO", "SH-25", func(path string) error { return unix.Mkfifo(path, 0o755) }, 126, "permission denied", "EACCES"},
		{"for another machine", "SH-25", otherMachine, 126, "exec format error", ""},
		{"empty", "SH-25", script(""), 126, "exec format error", ""},
		{"cut off", "SH-25", script("\x7fELF"), 126, "exec format error", ""},
		{"with a missing interpreter", "SH-25", script("#!/nonexistent/sh\n"), 126, "interpreter", ""},
		{"a link to itself", "SH-25", func(path string) error { return os.Symlink(path, path) }, 126, "/docker.original", "ELOOP"},
		{"open for writing", "SH-25", func(path string) error {
			b, err := os.ReadFile(bin + "/real")
			if err != nil {
				return err
			}
			f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
			if err == nil {
				t.Cleanup(func() { f.Close() })
				_, err = f.Write(b)
			}
			return err
		}, 126, "text file busy", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			faults.Case(t, test.id)
			eachBuild(t, func(t *testing.T, r *rig) {
				must(t, os.Remove(r.real))
				must(t, test.make(r.real))
				r.refused(r.shim, test.code, test.says)
				if rec, _ := r.last(); rec.Invocation.ExecError != test.record {
					t.Errorf("exec_error %q, want %q", rec.Invocation.ExecError, test.record)
				}
			})
		})
	}
}

// TestShimOfItself: the real docker is the shim, in every disguise.
func TestShimOfItself(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-26")
	eachBuild(t, func(t *testing.T, r *rig) {
		for name, make := range map[string]func(){
			"link":      func() { must(t, os.Symlink("docker", r.real)) },
			"hard link": func() { must(t, os.Link(r.shim, r.real)) },
			"copy":      func() { copyFile(t, r.shim, r.real) },
		} {
			must(t, os.Remove(r.real))
			make()
			r.refused(r.shim, 126, "shim itself")
			if rec, _ := r.last(); rec.Invocation.ExecError != "ELOOP" {
				t.Errorf("%s: exec_error %q", name, rec.Invocation.ExecError)
			}
		}
	})
	// Two different builds, each the other's real docker: neither sees itself.
	t.Run("each other", func(t *testing.T) {
		a, b := newRig(t, "lean"), newRig(t, "usual")
		a.configure("real.docker = " + b.shim)
		b.configure("real.docker = " + a.shim)
		a.refused(a.shim, 126, "shim itself")
		b.refused(b.shim, 126, "shim itself")
	})
	// A long life before is no loop.
	t.Run("control", func(t *testing.T) {
		r := newRig(t, "lean")
		r.call(call{under: []string{"bash", "-c", `while read -r _ u _ < <(times | tr 'ms' '  '); [ "$SECONDS" -lt 1 ]; do :; done; exec "$@"`, "bash"}})
		r.wantSpooled(0, 1)
	})
}

// TestFileSizeLimit: at RLIMIT_FSIZE the kernel signals the writer, which kills by
// default. docker starts, with the limit and the signal's disposition as they were.
func TestFileSizeLimit(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-30")
	eachBuild(t, func(t *testing.T, r *rig) {
		for _, limit := range []string{"0", "1", "100"} {
			for _, trap := range []string{"", "trap '' XFSZ;"} {
				if trap != "" && strings.HasSuffix(t.Name(), "usual") {
					continue // a Go program with the usual runtime makes ignored signals default ones
				}
				under := []string{"sh", "-c", trap + ` prlimit --fsize=` + limit + ` "$@"; grep -h '^Sig[IB]' /proc/self/status; exit 5`, "sh"}
				r.call(call{under: under})
				r.call(call{under: []string{"sh", "-c", trap + ` exec prlimit --fsize=` + limit + ` "$@"`, "sh"}})
			}
		}
		must(t, os.Remove(r.real))
		must(t, os.Symlink("/bin/cat", r.real))
		for _, trap := range []string{"", "trap '' XFSZ;"} {
			if trap != "" && strings.HasSuffix(t.Name(), "usual") {
				continue
			}
			// docker itself dies of the signal, or gets the error, as without us.
			r.call(call{under: []string{"sh", "-c", trap + ` cd "` + t.TempDir() + `"; prlimit --fsize=1 "$0" "$1" >out 2>/dev/null; echo $?`}, args: []string{"/etc/passwd"}})
		}
		if b, err := os.ReadFile(r.spoolFile(0, ".lost")); err != nil && !os.IsNotExist(err) || bytes.Count(b, []byte("f")) > 8 {
			t.Errorf("%q, %v", b, err)
		}
		if got := bytes.Count(spoolBytes(t, r), []byte("\n")); got != len(r.spooled(0)) {
			t.Errorf("%d lines and %d records", got, len(r.spooled(0)))
		}
	})
}

func spoolBytes(t testing.TB, r *rig) []byte {
	b, err := os.ReadFile(r.spoolFile(0, ".jsonl"))
	must(t, err)
	return b
}

// TestMistakenPrivileges: the shim has a set-user-ID or set-group-ID bit. docker runs
// with the caller's ids, as a direct start would; a path that the caller chose neither
// gets a record nor runs with more than the caller's rights.
func TestMistakenPrivileges(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-53")
	for _, build := range builds {
		for name, mode := range map[string]uint32{"setuid": 0o4755, "setgid": 0o2755, "both": 0o6755} {
			t.Run(name+"/"+build, func(t *testing.T) {
				r := newRig(t, build)
				// A mount of its own: /dev/shm is often nosuid.
				mount(t, "faults", r.dir+"/suid", "tmpfs", 0, "mode=755")
				shim := r.dir + "/suid/docker"
				copyFile(t, r.shim, shim)
				copyFile(t, r.real, shim+".original")
				copyFile(t, r.dir+"/tallyman.conf", r.dir+"/suid/tallyman.conf")
				must(t, syscall.Chmod(shim, mode))
				// The control: the bit works for another program there.
				control := r.dir + "/suid/id"
				copyFile(t, bin+"/real", control)
				must(t, syscall.Chmod(control, mode))
				if got := r.start(control, call{uid: job}); !strings.Contains(got.stdout, " 0, ") && !strings.Contains(got.stdout, fmt.Sprintf("group %d 0", job)) {
					faults.CannotRun(t, fmt.Sprintf("needs a tmpfs that heeds set-user-ID bits: %s", got))
				}
				elsewhere := *r
				elsewhere.shim, elsewhere.real = shim, shim+".original"
				elsewhere.call(call{uid: job})
				r.wantSpooled(job, 0)

				// The caller's own link to it, the caller's own program and configuration.
				theirs := r.dir + "/theirs"
				must(t, os.Mkdir(theirs, 0o755))
				must(t, os.Chown(theirs, job, job))
				must(t, os.Symlink(shim, theirs+"/docker"))
				copyFile(t, r.real, theirs+"/docker.original")
				must(t, os.Symlink(r.dir+"/tallyman.conf", theirs+"/tallyman.conf"))
				elsewhere.shim, elsewhere.real = theirs+"/docker", theirs+"/docker.original"
				elsewhere.call(call{uid: job})
				r.wantSpooled(job, 0)
				r.wantSpooled(0, 0)

				// Root loses nothing by it.
				elsewhere.shim, elsewhere.real = shim, shim+".original"
				if name == "setuid" {
					elsewhere.call(call{uid: 0})
				}
			})
		}
	}
	// A caller that has another effective user keeps it.
	t.Run("the caller's own", func(t *testing.T) {
		eachBuild(t, func(t *testing.T, r *rig) {
			r.call(call{under: []string{"setpriv", "--ruid=1001", "--euid=0", "--clear-groups"}})
			r.call(call{under: []string{"setpriv", "--ruid=0", "--euid=1001", "--clear-groups"}})
			r.call(call{under: []string{"setpriv", "--rgid=1001", "--egid=0", "--clear-groups"}})
		})
	})
}

// TestWhoConfigures: no variable of a job sends a record elsewhere, and no configuration
// file, whatever it is, keeps docker from starting.
func TestWhoConfigures(t *testing.T) {
	require.Root(t)
	t.Run("variables", func(t *testing.T) {
		faults.Case(t, "SH-56")
		eachBuild(t, func(t *testing.T, r *rig) {
			must(t, os.MkdirAll(r.dir+"/other/spool", 0o777))
			must(t, os.WriteFile(r.dir+"/other.conf", []byte("run_dir = "+r.dir+"/other\n"), 0o644))
			env := []string{"TALLYMAN_RUN_DIR=" + r.dir + "/other", "TALLYMAN_CONFIG=" + r.dir + "/other.conf", "TALLYMAN_SOCKET=/etc/x", "TALLYMAN_LOG=/etc/x",
				"TALLYMAN=off", "TMPDIR=" + r.dir + "/other", "HOME=" + r.dir + "/other", "XDG_RUNTIME_DIR=" + r.dir + "/other", "GODEBUG=madvdontneed=9",
				"GOTRACEBACK=crash", "GOMEMLIMIT=1", "GOGC=1", "GOMAXPROCS=99", "DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND=/etc/x", "LD_PRELOAD=/etc/x"}
			r.call(call{env: env})
			r.wantSpooled(0, 1)
			if _, err := os.Stat("/etc/x"); err == nil {
				t.Error("/etc/x was made")
			}
		})
	})
	for _, test := range []struct {
		name     string
		make     func(t *testing.T, r *rig, path string)
		recorded int
	}{
		{"missing", func(t *testing.T, r *rig, path string) {}, -1},
		{"not readable", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("run_dir = "+r.run), 0o600))
		}, 0},
		{"a FIFO", func(t *testing.T, r *rig, path string) { must(t, unix.Mkfifo(path, 0o644)) }, 0},
		{"a folder", func(t *testing.T, r *rig, path string) { must(t, os.Mkdir(path, 0o755)) }, 0},
		{"a device without end", func(t *testing.T, r *rig, path string) { must(t, os.Symlink("/dev/zero", path)) }, 0},
		{"a link to itself", func(t *testing.T, r *rig, path string) { must(t, os.Symlink(path, path)) }, 0},
		{"a link to root's file", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path+".there", []byte("run_dir = "+r.run), 0o644))
			must(t, os.Symlink(path+".there", path))
		}, 1},
		{"the job's file", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("real.docker = /bin/false\nrun_dir = "+r.run), 0o644))
			must(t, os.Chown(path, job, job))
		}, 0},
		{"a file that everybody may write", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("real.docker = /bin/false\nrun_dir = "+r.run), 0o644))
			must(t, os.Chmod(path, 0o666))
		}, 0},
		{"binary", func(t *testing.T, r *rig, path string) {
			b, err := os.ReadFile(bin + "/real")
			must(t, err)
			must(t, os.WriteFile(path, append([]byte("run_dir = "+r.run+"\n"), b[:60<<10]...), 0o644))
		}, 1},
		{"one endless line", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, bytes.Repeat([]byte("x"), 64<<10), 0o644))
		}, -1},
		{"huge", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("run_dir = "+r.run), 0o644))
			must(t, os.Truncate(path, 1<<40))
		}, 0},
		{"with a NUL in a path", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("run_dir = "+r.run+"\x00/x\n"), 0o644))
		}, 0},
		{"with a run_dir longer than any path", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("run_dir = /"+strings.Repeat("x/", 20000)+"\n"), 0o644))
		}, 0},
		{"with the root as run_dir", func(t *testing.T, r *rig, path string) { must(t, os.WriteFile(path, []byte("run_dir = /\n"), 0o644)) }, 0},
		{"with a device as run_dir", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("run_dir = /dev/full\n"), 0o644))
		}, 0},
		{"with /proc as run_dir", func(t *testing.T, r *rig, path string) {
			must(t, os.WriteFile(path, []byte("run_dir = /proc/self\n"), 0o644))
		}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			faults.Case(t, "SH-63")
			eachBuild(t, func(t *testing.T, r *rig) {
				path := r.dir + "/tallyman.conf"
				must(t, os.Remove(path))
				test.make(t, r, path)
				r.call(call{uid: job})
				if test.recorded >= 0 { // without a file, the default run_dir is used
					r.wantSpooled(job, test.recorded)
				}
			})
		})
	}
}

// TestFewDescriptors: docker gets the limit of descriptors that its caller set. Where
// none is free the record is lost and counted.
func TestFewDescriptors(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-32")
	eachBuild(t, func(t *testing.T, r *rig) {
		for n := 3; n < 9; n++ {
			r.call(call{uid: job, under: []string{"prlimit", fmt.Sprintf("--nofile=%d", n)}})
		}
		lost := 6 - len(r.spooled(job))
		if lost == 0 {
			t.Error("no record was lost: this test shows nothing")
		}
		r.wantLost(job, lost, "no file descriptor")
	})
}
