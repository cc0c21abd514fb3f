// Package install puts the shim in a tool's place and takes it away again.
package install
