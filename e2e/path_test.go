package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/dockertest"
	"github.com/tallyman-ci/tallyman/e2e/runnertest"
	"github.com/tallyman-ci/tallyman/record"
)

var (
	shopBuild   = runnertest.Spec{Repository: "acme/shop", Workflow: "CI: build, test", WorkflowFile: "ci.yml", Job: "build", RunID: 7001}
	billingScan = runnertest.Spec{Repository: "acme/billing", Workflow: "Nightly", WorkflowFile: "nightly.yml", Job: "scan", RunID: 7002}
)

// call is what a test wants to know of an invocation.
type call struct {
	command, repository, job, step string
	by                             record.By
	outside                        bool
	exit                           int64  // -1 where no exit code was recorded
	path                           string // the way it took, shown only
}

func (c call) String() string {
	return fmt.Sprintf("%s: %s %s step=%q by=%s outside=%v exit=%d (by %s)", c.command, c.repository, c.job, c.step, c.by, c.outside, c.exit, c.path)
}

// calls are the invocations of an account with their ends, in the order of their time.
func calls(records []record.Record) []call {
	exits := map[string]int64{}
	for _, r := range ofKind(records, record.KindInvocationEnd) {
		if r.End.ExitCode != nil {
			exits[r.End.InvocationID] = *r.End.ExitCode
		}
	}
	invocations := ofKind(records, record.KindInvocation)
	slices.SortStableFunc(invocations, func(a, b record.Record) int { return a.TS.Compare(b.TS) })
	var found []call
	for _, r := range invocations {
		c := call{command: r.Invocation.Command, by: r.By, outside: r.OutsideJob, exit: -1, path: r.Invocation.Path}
		if r.CI != nil {
			c.repository, c.job, c.step = r.CI.Repository, r.CI.Job, r.CI.Step
		}
		if code, ok := exits[r.ID]; ok {
			c.exit = code
		}
		found = append(found, c)
	}
	return found
}

// exitCodesKnown says whether this kernel tells the exit code of a process that is
// nobody's child: PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15.
func exitCodesKnown(t *testing.T) bool { return kernelAtLeast(t, 6, 15) }

func kernelAtLeast(t *testing.T, wantMajor, wantMinor int) bool {
	var uts syscall.Utsname
	if err := syscall.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	release := make([]byte, 0, 65)
	for _, c := range uts.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	var major, minor int
	fmt.Sscanf(string(release), "%d.%d", &major, &minor)
	return major > wantMajor || major == wantMajor && minor >= wantMinor
}

func TestTheWholePathOfTwoJobs(t *testing.T) {
	wholePath(t, 0)
}

// On a real runner nothing runs as root but the daemon.
func TestTheWholePathAsAnUnprivilegedRunner(t *testing.T) {
	wholePath(t, 1001)
}

func wholePath(t *testing.T, user uint32) {
	r := newRig(t)
	if user != 0 {
		r.runner.User = user
		if err := r.daemon.Grant(user); err != nil {
			t.Fatal(err)
		}
		// As the image does: programs and configuration are root's, what grows is the runner's.
		if err := os.MkdirAll(r.inst.State(), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{r.inst.Run, r.inst.Spool(), r.inst.State()} {
			if err := os.Chown(dir, int(user), int(user)); err != nil {
				t.Fatal(err)
			}
		}
	}
	ctx := t.Context()

	// The entrypoint waits for the daemon before there is any job.
	if result, err := r.runner.Outside(ctx, "docker", "ps"); err != nil || result.Code != 0 {
		t.Fatalf("docker ps before any job: %+v, %v", result, err)
	}

	build := r.job(shopBuild)
	r.step(build, "compile", 0, "docker pull -q "+image+" && docker run --rm "+image+" true")
	r.step(build, "unit", 3, "docker run --rm "+image+" sh -c 'exit 3'")
	r.step(build, "__run_2", 0, `env -i PATH="$PATH" HOME="$HOME" DOCKER_HOST="$DOCKER_HOST" docker image ls`) // as sudo does
	r.step(build, "liar", 0, "docker version", "GITHUB_REPOSITORY=evil/other", "GITHUB_RUN_ID=666")
	r.step(build, "missing", 1, "docker pull "+dockertest.Registry+"/tools/absent:9")
	if result, err := build.Internal(ctx, "docker", "network", "create", "github_network_1"); err != nil || result.Code != 0 {
		t.Fatalf("the runner's own call: %+v, %v", result, err)
	}
	summary := r.complete(build)

	// A long-lived runner between two jobs.
	if result, err := r.runner.Outside(ctx, "docker", "info"); err != nil || result.Code != 0 {
		t.Fatalf("docker info between two jobs: %+v, %v", result, err)
	}

	scan := r.job(billingScan)
	r.step(scan, "scan", 0, "docker run --rm "+image+" echo nothing found")
	r.complete(scan)

	want := []call{
		{command: "ps", by: record.ByNone, outside: true},
		{command: "pull", repository: "acme/shop", job: "build", step: "compile", by: record.BySealed},
		{command: "run", repository: "acme/shop", job: "build", step: "compile", by: record.BySealed},
		{command: "run", repository: "acme/shop", job: "build", step: "unit", by: record.BySealed, exit: 3},
		{command: "image ls", repository: "acme/shop", job: "build", by: record.ByInferred},
		{command: "version", repository: "acme/shop", job: "build", step: "liar", by: record.BySealed},
		{command: "pull", repository: "acme/shop", job: "build", step: "missing", by: record.BySealed, exit: 1},
		{command: "network create", repository: "acme/shop", job: "build", by: record.BySealed},
		{command: "info", by: record.ByNone, outside: true},
		{command: "run", repository: "acme/billing", job: "scan", step: "scan", by: record.BySealed},
	}
	records := r.records()
	got := calls(records)
	if len(got) != len(want) {
		t.Fatalf("%d calls in the account, want %d:\n%v", len(got), len(want), lines(got))
	}
	// Before the first job and between jobs nobody was there to see the end.
	want[0].exit, want[8].exit = got[0].exit, got[8].exit
	for i := range want {
		if !exitCodesKnown(t) {
			want[i].exit = -1
		}
		want[i].path = got[i].path
		if got[i].path == "file" {
			// The agent of this job was still starting: who is found in an append file
			// may be gone, and with it the exit code.
			want[i].exit = got[i].exit
		}
		if got[i] != want[i] {
			t.Errorf("call %d:\n got %v\nwant %v", i, got[i], want[i])
		}
	}

	for _, inv := range ofKind(records, record.KindInvocation) {
		if inv.CI != nil && inv.CI.Step == "liar" {
			if inv.Claim == nil || inv.Claim.Repository != "evil/other" {
				t.Errorf("what the caller claimed is not visible: %+v", inv.Claim)
			}
		} else if inv.Claim != nil {
			t.Errorf("%s: a claim without a disagreement: %+v", inv.Invocation.Command, inv.Claim)
		}
		if inv.Host == nil || inv.Host.Name == "" || inv.Host.BootID == "" {
			t.Errorf("%s: host %+v, want name and boot id", inv.Invocation.Command, inv.Host)
		}
	}

	checkEvents(t, records, map[string][]string{
		"acme/shop":    {"image pull", "container create", "container start", "container die 0", "container die 3", "network create"},
		"acme/billing": {"container start", "container die 0"},
	})
	if l := losses(records); len(l) > 0 {
		t.Errorf("losses %v, want none", l)
	}

	for _, word := range []string{"run", "pull"} {
		if !strings.Contains(summary, word) {
			t.Errorf("summary lacks %q:\n%s", word, summary)
		}
	}
	answer := r.report()
	if answer.Coverage.Calls.None != 0 || answer.Coverage.Events.None != 0 {
		t.Errorf("unattributed: %d calls, %d events; want 0", answer.Coverage.Calls.None, answer.Coverage.Events.None)
	}
	if answer.Totals.Calls != 8 || answer.Totals.OutsideJob != 2 {
		t.Errorf("report: %d calls and %d outside any job, want 8 and 2", answer.Totals.Calls, answer.Totals.OutsideJob)
	}
	if exitCodesKnown(t) {
		if n := len(answer.FailedPulls.Rows); n != 1 || !strings.HasSuffix(answer.FailedPulls.Rows[0].Image, "absent:9") || answer.FailedPulls.Rows[0].Job != "build" {
			t.Errorf("failed pulls: %+v, want absent:9 of job build", answer.FailedPulls.Rows)
		}
	}
	for _, file := range []string{"set_env", "add_path"} {
		content, err := os.ReadFile(filepath.Join(r.runner.Root, "_work", "_temp", "_runner_file_commands", file))
		if err != nil || len(content) > 0 {
			t.Errorf("the hooks wrote %q to the job's %s (%v)", content, file, err)
		}
	}
}

// checkEvents wants each of the events under its repository, and every event under one.
func checkEvents(t *testing.T, records []record.Record, want map[string][]string) {
	t.Helper()
	seen := map[string][]string{}
	for _, e := range ofKind(records, record.KindEvent) {
		repository := ""
		if e.CI != nil {
			repository = e.CI.Repository
		} else {
			t.Errorf("event %s %s of %s has no job", e.Event.Type, e.Event.Action, e.Event.Name)
		}
		what := e.Event.Type + " " + e.Event.Action
		if e.Event.Action == "die" && e.Event.ExitCode != nil {
			what += fmt.Sprintf(" %d", *e.Event.ExitCode)
		}
		seen[repository] = append(seen[repository], what)
	}
	for repository, events := range want {
		for _, e := range events {
			if !slices.Contains(seen[repository], e) {
				t.Errorf("%s: no event %q among %v", repository, e, seen[repository])
			}
		}
	}
}

func lines[T fmt.Stringer](items []T) string {
	var all []string
	for _, i := range items {
		all = append(all, i.String())
	}
	return strings.Join(all, "\n")
}

// A job that uses no docker leaves no trace on its page.
func TestAJobWithoutDockerIsSilent(t *testing.T) {
	r := newRig(t)
	j := r.job(shopBuild)
	r.step(j, "__run", 0, "echo no containers here")
	if summary := r.complete(j); summary != "" {
		t.Errorf("summary of a job without docker: %q, want none", summary)
	}
}

// The agent is gone soon after its job, and nothing of it is left.
func TestTheAgentEndsWithItsJob(t *testing.T) {
	r := newRig(t)
	j := r.job(shopBuild)
	r.step(j, "__run", 0, "docker version")
	pid := r.agentPID()
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(environ), "RUNNER_TRACKING_ID=") {
		t.Error("the agent carries RUNNER_TRACKING_ID: the runner would kill it as an orphan")
	}
	r.complete(j)
	eventually(t, 15*time.Second, func() error {
		if left := r.inst.Processes(); len(left) > 0 {
			return fmt.Errorf("processes %v are still there", left)
		}
		return nil
	})
	ends := ofKind(r.records(), record.KindJobEnd)
	if len(ends) != 1 || ends[0].Job.Outcome != "completed" {
		t.Errorf("job.end records: %+v, want one, completed", ends)
	}
}
