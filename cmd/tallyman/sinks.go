package main

import (
	"os"

	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/fluent"
)

// schemes are the kinds of sinks beside those that package sinks has built in.
func schemes() []sinks.Scheme {
	return append([]sinks.Scheme{fluent.Scheme()}, googleSchemes()...)
}

// quietLibraries sends to nowhere what the sinks' libraries print: fluent-logger-golang
// writes of each acknowledgement that does not come, without a newline, between our
// lines. What happened is in the error that it returns. Our own lines go to
// program.stderr, and a panic to descriptor 2.
func quietLibraries() {
	if null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0); err == nil {
		os.Stderr = null
	}
	quietGoogle()
}
