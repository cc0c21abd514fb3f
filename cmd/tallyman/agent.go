package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/agent/adopt"
	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/health"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/record"
)

// maxLog bounds the agent's log: a longer one is put aside at the next start.
const maxLog = 1 << 20

func logFlags() []cli.Flag {
	const category = "Log"
	return []cli.Flag{
		&cli.StringFlag{Name: "log", Category: category, EnvVars: []string{"TALLYMAN_LOG"}, TakesFile: true,
			Usage: "append the log to `FILE` in place of stderr"},
		&cli.StringFlag{Name: "log-level", Category: category, EnvVars: []string{"TALLYMAN_LOG_LEVEL"}, Value: "info",
			Usage: "log what is at least as grave as `LEVEL`: debug, info, warn or error"},
	}
}

func (p *program) agentCommand() *cli.Command {
	return &cli.Command{
		Name: "agent", Category: forRunner, Usage: "receive calls and events, keep the journal and feed the sinks",
		Description: `The job-started hook starts it for each job; on a machine without hooks it runs as
a service. It ends on SIGTERM, after a flush. One agent runs at a time.

With --adopt it is another process: one on each node (a DaemonSet) that delivers the
journals which dead runners left in folders of DIR, and removes them.

Examples:
  tallyman agent
  tallyman agent --no-events --log-level debug
  tallyman agent --adopt /var/lib/tallyman-runners --health 127.0.0.1:9464`,
		Flags: append(append([]cli.Flag{
			&cli.BoolFlag{Name: "no-events", EnvVars: []string{"TALLYMAN_NO_EVENTS"}, Usage: "leave the Docker daemon's events alone"},
			&cli.BoolFlag{Name: "exit-on-job-end", EnvVars: []string{"TALLYMAN_EXIT_ON_JOB_END"}, Usage: "end after the job that it was started for"},
			&cli.DurationFlag{Name: "flush-timeout", EnvVars: []string{"TALLYMAN_FLUSH_TIMEOUT"}, Value: 5 * time.Second,
				Usage: "at the end, wait for the sinks at most this `LONG`"},
			&cli.StringFlag{Name: "health", EnvVars: []string{"TALLYMAN_HEALTH"},
				Usage: "answer /healthz and /metrics at `ADDRESS` (unix:///path or 127.0.0.1:9464), in place of the configuration's"},
			&cli.StringFlag{Name: "adopt", EnvVars: []string{"TALLYMAN_ADOPT"}, TakesFile: true,
				Usage: "deliver the journals that dead runners left in the folders of `DIR`, and nothing else"},
			&cli.DurationFlag{Name: "adopt-after", EnvVars: []string{"TALLYMAN_ADOPT_AFTER"}, Value: time.Minute,
				Usage: "adopt a journal that no agent has open and that has not changed for this `LONG`"},
		}, logFlags()...), placeFlags()...),
		Action: p.agent,
	}
}

func (p *program) agent(c *cli.Context) error {
	cfg, err := p.loadConfig(c)
	if err != nil {
		return err
	}
	log, done, err := p.logger(c)
	if err != nil && c.Bool("exit-on-job-end") {
		// As in runForHook: without its log, or with more of it, the agent can work.
		p.problems = append(p.problems, err.Error())
		if err = c.Set("log-level", "info"); err == nil {
			log, done, err = p.logger(c)
		}
		if err != nil {
			log, done, err = slog.New(slog.NewTextHandler(p.stderr, nil)), func() {}, nil
		}
	}
	if err != nil {
		return err
	}
	defer done()
	for _, problem := range p.problems {
		log.Warn("an option is not used", "problem", problem)
	}
	v, _ := commandline.Built(version, commit)
	host := hook.HostFromEnvironment(p.environ)
	if h := c.String("health"); h != "" {
		cfg.Health = h
	}
	if dir := c.String("adopt"); dir != "" {
		return p.adopt(c, dir, cfg, host, log)
	}
	store := hook.Options{StateDir: cfg.StateDir}
	// The collector starts at half the usual growth: at ten times the load that one job may
	// have, the peak is then below the promised 64 MB (make bench-bounds prints it).
	debug.SetGCPercent(50)
	a := agent.New(agent.Options{
		Config: cfg, Schemes: schemes(), Store: store.Store(), Host: host, Version: v,
		NoEvents: c.Bool("no-events"), ExitOnJobEnd: c.Bool("exit-on-job-end"), OffFile: config.OffPath, Problems: p.problems, FlushTimeout: c.Duration("flush-timeout"), Logger: log,
	})
	ctx, stop := context.WithCancel(c.Context)
	defer stop()
	healthDone := serveHealth(ctx, cfg.Health, func() health.Report { return health.OfAgent(a.Status(), host) }, log)
	err = a.Run(ctx)
	stop()
	healthDone()
	if errors.Is(err, agent.ErrOff) {
		fmt.Fprintf(p.stderr, "tallyman: %v; no agent runs\n", err)
		return nil
	}
	if errors.Is(err, agent.ErrRunning) {
		// Whoever started this one wanted an agent to run, and one does.
		fmt.Fprintf(p.stderr, "tallyman: %v; this one ends (tallyman status tells of the other)\n", err)
		return nil
	}
	if err != nil {
		log.Error("agent", "error", err)
	}
	return err
}

// adopt delivers the journals of dead runners until it is told to end.
func (p *program) adopt(c *cli.Context, dir string, cfg config.Config, host record.Host, log *slog.Logger) error {
	a, err := adopt.New(adopt.Options{Dir: dir, Sinks: cfg.Sinks, Schemes: schemes(), Quiet: c.Duration("adopt-after"), Host: host, Logger: log})
	if err != nil {
		return err
	}
	v, _ := commandline.Built(version, commit)
	ctx, stop := context.WithCancel(c.Context)
	defer stop()
	healthDone := serveHealth(ctx, cfg.Health, func() health.Report { return health.OfAdopter(a.Status(), v) }, log)
	log.Info("adopter started", "version", v, "dir", dir, "sinks", len(cfg.Sinks))
	err = a.Run(ctx)
	stop()
	healthDone()
	log.Info("adopter ended", "adopted", a.Status().Adopted)
	return err
}

// serveHealth answers at addr until ctx ends; the returned function waits for that.
// Without an address, or where it cannot be had, the account goes on without.
func serveHealth(ctx context.Context, addr string, report func() health.Report, log *slog.Logger) (wait func()) {
	if addr == "" {
		return func() {}
	}
	l, err := health.Listen(addr)
	if err != nil {
		log.Error("nobody answers for the health of this process", "error", err)
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := health.Serve(ctx, l, report, log); err != nil {
			log.Error("health", "error", err)
		}
	}()
	return func() { <-done }
}

// logger is the log of a command that runs for long.
func (p *program) logger(c *cli.Context) (log *slog.Logger, done func(), err error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.String("log-level"))); err != nil {
		return nil, nil, commandline.BadUsage(c, "--log-level %q: use debug, info, warn or error", c.String("log-level"))
	}
	w, done := p.stderr, func() {}
	if path := c.String("log"); path != "" {
		f, err := openLog(path)
		if err != nil {
			return nil, nil, err
		}
		// The hook starts the agent with its output on /dev/null: a crash, and the stacks
		// that a SIGABRT prints, would leave no trace.
		_ = debug.SetCrashOutput(f, debug.CrashOptions{})
		w, done = io.Writer(f), func() { f.Close() }
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})), done, nil
}

func openLog(path string) (*os.File, error) {
	if st, err := os.Lstat(path); err == nil && st.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("put the full log aside: %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log: %w (name another one with --log)", err)
	}
	return f, nil
}
