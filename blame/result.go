package blame

import "time"

// Verdict is what can be concluded.
type Verdict string

// The verdicts.
const (
	// Named: at least one suspect would not stand out by chance, and enough of the builds
	// were recorded for the ranking to be believed. Suspect.Named says which.
	Named Verdict = "named"
	// Indications: suspects stand out, but something in Reasons weakens the ranking.
	Indications Verdict = "indications"
	// CannotTell: nobody can be named; Reasons say why. A ranking may still be there.
	CannotTell Verdict = "cannot_tell"
)

// Result is the answer of Rank. Its JSON form is what tallyman-desk blame --format json
// prints; members are added, never renamed.
type Result struct {
	Verdict Verdict `json:"verdict"`
	// Reasons say in sentences what the verdict rests on, the weightiest first.
	Reasons []string `json:"reasons"`
	// From and To are the part of time that was looked at: where requests and builds overlap.
	From time.Time `json:"from"`
	To   time.Time `json:"to"`
	// Requests is the number of requests in that time, Outside the number before and after.
	Requests int64 `json:"requests"`
	Outside  int64 `json:"outside"`
	// Builds is the number of builds in that time, AssumedEnds of how many the end is not
	// known and was taken from alike builds, Candidates of how many sorts they are.
	Builds      int `json:"builds"`
	AssumedEnds int `json:"assumed_ends"`
	Candidates  int `json:"candidates"`
	// Explained is the number of requests that the builds of those explain who stand out
	// at all (PValue up to 0.02); the others are background: traffic of nobody here.
	Explained Estimate `json:"explained"`
	// Coverage says which share of the builds is believed to be recorded.
	Coverage Coverage `json:"coverage"`
	// Shift is how much later the server's clock shows the same moment than the runners'
	// clocks, as far as requests and builds tell; the ranking has it taken out.
	Shift time.Duration `json:"shift_ns"`
	// Bin is the width of the time bins that requests were counted in.
	Bin time.Duration `json:"bin_ns"`
	// Suspects are ranked by the evidence against them, the strongest first.
	Suspects []Suspect `json:"suspects"`
	// ByOverlap is the baseline: candidates by how many requests fell into the time of
	// their builds. It ranks busy workflows, not guilty ones, and stands here to be compared.
	ByOverlap []Baseline `json:"by_overlap"`
	// Method says how it was found, with the literature, in paragraphs.
	Method []string `json:"method"`
}

// Estimate is a number with the bounds of its 90 % interval.
type Estimate struct {
	Value float64 `json:"value"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
}

// Suspect is one candidate, or several that cannot be told apart.
type Suspect struct {
	// Rank counts from 1; RankLow to RankHigh is where it lies in 90 % of the resamples.
	Rank     int `json:"rank"`
	RankLow  int `json:"rank_low"`
	RankHigh int `json:"rank_high"`
	// Members has more than one element where builds of several candidates always ran at
	// the same time: the guilt is of one or some of them, and the figures are of all together.
	Members []Candidate `json:"members"`
	// Named is true where the evidence is beyond the strongest that any candidate got when
	// the requests were moved in time, so that nobody's builds could be their cause.
	Named bool `json:"named"`
	// PValue is the share of candidates that get evidence this strong when the requests
	// are moved in time: the probability by chance of one candidate, not of the best of all.
	PValue float64 `json:"p_value"`
	// Evidence is the number of standard deviations of those moves at which the evidence lies.
	Evidence float64 `json:"evidence"`
	// Requests is the number of requests that its recorded builds explain. For one who does
	// not stand out at all it is the most that could be laid at its door, and Low is 0.
	Requests Estimate `json:"requests"`
	// Share is its part of all requests, PerBuild the number for each recorded build.
	Share    float64 `json:"share"`
	PerBuild float64 `json:"per_build"`
	// Builds is the number of its recorded builds, Active the share of the time in which
	// at least one of them ran.
	Builds int     `json:"builds"`
	Active float64 `json:"active"`
	// Overlaps is the baseline's count for it, OverlapRank its place by that; Lift is the
	// rate of requests while its builds ran, over the rate while none ran (0: always one ran).
	Overlaps    int64   `json:"overlaps"`
	OverlapRank int     `json:"overlap_rank"`
	Lift        float64 `json:"lift"`
	LiftRank    int     `json:"lift_rank"`
	// Steps are the builds by step, image and target, those that explain most first.
	Steps []Part `json:"steps,omitempty"`
	// UserAgents and Asked say what its requests look like: user agents and repositories
	// that were asked for, where the file has them.
	UserAgents []Part `json:"user_agents,omitempty"`
	Asked      []Part `json:"asked,omitempty"`
	// Examples are builds that explain many requests, to look at.
	Examples []Example `json:"examples,omitempty"`
}

// Part is a part of a suspect's requests.
type Part struct {
	Name     string  `json:"name"`
	Builds   int     `json:"builds,omitempty"` // 0 where requests are parted, not builds
	Requests float64 `json:"requests"`
}

// Example is one build.
type Example struct {
	Start    time.Time `json:"start"`
	RunID    string    `json:"run_id,omitempty"`
	JobURL   string    `json:"job_url,omitempty"`
	Runner   string    `json:"runner,omitempty"`
	Requests float64   `json:"requests"`
}

// Baseline is a candidate by the plain count of overlaps.
type Baseline struct {
	Candidate Candidate `json:"candidate"`
	Overlaps  int64     `json:"overlaps"`
	Lift      float64   `json:"lift"`
}

// Coverage is the share of builds that is believed to be recorded. A ranking is worth
// less the lower it is: what missing builds caused is laid at the door of others.
type Coverage struct {
	// Share is 0 to 1; negative where nothing tells.
	Share float64 `json:"share"`
	// From says what it rests on.
	From string `json:"from"`
	// RunsSeen of RunsExpected run numbers between the first and the last of each workflow
	// are in the records.
	RunsSeen     int64 `json:"runs_seen"`
	RunsExpected int64 `json:"runs_expected"`
	// Lost is the number of records that loss records count; LostUnknown is true where one
	// of them cannot say how many.
	Lost        int64 `json:"lost"`
	LostUnknown bool  `json:"lost_unknown"`
}

// Candidate is whose builds are looked at together. Fields that the chosen level leaves
// out are empty.
type Candidate struct {
	Repository string `json:"repository"`
	Workflow   string `json:"workflow,omitempty"`
	Job        string `json:"job,omitempty"`
	// Step is the workflow's step, Image what the build tags, Target its stage: where known.
	Step   string `json:"step,omitempty"`
	Image  string `json:"image,omitempty"`
	Target string `json:"target,omitempty"`
}
