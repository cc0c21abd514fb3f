package hook

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/procfs"
	"github.com/tallyman-ci/tallyman/record"
)

// jobEnv is the environment of a hook without a runner.
func jobEnv(more ...string) []string {
	return append([]string{
		"GITHUB_REPOSITORY=acme/shop", "GITHUB_RUN_ID=1", "GITHUB_RUN_ATTEMPT=1", "GITHUB_JOB=build",
		"GITHUB_SERVER_URL=https://github.com", "RUNNER_NAME=r1", "RUNNER_TRACKING_ID=github_a",
	}, more...)
}

// here are options for hooks that do their work in the test process.
func here(t *testing.T, a *recorder) (Options, *bytes.Buffer) {
	dir := t.TempDir()
	var out bytes.Buffer
	o := Options{
		RunDir: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"), Enabled: true, Canary: 100,
		Environ: jobEnv(), Out: &out, StartedTimeout: 10 * time.Second,
	}
	if a != nil {
		o.Connect = a.connect
	}
	return o, &out
}

func TestStartedAndCompletedInOrder(t *testing.T) {
	var a recorder
	o, out := here(t, &a)
	summary := filepath.Join(t.TempDir(), "summary")
	write(t, summary, "from somebody else")
	o.Environ = append(o.Environ, "GITHUB_STEP_SUMMARY="+summary)
	var of string
	o.SummaryMarkdown = func(_ context.Context, c Context) (string, error) {
		of = c.CI.TrackingID + " " + c.Outcome
		return "docker\n", nil
	}
	if err := errors.Join(JobStarted(t.Context(), o), JobCompleted(t.Context(), o)); err != nil {
		t.Fatal(err)
	}
	if want := []string{"start build", "end completed", "flush"}; !slices.Equal(a.all(), want) {
		t.Errorf("the agent was told %q, want %q", a.all(), want)
	}
	b, _ := os.ReadFile(summary)
	if want := "from somebody else\ndocker\n"; string(b) != want {
		t.Errorf("summary %q, want %q", b, want)
	}
	if of != "github_a completed" {
		t.Errorf("the summary was asked of %q", of)
	}
	if out.Len() != 0 {
		t.Errorf("said %q", out)
	}
}

// A defect in the hook's own process is said in its output, and reaches nobody else: the
// rows of TestHK01HK15InternalFailures break the worker.
func TestDefectInTheHookItself(t *testing.T) {
	o, out := here(t, &recorder{})
	o.Now = func() time.Time { panic("the clock\n::error::boom") }
	for _, hook := range []func(context.Context, Options) error{JobStarted, JobCompleted} {
		out.Reset()
		if err := hook(t.Context(), o); err == nil || !strings.Contains(err.Error(), "internal error: the clock") {
			t.Errorf("returned %v", err)
		}
		if said := out.String(); strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, "tallyman: internal error: the clock") || strings.Contains(said, "\n::") {
			t.Errorf("said %q, want one line that commands the runner nothing", said)
		}
	}
}

// HK-06 for the whole hook: as an image's hook and as ARC's drop-in.
func TestHK06HooksRunTwice(t *testing.T) {
	faults.Case(t, "HK-06")
	var a recorder
	o, _ := here(t, &a)
	for _, hook := range []func(context.Context, Options) error{JobStarted, JobStarted, JobCompleted, JobCompleted} {
		if err := hook(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	store := o.Store()
	all := list(t, store)
	if len(all) != 1 || all[0].Outcome != Completed {
		t.Errorf("contexts %+v, want one, completed", all)
	}
}

// The stale GITHUB_ACTION of a job-completed hook, and what else makes a context of
// the job another one than it was.
func TestCompletedEndsTheContextOfItsJob(t *testing.T) {
	for _, row := range []struct {
		name    string
		environ []string
		ends    bool
	}{
		{"its own", jobEnv(), true},
		{"with the last step's action", jobEnv("GITHUB_ACTION=__run_9", "GITHUB_ACTION_REPOSITORY=a/b"), true},
		{"with an orchestration id", jobEnv("ACTIONS_ORCHESTRATION_ID=x"), true},
		{"another job's", append(jobEnv(), "RUNNER_TRACKING_ID=github_b"), false},
	} {
		o, _ := here(t, &recorder{})
		if err := JobStarted(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		o.Environ = row.environ
		if err := JobCompleted(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		store := o.Store()
		if a, _ := store.Active(); (a == nil) != row.ends {
			t.Errorf("%s: open context %+v, want it ended: %v", row.name, a, row.ends)
		}
	}
}

func TestSummary(t *testing.T) {
	for _, row := range []struct {
		mode, text string // how it is configured, what there is to say
		before     string // what the file holds
		want       string
		says       string
	}{
		{mode: SummaryAuto, text: "x\n", want: "x\n"},
		{mode: SummaryAuto, text: "", want: ""},
		{mode: SummaryAlways, text: "", want: noDocker},
		{mode: SummaryAlways, text: "x\n", want: "x\n"},
		{mode: SummaryOff, text: "x\n", want: ""},
		{mode: "", text: "x\n", want: "x\n"},
		{mode: SummaryAuto, text: "x\n", before: strings.Repeat("a", maxStepSummary-3), want: strings.Repeat("a", maxStepSummary-3) + "\nx\n"},
		{mode: SummaryAuto, text: "x\n", before: strings.Repeat("a", maxStepSummary-2), want: strings.Repeat("a", maxStepSummary-2), says: "refuses"},
		{mode: SummaryAuto, text: "a\x00\xff\n", want: "a\uFFFD\uFFFD\n"},
		{mode: SummaryAuto, text: strings.Repeat("a line\n", maxSummary), want: strings.Repeat("a line\n", 9357) + "\n_The rest of this summary was cut._\n"},
	} {
		o, out := here(t, &recorder{})
		path := filepath.Join(t.TempDir(), "summary")
		write(t, path, row.before)
		o.Summary, o.Environ = row.mode, jobEnv("GITHUB_STEP_SUMMARY="+path)
		o.SummaryMarkdown = func(context.Context, Context) (string, error) { return row.text, nil }
		_ = JobCompleted(t.Context(), o)
		b, _ := os.ReadFile(path)
		if string(b) != row.want {
			t.Errorf("%s with %.20q: %d bytes %.60q, want %d %.60q", row.mode, row.text, len(b), b, len(row.want), row.want)
		}
		if (row.says == "") != (out.Len() == 0) || !strings.Contains(out.String(), row.says) {
			t.Errorf("%s with %.20q: said %q, want %q", row.mode, row.text, out, row.says)
		}
	}
}

// The summary goes into the runner's file or nowhere.
func TestSummaryFileThatIsNone(t *testing.T) {
	faults.Case(t, "HK-24")
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	write(t, target, "")
	_ = os.Symlink(target, filepath.Join(dir, "link"))
	mkfifo(t, filepath.Join(dir, "fifo"))
	for name, says := range map[string]string{"link": "too many levels", "fifo": "no such device", ".": "is a directory", "missing": "", "missing/x": ""} {
		err := appendSummary(filepath.Join(dir, name), "x\n")
		if (says == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", name, err, says)
		}
	}
	if b, _ := os.ReadFile(target); len(b) != 0 {
		t.Errorf("written through a link: %q", b)
	}
	if _, err := os.Stat(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a summary file was made")
	}
}

func TestSwitchedOff(t *testing.T) {
	mine := filepath.Join(t.TempDir(), "mine")
	write(t, mine, "")
	roots := filepath.Join(t.TempDir(), "roots")
	write(t, roots, "")
	if os.Geteuid() == 0 {
		if err := os.Chown(mine, 12345, 12345); err != nil {
			t.Fatal(err)
		}
	} else {
		roots = "/etc/passwd" // stands for a file of root's
	}
	for _, row := range []struct {
		name   string
		change func(*Options)
		off    bool
	}{
		{"on", func(*Options) {}, false},
		{"configuration", func(o *Options) { o.Enabled = false }, true},
		{"the pod says off", func(o *Options) { o.Environ = jobEnv("TALLYMAN=off") }, true},
		{"the pod says OFF", func(o *Options) { o.Environ = jobEnv("TALLYMAN=OFF") }, true},
		{"the pod says 0", func(o *Options) { o.Environ = jobEnv("TALLYMAN=0") }, true},
		{"the pod says false", func(o *Options) { o.Environ = jobEnv("TALLYMAN=false") }, true},
		{"the pod says on", func(o *Options) { o.Environ = jobEnv("TALLYMAN=on") }, false},
		{"root's off file", func(o *Options) { o.OffFile = roots }, true},
		{"an off file of the job's", func(o *Options) { o.OffFile = mine }, false},
		{"no off file", func(o *Options) { o.OffFile = mine + "x" }, false},
		{"canary 0", func(o *Options) { o.Canary = 0 }, true},
		{"zero options", func(o *Options) { o.Enabled, o.Canary = false, 0 }, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			var a recorder
			o, out := here(t, &a)
			marker := filepath.Join(o.RunDir, "off")
			// An earlier job of this runner was accounted for, and its end was never seen.
			earlier := o
			earlier.Environ = append(jobEnv(), "RUNNER_TRACKING_ID=github_earlier")
			if err := JobStarted(t.Context(), earlier); err != nil {
				t.Fatal(err)
			}
			if !row.off { // and one before was not
				if err := os.MkdirAll(o.RunDir, 0o755); err != nil {
					t.Fatal(err)
				}
				write(t, marker, "off")
			}
			row.change(&o)
			if err := JobStarted(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(marker); (err == nil) != row.off {
				t.Errorf("the marker is there: %v, want %v", err == nil, row.off)
			}
			store := o.Store()
			active, _ := store.Active()
			if row.off != (active == nil) {
				t.Errorf("open context %+v", active)
			}
			if active != nil && active.CI.TrackingID != "github_a" {
				t.Errorf("the open context is that of %s", active.CI.TrackingID)
			}
			want := []string{"start build", "start build"}
			if row.off {
				want = []string{"start build", "end superseded"}
			}
			if !slices.Equal(a.all(), want) {
				t.Errorf("the agent was told %q, want %q", a.all(), want)
			}
			if out.Len() != 0 {
				t.Errorf("said %q", out)
			}
			// The end of a job during which everything was switched off.
			o.SummaryMarkdown = func(context.Context, Context) (string, error) { t.Error("a summary was made"); return "", nil }
			if row.off {
				if err := JobCompleted(t.Context(), o); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Several runners of one machine have one marker: one that the canary leaves out must
// not end the account of another's running job, and any other switch must.
func TestCanaryBesideAnotherRunner(t *testing.T) {
	me, err := procfs.Read(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name   string
		other  func(*Context) // the job of another runner
		change func(*Options)
		off    bool
	}{
		{"no other", nil, func(o *Options) { o.Canary = 0 }, true},
		{"another runs", func(*Context) {}, func(o *Options) { o.Canary = 0 }, false},
		{"another has ended", func(c *Context) { c.Ended, c.Outcome = time.Now(), Completed }, func(o *Options) { o.Canary = 0 }, true},
		{"another was killed", func(c *Context) { c.RunnerStart++ }, func(o *Options) { o.Canary = 0 }, true},
		{"another's end cannot be known", func(c *Context) { c.RunnerPID = 0 }, func(o *Options) { o.Canary = 0 }, true},
		{"another runs, and the pod says off", func(*Context) {}, func(o *Options) { o.Environ = jobEnv("TALLYMAN=off") }, true},
		{"another runs, and the configuration says off", func(*Context) {}, func(o *Options) { o.Enabled = false }, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			var a recorder
			o, _ := here(t, &a)
			if row.other != nil {
				c := Context{CI: record.CI{RunID: "8", TrackingID: "github_other", Runner: &record.Runner{Name: "other"}},
					Host: HostFromEnvironment(nil), Started: time.Now(), RunnerPID: os.Getpid(), RunnerStart: me.Start}
				row.other(&c)
				if _, err := o.Store().Seal(c); err != nil {
					t.Fatal(err)
				}
			}
			row.change(&o)
			if err := JobStarted(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(filepath.Join(o.RunDir, "off")); (err == nil) != row.off {
				t.Errorf("the marker is there: %v, want %v", err == nil, row.off)
			}
		})
	}
}

// The shims of all users look for the marker.
func TestOffMarkerIsSeenByAll(t *testing.T) {
	s := newStage(t)
	s.Off = true
	if err := os.Remove(s.RunDir); err != nil {
		t.Fatal(err)
	}
	s.tool("job-started", jobEnv()...)
	for path, want := range map[string]fs.FileMode{s.RunDir: 0o755, filepath.Join(s.RunDir, "off"): 0o644} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, mode %v, want %v", path, err, fi.Mode().Perm(), want)
		}
	}
}

// Switched off while a job runs: its end still ends it.
func TestSwitchedOffDuringAJob(t *testing.T) {
	var a recorder
	o, _ := here(t, &a)
	if err := JobStarted(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	o.Enabled = false
	if err := JobCompleted(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	store := o.Store()
	if all := list(t, store); all[0].Outcome != Completed {
		t.Errorf("outcome %q", all[0].Outcome)
	}
}

func TestCanary(t *testing.T) {
	names := make([]string, 2000)
	for i := range names {
		names[i] = fmt.Sprintf("fleet-runner-%05x", i*7919)
	}
	count := func(percent float64) (n int) {
		for _, name := range names {
			if inCanary(name, percent) {
				n++
			}
		}
		return n
	}
	for percent, want := range map[float64][2]int{-1: {0, 0}, 0: {0, 0}, 1: {8, 35}, 10: {150, 250}, 50: {900, 1100}, 100: {2000, 2000}} {
		if n := count(percent); n < want[0] || n > want[1] {
			t.Errorf("%g %% of 2000 runners are %d, want %d to %d", percent, n, want[0], want[1])
		}
	}
	for _, name := range names {
		if inCanary(name, 5) && !inCanary(name, 6) {
			t.Errorf("%s is in at 5 %% and out at 6 %%", name)
		}
	}
	// Stable over versions: a fleet's canaries do not change with an update.
	if !inCanary("runner-1", 63.5) || inCanary("runner-1", 63.4) { // 63.4945 %
		t.Errorf("the hash of a runner's name has changed")
	}
}

// HK-01 and HK-15: whatever is broken, the hooks exit 0 and say one plain line at
// most. The runner's own file is the whole truth: exit code and output.
func TestHK01HK15InternalFailures(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(t *testing.T, s *stage, p *play)
		says   string // in the output of the first hook; "" means nothing is said
		sealed bool
		fault  string // a case of the catalogue beside those of the whole test
	}{
		{"nothing", func(*testing.T, *stage, *play) {}, "", true, ""},
		{"no tallyman", func(_ *testing.T, s *stage, p *play) {
			p.Env = []string{"PATH=/bin:/usr/bin", "TALLYMAN_BIN=/nonexistent"}
		}, "", false, "HK-20"},
		{"tallyman cannot be executed", func(t *testing.T, s *stage, p *play) {
			path := filepath.Join(s.dir, "tallyman")
			write(t, path, "\x7fELF damaged")
			p.Env = append(p.Env, "TALLYMAN_BIN="+path)
		}, "", false, "HK-20"},
		{"tallyman fails", func(_ *testing.T, s *stage, p *play) { p.Env = append(p.Env, "TALLYMAN_BIN=/bin/false") }, "", false, "HK-20"},
		{"tallyman is a directory", func(_ *testing.T, s *stage, p *play) { p.Env = append(p.Env, "TALLYMAN_BIN="+s.dir) }, "", false, "HK-20"},
		{"no PATH", func(_ *testing.T, s *stage, p *play) {
			p.Env = slices.DeleteFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") })
			p.Env = append(p.Env, "PATH=")
		}, "", true, ""},
		{"state directory is a file", func(t *testing.T, s *stage, p *play) {
			s.StateDir = filepath.Join(s.dir, "file")
			write(t, s.StateDir, "")
		}, "create the directory of job contexts", false, ""},
		{"state directory cannot be made", func(t *testing.T, s *stage, p *play) { s.StateDir = "/proc/none" }, "create the directory of job contexts", false, "HK-19"},
		{"run directory cannot be made", func(t *testing.T, s *stage, p *play) { s.RunDir = "/proc/none" }, "make the run folder", true, "HK-19"},
		{"contexts is a link to nowhere", func(t *testing.T, s *stage, p *play) {
			_ = os.Symlink("/nonexistent/x", filepath.Join(s.StateDir, "contexts"))
		}, "create the directory of job contexts", false, ""},
		{"full disk", func(t *testing.T, s *stage, p *play) {
			s.StateDir = smallDisk(t)
			fill(t, s.StateDir)
		}, "no space left", false, "HK-19"},
		{"worker is missing", func(_ *testing.T, s *stage, p *play) { s.Worker = "missing" }, "", true, ""},
		{"worker crashes", func(_ *testing.T, s *stage, p *play) { s.Worker = "crash" }, "without an answer", false, ""},
		{"worker says nothing", func(_ *testing.T, s *stage, p *play) { s.Worker = "silent" }, "", false, ""},
		{"no worker", func(_ *testing.T, s *stage, p *play) { s.NoWorker = true }, "", true, ""},
		{"agent is missing", func(_ *testing.T, s *stage, p *play) { s.Agent = []string{"/nonexistent/agent"} }, "start the agent", true, ""},
		{"agent ends at once", func(_ *testing.T, s *stage, p *play) { s.Agent = []string{"/bin/false"} }, "", true, ""},
		{"panic with a workflow command", func(_ *testing.T, s *stage, p *play) { s.ConnectPanics = true }, "internal error: connect", true, ""},
		{"hostile names", func(t *testing.T, s *stage, p *play) {
			p.Spec.Workflow, p.Spec.Job = "::error::x", "\n::add-mask::y"
			s.ConnectPanics = true
		}, "internal error", true, ""},
		{"hostile contexts", func(t *testing.T, s *stage, p *play) {
			dir := filepath.Join(s.StateDir, "contexts")
			_ = os.MkdirAll(dir, 0o700)
			for i := range 20 {
				write(t, filepath.Join(dir, fmt.Sprintf("%d.json", i)), "::error::{")
				mkfifo(t, filepath.Join(dir, fmt.Sprintf("f%d.json", i)))
			}
		}, "", true, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			faults.Case(t, "HK-01", "HK-15")
			if row.fault != "" {
				faults.Case(t, row.fault)
			}
			s := newStage(t)
			s.CompletedTimeout = time.Second
			run := func(p *play) {
				row.change(t, s, p)
				// The setup is part of the environment: take it as changed.
				for i, e := range p.Env {
					if strings.HasPrefix(e, "TALLYMAN_TEST=") {
						p.Env[i] = s.setup.env()
					}
				}
			}
			got := s.job(1, run)
			for hook, r := range map[string]struct {
				code int
				out  string
				held bool
			}{
				"job-started":   {got.Start.Code, got.Start.Stdout + got.Start.Stderr, got.Start.Held},
				"job-completed": {got.End.Code, got.End.Stdout + got.End.Stderr, got.End.Held},
			} {
				if r.code != 0 || r.held {
					t.Errorf("%s: exit code %d, output held open %v", hook, r.code, r.held)
				}
				if strings.Count(r.out, "\n") > 1 || r.out != "" && !strings.HasPrefix(r.out, "tallyman: ") {
					t.Errorf("%s said %q", hook, r.out)
				}
			}
			if out := got.Start.Stdout; (row.says == "") != (out == "") || !strings.Contains(out, row.says) {
				t.Errorf("job-started said %q, want %q", out, row.says)
			}
			sealed := false
			if all, _ := s.store().List(); len(all) > 0 {
				sealed = all[0].CI.TrackingID == got.TrackingID
			}
			if sealed != row.sealed {
				t.Errorf("sealed: %v, want %v", sealed, row.sealed)
			}
		})
	}
}

// HK-02: what the runner demands of a hook's file.
func TestHK02TheScriptsAreFilesTheRunnerTakes(t *testing.T) {
	faults.Case(t, "HK-02")
	for _, name := range []string{"job-started.sh", "job-completed.sh"} {
		path := hookScript(name)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		fi, _ := os.Stat(path)
		// 0755 as git keeps it; what a umask adds for the group is the clone's.
		if fi.Mode().Perm()&^0o020 != 0o755 || !fi.Mode().IsRegular() {
			t.Errorf("%s has mode %v, want a regular file of mode 0755", name, fi.Mode())
		}
		if !bytes.HasPrefix(b, []byte("#!/bin/sh\n")) || bytes.Contains(b, []byte("\r")) {
			t.Errorf("%s: want #!/bin/sh and no carriage returns", name)
		}
		if strings.ContainsAny(name, " ") || filepath.Ext(name) != ".sh" {
			t.Errorf("%s: the runner takes .sh only, and does not quote the path", name)
		}
		for _, tool := range [][]string{{"bash", "-n", path}, {"dash", "-n", path}, {"shellcheck", path}, {"shellcheck", "-s", "bash", path}} {
			if out, err := exec.Command(tool[0], tool[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%v: %v\n%s", tool, err, out)
			}
		}
	}
}

// HK-03: what hangs costs the job half a second, and the work is done all the same.
func TestHK03SomethingHangs(t *testing.T) {
	for _, row := range []struct {
		name  string
		setup func(*stage)
	}{
		{"the worker (a disk that does not answer)", func(s *stage) { s.WorkerSleeps = 5 * time.Second }},
		{"the agent", func(s *stage) {
			s.AgentHangs = true
			s.tool("job-started", jobEnv()...)
			s.agent()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			faults.Case(t, "HK-03")
			if budget := DefaultStartedTimeout; budget >= 500*time.Millisecond {
				t.Errorf("the hook goes on for %v", budget)
			}
			s := newStage(t)
			row.setup(s)
			began := time.Now()
			s.tool("job-started", jobEnv("RUNNER_TRACKING_ID=github_b")...)
			took := time.Since(began)
			t.Logf("the hook took %v", took.Round(time.Millisecond))
			// It gives up after 400 ms by its own clock; the rest is for a machine whose
			// processors others use. What hangs does so for longer.
			if took > 4*time.Second {
				t.Errorf("the hook took %v", took)
			}
			s.eventually("the context is sealed", func() bool {
				a, _ := s.store().Active()
				return a != nil && a.CI.TrackingID == "github_b"
			})
		})
	}
}

// A disk that answers again when the next job runs already: the late context neither
// closes the next job's nor stays open beside it.
func TestSealedTooLate(t *testing.T) {
	s := newStage(t)
	s.WorkerSleeps = lateAfter + time.Second
	s.tool("job-started", jobEnv("RUNNER_TRACKING_ID=github_late")...)
	s.WorkerSleeps = 0
	s.tool("job-started", jobEnv("RUNNER_TRACKING_ID=github_next")...)
	s.eventually("the late context is there", func() bool { return len(s.contexts()) == 2 })
	all := s.contexts()
	next, late := all[0], all[1]
	if next.CI.TrackingID != "github_next" || !next.Open() {
		t.Errorf("the next job's context is %+v, want it open", next)
	}
	if late.CI.TrackingID != "github_late" || late.Outcome != Superseded || !late.Ended.Equal(next.Started) {
		t.Errorf("the late context is %+v, want it superseded when the next began", late)
	}
}

// A clock that was set back between two jobs: the running one is the active one.
func TestClockSetBack(t *testing.T) {
	o, _ := here(t, &recorder{})
	o.Now = func() time.Time { return t0 }
	if err := JobStarted(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	o.Environ = append(jobEnv(), "RUNNER_TRACKING_ID=github_b")
	o.Now = func() time.Time { return t0.Add(-24 * time.Hour) }
	if err := JobStarted(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	store := o.Store()
	a, err := store.Active()
	if err != nil || a == nil || a.CI.TrackingID != "github_b" {
		t.Errorf("active %+v (%v), want the second job", a, err)
	}
	if c, match, _ := store.Find("", t0.Add(-time.Hour)); match != MatchTime || c.CI.TrackingID != "github_b" {
		t.Errorf("a record of now went to %+v by %q", c, match)
	}
}

func TestCompletedIsBounded(t *testing.T) {
	faults.Case(t, "HK-09")
	s := newStage(t)
	s.CompletedTimeout = 600 * time.Millisecond
	s.AgentFlush = 20 * time.Second
	s.Markdown = "docker\n"
	s.tool("job-started", jobEnv()...)
	s.agent()
	summary := filepath.Join(s.dir, "summary")
	write(t, summary, "")
	began := time.Now()
	out := s.tool("job-completed", jobEnv("GITHUB_STEP_SUMMARY="+summary)...)
	if took := time.Since(began); took > 10*time.Second { // 0.6 s, and not the flush's 20
		t.Errorf("took %v", took)
	}
	if !strings.HasPrefix(out, "tallyman: flush the agent") {
		t.Errorf("said %q", out)
	}
	// A slow sink costs neither the end of the context nor the summary.
	if all := s.contexts(); all[0].Outcome != Completed {
		t.Errorf("outcome %q", all[0].Outcome)
	}
	if b, _ := os.ReadFile(summary); string(b) != "docker\n" {
		t.Errorf("summary %q", b)
	}
}

// The agent died during the job: its files are read by another one.
func TestCompletedStartsAnAgentThatDied(t *testing.T) {
	s := newStage(t)
	s.tool("job-started", jobEnv()...)
	first := s.agent().PID
	_ = syscall.Kill(first, syscall.SIGKILL)
	s.eventually("the agent is gone", func() bool { return !alive(first) })
	if out := s.tool("job-completed", jobEnv()...); out != "" {
		t.Errorf("said %q", out)
	}
	if second := s.agent().PID; second == first {
		t.Error("no new agent")
	}
	if said := s.said(); len(said) != 2 || said[1] != "flush" {
		t.Errorf("the new agent was told %q", said)
	}
}

// HK-09: a first SIGINT, 7.5 s later SIGTERM, 2.5 s later SIGKILL.
func TestHK09CancelledDuringTheFlush(t *testing.T) {
	faults.Case(t, "HK-09")
	s := newStage(t)
	s.CompletedTimeout = 20 * time.Second
	s.AgentFlush = 20 * time.Second
	s.tool("job-started", jobEnv()...)
	s.agent()
	cmd := exec.Command(s.self, "hook", "job-completed")
	cmd.Env = s.env(jobEnv()...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.eventually("the context has ended", func() bool { a, _ := s.store().Active(); return a == nil })
	began := time.Now()
	_ = cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the hook ended with %v", err)
	}
	if took := time.Since(began); took > 12*time.Second { // 1.5 s, and not the flush's 20
		t.Errorf("the hook went on for %v after the signal", took)
	}
	if signalGrace >= 2*time.Second {
		t.Errorf("a hook goes on for %v after a signal", signalGrace)
	}
}

// HK-17: the jobs after a hostile one.
func TestHK17PinnedFiles(t *testing.T) {
	faults.Case(t, "HK-17")
	dir := t.TempDir()
	file := filepath.Join(dir, "tallyman")
	write(t, file, "binary")
	sum := sha256.Sum256([]byte("binary"))
	good := hex.EncodeToString(sum[:])
	if os.Geteuid() != 0 {
		if err := CheckOwned(file); err == nil {
			t.Error("a file of the runner's user counts as root's")
		}
		faults.CannotRun(t, "needs root, to make files that are root's")
	}
	// A temporary directory is root's own down from the sticky /tmp.
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name   string
		change func()
		path   string
		pin    string
		says   string
	}{
		{"as installed", func() {}, file, good, ""},
		{"upper case", func() {}, file, strings.ToUpper(good), ""},
		{"by a link of root's", func() {}, link, good, ""},
		{"by a link of the job's", func() { _ = os.Lchown(link, 12345, 12345) }, link, good, "belongs to uid 12345"},
		{"another content", func() { write(t, file, "evil") }, file, good, "was changed"},
		{"missing", func() { _ = os.Remove(file) }, file, good, "no such file"},
		{"a FIFO", func() { mkfifo(t, file) }, file, good, "not a regular file"},
		{"another owner", func() { _ = os.Remove(file); write(t, file, "binary"); _ = os.Chown(file, 12345, 0) }, file, good, "belongs to uid 12345"},
		{"writable", func() { _ = os.Chown(file, 0, 0); _ = os.Chmod(file, 0o757) }, file, good, "writable for others"},
		{"writable for a group", func() { _ = os.Chmod(file, 0o775) }, file, good, "writable for others"},
		{"in a writable directory", func() { _ = os.Chmod(file, 0o755); _ = os.Chmod(dir, 0o777) }, file, good, "writable for others"},
	} {
		row.change()
		said := strings.Join(CheckPins([]Pin{{row.path, row.pin}}), "; ")
		if (row.says == "") != (said == "") || !strings.Contains(said, row.says) {
			t.Errorf("%s: %q, want %q", row.name, said, row.says)
		}
	}

	// The hook says so on the job's page, keeps it in the context for the agent, and
	// goes on: neither the job nor its account ends here.
	s := newStage(t)
	s.StartedTimeout = 20 * time.Second // the line is said where there is time
	s.Pins = []Pin{{s.self, strings.Repeat("0", 64)}, {"/nonexistent/docker", good}}
	out := s.tool("job-started", jobEnv()...)
	if !strings.HasPrefix(out, "tallyman: "+s.self) || strings.Count(out, "\n") != 1 {
		t.Errorf("said %q", out)
	}
	all := s.contexts()
	if len(all) != 1 || len(all[0].Problems) != 2 || !strings.Contains(all[0].Problems[1], "/nonexistent/docker") {
		t.Fatalf("contexts %+v, want one with two problems", all)
	}
	s.agent()
	if said := s.said(); len(said) != 1 || said[0] != "start_"+all[0].Key {
		t.Errorf("the agent was told %q, want the job once more, with its problems", said)
	}
	s.Pins = nil
	if out := s.tool("job-started", jobEnv("RUNNER_TRACKING_ID=github_b")...); out != "" {
		t.Errorf("said %q where nothing is pinned", out)
	}
}

// SE-03 and the rule behind the whole package: nothing of the environment but the
// allow-list reaches a file, a process, the output or the summary.
func TestNothingButTheAllowListIsKept(t *testing.T) {
	s := newStage(t)
	s.Markdown = "docker\n"
	env := []string{}
	canary := func(i int) string { return fmt.Sprintf("canary%04dx", i) }
	names := []string{
		"GITHUB_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_RUNTIME_TOKEN",
		"ACTIONS_RUNTIME_URL", "ACTIONS_RESULTS_URL", "ACTIONS_CACHE_URL", "ACTIONS_RUNNER_INPUT_JITCONFIG", "INPUT_PASSWORD",
		"GITHUB_ACTION", "GITHUB_ACTION_PATH", "GITHUB_ACTION_REPOSITORY", "GITHUB_ACTION_REF", "GITHUB_ENV", "GITHUB_PATH",
		"GITHUB_OUTPUT", "GITHUB_STATE", "GITHUB_EVENT_PATH", "GITHUB_API_URL", "GITHUB_GRAPHQL_URL", "GITHUB_BASE_REF", "GITHUB_REF_NAME",
		"GITHUB_RETENTION_DAYS", "GITHUB_ACTOR_ID", "RUNNER_TOOL_CACHE", "RUNNER_DEBUG",
		"AWS_SECRET_ACCESS_KEY", "NPM_TOKEN", "DOCKER_AUTH_CONFIG", "DOCKER_PASSWORD", "DD_API_KEY", "DD_APP_KEY", "TALLYMAN_TOKEN",
		"TALLYMAN_SECRET", "KUBECONFIG", "SSH_AUTH_SOCK", "LD_PRELOAD_X", "GITHUB_REPOSITORY_X", "XGITHUB_REPOSITORY", "github_repository", "HOSTNAME",
	}
	for i := range 80 {
		names = append(names, fmt.Sprintf("SOME_VARIABLE_%d", i))
	}
	for i, name := range names {
		env = append(env, name+"="+canary(i))
	}
	want := map[string]bool{}
	for i, name := range []string{
		"GITHUB_REPOSITORY", "GITHUB_REPOSITORY_ID", "GITHUB_REPOSITORY_OWNER", "GITHUB_REPOSITORY_OWNER_ID", "GITHUB_WORKFLOW",
		"GITHUB_WORKFLOW_REF", "GITHUB_WORKFLOW_SHA", "GITHUB_JOB", "GITHUB_EVENT_NAME", "GITHUB_REF", "GITHUB_HEAD_REF",
		"GITHUB_SHA", "GITHUB_ACTOR", "GITHUB_TRIGGERING_ACTOR", "RUNNER_TRACKING_ID", "RUNNER_NAME", "RUNNER_OS", "RUNNER_ARCH",
		"RUNNER_ENVIRONMENT", "ACTIONS_ORCHESTRATION_ID", "POD_NAME", "POD_NAMESPACE", "NODE_NAME",
	} {
		value := fmt.Sprintf("kept%04dx", i)
		env, want[value] = append(env, name+"="+value), true
	}
	summary := filepath.Join(s.dir, "summary")
	write(t, summary, "")
	env = append(env, "GITHUB_STEP_SUMMARY="+summary, "GITHUB_WORKSPACE="+s.dir)
	said := s.tool("job-started", env...)
	agent := s.agent()
	said += s.tool("job-completed", env...)

	held := said + strings.Join(agent.Environ, "\n")
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, s.root()) {
			return err
		}
		b, err := os.ReadFile(path)
		held += path + string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		if strings.Contains(held, canary(i)) {
			t.Errorf("the value of %s was kept", name)
		}
	}
	for value := range want {
		if !strings.Contains(held, value) {
			t.Errorf("%s is missing: the test would not see a canary either", value)
		}
	}
}

func TestFromEnvironment(t *testing.T) {
	ci := FromEnvironment(jobEnv("GITHUB_ACTION=__run", "GITHUB_ACTION_REPOSITORY=a/b", "GITHUB_ACTION_REF=v1",
		"GITHUB_ACTION_PATH=/w/_actions/c/d/v2", "JOB_CHECK_RUN_ID=77", "GITHUB_WORKFLOW=a\nb\u2028c\xff"+strings.Repeat("x", 5000)))
	if ci.Step != "" || ci.ActionRepository != "" || ci.ActionRef != "" {
		t.Errorf("the last step's action is kept: %q %q %q", ci.Step, ci.ActionRepository, ci.ActionRef)
	}
	if ci.JobID != "77" || ci.JobURL != "https://github.com/acme/shop/actions/runs/1/job/77" {
		t.Errorf("JOB_CHECK_RUN_ID is not honoured: %q %q", ci.JobID, ci.JobURL)
	}
	if len(ci.Workflow) > 4096 || !strings.HasPrefix(ci.Workflow, "a\uFFFDb\uFFFDc\uFFFDx") {
		t.Errorf("workflow %d bytes, %.30q", len(ci.Workflow), ci.Workflow)
	}
	if got := FromEnvironment(nil); got.Repository != "" || got.Runner != nil {
		t.Errorf("of nothing: %+v", got)
	}
}

func TestRunnerRoots(t *testing.T) {
	for _, row := range []struct {
		name                string
		process, configured string
		env                 []string
		want                []string
	}{
		{"all agree", "/home/runner", "/home/runner", []string{"RUNNER_WORKSPACE=/home/runner/_work/shop", "RUNNER_TEMP=/home/runner/_work/_temp",
			"GITHUB_WORKSPACE=/home/runner/_work/shop/shop"}, []string{"/home/runner"}},
		{"work folder elsewhere", "/opt/runner", "", []string{"RUNNER_TEMP=/data/work/_temp"}, []string{"/opt/runner", "/data"}},
		{"only the configuration", "", "/srv/runner/", nil, []string{"/srv/runner"}},
		{"relative and short paths", "", "", []string{"RUNNER_TEMP=_work/_temp", "GITHUB_WORKSPACE=/w"}, nil},
	} {
		if got := runnerRoots(row.process, readEnvironment(row.env), row.configured); !slices.Equal(got, row.want) {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
}
