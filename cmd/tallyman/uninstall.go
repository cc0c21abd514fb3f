package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/install"
)

func (p *program) uninstallCommand() *cli.Command {
	return &cli.Command{
		Name: "uninstall", Category: forRunner, Usage: "give docker its place back and remove what install made (root)",
		Description: `What was there before is there again: the same files, with owners, modes and times.
It also undoes half an installation. Records, and files that were edited since, stay.

Unset the two hook variables of the runner first: it fails every job whose hook is
not there.

Examples:
  tallyman uninstall --dry-run
  tallyman uninstall
  tallyman uninstall --purge       the records and the configuration too`,
		Flags: append(installFlags(),
			&cli.BoolFlag{Name: "purge", EnvVars: []string{"TALLYMAN_PURGE"}, Usage: "remove records and edited files too"}),
		Action: func(c *cli.Context) error {
			o := p.installOptions(c)
			o.Purge = c.Bool("purge")
			err := p.carryOut(c, o, install.Uninstall, "There is nothing to remove.", "Tallyman is removed.\n")
			if errors.Is(err, install.ErrNothing) {
				fmt.Fprintln(p.stdout, "There is nothing of Tallyman's to remove.")
				return nil
			}
			return err
		},
	}
}
