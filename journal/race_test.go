//go:build race

package journal

// underRace says that this is a build with the race detector, in which a process
// needs long to start.
const underRace = true
