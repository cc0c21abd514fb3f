package store

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// line is a record of the tests, written as the agent writes it.
func line(id string, ts time.Time, kind, rest string) string {
	if rest != "" {
		rest = "," + rest
	}
	return fmt.Sprintf(`{"id":%q,"ts":%q,"kind":%q,"schema":1%s}`, id, ts.UTC().Format(time.RFC3339Nano), kind, rest)
}

func journalOf(t testing.TB, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "records.jsonl")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// truth is what Write put into a journal, counted while it wrote.
type truth struct {
	records, doubles, calls, ends, pulls, starts, deaths, jobs, losses, lost int64
	byRepository                                                             map[string]*tally
	byImage                                                                  map[string]int64
	perHour                                                                  map[time.Time]int64
	exits                                                                    map[int]int64
	last                                                                     time.Time // when the last job began
}

type tally struct{ calls, failed, pulls, containers, timeNS int64 }

// write writes about n records of a fleet, the same for the same seed, and counts them:
// the independent computation that the views are held against.
func write(w io.Writer, seed uint64, n int64, start time.Time) (*truth, error) {
	r := rand.New(rand.NewPCG(seed, 7))
	zipf := rand.NewZipf(r, 1.2, 4, 799)
	images := []string{"alpine:3.20", "docker.io/library/alpine:3.20", "golang:1.26", "ghcr.io/acme/base:7", "registry.acme.example:5000/tools/lint", "acme/tool@sha256:" + strings.Repeat("ab", 32)}
	normal := []string{"alpine:3.20", "alpine:3.20", "golang:1.26", "ghcr.io/acme/base:7", "registry.acme.example:5000/tools/lint:latest", images[5]}
	tr := &truth{byRepository: map[string]*tally{}, byImage: map[string]int64{}, perHour: map[time.Time]int64{}, exits: map[int]int64{}}
	var buf []byte
	var err error
	var serial int64
	put := func(ts time.Time, kind, format string, args ...any) string {
		serial++
		id := fmt.Sprintf("0199c2a0-%04x-7%03x-8000-%012x", serial>>16&0xffff, serial>>4&0xfff, serial|int64(seed)<<40)
		buf = fmt.Appendf(buf[:0], `{"id":%q,"ts":%q,"kind":%q,"schema":1,`, id, ts.Format("2006-01-02T15:04:05.000000Z"), kind)
		buf = fmt.Appendf(buf, format, args...)
		buf = append(buf, "}\n"...)
		times := 1
		if r.IntN(100) == 0 { // delivered twice
			times = 2
			tr.doubles++
		}
		for range times {
			if _, e := w.Write(buf); e != nil && err == nil {
				err = e
			}
			tr.records++
		}
		return id
	}
	t := start
	for job := int64(0); tr.records < n && err == nil; job++ {
		t = t.Add(time.Duration(r.Int64N(int64(8*time.Second))) / 1000 * 1000)
		tr.last = t
		repo := zipf.Uint64()
		name := fmt.Sprintf("acme/repo-%03d", repo)
		ci := fmt.Sprintf(`"by":"sealed","ci":{"repository":%q,"workflow":"wf-%d","job":"build","run_id":"%d","run_attempt":1,"actor":"actor-%d","tracking_id":"github_%d"},"host":{"name":"runner-%d","node":"node-%d"}`,
			name, repo%3, 1_000_000+job, repo%17, job, job, job%40)
		own := tr.byRepository[name]
		if own == nil {
			own = &tally{}
			tr.byRepository[name] = own
		}
		tr.jobs++
		put(t, "job.start", `%s,"job":{"version":"1"}`, ci)
		at := t
		for call := range 8 {
			at = at.Add(time.Duration(1+r.IntN(2000)) * time.Millisecond)
			image := r.IntN(len(images))
			command := []string{"pull", "run", "build", "run"}[call%4]
			id := put(at, "invocation", `%s,"invocation":{"tool":"docker","command":%q,"images":[%q],"argc":3}`, ci, command, images[image])
			tr.calls++
			own.calls++
			tr.perHour[at.Truncate(time.Hour)]++
			duration := int64(r.IntN(5_000_000)+1000) * 1000
			code := 0
			if r.IntN(20) == 0 {
				code = 1 + r.IntN(3)
			}
			if r.IntN(50) != 0 { // the end was seen
				put(at.Add(time.Duration(duration)), "invocation.end", `%s,"end":{"invocation_id":%q,"tool":"docker","command":%q,"duration_ns":%d,"exit_code":%d,"source":"pidfd_info"}`, ci, id, command, duration, code)
				tr.ends++
				tr.exits[code]++
				own.timeNS += duration
				if code != 0 {
					own.failed++
				}
			}
			if command == "pull" && code == 0 {
				put(at.Add(time.Duration(duration)), "event", `%s,"event":{"type":"image","action":"pull","image":%q}`, ci, images[image])
				tr.pulls++
				own.pulls++
				tr.byImage[normal[image]]++
			}
			if command == "run" {
				actor := fmt.Sprintf("%064x", serial)
				for _, action := range []string{"create", "start", "exec_start", "die"} {
					more := ""
					if action == "die" {
						more = fmt.Sprintf(`,"exit_code":%d,"duration_ns":%d`, code, duration/2)
						tr.deaths++
					}
					put(at.Add(time.Duration(duration/2)), "event", `%s,"event":{"type":"container","action":%q,"image":%q,"actor_id":%q%s}`, ci, action, images[image], actor, more)
				}
				tr.starts++
				own.containers++
			}
		}
		put(at.Add(10*time.Second), "job.end", `%s,"job":{"outcome":"completed","duration_ns":%d}`, ci, int64(at.Sub(t)))
		if job%500 == 7 {
			put(at, "loss", `"loss":{"cause":"queue_full","source":"events","count":3}`)
			tr.losses++
			tr.lost += 3
		}
	}
	return tr, err
}
