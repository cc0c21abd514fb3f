// Package arc holds the values and manifests for Kubernetes. Their YAML is checked in
// e2e/manifests, against the types of Kubernetes.
package arc

import (
	"os"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/install"
)

// TestConfiguration: each line of the ConfigMap's configuration is one that Tallyman
// reads, and the run folder is the one that images and the carrier make.
func TestConfiguration(t *testing.T) {
	data, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(data), "  tallyman.conf: |\n")
	if !ok {
		t.Fatal("there is no tallyman.conf in config.yaml")
	}
	var text strings.Builder
	for line := range strings.Lines(block) {
		// What is a comment for some can be put in force by others.
		text.WriteString(strings.Replace(strings.TrimPrefix(line, "    "), "# real.docker", "real.docker", 1))
	}
	cfg := config.Default()
	problems := config.Parse(&cfg, text.String())
	if len(problems) > 0 {
		t.Errorf("%+v", problems)
	}
	if cfg.RunDir != install.RunDirOnDisk || !cfg.SpoolOnDisk || cfg.StateDir != install.StateDir || cfg.Real["docker"] == "" || len(cfg.Sinks) != 1 {
		t.Errorf("%+v", cfg)
	}
}
