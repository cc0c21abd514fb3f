// Package install puts the shim in a tool's place and takes it away again, and makes
// what else an installation is: programs, hook scripts, folders, configuration.
//
// A run looks at what there is and plans the steps that are missing; the same steps
// are shown by a dry run. Each step leaves a state that works and that the next run
// knows, so a run that was killed is completed by another one. In particular there
// is no moment without the tool. What a run does is written down beforehand, in an
// Account, by which Uninstall restores what was there.
//
// Nothing that is not ours is overwritten or removed: where something is in the way, the
// plan is an error that says what to do, and nothing has been done.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	hooks "github.com/tallyman-ci/tallyman/runner-image/hooks"
)

// Options say what to install and where. The zero value installs for docker on this
// system.
type Options struct {
	// Root is the folder of another file system, of an image for example; "" is this one's.
	Root string
	// Tools are names, looked for in Path, or absolute paths; none is docker, and those of
	// an earlier run.
	Tools []string
	// Path is the PATH of the runner; standard folders are looked at too.
	Path string
	// Binaries is the folder that holds tallyman and docker-shim, outside of Root.
	Binaries string
	// User owns the folders for records; "" is that of an earlier run, or runner.
	User string
	// FromPackage: the files of BinDir are a package's, and a tool may be missing.
	FromPackage bool
	// Purge removes records and edited files too (Uninstall only).
	Purge bool
}

// A Step is one change.
type Step struct {
	// Text says what it does, to be read after "will" or by itself.
	Text string
	do   func() error
}

// A Plan is what is missing.
type Plan struct {
	Steps []Step
	// Notes are what somebody should know of what is left as it is.
	Notes []string
}

// Run makes the steps, and says each of them when it is done. It stops at the first
// that cannot be done; the error names it. What was done stays, and works.
func (p *Plan) Run(ctx context.Context, say func(text string)) error {
	for _, s := range p.Steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.do(); err != nil {
			return explain(s.Text, err)
		}
		say(s.Text)
	}
	return nil
}

func explain(text string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%s: %w (free some space and run it again: what is done so far works)", text, err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s: %w (install into the image, or mount it writable)", text, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: %w (something is mounted there: mount it elsewhere, and name that place as real.TOOL in %s; uninstall takes back what is done so far)", text, err, ConfigFile)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w (run it as root; if you are, lsattr may show that the file or folder is immutable)", text, err)
	}
	return fmt.Errorf("%s: %w", text, err)
}

// ErrBusy is returned by Lock where another install or uninstall runs.
var ErrBusy = errors.New("another tallyman install or uninstall runs here")

// Lock keeps other installs and uninstalls of this root away. The lock goes with the
// process at the latest, and leaves no file behind.
func Lock(root string) (unlock func(), err error) {
	t := newTree(root)
	if st, err := os.Stat(t.at("/")); err != nil {
		return nil, fmt.Errorf("%w: name a folder that holds a file system with --root", err)
	} else if !st.IsDir() {
		return nil, fmt.Errorf("%s is no folder: name one that holds a file system with --root", root)
	}
	// flock(2) asks for no right but that of reading: a job could lock /var/lib and so keep
	// an upgrade away. /root is a folder that root alone can open.
	f, err := t.openPrivate("/root")
	if err != nil {
		dir := path.Dir(Manifest)
		for !t.exists(dir) {
			dir = path.Dir(dir)
		}
		if f, err = os.Open(t.at(dir)); err != nil {
			return nil, err
		}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrBusy
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// openPrivate opens a folder of the caller's that others cannot open.
func (t tree) openPrivate(dir string) (*os.File, error) {
	f, err := os.OpenFile(t.at(dir), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil {
		uid, gid := ids(st)
		if uid != os.Geteuid() || st.Mode().Perm()&0o004 != 0 || st.Mode().Perm()&0o040 != 0 && gid != os.Getegid() {
			err = fs.ErrPermission
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// planner makes a Plan.
type planner struct {
	Plan
	o         Options
	t         tree
	was, next *Account
	cfg       config.Config // the one that is there, or will be

	shim, shimSum string          // the source of shims, outside
	uid, gid      int             // of the folders for records
	records       map[string]bool // those folders, as far as a step makes them
}

func (p *planner) step(do func() error, text string, args ...any) {
	p.Steps = append(p.Steps, Step{fmt.Sprintf(text, args...), do})
}

func (p *planner) note(text string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(text, args...))
}

func (p *planner) place(place Place) {
	if have := p.next.place(place.Path); have != nil {
		*have = place
		return
	}
	p.next.Places = append(p.next.Places, place)
}

// Install plans an installation, an upgrade, or the rest of one. The plan of a whole
// one has no steps.
func Install(o Options) (*Plan, error) {
	p := &planner{o: o, t: newTree(o.Root), records: map[string]bool{}}
	var err error
	p.was, err = Load(o.Root)
	if errors.Is(err, ErrNoManifest) {
		p.was, err = &Account{Schema: manifestSchema}, nil
	}
	if err != nil {
		return nil, err
	}
	p.next = p.was.clone()
	for _, do := range []func() error{p.configured, p.owner, p.programs, p.hookScripts, p.writeConfig, p.folders, p.tools} {
		if err := do(); err != nil {
			return nil, err
		}
	}
	if !reflect.DeepEqual(p.was, p.next) || !p.t.exists(Manifest) {
		p.account()
	}
	return &p.Plan, nil
}

// account puts a step in front that writes down all that follows.
func (p *planner) account() {
	late := p.Steps
	p.Steps = nil
	dir := p.dirs(path.Dir(Manifest))
	next := p.next
	p.step(func() error {
		if err := dir(); err != nil {
			return err
		}
		data, err := next.encode()
		if err != nil {
			return err
		}
		return p.write(Manifest, data, 0o644)
	}, "write down in %s what is installed", Manifest)
	p.Steps = append(p.Steps, late...)
}

// write puts a file of ours in its place.
func (p *planner) write(file string, data []byte, mode fs.FileMode) error {
	return replace(p.t.at(file), func(temp string) error {
		return writeFile(temp, bytes.NewReader(data), os.Geteuid(), os.Getegid(), mode)
	})
}

// dirs plans folders of root's that are missing, and returns what makes them.
func (p *planner) dirs(dir string) (do func() error) {
	dir, err := p.t.resolve(dir)
	if err != nil {
		return func() error { return err }
	}
	var missing []string
	for d := dir; d != "/" && !p.t.exists(d) && !p.records[d]; d = path.Dir(d) {
		missing = append(missing, d)
	}
	slices.Reverse(missing)
	for _, d := range missing {
		p.next.addDir(d, false)
	}
	return func() error {
		for _, d := range missing {
			if err := p.t.makeDir(d, os.Geteuid(), os.Getegid(), 0o755); err != nil {
				return err
			}
		}
		return nil
	}
}

// configured reads the configuration that is there: its folders are to be made.
func (p *planner) configured() error {
	cfg, _, err := config.Load(p.t.at(ConfigFile), uint32(os.Geteuid()))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.cfg = config.Default()
		if !p.systemd() {
			p.cfg.RunDir, p.cfg.SpoolOnDisk = RunDirOnDisk, true
		}
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w (chown root:root and chmod 0644 it)", ConfigFile, err)
	}
	p.cfg = cfg
	return nil
}

// systemd: this system is one that systemd boots, with tmpfiles.d and a /run that is
// its own. Images are not.
func (p *planner) systemd() bool { return p.t.exists("/run/systemd/system") }

// owner finds whose the folders for records are.
func (p *planner) owner() error {
	name := p.o.User
	if name == "" {
		name = p.was.User
	}
	if name == "" {
		name = User
	}
	uid, gid, err := p.t.user(name)
	switch {
	case err == nil:
		p.uid, p.gid, p.next.User = uid, gid, name
	case p.o.User != "":
		return err
	default:
		p.uid, p.gid = os.Geteuid(), os.Getegid()
		p.note("there is no user %s, so the folders for records stay root's and an agent of another user cannot write: name the runner's user (--user NAME)", name)
	}
	return nil
}

// user finds a user by name or number in the root's own passwd.
func (t tree) user(name string) (uid, gid int, err error) {
	file, err := t.resolve("/etc/passwd")
	if err != nil {
		return 0, 0, err
	}
	data, err := os.ReadFile(t.at(file))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, 0, err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) >= 4 && (f[0] == name || f[2] == name) {
			uid, errUID := strconv.Atoi(f[2])
			gid, errGID := strconv.Atoi(f[3])
			return uid, gid, errors.Join(errUID, errGID)
		}
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 {
		return n, n, nil
	}
	return 0, 0, fmt.Errorf("there is no user %q in %s (name one, or a number, with --user)", name, t.at("/etc/passwd"))
}

// programs plans the two binaries, and finds the shim that is to stand in places.
func (p *planner) programs() error {
	p.shim = p.t.at(Shim)
	if !p.o.FromPackage && p.o.Binaries != "" {
		from, err := filepath.Abs(p.o.Binaries)
		if err != nil {
			return err
		}
		p.shim = filepath.Join(from, "docker-shim")
		if !IsShim(p.shim) {
			return fmt.Errorf("%s is not Tallyman's shim: name the folder that holds docker-shim and tallyman with --binaries", p.shim)
		}
		for _, to := range []string{Program, Shim} {
			if err := p.program(filepath.Join(from, path.Base(to)), to); err != nil {
				return err
			}
		}
	}
	if !IsShim(p.shim) {
		return fmt.Errorf("%s is not Tallyman's shim: install the package again", p.shim)
	}
	p.shimSum = digest(p.shim)
	if target := Program; !p.t.exists(Link) {
		dir := p.dirs(path.Dir(Link))
		p.next.addFile(Link, "", target)
		p.step(func() error {
			if err := dir(); err != nil {
				return err
			}
			return replace(p.t.at(Link), func(temp string) error { return os.Symlink(target, temp) })
		}, "link %s to %s", Link, target)
	} else if now, _ := os.Readlink(p.t.at(Link)); now != target {
		p.note("%s is there already and left as it is", Link)
	}
	return nil
}

func (p *planner) program(from, to string) error {
	st, err := os.Stat(from)
	if err != nil {
		return fmt.Errorf("%w: name the folder that holds docker-shim and tallyman with --binaries", err)
	}
	there, _ := os.Stat(p.t.at(to))
	if sameFile(st, there) {
		return nil // it was put there before, and whoever did so removes it
	}
	sum := digest(from)
	return p.file(to, sum, 0o755, func(temp string) error {
		return copyFile(from, temp, os.Geteuid(), os.Getegid(), 0o755)
	})
}

// file plans a file of ours that may be there in another version.
func (p *planner) file(to, sum string, mode fs.FileMode, make func(temp string) error) error {
	st, err := p.t.lstat(to)
	if err == nil && p.was.file(to) == nil && !p.madeByUs(to) {
		return fmt.Errorf("%s %w: move it away", to, errOccupied)
	}
	if err != nil || p.was.file(to) != nil {
		p.next.addFile(to, sum, "") // what somebody else put there, somebody else removes
	}
	if err == nil && st.Mode() == mode && digest(p.t.at(to)) == sum {
		return nil
	}
	dir := p.dirs(path.Dir(to))
	p.step(func() error {
		if err := dir(); err != nil {
			return err
		}
		return replace(p.t.at(to), make)
	}, "write %s", to)
	return nil
}

// madeByUs: a file that an image's author copied to its place, of whatever version.
func (p *planner) madeByUs(file string) bool {
	st, err := p.t.lstat(file)
	if err != nil || !st.Mode().IsRegular() {
		return false
	}
	data, err := os.ReadFile(p.t.at(file))
	return err == nil && bytes.Contains(data, []byte("tallyman"))
}

// hookScripts plans the two scripts, and those in the drop-in folders of images that
// have such.
func (p *planner) hookScripts() error {
	for _, h := range []struct {
		file, dropIn string
		text         []byte
	}{{HookStarted, DropInStarted, hooks.JobStarted}, {HookCompleted, DropInCompleted, hooks.JobCompleted}} {
		write := func(temp string) error {
			return writeFile(temp, bytes.NewReader(h.text), os.Geteuid(), os.Getegid(), 0o755)
		}
		if !p.o.FromPackage {
			if err := p.file(h.file, digestOf(h.text), 0o755, write); err != nil {
				return err
			}
		}
		if st, err := os.Stat(p.t.at(h.dropIn)); err == nil && st.IsDir() {
			if err := p.file(path.Join(h.dropIn, DropInName), digestOf(h.text), 0o755, write); err != nil {
				return err
			}
		}
	}
	return nil
}

const configHead = `# Tallyman's configuration: key = value. Without a line its default holds; the keys are
# in the README. Shim, hooks and agent read this file; a job cannot change it.
`

// tmpfiles is a tmpfiles.d(5) file: at each boot /run is empty.
const tmpfiles = `# Socket and spool of Tallyman's agent.
d %[1]s 0755 %[2]d %[3]d
d %[1]s/spool 1733 %[2]d %[3]d
`

// writeConfig plans a configuration where there is none. One that is there is never
// changed.
func (p *planner) writeConfig() error {
	if !p.t.exists(ConfigFile) {
		text := configHead
		if p.cfg.RunDir != RunDir {
			text += "\n# Not below /run, over which ARC's dind mode mounts a volume.\nrun_dir = " + p.cfg.RunDir +
				"\nspool_on_disk = " + strconv.FormatBool(p.cfg.SpoolOnDisk) + "\n"
		}
		if err := p.file(ConfigFile, digestOf([]byte(text)), 0o644, func(temp string) error {
			return writeFile(temp, strings.NewReader(text), os.Geteuid(), os.Getegid(), 0o644)
		}); err != nil {
			return err
		}
	}
	if p.systemd() && strings.HasPrefix(p.cfg.RunDir, "/run/") && (!p.t.exists(TmpfilesConf) || p.was.file(TmpfilesConf) != nil) {
		text := fmt.Sprintf(tmpfiles, p.cfg.RunDir, p.uid, p.gid)
		return p.file(TmpfilesConf, digestOf([]byte(text)), 0o644, func(temp string) error {
			return writeFile(temp, strings.NewReader(text), os.Geteuid(), os.Getegid(), 0o644)
		})
	}
	return nil
}

// folders plans the folders for records. Those that are there and none of ours are
// left as they are: doctor judges them.
func (p *planner) folders() error {
	for _, d := range []struct {
		path string
		mode uint32
	}{{p.cfg.StateDir, 0o755}, {p.cfg.RunDir, 0o755}, {p.cfg.Spool(), 0o1733}} {
		dir, err := p.t.resolve(d.path)
		if err != nil {
			return fmt.Errorf("%s: %w", d.path, err)
		}
		if st, err := p.t.lstat(dir); err == nil && (!slices.Contains(p.was.Dirs, dir) || !st.IsDir() || p.hasRights(st, d.mode)) {
			continue
		}
		above := p.dirs(path.Dir(dir))
		p.next.addDir(dir, true)
		p.records[dir] = true
		p.step(func() error {
			if err := above(); err != nil {
				return err
			}
			return p.t.makeDir(dir, p.uid, p.gid, d.mode)
		}, "make the folder %s, mode %o, of uid %d", dir, d.mode, p.uid)
	}
	return nil
}

func (p *planner) hasRights(st fs.FileInfo, mode uint32) bool {
	want := fs.FileMode(mode & 0o777)
	if mode&unix.S_ISVTX != 0 {
		want |= os.ModeSticky
	}
	uid, gid := ids(st)
	return st.Mode() == want|os.ModeDir && uid == p.uid && gid == p.gid
}

// tools plans the places of all tools.
func (p *planner) tools() error {
	tools := slices.Clone(p.o.Tools)
	for _, known := range p.was.Places {
		if !slices.Contains(tools, known.Path) && !slices.Contains(tools, path.Base(known.Path)) {
			tools = append(tools, path.Base(known.Path))
		}
	}
	if len(tools) == 0 {
		tools = []string{"docker"}
	}
	slices.Sort(tools)
	for _, tool := range slices.Compact(tools) {
		if strings.Contains(tool, "/") && !cleanPath(tool) || tool == "" || strings.HasSuffix(tool, OriginalSuffix) {
			return fmt.Errorf("--tool %q: want a name such as docker, or an absolute path", tool)
		}
		found := p.candidates(tool)
		if len(found) == 0 {
			if !p.o.FromPackage && (len(p.was.Places) == 0 || slices.Contains(p.o.Tools, tool)) {
				return fmt.Errorf("there is no %s to record the calls of: install it first, or name its path with --tool", tool)
			}
			p.note("there is no %s here: run tallyman install again when it is installed", tool)
		}
		for _, s := range found {
			if err := p.take(s); err != nil {
				return err
			}
		}
	}
	return nil
}
