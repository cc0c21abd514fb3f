package agent

import (
	"os"
	"slices"
	"sync"
	"time"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/record"
)

// contexts are the sealed contexts of this runner, read again when the hooks change
// their folder.
type contexts struct {
	store hook.Store

	mu      sync.Mutex
	list    hook.Contexts
	modTime time.Time
	read    bool
}

func (c *contexts) all() hook.Contexts {
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Stat(c.store.Dir)
	if err != nil {
		return c.list
	}
	// Two changes within one tick of the file system's clock have the same time.
	const tick = 100 * time.Millisecond
	if !c.read || !info.ModTime().Equal(c.modTime) || time.Since(c.modTime) < tick {
		// The list is good in spite of an error, which tells of files passed over.
		if list, _ := c.store.List(); list != nil {
			c.list, c.modTime, c.read = list, info.ModTime(), true
		}
	}
	return c.list
}

// add makes a context known that may not have reached the disk.
func (c *contexts) add(added hook.Context) {
	all := c.all()
	c.mu.Lock()
	defer c.mu.Unlock()
	if all.Of(&added) == nil {
		c.list = append(hook.Contexts{added}, all...)
	}
}

func (c *contexts) active() *hook.Context { return c.all().Active() }

// noneAt tells whether no job that was sealed here ran at t. Where several did, a
// record that names none of them is unattributed, not outside.
func (c *contexts) noneAt(t time.Time) bool {
	return !slices.ContainsFunc(c.all(), func(c hook.Context) bool { return c.Covers(t) })
}

// stamp gives an invocation its job. The sealed context of the caller's tracking id
// decides; without one that of the only job that ran at the time. What the caller
// itself claims stays visible where it disagrees.
func (a *Agent) stamp(r *record.Record) {
	claim := r.CI
	trackingID := ""
	if claim != nil {
		trackingID = claim.TrackingID
	}
	c, match := a.contexts.all().Find(trackingID, r.TS)
	if match == hook.MatchNone {
		// The shim's own word is all there is: environment, or none.
		r.OutsideJob = r.By == record.ByNone && claim == nil && a.contexts.noneAt(r.TS)
		return
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
		for _, f := range []struct {
			sealed *string
			claim  string
		}{{&ci.JobID, claim.JobID}, {&ci.JobURL, claim.JobURL}, {&ci.OrchestrationID, claim.OrchestrationID}} {
			if *f.sealed == "" {
				*f.sealed = f.claim
			}
		}
	}
	r.CI = &ci
}

// disagree tells whether the caller names another job than the sealed context.
func disagree(sealed, claim *record.CI) bool {
	for _, f := range [][2]string{
		{sealed.Repository, claim.Repository}, {sealed.RepositoryID, claim.RepositoryID}, {sealed.Owner, claim.Owner},
		{sealed.Workflow, claim.Workflow}, {sealed.WorkflowRef, claim.WorkflowRef}, {sealed.Job, claim.Job},
		{sealed.RunID, claim.RunID}, {sealed.Ref, claim.Ref}, {sealed.SHA, claim.SHA}, {sealed.Actor, claim.Actor},
		{sealed.JobID, claim.JobID},
	} {
		if f[0] != "" && f[1] != "" && f[0] != f[1] {
			return true
		}
	}
	return sealed.RunAttempt != 0 && claim.RunAttempt != 0 && sealed.RunAttempt != claim.RunAttempt
}

// stampByTime gives a record that names no job, an event or a loss, the only job
// that ran at its time.
func (a *Agent) stampByTime(r *record.Record) {
	c, match := a.contexts.all().Find("", r.TS)
	if match == hook.MatchNone {
		r.By, r.OutsideJob = record.ByNone, a.contexts.noneAt(r.TS)
		return
	}
	ci := c.CI
	r.CI, r.By = &ci, record.ByInferred
}
