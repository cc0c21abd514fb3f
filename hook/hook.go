// Package hook is what a GitHub Actions runner calls before and after each job.
//
// JobStarted seals the job's context: it reads the job's identity from an
// allow-list of the runner's variables (and from the runner's own Worker log),
// writes it to the Store, and starts the agent or tells a running one. JobCompleted
// asks the agent to flush, ends the context and appends a short summary to the job's
// page. Later, the agent finds the context of a record with Contexts.Find.
//
// What the package promises, because a runner fails the job when a hook fails
// (actions/runner ADR 1751) and sets no time limit of its own:
//
//   - It never fails a job: every error ends in one plain line, every panic is
//     recovered, and the callers exit 0.
//   - It is bounded: JobStarted returns within Options.StartedTimeout, JobCompleted
//     within Options.CompletedTimeout, even when a disk is frozen. All work that can
//     block is done by a detached process (Work) that the hook waits for so long and
//     no longer; an abandoned worker goes on and ends by itself.
//   - It leaves nothing behind that the runner could wait for or kill: worker and
//     agent are started in their own session, without the hook's stdio, without any
//     inherited descriptor, and with an environment built from an allow-list
//     (RUNNER_TRACKING_ID is not on it: the runner kills by it).
//   - It never writes to the job's environment: GITHUB_ENV and GITHUB_PATH are not
//     even read.
package hook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Defaults of Options.
const (
	// DefaultStartedTimeout leaves 100 ms of the promised 500 ms for the start and
	// the end of the hook's own process.
	DefaultStartedTimeout = 400 * time.Millisecond
	// DefaultCompletedTimeout is what a job's end may wait for the last records.
	DefaultCompletedTimeout = 3 * time.Second
)

// The values of Options.Summary.
const (
	SummaryOff    = "off"    // no summary
	SummaryAuto   = "auto"   // a summary when the job used docker
	SummaryAlways = "always" // a summary for every job
)

// Options is what a hook needs to know. They come from root-owned configuration
// and from the runner's own environment, never from the job. The zero value is
// switched off (Enabled is false, Canary is 0).
type Options struct {
	// RunDir holds the agent's socket and the marker "off"; StateDir holds contexts/.
	RunDir, StateDir string
	// Enabled is the configuration's switch.
	Enabled bool
	// Canary is the percentage of runners, by hash of their name, on which Tallyman is on: 0 to 100.
	Canary float64
	// OffFile switches Tallyman off when it exists and root owns it; "" means no such file.
	OffFile string
	// Summary is SummaryOff, SummaryAuto or SummaryAlways; anything else means SummaryAuto.
	Summary string
	// RunnerLabels are the labels to put on the runner of each record.
	RunnerLabels []string
	// RunnerRoot is the folder the runner is installed in, where it cannot be seen from the process tree or the environment.
	RunnerRoot string
	// Version is the version of Tallyman, kept in the context.
	Version string
	// Pins name files whose SHA-256 and ownership are checked when a job starts. What is
	// wrong is said on Out and in Context.Problems, and stops nothing.
	Pins []Pin

	// Environ is the environment of the hook, as from os.Environ.
	Environ []string
	// Worker is the command line that calls Work with the same options, with standard input and output
	// passed on: {"/proc/self/exe", "hook", "work"}. Without one the work is done in the hook's own process.
	Worker []string
	// Agent is the command line of the agent; empty starts none.
	Agent []string
	// Connect connects to a running agent; nil means there is none to talk to.
	Connect func(ctx context.Context, socket string) (Agent, error)
	// SummaryMarkdown describes the job of a context in a few lines of Markdown, or returns "" when it did not use docker. Nil means no summary.
	SummaryMarkdown func(ctx context.Context, c Context) (string, error)

	// StartedTimeout and CompletedTimeout bound the hooks; 0 means the defaults.
	StartedTimeout, CompletedTimeout time.Duration
	// Out takes at most one line, which begins with "tallyman: "; nil discards it. The runner reads
	// a hook's output for workflow commands, so nothing of the job's stands at its start.
	Out io.Writer
	// Logger takes details; nil discards them.
	Logger *slog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Agent is the part of a running agent that the hooks talk to. Each call honours
// its context's deadline.
type Agent interface {
	// JobStart says that c is sealed and its job begins now. c is passed whole,
	// because it may not have reached a full disk.
	JobStart(ctx context.Context, c Context) error
	// JobEnd says that the context with this key was closed with this outcome.
	JobEnd(ctx context.Context, key, outcome string) error
	// Flush returns when everything received so far is journalled and the sinks have had their chance.
	Flush(ctx context.Context) error
	// Close closes the connection, not the agent.
	Close() error
}

// Store returns the store of contexts in the state directory.
func (o *Options) Store() Store { return Store{Dir: filepath.Join(o.StateDir, "contexts")} }

func (o *Options) socket() string { return filepath.Join(o.RunDir, "agent.sock") }

func (o *Options) now() time.Time {
	if o.Now != nil {
		return o.Now()
	}
	return time.Now()
}

func (o *Options) logger() *slog.Logger {
	if o.Logger != nil {
		return o.Logger
	}
	return slog.New(slog.DiscardHandler)
}

// JobStarted is the hook that runs before the first step of a job, and before any
// docker call the runner makes for it. It returns within o.StartedTimeout. A
// returned error has been said on o.Out already and is of no concern to the job: the
// caller exits 0.
func JobStarted(ctx context.Context, o Options) error {
	return o.run(ctx, opStarted, orDefault(o.StartedTimeout, DefaultStartedTimeout))
}

// JobCompleted is the hook that runs after the last step of a job. It returns within
// o.CompletedTimeout, or 1.5 s after ctx ended: the runner follows a first signal
// with SIGTERM 7.5 s later (actions/runner ProcessInvoker.cs). For the returned
// error see JobStarted.
func JobCompleted(ctx context.Context, o Options) error {
	return o.run(ctx, opCompleted, orDefault(o.CompletedTimeout, DefaultCompletedTimeout))
}

// run gathers what only the hook's own process can see (environment, ancestors),
// hands it to the worker, and writes what comes back.
func (o *Options) run(ctx context.Context, op string, budget time.Duration) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
		}
		if err != nil {
			o.say(err)
		}
	}()
	deadline := time.Now().Add(budget)
	env := readEnvironment(o.Environ)
	runner := findRunner()
	c := Context{
		CI:          FromEnvironment(o.Environ),
		Host:        HostFromEnvironment(o.Environ),
		Workspace:   env.text("GITHUB_WORKSPACE"),
		Started:     o.now(),
		RunnerPID:   runner.PID,
		RunnerStart: runner.Start,
		Boot:        sinceBoot(),
		Version:     o.Version,
	}
	c.CI.Runner = withLabels(c.CI.Runner, o.RunnerLabels)
	off, canary := o.offReason(env)
	req := request{
		Op:        op,
		At:        c.Started,
		Boot:      sinceBoot(),
		Deadline:  deadline,
		Context:   c,
		ServerURL: env.text("GITHUB_SERVER_URL"),
		Runner:    runner,
		Roots:     runnerRoots(runner.Root, env, o.RunnerRoot),
		Off:       off,
		Canary:    canary,
	}

	rep, err := o.detached(ctx, req)
	if err != nil {
		return err
	}
	err = errorOf(rep.Problem)
	if op == opCompleted && rep.Summary != "" {
		// Written here and not by the worker: a worker that comes too late must not
		// write into a file that the runner has begun to upload.
		err = errors.Join(err, appendSummary(env.get("GITHUB_STEP_SUMMARY"), rep.Summary))
	}
	return err
}

// say writes the one line a hook may write.
func (o *Options) say(err error) {
	o.logger().Warn("hook", "error", err)
	if o.Out == nil {
		return
	}
	text := record.Clean(strings.ReplaceAll(err.Error(), "\n", "; "), 400)
	// Nobody reads the line of a hook whose runner is gone.
	_, _ = fmt.Fprintf(o.Out, "tallyman: %s (the job is not affected; tallyman doctor says more)\n", text)
}

func errorOf(text string) error {
	if text == "" {
		return nil
	}
	return errors.New(text)
}

func orDefault(d, def time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return def
}
