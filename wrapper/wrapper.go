// Package wrapper is the shim that stands in a tool's place: it describes the call in
// one record, hands the record over, and becomes the real tool by execve(2). It
// forks nothing, waits for nothing but a bounded acknowledgement, and adds nothing
// to what the tool sees: arguments (argv[0] too), environment, descriptors, signals
// and terminal are those of a direct call.
//
// Whatever happens while recording, the tool runs: every error there is counted
// where it can be counted, and otherwise forgotten. The shim speaks only where the
// tool cannot be started, on standard error, in one line.
//
// The package's dependencies are a promise, checked by a test: the docker command
// of every job starts with them.
package wrapper

import (
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
)

// Marker is part of every shim's binary; tallyman doctor knows a shim by it.
const Marker = "tallyman-docker-shim/1"

// Exit codes where the real tool cannot be started, as shells use them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// Main runs the shim and returns only where the real tool could not be started, with
// the exit code to end with.
func Main(args, environ []string) int {
	c := start{args: args, environ: environ}
	c.prepare()
	if c.real == "" {
		c.real = execFilename() + ".original" // prepare failed before it knew better
	}
	c.record()
	if c.problem != errnoSelf {
		// Also where looking at it failed: the kernel has the last word.
		c.problem = execReal(c.real, args, c.environ)
	}
	if c.problem == syscall.ENOENT && c.gaveBack() {
		c.real = c.self.path
		c.problem = execReal(c.real, args, c.environ)
	}
	return refuse(c.real, c.self, c.problem)
}

// start is one call of the shim, on its way to the start of the real tool.
type start struct {
	args, environ []string

	self    self
	cfg     config.Config
	trusted bool   // cfg is what the installation says, or there is none
	real    string // path of the real tool
	problem syscall.Errno
}

// prepare finds what to start. A panic in here is a defect that must not keep the
// tool from starting.
func (c *start) prepare() {
	c.cfg = config.Default()
	defer func() {
		if recover() != nil {
			c.trusted = false
			countInternalError(&c.cfg)
		}
	}()
	secure := isSecure()
	c.self = findSelf(c.args)
	if secure {
		c.environ = c.self.dropMistakenPrivileges(c.environ)
	}
	c.cfg, c.trusted = loadConfig(c.self, secure)
	c.real = c.findReal()
	c.problem = checkReal(c.real, c.self)
	if c.problem == syscall.ENOENT && c.gaveBack() {
		c.real = c.self.path
		c.problem = checkReal(c.real, c.self)
	}
}

// findReal finds the real tool. Where none stands beside the path of the call, that path
// may be a link to the shim in another folder, or the shim itself that a job has
// moved out of the way of a docker of its own: then it stands where the shim was
// installed.
func (c *start) findReal() string {
	if real := c.cfg.Real[c.self.tool]; real != "" {
		return real
	}
	beside := c.self.path + ".original"
	if exists(beside) {
		return beside
	}
	var buf [4096]byte
	if n, err := syscall.Readlink("/proc/self/exe", buf[:]); err == nil && n > 0 {
		// Of the same name only: podman may be a link to the shim, and is not docker.
		if real := string(buf[:n]) + ".original"; strings.HasSuffix(string(buf[:n]), "/"+c.self.tool) && exists(real) {
			return real
		}
	}
	if tool := nameBefore(c.self.tool); tool != "" {
		real := c.cfg.Real[tool]
		if real == "" {
			real = c.self.path[:len(c.self.path)-len(c.self.tool)] + tool + ".original"
		}
		if exists(real) {
			c.self.tool = tool
			return real
		}
	}
	return beside
}

// gaveBack tells whether the shim was uninstalled since this process was started: then
// the real tool has its own path again.
func (c *start) gaveBack() bool {
	var st syscall.Stat_t
	return c.self.ok && c.cfg.Real[c.self.tool] == "" && strings.HasPrefix(c.self.path, "/") && syscall.Stat(c.self.path, &st) == nil &&
		(st.Dev != c.self.st.Dev || st.Ino != c.self.st.Ino)
}

// nameBefore returns docker for docker.orig, docker-real and whatever else people call
// a program that they put another in the place of, and "" for other names.
func nameBefore(name string) string {
	i := strings.LastIndexAny(name, ".-_")
	if i <= 0 {
		return ""
	}
	switch name[i+1:] {
	case "orig", "org", "original", "real", "old", "bak", "backup", "distrib", "wrapped", "bin":
		return name[:i]
	}
	return ""
}

// record describes the call and hands the record over, where this is switched on. A
// panic in here is a defect that costs one record, never the call.
func (c *start) record() {
	defer func() {
		if recover() != nil {
			countInternalError(&c.cfg)
		}
	}()
	if !c.trusted || !c.cfg.Enabled || exists(config.OffPath) {
		return
	}
	t := handover.Target{Socket: c.cfg.Socket(), Spool: c.cfg.Spool(), SpoolMaxBytes: c.cfg.SpoolMaxBytes, SpoolOnDisk: c.cfg.SpoolOnDisk}
	hang := handover.MayHang(c.cfg.RunDir, c.cfg.RunDir, t.Spool)
	t.NoSocket, t.NoSpool = hang[0], hang[0] || hang[1]
	if !hang[0] && exists(c.cfg.Off()) {
		return
	}
	deliver(t, c.self, c.args, c.environ, c.problem, c.cfg.RecordArgv)
}

func countInternalError(cfg *config.Config) {
	defer func() { recover() }() // it may be the counting that is defective
	handover.CountInternalError(cfg.Spool())
}

// errnoSelf stands for a real binary that is the shim itself, errnoInterpreter for one
// that is there and whose interpreter is not, which execve(2) tells as ENOENT too.
const (
	errnoSelf        = syscall.ELOOP
	errnoInterpreter = syscall.ELIBACC
)

// refuse says in one line why the real tool does not run.
func refuse(real string, self self, errno syscall.Errno) int {
	code, text, hint := exitNotExecutable, errno.Error(), ""
	switch errno {
	case errnoInterpreter:
		text = "its interpreter or loader is missing"
	case syscall.ENOENT, syscall.ENOTDIR:
		code = exitNotFound
		hint = "; reinstall Tallyman, or set real." + self.tool + " in " + config.DefaultPath
	case errnoSelf:
		hint = "; it is Tallyman's shim itself: set real." + self.tool + " in " + config.DefaultPath
	}
	line := "tallyman: cannot start the real " + self.tool + " at " + real + ": " + text + hint + " (" + Marker + ")\n"
	syscall.Write(2, []byte(record.Clean(line[:len(line)-1], 1024)+"\n"))
	return code
}

// self is the shim's own identity.
type self struct {
	path string // absolute path by which it was called, links in folders resolved by nobody
	tool string // last part of path: docker, podman, ...
	st   syscall.Stat_t
	ok   bool // st is known
}

// findSelf finds the path that the caller executed. The kernel leaves it in the
// auxiliary vector (AT_EXECFN, getauxval(3)); unlike argv[0] the caller cannot choose
// it freely, and unlike /proc/self/exe it needs no /proc and keeps the name of a
// link, by which one shim can stand for several tools.
func findSelf(args []string) self {
	s := self{path: executedPath(args)}
	s.tool = s.path[strings.LastIndexByte(s.path, '/')+1:]
	s.ok = syscall.Stat("/proc/self/exe", &s.st) == nil || syscall.Stat(s.path, &s.st) == nil
	return s
}

// isSecure tells whether execve(2) gave privileges that the caller's real ids do not
// have (AT_SECURE, getauxval(3)).
func isSecure() bool {
	const atSecure = 23
	auxv := getAuxv()
	for i := 0; i+1 < len(auxv); i += 2 {
		if auxv[i] == atSecure {
			return auxv[i+1] != 0
		}
	}
	return false
}

// dropMistakenPrivileges gives back what a set-user-ID or set-group-ID bit on the shim
// itself gave: the caller chose the path it was called by, hence the program that it
// starts, and a direct start would not have had these privileges. It returns the
// environment without the variable that Go's runtime adds for such programs. Where the
// caller had the privileges itself, they stay.
func (s self) dropMistakenPrivileges(environ []string) []string {
	if s.ok && s.st.Mode&(syscall.S_ISUID|syscall.S_ISGID) != 0 {
		// Of this thread, which is the one that will execute the real tool.
		gid, uid := uintptr(syscall.Getgid()), uintptr(syscall.Getuid())
		syscall.RawSyscall(syscall.SYS_SETRESGID, gid, gid, gid)
		syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid)
	}
	kept := make([]string, 0, len(environ))
	for _, kv := range environ {
		if kv != "GOTRACEBACK=none" {
			kept = append(kept, kv)
		}
	}
	return kept
}

// loadConfig reads the configuration beside the shim or in /etc. A file that cannot
// be trusted turns recording off rather than on: someone else may have written it.
// With privileges that the caller did not have (secure), a file beside the path that
// the caller chose is none to go by.
func loadConfig(s self, secure bool) (cfg config.Config, trusted bool) {
	owner := uint32(0)
	if s.ok {
		owner = s.st.Uid
	}
	var err error = syscall.ENOENT
	if !secure {
		cfg, _, err = config.Load(s.path[:len(s.path)-len(s.tool)]+config.FileName, owner)
	}
	if err == syscall.ENOENT {
		cfg, _, err = config.Load(config.DefaultPath, owner)
	}
	if err == syscall.EMFILE || err == syscall.ENFILE {
		handover.CountNoDescriptor(cfg.Spool())
	}
	return cfg, err == nil || err == syscall.ENOENT
}

func exists(path string) bool {
	return syscall.Access(path, 0) == nil
}

// checkReal looks at the real binary before it is executed, so that the record can
// tell what is wrong with it, and so that the shim never executes itself without end.
func checkReal(real string, s self) syscall.Errno {
	var st syscall.Stat_t
	if err := syscall.Stat(real, &st); err != nil {
		return errno(err)
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Mode&0o111 == 0 {
		return syscall.EACCES // what execve(2) says, to root too
	}
	if !s.ok {
		return 0
	}
	if st.Dev == s.st.Dev && st.Ino == s.st.Ino || st.Size == s.st.Size && sameContent(real) {
		return errnoSelf
	}
	if st.Size < maxShim && cpuTime() > loopTime && isShim(real) {
		return errnoSelf
	}
	return 0
}

// Two shims of different builds that are each other's real tool would execute each
// other for ever. A process keeps its processor time across execve(2): where it has
// used more than loopTime, a candidate of a shim's size is searched for Marker.
const (
	loopTime = 200 * time.Millisecond
	maxShim  = 8 << 20
)

// cpuTime is what this process has used since its fork, under whatever programs.
func cpuTime() time.Duration {
	const clockProcessCPUTime = 2
	var ts syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockProcessCPUTime, uintptr(unsafe.Pointer(&ts)), 0)
	return time.Duration(ts.Nano())
}

// isShim searches a file for Marker.
func isShim(path string) bool {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(fd)
	buf := make([]byte, 256<<10)
	for have := 0; ; {
		n, err := syscall.Read(fd, buf[have:])
		if err != nil || n == 0 {
			return false
		}
		have += n
		if strings.Contains(unsafe.String(&buf[0], have), Marker) {
			return true
		}
		if keep := len(Marker); have > keep { // it may lie across two reads
			have = copy(buf, buf[have-keep:have])
		}
	}
}

// sameContent compares a file of the shim's size with the shim.
func sameContent(path string) bool {
	a, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(a)
	b, err := syscall.Open("/proc/self/exe", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(b)
	bufA, bufB := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := syscall.Read(a, bufA)
		m, errB := syscall.Read(b, bufB)
		if errA != nil || errB != nil || n != m || string(bufA[:n]) != string(bufB[:m]) {
			return false
		}
		if n == 0 {
			return true
		}
	}
}

func errno(err error) syscall.Errno {
	if e, ok := err.(syscall.Errno); ok {
		return e
	}
	return syscall.EINVAL
}

// execReal becomes the real tool; it returns only an error.
func execReal(real string, args, environ []string) syscall.Errno {
	err := errno(syscall.Exec(real, args, environ))
	if err == syscall.E2BIG {
		// The path is part of what the kernel limits, and the real one is longer
		// than the caller's. By descriptor it is shorter: /dev/fd/N.
		err = execByDescriptor(real, args, environ, err)
	}
	if err == syscall.ENOENT && exists(real) {
		err = errnoInterpreter
	}
	return err
}

func execByDescriptor(real string, args, environ []string, original syscall.Errno) syscall.Errno {
	const oPath = 0x200000
	fd, err := syscall.Open(real, oPath|syscall.O_CLOEXEC, 0)
	if err != nil {
		return original
	}
	argv, err1 := syscall.SlicePtrFromStrings(args)
	envv, err2 := syscall.SlicePtrFromStrings(environ)
	if err1 != nil || err2 != nil {
		return original
	}
	empty := [1]byte{}
	const atEmptyPath = 0x1000
	syscall.RawSyscall6(sysExecveat, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])), atEmptyPath, 0)
	syscall.Close(fd)
	return original
}

// maxRecord is the longest line that the shim writes: far below what one datagram of
// a socket takes, and short enough for one write(2) to an append file.
const maxRecord = 16 << 10

// deliver describes the call and hands the record over.
func deliver(t handover.Target, s self, args, environ []string, problem syscall.Errno, argv bool) {
	uid := syscall.Getuid()
	r := describe(s, args, environ, uid, argv)
	r.Invocation.ExecError = errnoName(problem)
	handover.Deliver(t, encode(r, environ), uid, syscall.Geteuid())
}

// encode returns the record's line. Where it is too long, what the job controls is
// cut harder and harder.
func encode(r *record.Record, environ []string) []byte {
	line := record.Append(make([]byte, 0, 4096), r)
	for limit := 512; len(line) > maxRecord && limit >= 32; limit /= 4 {
		r.CI = record.CIFromEnviron(environ, limit)
		inv := r.Invocation
		inv.Truncated = true
		inv.Images = inv.Images[:min(len(inv.Images), limit/16)]
		inv.Flags = inv.Flags[:min(len(inv.Flags), limit/4)]
		inv.Argv = firstBytes(inv.Argv, 8*limit)
		inv.Cwd = record.Clean(inv.Cwd, limit)
		line = record.Append(line[:0], r)
	}
	return line
}

// describe makes the record of one call.
func describe(s self, args, environ []string, uid int, argv bool) *record.Record {
	now := time.Now()
	inv := &record.Invocation{
		Tool:     record.Clean(s.tool, 64),
		Argc:     int64(len(args)),
		PID:      int64(syscall.Getpid()),
		PPID:     int64(syscall.Getppid()),
		UID:      int64(uid),
		StdinTTY: isTerminal(0),
		MonoNS:   monotonic(),
	}
	r := &record.Record{
		ID: record.NewID(now), TS: now.UTC(), Kind: record.KindInvocation, Schema: record.SchemaVersion, By: record.ByNone,
		Host: &record.Host{}, Invocation: inv,
	}
	r.CI = record.CIFromEnviron(environ, record.MaxField)
	if r.CI != nil && r.CI.Repository != "" && r.CI.RunID != "" {
		r.By = record.ByEnvironment
	}
	scrub := scrubber{environ: environ}
	describeEnviron(r, environ, &scrub)
	describeArgs(inv, args, &scrub, argv)
	if inv.Daemon == "" {
		inv.Daemon = "default"
	}
	return r
}

// describeEnviron takes what the environment tells beside the job context.
func describeEnviron(r *record.Record, environ []string, scrub *scrubber) {
	inv := r.Invocation
	var workspace, dockerHost, dockerContext string
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		switch key {
		case "GITHUB_WORKSPACE":
			workspace = value
		case "DOCKER_HOST":
			dockerHost = value
		case "DOCKER_CONTEXT":
			dockerContext = value
		case "SUDO_UID":
			inv.Sudo = value != ""
		case "DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND":
			inv.Nested = true
		case "POD_NAME":
			r.Host.Pod = record.Clean(value, 256)
		case "POD_NAMESPACE":
			r.Host.Namespace = record.Clean(value, 256)
		case "NODE_NAME":
			r.Host.Node = record.Clean(value, 256)
		}
	}
	switch { // the order in which the docker CLI looks at them
	case dockerHost != "":
		inv.Daemon = daemonClass(dockerHost)
	case dockerContext != "":
		inv.Daemon = "context"
	}
	var uts syscall.Utsname
	if syscall.Uname(&uts) == nil {
		r.Host.Name = utsString(uts.Nodename[:])
	}
	if workspace != "" {
		if wd, err := syscall.Getwd(); err == nil {
			inv.Cwd = relative(workspace, wd, scrub)
		}
	}
}

// relative returns wd below workspace, "." for the workspace itself and "" for
// elsewhere or for a path that may hold a secret.
func relative(workspace, wd string, scrub *scrubber) string {
	workspace = strings.TrimRight(workspace, "/")
	if wd == workspace {
		return "."
	}
	rest, ok := strings.CutPrefix(wd, workspace+"/")
	if !ok || !scrub.keepText(rest) {
		return ""
	}
	return rest
}

// describeArgs reads the command line, and with argv keeps the redacted whole of it.
// Where that fails, or would take too long, only the number of arguments is kept (rule R12).
func describeArgs(inv *record.Invocation, args []string, scrub *scrubber, argv bool) {
	defer func() {
		if recover() != nil || scrub.tired {
			*inv = record.Invocation{Tool: inv.Tool, Argc: inv.Argc, PID: inv.PID, PPID: inv.PPID, UID: inv.UID, MonoNS: inv.MonoNS, Redaction: "failed"}
		}
	}()
	if len(args) == 0 {
		return
	}
	c := describeCommand(inv.Tool, args[1:], scrub, argv)
	inv.Command, inv.Images, inv.Flags, inv.Argv = c.command, c.images, c.flags, c.argv
	inv.Platform, inv.Target, inv.Truncated = c.platform, c.target, c.clipped
	if c.daemon != "" {
		inv.Daemon = c.daemon
	}
}

func utsString[T int8 | uint8](field []T) string {
	b := make([]byte, 0, len(field))
	for _, c := range field {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return record.Clean(string(b), 256)
}

func isTerminal(fd int) bool {
	var termios [64]byte
	_, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TCGETS, uintptr(unsafe.Pointer(&termios)))
	return errno == 0
}

// monotonic returns CLOCK_MONOTONIC, which all processes of one boot share.
func monotonic() int64 {
	const clockMonotonic = 1
	var ts syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&ts)), 0)
	return ts.Nano()
}

// errnoName returns the name of the errors that will keep the real tool from
// starting, and "" for others.
func errnoName(e syscall.Errno) string {
	switch e {
	case syscall.ENOENT:
		return "ENOENT"
	case syscall.ENOTDIR:
		return "ENOTDIR"
	case syscall.EACCES:
		return "EACCES"
	case errnoSelf:
		return "ELOOP"
	}
	return ""
}
