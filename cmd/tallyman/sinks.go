package main

import (
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/fluent"
)

// schemes are the kinds of sinks beside those that package sinks has built in.
func schemes() []sinks.Scheme {
	return append([]sinks.Scheme{fluent.Scheme()}, googleSchemes()...)
}
