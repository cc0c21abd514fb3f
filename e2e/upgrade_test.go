package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/record"
)

// TestUpgradeDuringAJob replaces the programs while a job runs, one after the other as a
// package manager does, from an old version to this one and back. The agent goes on in the
// version that the job began with; shim and hooks are of the other one then.
//
// TALLYMAN_E2E_OLD is a folder with the programs of another version, see make skew.
// Without it they are this version's, and what is tested is the exchange itself.
func TestUpgradeDuringAJob(t *testing.T) {
	old := os.Getenv("TALLYMAN_E2E_OLD")
	if old == "" {
		old = built
		t.Log("TALLYMAN_E2E_OLD is not set: both versions are this one (make skew OLD=REVISION tests another)")
	}
	for _, row := range []struct {
		name, first, second string
		parts               []string
	}{
		{"upgrade, the shim first", old, built, []string{"docker-shim", "tallyman"}},
		{"upgrade, the program first", old, built, []string{"tallyman", "docker-shim"}},
		{"downgrade, the shim first", built, old, []string{"docker-shim", "tallyman"}},
		{"downgrade, the program first", built, old, []string{"tallyman", "docker-shim"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			ownCounters(t)
			r := newStubRig(t)
			r.put(row.first, "docker-shim")
			r.put(row.first, "tallyman")

			build := r.job(shopBuild)
			r.step(build, "before", 0, "docker pull code-0")
			agent := r.agentPID()
			r.put(row.second, row.parts[0])
			r.step(build, "between", 3, "docker run code-3")
			r.put(row.second, row.parts[1])
			r.step(build, "after", 4, "docker push code-4")
			if now := r.agentPID(); now != agent {
				t.Errorf("the job's agent was %d and is %d", agent, now)
			}
			if summary := r.complete(build); !strings.Contains(summary, "docker") {
				t.Errorf("the job's summary: %q", summary)
			}

			scan := r.job(billingScan)
			r.step(scan, "next", 0, "docker version code-0")
			r.complete(scan)

			want := []call{
				{command: "pull", repository: "acme/shop", job: "build", step: "before", by: record.BySealed},
				{command: "run", repository: "acme/shop", job: "build", step: "between", by: record.BySealed, exit: 3},
				{command: "push", repository: "acme/shop", job: "build", step: "after", by: record.BySealed, exit: 4},
				{command: "version", repository: "acme/billing", job: "scan", step: "next", by: record.BySealed},
			}
			records := r.records()
			got := calls(records)
			if len(got) != len(want) {
				t.Fatalf("%d calls in the account, want %d:\n%v", len(got), len(want), lines(got))
			}
			for i := range want {
				got[i].path = ""
				if !exitCodesKnown(t) {
					got[i].exit = want[i].exit
				}
				if got[i] != want[i] {
					t.Errorf("call %d:\n got %v\nwant %v", i+1, got[i], want[i])
				}
			}
			if lost := losses(records); len(lost) > 0 {
				t.Errorf("losses: %v", lost)
			}
			if out, err := r.tallyman("report"); err != nil || !strings.Contains(out, "acme/billing") {
				t.Errorf("the report of what both wrote: %v: %s", err, out)
			}
		})
	}
}

// put brings a program of another version to its place, in one step.
func (r *rig) put(from, name string) {
	r.t.Helper()
	to := r.inst.Tallyman()
	if name == "docker-shim" {
		to = r.inst.Shim()
	}
	data, err := os.ReadFile(filepath.Join(from, name))
	if err != nil {
		r.t.Fatal(err)
	}
	temp := filepath.Join(filepath.Dir(to), ".new-"+name)
	if err := os.WriteFile(temp, data, 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(temp, to); err != nil {
		r.t.Fatal(err)
	}
}
