package agent

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/procfs"
	"github.com/tallyman-ci/tallyman/record"
)

// contexts are the sealed contexts of this runner, read again when the hooks change
// their folder.
type contexts struct {
	store hook.Store

	mu      sync.Mutex
	list    hook.Contexts
	added   hook.Contexts // told by a hook and not found in the store, newest first
	modTime time.Time
	read    bool
}

func (c *contexts) all() hook.Contexts {
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Stat(c.store.Dir)
	if err != nil {
		return c.merged()
	}
	// Two changes within one tick of the file system's clock have the same time.
	const tick = 100 * time.Millisecond
	if !c.read || !info.ModTime().Equal(c.modTime) || time.Since(c.modTime) < tick {
		// The list is good in spite of an error, which tells of files passed over.
		if list, _ := c.store.List(); list != nil {
			c.list, c.modTime, c.read = list, info.ModTime(), true
			c.added = slices.DeleteFunc(c.added, func(a hook.Context) bool { return list.Of(&a) != nil })
		}
	}
	return c.merged()
}

func (c *contexts) merged() hook.Contexts {
	if len(c.added) == 0 {
		return c.list
	}
	return append(slices.Clone(c.added), c.list...)
}

// add makes a context known that may not have reached the disk.
func (c *contexts) add(added hook.Context) {
	all := c.all()
	c.mu.Lock()
	defer c.mu.Unlock()
	if all.Of(&added) == nil {
		const most = 50
		c.added = append(hook.Contexts{added}, c.added[:min(len(c.added), most-1)]...)
	}
}

// end closes a context that never reached the disk.
func (c *contexts) end(key, outcome string, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.added {
		if c.added[i].Key == key && c.added[i].Open() {
			c.added[i].Ended, c.added[i].Outcome = at, outcome
		}
	}
}

// stored says whether the store has the context with this key.
func (c *contexts) stored(key string) bool {
	c.all()
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.list, func(x hook.Context) bool { return x.Key == key })
}

func (c *contexts) active() *hook.Context { return c.all().Active() }

// noneAt tells whether no job that was sealed here ran at t. Where several did, a
// record that names none of them is unattributed, not outside.
func (c *contexts) noneAt(t time.Time) bool {
	return !slices.ContainsFunc(c.all(), func(c hook.Context) bool { return c.Covers(t) })
}

// witness is what the agent knows of a record's sender without asking it.
type witness struct {
	uid int // who sent it; -1 where unknown
	pid int // its process, 0 where unknown
	// earliest and latest bound the time at which the record can have been made;
	// earliest is zero where nothing is known.
	earliest, latest time.Time
}

const (
	// timeSlack is how far outside its bounds a record's own time may lie: a shim that
	// lost its processor between looking at the clock and sending.
	timeSlack = 2 * time.Second
	// maxAge is how old a record can be; sealed contexts are not kept longer.
	maxAge = 30 * 24 * time.Hour
	// lateSlack is how long after its job's end a record may still name it: what the
	// runner itself does between the job-completed hook and the end of its Worker.
	lateSlack = time.Minute
)

// bound moves the time of a record that cannot be true to the nearest that can: a job
// must not be able to write into the time of another job.
func (w *witness) bound(r *record.Record) {
	switch {
	case r.TS.After(w.latest.Add(timeSlack)), r.TS.Before(w.latest.Add(-maxAge)):
		r.TS = w.latest
	case !w.earliest.IsZero() && r.TS.Before(w.earliest.Add(-timeSlack)):
		r.TS = w.earliest
	}
	r.TS = r.TS.UTC().Round(0)
}

// stamp gives an invocation its job, and returns whose share it is charged to. The
// sealed context of the caller's tracking id decides, where it can be true; without
// one that of the only job that ran at the time. What the caller itself claims stays
// visible where it disagrees.
func (a *Agent) stamp(r *record.Record, w witness) (share string) {
	w.bound(r)
	claim := r.CI
	id := ""
	if claim != nil {
		id = claim.TrackingID
	}
	all := a.contexts.all()
	c, match := all.Find(id, r.TS)
	c, match = a.prove(c, match, covering(all, r.TS), r.TS, w)
	if match == hook.MatchNone {
		// The shim's own word is all there is: environment, or none.
		if r.By = record.ByNone; claim != nil && claim.Repository != "" && claim.RunID != "" {
			r.By = record.ByEnvironment
		}
		r.OutsideJob = claim == nil && a.contexts.noneAt(r.TS)
		return "uid " + strconv.Itoa(w.uid)
	}
	ci := c.CI
	r.Claim, r.By = nil, record.ByInferred
	if match == hook.MatchID {
		r.By = record.BySealed
	}
	if claim != nil {
		if disagree(&ci, claim) {
			r.Claim = claim
		} else if claim.RunID != "" && claim.RunID == ci.RunID && claim.Repository == ci.Repository {
			r.By = record.BySealed
		}
		// The step is the caller's alone to know.
		ci.Step, ci.ActionRepository, ci.ActionRef = claim.Step, claim.ActionRepository, claim.ActionRef
		if ci.JobID == "" && r.Claim == nil && numeric(claim.JobID) {
			ci.JobID = claim.JobID
		}
		if ci.JobURL == "" && r.Claim == nil && jobPage(claim.JobURL, &ci) {
			ci.JobURL = claim.JobURL
		}
		if ci.OrchestrationID == "" && r.Claim == nil {
			ci.OrchestrationID = claim.OrchestrationID
		}
	}
	r.CI = &ci
	return c.Key
}

// prove says which job a caller at t is of, after c was found for it by match. A
// tracking id is a word that any process of the machine may say: it is believed while
// only the job of that id runs here. Else the caller's ancestors decide, which it
// cannot choose; an orphan has none, and what it says stays a claim.
func (a *Agent) prove(c *hook.Context, match hook.Match, running []*hook.Context, t time.Time, w witness) (*hook.Context, hook.Match) {
	switch {
	case match == hook.MatchTime: // the only one, and the caller names no other
		return c, match
	case match == hook.MatchID && c.Covers(t) && len(running) == 1:
		return c, match
	case match == hook.MatchID && len(running) == 0 && !t.Before(c.Started.Add(-lateSlack)) && !t.After(c.Ended.Add(lateSlack)):
		return c, match // the last calls of a job, while there is no other
	}
	switch parent := workerOf(w.pid, running); {
	case parent != nil && match == hook.MatchID && parent.Key == c.Key:
		return c, match
	case parent != nil:
		return parent, hook.MatchTime
	case match == hook.MatchID && c.Covers(t) && !slices.ContainsFunc(running, func(x *hook.Context) bool { return x.RunnerPID != 0 }):
		return c, match // no Worker is known of any of them
	}
	return nil, hook.MatchNone
}

// covering are the contexts in whose time t lies.
func covering(all hook.Contexts, t time.Time) []*hook.Context {
	var found []*hook.Context
	for i := range all {
		if all[i].Covers(t) {
			found = append(found, &all[i])
		}
	}
	return found
}

// workerOf returns the context whose Worker process is an ancestor of pid, or nil.
func workerOf(pid int, contexts []*hook.Context) *hook.Context {
	for range 64 { // deeper than any chain of build tools
		if pid <= 1 {
			return nil
		}
		p, err := procfs.Read(pid)
		if err != nil {
			return nil
		}
		for _, c := range contexts {
			if c.RunnerPID == pid && (c.RunnerStart == 0 || c.RunnerStart == p.Start) {
				return c
			}
		}
		pid = p.Parent
	}
	return nil
}

func numeric(s string) bool {
	return s != "" && len(s) <= 20 && strings.Trim(s, "0123456789") == ""
}

// jobPage says whether an address that a caller gave can be the page of the job: a
// click on it must not lead elsewhere on the server.
func jobPage(address string, ci *record.CI) bool {
	rest, ok := strings.CutPrefix(address, "https://")
	if !ok {
		rest, ok = strings.CutPrefix(address, "http://")
	}
	return ok && !strings.ContainsAny(rest, "@?#\\ ") && strings.HasSuffix(rest, "/"+ci.Repository+"/actions/runs/"+ci.RunID+"/job/"+ci.JobID)
}

// disagree tells whether the caller names another job than the sealed context.
func disagree(sealed, claim *record.CI) bool {
	for _, f := range [][2]string{
		{sealed.Repository, claim.Repository}, {sealed.RepositoryID, claim.RepositoryID}, {sealed.Owner, claim.Owner},
		{sealed.Workflow, claim.Workflow}, {sealed.WorkflowRef, claim.WorkflowRef}, {sealed.Job, claim.Job},
		{sealed.RunID, claim.RunID}, {sealed.Ref, claim.Ref}, {sealed.SHA, claim.SHA}, {sealed.Actor, claim.Actor},
		{sealed.JobID, claim.JobID}, {trackingID(sealed), trackingID(claim)},
	} {
		if f[0] != "" && f[1] != "" && f[0] != f[1] {
			return true
		}
	}
	return sealed.RunAttempt != 0 && claim.RunAttempt != 0 && sealed.RunAttempt != claim.RunAttempt
}

// trackingID is the runner's own id of a job. Jobs set the variable to something else
// to keep a process alive after them, which says nothing.
func trackingID(ci *record.CI) string {
	if strings.HasPrefix(ci.TrackingID, "github_") {
		return ci.TrackingID
	}
	return ""
}

// stampByTime gives a record that names no job, an event or a loss, the only job
// that ran at its time, and returns whose share it is charged to. A loss is a job's only
// where all of its time is: what was lost before, or since nobody knows when, is nobody's.
func (a *Agent) stampByTime(r *record.Record) (share string) {
	all := a.contexts.all()
	c, match := all.Find("", r.TS)
	if match != hook.MatchNone && r.Loss != nil {
		if first, began := all.Find("", r.Loss.From); began == hook.MatchNone || first.Key != c.Key {
			match = hook.MatchNone
		}
	}
	if match == hook.MatchNone {
		r.By, r.OutsideJob = record.ByNone, a.contexts.noneAt(r.TS)
		return "no job"
	}
	ci := c.CI
	r.CI, r.By = &ci, record.ByInferred
	return c.Key
}
