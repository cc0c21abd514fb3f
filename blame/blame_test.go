package blame_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/blame/sim"
	"github.com/tallyman-ci/tallyman/record"
)

func read(f *sim.Fleet) (*blame.Requests, *blame.Builds) {
	requests, builds := blame.NewRequests(), blame.NewBuilds()
	for _, q := range f.Requests {
		requests.Add(q.Time, 1, blame.Mark{UserAgent: q.UserAgent})
	}
	for r := range f.Records() {
		builds.Add(r)
	}
	return requests, builds
}

func rank(t *testing.T, f *sim.Fleet, o blame.Options) *blame.Result {
	t.Helper()
	q, b := read(f)
	r, err := blame.Rank(context.Background(), q, b, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// only is a ranking without intervals, names and an estimate of the clocks, which is quick.
var only = blame.Options{Resamples: -1, Placebos: -1, Shift: new(time.Duration)}

func guilty(f *sim.Fleet) (list []blame.Candidate) {
	for i := range f.Workflows {
		if f.Workflows[i].Guilty() {
			var c blame.Candidate
			c.Repository, c.Workflow, c.Job = f.Candidate(i)
			list = append(list, c)
		}
	}
	return list
}

// hits is how many of the guilty are among as many first suspects.
func hits(f *sim.Fleet, r *blame.Result) (n int) {
	list := guilty(f)
	for _, s := range r.Suspects[:min(len(list), len(r.Suspects))] {
		if len(s.Members) == 1 && slices.Contains(list, s.Members[0]) {
			n++
		}
	}
	return n
}

// The promise in small: 500 jobs at once, one address, 200 workflows of which three are
// guilty, every tenth record missing, clocks off by two seconds. make bench-blame has it
// for a day and a hundred fleets.
func TestTheGuiltyComeFirst(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 1, Hours: 6, Missing: 0.1, Skew: 2 * time.Second})
	r := rank(t, f, only)
	if n := hits(f, r); n != 3 {
		t.Errorf("%d of 3 guilty on top: %v", n, r.Suspects[:3])
	}
	counted := 0
	for _, b := range r.ByOverlap[:3] {
		if slices.Contains(guilty(f), b.Candidate) {
			counted++
		}
	}
	if counted == 3 {
		t.Error("counting would have done, so this fleet shows nothing")
	}
}

// What builds are said to explain is what they asked for. Requests of others come in
// bursts, which a fit that keeps every rate gives to whoever was building: a fifth more.
func TestHowManyRequests(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 1, Hours: 8, Missing: 0.1, Skew: 2 * time.Second})
	asked := map[blame.Candidate]float64{}
	for _, b := range f.Builds {
		var c blame.Candidate
		c.Repository, c.Workflow, c.Job = f.Candidate(b.Workflow)
		if b.Recorded {
			asked[c] += float64(b.Requests)
		}
	}
	value, truth, all := 0.0, 0.0, 0
	for _, s := range rank(t, f, blame.Options{Resamples: -1, Placebos: 2, Shift: new(time.Duration)}).Suspects {
		if n := asked[s.Members[0]]; n > 0 && len(s.Members) == 1 {
			value, truth, all = value+s.Requests.Value, truth+n, all+1
		}
	}
	if all != 3 || value < 0.9*truth || value > 1.1*truth {
		t.Errorf("%.0f requests of %d suspects, who made %.0f", value, all, truth)
	}
}

// Clocks of all runners that are 45 seconds ahead of the server's make requests come
// before their builds.
func TestClocksThatAreOffAreFound(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 4, Hours: 3, Jobs: 30, Workflows: 12, Guilty: 2, Offset: -45 * time.Second})
	o := only
	o.Shift = nil
	r := rank(t, f, o)
	if r.Shift > -15*time.Second || hits(f, r) != 2 {
		t.Errorf("shift %s, %d of 2 guilty on top", r.Shift, hits(f, r))
	}
	if r := rank(t, f, only); r.Shift != 0 {
		t.Errorf("a shift of %s although it was given as 0", r.Shift)
	}
}

func TestNobodyIsNamedWhereNobodyIsGuilty(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 2, Hours: 2, Jobs: 20, Workflows: 8, Guilty: -1, Background: 0.1})
	r := rank(t, f, blame.Options{Resamples: 20, Placebos: 4, Shift: new(time.Duration)})
	if r.Verdict != blame.CannotTell {
		t.Errorf("verdict %s, suspects %+v", r.Verdict, r.Suspects)
	}
	for _, s := range r.Suspects {
		if s.Named {
			t.Errorf("%v is named", s.Members)
		}
	}
}

// Whom to name takes all placebos, by which chance does so in one of twenty fleets; that
// nobody is, fewer.
func TestAsManyPlacebosAsItTakes(t *testing.T) {
	for guilty, want := range map[int]float64{2: 19, -1: 9} {
		f := sim.Run(sim.Config{Seed: 1, Hours: 3, Jobs: 30, Workflows: 12, Guilty: guilty, Background: 0.1})
		r := rank(t, f, blame.Options{Resamples: 20, Shift: new(time.Duration)})
		if named := r.Suspects[0].Named; named != (guilty > 0) {
			t.Errorf("%d guilty: named %t", guilty, named)
		}
		// A chance is a number of candidates in placebos over that of all.
		n := r.Suspects[0].PValue * (1 + want*float64(r.Candidates))
		if math.Abs(n-math.Round(n)) > 1e-6 {
			t.Errorf("%d guilty: a chance of %g is of no %g fits to %d candidates", guilty, r.Suspects[0].PValue, want, r.Candidates)
		}
		if text := strings.Join(r.Reasons, " "); guilty > 0 && !strings.Contains(text, "one of 20 such files") {
			t.Errorf("reasons: %s", text)
		}
	}
}

// Where few of the builds are recorded, the verdict says so.
func TestCoverageBelongsToTheVerdict(t *testing.T) {
	for missing, want := range map[float64]blame.Verdict{0.3: blame.Indications, 0.7: blame.CannotTell} {
		f := sim.Run(sim.Config{Seed: 3, Hours: 3, Jobs: 30, Workflows: 12, Guilty: 2, Missing: missing})
		r := rank(t, f, blame.Options{Resamples: 20, Placebos: 4, Shift: new(time.Duration)})
		truth := 0.0
		for _, b := range f.Builds {
			if b.Recorded {
				truth += 1 / float64(len(f.Builds))
			}
		}
		if d := r.Coverage.Share - truth; d > 0.06 || d < -0.06 {
			t.Errorf("coverage %.2f, and %.2f is true", r.Coverage.Share, truth)
		}
		if r.Verdict != want || !strings.Contains(strings.Join(r.Reasons, " "), "of the builds are believed to be recorded") {
			t.Errorf("missing %.1f: verdict %s, want %s: %v", missing, r.Verdict, want, r.Reasons)
		}
	}
}

// Two jobs that each push starts together cannot be told apart: neither may be named alone.
func TestTogetherIsOneSuspect(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 6, Hours: 4, Jobs: 30, Workflows: 12, Guilty: 1})
	q, _ := read(f)
	b := blame.NewBuilds()
	add := func(c blame.Candidate, x sim.Build, later time.Duration) {
		b.AddBuild(blame.Build{Candidate: c, Start: x.Start.Add(later), End: x.Start.Add(x.Duration)}, x.RunNumber)
	}
	c := guilty(f)[0]
	twin := c
	twin.Job = "twin"
	for _, x := range f.Builds {
		var who blame.Candidate
		who.Repository, who.Workflow, who.Job = f.Candidate(x.Workflow)
		add(who, x, 0)
		if who == c {
			add(twin, x, 200*time.Millisecond)
		}
	}
	r, err := blame.Rank(context.Background(), q, b, blame.Options{Resamples: 20, Placebos: 4, Shift: new(time.Duration)})
	if err != nil {
		t.Fatal(err)
	}
	if s := r.Suspects[0]; len(s.Members) != 2 || !slices.Contains(s.Members, c) || !slices.Contains(s.Members, twin) || !s.Named {
		t.Errorf("the first suspect is %v, named %v; guilty are %v", s.Members, s.Named, c)
	}
	if !strings.Contains(strings.Join(r.Reasons, " "), "chance names somebody in about one of 5 such files") { // four placebos
		t.Errorf("no word of what chance does in %v", r.Reasons)
	}
	if !strings.Contains(strings.Join(r.Reasons, " "), "always start together") {
		t.Errorf("no word of it in %v", r.Reasons)
	}
}

func TestThereIsNothingToRank(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 3, Hours: 1, Jobs: 10, Workflows: 4, Guilty: 1})
	q, b := read(f)
	ctx := context.Background()
	if _, err := blame.Rank(ctx, blame.NewRequests(), b, only); !errors.Is(err, blame.ErrNoRequests) {
		t.Errorf("without requests: %v", err)
	}
	if _, err := blame.Rank(ctx, q, blame.NewBuilds(), only); !errors.Is(err, blame.ErrNoBuilds) {
		t.Errorf("without builds: %v", err)
	}
	late := blame.NewRequests()
	late.Add(sim.Begin.AddDate(0, 1, 0), 5, blame.Mark{})
	var apart *blame.NoOverlapError
	if _, err := blame.Rank(ctx, late, b, only); !errors.As(err, &apart) || !apart.RequestsFrom.Equal(sim.Begin.AddDate(0, 1, 0)) {
		t.Errorf("a month apart: %v", err)
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := blame.Rank(done, q, b, only); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
}

// What counts as a build, and what counts as one only.
func TestBuildsOfRecords(t *testing.T) {
	at := sim.Begin
	call := func(id, command string, flags ...string) *record.Record {
		return &record.Record{ID: id, TS: at, Kind: record.KindInvocation, By: record.BySealed,
			CI:         &record.CI{Repository: "a/b", Workflow: "CI", Job: "j", RunNumber: 7},
			Invocation: &record.Invocation{Tool: "docker", Command: command, Flags: flags, Images: []string{"r.test:5000/a/b:1"}}}
	}
	b := blame.NewBuilds()
	for i, c := range []string{"build", "image build", "buildx build", "buildx bake", "compose build"} {
		b.Add(call(fmt.Sprint("build", i), c))
		b.Add(call(fmt.Sprint("build", i), c)) // delivered twice
	}
	b.Add(call("up", "compose up", "--build"))
	if b.Len() != 6 {
		t.Errorf("%d builds, want 6", b.Len())
	}
	b.Add(call("up2", "compose up", "-d"))
	b.Add(call("run", "run"))
	nested := call("nested", "build")
	nested.Invocation.Nested = true
	b.Add(nested)
	never := call("never", "build")
	never.Invocation.ExecError = "ENOENT"
	b.Add(never)
	if b.Len() != 6 {
		t.Errorf("%d builds after what builds nothing, want 6", b.Len())
	}
	// An end that comes before its call, as sinks may deliver it.
	c := blame.NewBuilds()
	c.Add(&record.Record{ID: "e", TS: at.Add(time.Minute), Kind: record.KindInvocationEnd, End: &record.End{InvocationID: "x", Command: "build", DurationNS: int64(time.Minute)}})
	c.Add(call("x", "build"))
	if _, last, ok := c.Span(); !ok || !last.Equal(at.Add(time.Minute)) {
		t.Errorf("the build ends at %s", last)
	}
}

// Who starts when a guilty one starts fits what the guilty one's builds did that nobody
// recorded. It is judged by the builds at which the guilty one is recorded.
func TestCompanyOfTheGuilty(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 11, Hours: 12, Jobs: 60, Workflows: 30, Guilty: 1, Missing: 0.3})
	q, b := read(f)
	c := guilty(f)[0]
	company := blame.Candidate{Repository: "acme/company", Workflow: "CI", Job: "build"}
	r := rand.New(rand.NewPCG(1, 2))
	for _, x := range f.Builds {
		var who blame.Candidate
		if who.Repository, who.Workflow, who.Job = f.Candidate(x.Workflow); who == c {
			start := x.Start.Add(time.Duration(40e9 * (r.Float64() - r.Float64())))
			b.AddBuild(blame.Build{Candidate: company, Start: start, End: start.Add(3 * time.Minute)}, x.RunNumber)
		}
	}
	found, err := blame.Rank(context.Background(), q, b, only)
	if err != nil {
		t.Fatal(err)
	}
	if first := found.Suspects[0]; len(first.Members) != 1 || first.Members[0] != c {
		t.Errorf("the first suspect is %v, and %v is guilty", first.Members, c)
	}
	for _, s := range found.Suspects {
		if s.Members[0] == company && s.Evidence > 6 { // 4.9, and 7.5 by all of its builds
			t.Errorf("the company of the guilty has evidence of %.1f against it", s.Evidence)
		}
	}
}

// A timetable starts many at the hour. Those are told apart by the rest of their builds.
func TestTimetableIsNoCompany(t *testing.T) {
	f := sim.Run(sim.Config{Seed: 9, Hours: 8, Missing: 0.1, Skew: 2 * time.Second})
	r := rank(t, f, only)
	for _, s := range r.Suspects[:3] {
		if len(s.Members) > 1 {
			t.Errorf("%v are taken for one", s.Members)
		}
	}
}

// Of builds outside of the time that requests cover, nothing is said: not how many lack
// an end either, which would be more than there are builds.
func TestAssumedEndsAreOfTheBuildsInTime(t *testing.T) {
	start := time.Date(2026, 3, 2, 8, 0, 0, 0, time.UTC)
	q, b := blame.NewRequests(), blame.NewBuilds()
	c := blame.Candidate{Repository: "acme/app", Workflow: "CI", Job: "build"}
	for i := range 60 {
		q.Add(start.Add(time.Duration(i)*time.Minute), 1, blame.Mark{})
	}
	for i := range 100 { // from two hours before the first request on, every fifth without an end
		x := blame.Build{Candidate: c, Start: start.Add(time.Duration(3*i-120) * time.Minute)}
		if i%5 != 0 {
			x.End = x.Start.Add(time.Minute)
		}
		b.AddBuild(x, int64(i+1))
	}
	r, err := blame.Rank(context.Background(), q, b, only)
	if err != nil {
		t.Fatal(err)
	}
	// Those of minutes 0 to 60: the 40th to the 60th; the 40th, 45th, ... and 60th have no end.
	if r.Builds != 21 || r.AssumedEnds != 5 {
		t.Errorf("of %d builds %d have an assumed end; 5 of 21 have", r.Builds, r.AssumedEnds)
	}
}
