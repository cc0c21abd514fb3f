// Command tallyman-desk answers questions where people sit: it imports what others
// know of the same traffic. Nothing of it belongs into a runner image.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/report"
)

// version and commit are set by the linker.
var version, commit = "unknown", "unknown"

// commands are the commands, each in a file of its own.
var commands = []*cli.Command{
	importCommand(),
	queryCommand(),
	dashboardsCommand(),
	reportCommand(),
	serveCommand(),
	blameCommand(),
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	app := &cli.App{
		Name:                      "tallyman-desk",
		Usage:                     "the account of the fleet: questions, pages and imports",
		UsageText:                 "tallyman-desk <command> [options]",
		Version:                   version + " (" + commit + ")",
		Commands:                  commands,
		DisableSliceFlagSeparator: true, // a heading or a workflow's name may hold a comma
		Reader:                    os.Stdin,
		Writer:                    os.Stdout,
		ErrWriter:                 os.Stderr,
		ExitErrHandler:            func(*cli.Context, error) {},
	}
	err := app.RunContext(ctx, os.Args)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "tallyman-desk: "+report.Safe(err.Error()))
		os.Exit(1)
	}
}
