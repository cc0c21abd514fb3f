package manifests

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclwrite"
)

// TestTerraform: what tallyman bq terraform prints is read by Terraform's own parser, and
// terraform fmt has nothing to change.
func TestTerraform(t *testing.T) {
	files, err := filepath.Glob("../../bq/testdata/*.tf")
	if err != nil || len(files) < 2 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		parsed, diagnostics := hclwrite.ParseConfig(data, file, hcl.InitialPos)
		if diagnostics.HasErrors() {
			t.Error(diagnostics)
			continue
		}
		if n := len(parsed.Body().Blocks()); n < 10 {
			t.Errorf("%s has %d blocks only", file, n)
		}
		if !bytes.Equal(hclwrite.Format(data), data) {
			t.Errorf("%s: terraform fmt would change it", file)
		}
	}
}
