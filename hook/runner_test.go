package hook

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/runnertest"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/procfs"
)

// play is one job on a played runner: what to run, and what came of it.
type play struct {
	Root, Name     string
	Started, Ended string // the hooks
	Env            []string
	Spec           runnertest.Spec
	WorkerLog      string // the text of the Worker log; {run} is replaced
	Step           string // a script to run between the hooks
	KillBeforeEnd  bool   // the Worker dies with the job
}

type played struct {
	PID        int
	TrackingID string
	Workspace  string
	Start      runnertest.Result
	Step       runnertest.Result
	End        runnertest.Result
	Orphans    []string
	Summary    string
	SetEnv     string // what GITHUB_ENV and GITHUB_PATH hold in the end
	Error      string
}

// playRunner is the process Runner.Worker: it is the hooks' ancestor, has their name
// and place in the process tree, and does around them what the runner does.
func playRunner() {
	var p play
	var out played
	if err := json.NewDecoder(os.Stdin).Decode(&p); err != nil {
		fmt.Fprintln(os.Stderr, err)
		exit(3)
	}
	out.PID = os.Getpid()
	fail := func(err error) {
		if err != nil && out.Error == "" {
			out.Error = err.Error()
		}
	}
	if p.WorkerLog != "" {
		st, err := procfs.Read(os.Getpid())
		fail(err)
		began, _ := startTime(st.Start)
		dir := filepath.Join(p.Root, "_diag")
		fail(os.MkdirAll(dir, 0o755))
		fail(os.WriteFile(filepath.Join(dir, "Worker_"+began.UTC().Format("20060102-150405")+"-utc.log"), []byte(p.WorkerLog), 0o644))
	}
	r := runnertest.Runner{Name: p.Name, Root: p.Root, Env: p.Env, HookStarted: p.Started, HookCompleted: p.Ended}
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	job, err := r.Start(ctx, p.Spec)
	fail(err)
	if err == nil {
		out.TrackingID, out.Workspace, out.Start = job.TrackingID, job.Workspace, job.Started
		if p.Step != "" {
			out.Step, err = job.Step(ctx, "__run", p.Step)
			fail(err)
		}
		if !p.KillBeforeEnd {
			out.End, out.Orphans, err = job.Complete(ctx)
			fail(err)
		}
		b, _ := os.ReadFile(job.Summary)
		out.Summary = string(b)
		for _, name := range []string{"set_env", "add_path"} {
			b, _ := os.ReadFile(filepath.Join(filepath.Dir(job.Summary), name))
			out.SetEnv += string(b)
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(out)
	if p.KillBeforeEnd {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	exit(0)
}

// stage is a machine with a runner: its folders, and the setup of the tool.
type stage struct {
	t    *testing.T
	dir  string
	self string
	setup
}

func newStage(t *testing.T) *stage {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &stage{t: t, dir: dir, self: self, setup: setup{RunDir: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"), Summary: SummaryAuto}}
	for _, d := range []string{s.RunDir, s.StateDir, filepath.Join(dir, "runner", "bin")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A hard link is refused across file systems; the copy is what counts anyway: the
	// name of the executable.
	if err := os.Link(self, s.worker()); err != nil {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.worker(), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(s.endAgents)
	return s
}

func (s *stage) root() string   { return filepath.Join(s.dir, "runner") }
func (s *stage) worker() string { return filepath.Join(s.root(), "bin", "Runner.Worker") }
func (s *stage) store() Store   { return Store{Dir: filepath.Join(s.StateDir, "contexts")} }

func hookScript(name string) string {
	path, err := filepath.Abs(filepath.Join("..", "runner-image", "hooks", name))
	if err != nil {
		panic(err)
	}
	return path
}

// env is the runner's own environment.
func (s *stage) env(more ...string) []string {
	return append([]string{
		"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + s.dir, "TALLYMAN_BIN=" + s.self, s.setup.env(),
	}, more...)
}

func (s *stage) spec(run int64) runnertest.Spec {
	return runnertest.Spec{Repository: "acme/shop", Workflow: "CI", WorkflowFile: "ci.yml", Job: "build", RunID: run}
}

// job runs one job with the project's own scripts as hooks.
func (s *stage) job(run int64, change func(*play)) played {
	s.t.Helper()
	return s.jobOf(exec.Command(s.worker()), run, change)
}

// jobOf runs one job with the runner that cmd starts.
func (s *stage) jobOf(cmd *exec.Cmd, run int64, change func(*play)) played {
	s.t.Helper()
	p := play{
		Root: s.root(), Name: "runner-1", Env: s.env(), Spec: s.spec(run),
		Started: hookScript("job-started.sh"), Ended: hookScript("job-completed.sh"),
	}
	if change != nil {
		change(&p)
	}
	in, err := json.Marshal(p)
	if err != nil {
		s.t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader(string(in))
	out, err := cmd.Output()
	if err != nil && !p.KillBeforeEnd {
		s.t.Fatalf("the played runner: %v", err)
	}
	var got played
	if err := json.Unmarshal(out, &got); err != nil {
		s.t.Fatalf("the played runner said %q: %v", out, err)
	}
	if got.Error != "" {
		s.t.Fatal(got.Error)
	}
	return got
}

// tool runs one hook command directly and returns its output.
func (s *stage) tool(op string, env ...string) string {
	s.t.Helper()
	cmd := exec.Command(s.self, "hook", op)
	cmd.Env = s.env(env...)
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("hook %s: %v", op, err)
	}
	return string(out)
}

func (s *stage) contexts() Contexts {
	s.t.Helper()
	all, err := s.store().List()
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

// agent waits for the played agent's report.
func (s *stage) agent() agentReport {
	s.t.Helper()
	var r agentReport
	s.eventually("the agent reports", func() bool {
		b, err := os.ReadFile(filepath.Join(s.StateDir, "agent.report"))
		return err == nil && json.Unmarshal(b, &r) == nil
	})
	return r
}

func (s *stage) said() []string {
	b, _ := os.ReadFile(filepath.Join(s.StateDir, "agent.said"))
	return strings.Fields(strings.ReplaceAll(strings.TrimSpace(string(b)), " ", "_"))
}

func (s *stage) eventually(what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	s.t.Fatalf("not within 15 s: %s", what)
}

// endAgents ends the agents of this stage and no other process: those whose
// environment holds its folders.
func (s *stage) endAgents() {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cmd, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))
		if strings.HasSuffix(string(cmd), "\x00agent\x00") && strings.Contains(string(env), s.dir+"/run") {
			var pid int
			if _, err := fmt.Sscanf(filepath.Base(dir), "%d", &pid); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

func alive(pid int) bool {
	st, err := procfs.Read(pid)
	return err == nil && st.State != 'Z'
}

func TestAJobOnARunner(t *testing.T) {
	s := newStage(t)
	s.Markdown = "### Docker\n\n3 calls in {repository}\n"
	got := s.job(4711, func(p *play) { p.WorkerLog = workerLog(t, nil) })
	if got.Start.Code != 0 || got.End.Code != 0 {
		t.Errorf("exit codes %d and %d, want 0 and 0", got.Start.Code, got.End.Code)
	}
	if got.Start.Stdout+got.Start.Stderr+got.End.Stdout+got.End.Stderr != "" {
		t.Errorf("the hooks of a good job print nothing; got %+v %+v", got.Start, got.End)
	}
	if want := "### Docker\n\n3 calls in acme/shop\n"; got.Summary != want {
		t.Errorf("summary %q, want %q", got.Summary, want)
	}
	all := s.contexts()
	if len(all) != 1 {
		t.Fatalf("%d contexts, want 1", len(all))
	}
	c := all[0]
	for what, ok := range map[string]bool{
		"repository":   c.CI.Repository == "acme/shop",
		"job":          c.CI.Job == "build",
		"run":          c.CI.RunID == "4711" && c.CI.RunAttempt == 1,
		"tracking id":  c.CI.TrackingID == got.TrackingID && got.TrackingID != "",
		"no step":      c.CI.Step == "",
		"job id":       c.CI.JobID == "90005817181",
		"display name": c.CI.JobName == `Build "all" (linux, 1.26)`,
		"job url":      c.CI.JobURL == "https://github.com/acme/shop/actions/runs/4711/job/90005817181",
		"reusable":     c.CI.JobWorkflowRef == "acme/workflows/.github/workflows/build.yml@refs/heads/v2",
		"labels":       c.CI.Runner != nil && slices.Equal(c.CI.Runner.Labels, []string{"linux"}),
		"workspace":    c.Workspace == got.Workspace,
		"host":         c.Host.Name != "" && c.Host.BootID != "",
		"runner's pid": c.RunnerPID == got.PID && c.RunnerStart != 0,
		"ended":        c.Outcome == Completed && c.Ended.After(c.Started),
		"version":      c.Version == "test",
	} {
		if !ok {
			t.Errorf("%s is wrong in %+v", what, c)
		}
	}
	s.agent()
	want := []string{"end_" + c.Key + "_completed", "flush"}
	if got := s.said(); !slices.Equal(got, want) {
		t.Errorf("the agent was told %q, want %q", got, want)
	}

	// The next job finds the agent running and is announced to it.
	s.job(4712, nil)
	second := s.contexts()[0]
	want = append(want, "start_"+second.Key, "end_"+second.Key+"_completed", "flush")
	if got := s.said(); !slices.Equal(got, want) {
		t.Errorf("the agent was told %q, want %q", got, want)
	}
	if second.CI.JobName != "" || second.CI.JobID != "" {
		t.Errorf("the second job has the first one's name %q and id %q", second.CI.JobName, second.CI.JobID)
	}
}

// HK-04 and HK-05: the runner neither waits for the agent nor kills it, and the agent
// holds nothing of the hook.
func TestHK04HK05TheAgentIsDetached(t *testing.T) {
	faults.Case(t, "HK-04", "HK-05")
	s := newStage(t)
	wrapper := filepath.Join(s.dir, "wrapper.sh")
	// A script around ours can leave copies of the runner's pipes open.
	write(t, wrapper, "exec 7>&1 8>&2\nbash -e "+hookScript("job-started.sh")+"\n")
	var before agentReport
	got := s.job(1, func(p *play) {
		p.Started = wrapper
		p.Env = append(p.Env, "ACTIONS_ID_TOKEN_REQUEST_TOKEN=live", "DD_API_KEY=secret", "DD_AGENT_HOST=10.0.0.1", "DOCKER_HOST=unix:///x.sock")
		p.Step = `echo step`
	})
	if got.Start.Held || got.End.Held {
		t.Error("the runner waited five seconds for somebody who kept a hook's output open")
	}
	if len(got.Orphans) != 0 {
		t.Errorf("the runner killed %v", got.Orphans)
	}
	before = s.agent()
	if !alive(before.PID) {
		t.Error("the agent did not survive the job")
	}
	if before.Session != before.PID {
		t.Errorf("the agent is in session %d, not in its own (%d)", before.Session, before.PID)
	}
	if st, err := procfs.Read(before.PID); err != nil || st.Parent == got.PID {
		t.Errorf("the agent's parent is %d (%v): the runner", st.Parent, err)
	}
	if before.Cwd != "/" || before.Umask != 0o077 {
		t.Errorf("working directory %s and umask %o, want / and 77", before.Cwd, before.Umask)
	}
	if want := []string{"0 /dev/null", "1 /dev/null", "2 /dev/null"}; !slices.Equal(before.Files, want) {
		t.Errorf("descriptors %q, want %q", before.Files, want)
	}
	var names []string
	for _, e := range before.Environ {
		name, _, _ := strings.Cut(e, "=")
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"DD_AGENT_HOST", "DOCKER_HOST", "HOME", "PATH", "TALLYMAN_BIN", "TALLYMAN_TEST"}; !slices.Equal(names, want) {
		t.Errorf("the agent's environment has %q, want %q", names, want)
	}
}

// A worker that outlives the hook is out of the runner's reach, too.
func TestHK05TheWorkerIsDetached(t *testing.T) {
	faults.Case(t, "HK-05")
	s := newStage(t)
	s.WorkerSleeps, s.CompletedTimeout = 3*time.Second, 100*time.Millisecond
	got := s.job(1, nil)
	if got.Start.Held || got.End.Held || len(got.Orphans) != 0 {
		t.Errorf("output held open: %v and %v, killed: %v", got.Start.Held, got.End.Held, got.Orphans)
	}
	s.eventually("the worker seals", func() bool { return len(s.contexts()) == 1 })
}

// The runner raises a hook's oom_score_adj to 500; the agent gets the runner's own.
func TestTheAgentIsNoPreferredVictim(t *testing.T) {
	s := newStage(t)
	wrapper := filepath.Join(s.dir, "wrapper.sh")
	write(t, wrapper, "echo 500 > /proc/self/oom_score_adj\nbash -e "+hookScript("job-started.sh")+"\n")
	s.job(1, func(p *play) { p.Started = wrapper })
	own, _ := os.ReadFile("/proc/self/oom_score_adj")
	if got := s.agent().OOMScoreAdj; got != strings.TrimSpace(string(own)) {
		t.Errorf("the agent's oom_score_adj is %s, want the runner's own %s", got, own)
	}
}

// HK-10: the runner dies without calling the hook; the context knows its process.
func TestHK10ContextOfADeadRunner(t *testing.T) {
	faults.Case(t, "HK-10")
	s := newStage(t)
	got := s.job(1, func(p *play) { p.KillBeforeEnd = true })
	c := s.contexts().Active()
	if c == nil || c.RunnerPID != got.PID {
		t.Fatalf("open context %+v, want one of process %d", c, got.PID)
	}
	if !c.RunnerGone() {
		t.Error("RunnerGone is false for a process that was killed")
	}
	st, err := procfs.Read(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	live := *c
	live.RunnerPID, live.RunnerStart = os.Getpid(), st.Start
	if live.RunnerGone() {
		t.Error("RunnerGone is true for a living process")
	}
	live.RunnerStart++
	if !live.RunnerGone() {
		t.Error("RunnerGone is false for a pid that was used again")
	}
	for what, change := range map[string]func(*Context){
		"no process known": func(c *Context) { c.RunnerPID = 0 },
		"another host":     func(c *Context) { c.Host.Name = "elsewhere" },
	} {
		other := *c
		change(&other)
		if other.RunnerGone() {
			t.Errorf("%s: RunnerGone is true", what)
		}
	}
	rebooted := *c
	rebooted.RunnerPID, rebooted.Host.BootID = 0, "00000000-0000-0000-0000-000000000000"
	if !rebooted.RunnerGone() {
		t.Error("RunnerGone is false after a boot")
	}
}

// HK-13: the files that change a job's environment stay empty.
func TestHK13TheJobsEnvironmentStaysAsItIs(t *testing.T) {
	faults.Case(t, "HK-13")
	s := newStage(t)
	s.Markdown = "x\n"
	if got := s.job(1, nil); got.SetEnv != "" {
		t.Errorf("GITHUB_ENV and GITHUB_PATH hold %q", got.SetEnv)
	}
}

// HK-16: when the hook is over, the context is there.
func TestHK16SealedBeforeTheFirstCall(t *testing.T) {
	faults.Case(t, "HK-16")
	s := newStage(t)
	got := s.job(1, func(p *play) { p.Step = "cat " + s.store().Dir + "/*.json" })
	if !strings.Contains(got.Step.Stdout, got.TrackingID) {
		t.Errorf("the first step found the contexts %q", got.Step.Stdout)
	}
}

// HK-07: a runner that lives on, and a job whose end was never seen.
func TestHK07TheNextJobInheritsNothing(t *testing.T) {
	faults.Case(t, "HK-07")
	s := newStage(t)
	first := s.job(1, func(p *play) { p.KillBeforeEnd = true })
	second := s.job(2, func(p *play) { p.KillBeforeEnd = true })
	all := s.contexts()
	if len(all) != 2 || all[1].Outcome != Superseded || all[1].Ended != all[0].Started {
		t.Fatalf("contexts %+v, want the first superseded when the second began", all)
	}
	// A record of each job that waited in a file, and one that names no job.
	for _, row := range []struct {
		what, id string
		at       time.Time
		run      string
		match    Match
	}{
		{"by the first job's id, late", first.TrackingID, time.Now(), "1", MatchID},
		{"by the second job's id", second.TrackingID, time.Now(), "2", MatchID},
		{"no id, in the first job's time", "", all[1].Started.Add(time.Nanosecond), "1", MatchTime},
		{"no id, now", "", time.Now(), "2", MatchTime},
		{"another runner's id", "github_0", time.Now(), "", MatchNone},
		{"before any job", "", all[1].Started.Add(-time.Nanosecond), "", MatchNone},
	} {
		c, match, err := s.store().Find(row.id, row.at)
		run := ""
		if c != nil {
			run = c.CI.RunID
		}
		if err != nil || run != row.run || match != row.match {
			t.Errorf("%s: run %q by %q (%v), want %q by %q", row.what, run, match, err, row.run, row.match)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}
