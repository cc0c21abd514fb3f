package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// The runner's Worker writes the job's message to <root>/_diag/Worker_<time>-utc.log
// before it starts the hook: a line that ends in "Job message:", then the message as
// indented JSON with every secret masked (actions/runner src/Runner.Worker/Worker.cs).
// It holds what no variable does: the numeric id of the job, its display name, and
// the workflow that defines it. The form is no contract, so everything here is
// optional, and what is read counts only when it names this very job.
const (
	maxWorkerLog     = 2 << 20 // the message holds the whole event, commonly 10 to 100 KiB
	workerLogTimeout = 100 * time.Millisecond
)

var workerLogName = regexp.MustCompile(`^Worker_(\d{8}-\d{6})-utc\.log$`)

// workerJob is what a Worker log says of its job.
type workerJob struct {
	Name            string // jobDisplayName
	ID              string // check_run_id
	WorkflowRef     string // of the workflow that defines the job
	Repository      string
	RunID           string
	RunAttempt      string
	Job             string
	OrchestrationID string
}

// enrich adds to ci what the Worker log knows. It gives up after workerLogTimeout:
// a log on a hung network share costs no more than that.
func enrich(ctx context.Context, ci *record.CI, roots []string, runner runnerProcess, serverURL string) error {
	ctx, cancel := context.WithTimeout(ctx, workerLogTimeout)
	defer cancel()
	type answer struct {
		job   workerJob
		found bool
	}
	// The goroutine can outlive the call only inside a system call on a hung file
	// system, which nothing can end; the worker process exits regardless.
	ch := make(chan answer, 1)
	known := *ci // the goroutine's own: ci belongs to the caller again after the timeout
	go func() {
		var a answer
		defer func() {
			_ = recover() // a log that cannot be read is a log that is not there
			ch <- a
		}()
		a.job, a.found = findWorkerJob(ctx, &known, roots, runner)
	}()
	var a answer
	select {
	case a = <-ch:
	case <-ctx.Done():
		return fmt.Errorf("read the runner's Worker log: %w", ctx.Err())
	}
	if !a.found {
		return nil
	}
	if ci.JobID == "" {
		ci.JobID = a.job.ID
	}
	ci.JobName = a.job.Name
	if a.job.WorkflowRef != ci.WorkflowRef {
		ci.JobWorkflowRef = a.job.WorkflowRef
	}
	if ci.OrchestrationID == "" {
		ci.OrchestrationID = a.job.OrchestrationID
	}
	if ci.JobURL == "" {
		ci.JobURL = record.JobURL(serverURL, ci)
	}
	return nil
}

// findWorkerJob reads the newest logs of each root until one is this job's.
func findWorkerJob(ctx context.Context, ci *record.CI, roots []string, runner runnerProcess) (workerJob, bool) {
	for _, root := range roots {
		dir := filepath.Join(root, "_diag")
		for _, name := range newestWorkerLogs(dir, 3) {
			if ctx.Err() != nil {
				return workerJob{}, false
			}
			data, err := readRegular(filepath.Join(dir, name), maxWorkerLog)
			if err != nil {
				continue
			}
			job, ok := parseWorkerLog(data)
			if !ok || !job.isOf(ci) {
				continue
			}
			// The legs of a matrix share run, attempt and job key. On a runner that ran
			// one leg before, only the orchestration id or the time tells them apart.
			sameLeg := ci.OrchestrationID != "" && job.OrchestrationID == ci.OrchestrationID
			if sameLeg || beganWith(name, runner) {
				return job, true
			}
		}
	}
	return workerJob{}, false
}

// newestWorkerLogs returns up to n names of logs, newest first by the time in their
// names: mtimes change when an old log is read by a collector or copied.
func newestWorkerLogs(dir string, n int) []string {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(10_000) // a runner keeps 30 days of logs; what was read before an error is still of use
	names = slices.DeleteFunc(names, func(name string) bool { return !workerLogName.MatchString(name) })
	slices.Sort(names)
	slices.Reverse(names)
	return names[:min(n, len(names))]
}

// beganWith is true when the log's name holds the time at which the runner's
// Worker process started, or, where that process is not known, the last ten minutes.
func beganWith(name string, runner runnerProcess) bool {
	m := workerLogName.FindStringSubmatch(name)
	if m == nil {
		return false
	}
	at, err := time.Parse("20060102-150405", m[1])
	if err != nil {
		return false
	}
	if start, ok := startTime(runner.Start); ok {
		d := at.Sub(start)
		return d > -15*time.Second && d < 60*time.Second
	}
	age := time.Since(at)
	return age > -time.Minute && age < 10*time.Minute
}

// isOf is true when everything the log and the environment both know is equal, the
// run's id among it.
func (j *workerJob) isOf(ci *record.CI) bool {
	same := func(a, b string) bool { return a == "" || b == "" || a == b }
	attempt := ""
	if ci.RunAttempt > 0 {
		attempt = strconv.FormatInt(ci.RunAttempt, 10)
	}
	return j.RunID != "" && j.RunID == ci.RunID &&
		same(j.RunAttempt, attempt) &&
		same(strings.ToLower(j.Repository), strings.ToLower(ci.Repository)) &&
		same(j.Job, ci.Job) &&
		same(j.OrchestrationID, ci.OrchestrationID) &&
		same(j.ID, ci.JobID)
}

// parseWorkerLog reads the job message of a Worker log, whole or cut. It follows
// the message's structure and never searches for a key: the message holds the event's
// text, in which anybody who opens a pull request can write "jobDisplayName".
func parseWorkerLog(data []byte) (workerJob, bool) {
	const marker = "Job message:"
	at := bytes.Index(data, []byte(marker))
	if at < 0 {
		return workerJob{}, false
	}
	s := scanner{b: data, i: at + len(marker)}
	var j workerJob
	s.object(func(key string) {
		switch strings.ToLower(key) {
		case "jobdisplayname":
			j.Name = s.text()
		case "variables":
			s.object(func(name string) {
				switch name {
				case "system.github.job":
					j.Job = s.member("value")
				case "system.orchestrationId":
					j.OrchestrationID = s.member("value")
				default:
					s.skip()
				}
			})
		case "contextdata":
			s.object(func(name string) {
				switch name {
				case "github":
					s.dictionary(map[string]*string{
						"repository": &j.Repository, "run_id": &j.RunID, "run_attempt": &j.RunAttempt,
					})
				case "job":
					s.dictionary(map[string]*string{
						"check_run_id": &j.ID, "workflow_ref": &j.WorkflowRef,
					})
				default:
					s.skip()
				}
			})
		default:
			s.skip()
		}
	})
	j.ID = strings.TrimSuffix(j.ID, ".0") // the runner holds numbers as doubles
	if !isDigits(j.ID) {
		j.ID = ""
	}
	for _, v := range []*string{&j.Name, &j.WorkflowRef, &j.OrchestrationID} {
		*v = clean(*v)
		if strings.Contains(*v, "***") {
			*v = "" // masked: no longer the name of anything
		}
	}
	return j, j.RunID != ""
}

// scanner walks through JSON that need not be whole: the log may be cut, and a
// secret that is a word of JSON ("true", "1") is masked there too, which leaves a bare
// *** where a value should be. Every method moves on or sets i to the end.
type scanner struct {
	b []byte
	i int
}

func (s *scanner) end() bool { return s.i >= len(s.b) }

// space skips white space and what separates members.
func (s *scanner) space() {
	for !s.end() {
		switch s.b[s.i] {
		case ' ', '\t', '\r', '\n', ',', ':':
			s.i++
		default:
			return
		}
	}
}

// object calls member for each member of the object that begins here. member reads
// or skips the value; when it does neither, object skips it.
func (s *scanner) object(member func(key string)) {
	s.space()
	if s.end() || s.b[s.i] != '{' {
		s.skip()
		return
	}
	s.i++
	for {
		s.space()
		if s.end() {
			return
		}
		switch s.b[s.i] {
		case '}':
			s.i++
			return
		case '"':
		default:
			s.i = len(s.b) // no longer an object: what was found before counts
			return
		}
		key := s.string()
		s.space()
		before := s.i
		member(key)
		if s.i == before {
			s.skip()
		}
	}
}

// array calls element for each element of the array that begins here.
func (s *scanner) array(element func()) {
	s.space()
	if s.end() || s.b[s.i] != '[' {
		s.skip()
		return
	}
	s.i++
	for {
		s.space()
		if s.end() {
			return
		}
		if s.b[s.i] == ']' {
			s.i++
			return
		}
		before := s.i
		element()
		if s.i == before {
			s.i = len(s.b)
		}
	}
}

// member returns the text of one member of the object that begins here.
func (s *scanner) member(name string) (text string) {
	s.object(func(key string) {
		if key == name {
			text = s.text()
		} else {
			s.skip()
		}
	})
	return text
}

// dictionary reads the runner's compact form of a context,
// {"t":2,"d":[{"k":"run_id","v":"1"}, ...]}, into the strings of want.
func (s *scanner) dictionary(want map[string]*string) {
	s.object(func(key string) {
		if key != "d" {
			s.skip()
			return
		}
		s.array(func() {
			var name string
			value := -1
			s.object(func(key string) {
				switch key {
				case "k":
					name = s.text()
				case "v":
					value = s.i
					s.skip()
				default:
					s.skip()
				}
			})
			if dst := want[name]; dst != nil && value >= 0 {
				v := scanner{b: s.b, i: value}
				*dst = v.text()
			}
		})
	})
}

// text reads a string, a number or another bare word; an object or array is skipped
// and reads as "".
func (s *scanner) text() string {
	s.space()
	if s.end() {
		return ""
	}
	switch s.b[s.i] {
	case '"':
		return s.string()
	case '{', '[':
		s.skip()
		return ""
	}
	from := s.i
	if s.word(); s.end() {
		return "" // cut: half a number is another number
	}
	return string(s.b[from:s.i])
}

// word moves over a bare word.
func (s *scanner) word() {
	for !s.end() {
		switch s.b[s.i] {
		case ',', '}', ']', ' ', '\t', '\r', '\n':
			return
		}
		s.i++
	}
}

// string reads the string whose opening quote is here. A string that was cut
// reads as "".
func (s *scanner) string() string {
	from := s.i
	if !s.quoted() {
		return ""
	}
	var text string
	if err := json.Unmarshal(s.b[from:s.i], &text); err != nil {
		return ""
	}
	return text
}

// quoted moves behind the string whose opening quote is here, and tells whether it
// was closed.
func (s *scanner) quoted() bool {
	for s.i++; !s.end(); s.i++ {
		switch s.b[s.i] {
		case '\\':
			s.i++
		case '"':
			s.i++
			return true
		}
	}
	s.i = len(s.b)
	return false
}

// skip moves behind the value that begins here, however deep it is.
func (s *scanner) skip() {
	s.space()
	depth := 0
	for !s.end() {
		switch s.b[s.i] {
		case '"':
			s.quoted()
		case '{', '[':
			depth++
			s.i++
		case '}', ']':
			if depth == 0 {
				return // the end of what holds the value
			}
			depth--
			s.i++
		default:
			if depth == 0 {
				s.word()
				return
			}
			s.i++
		}
		if depth == 0 {
			return
		}
	}
}
