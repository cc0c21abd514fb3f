// Package require says what a test needs of its machine. Where that is missing the
// test is red in continuous integration (CI=true), and elsewhere it is skipped with a
// line on standard error, which go test shows without -v.
package require

import (
	"fmt"
	"os"
	"testing"
)

// Root ends the test where it does not run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root: run it with sudo")
	}
}

// Missing ends a test that cannot run here. What is needed reads behind "needs", and
// says how to get it.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal("needs " + what)
	}
	fmt.Fprintf(os.Stderr, "\n*** %s SKIPPED: needs %s ***\n\n", t.Name(), what)
	t.Skip("needs " + what)
}
