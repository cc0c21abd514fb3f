// Package doctor says in plain words what is wrong with an installation of
// Tallyman: each check looks at one thing, says what it found, and what to do
// where that is not well.
//
// Whatever a check needs from outside stands in Input, so that every fault can be
// shown to it. The checks change nothing, but for one small file that is written
// and removed again in the state folder: only a real write knows a full disk.
package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/report"
)

// Result is the outcome of a check.
type Result string

// The outcomes of a check.
const (
	OK   Result = "ok"   // as it should be
	Warn Result = "warn" // works, but something will be missing from the account
	Fail Result = "fail" // does not work
)

// Check is one thing that was looked at.
type Check struct {
	// Name is the thing: shim, agent, journal, ...
	Name string `json:"name"`
	// Result is ok, warn or fail.
	Result Result `json:"result"`
	// Finding says what was found.
	Finding string `json:"finding"`
	// Do says what to do about it; empty when there is nothing to do.
	Do string `json:"do"`
}

// Report is the outcome of all checks, in the order in which they were made.
type Report struct {
	// Schema is 1.
	Schema int `json:"schema"`
	// Failed and Warned count the checks with these results.
	Failed int `json:"failed"`
	Warned int `json:"warned"`
	// Checks are all checks, also those that found nothing wrong.
	Checks []Check `json:"checks"`
}

// Input is what the checks look at. The zero value of a field stands for the real
// thing, except for Environ.
type Input struct {
	// Environ is the environment to judge, as from os.Environ; for the hooks' variables
	// a running runner's own is preferred.
	Environ []string
	// ConfigPath is the configuration file; "" looks beside the shim, then at config.DefaultPath.
	ConfigPath string
	// AgentConfig is the file that the agent would read where ConfigPath is empty; ""
	// where that is the shim's too.
	AgentConfig string
	// Program is the path of the tallyman command, whose owner is looked at; "" looks at none.
	Program string
	// RunDir and StateDir override the configuration's where they are not empty.
	RunDir, StateDir string
	// OffPath is the kill switch; "" is config.OffPath.
	OffPath string
	// Proc is where procfs is mounted, "" is /proc.
	Proc string
	// Root is the file system whose installation is compared with the account of it; ""
	// is this one's.
	Root string
	// Dpkg is the database of dpkg, "" is /var/lib/dpkg.
	Dpkg string
	// Sudoers is sudo's configuration, "" is /etc/sudoers.
	Sudoers string
	// UID is the user whose rights count; the real user's where nil.
	UID *int
	// Kernel asks the kernel for what ends of calls are seen by.
	Kernel Kernel
	// Agent asks the agent behind a socket how it is. A nil func makes no such check.
	Agent func(ctx context.Context, socket string) (AgentState, error)
	// Daemon asks the Docker daemon at a host (DOCKER_HOST form) how it is.
	Daemon func(ctx context.Context, host string) (DaemonState, error)
	// Sinks says what is wrong with the URLs of sinks, at the place of each. A nil func
	// makes no such check.
	Sinks func(rawURLs []string) []error
	// StatFS tells about the file system of a path.
	StatFS func(path string) (FileSystem, error)
	// Timeout bounds the waiting of one check, 3 s where zero.
	Timeout time.Duration
	// Now is the clock.
	Now func() time.Time
}

// AgentState is what doctor wants to know of a running agent.
type AgentState struct {
	Summary  string   // one line: version, pid, since when
	Problems []string // what the agent itself says is wrong
}

// DaemonState is what doctor wants to know of a Docker daemon.
type DaemonState struct {
	Version string
	Time    time.Time // the daemon's clock; zero where it did not tell
}

// examination is one run of all checks.
type examination struct {
	in     Input
	env    map[string]string
	uid    int
	cfg    config.Config
	file   string // the configuration that the shim reads, or would read
	shim   string // path of the shim that was found first, "" for none
	checks []Check
}

// Run makes all checks.
func Run(ctx context.Context, in Input) *Report {
	x := &examination{in: in, env: environment(in.Environ), cfg: config.Default()}
	x.defaults()
	x.shims() // first: the configuration may lie beside the shim
	x.configuration()
	if in.RunDir != "" {
		x.cfg.RunDir = in.RunDir
	}
	if in.StateDir != "" {
		x.cfg.StateDir = in.StateDir
	}
	x.realBinary()
	x.installation()
	x.installed()
	x.switches()
	x.hooks()
	x.runDir()
	x.spool()
	x.stateDir()
	x.journal()
	x.agent(ctx)
	x.daemon(ctx)
	x.kernel()
	x.metrics(ctx)
	x.sinks()
	x.clock()
	r := &Report{Schema: 1, Checks: x.checks}
	for _, c := range x.checks {
		switch c.Result {
		case Fail:
			r.Failed++
		case Warn:
			r.Warned++
		}
	}
	return r
}

func (x *examination) defaults() {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&x.in.OffPath, config.OffPath)
	def(&x.in.Proc, "/proc")
	def(&x.in.Dpkg, "/var/lib/dpkg")
	def(&x.in.Sudoers, "/etc/sudoers")
	x.uid = os.Getuid()
	if x.in.UID != nil {
		x.uid = *x.in.UID
	}
	if x.in.Kernel == nil {
		x.in.Kernel = realKernel{}
	}
	if x.in.Daemon == nil {
		x.in.Daemon = askDaemon
	}
	if x.in.StatFS == nil {
		x.in.StatFS = statFS
	}
	if x.in.Timeout == 0 {
		x.in.Timeout = 3 * time.Second
	}
	if x.in.Now == nil {
		x.in.Now = time.Now
	}
}

func environment(environ []string) map[string]string {
	env := make(map[string]string, len(environ))
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return env
}

func (x *examination) ok(name, finding string, args ...any) {
	x.add(OK, name, fmt.Sprintf(finding, args...), "")
}

func (x *examination) add(r Result, name, finding, do string) {
	x.checks = append(x.checks, Check{Name: name, Result: r, Finding: finding, Do: do})
}

// Terminal writes the report as text.
func (r *Report) Terminal(w io.Writer) error {
	width := 0
	for _, c := range r.Checks {
		width = max(width, len(c.Name))
	}
	var b strings.Builder
	for _, c := range r.Checks {
		word := string(c.Result)
		if c.Result == Fail {
			word = "FAIL"
		}
		fmt.Fprintf(&b, "%-4s  %-*s  %s\n", word, width, c.Name, report.Safe(c.Finding))
		if c.Do != "" {
			fmt.Fprintf(&b, "      %*s  -> %s\n", width, "", report.Safe(c.Do))
		}
	}
	fmt.Fprintln(&b)
	switch {
	case r.Failed == 0 && r.Warned == 0:
		fmt.Fprintf(&b, "All %d checks are well.\n", len(r.Checks))
	default:
		fmt.Fprintf(&b, "%d of %d checks failed, %d with a warning.\n", r.Failed, len(r.Checks), r.Warned)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// JSON writes the report as one indented JSON object.
func (r *Report) JSON(w io.Writer) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the findings: %w", err)
	}
	_, err = w.Write(append(report.SafeJSON(data), '\n'))
	return err
}

func fileExists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
