package procfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRead(t *testing.T) {
	self, err := Read(os.Getpid())
	if err != nil || self.Parent != os.Getppid() || self.Start == 0 || self.State == 0 || self.Name == "" {
		t.Errorf("%+v, %v", self, err)
	}
	if s, err := Read(1 << 30); err == nil {
		t.Errorf("a process that cannot be: %+v", s)
	}
	rest := strings.Repeat(" 0", 16) + " 4711 0"
	for _, row := range []struct {
		text string
		want Stat
	}{
		{"7 (bash) S 6 7" + strings.Repeat(" 0", 16) + " 4711 0\n", Stat{"bash", 'S', 6, 4711}},
		{"7 (a) b (c) Z 6 7" + rest, Stat{"a) b (c", 'Z', 6, 4711}},
		{"7 () R 0 7" + rest, Stat{"", 'R', 0, 4711}},
		{"", Stat{}},
		{"7 bash S 6", Stat{}},
		{")(", Stat{}},
		{"7 (bash) S 6 7", Stat{}},
		{"7 (bash) S x 7" + rest, Stat{}},
		{"7 (bash) S 6 7" + strings.Repeat(" 0", 16) + " -1 0", Stat{}},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "stat"), []byte(row.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadIn(dir)
		if got != row.want || (err == nil) != (row.want != Stat{}) {
			t.Errorf("%q: %+v, %v", row.text, got, err)
		}
	}
}
