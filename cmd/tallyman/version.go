package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"
)

// version and commit are set by the linker (-X main.version=...).
var version, commit string

// versionOf returns both, from what Go put into the binary where the linker was not told.
func versionOf() (v, c string) {
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

func versionLine() string {
	v, c := versionOf()
	return fmt.Sprintf("%s (commit %s, %s, %s/%s)", v, c, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func (p *program) versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Category: forShell, Usage: "print the version, the commit and what it was built with",
		Action: func(*cli.Context) error {
			_, err := fmt.Fprintln(p.stdout, "tallyman version "+versionLine())
			return err
		},
	}
}
