package sim

import (
	"bufio"
	"fmt"
	"io"
	"iter"
	"strconv"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Candidate names a workflow as Records do: repository, workflow and job.
func (f *Fleet) Candidate(workflow int) (repository, name, job string) {
	w := &f.Workflows[workflow]
	return w.Repository, w.Name, w.Job
}

// Records yields what the journals of the fleet hold: the call of each recorded build,
// and its end where that is known.
func (f *Fleet) Records() iter.Seq[*record.Record] {
	return func(yield func(*record.Record) bool) {
		for n := range f.Builds {
			b := &f.Builds[n]
			if !b.Recorded {
				continue
			}
			w := &f.Workflows[b.Workflow]
			host := fmt.Sprintf("runner-%04d", b.Host)
			call := &record.Record{
				ID: record.DeriveID(b.Start, "call", strconv.Itoa(n)), TS: b.Start.UTC(), Kind: record.KindInvocation,
				Schema: record.SchemaVersion, By: record.BySealed,
				CI: &record.CI{
					Repository: w.Repository, Workflow: w.Name, Job: w.Job, Step: "__run_2",
					RunID: strconv.Itoa(b.Workflow*1_000_000 + int(b.RunNumber)), RunNumber: b.RunNumber, RunAttempt: b.RunAttempt,
					Runner: &record.Runner{Name: host},
				},
				Host:       &record.Host{Name: host},
				Invocation: &record.Invocation{Tool: "docker", Command: "buildx build", Images: []string{fmt.Sprintf("%s:%d", w.Image, b.RunNumber)}, Flags: []string{"-t"}, UID: 1001, PID: 4711, Argc: 6},
			}
			call.CI.JobURL = "https://github.test/" + w.Repository + "/actions/runs/" + call.CI.RunID
			if !yield(call) {
				return
			}
			if !b.EndKnown {
				continue
			}
			at := b.Start.Add(b.Duration).UTC()
			code := int64(0)
			end := &record.Record{
				ID: record.DeriveID(at, "end", strconv.Itoa(n)), TS: at, Kind: record.KindInvocationEnd, Schema: record.SchemaVersion,
				By: record.BySealed, CI: call.CI, Host: call.Host,
				End: &record.End{InvocationID: call.ID, Tool: "docker", Command: "buildx build", DurationNS: int64(b.Duration), ExitCode: &code, Source: "pidfd_info"},
			}
			if !yield(end) {
				return
			}
		}
	}
}

// WriteRecords writes Records as JSON Lines.
func (f *Fleet) WriteRecords(w io.Writer) error {
	out := bufio.NewWriter(w)
	var line []byte
	for r := range f.Records() {
		line = record.Append(line[:0], r)
		if _, err := out.Write(line); err != nil {
			return err
		}
	}
	return out.Flush()
}

// WriteCSV writes the server's log as its operators would hand it out. Times are in
// zone, and do not name it.
func (f *Fleet) WriteCSV(w io.Writer, zone *time.Location) error {
	out := bufio.NewWriter(w)
	fmt.Fprintln(out, "timestamp,method,url,status,user_agent,remote_addr")
	for _, q := range f.Requests {
		fmt.Fprintf(out, "%s,GET,https://github.com/%s/info/refs?service=git-upload-pack,%d,%s,%s\n",
			q.Time.In(zone).Format(time.DateTime), q.Asked, q.Status, q.UserAgent, q.Addr)
	}
	return out.Flush()
}

// Egress is the address that the requests of a host come from.
func (f *Fleet) Egress(host int) string { return Address(host % f.Config.Addresses) }
