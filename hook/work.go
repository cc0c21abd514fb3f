package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// workerLife ends a worker whose hook is gone long since.
	workerLife = 10 * time.Second
	// agentTimeout bounds one exchange with a running agent at a job's start.
	agentTimeout = 300 * time.Millisecond
	// agentStart is what job-completed waits for an agent that it had to start.
	agentStart = time.Second
	// agentListens is what job-started waits for the agent that it has started.
	agentListens = 150 * time.Millisecond
	// lateAfter is when a worker begins to doubt that its job still runs. Before that, a
	// context that seems to have begun later shows a clock that was set back.
	lateAfter = 2 * time.Second
	// summaryShare is the part of job-completed's time kept for the summary.
	summaryShare = 4
)

// Work does what a hook asks for on in, and answers on out. It is the whole of the
// hidden command that Options.Worker names; it runs detached, with the same options
// as the hook, and its caller exits 0 after it.
func Work(ctx context.Context, in io.Reader, out io.Writer, o Options) error {
	// Files of this process and of the agent are the runner user's alone.
	syscall.Umask(0o077)
	var req request
	if err := json.NewDecoder(io.LimitReader(in, maxRequest)).Decode(&req); err != nil {
		return fmt.Errorf("read the hook's request: %w", err)
	}
	restoreOOMScore(req.Runner.OOM)
	ctx, cancel := context.WithTimeout(ctx, max(workerLife, time.Until(req.Deadline)))
	defer cancel()
	rep := o.bounded(ctx, req)
	if rep.Problem != "" {
		o.logger().Warn("hook", "op", req.Op, "problem", rep.Problem)
	}
	return json.NewEncoder(out).Encode(rep)
}

// do does one request. It never panics.
func (o *Options) do(ctx context.Context, req request) (rep reply) {
	var err error
	defer func() {
		if p := recover(); p != nil {
			err = errors.Join(err, fmt.Errorf("internal error: %v", p))
		}
		if err != nil {
			rep.Problem = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
	}()
	switch {
	case req.Op == opStarted && req.Off != "":
		err = o.workOff(ctx, req)
	case req.Op == opStarted:
		err = o.workStarted(ctx, req)
	case req.Op == opCompleted:
		rep.Summary, err = o.workCompleted(ctx, req)
	default:
		err = fmt.Errorf("unknown request %q", req.Op)
	}
	return rep
}

// workOff leaves nothing of an earlier job behind: its context must not go on while
// nobody accounts for the jobs after it.
func (o *Options) workOff(ctx context.Context, req request) error {
	var errs []error
	if !req.Canary {
		errs = append(errs, o.writeOffMarker(req.Off))
	}
	closed, err := o.Store().Supersede(req.Context)
	errs = append(errs, err)
	if req.Canary && !o.anotherRuns() {
		errs = append(errs, o.writeOffMarker(req.Off))
	}
	for i := range closed {
		err := o.tell(ctx, func(ctx context.Context, a Agent) error {
			return a.JobEnd(ctx, closed[i].Key, Superseded)
		})
		if errors.Is(err, errNoAgent) {
			break
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// anotherRuns tells whether a job of another runner of this machine is accounted for
// now. The marker is one for all of them: a runner that the canary leaves out must not
// end the account of one that it picked.
func (o *Options) anotherRuns() bool {
	all, _ := o.Store().List() // good in spite of an error, which tells of files passed over
	return slices.ContainsFunc(all, func(c Context) bool { return c.Open() && c.RunnerPID > 0 && !c.RunnerGone() })
}

// workStarted seals the job and has it announced to a running agent, or starts one,
// which finds the sealed context by itself.
func (o *Options) workStarted(ctx context.Context, req request) error {
	errs := []error{MakeRunDir(o.RunDir), o.removeOffMarker()}
	c := req.Context
	if err := enrich(ctx, &c.CI, req.Roots, req.Runner, req.ServerURL); err != nil {
		o.logger().Info("job id and name unknown", "error", err)
	}
	store := o.Store()
	if sinceBoot()-req.Boot > int64(lateAfter) {
		o.closeLate(store, &c)
	}
	c, err := store.Seal(c)
	errs = append(errs, err)
	if !c.Open() {
		return errors.Join(errs...)
	}
	err = o.tell(ctx, func(ctx context.Context, a Agent) error { return a.JobStart(ctx, c) })
	if errors.Is(err, errNoAgent) {
		if err = o.launchAgent(); err == nil && o.Connect != nil && len(o.Agent) > 0 {
			// The job's first docker call may come at once. An agent that does not
			// listen yet is no error: that call's record waits in the spool, and has no
			// exit code if it ends before the agent comes.
			if a, err := o.await(ctx, agentListens); err == nil {
				a.Close()
			}
		}
	}
	errs = append(errs, err, o.tellChanges(ctx, store, c))
	return errors.Join(errs...)
}

// tellChanges checks the pinned files, keeps in the context what is wrong with them,
// and tells the agent. It comes last, and may outlive the hook: reading twenty
// megabytes takes milliseconds, or on a busy machine more than a job may wait.
func (o *Options) tellChanges(ctx context.Context, store Store, c Context) error {
	c.Problems = CheckPins(o.Pins)
	if len(c.Problems) == 0 {
		return nil
	}
	errs := []error{errors.New(strings.Join(c.Problems, "; ")), store.note(c)}
	if o.Connect != nil {
		// An agent that comes later reads it from the context.
		if a, err := o.await(ctx, agentStart); err == nil {
			errs = append(errs, a.JobStart(ctx, c))
			a.Close()
		}
	}
	return errors.Join(errs...)
}

// closeLate ends a context that a disk held up until its job was over: the next job
// of the runner has begun, or the runner is gone. Sealed open now, it would close the
// next job's.
func (o *Options) closeLate(store Store, c *Context) {
	all, err := store.List()
	if err != nil {
		o.logger().Warn("job contexts", "error", err)
	}
	if next := all.after(c); next != nil {
		c.Ended, c.Outcome = next.Started, Superseded
	} else if c.RunnerGone() {
		c.Ended, c.Outcome = o.now(), Abandoned
	}
}

// errNoAgent means that nobody answers on the agent's socket.
var errNoAgent = errors.New("no agent")

// tell has one bounded exchange with the running agent.
func (o *Options) tell(ctx context.Context, say func(context.Context, Agent) error) error {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	a, err := o.connect(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	if err := say(ctx, a); err != nil {
		return fmt.Errorf("tell the agent: %w", err)
	}
	return nil
}

func (o *Options) connect(ctx context.Context) (Agent, error) {
	if o.Connect == nil {
		return nil, errNoAgent
	}
	a, err := o.Connect(ctx, o.socket())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAgent, err)
	}
	return a, nil
}

// workCompleted ends the job's context, has everything flushed, and returns the
// summary. The context ends first: even a hung agent must not lend it to the next job.
func (o *Options) workCompleted(ctx context.Context, req request) (summary string, err error) {
	budget := time.Until(req.Deadline)
	ctx, cancel := context.WithTimeout(ctx, budget-budget/20) // the reply must be in time, too
	defer cancel()
	store := o.Store()
	all, err := store.List()
	if err != nil {
		o.logger().Warn("job contexts", "error", err)
	}
	var errs []error
	c := all.Of(&req.Context)
	switch {
	case c == nil:
		// Never sealed (switched on during the job, a full disk). Its records carry
		// the caller's own claims, and the summary can find them by those.
		c = &req.Context
		c.Key = c.baseKey()
	case c.Open():
		at := endOf(c, req)
		errs = append(errs, store.End(c.Key, Completed, at))
		c.Ended, c.Outcome = at, Completed
	}
	fctx, stop := context.WithTimeout(ctx, budget-budget/summaryShare)
	defer stop()
	errs = append(errs, o.endAndFlush(fctx, c, req.Off == ""))
	if req.Off == "" {
		summary, err = o.summary(ctx, c)
		errs = append(errs, err)
	}
	return summary, errors.Join(errs...)
}

// endOf is when the job that c began ended, by the clock of its start: where the clock
// was set back meanwhile, the boot clock tells how long it took.
func endOf(c *Context, req request) time.Time {
	if !req.At.Before(c.Started) {
		return req.At
	}
	if took := req.Boot - c.Boot; c.Boot > 0 && took > 0 && c.Host.BootID == req.Context.Host.BootID {
		return c.Started.Add(time.Duration(took))
	}
	return c.Started
}

// endAndFlush tells the agent of the end and waits for its flush. An agent that died
// during the job is started once more where start allows it: the shim's append files
// are waiting.
func (o *Options) endAndFlush(ctx context.Context, c *Context, start bool) error {
	a, err := o.connect(ctx)
	if err != nil && start && o.Connect != nil && len(o.Agent) > 0 {
		if err := o.launchAgent(); err != nil {
			return err
		}
		a, err = o.await(ctx, agentStart)
	}
	if err != nil {
		if !start || o.Connect == nil {
			return nil // nothing to flush
		}
		return fmt.Errorf("flush the agent: %w", err)
	}
	defer a.Close()
	if err := a.JobEnd(ctx, c.Key, Completed); err != nil {
		return fmt.Errorf("tell the agent: %w", err)
	}
	if err := a.Flush(ctx); err != nil {
		return fmt.Errorf("flush the agent: %w", err)
	}
	return nil
}

// await connects to an agent that is starting.
func (o *Options) await(ctx context.Context, longest time.Duration) (Agent, error) {
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	var why error
	for {
		a, err := o.connect(ctx)
		if err == nil {
			return a, nil
		}
		if why == nil || ctx.Err() == nil {
			why = err // a later one only tells of the time
		}
		select {
		case <-ctx.Done():
			return nil, why
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (o *Options) summary(ctx context.Context, c *Context) (string, error) {
	if o.Summary == SummaryOff || o.SummaryMarkdown == nil {
		return "", nil
	}
	text, err := o.SummaryMarkdown(ctx, *c)
	if err != nil {
		return "", fmt.Errorf("summarise the job: %w", err)
	}
	if text == "" && o.Summary == SummaryAlways {
		text = noDocker
	}
	return shorten(text, maxSummary), nil
}
