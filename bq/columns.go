package bq

import (
	_ "embed"
	"strings"
	"sync"

	"github.com/tallyman-ci/tallyman/sinks/row"
)

// Column is a column of a view.
type Column struct {
	Name    string
	Type    string // of GoogleSQL: STRING, INT64, FLOAT64, BOOL, TIMESTAMP or ARRAY<STRING>
	Meaning string
}

// columnsFile lists the columns of all views, as the analyser of GoogleSQL found them
// in the queries: (cd bq/analyse && go test . -update) writes it, and go test compares.
//
//go:embed columns.txt
var columnsFile string

// meanings say what columns hold. A name means the same in all views but those
// that are named before a dot.
var meanings = map[string]string{
	"action":                     "what happened, in the daemon's word: pull, create, start or die",
	"actor":                      "who triggered the run first",
	"anonymous":                  "the server says that no credentials were given",
	"asked":                      "the repository that was asked for, not that of the job",
	"basis":                      "what is counted: calls, pulls or containers",
	"calls":                      "calls of docker that jobs made themselves",
	"cause":                      "why records are missing, see docs/record.md",
	"class":                      "the kind of request, see docs/record.md",
	"command":                    "the subcommands as typed: run, buildx build",
	"container_id":               "the container's id",
	"containers":                 "containers that were started",
	"created":                    "containers that were created",
	"day":                        "the first moment of the day, UTC",
	"detail":                     "more in plain words",
	"duration_ns":                "how long it took, in nanoseconds; NULL where not known",
	"ended":                      "the end of the job was recorded",
	"environment":                "calls whose job was found in the caller's environment",
	"events":                     "pulls, creations and starts that the daemon reported",
	"exit_code":                  "the exit code; NULL where not known",
	"explained":                  "a recorded call ran on the host at the time, or the runner itself asked for it",
	"coverage.explained":         "of these, the events that a recorded call explains",
	"failed":                     "how many of them failed",
	"found_by":                   "how the job was found: sealed, environment, inferred or none",
	"git_version":                "version of the git that asked; empty where it was no git",
	"holes":                      "losses of unknown size",
	"lost.holes":                 "records that tell of a loss",
	"host":                       "host that ran the call",
	"requests.host":              "host that was asked",
	"hour":                       "the first moment of the hour, UTC",
	"id":                         "id of the record",
	"image":                      "the image without Docker Hub's own names; latest where no tag was given",
	"images":                     "images that were named",
	"containers_per_job.images":  "different images",
	"in_window":                  "such pulls in this hour and the five before",
	"inferred":                   "calls whose job was inferred",
	"job":                        "the job's key in the workflow file",
	"job_key":                    "tells jobs apart: run, attempt, job and tracking id; NULL where no run is known",
	"job_url":                    "opens the job's log; empty where not known",
	"jobs":                       "different jobs",
	"recording.jobs":             "jobs that any record names",
	"last":                       "the last time",
	"logged_in":                  "the job had called docker login before",
	"longest_ns":                 "the longest, in nanoseconds",
	"lost":                       "records that are missing; NULL where nobody can know how many",
	"node":                       "Kubernetes node, or the host where there is none",
	"nodes":                      "different nodes",
	"ok":                         "calls that ended with 0",
	"oom":                        "ran out of memory",
	"containers_per_job.oom":     "containers that ran out of memory",
	"outcome":                    "how it ended: ok, failed, unknown",
	"containers.outcome":         "how a container ended: ok, stopped (it was told to), failed; empty for other events",
	"jobs.outcome":               "how the job's context was closed, see docs/record.md",
	"p50_ns":                     "the median, in nanoseconds",
	"p95_ns":                     "what 95 of 100 do not exceed, in nanoseconds",
	"proactive":                  "the User-Agent bears the mark of a golden image",
	"pulls":                      "pulls that succeeded",
	"dockerhub_limit.pulls":      "pulls from Docker Hub in the hour by jobs that had not logged in",
	"requests.pulls":             "pulls, by Docker Hub's own count",
	"recorded":                   "jobs whose start was recorded by the hook",
	"refused":                    "requests answered with 401",
	"refused_share":              "their share",
	"registry":                   "the registry's host; docker.io for Docker Hub",
	"remote_addr":                "address that the request came from",
	"repositories":               "different repositories",
	"repository":                 "owner/name; empty where no job is known",
	"requests":                   "requests that the row stands for",
	"run_id":                     "id of the workflow run; empty where not known",
	"runner_made":                "the runner made it for the job: services, job containers, container actions",
	"runs":                       "different workflow runs",
	"sealed":                     "calls whose job was sealed by the job-started hook",
	"share":                      "unattributed of total, 0 to 1",
	"coverage.share":             "explained of events, 0 to 1",
	"signal":                     "the signal that ended the call; NULL or 0 where none did",
	"since":                      "start of the time of the loss, where known",
	"source":                     "the part that lost them",
	"requests.source":            "what the record was imported from",
	"started":                    "the start of the job was recorded",
	"containers_per_job.started": "containers that were started",
	"status":                     "status code of the answer",
	"step":                       "the step that called, where known",
	"suspect":                    "bears the mark, and is too old to do what it says",
	"team":                       "the team that owns the repository",
	"time_ns":                    "sum of the known durations, in nanoseconds",
	"time_ns_per_run":            "time_ns divided by runs; NULL where no run is known",
	"tool":                       "docker, podman, ...",
	"total":                      "all of them",
	"ts":                         "time of what is recorded; of the first record where a row stands for several",
	"type":                       "image or container",
	"unattributed":               "those without a job",
	"unknown":                    "calls whose end nobody saw",
	"lost.unknown":               "losses of unknown size",
	"until":                      "end of that time, where known",
	"used":                       "in_window as a share of the 100 pulls that are allowed",
	"user_agent":                 "the User-Agent header",
	"version":                    "Tallyman's version on the runner",
	"workflow":                   "the workflow's name or path; empty where no job is known",
}

// columns are the columns of each view.
var columns = sync.OnceValue(func() map[string][]Column {
	all := map[string][]Column{}
	view := ""
	for line := range strings.Lines(columnsFile) {
		line = strings.TrimSuffix(line, "\n")
		field, found := strings.CutPrefix(line, "  ")
		if !found {
			view = line
			continue
		}
		if field == "the columns of records" {
			for _, c := range row.Columns() {
				all[view] = append(all[view], Column{c.Name, typeOf(c), "see docs/record.md"})
			}
			continue
		}
		name, kind, _ := strings.Cut(field, " ")
		meaning, own := meanings[view+"."+name]
		if !own {
			meaning = meanings[name]
		}
		all[view] = append(all[view], Column{name, kind, meaning})
	}
	return all
})

// typeOf is a column's type as GoogleSQL writes it.
func typeOf(c row.Column) string {
	t := map[row.Type]string{row.String: "STRING", row.Integer: "INT64", row.Boolean: "BOOL", row.Timestamp: "TIMESTAMP"}[c.Type]
	if c.Type == row.Record {
		var fields []string
		for _, f := range c.Fields {
			fields = append(fields, "`"+f.Name+"` "+typeOf(f))
		}
		t = "STRUCT<" + strings.Join(fields, ", ") + ">"
	}
	if c.Mode == row.Repeated {
		t = "ARRAY<" + t + ">"
	}
	return t
}
