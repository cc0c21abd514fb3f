// Package image tests runner-image: its Dockerfiles are built on a real daemon, from a
// stand-in for the official runner image, and what they make is used as a runner pod
// uses it. Nothing is taken from a network.
package image
