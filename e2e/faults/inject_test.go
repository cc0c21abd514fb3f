package faults

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

const launchMark = "launch-for-a-test-of-faults"

func launch(args []string) { os.Exit(1) }

// needStrace makes sure that strace can trace here.
func needStrace(t testing.TB) {
	t.Helper()
	err := exec.Command("strace", "-qq", "-o", "/dev/null", "-e", "inject=write:error=EIO:when=9999", "true").Run()
	if err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("strace cannot be used (%v): apt-get install strace, and allow ptrace", err)
	}
	faults.CannotRun(t, fmt.Sprintf("needs strace and ptrace: %v (apt-get install strace)", err))
}
