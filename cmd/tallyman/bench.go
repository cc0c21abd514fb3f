package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/selftest"
)

func (p *program) benchCommand() *cli.Command {
	return &cli.Command{
		Name: "bench", Category: forPeople, Usage: "measure what the shim adds to a command on this machine",
		ArgsUsage: "[COMMAND [ARG...]]",
		Description: `It measures a copy of the installed shim in a folder of its own, with an agent of its
own: nothing of the installation is touched, and nothing stays. It needs no root and
no Docker daemon. COMMAND is what the shim is put in front of; without one, true.

Examples:
  tallyman bench
  tallyman bench --duration 1m --json
  tallyman bench docker.original --version`,
		Flags: append([]cli.Flag{
			&cli.DurationFlag{Name: "duration", Category: "Measuring", EnvVars: []string{"TALLYMAN_BENCH_DURATION"}, Value: 10 * time.Second,
				Usage: "measure for this `LONG`"},
			&cli.IntFlag{Name: "rounds", Category: "Measuring", EnvVars: []string{"TALLYMAN_BENCH_ROUNDS"},
				Usage: "end after `N` rounds, even if it is early"},
			&cli.BoolFlag{Name: "json", Category: "Output", EnvVars: []string{"TALLYMAN_BENCH_JSON"}, Usage: "write one JSON object"},
		}, copyFlags()...),
		Action: func(c *cli.Context) error {
			if c.Duration("duration") <= 0 {
				return commandline.BadUsage(c, "--duration %s: it must be longer than nothing", c.Duration("duration"))
			}
			o, _, err := p.selftestOptions(c)
			if err != nil {
				return err
			}
			ctx, stop := untilHangup(c.Context)
			defer stop()
			figures, err := selftest.Bench(ctx, o, selftest.Measure{
				Duration: c.Duration("duration"), Rounds: c.Int("rounds"), Command: c.Args().Slice(),
			})
			if err != nil {
				return interrupted(ctx, err)
			}
			write := figures.Text
			if c.Bool("json") {
				write = figures.JSON
			}
			if err := write(p.stdout); err != nil {
				return fmt.Errorf("write the figures: %w", err)
			}
			return nil
		},
	}
}
