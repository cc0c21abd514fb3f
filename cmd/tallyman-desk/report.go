package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/commandline"
)

func reportCommand() *cli.Command {
	const which = "Which records"
	return &cli.Command{
		Name: "report", Usage: "answer from journals or BigQuery as one page of HTML", ArgsUsage: "[JOURNAL...]",
		Description: `Examples:
  tallyman-desk report --html account.html /var/log/tallyman
  tallyman-desk report --html week.html --since 7d -r 'acme/*' runner-*/journal requests.jsonl
  tallyman-desk report --html fleet.html --from bigquery://my-project/tallyman`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "since", Category: which, Usage: "only what happened since `TIME`: 2h, 7d, 2026-03-01, or RFC 3339"},
			&cli.StringFlag{Name: "until", Category: which, Usage: "only what happened before `TIME`"},
			&cli.StringFlag{Name: "repository", Aliases: []string{"r"}, Category: which, Usage: "only this `OWNER/NAME`; * at the end stands for any text, as in the next ones"},
			&cli.StringFlag{Name: "workflow", Aliases: []string{"w"}, Category: which, Usage: "only the workflow of this `NAME`"},
			&cli.StringFlag{Name: "image", Category: which, Usage: "only this `IMAGE`, where a question is about images"},
		}, append(pictureFlags(), storeFlags()...)...),
		Action: func(c *cli.Context) error {
			if !pictured(c) {
				return commandline.BadUsage(c, "report wants --html FILE (- is standard output)")
			}
			return picture(c, func(_ context.Context, paths []string) (panels.Stream, func() error, error) {
				s, err := openStore(c, paths, false)
				if err != nil {
					return nil, nil, err
				}
				return s, s.Close, nil
			})
		},
	}
}
