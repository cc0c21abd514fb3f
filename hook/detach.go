package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	opStarted   = "started"
	opCompleted = "completed"

	maxRequest = 4 << 20 // a context with every character escaped
	maxReply   = 2 * 6 * maxSummary

	// signalGrace is what a hook goes on for after a first signal.
	signalGrace = 1500 * time.Millisecond
)

// request is what the hook's process tells its worker. It holds nothing of the
// environment but what was read through the allow-list.
type request struct {
	Op        string        `json:"op"`
	At        time.Time     `json:"at"`       // when the hook was called
	Boot      int64         `json:"boot"`     // the same in nanoseconds since boot, which no clock step changes
	Deadline  time.Time     `json:"deadline"` // when it will have returned
	Context   Context       `json:"context"`  // the job's, not sealed yet
	ServerURL string        `json:"server_url,omitempty"`
	Runner    runnerProcess `json:"runner"`
	Roots     []string      `json:"roots,omitempty"`
	Off       string        `json:"off,omitempty"`    // why Tallyman is off
	Canary    bool          `json:"canary,omitempty"` // off because of the canary: for this runner, and not for others on its machine
}

// reply is what the worker answers.
type reply struct {
	Problem string `json:"problem,omitempty"`
	Summary string `json:"summary,omitempty"`
}

// detached lets a worker process do the request and waits for its reply until the
// deadline. A deadline that passes is no error: the worker goes on by itself, with
// nothing of ours in its hands. Only another process gives that guarantee: a thread
// that waits for a frozen disk keeps its own process from exiting.
//
// The worker is also the first half of the double fork that makes the agent an
// orphan: hook -> worker (own session) -> agent.
func (o *Options) detached(ctx context.Context, req request) (reply, error) {
	if len(o.Worker) == 0 {
		return o.inProcess(ctx, req)
	}
	pid, in, out, err := o.startWorker()
	if err != nil {
		// No more processes on this machine: at least the context can be sealed.
		o.logger().Warn("start the hook's worker", "error", err)
		return o.inProcess(ctx, req)
	}
	defer in.Close()
	defer out.Close()
	stop := context.AfterFunc(ctx, func() {
		if grace := time.Now().Add(signalGrace); grace.Before(req.Deadline) {
			_ = out.SetReadDeadline(grace)
		}
	})
	defer stop()
	// Pipes between Go programs are in the poller, so the deadlines hold without a
	// goroutine that could stay behind.
	write := req.Deadline
	if soon := time.Now().Add(100 * time.Millisecond); write.Before(soon) {
		// Starting the worker took all of the time. The pipe is empty and takes the request
		// at once; without it no context would be sealed.
		write = soon
	}
	_ = in.SetWriteDeadline(write)
	_ = out.SetReadDeadline(req.Deadline)
	err = json.NewEncoder(in).Encode(&req)
	if cerr := in.Close(); err == nil {
		err = cerr
	}
	var rep reply
	if err == nil {
		err = json.NewDecoder(io.LimitReader(out, maxReply)).Decode(&rep)
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		o.logger().Warn("the hook's worker goes on alone", "op", req.Op)
		return reply{}, nil
	case err != nil:
		return reply{}, fmt.Errorf("the hook's worker ended without an answer: %w", err)
	}
	reap(pid)
	return rep, nil
}

// reap collects the worker, which ends right after its reply, so that it does not
// become a zombie where process 1 of a container reaps none. It waits for a moment only.
func reap(pid int) {
	for range 25 {
		if got, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); got == pid || err != nil && err != syscall.EINTR {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// startWorker starts the worker and returns its process and what it reads from and
// writes to.
func (o *Options) startWorker() (pid int, in, out *os.File, err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	stdin, in, err := os.Pipe()
	if err != nil {
		return 0, nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	files = append(files, stdin)
	out, stdout, err := os.Pipe()
	if err != nil {
		in.Close()
		return 0, nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	files = append(files, stdout)
	cmd := detachedCommand(o.Worker, agentEnvironment(o.Environ))
	cmd.Stdin, cmd.Stdout = stdin, stdout
	if err := cmd.Start(); err != nil {
		in.Close()
		out.Close()
		return 0, nil, nil, fmt.Errorf("start %s: %w", o.Worker[0], err)
	}
	pid = cmd.Process.Pid
	return pid, in, out, cmd.Process.Release()
}

// inProcess does the request in this process, until the deadline.
func (o *Options) inProcess(ctx context.Context, req request) (reply, error) {
	ctx, cancel := context.WithDeadline(ctx, req.Deadline)
	defer cancel()
	return o.bounded(ctx, req), nil
}

// bounded does the request and returns when it is done or ctx ends. After the latter
// the goroutine may go on until the process exits, which the callers do at once: only
// a system call that hangs, or a SummaryMarkdown that ignores its context, keeps it.
func (o *Options) bounded(ctx context.Context, req request) reply {
	ch := make(chan reply, 1)
	go func() { ch <- o.do(ctx, req) }()
	select {
	case rep := <-ch:
		return rep
	case <-ctx.Done():
		return reply{Problem: "not done in time: " + req.Op}
	}
}

// detachedCommand prepares a process that shares nothing with this one: own session
// (the runner's shutdown signals the whole process group: run.sh), / as working
// directory, /dev/null as stdio, and the given environment.
func detachedCommand(argv, env []string) *exec.Cmd {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = env
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	closeOnExec()
	return cmd
}

// closeOnExec marks every descriptor above stderr: the hook may have inherited copies
// of the runner's pipe (exec 3>&1 in a script around it), and the runner waits five
// seconds for whoever holds one.
func closeOnExec() {
	if unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) == nil { // Linux 5.11
		return
	}
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// passed are the variables the agent gets, beside those with one of passedPrefixes.
var passed = map[string]bool{
	"PATH": true, "HOME": true, "TZ": true, "LANG": true,
	"POD_NAME": true, "POD_NAMESPACE": true, "POD_UID": true, "POD_IP": true, "NODE_NAME": true, "NODE_IP": true,
	"DOCKER_HOST": true, "DOCKER_TLS_VERIFY": true, "DOCKER_CERT_PATH": true, "DOCKER_API_VERSION": true,
	"GOOGLE_APPLICATION_CREDENTIALS": true, "GOOGLE_CLOUD_PROJECT": true, "GCE_METADATA_HOST": true,
	"PUBSUB_EMULATOR_HOST": true, "BIGQUERY_EMULATOR_HOST": true,
	"HTTPS_PROXY": true, "HTTP_PROXY": true, "NO_PROXY": true, "https_proxy": true, "http_proxy": true, "no_proxy": true,
	"SSL_CERT_FILE": true, "SSL_CERT_DIR": true,
	"GOMEMLIMIT": true, "GOGC": true, "GOMAXPROCS": true, "GOCOVERDIR": true,
}

var passedPrefixes = []string{"DD_", "TALLYMAN_"}

// agentEnvironment builds the environment of worker and agent. RUNNER_TRACKING_ID
// must not be in it: at the end of a job the runner sends SIGKILL to every process
// whose /proc/<pid>/environ, the environment at exec, holds the job's.
func agentEnvironment(environ []string) []string {
	var env []string
	for _, entry := range environ {
		name, _, ok := strings.Cut(entry, "=")
		if ok && passes(name) {
			env = append(env, entry)
		}
	}
	return env
}

func passes(name string) bool {
	if passed[name] {
		return true
	}
	for _, word := range []string{"TOKEN", "SECRET", "PASSW", "KEY", "CREDENTIAL", "AUTH"} {
		if strings.Contains(name, word) {
			return false // DD_API_KEY and the like: DogStatsD needs none
		}
	}
	for _, prefix := range passedPrefixes {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// launchAgent starts the agent, detached. Its parent is the worker, which ends.
func (o *Options) launchAgent() error {
	if len(o.Agent) == 0 {
		return nil
	}
	cmd := detachedCommand(o.Agent, agentEnvironment(o.Environ))
	if err := cmd.Start(); err != nil { // nil stdio is /dev/null
		return fmt.Errorf("start the agent: %w", err)
	}
	return cmd.Process.Release()
}

// restoreOOMScore gives this process, and so the agent, the runner's own
// oom_score_adj back: the runner raised the hook's to 500, which makes it the first
// victim. Lowering is permitted down to the value the process began with (proc_oom_score_adj(5)).
func restoreOOMScore(want *int) {
	have := oomScoreAdj(os.Getpid())
	if want == nil || have == nil || *want >= *have {
		return
	}
	// Where it is not permitted the agent stays what it is.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(*want)), 0)
}
