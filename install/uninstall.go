package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ErrNothing is returned by Uninstall where there is nothing of ours.
var ErrNothing = errors.New("there is nothing of Tallyman's to remove")

// Uninstall plans the removal of what Install did, of half of it too, and of shims
// that were put in their places by hand. Each tool gets its real one back in one
// rename(2). Records, and files that were edited, stay unless Options.Purge is set.
func Uninstall(o Options) (*Plan, error) {
	p := &planner{o: o, t: newTree(o.Root)}
	var err error
	p.was, err = Load(o.Root)
	byHand := errors.Is(err, ErrNoManifest)
	if byHand {
		p.was, err = &Account{Schema: manifestSchema}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := p.giveBack(); err != nil {
		return nil, err
	}
	if byHand {
		// An install that was killed before it had written down anything left this at most.
		if temp := temporary(p.t.at(Manifest)); lexists(temp) {
			p.step(func() error { return removeIfThere(temp) }, "remove %s, which a run that was cut short left", filepath.Base(temp))
		}
		if len(p.Steps) == 0 {
			return nil, ErrNothing
		}
		// Whose these are nobody can say without the account.
		var stay []string
		for _, file := range []string{path.Dir(BinDir), Link, path.Dir(ConfigFile), StateDir, TmpfilesConf} {
			if p.t.exists(file) {
				stay = append(stay, file)
			}
		}
		if len(stay) > 0 {
			p.note("%s is not there, so only the tools are given back; what else is Tallyman's stays: rm -r %s", Manifest, strings.Join(stay, " "))
		}
		return &p.Plan, nil
	}
	p.removeFiles()
	p.removeDirs()
	p.step(func() error {
		temp := p.t.at(Manifest)
		if err := removeIfThere(temporary(temp)); err != nil {
			return err
		}
		return removeIfThere(temp)
	}, "remove %s", Manifest)
	// The folder of the manifest itself, in a root that had none.
	p.lastDirs()
	return &p.Plan, nil
}

// giveBack plans the return of the tools.
func (p *planner) giveBack() error {
	var places []Place
	places = append(places, p.was.Places...)
	tools := slices.Clone(p.o.Tools)
	if len(tools) == 0 {
		tools = []string{"docker"}
	}
	for _, tool := range tools {
		for _, s := range p.candidates(tool) {
			if s.shim && s.link == "" && p.was.place(s.path) == nil && (s.realSt != nil && !s.realShim || s.divertedToReal()) {
				places = append(places, Place{Path: s.path, Real: s.real, Diverted: s.divertedToReal() && s.diversion.Package == ""})
			}
		}
	}
	p.Notes = nil // what candidates notes is for those who install
	for _, place := range places {
		if err := p.giveBackOne(place); err != nil {
			return err
		}
	}
	return nil
}

func (p *planner) giveBackOne(place Place) error {
	s := p.t.look(place.Path)
	at, realAt := p.t.at(s.path), p.t.at(s.real)
	for _, temp := range []string{temporary(at), temporary(realAt)} {
		if lexists(temp) {
			p.step(func() error { return removeIfThere(temp) }, "remove %s, which a run that was cut short left", filepath.Base(temp))
		}
	}
	if s.st != nil && !s.shim && s.realSt != nil && !s.twin {
		if err := p.t.moved(s); err != nil {
			return err
		}
	}
	switch {
	case s.realShim:
		return fmt.Errorf("%s is a shim too, and there is no real %s to put back: put the real one at %s (by installing its package again, for example)", s.real, s.tool, s.path)
	case s.st != nil && !s.shim && s.realSt != nil && !s.twin && place.Diverted && s.divertedToReal():
		return fmt.Errorf("%s is not the shim any more, and %s is what its package installed: remove the one that is not wanted (rm %[1]s, or rm %[2]s), then run it again", s.path, s.real)
	case (s.st == nil || s.shim) && s.realSt != nil:
		script := p.t.script(s.real) != nil
		p.step(func() error { return giveBack(realAt, at, script) }, "put the real %s back at %s", s.tool, s.path)
		if script {
			p.step(func() error {
				time.Sleep(interpreterStarts)
				return removeIfThere(realAt)
			}, "remove %s", s.real)
		}
	case s.shim:
		p.note("the real %s at %s is gone, so nothing can be put back at %s", s.tool, s.real, s.path)
		p.step(func() error { return removeIfThere(at) }, "remove the shim at %s", s.path)
	case s.realSt != nil: // replaced by an upgrade, or the same file: the first step of an installation
		p.step(func() error { return removeIfThere(realAt) }, "remove %s: %s is the real %s", s.real, s.path, s.tool)
	}
	if place.Diverted && s.divertedToReal() {
		name := s.diversion.From
		p.step(func() error { return p.t.divert("--remove", name) }, "end the diversion of %s", name)
	}
	return nil
}

// interpreterStarts is the time in which an interpreter that the kernel has started has
// opened its script: it does so by the path, of docker.original while a shim stands
// before it.
const interpreterStarts = 50 * time.Millisecond

// giveBack puts the real tool at its path in one rename(2). With keep it stands at
// both afterwards, where the file system has hard links.
func giveBack(realAt, at string, keep bool) error {
	linked := false
	if keep {
		linked = replace(at, func(temp string) error { return os.Link(realAt, temp) }) == nil
	}
	if !linked {
		if err := os.Rename(realAt, at); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(at))
}

func lexists(outside string) bool {
	_, err := os.Lstat(outside)
	return err == nil
}

func removeIfThere(outside string) error {
	if err := os.Remove(outside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeFiles plans the end of the files that are as we made them.
func (p *planner) removeFiles() {
	files := slices.Clone(p.was.Files)
	// The program itself last: what is left to do needs it.
	slices.SortStableFunc(files, func(a, b File) int { return boolInt(a.Path == Program) - boolInt(b.Path == Program) })
	for _, f := range files {
		at := p.t.at(f.Path)
		if temp := temporary(at); lexists(temp) {
			p.step(func() error { return removeIfThere(temp) }, "remove %s, which a run that was cut short left", filepath.Base(temp))
		}
		if !p.t.exists(f.Path) {
			continue
		}
		if !p.o.Purge && !f.unchanged(at) {
			p.note("%s was changed since and stays (--purge removes it)", f.Path)
			continue
		}
		p.step(func() error { return removeIfThere(at) }, "remove %s", f.Path)
	}
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (f *File) unchanged(at string) bool {
	if f.Link != "" {
		target, err := os.Readlink(at)
		return err == nil && target == f.Link
	}
	return slices.Contains(f.SHA256, digest(at))
}

// removeDirs plans the end of our folders, where nothing is left in them.
func (p *planner) removeDirs() {
	if p.o.Purge {
		for _, d := range p.was.Data {
			if p.t.exists(d) {
				p.step(func() error { return p.removeAll(d) }, "remove %s and all records in it", d)
			}
		}
	}
	for _, d := range slices.Backward(p.was.Dirs) {
		data := slices.Contains(p.was.Data, d)
		if !p.t.exists(d) || holdsManifest(d) || data && p.o.Purge {
			continue
		}
		if entries, err := os.ReadDir(p.t.at(d)); err == nil && data && !p.onlyDirsOfOurs(d, entries) {
			p.note("%s holds records and stays (--purge removes it)", d)
			continue
		}
		p.step(func() error { _, err := p.t.removeDir(d); return err }, "remove the folder %s, if it is empty", d)
	}
}

// onlyDirsOfOurs: what is in a folder goes as well.
func (p *planner) onlyDirsOfOurs(dir string, entries []os.DirEntry) bool {
	for _, e := range entries {
		inner := path.Join(dir, e.Name())
		if !e.IsDir() || !slices.Contains(p.was.Dirs, inner) {
			return false
		}
		below, err := os.ReadDir(p.t.at(inner))
		if err != nil || !p.onlyDirsOfOurs(inner, below) {
			return false
		}
	}
	return true
}

// removeAll removes a folder that others can write to: os.RemoveAll goes by
// descriptors and follows no link below it; links above it are root's.
func (p *planner) removeAll(dir string) error {
	end, err := p.t.resolve(dir)
	if err != nil {
		return err
	}
	if end != dir {
		return fmt.Errorf("%s is a link now, and was a folder", dir)
	}
	return os.RemoveAll(p.t.at(dir))
}

// holdsManifest: dir is above the manifest.
func holdsManifest(dir string) bool { return strings.HasPrefix(Manifest, dir+"/") }

// lastDirs plans the end of the folders above the manifest, where they are ours.
func (p *planner) lastDirs() {
	for _, d := range slices.Backward(p.was.Dirs) {
		if holdsManifest(d) {
			p.step(func() error { _, err := p.t.removeDir(d); return err }, "remove the folder %s, if it is empty", d)
		}
	}
}
