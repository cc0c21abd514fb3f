package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCuts: what is cut out to measure a sink is in the source, once.
func TestCuts(t *testing.T) {
	cuts := 0
	for _, v := range variants {
		for _, c := range v.cuts {
			cuts++
			source, err := os.ReadFile(filepath.Join("../..", c.file))
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(source), c.text); n != 1 {
				t.Errorf("%s: %s has %q %d times instead of once", v.what, c.file, c.text, n)
			}
		}
	}
	if cuts < 6 {
		t.Errorf("%d cuts", cuts)
	}
}
