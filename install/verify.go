package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// A Problem is something of an installation that is not as the account of it says.
type Problem struct {
	// Path is the file that it is about.
	Path string
	// Serious: calls fail or are not recorded. Else they will be, after an upgrade say.
	Serious bool
	// Finding says what was found, and Do what to do about it.
	Finding, Do string
}

// again is what repairs nearly everything.
const again = "tallyman install, as root"

// Verify compares what is there with the account. real are the real tools that the
// configuration names, by the tool's name. It changes nothing and needs no rights: what
// the caller may not read is passed over. The errors are those of Load.
func Verify(root string, real map[string]string) (*Account, []Problem, error) {
	a, err := Load(root)
	if err != nil {
		return nil, nil, err
	}
	t := newTree(root)
	var found []Problem
	for _, p := range a.Places {
		found = append(found, t.verifyPlace(p, real)...)
	}
	for _, f := range a.Files {
		if problem, ok := t.verifyFile(f); !ok {
			found = append(found, problem)
		}
	}
	return a, found, nil
}

func (t tree) verifyPlace(p Place, real map[string]string) (found []Problem) {
	s := t.look(p.Path)
	add := func(serious bool, do, finding string, args ...any) {
		found = append(found, Problem{p.Path, serious, fmt.Sprintf(finding, args...), do})
	}
	realPath := s.real
	if named := real[s.tool]; named != "" {
		realPath = named
	}
	_, realErr := t.follow(realPath)
	switch {
	case !t.readable(p.Path):
		return nil
	case s.st == nil && s.realSt == nil:
		return nil // the tool was removed, and whoever installs it again is taken then
	case s.st == nil:
		add(true, again, "there is no %s at %s, where a shim was; the real one is at %s", s.tool, s.path, s.real)
	case !s.shim && t.moved(s) != nil:
		moved := t.moved(s)
		add(true, moved.do(), "%s", moved.finding())
	case !s.shim:
		add(true, again, "%s is not the shim any more: it was replaced, and its calls are not recorded", s.path)
	case errors.Is(realErr, fs.ErrNotExist):
		add(true, "install "+s.tool+" again, or remove the shim: tallyman uninstall", "%s is the shim, and the real %s at %s is gone: each call ends with exit code 127", s.path, s.tool, realPath)
	case s.realShim && realPath == s.real:
		add(true, "put the real "+s.tool+" there (by installing its package again, for example)", "%s is the shim too, so there is no real %s", s.real, s.tool)
	default:
		if built, now := digest(t.at(Shim)), digest(t.at(s.path)); built != "" && now != "" && built != now {
			add(false, again, "the shim at %s is of another version than %s", s.path, Shim)
		}
	}
	if s.owner != "" && !s.diverted {
		add(false, again, "package %s owns %s, and nothing diverts it: the package's next upgrade overwrites the shim", s.owner, s.ownerName)
	}
	return found
}

// readable: the caller may look at what is there, or there is nothing.
func (t tree) readable(p string) bool {
	err := unix.Faccessat(unix.AT_FDCWD, t.at(p), unix.R_OK, unix.AT_EACCESS)
	return err == nil || errors.Is(err, fs.ErrNotExist)
}

// verifyFile looks at programs, scripts and links; configuration is there to be edited.
func (t tree) verifyFile(f File) (problem Problem, ok bool) {
	at := t.at(f.Path)
	st, err := os.Lstat(at)
	switch {
	case f.Path == ConfigFile || f.Path == TmpfilesConf || errors.Is(err, fs.ErrPermission):
		return Problem{}, true
	case err != nil:
		// Without its script a hook variable fails every job.
		hook := path.Ext(f.Path) == ".sh"
		return Problem{f.Path, hook || path.Dir(f.Path) == BinDir, f.Path + " is gone", again}, false
	case f.Link == "" && st.Mode().IsRegular() && digest(at) == "", f.unchanged(at):
		return Problem{}, true
	}
	return Problem{f.Path, false, f.Path + " is not what tallyman install put there", "find out who changed it; move it away and run " + again}, false
}
