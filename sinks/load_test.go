package sinks_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/journal"
)

// A load goes through journal and pump to a file, each record once and as it was: the
// line of comparison for the sinks with servers (make bench-sinks).
func TestALoadToAFile(t *testing.T) {
	n := sinktest.Records(t, 5000)
	out := filepath.Join(t.TempDir(), "out.jsonl")
	run := sinktest.Run(t, "file://"+out+"?keep=0", n, nil)
	o := sinktest.NewOracle(n, sinktest.Line)
	r, err := journal.OpenReader(out, journal.Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for {
		line, err := r.Next()
		if err != nil {
			break
		}
		o.Saw(string(line.ID()), sinktest.Sum(line.Data))
	}
	sinktest.Check(t, "file", run, o)
	if st, err := os.Stat(out); err != nil || st.Size() == 0 {
		t.Error(err)
	}
}
