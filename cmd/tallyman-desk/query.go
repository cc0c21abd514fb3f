package main

import (
	"bufio"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/desk/store"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/report"
)

// storeFlags are the flags of all commands that read journals into a database.
func storeFlags() []cli.Flag {
	const category = "The database"
	return []cli.Flag{
		&cli.StringFlag{Name: "database", Category: category, TakesFile: true, Usage: "keep in `FILE` what was read, and read only what is new the next time"},
		&cli.StringFlag{Name: "owners", Category: category, Usage: "`FILE` that says which team owns which repositories: a pattern (acme/shop, acme/*) and a team on each line; the last that fits counts"},
		&cli.Int64Flag{Name: "memory", Category: category, Value: 2048, Usage: "`MiB` that the database may take before it writes to TMPDIR"},
		&cli.IntFlag{Name: "threads", Category: category, Usage: "use `N` processors; 0 uses all"},
	}
}

// openStore reads the journals that were named, and says on standard error what it could
// not read. With follow they are read on later.
func openStore(c *cli.Context, paths []string, follow bool) (*store.Store, error) {
	name := c.String("database")
	if len(paths) == 0 && name == "" {
		return nil, commandline.BadUsage(c, "%s wants a journal: a folder such as /var/lib/tallyman, or a file of records", c.Command.Name)
	}
	if c.Int64("memory") < 64 {
		return nil, commandline.BadUsage(c, "--memory wants 64 MiB or more")
	}
	o := store.Options{Memory: c.Int64("memory") << 20, Threads: c.Int("threads"), Stdin: c.App.Reader, Database: name, Follow: follow}
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
	for _, path := range s.Stats().Replaced {
		fmt.Fprintf(c.App.ErrWriter, "%s is another file than the one that %s has read there: it was read from its beginning, and the records of both are in the answers\n", report.Safe(path), report.Safe(name))
	}
	if s.Stats().Records == 0 { // as good as empty is any folder that is no journal
		fmt.Fprintf(c.App.ErrWriter, "there are no records in %s: is it a journal?\n", report.Safe(strings.Join(paths, ", ")))
	}
	return s, nil
}

// namedSources are what a page says that it is about.
func namedSources(c *cli.Context) []string {
	sources := c.Args().Slice()
	if name := c.String("database"); name != "" {
		sources = append(sources, "all in "+name)
	}
	return sources
}

func queryCommand() *cli.Command {
	return &cli.Command{
		Name: "query", Usage: "ask journals questions of your own, in SQL", ArgsUsage: "SQL|- JOURNAL...",
		Description: `Reads journals (folders) and files of records into a database, and runs one query in the SQL
of DuckDB. The records are in tallyman.records, with the columns of docs/record.md; views with
each record once stand beside them: --list names them with their questions, and DESCRIBE
tallyman.calls their columns. A query can read and write nothing else.

To read the journals takes longer than to answer. Where there are many questions, - reads
them from standard input, each up to a semicolon at the end of a line; --database keeps
what was read for the next call, and is asked alone where no journal is named.

Examples:
  tallyman-desk query 'SELECT image, pulls FROM tallyman.pulls_by_image' /var/lib/tallyman
  tallyman-desk query --format csv 'FROM tallyman.failed_pulls' runner-1/journal runner-2/journal
  tallyman-desk query - /var/lib/tallyman < questions.sql
  tallyman-desk query --database fleet.db 'FROM tallyman.lost' runner-*/journal
  tallyman-desk query --list`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "format", Value: "table", Usage: "`FORM` of the answer: table, csv or json (JSON Lines)"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "do not say on standard error how much of the truth the records hold"},
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
	form, ok := map[string]func(io.Writer) writer{"table": newTable, "csv": newCSV, "json": newJSON}[c.String("format")]
	if !ok {
		return commandline.BadUsage(c, "--format %s is not known: table, csv or json", report.Safe(c.String("format")))
	}
	sql, paths := c.Args().First(), c.Args().Tail()
	if sql != "-" && statement(sql) == "" {
		return commandline.BadUsage(c, "query wants SQL: tallyman-desk query 'SELECT ...' JOURNAL")
	}
	if sql == "-" && slices.Contains(paths, "-") {
		return commandline.BadUsage(c, "standard input holds the questions or the records, not both")
	}
	s, err := openStore(c, paths, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if !c.Bool("quiet") {
		if err := trust(c, s); err != nil {
			return err
		}
	}
	ask := func(sql string) error {
		w := form(c.App.Writer)
		return errors.Join(s.Each(c.Context, sql, w.head, w.row), w.flush())
	}
	if sql != "-" {
		return ask(statement(sql))
	}
	// One question that is wrong does not take the answers to the others.
	asked, wrong := 0, 0
	for sql, err := range statements(c.App.Reader) {
		if err != nil {
			return fmt.Errorf("read questions: %w", err)
		}
		asked++
		if err := ask(sql); err != nil {
			if c.Context.Err() != nil {
				return c.Context.Err()
			}
			wrong++
			fmt.Fprintf(c.App.ErrWriter, "question %d: %s\n", asked, report.Safe(err.Error()))
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d of %d questions were not answered", wrong, asked)
	}
	return nil
}

// trust says on standard error how much of the truth is in the answers.
func trust(c *cli.Context, s *store.Store) error {
	sql, params := panels.Parameters(panels.Trust().SQL, panels.DuckDB, panels.Filter{}.Always())
	t, err := s.Query(c.Context, sql, params...)
	if err != nil {
		return fmt.Errorf("ask how far the answers can be trusted: %w", err)
	}
	of := map[string]any{}
	for i, name := range t.Columns {
		of[name] = t.Rows[0][i]
	}
	jobs := fmt.Sprintf("%v of %v jobs recorded", of["recorded"], of["jobs"])
	if of["recorded"] == int64(0) && of["jobs"] != int64(0) { // "0 of 9" would read as if all were missing
		jobs = fmt.Sprintf("%v jobs known by records alone, none by the runner's hook", of["jobs"])
	}
	_, err = fmt.Fprintf(c.App.ErrWriter, "%s; job of a call known by: sealed %v, environment %v, inferred %v, none %v; %v records lost, %v holes of unknown size\n",
		jobs, of["sealed"], of["environment"], of["inferred"], of["none"], of["lost"], of["holes"])
	return err
}

// statement is SQL without the semicolon at its end.
func statement(sql string) string { return strings.TrimRight(strings.TrimSpace(sql), "; \t\r\n") }

// statements reads SQL that ends with a semicolon at the end of a line, or with the text.
func statements(r io.Reader) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		lines := bufio.NewReader(r)
		var sql strings.Builder
		for {
			line, err := lines.ReadString('\n')
			sql.WriteString(line)
			if err != nil && err != io.EOF {
				yield("", err)
				return
			}
			if err == io.EOF || strings.HasSuffix(strings.TrimSpace(line), ";") {
				if one := statement(sql.String()); one != "" && !yield(one, nil) {
					return
				}
				sql.Reset()
			}
			if err == io.EOF {
				return
			}
		}
	}
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
	case []any, map[string]any:
		if text, err := json.Marshal(v); err == nil {
			return string(report.SafeJSON(text))
		}
		return report.Safe(fmt.Sprint(v))
	default:
		return report.Safe(fmt.Sprint(v))
	}
}

// writer writes an answer row by row, so that a long one takes no memory.
type writer interface {
	head(columns []string) error
	row(values []any) error
	flush() error
}

// block is how many rows of a table are lined up with each other.
const block = 1000

type tableWriter struct {
	w    *tabwriter.Writer
	rows int
}

func newTable(w io.Writer) writer {
	return &tableWriter{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
}

func (t *tableWriter) head(columns []string) error {
	var names []string
	for _, c := range columns {
		names = append(names, report.Safe(c))
	}
	_, err := fmt.Fprintln(t.w, strings.Join(names, "\t"))
	return err
}

func (t *tableWriter) row(values []any) error {
	var cells []string
	for _, v := range values {
		cells = append(cells, cell(v))
	}
	_, err := fmt.Fprintln(t.w, strings.Join(cells, "\t"))
	if t.rows++; err == nil && t.rows%block == 0 {
		err = t.w.Flush()
	}
	return err
}

func (t *tableWriter) flush() error { return t.w.Flush() }

type csvWriter struct{ w *csv.Writer }

func newCSV(w io.Writer) writer { return csvWriter{csv.NewWriter(w)} }

func (c csvWriter) head(columns []string) error { return c.w.Write(columns) }

func (c csvWriter) row(values []any) error {
	cells := make([]string, len(values))
	for i, v := range values {
		cells[i] = cell(v)
	}
	return c.w.Write(cells)
}

func (c csvWriter) flush() error {
	c.w.Flush()
	return c.w.Error()
}

// jsonWriter writes JSON Lines, with the members in the order of the columns.
type jsonWriter struct {
	w     *bufio.Writer
	names [][]byte
}

func newJSON(w io.Writer) writer { return &jsonWriter{w: bufio.NewWriter(w)} }

func (j *jsonWriter) head(columns []string) error {
	for _, c := range columns {
		name, err := json.Marshal(c)
		if err != nil {
			return err
		}
		j.names = append(j.names, name)
	}
	return nil
}

func (j *jsonWriter) row(values []any) error {
	line := []byte{'{'}
	for i, v := range values {
		switch x := v.(type) {
		case time.Time:
			v = x.Format(time.RFC3339Nano)
		case float64:
			if math.IsNaN(x) || math.IsInf(x, 0) { // JSON has no such numbers
				v = fmt.Sprint(x)
			}
		}
		value, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("column %s: %w", j.names[i], err)
		}
		if i > 0 {
			line = append(line, ',')
		}
		line = append(append(append(line, j.names[i]...), ':'), value...)
	}
	_, err := j.w.Write(append(report.SafeJSON(append(line, '}')), '\n'))
	return err
}

func (j *jsonWriter) flush() error { return j.w.Flush() }
