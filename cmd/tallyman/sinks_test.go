package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/sinks"
)

// docs/sinks.md is what a person reads before writing a URL.
func TestSinksAreDocumented(t *testing.T) {
	data, err := os.ReadFile("../../docs/sinks.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, s := range strings.Split(string(data), "\n## ")[1:] {
		name, text, _ := strings.Cut(s, "\n")
		sections[name] = text
	}
	check := func(section string, params []sinks.Param) {
		t.Helper()
		rows := 0
		for line := range strings.Lines(sections[section]) {
			if strings.HasPrefix(line, "| `") {
				rows++
			}
		}
		for _, p := range params {
			if row := fmt.Sprintf("| `%s` | %s | ", p.Name, p.Default); !strings.Contains(sections[section], row) {
				t.Errorf("docs/sinks.md, section %q, lacks a line that begins with\n%s", section, row)
			}
		}
		if rows != len(params) {
			t.Errorf("docs/sinks.md, section %q, has %d parameters, and there are %d", section, rows, len(params))
		}
	}
	check("Parameters of every sink", sinks.CommonParams())
	for _, s := range append(sinks.Builtin(), schemes()...) {
		if !strings.Contains(sections[s.Name], "`"+s.Form+"`") {
			t.Errorf("docs/sinks.md does not show the form %s", s.Form)
		}
		check(s.Name, s.Params)
	}
}

// A parameter with one wrong letter is answered with the right one, whatever the sink.
func TestAMisspeltParameterIsNamed(t *testing.T) {
	for _, s := range append(sinks.Builtin(), schemes()...) {
		if err := sinks.Check(s.Form, schemes()...); err != nil {
			t.Errorf("the form that we show is refused: %v", err)
		}
		for _, p := range append(sinks.CommonParams(), s.Params...) {
			url := s.Form + "?" + p.Name[:len(p.Name)-1] + "x=1"
			err := sinks.Check(url, schemes()...)
			if want := fmt.Sprintf("did you mean %q?", p.Name); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %s", url, err, want)
			}
		}
	}
}
