//go:build !slim

package main

import (
	"io"
	"os"

	"google.golang.org/grpc/grpclog"

	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/cloudlogging"
	"github.com/tallyman-ci/tallyman/sinks/pubsub"
)

// googleSchemes are the sinks for Google Cloud. Their clients are more than half of
// the binary; `go build -tags slim` leaves them out.
func googleSchemes() []sinks.Scheme {
	return []sinks.Scheme{pubsub.Scheme(), cloudlogging.Scheme()}
}

// quietGoogle silences gRPC, unless somebody asks for its words by gRPC's own variable.
func quietGoogle() {
	if os.Getenv("GRPC_GO_LOG_SEVERITY_LEVEL") == "" {
		grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	}
}
