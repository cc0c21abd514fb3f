// Command tallyman-desk answers questions where people sit: it imports what others
// know of the same traffic. Nothing of it belongs into a runner image.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/report"
)

// version and commit are set by the linker (-X main.version=...).
var version, commit string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := app().RunContext(ctx, os.Args)
	stop()
	var usage *commandline.UsageError
	switch {
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "tallyman-desk: %s\nRun '%s --help' for what there is.\n", report.Safe(usage.Error()), usage.Command)
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "tallyman-desk: "+report.Safe(err.Error()))
		os.Exit(1)
	}
}

// app declares the commands, each in a file of its own.
func app() *cli.App {
	app := &cli.App{
		Name:      "tallyman-desk",
		Usage:     "the account of the fleet: questions, pages and imports",
		UsageText: "tallyman-desk <command> [options]",
		Description: `Examples:
  tallyman-desk report --html page.html /var/log/tallyman            one page of a journal
  tallyman-desk serve /var/log/tallyman                              the same, live
  tallyman-desk query 'FROM tallyman.failed_pulls' /var/log/tallyman
  tallyman-desk blame --csv requests.csv.gz /var/log/tallyman        who caused these requests`,
		Commands: []*cli.Command{
			importCommand(), queryCommand(), dashboardsCommand(), reportCommand(), serveCommand(), blameCommand(),
		},
		Reader:    os.Stdin,
		Writer:    os.Stdout,
		ErrWriter: os.Stderr,
	}
	commandline.Variables("TALLYMAN_DESK", app.Commands)
	commandline.Prepare(app, commandline.Version(version, commit))
	return app
}

// versionOf is the version that a page names.
func versionOf() string {
	v, _ := commandline.Built(version, commit)
	return v
}
