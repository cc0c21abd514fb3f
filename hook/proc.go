package hook

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/procfs"
)

// runnerProcess is the runner's Worker process, which lives as long as the job.
type runnerProcess struct {
	PID   int    `json:"pid,omitempty"`   // 0 where it was not found
	Start uint64 `json:"start,omitempty"` // its start in clock ticks since boot: tells a later process with the same number apart
	Root  string `json:"root,omitempty"`  // the folder the runner is installed in
	OOM   *int   `json:"oom,omitempty"`   // its oom_score_adj, which the hook's own was before the runner raised it to 500
}

// findRunner looks for Runner.Worker among the ancestors of this process:
// Runner.Worker -> bash -e hook.sh -> (timeout ->) tallyman.
func findRunner() runnerProcess {
	pid := os.Getpid()
	for range 16 { // deeper than any chain of hook scripts
		st, err := procfs.Read(pid)
		if err != nil {
			break
		}
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		exe = strings.TrimSuffix(exe, " (deleted)") // the runner updates itself
		if st.Name == "Runner.Worker" || filepath.Base(exe) == "Runner.Worker" {
			r := runnerProcess{PID: pid, Start: st.Start, OOM: oomScoreAdj(pid)}
			if exe != "" {
				r.Root = filepath.Dir(filepath.Dir(exe)) // <root>/bin/Runner.Worker, or bin.2.336.0
			}
			return r
		}
		if st.Parent == 0 {
			break
		}
		pid = st.Parent
	}
	return runnerProcess{}
}

// startTime turns a start in clock ticks since boot into a time of day. User space
// always sees 100 ticks a second (USER_HZ).
func startTime(ticks uint64) (time.Time, bool) {
	now := sinceBoot()
	if ticks == 0 || now == 0 {
		return time.Time{}, false
	}
	age := time.Duration(now) - time.Duration(ticks)*10*time.Millisecond
	return time.Now().Add(-age), true
}

// sinceBoot is the time since boot in nanoseconds, suspended time included; 0 where
// the kernel does not tell.
func sinceBoot() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return ts.Nano()
}

func oomScoreAdj(pid int) *int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	if err != nil {
		return nil
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return nil
	}
	return &n
}

// runnerRoots lists where the runner may be installed, the surest first: the
// Worker's own executable, the parents of its work folder (<root>/_work/<repository>
// by default), the configuration (which is last because one machine can hold
// several runners).
func runnerRoots(process string, env environment, configured string) []string {
	up := func(path string, levels int) string {
		if !filepath.IsAbs(path) {
			return ""
		}
		for range levels {
			path = filepath.Dir(path)
		}
		return path
	}
	var roots []string
	for _, root := range []string{
		process,
		up(env.get("RUNNER_WORKSPACE"), 2),
		up(env.get("RUNNER_TEMP"), 2),
		up(env.get("GITHUB_WORKSPACE"), 3),
		configured,
	} {
		if root == "" || root == "/" || len(root) > 4096 {
			continue
		}
		root = filepath.Clean(root)
		seen := false
		for _, r := range roots {
			seen = seen || r == root
		}
		if !seen {
			roots = append(roots, root)
		}
	}
	return roots
}
