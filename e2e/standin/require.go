package standin

import (
	"errors"
	"fmt"
	"os"
	"testing"
)

// Require makes a root in a folder of the test's. Where the machine cannot, the test
// fails if CI=true is set, and is skipped otherwise with a line on standard error.
func Require(t testing.TB) (root string) {
	t.Helper()
	root = t.TempDir()
	err := Root(root)
	if errors.Is(err, ErrUnavailable) && os.Getenv("CI") != "true" {
		fmt.Fprintf(os.Stderr, "\n*** %s SKIPPED: %v ***\n\n", t.Name(), err)
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	return root
}
