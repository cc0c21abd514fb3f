package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/dockertest"
	"github.com/tallyman-ci/tallyman/e2e/prefix"
	"github.com/tallyman-ci/tallyman/e2e/runnertest"
)

// stage is everything the demo runs on.
type stage struct {
	options
	daemon  *dockertest.Daemon
	install *prefix.Prefix
	runner  *runnertest.Runner
	runID   int64 // of the last workflow run
	jobID   int64 // of the last job
	runOf   map[string]int64
}

// published are the images in the private registry before the first job.
var published = []string{
	dockertest.Registry + "/base/busybox:1",
	dockertest.Registry + "/tools/scanner:2",
}

func newStage(ctx context.Context, o options) (_ *stage, err error) {
	if _, err := exec.LookPath(o.act); err != nil {
		return nil, fmt.Errorf("act: %w (run make demo, which installs it)", err)
	}
	if err := os.RemoveAll(o.dir); err != nil {
		return nil, fmt.Errorf("empty the demo's folder: %w", err)
	}
	s := &stage{options: o, runID: 26_000_000_000, jobID: 61_000_000_000, runOf: map[string]int64{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.daemon, err = dockertest.Start(ctx); err != nil {
		return nil, err
	}
	for _, image := range published {
		if err := s.daemon.Publish(ctx, image); err != nil {
			return nil, err
		}
	}
	s.install, err = prefix.Install(o.dir, prefix.Options{
		Built: o.built, Hooks: o.hooks, Real: s.daemon.CLI(),
		Config: []string{"spool_on_disk = true"}, // the demo's folder is where the clone is
	})
	if err != nil {
		return nil, err
	}
	home := filepath.Join(o.dir, "home")
	if err := os.MkdirAll(home, 0o755); err != nil {
		return nil, err
	}
	s.runner = &runnertest.Runner{
		Name: "acme-runner-1",
		Root: filepath.Join(o.dir, "runner"),
		Env: append(s.install.Env(),
			"PATH="+s.install.Path(), "HOME="+home, "LANG=C.UTF-8", "DOCKER_HOST="+s.daemon.Host(),
			"DOCKER_BUILDKIT=0", // Debian's docker.io brings no buildx
		),
		HookStarted:   s.install.HookStarted(),
		HookCompleted: s.install.HookCompleted(),
	}
	fmt.Printf("dockerd   %s\nregistry  %s (in there)\nshim      %s -> docker.original -> %s\n",
		s.daemon.Host(), dockertest.Registry, s.install.Shim(), s.daemon.CLI())
	return s, nil
}

// close stops what the demo started, the agent first: the daemon's end is not part
// of the account.
func (s *stage) close() error {
	var errs []error
	if s.install != nil {
		errs = append(errs, s.install.Remove())
	}
	if s.daemon != nil {
		errs = append(errs, s.daemon.Stop())
	}
	return errors.Join(errs...)
}

// checkout makes a git repository of the demo's files, as a clone of the one on
// GitHub: act takes the repository's name from its origin.
func (s *stage) checkout(ctx context.Context, name string) ([]job, error) {
	dir := filepath.Join(s.dir, "repos", name)
	if err := writeRepo(name, dir); err != nil {
		return nil, err
	}
	repository := "acme/" + name
	for _, args := range [][]string{
		{"init", "--quiet"},
		{"symbolic-ref", "HEAD", "refs/heads/main"},
		{"remote", "add", "origin", "https://github.com/" + repository},
		{"add", "--all"},
		{"-c", "user.name=Octocat", "-c", "user.email=octocat@example.com", "commit", "--quiet", "--message", "Ship it"},
	} {
		if _, err := s.git(ctx, dir, args...); err != nil {
			return nil, err
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, ".github", "workflows", "*.yml"))
	if err != nil {
		return nil, err
	}
	var jobs []job
	for _, file := range files {
		found, err := readJobs(repository, dir, filepath.Base(file))
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, found...)
	}
	return jobs, nil
}

func (s *stage) git(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "GIT_CONFIG_NOSYSTEM=1"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// waitForDocker does what the runner's entrypoint does before there is any job: it
// calls `docker ps` until the daemon answers (run-helper.sh.template).
func (s *stage) waitForDocker(ctx context.Context) error {
	result, err := s.runner.Outside(ctx, "docker", "ps", "--quiet")
	if err != nil {
		return err
	}
	if result.Code != 0 {
		return fmt.Errorf("docker ps through the shim: exit code %d: %s", result.Code, result.Stderr)
	}
	return nil
}

// runJob runs one job with act between the two hooks.
func (s *stage) runJob(ctx context.Context, j job) error {
	sha, err := s.git(ctx, j.dir, "rev-parse", "HEAD")
	if err != nil {
		return err
	}
	run, ok := s.runOf[j.repository+" "+j.file]
	if !ok {
		s.runID += 1001
		run = s.runID
		s.runOf[j.repository+" "+j.file] = run
	}
	s.jobID += 37
	rj, err := s.runner.Start(ctx, runnertest.Spec{
		Repository: j.repository, Workflow: j.workflow, WorkflowFile: j.file, Job: j.name, RunID: run, RunNumber: 7, SHA: sha,
		JobID: s.jobID,
	})
	if err != nil {
		return err
	}
	if err := printHook("job-started", rj.Started); err != nil {
		return err
	}
	actErr := s.act(ctx, j, rj)
	completed, orphans, err := rj.Complete(ctx)
	if err := errors.Join(actErr, err); err != nil {
		return err
	}
	if err := printHook("job-completed", completed); err != nil {
		return err
	}
	if len(orphans) > 0 {
		return fmt.Errorf("the runner had to kill orphans: %s", strings.Join(orphans, ", "))
	}
	summary, err := os.ReadFile(rj.Summary)
	if err != nil {
		return err
	}
	if len(bytes.TrimSpace(summary)) > 0 {
		fmt.Printf("  summary on the job's page:\n")
		io.Copy(indented("  | "), bytes.NewReader(summary))
	}
	return nil
}

func printHook(name string, r runnertest.Result) error {
	fmt.Printf("  hook %-13s %4.0f ms\n", name, float64(r.Took)/float64(time.Millisecond))
	io.Copy(indented("  | "), strings.NewReader(r.Stdout+r.Stderr))
	switch {
	case r.Code != 0:
		return fmt.Errorf("hook %s: exit code %d, which fails the job", name, r.Code)
	case r.Held:
		return fmt.Errorf("hook %s: something it started holds its output open, which costs each job five seconds", name)
	}
	return nil
}

// fromHooks are the variables that act sets otherwise or not at all. With them each
// step sees what the hooks saw.
var fromHooks = []string{
	"GITHUB_ACTOR", "GITHUB_ACTOR_ID", "GITHUB_TRIGGERING_ACTOR", "GITHUB_REPOSITORY_ID", "GITHUB_REPOSITORY_OWNER_ID",
	"GITHUB_RUN_ID", "GITHUB_RUN_NUMBER", "GITHUB_WORKFLOW_REF", "GITHUB_WORKFLOW_SHA",
	"RUNNER_NAME", "RUNNER_ENVIRONMENT", "RUNNER_TRACKING_ID",
}

// act runs the job's steps on this machine, in a copy of the repository. Nothing is
// fetched: the image of the runner is the machine, and the steps use no action.
func (s *stage) act(ctx context.Context, j job, rj *runnertest.Job) error {
	args := []string{"push", "--actor", "octocat", "--job", j.name, "--workflows", filepath.Join(".github", "workflows", j.file),
		"--platform", "ubuntu-latest=-self-hosted", "--pull=false", "--log-prefix-job-id",
		"--no-cache-server", // it would listen on an address that other machines reach
	}
	for _, pair := range rj.Context {
		name, _, _ := strings.Cut(pair, "=")
		for _, wanted := range fromHooks {
			if name == wanted {
				args = append(args, "--env", pair)
			}
		}
	}
	cmd := exec.CommandContext(ctx, s.options.act, args...)
	cmd.Dir = j.dir
	// Not the job's variables: act makes those itself.
	cmd.Env = append(append([]string(nil), s.runner.Env...), "XDG_CACHE_HOME="+filepath.Join(s.dir, "act"), "NO_COLOR=1")
	out := indented("  ")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("act: %w", err)
	}
	return nil
}

// tallyman runs the installed command.
func (s *stage) tallyman(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, s.install.Tallyman(), args...)
	cmd.Env = s.runner.Env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("tallyman %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

func (s *stage) report(ctx context.Context) error {
	out, err := s.tallyman(ctx, "report")
	fmt.Print(out)
	return err
}

func (s *stage) printPlaces() {
	places := []struct{ what, where string }{
		{"journal", s.install.Journal()},
		{"job contexts", filepath.Join(s.install.State(), "contexts")},
		{"configuration", s.install.Config()},
		{"agent's log", filepath.Join(s.install.State(), "agent.log")},
	}
	for _, p := range places {
		fmt.Printf("%-15s %s\n", p.what, p.where)
	}
	fmt.Printf("\nLook further with:\n  %s report --help\n  jq . %s\n", s.install.Tallyman(), filepath.Join(s.install.Journal(), "records.jsonl"))
}

// indent writes lines to standard output with something before each.
type indent struct {
	before string
	mu     sync.Mutex // guards rest; act's two streams share one writer
	rest   []byte
}

func indented(before string) *indent { return &indent{before: before} }

func (w *indent) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, p...)
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		fmt.Printf("%s%s\n", w.before, line)
		w.rest = rest
	}
}
