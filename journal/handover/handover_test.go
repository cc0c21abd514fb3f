package handover

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/require"
)

var line = []byte(`{"id":"test"}` + "\n")

// shm makes a folder on tmpfs, where the append files belong.
func shm(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "handover")
	if err != nil {
		t.Fatalf("the tests need a tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func target(dir string) Target {
	return Target{Socket: dir + "/agent.sock", Spool: dir + "/spool", SpoolMaxBytes: 1 << 20}
}

func deliver(tg Target) Result { return Deliver(tg, line, os.Getuid(), os.Geteuid()) }

func spoolName(dir, ending string) string {
	return fmt.Sprintf("%s/spool/%d%s", dir, os.Getuid(), ending)
}

// TestSpool names the cases of the fault catalogue that concern the append file.
func TestSpool(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		want    Result
	}{
		{"a folder takes the record", func(t *testing.T, dir string) {}, Spooled},
		{"SH-01 no folder", func(t *testing.T, dir string) { os.RemoveAll(dir + "/spool") }, Lost},
		{"SH-07 a FIFO without a reader", func(t *testing.T, dir string) { syscall.Mkfifo(spoolName(dir, ".jsonl"), 0o600) }, Lost},
		{"SH-09 a link to another file", func(t *testing.T, dir string) {
			os.WriteFile(dir+"/victim", nil, 0o600)
			os.Symlink(dir+"/victim", spoolName(dir, ".jsonl"))
		}, Lost},
		{"SH-06 a link to /dev/full", func(t *testing.T, dir string) { os.Symlink("/dev/full", spoolName(dir, ".jsonl")) }, Lost},
		{"SH-11 a second name of another file", func(t *testing.T, dir string) {
			os.WriteFile(dir+"/victim", nil, 0o600)
			os.Link(dir+"/victim", spoolName(dir, ".jsonl"))
		}, Lost},
		{"SH-12 a link in the folder's place", func(t *testing.T, dir string) {
			os.Mkdir(dir+"/elsewhere", 0o700)
			os.Remove(dir + "/spool")
			os.Symlink(dir+"/elsewhere", dir+"/spool")
		}, Lost},
		{"another user's file", func(t *testing.T, dir string) {
			os.WriteFile(spoolName(dir, ".jsonl"), nil, 0o666)
			if os.Chown(spoolName(dir, ".jsonl"), 4321, 4321) != nil {
				require.Missing(t, "root, to give a file away")
			}
		}, Lost},
		{"a folder in the file's place", func(t *testing.T, dir string) { os.Mkdir(spoolName(dir, ".jsonl"), 0o700) }, Lost},
		{"a file at its bound", func(t *testing.T, dir string) { os.WriteFile(spoolName(dir, ".jsonl"), make([]byte, 1<<20), 0o600) }, Lost},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := shm(t)
			if err := os.Mkdir(dir+"/spool", 0o700); err != nil {
				t.Fatal(err)
			}
			test.prepare(t, dir)
			start := time.Now()
			if got := deliver(target(dir)); got != test.want {
				t.Errorf("result %d, want %d", got, test.want)
			}
			// The bound is 50 ms; what is looked for on a busy machine is a hang.
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("took %v", d)
			}
			if b, _ := os.ReadFile(dir + "/victim"); len(b) != 0 {
				t.Errorf("wrote %q through a link", b)
			}
			if files, _ := filepath.Glob(dir + "/elsewhere/*"); len(files) != 0 {
				t.Errorf("wrote through a link to a folder: %v", files)
			}
			if test.want == Spooled {
				b, err := os.ReadFile(spoolName(dir, ".jsonl"))
				if err != nil || !bytes.Equal(b, line) {
					t.Errorf("file holds %q, %v", b, err)
				}
				if info, err := os.Stat(spoolName(dir, ".jsonl")); err != nil || info.Mode().Perm() != 0o600 {
					t.Errorf("SE-07 mode %v", info.Mode())
				}
			}
		})
	}
}

func TestLossesAreCounted(t *testing.T) {
	dir := shm(t)
	os.Mkdir(dir+"/spool", 0o700)
	deliver(target(dir))
	small := target(dir)
	small.SpoolMaxBytes = 1
	for range 3 {
		if got := deliver(small); got != Lost {
			t.Fatalf("result %d", got)
		}
	}
	if b, _ := os.ReadFile(spoolName(dir, ".lost")); string(b) != "\nfff" {
		t.Errorf("counter holds %q", b)
	}
}

// TestFullDisk: on a tmpfs without room the line is cut short or refused, nothing is
// written after it, and the loss is counted in the page kept for it (SH-04).
func TestFullDisk(t *testing.T) {
	dir := shm(t)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		require.Missing(t, fmt.Sprintf("a small tmpfs to fill, which root mounts: %v", err))
	}
	t.Cleanup(func() { syscall.Unmount(dir, 0) })
	os.Mkdir(dir+"/spool", 0o700)
	tg := target(dir)
	big := append(bytes.Repeat([]byte("x"), 9999), '\n')
	results := map[Result]int{}
	for range 10 {
		results[Deliver(tg, big, os.Getuid(), os.Geteuid())]++
	}
	b, err := os.ReadFile(spoolName(dir, ".jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	whole := bytes.Count(b, []byte("\n"))
	if whole != results[Spooled] || results[Spooled] == 0 || results[Lost] == 0 {
		t.Errorf("%d whole lines, results %v", whole, results)
	}
	if lost, _ := os.ReadFile(spoolName(dir, ".lost")); bytes.Count(lost, []byte("s")) != results[Lost] {
		t.Errorf("%d losses, counter holds %q", results[Lost], lost)
	}
}

// TestRlimitFsize: at the limit of file sizes the kernel sends SIGXFSZ, which must
// not kill, and whose disposition must be what it was (SH-30).
func TestRlimitFsize(t *testing.T) {
	if dir := os.Getenv("HANDOVER_FSIZE"); dir != "" {
		syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 20, Max: 20})
		var before, after sigaction
		rtSigaction(syscall.SIGXFSZ, nil, &before)
		fmt.Print(deliver(target(dir)), deliver(target(dir)))
		rtSigaction(syscall.SIGXFSZ, nil, &after)
		fmt.Print(" ", before == after)
		os.Exit(0)
	}
	dir := shm(t)
	os.Mkdir(dir+"/spool", 0o700)
	cmd := exec.Command(os.Args[0], "-test.run=^TestRlimitFsize$")
	cmd.Env = append(os.Environ(), "HANDOVER_FSIZE="+dir)
	out, err := cmd.CombinedOutput()
	if want := fmt.Sprint(Spooled, Lost, " ", true); err != nil || string(out) != want {
		t.Errorf("got %q, %v; want %q", out, err, want)
	}
}

// listen makes an agent's socket whose connections answer treats.
func listen(t *testing.T, dir string, answer func(*net.UnixConn)) {
	t.Helper()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: dir + "/agent.sock", Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go func() {
		defer close(done)
		for answer != nil {
			conn, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			answer(conn)
			conn.Close()
		}
	}()
}

func TestSocket(t *testing.T) {
	read := func(c *net.UnixConn) string {
		b := make([]byte, 1<<16)
		n, _ := c.Read(b)
		return string(b[:n])
	}
	got := make(chan string, 16)
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		want    Result
		spooled bool
	}{
		{"an answer ends it", func(t *testing.T, dir string) {
			listen(t, dir, func(c *net.UnixConn) { got <- read(c); c.Write([]byte{AckClose}) })
		}, Acked, false},
		{"SH-46 no answer: into the file too", func(t *testing.T, dir string) {
			listen(t, dir, func(c *net.UnixConn) { got <- read(c); read(c) })
		}, QueuedToo, true},
		{"SH-44 a stopped agent: the backlog holds it", func(t *testing.T, dir string) { listen(t, dir, nil) }, QueuedToo, true},
		{"an agent that closes without answer does not have it", func(t *testing.T, dir string) {
			listen(t, dir, func(c *net.UnixConn) { got <- read(c) })
		}, Spooled, true},
		{"a newer agent with an answer that is not known: into the file too", func(t *testing.T, dir string) {
			listen(t, dir, func(c *net.UnixConn) { got <- read(c); c.Write([]byte("3, and more")) })
		}, Spooled, true},
		{"SH-45 a stale socket", func(t *testing.T, dir string) {
			fd, _ := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET, 0)
			syscall.Bind(fd, &syscall.SockaddrUnix{Name: dir + "/agent.sock"})
			syscall.Close(fd)
		}, Spooled, true},
		{"SH-45 a socket of another type", func(t *testing.T, dir string) {
			ln, err := net.Listen("unix", dir+"/agent.sock")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ln.Close() })
		}, Spooled, true},
		{"SH-45 a file in its place", func(t *testing.T, dir string) { os.WriteFile(dir+"/agent.sock", nil, 0o600) }, Spooled, true},
		{"a path longer than a socket's", func(t *testing.T, dir string) {}, Spooled, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			var dir string
			var start time.Time
			r := eventually(test.want, func() Result {
				dir = shm(t)
				os.Mkdir(dir+"/spool", 0o700)
				test.prepare(t, dir)
				tg := target(dir)
				if strings.Contains(test.name, "longer") {
					tg.Socket = dir + "/" + strings.Repeat("x", 120)
				}
				start = time.Now()
				return deliver(tg)
			})
			if r != test.want {
				t.Errorf("result %d, want %d", r, test.want)
			}
			// The bound is 50 ms; what is looked for on a busy machine is a hang.
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("took %v", d)
			}
			if _, err := os.Stat(spoolName(dir, ".jsonl")); (err == nil) != test.spooled {
				t.Errorf("append file: %v", err)
			}
			select {
			case s := <-got:
				if s != string(line) {
					t.Errorf("agent read %q", s)
				}
			default:
			}
		})
	}
}

// eventually tries again where a busy machine answered after AckWait, so that the record
// is queued and in the file too.
func eventually(want Result, try func() Result) (r Result) {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if r = try(); r == want || r != QueuedToo || time.Now().After(deadline) {
			return r
		}
	}
}

// TestKeptSocket: with AckKeep the socket stays open across exec, so that the agent
// sees the end of the command by its end of file; otherwise nothing stays open.
func TestKeptSocket(t *testing.T) {
	for _, test := range []struct {
		ack  byte
		kept int
	}{{AckClose, 0}, {AckKeep, 1}} {
		var before map[int]bool
		r := eventually(Acked, func() Result {
			dir := shm(t)
			listen(t, dir, func(c *net.UnixConn) {
				b := make([]byte, 1024)
				c.Read(b)
				c.Write([]byte{test.ack})
				c.SetReadDeadline(time.Now().Add(time.Second))
				c.Read(b)
			})
			before = inheritable(t)
			return deliver(target(dir))
		})
		if r != Acked {
			t.Fatalf("result %d", r)
		}
		after := inheritable(t)
		if len(after)-len(before) != test.kept {
			t.Errorf("ack %c: %d descriptors survive exec, want %d", test.ack, len(after)-len(before), test.kept)
		}
		for fd := range after {
			if !before[fd] {
				syscall.Close(fd)
			}
		}
	}
}

// inheritable are the open descriptors that survive execve.
func inheritable(t *testing.T) map[int]bool {
	t.Helper()
	fds := map[int]bool{}
	for fd := range 256 {
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if errno == 0 && flags&syscall.FD_CLOEXEC == 0 {
			fds[fd] = true
		}
	}
	return fds
}
