package packages

import (
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tallyman-ci/tallyman/e2e/standin"
	"github.com/tallyman-ci/tallyman/install"
	"github.com/tallyman-ci/tallyman/internal/require"
)

// The version that the tests build; packages number it as below.
const (
	described = "v1.2.3-4-g0123abc"
	version   = "1.2.3+4.g0123abc"
	next      = "1.3.0"
)

// dist is what build.sh made, for this machine's architecture.
type dist struct{ dir, deb, rpm string }

var built = sync.OnceValues(func() (dist, error) {
	return build(repository, filepath.Join(temp, "dist"))
})

var repository, temp string

func TestMain(m *testing.M) {
	var err error
	if repository, err = filepath.Abs("../.."); err == nil {
		temp, err = os.MkdirTemp("", "tallyman-packages-")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(temp)
	os.Exit(code)
}

// tool is a program that the Makefile builds into .cache/bin: NAME-VERSION/NAME.
func tool(name string) (string, error) {
	found, _ := filepath.Glob(filepath.Join(repository, ".cache/bin", name+"-v*", name))
	if len(found) == 0 {
		return "", fmt.Errorf("%s is not built: run make e2e, or make packages", name)
	}
	return found[len(found)-1], nil
}

// build runs build.sh of the sources in src.
func build(src, out string) (dist, error) {
	nfpm, err := tool("nfpm")
	if err != nil {
		return dist{}, err
	}
	sbom, err := tool("cyclonedx-gomod")
	if err != nil {
		return dist{}, err
	}
	cmd := exec.Command(filepath.Join(src, "packaging/build.sh"), "-a", runtime.GOARCH, "-o", out, nfpm, sbom)
	cmd.Env = append(os.Environ(), "VERSION="+described, "COMMIT=0123abc", "SOURCE_DATE_EPOCH=1780000000")
	if said, err := cmd.CombinedOutput(); err != nil {
		return dist{}, fmt.Errorf("build.sh: %w: %s", err, said)
	}
	rpmArch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	return dist{dir: out, deb: filepath.Join(out, "tallyman_"+version+"_"+runtime.GOARCH+".deb"), rpm: filepath.Join(out, "tallyman-"+version+"-1."+rpmArch+".rpm")}, nil
}

func requireBuilt(t *testing.T) dist {
	t.Helper()
	d, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestReproducible: the same sources in another folder give the same bytes.
func TestReproducible(t *testing.T) {
	first := requireBuilt(t)
	copied := filepath.Join(t.TempDir(), "elsewhere")
	out, err := exec.Command("git", "-C", repository, "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard").Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.Trim(string(out), "\x00"), "\x00") {
		from, to := filepath.Join(repository, name), filepath.Join(copied, name)
		st, err := os.Stat(from)
		if err != nil || !st.Mode().IsRegular() {
			continue // removed, and not committed yet
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := standin.CopyFile(from, to); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(to, st.Mode()); err != nil {
			t.Fatal(err)
		}
	}
	second, err := build(copied, filepath.Join(t.TempDir(), "dist"))
	if err != nil {
		t.Fatal(err)
	}
	files := func(d dist) map[string]string {
		sums, err := os.ReadFile(filepath.Join(d.dir, "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		named := map[string]string{}
		for line := range strings.Lines(string(sums)) {
			sum, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
			named[name] = sum
		}
		return named
	}
	was, is := files(first), files(second)
	for _, said := range standin.Differences(was, is) {
		t.Error(said)
	}
	if len(was) != 6 { // deb, rpm, and two tarballs with an SBOM each
		t.Errorf("SHA256SUMS names %d files: %v", len(was), was)
	}
	if out, err := runIn(first.dir, "sha256sum", "--check", "--strict", "SHA256SUMS"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func runIn(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestBillOfMaterials: the SBOM lists the modules that are in the binary, with their
// versions.
func TestBillOfMaterials(t *testing.T) {
	d := requireBuilt(t)
	for _, variant := range []string{"", "_slim"} {
		var bom struct {
			Format     string `json:"bomFormat"`
			Components []struct {
				Name, Version, PURL string
				Hashes              []struct{ Alg string }
			}
		}
		data, err := os.ReadFile(filepath.Join(d.dir, "tallyman_"+version+"_linux_"+runtime.GOARCH+variant+".cdx.json"))
		if err == nil {
			err = json.Unmarshal(data, &bom)
		}
		if err != nil {
			t.Fatal(err)
		}
		listed := map[string]bool{}
		for _, c := range bom.Components {
			listed[c.Name+"@"+c.Version] = true
		}
		info, err := buildinfo.ReadFile(filepath.Join(d.dir, "linux_"+runtime.GOARCH+variant, "tallyman"))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range info.Deps {
			if !listed[m.Path+"@"+m.Version] {
				t.Errorf("%s: %s@%s is in the binary and not in the SBOM", variant, m.Path, m.Version)
			}
		}
		google := slices.ContainsFunc(bom.Components, func(c struct {
			Name, Version, PURL string
			Hashes              []struct{ Alg string }
		}) bool {
			return strings.HasPrefix(c.Name, "cloud.google.com/go/pubsub")
		})
		if bom.Format != "CycloneDX" || google != (variant == "") {
			t.Errorf("%q: format %q, Pub/Sub's client listed: %v", variant, bom.Format, google)
		}
	}
}

// TestTarball: it unpacks into one folder, and what is in it installs.
func TestTarball(t *testing.T) {
	d := requireBuilt(t)
	root := standin.Require(t)
	docker(t, root, "1")
	dir := t.TempDir()
	if out, err := runIn(dir, "tar", "xzf", filepath.Join(d.dir, "tallyman_"+version+"_linux_"+runtime.GOARCH+".tar.gz")); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	unpacked := filepath.Join(dir, "tallyman-"+version)
	before := treeOf(t, root)
	if out, err := runIn(dir, filepath.Join(unpacked, "tallyman"), "install", "--root", root); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	wantShim(t, root, "docker 1")
	if out, err := runIn(dir, filepath.Join(unpacked, "tallyman"), "uninstall", "--purge", "--root", root); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	sameTree(t, before, treeOf(t, root))
	if out, err := runIn(dir, filepath.Join(unpacked, "tallyman"), "--version"); err != nil || !strings.Contains(out, described) {
		t.Errorf("%v: %s", err, out)
	}
}

// docker installs a stand-in for a package of docker's in a root: a program that says
// its version.
func docker(t *testing.T, root, version string) {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "docker")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho docker "+version+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	deb, err := standin.Package(dir, "docker-ce-cli", version, map[string]string{"usr/bin/docker": program})
	if err != nil {
		t.Fatal(err)
	}
	dpkg(t, root, "--install", deb)
}

// dpkg runs dpkg in a root, and must succeed. Packages are copied there.
func dpkg(t *testing.T, root string, args ...string) string {
	t.Helper()
	out, err := tryDpkg(t, root, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func tryDpkg(t *testing.T, root string, args ...string) (string, error) {
	t.Helper()
	args = slices.Clone(args)
	for i, arg := range args {
		if !strings.HasSuffix(arg, ".deb") {
			continue
		}
		inside := "/tmp/" + filepath.Base(arg)
		if err := standin.CopyFile(arg, filepath.Join(root, inside)); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(filepath.Join(root, inside))
		args[i] = inside
	}
	return standin.Run(root, append([]string{"dpkg"}, args...)...)
}

func treeOf(t *testing.T, root string) map[string]string {
	t.Helper()
	tree, err := standin.Tree(root)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func sameTree(t *testing.T, before, after map[string]string) {
	t.Helper()
	for _, said := range standin.Differences(before, after) {
		t.Error(said)
	}
}

// wantShim: docker is the shim, and what it starts says what is wanted.
func wantShim(t *testing.T, root, want string) {
	t.Helper()
	if !install.IsShim(filepath.Join(root, "usr/bin/docker")) {
		t.Error("/usr/bin/docker is not the shim")
	}
	wantDocker(t, root, want)
}

func wantDocker(t *testing.T, root, want string) {
	t.Helper()
	out, err := standin.Run(root, "docker", "version")
	if err != nil || strings.TrimSpace(out) != want {
		t.Errorf("docker says %q, not %q: %v", out, want, err)
	}
}

// renumbered is the package of a later version.
func renumbered(t *testing.T, d dist, packager string) string {
	t.Helper()
	nfpm, err := tool("nfpm")
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "tallyman-"+next+"."+packager)
	cmd := exec.Command(nfpm, "package", "--config", "packaging/nfpm.yaml", "--packager", packager, "--target", out)
	cmd.Dir = repository
	cmd.Env = append(os.Environ(), "PACKAGE_ARCH="+runtime.GOARCH, "PACKAGE_VERSION="+next, "PACKAGE_FILES="+filepath.Join(d.dir, "linux_"+runtime.GOARCH))
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	return out
}

// TestDeb goes through the life of the package beside docker's own.
func TestDeb(t *testing.T) {
	d := requireBuilt(t)
	root := standin.Require(t)
	docker(t, root, "1")
	before := treeOf(t, root)

	dpkg(t, root, "--install", d.deb)
	wantShim(t, root, "docker 1")
	if st, err := os.Stat(filepath.Join(root, install.StateDir)); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the folder for records: %v, %v", st, err)
	}
	if out, err := standin.Run(root, "tallyman", "install", "--from-package", "--check"); err != nil {
		t.Errorf("after the package, something is left to install: %v: %s", err, out)
	}

	if out := dpkg(t, root, "--verify", "tallyman"); out != "" {
		t.Errorf("dpkg --verify: %s", out)
	}

	docker(t, root, "2")
	wantShim(t, root, "docker 2")

	dpkg(t, root, "--install", renumbered(t, d, "deb"))
	wantShim(t, root, "docker 2")

	docker(t, root, "1")
	wantShim(t, root, "docker 1")

	records := filepath.Join(root, install.StateDir, "journal")
	if err := os.WriteFile(records, []byte("{}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	dpkg(t, root, "--remove", "tallyman")
	wantDocker(t, root, "docker 1")
	if _, err := os.Stat(records); err != nil {
		t.Errorf("a removal took the records: %v", err)
	}
	dpkg(t, root, "--purge", "tallyman")
	sameTree(t, before, treeOf(t, root))
	if out := dpkg(t, root, "--verify", "docker-ce-cli"); out != "" {
		t.Errorf("dpkg --verify: %s", out)
	}
	if out, err := standin.Run(root, "dpkg-divert", "--list"); err != nil || out != "" {
		t.Errorf("diversions that are left: %s%v", out, err)
	}
}

// TestDebBeforeDocker: a docker that comes after us is taken when it comes, and one that
// goes leaves nothing that fails to be removed.
func TestDebBeforeDocker(t *testing.T) {
	d := requireBuilt(t)
	root := standin.Require(t)
	before := treeOf(t, root)
	dpkg(t, root, "--install", d.deb)
	docker(t, root, "1")
	wantShim(t, root, "docker 1")
	docker(t, root, "2")
	wantShim(t, root, "docker 2")
	dpkg(t, root, "--remove", "docker-ce-cli")
	docker(t, root, "2")
	wantShim(t, root, "docker 2")
	dpkg(t, root, "--remove", "docker-ce-cli")
	dpkg(t, root, "--purge", "tallyman")
	sameTree(t, before, treeOf(t, root))
}

// TestDebThatFails: a maintainer script that cannot do its work leaves docker as it was,
// says what to do, and can be finished when that is done.
func TestDebThatFails(t *testing.T) {
	d := requireBuilt(t)
	root := standin.Require(t)
	docker(t, root, "1")
	before := treeOf(t, root)
	foreign := filepath.Join(root, "usr/bin/docker.original")
	if err := os.WriteFile(foreign, []byte("#!/bin/sh\necho somebody else\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := tryDpkg(t, root, "--install", d.deb)
	if err == nil || !strings.Contains(out, "docker.original") {
		t.Errorf("something is in the way, and dpkg says: %v: %s", err, out)
	}
	wantDocker(t, root, "docker 1")
	if err := os.Remove(foreign); err != nil {
		t.Fatal(err)
	}
	dpkg(t, root, "--configure", "--pending")
	wantShim(t, root, "docker 1")

	// A removal that cannot put docker back leaves the shim, which works.
	program := filepath.Join(root, install.Program)
	if err := os.Rename(program, program+".away"); err != nil {
		t.Fatal(err)
	}
	if out, err := tryDpkg(t, root, "--remove", "tallyman"); err == nil || !strings.Contains(out, "--reinstall") {
		t.Errorf("the program is gone, and dpkg says: %v: %s", err, out)
	}
	wantShim(t, root, "docker 1")
	if err := os.Rename(program+".away", program); err != nil {
		t.Fatal(err)
	}
	dpkg(t, root, "--configure", "--pending")
	dpkg(t, root, "--purge", "tallyman")
	sameTree(t, before, treeOf(t, root))
}

// dockerRPM makes a stand-in for docker's own .rpm.
func dockerRPM(t *testing.T, version string) string {
	t.Helper()
	nfpm, err := tool("nfpm")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"docker": "#!/bin/sh\necho docker " + version + "\n",
		"nfpm.yaml": "name: docker-ce-cli\narch: all\nversion: " + version + "\nversion_schema: none\nmaintainer: a <a@example.org>\ndescription: x\n" +
			"contents:\n  - {src: docker, dst: /usr/bin/docker, file_info: {mode: 0755}}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if said, err := runIn(dir, nfpm, "package", "--packager", "rpm", "--target", "docker.rpm"); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	return filepath.Join(dir, "docker.rpm")
}

// TestRPM installs, upgrades and removes the .rpm in a root with a database of RPM's. The
// root is otherwise a Debian, so what is tested is the package and its scriptlets, not
// a distribution that lives on RPM.
func TestRPM(t *testing.T) {
	d := requireBuilt(t)
	if _, err := exec.LookPath("rpm"); err != nil {
		require.Missing(t, "rpm: run make setup, or apt-get install rpm")
	}
	root := standin.Require(t)
	// It is of a distribution's package filesystem.
	if err := os.MkdirAll(filepath.Join(root, "usr/share/licenses"), 0o755); err != nil {
		t.Fatal(err)
	}
	rpm := func(args ...string) string {
		t.Helper()
		out, err := runIn("/", "rpm", append([]string{"--root", root, "--dbpath", "/var/lib/rpm"}, args...)...)
		if err != nil {
			t.Fatalf("rpm %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return out
	}
	one := dockerRPM(t, "1")
	docker := filepath.Join(root, "usr/bin/docker")
	rpm("--install", "--nodeps", one)
	before := treeOf(t, root)
	// The root has no package that RPM knows, so /bin/sh is not provided by any.
	rpm("--install", "--nodeps", d.rpm)
	wantShim(t, root, "docker 1")
	if out := rpm("--verify", "--nodeps", "tallyman"); out != "" {
		t.Errorf("rpm --verify: %s", out)
	}
	rpm("--upgrade", "--nodeps", renumbered(t, d, "rpm"))
	wantShim(t, root, "docker 1")
	if out := rpm("--query", "tallyman"); !strings.Contains(out, next) {
		t.Errorf("after the upgrade there is %s", out)
	}

	// RPM knows no diversions: docker's upgrade overwrites the shim, which is told, and
	// mended by another run.
	rpm("--upgrade", "--nodeps", dockerRPM(t, "2"))
	wantDocker(t, root, "docker 2")
	if install.IsShim(docker) {
		t.Error("RPM left the shim alone: the documents can say so")
	}
	if out, err := standin.Run(root, "tallyman", "install", "--from-package", "--check"); err == nil || !strings.Contains(out, "put the shim at /usr/bin/docker") {
		t.Errorf("after docker's upgrade nothing is to do: %v: %s", err, out)
	}
	if out, err := standin.Run(root, "tallyman", "install", "--from-package"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	wantShim(t, root, "docker 2")

	rpm("--upgrade", "--oldpackage", "--nodeps", one)
	if out, err := standin.Run(root, "tallyman", "install", "--from-package"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	wantShim(t, root, "docker 1")
	rpm("--erase", "tallyman")
	wantDocker(t, root, "docker 1")
	if out := rpm("--verify", "--nodeps", "docker-ce-cli"); out != "" {
		t.Errorf("rpm --verify docker-ce-cli: %s", out)
	}

	// A removal of docker takes the shim and leaves the real one, which ours puts back.
	rpm("--install", "--nodeps", d.rpm)
	rpm("--erase", "docker-ce-cli")
	if _, err := os.Lstat(docker); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("docker after its removal: %v", err)
	}
	rpm("--erase", "tallyman")
	wantDocker(t, root, "docker 1")
	if err := os.Remove(docker); err != nil {
		t.Fatal(err)
	}
	rpm("--install", "--nodeps", one)
	// RPM knows no purge.
	records := filepath.Join(root, install.StateDir)
	if _, err := os.Stat(filepath.Join(records, "run/spool/0.jsonl")); err != nil {
		t.Errorf("the removal took the records: %v", err)
	}
	if err := os.RemoveAll(records); err != nil {
		t.Fatal(err)
	}
	sameTree(t, before, treeOf(t, root))
}
