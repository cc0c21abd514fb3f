package browser

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// line is a record with its id in front, as all writers put it.
type line struct {
	ID         string         `json:"id"`
	TS         time.Time      `json:"ts"`
	Kind       string         `json:"kind"`
	Schema     int            `json:"schema"`
	By         string         `json:"by,omitempty"`
	CI         map[string]any `json:"ci,omitempty"`
	Host       map[string]any `json:"host,omitempty"`
	Invocation map[string]any `json:"invocation,omitempty"`
	End        map[string]any `json:"end,omitempty"`
	Event      map[string]any `json:"event,omitempty"`
	Loss       map[string]any `json:"loss,omitempty"`
	Job        map[string]any `json:"job,omitempty"`
	HTTP       map[string]any `json:"http,omitempty"`
}

// fleet writes journals of a small fleet. The same seed writes the same bytes.
type fleet struct {
	t    *testing.T
	w    *bufio.Writer
	rand *rand.Rand
	n    int
	at   time.Time
	by   string
	ci   map[string]any
	host map[string]any
}

// day is when the fleet's two days end.
var day = time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)

func (f *fleet) add(l line) string {
	f.n++
	l.ID = fmt.Sprintf("%012x-7%03x-8000-%012x", l.TS.UnixMilli(), f.n&0xfff, f.n)
	l.ID = l.ID[:8] + "-" + l.ID[8:]
	l.Schema = 1
	if l.By == "" {
		l.By = f.by
	}
	if l.CI == nil && l.By != "none" {
		l.CI = f.ci
	}
	l.Host = f.host
	text, err := json.Marshal(l)
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.w.Write(append(text, '\n')); err != nil {
		f.t.Fatal(err)
	}
	return l.ID
}

// call is one docker command with its end.
func (f *fleet) call(command string, took time.Duration, exit int, images ...string) {
	inv := map[string]any{"tool": "docker", "command": command, "argc": 3, "pid": 1000 + f.n, "ppid": 900, "uid": 1001, "cwd": ".", "daemon": "unix", "path": "socket"}
	end := map[string]any{"tool": "docker", "command": command, "duration_ns": int64(took), "exit_code": exit, "source": "pidfd_info"}
	if len(images) > 0 {
		inv["images"], end["images"] = images, images
	}
	end["invocation_id"] = f.add(line{TS: f.at, Kind: "invocation", Invocation: inv})
	f.at = f.at.Add(took)
	f.add(line{TS: f.at, Kind: "invocation.end", End: end})
}

func (f *fleet) event(typ, action, actor, image string, more map[string]any) {
	e := map[string]any{"type": typ, "action": action, "scope": "local", "actor_id": actor, "image": image, "time_nano": f.at.UnixNano(), "received": f.at}
	for k, v := range more {
		e[k] = v
	}
	f.add(line{TS: f.at, Kind: "event", Event: e})
}

var images = []string{"docker.io/library/golang:1.24-bookworm", "alpine:3.20", "postgres:16", "node:22", "ghcr.io/acme/tools:7", "registry.acme.example/base/python:3.12", "redis:7",
	"mcr.microsoft.com/playwright:v1.49.0-jammy", "grafana/k6:0.54.0", "busybox"}

// write writes jobs of a fleet over two days to a file. Names of repositories and workflows
// are given, so that a test can choose hostile ones.
func write(t *testing.T, jobs int, repositories, workflows []string) string {
	t.Helper()
	return writeAll(t, jobs, repositories, workflows, "")
}

// writeRequested writes a fleet's journal with the requests that a server saw of it: the
// builds of acme/billing ask without credentials, and others outside of the fleet do.
func writeRequested(t *testing.T, jobs int) string {
	t.Helper()
	return writeAll(t, jobs, repositories, workflows, "acme/billing")
}

// requests are what a server saw: a burst soon after at.
func (f *fleet) requests(at time.Time, n int) {
	for range n {
		status := 200
		if f.rand.IntN(3) == 0 {
			status = 401
		}
		f.add(line{TS: at.Add(time.Duration(f.rand.ExpFloat64() * 8e9)).Truncate(time.Second), Kind: "http", By: "none", HTTP: map[string]any{
			"source": "github-csv", "row": f.n, "count": 1, "method": "GET", "host": "github.com", "path": "/acme/lib/info/refs", "class": "git-refs", "repository": []string{"acme/lib", "acme/protos"}[f.rand.IntN(2)],
			"status": status, "user_agent": []string{"git/2.39.5", "git/2.47.3"}[f.rand.IntN(2)], "remote_addr": "192.0.2.7", "anonymous": true}})
	}
}

func writeAll(t *testing.T, jobs int, repositories, workflows []string, guilty string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "journal.jsonl")
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{t: t, w: bufio.NewWriter(out), rand: rand.New(rand.NewPCG(1, 2))}
	numbers := map[string]int{} // of the runs of each workflow
	for i := range jobs {
		// Busy repositories come first; most of the work is done by day.
		r := int(float64(len(repositories)) * f.rand.Float64() * f.rand.Float64())
		hour := 8 + 4*f.rand.NormFloat64()
		f.at = day.Add(-time.Duration(1+f.rand.IntN(2)) * 24 * time.Hour).Add(time.Duration(hour*float64(time.Hour)) + 5*time.Hour)
		run := fmt.Sprint(70_000 + i)
		repository, workflow := repositories[r], workflows[(r+i%2)%len(workflows)]
		numbers[repository+workflow]++
		job := []string{"test", "build", "lint", "scan"}[f.rand.IntN(4)]
		f.by = []string{"sealed", "sealed", "sealed", "sealed", "sealed", "sealed", "environment", "inferred"}[f.rand.IntN(8)]
		f.host = map[string]any{"name": fmt.Sprintf("runner-%d", i%40), "node": fmt.Sprintf("node-%d", i%6)}
		f.ci = map[string]any{"repository": repository, "owner": "acme", "workflow": workflow, "job": job, "run_id": run, "run_number": numbers[repository+workflow], "run_attempt": 1, "event_name": "push", "actor": []string{"alice", "bob", "carol"}[r%3],
			"tracking_id": "github_" + run, "job_id": fmt.Sprint(900_000 + i), "job_url": "https://github.com/acme/x/actions/runs/" + run + "/job/1", "runner": map[string]any{"name": fmt.Sprintf("runner-%d", i%40), "environment": "self-hosted"}}
		begun := f.at
		f.add(line{TS: f.at, Kind: "job.start", Job: map[string]any{"started": f.at, "version": "test"}})
		for c := range 2 + f.rand.IntN(6) {
			image := images[int(float64(len(images))*f.rand.Float64()*f.rand.Float64())]
			took := time.Duration((1 + f.rand.ExpFloat64()*20) * float64(time.Second))
			exit := 0
			if f.rand.IntN(12) == 0 {
				exit = []int{1, 2, 125, 137}[f.rand.IntN(4)]
			}
			switch c % 4 {
			case 0:
				f.call("pull", took/3, exit%125, image)
				if exit%125 == 0 {
					f.event("image", "pull", image, image, nil)
				}
			case 1, 2:
				id := fmt.Sprintf("%064x", f.n)
				f.event("container", "create", id, image, nil)
				f.event("container", "start", id, image, nil)
				f.call("run", took, exit, image)
				f.event("container", "die", id, image, map[string]any{"exit_code": exit, "duration_ns": int64(took), "oom": exit == 137})
			case 3:
				if repository == guilty {
					f.requests(f.at.Add(10*time.Second), 4+f.rand.IntN(8))
				} else if guilty != "" && f.rand.IntN(6) == 0 {
					f.requests(day.Add(-time.Duration(f.rand.Float64()*48*float64(time.Hour))), 5)
				}
				f.call("build", 4*took, exit%125, "acme/app:"+run)
			}
		}
		f.add(line{TS: f.at, Kind: "job.end", Job: map[string]any{"outcome": "completed", "started": begun, "duration_ns": int64(f.at.Sub(begun))}})
		if i%50 == 7 {
			f.add(line{TS: f.at, Kind: "loss", By: "none", Loss: map[string]any{"cause": "queue_full", "count": 3, "from": begun, "to": f.at, "source": "events"}})
		}
		if i%40 == 9 {
			f.by = "none"
			f.call("images", 100*time.Millisecond, 0)
		}
	}
	if err := f.w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}
