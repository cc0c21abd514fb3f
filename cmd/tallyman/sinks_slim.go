//go:build slim

package main

import "github.com/tallyman-ci/tallyman/sinks"

func googleSchemes() []sinks.Scheme { return nil }

func quietGoogle() {}
