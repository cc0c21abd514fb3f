package runnertest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func newJob(t *testing.T, started, completed string) *Job {
	t.Helper()
	dir := t.TempDir()
	r := &Runner{Name: "runner-1", Root: filepath.Join(dir, "runner"), Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}}
	for _, hook := range []struct {
		path   *string
		script string
	}{{&r.HookStarted, started}, {&r.HookCompleted, completed}} {
		if hook.script == "" {
			continue
		}
		file, err := os.CreateTemp(dir, "*.sh")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteString(hook.script); err != nil {
			t.Fatal(err)
		}
		file.Close()
		*hook.path = file.Name()
	}
	j, err := r.Start(t.Context(), Spec{Repository: "acme/shop", Workflow: "CI: build, test", WorkflowFile: "ci.yml", Job: "build", RunID: 42})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Kill)
	return j
}

func TestStepsAreChildrenOfAProcessNamedRunnerWorker(t *testing.T) {
	j := newJob(t, "", "")
	for range 2 {
		result, err := j.Step(t.Context(), "x", `cat /proc/$PPID/comm; readlink /proc/$PPID/exe; echo $PPID`)
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("Runner.Worker\n%s\n%d\n", filepath.Join(j.runner.Root, "bin", "Runner.Worker"), j.worker.cmd.Process.Pid)
		if result.Stdout != want {
			t.Errorf("parent of a step:\n%s\nwant\n%s", result.Stdout, want)
		}
	}
	j.Kill()
	if _, err := j.Step(t.Context(), "x", "true"); err == nil {
		t.Error("a step ran without its Worker")
	}
}

func TestArgumentsAndOutputAreKeptByteForByte(t *testing.T) {
	j := newJob(t, "", "")
	odd := "it's \"quoted\" $HOME `id` \\ \n\xff ü"
	result, err := j.Internal(t.Context(), "printf", "%s", odd)
	if err != nil || result.Stdout != odd {
		t.Errorf("printf gave %q, %v; want %q", result.Stdout, err, odd)
	}
	large, err := j.Step(t.Context(), "x", "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2")
	if err != nil || len(large.Stdout) != 3_000_000 || len(large.Stderr) != 2_000_000 {
		t.Errorf("%d and %d bytes, %v; want 3000000 and 2000000", len(large.Stdout), len(large.Stderr), err)
	}
}

func TestEachCallerSeesTheEnvironmentThatTheRunnerGivesIt(t *testing.T) {
	const show = `echo "$GITHUB_REPOSITORY|$GITHUB_WORKFLOW|$GITHUB_JOB|$GITHUB_RUN_ID|$GITHUB_ACTION|${RUNNER_TRACKING_ID:0:7}|$(pwd)"`
	j := newJob(t, show, show)
	step, err := j.Step(t.Context(), "compile", show, "SHOP=1")
	if err != nil {
		t.Fatal(err)
	}
	internal, err := j.Internal(t.Context(), "bash", "-c", show)
	if err != nil {
		t.Fatal(err)
	}
	outside, err := j.runner.Outside(t.Context(), "bash", "-c", show)
	if err != nil {
		t.Fatal(err)
	}
	completed, orphans, err := j.Complete(t.Context())
	if err != nil || len(orphans) > 0 {
		t.Fatal(orphans, err)
	}
	for _, row := range []struct{ name, got, want string }{
		{"job-started hook", j.Started.Stdout, "acme/shop|CI: build, test|build|42||github_|" + j.Workspace},
		{"step", step.Stdout, "acme/shop|CI: build, test|build|42|compile|github_|" + j.Workspace},
		{"the runner's own call", internal.Stdout, "|||||github_|" + j.Workspace},
		{"before any job", outside.Stdout, "||||||" + j.runner.Root},
		{"job-completed hook has the last step's action", completed.Stdout, "acme/shop|CI: build, test|build|42|__run_9|github_|" + j.Workspace},
	} {
		if got := strings.TrimSpace(row.got); got != row.want {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
}

func TestExitCodesOfSteps(t *testing.T) {
	j := newJob(t, "", "")
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "false; exit 0": 1, "kill -TERM $$": 128 + 15} {
		result, err := j.Step(t.Context(), "x", script)
		if err != nil || result.Code != want {
			t.Errorf("%s: code %d, %v; want %d", script, result.Code, err, want)
		}
	}
}

func TestOrphansWithTheJobsTrackingIDAreKilled(t *testing.T) {
	j := newJob(t, "", "")
	// Until env has exec'd sleep, both its environment and its name are the shell's.
	step, err := j.Step(t.Context(), "x", `
sleep 300 </dev/null >/dev/null 2>&1 & with=$!
env -u RUNNER_TRACKING_ID sleep 300 </dev/null >/dev/null 2>&1 & without=$!
for pid in $with $without; do
  until [ "$(cat /proc/$pid/comm)" = sleep ]; do :; done
  echo $pid
done`)
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(step.Stdout)
	if len(pids) != 2 {
		t.Fatalf("output %q, want two pids", step.Stdout)
	}
	_, orphans, err := j.Complete(t.Context())
	if err != nil || len(orphans) != 1 || orphans[0] != pids[0]+" sleep" {
		t.Errorf("killed %q, %v; want only %s sleep", orphans, err, pids[0])
	}
	if pid, err := strconv.Atoi(pids[1]); err != nil || syscall.Kill(pid, syscall.SIGKILL) != nil {
		t.Errorf("process %s without the tracking id is gone (%v)", pids[1], err)
	}
}

func TestAHookThatLeavesItsOutputOpenIsNoticed(t *testing.T) {
	j := newJob(t, "sleep 8 & exit 0", "")
	if !j.Started.Held || j.Started.Code != 0 {
		t.Errorf("result %+v, want held output and code 0", j.Started)
	}
	j.killOrphans()
}
