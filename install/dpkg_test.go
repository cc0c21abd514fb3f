package install

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/internal/require"
)

// dpkgRoot makes the root of a stage one that the real dpkg manages.
func dpkgRoot(t testing.TB, s *stage) {
	t.Helper()
	for _, tool := range []string{"dpkg", "dpkg-deb", "dpkg-divert"} {
		if _, err := exec.LookPath(tool); err != nil {
			require.Missing(t, fmt.Sprintf("dpkg (%v): a Debian or Ubuntu, or apt-get install dpkg", err))
		}
	}
	for _, dir := range []string{"info", "updates", "triggers"} {
		must(t, os.MkdirAll(s.root+dpkgDir+"/"+dir, 0o755))
	}
	for _, file := range []string{"status", "available", "diversions"} {
		must(t, os.WriteFile(s.root+dpkgDir+"/"+file, nil, 0o644))
	}
}

// deb makes a package with a docker of a version.
func deb(t testing.TB, version string) string {
	t.Helper()
	return debOf(t, version, fmt.Appendf(nil, fakeDocker, version))
}

func debOf(t testing.TB, version string, docker []byte) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/DEBIAN", 0o755))
	must(t, os.MkdirAll(dir+"/usr/bin", 0o755))
	must(t, os.WriteFile(dir+"/DEBIAN/control", []byte("Package: testdocker\nVersion: "+version+"\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: x\n"), 0o644))
	must(t, os.WriteFile(dir+"/usr/bin/docker", docker, 0o755))
	file := dir + ".deb"
	output(t, "dpkg-deb", "-Znone", "--root-owner-group", "--build", dir, file)
	return file
}

func (s *stage) dpkg(args ...string) {
	s.t.Helper()
	options := []string{"--root=" + s.root, "--log=/dev/null", "--force-not-root", "--force-script-chrootless", "--force-bad-path", "--force-unsafe-io"}
	output(s.t, "dpkg", append(options, args...)...)
}

func output(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// The real dpkg upgrades and removes docker's package under the shim.
func TestPackage(t *testing.T) {
	s := newStage(t)
	dpkgRoot(t, s)
	one, two := deb(t, "1"), deb(t, "2")
	s.dpkg("-i", one)
	before := s.tree()
	s.install()
	s.wrapped("/usr/bin/docker", "1")
	s.uninstall()
	same(t, s.tree(), before)

	s.install()
	s.dpkg("-i", two)
	s.wrapped("/usr/bin/docker", "2")
	s.install() // nothing to do, and nothing done
	if d, ok := DiversionOf(s.root+dpkgDir, "/usr/bin/docker"); !ok || d.To != "/usr/bin/docker.original" || d.Package != "" {
		t.Errorf("the diversion is %+v", d)
	}
	s.uninstall()
	s.says("/usr/bin/docker", "docker 2")
	if out := output(t, "dpkg", "--root="+s.root, "--verify", "testdocker"); out != "" {
		t.Errorf("dpkg --verify after an uninstall: %s", out)
	}
	s.dpkg("-i", one)
	s.says("/usr/bin/docker", "docker 1")

	// The package goes and comes while the shim is there.
	s.install()
	s.dpkg("--remove", "testdocker")
	p, err := Install(s.o)
	if s.o.FromPackage = true; err == nil {
		p, err = Install(s.o)
	}
	must(t, err)
	if len(p.Notes) == 0 || !strings.Contains(p.Notes[0], "127") {
		t.Errorf("nobody is told that the shim has no docker: %q", p.Notes)
	}
	s.o.FromPackage = false
	s.dpkg("-i", two)
	s.wrapped("/usr/bin/docker", "2")
	s.uninstall()
	s.says("/usr/bin/docker", "docker 2")
}

// Docker came from a tarball first, and from a package later.
func TestPackageLater(t *testing.T) {
	s := newStage(t)
	dpkgRoot(t, s)
	s.docker("/usr/bin/docker", "0")
	s.install()
	s.dpkg("-i", deb(t, "1")) // overwrites the shim
	s.install()
	s.wrapped("/usr/bin/docker", "1")
	s.dpkg("-i", deb(t, "2"))
	s.wrapped("/usr/bin/docker", "2")
	s.uninstall()
	s.says("/usr/bin/docker", "docker 2")
}

// helperVariable makes the test's own binary an install or uninstall of a root, for tests
// that kill it.
const helperVariable = "TALLYMAN_INSTALL_TEST"

func TestMain(m *testing.M) {
	if what := os.Getenv(helperVariable); what != "" {
		root, binaries := os.Args[1], os.Args[2]
		plan := map[string]func(Options) (*Plan, error){"install": Install, "uninstall": Uninstall}[what]
		p, err := plan(Options{Root: root, Path: SearchPath, Binaries: binaries})
		if err == nil {
			err = p.Run(context.Background(), func(string) {})
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func (s *stage) helper(what string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], s.root, s.o.Binaries)
	cmd.Env = append(os.Environ(), helperVariable+"="+what, "GOMAXPROCS=1")
	return cmd
}

// changing are the calls by which files come, go and get their names.
var changing = []string{"renameat", "renameat2", "linkat", "unlinkat", "mkdirat", "fchmod", "fchown", "symlinkat", "fsync"}

// A kill at each call that changes something leaves a docker that works, and what the
// next run completes.
func TestKilledAnywhere(t *testing.T) {
	inject.Require(t)
	dpkgRoot(t, newStage(t)) // says what is missing
	one := deb(t, "1")
	stages := func(t testing.TB) (*stage, []string) {
		s := newStage(t)
		dpkgRoot(t, s)
		s.docker("/usr/local/bin/docker", "static")
		s.dpkg("-i", one)
		return s, s.tree()
	}
	for _, what := range []string{"install", "uninstall"} {
		s, _ := stages(t)
		if what == "uninstall" {
			s.install()
		}
		count := inject.Counting(t, s.helper(what), changing...)
		if out, err := count.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		calls, _ := count.Calls(t)
		points := inject.Points(calls, inject.Kill, changing...)
		if len(points) < 10 {
			t.Fatalf("only %d points", len(points))
		}
		for _, p := range inject.SampleOfSelf(points, 16) {
			t.Run(what+" "+p.String(), func(t *testing.T) {
				s, before := stages(t)
				if what == "uninstall" {
					s.install()
				}
				_ = p.Command(s.helper(what)).Run() // killed, or through before the point
				s.says("/usr/bin/docker", "docker 1")
				s.says("/usr/local/bin/docker", "docker static")
				// Half of it is undone as well as completed.
				if p.N%2 == 0 {
					s.install()
					s.wrapped("/usr/bin/docker", "1")
					s.wrapped("/usr/local/bin/docker", "static")
				}
				if err := s.try(Uninstall); err != nil && err != ErrNothing {
					t.Fatal(err)
				}
				same(t, s.tree(), before)
			})
		}
	}
}

// A program that calls docker again and again never misses it, whatever comes and goes.
func TestNoMomentWithoutDocker(t *testing.T) {
	s := newStage(t)
	dpkgRoot(t, s)
	// No script: its interpreter opens it a second time, and would find the shim there.
	echo, err := os.ReadFile("/bin/echo")
	must(t, err)
	s.dpkg("-i", debOf(t, "1", echo))
	shim := s.o.Binaries + "/docker-shim"
	must(t, os.Remove(shim))
	build := exec.Command("go", "build", "-o", shim, "../cmd/docker-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The shim reads a configuration beside itself: nothing is recorded here.
	s.file("/usr/bin/tallyman.conf", "enabled = false\n", 0o644)
	stop := filepath.Join(t.TempDir(), "stop")
	loop := exec.Command("/bin/sh", "-c", `n=0; while [ ! -e "$1" ]; do n=$((n+1)); out=$("$2" x) || exit 1; [ "$out" = x ] || exit 2; done; echo "$n calls"`, "sh", stop, s.root+"/usr/bin/docker")
	var out bytes.Buffer
	loop.Stdout, loop.Stderr = &out, &out
	must(t, loop.Start())
	ended := false
	defer func() {
		if !ended {
			_ = loop.Process.Kill()
			_ = loop.Wait()
		}
	}()
	for range 8 {
		for _, what := range []string{"install", "uninstall"} {
			if out, err := s.helper(what).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", what, err, out)
			}
		}
	}
	must(t, os.WriteFile(stop, nil, 0o600))
	err = loop.Wait()
	ended = true
	if err != nil {
		t.Errorf("a call failed while docker was taken or given back: %v: %s", err, out.String())
	}
	t.Log(out.String())
}
