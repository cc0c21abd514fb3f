package sim_test

import (
	"bytes"
	"math"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/blame/sim"
)

// The same seed plays the same fleet, and another one another.
func TestSeedsDecide(t *testing.T) {
	play := func(seed uint64) string {
		var out bytes.Buffer
		f := sim.Run(sim.Config{Seed: seed, Hours: 1, Jobs: 20, Workflows: 10, Missing: 0.2, Skew: time.Second})
		if err := f.WriteRecords(&out); err != nil {
			t.Fatal(err)
		}
		if err := f.WriteCSV(&out, time.UTC); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	first := play(1)
	if again := play(1); again != first {
		t.Error("the same seed gave two fleets")
	}
	if play(2) == first {
		t.Error("two seeds gave the same fleet")
	}
}

// What the truth says is what the log and the journals hold.
func TestTruthIsTrue(t *testing.T) {
	c := sim.Config{Seed: 5, Hours: 6, Jobs: 200, Workflows: 50, Missing: 0.4, Addresses: 3}
	f := sim.Run(c)
	made := make([]int64, len(f.Builds))
	others := 0
	for i, q := range f.Requests {
		if i > 0 && q.Time.Before(f.Requests[i-1].Time) {
			t.Fatal("requests are not in the order of time")
		}
		if q.Build < 0 {
			others++
			continue
		}
		made[q.Build]++
		b := &f.Builds[q.Build]
		if !f.Workflows[b.Workflow].Guilty() {
			t.Fatal("an innocent build has requests")
		}
		if q.Addr != f.Egress(b.Host) {
			t.Fatal("a request left by another address than its host's")
		}
		if d := q.Time.Sub(b.Start); d < -time.Second || d > b.Duration+time.Second {
			t.Fatalf("a request %s after its build's start, which ran %s", d, b.Duration)
		}
	}
	recorded := 0.0
	for i, b := range f.Builds {
		if made[i] != b.Requests {
			t.Fatalf("build %d made %d requests, and %d are in the log", i, b.Requests, made[i])
		}
		if b.Recorded {
			recorded++
		}
	}
	if share := recorded / float64(len(f.Builds)); math.Abs(share-0.6) > 0.06 {
		t.Errorf("%.2f of the builds are recorded, want 0.6", share)
	}
	if atOnce := float64(len(f.Builds)) * 10 / (c.Hours * 60); atOnce < 0.8*float64(c.Jobs) || atOnce > 1.25*float64(c.Jobs) {
		t.Errorf("%.0f jobs at once, want %d", atOnce, c.Jobs)
	}
	if share := float64(others) / float64(len(f.Requests)); math.Abs(share-0.5) > 0.02 {
		t.Errorf("%.2f of the requests are background, want half", share)
	}
}
