package hook

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tallyman-ci/tallyman/internal/procfs"
	"github.com/tallyman-ci/tallyman/record"
)

// contextVersion is the version of the context's file form.
const contextVersion = 1

// The outcomes of a context, as in record.Job.
const (
	Completed  = "completed"  // by the job-completed hook
	Superseded = "superseded" // the next job of the runner began
	Abandoned  = "abandoned"  // the runner's process went away
	Shutdown   = "shutdown"   // the agent was asked to stop
)

// Context is the sealed identity of one job on one runner, and the time it lasted.
type Context struct {
	// Schema is the version of this form.
	Schema int `json:"schema"`
	// Key names the context; Seal makes it.
	Key string `json:"key"`
	// CI and Host are what records of the job carry.
	CI   record.CI   `json:"ci"`
	Host record.Host `json:"host"`
	// Workspace is GITHUB_WORKSPACE as the runner sees it, to which working directories are made relative.
	Workspace string `json:"workspace,omitempty"`
	// Started is when the hook was called, before any docker call of the job.
	Started time.Time `json:"started"`
	// Ended is when the context was closed; zero while the job runs.
	Ended time.Time `json:"ended,omitzero"`
	// Outcome says how it was closed: Completed, Superseded, Abandoned or Shutdown.
	Outcome string `json:"outcome,omitempty"`
	// RunnerPID is the runner's Worker process, whose end is the end of the job; 0 where the hook was not called by one.
	RunnerPID int `json:"runner_pid,omitempty"`
	// RunnerStart is that process's start in clock ticks since boot (field 22 of /proc/<pid>/stat), because pids are used again.
	RunnerStart uint64 `json:"runner_start,omitempty"`
	// Boot is the time of Started in nanoseconds since boot, which no clock step changes; 0 where unknown.
	Boot int64 `json:"boot,omitempty"`
	// Problems say which files of the installation are not what was installed.
	Problems []string `json:"problems,omitempty"`
	// Version is the version of Tallyman that sealed the context.
	Version string `json:"version,omitempty"`
}

// Open is true until the context was closed.
func (c *Context) Open() bool { return c.Ended.IsZero() }

// Covers is true when t lies in the time of the job, its ends included.
func (c *Context) Covers(t time.Time) bool {
	return !t.Before(c.Started) && (c.Open() || !t.After(c.Ended))
}

// RunnerGone is true when the runner that ran the job is certainly gone: the
// machine was booted since, or the Worker process has ended. It is false where that
// cannot be known: no Worker process was found, or the context is another host's.
func (c *Context) RunnerGone() bool {
	host, _ := os.Hostname()
	if c.Host.Name == "" || c.Host.Name != clean(host) {
		return false
	}
	if boot := bootID(); boot != "" && c.Host.BootID != "" && boot != c.Host.BootID {
		return true
	}
	if c.RunnerPID <= 0 {
		return false
	}
	st, err := procfs.Read(c.RunnerPID)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
	}
	return st.State == 'Z' || st.State == 'X' || c.RunnerStart != 0 && st.Start != c.RunnerStart
}

func (c *Context) runnerName() string {
	if c.CI.Runner == nil {
		return ""
	}
	return c.CI.Runner.Name
}

// identity is equal for two calls of the hook for one job, and for nothing else a
// runner does: the tracking id is new for each job. Only what both hooks see in
// their environment counts, nothing from the Worker log.
func (c *Context) identity() string {
	h := sha256.New()
	for _, part := range []string{
		c.CI.RunID, strconv.FormatInt(c.CI.RunAttempt, 10), c.CI.Job, c.runnerName(), c.CI.TrackingID,
	} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil)[:10])
}

// sameJobWindow is how far apart two calls of the hook for one job may be where no
// tracking id tells jobs apart (outside a real runner: act gives every run the id 1).
const sameJobWindow = time.Minute

// sameJob is true when c, which is open, is the context of the job that next
// describes.
func (c *Context) sameJob(next *Context) bool {
	if !c.Open() || c.identity() != next.identity() {
		return false
	}
	return c.CI.TrackingID != "" || next.Started.Sub(c.Started).Abs() < sameJobWindow
}

// baseKey is the readable start of a context's key.
func (c *Context) baseKey() string {
	key := c.identity()
	if isDigits(c.CI.RunID) {
		key = "run" + c.CI.RunID + "-" + strconv.FormatInt(c.CI.RunAttempt, 10) + "-" + key
	}
	return key
}

// Match says how Find found a context.
type Match string

// The ways to find a context.
const (
	MatchNone Match = ""     // no context
	MatchID   Match = "id"   // the record carries the job's tracking id
	MatchTime Match = "time" // the record fell into the time of the only job it could belong to
)

// Contexts are contexts, newest first.
type Contexts []Context

// Active returns the newest context that was not closed, or nil.
func (cs Contexts) Active() *Context {
	for i := range cs {
		if cs[i].Open() {
			return &cs[i]
		}
	}
	return nil
}

// Find returns the context of a record that carries trackingID ("" when it carries
// none) and was made at t.
//
// A tracking id decides alone: it may name a job that has ended, for a record that
// waited in a file. A runner's tracking id (github_...) that no context has names a
// job that was never sealed, and its record is never given to another job. Without a
// usable id the time decides, but only where exactly one job ran then: with two
// runners on one machine it would be a guess.
func (cs Contexts) Find(trackingID string, t time.Time) (*Context, Match) {
	foreign := false
	if trackingID != "" {
		for i := range cs {
			if cs[i].CI.TrackingID == trackingID {
				return &cs[i], MatchID
			}
		}
		// Jobs set the variable to something else to keep a process alive after
		// them (RUNNER_TRACKING_ID: 0), so only the runner's own form says anything.
		foreign = strings.HasPrefix(trackingID, "github_")
	}
	var found *Context
	for i := range cs {
		c := &cs[i]
		if !c.Covers(t) || foreign && c.CI.TrackingID != "" {
			continue
		}
		if found != nil {
			return nil, MatchNone
		}
		found = c
	}
	if found == nil {
		return nil, MatchNone
	}
	return found, MatchTime
}

// after returns the first context of the same runner that began after c, or nil.
func (cs Contexts) after(c *Context) (next *Context) {
	for i := range cs {
		if cs[i].runnerName() == c.runnerName() && cs[i].Started.After(c.Started) {
			next = &cs[i] // newest first
		}
	}
	return next
}

// Of returns the newest context of the job that c describes, or nil.
func (cs Contexts) Of(c *Context) *Context {
	id := c.identity()
	for i := range cs {
		if cs[i].identity() == id {
			return &cs[i]
		}
	}
	return nil
}
