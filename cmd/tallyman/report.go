package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/report"
)

func (p *program) reportCommand() *cli.Command {
	const filters, output = "Which records", "Output"
	var kinds []string
	for _, k := range report.Kinds() {
		kinds = append(kinds, string(k))
	}
	return &cli.Command{
		Name: "report", Category: forPeople, Usage: "answer from the journal: who called docker, what was pulled and run, what failed",
		ArgsUsage: "[JOURNAL...]",
		UsageText: "tallyman report [options] [JOURNAL...]",
		Description: `Reads the journal of this runner, or the JOURNALs named: folders, files of JSON
Lines, or - for stdin. Beside every figure stands how far it can be trusted.

Examples:
  tallyman report --since 2h
  tallyman report --since 2026-03-01 --until 2026-03-02T12:00:00Z --top 20
  tallyman report --repository acme/web --job test
  tallyman report --workflow 'Nightly*' --markdown > nightly.md
  tallyman report --json | jq '.failed_pulls.rows[] | {image, job, failures}'
  tallyman report copies/*.jsonl`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "since", Category: filters, EnvVars: []string{"TALLYMAN_REPORT_SINCE"},
				Usage: "only what happened since `TIME`: 2h, 7d, 2026-03-01, or RFC 3339"},
			&cli.StringFlag{Name: "until", Category: filters, EnvVars: []string{"TALLYMAN_REPORT_UNTIL"},
				Usage: "only what happened before `TIME`"},
			&cli.StringSliceFlag{Name: "repository", Aliases: []string{"r"}, Category: filters, EnvVars: []string{"TALLYMAN_REPORT_REPOSITORY"},
				Usage: "only this `OWNER/NAME`; * stands for any text; may be repeated, as the next ones"},
			&cli.StringSliceFlag{Name: "workflow", Aliases: []string{"w"}, Category: filters, EnvVars: []string{"TALLYMAN_REPORT_WORKFLOW"},
				Usage: "only the workflow of this `NAME`"},
			&cli.StringSliceFlag{Name: "job", Aliases: []string{"j"}, Category: filters, EnvVars: []string{"TALLYMAN_REPORT_JOB"},
				Usage: "only the job of this `KEY`, display name or numeric id"},
			&cli.StringSliceFlag{Name: "run", Category: filters, EnvVars: []string{"TALLYMAN_REPORT_RUN"},
				Usage: "only the workflow run of this `ID`, or one attempt of it: ID/2"},
			&cli.StringSliceFlag{Name: "kind", Category: filters, EnvVars: []string{"TALLYMAN_REPORT_KIND"},
				Usage: "only records of this `KIND`: " + strings.Join(kinds, ", ")},
			&cli.IntFlag{Name: "top", Aliases: []string{"n"}, Category: output, EnvVars: []string{"TALLYMAN_REPORT_TOP"}, Value: report.DefaultTop,
				Usage: "show the first `N` rows of each table"},
			&cli.BoolFlag{Name: "json", Category: output, EnvVars: []string{"TALLYMAN_REPORT_JSON"},
				Usage: "write one JSON object, whose form is stable"},
			&cli.BoolFlag{Name: "markdown", Category: output, EnvVars: []string{"TALLYMAN_REPORT_MARKDOWN"},
				Usage: "write GitHub Flavored Markdown"},
			&cli.BoolFlag{Name: "summary", Category: output, EnvVars: []string{"TALLYMAN_REPORT_SUMMARY"},
				Usage: "write the few lines that the hook adds to a job's page; nothing where docker was not used"},
			&cli.IntFlag{Name: "width", Category: output, EnvVars: []string{"TALLYMAN_REPORT_WIDTH"},
				Usage: "fit tables into `N` columns and draw bars, as on a terminal; 0 does neither", DefaultText: "the terminal's"},
		}, placeFlags()...),
		Action: p.report,
	}
}

func (p *program) report(c *cli.Context) error {
	now := time.Now()
	o := report.Options{
		Top: c.Int("top"),
		Filter: report.Filter{
			Repositories: list(c, "repository"), Workflows: list(c, "workflow"), Jobs: list(c, "job"), Runs: list(c, "run"),
		},
		Now: func() time.Time { return now },
	}
	if o.Top < 1 {
		return commandline.BadUsage(c, "--top %d: show one row at least", o.Top)
	}
	for _, k := range list(c, "kind") {
		o.Filter.Kinds = append(o.Filter.Kinds, record.Kind(k))
	}
	formats := 0
	for _, f := range []string{"json", "markdown", "summary"} {
		if c.Bool(f) {
			formats++
		}
	}
	if formats > 1 {
		return commandline.BadUsage(c, "choose one of --json, --markdown and --summary")
	}
	for flag, field := range map[string]*time.Time{"since": &o.From, "until": &o.To} {
		t, err := report.ParseTime(c.String(flag), now)
		if err != nil {
			return commandline.BadUsage(c, "--%s: %v", flag, err)
		}
		*field = t
	}
	if err := o.Check(); err != nil {
		return commandline.BadUsage(c, "%v", err)
	}
	paths := c.Args().Slice()
	if len(paths) == 0 {
		cfg, err := p.loadConfig(c)
		if err != nil {
			return err
		}
		paths = []string{cfg.Journal()}
	}
	sources, done, err := report.OpenPaths(paths, o.From, p.stdin)
	if err != nil {
		return err
	}
	defer done()
	r, err := report.Build(c.Context, sources, o)
	if err != nil {
		return err
	}
	switch {
	case c.Bool("json"):
		err = r.JSON(p.stdout)
	case c.Bool("markdown"):
		err = r.Markdown(p.stdout)
	case c.Bool("summary"):
		err = report.Summary(p.stdout, r)
	default:
		width := c.Int("width")
		if !c.IsSet("width") {
			width = terminalWidth(p.stdout)
		}
		err = r.Terminal(p.stdout, report.TerminalOptions{Width: width})
	}
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// list are the values of a flag that may be repeated. An empty one is none: a
// variable that is set to nothing must not ask for jobs without a name.
func list(c *cli.Context, flag string) []string {
	return slices.DeleteFunc(c.StringSlice(flag), func(v string) bool { return v == "" })
}

// terminalWidth is the number of columns of w, or 0 for what is no terminal.
func terminalWidth(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	if ws.Col == 0 {
		return 80 // a terminal that does not know its size, as under some test drivers
	}
	return int(ws.Col)
}
