package faults

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/journal/handover"
)

// disk mounts a fresh ext4 of some MiB from an image file at target.
func disk(t testing.TB, target string, size int64) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(image)
	must(t, err)
	must(t, errors.Join(f.Truncate(size<<20), f.Close()))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-m", "0", image).CombinedOutput(); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs mkfs.ext4 (apt-get install e2fsprogs): %v: %s", err, out))
	}
	must(t, os.MkdirAll(target, 0o755))
	// mount(8) finds a free loop device, and umount(8) frees it.
	if out, err := exec.Command("mount", "-o", "loop", image, target).CombinedOutput(); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs loop devices and mount(2): %v: %s", err, out))
	}
	t.Cleanup(func() {
		// A process that was killed a moment ago may still hold it.
		if err := eventually(t.Context(), func() error {
			out, err := exec.Command("umount", target).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}); err != nil {
			exec.Command("umount", "-l", target).Run()
			t.Error(err)
		}
	})
}

// bigRecord makes the record of a call some 10 KB long.
func bigRecord() (env []string) {
	for _, name := range []string{"GITHUB_WORKFLOW", "GITHUB_REF", "GITHUB_HEAD_REF"} {
		env = append(env, name+"="+strings.Repeat(name[7:8], 3200))
	}
	return env
}

// fill takes all room of a file system but so many bytes.
func fill(t testing.TB, path string, leave int64) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	var size int64
	for chunk := make([]byte, 1<<18); len(chunk) > 0; {
		n, err := f.Write(chunk)
		size += int64(n)
		if err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	must(t, f.Sync()) // or ext4 holds room back for blocks that it has yet to place
	must(t, errors.Join(f.Truncate(max(0, size-leave)), f.Sync(), f.Close()))
}

// TestFullDisk: a file system without room cuts a line short or refuses it. The rest is
// not written later, docker runs, what was lost is counted, and once there is room the
// record behind the torn line is found.
func TestFullDisk(t *testing.T) {
	require.Root(t)
	for _, test := range []struct {
		name, id string
		lines    []string
		mount    func(t *testing.T, r *rig)
		free     func(t *testing.T, r *rig)
	}{
		{"tmpfs", "SH-04", nil,
			func(t *testing.T, r *rig) { mount(t, "faults", r.run, "tmpfs", 0, "size=64k,mode=755") },
			func(t *testing.T, r *rig) { must(t, unix.Mount("faults", r.run, "tmpfs", unix.MS_REMOUNT, "size=1m")) }},
		{"ext4", "SH-05", []string{"spool_on_disk = true"},
			func(t *testing.T, r *rig) {
				disk(t, r.run, 8)
				fill(t, r.run+"/ballast", 64<<10)
			},
			func(t *testing.T, r *rig) { must(t, os.Remove(r.run+"/ballast")) }},
	} {
		for _, build := range builds {
			t.Run(test.name+"/"+build, func(t *testing.T) {
				faults.Case(t, test.id)
				r := newRig(t, build, test.lines...)
				must(t, os.RemoveAll(r.run))
				test.mount(t, r)
				r.makeSpool()
				const calls = 20
				for range calls {
					r.call(call{uid: job, env: bigRecord()})
				}
				b, err := os.ReadFile(r.spoolFile(job, ".jsonl"))
				must(t, err)
				whole, torn := parse(t, b)
				lost, err := os.ReadFile(r.spoolFile(job, ".lost"))
				must(t, err)
				if n := bytes.Count(lost, []byte("s")); len(whole) == 0 || len(whole) == calls || len(whole)+n != calls {
					t.Errorf("%d of %d records are whole, and the counter of losses says %d", len(whole), calls, n)
				}
				if torn > 0 {
					t.Errorf("%d records are torn in the middle of the file: the rest of a short write was written later", torn)
				}
				tail := len(b) - 1 - bytes.LastIndexByte(b, '\n')
				t.Logf("%d whole records, a torn one of %d bytes", len(whole), tail)
				test.free(t, r)
				r.call(call{uid: job})
				b, err = os.ReadFile(r.spoolFile(job, ".jsonl"))
				must(t, err)
				if again, _ := parse(t, b); len(again) != len(whole)+1 {
					t.Errorf("%d whole records after one more call, want %d", len(again), len(whole)+1)
				}
				r.wantLost(job, calls-len(whole), "is full")
			})
		}
	}
	// Small records that find no room fail whole.
	t.Run("counter has no room either", func(t *testing.T) {
		faults.Case(t, "SH-04")
		r := newRig(t, "lean")
		mount(t, "faults", r.run+"/full", "tmpfs", 0, "size=64k,mode=755")
		r.run += "/full"
		r.makeSpool()
		r.configure()
		fill(t, r.run+"/ballast", 0)
		for range 5 {
			r.call(call{uid: job})
		}
		must(t, os.Remove(r.run+"/ballast"))
		r.wantLost(job, 5, "is full")
	})
}

// freeze stops a file system until thaw, as LVM does. A process of its own holds it
// and thaws it whatever happens to the test.
func freeze(t testing.TB, dir string) (thaw func()) {
	t.Helper()
	cmd := exec.Command("sh", "-c", `fsfreeze -f "$0" && echo frozen && read -r _; fsfreeze -u "$0"`, dir)
	hold, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	var once sync.Once
	thaw = func() {
		once.Do(func() {
			hold.Close()
			cmd.Wait()
		})
	}
	t.Cleanup(thaw)
	said := make([]byte, 7)
	if _, err := io.ReadFull(out, said); err != nil {
		thaw()
		faults.CannotRun(t, fmt.Sprintf("needs fsfreeze: %s", strings.TrimSpace(stderr.String())))
	}
	return thaw
}

// TestFrozenDisk: with run_dir on an ext4 that is frozen, docker starts. Its record goes
// over the socket; where nobody answers there, it is counted.
func TestFrozenDisk(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-16")
	for _, build := range builds {
		t.Run(build, func(t *testing.T) {
			r := newRig(t, build)
			disk(t, r.dir+"/disk", 8)
			r.run = r.dir + "/disk/run"
			r.makeSpool()
			r.configure()
			// docker and the shim are there too, as in a container's root.
			for _, name := range []string{"docker", "docker.original", "tallyman.conf"} {
				copyFile(t, r.dir+"/"+name, r.dir+"/disk/"+name)
			}
			onDisk := *r
			onDisk.shim, onDisk.real = r.dir+"/disk/docker", r.dir+"/disk/docker.original"
			must(t, os.Chmod(r.dir+"/disk/tallyman.conf", 0o644))
			got := make(chan string, 100)
			stop := serve(t, r.run+"/agent.sock", func(fd int) {
				got <- receive(fd)
				unix.Write(fd, []byte{handover.AckClose})
			})
			thaw := freeze(t, r.dir+"/disk")
			r.call(call{uid: job})
			onDisk.call(call{uid: job})
			for range 2 {
				if line := <-got; !strings.Contains(line, `"run_id":"42"`) {
					t.Errorf("the agent got %q", line)
				}
			}
			// The agent stops answering, then goes.
			stop()
			r.call(call{uid: job})
			onDisk.call(call{uid: job})
			thaw()
			if names, _ := filepath.Glob(r.run + "/spool/*"); len(names) != 0 {
				t.Errorf("the shim made %v on the disk", names)
			}
			r.wantLost(job, 2, "on a disk")
		})
	}
	// The control: with spool_on_disk, the freeze does stop docker, until it ends.
	t.Run("control", func(t *testing.T) {
		r := newRig(t, "lean", "spool_on_disk = true")
		disk(t, r.run+"/disk", 8)
		r.run += "/disk"
		r.makeSpool()
		r.configure("spool_on_disk = true")
		thaw := freeze(t, r.run)
		ended := make(chan outcome, 1)
		go func() { ended <- r.start(r.shim, call{uid: job}) }()
		select {
		case got := <-ended:
			t.Errorf("docker did not wait for the disk (%s): this test shows nothing", got)
		case <-time.After(time.Second):
		}
		thaw()
		if got := <-ended; got.status.ExitStatus() != 37 {
			t.Errorf("after the thaw: %s", got)
		}
		r.wantSpooled(job, 1)
	})
}

// hang mounts a FUSE file system whose server answers the kernel's greeting and then
// nothing, as one that is stopped or waits for its network.
func hang(t testing.TB, target string) {
	t.Helper()
	must(t, os.MkdirAll(target, 0o755))
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs FUSE: open /dev/fuse: %v", err))
	}
	if err := unix.Mount("faults", target, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		unix.Close(fd)
		faults.CannotRun(t, fmt.Sprintf("needs FUSE: mount: %v", err))
	}
	t.Cleanup(func() {
		// Closing the server's end fails all that waits for it.
		if err := errors.Join(unix.Close(fd), unix.Unmount(target, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	// struct fuse_in_header (40 bytes) and fuse_init_in; the answer is fuse_out_header
	// (16 bytes) and fuse_init_out (64 bytes), see linux/fuse.h.
	in := make([]byte, 1<<17)
	n, err := unix.Read(fd, in)
	must(t, err)
	const opInit = 26
	if n < 48 || binary.LittleEndian.Uint32(in[4:]) != opInit {
		t.Fatalf("the kernel's first request is %x", in[:n])
	}
	out := make([]byte, 80)
	binary.LittleEndian.PutUint32(out, uint32(len(out)))
	copy(out[8:16], in[8:16])                        // unique
	binary.LittleEndian.PutUint32(out[16:], 7)       // major
	binary.LittleEndian.PutUint32(out[20:], 31)      // minor
	binary.LittleEndian.PutUint32(out[24:], 1<<17)   // max_readahead
	binary.LittleEndian.PutUint16(out[32:], 12)      // max_background
	binary.LittleEndian.PutUint32(out[36:], 128<<10) // max_write
	_, err = unix.Write(fd, out)
	must(t, err)
}

// TestHungFileSystem: run_dir lies on a FUSE file system whose server hangs, or below
// it. docker starts, without a call to it.
func TestHungFileSystem(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-17")
	for _, build := range builds {
		for _, test := range []struct {
			name, at string
			run      string // "": the usual
			socket   bool   // can be used
		}{
			{"run_dir itself", "/run", "", false},
			{"below it", "/hung", "/hung/deep/run", false},
			{"the spool alone", "/run/spool", "", true},
			{"a name with a space", "/a b", "/a b/run", false},
		} {
			t.Run(test.name+"/"+build, func(t *testing.T) {
				r := newRig(t, build)
				var got chan string
				if test.socket {
					got = make(chan string, 10)
					serve(t, r.run+"/agent.sock", func(fd int) {
						got <- receive(fd)
						unix.Write(fd, []byte{handover.AckClose})
					})
				}
				if test.run != "" {
					r.run = r.dir + test.run
					r.configure()
				}
				hang(t, r.dir+test.at)
				if test.at == "/run" && build == "lean" {
					// The control: a look at it waits for ever.
					cmd := exec.Command("stat", r.run+"/x")
					must(t, cmd.Start())
					ended := make(chan error, 1)
					go func() { ended <- cmd.Wait() }()
					select {
					case err := <-ended:
						t.Errorf("the file system does not hang (%v): this test shows nothing", err)
					case <-time.After(time.Second / 2):
						defer func() { <-ended }()
						defer cmd.Process.Kill()
					}
				}
				r.call(call{uid: job})
				r.call(call{uid: 0})
				if test.socket {
					for range 2 {
						if line := <-got; !strings.Contains(line, `"run_id":"42"`) {
							t.Errorf("the agent got %q", line)
						}
					}
					return
				}
				if n := kernelCounter(t, r.run+"/spool", job, "hang"); n != 1 {
					t.Errorf("%d losses are counted for uid %d, want 1", n, job)
				}
			})
		}
	}
	// A link must not lead to it either.
	t.Run("behind a link", func(t *testing.T) {
		r := newRig(t, "lean")
		hang(t, r.dir+"/hung")
		must(t, os.RemoveAll(r.run))
		must(t, os.Symlink(r.dir+"/hung/run", r.run))
		r.call(call{uid: job})
	})
}

// kernelCounter reads the counter of one cause that the shims of uid keep in the
// kernel.
func kernelCounter(t testing.TB, spool string, uid int, cause string) int {
	t.Helper()
	id, _, errno := unix.Syscall(unix.SYS_SEMGET, uintptr(handover.LossKey(spool, uid)), 0, 0)
	if errno != 0 {
		t.Fatalf("uid %d has no counters: %v", uid, errno)
	}
	which := slices.IndexFunc(handover.Causes[:], func(c handover.Cause) bool { return c.Text == text(t, cause) })
	const getVal = 12
	n, _, errno := unix.Syscall6(unix.SYS_SEMCTL, id, uintptr(which), getVal, 0, 0, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
	return int(n)
}

// TestReadOnlyRoot: a root file system without a single writable mount, no /proc and no
// /dev. The socket still takes the record; without an agent the loss is counted in the
// kernel, and the next agent tells it.
func TestReadOnlyRoot(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-59", "SH-03")
	eachBuild(t, func(t *testing.T, r *rig) {
		got := make(chan string, 10)
		stop := serve(t, r.run+"/agent.sock", func(fd int) {
			got <- receive(fd)
			unix.Write(fd, []byte{handover.AckClose})
		})
		root := r.dir + "/root"
		mount(t, "faults", root, "tmpfs", 0, "size=1m,mode=755")
		inside := root + r.dir
		must(t, os.MkdirAll(inside, 0o755))
		if err := errors.Join(unix.Mount(r.dir, inside, "", unix.MS_BIND, ""), unix.Mount("", inside, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")); err != nil {
			faults.CannotRun(t, fmt.Sprintf("needs bind mounts: %v", err))
		}
		t.Cleanup(func() { unix.Unmount(inside, unix.MNT_DETACH) })
		must(t, unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, "size=1m"))
		r.call(call{root: root, uid: job})
		if line := <-got; !strings.Contains(line, `"run_id":"42"`) {
			t.Errorf("the agent got %q", line)
		}
		stop()
		r.call(call{root: root, uid: job})
		r.call(call{root: root})
		must(t, unix.Unmount(inside, unix.MNT_DETACH))
		r.wantLost(job, 1, "read-only")
		r.wantLost(0, 1, "read-only")
	})
}

// TestWriteback: while a disk is busy writing back, calls with their run_dir on tmpfs go
// on: each is recorded. What they take beside direct calls is printed.
func TestWriteback(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-18")
	r := newRig(t, "lean")
	busy := exec.Command("sh", "-c", `while :; do dd if=/dev/zero of="$0" bs=1M count=256 conv=fsync status=none; done`, filepath.Join(t.TempDir(), "written"))
	busy.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	must(t, busy.Start())
	defer func() {
		syscall.Kill(-busy.Process.Pid, syscall.SIGKILL)
		busy.Wait()
	}()
	const calls = 150
	var direct, shimmed []time.Duration
	for range calls {
		began := time.Now()
		want := r.start(r.real, call{})
		middle := time.Now()
		if got := r.start(r.shim, call{}); got != want {
			t.Fatalf("through the shim: %s\ndirectly: %s", got, want)
		}
		direct, shimmed = append(direct, middle.Sub(began)), append(shimmed, time.Since(middle))
	}
	r.wantSpooled(0, calls)
	slices.Sort(direct)
	slices.Sort(shimmed)
	t.Logf("direct p50 %v p99 %v max %v; through the shim p50 %v p99 %v max %v (includes what this test does)",
		direct[calls/2], direct[calls*99/100], direct[calls-1], shimmed[calls/2], shimmed[calls*99/100], shimmed[calls-1])
}
