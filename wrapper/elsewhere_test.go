package wrapper

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
)

// An image may have links to docker, and a job may move docker to put one of its own
// in its place. The real one then still stands where the shim was installed.
func TestShimByAnotherName(t *testing.T) {
	eachBuild(t, func(t *testing.T, in installation) {
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		link, other := in.dir+"/bin/docker", in.dir+"/elsewhere/docker-compose"
		must(os.Mkdir(filepath.Dir(link), 0o755))
		must(os.Mkdir(filepath.Dir(other), 0o755))
		must(os.Symlink("../docker", link))
		copyFile(t, in.dir+"/tallyman.conf", filepath.Dir(link)+"/tallyman.conf")
		copyFile(t, in.shim, other)
		for _, row := range []struct {
			name, moved, call string
			code              int
		}{
			{"a link in another folder", "", link, 0},
			{"moved to docker.orig", "docker.orig", "", 0},
			{"moved to docker-real", "docker-real", "", 0},
			{"moved to another program's name", "docker-compose", "", 127},
			{"no real one beside it", "", other, 127},
		} {
			t.Run(row.name, func(t *testing.T) {
				before := len(in.records(t))
				call := row.call
				if row.moved != "" {
					moved := filepath.Join(in.dir, row.moved)
					must(os.Rename(in.shim, moved))
					// What a job puts in its place calls the one that it found there.
					must(os.WriteFile(in.shim, []byte("#!/bin/sh\nexec "+moved+" \"$@\"\n"), 0o755))
					defer func() { must(os.Rename(moved, in.shim)) }()
					call = in.shim
				}
				cmd := exec.Command(call, "pull", "alpine")
				cmd.Dir = in.dir
				out, err := cmd.CombinedOutput()
				code := cmd.ProcessState.ExitCode()
				if code != row.code {
					t.Fatalf("exit code %d, want %d: %v %.300s", code, row.code, err, out)
				}
				if row.code != 0 {
					return
				}
				all := in.records(t)
				if len(all) != before+1 {
					t.Fatalf("%d records came of one call", len(all)-before)
				}
				inv := all[len(all)-1].Invocation
				if inv.Tool != "docker" || inv.Command != "pull" || len(inv.Images) != 1 {
					t.Errorf("recorded as %+v", inv)
				}
			})
		}
	})
}

// An uninstall puts the real docker back while a call is between the start of the shim
// and that of docker. The call is held there: its agent stops it when it has the record.
func TestUninstalledDuringACall(t *testing.T) {
	eachBuild(t, func(t *testing.T, in installation) {
		agent, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: in.run + "/agent.sock", Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		defer agent.Close()
		if err := agent.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		for try := 0; ; try++ {
			if try == 200 {
				t.Fatal("no call could be stopped in time")
			}
			cmd := exec.Command(in.shim, "exit", "3")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			conn, err := agent.Accept()
			if err != nil {
				t.Fatal(err)
			}
			held := cmd.Process.Signal(syscall.SIGSTOP) == nil
			exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
			held = held && exe == in.shim && stopped(cmd.Process.Pid)
			if held {
				if err := os.Rename(in.real, in.shim); err != nil {
					t.Fatal(err)
				}
			}
			_ = cmd.Process.Signal(syscall.SIGCONT)
			conn.Close()
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 3 {
				t.Fatalf("exit code %d, want docker's 3: %.300s", code, out.String())
			}
			if held {
				return
			}
		}
	})
}

// stopped waits until a process that was sent SIGSTOP has stopped.
func stopped(pid int) bool {
	for range 1000 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return false
		}
		_, after, _ := strings.Cut(string(stat), ") ")
		switch after[:1] {
		case "T":
			return true
		case "Z":
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return false
}
