package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/install"
	"github.com/tallyman-ci/tallyman/report"
)

// installFlags are those of install and uninstall.
func installFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "root", EnvVars: []string{"TALLYMAN_ROOT"}, TakesFile: true,
			Usage: "the file system in `DIR` in place of this one, of an image that is being built"},
		&cli.StringSliceFlag{Name: "tool", EnvVars: []string{"TALLYMAN_TOOL"},
			Usage: "the tool of this `NAME`, or at this absolute path; may be repeated (default docker, and those of an earlier run)"},
		&cli.BoolFlag{Name: "check", EnvVars: []string{"TALLYMAN_CHECK"}, Usage: "do nothing; exit 1 where there is something to do, 0 where not"},
		&cli.BoolFlag{Name: "dry-run", EnvVars: []string{"TALLYMAN_DRY_RUN"}, Usage: "do nothing; say what would be done, and exit 0"},
		&cli.BoolFlag{Name: "from-package", EnvVars: []string{"TALLYMAN_FROM_PACKAGE"},
			Usage: "for maintainer scripts: the files below " + install.BinDir + " are the package's, and the tool may be missing"},
	}
}

func (p *program) installCommand() *cli.Command {
	return &cli.Command{
		Name: "install", Category: forRunner, Usage: "put the shim in docker's place, with hooks, folders and configuration (root)",
		Description: `A docker that a package of dpkg owns is diverted, so that upgrades leave the shim in
place; another is renamed to docker.original. At no moment is there no docker, and what is in the
way is never overwritten. Run it again after an upgrade of Tallyman, or to finish
what was cut short.

Examples:
  tallyman install --dry-run                       say what would be done
  tallyman install                                 take docker's place, on this machine
  tallyman install --tool docker --tool podman     two tools
  tallyman install --root /mnt/image --binaries bin
  tallyman install --check || echo 'something is missing'`,
		Flags: append(installFlags(),
			&cli.StringFlag{Name: "binaries", EnvVars: []string{"TALLYMAN_BINARIES"}, TakesFile: true,
				Usage: "the `DIR` that holds tallyman and docker-shim (default that of this program)"},
			&cli.StringFlag{Name: "user", EnvVars: []string{"TALLYMAN_USER"},
				Usage: "the `NAME` or number of the runner's user, who owns the folders for records (default " + install.User + ")"}),
		Action: func(c *cli.Context) error {
			o := p.installOptions(c)
			o.User = c.String("user")
			if o.Binaries = c.String("binaries"); o.Binaries == "" && !o.FromPackage {
				exe, err := os.Executable()
				if err != nil {
					return fmt.Errorf("find this program: %w (name its folder with --binaries)", err)
				}
				o.Binaries = filepath.Dir(exe)
			}
			return p.carryOut(c, o, install.Install, "Everything is installed.",
				"Now let the runner know the hooks, and look whether all is well:\n"+
					"  ACTIONS_RUNNER_HOOK_JOB_STARTED="+install.HookStarted+"\n"+
					"  ACTIONS_RUNNER_HOOK_JOB_COMPLETED="+install.HookCompleted+"\n"+
					"  tallyman doctor\n")
		},
	}
}

// installOptions are those that install and uninstall share.
func (p *program) installOptions(c *cli.Context) install.Options {
	o := install.Options{Root: c.String("root"), Tools: c.StringSlice("tool"), FromPackage: c.Bool("from-package")}
	if o.Root == "" && o.FromPackage {
		o.Root = p.variable("DPKG_ROOT") // dpkg --root with --force-script-chrootless, dpkg(1)
	}
	if o.Root == "" || filepath.Clean(o.Root) == "/" {
		o.Path = p.variable("PATH")
	} else {
		o.Path = install.SearchPath
	}
	return o
}

func (p *program) variable(name string) string {
	for _, kv := range p.environ {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// carryOut makes a plan and runs it, or says what is in it.
func (p *program) carryOut(c *cli.Context, o install.Options, plan func(install.Options) (*install.Plan, error), nothing, after string) error {
	check, dry := c.Bool("check"), c.Bool("dry-run")
	if !check && !dry {
		if os.Geteuid() != 0 && (o.Root == "" || filepath.Clean(o.Root) == "/") {
			return fmt.Errorf("%s changes this system: run it as root (or look at what it would do, with --dry-run)", c.Command.HelpName)
		}
		unlock, err := install.Lock(o.Root)
		if err != nil {
			return err
		}
		defer unlock()
	}
	todo, err := plan(o)
	if err != nil {
		return err
	}
	for _, note := range todo.Notes {
		fmt.Fprintln(p.stderr, "tallyman: note: "+report.Safe(note))
	}
	switch {
	case len(todo.Steps) == 0:
		fmt.Fprintln(p.stdout, nothing)
		return nil
	case check || dry:
		for _, s := range todo.Steps {
			fmt.Fprintln(p.stdout, "would "+report.Safe(s.Text))
		}
		if check {
			return errSaid
		}
		return nil
	}
	if err := todo.Run(c.Context, func(text string) { fmt.Fprintln(p.stdout, report.Safe(text)) }); err != nil {
		return err
	}
	fmt.Fprint(p.stdout, after)
	return nil
}
