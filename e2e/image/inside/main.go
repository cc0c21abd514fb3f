// Command inside is run in containers by the tests of the runner image.
//
//	inside job        runs a job with some docker commands as the runner does, as this user
//	inside tree       describes each file, as standin.Tree does
//	inside records F  prints the records of the journal in F
//
// Each prints one JSON value.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tallyman-ci/tallyman/e2e/image/report"
	"github.com/tallyman-ci/tallyman/e2e/runnertest"
	"github.com/tallyman-ci/tallyman/e2e/standin"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "inside:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	var value any
	var err error
	switch args[0] {
	case "job":
		value, err = job(context.Background(), args[1:])
	case "tree":
		value, err = standin.Tree("/")
	case "records":
		value, err = records(args[1])
	default:
		err = fmt.Errorf("what is %q?", args[0])
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(value)
}

// job runs one job whose steps are scripts.
func job(ctx context.Context, steps []string) (report.Job, error) {
	host, err := os.Hostname()
	if err != nil {
		return report.Job{}, err
	}
	runner := &runnertest.Runner{Name: host, Root: "/home/runner", Env: os.Environ(),
		HookStarted: os.Getenv("ACTIONS_RUNNER_HOOK_JOB_STARTED"), HookCompleted: os.Getenv("ACTIONS_RUNNER_HOOK_JOB_COMPLETED")}
	j, err := runner.Start(ctx, runnertest.Spec{Repository: "acme/shop", Workflow: "CI", WorkflowFile: "ci.yml", Job: "build", RunID: 4711})
	if err != nil {
		return report.Job{}, err
	}
	out := report.Job{UID: os.Getuid(), Started: j.Started}
	for i, script := range steps {
		result, err := j.Step(ctx, fmt.Sprintf("__run_%d", i+1), script)
		if err != nil {
			return out, err
		}
		out.Steps = append(out.Steps, result)
	}
	var orphans []string
	if out.Completed, orphans, err = j.Complete(ctx); err != nil {
		return out, err
	}
	out.Orphans = orphans
	summary, err := os.ReadFile(j.Summary)
	out.Summary = string(summary)
	return out, err
}

// records are the lines of a journal.
func records(dir string) ([]json.RawMessage, error) {
	files, err := filepath.Glob(filepath.Join(dir, "records-*.jsonl"))
	lines := []json.RawMessage{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(data) {
			if text, whole := bytes.CutSuffix(line, []byte("\n")); whole { // the agent may be writing
				lines = append(lines, json.RawMessage(text))
			}
		}
	}
	return lines, err
}
