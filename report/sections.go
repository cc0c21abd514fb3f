package report

import (
	"fmt"
	"strings"

	"github.com/tallyman-ci/tallyman/internal/figures"
)

// section is one answer, as both the terminal and Markdown show it.
type section struct {
	title   string
	columns []column
	rows    [][]string
	bars    []int64 // beside the first number of each row, where the terminal draws bars
	notes   []string
	empty   string // said where there are no rows; a section with neither is left out
}

type column struct {
	head   string
	number bool // ours, right-aligned; everything else is somebody's text
	plain  bool // our own words
}

func text(head string) column   { return column{head: head} }
func number(head string) column { return column{head: head, number: true} }
func words(head string) column  { return column{head: head, plain: true} }

// line is the coverage as it stands beside each figure.
func (c Coverage) line(what string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "coverage: %s of %s %s with a job", figures.Count(c.WithJob), figures.Count(c.Records), what)
	if c.Records > 0 {
		fmt.Fprintf(&b, "; sealed %s, environment %s, inferred %s, none %s",
			share(c.Sealed, c.Records), share(c.Environment, c.Records), share(c.Inferred, c.Records), share(c.None, c.Records))
	}
	if n := c.Explained + c.Unattributed; n > 0 {
		fmt.Fprintf(&b, "; unattributed %s", share(c.Unattributed, n))
	}
	fmt.Fprintf(&b, "; lost %s", figures.Count(c.Lost))
	if c.LostUnknown > 0 {
		fmt.Fprintf(&b, " and %s of unknown size", figures.Plural(c.LostUnknown, "hole"))
	}
	return b.String()
}

func (r *Report) callsCoverage() string  { return r.Coverage.Calls.line("calls") }
func (r *Report) eventsCoverage() string { return r.Coverage.Events.line("events") }

// exitCoverage says of how many calls the outcome is known, without which a
// number of failures means little.
func (r *Report) exitCoverage() string {
	t := r.Totals
	s := fmt.Sprintf("exit code or signal known for %s of %s (%s)", figures.Count(t.ExitKnown), figures.Plural(t.Calls+t.EndsAlone, "call"), share(t.ExitKnown, t.Calls+t.EndsAlone))
	if t.NoEnd > 0 {
		s += fmt.Sprintf("; %s without an end: still running, or unknown", figures.Count(t.NoEnd))
	}
	return s
}

func tableNotes[T any](t Table[T], more ...string) []string {
	var notes []string
	if t.More > 0 {
		notes = append(notes, fmt.Sprintf("and %s more", figures.Count(t.More)))
	}
	if t.Slack > 0 {
		notes = append(notes, fmt.Sprintf("more than %s different keys: rare ones are missing, figures may be up to %s too low", figures.Count(maxKeys), figures.Count(t.Slack)))
	}
	return append(notes, more...)
}

// sections are the answers in the order in which they are read.
func (r *Report) sections() []section {
	return []section{
		r.totalsSection(),
		r.usageSection("Repositories, by docker calls", r.Repositories, 0),
		r.usageSection("Workflows, by docker calls", r.Workflows, 1),
		r.usageSection("Jobs, by docker calls", r.Jobs, 2),
		r.commandsSection(),
		r.failuresSection(),
		r.failedImagesSection("Failed pulls, by image and job", "no failed pulls", r.FailedPulls,
			"a pull that fails leaves no event: these are the calls of docker pull and docker compose pull that ended badly"),
		r.failedImagesSection("Could not start (docker run, exit code 125), by image and job", "", r.CouldNotStart,
			"docker itself failed before the container ran: a failed pull, a bad option, a port in use"),
		r.longestSection(),
		r.imagesSection("Images named on command lines", "calls", r.ImagesNamed, r.callsCoverage()),
		r.imagesSection("Images pulled", "pulls", r.ImagesPulled, "also counts pulls that found the image up to date; images that BuildKit pulls for a build leave no event", r.eventsCoverage()),
		r.registriesSection(),
		r.containersSection(),
		r.exitsSection(),
		r.attributionSection(),
		r.lossesSection(),
	}
}

func (r *Report) totalsSection() section {
	t := r.Totals
	s := section{title: "Totals", columns: []column{words("what"), number("number")}}
	always := func(what string, n string) { s.rows = append(s.rows, []string{what, n}) }
	add := func(what string, n int64) {
		if n != 0 {
			always(what, figures.Count(n))
		}
	}
	always("docker calls", figures.Count(t.Calls))
	add("  failed", t.Failed)
	add("  could not be executed", t.NotExecuted)
	add("  without an end (still running, or unknown)", t.NoEnd)
	add("  ends whose call was not read", t.EndsAlone)
	if t.DurationNS > 0 {
		always("  time taken", length(t.DurationNS))
	}
	add("nested calls (docker's own plugins; not counted above)", t.Nested)
	add("calls outside any job (not counted above)", t.OutsideJob)
	add("failed pulls", t.FailedPulls)
	add("containers that could not start", t.CouldNotStart)
	always("images pulled", figures.Count(t.ImagesPulled))
	always("containers started", figures.Count(t.ContainersStarted))
	add("  by the runner itself (services, job containers)", t.ContainersRunner)
	add("  failed", t.ContainersFailed)
	add("  out of memory", t.ContainersOOM)
	add("  told to stop", t.ContainersStopped)
	if t.ContainerDurationNS > 0 {
		always("  run time", length(t.ContainerDurationNS))
	}
	always("workflow runs", figures.Count(t.Runs))
	always("jobs", figures.Count(t.Jobs))
	s.notes = []string{r.callsCoverage(), r.eventsCoverage()}
	if t.Calls+t.EndsAlone > 0 {
		s.notes = append(s.notes, r.exitCoverage())
	}
	return s
}

func (r *Report) usageSection(title string, t Table[Usage], depth int) section {
	s := section{title: title, columns: []column{text("repository"), text("workflow"), text("job")}[:depth+1]}
	s.columns = append(s.columns, number("calls"), number("failed"), number("time"), number("pulls"), number("containers"))
	for _, u := range t.Rows {
		row := append([]string{u.Repository, u.Workflow, u.Job}[:depth+1:depth+1],
			figures.Count(u.Calls), figures.Count(u.Failed), length(u.DurationNS), figures.Count(u.ImagesPulled), figures.Count(u.ContainersStarted))
		s.rows = append(s.rows, row)
		s.bars = append(s.bars, u.Calls)
	}
	s.notes = tableNotes(t, r.callsCoverage())
	return s
}

func (r *Report) commandsSection() section {
	s := section{title: "Commands", columns: []column{text("command"), number("calls"), number("failed"), number("no end"), number("time"), number("longest")}}
	for _, c := range r.Commands.Rows {
		s.rows = append(s.rows, []string{commandName(c.Tool, c.Command), figures.Count(c.Calls), figures.Count(c.Failed),
			figures.Count(max(0, c.Calls-c.Ended)), length(c.DurationNS), length(c.LongestNS)})
		s.bars = append(s.bars, c.Calls)
	}
	s.notes = tableNotes(r.Commands, r.callsCoverage())
	return s
}

func commandName(tool, command string) string {
	return strings.TrimSpace(tool + " " + command)
}

func (r *Report) failuresSection() section {
	s := section{title: "Failed calls", columns: []column{text("command"), text("image"), words("exit code"), number("calls")}}
	for _, f := range r.FailedCalls.Rows {
		s.rows = append(s.rows, []string{commandName(f.Tool, f.Command), familiar(f.Image), exit(f.ExitCode, f.Signal), figures.Count(f.Calls)})
		s.bars = append(s.bars, f.Calls)
	}
	if r.Totals.ExitKnown > 0 {
		s.empty = "no failed calls"
	}
	s.notes = tableNotes(r.FailedCalls, r.exitCoverage(), r.callsCoverage())
	return s
}

func (r *Report) failedImagesSection(title, empty string, t Table[FailedImage], meaning string) section {
	s := section{title: title, columns: []column{text("image"), text("repository"), text("workflow"), text("job"),
		number("failures"), words("last exit"), words("last (UTC)")}}
	for _, f := range t.Rows {
		s.rows = append(s.rows, []string{familiar(f.Image), f.Repository, f.Workflow, f.Job, figures.Count(f.Failures), exit(f.ExitCode, f.Signal), stamp(f.Last)})
		s.bars = append(s.bars, f.Failures)
	}
	if r.Totals.ExitKnown > 0 {
		s.empty = empty
	}
	if len(s.rows) > 0 {
		s.notes = tableNotes(t, meaning)
	}
	s.notes = append(s.notes, r.exitCoverage(), r.callsCoverage())
	return s
}

func (r *Report) longestSection() section {
	s := section{title: "Longest calls", columns: []column{text("command"), text("images"), text("repository"), text("workflow"), text("job"),
		number("time"), words("exit"), words("started (UTC)")}}
	bound := false
	for _, c := range r.Longest {
		took, end := length(c.DurationNS), "unknown"
		if c.Source == "socket_eof" {
			took, bound = "<"+took, true
		}
		if c.Signal != 0 {
			end = exit(0, c.Signal)
		} else if c.ExitCode != nil {
			end = exit(*c.ExitCode, 0)
		}
		s.rows = append(s.rows, []string{commandName(c.Tool, c.Command), familiarList(c.Images), c.Repository, c.Workflow, c.Job,
			took, end, stamp(c.Started)})
		s.bars = append(s.bars, c.DurationNS)
	}
	if bound {
		s.notes = append(s.notes, "<: an upper bound, because the kernel could not say when the call ended")
	}
	s.notes = append(s.notes, r.callsCoverage())
	return s
}

func (r *Report) imagesSection(title, what string, t Table[ImageCount], notes ...string) section {
	s := section{title: title, columns: []column{text("image"), text("registry"), number(what)}}
	for _, i := range t.Rows {
		s.rows = append(s.rows, []string{familiar(i.Image), i.Registry, figures.Count(i.Count)})
		s.bars = append(s.bars, i.Count)
	}
	s.notes = tableNotes(t, notes...)
	return s
}

func (r *Report) registriesSection() section {
	s := section{title: "Registries", columns: []column{text("registry"), number("pulled"), number("named"), number("failed pulls")}}
	var hub, pulled int64
	for _, g := range r.Registries.Rows {
		name := g.Registry
		if name == "" {
			name = "(none: by id, or not an image reference)"
		}
		if g.Registry == "docker.io" {
			hub = g.Pulled
		}
		s.rows = append(s.rows, []string{name, figures.Count(g.Pulled), figures.Count(g.Named), figures.Count(g.Failed)})
		s.bars = append(s.bars, g.Pulled)
	}
	pulled = r.Totals.ImagesPulled
	s.notes = tableNotes(r.Registries)
	if pulled > 0 {
		s.notes = append(s.notes, fmt.Sprintf("docker.io %s of pulls, other registries %s", share(hub, pulled), share(pulled-hub, pulled)))
	}
	s.notes = append(s.notes, r.callsCoverage(), r.eventsCoverage())
	return s
}

func (r *Report) containersSection() section {
	s := section{title: "Containers, by image", columns: []column{text("image"), number("started"), number("ended"), number("failed"),
		number("stopped"), number("out of memory"), number("run time"), number("longest")}}
	for _, c := range r.Containers.Rows {
		s.rows = append(s.rows, []string{familiar(c.Image), figures.Count(c.Started), figures.Count(c.Ended), figures.Count(c.Failed), figures.Count(c.Stopped), figures.Count(c.OOM),
			length(c.DurationNS), length(c.LongestNS)})
		s.bars = append(s.bars, c.Started)
	}
	s.notes = tableNotes(r.Containers, "stopped: ended after docker stop, kill or rm --force; not counted as failed", r.eventsCoverage())
	return s
}

func (r *Report) exitsSection() section {
	s := section{title: "Exit codes of containers", columns: []column{words("exit code"), number("containers")}}
	for _, x := range r.ContainerExits.Rows {
		name := exit(x.ExitCode, 0)
		if x.Stopped {
			name += " (told to stop)"
		}
		s.rows = append(s.rows, []string{name, figures.Count(x.Containers)})
		s.bars = append(s.bars, x.Containers)
	}
	s.notes = tableNotes(r.ContainerExits, r.eventsCoverage())
	return s
}

func (r *Report) attributionSection() section {
	s := section{title: "How the job of a record was found", columns: []column{words("way"), number("calls"), number("share of calls"), number("events"), number("share of events")}}
	c, e := r.Coverage.Calls, r.Coverage.Events
	if c.Records+e.Records+c.OutsideJob+e.OutsideJob == 0 {
		return s
	}
	row := func(name string, calls, events int64) {
		s.rows = append(s.rows, []string{name, figures.Count(calls), share(calls, c.Records), figures.Count(events), share(events, e.Records)})
	}
	row("sealed by the job-started hook", c.Sealed, e.Sealed)
	row("the caller's environment", c.Environment, e.Environment)
	row("inferred from the time", c.Inferred, e.Inferred)
	row("none: no job is known", c.None, e.None)
	if n := c.Disputed + e.Disputed; n > 0 {
		row("of these: the caller claimed another job", c.Disputed, e.Disputed)
	}
	if n := e.Explained + e.Unattributed; n > 0 {
		s.rows = append(s.rows, []string{"unattributed: no recorded call explains it", "", "", figures.Count(e.Unattributed), share(e.Unattributed, n)})
	}
	if n := c.OutsideJob + e.OutsideJob; n > 0 {
		s.rows = append(s.rows, []string{"outside any job (not counted)", figures.Count(c.OutsideJob), "", figures.Count(e.OutsideJob), ""})
	}
	if !r.Filter.empty() {
		s.notes = append(s.notes, "of the whole time range: a record without a job cannot be filtered by job")
	}
	s.notes = append(s.notes, r.callsCoverage(), r.eventsCoverage())
	return s
}

func (r *Report) lossesSection() section {
	s := section{title: "Losses", empty: "no losses recorded", columns: []column{text("cause"), text("source"), number("holes"), number("records lost"),
		words("from (UTC)"), words("to (UTC)"), text("detail")}}
	for _, l := range r.Losses.Rows {
		lost := figures.Count(l.Lost)
		if l.Unknown > 0 {
			lost = fmt.Sprintf("%s + %d x unknown", lost, l.Unknown)
		}
		s.rows = append(s.rows, []string{l.Cause, l.Source, figures.Count(l.Holes), lost, stamp(l.From), stamp(l.To), l.Detail})
	}
	s.notes = tableNotes(r.Losses)
	return s
}

// heading says in a few lines what the report is about.
func (r *Report) heading() []string {
	var lines []string
	span := "everything"
	switch {
	case !r.From.IsZero() && !r.To.IsZero():
		span = stamp(r.From) + " to " + stamp(r.To) + " UTC"
	case !r.From.IsZero():
		span = "since " + stamp(r.From) + " UTC"
	case !r.To.IsZero():
		span = "until " + stamp(r.To) + " UTC"
	}
	if !r.Read.First.IsZero() {
		span += fmt.Sprintf(" (records from %s to %s)", stamp(r.Read.First), stamp(r.Read.Last))
	}
	lines = append(lines, "time: "+span)
	if f := r.Filter.words(); f != "" {
		lines = append(lines, "only: "+f)
	}
	read := fmt.Sprintf("read: %s from %s", figures.Plural(r.Read.Records, "record"), strings.Join(r.Sources, ", "))
	if r.Read.Duplicates > 0 {
		read += fmt.Sprintf("; %s left out", figures.Plural(r.Read.Duplicates, "duplicate"))
	}
	if r.Read.Unreadable > 0 {
		read += fmt.Sprintf("; %s unreadable", figures.Plural(r.Read.Unreadable, "line"))
	}
	if r.Read.Torn > 0 {
		read += fmt.Sprintf("; %s", figures.Plural(r.Read.Torn, "torn line"))
	}
	if r.Read.Newer > 0 {
		read += fmt.Sprintf("; %s written by a newer version, which may say more than is shown", figures.Count(r.Read.Newer))
	}
	return append(lines, read)
}

func (f *Filter) words() string {
	var parts []string
	add := func(name string, values []string) {
		if len(values) > 0 {
			parts = append(parts, name+" "+strings.Join(values, " or "))
		}
	}
	add("repository", f.Repositories)
	add("workflow", f.Workflows)
	add("job", f.Jobs)
	add("run", f.Runs)
	if f.TrackingID != "" {
		parts = append(parts, "tracking id "+f.TrackingID)
	}
	var kinds []string
	for _, k := range f.Kinds {
		kinds = append(kinds, string(k))
	}
	add("kind", kinds)
	return strings.Join(parts, ", ")
}

// nothing says why there may be nothing to show.
func (r *Report) nothing() string {
	if r.Read.Selected > 0 {
		return ""
	}
	if r.Read.Records > 0 {
		return fmt.Sprintf("No record in this time range and filter, of %s read.", figures.Plural(r.Read.Records, "record"))
	}
	return "No record at all. Has docker been called since the installation? `tallyman doctor` tells what is wrong."
}
