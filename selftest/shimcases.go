package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

const sameAndLost = "the command runs as without the shim; the record is lost, and the loss is counted"

// shimCases are the SH cases. Each also asserts that the command's exit code and
// streams are those of a direct start.
var shimCases = []fault{
	{"SH-01", "the spool folder is missing; then an agent's socket is there", "the command runs; the loss is counted; the record goes to the socket", noSpool},
	{"SH-02", "the spool folder is not writable (0555)", sameAndLost, readOnlySpool},
	{"SH-06", "the append file is /dev/full", sameAndLost, devFull},
	{"SH-07", "the append file is a FIFO that nobody reads", "the command does not wait; the loss is counted", fifo},
	{"SH-09", "the append file is a symbolic link to another file", "nothing is written to that file; the loss is counted", symlink},
	{"SH-11", "the append file is a hard link to another file", "nothing is written to that file; the loss is counted", hardLink},
	{"SH-12", "the spool folder is a symbolic link", "nothing is written behind it; the loss is counted", linkedFolder},
	{"SH-21", "arguments and variables that are not UTF-8", "the command gets the exact bytes; the record is valid JSON", invalidUTF8},
	{"SH-22", "line ends, control bytes and U+2028 in GITHUB_*", "one line; no control characters in the record", controlBytes},
	{"SH-23", "GITHUB_* of 100 KB", "the record stays under 16 KiB", longVariables},
	{"SH-24", "the real tool is missing", "exit 127, one line on stderr that names it, nothing on stdout, the record says ENOENT", missing},
	{"SH-25", "the real tool is not executable, then no program", "exit 126, one line on stderr, nothing on stdout", notExecutable},
	{"SH-26", "the real tool is the shim itself, by symbolic link, hard link and copy", "exit 126, no endless loop", loop},
	{"SH-30", "RLIMIT_FSIZE is 0", "no death by SIGXFSZ, the signal's disposition is unchanged for the command", fileSizeLimit},
	{"SH-32", "no descriptor is free (RLIMIT_NOFILE 3)", "the command runs as without the shim", noDescriptor},
	{"SH-36", "exit codes 0 to 255", "each arrives unchanged", exitCodes},
	{"SH-37", "the command is killed by each signal 1 to 64 that kills", "each wait status arrives unchanged", signals},
	{"SH-43", "200 commands at once, no agent", "200 whole records in one file", atOnce},
	{"SH-44", "50 commands at once, the agent is stopped (SIGSTOP)", "no command waits; all 50 records are in the journal once the agent goes on", stalled},
	{"SH-45", "the socket is stale, of another type, or closed to this user", "the record goes to the append file", badSockets},
	{"SH-46", "the agent takes the record and never acknowledges it", "the command goes on; the record is in the file too, with the same id", neverAcks},
	{"SH-52", "another docker.original in the working folder, PATH is .", "the configured tool runs", relativePath},
	{"SH-55", "a plugin calls docker again", "the record is marked nested", nested},
	{"SH-56", "variables of the job name other folders, files and tools", "they change nothing", redirect},
}

func noSpool(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	if err := os.Remove(p.spool); err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, nil)
	if err == nil {
		err = p.expectLost(1, os.Getuid())
	}
	if err != nil || r.off != "" {
		return told(o, "records could not be looked at: "+r.off), err
	}
	l, err := p.listen(handover.AckClose)
	if err != nil {
		return "", err
	}
	defer l.close()
	if o, err = p.unharmed(ctx, nil); err != nil {
		return "", err
	}
	_, err = l.record(ctx)
	return told(o, "the record came by the socket"), err
}

func readOnlySpool(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(p.spool, 0o555); err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, func(c *call) { c.uid = stranger() })
	if errors.Is(err, os.ErrPermission) {
		return "", cannot("as root this needs another user: %v", err)
	}
	if err != nil {
		return "", err
	}
	uid := os.Getuid()
	if uid == 0 {
		uid = stranger()
	}
	return told(o, "counted"), errors.Join(nothingIn(p.spool), p.expectLost(1, uid))
}

func nothingIn(dir string) error {
	names, err := os.ReadDir(dir)
	if err == nil && len(names) > 0 {
		err = fmt.Errorf("%s was made in %s", names[0].Name(), dir)
	}
	return err
}

func devFull(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	if err := unix.Mknod(p.file, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 7))); err != nil {
		return "", cannot("a device file needs root with CAP_MKNOD: %v", err)
	}
	o, err := p.unharmed(ctx, nil)
	return told(o, "counted"), errors.Join(err, p.expectLost(1, os.Getuid()))
}

func fifo(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	if err := unix.Mkfifo(p.file, 0o600); err != nil {
		return "", cannot("mkfifo: %v", err)
	}
	o, err := p.unharmed(ctx, nil)
	return told(o, "counted"), errors.Join(err, p.expectLost(1, os.Getuid()))
}

// victim is a file of somebody that must stay as it is.
func (p *place) victim() (path string, untouched func() error, err error) {
	path = filepath.Join(filepath.Dir(p.run), "victim")
	const text = "somebody's\n"
	return path, func() error {
		b, err := os.ReadFile(path)
		if err == nil && string(b) != text {
			err = fmt.Errorf("the other file was written to: %s", short(string(b)))
		}
		return err
	}, os.WriteFile(path, []byte(text), 0o600)
}

func symlink(ctx context.Context, r *rig) (string, error) { return linked(ctx, r, os.Symlink) }

func hardLink(ctx context.Context, r *rig) (string, error) { return linked(ctx, r, os.Link) }

func linked(ctx context.Context, r *rig, link func(string, string) error) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	victim, untouched, err := p.victim()
	if err != nil {
		return "", err
	}
	if err := link(victim, p.file); err != nil {
		return "", cannot("%v", err)
	}
	o, err := p.unharmed(ctx, nil)
	return told(o, "the other file is untouched; counted"), errors.Join(err, untouched(), p.expectLost(1, os.Getuid()))
}

func linkedFolder(ctx context.Context, r *rig) (string, error) {
	if err := openat2(); err != nil {
		return "", cannot("openat2: %v", err)
	}
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	target := filepath.Join(filepath.Dir(p.run), "elsewhere")
	if err := errors.Join(os.Mkdir(target, 0o777), os.Remove(p.spool), os.Symlink(target, p.spool)); err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, nil)
	return told(o, "nothing was written behind the link; counted"), errors.Join(err, nothingIn(target), p.expectLost(1, os.Getuid()))
}

func invalidUTF8(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, func(c *call) {
		c.args = []string{"sh", "-c", `printf '%s|%s' "$1" "$ODD"`, "sh", "\xff\xfe\x80"}
		c.env = []string{"ODD=\xc3\x28", "GITHUB_WORKFLOW=\xff\xfe", "GITHUB_REPOSITORY=a/b\xf0"}
	})
	if err == nil && o.stdout != "\xff\xfe\x80|\xc3\x28" {
		err = fmt.Errorf("the command got %s", short(o.stdout))
	}
	if err != nil {
		return "", err
	}
	return told(o, "the record is valid"), p.expectSpooled(1)
}

func controlBytes(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	nasty := "a\nb\rc\x1b[31md\x07e\u2028f\x7fg"
	o, err := p.unharmed(ctx, func(c *call) {
		c.env = []string{"GITHUB_WORKFLOW=" + nasty, "GITHUB_REPOSITORY=" + nasty, "GITHUB_JOB=" + nasty, "GITHUB_ACTION=" + nasty}
	})
	if err == nil {
		err = p.expectSpooled(1)
	}
	if err != nil {
		return "", err
	}
	all, err := p.spooled()
	if err != nil || all[0].CI == nil {
		return "", errors.Join(err, errors.New("the record has no job"))
	}
	for _, field := range []string{all[0].CI.Workflow, all[0].CI.Repository, all[0].CI.Job, all[0].CI.Step} {
		if strings.ContainsFunc(field, func(c rune) bool { return c < 0x20 || c >= 0x7f && c < 0xa0 || c == '\u2028' }) {
			return "", fmt.Errorf("a control character is in the record: %s", short(field))
		}
	}
	return told(o, ""), nil
}

func longVariables(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	long := strings.Repeat("w", 100<<10)
	o, err := p.unharmed(ctx, func(c *call) { c.env = []string{"GITHUB_WORKFLOW=" + long, "GITHUB_JOB=" + long, "GITHUB_REF=" + long} })
	if err == nil {
		err = p.expectSpooled(1)
	}
	if err != nil {
		return "", err
	}
	st, err := os.Stat(p.file)
	if err == nil && st.Size() > 16<<10 {
		err = fmt.Errorf("the record has %d bytes", st.Size())
	}
	if err != nil {
		return "", err
	}
	return told(o, fmt.Sprintf("the record has %d bytes", st.Size())), nil
}

// refused calls the shim where the real tool cannot run.
func (p *place) refused(ctx context.Context, code int, names string) error {
	o, err := p.r.do(ctx, witnessCall(p.docker))
	if err == nil && (o.status.ExitStatus() != code || o.stdout != "" || strings.Count(o.stderr, "\n") != 1 || !strings.Contains(o.stderr, names)) {
		err = fmt.Errorf("%s; want exit %d, nothing on stdout, and one line on stderr with %q", o, code, names)
	}
	return err
}

func missing(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace(filepath.Join(r.dir, "no-such-tool"))
	if err != nil {
		return "", err
	}
	if err := p.refused(ctx, 127, p.real); err != nil {
		return "", err
	}
	if err := p.expectSpooled(1); err != nil {
		return "", err
	}
	all, err := p.spooled()
	if err == nil && all[0].Invocation.ExecError != "ENOENT" {
		err = fmt.Errorf("the record says %q", all[0].Invocation.ExecError)
	}
	return "exit 127, one line, recorded", err
}

func notExecutable(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	p.real = filepath.Join(p.dir, "tool")
	if err := errors.Join(p.configure("real.docker = "+p.real), os.WriteFile(p.real, []byte("\x00\x01 no program"), 0o644)); err != nil {
		return "", err
	}
	if err := p.refused(ctx, 126, p.real); err != nil {
		return "", fmt.Errorf("not executable: %w", err)
	}
	if err := os.Chmod(p.real, 0o755); err != nil {
		return "", err
	}
	if err := p.refused(ctx, 126, p.real); err != nil {
		return "", fmt.Errorf("no program: %w", err)
	}
	return "exit 126, one line each", nil
}

func loop(ctx context.Context, r *rig) (string, error) {
	for _, how := range []struct {
		name string
		make func(from, to string) error
	}{{"symbolic link", os.Symlink}, {"hard link", os.Link}, {"copy", copyProgram}} {
		p, err := r.newPlace("")
		if err != nil {
			return "", err
		}
		p.real = p.docker + ".original"
		if err := errors.Join(p.configure(), how.make(r.shim, p.real)); err != nil {
			return "", err
		}
		if err := p.refused(ctx, 126, p.real); err != nil {
			return "", fmt.Errorf("%s: %w", how.name, err)
		}
	}
	return "exit 126, one line each", nil
}

func fileSizeLimit(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	look := `while read -r key value; do case $key in SigIgn:|SigBlk:) echo "$key $value";; esac; done < /proc/$$/status; exit 23`
	o, err := p.unharmed(ctx, func(c *call) {
		c.args = []string{"sh", "-c", `ulimit -f 0; exec "$0" -c "$1"`, c.path, look}
		c.path = r.sh
	})
	if err == nil && o.status.ExitStatus() != 23 {
		err = fmt.Errorf("%s", o)
	}
	return told(o, "SIGXFSZ is as it was"), err
}

func noDescriptor(ctx context.Context, r *rig) (string, error) {
	// A tool that is linked dynamically could not start either; this program can. It
	// stands beside the shim: without a descriptor no configuration can be read.
	p, err := r.newPlace(r.tallyman)
	if err != nil {
		return "", err
	}
	p.real = p.docker + ".original"
	if err := errors.Join(p.configure(), os.Symlink(r.tallyman, p.real)); err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, func(c *call) {
		// The shim cannot read its configuration then, and would count the loss where the
		// default installation counts: that must not see it.
		c.ipc = true
		c.args = append([]string{"sh", "-c", `ulimit -n 3; exec "$0" "$@"`, c.path}, append(r.o.Probe, "exit", "23")...)
		c.path = r.sh
	})
	if errors.Is(err, os.ErrPermission) {
		return "", cannot("it would be counted in the installation's own counters, and namespaces may not be made: %v", err)
	}
	if err == nil && o.status.ExitStatus() != 23 {
		return "", cannot("a program cannot start like that without the shim either: %s", o)
	}
	return told(o, ""), err
}

func exitCodes(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	for code := range 256 {
		o, err := r.do(ctx, call{path: p.docker, args: []string{"sh", "-c", "exit " + strconv.Itoa(code)}})
		if err != nil {
			return "", err
		}
		if o.status != syscall.WaitStatus(code<<8) || o.stdout+o.stderr != "" {
			return "", fmt.Errorf("exit code %d became: %s", code, o)
		}
	}
	return "0 of 256 differ", p.expectSpooled(256)
}

func signals(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	tried := 0
	for sig := 1; sig <= 64; sig++ {
		if stops(sig) {
			continue
		}
		args := []string{"sh", "-c", fmt.Sprintf("ulimit -c 0; kill -%d $$; exit 0", sig)}
		direct, err := r.do(ctx, call{path: r.sh, args: args, dir: p.dir})
		if err != nil {
			return "", err
		}
		through, err := r.do(ctx, call{path: p.docker, args: args, dir: p.dir})
		if err != nil {
			return "", err
		}
		tried++
		if !through.same(direct) {
			return "", fmt.Errorf("signal %d: through the shim %s; without it %s", sig, through, direct)
		}
	}
	return fmt.Sprintf("0 of %d differ", tried), nil
}

// stops tells the signals that stop a process: it would wait for a continuation.
func stops(sig int) bool {
	switch syscall.Signal(sig) {
	case syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU:
		return true
	}
	return false
}

// crowd runs n commands, some at the same time, and returns the first thing that was
// wrong with one.
func (p *place) crowd(ctx context.Context, n int) error {
	var wg sync.WaitGroup
	places := make(chan struct{}, 25)
	wrong := make(chan error, n)
	for i := range n {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			o, err := p.r.do(ctx, call{path: p.docker, args: []string{"sh", "-c", "exit " + strconv.Itoa(i%256)}, env: []string{"GITHUB_WORKFLOW=" + strings.Repeat("w", i*20)}})
			if err == nil && (o.status.ExitStatus() != i%256 || o.stdout+o.stderr != "") {
				err = fmt.Errorf("a command with exit code %d became: %s", i%256, o)
			}
			wrong <- err
		})
	}
	wg.Wait()
	close(wrong)
	for err := range wrong {
		if err != nil {
			return err
		}
	}
	return nil
}

func atOnce(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	if err := p.crowd(ctx, 200); err != nil {
		return "", err
	}
	if err := p.expectSpooled(200); err != nil {
		return "", err
	}
	all, _ := p.spooled()
	ids := map[string]bool{}
	for _, rec := range all {
		ids[rec.ID] = true
	}
	if len(ids) != 200 {
		return "", fmt.Errorf("%d different records of 200", len(ids))
	}
	return "200 of 200 records, none torn", nil
}

func stalled(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	a, err := p.agent(ctx)
	if err != nil {
		return "", err
	}
	defer a.stop()
	if err := syscall.Kill(a.pid, syscall.SIGSTOP); err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, nil)
	if err == nil {
		err = p.crowd(ctx, 49)
	}
	if err = errors.Join(err, syscall.Kill(a.pid, syscall.SIGCONT)); err != nil {
		return "", err
	}
	if r.off != "" {
		return "", cannot("%s; the commands were not harmed", r.off)
	}
	err = wait(ctx, func() error {
		all, err := p.journaled()
		ids := map[string]bool{}
		for _, rec := range all {
			if rec.Kind == record.KindInvocation {
				ids[rec.ID] = true
			}
		}
		if err == nil && len(ids) != 50 {
			err = fmt.Errorf("%d of 50 records are in the journal", len(ids))
		}
		return err
	})
	return told(o, "50 of 50 records in the journal"), err
}

// listener plays the agent at the socket of a place.
type listener struct {
	l    *net.UnixListener
	got  chan []byte
	done sync.WaitGroup
}

// listen answers each message with ack, or, where that is 0, with nothing.
func (p *place) listen(ack byte) (*listener, error) {
	socket := filepath.Join(p.run, "agent.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	s := &listener{l: l, got: make(chan []byte, 16)}
	s.done.Go(func() {
		var held []net.Conn
		defer func() {
			for _, c := range held {
				c.Close()
			}
		}()
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			held = append(held, conn)
			buf := make([]byte, handover.MaxMessage)
			n, err := conn.Read(buf)
			if err != nil || len(s.got) == cap(s.got) {
				continue
			}
			s.got <- buf[:n]
			if ack != 0 {
				conn.Write([]byte{ack})
			}
		}
	})
	return s, os.Chmod(socket, 0o666)
}

// record waits for the next message.
func (s *listener) record(ctx context.Context) (rec record.Record, err error) {
	err = wait(ctx, func() error {
		select {
		case line := <-s.got:
			return recordjson.Unmarshal(line, &rec)
		default:
			return errors.New("no record came by the socket")
		}
	})
	return rec, err
}

func (s *listener) close() {
	s.l.Close()
	s.done.Wait()
}

func badSockets(ctx context.Context, r *rig) (string, error) {
	var tried []string
	for _, row := range []struct {
		name string
		make func(socket string) (close func(), err error)
	}{
		{"missing", func(string) (func(), error) { return func() {}, nil }},
		{"stale", func(socket string) (func(), error) {
			l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
			if err != nil {
				return nil, err
			}
			l.SetUnlinkOnClose(false)
			return func() {}, l.Close()
		}},
		{"a stream socket", func(socket string) (func(), error) {
			l, err := net.Listen("unix", socket)
			return func() { l.Close() }, err
		}},
		{"a file", func(socket string) (func(), error) { return func() {}, os.WriteFile(socket, nil, 0o666) }},
		{"closed to this user", func(socket string) (func(), error) {
			l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
			if err != nil {
				return nil, err
			}
			return func() { l.Close() }, os.Chmod(socket, 0)
		}},
	} {
		if row.name == "closed to this user" && os.Getuid() == 0 {
			continue // nothing is closed to root
		}
		p, err := r.newPlace("")
		if err != nil {
			return "", err
		}
		done, err := row.make(filepath.Join(p.run, "agent.sock"))
		if err != nil {
			return "", err
		}
		_, err = p.unharmed(ctx, nil)
		if err == nil {
			err = p.expectSpooled(1)
		}
		done()
		if err != nil {
			return "", fmt.Errorf("%s: %w", row.name, err)
		}
		tried = append(tried, row.name)
	}
	return "in the append file each time: " + strings.Join(tried, ", "), nil
}

func neverAcks(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	l, err := p.listen(0)
	if err != nil {
		return "", err
	}
	defer l.close()
	o, err := p.unharmed(ctx, nil)
	if err != nil {
		return "", err
	}
	if r.off != "" {
		return "", cannot("%s; the command was not harmed", r.off)
	}
	rec, err := l.record(ctx)
	if err != nil {
		return "", err
	}
	if fsType(p.spool) != "tmpfs" {
		return told(o, "the socket has the record; "+p.spool+" is not on tmpfs, so no file has it while an agent is there"), nil
	}
	all, err := p.spooled()
	if err == nil && (len(all) != 1 || all[0].ID != rec.ID) {
		err = fmt.Errorf("the socket got record %s, the file %d records", rec.ID, len(all))
	}
	return told(o, "socket and file have one id"), err
}

func relativePath(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	job := filepath.Join(p.dir, "job")
	err = os.Mkdir(job, 0o755)
	for _, name := range []string{"docker", "docker.original", "sh"} {
		err = errors.Join(err, os.WriteFile(filepath.Join(job, name), []byte("#!"+r.sh+"\necho the job\\'s own\n"), 0o755))
	}
	if err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, func(c *call) { c.dir, c.env = job, []string{"PATH=.:" + job} })
	return told(o, ""), err
}

func nested(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, func(c *call) { c.env = []string{"DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND=docker"} })
	if err == nil {
		err = p.expectSpooled(1)
	}
	if err != nil {
		return "", err
	}
	all, err := p.spooled()
	if err == nil && !all[0].Invocation.Nested {
		err = errors.New("the record is not marked")
	}
	return told(o, "marked"), err
}

func redirect(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	other, err := r.newPlace(filepath.Join(r.dir, "no-such-tool"))
	if err != nil {
		return "", err
	}
	env := []string{"TALLYMAN=off", "GODEBUG=x=y", "GOTRACEBACK=crash", "GOMAXPROCS=9", "GOMEMLIMIT=1"}
	for name, value := range map[string]string{"CONFIG": other.conf, "RUN_DIR": other.run, "STATE_DIR": other.state, "SOCKET": other.run + "/agent.sock",
		"SPOOL": other.spool, "REAL": other.real, "REAL_DOCKER": other.real, "LOG": other.file, "ENABLED": "false", "CANARY": "0"} {
		env = append(env, "TALLYMAN_"+name+"="+value)
	}
	o, err := p.unharmed(ctx, func(c *call) { c.env = env })
	if err != nil {
		return "", err
	}
	if err := nothingIn(other.spool); err != nil {
		return "", err
	}
	return told(o, fmt.Sprintf("%d variables changed nothing", len(env))), p.expectSpooled(1)
}

// contains looks for any of the needles.
func contains(data []byte, needles [][]byte) bool {
	for _, n := range needles {
		if bytes.Contains(data, n) {
			return true
		}
	}
	return false
}
