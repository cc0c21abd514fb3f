package wrapper

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/probe"
)

// TestTransparency starts the probe in many ways, first as docker itself, then behind
// the shim at the same path, and compares all that the probe sees and all that its
// parent sees. What differs has to be named in testdata/differences.tsv, and what is
// named there has to be seen.
//
// One test holds all cases, because only then is it known that a named difference was
// not seen.
func TestTransparency(t *testing.T) {
	st := newStage(t)
	book := readDifferences(t)
	for _, c := range st.cases() {
		t.Run(c.name, func(t *testing.T) {
			defer func() { book.ran[c.name] = !t.Skipped() && !t.Failed() }()
			if len(c.ids) > 0 {
				faults.Case(t, c.ids...)
			}
			if c.root && os.Getuid() != 0 {
				faults.CannotRun(t, "needs root to set up: sudo make unit")
			}
			if c.can != nil {
				c.can(t)
			}
			ways := c.ways
			if ways == nil {
				ways = []way{lean, usual}
			}
			direct := c.see(t, st, direct)
			for name, want := range c.sees {
				if direct[name] != want {
					t.Fatalf("the case is not set up: %s is %q directly, want %q", name, direct[name], want)
				}
			}
			for _, w := range ways {
				before := st.handedOver(w)
				through := c.see(t, st, w)
				for _, varies := range c.varies {
					delete(direct, varies)
					delete(through, varies)
				}
				for _, d := range probe.Compare(direct, through) {
					if direct["exit status"] != through["exit status"] && d.Name != "exit status" && d.Name != "standard error" {
						continue // one of both did not run and has seen nothing
					}
					if !book.named(w, c.name, d.Name) {
						t.Errorf("%s, %s:\ndirectly         %s\nthrough the shim %s", w.name, d.Name, d.Direct, d.Through)
					}
				}
				if st.handedOver(w) == before && !c.lost && through["exit status"] == direct["exit status"] {
					t.Errorf("%s: nothing was recorded", w.name)
				}
			}
		})
	}
	book.check(t)
}

// A way is how the probe is started.
type way struct {
	name  string
	build string // of the shim; none for the direct start
	agent byte   // the answer of the agent; without one, records go to the append file
}

var (
	direct = way{name: "direct"}
	lean   = way{name: "lean", build: "lean"}
	usual  = way{name: "usual", build: "usual"}
	// With an agent, the shim has a socket open and waits.
	leanAgent    = way{name: "lean, agent", build: "lean", agent: '1'}
	usualAgent   = way{name: "usual, agent", build: "usual", agent: '1'}
	leanOldAgent = way{name: "lean, agent on Linux before 5.3", build: "lean", agent: '2'}
)

// A transparencyCase is one way of starting docker.
type transparencyCase struct {
	name   string
	ids    []string           // of the catalogue of faults
	setup  []string           // of testdata/probe/launch.go
	args   []string           // of docker; none asks the probe for what it sees
	tool   string             // the program in docker's place, probe if empty
	path   string             // by which docker is called
	sees   map[string]string  // what the direct start must see, so that it is known to be set up
	file   bool               // the probe writes to a file, because standard output is part of the case
	root   bool               // needs root
	varies []string           // what is not the same in any two runs of this case
	lost   bool               // the record cannot be kept
	ways   []way              // lean and usual, if empty
	can    func(t *testing.T) // skips the test where the machine cannot do it
	run    func(t *testing.T, st *stage, c *transparencyCase, w way) probe.State
	after  func(t *testing.T, st *stage) // undoes what the setup did to files
}

func (c *transparencyCase) see(t *testing.T, st *stage, w way) probe.State {
	t.Helper()
	st.place(t, w, c.tool)
	if c.run != nil {
		return c.run(t, st, c, w)
	}
	s := st.start(t, c)
	if c.after != nil {
		c.after(t, st)
	}
	return s
}

// A stage is a folder in which docker is the probe or a shim before it, at one path.
type stage struct {
	dir    string
	docker string // the path under test
	acked  atomic.Int64
}

// newStage makes the folder readable for all, because some cases start docker as
// another user.
func newStage(t *testing.T) *stage {
	t.Helper()
	builtShims(t)
	dir, err := os.MkdirTemp("/dev/shm", "stage") // where append files may be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.Chmod(dir+"/locked", 0o755) // see the case of a folder that cannot be read
		os.RemoveAll(dir)
	})
	st := &stage{dir: dir, docker: dir + "/bin/docker"}
	for _, sub := range []string{"", "/bin", "/work", "/jail", "/jail/bin", "/jail/run", "/run", "/run-1", "/run-2", "/strange"} {
		if err := errors.Join(os.MkdirAll(dir+sub, 0o755), os.Chmod(dir+sub, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"/jail/run", "/run", "/run-1", "/run-2"} {
		if err := errors.Join(os.Mkdir(dir+sub+"/spool", 0o755), os.Chmod(dir+sub+"/spool", os.ModeSticky|0o733)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"lean", "usual", "probe", "probe-usual"} {
		copyFile(t, shims.dir+"/"+name, dir+"/"+name)
	}
	cat, err := exec.LookPath("cat")
	if err == nil {
		cat, err = filepath.EvalSymlinks(cat)
	}
	if err != nil {
		t.Fatal(err)
	}
	copyFile(t, cat, dir+"/cat")
	// What a search relative to the working directory would find.
	copyFile(t, shims.dir+"/probe-usual", dir+"/strange/docker.original")
	if err := os.Symlink("bin", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, answer := range []byte{'1', '2'} {
		st.serve(t, answer)
	}
	return st
}

// serve is an agent that answers each record with one byte.
func (st *stage) serve(t *testing.T, answer byte) {
	l, err := net.Listen("unixpacket", st.dir+"/run-"+string(answer)+"/agent.sock")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if n, err := conn.Read(buf); err == nil && n > 0 {
				st.acked.Add(1)
				conn.Write([]byte{answer})
			}
			conn.Close()
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
}

// place puts the tool, or a shim before the tool, at the path under test.
func (st *stage) place(t *testing.T, w way, tool string) {
	t.Helper()
	if tool == "" {
		tool = "probe"
	}
	for _, root := range []string{"", "/jail"} {
		bin := st.dir + root + "/bin/"
		os.Remove(bin + "docker")
		os.Remove(bin + "docker.original")
		run := st.dir + "/run"
		if root != "" {
			run = "/run"
		} else if w.agent != 0 {
			run += "-" + string(w.agent)
		}
		err := os.WriteFile(bin+"tallyman.conf", []byte("run_dir = "+run+"\n"), 0o644)
		if w.build == "" {
			err = errors.Join(err, os.Link(st.dir+"/"+tool, bin+"docker"))
		} else {
			err = errors.Join(err, os.Link(st.dir+"/"+w.build, bin+"docker"), os.Link(st.dir+"/"+tool, bin+"docker.original"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// handedOver counts the records of a way so far. An agent may take a record so late that
// the shim puts it into the append file too.
func (st *stage) handedOver(w way) int64 {
	n := st.acked.Load()
	names, _ := filepath.Glob(st.dir + "/run*/spool/*.jsonl")
	jailed, _ := filepath.Glob(st.dir + "/jail/run/spool/*.jsonl")
	for _, name := range append(names, jailed...) {
		if fi, err := os.Stat(name); err == nil {
			n += fi.Size()
		}
	}
	return n
}

// command starts docker by the launcher.
func (st *stage) command(setup []string, path string, args ...string) *exec.Cmd {
	all := append([]string{"launch", "noenv"}, "env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "env=GITHUB_REPOSITORY=octo/shop", "env=GITHUB_RUN_ID=1")
	all = append(append(append(all, setup...), "--", path), args...)
	cmd := exec.Command(st.dir+"/probe", all...)
	cmd.Dir = st.dir + "/work"
	return cmd
}

// start runs one case and returns what the probe saw and how it ended.
func (st *stage) start(t *testing.T, c *transparencyCase) probe.State {
	t.Helper()
	setup := slices.Clone(c.setup)
	for i := range setup {
		setup[i] = strings.ReplaceAll(setup[i], "STAGE", st.dir)
	}
	out := st.dir + "/out"
	if c.file {
		os.Remove(out)
		setup = append([]string{setup[0], "env=PROBE_OUT=" + out}, setup[1:]...)
	}
	path := st.docker
	if c.path != "" {
		path = strings.ReplaceAll(c.path, "STAGE", st.dir)
	}
	cmd := st.command(setup, path, c.args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	mustBeSetUp(t, stderr.String())
	b := stdout.Bytes()
	if c.file {
		b, _ = os.ReadFile(out)
	}
	s := probe.State{}
	if c.args == nil && len(b) > 0 {
		s = parseState(t, b)
		if s["pid"] != strconv.Itoa(cmd.Process.Pid) || s["parent pid"] != strconv.Itoa(os.Getpid()) {
			t.Errorf("the probe has pid %s and parent %s, want %d and %d", s["pid"], s["parent pid"], cmd.Process.Pid, os.Getpid())
		}
	} else {
		s["standard output"] = string(b)
	}
	s["exit status"] = fmt.Sprintf("%#x", cmd.ProcessState.Sys().(syscall.WaitStatus))
	s["standard error"] = stderr.String()
	return s
}

// mustBeSetUp ends the case where the launcher says that it could not do as told: not
// every container and user may change everything.
func mustBeSetUp(t *testing.T, said string) {
	t.Helper()
	if !strings.HasPrefix(said, "launch: ") {
		return
	}
	for _, forbidden := range []string{"operation not permitted", "permission denied", "function not implemented", "read-only file system"} {
		if strings.Contains(said, forbidden) {
			faults.CannotRun(t, "cannot be set up: "+strings.TrimSpace(said))
		}
	}
	t.Fatal(said)
}

func parseState(t *testing.T, b []byte) probe.State {
	t.Helper()
	var s probe.State
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatalf("%v: %q", err, b)
	}
	return s
}

// A difference is a line of testdata/differences.tsv.
type difference struct {
	builds, cases, property, what, why string
	seen                               bool
}

type differences struct {
	rows []*difference
	ran  map[string]bool // cases that were compared
}

//go:embed testdata/differences.tsv
var differencesTSV string

func readDifferences(t *testing.T) *differences {
	t.Helper()
	book := &differences{ran: map[string]bool{}}
	for line := range strings.Lines(differencesTSV) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Split(line, "\t")
		if len(f) != 5 {
			t.Fatalf("testdata/differences.tsv: %d columns in %q, want 5", len(f), line)
		}
		book.rows = append(book.rows, &difference{builds: f[0], cases: f[1], property: f[2], what: f[3], why: f[4]})
	}
	return book
}

// named tells whether a difference is expected, and notes that it was seen.
func (d *differences) named(w way, name, property string) bool {
	found := false
	for _, row := range d.rows {
		if (row.builds == "both" || row.builds == w.build) && (row.cases == "*" || slices.Contains(strings.Split(row.cases, " | "), name)) &&
			slices.Contains(strings.Split(row.property, " | "), property) {
			row.seen, found = true, true
		}
	}
	return found
}

// check finds the rows that are no longer true. It cannot tell where not all cases ran.
func (d *differences) check(t *testing.T) {
	for _, row := range d.rows {
		complete := true
		for name := range strings.SplitSeq(row.cases, " | ") {
			if name == "*" {
				name = "plainly"
			}
			complete = complete && d.ran[name]
		}
		if !row.seen && complete && !t.Failed() {
			t.Errorf("testdata/differences.tsv: %q is no longer seen in %q; take it out", row.what, row.cases)
		}
	}
}

var updatePage = flag.Bool("update-transparency", false, "write ../docs/transparency.md again")

// TestTransparencyPage: the page says which cases are compared and what differs, as the
// test above has it.
func TestTransparencyPage(t *testing.T) {
	var page strings.Builder
	page.WriteString("# What a tool sees of the shim\n\n" +
		"<!-- Written by `go test ./wrapper -run TestTransparencyPage -update-transparency`; a test fails when it is stale. -->\n\n" +
		"The shim becomes the real tool by `execve` in the same process, so pid and parent stay. `TestTransparency` in `wrapper` starts a probe at one path in the\n" +
		"ways listed below, directly and through the shim, and compares all that the probe and its parent see: arguments, environment, working\n" +
		"directory, descriptors with their flags and offsets, limits, ids, capabilities, signals, scheduling, timers, name spaces, control groups, terminal,\n" +
		"output and wait status (`internal/probe`). A difference that is not in these tables fails the test, and so does one that is no longer seen.\n\n")
	table := func(heading, text string, builds ...string) {
		page.WriteString("## " + heading + "\n\n" + text + "\n\n| what differs | why |\n| --- | --- |\n")
		for _, row := range readDifferences(t).rows {
			if slices.Contains(builds, row.builds) {
				page.WriteString("| " + row.what + ". | " + row.why + ". |\n")
			}
		}
		page.WriteString("\n")
	}
	table("What differs", "The shim as `make build` makes it:", "both", "lean")
	page.WriteString("Not compared, because they differ between any two starts: times, addresses, and the counters of processor time and page faults, which the shim's\nown start adds to. `execve` of the path succeeds also where the real tool is missing or damaged; the exit code is 127 or 126 then.\n\n")
	table("With Go's usual runtime", "With a Go version that `internal/leanbuild` does not know, it builds the shim with the runtime as it is, and says so. Then these come in addition:", "usual")
	page.WriteString("## The cases\n\n")
	for _, c := range (&stage{}).cases() {
		page.WriteString("- " + c.name)
		if len(c.ids) > 0 {
			page.WriteString(" (" + strings.Join(c.ids, ", ") + ")")
		}
		page.WriteString("\n")
	}
	const path = "../docs/transparency.md"
	if *updatePage {
		if err := os.WriteFile(path, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != page.String() {
		t.Errorf("%s is stale (%v): go test ./wrapper -run TestTransparencyPage -update-transparency", path, err)
	}
}
