package hook

import (
	"os"
	"slices"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
)

// environment holds the variables that the hook itself goes by, and nothing else: a
// hook's environment holds live tokens (ACTIONS_ID_TOKEN_REQUEST_TOKEN among them).
// GITHUB_ENV and GITHUB_PATH are not in it, because a hook of ours has no business there.
type environment map[string]string

var used = map[string]bool{
	"GITHUB_SERVER_URL": true, "GITHUB_WORKSPACE": true, "GITHUB_STEP_SUMMARY": true,
	"RUNNER_NAME": true, "RUNNER_WORKSPACE": true, "RUNNER_TEMP": true,
	"POD_NAME": true, "POD_NAMESPACE": true, "NODE_NAME": true,
	"TALLYMAN": true, // the pod's kill switch
}

func readEnvironment(environ []string) environment {
	env := make(environment, len(used))
	for _, entry := range environ {
		if name, value, ok := strings.Cut(entry, "="); ok && used[name] {
			env[name] = value
		}
	}
	return env
}

// get returns a value as it stands, for use as a path.
func (e environment) get(name string) string { return e[name] }

// text returns a value fit for a record.
func (e environment) text(name string) string { return clean(e[name]) }

// FromEnvironment reads the identity of a job from a hook's environment. It reads
// nothing but an allow-list, and leaves out the GITHUB_ACTION family: in a
// job-completed hook it still names the last step, because all steps share one
// github context (actions/runner ExecutionContext.cs).
func FromEnvironment(environ []string) record.CI {
	ci := record.CIFromEnviron(environ, record.MaxField)
	if ci == nil {
		return record.CI{}
	}
	ci.Step, ci.ActionRepository, ci.ActionRef = "", "", ""
	for _, s := range identityOf(ci) {
		*s = record.Clean(*s, maxIdentityField)
	}
	return *ci
}

// identityOf are the texts by which both hooks know a job.
func identityOf(ci *record.CI) []*string {
	all := []*string{&ci.RunID, &ci.Job, &ci.TrackingID}
	if ci.Runner != nil {
		all = append(all, &ci.Runner.Name)
	}
	return all
}

// HostFromEnvironment names this machine, and the pod and node where the downward
// API sets POD_NAME, POD_NAMESPACE and NODE_NAME.
func HostFromEnvironment(environ []string) record.Host {
	env := readEnvironment(environ)
	h := record.Host{
		Pod:       env.text("POD_NAME"),
		Namespace: env.text("POD_NAMESPACE"),
		Node:      env.text("NODE_NAME"),
		BootID:    bootID(),
	}
	if name, err := os.Hostname(); err == nil {
		h.Name = clean(name)
	}
	return h
}

// bootID names this boot of the kernel; "" where /proc does not tell.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return clean(strings.TrimSpace(string(b)))
}

func withLabels(r *record.Runner, labels []string) *record.Runner {
	if len(labels) == 0 {
		return r
	}
	if r == nil {
		r = &record.Runner{}
	}
	for _, l := range labels[:min(len(labels), maxLabels)] {
		r.Labels = append(r.Labels, clean(l))
	}
	return r
}

// maxLabels bounds what one runner's labels can take of every record.
const maxLabels = 50

const (
	// maxCI is what the texts of a job may take of every record, which the journal
	// takes up to 64 KiB, escaped: one that it refused would wait for ever. Those of a
	// real job take a tenth of that.
	maxCI = 12 << 10
	// maxIdentityField bounds those by which a job is known: they are not cut later.
	maxIdentityField = 512
)

// fit cuts the longest texts of a job until all fit, but for its identity.
func fit(ci *record.CI) {
	keep := identityOf(ci)
	for limit := record.MaxField; limit >= 64; limit /= 2 {
		total := 0
		eachText(ci, func(s *string) { total += len(*s) })
		if total <= maxCI {
			return
		}
		eachText(ci, func(s *string) {
			if !slices.Contains(keep, s) {
				*s = record.Clean(*s, limit)
			}
		})
	}
}

func clean(s string) string { return record.Clean(s, record.MaxField) }

func isDigits(s string) bool {
	if s == "" || len(s) > 20 {
		return false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

// eachText calls f with every string of a job's identity.
func eachText(ci *record.CI, f func(*string)) {
	for _, s := range []*string{
		&ci.Repository, &ci.RepositoryID, &ci.Owner, &ci.OwnerID, &ci.Workflow, &ci.WorkflowRef, &ci.WorkflowSHA,
		&ci.Job, &ci.JobID, &ci.JobName, &ci.JobURL, &ci.JobWorkflowRef, &ci.OrchestrationID, &ci.RunID,
		&ci.EventName, &ci.Ref, &ci.HeadRef, &ci.SHA, &ci.Actor, &ci.TriggeringActor, &ci.Step,
		&ci.ActionRepository, &ci.ActionRef, &ci.TrackingID,
	} {
		f(s)
	}
	if r := ci.Runner; r != nil {
		f(&r.Name)
		f(&r.OS)
		f(&r.Arch)
		f(&r.Environment)
		for i := range r.Labels {
			f(&r.Labels[i])
		}
	}
}
