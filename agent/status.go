package agent

import (
	"os"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/metrics"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// Status is what a running agent is doing.
type Status struct {
	Version string         `json:"version"`
	PID     int            `json:"pid"`
	Started time.Time      `json:"started"`
	Job     string         `json:"job,omitempty"` // repository, workflow and job of the active context
	CI      *record.CI     `json:"ci,omitempty"`  // that context
	Running int64          `json:"running"`       // commands whose end is waited for
	Counts  Counts         `json:"counts"`
	Journal journal.Status `json:"journal"`
	Events  *events.Status `json:"events,omitempty"`
	Metrics Metrics        `json:"metrics"`
	Sinks   []sinks.Status `json:"sinks"`
	// Problems are what could not be opened and was left out.
	Problems []string `json:"problems,omitempty"`
}

// Metrics says where metrics go and what did not get there.
type Metrics struct {
	Address string        `json:"address,omitempty"` // empty: off
	Source  string        `json:"source,omitempty"`  // the setting that named the address
	Dropped metrics.Drops `json:"dropped"`
}

// Status returns a snapshot; before Run has opened everything, a short one. It is safe
// to call at any time.
func (a *Agent) Status() Status {
	if !a.opened.Load() {
		return Status{Version: a.o.Version, PID: os.Getpid(), Started: a.started, Sinks: []sinks.Status{}, Problems: []string{"the agent is starting"}}
	}
	st := Status{
		Version: a.o.Version, PID: os.Getpid(), Started: a.started, Running: a.server.watches.count(),
		Counts: a.intake.status(), Journal: a.journal.Status(), Problems: a.problems,
		Metrics: Metrics{Dropped: a.metrics.Dropped()},
	}
	st.Metrics.Address, st.Metrics.Source = a.metrics.Address()
	if c := a.contexts.active(); c != nil {
		st.Job = strings.Join([]string{c.CI.Repository, c.CI.Workflow, c.CI.Job}, " / ")
		st.CI = &c.CI
	}
	if a.events != nil {
		s := a.events.Status()
		st.Events = &s
	}
	st.Sinks = make([]sinks.Status, 0, len(a.pumps))
	for _, p := range a.pumps {
		st.Sinks = append(st.Sinks, p.Status())
	}
	return st
}
