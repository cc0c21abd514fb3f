// Command docker-shim stands in the place of docker (or of another tool): see
// package wrapper. Build it with internal/leanbuild (`make build`), which halves
// what it adds to each command; a plain `go build` works too.
package main

import (
	"runtime"
	"syscall"

	"github.com/tallyman-ci/tallyman/wrapper"
)

// lean is set by leanbuild: this program will never have a second thread.
var lean string

// A parent-death signal (PR_SET_PDEATHSIG) survives execve only when it comes from
// the main thread. The lean runtime has no other; locking would start one.
func init() {
	if lean == "" {
		runtime.LockOSThread()
	}
}

func main() {
	syscall.Exit(wrapper.Main(wrapper.Arguments(), wrapper.Environment()))
}
