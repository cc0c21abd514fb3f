package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/report"
)

// importCommand makes records of what others wrote down of the same traffic.
func importCommand() *cli.Command {
	to := []cli.Flag{
		&cli.StringFlag{Name: "to", Value: "-", Usage: "write the records to `PLACE`: a new file, a journal (a folder, or a name with / at its end), or - for standard output"},
		&cli.Int64Flag{Name: "max-bad", Usage: "exit 0 with up to `N` bad rows; all rows are read in any case"},
		&cli.StringFlag{Name: "bad", Usage: "list all bad rows in `FILE`; without it the first 20 are shown"},
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "say nothing of what went well"},
	}
	table := func(map_ bool) []cli.Flag {
		column := &cli.StringSliceFlag{Name: "column", Usage: "`FIELD=HEADING`, or FIELD=#3 for the third column; FIELD= for none; may be repeated. Fields: " + strings.Join(importer.Fields(), " ")}
		if map_ {
			column.Name, column.Aliases = "map", []string{"column"}
		}
		return append([]cli.Flag{
			column,
			&cli.StringFlag{Name: "time-format", Usage: "`FORM` of the times: rfc3339, unix, unix-ms, unix-us, unix-ns, '%Y-%m-%d %H:%M:%S' or '2006-01-02 15:04:05'; without it, found out"},
			&cli.StringFlag{Name: "timezone", Value: "UTC", Usage: "`ZONE` of times that name none, such as Europe/Berlin"},
			&cli.StringFlag{Name: "delimiter", Usage: "`CHARACTER` between cells (tab for a tab); without it, found out"},
			&cli.StringFlag{Name: "host", Usage: "`HOST` of requests whose row names none"},
		}, to...)
	}
	join := []cli.Flag{
		&cli.StringSliceFlag{Name: "records", Aliases: []string{"journal"}, Usage: "join the rows to the jobs in `PATH`, a journal or a file of records; may be repeated"},
		&cli.DurationFlag{Name: "slack", Value: 2 * time.Minute, Usage: "the clocks of runners and registry may be `TIME` apart"},
		&cli.StringSliceFlag{Name: "token", Usage: "`NAME=PATTERN`: only repositories like PATTERN (acme/*) hold the access token NAME; may be repeated"},
	}
	rows := func(f importer.Format) cli.ActionFunc {
		return func(c *cli.Context) error { return importTables(c, f) }
	}
	return &cli.Command{
		Name:      "import",
		Usage:     "make records of request logs, usage exports and Worker logs",
		ArgsUsage: " ",
		Description: `Examples:
  tallyman-desk import github-csv --to requests.jsonl requests.csv.gz
  tallyman-desk import dockerhub-csv --records /var/log/tallyman --to hub.jsonl usage.csv
  tallyman-desk import worker-log --to before.jsonl /home/runner/_diag
  tallyman-desk import csv --map time=when --map url=target --to other.jsonl other.csv`,
		Subcommands: []*cli.Command{
			{Name: "github-csv", Usage: "request tables that GitHub's support hands out", ArgsUsage: "FILE...", Flags: table(false), Action: rows(importer.GitHubCSV)},
			{Name: "dockerhub-csv", Usage: "Docker Hub's usage export, joined to jobs with --records", ArgsUsage: "FILE...", Flags: append(table(false), join...), Action: rows(importer.DockerHubCSV)},
			{Name: "csv", Usage: "any table of requests", ArgsUsage: "FILE...", Flags: table(true), Action: rows(importer.CSV)},
			{Name: "jsonl", Usage: "JSON Lines, one request each", ArgsUsage: "FILE...", Flags: table(true), Action: rows(importer.JSONL)},
			{Name: "worker-log", Usage: "the runner's logs of jobs that ran before the installation", ArgsUsage: "FILE|FOLDER...", Flags: to, Action: importWorkerLogs},
		},
	}
}

// intake is what one import counts and where it writes.
type intake struct {
	c       *cli.Context
	say     io.Writer // nothing where it shall be quiet
	out     *destination
	bad     *bufio.Writer // nil: none is wanted
	line    []byte
	rows    int64
	records int64
	badRows int64
	shown   int64
}

const maxShown = 20

// startImport opens the places of output.
func startImport(c *cli.Context) (*intake, func() error, error) {
	if !c.Args().Present() {
		return nil, nil, commandline.BadUsage(c, "import %s wants a file (- is standard input)", c.Command.Name)
	}
	in := &intake{c: c, say: c.App.ErrWriter}
	if c.Bool("quiet") {
		in.say = io.Discard
	}
	var badFile *os.File
	if name := c.String("bad"); name != "" {
		f, err := os.Create(name)
		if err != nil {
			return nil, nil, err
		}
		badFile, in.bad = f, bufio.NewWriter(f)
	}
	out, err := openDestination(c.String("to"), c.App.Writer)
	if err != nil {
		if badFile != nil {
			badFile.Close()
		}
		return nil, nil, err
	}
	in.out = out
	return in, func() error {
		var err error
		if badFile != nil {
			err = errors.Join(in.bad.Flush(), badFile.Close())
		}
		return errors.Join(err, out.abandon())
	}, nil
}

func (in *intake) record(r *record.Record) error {
	in.rows++
	in.records++
	in.line = record.Append(in.line[:0], r)
	return in.out.write(in.line)
}

func (in *intake) badRow(file string, err error) error {
	in.rows++
	in.badRows++
	text := report.Safe(file + ": " + err.Error())
	if in.bad != nil {
		_, err := fmt.Fprintln(in.bad, text)
		return err
	}
	if in.shown++; in.shown <= maxShown {
		fmt.Fprintln(in.c.App.ErrWriter, text)
	}
	return nil
}

// end puts the output into its place and says what became of the rows.
func (in *intake) end(what string) error {
	if err := in.out.finish(); err != nil {
		return err
	}
	if in.bad == nil && in.shown > maxShown {
		fmt.Fprintf(in.c.App.ErrWriter, "and %d more (--bad FILE lists all)\n", in.shown-maxShown)
	}
	if in.badRows > in.c.Int64("max-bad") {
		return fmt.Errorf("%d of %d %s are bad; the %d records of the others were written", in.badRows, in.rows, what, in.records)
	}
	return nil
}

func importTables(c *cli.Context, format importer.Format) (err error) {
	o, err := tableOptions(c, format)
	if err != nil {
		return err
	}
	var join *importer.Join
	if paths := c.StringSlice("records"); len(paths) > 0 {
		if join, err = readJobs(c, paths); err != nil {
			return err
		}
	} else if len(c.StringSlice("token")) > 0 {
		return commandline.BadUsage(c, "--token needs --records: without jobs nothing is joined")
	}
	in, closeAll, err := startImport(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	for _, name := range c.Args().Slice() {
		before := *in
		o.OnLayout = func(l importer.Layout) { sayLayout(in.say, name, l) }
		if err := importTable(c.Context, in, name, o, join); err != nil {
			return fmt.Errorf("%s: %w", report.Safe(name), err)
		}
		fmt.Fprintf(in.say, "%s: %d rows, %d records, %d bad rows\n", report.Safe(name), in.rows-before.rows, in.records-before.records, in.badRows-before.badRows)
	}
	err = in.end("rows")
	if join != nil {
		sayJoin(in.say, join)
	}
	return err
}

func importTable(ctx context.Context, in *intake, name string, o importer.Options, join *importer.Join) error {
	f, err := openInput(name, in.c.App.Reader)
	if err != nil {
		return err
	}
	defer f.Close()
	for r, err := range importer.Requests(ctx, f, o) {
		var bad *importer.BadRow
		switch {
		case errors.As(err, &bad):
			err = in.badRow(name, bad)
		case err == nil:
			if join != nil {
				join.Explain(r)
			}
			err = in.record(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func openInput(name string, stdin io.Reader) (io.ReadCloser, error) {
	if name == "-" {
		return io.NopCloser(stdin), nil
	}
	return os.Open(name)
}

func tableOptions(c *cli.Context, format importer.Format) (o importer.Options, err error) {
	o = importer.Options{Format: format, TimeFormat: c.String("time-format"), Host: c.String("host"), Columns: map[string]string{}}
	pairs := c.StringSlice("column")
	if format == importer.CSV || format == importer.JSONL {
		pairs = c.StringSlice("map")
	}
	for _, pair := range pairs {
		field, heading, ok := strings.Cut(pair, "=")
		if !ok || !slices.Contains(importer.Fields(), field) {
			return o, commandline.BadUsage(c, "--%s wants FIELD=HEADING with a field of: %s", map[bool]string{true: "column", false: "map"}[format == importer.GitHubCSV || format == importer.DockerHubCSV], strings.Join(importer.Fields(), " "))
		}
		o.Columns[field] = heading
	}
	if o.Location, err = time.LoadLocation(c.String("timezone")); err != nil {
		return o, commandline.BadUsage(c, "--timezone: %v", err)
	}
	switch d := c.String("delimiter"); {
	case d == "":
	case d == "tab" || d == `\t`:
		o.Delimiter = '\t'
	case utf8.RuneCountInString(d) == 1 && !strings.ContainsAny(d, "\"\r\n"):
		o.Delimiter, _ = utf8.DecodeRuneInString(d)
	default:
		return o, commandline.BadUsage(c, "--delimiter wants one character, which is neither a quote nor a line's end")
	}
	return o, nil
}

// readJobs reads what jobs did from journals and files of records.
func readJobs(c *cli.Context, paths []string) (*importer.Join, error) {
	join := &importer.Join{Slack: c.Duration("slack"), Tokens: map[string][]string{}}
	for _, pair := range c.StringSlice("token") {
		name, pattern, ok := strings.Cut(pair, "=")
		if _, err := filepath.Match(pattern, ""); !ok || name == "" || err != nil {
			return nil, commandline.BadUsage(c, "--token wants NAME=PATTERN, such as ci-shop=acme/shop*")
		}
		join.Tokens[name] = append(join.Tokens[name], pattern)
	}
	sources, closeAll, err := report.OpenPaths(paths, time.Time{}, c.App.Reader)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	for _, s := range sources {
		for n := 0; ; n++ {
			if n&1023 == 0 && c.Context.Err() != nil {
				return nil, c.Context.Err()
			}
			line, err := s.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", report.Safe(s.Name()), err)
			}
			var r record.Record
			if recordjson.Unmarshal(line, &r) == nil { // what is torn is not an image that was pulled
				join.Add(&r)
			}
		}
	}
	return join, nil
}

func importWorkerLogs(c *cli.Context) (err error) {
	in, closeAll, err := startImport(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	var files []string
	for _, arg := range c.Args().Slice() {
		info, err := os.Stat(arg)
		if arg != "-" && err != nil {
			return err
		}
		if arg == "-" || !info.IsDir() {
			files = append(files, arg)
			continue
		}
		err = filepath.WalkDir(arg, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() && importer.WorkerLogName.MatchString(e.Name()) {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	records := int64(0)
	for _, name := range files {
		f, err := openInput(name, c.App.Reader)
		if err != nil {
			return err
		}
		var made []*record.Record
		err = importer.WorkerLog(c.Context, f, func(r *record.Record) error { made = append(made, r); return nil })
		f.Close()
		if c.Context.Err() != nil {
			return c.Context.Err()
		}
		if err != nil {
			if err := in.badRow(name, err); err != nil {
				return err
			}
			continue
		}
		for _, r := range made {
			if err := in.record(r); err != nil {
				return err
			}
		}
		in.rows -= int64(len(made)) - 1 // files are counted here
		records += int64(len(made))
	}
	fmt.Fprintf(in.say, "%d logs, %d records, %d logs without a job\n", in.rows, records, in.badRows)
	return in.end("logs")
}

// sayLayout says how a table was understood, so that a mistake is seen.
func sayLayout(w io.Writer, name string, l importer.Layout) {
	var pairs []string
	for _, f := range importer.Fields() {
		if head, ok := l.Columns[f]; ok {
			pairs = append(pairs, f+"="+head)
		}
	}
	if len(pairs) == 0 {
		return
	}
	fmt.Fprintf(w, "%s: %s\n", report.Safe(name), report.Safe(strings.Join(pairs, ", ")))
	if len(l.Ignored) > 0 {
		fmt.Fprintf(w, "%s: not used: %s\n", report.Safe(name), report.Safe(strings.Join(l.Ignored, ", ")))
	}
	if l.Skipped > 0 {
		fmt.Fprintf(w, "%s: %d lines before the heading were passed over\n", report.Safe(name), l.Skipped)
	}
}

// sayJoin says which jobs explain which share of an export.
func sayJoin(w io.Writer, j *importer.Join) {
	t := j.Totals()
	part := func(n, all int64) string {
		if all == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f %%", 100*float64(n)/float64(all))
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "explained by\trows\tpulls\tof pulls\tversion checks")
	fmt.Fprintf(tw, "one job\t%d\t%d\t%s\t%d\n", t.One, t.PullsOne, part(t.PullsOne, t.Pulls), t.ChecksOne)
	fmt.Fprintf(tw, "one of several jobs\t%d\t%d\t%s\t%d\n", t.Several, t.PullsSeveral, part(t.PullsSeveral, t.Pulls), t.ChecksSeveral)
	fmt.Fprintf(tw, "no recorded job\t%d\t%d\t%s\t%d\n", t.None, t.PullsNone, part(t.PullsNone, t.Pulls), t.ChecksNone)
	tw.Flush()
	shares := j.Shares()
	if len(shares) == 0 {
		return
	}
	const top = 20
	fmt.Fprintln(tw, "job\tpulls\tof pulls\tperhaps up to\trun")
	for _, s := range shares[:min(top, len(shares))] {
		name := strings.Join(slices.DeleteFunc([]string{s.CI.Repository, s.CI.Workflow, s.CI.Job}, func(v string) bool { return v == "" }), " / ")
		fmt.Fprintf(tw, "%s\t%d\t%s\t%d\t%s\n", report.Safe(name), s.Pulls, part(s.Pulls, t.Pulls), s.Pulls+s.MaybePulls, report.Safe(s.CI.RunID))
	}
	tw.Flush()
	if len(shares) > top {
		fmt.Fprintf(w, "and %d jobs more\n", len(shares)-top)
	}
}

// destination is a file, a journal or a stream that records go to.
type destination struct {
	w       *bufio.Writer
	file    *os.File
	part    string // the file's name until it is whole
	name    string
	journal *journal.Journal
	batch   []byte
}

// openDestination opens the place of output. A file must be new: it gets its name when
// it is whole.
func openDestination(place string, stdout io.Writer) (*destination, error) {
	if place == "-" || place == "" {
		return &destination{w: bufio.NewWriterSize(stdout, 64<<10)}, nil
	}
	info, err := os.Stat(place)
	switch {
	case err == nil && info.IsDir() || strings.HasSuffix(place, "/"):
		// Nobody wants an import to push older records out of a journal.
		j, err := journal.Open(place, journal.Options{MaxBytes: 1 << 50, MaxSegmentBytes: 64 << 20})
		if err != nil {
			return nil, err
		}
		return &destination{journal: j}, nil
	case err == nil && info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is there already: remove it, or name another file", report.Safe(place))
	case err == nil: // a pipe or a device
		f, err := os.OpenFile(place, os.O_WRONLY, 0)
		if err != nil {
			return nil, err
		}
		return &destination{w: bufio.NewWriterSize(f, 64<<10), file: f}, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(place), "."+filepath.Base(place)+".*.part")
	if err != nil {
		return nil, err
	}
	return &destination{w: bufio.NewWriterSize(f, 64<<10), file: f, part: f.Name(), name: place}, nil
}

const maxBatch = 1 << 20

func (d *destination) write(line []byte) error {
	if d.journal == nil {
		_, err := d.w.Write(line)
		return err
	}
	if len(d.batch)+len(line) > maxBatch {
		if err := d.flush(); err != nil {
			return err
		}
	}
	d.batch = append(d.batch, line...)
	return nil
}

func (d *destination) flush() error {
	if len(d.batch) == 0 {
		return nil
	}
	err := d.journal.Append(d.batch)
	d.batch = d.batch[:0]
	return err
}

// finish makes what was written last.
func (d *destination) finish() error {
	if j := d.journal; j != nil {
		err := d.flush()
		d.journal = nil
		return errors.Join(err, j.Sync(), j.Close())
	}
	if err := d.w.Flush(); err != nil {
		return err
	}
	if d.file == nil {
		return nil
	}
	f := d.file
	if d.part == "" {
		d.file = nil
		return f.Close()
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync()); err != nil {
		return err
	}
	// Link, unlike rename, does not replace what came to be there meanwhile.
	if err := os.Link(d.part, d.name); err != nil {
		return err
	}
	d.file = nil
	return errors.Join(os.Remove(d.part), f.Close())
}

// abandon removes what an import that failed has begun. After finish it does nothing.
func (d *destination) abandon() error {
	switch {
	case d.journal != nil:
		j := d.journal
		d.journal = nil
		return errors.Join(j.Sync(), j.Close())
	case d.file != nil:
		f := d.file
		d.file = nil
		err := f.Close()
		if d.part != "" {
			err = errors.Join(err, os.Remove(d.part))
		}
		return err
	}
	return nil
}
