package commandline

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"
)

// Built returns version and commit of the program. They are what the linker was told
// (-X main.version=...), else what Go put into the binary.
func Built(version, commit string) (v, c string) {
	v, c = version, commit
	info, ok := debug.ReadBuildInfo()
	if ok && v == "" {
		v = info.Main.Version
	}
	modified := ""
	if ok && c == "" {
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				c = s.Value
			case "vcs.modified":
				if s.Value == "true" {
					modified = "-dirty"
				}
			}
		}
		if len(c) > 12 {
			c = c[:12]
		}
		c += modified
	}
	if v == "" || v == "(devel)" {
		v = "development"
	}
	if c == "" {
		c = "unknown"
	}
	return v, c
}

// Version is what --version says of the program.
func Version(version, commit string) string {
	v, c := Built(version, commit)
	return fmt.Sprintf("%s (commit %s, %s, %s/%s)", v, c, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func versionCommand(version string) *cli.Command {
	return &cli.Command{
		Name: "version", Category: ForShell, Usage: "print the version, the commit and what it was built with",
		Action: func(c *cli.Context) error {
			_, err := fmt.Fprintln(c.App.Writer, c.App.Name+" version "+version)
			return err
		},
	}
}
