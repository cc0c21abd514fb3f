package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/desk/dashboards"
	"github.com/tallyman-ci/tallyman/desk/dataset"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/commandline"
)

func dashboardsCommand() *cli.Command {
	place := []cli.Flag{
		&cli.StringFlag{Name: "project", Usage: "the `PROJECT` that holds the data set"},
		&cli.StringFlag{Name: "dataset", Usage: "the `DATASET` that tallyman bq apply made"},
	}
	return &cli.Command{
		Name: "dashboards", Usage: "print the page's panels for Grafana or Looker Studio",
		Description: `The dashboards ask the views of a BigQuery data set the questions that the page of
tallyman-desk report answers. Nothing is sent anywhere: import what is printed.

Examples:
  tallyman-desk dashboards grafana > tallyman.json
  tallyman-desk dashboards grafana --project my-project --dataset tallyman > tallyman.json
  tallyman-desk dashboards looker --project my-project --dataset tallyman`,
		Subcommands: []*cli.Command{
			{
				Name: "grafana", Usage: "a dashboard for Grafana's BigQuery data source, as JSON", Flags: place,
				UsageText: "tallyman-desk dashboards grafana [--project PROJECT --dataset DATASET]",
				Action: func(c *cli.Context) error {
					project, name := c.String("project"), c.String("dataset")
					if (project == "") != (name == "") {
						return commandline.BadUsage(c, "give --project and --dataset, or neither: then the dashboard asks for them")
					}
					if project != "" {
						if _, err := dataset.Parse("bigquery://" + project + "/" + name); err != nil {
							return err
						}
					}
					text, err := dashboards.Grafana(panels.All(), project, name)
					if err != nil {
						return err
					}
					_, err = c.App.Writer.Write(text)
					return err
				},
			},
			{
				Name: "looker", Usage: "links that open the views in Looker Studio",
				UsageText: "tallyman-desk dashboards looker --project PROJECT --dataset DATASET [options]",
				Flags: append([]cli.Flag{
					&cli.StringFlag{Name: "billing-project", Usage: "the `PROJECT` that pays for the queries", DefaultText: "that of --project"},
				}, place...),
				Action: func(c *cli.Context) error {
					project, name, billing := c.String("project"), c.String("dataset"), c.String("billing-project")
					if project == "" || name == "" {
						return commandline.BadUsage(c, "looker wants --project and --dataset")
					}
					address := "bigquery://" + project + "/" + name
					if billing != "" {
						address += "?billing_project=" + billing
					}
					if _, err := dataset.Parse(address); err != nil {
						return err
					}
					for _, l := range dashboards.Looker(panels.All(), project, name, billing) {
						if _, err := fmt.Fprintf(c.App.Writer, "%s (%s)\n  %s\n", l.Title, l.View, l.URL); err != nil {
							return err
						}
					}
					return nil
				},
			},
		},
	}
}
