// Package commandline is what the programs share of their command lines: the help, the
// answer to wrong use, the version, and the completion of shells.
//
// A program declares its commands for the library and hands them to Prepare.
package commandline

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/nearest"
)

// ForShell is the category of the commands that every program has.
const ForShell = "This program"

// Prepare completes an app: help texts, a strict reading of each command line, and the
// commands version, completion and help. version is what Version returns.
func Prepare(app *cli.App, version string) {
	app.Version = version
	app.Commands = append(app.Commands, versionCommand(version), completionCommand(app.Name), helpCommand())
	app.Flags = []cli.Flag{&cli.BoolFlag{Name: "help", Aliases: []string{"h"}, Usage: "show this help"}} // the library adds it only where there is no help command
	app.EnableBashCompletion = true
	app.DisableSliceFlagSeparator = true // a workflow's name may hold a comma
	app.HideHelpCommand = true
	app.ExitErrHandler = func(*cli.Context, error) {} // the program's main says it
	app.OnUsageError = usage
	app.Action = noSuchCommand
	strict(app.Commands)
	setHelp(app)
}

// UsageError is a command line that makes no sense.
type UsageError struct {
	Command string // the command whose help tells more
	text    string
}

func (e *UsageError) Error() string { return e.text }

// BadUsage makes a UsageError of the command that runs.
func BadUsage(c *cli.Context, format string, args ...any) error {
	return &UsageError{Command: c.Command.HelpName, text: fmt.Sprintf(format, args...)}
}

var option = regexp.MustCompile(`^--?[a-z][a-z-]*(=|$)`)

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
					return BadUsage(ctx, "%s takes no argument, and got %q", ctx.Command.HelpName, ctx.Args().First())
				}
				return action(ctx)
			}
		} else if action != nil && len(c.Subcommands) == 0 && !strings.Contains(c.ArgsUsage, "ARG...") {
			c.Action = func(ctx *cli.Context) error {
				// The library takes everything behind the first argument as arguments.
				for _, arg := range ctx.Args().Slice() {
					if option.MatchString(arg) {
						return BadUsage(ctx, "options come before %s: %s", strings.Trim(ctx.Command.ArgsUsage, "[]."), arg)
					}
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
		return BadUsage(c, "there is no command %q%s", name, DidYouMean(nearestCommand(name, c.Command.Subcommands)))
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
	return nearest.Word(name, known)
}

var undefined = regexp.MustCompile(`flag provided but not defined: -+(.*)`)

// usage says what is wrong with a flag, and which one was meant.
func usage(c *cli.Context, err error, _ bool) error {
	m := undefined.FindStringSubmatch(err.Error())
	if m == nil {
		return BadUsage(c, "%s", strings.TrimSpace(err.Error()))
	}
	var known []string
	for _, f := range c.Command.VisibleFlags() {
		known = append(known, f.Names()...)
	}
	near := nearest.Word(m[1], known)
	if near != "" {
		near = dashes(near)
	}
	return BadUsage(c, "there is no option %s%s", dashes(m[1]), DidYouMean(near))
}

func dashes(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// DidYouMean is the end of a message about a word, where near is what was meant, or "".
func DidYouMean(near string) string {
	if near == "" {
		return ""
	}
	return fmt.Sprintf(": did you mean %s?", near)
}
