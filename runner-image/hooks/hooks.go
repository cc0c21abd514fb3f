// Package hooks holds the two scripts that the runner starts before and after each
// job, so that the tallyman command can install them.
package hooks

import _ "embed"

// JobStarted is job-started.sh.
//
//go:embed job-started.sh
var JobStarted []byte

// JobCompleted is job-completed.sh.
//
//go:embed job-completed.sh
var JobCompleted []byte
