package report

import "time"

// SchemaVersion is the version of the report's JSON. It grows when a member
// changes its meaning or goes; members may be added without it.
const SchemaVersion = 1

// Report is the answer to the questions of one run of `tallyman report`. Its JSON
// form is stable: all members below are always there, durations are nanoseconds,
// times are RFC 3339 in UTC.
type Report struct {
	// Schema is SchemaVersion.
	Schema int `json:"schema"`
	// Generated is when the report was made.
	Generated time.Time `json:"generated"`
	// Sources are the journals and files that were read.
	Sources []string `json:"sources"`
	// From and To are the time range asked for (To itself is outside); absent where open.
	From time.Time `json:"from,omitzero"`
	To   time.Time `json:"to,omitzero"`
	// Filter is what the report was narrowed to.
	Filter Filter `json:"filter"`
	// Read says what was read to answer.
	Read Read `json:"read"`
	// Coverage says how far the figures below can be trusted. It belongs to the
	// time range, not to the filter on jobs: a record without a job could be
	// anybody's.
	Coverage CoverageByBasis `json:"coverage"`
	// Totals are the sums over everything selected.
	Totals Totals `json:"totals"`

	// Repositories, Workflows and Jobs are ordered by calls.
	Repositories Table[Usage] `json:"repositories"`
	Workflows    Table[Usage] `json:"workflows"`
	Jobs         Table[Usage] `json:"jobs"`
	// Commands are ordered by calls.
	Commands Table[Command] `json:"commands"`
	// Failures are the calls that ended with an exit code other than 0 or by a signal.
	Failures Table[Failure] `json:"failures"`
	// FailedCalls are the same calls, apart by the first image that they name.
	FailedCalls Table[FailedCall] `json:"failed_calls"`
	// FailedPulls are `docker pull`, `docker image pull` and `docker compose pull`
	// calls that failed. A failed pull leaves no event of the daemon.
	FailedPulls Table[FailedImage] `json:"failed_pulls"`
	// CouldNotStart are `docker run` calls with exit code 125: docker itself
	// could not start the container, for a failed pull among other reasons.
	CouldNotStart Table[FailedImage] `json:"could_not_start"`
	// Longest are the calls that took longest.
	Longest []Call `json:"longest"`
	// ImagesNamed are the images named on command lines, ImagesPulled those that
	// the daemon says it pulled (also when it found them up to date).
	ImagesNamed  Table[ImageCount] `json:"images_named"`
	ImagesPulled Table[ImageCount] `json:"images_pulled"`
	// Registries splits both by registry.
	Registries Table[Registry] `json:"registries"`
	// Containers are ordered by containers started.
	Containers Table[Container] `json:"containers"`
	// ContainerExits are the exit codes of containers.
	ContainerExits Table[ContainerExit] `json:"container_exits"`
	// Losses are the holes in the account that touch the time range, by cause. They
	// are never narrowed to a job: what was lost cannot say whose it was.
	Losses Table[Loss] `json:"losses"`
}

// Table is the head of a list.
type Table[T any] struct {
	// Rows are the first rows, as many as were asked for.
	Rows []T `json:"rows"`
	// More is the number of rows not shown.
	More int `json:"more"`
	// Slack is 0 where the figures are exact. Otherwise there were more different
	// keys than the report keeps in memory: rare ones are missing, and a figure may
	// be too low by up to this much.
	Slack int64 `json:"slack"`
}

// Read counts lines and records.
type Read struct {
	// Lines is the number of lines read, Bytes their size.
	Lines int64 `json:"lines"`
	Bytes int64 `json:"bytes"`
	// Records is the number of different records among them.
	Records int64 `json:"records"`
	// Duplicates is the number of records left out because their id was read before.
	Duplicates int64 `json:"duplicates"`
	// Unreadable is the number of lines that are no record.
	Unreadable int64 `json:"unreadable"`
	// Torn is the number of damaged lines that the journal's reader passed over.
	Torn int64 `json:"torn"`
	// Newer is the number of records written with a newer schema than this build knows.
	Newer int64 `json:"newer"`
	// Selected is the number of records that the time range and the filter let through.
	Selected int64 `json:"selected"`
	// First and Last are the times of the first and the last of these.
	First time.Time `json:"first,omitzero"`
	Last  time.Time `json:"last,omitzero"`
}

// CoverageByBasis is the coverage of the two kinds of figures: those from the
// calls that the shim saw and those from the events of the daemon.
type CoverageByBasis struct {
	Calls  Coverage `json:"calls"`
	Events Coverage `json:"events"`
}

// Coverage says of how many records the job is known, and how.
type Coverage struct {
	// Records is the number of records (calls: without nested ones); those made
	// while no job was on the runner are not among them but in OutsideJob.
	Records int64 `json:"records"`
	// WithJob is the number of records that name a job.
	WithJob int64 `json:"with_job"`
	// Sealed, Environment, Inferred and None are how the job was found; None is the
	// number of records without one.
	Sealed      int64 `json:"sealed"`
	Environment int64 `json:"environment"`
	Inferred    int64 `json:"inferred"`
	None        int64 `json:"none"`
	// Explained and Unattributed say of events whether a recorded call of the same
	// machine can have caused them. What none can was done past the shim, and only its
	// time says whose it is. A lower bound: what was done past it while a fitting call
	// ran counts as explained. Events of the daemon itself are neither.
	Explained    int64 `json:"explained,omitempty"`
	Unattributed int64 `json:"unattributed"`
	// Disputed is the number of records whose caller claimed another job than the sealed one.
	Disputed int64 `json:"disputed"`
	// OutsideJob is the number of records made while no job was known on the runner.
	OutsideJob int64 `json:"outside_job"`
	// Lost is the number of records known to be lost, LostUnknown the number of
	// holes of unknown size.
	Lost        int64 `json:"lost"`
	LostUnknown int64 `json:"lost_unknown"`
}

// Totals are sums. A call is one of a job's own: nested calls (a plugin calling
// docker again) and calls outside any job are counted apart.
type Totals struct {
	Runs          int64 `json:"runs"`            // workflow runs seen
	Jobs          int64 `json:"jobs"`            // jobs seen, each attempt and each leg of a matrix where they can be told apart
	Calls         int64 `json:"calls"`           // calls of docker and other wrapped tools
	Nested        int64 `json:"nested"`          // calls made by a plugin of docker
	OutsideJob    int64 `json:"outside_job"`     // calls while no job was known
	Ended         int64 `json:"ended"`           // calls whose end was seen
	NoEnd         int64 `json:"no_end"`          // calls whose end was not seen: still running, or unknown
	ExitKnown     int64 `json:"exit_known"`      // calls whose exit code or signal is known
	Failed        int64 `json:"failed"`          // calls that ended with an exit code other than 0, or by a signal
	NotExecuted   int64 `json:"not_executed"`    // calls whose real binary could not be started
	EndsAlone     int64 `json:"ends_alone"`      // ends whose call was not read (it lies before the journal's first record)
	DurationNS    int64 `json:"duration_ns"`     // sum of the calls' durations
	FailedPulls   int64 `json:"failed_pulls"`    // see Report.FailedPulls
	CouldNotStart int64 `json:"could_not_start"` // see Report.CouldNotStart

	Events              int64 `json:"events"`                // events of the daemon
	ImagesPulled        int64 `json:"images_pulled"`         // image pull events
	ContainersCreated   int64 `json:"containers_created"`    // container create events
	ContainersStarted   int64 `json:"containers_started"`    // container start events
	ContainersEnded     int64 `json:"containers_ended"`      // container die events
	ContainersFailed    int64 `json:"containers_failed"`     // ended with an exit code other than 0 without having been told to stop
	ContainersStopped   int64 `json:"containers_stopped"`    // ended after docker stop, kill or rm -f, whatever the exit code
	ContainersOOM       int64 `json:"containers_oom"`        // ended after the daemon reported that memory ran out
	ContainersRunner    int64 `json:"containers_runner"`     // started by the runner itself: services, job containers, container actions
	ContainerDurationNS int64 `json:"container_duration_ns"` // sum of the containers' run times
}

// Usage is what a repository, a workflow or a job used.
type Usage struct {
	Repository        string `json:"repository"`
	Workflow          string `json:"workflow,omitempty"`
	Job               string `json:"job,omitempty"`
	Calls             int64  `json:"calls"`
	Failed            int64  `json:"failed"`
	DurationNS        int64  `json:"duration_ns"`
	ImagesPulled      int64  `json:"images_pulled"`
	ContainersStarted int64  `json:"containers_started"`
}

// Command is the use of one command path.
type Command struct {
	Tool       string `json:"tool"`
	Command    string `json:"command"`
	Calls      int64  `json:"calls"`
	Ended      int64  `json:"ended"`
	Failed     int64  `json:"failed"`
	DurationNS int64  `json:"duration_ns"`
	LongestNS  int64  `json:"longest_ns"`
}

// Failure is one way in which one command failed.
type Failure struct {
	Tool     string `json:"tool"`
	Command  string `json:"command"`
	ExitCode int64  `json:"exit_code"` // 0 when a signal ended it
	Signal   int64  `json:"signal"`    // 0 when it exited
	Calls    int64  `json:"calls"`
}

// FailedCall is one way in which one command failed with one image.
type FailedCall struct {
	Failure
	Image string `json:"image"` // "" where the command line named none
}

// FailedImage is an image with which a job's calls failed.
type FailedImage struct {
	Image      string    `json:"image"`
	Registry   string    `json:"registry"`
	Repository string    `json:"repository"`
	Workflow   string    `json:"workflow"`
	Job        string    `json:"job"`
	Failures   int64     `json:"failures"`
	Last       time.Time `json:"last,omitzero"` // of the last failure, as are the members below
	ExitCode   int64     `json:"exit_code"`
	Signal     int64     `json:"signal"`
	RunID      string    `json:"run_id"`
	JobURL     string    `json:"job_url"`
}

// Call is one call with its end.
type Call struct {
	InvocationID string    `json:"invocation_id"`
	Started      time.Time `json:"started,omitzero"`
	Tool         string    `json:"tool"`
	Command      string    `json:"command"`
	Images       []string  `json:"images,omitempty"`
	Repository   string    `json:"repository"`
	Workflow     string    `json:"workflow"`
	Job          string    `json:"job"`
	RunID        string    `json:"run_id"`
	JobURL       string    `json:"job_url"`
	DurationNS   int64     `json:"duration_ns"`
	ExitCode     *int64    `json:"exit_code,omitempty"`
	Signal       int64     `json:"signal,omitempty"`
	Source       string    `json:"source"` // how the end was seen; with socket_eof the duration is an upper bound
}

// ImageCount counts one image.
type ImageCount struct {
	Image    string `json:"image"`
	Registry string `json:"registry"`
	Count    int64  `json:"count"`
}

// Registry counts the images of one registry.
type Registry struct {
	Registry string `json:"registry"`
	Named    int64  `json:"named"`
	Pulled   int64  `json:"pulled"`
	Failed   int64  `json:"failed_pulls"`
}

// Container counts the containers of one image.
type Container struct {
	Image      string `json:"image"`
	Created    int64  `json:"created"`
	Started    int64  `json:"started"`
	Ended      int64  `json:"ended"`
	Failed     int64  `json:"failed"`
	Stopped    int64  `json:"stopped"`
	OOM        int64  `json:"oom"`
	DurationNS int64  `json:"duration_ns"`
	LongestNS  int64  `json:"longest_ns"`
}

// ContainerExit counts one exit code of containers.
type ContainerExit struct {
	ExitCode   int64 `json:"exit_code"`
	Stopped    bool  `json:"stopped"` // after docker stop, kill or rm -f
	Containers int64 `json:"containers"`
}

// Loss sums up the losses of one cause.
type Loss struct {
	Cause   string    `json:"cause"`
	Source  string    `json:"source"`
	Holes   int64     `json:"holes"`   // loss records
	Lost    int64     `json:"lost"`    // records known to be lost
	Unknown int64     `json:"unknown"` // holes of unknown size
	From    time.Time `json:"from,omitzero"`
	To      time.Time `json:"to,omitzero"`
	Detail  string    `json:"detail"` // of the last
}
