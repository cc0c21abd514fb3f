package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/runnertest"
)

// The agent of a hook answers /healthz and /metrics where the configuration says so:
// the job by its pod, and a dead sink as degraded and not as failing.
func TestHealthOfARunner(t *testing.T) {
	dir := shm(t)
	socket, missing := filepath.Join(dir, "health.sock"), filepath.Join(dir, "missing")
	r := newStubRig(t, "health = unix://"+socket, "sinks = file://"+missing+"/out.jsonl?name=dead")
	r.runner.Env = append(r.runner.Env, "POD_NAME=runner-abc", "POD_NAMESPACE=arc", "NODE_NAME=node-7")
	j := r.job(runnertest.Spec{Repository: "acme/shop", Workflow: "CI", Job: "build"})
	r.step(j, "s", 0, "docker pull code-0")

	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	want := func(path string, code int, parts ...string) {
		t.Helper()
		eventually(t, time.Minute, func() error {
			answer, err := client.Get("http://tallyman" + path)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			body, err := io.ReadAll(answer.Body)
			if err != nil || answer.StatusCode != code {
				return fmt.Errorf("%s: %s, %v: %s", path, answer.Status, err, body)
			}
			for _, part := range parts {
				if !strings.Contains(string(body), part) {
					return fmt.Errorf("%s does not say %q: %s", path, part, body)
				}
			}
			return nil
		})
	}
	want("/metrics", http.StatusOK,
		`tallyman_job_info{job="build",namespace="arc",node="node-7",pod="runner-abc",repository="acme/shop",workflow="CI"} 1`,
		`tallyman_sink_up{sink="dead"} 0`, `tallyman_sink_dropped_total{sink="dead"} 0`)
	want("/healthz", http.StatusOK, `"status":"degraded"`, "sink dead is retrying")
	if err := os.Mkdir(missing, 0o755); err != nil {
		t.Fatal(err)
	}
	r.complete(j)
}

// Without the setting an agent listens on its own socket and nowhere else.
func TestNoHealthByDefault(t *testing.T) {
	l, err := newLone(shm(t))
	if err != nil {
		t.Fatal(err)
	}
	p := l.mustStart(t, l.command())
	got, err := listens(p.pid)
	// The kernel knows a socket by its first name; the agent puts it in place by a rename.
	if want := []string{l.socket() + ".new"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("the agent listens on %q (%v), want %q", got, err, want)
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
}

// listens are the TCP addresses and the unix sockets on which a process listens, from
// the kernel's tables (proc_net(5), unix(7)).
func listens(pid int) ([]string, error) {
	proc := fmt.Sprintf("/proc/%d/", pid)
	links, err := os.ReadDir(proc + "fd")
	if err != nil {
		return nil, err
	}
	inodes := map[string]bool{}
	for _, l := range links {
		if to, err := os.Readlink(proc + "fd/" + l.Name()); err == nil && strings.HasPrefix(to, "socket:[") {
			inodes[strings.Trim(to, "socket:[]")] = true
		}
	}
	var all []string
	for _, table := range []string{"tcp", "tcp6", "unix"} {
		b, err := os.ReadFile(proc + "net/" + table)
		if os.IsNotExist(err) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			switch {
			case table == "unix" && len(f) > 7 && f[3] == "00010000" && inodes[f[6]]: // __SO_ACCEPTCON
				all = append(all, f[7])
			case table != "unix" && len(f) > 9 && f[3] == "0A" && inodes[f[9]]: // TCP_LISTEN
				all = append(all, f[1])
			}
		}
	}
	return all, nil
}
