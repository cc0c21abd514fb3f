package hook

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

// HK-18: what a hook may take for granted is nothing.
func TestBareHook(t *testing.T) {
	for _, row := range []struct {
		name   string
		redir  string // for the shell that starts the tool
		env    []string
		sealed bool
	}{
		{"an empty environment", "", nil, true},
		{"no HOME and no PATH", "", jobEnv(), true},
		{"stdin closed", "<&-", jobEnv(), true},
		{"stdout closed", ">&-", jobEnv(), true},
		{"stderr closed", "2>&-", jobEnv(), true},
		{"all closed", "<&- >&- 2>&-", jobEnv(), true},
		{"stdout is full", ">/dev/full 2>/dev/full", jobEnv(), true},
		{"stdout has no reader", "| :", jobEnv(), true},
		{"a deleted working folder", "", jobEnv(), true},
	} {
		t.Run(row.name, func(t *testing.T) {
			faults.Case(t, "HK-18")
			s := newStage(t)
			s.StartedTimeout = 20 * time.Second // not the subject here, and the machine may be busy
			for _, op := range []string{"job-started", "job-completed"} {
				script := fmt.Sprintf("%s hook %s %s", s.self, op, row.redir)
				if strings.HasPrefix(row.redir, "|") {
					script = "set -o pipefail; " + script
				}
				dir := t.TempDir()
				if row.name == "a deleted working folder" {
					script = "cd " + dir + " && rmdir " + dir + " && " + script
				}
				cmd := exec.Command("/bin/bash", "-c", script)
				cmd.Env = append([]string{s.setup.env()}, row.env...)
				out, err := cmd.CombinedOutput()
				if err != nil || len(out) != 0 {
					t.Errorf("%s: %v, output %q", op, err, out)
				}
			}
			s.eventually("the job is sealed and over", func() bool {
				all := s.contexts()
				return len(all) == 1 && all[0].Outcome == Completed
			})
		})
	}
}

// HK-19: the run folder cannot be written to; the seal does not need it.
func TestReadOnlyFolders(t *testing.T) {
	if os.Geteuid() != 0 {
		faults.Case(t, "HK-19")
		faults.CannotRun(t, "needs root, to mount a file system read-only")
	}
	for _, which := range []string{"run", "state"} {
		t.Run(which, func(t *testing.T) {
			faults.Case(t, "HK-19")
			s := newStage(t)
			s.StartedTimeout = 20 * time.Second // not the subject here, and the machine may be busy
			dir := smallDisk(t)
			if which == "run" {
				s.RunDir = filepath.Join(dir, "run")
			} else {
				s.StateDir = filepath.Join(dir, "state")
			}
			if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
				t.Fatalf("remount %s read-only: %v", dir, err)
			}
			s.NoAgent = true
			out := s.tool("job-started", jobEnv()...)
			if !strings.HasPrefix(out, "tallyman: ") || !strings.Contains(out, "read-only file system") || strings.Count(out, "\n") != 1 {
				t.Errorf("said %q", out)
			}
			all, _ := s.store().List()
			if sealed := len(all) == 1; sealed != (which == "run") {
				t.Errorf("sealed %v", sealed)
			}
		})
	}
}

// HK-20: a tallyman that was built for another machine.
func TestBinaryOfAnotherArchitecture(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint16(b[18:], uint16(elf.EM_S390)) // e_machine (elf(5))
	for _, shell := range shells {
		for _, hook := range []string{"job-started.sh", "job-completed.sh"} {
			t.Run(shell+" "+hook, func(t *testing.T) {
				faults.Case(t, "HK-20")
				s := newScripts(t, shell)
				write(t, s.path("tallyman"), string(b))
				if err := exec.Command(s.path("tallyman"), "hook").Run(); !errors.Is(err, syscall.ENOEXEC) {
					t.Fatalf("the binary: %v, want it to be of another architecture", err)
				}
				if code, out := s.run(hookScript(hook)); code != 0 || out != "" {
					t.Errorf("exit code %d, output %q", code, out)
				}
			})
		}
	}
}

// HK-21: two runners on one machine share the store.
func TestTwoRunners(t *testing.T) {
	faults.Case(t, "HK-21")
	var a recorder
	o, out := here(t, &a)
	env := func(runner, tracking, job string) []string {
		return append(jobEnv(), "RUNNER_NAME="+runner, "RUNNER_TRACKING_ID="+tracking, "GITHUB_JOB="+job)
	}
	store := o.Store()
	open := func() (jobs string) {
		for _, c := range list(t, store) {
			if c.Open() {
				jobs += c.CI.Job + " "
			}
		}
		return jobs
	}
	call := func(hook string, environ []string) {
		t.Helper()
		o.Environ = environ
		run := JobStarted
		if hook == "completed" {
			run = JobCompleted
		}
		if err := run(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	call("started", env("r1", "github_1", "one"))
	call("started", env("r2", "github_2", "two"))
	if got := open(); got != "two one " {
		t.Fatalf("open: %q, want both", got)
	}
	now := time.Now()
	for id, want := range map[string]string{"github_1": "one", "github_2": "two", "": "", "github_3": ""} {
		c, _, err := store.Find(id, now)
		got := ""
		if c != nil {
			got = c.CI.Job
		}
		if err != nil || got != want {
			t.Errorf("a record with the id %q goes to job %q (%v), want %q", id, got, err, want)
		}
	}
	call("completed", env("r1", "github_1", "one"))
	if got := open(); got != "two " {
		t.Errorf("after the end of the first: open %q, want the second", got)
	}
	call("started", env("r1", "github_4", "four"))
	call("completed", env("r2", "github_2", "two"))
	if got := open(); got != "four " {
		t.Errorf("open: %q, want the third job alone", got)
	}
	for _, c := range list(t, store) {
		if !c.Open() && c.Outcome != Completed {
			t.Errorf("job %s ended %q", c.CI.Job, c.Outcome)
		}
	}
	if out.Len() != 0 {
		t.Errorf("said %q", out)
	}
}

// HK-22: the clock is set back while the job runs.
func TestClockSetBackInAJob(t *testing.T) {
	faults.Case(t, "HK-22")
	o, _ := here(t, &recorder{})
	began := time.Now().Add(time.Hour)
	o.Now = func() time.Time { return began }
	if err := JobStarted(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	boot := sinceBoot()
	o.Now = time.Now // an hour before
	for sinceBoot()-boot < int64(20*time.Millisecond) {
		time.Sleep(time.Millisecond)
	}
	if err := JobCompleted(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	store := o.Store()
	c := list(t, store)[0]
	took := c.Ended.Sub(c.Started)
	if c.Outcome != Completed || took < 20*time.Millisecond || took > time.Duration(sinceBoot()-boot)+time.Second {
		t.Errorf("%s after %v, want completed after what the boot clock says", c.Outcome, took)
	}
	// Where no boot clock tells, the end is not before the start.
	if c, err := store.Seal(aContext("9", "github_9", "r9", time.Now())); err != nil {
		t.Fatal(err)
	} else if err := store.End(c.Key, Completed, c.Started.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if c := list(t, store).Of(&Context{CI: aContext("9", "github_9", "r9", time.Now()).CI}); c == nil || !c.Ended.Equal(c.Started) {
		t.Errorf("%+v, want it ended when it began", c)
	}
}

// HK-23: folders that a person names.
func TestFoldersWithSpacesAndNewlines(t *testing.T) {
	faults.Case(t, "HK-23")
	s := newStage(t)
	s.StartedTimeout = 20 * time.Second // not the subject here, and the machine may be busy
	s.Markdown = "### Docker\n"
	odd := filepath.Join(s.dir, "my runner\n::error::x")
	if err := os.Rename(s.root(), odd); err != nil {
		t.Fatal(err)
	}
	tool := filepath.Join(odd, "a tally man")
	if err := os.Symlink(s.self, tool); err != nil {
		t.Fatal(err)
	}
	// As s.job does, from the runner's new place.
	cmd := exec.Command(filepath.Join(odd, "bin", "Runner.Worker"))
	got := s.jobOf(cmd, 1, func(p *play) { p.Root, p.Env = odd, append(p.Env, "TALLYMAN_BIN="+tool) })
	if got.Start.Code != 0 || got.End.Code != 0 || got.Start.Stdout+got.End.Stdout != "" {
		t.Errorf("hooks: %+v, %+v", got.Start, got.End)
	}
	if got.Summary != s.Markdown {
		t.Errorf("summary %q", got.Summary)
	}
	c := s.contexts()[0]
	if c.Outcome != Completed || c.RunnerPID != got.PID || strings.Contains(c.Workspace, "\n") || !strings.Contains(c.Workspace, "my runner") {
		t.Errorf("context %+v", c)
	}
}

// HK-24: whatever stands where the summary goes, the hook is over at once and fails
// nothing.
func TestSummaryThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	mkfifo(t, path("fifo"))
	mkfifo(t, path("read fifo"))
	reader, err := os.OpenFile(path("read fifo"), os.O_RDWR, 0) // one that reads nothing
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	write(t, path("target"), "")
	rows := map[string]string{
		"no variable": "", "missing": path("missing"), "a FIFO": path("fifo"), "a FIFO with a reader": path("read fifo"), "a device": "/dev/full",
		"a folder": dir, "a link": path("link"), "a relative path": "summary", "a name of 5,000 bytes": "/" + strings.Repeat("x", 5000),
	}
	if err := os.Symlink(path("target"), path("link")); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		full := smallDisk(t)
		write(t, filepath.Join(full, "summary"), "")
		fill(t, full)
		rows["on a full disk"] = filepath.Join(full, "summary")
		readOnly := smallDisk(t)
		write(t, filepath.Join(readOnly, "summary"), "")
		if err := syscall.Mount("", readOnly, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		rows["on a read-only disk"] = filepath.Join(readOnly, "summary")
	}
	for name, summary := range rows {
		t.Run(name, func(t *testing.T) {
			faults.Case(t, "HK-24")
			s := newStage(t)
			s.StartedTimeout = 20 * time.Second // not the subject here, and the machine may be busy
			s.NoAgent = true
			s.Markdown = "docker\n"
			s.tool("job-started", jobEnv()...)
			out := s.tool("job-completed", jobEnv("GITHUB_STEP_SUMMARY="+summary)...) // fails the test where it does not exit 0
			if strings.Count(out, "\n") > 1 || out != "" && !strings.HasPrefix(out, "tallyman: ") {
				t.Errorf("said %q", out)
			}
			if all := s.contexts(); len(all) != 1 || all[0].Outcome != Completed {
				t.Errorf("contexts %+v", all)
			}
		})
	}
	if b, _ := os.ReadFile(path("target")); len(b) != 0 {
		t.Errorf("written through a link: %q", b)
	}
	if _, err := os.Stat(path("missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a summary was made where the runner had made none")
	}
}

// HK-25: the longest values that can be, every byte of which is escaped in a record.
func TestLongValues(t *testing.T) {
	faults.Case(t, "HK-25")
	o, _ := here(t, &recorder{})
	long := func(name string) string { return name + "=" + strings.Repeat(`"`, 100<<10) }
	o.Environ = []string{"GITHUB_RUN_ATTEMPT=1"}
	for _, name := range []string{
		"GITHUB_REPOSITORY", "GITHUB_REPOSITORY_ID", "GITHUB_REPOSITORY_OWNER", "GITHUB_REPOSITORY_OWNER_ID", "GITHUB_WORKFLOW", "GITHUB_WORKFLOW_REF",
		"GITHUB_WORKFLOW_SHA", "GITHUB_JOB", "GITHUB_EVENT_NAME", "GITHUB_REF", "GITHUB_HEAD_REF", "GITHUB_SHA", "GITHUB_ACTOR", "GITHUB_TRIGGERING_ACTOR",
		"GITHUB_RUN_ID", "RUNNER_TRACKING_ID", "RUNNER_NAME", "RUNNER_OS", "RUNNER_ARCH", "RUNNER_ENVIRONMENT", "ACTIONS_ORCHESTRATION_ID", "JOB_CHECK_RUN_ID",
	} {
		o.Environ = append(o.Environ, long(name))
	}
	for range 60 {
		o.RunnerLabels = append(o.RunnerLabels, strings.Repeat("l", 5000))
	}
	if err := errors.Join(JobStarted(t.Context(), o), JobCompleted(t.Context(), o)); err != nil {
		t.Fatal(err)
	}
	store := o.Store()
	all := list(t, store)
	if len(all) != 1 || all[0].Outcome != Completed {
		t.Fatalf("%d contexts, want one that its own hook has ended", len(all))
	}
	c := all[0]
	encoded := record.Append(nil, &record.Record{ID: record.NewID(time.Now()), Kind: record.KindJobEnd, CI: &c.CI, Job: &record.Job{Outcome: Completed}})
	if len(encoded) > journal.MaxLine/2 {
		t.Errorf("the record of the job's end has %d bytes; the journal takes %d", len(encoded), journal.MaxLine)
	}
	if !bytes.HasPrefix([]byte(c.CI.Repository), []byte(`"""`)) {
		t.Errorf("repository %q", c.CI.Repository)
	}
}
