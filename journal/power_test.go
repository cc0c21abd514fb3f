package journal

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/inject"
)

// writeUntilPowerCut appends, syncs after every few records, and prints each id when
// it was taken and a line when it was synced.
func writeUntilPowerCut(dir string) {
	say := func(s string) {
		if _, err := os.Stdout.WriteString(s + "\n"); err != nil {
			os.Exit(5)
		}
	}
	j, err := Open(filepath.Join(dir, "journal"), Options{MaxSegmentBytes: 20_000, MaxBytes: 4 << 20})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	c, err := j.OpenCursor(filepath.Join(dir, "cursors"), "x")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	for i := 0; ; i++ {
		id := fmt.Sprintf("%d-%d_%d", os.Getpid(), i, 300+rand.IntN(3000))
		if err := j.Append(padded(id)); err != nil {
			os.Exit(0) // the power is off
		}
		say("taken " + id)
		if i%5 == 4 {
			if err := j.Sync(); err != nil {
				os.Exit(0)
			}
			say("synced")
			c.Advance(j.End(), 5)
		}
		if i%50 == 49 && c.Save() != nil {
			os.Exit(0)
		}
	}
}

// loopExt4 makes an ext4 of 16 MB in a file of image and returns how to mount it at
// dir.
func loopExt4(t *testing.T, image, dir string) (mount func(), unmount func()) {
	t.Helper()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 16<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
		faults.CannotRun(t, fmt.Sprintf("needs mkfs.ext4: %v %s", err, out))
	}
	mounted := false
	unmount = func() {
		if mounted {
			if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
				t.Errorf("umount: %v: %s", err, out)
			}
			mounted = false
		}
	}
	t.Cleanup(unmount)
	first := true
	return func() {
		t.Helper()
		out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput()
		if err != nil && first {
			faults.CannotRun(t, fmt.Sprintf("needs root and loop devices: %v: %s", err, bytes.TrimSpace(out)))
		}
		if err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
		first, mounted = false, true
	}, unmount
}

// inOwnNamespace runs the test as a process with mounts of its own. A process that
// copies the mounts of all, a container's, would keep the file system alive after its
// unmount.
func inOwnNamespace(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "JOURNAL_TEST_NAMESPACE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		faults.CannotRun(t, "needs root, for mounts of its own: "+err.Error())
	}
	if _, why, could := strings.Cut(string(out), "COULD NOT RUN HERE: "); could {
		why, _, _ = strings.Cut(why, " ***")
		faults.CannotRun(t, why)
	}
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	t.Logf("%s", out)
}

// cutPower shuts ext4 down as a power cut does: nothing more reaches the device, the
// log is not flushed (EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH, fs/ext4/ext4.h).
func cutPower(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	const shutdown, noLogFlush = 0x8004587d, 2
	flags := uint32(noLogFlush)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		return errno
	}
	return nil
}

// The power fails at random moments. What Sync covered is read afterwards, nothing is
// invented, and the journal goes on without help.
//
// A copy of the mounted image would not do: the kernel writes to it while it is
// copied, so it can be an image that no power cut leaves.
func TestPowerCut(t *testing.T) {
	if os.Getenv("JOURNAL_TEST_NAMESPACE") == "" {
		faults.Case(t, "SP-08")
		inOwnNamespace(t)
		return
	}
	dir := t.TempDir()
	image := filepath.Join(memoryDir(t), "image")
	mount, unmount := loopExt4(t, image, dir)
	mount()
	taken := map[string]bool{}
	var mu sync.Mutex
	synced := map[string]bool{}
	kept := 0
	cuts := 4 // an unmount on a busy machine takes a second
	if os.Getenv(inject.AllVariable) == "all" {
		cuts = 30
	}
	for round := range cuts {
		cmd := rerun(t, "JOURNAL_TEST_POWER="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		off := false
		var cut <-chan error
		var pending []string
		lines := bufio.NewReader(out)
		for {
			l, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			if cut == nil && len(synced) > 0 { // it runs
				done := make(chan error, 1)
				cut = done
				go func() {
					time.Sleep(time.Duration(rand.IntN(60_000)) * time.Microsecond)
					// What is said after this moment, nobody hears when the power is off: an
					// fsync on its way while ext4 shuts down can return 0 for nothing.
					mu.Lock()
					defer mu.Unlock()
					off = true
					done <- cutPower(dir)
				}()
			}
			if id, ok := strings.CutPrefix(strings.TrimSpace(l), "taken "); ok {
				taken[id] = true
				pending = append(pending, id)
			} else {
				mu.Lock()
				for _, id := range pending {
					synced[id] = synced[id] || !off
				}
				mu.Unlock()
				pending = nil
			}
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("the writer: %v", err)
		}
		if cut == nil {
			t.Fatal("the writer wrote nothing")
		}
		if err := <-cut; errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
			faults.CannotRun(t, "needs EXT4_IOC_SHUTDOWN: "+err.Error())
		} else if err != nil {
			t.Fatal(err)
		}
		unmount()
		mount() // which replays the file system's own journal
		r, err := OpenReader(filepath.Join(dir, "journal"), Position{})
		if err != nil {
			t.Fatal(err)
		}
		read := map[string]bool{}
		for {
			l, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			id := string(l.ID())
			if !bytes.Equal(append(bytes.Clone(l.Data), '\n'), padded(id)) {
				t.Fatalf("cut %d: %s is not as it was written", round, id)
			}
			read[id] = true
		}
		_ = r.Close()
		for id, heard := range synced {
			if heard && !read[id] {
				t.Errorf("cut %d: %s was synced and is gone", round, id)
			}
		}
		kept = len(read)
		if t.Failed() {
			return
		}
		if c, err := LoadCursor(filepath.Join(dir, "cursors"), "x"); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("cut %d: the cursor: %v, %+v", round, err, c)
		}
		if len(read)*2000 > 2<<20 { // begin anew before the bound takes what the test counts on
			if err := os.RemoveAll(filepath.Join(dir, "journal")); err != nil {
				t.Fatal(err)
			}
			clear(synced)
			clear(taken)
		}
	}
	t.Logf("%d power cuts; at the last, %d records had been taken, %d synced, and %d were there", cuts, len(taken), len(synced), kept)
}
