package journal

import (
	"errors"
	"io/fs"
	"os"
	"testing"
)

// Whoever opens a journal while another process removes it must come to an end.
func TestTheLockOfARemovedJournal(t *testing.T) {
	dir := t.TempDir() + "/journal"
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	d, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.f.Close()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := d.lock(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("lock in a removed folder: %v", err)
	}
}
