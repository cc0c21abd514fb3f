package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLeanRuntime runs a program that was built with the cut start: faults are still
// panics that can be recovered, stacks and heap grow, clocks and hashes work, and
// there is one thread.
func TestLeanRuntime(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "strain")
	if err := run(bin, "", true, []string{"./testdata/strain"}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 7 {
		t.Fatalf("%v: %s", err, out)
	}
	want := "lean true\nnil true\nindex true\ndivide true\nstack 100000\nmemory 204800000\nmap 10000\nhash true\nclock true\nthreads 1\n"
	if string(out) != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

// TestLeanBuildForArm64: the other architecture of the runner image builds too.
func TestLeanBuildForArm64(t *testing.T) {
	t.Setenv("GOARCH", "arm64")
	if err := run(filepath.Join(t.TempDir(), "shim"), "-s -w", true, []string{"../../cmd/docker-shim"}); err != nil {
		t.Error(err)
	}
}

// TestUnknownGoVersion: where a text to replace is missing or there twice, the error
// says so, and without -require the program is built all the same.
func TestUnknownGoVersion(t *testing.T) {
	saved := edits
	defer func() { edits = saved }()
	edits = append(edits[:len(edits):len(edits)], edit{file: "runtime/proc.go", old: "no such text in any Go version", why: "a test"})
	bin := filepath.Join(t.TempDir(), "strain")
	err := run(bin, "", true, []string{"./testdata/strain"})
	if err == nil || !strings.Contains(err.Error(), "0 times instead of once") {
		t.Errorf("got %v", err)
	}
	if err := run(bin, "", false, []string{"./testdata/strain"}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Error(err)
	}
	out, _ := exec.Command(bin).Output()
	if !strings.HasPrefix(string(out), "lean \n") {
		t.Errorf("built with the lean runtime: %.40s", out)
	}
}
