package page

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files again")

// The sample page is the same bytes each time, and those of the golden file. Write it
// again with go test ./desk/page -update, and look at it.
func TestGolden(t *testing.T) {
	name := filepath.Join("testdata", "sample.html")
	var first, second bytes.Buffer
	for _, b := range []*bytes.Buffer{&first, &second} {
		if err := Render(b, sample()); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("one page gave two texts")
	}
	if *update {
		if err := os.WriteFile(name, first.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), want) {
		t.Error("the page differs from testdata/sample.html: see go test ./desk/page -update and git diff")
	}
}
