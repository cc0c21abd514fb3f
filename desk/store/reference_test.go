package store

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/record"
)

// TestViewsByReference holds every view against the same answer computed in plain Go from
// the records: no SQL, no regular expression of the views, and another parser of image
// references. The corpus is unkind: calls without an end, with two, nested ones, jobs
// without hooks or name, doubles, clocks that run ahead, killed containers.
func TestViewsByReference(t *testing.T) {
	records := unkind(11, 2500)
	path := filepath.Join(t.TempDir(), "records.jsonl")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := bufio.NewWriter(f)
	if err := writeDoubled(w, records); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s, err := Open(t.Context(), []string{path}, Options{Owners: strings.NewReader(owners)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if st := s.Stats(); st.Unread != 0 {
		t.Fatalf("%+v", st)
	}
	ref := newReference(records)
	for _, v := range bq.Views() {
		if v.Name == "records_unique" {
			if got := rows(t, s, "SELECT COUNT(*) FROM tallyman.records_unique"); got[0] != fmt.Sprint(len(records)) {
				t.Errorf("records_unique has %s rows, want %d", got[0], len(records))
			}
			continue
		}
		compute := ref.views()[v.Name]
		if compute == nil {
			t.Errorf("%s: nothing computes it", v.Name)
			continue
		}
		got, err := s.Query(t.Context(), "SELECT * FROM tallyman."+v.Name)
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		have, want := lines(got.Rows), lines(compute())
		if len(want) < 2 {
			t.Errorf("%s: the corpus says next to nothing of it: %v", v.Name, want)
		}
		if !slices.Equal(have, want) {
			t.Errorf("%s (%s): %d rows, want %d; %s", v.Name, strings.Join(got.Columns, "|"), len(have), len(want), firstDifference(have, want))
		}
	}
}

// lines are rows as text, in order.
func lines(rows [][]any) []string {
	var out []string
	for _, r := range rows {
		var cells []string
		for _, v := range r {
			switch v := v.(type) {
			case nil:
				cells = append(cells, "NULL")
			case time.Time:
				cells = append(cells, v.UTC().Format(time.RFC3339Nano))
			case float64:
				cells = append(cells, strconv.FormatFloat(v, 'g', 12, 64))
			default:
				cells = append(cells, fmt.Sprint(v))
			}
		}
		out = append(out, strings.Join(cells, "|"))
	}
	slices.Sort(out)
	return out
}

func firstDifference(have, want []string) string {
	for i := range max(len(have), len(want)) {
		switch {
		case i >= len(want):
			return "too much: " + have[i]
		case i >= len(have):
			return "missing: " + want[i]
		case have[i] != want[i]:
			return "\n have " + have[i] + "\n want " + want[i]
		}
	}
	return "none"
}

// unkind makes the records of a fleet in which nothing can be relied on.
func unkind(seed uint64, jobs int) []record.Record {
	r := rand.New(rand.NewPCG(seed, 5))
	one := func(of ...string) string { return of[r.IntN(len(of))] }
	chance := func(percent int) bool { return r.IntN(100) < percent }
	number := func(n int64) *int64 { return &n }
	var out []record.Record
	put := func(ts time.Time, rec record.Record) string {
		rec.ID, rec.TS, rec.Schema = fmt.Sprintf("id-%06d", len(out)), ts.UTC().Truncate(time.Microsecond), record.SchemaVersion
		if rec.By == "" {
			rec.By = record.ByNone
		}
		out = append(out, rec)
		return rec.ID
	}
	id := strings.Repeat("0123456789abcdef", 4)
	image := func() string {
		return one("alpine", "alpine:3.20", "docker.io/library/alpine:3.20", "docker.io/acme/tool", "acme/tool:2", "ghcr.io/acme/base:7", "localhost/x",
			"localhost:5000/base/busybox:1", "registry.acme.example/tools/lint", "acme/tool@sha256:"+id, "sha256:"+id, id)
	}
	start := time.Date(2026, 11, 23, 20, 0, 0, 0, time.UTC)
	for job := range jobs {
		t := start.Add(time.Duration(r.Int64N(int64(52 * time.Hour))))
		host := &record.Host{Name: fmt.Sprintf("runner-%d", r.IntN(12))}
		if chance(80) {
			host.Node = fmt.Sprintf("node-%d", r.IntN(3))
		}
		var ci *record.CI
		by := record.By(one("sealed", "sealed", "sealed", "environment", "inferred", "none"))
		if by != record.ByNone {
			ci = &record.CI{Repository: one("acme/shop", "acme/billing", "acme/web", "other/thing"), Workflow: one("CI", "Nightly", ""), Job: one("build", "test", ""),
				Actor: one("ann", "bob", ""), RunID: fmt.Sprint(1000 + job/3), RunAttempt: int64(r.IntN(3)), Step: one("", "__run_2")}
			if chance(60) {
				ci.TrackingID = fmt.Sprintf("github_%d", job)
			}
			if chance(50) {
				ci.JobURL = fmt.Sprintf("https://github.com/%s/actions/runs/%s/job/%d", ci.Repository, ci.RunID, job)
			}
			if chance(5) {
				ci.RunID = "" // a record that names no run
			}
		}
		put := func(ts time.Time, rec record.Record) string {
			rec.CI, rec.Host, rec.By = ci, host, by
			return put(ts, rec)
		}
		if chance(85) {
			put(t, record.Record{Kind: record.KindJobStart, Job: &record.Job{Version: one("1.0", "1.1")}})
		}
		now := t
		for range r.IntN(6) {
			now = now.Add(time.Duration(r.Int64N(int64(90 * time.Second))))
			call := &record.Invocation{Tool: one("docker", "docker", "podman"), Nested: chance(6),
				Command: one("pull", "image pull", "compose pull", "run", "build", "login", "push")}
			for range r.IntN(3) {
				call.Images = append(call.Images, image())
			}
			if chance(3) {
				call.ExecError = "ENOENT"
			}
			outside := chance(4)
			id := put(now, record.Record{Kind: record.KindInvocation, Invocation: call, OutsideJob: outside})
			took := time.Duration(r.Int64N(int64(3 * time.Minute)))
			if chance(25) {
				took = time.Duration(r.Int64N(int64(10 * time.Second)))
			}
			for second := range 1 + r.IntN(20)/19 { // sometimes two ends
				end := &record.End{InvocationID: id, Tool: call.Tool, Command: call.Command, DurationNS: int64(took), Source: one("pidfd_info", "pidfd_info", "pidfd_info", "socket", "unknown")}
				switch r.IntN(8) {
				case 0:
					end.ExitCode = number(int64(r.IntN(3) + 1))
				case 1:
					end.Signal = int64(one("9", "15")[0])
				case 2: // only its duration is known
				default:
					end.ExitCode = number(0)
				}
				if chance(90) {
					put(now.Add(took+time.Duration(second)*time.Second), record.Record{Kind: record.KindInvocationEnd, End: end})
				}
			}
			// What the daemon tells of it, with a clock that may run ahead or behind.
			seen := now.Add(time.Duration(r.Int64N(int64(took)+1)) + time.Duration(r.IntN(7)-3)*time.Second)
			made := chance(10)
			if chance(50) {
				put(seen, record.Record{Kind: record.KindEvent, OutsideJob: chance(4), Event: &record.Event{Type: "image", Action: one("pull", "pull", "tag"), Image: image(), RunnerMade: made}})
			}
			if chance(60) {
				name, from := fmt.Sprintf("container-%d-%d", job, len(out)), image()
				event := func(after time.Duration, e record.Event) {
					e.Type, e.ActorID, e.Image, e.RunnerMade = "container", name, from, made
					put(seen.Add(after), record.Record{Kind: record.KindEvent, Event: &e})
				}
				event(0, record.Event{Action: "create"})
				event(time.Second, record.Event{Action: "start"})
				if chance(20) {
					event(2*time.Second, record.Event{Action: "kill", Signal: []int64{2, 3, 9, 15, 28, 1, 10}[r.IntN(7)]})
				}
				if chance(90) {
					die := record.Event{Action: "die", OOM: chance(5), DurationNS: int64(r.IntN(int(time.Minute)))}
					if chance(95) {
						die.ExitCode = number(int64([]int{0, 0, 1, 137}[r.IntN(4)]))
					}
					event(time.Duration(r.IntN(5))*time.Second, die)
				}
			}
		}
		if chance(80) {
			put(now.Add(time.Minute), record.Record{Kind: record.KindJobEnd, Job: &record.Job{Outcome: one("completed", "cancelled"), DurationNS: int64(now.Sub(t))}})
		}
	}
	for range jobs / 10 {
		loss := &record.Loss{Cause: one("queue_full", "torn_line", "shim"), Source: one("events", "journal"), Count: int64(r.IntN(9) + 1)}
		if chance(30) {
			loss.Count = -1
		}
		ts := start.Add(time.Duration(r.Int64N(int64(52 * time.Hour))))
		if chance(50) {
			loss.From, loss.To, loss.Detail = ts.Add(-time.Minute).Truncate(time.Microsecond), ts.Truncate(time.Microsecond), "somewhere"
		}
		put(ts, record.Record{Kind: record.KindLoss, Loss: loss, Host: &record.Host{Name: one("runner-1", "runner-2")}})
	}
	for range jobs {
		request := &record.HTTP{Source: "github-csv", Count: int64(r.IntN(4)), Host: "github.com", Class: one("git-refs", "git-fetch", "api", "pull"), Status: []int64{200, 401, 403, 0}[r.IntN(4)],
			UserAgent:  one("git/2.39.5 proactive", "git/2.47.1 (proactive)", "git/2.45.0 proactive", "git/2.46.2 nonproactive", "curl/8.1", "", "go-git/5", "git/2.51"),
			Repository: one("acme/lib", "acme/x"), RemoteAddr: one("192.0.2.1", ""), Anonymous: chance(50)}
		rec := record.Record{Kind: record.KindHTTP, HTTP: request}
		if request.Class == "pull" {
			request.Image, request.Pulls = "docker.io/library/alpine", number(int64(r.IntN(9)))
			rec.By, rec.CI = record.ByInferred, &record.CI{Repository: "acme/shop", Workflow: "CI", Job: "build"}
		}
		put(start.Add(time.Duration(r.Int64N(int64(52*time.Hour)))), rec)
	}
	return out
}

// writeDoubled writes records in a random order, some of them twice.
func writeDoubled(w io.Writer, records []record.Record) error {
	r := rand.New(rand.NewPCG(3, 3))
	for _, i := range r.Perm(len(records)) {
		line := append(record.Append(nil, &records[i]), '\n')
		for range 1 + r.IntN(30)/29 {
			if _, err := w.Write([]byte(strings.TrimRight(string(line), "\n") + "\n")); err != nil {
				return err
			}
		}
	}
	return nil
}

// referenceAnswers answers the questions of the views from records, each once.
type referenceAnswers struct {
	records    []record.Record
	calls      []refCall
	containers []refEvent
	pulls      []refEvent
	jobs       []refJob
}

// who is what calls and events say of their job.
type who struct {
	ts                                          time.Time
	id                                          string
	repository, workflow, job, actor, run, link string
	key                                         any // nil, or a string
	by, node, host                              string
}

type refCall struct {
	who
	step, tool, command, outcome string
	images                       []string
	exit, signal, took           any
}

type refEvent struct {
	who
	e       *record.Event
	outcome string
	login   bool
}

type refJob struct {
	who
	started, ended   bool
	outcome, version string
	took             any
}

func newReference(records []record.Record) *referenceAnswers {
	a := &referenceAnswers{records: records}
	a.findCalls()
	a.findEvents()
	a.findJobs()
	return a
}

func whose(r *record.Record) who {
	w := who{ts: r.TS, id: r.ID, by: string(r.By)}
	if r.Host != nil {
		w.host, w.node = r.Host.Name, r.Host.Node
		if w.node == "" {
			w.node = r.Host.Name
		}
	}
	if c := r.CI; c != nil {
		w.repository, w.workflow, w.job, w.actor, w.run, w.link = c.Repository, c.Workflow, c.Job, c.Actor, c.RunID, c.JobURL
		if c.RunID != "" {
			w.key = fmt.Sprintf("%s/%d/%s/%s", c.RunID, max(1, c.RunAttempt), c.Job, c.TrackingID)
		}
	}
	return w
}

// absent is NULL where a member is left out of a record.
func absent(n int64) any {
	if n == 0 {
		return nil
	}
	return n
}

func pointed(n *int64) any {
	if n == nil {
		return nil
	}
	return *n
}

func (a *referenceAnswers) findCalls() {
	ends := map[string]*record.Record{}
	for i := range a.records {
		r := &a.records[i]
		if r.Kind != record.KindInvocationEnd || r.End.Source == "unknown" {
			continue
		}
		if e := ends[r.End.InvocationID]; e == nil || r.TS.Before(e.TS) || r.TS.Equal(e.TS) && r.ID < e.ID {
			ends[r.End.InvocationID] = r
		}
	}
	for i := range a.records {
		r := &a.records[i]
		if r.Kind != record.KindInvocation || r.Invocation.Nested || r.OutsideJob {
			continue
		}
		c := refCall{who: whose(r), tool: r.Invocation.Tool, command: r.Invocation.Command, images: r.Invocation.Images, outcome: "unknown"}
		if r.CI != nil {
			c.step = r.CI.Step
		}
		if e := ends[r.ID]; e != nil {
			c.exit, c.signal, c.took = pointed(e.End.ExitCode), absent(e.End.Signal), absent(e.End.DurationNS)
			if e.End.ExitCode != nil && *e.End.ExitCode == 0 {
				c.outcome = "ok"
			}
			if e.End.ExitCode != nil && *e.End.ExitCode != 0 || e.End.Signal != 0 {
				c.outcome = "failed"
			}
		}
		if r.Invocation.ExecError != "" {
			c.outcome = "failed"
		}
		a.calls = append(a.calls, c)
	}
}

func (a *referenceAnswers) findEvents() {
	told, logins := map[string]time.Time{}, map[any]time.Time{}
	earliest := func(m map[any]time.Time, key any, ts time.Time) {
		if was, ok := m[key]; !ok || ts.Before(was) {
			m[key] = ts
		}
	}
	for i := range a.records {
		r := &a.records[i]
		switch {
		case r.Kind == record.KindInvocation && r.Invocation.Command == "login":
			if key := whose(r).key; key != nil {
				earliest(logins, key, r.TS)
			}
		case r.Kind == record.KindEvent && r.Event.Action == "kill" && slices.Contains([]int64{2, 3, 9, 15, 28}, r.Event.Signal):
			if was, ok := told[r.Event.ActorID]; !ok || r.TS.Before(was) {
				told[r.Event.ActorID] = r.TS
			}
		}
	}
	for i := range a.records {
		r := &a.records[i]
		if r.Kind != record.KindEvent || r.OutsideJob {
			continue
		}
		e := refEvent{who: whose(r), e: r.Event}
		switch {
		case r.Event.Type == "image" && r.Event.Action == "pull":
			ts, ok := logins[e.key]
			e.login = ok && !ts.After(r.TS)
			a.pulls = append(a.pulls, e)
		case r.Event.Type == "container" && slices.Contains([]string{"create", "start", "die"}, r.Event.Action):
			if r.Event.Action == "die" {
				ts, ok := told[r.Event.ActorID]
				switch code := r.Event.ExitCode; {
				case ok && !ts.After(r.TS) && !r.Event.OOM:
					e.outcome = "stopped"
				case r.Event.OOM || code != nil && *code != 0:
					e.outcome = "failed"
				default:
					e.outcome = "ok"
				}
			}
			a.containers = append(a.containers, e)
		}
	}
}

func (a *referenceAnswers) findJobs() {
	byKey := map[any]*refJob{}
	// less is SQL's MIN, for which what is absent is no text.
	less := func(into *string, s string) {
		if s != "" && (*into == "" || s < *into) {
			*into = s
		}
	}
	more := func(into *string, s string) {
		if s > *into {
			*into = s
		}
	}
	names := map[any]*[2]string{}
	for i := range a.records {
		r := &a.records[i]
		w := whose(r)
		if w.key == nil || !slices.Contains([]record.Kind{record.KindInvocation, record.KindEvent, record.KindJobStart, record.KindJobEnd}, r.Kind) {
			continue
		}
		j := byKey[w.key]
		if j == nil {
			j = &refJob{who: who{ts: r.TS, key: w.key}}
			byKey[w.key], names[w.key] = j, &[2]string{}
		}
		if r.TS.Before(j.ts) {
			j.ts = r.TS
		}
		less(&j.repository, w.repository)
		less(&j.workflow, w.workflow)
		less(&j.job, w.job)
		less(&j.actor, w.actor)
		less(&j.run, w.run)
		more(&j.link, w.link)
		less(&names[w.key][0], r.Host.Node)
		less(&names[w.key][1], r.Host.Name)
		switch r.Kind {
		case record.KindJobStart:
			j.started = true
			more(&j.version, r.Job.Version)
		case record.KindJobEnd:
			j.ended = true
			more(&j.outcome, r.Job.Outcome)
			if d := r.Job.DurationNS; d != 0 && (j.took == nil || d > j.took.(int64)) {
				j.took = d
			}
		}
	}
	for key, j := range byKey {
		if j.node = names[key][0]; j.node == "" {
			j.node = names[key][1]
		}
		a.jobs = append(a.jobs, *j)
	}
}

func hourOf(t time.Time) time.Time { return t.Truncate(time.Hour) }
func dayOf(t time.Time) time.Time  { return t.Truncate(24 * time.Hour) }

var imageID = regexp.MustCompile(`^(sha256:)?[0-9a-f]{64}$`)

// named is an image as docker shows it, and its registry.
func named(image string) (name, registry string) {
	if imageID.MatchString(image) {
		return "(by id)", ""
	}
	n, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		panic(err)
	}
	return reference.FamiliarString(reference.TagNameOnly(n)), reference.Domain(n)
}

// grouped adds up rows that begin with the same cells.
type grouped struct {
	order []string
	rows  map[string]*group
}

type group struct {
	key    []any
	n      map[string]int64
	values []int64 // for quantiles
	sets   map[string]map[any]bool
	last   time.Time
}

func (g *grouped) at(key ...any) *group {
	text := lines([][]any{key})[0]
	if g.rows == nil {
		g.rows = map[string]*group{}
	}
	if g.rows[text] == nil {
		g.rows[text] = &group{key: key, n: map[string]int64{}, sets: map[string]map[any]bool{}}
		g.order = append(g.order, text)
	}
	return g.rows[text]
}

func (x *group) distinct(name string, v any) {
	if x.sets[name] == nil {
		x.sets[name] = map[any]bool{}
	}
	if v != nil && v != "" {
		x.sets[name][v] = true
	}
}

func (x *group) count(name string, yes bool) {
	if yes {
		x.n[name]++
	}
}

func (x *group) add(name string, v any) {
	if n, ok := v.(int64); ok {
		x.n[name] += n
	}
}

func (x *group) value(v any) {
	if n, ok := v.(int64); ok {
		x.values = append(x.values, n)
	}
}

// quantile is the value that so many of a hundred do not exceed.
func (x *group) quantile(percent int) any {
	if len(x.values) == 0 {
		return nil
	}
	slices.Sort(x.values)
	for i, v := range x.values {
		if (i+1)*100 >= percent*len(x.values) {
			return v
		}
	}
	return nil
}

func (x *group) size(name string) int64 { return int64(len(x.sets[name])) }

// answer makes a row of each group: its key, and what cells adds.
func (g *grouped) answer(cells func(x *group) []any) [][]any {
	var out [][]any
	for _, text := range g.order {
		x := g.rows[text]
		out = append(out, append(slices.Clone(x.key), cells(x)...))
	}
	return out
}

func share(part, whole int64) float64 { return float64(part) / float64(whole) }

// views are the answers, by the views' names.
func (a *referenceAnswers) views() map[string]func() [][]any {
	return map[string]func() [][]any{
		"calls": a.viewCalls, "pulls": a.viewPulls, "containers": a.viewContainers, "jobs": a.viewJobs, "losses": a.viewLosses,
		"requests": a.viewRequests, "explained": a.viewExplained, "traffic": func() [][]any { return a.viewTraffic(nil) },
		"activity": a.viewActivity, "commands": a.viewCommands, "pulls_by_image": a.viewPullsByImage, "dockerhub_limit": a.viewLimit,
		"containers_per_job": a.viewContainersPerJob, "failures": a.viewFailures, "failed_pulls": a.viewFailedPulls, "slow_pulls": a.viewSlowPulls,
		"heavy_workflows": a.viewHeavy, "unattributed": a.viewUnattributed, "lost": a.viewLost, "coverage": a.viewCoverage, "recording": a.viewRecording,
		"golden_images": a.viewGolden, "teams": a.viewTeams, "traffic_by_team": a.viewTrafficByTeam,
	}
}

func (a *referenceAnswers) viewCalls() (out [][]any) {
	for _, c := range a.calls {
		out = append(out, []any{c.id, c.ts, hourOf(c.ts), c.repository, c.workflow, c.job, c.actor, c.run, c.key, c.link, c.step, c.by, c.node, c.host, c.tool, c.command,
			fmt.Sprint(c.images), c.outcome, c.exit, c.signal, c.took})
	}
	return out
}

func (a *referenceAnswers) viewPulls() (out [][]any) {
	for _, p := range a.pulls {
		image, registry := named(p.e.Image)
		out = append(out, []any{p.id, p.ts, hourOf(p.ts), p.repository, p.workflow, p.job, p.actor, p.run, p.key, p.by, p.node, image, registry, p.login})
	}
	return out
}

func (a *referenceAnswers) viewContainers() (out [][]any) {
	for _, c := range a.containers {
		image, _ := named(c.e.Image)
		out = append(out, []any{c.id, c.ts, hourOf(c.ts), c.repository, c.workflow, c.job, c.run, c.key, c.link, c.by, c.node, c.e.ActorID, image, c.e.Action, c.e.RunnerMade,
			c.outcome, pointed(c.e.ExitCode), c.e.OOM, absent(c.e.DurationNS)})
	}
	return out
}

func (a *referenceAnswers) viewJobs() (out [][]any) {
	for _, j := range a.jobs {
		out = append(out, []any{j.key, j.ts, hourOf(j.ts), j.repository, j.workflow, j.job, j.actor, j.run, j.link, j.node, j.started, j.ended, j.outcome, j.took, j.version})
	}
	return out
}

func (a *referenceAnswers) losses(each func(r *record.Record, lost any)) {
	for i := range a.records {
		if r := &a.records[i]; r.Kind == record.KindLoss {
			var lost any
			if r.Loss.Count > 0 {
				lost = r.Loss.Count
			}
			each(r, lost)
		}
	}
}

func (a *referenceAnswers) viewLosses() (out [][]any) {
	moment := func(t time.Time) any {
		if t.IsZero() {
			return nil
		}
		return t
	}
	a.losses(func(r *record.Record, lost any) {
		out = append(out, []any{r.ID, r.TS, hourOf(r.TS), r.Loss.Cause, r.Loss.Source, lost, moment(r.Loss.From), moment(r.Loss.To), r.Loss.Detail, r.Host.Name})
	})
	return out
}

// gitVersion is the version of a git's User-Agent, major and minor, and whether it bears
// the mark of a golden image.
func gitVersion(agent string) (version string, proactive bool) {
	for _, word := range strings.FieldsFunc(agent, func(r rune) bool { return strings.ContainsRune(" +;()/", r) }) {
		proactive = proactive || word == "proactive"
	}
	rest, ok := strings.CutPrefix(agent, "git/")
	parts := strings.Split(strings.Fields(rest + " x")[0], ".")
	if !ok || len(parts) < 2 {
		return "", proactive
	}
	return parts[0] + "." + parts[1], proactive
}

func (a *referenceAnswers) viewRequests() (out [][]any) {
	for i := range a.records {
		r := &a.records[i]
		if r.Kind != record.KindHTTP {
			continue
		}
		h, w := r.HTTP, whose(r)
		version, proactive := gitVersion(h.UserAgent)
		var pulls int64
		if h.Pulls != nil {
			pulls = *h.Pulls
		}
		out = append(out, []any{r.ID, r.TS, hourOf(r.TS), h.Source, h.Count, h.Host, h.Class, h.Repository, absent(h.Status), h.UserAgent, version, proactive, h.RemoteAddr, h.Anonymous,
			h.Image, pulls, w.repository, w.workflow, w.job})
	}
	return out
}

// explains says for each pull, creation and start whether a call on its host explains it.
func (a *referenceAnswers) explains(each func(e refEvent, explained bool)) {
	onHost := map[string][]refCall{}
	for _, c := range a.calls {
		onHost[c.host] = append(onHost[c.host], c)
	}
	for _, e := range append(slices.Clone(a.pulls), a.containers...) {
		if e.e.Action == "die" {
			continue
		}
		explained := e.e.RunnerMade
		for _, c := range onHost[e.host] {
			took := time.Hour
			if n, ok := c.took.(int64); ok {
				took = time.Duration(n).Truncate(time.Microsecond)
			}
			if !e.ts.Before(c.ts.Add(-2*time.Second)) && !e.ts.After(c.ts.Add(took+2*time.Second)) {
				explained = true
			}
		}
		each(e, explained)
	}
}

func (a *referenceAnswers) viewExplained() (out [][]any) {
	a.explains(func(e refEvent, explained bool) {
		out = append(out, []any{e.id, e.ts, hourOf(e.ts), e.repository, e.workflow, e.job, e.by, e.node, e.e.Type, e.e.Action, e.e.RunnerMade, explained})
	})
	return out
}

func (a *referenceAnswers) viewCoverage() [][]any {
	var g grouped
	a.explains(func(e refEvent, explained bool) {
		x := g.at(dayOf(e.ts), e.node, e.e.Type, e.e.Action)
		x.count("all", true)
		x.count("explained", explained)
	})
	return g.answer(func(x *group) []any {
		return []any{x.n["all"], x.n["explained"], share(x.n["explained"], x.n["all"])}
	})
}

func (a *referenceAnswers) viewTraffic(team func(repository string) string) [][]any {
	var g grouped
	for _, c := range a.calls {
		key := []any{dayOf(c.ts), c.repository, c.workflow, c.job, c.actor}
		if team != nil {
			key = []any{dayOf(c.ts), team(c.repository)}
		}
		x := g.at(key...)
		x.count("calls", true)
		x.count("failed", c.outcome == "failed")
		x.distinct("runs", c.run)
		x.add("time", c.took)
		if x.sets["repositories"] == nil {
			x.sets["repositories"] = map[any]bool{}
		}
		x.sets["repositories"][c.repository] = true // the one without a name counts
	}
	return g.answer(func(x *group) []any {
		if team != nil {
			return []any{x.size("repositories"), x.n["calls"], x.n["failed"], x.n["time"]}
		}
		return []any{x.n["calls"], x.n["failed"], x.size("runs"), x.n["time"]}
	})
}

func (a *referenceAnswers) viewActivity() [][]any {
	var g grouped
	for _, c := range a.calls {
		x := g.at(hourOf(c.ts))
		x.count("calls", true)
		x.count(c.outcome, true)
	}
	return g.answer(func(x *group) []any { return []any{x.n["calls"], x.n["ok"], x.n["failed"], x.n["unknown"]} })
}

func (a *referenceAnswers) viewCommands() [][]any {
	var g grouped
	for _, c := range a.calls {
		x := g.at(dayOf(c.ts), c.tool, c.command)
		x.count("calls", true)
		x.count(c.outcome, true)
		x.add("time", c.took)
		x.value(c.took)
	}
	return g.answer(func(x *group) []any {
		return []any{x.n["calls"], x.n["failed"], x.n["unknown"], x.n["time"], x.quantile(50), x.quantile(95), x.quantile(100)}
	})
}

func (a *referenceAnswers) viewPullsByImage() [][]any {
	var g grouped
	for _, p := range a.pulls {
		image, registry := named(p.e.Image)
		x := g.at(dayOf(p.ts), image, registry)
		x.count("pulls", true)
		for name, v := range map[string]string{"repositories": p.repository, "nodes": p.node} {
			if x.sets[name] == nil {
				x.sets[name] = map[any]bool{}
			}
			x.sets[name][v] = true
		}
		x.distinct("jobs", p.key)
	}
	return g.answer(func(x *group) []any {
		return []any{x.n["pulls"], x.size("repositories"), x.size("jobs"), x.size("nodes")}
	})
}

func (a *referenceAnswers) viewLimit() (out [][]any) {
	type place struct {
		node string
		hour time.Time
	}
	hourly := map[place]int64{}
	for _, p := range a.pulls {
		if _, registry := named(p.e.Image); registry == "docker.io" && !p.login {
			hourly[place{p.node, hourOf(p.ts)}]++
		}
	}
	for at, n := range hourly {
		var sum int64
		for back := range 6 {
			sum += hourly[place{at.node, at.hour.Add(-time.Duration(back) * time.Hour)}]
		}
		out = append(out, []any{at.node, at.hour, n, sum, float64(sum) / 100})
	}
	return out
}

func (a *referenceAnswers) viewContainersPerJob() (out [][]any) {
	var g grouped
	for _, c := range a.containers {
		if c.key == nil {
			continue
		}
		x := g.at(c.repository, c.workflow, c.job, c.key)
		if x.last.IsZero() || c.ts.Before(x.last) {
			x.last = c.ts
		}
		x.count(c.e.Action, true)
		x.count("failed", c.outcome == "failed")
		x.count("oom", c.e.Action == "die" && c.e.OOM)
		image, _ := named(c.e.Image)
		x.distinct("images", image)
		x.add("time", absent(c.e.DurationNS))
	}
	for _, text := range g.order {
		x := g.rows[text]
		out = append(out, append(append([]any{x.last}, x.key...), x.n["create"], x.n["start"], x.n["failed"], x.n["oom"], x.size("images"), x.n["time"]))
	}
	return out
}

func (a *referenceAnswers) viewFailures() [][]any {
	var g grouped
	for _, c := range a.calls {
		if c.outcome != "failed" {
			continue
		}
		x := g.at(dayOf(c.ts), c.repository, c.workflow, c.job, c.tool, c.command, c.exit, c.signal)
		x.count("calls", true)
		if c.ts.After(x.last) {
			x.last = c.ts
		}
	}
	return g.answer(func(x *group) []any { return []any{x.n["calls"], x.last} })
}

func (a *referenceAnswers) viewFailedPulls() (out [][]any) {
	for _, c := range a.calls {
		if c.outcome != "failed" || !slices.Contains([]string{"pull", "image pull", "compose pull"}, c.command) {
			continue
		}
		row := []any{c.ts, hourOf(c.ts), c.repository, c.workflow, c.job, c.run, c.link, c.node, c.exit}
		if len(c.images) == 0 {
			out = append(out, append(row, "(not named)", ""))
		}
		for _, i := range c.images {
			image, registry := named(i)
			out = append(out, append(slices.Clone(row), image, registry))
		}
	}
	return out
}

func (a *referenceAnswers) viewSlowPulls() [][]any {
	var g grouped
	for _, c := range a.calls {
		if c.outcome != "ok" || c.took == nil || len(c.images) != 1 || c.command != "pull" && c.command != "image pull" {
			continue
		}
		image, registry := named(c.images[0])
		x := g.at(dayOf(c.ts), image, registry)
		x.count("pulls", true)
		x.value(c.took)
	}
	return g.answer(func(x *group) []any { return []any{x.n["pulls"], x.quantile(50), x.quantile(95), x.quantile(100)} })
}

func (a *referenceAnswers) viewHeavy() [][]any {
	var used, ran grouped
	for _, c := range a.calls {
		if c.repository != "" {
			x := used.at(dayOf(c.ts), c.repository, c.workflow)
			x.count("calls", true)
			x.add("time", c.took)
		}
	}
	for _, p := range a.pulls {
		if p.repository != "" {
			used.at(dayOf(p.ts), p.repository, p.workflow).count("pulls", true)
		}
	}
	for _, c := range a.containers {
		if c.repository != "" && c.e.Action == "start" {
			used.at(dayOf(c.ts), c.repository, c.workflow).count("containers", true)
		}
	}
	for _, j := range a.jobs {
		ran.at(dayOf(j.ts), j.repository, j.workflow).distinct("runs", j.run)
	}
	return used.answer(func(x *group) []any {
		runs := ran.at(x.key...).size("runs")
		var each any
		if runs > 0 {
			each = share(x.n["time"], runs)
		}
		return []any{runs, x.n["calls"], x.n["pulls"], x.n["containers"], x.n["time"], each}
	})
}

func (a *referenceAnswers) viewUnattributed() [][]any {
	var g grouped
	add := func(w who, basis string) {
		x := g.at(dayOf(w.ts), basis)
		x.count("all", true)
		x.count("none", w.repository == "")
	}
	for _, c := range a.calls {
		add(c.who, "calls")
	}
	for _, p := range a.pulls {
		add(p.who, "pulls")
	}
	for _, c := range a.containers {
		if c.e.Action == "start" {
			add(c.who, "containers")
		}
	}
	return g.answer(func(x *group) []any { return []any{x.n["all"], x.n["none"], share(x.n["none"], x.n["all"])} })
}

func (a *referenceAnswers) viewLost() [][]any {
	var g grouped
	a.losses(func(r *record.Record, lost any) {
		x := g.at(dayOf(r.TS), r.Loss.Cause, r.Loss.Source)
		x.count("holes", true)
		x.count("unknown", lost == nil)
		x.add("lost", lost)
	})
	return g.answer(func(x *group) []any { return []any{x.n["holes"], x.n["lost"], x.n["unknown"]} })
}

func (a *referenceAnswers) viewRecording() [][]any {
	var g grouped
	for _, j := range a.jobs {
		x := g.at(dayOf(j.ts))
		x.count("jobs", true)
		x.count("recorded", j.started)
	}
	for _, c := range a.calls {
		x := g.at(dayOf(c.ts))
		x.count("calls", true)
		x.count(c.by, true)
	}
	a.losses(func(r *record.Record, lost any) {
		x := g.at(dayOf(r.TS))
		x.count("holes", lost == nil)
		x.add("lost", lost)
	})
	return g.answer(func(x *group) []any {
		return []any{x.n["jobs"], x.n["recorded"], x.n["calls"], x.n["sealed"], x.n["environment"], x.n["inferred"], x.n["none"], x.n["lost"], x.n["holes"]}
	})
}

func (a *referenceAnswers) viewGolden() [][]any {
	var g grouped
	for i := range a.records {
		r := &a.records[i]
		if r.Kind != record.KindHTTP || r.HTTP.Count <= 0 {
			continue
		}
		version, proactive := gitVersion(r.HTTP.UserAgent)
		if version == "" {
			continue
		}
		x := g.at(dayOf(r.TS), version, proactive)
		x.add("all", r.HTTP.Count)
		if r.HTTP.Status == 401 {
			x.add("refused", r.HTTP.Count)
		}
	}
	return g.answer(func(x *group) []any {
		var major, minor int
		if _, err := fmt.Sscanf(x.key[1].(string), "%d.%d", &major, &minor); err != nil {
			panic(err)
		}
		old := major < 2 || major == 2 && minor < 46
		return []any{x.n["all"], x.n["refused"], share(x.n["refused"], x.n["all"]), x.key[2].(bool) && old}
	})
}

// team applies the rules of the test's owners.
func team(repository string) string {
	switch {
	case repository == "acme/billing":
		return "@acme/money"
	case strings.HasPrefix(repository, "acme/"):
		return "@acme/all"
	}
	return ""
}

func (a *referenceAnswers) viewTeams() (out [][]any) {
	seen := map[string]bool{}
	for _, j := range a.jobs {
		if name := team(j.repository); name != "" && !seen[j.repository] {
			seen[j.repository] = true
			out = append(out, []any{j.repository, name})
		}
	}
	return out
}

func (a *referenceAnswers) viewTrafficByTeam() [][]any {
	return a.viewTraffic(func(repository string) string {
		if name := team(repository); name != "" {
			return name
		}
		return "(no owner)"
	})
}
