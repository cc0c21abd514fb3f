package standin

import (
	"errors"
	"os"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/require"
)

// Require makes a root in a folder of the test's. Where the machine cannot, the test
// fails if CI=true is set, and is skipped otherwise with a line on standard error.
func Require(t testing.TB) (root string) {
	t.Helper()
	root = t.TempDir()
	err := Root(root)
	if errors.Is(err, ErrUnavailable) {
		require.Missing(t, "a root to install in: "+err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	return root
}
