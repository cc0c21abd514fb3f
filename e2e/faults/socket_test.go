package faults

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// listen makes a SOCK_SEQPACKET socket that everybody may connect to.
func listen(t testing.TB, path string, kind, backlog int) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	must(t, os.Chmod(path, 0o666))
	if backlog > 0 {
		must(t, unix.Listen(fd, backlog))
	}
	return fd
}

// serve answers connections at path, one after the other, until stop or the test's end.
func serve(t testing.TB, path string, answer func(fd int)) (stop func()) {
	t.Helper()
	listener := listen(t, path, unix.SOCK_SEQPACKET, 4096)
	var done sync.WaitGroup
	done.Go(func() {
		for {
			fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return
			}
			answer(fd)
			unix.Close(fd)
		}
	})
	var once sync.Once
	stop = func() {
		once.Do(func() {
			unix.Shutdown(listener, unix.SHUT_RDWR)
			done.Wait()
			unix.Close(listener)
		})
	}
	t.Cleanup(stop)
	return stop
}

// receive reads one message.
func receive(fd int) string {
	b := make([]byte, 1<<17)
	n, err := unix.Read(fd, b)
	if err != nil {
		return err.Error()
	}
	return string(b[:n])
}

// TestSocketThatNobodyAnswers: whatever stands in the socket's place, the record goes
// to the file.
func TestSocketThatNobodyAnswers(t *testing.T) {
	require.Root(t)
	for _, test := range []struct {
		name    string
		cases   []string
		prepare func(t *testing.T, path string)
	}{
		{"nothing", []string{"SH-45"}, func(t *testing.T, path string) {}},
		{"a dead agent's", []string{"SH-45"}, func(t *testing.T, path string) { unix.Close(listen(t, path, unix.SOCK_SEQPACKET, 1)) }},
		{"one that does not listen", []string{"SH-45"}, func(t *testing.T, path string) {
			fd := listen(t, path, unix.SOCK_SEQPACKET, 0)
			t.Cleanup(func() { unix.Close(fd) })
		}},
		{"a stream", []string{"SH-45"}, func(t *testing.T, path string) {
			fd := listen(t, path, unix.SOCK_STREAM, 16)
			t.Cleanup(func() { unix.Close(fd) })
		}},
		{"a datagram socket", []string{"SH-45", "SH-44"}, func(t *testing.T, path string) {
			fd := listen(t, path, unix.SOCK_DGRAM, 0)
			t.Cleanup(func() { unix.Close(fd) })
		}},
		{"one of root with mode 0600", []string{"SH-45"}, func(t *testing.T, path string) {
			fd := listen(t, path, unix.SOCK_SEQPACKET, 16)
			must(t, os.Chmod(path, 0o600))
			t.Cleanup(func() { unix.Close(fd) })
		}},
		{"one with a full backlog", []string{"SH-44"}, func(t *testing.T, path string) {
			fd := listen(t, path, unix.SOCK_SEQPACKET, 1)
			t.Cleanup(func() { unix.Close(fd) })
			for range 64 {
				c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				must(t, err)
				t.Cleanup(func() { unix.Close(c) })
				if err := unix.Connect(c, &unix.SockaddrUnix{Name: path}); err == unix.EAGAIN {
					return
				} else if err != nil {
					t.Fatal(err)
				}
			}
			t.Fatal("the backlog does not fill")
		}},
		{"a file", nil, func(t *testing.T, path string) { must(t, os.WriteFile(path, nil, 0o666)) }},
		{"a folder", nil, func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o777)) }},
		{"a FIFO", nil, func(t *testing.T, path string) { must(t, unix.Mkfifo(path, 0o666)) }},
		{"a link to itself", nil, func(t *testing.T, path string) { must(t, os.Symlink(path, path)) }},
		{"a device", nil, func(t *testing.T, path string) { must(t, os.Symlink("/dev/full", path)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			faults.Case(t, test.cases...)
			eachBuild(t, func(t *testing.T, r *rig) {
				test.prepare(t, r.run+"/agent.sock")
				r.call(call{uid: job})
				r.wantSpooled(job, 1)
			})
		})
	}
}

// TestHostileAgent: a socket that a hostile user put in the agent's place. docker starts
// and inherits nothing from it.
func TestHostileAgent(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-61")
	for _, test := range []struct {
		name   string
		answer func(fd int)
	}{
		{"reads and never answers", func(fd int) { receive(fd); receive(fd) }},
		{"never reads", func(fd int) {
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, int(hung.Milliseconds()))
		}},
		{"closes at once", func(fd int) {}},
		{"closes after reading", func(fd int) { receive(fd) }},
		{"shuts down its side", func(fd int) { unix.Shutdown(fd, unix.SHUT_RDWR); receive(fd) }},
		{"answers nonsense", func(fd int) { receive(fd); unix.Write(fd, []byte("\x00\xff{}\n")); receive(fd) }},
		{"answers with an empty message", func(fd int) { receive(fd); unix.Write(fd, nil); receive(fd) }},
		{"never stops talking", func(fd int) {
			b := bytes.Repeat([]byte("garbage"), 10000)
			for {
				if _, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_NOSIGNAL); err != nil {
					return
				}
			}
		}},
		{"acknowledges and never stops talking", func(fd int) {
			b := bytes.Repeat([]byte{handover.AckClose}, 70000)
			for {
				if _, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_NOSIGNAL); err != nil {
					return
				}
			}
		}},
		{"passes descriptors", func(fd int) {
			rights := unix.UnixRights(0, 1, 2, fd)
			unix.SendmsgN(fd, []byte{handover.AckClose}, rights, nil, unix.MSG_NOSIGNAL)
			unix.SendmsgN(fd, []byte{handover.AckClose}, rights, nil, unix.MSG_NOSIGNAL)
			receive(fd)
		}},
		{"passes descriptors first, then acknowledges", func(fd int) {
			unix.SendmsgN(fd, nil, unix.UnixRights(0, 1, 2), nil, unix.MSG_NOSIGNAL)
			unix.SendmsgN(fd, []byte{handover.AckClose}, nil, nil, unix.MSG_NOSIGNAL)
			receive(fd)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachBuild(t, func(t *testing.T, r *rig) {
				serve(t, r.run+"/agent.sock", test.answer)
				for range 3 {
					r.call(call{uid: job})
				}
			})
		})
	}
}

// TestStoppedAgent: an agent that is stopped takes connections and answers none. Each
// record goes to the file too, with the same id, and is in the account once.
func TestStoppedAgent(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-46")
	eachBuild(t, func(t *testing.T, r *rig) {
		r.withAgent(func(a *agent) {
			must(t, a.cmd.Process.Signal(unix.SIGSTOP))
			const calls = 5
			for range calls {
				r.call(call{uid: job})
			}
			r.wantSpooled(job, calls)
			ids := map[string]bool{}
			for _, rec := range r.spooled(job) {
				ids[rec.ID] = true
			}
			must(t, a.cmd.Process.Signal(unix.SIGCONT))
			// Both copies have come once the file was read, too.
			a.eventually(func() error {
				if b, err := os.ReadFile(r.dir + "/state/spool.json"); err != nil || !bytes.Contains(b, []byte(`"offset"`)) {
					return fmt.Errorf("the agent has not read the spool: %w", err)
				}
				if n := len(a.invocations()); n < calls {
					return fmt.Errorf("%d records, want %d", n, calls)
				}
				return nil
			})
			all := a.invocations()
			if len(all) != calls {
				t.Errorf("%d records of %d calls", len(all), calls)
			}
			for _, rec := range all {
				if !ids[rec.ID] {
					t.Errorf("%s is in the journal and was not in the file", rec.ID)
				}
			}
		})
	})
}

// TestThousandCallsWhileTheAgentStandsStill: their records wait in the socket, and are
// read when all who sent them are gone.
func TestThousandCallsWhileTheAgentStandsStill(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-44")
	b, err := os.ReadFile("/proc/sys/net/core/somaxconn")
	must(t, err)
	if most, err := strconv.Atoi(strings.TrimSpace(string(b))); err != nil || most < 1000 {
		faults.CannotRun(t, fmt.Sprintf("needs net.core.somaxconn of 1000 or more: %s", b))
	}
	r := newRig(t, "lean")
	must(t, os.Remove(r.real))
	must(t, os.Symlink("/bin/true", r.real))
	fd := listen(t, r.run+"/agent.sock", unix.SOCK_SEQPACKET, 4096)
	defer unix.Close(fd)
	const calls = 1000
	r.many(calls, func(i int) call { return call{args: []string{"ps"}, env: []string{"GITHUB_RUN_ID=" + strconv.Itoa(i)}} })
	queued := map[string]bool{}
	unix.SetNonblock(fd, true)
	for {
		conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err == unix.EAGAIN {
			break
		}
		must(t, err)
		var rec record.Record
		if err := recordjson.Unmarshal([]byte(strings.TrimSuffix(receive(conn), "\n")), &rec); err != nil {
			t.Error(err)
		} else {
			queued[rec.CI.RunID] = true
		}
		unix.Close(conn)
	}
	if len(queued) != calls {
		t.Errorf("%d records of %d calls lie in the socket", len(queued), calls)
	}
	r.wantSpooled(0, calls)
}

// many makes n calls, many at the same time, each of which must succeed.
func (r *rig) many(n int, c func(i int) call) {
	r.t.Helper()
	limit := make(chan struct{}, 64)
	var wg sync.WaitGroup
	for i := range n {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			if got := r.start(r.shim, c(i)); got.status != 0 || got.stdout+got.stderr != "" {
				r.t.Errorf("call %d: %s", i, got)
			}
		})
	}
	wg.Wait()
}

// TestThousandCallsIntoOneFile: without an agent, records from some hundred bytes to 9 KB
// go into one file, whole and all.
func TestThousandCallsIntoOneFile(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-43")
	r := newRig(t, "lean")
	must(t, os.Remove(r.real))
	must(t, os.Symlink("/bin/true", r.real))
	const calls = 1000
	r.many(calls, func(i int) call {
		size := i * 9000 / calls
		return call{args: []string{"ps"}, env: []string{"GITHUB_RUN_ID=" + strconv.Itoa(i),
			"GITHUB_WORKFLOW=" + strings.Repeat("w", size/3), "GITHUB_REF=" + strings.Repeat("r", size/3), "GITHUB_ACTOR=" + strings.Repeat("a", size/3)}}
	})
	b, err := os.ReadFile(r.spoolFile(0, ".jsonl"))
	must(t, err)
	all, torn := parse(t, b)
	runs := map[string]bool{}
	longest := 0
	for _, rec := range all {
		runs[rec.CI.RunID] = true
	}
	for _, line := range bytes.Split(b, []byte("\n")) {
		longest = max(longest, len(line))
	}
	if len(runs) != calls || len(all) != calls || torn != 0 || longest < 9000 {
		t.Errorf("%d records of %d calls, %d torn; the longest has %d bytes", len(runs), calls, torn, longest)
	}
}

// TestKilledShims: shims are killed at random moments, 16 at a time. Where docker ran,
// its record is in the file and whole, whatever the killed ones left before it.
func TestKilledShims(t *testing.T) {
	require.Root(t)
	faults.Case(t, "SH-47")
	r := newRig(t, "lean")
	must(t, os.Remove(r.real))
	must(t, os.Symlink("/bin/true", r.real))
	var mu sync.Mutex
	ran := map[string]bool{}
	killed := 0
	end := time.Now().Add(4 * time.Second)
	var writers sync.WaitGroup
	for w := range 16 {
		writers.Go(func() {
			for i := 0; time.Now().Before(end); i++ {
				run := fmt.Sprintf("%d%05d", w+1, i)
				cmd := exec.Command(r.shim, "ps")
				cmd.Env = append(bigRecord(), "GITHUB_RUN_ID="+run)
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				kill := i%2 == 0
				if kill {
					time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond)
					cmd.Process.Kill()
				}
				err := cmd.Wait()
				mu.Lock()
				switch {
				case err == nil:
					ran[run] = true
				case kill:
					killed++
				default:
					t.Errorf("a call that was not killed: %v", err)
				}
				mu.Unlock()
			}
		})
	}
	writers.Wait()
	b, err := os.ReadFile(r.spoolFile(0, ".jsonl"))
	must(t, err)
	all, torn := parse(t, b)
	for _, rec := range all {
		delete(ran, rec.CI.RunID)
	}
	t.Logf("%d shims were killed, %d records are whole, %d lines torn", killed, len(all), torn)
	if len(ran) != 0 || killed == 0 {
		t.Errorf("docker ran for %d calls of which there is no record; %d shims were killed", len(ran), killed)
	}
}
