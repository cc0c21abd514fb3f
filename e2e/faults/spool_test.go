package faults

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
)

// mount mounts a file system at a new folder until the test's end.
func mount(t testing.TB, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	must(t, os.MkdirAll(target, 0o755))
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs mount(2) of %s: %v", kind, err))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
			t.Error(err)
		}
	})
}

// TestSpoolThatCannotBeUsed: no agent, and a spool that takes nothing. docker runs,
// nothing is written where a hostile user points, and the loss is in the account when
// an agent comes.
func TestSpoolThatCannotBeUsed(t *testing.T) {
	require.Root(t)
	for _, test := range []struct {
		name    string
		cases   []string
		prepare func(t *testing.T, r *rig)
		cause   string
	}{
		{"folder is missing", []string{"SH-01"}, func(t *testing.T, r *rig) { must(t, os.Remove(r.run+"/spool")) }, "no spool folder"},
		{"run_dir is missing", []string{"SH-01"}, func(t *testing.T, r *rig) { must(t, os.RemoveAll(r.run)) }, "no spool folder"},
		{"folder is not writable", []string{"SH-02"}, func(t *testing.T, r *rig) { must(t, os.Chmod(r.run+"/spool", 0o555)) }, "may not be written"},
		{"folder is on a read-only file system", []string{"SH-03"}, func(t *testing.T, r *rig) {
			mount(t, "faults", r.run+"/spool", "tmpfs", unix.MS_RDONLY, "mode=1733")
		}, "read-only"},
		{"folder is a file", nil, func(t *testing.T, r *rig) {
			must(t, os.Remove(r.run+"/spool"))
			must(t, os.WriteFile(r.run+"/spool", nil, 0o666))
		}, "no spool folder"},
		{"file leads to /dev/full", []string{"SH-06"}, func(t *testing.T, r *rig) {
			must(t, os.Symlink("/dev/full", r.spoolFile(job, ".jsonl")))
		}, "something else than a plain file"},
		{"file is /dev/full", []string{"SH-06"}, func(t *testing.T, r *rig) {
			must(t, os.WriteFile(r.spoolFile(job, ".jsonl"), nil, 0o600))
			if err := unix.Mount("/dev/full", r.spoolFile(job, ".jsonl"), "", unix.MS_BIND, ""); err != nil {
				faults.CannotRun(t, fmt.Sprintf("needs a bind mount: %v", err))
			}
			t.Cleanup(func() { unix.Unmount(r.spoolFile(job, ".jsonl"), unix.MNT_DETACH) })
		}, "something else than a plain file"},
		{"file is a FIFO without a reader", []string{"SH-07"}, func(t *testing.T, r *rig) {
			must(t, unix.Mkfifo(r.spoolFile(job, ".jsonl"), 0o622))
			must(t, os.Chown(r.spoolFile(job, ".jsonl"), job, job))
		}, "something else than a plain file"},
		{"file and counter are FIFOs", []string{"SH-07"}, func(t *testing.T, r *rig) {
			for _, ending := range []string{".jsonl", ".lost"} {
				must(t, unix.Mkfifo(r.spoolFile(job, ending), 0o622))
				must(t, os.Chown(r.spoolFile(job, ending), job, job))
			}
		}, "something else than a plain file"},
		{"file is a FIFO with a reader", nil, func(t *testing.T, r *rig) {
			must(t, unix.Mkfifo(r.spoolFile(job, ".jsonl"), 0o622))
			must(t, os.Chown(r.spoolFile(job, ".jsonl"), job, job))
			f, err := os.OpenFile(r.spoolFile(job, ".jsonl"), os.O_RDONLY|syscall.O_NONBLOCK, 0)
			must(t, err)
			t.Cleanup(func() {
				b := make([]byte, 100)
				if n, _ := f.Read(b); n > 0 {
					t.Errorf("the FIFO's reader got %q", b[:n])
				}
				f.Close()
			})
		}, "something else than a plain file"},
		{"file is a link to a victim", []string{"SH-09"}, func(t *testing.T, r *rig) {
			must(t, os.Symlink(r.dir+"/victim", r.spoolFile(job, ".jsonl")))
			must(t, os.Symlink(r.dir+"/victim", r.spoolFile(job, ".lost")))
		}, "something else than a plain file"},
		{"file is another name of the caller's own file", []string{"SH-11"}, func(t *testing.T, r *rig) {
			must(t, os.Link(r.dir+"/victim", r.spoolFile(job, ".jsonl")))
			must(t, os.Link(r.dir+"/victim", r.spoolFile(job, ".lost")))
		}, "something else than a plain file"},
		{"file belongs to a stranger", []string{"SH-11"}, func(t *testing.T, r *rig) {
			must(t, os.WriteFile(r.spoolFile(job, ".jsonl"), nil, 0o666))
			must(t, os.Chmod(r.spoolFile(job, ".jsonl"), 0o666))
			must(t, os.Chown(r.spoolFile(job, ".jsonl"), 1234, 1234))
		}, "something else than a plain file"},
		{"file is a folder", nil, func(t *testing.T, r *rig) { must(t, os.Mkdir(r.spoolFile(job, ".jsonl"), 0o777)) }, "something else than a plain file"},
		{"file is a socket", nil, func(t *testing.T, r *rig) {
			fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
			must(t, err)
			must(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: r.spoolFile(job, ".jsonl")}))
			must(t, syscall.Close(fd))
			must(t, os.Chmod(r.spoolFile(job, ".jsonl"), 0o777))
		}, "something else than a plain file"},
		{"a link was swapped in for the folder", []string{"SH-12"}, func(t *testing.T, r *rig) {
			must(t, os.Remove(r.run+"/spool"))
			must(t, os.Symlink(r.dir+"/elsewhere", r.run+"/spool"))
		}, "something else than a plain file"},
		{"a link was swapped in for run_dir", []string{"SH-12"}, func(t *testing.T, r *rig) {
			must(t, os.Rename(r.run, r.dir+"/elsewhere/run"))
			must(t, os.Symlink(r.dir+"/elsewhere/run", r.run))
		}, "behind a link"},
		{"file is at its bound", nil, func(t *testing.T, r *rig) {
			r.configure("spool_max_bytes = 1KiB")
			must(t, os.WriteFile(r.spoolFile(job, ".jsonl"), make([]byte, 1024), 0o600))
			must(t, os.Chown(r.spoolFile(job, ".jsonl"), job, job))
		}, "at its bound"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			faults.Case(t, test.cases...)
			for _, build := range builds {
				r := newRig(t, build)
				must(t, os.Mkdir(r.dir+"/elsewhere", 0o777))
				must(t, os.Chmod(r.dir+"/elsewhere", 0o777))
				must(t, os.WriteFile(r.dir+"/victim", nil, 0o600))
				must(t, os.Chown(r.dir+"/victim", job, job))
				test.prepare(t, r)
				for range 3 {
					r.call(call{uid: job})
				}
				if b, err := os.ReadFile(r.dir + "/victim"); len(b) != 0 || err != nil {
					t.Errorf("the victim holds %q, %v", b, err)
				}
				filepath.WalkDir(r.dir+"/elsewhere", func(path string, d os.DirEntry, err error) error {
					if err == nil && d.Type().IsRegular() {
						t.Errorf("%s was made behind a link", path)
					}
					return nil
				})
				// What stands in the way goes, so that an agent can start.
				if link, err := os.Readlink(r.run); err == nil {
					must(t, os.Remove(r.run))
					must(t, os.Rename(link, r.run))
				}
				if info, err := os.Lstat(r.run + "/spool"); err == nil && !info.IsDir() {
					must(t, os.Remove(r.run+"/spool"))
				}
				r.wantLost(job, 3, test.cause)
				if build == "lean" {
					// With an agent none of it matters: the record goes to the socket.
					r.withAgent(func(a *agent) {
						before := len(a.invocations())
						r.call(call{uid: job})
						a.eventually(func() error {
							if n := len(a.invocations()) - before; n != 1 {
								return fmt.Errorf("%d records came by the socket, want 1", n)
							}
							return nil
						})
					})
				}
			}
		})
	}
}

// TestLossOfManyUsers: each uid's losses are its own, and told once, by the next agent
// or by the one that runs; a next agent tells nothing twice.
func TestLossOfManyUsers(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-01", "SH-02")
	r := newRig(t, "lean")
	must(t, os.Remove(r.run+"/spool"))
	for i, uid := range []int{0, job, 65534} {
		for range i + 1 {
			r.call(call{uid: uid})
		}
	}
	r.wantLost(0, 1, "no spool folder")
	r.wantLost(job, 2, "no spool folder")
	r.wantLost(65534, 3, "no spool folder")
}

// TestWhoOwnsWhat: one file for each uid, made 0600 in a folder where everybody may
// make one and nobody may list, read or remove those of others, whatever the umask.
func TestWhoOwnsWhat(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-15", "SE-07")
	eachBuild(t, func(t *testing.T, r *rig) {
		umask := func(mask string) []string { return []string{"sh", "-c", "umask " + mask + "; exec \"$@\"", "sh"} }
		r.call(call{uid: 0, under: umask("077")})
		r.call(call{uid: job, under: umask("000")})
		r.call(call{uid: job, under: umask("777")})
		r.call(call{uid: 1002, under: umask("022")})
		r.call(call{uid: 0, under: umask("000")})
		for uid, n := range map[int]int{0: 2, job: 2, 1002: 1} {
			r.wantSpooled(uid, n)
			info, err := os.Stat(r.spoolFile(uid, ".jsonl"))
			must(t, err)
			if mode, st := info.Mode(), info.Sys().(*syscall.Stat_t); mode&^0o600 != 0 || int(st.Uid) != uid {
				t.Errorf("the file of uid %d has mode %v and belongs to %d", uid, mode, st.Uid)
			}
		}
		for _, command := range []string{
			"cat " + r.spoolFile(job, ".jsonl"), "cat " + r.spoolFile(0, ".jsonl"), "ls " + r.run + "/spool",
			"rm -f " + r.spoolFile(job, ".jsonl"), "mv " + r.spoolFile(job, ".jsonl") + " " + r.spoolFile(7, ".jsonl"),
			"echo forged >>" + r.spoolFile(job, ".jsonl"), "truncate -s 0 " + r.spoolFile(job, ".lost"),
		} {
			cmd := exec.Command("sh", "-c", command)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1002, Gid: 1002}}
			if out, err := cmd.CombinedOutput(); err == nil {
				t.Errorf("uid 1002 may %s: %s", command, out)
			}
		}
		r.wantSpooled(job, 2)
	})
}

// TestProtectedRegular: with fs.protected_regular set even root gets EACCES when it
// opens another user's file in a sticky folder with O_CREAT. Root's own file there,
// and the one that belongs to the folder's owner, are appended to; one that a stranger
// planted is refused and the loss counted.
func TestProtectedRegular(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-13")
	const sysctl = "/proc/sys/fs/protected_regular"
	was, err := os.ReadFile(sysctl)
	must(t, err)
	t.Cleanup(func() { must(t, os.WriteFile(sysctl, was, 0o644)) })
	for _, level := range []string{"1", "2"} {
		if err := os.WriteFile(sysctl, []byte(level), 0o644); err != nil {
			faults.CannotRun(t, fmt.Sprintf("needs to set fs.protected_regular: %v", err))
		}
		eachBuild(t, func(t *testing.T, r *rig) {
			must(t, os.Chmod(r.run+"/spool", 0o777|os.ModeSticky))
			planted := r.spoolFile(0, ".jsonl")
			must(t, os.WriteFile(planted, nil, 0o666))
			must(t, os.Chown(planted, job, job))
			// The control: this is what O_CREAT would do.
			if fd, err := syscall.Open(planted, syscall.O_WRONLY|syscall.O_APPEND|syscall.O_CREAT, 0o600); err != syscall.EACCES {
				syscall.Close(fd)
				faults.CannotRun(t, fmt.Sprintf("needs a kernel that heeds fs.protected_regular: open with O_CREAT gives %v", err))
			}
			r.call(call{uid: 0})
			if info, err := os.Stat(planted); err != nil || info.Size() != 0 {
				t.Errorf("root wrote into a file that uid %d planted: %v, %v", job, info.Size(), err)
			}
			r.wantLost(0, 1, "something else than a plain file")
			must(t, os.Remove(planted))
			// The folder is the agent's, which is not root: what root writes there becomes
			// its own, and stays writable for root.
			must(t, os.Chown(r.run+"/spool", job, job))
			r.call(call{uid: 0})
			r.call(call{uid: 0})
			r.wantSpooled(0, 2)
			if info, err := os.Stat(planted); err != nil || info.Sys().(*syscall.Stat_t).Uid != job {
				t.Errorf("root's file does not belong to the folder's owner: %v", err)
			}
		})
	}
}

// TestRenamedBetweenOpenAndWrite: the agent puts a file away while a shim has it open.
// The record lands in the file that was put away, which the agent reads until no
// writer can hold it.
func TestRenamedBetweenOpenAndWrite(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-48")
	t.Parallel()
	needStrace(t)
	r := newRig(t, "lean")
	r.call(call{})
	r.wantSpooled(0, 1)
	// The first openat2 looks at run_dir, the second opens the file; then the shim is
	// stopped.
	late := make(chan outcome, 1)
	trace := r.dir + "/trace"
	go func() {
		late <- r.start(r.shim, call{under: []string{"strace", "-f", "-qq", "-o", trace, "-e", "trace=openat2", "-e", "inject=openat2:signal=SIGSTOP:when=2"}})
	}()
	var pid int
	must(t, eventually(t.Context(), func() error {
		b, _ := os.ReadFile(trace)
		if _, err := fmt.Sscan(string(b), &pid); err != nil || !bytes.Contains(b, []byte("stopped by SIGSTOP")) {
			return fmt.Errorf("the shim does not stop: %s", b)
		}
		return nil
	}))
	defer syscall.Kill(pid, syscall.SIGCONT)
	r.withAgent(func(a *agent) {
		a.eventually(func() error {
			if _, err := os.Stat(r.spoolFile(0, ".jsonl")); err == nil {
				return errors.New("the agent does not put the file away")
			}
			return nil
		})
		must(t, syscall.Kill(pid, syscall.SIGCONT))
		if got := <-late; got.status.ExitStatus() != 37 {
			t.Errorf("the late call: %s", got)
		}
		a.eventually(func() error {
			if n := len(a.invocations()); n != 2 {
				return fmt.Errorf("%d records in the journal, want 2", n)
			}
			return nil
		})
	})
}

// TestTruncatedFile: someone cuts the file (copytruncate). The agent says that records
// may be missing, and reads on from the start; also where the file has grown beyond
// the old place before the agent looks again.
func TestTruncatedFile(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-49")
	for name, more := range map[string]int{"shorter than before": 1, "longer than before": 6} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "lean")
			for range 3 {
				r.call(call{})
			}
			r.withAgent(func(a *agent) {
				want := func(n int) {
					t.Helper()
					a.eventually(func() error {
						if got := len(a.invocations()); got != n {
							return fmt.Errorf("%d records, want %d", got, n)
						}
						return nil
					})
				}
				want(3)
				// The agent stands still, so that no part of this is seen alone, and it must
				// not have put the file away yet.
				must(t, a.cmd.Process.Signal(syscall.SIGSTOP))
				name := r.spoolFile(0, ".jsonl")
				if _, err := os.Stat(name); err != nil {
					done, _ := filepath.Glob(r.run + "/spool/*.done")
					if len(done) != 1 {
						t.Fatalf("%v, %v", err, done)
					}
					name = done[0]
				}
				other := newRig(t, "lean")
				for range more {
					other.call(call{})
				}
				lines, err := os.ReadFile(other.spoolFile(0, ".jsonl"))
				must(t, err)
				f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0)
				must(t, err)
				_, err = f.Write(lines)
				must(t, errors.Join(err, f.Close()))
				must(t, a.cmd.Process.Signal(syscall.SIGCONT))
				want(3 + more)
				a.eventually(func() error {
					for _, l := range a.records() {
						if l.Kind == record.KindLoss && l.Loss.Cause == "truncated_file" && strings.Contains(l.Loss.Detail, filepath.Base(name)) {
							return nil
						}
					}
					return errors.New("no loss record tells of the cut file")
				})
			})
		})
	}
}
