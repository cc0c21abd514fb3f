package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/report"
	"github.com/tallyman-ci/tallyman/sinks"
)

func (p *program) replayCommand() *cli.Command {
	const what, where = "What", "Where to"
	return &cli.Command{
		Name: "replay", Category: forRunner, Usage: "send refused records, or a range of the journal, to a sink again",
		ArgsUsage: "[JOURNAL...]",
		UsageText: "tallyman replay --quarantine | --since TIME [options] [JOURNAL...]",
		Description: `Records come under their own ids again, so the far side drops what it has already.
The agent may run beside it.

With --quarantine it sends what the sinks refused: once the cause is gone, a column
added for example, the records are taken and leave the quarantine; what is refused
again stays, with the new reason.

Examples:
  tallyman replay --quarantine --dry-run
  tallyman replay --quarantine
  tallyman replay --quarantine --file /node/.quarantine/pod-1-pubsub.jsonl --to pubsub://acme/docker
  tallyman replay --since 2026-03-01 --until 2026-03-02 --to pubsub://acme/docker`,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "quarantine", Category: what, EnvVars: []string{"TALLYMAN_REPLAY_QUARANTINE"}, Usage: "send what the sinks refused"},
			&cli.StringFlag{Name: "file", Category: what, EnvVars: []string{"TALLYMAN_REPLAY_FILE"}, TakesFile: true, Usage: "the quarantine is `FILE`, of a dead runner for example; needs --to"},
			&cli.StringFlag{Name: "since", Category: what, EnvVars: []string{"TALLYMAN_REPLAY_SINCE"}, Usage: "send what the journal has since `TIME`: 2h, 7d, 2026-03-01, or RFC 3339"},
			&cli.StringFlag{Name: "until", Category: what, EnvVars: []string{"TALLYMAN_REPLAY_UNTIL"}, Usage: "and before `TIME`"},
			&cli.StringFlag{Name: "to", Category: where, EnvVars: []string{"TALLYMAN_REPLAY_TO"}, Usage: "a sink's `URL`; without it, the sinks of the configuration"},
			&cli.DurationFlag{Name: "patience", Category: where, EnvVars: []string{"TALLYMAN_REPLAY_PATIENCE"}, Value: time.Minute, Usage: "give up on a sink that takes nothing for this `LONG`"},
			&cli.BoolFlag{Name: "dry-run", Category: where, EnvVars: []string{"TALLYMAN_REPLAY_DRY_RUN"}, Usage: "say what would be sent, and send nothing"},
		}, placeFlags()...),
		Action: p.replay,
	}
}

func (p *program) replay(c *cli.Context) error {
	quarantine, ranged := c.Bool("quarantine"), c.String("since") != "" || c.String("until") != ""
	switch {
	case quarantine == ranged:
		return commandline.BadUsage(c, "choose --quarantine, or a range with --since")
	case quarantine && c.Args().Present():
		return commandline.BadUsage(c, "--quarantine takes no journals; name a quarantine with --file")
	case c.String("file") != "" && (!quarantine || c.String("to") == ""):
		return commandline.BadUsage(c, "--file goes with --quarantine and --to")
	}
	if file := c.String("file"); file != "" {
		_, err := os.Stat(file)
		if _, left := os.Stat(file + ".replay"); err != nil && left != nil { // a replay that was killed leaves that one
			return fmt.Errorf("%w (a quarantine of which all was taken is removed)", err)
		}
	}
	cfg, err := p.loadConfig(c)
	if err != nil {
		return err
	}
	urls := cfg.Sinks
	if to := c.String("to"); to != "" {
		urls = []string{to}
	}
	if len(urls) == 0 {
		return errors.New("no sink is configured (set sinks in the configuration, or name one with --to)")
	}
	now := time.Now()
	var from, until time.Time
	for flag, field := range map[string]*time.Time{"since": &from, "until": &until} {
		if *field, err = report.ParseTime(c.String(flag), now); err != nil {
			return commandline.BadUsage(c, "--%s: %v", flag, err)
		}
	}
	if !until.IsZero() && !from.Before(until) {
		return commandline.BadUsage(c, "--until is not after --since: there is nothing between %s and %s", from.Format(time.RFC3339), until.Format(time.RFC3339))
	}
	var errs []error
	for _, url := range urls {
		// One sink that is away must not keep the others from theirs.
		replayTo := p.replayTo
		if c.Bool("dry-run") {
			replayTo = p.rehearse
		}
		err := replayTo(c, url, func(t *sinks.Target, s sinks.Sink) (sinks.Replayed, error) {
			o := sinks.ReplayOptions{MaxRecords: t.Pump.MaxRecords, MaxBytes: t.Pump.MaxBytes, Timeout: t.Pump.Timeout, Patience: c.Duration("patience")}
			if quarantine {
				path := c.String("file")
				if path == "" {
					path = filepath.Join(cfg.Journal(), "quarantine", t.Pump.Name+".jsonl")
				}
				if r, ok := s.(*rehearsal); ok {
					return r.quarantine(c.Context, path)
				}
				return sinks.ReplayQuarantine(c.Context, path, s, o)
			}
			paths := c.Args().Slice()
			if len(paths) == 0 {
				paths = []string{cfg.Journal()}
			}
			return p.replayRange(c, paths, from, until, s, o)
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (p *program) replayTo(c *cli.Context, url string, do func(*sinks.Target, sinks.Sink) (sinks.Replayed, error)) error {
	t, err := sinks.Parse(url, schemes()...)
	if err != nil {
		return err
	}
	s, err := t.Open(c.Context)
	if err != nil {
		return err
	}
	r, err := do(t, s)
	err = errors.Join(err, s.Close(c.Context))
	fmt.Fprintf(p.stderr, "%s: %d delivered, %d refused, %d unreadable, %d left\n", t.Pump.Name, r.Delivered, r.Refused, r.Unreadable, r.Left)
	return err
}

// replayRange sends the records of a time from journals. What is refused is told, and
// not kept: it is in the journal.
func (p *program) replayRange(c *cli.Context, paths []string, from, until time.Time, s sinks.Sink, o sinks.ReplayOptions) (sinks.Replayed, error) {
	sources, done, err := report.OpenPaths(paths, from, p.stdin)
	if err != nil {
		return sinks.Replayed{}, err
	}
	defer done()
	unreadable := int64(0)
	next := func() (sinks.Entry, error) {
		for len(sources) > 0 {
			line, err := sources[0].Next()
			if errors.Is(err, io.EOF) {
				sources = sources[1:]
				continue
			}
			if err != nil {
				return sinks.Entry{}, err
			}
			var r record.Record
			if err := recordjson.Unmarshal(line, &r); err != nil {
				unreadable++
				continue
			}
			if r.Kind == "segment" {
				continue // the header of a journal's file, read as a plain file
			}
			if !from.IsZero() && r.TS.Before(from) || !until.IsZero() && !r.TS.Before(until) {
				continue
			}
			return sinks.Entry{ID: r.ID, Kind: r.Kind, Line: bytes.Clone(line)}, nil
		}
		return sinks.Entry{}, io.EOF
	}
	r, err := sinks.Replay(c.Context, next, s, o, func(e sinks.Entry, reason string) error {
		fmt.Fprintf(p.stderr, "refused: %s: %s\n", report.Safe(e.ID), report.Safe(strings.TrimSpace(reason)))
		return nil
	})
	r.Unreadable = unreadable
	return r, err
}
