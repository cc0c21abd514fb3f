package commandline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// The help is made here and not from the library's templates, which put a flag with
// all its names, its sentence and its variable on one line of any length.
const (
	helpWidth  = 90 // columns
	helpIndent = 26 // where sentences begin
)

// setHelp gives every command its help text.
func setHelp(app *cli.App) {
	var b strings.Builder
	head(&b, app.Name, app.Usage, app.UsageText, "")
	helpCommands(&b, app.Commands)
	fmt.Fprintf(&b, "\n%s\n", app.Description)
	fmt.Fprint(&b, "\nEach option can also be set by the variable behind it. '"+app.Name+" COMMAND --help' tells more.\n"+
		"Exit codes: 0 done, 1 it went wrong, 2 the command line makes no sense.\n")
	app.CustomAppHelpTemplate = literally(b.String())
	for _, c := range app.Commands {
		setCommandHelp(c, app.Name)
	}
}

func setCommandHelp(c *cli.Command, parent string) {
	path := parent + " " + c.Name
	text := c.UsageText
	if text == "" {
		text = strings.TrimSpace(path + " [options] " + c.ArgsUsage)
		if len(c.Subcommands) > 0 {
			text = path + " <command> [options]"
		}
	}
	var b strings.Builder
	head(&b, path, c.Usage, text, c.Description)
	helpCommands(&b, c.Subcommands)
	helpFlags(&b, c.Flags)
	c.CustomHelpTemplate = literally(b.String())
	for _, sub := range c.Subcommands {
		setCommandHelp(sub, path)
	}
}

// literally makes a template that says text.
func literally(text string) string { return strings.ReplaceAll(text, "{{", "{{`{{`}}") }

func head(b *strings.Builder, name, usage, usageText, description string) {
	fmt.Fprintf(b, "%s - %s\n\nUsage: %s\n", name, usage, usageText)
	if description != "" {
		fmt.Fprintf(b, "\n%s\n", description)
	}
}

func helpCommands(b *strings.Builder, commands []*cli.Command) {
	var categories []string
	for _, c := range commands {
		if !c.Hidden && !slices.Contains(categories, c.Category) {
			categories = append(categories, c.Category)
		}
	}
	for _, category := range categories {
		title := category
		if title == "" {
			title = "Commands"
		}
		fmt.Fprintf(b, "\n%s:\n", title)
		for _, c := range commands {
			if !c.Hidden && c.Category == category {
				entry(b, c.Name, c.Usage, 18)
			}
		}
	}
}

// helpFlags lists flags under their categories, in the order in which they were declared.
func helpFlags(b *strings.Builder, flags []cli.Flag) {
	var categories []string
	byCategory := map[string][]cli.DocGenerationFlag{}
	for _, f := range flags {
		doc, ok := f.(cli.DocGenerationFlag)
		if !ok {
			continue
		}
		category := "Options"
		if c, ok := f.(cli.CategorizableFlag); ok && c.GetCategory() != "" {
			category = c.GetCategory()
		}
		if !slices.Contains(categories, category) {
			categories = append(categories, category)
		}
		byCategory[category] = append(byCategory[category], doc)
	}
	for _, category := range categories {
		fmt.Fprintf(b, "\n%s:\n", category)
		for _, f := range byCategory[category] {
			helpFlag(b, f)
		}
	}
}

func helpFlag(b *strings.Builder, f cli.DocGenerationFlag) {
	var short, long []string
	for _, n := range f.Names() {
		if len(n) == 1 {
			short = append(short, "-"+n)
		} else {
			long = append(long, "--"+n)
		}
	}
	name := strings.Join(append(short, long...), ", ")
	// The word in backticks stands for the value.
	before, rest, _ := strings.Cut(f.GetUsage(), "`")
	value, after, named := strings.Cut(rest, "`")
	usage := before + value + after
	if f.TakesValue() {
		if !named {
			value, usage = "VALUE", f.GetUsage()
		}
		name += " " + value
		if d := f.GetDefaultText(); d != "" {
			usage += " (default " + strings.Trim(d, `"`) + ")"
		}
	}
	for _, e := range f.GetEnvVars() {
		usage += " [" + e + "]"
	}
	entry(b, name, usage, helpIndent)
}

// entry writes a name and its sentence, wrapped at helpWidth and indented.
func entry(b *strings.Builder, name, usage string, indent int) {
	line := "  " + name
	if len(line) > indent-2 {
		fmt.Fprintln(b, line)
		line = ""
	}
	line += strings.Repeat(" ", indent-len(line))
	empty := true
	for word := range strings.FieldsSeq(usage) {
		if !empty && len(line)+1+len(word) > helpWidth {
			fmt.Fprintln(b, line)
			line, empty = strings.Repeat(" ", indent), true
		}
		if !empty {
			line += " "
		}
		line += word
		empty = false
	}
	fmt.Fprintln(b, line)
}

// helpCommand is `help [COMMAND...]`.
func helpCommand() *cli.Command {
	return &cli.Command{
		Name: "help", Category: ForShell, Usage: "tell of a command and its options", ArgsUsage: "[COMMAND...]",
		Action: func(c *cli.Context) error {
			commands, text := c.App.Commands, c.App.CustomAppHelpTemplate
			for _, name := range c.Args().Slice() {
				i := slices.IndexFunc(commands, func(k *cli.Command) bool { return k.Name == name })
				if i < 0 {
					return BadUsage(c, "there is no command %q%s", name, DidYouMean(nearestCommand(name, commands)))
				}
				commands, text = commands[i].Subcommands, commands[i].CustomHelpTemplate
			}
			_, err := fmt.Fprint(c.App.Writer, strings.ReplaceAll(text, "{{`{{`}}", "{{"))
			return err
		},
	}
}
