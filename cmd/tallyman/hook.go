package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/report"
)

func (p *program) hookCommand() *cli.Command {
	command := func(name, usage string, run func(context.Context, hook.Options) error) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage, Flags: placeFlags(),
			Action: func(c *cli.Context) error {
				o, err := p.hookOptions(c)
				if err != nil {
					return err
				}
				if err := run(c.Context, o); err != nil && name != "work" {
					return errSaid // in the one line that a hook may write
				} else if err != nil {
					return err
				}
				return nil
			},
		}
	}
	work := command("work", "do the work of a hook, detached from it", func(ctx context.Context, o hook.Options) error {
		return hook.Work(ctx, p.stdin, p.stdout, o)
	})
	work.Hidden = true
	return &cli.Command{
		Name: "hook", Category: forRunner, Usage: "the runner's hooks, called by the two scripts of Tallyman",
		UsageText: "tallyman hook job-started|job-completed",
		Description: `The runner calls a script before and after each job; name ours in
ACTIONS_RUNNER_HOOK_JOB_STARTED and ACTIONS_RUNNER_HOOK_JOB_COMPLETED.
A hook always exits 0: nothing that is wrong with Tallyman fails a job.`,
		Subcommands: []*cli.Command{
			command("job-started", "seal the job's context and start the agent, in less than half a second", hook.JobStarted),
			command("job-completed", "flush, close the job's context and write the job summary", hook.JobCompleted),
			work,
		},
	}
}

func (p *program) hookOptions(c *cli.Context) (hook.Options, error) {
	cfg, err := p.loadConfig(c)
	if err != nil {
		return hook.Options{}, err
	}
	exe, err := os.Executable()
	if err != nil {
		return hook.Options{}, fmt.Errorf("find this program: %w", err)
	}
	v, _ := commandline.Built(version, commit)
	places := []string{"--run-dir", cfg.RunDir, "--state-dir", cfg.StateDir}
	if path := c.String("config"); path != "" {
		places = append(places, "--config", path)
	}
	return hook.Options{
		RunDir: cfg.RunDir, StateDir: cfg.StateDir, Enabled: cfg.Enabled, Canary: float64(cfg.Canary), OffFile: config.OffPath,
		Summary: cfg.Summary, RunnerLabels: cfg.RunnerLabels, Version: v, Environ: p.environ,
		Worker: append([]string{exe, "hook", "work"}, places...),
		Agent:  append([]string{exe, "agent", "--exit-on-job-end", "--log", cfg.StateDir + "/agent.log"}, places...),
		Connect: func(ctx context.Context, socket string) (hook.Agent, error) {
			client, err := agent.Dial(ctx, socket)
			if err != nil {
				return nil, err
			}
			return client, nil
		},
		SummaryMarkdown: func(ctx context.Context, job hook.Context) (string, error) { return jobSummary(ctx, cfg, job) },
		Pins:            pins(cfg),
		Out:             p.stdout,
		Logger:          slog.New(slog.NewTextHandler(io.Discard, nil)),
	}, nil
}

// pins are the files whose content the configuration fixes.
func pins(cfg config.Config) []hook.Pin {
	var all []hook.Pin
	for _, p := range cfg.Pins {
		all = append(all, hook.Pin(p))
	}
	return all
}

// jobSummary describes one job from the journal. The tracking id tells it from the
// other legs of a matrix on the same runner; where there is none, run and job do. It
// begins with the job, so that its coverage is of this job and not of the one before.
func jobSummary(ctx context.Context, cfg config.Config, job hook.Context) (string, error) {
	o := report.Options{From: job.Started}
	if job.CI.TrackingID != "" {
		o.Filter.TrackingID = job.CI.TrackingID
	} else {
		o.Filter.Runs, o.Filter.Jobs = literal(job.CI.RunID), literal(job.CI.Job)
	}
	sources, done, err := report.OpenPaths([]string{cfg.Journal()}, o.From, strings.NewReader(""))
	if err != nil {
		return "", err
	}
	defer done()
	r, err := report.Build(ctx, sources, o)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	if err := report.Summary(&b, r); err != nil {
		return "", err
	}
	return b.String(), nil
}

// literal is a filter on one value, or none where the value is not known or would
// be read as a pattern.
func literal(value string) []string {
	if value == "" || strings.Contains(value, "*") {
		return nil
	}
	return []string{value}
}
