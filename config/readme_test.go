package config

import (
	"os"
	"strings"
	"testing"
)

// TestREADMEHasTheTable: the README's configuration table is what Keys says.
func TestREADMEHasTheTable(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	want.WriteString("| key | default | meaning |\n| --- | --- | --- |\n")
	d := Default()
	for _, k := range Keys() {
		name, value := k.Name, k.Value(&d)
		if name == "real." {
			name = "real.<tool>"
		}
		if value != "" {
			value = "`" + value + "`"
		}
		want.WriteString("| `" + name + "` | " + value + " | " + k.Doc + " |\n")
	}
	if !strings.Contains(string(readme), want.String()) {
		t.Errorf("README.md does not have this table:\n%s", want.String())
	}
}
