package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/report"
)

// events are daemon events that each job must have caused, beside what its docker
// commands are. Those of a build are left out: they differ between builders.
var events = map[string][]string{
	"acme/shop build":   {"image push"},
	"acme/shop test":    {"network create", "container start", "container exec_die", "container die 3", "network destroy"},
	"acme/billing scan": {"image pull", "container die 0"},
}

// secrets are what the workflows carelessly put on command lines.
var secrets = []string{"npm_0123456789abcdefghijklmnopqrstuvwxyz", "correct-horse-battery-staple"}

// check holds the account against the workflow files and prints what it compares.
func (s *stage) check(ctx context.Context, jobs []job) error {
	records, err := s.install.Records()
	if err != nil {
		return fmt.Errorf("read the journal: %w", err)
	}
	var c checker
	for _, j := range jobs {
		c.job(j, records)
	}
	c.coverage(records)
	if err := c.reportAgrees(ctx, s, jobs); err != nil {
		return err
	}
	if err := c.noSecrets(s.install.Dir, s.install.Run); err != nil {
		return err
	}
	if c.wrong > 0 {
		return fmt.Errorf("%d of %d checks failed, see above", c.wrong, c.checks)
	}
	return nil
}

type checker struct {
	checks, wrong int
}

// expect prints one line of the comparison.
func (c *checker) expect(ok bool, what, but string) {
	c.checks++
	if ok {
		fmt.Printf("%s %s\n", green("ok"), what)
		return
	}
	c.wrong++
	fmt.Printf("%s %s: %s\n", red("NOT OK"), what, but)
}

// of reports whether a record names exactly this job as its cause.
func (j job) of(r *record.Record) bool {
	return r.CI != nil && r.CI.Repository == j.repository && r.CI.Workflow == j.workflow && r.CI.Job == j.name
}

func (c *checker) job(j job, records []record.Record) {
	where := fmt.Sprintf("%s, %s, %s", j.repository, j.workflow, j.name)
	var got, seen []string
	ends := map[string]bool{}
	for i := range records {
		r := &records[i]
		if r.Kind == record.KindInvocationEnd {
			ends[r.End.InvocationID] = true
		}
	}
	unended := 0
	for i := range records {
		r := &records[i]
		if !j.of(r) {
			continue
		}
		switch {
		case r.Kind == record.KindInvocation && !r.Invocation.Nested:
			got = append(got, r.Invocation.Command)
			// A call in the moment in which the agent starts comes by file, and nobody sees its end.
			if !ends[r.ID] && r.Invocation.Path != "file" {
				unended++
			}
		case r.Kind == record.KindEvent:
			seen = append(seen, r.Event.Type+" "+r.Event.Action)
			if r.Event.ExitCode != nil {
				seen = append(seen, fmt.Sprintf("%s %s %d", r.Event.Type, r.Event.Action, *r.Event.ExitCode))
			}
		}
	}
	want := slices.Sorted(slices.Values(j.commands))
	slices.Sort(got)
	c.expect(slices.Equal(got, want), fmt.Sprintf("%s: %d docker commands (%s)", where, len(want), strings.Join(j.commands, ", ")),
		"the account has "+strings.Join(got, ", "))
	c.expect(unended == 0 && len(got) > 0, where+": the end of each was seen", fmt.Sprintf("%d without an end", unended))

	var missing []string
	for _, e := range events[j.repository+" "+j.name] {
		if !slices.Contains(seen, e) {
			missing = append(missing, e)
		}
	}
	c.expect(len(missing) == 0, fmt.Sprintf("%s: daemon events beside them (%d)", where, len(seen)), "missing: "+strings.Join(missing, ", "))
}

func (c *checker) coverage(records []record.Record) {
	var unattributed, losses []string
	outside := 0
	for i := range records {
		r := &records[i]
		switch {
		case r.Kind == record.KindLoss:
			losses = append(losses, r.Loss.Cause+" "+r.Loss.Detail)
		case r.OutsideJob:
			outside++
		case r.CI == nil || r.CI.Job == "" || r.By == record.ByNone:
			unattributed = append(unattributed, fmt.Sprintf("%s %s", r.Kind, r.ID))
		}
	}
	c.expect(len(unattributed) == 0, "0 records unattributed", fmt.Sprintf("%d are: %v", len(unattributed), unattributed))
	c.expect(outside > 0, "the runner's own docker ps before the first job is kept apart", "it is not in the account")
	c.expect(len(losses) == 0, "no losses", strings.Join(losses, "; "))
}

func (c *checker) reportAgrees(ctx context.Context, s *stage, jobs []job) error {
	out, err := s.tallyman(ctx, "report", "--json")
	if err != nil {
		return err
	}
	var r report.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return fmt.Errorf("tallyman report --json: %w", err)
	}
	for _, j := range jobs {
		i := slices.IndexFunc(r.Jobs.Rows, func(u report.Usage) bool {
			return u.Repository == j.repository && u.Workflow == j.workflow && u.Job == j.name
		})
		what := fmt.Sprintf("the report has job %s of %s with %d calls", j.name, j.repository, len(j.commands))
		if i < 0 {
			c.expect(false, what, "it does not have the job")
			continue
		}
		c.expect(r.Jobs.Rows[i].Calls == int64(len(j.commands)), what, fmt.Sprintf("it has %d", r.Jobs.Rows[i].Calls))
	}
	c.expect(r.Coverage.Calls.None == 0 && r.Coverage.Events.None == 0, "the report has 0 unattributed",
		fmt.Sprintf("it has %d calls and %d events", r.Coverage.Calls.None, r.Coverage.Events.None))
	if r.Totals.ExitKnown == r.Totals.Calls {
		c.expect(r.Totals.Failed == 2, "the report has the two calls that failed", fmt.Sprintf("it has %d", r.Totals.Failed))
		c.expect(len(r.FailedPulls.Rows) == 1 && strings.HasSuffix(r.FailedPulls.Rows[0].Image, "scanner:3"),
			"the report has the failed pull", fmt.Sprintf("it has %v", r.FailedPulls.Rows))
	} else {
		fmt.Printf("   (exit codes are known of %d of %d calls; tallyman doctor says why they may not be)\n", r.Totals.ExitKnown, r.Totals.Calls)
	}
	return nil
}

// noSecrets searches every file that Tallyman wrote.
func (c *checker) noSecrets(dirs ...string) error {
	var leaks []string
	files := 0
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			// The repositories and their copies hold the workflows themselves.
			if entry.IsDir() && slices.Contains([]string{"repos", "act", "home"}, entry.Name()) {
				return fs.SkipDir
			}
			if !entry.Type().IsRegular() {
				return nil
			}
			data, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			files++
			for _, secret := range secrets {
				if bytes.Contains(data, []byte(secret)) {
					leaks = append(leaks, path)
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("search for secrets: %w", err)
		}
	}
	c.expect(len(leaks) == 0, fmt.Sprintf("no secret of a command line in any of %d files", files), "found in "+strings.Join(leaks, ", "))
	return nil
}
