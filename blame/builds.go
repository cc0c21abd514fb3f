package blame

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Level says which builds are one candidate.
type Level string

// The levels, from the coarsest to the finest.
const (
	ByRepository Level = "repository"
	ByWorkflow   Level = "workflow"
	ByJob        Level = "job"
	ByImage      Level = "image" // job, step, image and target
)

// Levels lists them.
func Levels() []Level { return []Level{ByRepository, ByWorkflow, ByJob, ByImage} }

// of is the candidate of a build at a level.
func (l Level) of(c Candidate) Candidate {
	switch l {
	case ByRepository:
		return Candidate{Repository: c.Repository}
	case ByWorkflow:
		return Candidate{Repository: c.Repository, Workflow: c.Workflow}
	case ByImage:
		return c
	}
	return Candidate{Repository: c.Repository, Workflow: c.Workflow, Job: c.Job}
}

// String names the candidate, from the repository to the target.
func (c Candidate) String() string {
	name := c.Repository
	if name == "" {
		name = "(no repository)"
	}
	for _, part := range []string{c.Workflow, c.Job, c.part()} {
		if part != "" {
			name += " / " + part
		}
	}
	return name
}

// part names the step, image and target.
func (c Candidate) part() string {
	var words []string
	if c.Step != "" {
		words = append(words, "step "+c.Step)
	}
	if c.Image != "" {
		words = append(words, "image "+c.Image)
	}
	if c.Target != "" {
		words = append(words, "target "+c.Target)
	}
	return strings.Join(words, ", ")
}

// Build is one docker build of a job.
type Build struct {
	// Candidate has all fields that are known, at the finest level.
	Candidate Candidate
	Start     time.Time // by the runner's clock
	End       time.Time // zero: not known
	Runner    string    // host or runner
	Addr      string    // egress address; empty: not known, any
	RunID     string
	JobURL    string
}

// Builds collects builds from records of any kind and in any order. Memory follows the
// number of builds, not of records. It is not safe for concurrent use.
type Builds struct {
	// Egress, if set, names the egress address of a host; empty: not known.
	Egress func(*record.Record) string
	// From and To, where not zero, bound the start of the builds that are kept.
	From, To time.Time

	list    []Build
	open    map[string]int // by id of the invocation
	ends    map[string]time.Duration
	ids     map[string]struct{} // of loss records
	runs    map[runKey]map[int64]struct{}
	strings map[string]string
	lost    int64
	unknown bool
}

type runKey struct{ repository, workflow string }

// NewBuilds returns an empty collection.
func NewBuilds() *Builds {
	return &Builds{open: map[string]int{}, ends: map[string]time.Duration{}, ids: map[string]struct{}{}, runs: map[runKey]map[int64]struct{}{}, strings: map[string]string{}}
}

// IsBuild says whether a command path builds images: where it may do so only in part
// (compose up --build), its flags decide.
func IsBuild(command string, flags []string) bool {
	switch command {
	case "build", "image build", "builder build", "buildx build", "buildx b", "buildx debug build", "buildx debug b", "buildx dap build",
		"bake", "buildx bake", "buildx f", "builder bake", "compose build":
		return true
	case "compose up", "compose run", "compose create":
		return slices.Contains(flags, "--build")
	}
	return false
}

// Add takes a record into account. Records that are there twice count once.
func (b *Builds) Add(r *record.Record) {
	switch {
	case r.Kind == record.KindInvocation && r.Invocation != nil:
		b.invocation(r)
	case r.Kind == record.KindInvocationEnd && r.End != nil:
		if IsBuild(r.End.Command, []string{"--build"}) && r.End.DurationNS > 0 && !r.End.AtMost {
			b.ends[r.End.InvocationID] = time.Duration(r.End.DurationNS)
		}
	case r.Kind == record.KindLoss && r.Loss != nil:
		if _, twice := b.ids[r.ID]; twice || !b.within(r.TS) {
			return
		}
		b.ids[r.ID] = struct{}{}
		if r.Loss.Source == "events" || r.Loss.Cause == "metrics_dropped" || r.Loss.Cause == "changed_file" {
			return // no call of docker is missing for it
		}
		if r.Loss.Count < 0 {
			b.unknown = true
		} else {
			b.lost += r.Loss.Count
		}
	}
	b.run(r)
}

// AddBuild adds a build that is known from elsewhere than records. number is the run's
// in its workflow, 0 where not known.
func (b *Builds) AddBuild(x Build, number int64) {
	b.list = append(b.list, x)
	b.number(x.Candidate.Repository, x.Candidate.Workflow, number)
}

func (b *Builds) invocation(r *record.Record) {
	inv := r.Invocation
	if _, twice := b.open[r.ID]; twice || inv.Nested || inv.ExecError != "" || !IsBuild(inv.Command, inv.Flags) || !b.within(r.TS) {
		return
	}
	x := Build{Start: r.TS}
	if r.CI != nil {
		x.Candidate = Candidate{
			Repository: b.keep(r.CI.Repository), Workflow: b.keep(r.CI.Workflow), Job: b.keep(r.CI.Job), Step: b.keep(r.CI.Step),
		}
		x.RunID, x.JobURL = b.keep(r.CI.RunID), b.keep(r.CI.JobURL)
		if r.CI.Runner != nil {
			x.Runner = b.keep(r.CI.Runner.Name)
		}
	}
	if len(inv.Images) > 0 {
		x.Candidate.Image = b.keep(imageName(inv.Images[0]))
	}
	x.Candidate.Target = b.keep(inv.Target)
	if r.Host != nil {
		x.Runner = b.keep(cmp.Or(x.Runner, r.Host.Pod, r.Host.Name))
	}
	if b.Egress != nil {
		x.Addr = b.keep(b.Egress(r))
	}
	b.open[strings.Clone(r.ID)] = len(b.list)
	b.list = append(b.list, x)
}

// run notes the number of the run that a record belongs to, whatever its kind.
func (b *Builds) run(r *record.Record) {
	if r.CI != nil && r.By != record.ByNone && b.within(r.TS) && r.Kind == record.KindInvocation && IsBuild(r.Invocation.Command, r.Invocation.Flags) {
		b.number(r.CI.Repository, r.CI.Workflow, r.CI.RunNumber)
	}
}

func (b *Builds) number(repository, workflow string, n int64) {
	if n <= 0 {
		return
	}
	k := runKey{b.keep(repository), b.keep(workflow)}
	if b.runs[k] == nil {
		b.runs[k] = map[int64]struct{}{}
	}
	b.runs[k][n] = struct{}{}
}

func (b *Builds) within(t time.Time) bool {
	return (b.From.IsZero() || !t.Before(b.From)) && (b.To.IsZero() || t.Before(b.To))
}

// keep makes equal strings one.
func (b *Builds) keep(s string) string {
	if s == "" {
		return ""
	}
	if k, ok := b.strings[s]; ok {
		return k
	}
	s = strings.Clone(s)
	b.strings[s] = s
	return s
}

// Len is the number of builds.
func (b *Builds) Len() int { return len(b.list) }

// Span is the time from the first start to the last end; ok is false where there is no
// build.
func (b *Builds) Span() (first, last time.Time, ok bool) {
	for _, x := range b.all() {
		if !ok || x.Start.Before(first) {
			first = x.Start
		}
		if end := x.End; !ok || end.After(last) {
			last = end
		}
		if x.Start.After(last) {
			last = x.Start
		}
		ok = true
	}
	return first, last, ok
}

// all returns the builds with their ends, by time.
func (b *Builds) all() []Build {
	for id, d := range b.ends {
		if n, ok := b.open[id]; ok {
			b.list[n].End = b.list[n].Start.Add(d)
			delete(b.ends, id)
		}
	}
	list := slices.Clone(b.list)
	slices.SortStableFunc(list, func(x, y Build) int { return x.Start.Compare(y.Start) })
	return list
}

// coverage is which share of the builds is believed to be there. Run numbers of a
// workflow have no holes, so holes in the records are runs that nobody recorded, or
// that built nothing: the share is the lowest that it can be. A loss record counts
// what went missing on the way.
func (b *Builds) coverage() Coverage {
	c := Coverage{Share: -1, Lost: b.lost, LostUnknown: b.unknown}
	for _, seen := range b.runs {
		if len(seen) < 2 {
			continue
		}
		low, high := int64(0), int64(0)
		for n := range seen {
			if low == 0 || n < low {
				low = n
			}
			high = max(high, n)
		}
		// The first and the last are there because they made the bounds: they tell nothing.
		c.RunsSeen += int64(len(seen)) - 2
		c.RunsExpected += high - low - 1
	}
	if c.RunsExpected >= 20 {
		c.Share = float64(c.RunsSeen) / float64(c.RunsExpected)
		c.From = fmt.Sprintf("%d of %d runs between the first and the last of each workflow are in the records; runs that built nothing count as missing", c.RunsSeen, c.RunsExpected)
	} else {
		c.From = "too few run numbers in the records to tell"
	}
	return c
}

// imageName is an image's name without tag and digest, which differ from build to build.
func imageName(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	return path.Clean(ref)
}
