//go:build !slim && !nobq

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/bq/apply"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/internal/nearest"
	"github.com/tallyman-ci/tallyman/report"
)

const forFleet = "For the fleet"

// bqCommands is `tallyman bq`. `go build -tags slim` leaves it out: it is for the desk of
// whoever sets up the fleet's tables, not for runners.
func (p *program) bqCommands() []*cli.Command {
	return []*cli.Command{{
		Name: "bq", Category: forFleet, Usage: "make the fleet's tables and views in BigQuery, and what fills them",
		Description: `Examples:
  tallyman bq apply --project acme-ci --dataset tallyman --dry-run
  tallyman bq terraform --project acme-ci --dataset tallyman > tallyman.tf
  tallyman bq views`,
		Subcommands: []*cli.Command{p.bqApply(), p.bqTerraform(), p.bqRefresh(), p.bqOwners(), p.bqViews()},
	}}
}

// bqPlace are the flags that say where the tables are.
func bqPlace() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "project", EnvVars: []string{"TALLYMAN_BQ_PROJECT"}, Usage: "the Google Cloud project of this `ID`"},
		&cli.StringFlag{Name: "dataset", EnvVars: []string{"TALLYMAN_BQ_DATASET"}, Value: "tallyman", Usage: "the BigQuery data set of this `NAME`"},
	}
}

func bqFlags() []cli.Flag {
	return append(bqPlace(),
		&cli.StringFlag{Name: "location", EnvVars: []string{"TALLYMAN_BQ_LOCATION"}, Usage: "where a new data set is, for good: US, EU, europe-west1 (`PLACE`; default US)"},
		&cli.StringFlag{Name: "topic", EnvVars: []string{"TALLYMAN_BQ_TOPIC"}, Usage: "the Pub/Sub topic of this `NAME`, to which the runners publish (default tallyman)"},
		&cli.StringFlag{Name: "subscription", EnvVars: []string{"TALLYMAN_BQ_SUBSCRIPTION"}, Usage: "the subscription of this `NAME`, which writes to BigQuery (default the topic's name and -to-bigquery)"},
		&cli.StringFlag{Name: "dead-letter", EnvVars: []string{"TALLYMAN_BQ_DEAD_LETTER"}, Usage: "topic and subscription of this `NAME`, for what could not be written (default the subscription's name and -dead)"},
		&cli.StringFlag{Name: "expiration", EnvVars: []string{"TALLYMAN_BQ_EXPIRATION"}, Usage: "how long records stay (`DAYS`): 90d, or never (default 90d in a new table; another is left as it is)"},
		&cli.StringFlag{Name: "runners", EnvVars: []string{"TALLYMAN_BQ_RUNNERS"}, Usage: "who publishes, as an IAM `MEMBER`: serviceAccount:NAME@PROJECT.iam.gserviceaccount.com"},
		&cli.StringFlag{Name: "project-number", EnvVars: []string{"TALLYMAN_BQ_PROJECT_NUMBER"}, Usage: "the project's `NUMBER`, which is part of the name of Pub/Sub's service agent (default: gcloud is asked for it when you run the printed commands)"},
	)
}

func bqOptions(c *cli.Context) (bq.Options, error) {
	o := bq.Options{
		Project: c.String("project"), Dataset: c.String("dataset"), Location: c.String("location"), Topic: c.String("topic"),
		Subscription: c.String("subscription"), DeadLetter: c.String("dead-letter"), Runners: c.String("runners"), Number: c.String("project-number"),
	}
	if o.Project == "" {
		return o, commandline.BadUsage(c, "%s needs --project", c.Command.HelpName)
	}
	var err error
	if text := c.String("expiration"); text != "" {
		if o.Expiration, err = bq.ParseExpiration(text); err != nil {
			return o, commandline.BadUsage(c, "--expiration: %v", err)
		}
	}
	if o, err = o.Complete(); err != nil {
		return o, commandline.BadUsage(c, "%v", err)
	}
	return o, nil
}

func (p *program) bqApply() *cli.Command {
	return &cli.Command{
		Name: "apply", Usage: "make or evolve tables, views, topic and subscriptions",
		Description: `Prints a plan and carries it out. Nothing is deleted, columns are only added, and a second
run finds nothing to do; what was cut short is finished by the next run. Beside the
plan stand the grants that are missing, as commands to run: it gives none itself.
Credentials are Google's application default ones.

Examples:
  tallyman bq apply --project acme-ci --dry-run
  tallyman bq apply --project acme-ci --dataset tallyman --location EU \
    --runners serviceAccount:runners@acme-ci.iam.gserviceaccount.com`,
		Flags: append(bqFlags(), &cli.BoolFlag{Name: "dry-run", EnvVars: []string{"TALLYMAN_BQ_DRY_RUN"}, Usage: "print the plan, and do nothing"}),
		Action: func(c *cli.Context) (err error) {
			o, err := bqOptions(c)
			if err != nil {
				return err
			}
			clients, err := apply.Connect(c.Context, p.variable("BIGQUERY_EMULATOR_HOST"), p.variable("PUBSUB_EMULATOR_HOST"))
			if err != nil {
				return err
			}
			defer func() {
				if err != nil && c.Context.Err() == nil {
					err = p.sayLines(err)
				}
				if closing := clients.Close(); err == nil {
					err = closing
				}
			}()
			plan, err := apply.New(c.Context, clients, o)
			if err != nil {
				return err
			}
			p.bqPlan(plan)
			switch {
			case c.Bool("dry-run"):
				fmt.Fprintln(p.stdout, "\nThis was the plan; nothing was done.")
				return nil
			case plan.Pending():
				fmt.Fprintln(p.stdout)
			}
			tables := false
			err = plan.Run(c.Context, func(s apply.Step) {
				tables = tables || s.Action == apply.Create && s.What == "table"
				fmt.Fprintf(p.stdout, "%sd %s %s\n", s.Action, s.What, report.Safe(s.Name))
			})
			if err == nil {
				fmt.Fprintln(p.stdout, "\nEverything is there.")
			}
			if err == nil && tables {
				fmt.Fprintln(p.stdout, "The answers are empty until a scheduled query fills their tables: tallyman bq refresh --help")
			}
			return err
		},
	}
}

// sayLines prints an error of several lines, each of them made safe.
func (p *program) sayLines(err error) error {
	for i, line := range strings.Split(err.Error(), "\n") {
		if i == 0 || !strings.HasPrefix(line, " ") {
			line = "tallyman: " + line
		}
		fmt.Fprintln(p.stderr, report.Safe(line))
	}
	return errSaid
}

// bqPlan prints what there is to do, and what is not the plan's to do.
func (p *program) bqPlan(plan *apply.Plan) {
	w := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	for _, s := range plan.Steps {
		fmt.Fprintf(w, "%s\t%s\t%s", s.Action, s.What, report.Safe(s.Name))
		if len(s.Details) > 0 {
			fmt.Fprintf(w, "\t%s", report.Safe(strings.Join(s.Details, "; ")))
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush() // as all of stdout
	for _, n := range plan.Notes {
		fmt.Fprintln(p.stdout, "\nNote: "+report.Safe(n))
	}
	if len(plan.Grants) == 0 {
		return
	}
	fmt.Fprint(p.stdout, "\nMissing grants, unless the whole project or a group gives them. Once the resources are there, run:\n")
	unknown := false
	for _, g := range plan.Grants {
		unsure := ""
		if g.Unsure {
			unsure = " (you may not read what is granted: perhaps it is)"
		}
		fmt.Fprintf(p.stdout, "  # %s%s\n  %s\n", report.Safe(g.Why), unsure, report.Safe(g.Command))
		unknown = unknown || g.Member == bq.MemberUnknown
	}
	if unknown {
		fmt.Fprintf(p.stdout, "%s stands for the account: --runners names that of the runners, and yours is user:NAME@EXAMPLE.COM or a serviceAccount.\n", bq.MemberUnknown)
	}
}

func (p *program) bqTerraform() *cli.Command {
	return &cli.Command{
		Name: "terraform", Usage: "print what apply makes as a Terraform configuration, the grants included",
		Description: `Examples:
  tallyman bq terraform --project acme-ci > tallyman.tf && terraform plan`,
		Flags: bqFlags(),
		Action: func(c *cli.Context) error {
			o, err := bqOptions(c)
			if err != nil {
				return err
			}
			text, err := bq.Terraform(o)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(p.stdout, text)
			return err
		},
	}
}

func (p *program) bqRefresh() *cli.Command {
	return &cli.Command{
		Name: "refresh", Usage: "print the script that brings the kept answers up to date",
		Description: `The views read answers that are kept in tables. The script takes the records of the last
days anew; run it by a scheduled query, and once for all days that there are.

Examples:
  tallyman bq refresh --project acme-ci --days 90 > all.sql
  bq query --project_id=acme-ci --use_legacy_sql=false < all.sql`,
		Flags: append(bqPlace(), &cli.IntFlag{Name: "days", EnvVars: []string{"TALLYMAN_BQ_DAYS"}, Value: 2, Usage: "the last `N` days, and today"}),
		Action: func(c *cli.Context) error {
			o, err := bqOptions(c)
			if err != nil {
				return err
			}
			if n := c.Int("days"); n < 1 || n > 4000 {
				return commandline.BadUsage(c, "--days: want 1 to 4000, not %d", n)
			}
			_, err = fmt.Fprint(p.stdout, bq.RefreshScript(o.Project, o.Dataset, c.Int("days")))
			return err
		},
	}
}

func (p *program) bqOwners() *cli.Command {
	return &cli.Command{
		Name: "owners", Usage: "print the script that says which team owns which repositories", ArgsUsage: "FILE",
		Description: `FILE (- is standard input) has a pattern and a team on each line: acme/shop or acme/*, and a name.
The last line that fits a repository counts; # begins a comment. The script puts these rules in the
place of those that are there, for the views teams and traffic_by_team.

Examples:
  tallyman bq owners --project acme-ci OWNERS | bq query --project_id=acme-ci --use_legacy_sql=false`,
		Flags: bqPlace(),
		Action: func(c *cli.Context) error {
			o, err := bqOptions(c)
			if err != nil {
				return err
			}
			if c.NArg() != 1 {
				return commandline.BadUsage(c, "%s wants one file", c.Command.HelpName)
			}
			in := p.stdin
			if name := c.Args().First(); name != "-" {
				f, err := os.Open(name)
				if err != nil {
					return fmt.Errorf("read owners: %w", err)
				}
				defer f.Close()
				in = f
			}
			owners, err := bq.ParseOwners(in)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(p.stdout, bq.OwnersScript(o.Project, o.Dataset, owners))
			return err
		},
	}
}

func (p *program) bqViews() *cli.Command {
	return &cli.Command{
		Name: "views", Usage: "print the views: name, question and SQL", ArgsUsage: "[NAME...]",
		Description: `Examples:
  tallyman bq views                        all of them
  tallyman bq views pulls_by_image         one`,
		Flags: []cli.Flag{&cli.BoolFlag{Name: "names", EnvVars: []string{"TALLYMAN_BQ_NAMES"}, Usage: "names and questions only"}},
		Action: func(c *cli.Context) error {
			views := bq.Views()
			var known []string
			for _, v := range views {
				known = append(known, v.Name)
			}
			wanted := c.Args().Slice()
			for _, name := range wanted {
				if !slices.Contains(known, name) {
					return commandline.BadUsage(c, "there is no view %q%s", name, commandline.DidYouMean(nearest.Word(name, known)))
				}
			}
			for _, v := range views {
				switch {
				case len(wanted) > 0 && !slices.Contains(wanted, v.Name):
					continue
				case c.Bool("names"):
					fmt.Fprintf(p.stdout, "%-20s %s\n", v.Name, v.Question)
					continue
				}
				kept := ""
				if v.Table {
					kept = " (kept in a table)"
				}
				fmt.Fprintf(p.stdout, "-- %s%s\n-- %s\n%s;\n\n", v.Name, kept, v.Description(), v.SQL)
			}
			return nil
		},
	}
}
