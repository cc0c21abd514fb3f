package importer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// The runner's Worker writes one log for each job, _diag/Worker_<time>-utc.log
// (actions/runner, src/Runner.Common/Tracing.cs, src/Runner.Worker/Worker.cs). Lines
// begin with a stamp, [2026-11-23 10:11:12Z INFO StepsRunner], on some installations
// with WORKER before the time. What follows of a message that has more lines, such as
// that of the job itself, has none. None of it is a contract.
var stamp = regexp.MustCompile(`^\[(?:[A-Z]+ )?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)Z ([A-Z]+) +([^\]]+)\] ?`)

// WorkerLogName is the form of the names of Worker logs.
var WorkerLogName = regexp.MustCompile(`^Worker_\d{8}-\d{6}-utc\.log(\.gz)?$`)

// ErrWorkerLog is what a file fails with that holds no job of a Worker log.
var ErrWorkerLog = errors.New("not a Worker log with a job in it")

const (
	maxLogLine = 1 << 20 // of a line; what is behind is dropped
	maxMessage = 8 << 20 // of the job's message
)

// WorkerLog reads the log of one job and calls emit for its records: job.start, the
// docker commands that the runner itself ran (service and job containers, container
// actions) with their ends, and job.end where the log has it. What a step's script ran
// is not in the log. All of the records are inferred: nobody sealed them while the job
// ran.
func WorkerLog(ctx context.Context, r io.Reader, emit func(*record.Record) error) error {
	text, err := decode(r)
	if err != nil {
		return err
	}
	defer text.Close()
	w := workerLog{emit: emit, safe: newSanitizer()}
	in := bufio.NewReaderSize(text, 64<<10)
	for n := 0; ; n++ {
		if n&255 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		line, err := logLine(in)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := w.line(line); err != nil {
			return err
		}
	}
	return w.end()
}

// logLine returns the next line without its end, cut at maxLogLine.
func logLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if room := maxLogLine - len(line); room > 0 {
			line = append(line, part[:min(room, len(part))]...)
		}
		switch {
		case err == bufio.ErrBufferFull:
		case err == nil, err == io.EOF && len(line) > 0:
			return bytes.TrimRight(line, "\r\n"), nil
		default:
			return nil, err
		}
	}
}

// workerLog is the state of one log.
type workerLog struct {
	emit    func(*record.Record) error
	safe    *sanitizer
	message []byte // of the job, while it is read
	reading bool
	ci      *record.CI
	first   time.Time // of the log
	last    time.Time
	started time.Time // of the job
	result  string
	ended   time.Time
	file    string // of the process that is being started
	args    string
	n       int
	running map[string]*record.Record // by process id
}

func (w *workerLog) line(line []byte) error {
	m := stamp.FindSubmatchIndex(line)
	if m == nil {
		if w.reading && len(w.message) < maxMessage {
			w.message = append(append(w.message, line...), '\n')
		}
		return nil
	}
	ts, err := time.Parse("2006-01-02 15:04:05", string(line[m[2]:m[3]]))
	if err != nil {
		return nil
	}
	if w.first.IsZero() {
		w.first = ts
	}
	w.last = ts
	if w.reading {
		w.reading = false
		if err := w.job(); err != nil {
			return err
		}
	}
	source, text := string(line[m[6]:m[7]]), string(line[m[1]:])
	switch {
	case source == "Worker" && strings.HasPrefix(text, "Job message:"):
		if w.ci == nil {
			w.reading, w.started = true, ts
			w.message = append(w.message[:0], strings.TrimPrefix(text, "Job message:")...)
		}
	case w.ci == nil:
	case source == "JobRunner" && strings.HasPrefix(text, "Job result after all job steps finish: "):
		w.setResult(strings.TrimPrefix(text, "Job result after all job steps finish: "))
		w.ended = ts
	case source == "JobRunner" && strings.HasPrefix(text, "Completing the job execution context."), source == "Worker" && strings.HasPrefix(text, "Job completed."):
		w.ended = ts
	case strings.HasPrefix(source, "ProcessInvoker"):
		return w.process(ts, text)
	}
	return nil
}

func (w *workerLog) setResult(v string) {
	switch v = strings.TrimSpace(v); v {
	case "Succeeded", "Failed", "Canceled", "Skipped", "Abandoned":
		w.result = strings.ToLower(v)
	case "SucceededWithIssues":
		w.result = "succeeded_with_issues"
	case "Cancelled":
		w.result = "canceled"
	case "": // null: no step failed
		w.result = "succeeded"
	}
}

// process follows the runner's own processes: their command line, start and end.
func (w *workerLog) process(ts time.Time, text string) error {
	quoted := func(prefix string) (string, bool) {
		v, ok := strings.CutPrefix(strings.TrimSpace(text), prefix+": '")
		return strings.TrimSuffix(v, "'"), ok
	}
	if v, ok := quoted("File name"); ok {
		w.file, w.args = v, ""
		return nil
	}
	if v, ok := quoted("Arguments"); ok {
		w.args = v
		return nil
	}
	if v, ok := strings.CutPrefix(text, "Process started with process id "); ok {
		pid, _, _ := strings.Cut(v, ",")
		tool := strings.TrimSuffix(path.Base(strings.ReplaceAll(w.file, `\`, "/")), ".exe")
		if tool != "docker" && tool != "podman" && tool != "nerdctl" {
			w.file, w.args = "", ""
			return nil
		}
		r := w.record(ts, record.KindInvocation)
		r.Invocation = w.safe.redactor.DescribeArgs(tool, append([]string{tool}, words(w.args)...))
		r.Invocation.UID = -1 // the log does not say it
		r.Invocation.PID, _ = strconv.ParseInt(pid, 10, 64)
		r.ID = w.id(r)
		w.file, w.args = "", ""
		if len(w.running) < 1024 {
			w.running[pid] = r
		}
		return w.emit(r)
	}
	if v, ok := strings.CutPrefix(text, "Finished process "); ok {
		pid, rest, _ := strings.Cut(v, " ")
		start := w.running[pid]
		if start == nil {
			return nil
		}
		delete(w.running, pid)
		r := w.record(ts, record.KindInvocationEnd)
		r.End = &record.End{InvocationID: start.ID, Tool: start.Invocation.Tool, Command: start.Invocation.Command, Images: start.Invocation.Images, Source: "worker_log"}
		rest, elapsed, _ := strings.Cut(strings.TrimPrefix(rest, "with exit code "), ",")
		if code, err := strconv.ParseInt(rest, 10, 64); err == nil && code >= 0 && code <= 255 {
			r.End.ExitCode = &code
		}
		elapsed = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(elapsed), "and elapsed time "), ".")
		if d, ok := timeSpan(elapsed); ok {
			r.End.DurationNS = int64(d)
		}
		r.ID = w.id(r)
		return w.emit(r)
	}
	return nil
}

// timeSpan reads what .NET writes for a TimeSpan: [d.]hh:mm:ss[.fffffff].
func timeSpan(s string) (time.Duration, bool) {
	var days int64
	if d, rest, ok := strings.Cut(s, "."); ok && strings.Contains(rest, ":") {
		n, err := strconv.ParseInt(d, 10, 32)
		if err != nil || n < 0 || n > 1000 {
			return 0, false
		}
		days, s = n, rest
	}
	parts := strings.Split(s, ":")
	if len(parts) != 3 {
		return 0, false
	}
	h, err1 := strconv.ParseUint(parts[0], 10, 8)
	m, err2 := strconv.ParseUint(parts[1], 10, 8)
	sec, err3 := strconv.ParseFloat(parts[2], 64)
	if err1 != nil || err2 != nil || err3 != nil || !(sec >= 0 && sec < 61) {
		return 0, false
	}
	return time.Duration(days)*24*time.Hour + time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(sec*float64(time.Second)), true
}

// words splits a command line as .NET does on Linux: white space parts words, double
// quotes hold them together, a backslash escapes a quote.
func words(s string) (list []string) {
	var b strings.Builder
	quoted, any := false, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && i+1 < len(s) && s[i+1] == '"':
			i++
			b.WriteByte('"')
			any = true
		case c == '"':
			quoted, any = !quoted, true
		case (c == ' ' || c == '\t') && !quoted:
			if any {
				list = append(list, b.String())
				b.Reset()
			}
			any = false
		default:
			b.WriteByte(c)
			any = true
		}
	}
	if any {
		list = append(list, b.String())
	}
	return list
}

// job reads the job's message and emits its start.
func (w *workerLog) job() error {
	ci := parseMessage(w.message, w.safe)
	w.message = nil
	if ci == nil {
		return nil
	}
	w.ci, w.running = ci, map[string]*record.Record{}
	r := w.record(w.started, record.KindJobStart)
	r.Job = &record.Job{Started: w.started, Source: "worker-log"}
	r.ID = w.id(r)
	return w.emit(r)
}

func (w *workerLog) end() error {
	if w.reading {
		if err := w.job(); err != nil {
			return err
		}
	}
	if w.ci == nil {
		return ErrWorkerLog
	}
	outcome, at := "completed", w.ended
	if at.IsZero() {
		outcome, at = "abandoned", w.last // the log was cut, or the Worker killed
	}
	r := w.record(at, record.KindJobEnd)
	r.Job = &record.Job{Outcome: outcome, Started: w.started, DurationNS: int64(at.Sub(w.started)), Result: w.result, Source: "worker-log"}
	r.ID = w.id(r)
	return w.emit(r)
}

func (w *workerLog) record(ts time.Time, kind record.Kind) *record.Record {
	r := &record.Record{TS: ts, Kind: kind, Schema: record.SchemaVersion, By: record.ByInferred, CI: w.ci}
	if w.ci.Runner != nil && w.ci.Runner.Name != "" {
		r.Host = &record.Host{Name: w.ci.Runner.Name}
	}
	w.n++
	return r
}

// id follows the job and the place of the record among those of its log, not the log's
// name: a copy of it gives the same ids.
func (w *workerLog) id(r *record.Record) string {
	return record.DeriveID(r.TS, "worker-log", w.ci.Repository, w.ci.RunID, fmt.Sprint(w.ci.RunAttempt), w.ci.JobID, w.ci.Job, w.ci.OrchestrationID, w.started.String(), string(r.Kind), strconv.Itoa(w.n))
}

// message is what is read of a job's message (actions/runner, AgentJobRequestMessage).
type message struct {
	JobDisplayName string
	Variables      map[string]struct{ Value any }
	ContextData    map[string]json.RawMessage
}

// parseMessage reads the job's message. Every secret in it is masked with ***, bare words
// of JSON too.
func parseMessage(text []byte, safe *sanitizer) *record.CI {
	var m message
	if json.Unmarshal(unmask(text), &m) != nil {
		return nil
	}
	variable := func(name string) string { v, _ := m.Variables[name].Value.(string); return v }
	github, job, runner := dictionary(m.ContextData["github"]), dictionary(m.ContextData["job"]), dictionary(m.ContextData["runner"])
	keep := func(v string) string {
		if strings.Contains(v, "***") {
			return "" // masked: no longer the name of anything
		}
		return record.Clean(v, record.MaxField)
	}
	title := func(v string) string { return safe.text(keep(v)) }
	number := func(v string) int64 { n, _ := strconv.ParseInt(v, 10, 64); return n }
	ci := &record.CI{
		Repository: keep(github["repository"]), RepositoryID: digits(github["repository_id"]), Owner: keep(github["repository_owner"]), OwnerID: digits(github["repository_owner_id"]),
		Workflow: title(github["workflow"]), WorkflowRef: keep(github["workflow_ref"]), WorkflowSHA: keep(github["workflow_sha"]),
		Job: keep(variable("system.github.job")), JobID: digits(strings.TrimSuffix(job["check_run_id"], ".0")), JobName: title(m.JobDisplayName),
		OrchestrationID: keep(variable("system.orchestrationId")),
		RunID:           digits(github["run_id"]), RunNumber: number(github["run_number"]), RunAttempt: number(github["run_attempt"]),
		EventName: keep(github["event_name"]), Ref: keep(github["ref"]), HeadRef: keep(github["head_ref"]), SHA: keep(github["sha"]),
		Actor: keep(github["actor"]), TriggeringActor: keep(github["triggering_actor"]),
	}
	if ci.Repository == "" || ci.RunID == "" {
		return nil
	}
	if r := keep(job["workflow_ref"]); r != ci.WorkflowRef {
		ci.JobWorkflowRef = r
	}
	name := keep(runner["name"])
	if name == "" {
		name = keep(variable("system.runner.name"))
	}
	if name != "" || runner["os"] != "" {
		ci.Runner = &record.Runner{Name: name, OS: keep(runner["os"]), Arch: keep(runner["arch"]), Environment: keep(runner["environment"])}
	}
	server := keep(github["server_url"])
	if server == "" {
		server = "https://github.com"
	}
	ci.JobURL = record.JobURL(server, ci)
	return ci
}

func digits(v string) string {
	if len(v) > 20 || strings.Trim(v, "0123456789") != "" {
		return ""
	}
	return v
}

// dictionary reads the strings and numbers of a context, {"t":2,"d":[{"k":..,"v":..}]}.
func dictionary(raw json.RawMessage) map[string]string {
	var c struct {
		D []struct {
			K string
			V json.RawMessage
		}
	}
	if json.Unmarshal(raw, &c) != nil {
		return nil
	}
	values := map[string]string{}
	for _, e := range c.D {
		var text string
		var n json.Number
		if json.Unmarshal(e.V, &text) == nil {
			values[e.K] = text
		} else if json.Unmarshal(e.V, &n) == nil {
			values[e.K] = n.String()
		}
	}
	return values
}

// unmask makes JSON of a text in which bare words may be masked: null for ***. What
// follows the object is dropped.
func unmask(text []byte) []byte {
	out := make([]byte, 0, len(text))
	depth := 0
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c == '"':
			from := i
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			out = append(out, text[from:min(i+1, len(text))]...)
			continue
		case c == '*' && bytes.HasPrefix(text[i:], []byte("***")):
			for i+1 < len(text) && strings.IndexByte(",}] \t\r\n", text[i+1]) < 0 {
				i++
			}
			out = append(out, "null"...)
			continue
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			depth--
		}
		out = append(out, c)
		if depth == 0 && (c == '}' || c == ']') {
			break
		}
	}
	return out
}
