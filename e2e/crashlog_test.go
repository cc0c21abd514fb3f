package e2e

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// The hook starts the agent with its output on /dev/null. Where it hangs, kill -ABRT
// brings its stacks to its log (docs/operations.md), and a crash its reason; the job
// goes on without it.
func TestStacksOfAnAgentGoToItsLog(t *testing.T) {
	r := newStubRig(t)
	j := r.job(shopBuild)
	if err := syscall.Kill(r.agentPID(), syscall.SIGABRT); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		log, err := os.ReadFile(filepath.Join(r.inst.State(), "agent.log"))
		if err != nil {
			return err
		}
		if !bytes.Contains(log, []byte("SIGABRT: abort")) || !bytes.Contains(log, []byte("goroutine ")) {
			return errors.New("there are no stacks in the log")
		}
		return nil
	})
	r.step(j, "after", 3, "docker run code-3")
	r.complete(j)
}
