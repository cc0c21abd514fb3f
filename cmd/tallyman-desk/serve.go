package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/desk/ranking"
	"github.com/tallyman-ci/tallyman/desk/serve"
	"github.com/tallyman-ci/tallyman/desk/store"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/record"
)

func serveCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "show the page live, on this machine only", ArgsUsage: "JOURNAL...",
		Description: `Reads journals (folders) and files of records, and what is appended to them, and shows
the page of tallyman-desk report at an address of this machine. Filters stand in the URL.

Examples:
  tallyman-desk serve /var/log/tallyman
  tallyman-desk serve --listen 127.0.0.1:8080 runner-1/journal requests.jsonl`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "listen", Value: "127.0.0.1:0", Usage: "listen on `ADDRESS`; port 0 takes a free one"},
			&cli.DurationFlag{Name: "every", Value: 5 * time.Second, Usage: "`TIME` between two looks of an open page"},
			&cli.StringSliceFlag{Name: "host", Usage: "answer to this `NAME` too; may be repeated"},
			&cli.BoolFlag{Name: "allow-remote", Usage: "listen where other machines can reach it; they may read everything"},
			&cli.StringFlag{Name: "title", Value: "Who uses docker", Usage: "`TITLE` of the page"},
		}, storeFlags()...),
		Action: serveLive,
	}
}

func serveLive(c *cli.Context) (err error) {
	if !c.Args().Present() && c.String("database") == "" {
		return commandline.BadUsage(c, "serve wants a journal: tallyman-desk serve /var/log/tallyman")
	}
	if slices.Contains(c.Args().Slice(), "-") {
		return commandline.BadUsage(c, "serve reads journals again and again, and standard input only once")
	}
	if c.Duration("every") < time.Second {
		return commandline.BadUsage(c, "--every wants a second or more")
	}
	// The port first: who mistypes it shall not wait for a large journal.
	l, err := serve.Listen(c.Context, c.String("listen"), c.Bool("allow-remote"))
	if err != nil {
		return err
	}
	src, err := openStore(c, c.Args().Slice(), true)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	log := slog.New(slog.NewTextHandler(c.App.ErrWriter, nil))
	ranked := ranking.NewLive(src, log)
	defer ranked.Close() // before the database goes
	h := serve.New(&live{src: src, ranked: ranked, title: c.String("title"), sources: namedSources(c), every: c.Duration("every") / 2}, serve.Options{
		Every: c.Duration("every"), Hosts: c.StringSlice("host"), Kinds: panels.Kinds(), Log: log,
	})
	fmt.Fprintf(c.App.Writer, "http://%s/\n", l.Addr())
	return serve.Run(c.Context, l, h)
}

// live is the account that serve shows.
type live struct {
	src     *store.Store
	ranked  *ranking.Live
	title   string
	sources []string
	every   time.Duration // not more often than this does it look for new records

	// asking is held for reading by queries and for writing while records come in, so
	// that all panels of a page are about the same records.
	asking sync.RWMutex
	looked time.Time
	state  string
}

var _ serve.Account = (*live)(nil)

func (a *live) Refresh(ctx context.Context) (string, error) {
	a.asking.Lock()
	defer a.asking.Unlock()
	if a.state == "" || time.Since(a.looked) >= a.every {
		state, err := a.src.Refresh(ctx)
		if err != nil {
			return "", err
		}
		a.state, a.looked = state, time.Now()
	}
	return fmt.Sprintf("%s %d", a.state, a.ranked.Changes()), nil
}

func (a *live) Page(ctx context.Context, f panels.Filter, kind string) (page.Page, error) {
	a.asking.RLock()
	defer a.asking.RUnlock()
	p, err := page.Build(ctx, a.src, f, panels.Of(kind), 1)
	p.Title, p.Sources, p.Version = a.title, a.sources, versionOf()
	if kind == "" || kind == string(record.KindHTTP) {
		p.Suspects = a.ranked.Of(f, a.state)
	}
	return p, err
}
