package report

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/tallyman-ci/tallyman/internal/figures"
)

// summaryRows is the number of rows of each table in a summary.
const summaryRows = 5

// Summary writes the few lines for a job's own page (GITHUB_STEP_SUMMARY): calls
// by command, images pulled, containers, failures and the longest calls. It writes
// nothing at all when the report holds no use of docker, so that jobs without it
// get no page.
func Summary(w io.Writer, r *Report) error {
	t := r.Totals
	if t.Calls+t.EndsAlone+t.ImagesPulled+t.ContainersStarted == 0 {
		return nil
	}
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "### Docker in this job\n\n")
	parts := []string{figures.Plural(t.Calls, "docker call")}
	if t.DurationNS > 0 {
		parts[0] += " (" + length(t.DurationNS) + ")"
	}
	parts = append(parts, figures.Plural(t.ImagesPulled, "image")+" pulled", figures.Plural(t.ContainersStarted, "container")+" run")
	switch {
	case t.Failed > 0:
		parts = append(parts, fmt.Sprintf("**%s failed**", figures.Plural(t.Failed, "call")))
	case t.ExitKnown > 0:
		parts = append(parts, "no call failed")
	}
	if t.ContainersFailed > 0 {
		parts = append(parts, fmt.Sprintf("**%s failed**", figures.Plural(t.ContainersFailed, "container")))
	}
	if t.ContainersOOM > 0 {
		parts = append(parts, fmt.Sprintf("**%s out of memory**", figures.Plural(t.ContainersOOM, "container")))
	}
	fmt.Fprintf(b, "%s.\n", note(strings.Join(parts, ", ")))

	r.short().write(b)
	fmt.Fprintf(b, "\n<sub>%s</sub>\n", note(r.callsCoverage()))
	if t.NoEnd > 0 {
		fmt.Fprintf(b, "\n<sub>%s</sub>\n", note(r.exitCoverage()))
	}
	return b.Flush()
}

type sectionList []section

// short are the sections of the summary, a few rows and columns each.
func (r *Report) short() sectionList {
	commands := section{title: "Calls by command", columns: []column{text("command"), number("calls"), number("failed"), number("time")}}
	for _, c := range head(r.Commands.Rows) {
		commands.rows = append(commands.rows, []string{commandName(c.Tool, c.Command), figures.Count(c.Calls), figures.Count(c.Failed), length(c.DurationNS)})
	}
	more(&commands, len(r.Commands.Rows)+r.Commands.More)
	failed := section{title: "Failures", columns: []column{text("command"), text("image"), words("exit code"), number("times")}}
	for _, f := range head(r.FailedCalls.Rows) {
		failed.rows = append(failed.rows, []string{commandName(f.Tool, f.Command), familiar(f.Image), exit(f.ExitCode, f.Signal), figures.Count(f.Calls)})
	}
	more(&failed, len(r.FailedCalls.Rows)+r.FailedCalls.More)
	pulled := section{title: "Images pulled", columns: []column{text("image"), number("pulls")}}
	for _, i := range head(r.ImagesPulled.Rows) {
		pulled.rows = append(pulled.rows, []string{familiar(i.Image), figures.Count(i.Count)})
	}
	more(&pulled, len(r.ImagesPulled.Rows)+r.ImagesPulled.More)
	containers := section{title: "Containers", columns: []column{text("image"), number("run"), number("failed"), number("run time")}}
	for _, c := range head(r.Containers.Rows) {
		containers.rows = append(containers.rows, []string{familiar(c.Image), figures.Count(c.Started), figures.Count(c.Failed), length(c.DurationNS)})
	}
	more(&containers, len(r.Containers.Rows)+r.Containers.More)
	longest := section{title: "Longest calls", columns: []column{text("command"), text("images"), number("time")}}
	for _, c := range head(r.Longest) {
		longest.rows = append(longest.rows, []string{commandName(c.Tool, c.Command), familiarList(c.Images), length(c.DurationNS)})
	}
	return sectionList{commands, failed, pulled, containers, longest}
}

func head[T any](rows []T) []T { return rows[:min(len(rows), summaryRows)] }

func more(s *section, all int) {
	if all > len(s.rows) {
		s.notes = []string{fmt.Sprintf("and %s more", figures.Count(all-len(s.rows)))}
	}
}

func (l sectionList) write(b *bufio.Writer) {
	for _, s := range l {
		if len(s.rows) == 0 {
			continue
		}
		fmt.Fprintf(b, "\n**%s**\n\n", s.title)
		s.markdown(b)
		for _, n := range s.notes {
			fmt.Fprintf(b, "\n<sub>%s</sub>\n", note(n))
		}
	}
}
