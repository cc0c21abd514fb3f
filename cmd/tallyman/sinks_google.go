//go:build !slim

package main

import (
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/cloudlogging"
	"github.com/tallyman-ci/tallyman/sinks/pubsub"
)

// googleSchemes are the sinks for Google Cloud. Their clients are more than half of
// the binary; `go build -tags slim` leaves them out.
func googleSchemes() []sinks.Scheme {
	return []sinks.Scheme{pubsub.Scheme(), cloudlogging.Scheme()}
}
