// Package standin makes root file systems that stand in for a runner image where no
// network is: a small Debian of this machine's own packages, with a package database
// that works, laid out as the official runner image is (actions/runner,
// images/Dockerfile): user runner 1001, group docker 123, /home/runner with run.sh
// and externals.
//
// What is left out is documentation, translations, and maintainer scripts of the
// machine's packages.
package standin

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// The runner's user and docker's group in the official image.
const (
	RunnerUID = 1001
	RunnerGID = 1001
	DockerGID = 123
)

// ErrUnavailable is wrapped where this machine cannot be the source of a root.
var ErrUnavailable = errors.New("no stand-in for a runner image can be made here")

// base are the packages that a root holds, with all that they depend on.
var base = []string{"base-files", "dpkg", "tar", "gzip", "bash", "dash", "coreutils", "sed", "grep", "findutils", "diffutils", "libc-bin", "debianutils"}

// skipped are folders that nothing here reads.
var skipped = []string{"/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/share/info/", "/usr/share/lintian/",
	"/usr/share/bug/", "/usr/share/zoneinfo/", "/usr/lib/locale/", "/gconv/", "/etc/"}

// Root fills dir, which must be empty, with a runner's root file system. It needs root
// and a machine with dpkg.
func Root(dir string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: it needs root; run the command again as root, for example with sudo env \"PATH=$PATH\"", ErrUnavailable)
	}
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		return fmt.Errorf("%w: there is no dpkg; run it on Debian or Ubuntu", ErrUnavailable)
	}
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		if target, err := os.Readlink("/" + name); err == nil { // a merged /usr
			if err := errors.Join(os.MkdirAll(filepath.Join(dir, "usr", name), 0o755), os.Symlink(target, filepath.Join(dir, name))); err != nil {
				return err
			}
		}
	}
	packages, err := closure(base)
	if err != nil {
		return err
	}
	admin := filepath.Join(dir, "var/lib/dpkg")
	for _, d := range []string{"info", "updates", "triggers", "alternatives", "parts"} {
		if err := os.MkdirAll(filepath.Join(admin, d), 0o755); err != nil {
			return err
		}
	}
	var status bytes.Buffer
	for _, p := range packages {
		if err := p.copyTo(dir); err != nil {
			return fmt.Errorf("copy package %s: %w", p.name, err)
		}
		stanza, err := output("dpkg-query", "-s", p.name)
		if err != nil {
			return err
		}
		// Their configuration files are not here.
		status.WriteString(withoutField(stanza, "Conffiles:") + "\n")
	}
	// Without the file format dpkg looks for the lists of libraries under other names.
	err = errors.Join(os.WriteFile(filepath.Join(admin, "status"), status.Bytes(), 0o644), os.WriteFile(filepath.Join(admin, "info/format"), []byte("1\n"), 0o644))
	if err != nil {
		return err
	}
	return layOut(dir)
}

// layOut makes what the official image has besides its packages.
func layOut(dir string) error {
	for _, d := range []struct {
		path string
		mode fs.FileMode
		uid  int
	}{
		{"dev", 0o755, 0}, {"proc", 0o755, 0}, {"sys", 0o755, 0}, {"run", 0o755, 0}, {"root", 0o700, 0}, {"tmp", 0o1777, 0}, {"etc", 0o755, 0},
		{"opt", 0o755, 0}, {"usr/local/bin", 0o755, 0}, {"var/log", 0o755, 0}, {"var/cache", 0o755, 0},
		{"home/runner", 0o777, RunnerUID}, {"home/runner/externals", 0o755, RunnerUID}, {"home/runner/bin", 0o755, RunnerUID},
	} {
		at := filepath.Join(dir, d.path)
		if err := os.MkdirAll(at, 0o755); err != nil {
			return err
		}
		mode := d.mode & fs.ModePerm
		if d.mode&0o1000 != 0 {
			mode |= fs.ModeSticky
		}
		if err := errors.Join(os.Chown(at, d.uid, d.uid), os.Chmod(at, mode)); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", filepath.Join(dir, "var/run")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for name, text := range map[string]string{
		"etc/passwd":         "root:x:0:0:root:/root:/bin/bash\nrunner:x:1001:1001::/home/runner:/bin/bash\n",
		"etc/group":          "root:x:0:\nsudo:x:27:runner\ndocker:x:123:runner\nrunner:x:1001:\n",
		"etc/nsswitch.conf":  "passwd: files\ngroup: files\n",
		"etc/os-release":     "ID=tallyman-standin\n",
		"home/runner/run.sh": "#!/bin/bash\nexec sleep infinity\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mknod(filepath.Join(dir, "dev/null"), syscall.S_IFCHR|0o666, 1<<8|3); err != nil {
		return fmt.Errorf("make /dev/null: %w", err)
	}
	return os.Chmod(filepath.Join(dir, "dev/null"), 0o666)
}

// pkg is a package of this machine.
type pkg struct{ name, depends string }

// closure is the packages of these names with all they depend on, where installed.
func closure(names []string) ([]pkg, error) {
	out, err := output("dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}\t${Pre-Depends}, ${Depends}\n")
	if err != nil {
		return nil, err
	}
	installed := map[string]string{}
	for line := range strings.Lines(out) {
		f := strings.SplitN(strings.TrimSpace(line), "\t", 3)
		if len(f) == 3 && strings.HasPrefix(f[0], "ii") {
			installed[f[1]] = f[2]
		}
	}
	var found []pkg
	queue := slices.Clone(names)
	seen := map[string]bool{}
	for ; len(queue) > 0; queue = queue[1:] {
		name := queue[0]
		depends, ok := installed[name]
		if seen[name] || !ok {
			continue
		}
		seen[name] = true
		found = append(found, pkg{name, depends})
		for _, all := range strings.Split(depends, ",") {
			for _, one := range strings.Split(all, "|") {
				name, _, _ := strings.Cut(strings.TrimSpace(one), " ")
				name, _, _ = strings.Cut(name, ":")
				if _, ok := installed[name]; ok {
					queue = append(queue, name)
					break
				}
			}
		}
	}
	return found, nil
}

// copyTo copies the package's files and dpkg's list of them.
func (p pkg) copyTo(dir string) error {
	list, err := output("dpkg-query", "-L", p.name)
	if err != nil {
		return err
	}
	var kept []string
	for line := range strings.Lines(list) {
		file := strings.TrimSpace(line)
		// Lines such as "diverted by ... to: ..." are no paths.
		if !strings.HasPrefix(file, "/") || file == "/." || slices.ContainsFunc(skipped, func(s string) bool { return strings.Contains(file+"/", s) && !strings.HasPrefix(file, "/etc/ld.so") }) {
			continue
		}
		if err := copyEntry(file, filepath.Join(dir, file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		kept = append(kept, file)
	}
	name := p.name
	if matches, _ := filepath.Glob("/var/lib/dpkg/info/" + p.name + ":*.list"); len(matches) > 0 {
		name = strings.TrimSuffix(filepath.Base(matches[0]), ".list")
	}
	return os.WriteFile(filepath.Join(dir, "var/lib/dpkg/info", name+".list"), []byte("/.\n"+strings.Join(kept, "\n")+"\n"), 0o644)
}

// copyEntry copies one file, link or folder with its owner and mode.
func copyEntry(from, to string) error {
	st, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if there, err := os.Lstat(to); err == nil && (there.IsDir() || there.Mode()&fs.ModeSymlink != 0) {
		return nil // a folder of several packages, or a link of the merged /usr
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t)
	switch {
	case st.IsDir():
		err = os.MkdirAll(to, st.Mode().Perm())
	case st.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case st.Mode().IsRegular():
		err = CopyFile(from, to)
	default:
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(os.Lchown(to, int(sys.Uid), int(sys.Gid)), os.Chmod(to, st.Mode()))
}

// CopyFile copies the content of a file to a new or emptied one, mode 0755.
func CopyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// withoutField takes a field and its continuation lines out of a control stanza.
func withoutField(stanza, field string) string {
	var b strings.Builder
	in := false
	for line := range strings.Lines(stanza) {
		if !strings.HasPrefix(line, " ") {
			in = strings.HasPrefix(line, field)
		}
		if !in {
			b.WriteString(line)
		}
	}
	return b.String()
}

// packaged is the time of all files of packages.
var packaged = time.Unix(1_700_000_000, 0)

// Package builds a .deb of this name and version that holds files (path to source) and
// returns its path. Sources are copied as executables.
func Package(dir, name, version string, files map[string]string) (string, error) {
	tree := filepath.Join(dir, name+"_"+version)
	arch, err := output("dpkg", "--print-architecture")
	if err != nil {
		return "", err
	}
	control := "Package: " + name + "\nVersion: " + version + "\nArchitecture: " + strings.TrimSpace(arch) +
		"\nMaintainer: Nobody <nobody@example.com>\nDescription: stands in for a package of Docker\n"
	if err := os.MkdirAll(filepath.Join(tree, "DEBIAN"), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(tree, "DEBIAN/control"), []byte(control), 0o644); err != nil {
		return "", err
	}
	for to, from := range files {
		to = filepath.Join(tree, to)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), CopyFile(from, to), os.Chtimes(to, packaged, packaged)); err != nil {
			return "", err
		}
	}
	_, err = output("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, tree+".deb")
	return tree + ".deb", err
}

func output(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// Run runs a command as root inside of a root, with nothing of this process's
// environment. The error holds what it printed.
func Run(root string, argv ...string) (string, error) {
	// The program is found inside: exec.Command would look outside.
	cmd := &exec.Cmd{Path: "/bin/sh", Args: append([]string{"sh", "-c", `exec "$@"`, "sh"}, argv...), Dir: "/",
		Env:         []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"},
		SysProcAttr: &syscall.SysProcAttr{Chroot: root}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return string(out), nil
}

// Tree describes each file below root by type, mode, owner and content; folders have
// no times. What package managers note of their own work (database, logs, caches) is
// left out.
func Tree(root string) (map[string]string, error) {
	tree := map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		switch name {
		case "/proc", "/sys", "/var/lib/dpkg", "/var/lib/rpm", "/usr/lib/sysimage", "/var/log", "/var/cache":
			return fs.SkipDir
		}
		st, err := entry.Info()
		if err != nil {
			return err
		}
		sys := st.Sys().(*syscall.Stat_t)
		what := fmt.Sprintf("%v %d:%d", st.Mode(), sys.Uid, sys.Gid)
		switch {
		case st.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			what += fmt.Sprintf(" %d %s %s", st.Size(), st.ModTime().UTC().Format("2006-01-02T15:04:05.000000000"), hex.EncodeToString(sum[:8]))
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " -> " + target
		}
		tree[name] = what
		return nil
	})
	return tree, err
}

// Differences says what is in one tree and not, or not so, in the other.
func Differences(before, after map[string]string) []string {
	var said []string
	for name, was := range before {
		if now, ok := after[name]; !ok {
			said = append(said, name+" is gone")
		} else if now != was {
			said = append(said, name+" was "+was+", is "+now)
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			said = append(said, name+" is new: "+after[name])
		}
	}
	slices.Sort(said)
	return said
}
