package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// SearchPath is where tools are looked for in any root, in the order of most PATHs.
// /snap/bin is looked at to be able to say why nothing is done there.
const SearchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/snap/bin"

// state is what stands at a path where a tool may be.
type state struct {
	path string // in its folder's real place, itself not followed
	real string // path + ".original"
	tool string

	st, realSt     fs.FileInfo // nil where there is nothing
	shim, realShim bool        // it is our shim
	twin           bool        // path and real are one file, or equal
	link           string      // where path leads to when it is a link to something else

	owner, ownerName string    // package of path, and its name for it
	diversion        Diversion // of path
	diverted         bool
}

func (t tree) look(p string) state {
	s := state{path: p, real: p + OriginalSuffix, tool: path.Base(p)}
	s.st, _ = t.lstat(s.path)
	s.realSt, _ = t.lstat(s.real)
	target := func(name string, st fs.FileInfo) (string, bool) { // as the file that a start would start
		if st == nil {
			return "", false
		}
		end, err := t.resolve(name)
		return end, err == nil && IsShim(t.at(end))
	}
	var end string
	end, s.shim = target(s.path, s.st)
	if s.st != nil && s.st.Mode()&os.ModeSymlink != 0 {
		s.link = end
	}
	_, s.realShim = target(s.real, s.realSt)
	s.twin = !s.shim && !s.realShim && t.equal(s.path, s.real)
	admin := t.at(dpkgDir)
	s.owner, s.ownerName = Owner(admin, p)
	s.diversion, s.diverted = DiversionOf(admin, p)
	return s
}

// equal: both are one file, or one is a copy of the other.
func (t tree) equal(a, b string) bool {
	sa, errA := t.lstat(a)
	sb, errB := t.lstat(b)
	if errA != nil || errB != nil || sa.Mode() != sb.Mode() {
		return false
	}
	if os.SameFile(sa, sb) {
		return true
	}
	if sa.Mode()&os.ModeSymlink != 0 {
		la, _ := os.Readlink(t.at(a))
		lb, _ := os.Readlink(t.at(b))
		return la == lb
	}
	sum := ""
	if sa.Mode().IsRegular() && sa.Size() == sb.Size() {
		sum = digest(t.at(a))
	}
	return sum != "" && sum == digest(t.at(b))
}

// divertedToReal: what packages ship at path goes to real.
func (s *state) divertedToReal() bool { return s.diverted && alike(s.diversion.To, s.real) }

// candidates finds everything that a call of the tool may start, in the order of the
// search path, and says of what it leaves alone why.
func (p *planner) candidates(tool string) (found []state) {
	dirs := p.searchDirs()
	if strings.HasPrefix(tool, "/") {
		dirs = nil
		if dir, err := p.t.resolve(path.Dir(tool)); err == nil {
			dirs = []string{dir}
		}
	}
	for _, known := range p.was.Places { // also outside of this PATH
		if path.Base(known.Path) == path.Base(tool) {
			dirs = append(dirs, path.Dir(known.Path))
		}
	}
	seen := map[string]bool{}
	var all []state
	for _, dir := range dirs {
		at := path.Join(dir, path.Base(tool))
		if seen[at] {
			continue
		}
		seen[at] = true
		s := p.t.look(at)
		known := p.was.place(at) != nil
		switch {
		case s.st == nil && (s.realSt == nil || !known && !s.divertedToReal()):
			continue
		case s.st != nil && !s.shim && !known && !p.runs(s):
			continue // nobody can start it
		case !path.IsAbs(tool) && !known && !p.t.trustedDir(dir):
			p.note("%s is left alone: others than root can change that folder, so a job could undo it (to have it all the same: --tool %s)", at, at)
			continue
		}
		all = append(all, s)
	}
	for _, s := range all {
		switch other := p.leadsTo(s, all); {
		case path.Dir(s.path) == "/snap/bin" || path.Base(s.link) == "snap":
			p.note("%s is left alone, because snapd makes it anew: put a copy of %s at /usr/local/bin/%s and set real.%s = %s in %s", s.path, Shim, s.tool, s.tool, s.path, ConfigFile)
			continue
		case other != "":
			p.note("%s is left alone: it starts %s, where its calls are recorded", s.path, other)
			continue
		}
		found = append(found, s)
	}
	return found
}

// searchDirs are the folders where tools are looked for, in their real places.
func (p *planner) searchDirs() (dirs []string) {
	for _, dir := range filepath.SplitList(p.o.Path + ":" + SearchPath) {
		if !path.IsAbs(dir) {
			continue
		}
		if dir, err := p.t.resolve(dir); err == nil && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// runs: it is a file that can be started, or a link to one.
func (p *planner) runs(s state) bool {
	end, err := p.t.resolve(s.path)
	return err == nil && isExecutable(p.t.at(end))
}

// leadsTo is the other candidate that s is a link to, or a script for: ARC's legacy
// images have such a script at /usr/local/bin/docker, which ends as /usr/bin/docker. A
// shim at both would record each call twice.
func (p *planner) leadsTo(s state, all []state) string {
	var text []byte
	if s.st != nil && s.st.Mode().IsRegular() {
		text = p.t.script(s.path)
	}
	for _, other := range all {
		if other.path == s.path {
			continue
		}
		if s.link != "" && (s.link == other.path || s.link == other.real) {
			return other.path
		}
		if slices.ContainsFunc(aliases(other.path), func(name string) bool { return names(text, name) }) {
			return other.path
		}
	}
	return ""
}

// script is the text of a script, as far as it matters, or nil for other files.
func (t tree) script(p string) []byte {
	f, err := os.Open(t.at(p))
	if err != nil {
		return nil
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil || !bytes.HasPrefix(text, []byte("#!")) {
		return nil
	}
	return text
}

// names: the text holds this path as a whole word, not in a comment.
func names(text []byte, path string) bool {
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); bytes.HasPrefix(line, []byte("#")) {
			continue
		}
		for rest := line; ; {
			_, after, ok := bytes.Cut(rest, []byte(path))
			if !ok {
				break
			}
			before := rest[:len(rest)-len(after)-len(path)]
			if (len(before) == 0 || !inPathName(before[len(before)-1])) && (len(after) == 0 || !inPathName(after[0])) {
				return true
			}
			rest = after
		}
	}
	return false
}

func inPathName(c byte) bool {
	return c == '/' || c == '.' || c == '-' || c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// errOccupied is wrapped where a file that is none of ours stands where the real tool
// is to go. Nothing is overwritten.
var errOccupied = errors.New("is in the way and none of ours")

// take plans how the shim comes to stand at s.path.
//
// The order is what keeps the tool there at each moment, and each state between two
// steps one that the next run knows: the diversion is only a note of dpkg's, the real
// tool gets its second name before it loses the first, and it loses it to the shim in
// one rename(2).
func (p *planner) take(s state) error {
	known := p.was.place(s.path)
	real := s.st != nil && !s.shim
	if s.st != nil && s.st.IsDir() {
		return fmt.Errorf("%s is a folder", s.path)
	}
	if real && known != nil {
		if err := p.t.moved(s); err != nil {
			return err
		}
	}
	switch {
	case s.realShim:
		return fmt.Errorf("%s is a shim too, and there is no real %s: put the real one there (by installing its package again, for example)", s.real, s.tool)
	case real && s.twin:
		// A run of ours ended between two steps, or somebody made the link beforehand.
	case real && s.realSt != nil && known == nil:
		return fmt.Errorf("%s %w: is it another tool's real %s, remove that tool first; is it a leftover, move it away (mv %[1]s %[1]s.old)", s.real, errOccupied, s.tool)
	case real && s.realSt != nil && s.divertedToReal():
		return fmt.Errorf("%s is not the shim any more, and packages of %s go to %s: if that is the real one, put the shim back (install -m 0755 %s %s); else move it to the new one (mv %[3]s %[3]s.old)",
			s.path, s.tool, s.real, Shim, s.path)
	case s.shim && s.realSt == nil && p.cfg.Real[s.tool] == "":
		if p.o.FromPackage || s.divertedToReal() {
			p.note("%s is the shim, and %s is not there: calls end with exit code 127 until %s is installed", s.path, s.real, s.tool)
		} else {
			return fmt.Errorf("%s is the shim, and the real %s at %s is gone: put it there", s.path, s.tool, s.real)
		}
	}
	place := Place{Path: s.path, Real: s.real}
	divert := s.owner != "" && !s.diverted
	switch {
	case known != nil:
		place.Diverted = known.Diverted || divert
	case s.shim:
		place.Diverted = s.divertedToReal() && s.diversion.Package == "" || divert // done by hand, as the README once said
	default:
		place.Diverted = divert
	}
	p.place(place)
	switch {
	case s.diverted && s.diversion.Package != "":
		p.note("%s is package %s's own, which an upgrade puts back over the shim: run tallyman install again then", s.path, s.diversion.Package)
	case s.owner == "" && !s.diverted && p.t.hasRPM():
		p.note("RPM knows no diversions: if a package ships %s, run tallyman install again after its upgrades", s.path)
	}
	if divert {
		name := s.ownerName
		p.step(func() error { return p.t.divert("--add", name) }, "divert %s of package %s to %s%s", name, s.owner, name, OriginalSuffix)
	}
	at, realAt := p.t.at(s.path), p.t.at(s.real)
	if real && !s.twin {
		if s.realSt == nil {
			p.step(func() error { return second(at, realAt) }, "keep the real %s as %s", s.tool, s.real)
		} else {
			p.step(func() error {
				return replace(realAt, func(temp string) error { return second(at, temp) })
			}, "keep the real %s, which was replaced, as %s", s.tool, s.real)
		}
	}
	if real {
		p.otherNames(s)
	}
	tool := s.real
	if real {
		tool = s.path
	}
	uid, gid, mode := p.shimRights(tool)
	if s.shim && s.st.Mode() == mode && digest(at) == p.shimSum {
		return nil
	}
	verb := "put the shim at %s"
	if s.shim {
		verb = "renew the shim at %s"
	}
	p.step(func() error {
		return replace(at, func(temp string) error { return copyFile(p.shim, temp, uid, gid, mode) })
	}, verb, s.path)
	return nil
}

// errMoved: somebody moved the shim to a name beside it, docker.orig say, and put another
// docker in its place, which most likely starts the one that was found there. To take
// that for the new real tool would make a circle, and lose the real one.
type errMoved struct{ from, to string }

func (e *errMoved) Error() string { return e.finding() + ": " + e.do() }

func (e *errMoved) finding() string {
	return fmt.Sprintf("the shim at %s was moved to %s, and something else put in its place", e.from, e.to)
}

func (e *errMoved) do() string {
	return fmt.Sprintf("put it back (mv %[2]s %[1]s), or remove %[2]s if %[1]s is the real one", e.from, e.to)
}

// moved looks for the shim beside s.path, where another file stands now. It returns an
// *errMoved, or nil.
func (t tree) moved(s state) *errMoved {
	dir := path.Dir(s.path)
	entries, _ := os.ReadDir(t.at(dir))
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), s.tool)
		name := path.Join(dir, e.Name())
		if ok && rest != "" && strings.ContainsRune(".-_", rune(rest[0])) && name != s.real && e.Type().IsRegular() && IsShim(t.at(name)) {
			return &errMoved{s.path, name}
		}
	}
	return nil
}

// otherNames plans a real tool for each link of another name to s, which would be
// called by that name: the shim looks beside the link, because one shim may be linked
// to by several tools. Links of the same name it understands by itself.
func (p *planner) otherNames(s state) {
	for _, dir := range p.searchDirs() {
		entries, _ := os.ReadDir(p.t.at(dir))
		for _, e := range entries {
			link := path.Join(dir, e.Name())
			if e.Type()&os.ModeSymlink == 0 || e.Name() == s.tool || strings.HasSuffix(link, OriginalSuffix) || !p.t.trustedDir(dir) || p.t.exists(link+OriginalSuffix) {
				continue
			}
			if end, err := p.t.resolve(link); err != nil || end != s.path {
				continue
			}
			target := s.real
			if path.Dir(link) == path.Dir(s.path) {
				target = path.Base(s.real)
			}
			p.next.addFile(link+OriginalSuffix, "", target)
			p.step(func() error {
				return replace(p.t.at(link+OriginalSuffix), func(temp string) error { return os.Symlink(target, temp) })
			}, "let %s, a link to %s, start the real one", link, s.path)
		}
	}
}

// follow is stat(2) inside.
func (t tree) follow(p string) (fs.FileInfo, error) {
	end, err := t.resolve(p)
	if err != nil {
		return nil, err
	}
	return t.lstat(end)
}

// shimRights lets those start the shim who may start the real tool, and root alone
// write to it. Set-user-ID bits stay with the real one.
func (p *planner) shimRights(tool string) (uid, gid int, mode fs.FileMode) {
	uid, gid, mode = os.Geteuid(), os.Getegid(), 0o755
	st, err := p.t.follow(tool)
	if err != nil {
		return uid, gid, mode
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if ok && int(sys.Uid) == uid && st.Mode().Perm()&0o005 != 0o005 {
		gid, mode = int(sys.Gid), 0o500|st.Mode().Perm()&0o755
	}
	return uid, gid, mode
}

// hasRPM: packages here are RPM's.
func (t tree) hasRPM() bool { return t.exists("/usr/lib/sysimage/rpm") || t.exists("/var/lib/rpm") }
