// Package inject runs a program of a test under strace(1) and kills it, or lets a
// system call fail, at its N-th call of a kind. A test of crashes first counts the
// calls of a whole run, then visits the points of that run one after the other.
//
// strace counts for each thread and each kind of call alone. A program that does its
// work on one locked thread therefore has each of its calls visited; of one with
// more threads, a point is the first thread's that gets so far.
//
// A kill comes at the entry of the call, which then has not happened. What a kill
// inside a write leaves, half a line, is for tests that kill at random moments.
package inject

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

// AllVariable names the environment variable that makes Sample return all points.
const AllVariable = "TALLYMAN_CRASH"

// Kill is the fault of a Point that ends the program by SIGKILL.
const Kill = "signal=KILL"

// Error is the fault of a Point that lets the call fail with errno, ENOSPC for
// example. The call does not happen.
func Error(errno string) string { return "error=" + errno }

// A Point is one call of a program and what happens to it.
type Point struct {
	Call  string // name of the system call
	N     int    // from 1
	Fault string // Kill or an Error
}

func (p Point) String() string { return fmt.Sprintf("%s %d %s", p.Call, p.N, p.Fault) }

// Require makes sure that strace can trace here. The fault cases of the test could
// not run otherwise.
func Require(t testing.TB) {
	t.Helper()
	// Not only that it starts: versions differ in what they inject.
	cmd := Point{"write", 1, Kill}.Command(exec.Command("echo"))
	err := cmd.Run()
	if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); err != nil && cmd.ProcessState != nil && ok && s.Signaled() && s.Signal() == syscall.SIGKILL {
		return
	}
	if err == nil {
		err = errors.New("it did not kill the program it traced")
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("strace cannot be used (%v): apt-get install strace, and allow ptrace", err)
	}
	faults.CannotRun(t, fmt.Sprintf("needs strace and ptrace: %v (apt-get install strace)", err))
}

// Command returns cmd as it runs under strace with p injected. cmd itself is not run.
func (p Point) Command(cmd *exec.Cmd) *exec.Cmd {
	options := []string{"-o", "/dev/null", "-e", "trace=" + p.Call, "-e", fmt.Sprintf("inject=%s:%s:when=%d", p.Call, p.Fault, p.N)}
	if p.Fault != Kill {
		// Five times as fast, but strace 6.1 forgets signals with it.
		options = append(options, "--seccomp-bpf")
	}
	return traced(cmd, options...)
}

func traced(cmd *exec.Cmd, options ...string) *exec.Cmd {
	c := exec.Command("strace", slices.Concat([]string{"-f", "-qq"}, options, []string{cmd.Path}, cmd.Args[1:])...)
	c.Env, c.Dir, c.Stdin, c.Stdout, c.Stderr = cmd.Env, cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr
	c.SysProcAttr = cmd.SysProcAttr
	return c
}

var entered = regexp.MustCompile(`^(\d+) +([a-z0-9_]+)\(`)

// A Count is a program in the trace of its calls.
type Count struct {
	*exec.Cmd
	path string
}

// Counting returns cmd as it runs under strace with these kinds of calls counted.
// After its end, Calls gives the counts.
func Counting(t testing.TB, cmd *exec.Cmd, calls ...string) Count {
	path := filepath.Join(t.TempDir(), "trace")
	return Count{traced(cmd, "--seccomp-bpf", "-o", path, "-e", "trace="+strings.Join(calls, ",")), path}
}

// Calls are, for each kind, the most calls that one thread made, which is how far a
// point can get, and the calls of all threads together. Which thread makes a call
// differs from run to run: what a run must have done is asked of all.
func (c Count) Calls(t testing.TB) (most, all map[string]int) {
	t.Helper()
	data, err := os.ReadFile(c.path)
	if err != nil {
		t.Fatal(err)
	}
	most, all = map[string]int{}, map[string]int{}
	each := map[string]int{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		if m := entered.FindStringSubmatch(lines.Text()); m != nil {
			each[m[1]+m[2]]++
			most[m[2]] = max(most[m[2]], each[m[1]+m[2]])
			all[m[2]]++
		}
	}
	return most, all
}

// Points are all calls of these kinds with this fault.
func Points(counts map[string]int, fault string, calls ...string) []Point {
	var all []Point
	for _, call := range calls {
		for n := range counts[call] {
			all = append(all, Point{call, n + 1, fault})
		}
	}
	return all
}

// Sample returns about n points, evenly apart, or all of them where TALLYMAN_CRASH is
// "all".
func Sample(points []Point, n int) []Point {
	if os.Getenv(AllVariable) == "all" || len(points) <= n {
		return points
	}
	var some []Point
	for i := range n {
		some = append(some, points[i*len(points)/n])
	}
	return some
}

// SampleOfSelf is Sample for programs that are the test's own binary. Under the race
// detector its start takes ten times as long, and a few points must do.
func SampleOfSelf(points []Point, n int) []Point {
	if underRace {
		n = max(n/8, 1)
	}
	return Sample(points, n)
}

// Explore visits the points, two at a time: most of a visit is waiting for the start
// of processes.
func Explore(points []Point, visit func(p Point)) {
	next := make(chan Point)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for p := range next {
				visit(p)
			}
		})
	}
	for _, p := range points {
		next <- p
	}
	close(next)
	wg.Wait()
}
