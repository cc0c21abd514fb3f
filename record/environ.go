package record

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// MaxField is the longest string, in bytes, that a record keeps of anything that a
// job controls.
const MaxField = 4096

// CIFromEnviron reads the job context from an environment of KEY=value strings. It
// copies the variables that CI's fields name and nothing else, because the
// environments of jobs and hooks hold live tokens. It returns nil where none of
// them is set. Values are cleaned and cut at max bytes.
//
// GITHUB_ACTION and its companions are copied too: in a step they name the caller.
// In the job-completed hook they are leftovers of the last step, and the hook
// clears them.
func CIFromEnviron(environ []string, max int) *CI {
	var ci CI
	var server, actionPath string
	found := false
	for _, kv := range environ {
		key, value, ok := strings.Cut(kv, "=")
		if !ok || value == "" {
			continue
		}
		var field *string
		switch key {
		case "GITHUB_REPOSITORY":
			field = &ci.Repository
		case "GITHUB_REPOSITORY_ID":
			field = &ci.RepositoryID
		case "GITHUB_REPOSITORY_OWNER":
			field = &ci.Owner
		case "GITHUB_REPOSITORY_OWNER_ID":
			field = &ci.OwnerID
		case "GITHUB_WORKFLOW":
			field = &ci.Workflow
		case "GITHUB_WORKFLOW_REF":
			field = &ci.WorkflowRef
		case "GITHUB_WORKFLOW_SHA":
			field = &ci.WorkflowSHA
		case "GITHUB_JOB":
			field = &ci.Job
		case "JOB_CHECK_RUN_ID":
			field = &ci.JobID
		case "ACTIONS_ORCHESTRATION_ID":
			field = &ci.OrchestrationID
		case "GITHUB_RUN_ID":
			field = &ci.RunID
		case "GITHUB_EVENT_NAME":
			field = &ci.EventName
		case "GITHUB_REF":
			field = &ci.Ref
		case "GITHUB_HEAD_REF":
			field = &ci.HeadRef
		case "GITHUB_SHA":
			field = &ci.SHA
		case "GITHUB_ACTOR":
			field = &ci.Actor
		case "GITHUB_TRIGGERING_ACTOR":
			field = &ci.TriggeringActor
		case "GITHUB_ACTION":
			field = &ci.Step
		case "GITHUB_ACTION_REPOSITORY":
			field = &ci.ActionRepository
		case "GITHUB_ACTION_REF":
			field = &ci.ActionRef
		case "RUNNER_TRACKING_ID":
			field = &ci.TrackingID
		case "GITHUB_RUN_NUMBER":
			ci.RunNumber = number(value)
		case "GITHUB_RUN_ATTEMPT":
			ci.RunAttempt = number(value)
		case "RUNNER_NAME":
			field = &ci.runner().Name
		case "RUNNER_OS":
			field = &ci.runner().OS
		case "RUNNER_ARCH":
			field = &ci.runner().Arch
		case "RUNNER_ENVIRONMENT":
			field = &ci.runner().Environment
		case "GITHUB_SERVER_URL":
			server = value
			continue
		case "GITHUB_ACTION_PATH":
			actionPath = value
			continue
		default:
			continue
		}
		found = true
		if field != nil {
			*field = Clean(value, max)
		}
	}
	if !found {
		return nil
	}
	if !numeric(ci.JobID) {
		ci.JobID = ""
	}
	ci.JobURL = JobURL(Clean(server, max), &ci)
	if ci.ActionRepository == "" {
		ci.ActionRepository, ci.ActionRef = actionFromPath(Clean(actionPath, max))
	}
	return &ci
}

// number is 0 for what is no number, or none that a run could have.
func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

func (ci *CI) runner() *Runner {
	if ci.Runner == nil {
		ci.Runner = new(Runner)
	}
	return ci.Runner
}

// JobURL returns the address of the job's log, or "" where a part of it is not
// known. The form is that of the job's own page on the server.
func JobURL(server string, ci *CI) string {
	if !strings.HasPrefix(server, "https://") && !strings.HasPrefix(server, "http://") ||
		strings.ContainsAny(server, "@?# ") || ci.Repository == "" || !numeric(ci.RunID) || !numeric(ci.JobID) {
		return ""
	}
	return strings.TrimRight(server, "/") + "/" + ci.Repository + "/actions/runs/" + ci.RunID + "/job/" + ci.JobID
}

// actionFromPath takes owner/name and ref from the folder that the runner gives a
// downloaded action, <work>/_actions/<owner>/<name>/<ref>[/...]: the only trace of
// the action in the run steps of a composite action.
func actionFromPath(path string) (repository, ref string) {
	_, rest, ok := strings.Cut(path, "/_actions/")
	if !ok {
		return "", ""
	}
	owner, rest, _ := strings.Cut(rest, "/")
	name, rest, _ := strings.Cut(rest, "/")
	ref, _, _ = strings.Cut(rest, "/")
	if owner == "" || name == "" {
		return "", ""
	}
	return owner + "/" + name, ref
}

func numeric(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != "" && len(s) <= 20
}

// Clean makes s safe for a record, a log line and a terminal: control characters
// (C0, DEL, C1), the line separators U+2028 and U+2029 and invalid UTF-8 become
// U+FFFD, and the result is at most max bytes long, cut between characters.
func Clean(s string, max int) string {
	dirty := len(s) > max
	for i := 0; i < len(s) && !dirty; i++ {
		dirty = s[i] < ' ' || s[i] >= 0x7f
	}
	if !dirty {
		return s
	}
	b := make([]byte, 0, min(len(s), max))
	for _, r := range s {
		if r < ' ' || r >= 0x7f && r <= 0x9f || r == '\u2028' || r == '\u2029' {
			r = utf8.RuneError
		}
		if len(b)+utf8.RuneLen(r) > max {
			break
		}
		b = utf8.AppendRune(b, r)
	}
	return string(b)
}
