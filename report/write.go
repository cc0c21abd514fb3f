package report

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// TerminalOptions say what the terminal is.
type TerminalOptions struct {
	// Width is the number of columns; 0 for what is no terminal: no line is cut then
	// and no bars are drawn.
	Width int
}

// barCells is the length of the longest bar.
const barCells = 20

// Terminal writes the report as aligned text.
func (r *Report) Terminal(w io.Writer, o TerminalOptions) error {
	b := bufio.NewWriter(w)
	for _, line := range r.heading() {
		fmt.Fprintln(b, Safe(line))
	}
	if none := r.nothing(); none != "" {
		fmt.Fprintln(b)
		fmt.Fprintln(b, none)
		return b.Flush()
	}
	for _, s := range r.sections() {
		if len(s.rows) == 0 && s.empty == "" {
			continue
		}
		fmt.Fprintf(b, "\n%s\n", s.title)
		if len(s.rows) == 0 {
			fmt.Fprintf(b, "  %s\n", s.empty)
		} else {
			s.terminal(b, o)
		}
		for _, n := range s.notes {
			fmt.Fprintf(b, "  [%s]\n", Safe(n))
		}
	}
	return b.Flush()
}

func (s *section) terminal(b *bufio.Writer, o TerminalOptions) {
	table := make([][]string, 0, len(s.rows)+1)
	head := make([]string, len(s.columns))
	for i, c := range s.columns {
		head[i] = c.head
	}
	table = append(table, head)
	for _, row := range s.rows {
		safe := make([]string, len(row))
		for i, v := range row {
			safe[i] = Safe(v)
			if v == "" {
				safe[i] = "-"
			}
		}
		table = append(table, safe)
	}
	widths := make([]int, len(s.columns))
	for _, row := range table {
		for i, v := range row {
			widths[i] = max(widths[i], cells(v))
		}
	}
	// Bars are drawn where they fit beside the whole table: a name is worth more.
	bars := len(s.bars) > 1 && rowCells(widths)+barCells+1 <= o.Width
	if o.Width > 0 {
		shrink(widths, s.columns, o.Width)
	}
	var most int64
	for _, n := range s.bars {
		most = max(most, n)
	}
	for y, row := range table {
		line := " "
		for i, v := range row {
			v = fit(v, widths[i])
			pad := strings.Repeat(" ", max(0, widths[i]-cells(v)))
			if s.columns[i].number {
				line += " " + pad + v
			} else {
				line += " " + v + pad
			}
			line += " "
		}
		if bars && y > 0 && most > 0 {
			line += " " + strings.Repeat("#", int((s.bars[y-1]*barCells+most-1)/most))
		}
		fmt.Fprintln(b, strings.TrimRight(line, " "))
	}
}

func rowCells(widths []int) int {
	sum := 0
	for _, w := range widths {
		sum += w + 2 // two spaces between columns, and before the first
	}
	return sum
}

// shrink takes columns from the widest names until a row fits the terminal. The
// first name, which says what the row is about, keeps 28 at least, the others ten;
// the line wraps where that is not enough.
func shrink(widths []int, columns []column, room int) {
	for rowCells(widths) > room {
		widest := -1
		for i, w := range widths {
			least := 10
			if i == 0 {
				least = 28
			}
			if !columns[i].number && !columns[i].plain && w > least && (widest < 0 || w > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			return
		}
		widths[widest]--
	}
}

// Markdown writes the report as GitHub Flavored Markdown.
func (r *Report) Markdown(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "## Docker account\n\n")
	for _, line := range r.heading() {
		what, value, _ := strings.Cut(line, ": ")
		fmt.Fprintf(b, "- %s: %s\n", what, code(value))
	}
	if none := r.nothing(); none != "" {
		fmt.Fprintf(b, "\n%s\n", none)
		return b.Flush()
	}
	for _, s := range r.sections() {
		if len(s.rows) == 0 && s.empty == "" {
			continue
		}
		fmt.Fprintf(b, "\n### %s\n\n", s.title)
		if len(s.rows) == 0 {
			fmt.Fprintf(b, "%s\n", s.empty)
		} else {
			s.markdown(b)
		}
		for _, n := range s.notes {
			fmt.Fprintf(b, "\n<sub>%s</sub>\n", note(n))
		}
	}
	return b.Flush()
}

// note is a sentence of ours, whose one special character is the less-than sign.
func note(s string) string { return strings.ReplaceAll(Safe(s), "<", "&lt;") }

func (s *section) markdown(b *bufio.Writer) {
	for _, c := range s.columns {
		fmt.Fprintf(b, "| %s ", c.head)
	}
	fmt.Fprintln(b, "|")
	for _, c := range s.columns {
		if c.number {
			fmt.Fprint(b, "| ---: ")
		} else {
			fmt.Fprint(b, "| --- ")
		}
	}
	fmt.Fprintln(b, "|")
	for _, row := range s.rows {
		for i, v := range row {
			switch {
			case s.columns[i].number || s.columns[i].plain:
				v = note(v)
			default:
				v = code(v)
			}
			fmt.Fprintf(b, "| %s ", v)
		}
		fmt.Fprintln(b, "|")
	}
}

// JSON writes the report as one indented JSON object and a newline. Characters
// that a terminal would act on are escaped, as in all output of this package.
func (r *Report) JSON(w io.Writer) error {
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return fmt.Errorf("encode the report: %w", err)
	}
	_, err := w.Write(SafeJSON(buf.Bytes()))
	return err
}
