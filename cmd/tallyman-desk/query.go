package main

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/desk/store"
	"github.com/tallyman-ci/tallyman/report"
)

// storeFlags are the flags of all commands that read journals into a database.
func storeFlags() []cli.Flag {
	const category = "The database"
	return []cli.Flag{
		&cli.StringFlag{Name: "owners", Category: category, Usage: "`FILE` that says which team owns which repositories: a pattern (acme/shop, acme/*) and a team on each line; the last that fits counts"},
		&cli.Int64Flag{Name: "memory", Category: category, Value: 2048, Usage: "`MiB` that the database may take before it writes to TMPDIR"},
		&cli.IntFlag{Name: "threads", Category: category, Usage: "processors to use; 0 uses all"},
	}
}

// openStore reads the journals that were named, and says on standard error what it could
// not read.
func openStore(c *cli.Context, paths []string) (*store.Store, error) {
	if len(paths) == 0 {
		return nil, fmt.Errorf("%s wants a journal: a folder such as /var/lib/tallyman, or a file of records", c.Command.Name)
	}
	if c.Int64("memory") < 64 {
		return nil, errors.New("--memory wants 64 MiB or more")
	}
	o := store.Options{Memory: c.Int64("memory") << 20, Threads: c.Int("threads"), Stdin: os.Stdin}
	if name := c.String("owners"); name != "" {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read owners: %w", err)
		}
		defer f.Close()
		o.Owners = f
	}
	s, err := store.Open(c.Context, paths, o)
	if err != nil {
		return nil, err
	}
	if st := s.Stats(); st.Unread > 0 {
		fmt.Fprintf(c.App.ErrWriter, "%d lines are no records and are in no answer; %d records are\n", st.Unread, st.Records)
	}
	return s, nil
}

func queryCommand() *cli.Command {
	return &cli.Command{
		Name: "query", Usage: "ask journals a question of your own, in SQL", ArgsUsage: "SQL JOURNAL...",
		Description: `Reads journals (folders) and files of records into a database, and runs one query in the SQL
of DuckDB. The records are in tallyman.records, with the columns of docs/record.md; the views
of docs/questions.md stand beside them and have each record once. The query can read and
write nothing else. --list names the views with their questions.

Examples:
  tallyman-desk query 'SELECT image, SUM(pulls) FROM tallyman.pulls_by_image GROUP BY 1 ORDER BY 2 DESC LIMIT 20' /var/lib/tallyman
  tallyman-desk query --format csv 'FROM tallyman.failed_pulls' runner-1/journal runner-2/journal
  tallyman-desk query --list`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "format", Value: "table", Usage: "`table`, csv or json (JSON Lines)"},
			&cli.BoolFlag{Name: "list", Usage: "list the views and their questions"},
		}, storeFlags()...),
		Action: query,
	}
}

func query(c *cli.Context) (err error) {
	if c.Bool("list") {
		w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
		for _, v := range bq.Views() {
			fmt.Fprintf(w, "tallyman.%s\t%s\n", v.Name, v.Question)
		}
		return w.Flush()
	}
	write, ok := map[string]func(io.Writer, panels.Table) error{"table": writeTable, "csv": writeCSV, "json": writeJSON}[c.String("format")]
	if !ok {
		return fmt.Errorf("--format %s is not known: table, csv or json", report.Safe(c.String("format")))
	}
	sql := strings.TrimRight(strings.TrimSpace(c.Args().First()), "; ")
	if sql == "" {
		return errors.New("query wants SQL: tallyman-desk query 'SELECT ...' JOURNAL")
	}
	s, err := openStore(c, c.Args().Tail())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	t, err := s.Query(c.Context, sql)
	if err != nil {
		return err
	}
	return write(c.App.Writer, t)
}

// cell is a value for people and for CSV. Whatever a record holds, no control character
// reaches a terminal.
func cell(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case time.Time:
		return v.Format("2006-01-02 15:04:05.999999")
	case string:
		return report.Safe(v)
	default:
		return report.Safe(fmt.Sprint(v))
	}
}

func writeTable(w io.Writer, t panels.Table) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(t.Columns, "\t"))
	for _, r := range t.Rows {
		for i, v := range r {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			fmt.Fprint(tw, cell(v))
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}

func writeCSV(w io.Writer, t panels.Table) error {
	cw := csv.NewWriter(w)
	if err := cw.Write(t.Columns); err != nil {
		return err
	}
	for _, r := range t.Rows {
		cells := make([]string, len(r))
		for i, v := range r {
			cells[i] = cell(v)
		}
		if err := cw.Write(cells); err != nil {
			return err
		}
	}
	cw.Flush()
	return cw.Error()
}

func writeJSON(w io.Writer, t panels.Table) error {
	for _, r := range t.Rows {
		var b strings.Builder
		for i, v := range r {
			if x, ok := v.(time.Time); ok {
				v = x.Format(time.RFC3339Nano)
			}
			name, err := json.Marshal(t.Columns[i])
			if err != nil {
				return err
			}
			value, err := json.Marshal(v)
			if err != nil {
				return fmt.Errorf("column %s: %w", t.Columns[i], err)
			}
			if i > 0 {
				b.WriteByte(',')
			}
			b.Write(name)
			b.WriteByte(':')
			b.Write(value)
		}
		line := append(report.SafeJSON([]byte("{"+b.String()+"}")), '\n')
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	return nil
}
