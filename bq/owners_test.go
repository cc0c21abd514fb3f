package bq

import (
	"strings"
	"testing"
)

func TestOwners(t *testing.T) {
	owners, err := ParseOwners(strings.NewReader("# who owns what\n\nacme/*  @acme/all # the rest\r\n\tacme/billing \"m\\oney\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	const want = "BEGIN TRANSACTION;\nDELETE FROM `p.d.owners` WHERE TRUE;\nINSERT INTO `p.d.owners` (pattern, team, line) VALUES\n" +
		`("acme/*", "@acme/all", 3),` + "\n" + `("acme/billing", "\"m\\oney\"", 4)` + ";\nCOMMIT TRANSACTION;\n"
	if got := OwnersScript("p", "d", owners); got != want {
		t.Errorf("the script is\n%s\nwant\n%s", got, want)
	}
	if got := OwnersScript("p", "d", nil); strings.Contains(got, "INSERT") || !strings.Contains(got, "DELETE") {
		t.Errorf("without rules the script is %s", got)
	}
	for text, want := range map[string]string{
		"\nacme/*\n":                "line 2: one pattern and one team",
		"acme/* @a @b":              "line 1: one pattern and one team",
		"a*/b @a":                   "line 1: a * stands at the end",
		"acme/x @a\x1b[2J":          "line 1: it has characters that cannot be printed",
		"acme/x @\xff":              "line 1: it has characters that cannot be printed",
		strings.Repeat("a", 70_000): "line 1: bufio.Scanner: token too long",
	} {
		if _, err := ParseOwners(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", text, err, want)
		}
	}
}
