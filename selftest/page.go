package selftest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tallyman-ci/tallyman/report"
)

// JSON writes the page as one indented JSON object.
func (p *Page) JSON(w io.Writer) error { return writeJSON(w, p) }

// JSON writes the figures as one indented JSON object.
func (l *Latency) JSON(w io.Writer) error { return writeJSON(w, l) }

func writeJSON(w io.Writer, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the page: %w", err)
	}
	_, err = w.Write(append(report.SafeJSON(data), '\n'))
	return err
}

// Text writes the page for a terminal.
func (p *Page) Text(w io.Writer) error {
	var b strings.Builder
	line := func(format string, args ...any) { b.WriteString(report.Safe(fmt.Sprintf(format, args...)) + "\n") }
	title := func(text string) { b.WriteString("\n" + text + "\n") }
	line("Tallyman self test: %s", p.verdict())
	for _, row := range p.head() {
		line("  %-9s %s", row[0], row[1])
	}
	if p.Ends.Rung != "" {
		title("What this kernel tells of the end of a command")
		line("  %s (%s)", p.Ends.Detail, p.Ends.Rung)
		title("What is degraded here")
		if len(p.Degraded) == 0 {
			line("  nothing")
		}
	}
	for _, d := range p.Degraded {
		line("  %s", d.What)
		line("    because: %s", d.Why)
	}
	if p.Latency != nil {
		b.WriteString("\n")
		p.Latency.text(&b)
	}
	if len(p.Transparency.Ways) > 0 {
		title("Transparency: what a program sees, directly and through the shim")
		line("  %s", p.transparencyLine())
	}
	for _, d := range p.Transparency.Differences {
		line("  %s: %s: directly %s, through the shim %s: %s", d.Way, d.Name, d.Direct, d.Through, d.why())
	}
	title("Checks, by the id of the fault")
	for _, c := range p.Cases {
		line("  %-17s %s  %s", mark(c.Result), c.ID, c.Injected)
		line("  %-17s must: %s", "", c.Promised)
		if c.Detail != "" {
			line("  %-17s seen: %s", "", c.Detail)
		}
	}
	title("Verdict: " + p.verdict())
	_, err := io.WriteString(w, b.String())
	return err
}

// Markdown writes the page in GitHub Flavored Markdown.
func (p *Page) Markdown(w io.Writer) error {
	var b strings.Builder
	cell := strings.NewReplacer("|", `\|`, "<", "&lt;", "`", "'").Replace
	row := func(cells ...string) {
		for i := range cells {
			cells[i] = cell(report.Safe(cells[i]))
		}
		b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
	}
	table := func(cells ...string) {
		row(cells...)
		b.WriteString("|" + strings.Repeat(" --- |", len(cells)) + "\n")
	}
	fmt.Fprintf(&b, "# Tallyman self test: %s\n\n", p.verdict())
	table("", "")
	for _, r := range p.head() {
		row(r[0], r[1])
	}
	if p.Ends.Rung != "" {
		row("ends of commands", fmt.Sprintf("%s (%s)", p.Ends.Detail, p.Ends.Rung))
	}
	b.WriteString("\n## Degraded here\n\n")
	switch {
	case p.Ends.Rung == "":
		b.WriteString("Not asked.\n")
	case len(p.Degraded) == 0:
		b.WriteString("Nothing.\n")
	default:
		table("what", "why")
		for _, d := range p.Degraded {
			row(d.What, d.Why)
		}
	}
	if l := p.Latency; l != nil {
		fmt.Fprintf(&b, "\n## Latency added\n\nTo `%s`, %d rounds, load %s. %s\n\n", cell(report.Safe(l.Command)), l.Rounds, l.Load, l.Method)
		table("way", "p50, us", "p99, us", "max, us", "processor p50, us", "p99", "max", "ratio of p50 to the shell wrapper's")
		for _, a := range l.Added {
			row(a.Name, figure(a.P50), figure(a.P99), figure(a.Max), figure(a.CPU50), figure(a.CPU99), figure(a.CPUMax), ratio(a.Ratio))
		}
		for _, text := range l.remarks() {
			fmt.Fprintf(&b, "\n%s\n", cell(report.Safe(text)))
		}
	}
	fmt.Fprintf(&b, "\n## Transparency\n\n%s\n", cell(report.Safe(p.transparencyLine())))
	if len(p.Transparency.Differences) > 0 {
		b.WriteString("\n")
		table("way", "property", "directly", "through the shim", "reason")
		for _, d := range p.Transparency.Differences {
			row(d.Way, d.Name, d.Direct, d.Through, d.why())
		}
	}
	b.WriteString("\n## Checks\n\n")
	table("id", "injected", "must happen", "result", "seen")
	for _, c := range p.Cases {
		row(c.ID, c.Injected, c.Promised, mark(c.Result), c.Detail)
	}
	fmt.Fprintf(&b, "\n**Verdict: %s**\n", p.verdict())
	_, err := io.WriteString(w, b.String())
	return err
}

func mark(r Result) string {
	if r == Fail {
		return "FAIL"
	}
	return string(r)
}

func (p *Page) verdict() string {
	word := "PASS"
	if p.Verdict != Pass {
		word = "FAIL"
	}
	return fmt.Sprintf("%s (%d passed, %d failed, %d not possible here)", word, p.Passed, p.Failed, p.NotPossible)
}

func (p *Page) head() [][2]string {
	m := p.Machine
	all := [][2]string{
		{"version", fmt.Sprintf("%s, commit %s", p.Version, p.Commit)},
		{"time", p.Time.Format(time.RFC3339)},
		{"machine", fmt.Sprintf("Linux %s, %s, %d processors, load %s, uid %d", m.Kernel, m.Arch, m.CPUs, m.Load, m.UID)},
		{"shim", fmt.Sprintf("%s, %d bytes, SHA-256 %s", p.Shim.Path, p.Shim.Bytes, p.Shim.SHA256)},
		{"tested", fmt.Sprintf("a copy of it in %s (%s), socket and append files in %s (%s), removed again", m.Dir, m.DirFS, m.RunDir, m.RunFS)},
	}
	if len(p.Only) > 0 {
		all = append(all, [2]string{"only", strings.Join(p.Only, " ")})
	}
	return all
}

func (p *Page) transparencyLine() string {
	t := p.Transparency
	return fmt.Sprintf("%d properties compared, %d differences; started: %s", t.Properties, len(t.Differences), strings.Join(t.Ways, "; "))
}

func (d Difference) why() string {
	if d.Reason == "" {
		return "NO REASON: a defect"
	}
	return d.Reason
}

// Text writes the figures for a terminal.
func (l *Latency) Text(w io.Writer) error {
	var b strings.Builder
	l.text(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

func (l *Latency) text(b *strings.Builder) {
	fmt.Fprintf(b, "Latency added to `%s`, %d rounds, microseconds\n", report.Safe(l.Command), l.Rounds)
	b.WriteString(Table(l.Added, "ratio of p50 to the shell wrapper's"))
	fmt.Fprintf(b, "  (the command alone takes p50 %s, p99 %s, max %s; load %s)\n", figure(l.Plain.P50), figure(l.Plain.P99), figure(l.Plain.Max), l.Load)
	for _, text := range l.remarks() {
		fmt.Fprintf(b, "  %s\n", report.Safe(text))
	}
	b.WriteString("Method: " + fold(l.Method, 90) + "\n")
}

// remarks are the promise, and what else there is to know.
func (l *Latency) remarks() []string {
	all := append([]string{}, l.Notes...)
	if l.Met {
		return append(all, "The promise, p99 of 5 ms and never over 50 ms, was kept in this run.")
	}
	all = append(all, "The promise, p99 of 5 ms and never over 50 ms, was not seen in this run (times do not decide the verdict):")
	return append(all, l.Missed...)
}

// Table writes figures in columns.
func Table(rows []Added, ratioOf string) string {
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "p50\tp99\tmax\tprocessor p50\tp99\tmax\t%s\t \n", ratioOf)
	for _, a := range rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t  %s\n", figure(a.P50), figure(a.P99), figure(a.Max),
			figure(a.CPU50), figure(a.CPU99), figure(a.CPUMax), ratio(a.Ratio), a.Name)
	}
	t.Flush()
	return b.String()
}

func figure(us float64) string { return fmt.Sprintf("%.0f", us) }

func ratio(r float64) string { return fmt.Sprintf("%.2f", r) }

// fold breaks a text into lines.
func fold(text string, width int) string {
	var b strings.Builder
	n := 0
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
		case n+1+len(word) > width:
			b.WriteString("\n")
			n = 0
		default:
			b.WriteString(" ")
			n++
		}
		b.WriteString(word)
		n += len(word)
	}
	return b.String()
}
