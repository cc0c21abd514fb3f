package handover

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMountTypes(t *testing.T) {
	paths := []string{"/run/tallyman", "/run/tallyman/spool"}
	for _, test := range []struct {
		name   string
		mounts string
		want   [2]bool
	}{
		{"a machine", "sysfs /sys sysfs rw 0 0\n/dev/vda / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n", [2]bool{false, false}},
		{"FUSE at run_dir", "tmpfs /run tmpfs rw 0 0\nx /run/tallyman fuse rw 0 0\n", [2]bool{true, true}},
		{"FUSE above", "x /run fuse.sshfs rw 0 0\n", [2]bool{true, true}},
		{"NFS at the spool alone", "s:/x /run/tallyman/spool nfs4 rw 0 0\n", [2]bool{false, true}},
		{"a tmpfs on FUSE", "x /run fuse rw 0 0\ntmpfs /run/tallyman tmpfs rw 0 0\n", [2]bool{false, false}},
		{"the later one at one place is on top", "tmpfs /run tmpfs rw 0 0\nx /run fuse rw 0 0\n", [2]bool{true, true}},
		{"and the other way round", "x /run fuse rw 0 0\ntmpfs /run tmpfs rw 0 0\n", [2]bool{false, false}},
		{"a longer one that came before", "x /run/tallyman fuse rw 0 0\ntmpfs /run tmpfs rw 0 0\n", [2]bool{true, true}},
		{"the root, without which nothing runs", "root / virtiofs rw 0 0\n", [2]bool{false, false}},
		{"a name that only begins the same", "x /run/tally fuse rw 0 0\nx /run/tallyman2 fuse rw 0 0\n", [2]bool{false, false}},
		{"a type that only begins the same", "x /run fusectl rw 0 0\n", [2]bool{false, false}},
		{"noise", "\n\n x\nx /run\n\\ \\ \\ \n/run/tallyman fuse", [2]bool{false, false}},
		{"more than is read at once", strings.Repeat("overlay /var/lib/docker/overlay2/0123456789abcdef/merged overlay rw 0 0\n", 700) + "x /run fuse rw 0 0\n", [2]bool{true, true}},
		{"a line longer than what is read at once", "overlay /x overlay lowerdir=" + strings.Repeat("/a:", 10000) + " 0 0\nx /run fuse rw 0 0\n", [2]bool{true, true}},
		{"more than is looked at", strings.Repeat("x", maxMounts) + "\nx /run fuse rw 0 0\n", [2]bool{false, false}},
	} {
		t.Run(test.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "mounts")
			if err := os.WriteFile(file, []byte(test.mounts), 0o600); err != nil {
				t.Fatal(err)
			}
			got := make([]bool, 2)
			mountTypes(file, paths, got)
			if !slices.Equal(got, test.want[:]) {
				t.Errorf("%v may hang: %v, want %v", paths, got, test.want)
			}
		})
	}
	t.Run("a name with a space", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "mounts")
		os.WriteFile(file, []byte(`x /a\040b\011c\134 fuse rw 0 0`+"\n"), 0o600)
		got := make([]bool, 1)
		if mountTypes(file, []string{"/a b\tc\\/d"}, got); !got[0] {
			t.Error("not found")
		}
	})
	t.Run("no list", func(t *testing.T) {
		got := make([]bool, 2)
		if mountTypes("/nonexistent", paths, got); got[0] || got[1] {
			t.Error(got)
		}
	})
}

// TestCauses: shims and agents of different versions agree on letters and places.
func TestCauses(t *testing.T) {
	letters := ""
	for _, c := range Causes {
		letters += string(c.Letter)
		if c.Letter == '\n' || c.Text == "" || strings.Count(letters, string(c.Letter)) != 1 {
			t.Errorf("%q", c.Letter)
		}
	}
	if want := "xnarsfdlbhp"; !strings.HasPrefix(letters, want) {
		t.Errorf("the letters are %q, want %q first: their places are the kernel's counters", letters, want)
	}
	keys := map[int32]string{}
	for _, spool := range []string{"/run/tallyman/spool", "/var/lib/tallyman/run/spool"} {
		for uid := range 2000 {
			k := LossKey(spool, uid)
			if k <= 0 || keys[k] != "" {
				t.Errorf("key %d of %s for uid %d is also that of %s", k, spool, uid, keys[k])
			}
			keys[k] = fmt.Sprint(spool, uid)
		}
	}
}
