package doctor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/install"
	"github.com/tallyman-ci/tallyman/internal/nearest"
	"github.com/tallyman-ci/tallyman/internal/procfs"
	"github.com/tallyman-ci/tallyman/wrapper"
)

// tool is the tool whose shim is looked for everywhere. Others are looked for where
// tallyman install put a shim.
const tool = "docker"

// candidate is a docker in PATH, or another tool.
type candidate struct {
	path string
	shim bool
}

// inPath finds every executable tool in a PATH, in order.
func inPath(path, tool string) (found []candidate, relative bool) {
	for _, dir := range filepath.SplitList(path) {
		if dir == "" || !filepath.IsAbs(dir) {
			relative = true
			continue
		}
		p := filepath.Join(dir, tool)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			found = append(found, candidate{p, isShim(p)})
		}
	}
	return found, relative
}

// isShim recognises our shim by the marker that is part of its binary. The real
// docker is forty megabytes; it is read in pieces.
func isShim(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	marker := []byte(wrapper.Marker)
	buf := make([]byte, 256<<10)
	kept := 0
	for {
		n, err := io.ReadFull(f, buf[kept:])
		if bytes.Contains(buf[:kept+n], marker) {
			return true
		}
		if err != nil {
			return false
		}
		kept = copy(buf, buf[len(buf)-len(marker):])
	}
}

// shims checks that the first docker in PATH is ours, for the runner and for sudo.
func (x *examination) shims() {
	const name = "shim"
	found, relative := inPath(x.env["PATH"], tool)
	for _, c := range found {
		if c.shim {
			x.shim = c.path
			break
		}
	}
	switch {
	case len(found) == 0 && x.othersOnly():
		return
	case x.shim == "" && x.othersOnly():
		x.add(Warn, name, found[0].path+" is not Tallyman's shim: its calls are not recorded, those of other tools are", "tallyman install --tool docker, as root, where they are wanted")
		return
	case len(found) == 0:
		x.add(Fail, name, "there is no docker in PATH", "install the docker CLI, and then run tallyman install as root (PATH is "+x.env["PATH"]+")")
		return
	case x.shim == "":
		x.add(Fail, name, found[0].path+" is not Tallyman's shim: no docker call is recorded",
			"tallyman install, as root: it takes that place, and diverts it where a package owns it")
		return
	case x.shim != found[0].path:
		x.add(Fail, name, fmt.Sprintf("%s comes before Tallyman's shim %s in PATH: calls are not recorded", found[0].path, x.shim),
			"put "+filepath.Dir(x.shim)+" first in the runner's PATH, or take its place too: tallyman install --tool "+found[0].path)
	case relative:
		x.add(Warn, name, x.shim+" is the first docker in PATH, but PATH has a relative folder: a docker in the working folder may come before it",
			"take empty and relative folders out of the runner's PATH")
	default:
		x.ok(name, "%s is Tallyman's shim, and the first docker in PATH", x.shim)
	}
	if err := hook.CheckOwned(x.shim); err != nil {
		x.add(Warn, "shim owner", err.Error(), "a job could put its own docker there and hide its calls: let root own the shim and the folders above it")
	}
	x.sudoPath()
	x.packaged()
}

// othersOnly: the installation was told to take other tools, and not docker.
func (x *examination) othersOnly() bool {
	account, err := install.Load(x.in.Root)
	return err == nil && len(account.Places) > 0 && !slices.ContainsFunc(account.Places, func(p install.Place) bool { return filepath.Base(p.Path) == tool })
}

// sudoPath checks the docker that `sudo docker` finds: sudo sets PATH anew.
func (x *examination) sudoPath() {
	const name = "sudo"
	data, err := os.ReadFile(x.in.Sudoers)
	if err != nil {
		return // no sudo, or not ours to read
	}
	for line := range strings.Lines(string(data)) {
		_, value, ok := strings.Cut(line, "secure_path")
		if !ok || strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		value = strings.Trim(strings.TrimLeft(strings.TrimSpace(value), "= \t"), `"`)
		if found, _ := inPath(value, tool); len(found) > 0 && !found[0].shim {
			x.add(Warn, name, "`sudo docker` runs "+found[0].path+", which is not Tallyman's shim",
				"put "+filepath.Dir(x.shim)+" first in secure_path of "+x.in.Sudoers)
		} else if len(found) > 0 {
			x.ok(name, "`sudo docker` runs the shim %s", found[0].path)
		}
		return
	}
}

// packaged checks that an upgrade of the docker package will not put its own file
// in the shim's place.
func (x *examination) packaged() {
	owner, name := install.Owner(x.in.Dpkg, x.shim)
	if owner == "" {
		return
	}
	if d, ok := install.DiversionOf(x.in.Dpkg, x.shim); ok && d.Package == "" {
		x.ok("package", "%s of package %s is diverted to %s: an upgrade leaves the shim alone", name, owner, d.To)
		return
	}
	x.add(Warn, "package", "package "+owner+" owns "+name+": its next upgrade overwrites the shim",
		"tallyman install, as root, which diverts it; by hand: dpkg-divert --local --no-rename --divert "+name+".original --add "+name)
}

// installation checks all that tallyman install says it did. Where something else
// brought the shim (the carrier, somebody's Dockerfile) there is no account of it.
func (x *examination) installation() {
	const name = "installation"
	account, problems, err := install.Verify(x.in.Root, x.cfg.Real)
	switch {
	case errors.Is(err, install.ErrNoManifest):
		return
	case err != nil:
		x.add(Warn, name, err.Error(), "run the tallyman that was installed last; it alone can undo that installation")
		return
	}
	for _, p := range problems {
		result := Warn
		if p.Serious {
			result = Fail
		}
		x.add(result, name, p.Finding, p.Do)
	}
	if len(problems) == 0 {
		x.ok(name, "all that tallyman install put here is as it was (shims: %d, files: %d)", len(account.Places), len(account.Files))
	}
	seen := map[string]bool{tool: true}
	for _, p := range account.Places {
		if other := filepath.Base(p.Path); !seen[other] {
			seen[other] = true
			x.otherTool(other)
		}
	}
}

// otherTool checks that the first podman in PATH is ours too.
func (x *examination) otherTool(tool string) {
	found, _ := inPath(x.env["PATH"], tool)
	switch {
	case len(found) == 0: // said by installation where it matters
	case !found[0].shim:
		x.add(Fail, "shim "+tool, found[0].path+" is not Tallyman's shim, and the first "+tool+" in PATH: calls are not recorded",
			"take its place too: tallyman install --tool "+found[0].path)
	default:
		x.ok("shim "+tool, "%s is Tallyman's shim, and the first %s in PATH", found[0].path, tool)
		if err := hook.CheckOwned(found[0].path); err != nil {
			x.add(Warn, "shim owner", err.Error(), "a job could put its own "+tool+" there and hide its calls: let root own the shim and the folders above it")
		}
	}
}

// configuration finds and reads the configuration file as the shim does.
func (x *examination) configuration() {
	const name = "configuration"
	paths := []string{x.in.ConfigPath}
	if x.in.ConfigPath == "" {
		paths = []string{config.DefaultPath}
		if x.shim != "" {
			paths = append([]string{filepath.Join(filepath.Dir(x.shim), config.FileName)}, paths...)
		}
	}
	var owner uint32
	if st, err := os.Stat(x.shim); err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			owner = sys.Uid
		}
	}
	x.file = paths[len(paths)-1]
	for _, path := range paths {
		cfg, problems, err := config.Load(path, owner)
		if !errors.Is(err, fs.ErrNotExist) {
			x.file = path
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case errors.Is(err, config.ErrUntrusted):
			x.add(Fail, name, path+" is "+err.Error()+". The shim records nothing while it is like that",
				"chown root:root "+path+" && chmod 0644 "+path)
		case errors.Is(err, fs.ErrPermission):
			x.add(Fail, name, fmt.Sprintf("uid %d may not read %s. The shim records nothing of this user", x.uid, path), "chmod 0644 "+path)
		case err != nil:
			x.add(Fail, name, fmt.Sprintf("%s cannot be read: %v. The shim records nothing while it is like that", path, err), "repair or remove the file")
		default:
			x.cfg = cfg
			x.keys(name, path, problems)
		}
		x.sameConfiguration(path)
		return
	}
	if x.in.ConfigPath != "" {
		x.add(Warn, name, "there is no "+x.in.ConfigPath+"; the defaults hold", "write the file, or leave out --config")
		return
	}
	x.ok(name, "no file at %s; the defaults hold", config.DefaultPath)
	x.sameConfiguration(config.DefaultPath)
}

// sameConfiguration checks that shim and agent read one file: each looks beside
// itself first.
func (x *examination) sameConfiguration(shims string) {
	if agents := x.in.AgentConfig; x.in.ConfigPath == "" && agents != "" && agents != shims && !sameFile(agents, shims) {
		x.add(Warn, "one configuration", "the shim reads "+shims+", but the agent and the hooks read "+agents,
			"keep one file at "+config.DefaultPath+", or put shim, tallyman and "+config.FileName+" into one folder")
	}
}

func (x *examination) keys(name, path string, problems []config.Problem) {
	if len(problems) == 0 {
		x.ok(name, "%s is read", path)
		return
	}
	var known []string
	for _, k := range config.Keys() {
		if !strings.HasSuffix(k.Name, ".") {
			known = append(known, k.Name)
		} else {
			known = append(known, k.Name+tool)
		}
	}
	var said []string
	for _, p := range problems {
		text := fmt.Sprintf("line %d, %s: %s", p.Line, p.Key, p.Text)
		if near := nearest.Word(p.Key, known); near != "" && !slices.Contains(known, p.Key) {
			text += " (did you mean " + near + "?)"
		}
		said = append(said, text)
	}
	x.add(Warn, name, path+" has lines that are not used: "+strings.Join(said, "; "), "correct them; the other lines are in force")
}

// realBinary checks what the shim will start.
func (x *examination) realBinary() {
	const name = "real docker"
	if x.shim == "" {
		return
	}
	real, from := x.cfg.Real[tool], "real."+tool+" in the configuration"
	if real == "" {
		real, from = x.shim+".original", "the file beside the shim"
		// The shim looks there next, where its path is a link of the same name.
		if target, err := filepath.EvalSymlinks(x.shim); err == nil && !fileExists(real) && filepath.Base(target) == tool && fileExists(target+".original") {
			real = target + ".original"
		}
	}
	st, err := os.Stat(real)
	set := "put the real docker at " + real + ", or set real." + tool + " in " + x.file
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.add(Fail, name, fmt.Sprintf("%s (%s) is not there: every docker call ends with exit code 127", real, from), set)
	case err != nil:
		x.add(Fail, name, fmt.Sprintf("%s (%s): %v", real, from, err), set)
	case !st.Mode().IsRegular() || unix.Faccessat(unix.AT_FDCWD, real, unix.X_OK, unix.AT_EACCESS) != nil:
		x.add(Fail, name, fmt.Sprintf("%s (%s) is no executable file (mode %v): every docker call ends with exit code 126", real, from, st.Mode()), "chmod 0755 "+real)
	case sameFile(real, x.shim) || isShim(real):
		x.add(Fail, name, fmt.Sprintf("%s (%s) is Tallyman's shim itself: every docker call ends with exit code 126", real, from), set)
	default:
		x.ok(name, "the shim starts %s", real)
	}
}

// installed checks who may replace the program that the hooks start, and the files
// that the configuration pins.
func (x *examination) installed() {
	if x.in.Program != "" {
		if err := hook.CheckOwned(x.in.Program); err != nil {
			x.add(Warn, "program owner", err.Error(), "a job could put its own program there for the hooks of the next: let root own it and the folders above it")
		}
	}
	if len(x.cfg.Pins) == 0 {
		return
	}
	var all []hook.Pin
	for _, p := range x.cfg.Pins {
		all = append(all, hook.Pin(p))
	}
	if problems := hook.CheckPins(all); len(problems) > 0 {
		x.add(Fail, "pinned files", strings.Join(problems, "; "), "find out who changed them, and install them again; after an upgrade of your own, pin what sha256sum prints now")
		return
	}
	x.ok("pinned files", "%d files are what was installed", len(all))
}

func sameFile(a, b string) bool {
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// switches checks what turns the account off.
func (x *examination) switches() {
	const name = "switch"
	env, where := x.runnerEnvironment()
	switch off := x.cfg.Off(); {
	case !x.cfg.Enabled:
		x.add(Warn, name, "enabled = false in the configuration: nothing is recorded", "remove the line to record again")
	case fileExists(x.in.OffPath):
		x.add(Warn, name, "the kill switch "+x.in.OffPath+" is there: nothing is recorded", "remove the file to record again")
	case hook.TurnsOff(env["TALLYMAN"]):
		x.add(Warn, name, "TALLYMAN="+env["TALLYMAN"]+" in "+where+": in the runner's, it turns recording off", "take it out of the pod's environment to record again")
	case fileExists(off):
		why, _ := os.ReadFile(off)
		x.add(Warn, name, strings.TrimSpace(off+" is there: nothing is recorded ("+strings.TrimSpace(string(why[:min(len(why), 200)])))+")",
			"the job-started hook made it because of a kill switch or the canary, and removes it before the next job when that is over")
	case x.cfg.Canary < 100:
		x.ok(name, "on for %d %% of runners, chosen by their names", x.cfg.Canary)
	default:
		x.ok(name, "on")
	}
}

// startedVariable names the hook that starts the agent.
const startedVariable = "ACTIONS_RUNNER_HOOK_JOB_STARTED"

// hooks checks the two hooks of the runner, in the environment of a running runner
// where there is one that can be read.
func (x *examination) hooks() {
	env, where := x.runnerEnvironment()
	x.runnerPath(env["PATH"], where)
	for _, h := range []struct{ name, variable, without string }{
		{"hook job-started", startedVariable, "records are attributed by the callers' environment only, and no hook starts an agent"},
		{"hook job-completed", "ACTIONS_RUNNER_HOOK_JOB_COMPLETED", "at a job's end nothing is flushed to the sinks, and no summary is written"},
	} {
		path := env[h.variable]
		if path == "" {
			x.add(Warn, h.name, h.variable+" is not set in "+where+": "+h.without,
				"set it to Tallyman's hook script in the image (ENV), the pod, or .env in the runner's folder")
			continue
		}
		if problem, do := hookFile(path); problem != "" {
			x.add(Fail, h.name, path+" "+problem, do)
		} else if err := hook.CheckOwned(path); err != nil {
			x.add(Warn, h.name, err.Error(), "a job could change what the next job's hook does: let root own the script and the folders above it")
		} else {
			x.ok(h.name, "%s (from %s)", path, where)
		}
	}
	for _, h := range []struct{ name, variable, key, set string }{
		{"chained job-started", "TALLYMAN_CHAIN_JOB_STARTED", "chain_started", x.cfg.ChainStarted},
		{"chained job-completed", "TALLYMAN_CHAIN_JOB_COMPLETED", "chain_completed", x.cfg.ChainCompleted},
	} {
		path, from := h.set, h.key
		if v := env[h.variable]; v != "" {
			path, from = v, h.variable
		}
		if path != "" {
			x.chainedHook(h.name, path, from)
		}
	}
}

// chainedHook checks a hook that our script starts in turn: its exit code is its own.
func (x *examination) chainedHook(name, path, from string) {
	const fails = ": it fails every job, as it would without Tallyman"
	st, err := os.Stat(path)
	needs, mode := "may not run it", fs.FileMode(0o111)
	extension := filepath.Ext(path)
	pwsh, _ := inPath(x.env["PATH"], "pwsh")
	if extension == ".sh" || extension == ".ps1" { // the shell reads it
		needs, mode = "may not read it", 0o444
	}
	switch {
	case !filepath.IsAbs(path):
		x.add(Warn, name, path+" (from "+from+") is no absolute path and is not started: the working folder is the job's", "write the whole path")
	case errors.Is(err, fs.ErrNotExist):
		x.add(Fail, name, path+" (from "+from+") is not there"+fails, "install it again, or take "+from+" away")
	case err != nil:
		x.add(Fail, name, err.Error()+fails, "make the file and the folders above it readable for the runner's user")
	case !st.Mode().IsRegular():
		x.add(Fail, name, path+" (from "+from+") is no file"+fails, "name a script or a program")
	case extension == ".js" && !startsWith(path, "#!"):
		x.add(Fail, name, path+" (from "+from+") is started as a program, without the node that the runner brings: it fails every job",
			"give it a first line #!/usr/bin/env node, or name a .sh that starts node with it")
	case extension == ".ps1" && len(pwsh) == 0:
		x.add(Fail, name, path+" (from "+from+") needs pwsh, which is not in PATH"+fails, "install PowerShell, or name a .sh")
	case st.Mode().Perm()&mode != mode:
		x.add(Fail, name, fmt.Sprintf("%s (from %s) has mode %v: the runner's user %s%s", path, from, st.Mode().Perm(), needs, fails), "chmod 0755 "+path)
	default:
		if err := hook.CheckOwned(path); err != nil {
			x.add(Warn, name, err.Error(), "a job could change what the next job's hook does: let root own the script and the folders above it")
			return
		}
		x.ok(name, "%s (from %s)", path, from)
	}
}

func startsWith(path, text string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, len(text))
	_, err = io.ReadFull(f, head)
	return err == nil && string(head) == text
}

// runnerPath checks the docker that a running runner finds, where its PATH is another
// one than that of who asks.
func (x *examination) runnerPath(path, where string) {
	if path == "" || path == x.env["PATH"] {
		return
	}
	const name = "runner's PATH"
	found, _ := inPath(path, tool)
	switch {
	case len(found) == 0 || x.shim == "" && x.othersOnly():
	case !found[0].shim:
		x.add(Fail, name, fmt.Sprintf("%s is not Tallyman's shim, and the first docker in %s: calls are not recorded", found[0].path, where),
			"take its place too: tallyman install --tool "+found[0].path)
	default:
		x.ok(name, "%s is Tallyman's shim, and the first docker in %s", found[0].path, where)
	}
}

// hookFile says what the runner would stumble over (actions/runner,
// HostContext.cs and JobHookProvider.cs: the extension decides, a missing file
// fails the job, and the path is not quoted).
func hookFile(path string) (problem, do string) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "is not there: the runner fails every job", "install the script, or unset the variable"
	case err != nil:
		return err.Error(), "make the script readable for the runner's user"
	case !st.Mode().IsRegular():
		return "is no file: the runner fails every job", "name a script"
	case !strings.HasSuffix(path, ".sh"):
		return "does not end in .sh: the runner fails every job", "rename it; the runner chooses the shell by the extension"
	case strings.ContainsAny(path, " \t"):
		return "has a space in its path, which the runner does not quote", "move the script"
	case st.Mode().Perm()&0o444 != 0o444:
		return fmt.Sprintf("has mode %v: the runner's user may not read it", st.Mode().Perm()), "chmod 0755 " + path
	}
	data, err := os.ReadFile(path)
	switch {
	case err != nil:
		return err.Error(), "make the script readable for the runner's user"
	case bytes.Contains(data, []byte("\r\n")):
		return "has Windows line ends (CR LF): bash cannot run it", "sed -i 's/\\r$//' " + path
	case !bytes.HasPrefix(data, []byte("#!")):
		return "does not begin with #!: it was cut, or is no script", "install it again"
	case !bytes.Contains(data, []byte("tallyman")):
		if found, problem, do := dropIn(path, data); found {
			return problem, do
		}
		return "is not Tallyman's hook and does not call it", "call `tallyman hook job-started` or `job-completed` from it, or set chain_started or chain_completed and use our script"
	}
	return "", ""
}

// dropIn looks for our script beside a hook that runs every file of a folder of its own
// name, as job-started.sh and job-started.d of ARC's older images.
func dropIn(path string, hook []byte) (found bool, problem, do string) {
	dir := strings.TrimSuffix(path, ".sh") + ".d"
	if !bytes.Contains(hook, []byte(filepath.Base(dir))) {
		return false, "", ""
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return false, "", ""
	}
	for _, f := range files {
		name := filepath.Join(dir, f.Name())
		st, err := os.Stat(name)
		if err != nil || !st.Mode().IsRegular() {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(data, []byte("tallyman")) {
			continue
		}
		if st.Mode().Perm()&0o111 == 0 {
			return true, fmt.Sprintf("runs %s, which has mode %v: the runner fails every job", name, st.Mode().Perm()), "chmod 0755 " + name
		}
		return true, "", ""
	}
	return false, "", ""
}

// runnerEnvironment finds the environment of the runner: that of a Worker or
// Listener that runs now, and the .env file that the Listener reads. In a job, it is
// the job's own runner's. Of either only our own variables and those of the hooks are
// looked at; a runner's environment holds secrets. Runners in containers are passed
// over: their paths lead elsewhere.
func (x *examination) runnerEnvironment() (env map[string]string, where string) {
	running, _ := filepath.Glob(filepath.Join(x.in.Proc, "[0-9]*"))
	dirs := append(x.ancestors(), running...)
	ours, _ := os.Readlink(filepath.Join(x.in.Proc, "self/ns/mnt"))
	for _, comm := range []string{"Runner.Worker", "Runner.Listener"} {
		for _, dir := range dirs {
			name, err := os.ReadFile(filepath.Join(dir, "comm"))
			if err != nil || strings.TrimSpace(string(name)) != comm {
				continue
			}
			if theirs, err := os.Readlink(filepath.Join(dir, "ns/mnt")); err == nil && ours != "" && theirs != ours {
				continue
			}
			data, err := os.ReadFile(filepath.Join(dir, "environ"))
			if err != nil {
				continue // another user's runner
			}
			env := environment(strings.Split(string(data), "\x00"))
			if exe, err := os.Readlink(filepath.Join(dir, "exe")); err == nil {
				dotEnv, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(exe)), ".env"))
				if err == nil {
					for k, v := range environment(strings.Split(strings.ReplaceAll(string(dotEnv), "\r\n", "\n"), "\n")) {
						if env[k] == "" {
							env[k] = v
						}
					}
				}
			}
			return env, fmt.Sprintf("the environment of %s, pid %s", comm, filepath.Base(dir))
		}
	}
	return x.env, "this environment (no runner that can be looked into runs here)"
}

// ancestors are the folders in /proc of the processes that this one descends from, the
// nearest first.
func (x *examination) ancestors() (dirs []string) {
	for dir := filepath.Join(x.in.Proc, "self"); len(dirs) < 64; dirs = append(dirs, dir) {
		st, err := procfs.ReadIn(dir)
		if err != nil || st.Parent == 0 {
			break
		}
		dir = filepath.Join(x.in.Proc, strconv.Itoa(st.Parent))
	}
	return dirs
}
