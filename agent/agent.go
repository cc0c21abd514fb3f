// Package agent is the process that keeps the account on one runner. It receives
// the shim's records from a socket and from append files, and the Docker daemon's
// events; it stamps each with the job's sealed context, appends it to the journal,
// counts it for DogStatsD, and lets every sink read the journal at its own pace.
//
//	socket (server.go) ─┐
//	spool  (spool.go)  ─┼▶ stamp (stamp.go) ▶ journal and metrics (intake.go) ▶ sinks
//	events             ─┘        end of each command (ends.go) ─┘
//
// What it promises: a record that was acknowledged is in the journal; a record comes
// twice at most with the same id; whatever is missing is a record of kind loss; and
// nothing that a sink, a daemon or a job does makes the docker command of a job wait.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/metrics"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// ErrRunning is returned by Run where another agent has the state folder.
var ErrRunning = errors.New("another agent is running")

// ErrOff is returned by Run where Tallyman is switched off.
var ErrOff = errors.New("switched off")

// Options say what the agent does. Config and Store must be set.
type Options struct {
	Config  config.Config
	Store   hook.Store
	Host    record.Host // names this machine in each record
	Version string
	// NoEvents leaves the Docker daemon alone.
	NoEvents bool
	// OffFile is the kill switch: where it exists and is root's, no agent runs, and one that
	// runs ends within seconds. "" is none.
	OffFile string
	// Schemes are kinds of sinks beside those that package sinks has built in.
	Schemes []sinks.Scheme
	// ExitOnJobEnd ends the agent after the job that it was started for: the hooks
	// start one agent for each job.
	ExitOnJobEnd bool
	// Problems are what the start passed over; Status tells them with the agent's own.
	Problems []string
	// FlushTimeout bounds the flush at the end; default 5 s.
	FlushTimeout time.Duration
	Logger       *slog.Logger
	Now          func() time.Time // default time.Now
}

// Agent is one running agent.
type Agent struct {
	o       Options
	log     *slog.Logger
	now     func() time.Time
	started time.Time

	journal  *journal.Journal
	contexts contexts
	intake   *intake
	spool    *spool
	server   *server
	events   *events.Streamer // nil with NoEvents
	metrics  *metrics.Emitter
	pumps    []*sinks.Pump
	problems []string // what could not be opened and was left out

	// kernelCounters is the kernel's table of semaphores, see takeKernelCounters. Tests
	// have none, because shims of the whole machine count in it.
	kernelCounters string

	opened  atomic.Bool      // Status may look at all of it
	sampled map[string]int64 // counters as they were sent to DogStatsD last; used by wait alone

	mu       sync.Mutex
	jobEnded time.Time // when the job of ExitOnJobEnd ended; zero before
}

const (
	// syncEvery bounds what a power cut costs: records are durable after this time.
	syncEvery = 200 * time.Millisecond
	// lingerAfterJob is how long the agent stays after its job, for the hook's flush
	// and for the daemon's last events.
	lingerAfterJob = 2 * time.Second
	// watchRunner is how often the agent looks whether the runner's process still
	// lives; the job-completed hook does not run when the runner is killed
	// (actions/runner#2595).
	watchRunner = 2 * time.Second
	// gaugesEvery is DogStatsD's own interval of aggregation.
	gaugesEvery = 10 * time.Second
)

// New makes an agent. Nothing is opened before Run.
func New(o Options) *Agent {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.FlushTimeout == 0 {
		o.FlushTimeout = 5 * time.Second
	}
	return &Agent{kernelCounters: "/proc/sysvipc/sem", sampled: map[string]int64{}, problems: slices.Clone(o.Problems), o: o, log: o.Logger, now: o.Now, started: o.Now()}
}

// Run receives until ctx ends, or, with ExitOnJobEnd, until the job's end; then it
// flushes for at most FlushTimeout. It returns ErrRunning where another agent runs, and
// ErrOff where it may not begin.
func (a *Agent) Run(ctx context.Context) error {
	switch {
	case !a.o.Config.Enabled:
		return fmt.Errorf("%w by enabled = false in the configuration", ErrOff)
	case hook.OffFile(a.o.OffFile):
		return fmt.Errorf("%w by %s", ErrOff, a.o.OffFile)
	}
	if err := a.open(ctx); err != nil {
		over, end := context.WithCancel(ctx)
		end()
		for _, p := range a.pumps {
			err = errors.Join(err, p.Run(over)) // which closes its sink
		}
		return errors.Join(err, a.close())
	}
	a.opened.Store(true)
	a.intake.begin()
	// Receivers stop before what they feed: first sources, then sinks, then journal.
	sources, stopSources := context.WithCancel(context.Background())
	sinksCtx, stopSinks := context.WithCancel(context.Background())
	var sourcesDone, sinksDone sync.WaitGroup
	sourcesDone.Go(func() { a.server.run(sources) })
	sourcesDone.Go(func() { a.spool.run(sources) })
	sourcesDone.Go(func() { a.intake.run(sources) })
	if a.events != nil {
		sourcesDone.Go(func() {
			if err := a.events.Run(sources, a.takeEvents); err != nil {
				a.log.Warn("events were left behind", "error", err)
			}
		})
	}
	for _, p := range a.pumps {
		sinksDone.Go(func() {
			if err := p.Run(sinksCtx); err != nil {
				a.log.Warn("a sink ended", "sink", p.Status().Name, "error", err)
			}
		})
	}
	a.log.Info("agent started", "version", a.o.Version, "socket", a.o.Config.Socket(), "journal", a.o.Config.Journal(), "sinks", len(a.pumps))
	a.announceActive()
	a.wait(ctx)

	flush, cancel := context.WithTimeout(context.Background(), a.o.FlushTimeout)
	defer cancel()
	err := a.gather(flush)
	a.endWithJob()
	stopSources()
	sourcesDone.Wait()
	// Once, and last: a dead sink takes all of the time, and the others must not be
	// left with what the sources brought at their end.
	err = errors.Join(err, a.flushSinks(flush))
	stopSinks()
	sinksDone.Wait()
	a.gauges() // of a job shorter than gaugesEvery too
	err = errors.Join(err, a.close())
	a.log.Info("agent ended")
	return err
}

// wait returns when the agent shall end.
func (a *Agent) wait(ctx context.Context) {
	sync := time.NewTicker(syncEvery)
	defer sync.Stop()
	runner := time.NewTicker(watchRunner)
	defer runner.Stop()
	gauges := time.NewTicker(gaugesEvery)
	defer gauges.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-sync.C:
			if err := a.journal.Sync(); err != nil {
				a.intake.trouble("sync the journal", err)
			}
		case <-runner.C:
			a.endAbandoned()
			if hook.OffFile(a.o.OffFile) {
				a.log.Info("switched off", "by", a.o.OffFile)
				return
			}
		case <-gauges.C:
			a.gauges()
		}
		a.mu.Lock()
		over := !a.jobEnded.IsZero() && a.now().Sub(a.jobEnded) > lingerAfterJob
		a.mu.Unlock()
		if over {
			return
		}
	}
}

// open opens everything, and on an error leaves what is open to close.
func (a *Agent) open(ctx context.Context) error {
	cfg := &a.o.Config
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return fmt.Errorf("make the state folder: %w (create it, owned by the user the agent runs as, or set state_dir in the configuration)", err)
	}
	if err := hook.MakeRunDir(cfg.RunDir); err != nil {
		return err
	}
	a.contexts.store = a.o.Store
	a.intake = newIntake(a)
	j, err := journal.Open(cfg.Journal(), journal.Options{
		MaxSegmentBytes: cfg.SegmentMaxBytes, MaxSegmentAge: cfg.SegmentMaxAge, MaxBytes: cfg.JournalMaxBytes,
		OnLoss: a.intake.loss, Now: a.o.Now, Logger: a.log,
	})
	if errors.Is(err, journal.ErrLocked) {
		return fmt.Errorf("%w on %s", ErrRunning, cfg.StateDir)
	}
	if err != nil {
		return fmt.Errorf("open the journal: %w", err)
	}
	a.journal = j
	a.intake.remember(j)
	if a.metrics, err = a.openMetrics(); err != nil {
		return fmt.Errorf("set up DogStatsD: %w", err)
	}
	for _, url := range cfg.Sinks {
		// One sink that cannot be opened must not cost the account of all others: the
		// journal keeps the records, and status and log say what is wrong.
		if err := a.openSink(ctx, url); err != nil {
			a.problems = append(a.problems, err.Error())
			a.log.Error("a sink is left out", "error", err)
		}
	}
	a.spool = openSpool(a)
	if a.server, err = listen(a); err != nil {
		return err
	}
	if !a.o.NoEvents {
		since := time.Time{}
		if c := a.contexts.active(); c != nil {
			since = c.Started
		}
		a.events = events.New(events.Options{
			Host: cfg.DockerHost, StatePath: filepath.Join(cfg.StateDir, "events.json"), Since: since,
			Labels: cfg.EventLabels, LockDir: cfg.RunDir, Logger: a.log, Now: a.o.Now,
		})
	}
	return nil
}

// openMetrics finds DogStatsD. A mistyped address or tag costs the metrics and not the
// account: status, doctor and log say what is wrong.
func (a *Agent) openMetrics() (*metrics.Emitter, error) {
	o := metrics.Options{
		Addr: a.o.Config.Statsd, EventTags: a.o.Config.StatsdTags, Tools: slices.Collect(maps.Keys(a.o.Config.Real)), Logger: a.log, Now: a.o.Now,
	}
	e, err := metrics.New(o)
	if err == nil {
		return e, nil
	}
	a.problems = append(a.problems, "no metrics are sent: "+err.Error()+" (statsd and statsd_tags in the configuration)")
	a.log.Error("no metrics are sent", "error", err)
	return metrics.New(metrics.Options{Addr: "off", Logger: a.log, Now: a.o.Now})
}

func (a *Agent) openSink(ctx context.Context, url string) error {
	target, err := sinks.Parse(url, a.o.Schemes...)
	if err != nil {
		return err
	}
	if target.URL.Scheme == "stdout" && nowhere(unix.Stdout) {
		return errors.New("sink stdout: the agent's standard output is /dev/null, as a hook starts it: run the agent as the container's main process or in a sidecar, or name another sink")
	}
	sink, err := target.Open(ctx)
	if err != nil {
		return err
	}
	p, err := target.NewPump(a.journal, sink, a.o.Config.Journal(), a.intake.loss, a.log)
	if err != nil {
		return errors.Join(err, sink.Close(ctx))
	}
	a.pumps = append(a.pumps, p)
	return nil
}

// nowhere says that fd is /dev/null (null(4)), which takes everything: a sink would call
// delivered what nobody gets.
func nowhere(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

func (a *Agent) close() error {
	var errs []error
	if a.server != nil {
		errs = append(errs, a.server.close())
	}
	if a.spool != nil {
		errs = append(errs, a.spool.close())
	}
	if a.metrics != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		errs = append(errs, a.metrics.Close(ctx))
	}
	if a.journal != nil {
		errs = append(errs, a.journal.Close())
	}
	return errors.Join(errs...)
}

// Flush waits until everything that was received is in the journal, durable, and
// offered to the sinks, or until ctx ends.
func (a *Agent) Flush(ctx context.Context) error {
	return errors.Join(a.gather(ctx), a.flushSinks(ctx))
}

// gather waits until everything that was received is in the journal, durable.
func (a *Agent) gather(ctx context.Context) error {
	a.settleEvents(ctx)
	a.spool.scan()
	a.intake.retry()
	return a.journal.Sync()
}

// flushSinks flushes all sinks at the same time: a dead one takes until ctx ends, and
// the others must not wait for it. The log says of each sink what is left and why; the
// error says it of all in few words, because the hook has one line for it.
func (a *Agent) flushSinks(ctx context.Context) error {
	results := make([]error, len(a.pumps))
	var flushes sync.WaitGroup
	for i, p := range a.pumps {
		flushes.Go(func() { results[i] = p.Flush(ctx) })
	}
	flushes.Wait()
	var errs []error
	var left []string
	for _, err := range results {
		var l *sinks.LeftError
		if !errors.As(err, &l) {
			errs = append(errs, err)
			continue
		}
		a.log.Warn("a sink lacks records at the end of a flush; they stay in the journal", "sink", l.Sink, "left", l.Records, "why", l.Err, "last_error", l.LastError)
		left = append(left, fmt.Sprintf("%d records for %s", l.Records, l.Sink))
	}
	if left != nil {
		errs = append(errs, fmt.Errorf("not delivered in time: %s; they stay in the journal", strings.Join(left, ", ")))
	}
	return errors.Join(errs...)
}

// settleEvents waits until the daemon's stream has been quiet for a moment: the
// event of a command that has just ended comes a few milliseconds after it.
func (a *Agent) settleEvents(ctx context.Context) {
	if a.events == nil || !a.events.Status().Connected {
		return
	}
	const quiet, longest = 100 * time.Millisecond, 500 * time.Millisecond
	last, since := a.events.Status(), time.Now()
	for start := since; time.Since(since) < quiet && time.Since(start) < longest; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
		if s := a.events.Status(); s.Events != last.Events || s.Queued > 0 {
			last, since = s, time.Now()
		}
	}
}

// takeEvents stamps and journals a batch of the daemon's events. An error makes the
// streamer keep the batch and try again.
func (a *Agent) takeEvents(batch []*record.Record) error {
	arrivals := make([]arrival, len(batch))
	for i, r := range batch {
		arrivals[i] = arrival{r: r, share: a.stampByTime(r), limiter: a.intake.events}
		if r.Kind != record.KindEvent {
			arrivals[i].share = "" // losses of the stream
		}
	}
	return a.intake.take(arrivals)
}

// announceActive writes the start of a job whose context was sealed before the agent
// ran, and the end of those that nobody could tell it of.
func (a *Agent) announceActive() {
	a.endAbandoned()
	if c := a.contexts.active(); c != nil {
		a.jobStart(*c)
	}
}

// endAbandoned closes the contexts of jobs whose runner process is gone.
func (a *Agent) endAbandoned() {
	for _, c := range a.contexts.all() {
		if c.Open() && c.RunnerGone() {
			a.closeJob(c, hook.Abandoned)
		}
	}
}

// endWithJob closes the jobs that run while an agent of the hooks is asked to stop: the
// pod or the machine is going down, and no job-completed hook may come.
func (a *Agent) endWithJob() {
	a.endAbandoned()
	for _, c := range a.contexts.all() {
		if c.Open() && a.o.ExitOnJobEnd {
			a.closeJob(c, hook.Shutdown)
		}
	}
}

func (a *Agent) closeJob(c hook.Context, outcome string) {
	if err := a.o.Store.End(c.Key, outcome, a.now()); err != nil {
		a.log.Warn("cannot close the context of a job", "job", c.Key, "outcome", outcome, "error", err)
	}
	a.jobEnd(c, outcome)
}

// jobStart records that a job began. The id is derived, so that a second agent for
// the same job writes the same record.
func (a *Agent) jobStart(c hook.Context) {
	a.mu.Lock()
	a.jobEnded = time.Time{}
	a.mu.Unlock()
	a.contexts.add(c)
	for _, old := range a.contexts.all() {
		// Sealing a job closes those that its runner left open, at its own start.
		if old.Outcome == hook.Superseded && old.Ended.Equal(c.Started) {
			a.recordJobEnd(old, hook.Superseded)
		}
	}
	a.intake.keep(&record.Record{
		ID: record.DeriveID(c.Started, "job.start", c.Key), TS: c.Started, Kind: record.KindJobStart, By: record.BySealed, CI: &c.CI,
		Job: &record.Job{Started: c.Started, Version: c.Version},
	})
	for i, text := range c.Problems {
		a.log.Error("a file of the installation is not what was installed", "problem", text)
		a.intake.keep(&record.Record{
			ID: record.DeriveID(c.Started, "changed_file", c.Key, strconv.Itoa(i)), TS: c.Started, Kind: record.KindLoss, By: record.BySealed, CI: &c.CI,
			Loss: &record.Loss{Cause: "changed_file", Count: -1, Source: "installation", From: c.Started, Detail: text},
		})
	}
}

// jobEnd records that a job ended, and lets the agent end with it.
func (a *Agent) jobEnd(c hook.Context, outcome string) {
	a.recordJobEnd(c, outcome)
	// Another runner of this machine may have a job of its own, whose calls come here.
	others := slices.ContainsFunc(a.contexts.all(), func(o hook.Context) bool {
		return o.Key != c.Key && o.Open() && o.RunnerPID > 0 && !o.RunnerGone()
	})
	if a.o.ExitOnJobEnd && !others {
		a.mu.Lock()
		a.jobEnded = a.now()
		a.mu.Unlock()
	}
}

func (a *Agent) recordJobEnd(c hook.Context, outcome string) {
	ended := c.Ended
	if ended.IsZero() {
		ended = a.now()
	}
	a.intake.keep(&record.Record{
		ID: record.DeriveID(c.Started, "job.end", c.Key), TS: ended, Kind: record.KindJobEnd, By: record.BySealed, CI: &c.CI,
		Job: &record.Job{Outcome: outcome, Started: c.Started, DurationNS: int64(ended.Sub(c.Started)), Version: c.Version},
	})
}
