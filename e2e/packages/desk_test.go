package packages

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/e2e/standin"
	"github.com/tallyman-ci/tallyman/internal/require"
)

// TestDesk: the desk's package and tarball bring a program that answers where there is no
// C++ library, ask for the glibc that they need, and go without a trace.
func TestDesk(t *testing.T) {
	if _, err := exec.LookPath("g++"); err != nil {
		require.Missing(t, "g++: a C++ compiler, apt-get install g++")
	}
	nfpm, err := tool("nfpm")
	if err != nil {
		t.Fatal(err)
	}
	sbom, err := tool("cyclonedx-gomod")
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "dist")
	cmd := exec.Command(filepath.Join(repository, "packaging/desk.sh"), "-o", out, nfpm, sbom)
	cmd.Env = append(os.Environ(), "VERSION="+described, "COMMIT=0123abc", "SOURCE_DATE_EPOCH=1780000000")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("desk.sh: %v: %s", err, said)
	}
	if said, err := runIn(out, "sha256sum", "--check", "--strict", "SHA256SUMS"); err != nil || strings.Count(said, "\n") != 4 {
		t.Errorf("%v: %s", err, said) // deb, rpm, tarball, SBOM
	}

	program := filepath.Join(out, "desk_linux_"+runtime.GOARCH, "tallyman-desk")
	binary, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	libraries, err := binary.ImportedLibraries()
	if err != nil || slices.Contains(libraries, "libstdc++.so.6") {
		t.Errorf("it wants the libraries %v: %v", libraries, err)
	}
	deb := filepath.Join(out, "tallyman-desk_"+version+"_"+runtime.GOARCH+".deb")
	depends, err := runIn(out, "dpkg-deb", "--field", deb, "Depends")
	if err != nil || !strings.HasPrefix(depends, "libc6 (>= 2.") {
		t.Errorf("it depends on %q: %v", depends, err)
	}

	root := standin.Require(t)
	before := treeOf(t, root)
	dpkg(t, root, "--install", "--force-depends", deb) // the stand-in's libc6 is not in its database
	if err := os.WriteFile(filepath.Join(root, "tmp/empty"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	const question = "SELECT 6 * 7 AS answer"
	if said, err := standin.Run(root, "tallyman-desk", "query", "--format", "csv", question, "/tmp/empty"); err != nil || !strings.Contains(said, "42") {
		t.Errorf("%v: %s", err, said)
	}
	if err := os.Remove(filepath.Join(root, "tmp/empty")); err != nil {
		t.Fatal(err)
	}
	dpkg(t, root, "--purge", "tallyman-desk")
	sameTree(t, before, treeOf(t, root))

	dir := t.TempDir()
	if said, err := runIn(dir, "tar", "xzf", filepath.Join(out, "tallyman-desk_"+version+"_linux_"+runtime.GOARCH+".tar.gz")); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	if said, err := runIn(dir, filepath.Join(dir, "tallyman-desk-"+version, "tallyman-desk"), "--version"); err != nil || !strings.Contains(said, described) {
		t.Errorf("%v: %s", err, said)
	}
}
