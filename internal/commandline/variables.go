package commandline

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

// Variables gives every flag of the commands that has none a variable of the
// environment: prefix, the command's path and the flag's name, apart by underscores, as
// in TALLYMAN_DESK_BLAME_CSV. Flags that commands share become each command's own.
func Variables(prefix string, commands []*cli.Command) {
	for _, c := range commands {
		path := prefix + "_" + variable(c.Name)
		flags := make([]cli.Flag, 0, len(c.Flags))
		for _, f := range c.Flags {
			flags = append(flags, withVariable(f, path+"_"+variable(f.Names()[0])))
		}
		c.Flags = flags
		Variables(path, c.Subcommands)
	}
}

func variable(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }

func withVariable(flag cli.Flag, name string) cli.Flag {
	if f, ok := flag.(cli.DocGenerationFlag); ok && len(f.GetEnvVars()) > 0 {
		return flag
	}
	switch f := flag.(type) {
	case *cli.StringFlag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	case *cli.StringSliceFlag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	case *cli.BoolFlag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	case *cli.IntFlag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	case *cli.Int64Flag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	case *cli.Uint64Flag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	case *cli.DurationFlag:
		own := *f
		own.EnvVars = []string{name}
		return &own
	}
	panic(fmt.Sprintf("commandline: no variable for a %T", flag)) // any start of the program would show it
}
