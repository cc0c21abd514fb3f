package bq

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Owner is a rule that says which team owns a repository.
type Owner struct {
	Pattern string // a repository, or the beginning of names and an asterisk
	Team    string
	Line    int64 // in the file; of all rules that fit, the last one counts
}

// ParseOwners reads rules as a CODEOWNERS file has them: a pattern and a team on each
// line; # begins a comment. The error names the line.
func ParseOwners(r io.Reader) ([]Owner, error) {
	var out []Owner
	lines := bufio.NewScanner(r)
	n := int64(1)
	for ; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(text)
		switch {
		case len(fields) == 0:
			continue
		case len(fields) != 2:
			return nil, fmt.Errorf("owners, line %d: one pattern and one team are wanted, as in: acme/* @acme/platform", n)
		case !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\t' && !unicode.IsPrint(r) }):
			return nil, fmt.Errorf("owners, line %d: it has characters that cannot be printed", n)
		case strings.Contains(strings.TrimSuffix(fields[0], "*"), "*"):
			return nil, fmt.Errorf("owners, line %d: a * stands at the end of a pattern, as in: acme/*", n)
		}
		out = append(out, Owner{fields[0], fields[1], n})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("owners, line %d: %w", n, err)
	}
	return out, nil
}

// OwnersSQL are the statements that put rules in the place of those in the table of owners.
func OwnersSQL(project, dataset string, owners []Owner) []string {
	out := []string{In("DELETE FROM tallyman."+Owners+" WHERE TRUE", project, dataset)}
	var rows []string
	for _, o := range owners {
		rows = append(rows, fmt.Sprintf("(%s, %s, %d)", literal(o.Pattern), literal(o.Team), o.Line))
	}
	if len(rows) > 0 {
		out = append(out, In("INSERT INTO tallyman."+Owners+" (pattern, team, line) VALUES\n", project, dataset)+strings.Join(rows, ",\n"))
	}
	return out
}

// OwnersScript is OwnersSQL as one script, which puts all rules in place or none.
func OwnersScript(project, dataset string, owners []Owner) string {
	return "BEGIN TRANSACTION;\n" + strings.Join(OwnersSQL(project, dataset, owners), ";\n") + ";\nCOMMIT TRANSACTION;\n"
}
