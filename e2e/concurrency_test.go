package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

const herd = 1000

// A thousand calls at once: each exit code is its own, each record is whole and in
// the account once, whatever state the agent is in.
func TestAThousandCallsAtOnce(t *testing.T) {
	t.Run("with an agent", func(t *testing.T) {
		faults.Case(t, "EN-01")
		for try := 1; ; try++ {
			r := newStubRig(t)
			r.startAgent()
			codes := r.stampede(herd)
			r.wantAll(herd)
			// On a machine so busy that a shim lost its processor for seconds between two
			// system calls, its record goes to the file, and nobody sees its end.
			if late := r.wantCodes(codes); late == 0 {
				break
			} else if try == 5 {
				t.Errorf("%d calls of %d were too late for the socket, five times in a row", late, herd)
				break
			}
		}
	})
	t.Run("with a stalled agent", func(t *testing.T) {
		r := newStubRig(t)
		agent := r.startAgent()
		if err := agent.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		r.stampede(herd)
		if err := agent.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		r.wantAll(herd)
	})
	t.Run("with an agent that is killed while it is stalled", func(t *testing.T) {
		r := newStubRig(t)
		agent := r.startAgent()
		if err := agent.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		r.stampede(herd)
		r.killAgent() // what lay in its socket's queue is gone, but the spool is on tmpfs
		r.startAgent()
		r.wantAll(herd)
	})
	t.Run("without an agent", func(t *testing.T) {
		r := newStubRig(t)
		r.stampede(herd)
		path := filepath.Join(r.inst.Spool(), "0.jsonl")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		whole := map[string]bool{}
		for line := range bytes.Lines(data) {
			var rec record.Record
			if bytes.HasPrefix(line, []byte(`{"kind":"segment"`)) {
				continue
			}
			if err := recordjson.Unmarshal(bytes.TrimSuffix(line, []byte("\n")), &rec); err != nil {
				t.Fatalf("a torn line in the append file: %v: %.100q", err, line)
			}
			whole[rec.ID] = true
		}
		if len(whole) != herd {
			t.Errorf("%d whole records in the append file, want %d", len(whole), herd)
		}
		r.startAgent() // the next job's agent finds them
		r.wantAll(herd)
	})
}

// stampede starts n calls of the shim, holds them back at a gate until all are
// there, and lets them go at once. Call i must exit with i modulo 256. The result are
// the exit codes by the calls' process ids.
func (r *rig) stampede(n int) map[int64]int64 {
	r.t.Helper()
	codes := make(map[int64]int64, n)
	gate := filepath.Join(r.t.TempDir(), "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		r.t.Fatal(err)
	}
	// Opening a FIFO for reading waits for a writer: one open lets all of them go.
	script := `: <"$0"; exec docker run --rm some/image "code-$1"`
	commands := make([]*exec.Cmd, n)
	for i := range commands {
		cmd := exec.Command("/bin/sh", "-c", script, gate, fmt.Sprint(i%256))
		cmd.Env = r.runner.Env
		if err := cmd.Start(); err != nil {
			r.t.Fatal(err)
		}
		commands[i] = cmd
	}
	opened, err := os.OpenFile(gate, os.O_WRONLY, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer opened.Close() // held open: some of the herd may not have reached the gate yet
	wrong := 0
	for i, cmd := range commands {
		cmd.Wait()
		codes[int64(cmd.Process.Pid)] = int64(i % 256) // the shell became the shim, and that docker
		if code := cmd.ProcessState.ExitCode(); code != i%256 {
			wrong++
			r.t.Logf("call %d: exit code %d, want %d", i, code, i%256)
		}
	}
	if wrong > 0 {
		r.t.Errorf("%d of %d exit codes are wrong", wrong, n)
	}
	return codes
}

// wantCodes waits until each call has its end in the account, with its own exit code.
// It returns how many have an unknown one because their record came by file; every code
// that is told must be right.
func (r *rig) wantCodes(codes map[int64]int64) (late int) {
	r.t.Helper()
	if !exitCodesKnown(r.t) {
		faults.CannotRun(r.t, "this kernel tells no exit codes of another's processes (they need Linux 6.15)")
	}
	var right, timed int
	eventually(r.t, time.Minute, func() error {
		records := r.records()
		pids, paths := map[string]int64{}, map[string]string{}
		for _, inv := range ofKind(records, record.KindInvocation) {
			pids[inv.ID], paths[inv.ID] = inv.Invocation.PID, inv.Invocation.Path
		}
		right, timed, late = 0, 0, 0
		ends := ofKind(records, record.KindInvocationEnd)
		for _, e := range ends {
			if e.End.Source == byNothing && paths[e.End.InvocationID] == "file" {
				late++
				continue
			}
			if want, ok := codes[pids[e.End.InvocationID]]; !ok || e.End.Source != byInfo || e.End.ExitCode == nil || *e.End.ExitCode != want {
				return fmt.Errorf("%s of a call that exits with %d, and came by %s", told(e.End), want, paths[e.End.InvocationID])
			}
			right++
			if e.End.DurationNS > 0 { // none where it could be off by more than ten seconds
				timed++
			}
		}
		if right+late != len(codes) || len(ends) != len(codes) {
			return fmt.Errorf("%d right ends of %d, for %d calls", right, len(ends), len(codes))
		}
		return nil
	})
	fmt.Fprintf(os.Stderr, "true exit codes: %d of %d concurrent commands, durations: %d\n", right, len(codes), timed)
	return late
}

// wantAll waits until the account has n invocations, each once by its id, and no
// loss.
func (r *rig) wantAll(n int) {
	r.t.Helper()
	eventually(r.t, 30*time.Second, func() error {
		if got := len(ofKind(r.records(), record.KindInvocation)); got < n {
			return fmt.Errorf("%d invocations in the account, want %d", got, n)
		}
		return nil
	})
	records := r.records()
	if got := len(ofKind(records, record.KindInvocation)); got != n {
		r.t.Errorf("%d invocations in the account, want %d", got, n)
	}
	pids := map[int64]bool{}
	for _, rec := range ofKind(records, record.KindInvocation) {
		pids[rec.Invocation.PID] = true
		if rec.Invocation.Command != "run" || len(rec.Invocation.Images) != 1 || rec.Invocation.Images[0] != "some/image" {
			r.t.Fatalf("a record that is not of these calls: %+v", rec.Invocation)
		}
	}
	if len(pids) != n {
		r.t.Errorf("%d different processes in the account, want %d", len(pids), n)
	}
	if l := losses(records); len(l) > 0 {
		r.t.Errorf("losses %v, want none", lossLines(ofKind(records, record.KindLoss)))
	}
}
