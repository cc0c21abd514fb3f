package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/prefix"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/selftest"
)

// proofs is a machine on which the built programs lie and nothing else of ours.
type proofs struct {
	t       *testing.T
	bin     string // the programs, root's
	temp    string // TMPDIR, and below it XDG_RUNTIME_DIR; the caller's
	runtime string
	uid     int      // who calls; 0 is the test's own user
	alone   bool     // on a read-only root, with TMPDIR as the only place to write
	env     []string // further variables
}

func newProofs(t *testing.T, uid int) *proofs {
	t.Helper()
	if uid != 0 && os.Getuid() != 0 {
		require.Missing(t, "root, to run the self test as another user")
	}
	p := &proofs{t: t, uid: uid}
	for _, folder := range []struct {
		path *string
		in   string
	}{{&p.bin, "/tmp"}, {&p.temp, "/tmp"}, {&p.runtime, "/dev/shm"}} {
		dir, err := os.MkdirTemp(folder.in, "tallyman-proofs-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, uid, uid)); err != nil {
			t.Fatal(err)
		}
		*folder.path = dir
	}
	os.Chown(p.bin, 0, 0)
	for _, name := range []string{"docker-shim", "tallyman"} {
		data, err := os.ReadFile(filepath.Join(built, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(p.bin, name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// command is a call of the built tallyman as a user of a runner image would make it:
// without root where uid says so, and with no writable folder but the two.
func (p *proofs) command(ctx context.Context, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	cmd = exec.CommandContext(ctx, filepath.Join(p.bin, "tallyman"), args...)
	cmd.Env = append([]string{"PATH=/usr/bin:/bin", "TMPDIR=" + p.temp, "XDG_RUNTIME_DIR=" + p.runtime}, p.env...)
	cmd.Dir = "/"
	switch {
	case p.alone:
		cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", readOnlyRoot, "sh", p.temp, fmt.Sprint(p.uid)}, cmd.Args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	case p.uid != 0:
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.uid)}}
	}
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, stdout, stderr
}

// readOnlyRoot becomes $3 as the user $2 without any capability, where nothing but the
// folder $1 can be written to.
const readOnlyRoot = `set -e
mount --bind "$1" "$1"
mount -t tmpfs -o ro tmpfs /dev/shm
mount -o remount,bind,ro /
uid=$2
shift 2
if touch /tmp/written /dev/shm/written 2>/dev/null; then echo "the root can be written to" >&2; exit 99; fi
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --bounding-set -all --no-new-privs "$@"
`

// run runs it to the end, and sees that nothing is left.
func (p *proofs) run(args ...string) (code int, stdout, stderr string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Minute)
	defer cancel()
	cmd, out, errs := p.command(ctx, args...)
	if err := cmd.Run(); cmd.ProcessState == nil {
		p.t.Fatal(err)
	}
	p.nothingLeft()
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// nothingLeft looks for files, processes and counters in the kernel.
func (p *proofs) nothingLeft() {
	p.t.Helper()
	for _, dir := range []string{p.temp, p.runtime} {
		names, err := os.ReadDir(dir)
		if err != nil || len(names) > 0 {
			p.t.Errorf("left in %s: %v %v", dir, names, err)
		}
	}
	eventually(p.t, 30*time.Second, func() error {
		links, _ := filepath.Glob("/proc/[0-9]*/exe")
		for _, link := range links {
			exe, err := os.Readlink(link)
			if err == nil && (strings.HasPrefix(exe, p.bin) || strings.HasPrefix(exe, p.temp)) {
				return fmt.Errorf("a process is left: %s is %s", link, exe)
			}
		}
		return nil
	})
	if p.uid != 0 {
		table, err := os.ReadFile("/proc/sysvipc/sem")
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); err == nil && len(f) > 6 && f[6] == fmt.Sprint(p.uid) {
				p.t.Errorf("a counter is left in the kernel: %s", line)
			}
		}
	}
}

// page runs the self test and reads its JSON.
func (p *proofs) page(wantCode int, args ...string) selftest.Page {
	p.t.Helper()
	code, stdout, stderr := p.run(append([]string{"selftest", "--json", "--duration", "200ms"}, args...)...)
	var page selftest.Page
	decoder := json.NewDecoder(strings.NewReader(stdout))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&page); err != nil {
		p.t.Fatalf("exit %d, %v: %s%s", code, err, stdout, stderr)
	}
	if code != wantCode || stderr != "" {
		p.t.Errorf("exit %d, want %d; stderr %q", code, wantCode, stderr)
		for _, c := range page.Cases {
			if c.Result == selftest.Fail {
				p.t.Errorf("%s: %s", c.ID, c.Detail)
			}
		}
		for _, d := range page.Transparency.Differences {
			p.t.Errorf("%+v", d)
		}
	}
	return page
}

// results are the checks by their ids.
func results(page selftest.Page) map[string]selftest.Check {
	all := map[string]selftest.Check{}
	for _, c := range page.Cases {
		all[c.ID] = c
	}
	return all
}

// unprivileged is a user that no machine has and no other run of the tests, so that
// what is its own can only be this run's.
var unprivileged = 55000 + os.Getpid()%4000

func TestSelfTestOfASoundInstallation(t *testing.T) {
	for _, row := range []struct {
		name  string
		uid   int
		alone bool
		args  []string
		// what must really have been tried
		least []string
	}{
		{"as root with file systems of its own", 0, false, []string{"--thorough"}, selftest.IDs()},
		{"without root on a read-only root", unprivileged, true, nil, []string{"shim", "ends", "transparency", "latency", "SH-01", "SH-02", "SH-07", "SH-09", "SH-24", "SH-25", "SH-26", "SH-30", "SH-36", "SH-37",
			"SH-43", "SH-44", "SH-45", "SH-46", "SH-56", "SE-01", "SE-03", "HK-01", "HK-03", "HK-13", "HK-15"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			if os.Getuid() != 0 {
				require.Missing(t, "root, for the self test with file systems and with users of its own")
			}
			p := newProofs(t, row.uid)
			p.alone = row.alone
			page := p.page(0, row.args...)
			got := results(page)
			for _, id := range row.least {
				if c := got[id]; c.Result != selftest.Pass && !(c.Result == selftest.NotPossible && row.uid == 0) {
					t.Errorf("%s: %q %s", id, c.Result, c.Detail)
				}
			}
			for _, id := range selftest.IDs() {
				if c, ok := got[id]; !ok || c.Result != selftest.Pass && c.Detail == "" {
					t.Errorf("%s is not on the page, or does not say why: %+v", id, c)
				}
			}
			if page.Verdict != selftest.Pass || page.Failed != 0 || page.Passed+page.NotPossible != len(page.Cases) || page.Schema != 1 {
				t.Errorf("verdict %s, %d passed, %d failed, %d not possible", page.Verdict, page.Passed, page.Failed, page.NotPossible)
			}
			if !page.Shim.Marked || len(page.Shim.SHA256) != 64 || page.Machine.UID != row.uid || page.Version == "" {
				t.Errorf("%+v %+v", page.Shim, page.Machine)
			}
			if page.Transparency.Properties < 500 || len(page.Transparency.Ways) < 10 {
				t.Errorf("hardly anything was compared: %+v", page.Transparency)
			}
			if exitCodesKnown(t) && (page.Ends.Rung != "pidfd_info" || !page.Ends.ExitCode) {
				t.Errorf("%+v on a kernel that knows", page.Ends)
			}
			checkLatency(t, page.Latency)
		})
	}
}

// checkLatency looks at the form and at what must hold on any machine.
func checkLatency(t *testing.T, l *selftest.Latency) {
	t.Helper()
	if l == nil || l.Rounds < 10 || l.Method == "" || l.Plain.P50 <= 0 {
		t.Fatalf("%+v", l)
	}
	if len(l.Added) != 5 {
		t.Errorf("%d ways, want noise, wrapper and three modes", len(l.Added))
	}
	for _, a := range l.Added {
		if a.P50 > a.P99 || a.P99 > a.Max {
			t.Errorf("quantiles do not rise: %+v", a)
		}
	}
	if l.Met != (len(l.Missed) == 0) {
		t.Errorf("met %v, missed %q", l.Met, l.Missed)
	}
}

// Every id of the page is one that docs/faults.md explains.
func TestSelfTestKnowsOnlyFaultsOfTheCatalogue(t *testing.T) {
	for _, id := range selftest.IDs() {
		if strings.Contains(id, "-") && !slices.ContainsFunc(faults.Catalogue(), func(f faults.Fault) bool { return f.ID == id }) {
			t.Errorf("%s is not in the catalogue", id)
		}
	}
}

// A shim that breaks a promise is found out, by name and with what was seen.
func TestSelfTestOfABrokenShim(t *testing.T) {
	for _, row := range []struct {
		name, script string
		fails        map[string]string // what the page must say, by the check
	}{
		{"it talks on standard output", `echo "calling docker"; exec "$real" "$@"`, map[string]string{"SH-36": "calling docker", "SH-07": "calling docker"}},
		{"it adds an argument", `exec "$real" "$@" extra`, map[string]string{"transparency": "without a reason", "SH-09": "b c extra"}},
		{"it adds a variable", `export SHIM=1; exec "$real" "$@"`, map[string]string{"transparency": "without a reason"}},
		{"it changes exit codes", `"$real" "$@" || exit 1`, map[string]string{"SH-36": "exit code 2 became", "SH-37": "signal 1"}},
		{"it lets the job choose the tool", `exec "${TALLYMAN_REAL_DOCKER:-$real}" "$@"`, map[string]string{"SH-56": "exit 127"}},
		{"it writes through links", `echo "$*" >> "$run/spool/$(id -u).jsonl"; exec "$real" "$@"`, map[string]string{"SH-09": "was written to", "SH-11": "was written to"}},
		{"it hangs on a FIFO", `echo "$*" >> "$run/spool/$(id -u).jsonl"; exec "$real" "$@"`, map[string]string{"SH-07": "did not end"}},
		{"it prints the command line", `echo "debug: $*" >&2; exec "$real" "$@"`, map[string]string{"SE-01": "debug: login"}},
		{"it records nothing", `exec "$real" "$@"`, map[string]string{"SH-21": "0 records", "SH-45": "0 records"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := newProofs(t, 0)
			shim := filepath.Join(p.bin, "docker-shim")
			script := "#!/bin/sh\nconf=${0%/*}/tallyman.conf\nreal=$(sed -n 's/^real.docker = //p' \"$conf\")\nrun=$(sed -n 's/^run_dir = //p' \"$conf\")\n" + row.script + "\n"
			if err := os.WriteFile(shim, []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			args := []string{"selftest", "--json", "--shim", shim, "--only", "shim"}
			for id := range row.fails {
				args = append(args, "--only", id)
			}
			code, stdout, stderr := p.run(args...)
			var page selftest.Page
			if err := json.Unmarshal([]byte(stdout), &page); err != nil || code != 1 || page.Verdict != selftest.Fail {
				t.Fatalf("exit %d, want 1; %v: %s%s", code, err, stdout, stderr)
			}
			got := results(page)
			for id, said := range row.fails {
				if c := got[id]; c.Result != selftest.Fail || !strings.Contains(c.Detail, said) {
					t.Errorf("%s: %s, %q; want FAIL with %q", id, c.Result, c.Detail, said)
				}
			}
			if got["shim"].Result != selftest.Fail || page.Failed != len(row.fails)+1 || len(page.Cases) != page.Failed {
				t.Errorf("%d of %d failed: %+v", page.Failed, len(page.Cases), got)
			}
			// Who reads the page for people sees it at once.
			if row.name == "it talks on standard output" {
				for _, form := range []string{"--markdown", "--json=false"} {
					code, stdout, _ := p.run("selftest", form, "--shim", shim, "--only", "SH-36")
					if code != 1 || !strings.Contains(stdout, "FAIL (0 passed, 1 failed") || !strings.Contains(stdout, "SH-36") {
						t.Errorf("exit %d: %s", code, stdout)
					}
				}
			}
		})
	}
}

// The installed agent, its journal and its spool do not notice.
func TestSelfTestDoesNotDisturbARunningAgent(t *testing.T) {
	r := newStubRig(t)
	ownCounters(t)
	r.startAgent()
	r.docker("run", "--rm", "code-0")
	var before map[string]bool
	eventually(t, 30*time.Second, func() error {
		before = traces(t, r.inst)
		if !strings.Contains(fmt.Sprint(before), "invocation.end ") {
			return errors.New("the call and its end are not in the journal yet")
		}
		return nil
	})
	p := newProofs(t, 0)
	p.env = r.runner.Env // with the shim first in PATH, where it is found
	p.bin = r.inst.Bin()
	args := []string{"selftest", "--duration", "200ms"}
	for _, id := range []string{"ends", "latency", "SH-01", "SH-06", "SH-32", "SH-44", "SH-56", "SE-01", "HK-01", "HK-06"} {
		args = append(args, "--only", id)
	}
	cmd, stdout, stderr := p.command(t.Context(), args...)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	if !strings.Contains(stdout.String(), "Verdict: PASS") {
		t.Error(stdout.String())
	}
	if after := traces(t, r.inst); !maps.Equal(before, after) {
		t.Errorf("before %v\nafter %v", before, after)
	}
	status, err := r.tallyman("status")
	if err != nil || !strings.Contains(status, " 0 refused") {
		t.Errorf("%v: %s", err, status)
	}
}

// traces are the ids of all records that an installation holds, in its journal and in
// its append files. (A record can be in both, and the agent may read the file when it
// likes.)
func traces(t *testing.T, p *prefix.Prefix) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	for _, dir := range []string{p.Spool(), p.Journal()} {
		names, err := filepath.Glob(filepath.Join(dir, "*.jsonl*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			for line := range bytes.Lines(b) {
				var r struct {
					ID, Kind string
					Loss     json.RawMessage
				}
				if err := json.Unmarshal(line, &r); err != nil {
					t.Fatalf("%v: %s", err, line)
				}
				all[fmt.Sprintf("%s %s %s", r.Kind, r.ID, r.Loss)] = true
			}
		}
	}
	return all
}

// Ctrl-C, SIGTERM and a terminal that goes away end it in order.
func TestSelfTestLeavesNothingWhenItIsInterrupted(t *testing.T) {
	for _, row := range []struct {
		sig  syscall.Signal
		args []string
	}{{syscall.SIGINT, []string{"selftest"}}, {syscall.SIGTERM, []string{"selftest", "--thorough"}}, {syscall.SIGHUP, []string{"bench", "--duration", "10m"}}} {
		t.Run(row.sig.String()+" "+row.args[0], func(t *testing.T) {
			p := newProofs(t, 0)
			if slices.Contains(row.args, "--thorough") && os.Getuid() != 0 {
				require.Missing(t, "root, for --thorough")
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			cmd, stdout, stderr := p.command(ctx, row.args...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			// When its agent listens it is in the middle of everything.
			eventually(t, time.Minute, func() error {
				sockets, _ := filepath.Glob(filepath.Join(p.runtime, "*", "*", "run", "agent.sock"))
				if len(sockets) == 0 {
					return errors.New("no temporary agent yet")
				}
				return nil
			})
			if err := cmd.Process.Signal(row.sig); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 1 || stdout.Len() > 0 || !strings.Contains(stderr.String(), "interrupted") {
				t.Errorf("exit %d, stdout %s, stderr %s", code, stdout, stderr)
			}
			p.nothingLeft()
		})
	}
}

func TestBench(t *testing.T) {
	for _, uid := range []int{0, unprivileged} {
		p := newProofs(t, uid)
		code, stdout, stderr := p.run("bench", "--json", "--duration", "100ms")
		var l selftest.Latency
		if err := json.Unmarshal([]byte(stdout), &l); err != nil || code != 0 || stderr != "" {
			t.Fatalf("exit %d, %v: %s%s", code, err, stdout, stderr)
		}
		checkLatency(t, &l)
	}
	p := newProofs(t, 0)
	code, stdout, stderr := p.run("bench", "--rounds", "10", "/bin/sh", "-c", "exit 3")
	if code != 0 || !strings.Contains(stdout, "`/bin/sh -c exit 3`, 10 rounds") {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	if code, _, stderr := p.run("bench", "--shim", "/nonexistent/shim"); code != 1 || !strings.Contains(stderr, "--shim") {
		t.Errorf("without a shim: exit %d: %s", code, stderr)
	}
}
