// Package selftest proves the shim's promises on the machine it runs on, and measures
// what the shim adds to a command there.
//
// It lays a copy of the installed shim out in a folder of its own, with its own
// configuration, run folder, state folder and agent, and calls that: the installed
// agent, its journal and the job that may be running are not touched, and at the end,
// also at an interrupted one, nothing is left. It needs no root and no Docker daemon;
// the real tool behind the copy is a shell, `true`, or this program itself.
//
//	rig.go           the temporary installation, its agent, and calls through it
//	latency.go       what is added to a command, paired and interleaved
//	ends.go          by which way this kernel tells how a command ended
//	transparency.go  what a program sees, directly and through the shim
//	cases.go         the runner of fault cases
//	shimcases.go, hookcases.go, secretcases.go, mountcases.go
//	page.go          the proof page: text, Markdown, JSON
//
// No time decides over pass or fail but a hang's: the machine may be busy with a job.
package selftest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/wrapper"
)

// Options say what to test. Shim and Tallyman must be set.
type Options struct {
	// Shim is the path of the shim to test a copy of.
	Shim string
	// Tallyman is this program, which is started as the temporary agent, as the hooks,
	// and as the probe.
	Tallyman string
	// Probe are the arguments that make Tallyman print what it sees (see package probe).
	Probe []string
	// Dir is the folder to lay the copy out in; "" takes the temporary folder, or
	// another one where programs may not be executed in that.
	Dir string
	// Duration bounds the measuring of latency.
	Duration time.Duration
	// Thorough adds the cases that mount file systems. The caller has put this process
	// into a mount namespace of its own.
	Thorough bool
	// Only are the IDs of the checks to make; none means all.
	Only []string
	// RunDir is the run folder of the installation, and SpoolOnDisk its setting of that
	// name, to judge what its file system means.
	RunDir      string
	SpoolOnDisk bool
	// Version and Commit are this program's.
	Version, Commit string
	// Progress is told what is being done; it may be nil.
	Progress func(doing string)
}

// Result is the outcome of one check.
type Result string

// The outcomes of a check.
const (
	Pass        Result = "pass"
	Fail        Result = "fail"
	NotPossible Result = "not possible here"
)

// Check is one thing that was tried.
type Check struct {
	ID       string  `json:"id"`       // of the fault in docs/faults.md; a word for what is no fault
	Injected string  `json:"injected"` // what was done
	Promised string  `json:"promised"` // what must happen
	Result   Result  `json:"result"`
	Detail   string  `json:"detail,omitempty"` // what was seen; why it failed or is not possible
	TookMS   float64 `json:"took_ms"`          // the whole check
}

// Page is the proof page.
type Page struct {
	Schema       int          `json:"schema"` // 1
	Version      string       `json:"version"`
	Commit       string       `json:"commit"`
	Only         []string     `json:"only,omitempty"` // the checks that were asked for, where not all
	Time         time.Time    `json:"time"`
	Shim         Shim         `json:"shim"`
	Machine      Machine      `json:"machine"`
	Ends         Ends         `json:"ends"`
	Degraded     []Degraded   `json:"degraded"`
	Latency      *Latency     `json:"latency"` // null where it was not measured
	Transparency Transparency `json:"transparency"`
	Cases        []Check      `json:"cases"`
	Passed       int          `json:"passed"`
	Failed       int          `json:"failed"`
	NotPossible  int          `json:"not_possible"`
	Verdict      Result       `json:"verdict"` // pass or fail
}

// Shim is the file that was tested.
type Shim struct {
	Path   string `json:"path"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
	Marked bool   `json:"marked"` // it carries the marker of Tallyman's shim
}

// Machine is where the test ran.
type Machine struct {
	Kernel string `json:"kernel"`
	Arch   string `json:"arch"`
	CPUs   int    `json:"cpus"`
	Load   string `json:"load"` // the three averages of /proc/loadavg at the start
	UID    int    `json:"uid"`
	Dir    string `json:"dir"`     // of the temporary installation
	DirFS  string `json:"dir_fs"`  // its type of file system
	RunDir string `json:"run_dir"` // of the temporary socket and spool
	RunFS  string `json:"run_fs"`
}

// Degraded is something that this machine does not give.
type Degraded struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

// Run makes the whole page. An error means that there is no page: the test could not
// be laid out, or ctx ended.
func Run(ctx context.Context, o Options) (*Page, error) {
	say := o.Progress
	if say == nil {
		say = func(string) {}
	}
	shim, err := examineShim(o.Shim)
	if err != nil {
		return nil, err
	}
	page := &Page{Schema: 1, Version: o.Version, Commit: o.Commit, Only: o.Only, Time: time.Now().UTC(), Shim: shim, Degraded: []Degraded{}}
	page.Transparency = Transparency{Ways: []string{}, Differences: []Difference{}}
	wanted := func(id string) bool {
		return ctx.Err() == nil && (len(o.Only) == 0 || slices.Contains(o.Only, id))
	}
	r, err := newRig(o)
	if err != nil {
		return nil, err
	}
	defer r.close()
	page.Machine = r.machine()
	if wanted("shim") {
		page.add(identity(shim))
	}
	var check Check
	if wanted("ends") {
		say("asking the kernel how commands end")
		page.Ends, check = r.ends(ctx)
		page.add(check)
		page.Degraded = append(page.Degraded, r.degraded(page.Ends)...)
	}
	if wanted("transparency") {
		say("comparing what a program sees")
		page.Transparency, check = r.transparency(ctx)
		page.add(check)
	}
	for _, c := range cases {
		if wanted(c.id) {
			say("trying " + c.id)
			page.add(r.try(ctx, c))
		}
	}
	if wanted("latency") {
		say("measuring what is added to a command")
		c := Check{ID: "latency", Injected: "nothing", Promised: "commands run and can be timed (the times decide nothing)"}
		c.run(func() (string, error) {
			var err error
			if page.Latency, err = r.latency(ctx, Measure{Duration: o.Duration}); err != nil {
				return "", err
			}
			return fmt.Sprintf("%d rounds", page.Latency.Rounds), nil
		})
		page.add(c)
	}
	if err := errors.Join(ctx.Err(), r.close()); err != nil {
		return nil, err
	}
	page.Verdict = Pass
	if page.Failed > 0 {
		page.Verdict = Fail
	}
	return page, nil
}

func (p *Page) add(c Check) {
	switch c.Result {
	case Pass:
		p.Passed++
	case Fail:
		p.Failed++
	case NotPossible:
		p.NotPossible++
	}
	p.Cases = append(p.Cases, c)
}

func examineShim(path string) (Shim, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Shim{}, fmt.Errorf("read the shim: %w (name it with --shim)", err)
	}
	sum := sha256.Sum256(data)
	return Shim{path, int64(len(data)), hex.EncodeToString(sum[:]), bytes.Contains(data, []byte(wrapper.Marker))}, nil
}

// identity is the first check: a foreign program behaves as it likes.
func identity(s Shim) Check {
	c := Check{ID: "shim", Injected: "nothing", Promised: "the file is Tallyman's shim", Result: Pass, Detail: s.Path + " carries its marker"}
	if !s.Marked {
		c.Result, c.Detail = Fail, s.Path+" does not carry the marker "+wrapper.Marker
	}
	return c
}

func (r *rig) machine() Machine {
	m := Machine{Kernel: "unknown", Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), UID: os.Getuid(),
		Dir: r.dir, DirFS: fsType(r.dir), RunDir: r.runs, RunFS: fsType(r.runs)}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	return m
}

// fsType names the file system of a folder.
func fsType(path string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return "unknown"
	}
	switch uint32(st.Type) { // linux/magic.h
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	}
	return fmt.Sprintf("type %#x", uint32(st.Type))
}
