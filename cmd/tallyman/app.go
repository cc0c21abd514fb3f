package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/doctor"
)

// Categories of commands and flags, in which the help shows them.
const (
	forRunner   = "On the runner"
	forPeople   = "Questions"
	forShell    = "This program"
	placesFlags = "Places"
)

// app declares the commands. No value of it is shared between runs.
func (p *program) app() *cli.App {
	app := &cli.App{
		Name:      "tallyman",
		Usage:     "the account of docker calls on a CI runner: who called what, how it ended",
		UsageText: "tallyman <command> [options]",
		Version:   versionLine(),
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
			p.versionCommand(), p.completionCommand(), p.helpCommand(),
		}),
		// The library adds it only where there is no help command.
		Flags:                     []cli.Flag{&cli.BoolFlag{Name: "help", Aliases: []string{"h"}, Usage: "show this help"}},
		EnableBashCompletion:      true,
		DisableSliceFlagSeparator: true, // a workflow's name may hold a comma
		HideHelpCommand:           true,
		Reader:                    p.stdin,
		Writer:                    p.stdout,
		ErrWriter:                 p.stderr,
		ExitErrHandler:            func(*cli.Context, error) {}, // run says it
		OnUsageError:              usage,
		Action:                    noSuchCommand,
	}
	strict(app.Commands)
	setHelp(app)
	return app
}

// strict gives every command our answer to a bad command line.
func strict(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = usage
		c.HideHelpCommand = true
		if len(c.Subcommands) > 0 && c.Action == nil {
			c.Action = noSuchCommand
		}
		if action := c.Action; action != nil && len(c.Subcommands) == 0 && c.ArgsUsage == "" {
			c.Action = func(ctx *cli.Context) error {
				if ctx.Args().Present() {
					return badUsage(ctx, "%s takes no argument, and got %q", ctx.Command.HelpName, ctx.Args().First())
				}
				return action(ctx)
			}
		}
		strict(c.Subcommands)
	}
}

// noSuchCommand is what runs when no command was named, or none that there is.
func noSuchCommand(c *cli.Context) error {
	if c.Args().Present() {
		name := c.Args().First()
		return badUsage(c, "there is no command %q%s", name, didYouMean(nearestCommand(name, c.Command.Subcommands)))
	}
	if len(c.Lineage()) > 2 {
		return cli.ShowSubcommandHelp(c)
	}
	return cli.ShowAppHelp(c)
}

func nearestCommand(name string, commands []*cli.Command) string {
	var known []string
	for _, k := range commands {
		if !k.Hidden {
			known = append(known, k.Name)
		}
	}
	return doctor.Nearest(name, known)
}

var undefined = regexp.MustCompile(`flag provided but not defined: -+(.*)`)

// usage says what is wrong with a flag, and which one was meant.
func usage(c *cli.Context, err error, _ bool) error {
	m := undefined.FindStringSubmatch(err.Error())
	if m == nil {
		return badUsage(c, "%s", strings.TrimSpace(err.Error()))
	}
	var known []string
	for _, f := range c.Command.VisibleFlags() {
		known = append(known, f.Names()...)
	}
	near := doctor.Nearest(m[1], known)
	if near != "" {
		near = dashes(near)
	}
	return badUsage(c, "there is no option %s%s", dashes(m[1]), didYouMean(near))
}

func dashes(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

func didYouMean(near string) string {
	if near == "" {
		return ""
	}
	return fmt.Sprintf(": did you mean %s?", near)
}
