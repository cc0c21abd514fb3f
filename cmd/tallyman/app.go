package main

import (
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/commandline"
)

// Categories of commands and flags, in which the help shows them.
const (
	forRunner   = "On the runner"
	forPeople   = "Questions"
	placesFlags = "Places"
)

// app declares the commands. No value of it is shared between runs.
func (p *program) app() *cli.App {
	app := &cli.App{
		Name:      "tallyman",
		Usage:     "the account of docker calls on a CI runner: who called what, how it ended",
		UsageText: "tallyman <command> [options]",
		Description: `Examples:
  tallyman doctor                                what is wrong with this installation
  tallyman report --since 24h                    what the runner did since yesterday
  tallyman report --repository 'acme/*' --json   the same for one owner, for a program
  tallyman status                                what the agent is doing`,
		Commands: slices.Concat([]*cli.Command{
			p.installCommand(), p.uninstallCommand(), p.carryCommand(), p.agentCommand(), p.eventsCommand(), p.hookCommand(),
			p.reportCommand(), p.statusCommand(), p.doctorCommand(),
		}, p.bqCommands(), []*cli.Command{
			p.replayCommand(), p.selftestCommand(), p.benchCommand(),
		}),
		Reader:    p.stdin,
		Writer:    p.stdout,
		ErrWriter: p.stderr,
	}
	commandline.Prepare(app, commandline.Version(version, commit))
	return app
}
