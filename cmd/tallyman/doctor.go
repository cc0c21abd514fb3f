package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/doctor"
	"github.com/tallyman-ci/tallyman/sinks"
)

func (p *program) doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Category: forPeople, Usage: "say in plain words what is wrong with this installation",
		Description: `Run it as the runner's user, in the runner's environment, to see what the runner
sees. It exits 1 when a check failed; a warning means that something will be
missing from the account.

Examples:
  sudo -u runner tallyman doctor
  kubectl exec runner-pod -c runner -- tallyman doctor
  tallyman doctor --json | jq '.checks[] | select(.result != "ok")'`,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "json", Category: "Output", EnvVars: []string{"TALLYMAN_DOCTOR_JSON"}, Usage: "write one JSON object"},
			&cli.DurationFlag{Name: "timeout", Category: "Output", EnvVars: []string{"TALLYMAN_DOCTOR_TIMEOUT"}, Value: 3 * time.Second,
				Usage: "wait for the agent and for the daemon at most this `LONG` each"},
		}, placeFlags()...),
		Action: func(c *cli.Context) error {
			in := doctor.Input{
				Environ: p.environ, ConfigPath: c.String("config"), Timeout: c.Duration("timeout"), AgentConfig: configPath(c),
				RunDir: c.String("run-dir"), StateDir: c.String("state-dir"),
				Agent: askAgent, Sinks: func(urls []string) []error { return sinks.CheckAll(urls, schemes()...) },
			}
			if exe, err := os.Executable(); err == nil {
				in.Program = exe
			}
			r := doctor.Run(c.Context, in)
			write := r.Terminal
			if c.Bool("json") {
				write = r.JSON
			}
			if err := write(p.stdout); err != nil {
				return fmt.Errorf("write the findings: %w", err)
			}
			if r.Failed > 0 {
				return errSaid
			}
			return nil
		},
	}
}

func askAgent(ctx context.Context, socket string) (doctor.AgentState, error) {
	s, err := agentStatus(ctx, socket)
	if err != nil {
		return doctor.AgentState{}, err
	}
	return doctor.AgentState{Summary: summary(s), Problems: problems(s)}, nil
}

// agentStatus asks a running agent; where the time was up, the error is ctx's.
func agentStatus(ctx context.Context, socket string) (agent.Status, error) {
	client, err := agent.Dial(ctx, socket)
	if err != nil {
		return agent.Status{}, err
	}
	defer client.Close()
	s, err := client.Status(ctx)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return s, err
}
