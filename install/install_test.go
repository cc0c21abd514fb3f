package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/wrapper"
)

// In these tests the shim is a script that carries the marker, and behaves as the real
// one: it becomes the tool beside it.
const fakeShim = "#!/bin/sh\n# " + wrapper.Marker + " %s\n[ -e \"$0.original\" ] || exec \"$0\" \"$@\"\nexec \"$0.original\" \"$@\"\n"

const fakeDocker = "#!/bin/sh\necho docker %s\n"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stage is a root with a docker in it, and a folder with binaries to install from.
type stage struct {
	t    testing.TB
	root string
	o    Options
}

func newStage(t testing.TB) *stage {
	t.Helper()
	dir := t.TempDir()
	s := &stage{t: t, root: dir + "/root"}
	s.o = Options{Root: s.root, Path: SearchPath, Binaries: dir + "/bin"}
	uid, gid := 1001, 1001
	if os.Geteuid() != 0 {
		uid, gid = os.Geteuid(), os.Getegid()
	}
	s.file("/etc/passwd", fmt.Sprintf("root:x:0:0::/root:/bin/sh\nrunner:x:%d:%d::/home/runner:/bin/sh\n", uid, gid), 0o644)
	for _, dir := range []string{"/var/lib", "/usr/local/bin", "/usr/bin"} {
		must(t, os.MkdirAll(s.root+dir, 0o755))
	}
	s.binaries("1")
	return s
}

// binaries makes the folder to install from, of a version.
func (s *stage) binaries(version string) {
	s.t.Helper()
	must(s.t, os.MkdirAll(s.o.Binaries, 0o755))
	must(s.t, os.WriteFile(s.o.Binaries+"/docker-shim", fmt.Appendf(nil, fakeShim, version), 0o755))
	must(s.t, os.WriteFile(s.o.Binaries+"/tallyman", []byte("tallyman "+version), 0o755))
}

// file writes a file in the root, in a way that leaves running copies alone.
func (s *stage) file(path, text string, mode fs.FileMode) {
	s.t.Helper()
	must(s.t, os.MkdirAll(filepath.Dir(s.root+path), 0o755))
	_ = os.Remove(s.root + path)
	must(s.t, os.WriteFile(s.root+path, []byte(text), mode))
	must(s.t, os.Chmod(s.root+path, mode))
}

func (s *stage) docker(path, version string) { s.file(path, fmt.Sprintf(fakeDocker, version), 0o755) }

func (s *stage) try(plan func(Options) (*Plan, error)) error {
	p, err := plan(s.o)
	if err != nil {
		return err
	}
	return p.Run(s.t.Context(), func(string) {})
}

func (s *stage) install() {
	s.t.Helper()
	must(s.t, s.try(Install))
	p, err := Install(s.o)
	must(s.t, err)
	for _, step := range p.Steps {
		s.t.Errorf("an installation is not whole after its run: %s", step.Text)
	}
}

func (s *stage) uninstall() {
	s.t.Helper()
	must(s.t, s.try(Uninstall))
	if _, err := Uninstall(s.o); !errors.Is(err, ErrNothing) {
		s.t.Errorf("an uninstall left something: %v", err)
	}
}

// says runs a docker of the root.
func (s *stage) says(path, want string) {
	s.t.Helper()
	out, err := exec.Command(s.root + path).CombinedOutput()
	if got := strings.TrimSpace(string(out)); err != nil || got != want {
		s.t.Errorf("%s says %q (%v), want %q", path, got, err, want)
	}
}

// wrapped: a shim stands at path, and starts this docker.
func (s *stage) wrapped(path, version string) {
	s.t.Helper()
	if !IsShim(s.root + path) {
		s.t.Errorf("%s is not the shim", path)
	}
	s.says(path, "docker "+version)
}

// tree lists the root with all that an uninstall must restore. Folders have other times
// afterwards, and dpkg keeps its own books.
func (s *stage) tree() (lines []string) {
	s.t.Helper()
	must(s.t, filepath.WalkDir(s.root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, s.root)
		if strings.HasPrefix(name, dpkgDir+"/") {
			return nil
		}
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		uid, gid := ids(st)
		line := fmt.Sprintf("%s %v %d:%d", name, st.Mode(), uid, gid)
		if !st.IsDir() {
			link, _ := os.Readlink(path)
			sys := st.Sys().(*syscall.Stat_t)
			line += fmt.Sprintf(" %d bytes %s -> %q, %v, inode %d, %d links, attributes %q", st.Size(), digest(path), link, st.ModTime(), sys.Ino, sys.Nlink, attributes(path))
		}
		lines = append(lines, line)
		return nil
	}))
	if data, err := os.ReadFile(s.root + dpkgDir + "/diversions"); err == nil && len(data) > 0 {
		lines = append(lines, "diversions: "+string(data))
	}
	return lines
}

func attributes(path string) string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n <= 0 {
		return ""
	}
	all := ""
	for name := range strings.SplitSeq(strings.Trim(string(buf[:n]), "\x00"), "\x00") {
		value := make([]byte, 4096)
		n, _ := unix.Lgetxattr(path, name, value)
		all += name + "=" + string(value[:max(n, 0)]) + ";"
	}
	return all
}

func same(t testing.TB, got, want []string) {
	t.Helper()
	for _, line := range got {
		if !slices.Contains(want, line) {
			t.Errorf("new or changed: %s", line)
		}
	}
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("gone or changed: %s", line)
		}
	}
}

func TestInstallAndUninstall(t *testing.T) {
	for _, row := range []struct {
		name  string
		set   func(s *stage)
		tools []string
		shims []string // where shims stand afterwards; all others are left alone
		calls string   // what a call at the first of them, or of calls, says
		at    string
	}{
		{"a docker without a package", func(s *stage) { s.docker("/usr/bin/docker", "1") }, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
		{"two in PATH", func(s *stage) { s.docker("/usr/bin/docker", "1"); s.docker("/usr/local/bin/docker", "2") },
			nil, []string{"/usr/bin/docker", "/usr/local/bin/docker"}, "docker 2", "/usr/local/bin/docker"},
		{"two tools", func(s *stage) { s.docker("/usr/bin/docker", "1"); s.docker("/usr/bin/podman", "2") },
			[]string{"docker", "podman"}, []string{"/usr/bin/docker", "/usr/bin/podman"}, "docker 2", "/usr/bin/podman"},
		{"a path out of the way", func(s *stage) { s.docker("/opt/x/docker", "1") }, []string{"/opt/x/docker"}, []string{"/opt/x/docker"}, "docker 1", "/opt/x/docker"},
		{"a link to a tool", func(s *stage) {
			s.docker("/usr/lib/docker/cli", "1")
			must(s.t, os.Symlink("../lib/docker/cli", s.root+"/usr/bin/docker"))
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
		{"alternatives, absolute inside", func(s *stage) {
			s.docker("/usr/bin/podman", "1")
			must(s.t, os.MkdirAll(s.root+"/etc/alternatives", 0o755))
			must(s.t, os.Symlink("/usr/bin/podman", s.root+"/etc/alternatives/docker"))
			must(s.t, os.Symlink("/etc/alternatives/docker", s.root+"/usr/bin/docker"))
		}, nil, []string{"/usr/bin/docker"}, "", ""},
		{"a merged /usr", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			must(s.t, os.Symlink("usr/bin", s.root+"/bin"))
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/bin/docker"},
		{"a link of another name", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			must(s.t, os.Symlink("docker", s.root+"/usr/bin/d"))
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/d"},
		{"a link to a docker that is taken", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			must(s.t, os.Symlink("/usr/bin/docker", s.root+"/usr/local/bin/docker"))
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
		{"ARC's docker-shim.sh", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			s.file("/usr/local/bin/docker", "#!/usr/bin/env bash\nset -Eeuo pipefail\nDOCKER=/usr/bin/docker\nexec $DOCKER \"$@\"\n", 0o755)
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
		{"hard links, attributes and an odd mode", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			must(s.t, os.Link(s.root+"/usr/bin/docker", s.root+"/usr/bin/hard"))
			must(s.t, os.Chmod(s.root+"/usr/bin/docker", 0o750))
			if err := unix.Lsetxattr(s.root+"/usr/bin/docker", "user.test", []byte("x"), 0); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
				s.t.Fatal(err)
			}
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
		{"drop-in folders of hooks", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			must(s.t, os.MkdirAll(s.root+DropInStarted, 0o755))
			must(s.t, os.MkdirAll(s.root+DropInCompleted, 0o755))
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
		{"a configuration of the user", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			s.file(ConfigFile, "state_dir = /data/tallyman\nrun_dir = /data/run\n", 0o644)
		}, nil, []string{"/usr/bin/docker"}, "docker 1", "/usr/bin/docker"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newStage(t)
			s.o.Tools = row.tools
			row.set(s)
			before := s.tree()
			s.install()
			for _, path := range row.shims {
				if st, err := os.Lstat(s.root + path); err != nil || !st.Mode().IsRegular() || !IsShim(s.root+path) {
					t.Errorf("%s is not the shim", path)
				}
			}
			a, err := Load(s.root)
			must(t, err)
			if len(a.Places) != len(row.shims) {
				t.Errorf("places are %+v, want %v", a.Places, row.shims)
			}
			if row.at != "" {
				s.says(row.at, row.calls)
			}
			s.uninstall()
			same(t, s.tree(), before)
		})
	}
}

// What root made for the runner has the rights that doctor and the shim ask for.
func TestOwnersAndModes(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	s.install()
	uid, gid, err := newTree(s.root).user(User)
	must(t, err)
	for path, want := range map[string]struct {
		mode fs.FileMode
		uid  int
		gid  int
	}{
		StateDir: {fs.ModeDir | 0o755, uid, gid}, RunDirOnDisk: {fs.ModeDir | 0o755, uid, gid}, RunDirOnDisk + "/spool": {fs.ModeDir | fs.ModeSticky | 0o733, uid, gid},
		BinDir: {fs.ModeDir | 0o755, os.Geteuid(), os.Getegid()}, Program: {0o755, os.Geteuid(), os.Getegid()}, HookStarted: {0o755, os.Geteuid(), os.Getegid()},
		ConfigFile: {0o644, os.Geteuid(), os.Getegid()}, Manifest: {0o644, os.Geteuid(), os.Getegid()}, "/usr/bin/docker": {0o755, os.Geteuid(), os.Getegid()},
	} {
		st, err := os.Lstat(s.root + path)
		must(t, err)
		if u, g := ids(st); st.Mode() != want.mode || u != want.uid || g != want.gid {
			t.Errorf("%s: %v of %d:%d, want %v of %d:%d", path, st.Mode(), u, g, want.mode, want.uid, want.gid)
		}
	}
}

// What is in the way is named, and nothing at all has been done.
func TestInTheWay(t *testing.T) {
	for _, row := range []struct {
		name, want string
		set        func(s *stage)
	}{
		{"another tool's docker.original", "is in the way and none of ours", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			s.docker("/usr/bin/docker.original", "0")
		}},
		{"no docker", "there is no docker", func(*stage) {}},
		{"a shim whose real docker is gone", "is gone: put it there", func(s *stage) { s.file("/usr/bin/docker", fmt.Sprintf(fakeShim, "1"), 0o755) }},
		{"two shims", "is a shim too", func(s *stage) {
			s.file("/usr/bin/docker", fmt.Sprintf(fakeShim, "1"), 0o755)
			s.file("/usr/bin/docker.original", fmt.Sprintf(fakeShim, "0"), 0o755)
		}},
		{"a strange file among ours", "is in the way", func(s *stage) { s.docker("/usr/bin/docker", "1"); s.file(Program, "something", 0o644) }},
		{"a configuration that a job could write", "not trusted", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			s.file(ConfigFile, "", 0o666)
		}},
		{"a user that is not there", "there is no user", func(s *stage) { s.docker("/usr/bin/docker", "1"); s.o.User = "nobody-such" }},
		{"no shim to install", "is not Tallyman's shim", func(s *stage) { s.docker("/usr/bin/docker", "1"); s.o.Binaries = s.root }},
		{"an account of a newer version", "newer version", func(s *stage) {
			s.docker("/usr/bin/docker", "1")
			s.file(Manifest, `{"schema": 2}`, 0o644)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newStage(t)
			row.set(s)
			before := s.tree()
			if err := s.try(Install); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%v, want %q", err, row.want)
			}
			same(t, s.tree(), before)
		})
	}
}

func TestUpgradeInPlace(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	before := s.tree()
	s.install()
	s.file(ConfigFile, "runner_labels = mine\n", 0o644)
	old, err := os.Open(s.root + "/usr/bin/docker") // as a call that runs
	must(t, err)
	defer old.Close()
	s.binaries("2")
	s.install()
	s.wrapped("/usr/bin/docker", "1")
	data, err := os.ReadFile(s.root + "/usr/bin/docker")
	if must(t, err); !strings.Contains(string(data), wrapper.Marker+" 2") {
		t.Error("the shim is still of the old version")
	}
	if st, err := old.Stat(); err != nil || st.Size() != int64(len(fmt.Sprintf(fakeShim, "1"))) {
		t.Error("the shim was written to, and not replaced: a call that runs sees half of it")
	}
	if data, _ := os.ReadFile(s.root + ConfigFile); string(data) != "runner_labels = mine\n" {
		t.Errorf("the edited configuration became %q", data)
	}
	// It stays at an uninstall too, as records do, and goes when told to.
	s.file(RunDirOnDisk+"/spool/0.jsonl", "record", 0o600)
	must(t, s.try(Uninstall))
	s.says("/usr/bin/docker", "docker 1")
	for _, path := range []string{ConfigFile, RunDirOnDisk + "/spool/0.jsonl"} {
		if _, err := os.Lstat(s.root + path); err != nil {
			t.Errorf("%v: it was not ours to remove", err)
		}
	}
	must(t, os.RemoveAll(s.root+"/etc/tallyman"))
	must(t, os.RemoveAll(s.root+StateDir))
	s.install()
	s.file(ConfigFile, "runner_labels = mine\n", 0o644)
	s.file(RunDirOnDisk+"/spool/0.jsonl", "record", 0o600)
	s.o.Purge = true
	s.uninstall()
	same(t, s.tree(), before)
}

// Without a diversion, docker's own installer overwrites the shim. The next install
// takes the new docker.
func TestReplacedWithoutDiversion(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	s.install()
	s.docker("/usr/bin/docker", "2")
	s.install()
	s.wrapped("/usr/bin/docker", "2")
	s.docker("/usr/bin/docker", "3")
	before, err := os.ReadFile(s.root + "/usr/bin/docker")
	must(t, err)
	s.uninstall()
	after, err := os.ReadFile(s.root + "/usr/bin/docker")
	if must(t, err); string(before) != string(after) {
		t.Error("an uninstall put an old docker over a new one")
	}
	if _, err := os.Lstat(s.root + "/usr/bin/docker.original"); err == nil {
		t.Error("the old docker was left behind")
	}
}

// A shim that was put in place by hand goes too.
func TestUninstallByHand(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	before := s.tree()
	must(t, os.Rename(s.root+"/usr/bin/docker", s.root+"/usr/bin/docker.original"))
	s.file("/usr/bin/docker", fmt.Sprintf(fakeShim, "1"), 0o755)
	s.uninstall()
	same(t, s.tree(), before)
}

// Without its account an installation is half undone, and says which half.
func TestUninstallWithoutAccount(t *testing.T) {
	for _, row := range []struct{ name, text string }{{"gone", ""}, {"torn", "{"}} {
		t.Run(row.name, func(t *testing.T) {
			s := newStage(t)
			s.docker("/usr/bin/docker", "1")
			s.install()
			if row.text != "" {
				s.file(Manifest, row.text, 0o644)
				if err := s.try(Uninstall); !errors.Is(err, ErrManifest) || !strings.Contains(err.Error(), "mv "+Manifest) {
					t.Errorf("nobody is told what to do: %v", err)
				}
			}
			must(t, os.Remove(s.root+Manifest))
			p, err := Uninstall(s.o)
			must(t, err)
			if len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "rm -r /opt/tallyman "+Link+" /etc/tallyman "+StateDir) {
				t.Errorf("what stays is not told: %q", p.Notes)
			}
			must(t, p.Run(t.Context(), func(string) {}))
			if IsShim(s.root + "/usr/bin/docker") {
				t.Error("the shim is still there")
			}
			s.says("/usr/bin/docker", "docker 1")
		})
	}
}

// Folders above are a job's: what it puts there must not lead root elsewhere.
func TestLinksOfJobs(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	s.install()
	victim := t.TempDir()
	must(t, os.WriteFile(victim+"/file", nil, 0o600))
	must(t, os.RemoveAll(s.root+RunDirOnDisk))
	must(t, os.Symlink(victim, s.root+RunDirOnDisk))
	if os.Geteuid() == 0 {
		must(t, os.Lchown(s.root+RunDirOnDisk, 1001, 1001))
	}
	_ = s.try(Install) // may say what is wrong
	s.o.Purge = true
	_ = s.try(Uninstall)
	if st, err := os.Stat(victim); err != nil || st.Mode().Perm() != 0o755 && st.Mode().Perm() != 0o700 || st.Mode()&fs.ModeSticky != 0 {
		t.Errorf("the folder behind a job's link was changed: %v %v", st.Mode(), err)
	}
	if _, err := os.Stat(victim + "/file"); err != nil {
		t.Error(err)
	}
}

// Nor is a link on the way to a folder followed.
func TestNoLinkOnTheWay(t *testing.T) {
	root, victim := t.TempDir(), t.TempDir()
	must(t, os.MkdirAll(root+"/var/lib", 0o755))
	must(t, os.Symlink(victim, root+"/var/lib/job"))
	if err := newTree(root).makeDir("/var/lib/job/tallyman", os.Geteuid(), os.Getegid(), 0o755); err == nil {
		t.Error("a folder was made behind a link")
	}
	if left, err := os.ReadDir(victim); err != nil || len(left) != 0 {
		t.Errorf("behind the link there is %v, %v", left, err)
	}
	must(t, newTree(root).makeDir("/var/lib/tallyman", os.Geteuid(), os.Getegid(), 0o755))
}

func TestLock(t *testing.T) {
	s := newStage(t)
	unlock, err := Lock(s.root)
	must(t, err)
	if _, err := Lock(s.root); !errors.Is(err, ErrBusy) {
		t.Errorf("a second install at the same time: %v", err)
	}
	unlock()
	unlock, err = Lock(s.root)
	must(t, err)
	unlock()
}

// A mistyped root is an error: above it there is nothing to look for.
func TestNoRoot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "image.tar")
	must(t, os.WriteFile(file, nil, 0o600))
	for _, root := range []string{filepath.Join(t.TempDir(), "mistyped"), file} {
		if _, err := Lock(root); err == nil || !strings.Contains(err.Error(), "--root") {
			t.Errorf("%s: %v", root, err)
		}
	}
}

// Whoever may read a folder may lock it: a job must not keep an upgrade away by that.
func TestLockOfAJob(t *testing.T) {
	s := newStage(t)
	must(t, os.Mkdir(s.root+"/root", 0o700))
	readable, err := os.Open(s.root + "/var/lib")
	must(t, err)
	defer readable.Close()
	must(t, unix.Flock(int(readable.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	unlock, err := Lock(s.root)
	must(t, err)
	if _, err := Lock(s.root); !errors.Is(err, ErrBusy) {
		t.Errorf("a second install at the same time: %v", err)
	}
	unlock()
	before := s.tree()
	unlock, err = Lock(s.root)
	must(t, err)
	unlock()
	same(t, s.tree(), before)
}

// FuzzManifest: whatever is read is a form that install itself would have written, and
// never names a path that another reading could take elsewhere.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schema":1,"user":"runner","places":[{"path":"/usr/bin/docker","real":"/usr/bin/docker.original","diverted":true}],"files":[{"path":"/opt/x","sha256":["a"]},{"path":"/usr/local/bin/tallyman","link":"/opt/x"}],"dirs":["/opt"],"data":["/opt"]}`))
	f.Add([]byte(`{"schema":1,"dirs":["/../etc"]}`))
	f.Add([]byte(`{"schema":1,"places":[{"path":"docker","real":"docker.original"}]}`))
	f.Add([]byte(`{"schema":99}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := parseManifest(data)
		if err != nil {
			if !errors.Is(err, ErrManifest) {
				t.Errorf("an error of another kind: %v", err)
			}
			return
		}
		var paths []string
		for _, p := range a.Places {
			paths = append(paths, p.Path, p.Real)
		}
		for _, f := range a.Files {
			paths = append(paths, f.Path)
		}
		for _, p := range slices.Concat(paths, a.Dirs, a.Data) {
			if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
				t.Errorf("the path %q was taken", p)
			}
		}
		again, err := a.encode()
		must(t, err)
		if b, err := parseManifest(again); err != nil || fmt.Sprint(b) != fmt.Sprint(a) {
			t.Errorf("written again it reads as %v, %v", b, err)
		}
	})
}

// A tool that is a script stands under both names for a moment of an uninstall: its
// interpreter may have been started and not have opened it yet.
func TestUninstallOfAScript(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	before := s.tree()
	s.install()
	p, err := Uninstall(s.o)
	must(t, err)
	back := slices.IndexFunc(p.Steps, func(step Step) bool { return strings.HasPrefix(step.Text, "put the real docker back") })
	if back < 0 {
		t.Fatalf("%+v", p.Steps)
	}
	must(t, p.Steps[back].do())
	s.says("/usr/bin/docker", "docker 1")
	s.says("/usr/bin/docker.original", "docker 1")
	s.uninstall()
	same(t, s.tree(), before)

	// A binary has no such moment, and is renamed.
	data, err := os.ReadFile("/bin/true")
	must(t, err)
	must(t, os.WriteFile(s.root+"/usr/bin/docker", data, 0o755))
	s.install()
	p, err = Uninstall(s.o)
	must(t, err)
	must(t, p.Steps[slices.IndexFunc(p.Steps, func(step Step) bool { return strings.HasPrefix(step.Text, "put the real docker back") })].do())
	if _, err := os.Lstat(s.root + "/usr/bin/docker.original"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("docker.original: %v", err)
	}
}

// A tool that a job started with too many rights moves docker away and puts a script of
// its own there. That script is not the real docker: neither an install nor an uninstall
// takes it for that.
func TestMovedAway(t *testing.T) {
	for _, packaged := range []bool{false, true} {
		s := newStage(t)
		s.docker("/usr/bin/docker", "1")
		s.docker("/usr/bin/docker-compose", "other")
		s.install()
		if packaged { // as a diversion of dpkg makes it
			s.file(dpkgDir+"/diversions", "/usr/bin/docker\n/usr/bin/docker.original\n:\n", 0o644)
		}
		must(t, os.Rename(s.root+"/usr/bin/docker", s.root+"/usr/bin/docker.orig"))
		s.file("/usr/bin/docker", "#!/bin/sh\nexec /usr/bin/docker.orig \"$@\"\n", 0o755)
		before := s.tree()
		for name, plan := range map[string]func(Options) (*Plan, error){"install": Install, "uninstall": Uninstall} {
			if err := s.try(plan); err == nil || !strings.Contains(err.Error(), "mv /usr/bin/docker.orig /usr/bin/docker") {
				t.Errorf("%s: %v", name, err)
			}
			same(t, s.tree(), before)
		}
		if _, found, err := Verify(s.root, nil); err != nil || len(found) != 1 || !strings.Contains(found[0].Finding, "was moved to /usr/bin/docker.orig") {
			t.Errorf("%+v, %v", found, err)
		}
		must(t, os.Rename(s.root+"/usr/bin/docker.orig", s.root+"/usr/bin/docker"))
		must(t, os.RemoveAll(s.root+dpkgDir))
		s.install()
		s.wrapped("/usr/bin/docker", "1")
		s.uninstall()
		s.says("/usr/bin/docker", "docker 1")
	}
}

// A docker that is mounted into a container cannot be renamed over. It says so, docker
// goes on, and an uninstall takes back what was done.
func TestMountedTool(t *testing.T) {
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	before := s.tree()
	p, err := Install(s.o)
	must(t, err)
	last := len(p.Steps) - 1
	if !strings.Contains(p.Steps[last].Text, "put the shim at /usr/bin/docker") {
		t.Fatalf("the last step is %s", p.Steps[last].Text)
	}
	// What rename(2) gives there, without the rights that a mount needs.
	p.Steps[last].do = func() error { return &os.LinkError{Op: "rename", Old: "a", New: "b", Err: unix.EBUSY} }
	err = p.Run(t.Context(), func(string) {})
	if err == nil || !strings.Contains(err.Error(), "mounted") || !strings.Contains(err.Error(), "real.TOOL") {
		t.Errorf("%v", err)
	}
	s.says("/usr/bin/docker", "docker 1")
	s.uninstall()
	same(t, s.tree(), before)
}

// What Verify finds is what Install repairs, or what it says to do.
func TestVerify(t *testing.T) {
	for _, c := range []struct {
		name    string
		damage  func(s *stage)
		path    string // the one problem's, "" for none
		serious bool
		repairs bool // another install does
	}{
		{"nothing", func(s *stage) {}, "", false, true},
		{"the configuration was edited", func(s *stage) { s.file(ConfigFile, "canary = 5\n", 0o644) }, "", false, true},
		{"the tool was replaced", func(s *stage) { s.docker("/usr/bin/docker", "2") }, "/usr/bin/docker", true, true},
		{"the shim was removed", func(s *stage) { must(s.t, os.Remove(s.root+"/usr/bin/docker")) }, "/usr/bin/docker", true, true},
		{"the real tool was removed", func(s *stage) { must(s.t, os.Remove(s.root+"/usr/bin/docker.original")) }, "/usr/bin/docker", true, false},
		{"the real tool is a shim", func(s *stage) { s.file("/usr/bin/docker.original", fmt.Sprintf(fakeShim, "1"), 0o755) }, "/usr/bin/docker", true, false},
		{"the whole tool was removed", func(s *stage) {
			must(s.t, errors.Join(os.Remove(s.root+"/usr/bin/docker"), os.Remove(s.root+"/usr/bin/docker.original")))
		}, "", false, false},
		{"a package brought a newer shim", func(s *stage) {
			s.uninstall()
			s.o.FromPackage = true
			s.file(Shim, fmt.Sprintf(fakeShim, "1"), 0o755)
			s.install()
			s.file(Shim, fmt.Sprintf(fakeShim, "2"), 0o755)
		}, "/usr/bin/docker", false, true},
		{"a package took the tool over", func(s *stage) {
			s.file(dpkgDir+"/info/docker-ce-cli.list", "/.\n/bin/docker\n", 0o644)
		}, "/usr/bin/docker", false, false},
		{"a hook script is gone", func(s *stage) { must(s.t, os.Remove(s.root+HookStarted)) }, HookStarted, true, true},
		{"a hook script was changed", func(s *stage) { s.file(HookCompleted, "#!/bin/sh\nexit 0\n", 0o755) }, HookCompleted, false, true},
		{"the command's link is gone", func(s *stage) { must(s.t, os.Remove(s.root+Link)) }, Link, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newStage(t)
			s.docker("/usr/bin/docker", "1")
			s.install()
			c.damage(s)
			_, found, err := Verify(s.root, nil)
			must(t, err)
			switch {
			case c.path == "" && len(found) == 0:
			case len(found) != 1 || found[0].Path != c.path || found[0].Serious != c.serious || found[0].Finding == "" || found[0].Do == "":
				t.Fatalf("found %+v, want one of %q, serious: %v", found, c.path, c.serious)
			}
			if !c.repairs {
				return
			}
			s.install()
			if _, found, err := Verify(s.root, nil); err != nil || len(found) > 0 {
				t.Errorf("after another install: %+v, %v", found, err)
			}
		})
	}
	if _, _, err := Verify(t.TempDir(), nil); !errors.Is(err, ErrNoManifest) {
		t.Errorf("where nothing was installed: %v", err)
	}
	s := newStage(t)
	s.docker("/usr/bin/docker", "1")
	s.install()
	must(t, os.Remove(s.root+"/usr/bin/docker.original"))
	s.docker("/opt/docker/docker", "1")
	if _, found, err := Verify(s.root, map[string]string{"docker": "/opt/docker/docker"}); err != nil || len(found) > 0 {
		t.Errorf("the configuration names the real tool, and yet: %+v, %v", found, err)
	}
}
