package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/figures"
	"github.com/tallyman-ci/tallyman/report"
	"github.com/tallyman-ci/tallyman/sinks"
)

func (p *program) statusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Category: forPeople, Usage: "tell what the running agent is doing",
		Description: `It exits 1 when no agent runs.

Examples:
  tallyman status
  tallyman status --json | jq .sinks`,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "json", Category: "Output", EnvVars: []string{"TALLYMAN_STATUS_JSON"}, Usage: "write one JSON object"},
			&cli.DurationFlag{Name: "timeout", Category: "Output", EnvVars: []string{"TALLYMAN_STATUS_TIMEOUT"}, Value: 3 * time.Second,
				Usage: "wait for the agent at most this `LONG`"},
		}, placeFlags()...),
		Action: p.status,
	}
}

func (p *program) status(c *cli.Context) error {
	cfg, err := p.loadConfig(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
	defer cancel()
	s, err := agentStatus(ctx, cfg.Socket())
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no agent runs at %s (the job-started hook starts it; tallyman doctor tells what is wrong)", cfg.Socket())
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the agent at %s does not answer within %s (tallyman doctor tells what is wrong)", cfg.Socket(), c.Duration("timeout"))
	case err != nil:
		return err
	}
	s.Problems = append(s.Problems, hook.CheckPins(pins(cfg))...)
	if c.Bool("json") {
		data, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			return fmt.Errorf("encode the status: %w", err)
		}
		_, err = p.stdout.Write(append(report.SafeJSON(data), '\n'))
		return err
	}
	_, err = fmt.Fprint(p.stdout, describe(s, time.Now()))
	return err
}

// summary is a status in one line.
func summary(s agent.Status) string {
	text := fmt.Sprintf("tallyman %s runs since %s, pid %d", s.Version, s.Started.UTC().Format("2006-01-02 15:04:05 UTC"), s.PID)
	if s.Job != "" {
		text += ", in job " + s.Job
	}
	return text
}

// problems are what a status has to complain about.
func problems(s agent.Status) []string {
	said := slices.Clone(s.Problems)
	if n := s.Counts.Pending; n > 0 {
		said = append(said, fmt.Sprintf("%d records wait, the journal does not take them: its disk is full, or somebody removed its folder, which the next agent makes anew (see the agent's log)", n))
	}
	if s.Events != nil && !s.Events.Connected {
		text := "no Docker daemon: events are not seen"
		if s.Events.Error != "" {
			text += " (" + s.Events.Error + ")"
		}
		said = append(said, text)
	}
	for _, k := range s.Sinks {
		if k.State == sinks.StateRetrying || k.State == sinks.StateStuck {
			said = append(said, fmt.Sprintf("sink %s is %s, %d records behind (%s)", k.Name, k.State, k.BehindRecords, k.LastError))
		}
	}
	return said
}

// describe is a status for people.
func describe(s agent.Status, now time.Time) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-9s %s\n", name, report.Safe(fmt.Sprintf(format, args...)))
	}
	up := "for an unknown time"
	if !s.Started.IsZero() { // an agent of another version may not say
		up = now.Sub(s.Started).Round(time.Second).String()
	}
	line("agent", "version %s, pid %d, up %s", s.Version, s.PID, up)
	job := s.Job
	if job == "" {
		job = "none"
	}
	line("job", "%s", job)
	c := s.Counts
	line("records", "%d journaled (%d by socket, %d by spool file, %d ends); %d duplicates, %d refused, %d beyond a job's share", c.Records, c.Socket, c.Spooled, c.Ends, c.Duplicates, c.Refused, c.Suppressed)
	line("running", "%s whose end is waited for", figures.Plural(s.Running, "call"))
	line("journal", "%s, %s of at most %s", figures.Plural(s.Journal.Segments, "segment"), figures.Bytes(s.Journal.Bytes), figures.Bytes(s.Journal.MaxBytes))
	switch e := s.Events; {
	case e == nil:
		line("events", "off")
	case e.Connected:
		line("events", "%d from docker %s at %s; %d replayed, %d dropped, %d gaps", e.Events, e.ServerVersion, e.Host, e.Replayed, e.Dropped, e.Gaps)
	case e.Host == "":
		line("events", "none: no daemon (see the problem below)")
	default:
		line("events", "none: no daemon at %s (see the problem below)", e.Host)
	}
	if n := c.Explained + c.Unattributed; n > 0 {
		line("", "%d of %d events unattributed: no recorded call explains them", c.Unattributed, n)
	}
	switch m := s.Metrics; {
	case m.Address == "":
		line("metrics", "off (%s)", m.Source)
	default:
		line("metrics", "to %s (%s), %d payloads and %d samples dropped", m.Address, m.Source, m.Dropped.Payloads, m.Dropped.Samples)
	}
	for _, k := range s.Sinks {
		line("sink", "%s: %s, %d records and %.1f s behind; %d delivered, %d refused, %d dropped", k.Name, k.State, k.BehindRecords, k.BehindSeconds, k.Delivered, k.Refused, k.Dropped)
		if k.Target != "" { // a name that was made from it tells a person nothing
			line("", "to %s", k.Target)
		}
		if k.LastError != "" {
			line("", "last error %s ago: %s", max(now.Sub(k.LastErrorAt), 0).Round(time.Second), k.LastError)
		}
	}
	for _, text := range problems(s) {
		line("problem", "%s", text)
	}
	return b.String()
}
