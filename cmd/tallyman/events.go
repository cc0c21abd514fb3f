package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/metrics"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/report"
	"github.com/tallyman-ci/tallyman/sinks"
)

func (p *program) eventsCommand() *cli.Command {
	return &cli.Command{
		Name: "events", Category: forRunner, Usage: "stream the Docker daemon's events alone, on any machine, to sinks and DogStatsD",
		Description: `Needs no hook, no shim and no agent. It waits for a daemon that is not up,
reconnects, and says which events were missed. It ends on SIGTERM, after a flush.
Where another tallyman of this machine streams the same daemon, it says so and ends
with exit code 0: every event would be counted twice.

Examples:
  tallyman events | jq -c .event
  tallyman events --state-dir /var/lib/tallyman-events --sink file:///var/log/docker-events.jsonl
  tallyman events --sink stdout: --statsd unix:///var/run/datadog/dsd.socket`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "host", EnvVars: []string{"TALLYMAN_DOCKER_HOST"},
				Usage: "`ADDRESS` of the daemon (unix:// or tcp://); without it docker_host of the configuration, DOCKER_HOST, or the default socket"},
			&cli.StringSliceFlag{Name: "sink", EnvVars: []string{"TALLYMAN_SINKS"}, DefaultText: "stdout:",
				Usage: "write the events to the sink of this `URL`; may be repeated"},
			&cli.StringFlag{Name: "statsd", EnvVars: []string{"TALLYMAN_STATSD"},
				Usage: "`ADDRESS` of DogStatsD, or off; without it statsd of the configuration, then DD_DOGSTATSD_URL or DD_AGENT_HOST"},
			&cli.StringSliceFlag{Name: "label", EnvVars: []string{"TALLYMAN_EVENT_LABELS"},
				Usage: "keep the container and image label of this `NAME`; may be repeated"},
			&cli.StringFlag{Name: "since", EnvVars: []string{"TALLYMAN_EVENTS_SINCE"},
				Usage: "begin at this `TIME` (10m, 2h, RFC 3339), as far as the daemon's 256 kept events reach back"},
			&cli.StringFlag{Name: "state-dir", EnvVars: []string{"TALLYMAN_EVENTS_STATE_DIR"}, TakesFile: true,
				Usage: "keep cursors and what is not delivered in `FOLDER`, and go on there after a restart; without it nothing is remembered"},
			&cli.BoolFlag{Name: "no-lock", EnvVars: []string{"TALLYMAN_NO_LOCK"},
				Usage: "stream although another tallyman does; what both count is counted twice"},
			&cli.StringFlag{Name: "config", EnvVars: []string{"TALLYMAN_CONFIG"}, TakesFile: true, Usage: "read the configuration from `FILE`"},
		}, logFlags()...),
		Action: p.events,
	}
}

func (p *program) events(c *cli.Context) (err error) {
	cfg, err := p.loadEventsConfig(c)
	if err != nil {
		return err
	}
	log, done, err := p.logger(c)
	if err != nil {
		return err
	}
	defer done()
	since, err := report.ParseTime(c.String("since"), time.Now())
	if err != nil {
		return commandline.BadUsage(c, "--since: %v", err)
	}
	if err := p.checkDaemon(cfg.host); err != nil {
		return commandline.BadUsage(c, "%v", err)
	}
	state := c.String("state-dir")
	if state == "" {
		if state, err = os.MkdirTemp("", "tallyman-events-"); err != nil {
			return fmt.Errorf("make a folder for what is not delivered: %w", err)
		}
		defer os.RemoveAll(state)
	}
	ctx, stop := context.WithCancel(c.Context)
	defer stop()
	s := &eventStream{log: log, host: hook.HostFromEnvironment(p.environ), stop: stop}
	err = s.open(ctx, state, cfg)
	if err == nil {
		p.warnOfContext(log, cfg.host)
		o := events.Options{
			Host: cfg.host, StatePath: filepath.Join(state, "events.json"), Since: since, Labels: cfg.labels, Logger: log,
			LockDir: lockDir(cfg.runDir), Yield: true,
		}
		if c.Bool("no-lock") {
			o.LockDir = ""
		}
		err = s.run(ctx, events.New(o))
	}
	if errors.Is(err, events.ErrStreamed) || errors.Is(err, journal.ErrLocked) {
		// Whoever started this one wanted the events streamed, and they are.
		fmt.Fprintf(p.stderr, "tallyman: %s; this one ends (--no-lock streams them twice)\n", report.Safe(err.Error()))
		err = nil
	}
	return errors.Join(err, s.close())
}

// lockDir is where the streamers of one machine meet: the run folder, where this user
// may write to it, else a folder of the user's own. "" means that there is none.
func lockDir(runDir string) string {
	if err := os.MkdirAll(runDir, 0o755); err == nil && unix.Access(runDir, unix.W_OK) == nil {
		return runDir
	}
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("tallyman-%d", os.Geteuid()))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return ""
	}
	var st unix.Stat_t
	if unix.Lstat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0 {
		return "" // somebody else made it
	}
	return dir
}

// checkDaemon refuses an address that can never be right. A daemon that is not up is
// waited for, but a mistyped one would be waited for without end.
func (p *program) checkDaemon(host string) error {
	if host != "" {
		_, err := events.Address(host)
		return err
	}
	if _, err := events.Address(p.variable("DOCKER_HOST")); err != nil {
		return fmt.Errorf("DOCKER_HOST: %w", err)
	}
	return nil
}

// warnOfContext says that a selected docker context is not followed: it stands in a
// file that any job may change, and would choose whose events are recorded.
func (p *program) warnOfContext(log *slog.Logger, host string) {
	if name := p.variable("DOCKER_CONTEXT"); host == "" && p.variable("DOCKER_HOST") == "" && name != "" && name != "default" {
		log.Warn("the docker context is not followed; name its daemon with --host or DOCKER_HOST", "DOCKER_CONTEXT", name)
	}
}

// eventsConfig is what the command takes from flags, else from the configuration.
type eventsConfig struct {
	host, statsd  string
	runDir        string
	sinks, labels []string
	statsdTags    []string
	segment, size int64
}

func (p *program) loadEventsConfig(c *cli.Context) (eventsConfig, error) {
	cfg, err := p.loadConfig(c)
	if err != nil {
		return eventsConfig{}, err
	}
	e := eventsConfig{
		runDir: cfg.RunDir, host: cfg.DockerHost, statsd: cfg.Statsd, labels: cfg.EventLabels, statsdTags: cfg.StatsdTags,
		segment: cfg.SegmentMaxBytes, size: cfg.JournalMaxBytes, sinks: []string{"stdout:"},
	}
	for flag, field := range map[string]*string{"host": &e.host, "statsd": &e.statsd} {
		if c.IsSet(flag) {
			*field = c.String(flag)
		}
	}
	for flag, field := range map[string]*[]string{"sink": &e.sinks, "label": &e.labels} {
		if c.IsSet(flag) {
			// From a variable they come in one text, apart by spaces as in the configuration.
			*field = strings.Fields(strings.Join(c.StringSlice(flag), " "))
		}
	}
	return e, nil
}

// eventStream carries events to a journal and from there to the sinks, so that a
// slow sink neither delays another one nor the daemon.
type eventStream struct {
	log     *slog.Logger
	host    record.Host
	stop    func() // ends the stream
	journal *journal.Journal
	metrics *metrics.Emitter
	pumps   []pump

	opened bool
	early  []record.Loss // found while opening, to be journaled after it
}

// pump delivers to one sink.
type pump struct {
	*sinks.Pump
	sink *endsWithReader
}

// endsWithReader is a sink that ends the stream when nobody reads its pipe any
// more: `tallyman events | head` must end with head, and not retry for ever.
type endsWithReader struct {
	sinks.Sink
	stop func()
	gone atomic.Bool
}

func (s *endsWithReader) Write(ctx context.Context, batch []sinks.Entry) error {
	err := s.Sink.Write(ctx, batch)
	if errors.Is(err, syscall.EPIPE) {
		s.gone.Store(true)
		s.stop()
	}
	return err
}

const (
	syncEvery    = 200 * time.Millisecond // bounds what a power cut costs
	flushTimeout = 5 * time.Second        // for the sinks, at the end
)

func (s *eventStream) open(ctx context.Context, state string, cfg eventsConfig) (err error) {
	if err := os.MkdirAll(state, 0o755); err != nil {
		return fmt.Errorf("make the state folder: %w (name another one with --state-dir)", err)
	}
	s.journal, err = journal.Open(filepath.Join(state, "journal"), journal.Options{MaxSegmentBytes: cfg.segment, MaxBytes: cfg.size, OnLoss: s.loss, Logger: s.log})
	if errors.Is(err, journal.ErrLocked) {
		return fmt.Errorf("another process streams into %s: %w", state, err)
	}
	if err != nil {
		return fmt.Errorf("open the journal: %w", err)
	}
	for _, raw := range cfg.sinks {
		target, err := sinks.Parse(raw, schemes()...)
		if err != nil {
			return err
		}
		sink, err := target.Open(ctx)
		if err != nil {
			return err
		}
		watched := &endsWithReader{Sink: sink, stop: s.stop}
		p, err := target.NewPump(s.journal, watched, filepath.Join(state, "journal"), s.loss, s.log)
		if err != nil {
			return errors.Join(err, sink.Close(ctx))
		}
		s.pumps = append(s.pumps, pump{p, watched})
	}
	if s.metrics, err = metrics.New(metrics.Options{Addr: cfg.statsd, EventTags: cfg.statsdTags, Logger: s.log}); err != nil {
		return fmt.Errorf("open DogStatsD: %w", err)
	}
	s.opened = true
	for _, l := range s.early {
		s.loss(l)
	}
	return nil
}

// run streams until ctx ends, then flushes.
func (s *eventStream) run(ctx context.Context, streamer *events.Streamer) error {
	pumping, stopPumps := context.WithCancel(context.WithoutCancel(ctx))
	var work sync.WaitGroup
	for _, p := range s.pumps {
		work.Go(func() {
			if err := p.Run(pumping); err != nil {
				s.log.Error("sink", "error", err)
			}
		})
	}
	work.Go(func() { s.syncUntil(pumping) })
	err := streamer.Run(ctx, s.take)
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	// At the same time: a dead one takes all of it, and the others must not wait.
	results := make(chan error, len(s.pumps))
	for _, p := range s.pumps {
		go func() {
			if p.sink.gone.Load() {
				results <- nil
			} else {
				results <- p.Flush(flush)
			}
		}()
	}
	for range s.pumps {
		err = errors.Join(err, <-results)
	}
	stopPumps()
	work.Wait()
	return err
}

func (s *eventStream) syncUntil(ctx context.Context) {
	t := time.NewTicker(syncEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := s.journal.Sync(); err != nil {
				s.log.Error("sync the journal", "error", err)
			}
		}
	}
}

// take journals a batch of events. There is no job here to find.
func (s *eventStream) take(batch []*record.Record) error {
	var lines []byte
	for _, r := range batch {
		r.Host, r.OutsideJob = &s.host, true
		lines = record.Append(lines, r)
	}
	if err := s.journal.Append(lines); err != nil {
		return fmt.Errorf("journal events: %w", err)
	}
	for _, r := range batch {
		s.metrics.Observe(r)
	}
	return nil
}

// loss journals what the journal and the sinks say is missing.
func (s *eventStream) loss(l record.Loss) {
	if !s.opened { // the first append comes after the last cursor was opened
		s.early = append(s.early, l)
		return
	}
	now := time.Now().UTC()
	r := record.Record{ID: record.NewID(now), TS: now, Kind: record.KindLoss, Schema: record.SchemaVersion, By: record.ByNone, OutsideJob: true, Host: &s.host, Loss: &l}
	s.log.Warn("records lost", "cause", l.Cause, "count", l.Count, "source", l.Source)
	if err := s.journal.Append(record.Append(nil, &r)); err != nil {
		s.log.Error("journal a loss", "error", err)
	}
}

func (s *eventStream) close() error {
	var errs []error
	if s.metrics != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := s.metrics.Close(ctx); err != nil {
			s.log.Warn("metrics were left behind", "error", err)
		}
	}
	if s.journal != nil {
		errs = append(errs, s.journal.Close())
	}
	return errors.Join(errs...)
}
