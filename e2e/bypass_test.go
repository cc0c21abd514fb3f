package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

// A job passes the shim by: with a docker of its own first in PATH, and by the daemon's
// socket. The shim sees none of it; the daemon's events are in the account under the job
// that ran then, and the report counts those that no recorded call explains.
func TestBypass(t *testing.T) {
	faults.Case(t, "SH-54")
	r := newRig(t)
	own := filepath.Join(r.inst.Dir, "own")
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(r.daemon.CLI(), filepath.Join(own, "docker")); err != nil {
		t.Fatal(err)
	}
	j := r.job(shopBuild)
	r.step(j, "honest", 0, "docker pull -q "+image)
	r.step(j, "own-docker", 0, "PATH="+own+":$PATH; docker volume create own-docker")
	r.step(j, "socket", 0, "true")
	r.storm(2) // creates and removes the volume storm-0 by HTTP
	eventually(t, 30*time.Second, func() error {
		if !volumes(r.records())["storm-0"] {
			return errors.New("the events are not in the account")
		}
		return nil
	})
	r.complete(j)

	records := r.records()
	for _, call := range ofKind(records, record.KindInvocation) {
		if call.Invocation.Command != "pull" {
			t.Errorf("a call past the shim is recorded as %q", call.Invocation.Command)
		}
	}
	past := 0
	for _, e := range ofKind(records, record.KindEvent) {
		if e.Event.Type != "volume" {
			continue
		}
		past++
		if e.By != record.ByInferred || e.CI == nil || e.CI.Repository != "acme/shop" {
			t.Errorf("%s of volume %s: by %s, %+v; want it inferred to the only job", e.Event.Action, e.Event.Name, e.By, e.CI)
		}
	}
	if past != 3 {
		t.Errorf("%d events of volumes, want 3", past)
	}
	eventually(t, 30*time.Second, func() error {
		if c := r.report().Coverage.Events; c.Unattributed != int64(past) || c.Explained == 0 {
			return fmt.Errorf("%d events are unattributed and %d explained, want %d and some", c.Unattributed, c.Explained, past)
		}
		return nil
	})
}
