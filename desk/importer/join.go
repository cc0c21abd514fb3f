package importer

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Join gives rows of Docker Hub's export to the jobs whose own records show that they
// asked for the image in that hour. It needs all records of jobs first (Add), then rows
// (Explain). One candidate is an explanation; several are counted and none is chosen,
// because the export holds nothing that would tell them apart. It is not safe for
// concurrent use.
type Join struct {
	// Slack is how far the clocks of runner and registry may be apart: a job that asked
	// within it of an hour's end is a candidate of both hours. 0 for none.
	Slack time.Duration
	// Tokens maps names of access tokens to patterns of repositories (path.Match on
	// owner/name): which jobs can hold the token. Rows with other tokens, or none, are not
	// limited.
	Tokens map[string][]string

	jobs   []JobShare
	keys   map[string]int
	asked  map[askKey][]int
	totals Totals
}

type askKey struct {
	hour  int64 // since 1970
	image string
}

// JobShare is what a job explains of the rows.
type JobShare struct {
	CI *record.CI
	// Rows, Pulls and Checks are those which this job alone explains.
	Rows, Pulls, Checks int64
	// MaybeRows, MaybePulls are those for which it is one of several candidates.
	MaybeRows, MaybePulls int64
}

// Totals are the rows and pulls by how many jobs explain them.
type Totals struct {
	Rows, One, Several, None                     int64
	Pulls, PullsOne, PullsSeveral, PullsNone     int64
	Checks, ChecksOne, ChecksSeveral, ChecksNone int64
}

// asks are the commands that ask a registry for the images they name.
func asks(inv *record.Invocation) bool {
	switch strings.TrimPrefix(strings.TrimPrefix(inv.Command, "image "), "container ") {
	case "pull", "run", "create", "service create", "service update":
		return true
	}
	return false
}

// Add takes one record of a job into account: commands and events that pull an image.
func (j *Join) Add(r *record.Record) {
	if r.CI == nil || r.CI.Repository == "" {
		return
	}
	var images []string
	switch {
	case r.Invocation != nil && asks(r.Invocation):
		images = r.Invocation.Images
	case r.Event != nil && r.Event.Type == "image" && r.Event.Action == "pull":
		images = []string{r.Event.Image}
	}
	if len(images) == 0 {
		return
	}
	job := j.job(r.CI)
	for _, image := range images {
		name := imageName(image)
		if name == "" {
			continue
		}
		for _, at := range []time.Time{r.TS.Add(-j.Slack), r.TS, r.TS.Add(j.Slack)} {
			k := askKey{hourOf(at), name}
			if !slices.Contains(j.asked[k], job) {
				if j.asked == nil {
					j.asked = map[askKey][]int{}
				}
				j.asked[k] = append(j.asked[k], job)
			}
		}
	}
}

func hourOf(t time.Time) int64 { return t.Unix() / 3600 }

func (j *Join) job(ci *record.CI) int {
	id := cmp.Or(ci.JobID, ci.TrackingID, ci.OrchestrationID, ci.Job)
	key := strings.Join([]string{strings.ToLower(ci.Repository), ci.RunID, fmt.Sprint(ci.RunAttempt), id}, "\x00")
	n, ok := j.keys[key]
	if !ok {
		if j.keys == nil {
			j.keys = map[string]int{}
		}
		job := *ci
		job.Step, job.ActionRepository, job.ActionRef, job.Unknown = "", "", "", nil // of one command, not of the job
		n = len(j.jobs)
		j.jobs = append(j.jobs, JobShare{CI: &job})
		j.keys[key] = n
	}
	return n
}

// Explain writes the number of candidates into a row, and the job where it is the
// only one.
func (j *Join) Explain(r *record.Record) {
	h := r.HTTP
	if h == nil {
		return
	}
	image := h.Image
	if image != "" {
		image = imageName(image)
	}
	var candidates []int
	for _, n := range j.asked[askKey{hourOf(r.TS), image}] {
		if j.mayHold(h.TokenName, j.jobs[n].CI.Repository) {
			candidates = append(candidates, n)
		}
	}
	count := int64(len(candidates))
	h.Candidates = &count
	var pulls, checks int64
	if h.Pulls != nil {
		pulls = *h.Pulls
	}
	if h.VersionChecks != nil {
		checks = *h.VersionChecks
	}
	t := &j.totals
	t.Rows, t.Pulls, t.Checks = t.Rows+1, t.Pulls+pulls, t.Checks+checks
	switch len(candidates) {
	case 0:
		t.None, t.PullsNone, t.ChecksNone = t.None+1, t.PullsNone+pulls, t.ChecksNone+checks
	case 1:
		t.One, t.PullsOne, t.ChecksOne = t.One+1, t.PullsOne+pulls, t.ChecksOne+checks
		job := &j.jobs[candidates[0]]
		job.Rows, job.Pulls, job.Checks = job.Rows+1, job.Pulls+pulls, job.Checks+checks
		r.CI, r.By = job.CI, record.ByInferred
	default:
		t.Several, t.PullsSeveral, t.ChecksSeveral = t.Several+1, t.PullsSeveral+pulls, t.ChecksSeveral+checks
		for _, n := range candidates {
			j.jobs[n].MaybeRows++
			j.jobs[n].MaybePulls += pulls
		}
	}
}

func (j *Join) mayHold(token, repository string) bool {
	patterns, known := j.Tokens[token]
	if token == "" || !known {
		return true
	}
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(strings.ToLower(p), strings.ToLower(repository))
		return ok && err == nil
	})
}

// Totals returns how much of the rows is explained.
func (j *Join) Totals() Totals { return j.totals }

// Shares returns the jobs that explain rows, or may, those with the most pulls first.
func (j *Join) Shares() []JobShare {
	list := slices.DeleteFunc(slices.Clone(j.jobs), func(s JobShare) bool { return s.Rows+s.MaybeRows == 0 })
	slices.SortStableFunc(list, func(a, b JobShare) int {
		return cmp.Or(cmp.Compare(b.Pulls, a.Pulls), cmp.Compare(b.Rows, a.Rows), cmp.Compare(b.MaybePulls, a.MaybePulls),
			cmp.Compare(b.MaybeRows, a.MaybeRows), cmp.Compare(a.CI.Repository, b.CI.Repository), cmp.Compare(a.CI.RunID, b.CI.RunID), cmp.Compare(a.CI.JobID, b.CI.JobID))
	})
	return list
}
