package report

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/explain"
	"github.com/tallyman-ci/tallyman/record"
)

// maxPending bounds the bytes of ends that wait for their call. An end is written
// after its call, so that the two are apart only when the call took the long way
// through a spool file; when the bound is reached, all that wait are counted
// without their call.
const maxPending = 4 << 20

// maxStopping bounds the containers that were told to stop and have not ended; when
// it is reached all are forgotten, and their ends count by their exit codes.
const maxStopping = 4096

// aggregation turns lines into a Report.
type aggregation struct {
	o      Options
	top    int
	parser parser
	l      line
	key    []byte // scratch for keys of tables

	ids  *idSet
	runs *idSet // of runs and of jobs, for their numbers

	pending      map[id][]byte // ends whose call was not read yet
	pendingBytes int
	stopping     map[string]struct{} // containers told to stop, by id
	images       *images

	book   *explain.Book
	read   Read
	cover  CoverageByBasis
	totals Totals

	repositories, workflows, jobs *top[Usage]
	commands                      *top[Command]
	failures                      *top[Failure]
	failedCalls                   *top[FailedCall]
	failedPulls, couldNotStart    *top[FailedImage]
	named, pulled                 *top[ImageCount]
	registries                    *top[Registry]
	containers                    *top[Container]
	exits                         *top[ContainerExit]
	losses                        *top[Loss]
	longest                       []Call // sorted, longest first, at most a.top
}

func newAggregation(o Options) *aggregation {
	a := &aggregation{
		o: o, top: o.Top,
		book: explain.New(), ids: newIDSet(), runs: newIDSet(), images: newImages(),
		pending: make(map[id][]byte), stopping: make(map[string]struct{}),
		repositories: newTop[Usage](), workflows: newTop[Usage](), jobs: newTop[Usage](),
		commands: newTop[Command](), failures: newTop[Failure](), failedCalls: newTop[FailedCall](),
		failedPulls: newTop[FailedImage](), couldNotStart: newTop[FailedImage](),
		named: newTop[ImageCount](), pulled: newTop[ImageCount](), registries: newTop[Registry](),
		containers: newTop[Container](), exits: newTop[ContainerExit](), losses: newTop[Loss](),
	}
	switch {
	case a.top == 0:
		a.top = DefaultTop
	case a.top < 0:
		a.top = maxKeys
	}
	return a
}

// line counts one line of a journal.
func (a *aggregation) line(data []byte) {
	a.read.Lines++
	a.read.Bytes += int64(len(data)) + 1
	l := &a.l
	if err := a.parser.parse(data, l); err != nil {
		a.read.Unreadable++
		return
	}
	if string(l.kind) == "segment" { // the header of a journal segment
		return
	}
	if len(l.id) == 0 || len(l.kind) == 0 || l.ts.IsZero() {
		a.read.Unreadable++
		return
	}
	key := a.ids.key(l.id)
	m := a.ids.at(key)
	if *m&markRecord != 0 {
		a.read.Duplicates++
		return
	}
	*m |= markRecord
	a.read.Records++
	if l.schema > record.SchemaVersion {
		a.read.Newer++
	}
	switch record.Kind(l.kind) {
	case record.KindInvocation:
		*m |= a.invocation(l)
		ended := *m&markEnded != 0
		if waiting, ok := a.pending[key]; ok {
			a.meet(key, waiting, *m)
		} else if ended && *m&markSelected != 0 && *m&markOwn != 0 {
			a.totals.Ended++ // its end was counted without it
			a.totals.EndsAlone--
		}
	case record.KindInvocationEnd:
		a.endLine(l, data)
	case record.KindEvent:
		a.event(l)
	case record.KindLoss:
		a.loss(l)
	default: // job.start, job.end, and kinds of later versions
		if a.within(l.ts) && a.o.Filter.kind(record.Kind(l.kind)) && a.o.Filter.matches(&l.ci) {
			a.selected(l.ts, &l.ci)
		}
	}
}

// within says whether a time lies in the range asked for.
func (a *aggregation) within(t time.Time) bool {
	return !t.Before(a.o.From) && (a.o.To.IsZero() || t.Before(a.o.To))
}

// selected counts a record that range and filter let through, its run and its job.
func (a *aggregation) selected(t time.Time, ci *lineCI) {
	a.read.Selected++
	if a.read.First.IsZero() || t.Before(a.read.First) {
		a.read.First = t.UTC()
	}
	if t.After(a.read.Last) {
		a.read.Last = t.UTC()
	}
	if len(ci.runID) == 0 {
		return
	}
	a.key = appendKey(append(a.key[:0], 'r'), ci.repository)
	a.key = appendKey(a.key, ci.runID)
	if a.first(a.key) {
		a.totals.Runs++
	}
	a.key = appendKey(a.key, ci.job)
	a.key = appendKey(a.key, ci.trackingID)
	a.key = strconv.AppendInt(a.key, ci.runAttempt, 10)
	if a.first(a.key) {
		a.totals.Jobs++
	}
}

// first says whether this is the first time that key is seen.
func (a *aggregation) first(key []byte) bool {
	m := a.runs.at(a.runs.key(key))
	seen := *m&markRecord != 0
	*m |= markRecord
	return !seen
}

// count adds a record to the coverage of its basis.
func (c *Coverage) count(l *line) {
	if l.outsideJob {
		c.OutsideJob++
		return
	}
	c.Records++
	if l.ci.known() {
		c.WithJob++
	}
	if l.claim {
		c.Disputed++
	}
	switch record.By(l.by) {
	case record.BySealed:
		c.Sealed++
	case record.ByEnvironment:
		c.Environment++
	case record.ByInferred:
		c.Inferred++
	default:
		c.None++
	}
}

// invocation counts a call and returns the marks that its end needs.
func (a *aggregation) invocation(l *line) mark {
	marks := markCall
	var images []string
	for _, raw := range l.invocation.images {
		images = append(images, string(raw))
	}
	a.book.Call(string(l.host), string(l.id), l.ts, string(l.invocation.tool), string(l.invocation.command), images)
	own := !l.invocation.nested && !l.outsideJob
	if own {
		marks |= markOwn
	}
	if !a.within(l.ts) || !a.o.Filter.kind(record.KindInvocation) {
		return marks
	}
	if !l.invocation.nested {
		a.cover.Calls.count(l)
	}
	if !a.o.Filter.matches(&l.ci) {
		return marks
	}
	marks |= markSelected
	a.selected(l.ts, &l.ci)
	switch {
	case l.outsideJob:
		a.totals.OutsideJob++
		return marks
	case l.invocation.nested:
		a.totals.Nested++
		return marks
	}
	a.totals.Calls++
	if len(l.invocation.execError) > 0 {
		a.totals.NotExecuted++
	}
	a.usage(&l.ci, func(u *Usage) { u.Calls++ })
	a.command(l.invocation.tool, l.invocation.command).Calls++
	for _, raw := range l.invocation.images {
		im := a.images.normalise(raw)
		a.image(a.named, im).Count++
		a.registry(im).Named++
	}
	return marks
}

// endLine counts the end of a call, or keeps it until its call is read.
func (a *aggregation) endLine(l *line, data []byte) {
	if len(l.end.invocationID) == 0 {
		a.end(l, 0)
		return
	}
	key := a.ids.key(l.end.invocationID)
	m := a.ids.at(key)
	if *m&markEnded != 0 {
		return // a second end of the same call, seen by another agent
	}
	seen := string(l.end.source) != "unknown"
	a.book.End(string(l.host), string(l.end.invocationID), l.ts, seen)
	if !seen {
		return // it says that nobody saw the end: the call has none
	}
	*m |= markEnded
	if *m&markCall != 0 {
		a.end(l, *m)
		return
	}
	if a.pendingBytes+len(data) > maxPending {
		a.settle()
	}
	a.pending[key] = slices.Clone(data)
	a.pendingBytes += len(data)
}

// meet joins a call that has just been read with its waiting end.
func (a *aggregation) meet(key id, waiting []byte, marks mark) {
	delete(a.pending, key)
	a.pendingBytes -= len(waiting)
	if a.parser.parse(waiting, &a.l) == nil {
		a.end(&a.l, marks)
	}
}

// settle counts all ends that wait for a call without it.
func (a *aggregation) settle() {
	for key, waiting := range a.pending {
		a.meet(key, waiting, 0)
	}
}

// end counts the end of a call. marks are those of the call; without markCall the
// call is unknown and the end speaks for itself.
func (a *aggregation) end(l *line, marks mark) {
	e := &l.end
	started := l.ts.Add(-time.Duration(e.durationNS)).UTC()
	if marks&markCall == 0 {
		alone := a.o.Filter.kind(record.KindInvocationEnd) || a.o.Filter.kind(record.KindInvocation)
		if !alone || l.outsideJob || !a.within(started) || !a.o.Filter.matches(&l.ci) {
			return
		}
		a.totals.EndsAlone++
	} else if marks&markSelected == 0 || marks&markOwn == 0 {
		return
	} else {
		a.totals.Ended++
	}
	a.selected(l.ts, &l.ci)
	failed := e.signal != 0 || e.exited && e.exitCode != 0
	if e.exited || e.signal != 0 {
		a.totals.ExitKnown++
	}
	a.totals.DurationNS += e.durationNS
	command := a.command(e.tool, e.command)
	command.Ended++
	command.DurationNS += e.durationNS
	command.LongestNS = max(command.LongestNS, e.durationNS)
	if failed {
		command.Failed++
	}
	a.usage(&l.ci, func(u *Usage) {
		u.DurationNS += e.durationNS
		if failed {
			u.Failed++
		}
	})
	if e.durationNS > 0 {
		a.long(l, started)
	}
	if failed {
		a.failure(l)
	}
}

// failure counts a call that ended badly.
func (a *aggregation) failure(l *line) {
	e := &l.end
	a.totals.Failed++
	a.key = appendKey(a.key[:0], e.tool)
	a.key = appendKey(a.key, e.command)
	a.key = strconv.AppendInt(a.key, e.exitCode, 10)
	a.key = append(a.key, ' ')
	a.key = strconv.AppendInt(a.key, e.signal, 10)
	f := a.failures.at(a.key)
	if f.Calls == 0 {
		f.Tool, f.Command = cut(e.tool), cut(e.command)
		f.ExitCode, f.Signal = e.exitCode, e.signal
	}
	f.Calls++
	var named image
	if len(e.images) > 0 {
		named = a.images.normalise(e.images[0])
	}
	a.key = appendKey(append(a.key, ' '), []byte(named.name))
	c := a.failedCalls.at(a.key)
	c.Tool, c.Command, c.ExitCode, c.Signal, c.Image = f.Tool, f.Command, f.ExitCode, f.Signal, named.name
	c.Calls++
	switch command := string(e.command); {
	case isPull(command):
		a.totals.FailedPulls++
		a.failedImages(a.failedPulls, l, true)
	case isRun(command) && e.exitCode == exitNotStarted:
		a.totals.CouldNotStart++
		a.failedImages(a.couldNotStart, l, false)
	}
}

// exitNotStarted is docker run's exit code when docker itself failed, not the
// command in the container (docs.docker.com, "docker run", exit status).
const exitNotStarted = 125

func isPull(command string) bool {
	return command == "pull" || command == "image pull" || command == "compose pull"
}

func isRun(command string) bool { return command == "run" || command == "container run" }

func (a *aggregation) failedImages(t *top[FailedImage], l *line, pull bool) {
	if len(l.end.images) == 0 {
		a.failedImage(t, l, image{name: imageNone})
		return
	}
	for _, raw := range l.end.images {
		im := a.images.normalise(raw)
		a.failedImage(t, l, im)
		if pull {
			a.registry(im).Failed++
		}
	}
}

func (a *aggregation) failedImage(t *top[FailedImage], l *line, im image) {
	a.key = appendKey(a.key[:0], []byte(im.name))
	a.key = appendKey(a.key, l.ci.repository)
	a.key = appendKey(a.key, l.ci.workflow)
	a.key = appendKey(a.key, l.ci.job)
	f := t.at(a.key)
	if f.Failures == 0 {
		f.Image, f.Registry = im.name, im.registry
		f.Repository, f.Workflow, f.Job = cut(l.ci.repository), cut(l.ci.workflow), cut(l.ci.job)
	}
	f.Failures++
	if !l.ts.Before(f.Last) {
		f.Last, f.ExitCode, f.Signal = l.ts.UTC(), l.end.exitCode, l.end.signal
		f.RunID, f.JobURL = cut(l.ci.runID), cut(l.ci.jobURL)
	}
}

// long keeps the call if it is one of the longest so far.
func (a *aggregation) long(l *line, started time.Time) {
	e := &l.end
	if len(a.longest) == a.top && e.durationNS <= a.longest[len(a.longest)-1].DurationNS {
		return
	}
	c := Call{
		InvocationID: cut(e.invocationID), Started: started, Tool: cut(e.tool), Command: cut(e.command),
		Repository: cut(l.ci.repository), Workflow: cut(l.ci.workflow), Job: cut(l.ci.job),
		RunID: cut(l.ci.runID), JobURL: cut(l.ci.jobURL),
		DurationNS: e.durationNS, Signal: e.signal, Source: cut(e.source),
	}
	for _, raw := range e.images[:min(len(e.images), 8)] {
		c.Images = append(c.Images, cut(raw))
	}
	if e.exited {
		code := e.exitCode
		c.ExitCode = &code
	}
	at, _ := slices.BinarySearchFunc(a.longest, c, func(x, y Call) int { return cmp.Compare(y.DurationNS, x.DurationNS) })
	for at < len(a.longest) && a.longest[at].DurationNS == c.DurationNS {
		at++ // of equals the first read stays first
	}
	if len(a.longest) == a.top {
		a.longest = a.longest[:a.top-1]
	}
	a.longest = slices.Insert(a.longest, at, c)
}

// event counts an event of the daemon.
func (a *aggregation) event(l *line) {
	e := &l.event
	stopped := a.stopped(e)
	a.explain(l)
	if !a.within(l.ts) || !a.o.Filter.kind(record.KindEvent) {
		return
	}
	a.cover.Events.count(l)
	if !a.o.Filter.matches(&l.ci) {
		return
	}
	a.selected(l.ts, &l.ci)
	a.totals.Events++
	switch string(e.typ) {
	case "image":
		if string(e.action) == "pull" {
			a.totals.ImagesPulled++
			im := a.images.normalise(e.image)
			a.image(a.pulled, im).Count++
			a.registry(im).Pulled++
			a.usage(&l.ci, func(u *Usage) { u.ImagesPulled++ })
		}
	case "container":
		a.container(l, stopped)
	}
}

// explain looks whether a recorded call can have caused the event.
func (a *aggregation) explain(l *line) {
	e := &l.event
	at := l.ts
	if !e.replayed && !e.received.IsZero() {
		at = e.received // the daemon's clock may be another machine's
	}
	a.book.Event(string(l.host), explain.Event{
		At: at, Type: string(e.typ), Action: string(e.action), Actor: string(e.actorID), Container: string(e.container), Image: string(e.image),
		Counted: !l.outsideJob && a.within(l.ts) && a.o.Filter.kind(record.KindEvent),
	})
}

// stopped follows which containers were told to stop, and says of the end of a
// container whether it was one of them. Services of a job end that way each time
// (docker rm --force), with exit code 137, and are no failures.
func (a *aggregation) stopped(e *lineEvent) bool {
	if string(e.typ) != "container" {
		return false
	}
	switch string(e.action) {
	case "kill":
		switch e.signal {
		case 2, 3, 9, 15, 28: // INT, QUIT, KILL, TERM, WINCH (httpd): the stop signals of images in use
			if len(a.stopping) >= maxStopping {
				clear(a.stopping)
			}
			a.stopping[cut(e.actorID)] = struct{}{}
		}
	case "die":
		_, was := a.stopping[string(clip(e.actorID, maxKeyBytes))]
		if was {
			delete(a.stopping, cut(e.actorID))
		}
		return was && !e.oom
	}
	return false
}

func (a *aggregation) container(l *line, stopped bool) {
	e := &l.event
	action := string(e.action)
	if action != "create" && action != "start" && action != "die" {
		return
	}
	im := a.images.normalise(e.image)
	a.key = appendKey(a.key[:0], []byte(im.name))
	c := a.containers.at(a.key)
	c.Image = im.name
	switch action {
	case "create":
		a.totals.ContainersCreated++
		c.Created++
	case "start":
		a.totals.ContainersStarted++
		c.Started++
		if e.runnerMade {
			a.totals.ContainersRunner++
		}
		a.usage(&l.ci, func(u *Usage) { u.ContainersStarted++ })
	case "die":
		a.totals.ContainersEnded++
		a.totals.ContainerDurationNS += e.durationNS
		c.Ended++
		c.DurationNS += e.durationNS
		c.LongestNS = max(c.LongestNS, e.durationNS)
		if e.oom {
			a.totals.ContainersOOM++
			c.OOM++
		}
		switch {
		case stopped:
			a.totals.ContainersStopped++
			c.Stopped++
		case e.oom || e.exited && e.exitCode != 0:
			a.totals.ContainersFailed++
			c.Failed++
		}
		if e.exited {
			a.key = strconv.AppendInt(a.key[:0], e.exitCode, 10)
			a.key = strconv.AppendBool(append(a.key, ' '), stopped)
			x := a.exits.at(a.key)
			x.ExitCode, x.Stopped = e.exitCode, stopped
			x.Containers++
		}
	}
}

// loss counts a hole that touches the time range.
func (a *aggregation) loss(l *line) {
	x := &l.loss
	from, to := x.from, x.to
	if from.IsZero() {
		from = l.ts
	}
	if to.Before(from) {
		to = from
	}
	if !a.o.Filter.kind(record.KindLoss) || to.Before(a.o.From) || !a.o.To.IsZero() && !from.Before(a.o.To) {
		return
	}
	a.read.Selected++
	a.key = appendKey(a.key[:0], x.cause)
	a.key = appendKey(a.key, x.source)
	s := a.losses.at(a.key)
	if s.Holes == 0 {
		s.Cause, s.Source, s.From = cut(x.cause), cut(x.source), from.UTC()
	}
	s.Holes++
	if x.count > 0 {
		s.Lost += x.count
	} else if x.count < 0 {
		s.Unknown++
	}
	if from.Before(s.From) {
		s.From = from.UTC()
	}
	if to.After(s.To) {
		s.To = to.UTC()
	}
	s.Detail = cut(x.detail)
	calls, events := missing(string(x.cause), string(x.source))
	if calls {
		a.cover.Calls.lose(x.count)
	}
	if events {
		a.cover.Events.lose(x.count)
	}
}

func (c *Coverage) lose(n int64) {
	if n > 0 {
		c.Lost += n
	} else if n < 0 {
		c.LostUnknown++
	}
}

// missing says which figures of this report a loss makes too low. A loss on the
// way out (a sink's quarantine, dropped metrics, a sink's cursor) takes nothing
// from the journal.
func missing(cause, source string) (calls, events bool) {
	switch {
	case cause == "metrics_dropped" || cause == "quarantine_full":
		return false, false
	case cause == "disk_cap" && source != "journal": // a sink that was too late, one record for each such sink
		return false, false
	case cause == "rate_limited":
		return source != "events", source == "events"
	case source == "events" || cause == "stream_gap" || cause == "daemon_restarted":
		return false, true
	case cause == "cursor_lost":
		return false, false
	case source == "shim" || source == "spool" || cause == "shim" || cause == "truncated_file":
		return true, false
	}
	return true, true
}

// usage adds to the repository, the workflow and the job of a record, if it names one.
func (a *aggregation) usage(ci *lineCI, add func(*Usage)) {
	if !ci.known() {
		return
	}
	a.key = appendKey(a.key[:0], ci.repository)
	for i, t := range []*top[Usage]{a.repositories, a.workflows, a.jobs} {
		switch i {
		case 1:
			a.key = appendKey(a.key, ci.workflow)
		case 2:
			a.key = appendKey(a.key, ci.job)
		}
		u := t.at(a.key)
		if u.Repository == "" {
			u.Repository = cut(ci.repository)
			if i >= 1 {
				u.Workflow = cut(ci.workflow)
			}
			if i == 2 {
				u.Job = cut(ci.job)
			}
		}
		add(u)
	}
}

func (a *aggregation) command(tool, command []byte) *Command {
	a.key = appendKey(a.key[:0], tool)
	a.key = appendKey(a.key, command)
	c := a.commands.at(a.key)
	if c.Tool == "" {
		c.Tool, c.Command = cut(tool), cut(command)
	}
	return c
}

func (a *aggregation) image(t *top[ImageCount], im image) *ImageCount {
	a.key = appendKey(a.key[:0], []byte(im.name))
	c := t.at(a.key)
	c.Image, c.Registry = im.name, im.registry
	return c
}

func (a *aggregation) registry(im image) *Registry {
	a.key = appendKey(a.key[:0], []byte(im.registry))
	r := a.registries.at(a.key)
	r.Registry = im.registry
	return r
}

// cut copies a string of a record, cut to what a key may hold.
func cut(b []byte) string { return strings.ToValidUTF8(string(clip(b, maxKeyBytes)), "") }

// result closes the books.
func (a *aggregation) result() *Report {
	a.settle()
	a.book.Settle()
	explained := a.book.Counts()
	a.cover.Events.Explained, a.cover.Events.Unattributed = explained.Explained, explained.Unattributed
	a.totals.NoEnd = a.totals.Calls - a.totals.Ended
	byCalls := func(x, y *Usage) int {
		return cmp.Or(cmp.Compare(y.Calls, x.Calls), cmp.Compare(y.ImagesPulled+y.ContainersStarted, x.ImagesPulled+x.ContainersStarted))
	}
	byFailures := func(x, y *FailedImage) int {
		return cmp.Or(cmp.Compare(y.Failures, x.Failures), y.Last.Compare(x.Last))
	}
	byCount := func(x, y *ImageCount) int { return cmp.Compare(y.Count, x.Count) }
	r := &Report{
		Schema: SchemaVersion, Read: a.read, Coverage: a.cover, Totals: a.totals, Longest: a.longest,
		Repositories:  table(a.repositories, a.top, byCalls),
		Workflows:     table(a.workflows, a.top, byCalls),
		Jobs:          table(a.jobs, a.top, byCalls),
		Commands:      table(a.commands, a.top, func(x, y *Command) int { return cmp.Or(cmp.Compare(y.Calls, x.Calls), cmp.Compare(y.Ended, x.Ended)) }),
		Failures:      table(a.failures, a.top, func(x, y *Failure) int { return cmp.Compare(y.Calls, x.Calls) }),
		FailedCalls:   table(a.failedCalls, a.top, func(x, y *FailedCall) int { return cmp.Compare(y.Calls, x.Calls) }),
		FailedPulls:   table(a.failedPulls, a.top, byFailures),
		CouldNotStart: table(a.couldNotStart, a.top, byFailures),
		ImagesNamed:   table(a.named, a.top, byCount),
		ImagesPulled:  table(a.pulled, a.top, byCount),
		Registries: table(a.registries, a.top, func(x, y *Registry) int {
			return cmp.Or(cmp.Compare(y.Pulled, x.Pulled), cmp.Compare(y.Named, x.Named))
		}),
		Containers: table(a.containers, a.top, func(x, y *Container) int {
			return cmp.Or(cmp.Compare(y.Started, x.Started), cmp.Compare(y.Created, x.Created))
		}),
		ContainerExits: table(a.exits, a.top, func(x, y *ContainerExit) int { return cmp.Compare(y.Containers, x.Containers) }),
		Losses:         table(a.losses, a.top, func(x, y *Loss) int { return cmp.Or(cmp.Compare(y.Lost, x.Lost), x.From.Compare(y.From)) }),
	}
	if r.Longest == nil {
		r.Longest = []Call{}
	}
	return r
}

// table is the head of t, in the order of less.
func table[T any](t *top[T], n int, less func(a, b *T) int) Table[T] {
	out := Table[T]{Rows: []T{}, Slack: t.slack}
	for i, e := range t.sorted(less) {
		if i == n {
			out.More = len(t.entries) - n
			break
		}
		out.Rows = append(out.Rows, e.v)
	}
	return out
}
