// Package report is what the program inside a container tells the tests outside.
package report

import "github.com/tallyman-ci/tallyman/e2e/runnertest"

// Job is how a job went.
type Job struct {
	UID       int
	Started   runnertest.Result
	Steps     []runnertest.Result
	Completed runnertest.Result
	Orphans   []string // that the runner killed
	Summary   string   // the job summary
}
