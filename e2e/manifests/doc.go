// Package manifests checks the files that other programs read: manifests for
// Kubernetes, values for the runners' Helm chart, and goreleaser's configuration, each by
// the types of the program that reads it, with unknown fields refused.
//
// It is a module of its own: these types are no dependency of Tallyman.
package manifests
