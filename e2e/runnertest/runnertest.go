// Package runnertest stands in for actions/runner in the end-to-end tests and in
// the demo: it does around a job what the runner's Worker does, as far as the hooks
// and a wrapped docker can tell the difference.
//
//   - Hooks run as `bash -e <path>` in the workspace, with standard input at its end,
//     and the runner waits at most five seconds for whoever keeps their output open
//     (ScriptHandler.cs, ProcessInvoker.cs).
//   - A hook's environment is the Worker's own with the github and runner contexts on
//     top; the variables of workflow, job and steps are not in it (JobHookProvider.cs).
//   - Steps get GITHUB_ACTION besides; the runner's own docker calls get no GITHUB_*
//     at all, only RUNNER_TRACKING_ID (DockerCommandManager.cs).
//   - Each job has a process named Runner.Worker, the parent of its hooks and steps,
//     which wrote the job's message to its log.
//   - When the job is over, every process that is new and has the job's
//     RUNNER_TRACKING_ID in its environment at exec is killed (JobExtension.cs).
//
// It does not model expressions, actions, contexts of a matrix or a job container;
// the demo runs act for that.
package runnertest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Runner is a self-hosted runner that takes one job after the other.
type Runner struct {
	// Name is the runner's name; on ARC also the name of the pod.
	Name string
	// Root is the folder the runner is installed in; it holds _work and _diag.
	Root string
	// Env is the Worker's own environment: the image's and the pod's variables.
	Env []string
	// HookStarted and HookCompleted are the paths of the hooks; "" runs none.
	HookStarted, HookCompleted string
	// User is the uid and gid that the runner runs as; 0 means the caller's.
	User uint32
}

// Spec is what the server tells a runner of a job.
type Spec struct {
	Repository   string // owner/name
	Workflow     string // the workflow's name
	WorkflowFile string // its file below .github/workflows
	Job          string // the job's key in that file
	RunID        int64
	RunNumber    int64
	SHA          string
	// JobID is the numeric id of the job, and DisplayName its name with the values of the
	// matrix; both stand in the Worker's log alone. No log is written where JobID is 0.
	JobID       int64
	DisplayName string
}

// Job is a job that runs on a Runner.
type Job struct {
	Spec
	TrackingID string   // RUNNER_TRACKING_ID
	Workspace  string   // GITHUB_WORKSPACE
	Summary    string   // the file that GITHUB_STEP_SUMMARY names
	Context    []string // the github and runner contexts as KEY=value, for a step's environment
	Started    Result   // of the job-started hook

	runner *Runner
	worker *worker         // nil where this process is the Worker
	before map[string]bool // processes that ran before the job, as pid_name
}

// Result is what a process of the job did.
type Result struct {
	Code           int // exit code; 128+n where signal n ended it, as a shell says
	Stdout, Stderr string
	Took           time.Duration
	// Held is true when something kept the output open after the process had ended, and the
	// runner gave up waiting for it after five seconds.
	Held bool
}

// Start prepares the folders of a job and runs the job-started hook. The error is
// of the stand-in itself; what the hook did is in the job's Started.
func (r *Runner) Start(ctx context.Context, spec Spec) (*Job, error) {
	id := make([]byte, 16)
	rand.Read(id)
	j := &Job{
		Spec:       spec,
		TrackingID: fmt.Sprintf("github_%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:]),
		runner:     r,
		before:     processes(),
	}
	owner, name, _ := strings.Cut(spec.Repository, "/")
	j.Workspace = filepath.Join(r.Root, "_work", name, name)
	temp := filepath.Join(r.Root, "_work", "_temp")
	commands := filepath.Join(temp, "_runner_file_commands")
	// TempDirectoryManager.cs wipes _temp before each job.
	if err := os.RemoveAll(temp); err != nil {
		return nil, fmt.Errorf("wipe %s: %w", temp, err)
	}
	for _, dir := range []string{j.Workspace, commands, filepath.Join(temp, "_github_workflow"), filepath.Join(r.Root, "_diag")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	j.Summary = filepath.Join(commands, "step_summary_"+strings.TrimPrefix(j.TrackingID, "github_"))
	event := filepath.Join(temp, "_github_workflow", "event.json")
	for path, content := range map[string]string{
		j.Summary: "", event: "{}",
		filepath.Join(commands, "set_env"): "", filepath.Join(commands, "add_path"): "",
		filepath.Join(commands, "set_output"): "", filepath.Join(commands, "save_state"): "",
	} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	if spec.JobID != 0 {
		if err := j.writeLog(time.Now()); err != nil {
			return nil, fmt.Errorf("write the Worker's log: %w", err)
		}
	}
	if r.User != 0 {
		err := filepath.WalkDir(r.Root, func(path string, _ os.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(path, int(r.User), int(r.User)))
		})
		if err != nil {
			return nil, fmt.Errorf("give %s to the runner's user: %w", r.Root, err)
		}
	}

	ref := "refs/heads/main"
	file := spec.Repository + "/.github/workflows/" + spec.WorkflowFile + "@" + ref
	sha := spec.SHA
	if sha == "" {
		sha = strings.Repeat("5ca1ab1e", 5)
	}
	number := spec.RunNumber
	if number == 0 {
		number = 1
	}
	j.Context = []string{
		"GITHUB_ACTOR=octocat", "GITHUB_ACTOR_ID=583231", "GITHUB_API_URL=https://api.github.com",
		"GITHUB_BASE_REF=", "GITHUB_EVENT_NAME=push", "GITHUB_EVENT_PATH=" + event,
		"GITHUB_GRAPHQL_URL=https://api.github.com/graphql", "GITHUB_HEAD_REF=", "GITHUB_JOB=" + spec.Job,
		"GITHUB_REF=" + ref, "GITHUB_REF_NAME=main", "GITHUB_REF_PROTECTED=false", "GITHUB_REF_TYPE=branch",
		"GITHUB_REPOSITORY=" + spec.Repository, "GITHUB_REPOSITORY_ID=" + number9(spec.Repository),
		"GITHUB_REPOSITORY_OWNER=" + owner, "GITHUB_REPOSITORY_OWNER_ID=" + number9(owner),
		"GITHUB_RETENTION_DAYS=90", "GITHUB_RUN_ATTEMPT=1", "GITHUB_RUN_ID=" + strconv.FormatInt(spec.RunID, 10),
		"GITHUB_RUN_NUMBER=" + strconv.FormatInt(number, 10), "GITHUB_SERVER_URL=https://github.com",
		"GITHUB_SHA=" + sha, "GITHUB_TRIGGERING_ACTOR=octocat", "GITHUB_WORKFLOW=" + spec.Workflow,
		"GITHUB_WORKFLOW_REF=" + file, "GITHUB_WORKFLOW_SHA=" + sha, "GITHUB_WORKSPACE=" + j.Workspace,
		"GITHUB_ENV=" + filepath.Join(commands, "set_env"), "GITHUB_PATH=" + filepath.Join(commands, "add_path"),
		"GITHUB_OUTPUT=" + filepath.Join(commands, "set_output"), "GITHUB_STATE=" + filepath.Join(commands, "save_state"),
		"GITHUB_STEP_SUMMARY=" + j.Summary,
		"RUNNER_OS=Linux", "RUNNER_ARCH=X64", "RUNNER_NAME=" + r.Name, "RUNNER_ENVIRONMENT=self-hosted",
		"RUNNER_TOOL_CACHE=" + filepath.Join(r.Root, "_work", "_tool"), "RUNNER_TEMP=" + temp,
		"RUNNER_WORKSPACE=" + filepath.Dir(j.Workspace),
		"RUNNER_TRACKING_ID=" + j.TrackingID, "GITHUB_ACTIONS=true", "CI=true",
	}
	var err error
	if !isWorker() {
		if j.worker, err = startWorker(r); err != nil {
			return nil, err
		}
	}
	j.Started, err = j.hook(ctx, r.HookStarted)
	return j, err
}

// Kill ends the runner's Worker and the running step with SIGKILL, as the end of a
// pod does: no job-completed hook runs, and no orphan is looked for. It may be called
// at any time, also after Complete.
func (j *Job) Kill() {
	if j.worker != nil {
		j.worker.kill()
	}
}

// number9 makes a stable number with nine digits of a name, where the server would
// have given one.
func number9(name string) string {
	n := uint32(2166136261)
	for _, b := range []byte(name) {
		n = (n ^ uint32(b)) * 16777619
	}
	return strconv.Itoa(100_000_000 + int(n%900_000_000))
}

// Complete runs the job-completed hook, then kills the job's orphans as the runner
// does, and returns what it killed as "pid name".
func (j *Job) Complete(ctx context.Context) (hook Result, orphans []string, err error) {
	// The github context is shared by all steps, so the last step's action is still in it.
	hook, err = j.hook(ctx, j.runner.HookCompleted, "GITHUB_ACTION=__run_9")
	if err != nil {
		return hook, nil, err
	}
	orphans = j.killOrphans()
	if j.worker != nil {
		j.worker.end()
	}
	return hook, orphans, nil
}

func (j *Job) hook(ctx context.Context, path string, more ...string) (Result, error) {
	if path == "" {
		return Result{}, nil
	}
	if _, err := os.Stat(path); err != nil {
		return Result{}, fmt.Errorf("the runner fails every job whose hook is missing: %w", err)
	}
	return j.run(ctx, slices.Concat(j.Context, more), "bash", "-e", path)
}

// Step runs a script as a run step does: `bash -e <file>` in the workspace. id is
// the step's id, or the name the runner makes up for it (__run, __run_2, ...). more
// is the step's env.
func (j *Job) Step(ctx context.Context, id, script string, more ...string) (Result, error) {
	file, err := os.CreateTemp(filepath.Join(j.runner.Root, "_work", "_temp"), "*.sh")
	if err != nil {
		return Result{}, err
	}
	defer os.Remove(file.Name())
	_, err = file.WriteString(script + "\n")
	if err := errors.Join(err, file.Chmod(0o644), file.Close()); err != nil {
		return Result{}, fmt.Errorf("write the script of step %s: %w", id, err)
	}
	return j.run(ctx, slices.Concat(j.Context, []string{"GITHUB_ACTION=" + id}, more), "bash", "-e", file.Name())
}

// Internal runs a command as the runner itself calls docker, for service containers
// and container actions.
func (j *Job) Internal(ctx context.Context, argv ...string) (Result, error) {
	return j.run(ctx, []string{"RUNNER_TRACKING_ID=" + j.TrackingID, "GITHUB_ACTIONS=true", "CI=true"}, argv...)
}

// Outside runs a command with the runner's own environment and no job, as the
// entrypoint's wait for the Docker daemon does.
func (r *Runner) Outside(ctx context.Context, argv ...string) (Result, error) {
	if err := os.MkdirAll(r.Root, 0o755); err != nil {
		return Result{}, err
	}
	return r.child(ctx, r.Root, r.Env, argv...)
}

func (j *Job) run(ctx context.Context, env []string, argv ...string) (Result, error) {
	env = slices.Concat(j.runner.Env, env)
	if j.worker == nil {
		return j.runner.child(ctx, j.Workspace, env, argv...)
	}
	return j.worker.run(ctx, j.Workspace, env, argv...)
}

// child runs a command as a child of this process.
func (r *Runner) child(ctx context.Context, dir string, env []string, argv ...string) (Result, error) {
	cmd := exec.CommandContext(ctx, lookup(argv[0], env), argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Dir, cmd.Env = dir, env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: r.credential()}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = drain
	began := time.Now()
	err := cmd.Run()
	result := Result{Stdout: stdout.String(), Stderr: stderr.String(), Took: time.Since(began), Held: errors.Is(err, exec.ErrWaitDelay)}
	if cmd.ProcessState == nil {
		return result, fmt.Errorf("run %s: %w", argv[0], err)
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if result.Code = status.ExitStatus(); status.Signaled() {
		result.Code = 128 + int(status.Signal())
	}
	return result, nil
}

func (r *Runner) credential() *syscall.Credential {
	if r.User == 0 {
		return nil
	}
	return &syscall.Credential{Uid: r.User, Gid: r.User}
}

// lookup finds a command in the PATH of env, not in ours.
func lookup(name string, env []string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for i := len(env) - 1; i >= 0; i-- {
		path, ok := strings.CutPrefix(env[i], "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(path) {
			if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
				return found
			}
		}
		break
	}
	return name
}

// processes are all processes that can be seen, as pid_name.
func processes() map[string]bool {
	found := map[string]bool{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if name, err := os.ReadFile(filepath.Join(dir, "comm")); err == nil {
			found[filepath.Base(dir)+"_"+strings.TrimSpace(string(name))] = true
		}
	}
	return found
}

func (j *Job) killOrphans() []string {
	var killed []string
	for key := range processes() {
		if j.before[key] {
			continue
		}
		pid, name, _ := strings.Cut(key, "_")
		environ, err := os.ReadFile(filepath.Join("/proc", pid, "environ"))
		if err != nil || !bytes.Contains(append([]byte{0}, environ...), []byte("\x00RUNNER_TRACKING_ID="+j.TrackingID+"\x00")) {
			continue
		}
		if n, err := strconv.Atoi(pid); err == nil && syscall.Kill(n, syscall.SIGKILL) == nil {
			killed = append(killed, pid+" "+name)
		}
	}
	return killed
}
