package fluent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

const defaultTag = "tallyman.{kind}"

// maxTagPart bounds what a record puts into a tag: receivers make file names and
// metric labels of it.
const maxTagPart = 64

// places are what a template may name, and where a record has it.
var places = map[string][]string{
	"kind":       {"kind"},
	"repository": {"ci", "repository"},
	"owner":      {"ci", "owner"},
	"workflow":   {"ci", "workflow"},
	"job":        {"ci", "job"},
	"runner":     {"ci", "runner", "name"},
	"host":       {"host", "name"},
}

// tag is a template: texts with places of the record between them.
type tag struct {
	texts []string   // one more than places
	paths [][]string // of the record's members
}

// parseTag takes a template apart.
func parseTag(template string) (tag, error) {
	var t tag
	rest := template
	for {
		text, after, ok := strings.Cut(rest, "{")
		if clean(text, len(text), ".") != text {
			return tag{}, fmt.Errorf("tag %q: want letters, digits, - _ . and {places}", template)
		}
		t.texts = append(t.texts, text)
		if !ok {
			break
		}
		name, after, ok := strings.Cut(after, "}")
		path := places[name]
		if !ok || path == nil {
			known := make([]string, 0, len(places))
			for name := range places {
				known = append(known, "{"+name+"}")
			}
			slices.Sort(known)
			return tag{}, fmt.Errorf("tag %q: unknown place {%s (known: %s)", template, name, strings.Join(known, ", "))
		}
		t.paths = append(t.paths, path)
		rest = after
	}
	if template == "" {
		return tag{}, errors.New("the tag is empty")
	}
	return t, nil
}

// of is the tag of a record. What the record puts into it was chosen by jobs, and a
// receiver routes by dots, writes files by the tag and knows wildcards: everything
// but letters, digits, dashes and underscores becomes an underscore.
func (t tag) of(message map[string]any) string {
	var b strings.Builder
	for i, text := range t.texts {
		b.WriteString(text)
		if i == len(t.paths) {
			break
		}
		var v any = message
		for _, member := range t.paths[i] {
			m, _ := v.(map[string]any)
			v = m[member]
		}
		s, _ := v.(string)
		if s == "" {
			s = "none"
		}
		// A kind is ours, and invocation.end has a dot.
		allowed := ""
		if t.paths[i][0] == "kind" {
			allowed = "."
		}
		b.WriteString(clean(s, maxTagPart, allowed))
	}
	return b.String()
}

// clean replaces what is no letter, digit, dash, underscore or one of also.
func clean(s string, most int, also string) string {
	b := make([]byte, 0, min(len(s), most))
	for i := 0; i < len(s) && len(b) < most; i++ {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', strings.IndexByte(also, c) >= 0:
			b = append(b, c)
		default:
			b = append(b, '_')
		}
	}
	return string(b)
}
