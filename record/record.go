// Package record defines the one record of Tallyman: what a docker invocation,
// its end, a daemon event, a job's start and end, an imported HTTP request, or a loss
// looks like on its way from where it is made to the place where people read it.
//
// A value flows one way: a source fills a Record, Append encodes it as one line
// of JSON, and every later stage (journal, sinks, report) passes that line on
// unchanged. The struct below is the only place where fields are declared: the
// encoder (append_gen.go) and docs/record.md are generated from it, and tests
// fail when either is stale.
//
// The package is linked into the docker shim, which starts with every docker
// command. It therefore imports very little of the standard library; decoding,
// which needs encoding/json, lives in record/recordjson.
package record

//go:generate go run ../internal/gen/recordgen

import "time"

// SchemaVersion is the version of the record's schema that this build writes.
// It grows by one when a field changes its meaning; added fields do not change it,
// because readers keep the fields they do not know.
const SchemaVersion = 1

// Kind says what a record is about.
type Kind string

// The kinds of record.
const (
	KindInvocation    Kind = "invocation"     // a wrapped tool was called
	KindInvocationEnd Kind = "invocation.end" // a wrapped tool ended
	KindEvent         Kind = "event"          // the Docker daemon reported an event
	KindLoss          Kind = "loss"           // something was not recorded or not delivered
	KindJobStart      Kind = "job.start"      // the runner started a job
	KindJobEnd        Kind = "job.end"        // the job's context was closed
	KindHTTP          Kind = "http"           // a server counted a request, or an hour of them; imported
)

// By says how the job context of a record was found, from the surest way to none.
type By string

// The ways in which a record's job context is found.
const (
	BySealed      By = "sealed"      // the job-started hook sealed it, and the record carries that job's tracking id or run
	ByEnvironment By = "environment" // the caller's own GITHUB_* variables, no sealed context to check them against
	ByInferred    By = "inferred"    // nothing in the record itself proves the job: it fell into the time of the only job of this runner, or an import found one job that explains it
	ByNone        By = "none"        // no job is known
)

// Record is one line of the account. Exactly one of the nested objects that
// belong to a kind is set: Invocation, End, Event, Loss, Job or HTTP.
type Record struct {
	// ID is a UUIDv7 (RFC 9562): unique, ordered by time, made once where the record is born. Every later stage removes duplicates by it.
	ID string `json:"id"`
	// TS is the time of what is recorded, not of its delivery: RFC 3339 in UTC with nanoseconds.
	TS time.Time `json:"ts"`
	// Kind says what the record is about: invocation, invocation.end, event, loss, job.start, job.end or http.
	Kind Kind `json:"kind"`
	// Schema is the version of this schema that the writer knew.
	Schema int64 `json:"schema"`
	// By says how the job context in ci was found: sealed, environment, inferred or none.
	By By `json:"by"`
	// OutsideJob is true when the record was made while no job was known on the runner and nothing in it hinted at one (the runner's own wait for its Docker daemon, for example). Such records are not counted as unattributed.
	OutsideJob bool `json:"outside_job,omitempty"`
	// CI is the GitHub Actions job that caused the record.
	CI *CI `json:"ci,omitempty"`
	// Claim is what the caller's environment said of its job, kept only where it disagrees with the sealed context in ci.
	Claim *CI `json:"claim,omitempty"`
	// Host is the machine, pod and node the record was made on.
	Host *Host `json:"host,omitempty"`
	// Invocation describes a call of a wrapped tool (kind invocation).
	Invocation *Invocation `json:"invocation,omitempty"`
	// End describes the end of an invocation (kind invocation.end).
	End *End `json:"end,omitempty"`
	// Event describes an event of the Docker daemon (kind event).
	Event *Event `json:"event,omitempty"`
	// Loss describes what could not be recorded or delivered (kind loss).
	Loss *Loss `json:"loss,omitempty"`
	// Job describes the start or the end of a job (kinds job.start and job.end).
	Job *Job `json:"job,omitempty"`
	// HTTP describes a request, or an hour of them, as the server that answered counted it (kind http).
	HTTP *HTTP `json:"http,omitempty"`
	// Unknown holds the members of the JSON object that this build does not know, as `,"key":value` pairs, so that they survive a round trip.
	Unknown []byte `json:"-"`
}

// CI is the identity of a GitHub Actions job, from the default variables of the
// runner (https://docs.github.com/actions/reference/variables-reference) and from
// what the job-started hook can read besides.
type CI struct {
	// Repository is owner/name, from GITHUB_REPOSITORY (OpenTelemetry: vcs.repository.name with vcs.owner.name).
	Repository string `json:"repository,omitempty"`
	// RepositoryID is the number of the repository, stable when it is renamed, from GITHUB_REPOSITORY_ID.
	RepositoryID string `json:"repository_id,omitempty"`
	// Owner is the user or organisation, from GITHUB_REPOSITORY_OWNER (OpenTelemetry: vcs.owner.name).
	Owner string `json:"owner,omitempty"`
	// OwnerID is the number of the owner, from GITHUB_REPOSITORY_OWNER_ID.
	OwnerID string `json:"owner_id,omitempty"`
	// Workflow is the workflow's name, or its path where it has none; that of the caller for reusable workflows, from GITHUB_WORKFLOW (OpenTelemetry: cicd.pipeline.name).
	Workflow string `json:"workflow,omitempty"`
	// WorkflowRef is the path and ref of the workflow file, from GITHUB_WORKFLOW_REF.
	WorkflowRef string `json:"workflow_ref,omitempty"`
	// WorkflowSHA is the commit of the workflow file, from GITHUB_WORKFLOW_SHA.
	WorkflowSHA string `json:"workflow_sha,omitempty"`
	// Job is the job's key in the workflow file, the same for all legs of a matrix, from GITHUB_JOB (OpenTelemetry: cicd.pipeline.task.name).
	Job string `json:"job,omitempty"`
	// JobID is the numeric id of the job (its check run), from the runner's Worker log or JOB_CHECK_RUN_ID (OpenTelemetry: cicd.pipeline.task.run.id).
	JobID string `json:"job_id,omitempty"`
	// JobName is the display name of the job with its matrix values, from the runner's Worker log.
	JobName string `json:"job_name,omitempty"`
	// JobURL opens the log of the job; made from server_url, repository, run_id and job_id where all are known (OpenTelemetry: cicd.pipeline.task.run.url.full).
	JobURL string `json:"job_url,omitempty"`
	// JobWorkflowRef is the path and ref of the reusable workflow that defines the job, where known.
	JobWorkflowRef string `json:"job_workflow_ref,omitempty"`
	// OrchestrationID tells the legs of a matrix apart, from ACTIONS_ORCHESTRATION_ID (runner 2.331.0 and later, where the server sends it).
	OrchestrationID string `json:"orchestration_id,omitempty"`
	// RunID is the id of the workflow run, from GITHUB_RUN_ID (OpenTelemetry: cicd.pipeline.run.id).
	RunID string `json:"run_id,omitempty"`
	// RunNumber is the number of the run in its workflow, from GITHUB_RUN_NUMBER.
	RunNumber int64 `json:"run_number,omitempty"`
	// RunAttempt is 1 for the first attempt of the run, from GITHUB_RUN_ATTEMPT.
	RunAttempt int64 `json:"run_attempt,omitempty"`
	// EventName is what triggered the workflow (push, schedule, ...), from GITHUB_EVENT_NAME.
	EventName string `json:"event_name,omitempty"`
	// Ref is the full git ref of the run, from GITHUB_REF (OpenTelemetry: vcs.ref.head.name).
	Ref string `json:"ref,omitempty"`
	// HeadRef is the source branch of a pull request, from GITHUB_HEAD_REF.
	HeadRef string `json:"head_ref,omitempty"`
	// SHA is the commit of the run, from GITHUB_SHA (OpenTelemetry: vcs.ref.head.revision).
	SHA string `json:"sha,omitempty"`
	// Actor is the login of who triggered the run first, from GITHUB_ACTOR.
	Actor string `json:"actor,omitempty"`
	// TriggeringActor is the login of who triggered this attempt, from GITHUB_TRIGGERING_ACTOR.
	TriggeringActor string `json:"triggering_actor,omitempty"`
	// Step is the id of the calling step, or the name the runner made for it (__run_2), from the caller's GITHUB_ACTION; never guessed by time, because steps can overlap.
	Step string `json:"step,omitempty"`
	// ActionRepository is owner/name of the action that the calling step uses, from GITHUB_ACTION_REPOSITORY or the path in GITHUB_ACTION_PATH.
	ActionRepository string `json:"action_repository,omitempty"`
	// ActionRef is the ref of that action, from GITHUB_ACTION_REF.
	ActionRef string `json:"action_ref,omitempty"`
	// TrackingID is the runner's own id of the job (RUNNER_TRACKING_ID), by which records and sealed context find each other.
	TrackingID string `json:"tracking_id,omitempty"`
	// Runner is the runner that ran the job.
	Runner *Runner `json:"runner,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Runner is the GitHub Actions runner that ran a job.
type Runner struct {
	// Name is the runner's name, from RUNNER_NAME; on Actions Runner Controller also the name of the pod.
	Name string `json:"name,omitempty"`
	// OS is Linux, Windows or macOS, from RUNNER_OS.
	OS string `json:"os,omitempty"`
	// Arch is X86, X64, ARM or ARM64, from RUNNER_ARCH.
	Arch string `json:"arch,omitempty"`
	// Environment is github-hosted or self-hosted, from RUNNER_ENVIRONMENT.
	Environment string `json:"environment,omitempty"`
	// Labels are the runner's labels or the name of its scale set, where the installation names them.
	Labels []string `json:"labels,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Host is the machine a record was made on.
type Host struct {
	// Name is the host name; in a pod, the pod's name.
	Name string `json:"name,omitempty"`
	// Pod is the name of the Kubernetes pod, from POD_NAME (downward API).
	Pod string `json:"pod,omitempty"`
	// Namespace is the pod's namespace, from POD_NAMESPACE (downward API).
	Namespace string `json:"namespace,omitempty"`
	// Node is the name of the Kubernetes node, from NODE_NAME (downward API).
	Node string `json:"node,omitempty"`
	// BootID is the id of this boot of the kernel, from /proc/sys/kernel/random/boot_id.
	BootID string `json:"boot_id,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Invocation describes one call of a wrapped tool. Nothing of argv is kept but
// the command path, image references, the names of flags and the values of a
// short list of harmless flags, unless the configuration asks for argv.
type Invocation struct {
	// Tool is the name the shim was called by: docker, podman, ...
	Tool string `json:"tool,omitempty"`
	// Command is the path of subcommands as typed: run, buildx build, image pull; empty where none was named.
	Command string `json:"command,omitempty"`
	// Images are the image references named on the command line, in order, as typed.
	Images []string `json:"images,omitempty"`
	// Flags are the names of the flags used, in order, without their values, as typed (-t, --build-arg).
	Flags []string `json:"flags,omitempty"`
	// Platform is the value of --platform.
	Platform string `json:"platform,omitempty"`
	// Target is the build stage named by --target.
	Target string `json:"target,omitempty"`
	// Argv is the command line behind the tool's own name, redacted (docs/redaction.md); kept only where record_argv is set.
	Argv []string `json:"argv,omitempty"`
	// Argc is the number of arguments, the tool's own name included.
	Argc int64 `json:"argc,omitempty"`
	// PID is the process id, which docker keeps.
	PID int64 `json:"pid,omitempty"`
	// PPID is the process id of the caller.
	PPID int64 `json:"ppid,omitempty"`
	// UID is the real user id of the caller; -1 where it is not known, in records from Worker logs.
	UID int64 `json:"uid"`
	// Sudo is true when the call came through sudo (SUDO_UID is set), which hides the job's variables.
	Sudo bool `json:"sudo,omitempty"`
	// Cwd is the working directory relative to GITHUB_WORKSPACE ("." is the workspace itself); empty where it lies outside or no workspace is known.
	Cwd string `json:"cwd,omitempty"`
	// StdinTTY is true when standard input is a terminal.
	StdinTTY bool `json:"stdin_tty,omitempty"`
	// Daemon is the class of daemon the call talks to, never its address: unix, tcp, ssh, npipe, fd, context or default.
	Daemon string `json:"daemon,omitempty"`
	// Nested is true when a CLI plugin called docker again; such a call is not counted as one of the job's own.
	Nested bool `json:"nested,omitempty"`
	// ParentID is the id of the invocation whose process is an ancestor of a nested call's. The agent writes it, where it sees the process and watches the parent.
	ParentID string `json:"parent_id,omitempty"`
	// MonoNS is CLOCK_MONOTONIC in nanoseconds at the call, for durations that a clock step cannot falsify.
	MonoNS int64 `json:"mono_ns,omitempty"`
	// Truncated is true when fields were cut to keep the record under 16 KiB.
	Truncated bool `json:"truncated,omitempty"`
	// Redaction is failed when the command line could not be examined safely; then only argc is kept.
	Redaction string `json:"redaction,omitempty"`
	// ExecError is the error of starting the real binary (ENOENT, EACCES, ELOOP, ...); empty where it started.
	ExecError string `json:"exec_error,omitempty"`
	// Path is the way the record took to the agent: socket or file. The agent writes it.
	Path string `json:"path,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// End describes the end of an invocation.
type End struct {
	// InvocationID is the id of the invocation record that ended.
	InvocationID string `json:"invocation_id,omitempty"`
	// Tool and Command repeat the invocation's, so that an end can be counted alone.
	Tool string `json:"tool,omitempty"`
	// Command repeats the invocation's command path.
	Command string `json:"command,omitempty"`
	// Images repeat the invocation's images.
	Images []string `json:"images,omitempty"`
	// DurationNS is the time from the call to the end, in nanoseconds.
	DurationNS int64 `json:"duration_ns,omitempty"`
	// AtMost is true where the duration is an upper bound: the tool had ended before the agent looked for the first time, or source is socket_eof. Where it could be off by more than ten seconds, it is left out.
	AtMost bool `json:"at_most,omitempty"`
	// ExitCode is the exit code, 0 to 255; absent where unknown or where a signal ended the tool.
	ExitCode *int64 `json:"exit_code,omitempty"`
	// Signal is the number of the signal that ended the tool.
	Signal int64 `json:"signal,omitempty"`
	// Source says how the end was seen: pidfd_info (exit code and duration, Linux 6.15 and later), pidfd_poll (duration, Linux 5.3 and later), socket_eof (an upper bound of the duration), worker_log (what the runner wrote of its own processes) or unknown.
	Source string `json:"source,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Event describes one event of the Docker daemon's event stream
// (https://docs.docker.com/reference/api/engine/, GET /events).
type Event struct {
	// Type is container, image, network, volume, builder, daemon, plugin, or other.
	Type string `json:"type,omitempty"`
	// Action is the action cut at its first colon: the rest of an exec action is a command line, which can hold secrets.
	Action string `json:"action,omitempty"`
	// Detail is a harmless rest of the action: the state in health_status (healthy, unhealthy, starting).
	Detail string `json:"detail,omitempty"`
	// Scope is local or swarm.
	Scope string `json:"scope,omitempty"`
	// ActorID is the id of the container, image, network or volume.
	ActorID string `json:"actor_id,omitempty"`
	// Image is the image reference as the daemon gives it: what the user typed for a container, the reference for an image event.
	Image string `json:"image,omitempty"`
	// Name is the name of the container, network or volume.
	Name string `json:"name,omitempty"`
	// TimeNano is the daemon's own time of the event in nanoseconds since 1970, its identity in replays.
	TimeNano int64 `json:"time_nano,omitempty"`
	// Received is the time the event was read from the stream.
	Received time.Time `json:"received,omitzero"`
	// ExitCode is the exit code of a container (die) or of an exec (exec_die). A label of the same name can overwrite it in the daemon.
	ExitCode *int64 `json:"exit_code,omitempty"`
	// DurationNS is the time from start to die of a container, in nanoseconds, by the daemon's clock.
	DurationNS int64 `json:"duration_ns,omitempty"`
	// OOM is true on die when the daemon reported an out-of-memory event for the container before.
	OOM bool `json:"oom,omitempty"`
	// Signal is the signal of a kill event.
	Signal int64 `json:"signal,omitempty"`
	// ExecID is the id of an exec.
	ExecID string `json:"exec_id,omitempty"`
	// Driver is the driver of a volume or the type of a network.
	Driver string `json:"driver,omitempty"`
	// Container is the id of the container that a network or volume event concerns.
	Container string `json:"container,omitempty"`
	// ReclaimedBytes is the space that a prune gave back.
	ReclaimedBytes int64 `json:"reclaimed_bytes,omitempty"`
	// RunnerMade is true for containers, networks and images that the runner itself made for a job (services, job containers, container actions).
	RunnerMade bool `json:"runner_made,omitempty"`
	// Labels are the labels of the container or image that the configuration lists.
	Labels []Attr `json:"labels,omitempty"`
	// Replayed is true when the event was read again from the daemon's buffer after a reconnect.
	Replayed bool `json:"replayed,omitempty"`
	// Engine is the id of the Docker daemon.
	Engine string `json:"engine,omitempty"`
	// WaitedNS is set in the first event after a start at which the Docker daemon was not up: how long it was waited for, in nanoseconds.
	WaitedNS int64 `json:"waited_ns,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Attr is one key with its value.
type Attr struct {
	// Key is the name of a label.
	Key string `json:"key,omitempty"`
	// Value is its value, cut at 4 KiB.
	Value string `json:"value,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Loss describes records that are missing, and why. A hole is data.
type Loss struct {
	// Cause is a short fixed word: stream_gap, daemon_restarted, queue_full, disk_full, disk_cap, torn_line, truncated_file, unreadable_file, cursor_lost, quarantine_full, shim, metrics_dropped, agent_restarted, rate_limited, changed_file.
	Cause string `json:"cause,omitempty"`
	// Count is the number of records lost; -1 where it cannot be known.
	Count int64 `json:"count,omitempty"`
	// From is the start of the time in which records were lost, where known.
	From time.Time `json:"from,omitzero"`
	// To is the end of that time.
	To time.Time `json:"to,omitzero"`
	// Source is the part that lost them: events, journal, spool, sink name, shim, or installation where one of its files was changed.
	Source string `json:"source,omitempty"`
	// Detail says more in plain words.
	Detail string `json:"detail,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// Job describes the start or the end of a job's context.
type Job struct {
	// Outcome says how the context was closed: completed (by the job-completed hook), superseded (the next job began), abandoned (the runner's process went away) or shutdown (the agent was asked to stop).
	Outcome string `json:"outcome,omitempty"`
	// Started is the time the context was sealed.
	Started time.Time `json:"started,omitzero"`
	// DurationNS is the time from the start to the end of the context, in nanoseconds.
	DurationNS int64 `json:"duration_ns,omitempty"`
	// Version is the version of Tallyman on the runner.
	Version string `json:"version,omitempty"`
	// Result is the result of the job as the runner wrote it, in lower case: succeeded, succeeded_with_issues, failed, canceled, skipped or abandoned. Known only where the record comes from the runner's Worker log.
	Result string `json:"result,omitempty"`
	// Source is worker-log where the record was made from a Worker log afterwards; empty where it was made while the job ran.
	Source string `json:"source,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}

// HTTP describes a request, or all alike requests of an hour, as the server that
// answered them counted them. The record's ts is the time of the request, or the start
// of the hour, by the server's clock. Such records are imported from what the operators
// of servers hand out; Tallyman itself watches no traffic.
type HTTP struct {
	// Source is what the record was imported from: github-csv (request logs from GitHub's support), dockerhub-csv (Docker Hub's usage export), csv or jsonl.
	Source string `json:"source,omitempty"`
	// Row is the number of the row in the imported file, the first row of data being 1.
	Row int64 `json:"row,omitempty"`
	// Count is how many requests the record stands for: 1 for a row that is one request. For Docker Hub's export it is version_checks and pulls together.
	Count int64 `json:"count"`
	// PeriodNS is the length of the time from ts on that the record stands for, in nanoseconds; absent for a single request.
	PeriodNS int64 `json:"period_ns,omitempty"`
	// Method is the request's method in capitals.
	Method string `json:"method,omitempty"`
	// Host is the host that was asked, in lower case and without a port that is the scheme's own.
	Host string `json:"host,omitempty"`
	// Path is the path of the URL, without query and fragment; segments that look like secrets read [REDACTED].
	Path string `json:"path,omitempty"`
	// Class says what kind of request the path is: git-refs, git-fetch, git-push, git-lfs, archive, raw, release, api, graphql, registry-manifest, registry-blob, registry-tags, registry-ping, token, web or other; pull and check for Docker Hub's counts, where only one of them is not 0.
	Class string `json:"class,omitempty"`
	// Repository is the repository that the path names, as owner/name without .git: what was asked for, not the repository of the job.
	Repository string `json:"repository,omitempty"`
	// Status is the status code of the answer, 100 to 599.
	Status int64 `json:"status,omitempty"`
	// Bytes is the length of the answer's body in bytes, as the server gives it.
	Bytes *int64 `json:"bytes,omitempty"`
	// DurationNS is the time that the server took to answer, in nanoseconds.
	DurationNS int64 `json:"duration_ns,omitempty"`
	// UserAgent is the User-Agent header, without what looks like a secret.
	UserAgent string `json:"user_agent,omitempty"`
	// RemoteAddr is the IP address that the request came from, as the server saw it: for runners behind NAT, their shared egress address.
	RemoteAddr string `json:"remote_addr,omitempty"`
	// RemoteAddrs are the addresses of a row that stands for requests from several; then remote_addr is empty.
	RemoteAddrs []string `json:"remote_addrs,omitempty"`
	// User is the account whose credentials the request carried; empty for anonymous requests and where the source does not say.
	User string `json:"user,omitempty"`
	// Anonymous is true where the source says that no credentials were given.
	Anonymous bool `json:"anonymous,omitempty"`
	// TokenName is the name (never the value) of the access token that was used, as its owner called it.
	TokenName string `json:"token_name,omitempty"`
	// Image is the repository of an image, with registry and namespace (docker.io/library/alpine).
	Image string `json:"image,omitempty"`
	// Tag is the tag that was asked for.
	Tag string `json:"tag,omitempty"`
	// Digest is the digest that was asked for or answered, as algorithm:hex.
	Digest string `json:"digest,omitempty"`
	// Pulls is the number of pulls in the period, which count against Docker Hub's limits.
	Pulls *int64 `json:"pulls,omitempty"`
	// VersionChecks is the number of version checks in the period: manifests asked for by HEAD, which do not count against the limits.
	VersionChecks *int64 `json:"version_checks,omitempty"`
	// RequestID is the server's own id of the request (GitHub: X-GitHub-Request-Id).
	RequestID string `json:"request_id,omitempty"`
	// Candidates is the number of jobs whose records could explain the row, where the import was joined to records of jobs; ci is set only where it is 1.
	Candidates *int64 `json:"candidates,omitempty"`
	// Unknown holds members that this build does not know.
	Unknown []byte `json:"-"`
}
