// Package clitest tests what every command of a program must have.
package clitest

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// Width is the number of columns that a line of help takes at most.
const Width = 100

// Walk goes through all commands of the app that make returns and fails t where one of
// them, or one of its flags, has no help, no variable that begins with prefix, too wide
// a line, or is not completed by a shell; or where the app does not name its commit.
func Walk(t *testing.T, prefix string, make func() *cli.App) {
	t.Helper()
	app := make()
	if !regexp.MustCompile(`^\S+ \(commit \S+, go1\.\S+, \w+/\w+\)$`).MatchString(app.Version) {
		t.Errorf("--version says %q", app.Version)
	}
	width(t, app.Name, app.CustomAppHelpTemplate)
	seen := map[string]string{}
	walk(t, prefix, make, nil, app.Commands, seen)
	if len(seen) < 20 {
		t.Errorf("only %d variables: was all of it walked?", len(seen))
	}
	var names []string
	for _, c := range app.Commands {
		names = append(names, c.Name)
	}
	for _, want := range []string{"version", "completion", "help"} {
		if !slices.Contains(names, want) {
			t.Errorf("there is no command %s", want)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script := run(t, make, "completion", shell)
		if !strings.Contains(script, app.Name) || strings.Contains(script, "PROGRAM") || strings.Contains(script, "FUNCTION") {
			t.Errorf("completion %s prints %q", shell, script)
		}
	}
}

func walk(t *testing.T, prefix string, make func() *cli.App, path []string, commands []*cli.Command, seen map[string]string) {
	t.Helper()
	var listed []string
	for line := range strings.Lines(run(t, make, append(slices.Clone(path), "--generate-bash-completion")...)) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), ":") // zsh gets a sentence behind it
		listed = append(listed, name)
	}
	for _, c := range commands {
		at := append(slices.Clone(path), c.Name)
		name := strings.Join(at, " ")
		if c.Usage == "" || c.CustomHelpTemplate == "" {
			t.Errorf("%s has no help", name)
		}
		if c.Hidden == slices.Contains(listed, c.Name) {
			t.Errorf("%s: hidden %v, and completion lists %q", name, c.Hidden, listed)
		}
		width(t, name, c.CustomHelpTemplate)
		flags := run(t, make, append(slices.Clone(at), "-", "--generate-bash-completion")...)
		for _, f := range c.Flags {
			long := "--" + f.Names()[0]
			doc := f.(cli.DocGenerationFlag)
			if !slices.Contains(strings.Fields(flags), long) && !hidden(f) {
				t.Errorf("%s: completion does not offer %s: %q", name, long, flags)
			}
			if doc.GetUsage() == "" || len(doc.GetEnvVars()) != 1 || !strings.HasPrefix(doc.GetEnvVars()[0], prefix) {
				t.Errorf("%s %s: usage %q, variables %v", name, long, doc.GetUsage(), doc.GetEnvVars())
				continue
			}
			// One variable means one thing in all commands.
			v := doc.GetEnvVars()[0]
			if before, ok := seen[v]; ok && before != long {
				t.Errorf("%s is %s and %s", v, before, long)
			}
			seen[v] = long
			if !strings.Contains(c.CustomHelpTemplate, "["+v+"]") {
				t.Errorf("%s: the help does not name %s", name, v)
			}
			if doc.TakesValue() && !strings.Contains(doc.GetUsage(), "`") {
				t.Errorf("%s %s: the help does not name its value: put it in backticks", name, long)
			}
		}
		if len(c.Subcommands) > 0 {
			walk(t, prefix, make, at, c.Subcommands, seen)
		}
	}
}

func hidden(f cli.Flag) bool {
	v, ok := f.(cli.VisibleFlag)
	return ok && !v.IsVisible()
}

func width(t *testing.T, name, help string) {
	t.Helper()
	for line := range strings.Lines(help) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > Width {
			t.Errorf("%s: a line of %d columns: %s", name, n, line)
		}
	}
}

// run runs a command line and returns what it printed. The library reads os.Args to
// complete.
func run(t *testing.T, make func() *cli.App, args ...string) string {
	t.Helper()
	app := make()
	var out bytes.Buffer
	app.Writer = &out
	before := os.Args
	os.Args = append([]string{app.Name}, args...)
	defer func() { os.Args = before }()
	if err := app.Run(os.Args); err != nil {
		t.Errorf("%s: %v", strings.Join(os.Args, " "), err)
	}
	return out.String()
}
