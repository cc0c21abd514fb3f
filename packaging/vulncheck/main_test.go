package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

const (
	config   = `{"config":{"protocol_version":"v1.0.0","scanner_name":"govulncheck","scan_mode":"source"}}` + "\n"
	known    = `{"osv":{"id":"GO-2030-0001","summary":"a bad thing"}}` + "\n"
	imported = `{"finding":{"osv":"GO-2030-0001","trace":[{"module":"example.com/m","package":"example.com/m/p"}]}}` + "\n"
	called   = `{"finding":{"osv":"GO-2030-0001","fixed_version":"v1.2.3","trace":[{"module":"example.com/m","package":"example.com/m/p","function":"F"}]}}` + "\n"
)

func TestCheck(t *testing.T) {
	for _, c := range []struct{ name, stream, accepted, wantError, wantOut string }{
		{"nothing is found", config, "", "", "0 called"},
		{"it is imported and not called", config + known + imported, "", "", "0 called"},
		{"it is called", config + known + imported + called, "", "GO-2030-0001 in example.com/m is called (fixed in v1.2.3): a bad thing", ""},
		{"it is accepted, on the last day", config + known + called, "# why\nGO-2030-0001 2030-05-31 not reachable\n", "", "accepted until 2030-05-31: GO-2030-0001 in example.com/m"},
		{"the day is over", config + known + called, "GO-2030-0001 2030-05-30 not reachable", "look again", ""},
		{"the day is over, and it is gone", config, "GO-2030-0001 2030-05-30 not reachable", "look again", ""},
		{"another one is accepted", config + known + called, "GO-2030-0002 2031-01-01 r", "GO-2030-0001 in example.com/m is called", "the line can go: GO-2030-0002"},
		{"no day", config, "GO-2030-0001 soon", "line 1", ""},
		{"no reason", config, "\nGO-2030-0001 2030-05-31", "line 2", ""},
		{"twice", config, "A 2031-01-01 r\nA 2031-01-01 r", "twice", ""},
		{"govulncheck failed", "", "", "no scan of source code", ""},
		{"only a binary was looked at", strings.Replace(config, "source", "binary", 1), "", "no scan of source code", ""},
		{"half an output", config + `{"finding":`, "", "read govulncheck's output", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			err := check(strings.NewReader(c.stream), strings.NewReader(c.accepted), time.Date(2030, 5, 31, 23, 59, 0, 0, time.UTC), &out)
			if (err == nil) != (c.wantError == "") || err != nil && !strings.Contains(err.Error(), c.wantError) {
				t.Errorf("error %v, want %q", err, c.wantError)
			}
			if !strings.Contains(out.String(), c.wantOut) {
				t.Errorf("said %q, want %q", out.String(), c.wantOut)
			}
		})
	}
}

// TestAcceptedFile: the file can be read. Whether a day is over is the scan's to say, or
// the tests of an old commit would fail some day.
func TestAcceptedFile(t *testing.T) {
	f, err := os.Open("accepted.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if accept, err := readAccepted(f); err != nil || len(accept) == 0 {
		t.Errorf("%d lines: %v", len(accept), err)
	}
}
