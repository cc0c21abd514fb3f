package agent

import (
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/metrics"
	"github.com/tallyman-ci/tallyman/record"
)

// BenchmarkTake is the agent's part of what a docker command waits for, without the
// socket: decode, stamp, journal.
func BenchmarkTake(b *testing.B) {
	o := options(b)
	a := New(o)
	a.contexts.store = o.Store
	a.intake = newIntake(a)
	j, err := journal.Open(o.Config.Journal(), journal.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer j.Close()
	a.journal = j
	a.metrics, _ = metrics.New(metrics.Options{Addr: "off"})
	r := invocation(time.Now())
	r.CI = &record.CI{Repository: "octo/shop", Workflow: "CI", Job: "build", RunID: "42", RunAttempt: 1, TrackingID: "github_x", SHA: "0123456789012345678901234567890123456789", Ref: "refs/heads/main", Step: "__run_2"}
	b.Run("decode", func(b *testing.B) {
		line := record.Append(nil, r)
		b.ReportAllocs()
		for b.Loop() {
			var x record.Record
			if err := a.decodeInvocation(line, &x); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("stamp", func(b *testing.B) {
		for b.Loop() {
			x := *r
			a.stamp(&x, witness{latest: time.Now()})
		}
	})
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			x := *r
			x.ID = record.NewID(time.Now())
			if err := a.intake.take([]arrival{{r: &x}}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
