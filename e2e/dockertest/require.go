package dockertest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/require"
)

// Require starts a private daemon for the test and stops it at the test's end.
//
// Where the machine cannot run one, the test fails if CI=true is set, because a
// green run that tested nothing is worse than a red one. Otherwise the test is
// skipped, with a line on standard error that says what to do.
func Require(t testing.TB) *Daemon {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	d, err := Start(ctx)
	switch {
	case err == nil:
	case errors.Is(err, ErrUnavailable):
		require.Missing(t, "a Docker daemon: "+err.Error())
	default:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the daemon's log:\n%s", d.tail())
		}
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	})
	return d
}
