package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/api/option"

	"github.com/tallyman-ci/tallyman/desk/dataset"
	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/desk/ranking"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/internal/figures"
	"github.com/tallyman-ci/tallyman/report"
)

// datasetOptions are options of the client of BigQuery; tests set them.
var datasetOptions []option.ClientOption

// pictureFlags are the flags of report that concern the page.
func pictureFlags() []cli.Flag {
	const picture, fleet = "The page", "From BigQuery"
	return []cli.Flag{
		&cli.StringFlag{Name: "html", Category: picture, Usage: "write one page that needs nothing else to `FILE`; - is standard output"},
		&cli.BoolFlag{Name: "force", Category: picture, Usage: "replace FILE where it is there already"},
		&cli.StringFlag{Name: "title", Category: picture, Value: "Who uses docker", Usage: "`TITLE` of the page"},
		&cli.StringFlag{Name: "from", Category: fleet, Usage: "ask `bigquery://PROJECT/DATASET` instead of journals; ?billing_project= and ?location= may follow"},
		&cli.Int64Flag{Name: "max-bytes", Category: fleet, Value: 10 << 30, Usage: "each query may be billed for `N` bytes at most"},
		&cli.BoolFlag{Name: "dry-run", Category: fleet, Usage: "only say how many bytes the queries would read"},
	}
}

// pictured says whether the flags ask for a page.
func pictured(c *cli.Context) bool { return c.IsSet("html") || c.IsSet("from") }

// picture writes the page. open opens the journals; it is not called with --from.
func picture(c *cli.Context, open func(ctx context.Context, paths []string) (panels.Stream, func() error, error)) (err error) {
	f, err := pictureFilter(c, time.Now())
	if err != nil {
		return err
	}
	name := c.String("html")
	if name == "" && !c.Bool("dry-run") {
		return commandline.BadUsage(c, "--from wants --html FILE (- is standard output), or --dry-run")
	}
	if name != "" && name != "-" {
		if err := mayWrite(name, c.Bool("force")); err != nil {
			return err
		}
	}
	var src panels.Stream
	var sources []string
	atOnce := 1 // DuckDB uses all cores for one query
	if from := c.String("from"); from != "" {
		if c.NArg() > 0 {
			return commandline.BadUsage(c, "--from asks BigQuery; %s cannot be read at the same time", report.Safe(c.Args().First()))
		}
		for _, flag := range storeFlags() {
			if name := flag.Names()[0]; c.IsSet(name) {
				return commandline.BadUsage(c, "--%s is for journals, and --from asks BigQuery%s", name, map[string]string{"owners": " (tallyman bq owners fills its table of owners)"}[name])
			}
		}
		d, err := openDataset(c, from, &f)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		if c.Bool("dry-run") {
			return nil
		}
		src, sources, atOnce = d, []string{from}, 4
	} else {
		if c.Bool("dry-run") {
			return commandline.BadUsage(c, "--dry-run is for --from: journals cost nothing")
		}
		var closeSource func() error
		src, closeSource, err = open(c.Context, c.Args().Slice())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, closeSource()) }()
		sources = namedSources(c)
	}
	p, err := page.Build(c.Context, src, f, panels.All(), atOnce)
	if err != nil {
		return err
	}
	if p.Suspects, err = ranking.Ask(c.Context, src, f); err != nil {
		return err
	}
	p.Title, p.Sources, p.Version, p.Generated = c.String("title"), sources, versionOf(), time.Now()
	if err := writeWhole(name, c.App.Writer, c.Bool("force"), func(w io.Writer) error { return page.Render(w, p) }); err != nil {
		return err
	}
	if d, ok := src.(*dataset.Dataset); ok {
		fmt.Fprintf(c.App.ErrWriter, "BigQuery billed %s\n", figures.Bytes(d.Read()))
	}
	return errors.Join(p.Failed()...) // the page says it too
}

// pictureFilter reads the flags that narrow the account.
func pictureFilter(c *cli.Context, now time.Time) (panels.Filter, error) {
	f := panels.Filter{Repository: c.String("repository"), Workflow: c.String("workflow"), Image: c.String("image")}
	for flag, field := range map[string]*time.Time{"since": &f.From, "until": &f.To} {
		t, err := report.ParseTime(c.String(flag), now)
		if err != nil {
			return f, commandline.BadUsage(c, "--%s: %v", flag, err)
		}
		*field = t
	}
	if !f.From.IsZero() && !f.To.IsZero() && !f.From.Before(f.To) {
		return f, commandline.BadUsage(c, "the time range is empty: --since is not before --until")
	}
	return f, nil
}

// fleetRange is what is asked of BigQuery where no range is given: without one,
// the whole table would be read.
const fleetRange = 7 * 24 * time.Hour

// openDataset opens a data set and says what the queries will read.
func openDataset(c *cli.Context, from string, f *panels.Filter) (*dataset.Dataset, error) {
	place, err := dataset.Parse(from)
	if err != nil {
		return nil, err
	}
	if f.To.IsZero() {
		f.To = time.Now().UTC().Truncate(time.Second)
	}
	if f.From.IsZero() {
		f.From = f.To.Add(-fleetRange)
	}
	limit := c.Int64("max-bytes")
	if limit <= 0 {
		return nil, commandline.BadUsage(c, "--max-bytes wants a positive number")
	}
	d, err := dataset.Open(c.Context, place, limit, datasetOptions...)
	if err != nil {
		return nil, err
	}
	var sum int64
	requests, builds := panels.Suspects()
	all := append(panels.All(), panels.Trust(), requests, builds)
	for _, p := range all {
		sql, params := panels.Parameters(strings.TrimSpace(p.SQL), panels.GoogleSQL, *f)
		n, err := d.Estimate(c.Context, sql, params...)
		if err == nil && n > limit {
			err = fmt.Errorf("would read %s, and %s are allowed: narrow --since and --until, or raise --max-bytes", figures.Bytes(n), figures.Bytes(limit))
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", p.ID, err), d.Close())
		}
		sum += n
	}
	fmt.Fprintf(c.App.ErrWriter, "%d queries will read %s, at most %s each\n", len(all), figures.Bytes(sum), figures.Bytes(limit))
	return d, nil
}

// mayWrite refuses early what writeWhole would refuse after a long query.
func mayWrite(name string, force bool) error {
	info, err := os.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		dir, err := os.Stat(filepath.Dir(name))
		if err == nil && !dir.IsDir() {
			err = fmt.Errorf("%s is no folder", report.Safe(filepath.Dir(name)))
		}
		return err
	case err != nil:
		return err
	case info.IsDir():
		return fmt.Errorf("%s is a folder: name a file", report.Safe(name))
	case info.Mode().IsRegular() && !force:
		return fmt.Errorf("%s is there already: --force replaces it", report.Safe(name))
	}
	return nil
}

// writeWhole gives a file its name when it is whole. A pipe or a device is written to.
func writeWhole(name string, stdout io.Writer, force bool, write func(io.Writer) error) (err error) {
	if name == "-" {
		return write(stdout)
	}
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*.part")
	if err != nil {
		return err
	}
	defer func() {
		if e := os.Remove(f.Name()); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}()
	if err := write(f); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	if force {
		return os.Rename(f.Name(), name)
	}
	// Link, unlike rename, does not replace what came to be there meanwhile.
	if err := os.Link(f.Name(), name); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already: --force replaces it", report.Safe(name))
	} else if err != nil {
		return err
	}
	return nil
}
