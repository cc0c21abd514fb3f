package install

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// dpkgDir is dpkg's database.
const dpkgDir = "/var/lib/dpkg"

// Owner is the package whose file a path is, by dpkg's database at admin (usually
// /var/lib/dpkg), and the name by which the package knows it: where /bin is a link to
// /usr/bin, that may be either. Both are "" where no package ships it.
func Owner(admin, file string) (pkg, name string) {
	lists, _ := filepath.Glob(filepath.Join(admin, "info", "*.list"))
	for _, list := range lists {
		data, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		data = append([]byte("\n"), data...)
		for _, name := range aliases(file) {
			if bytes.Contains(data, []byte("\n"+name+"\n")) {
				return strings.TrimSuffix(filepath.Base(list), ".list"), name
			}
		}
	}
	return "", ""
}

// aliases are the names of one file where /bin and /sbin are links into /usr. A file
// below /usr/bin may be known as one below /bin.
func aliases(file string) []string {
	if short, ok := strings.CutPrefix(file, "/usr"); ok && (path.Dir(short) == "/bin" || path.Dir(short) == "/sbin") {
		return []string{file, short}
	}
	return []string{file}
}

// alike: two names of one file, see aliases.
func alike(a, b string) bool {
	return a == b || slices.Contains(aliases(a), b) || slices.Contains(aliases(b), a)
}

// A Diversion says that the files which packages ship at a path go elsewhere.
type Diversion struct {
	From, To string
	// Package is the one whose own file stays; "" for a local diversion, which holds for all.
	Package string
}

// DiversionOf finds the diversion of a path in dpkg's database at admin; ok is false
// where there is none.
func DiversionOf(admin, file string) (d Diversion, ok bool) {
	data, err := os.ReadFile(filepath.Join(admin, "diversions"))
	if err != nil {
		return Diversion{}, false
	}
	// Three lines each: the path, where it went, the package or ":" (deb-diversions in
	// dpkg's sources; dpkg-divert(1)).
	lines := strings.Split(string(data), "\n")
	for i := 0; i+2 < len(lines); i += 3 {
		for _, name := range aliases(file) {
			if lines[i] == name {
				return Diversion{From: name, To: lines[i+1], Package: strings.TrimPrefix(lines[i+2], ":")}, true
			}
		}
	}
	return Diversion{}, false
}

// errNoDpkg: the file is a package's, and nobody here can divert it.
var errNoDpkg = errors.New("there is no dpkg-divert here: run tallyman install inside the image, or install dpkg")

// divert adds or removes the local diversion of a path. dpkg-divert moves nothing: with
// --rename there would be a moment without the tool.
func (t tree) divert(action, file string) error {
	var args []string
	if t != "" {
		root, err := filepath.Abs(string(t))
		if err != nil {
			return err
		}
		args = append(args, "--root="+root)
	}
	args = append(args, "--local", "--no-rename", "--divert", file+OriginalSuffix, action, file)
	program, err := exec.LookPath("dpkg-divert")
	if err != nil {
		if program = "/usr/bin/dpkg-divert"; !isExecutable(program) {
			return errNoDpkg
		}
	}
	cmd := exec.Command(program, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func isExecutable(outside string) bool {
	st, err := os.Stat(outside)
	return err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0
}
