// Command vulncheck reads what `govulncheck -format json` found and fails for what is
// called by our code and not accepted in a file, and for accepted lines whose day
// is over.
//
//	govulncheck -format json ./... >found.json && vulncheck packaging/vulncheck/accepted.txt <found.json
//
// No pipe: a scan that ends early says nothing, and would look like one that found nothing.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: vulncheck ACCEPTED <FOUND, which govulncheck -format json wrote")
		os.Exit(2)
	}
	f, err := os.Open(os.Args[1])
	if err == nil {
		err = check(os.Stdin, f, time.Now(), os.Stdout)
		f.Close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vulncheck:", err)
		os.Exit(1)
	}
}

// acceptance is a line of the file.
type acceptance struct {
	until  time.Time // the last day, UTC
	reason string
}

// message is what we read of one value in govulncheck's stream
// (golang.org/x/vuln/internal/govulncheck).
type message struct {
	Config *struct {
		ScanMode string `json:"scan_mode"`
	} `json:"config"`
	OSV *struct {
		ID      string `json:"id"`
		Summary string `json:"summary"`
	} `json:"osv"`
	Finding *struct {
		OSV          string `json:"osv"`
		FixedVersion string `json:"fixed_version"`
		Trace        []struct {
			Module   string `json:"module"`
			Package  string `json:"package"`
			Function string `json:"function"`
		} `json:"trace"`
	} `json:"finding"`
}

// finding is a vulnerability that our code calls.
type finding struct{ module, fixed string }

// check reads both and says what it thinks; the error is why the scan is red.
func check(stream, accepted io.Reader, now time.Time, out io.Writer) error {
	accept, err := readAccepted(accepted)
	if err != nil {
		return err
	}
	called, summaries := map[string]finding{}, map[string]string{}
	scanned := false
	for decoder := json.NewDecoder(stream); ; {
		var m message
		if err := decoder.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("read govulncheck's output: %w", err)
		}
		switch {
		case m.Config != nil:
			scanned = m.Config.ScanMode == "" || m.Config.ScanMode == "source"
		case m.OSV != nil:
			summaries[m.OSV.ID] = m.OSV.Summary
		case m.Finding != nil && len(m.Finding.Trace) > 0 && m.Finding.Trace[0].Function != "":
			called[m.Finding.OSV] = finding{m.Finding.Trace[0].Module, m.Finding.FixedVersion}
		}
	}
	if !scanned {
		return errors.New("no scan of source code came in: did govulncheck fail?")
	}
	var problems []string
	for _, id := range slices.Sorted(maps.Keys(called)) {
		f := called[id]
		fixed := "no version is fixed"
		if f.fixed != "" {
			fixed = "fixed in " + f.fixed
		}
		if a, ok := accept[id]; ok {
			fmt.Fprintf(out, "accepted until %s: %s in %s (%s): %s\n", a.until.Format(time.DateOnly), id, f.module, fixed, a.reason)
			continue
		}
		problems = append(problems, fmt.Sprintf("%s in %s is called (%s): %s", id, f.module, fixed, summaries[id]))
	}
	for _, id := range slices.Sorted(maps.Keys(accept)) {
		a := accept[id]
		_, found := called[id]
		switch {
		case !now.UTC().Before(a.until.AddDate(0, 0, 1)):
			problems = append(problems, fmt.Sprintf("%s was accepted until %s: look again, and set another day or remove the line", id, a.until.Format(time.DateOnly)))
		case !found:
			fmt.Fprintf(out, "not found any more, the line can go: %s\n", id)
		}
	}
	if len(problems) > 0 {
		return errors.New(strings.Join(problems, "\n  "))
	}
	fmt.Fprintf(out, "%d called, all accepted\n", len(called))
	return nil
}

// readAccepted reads lines of id, day and reason; # starts a comment line.
func readAccepted(r io.Reader) (map[string]acceptance, error) {
	accept := map[string]acceptance{}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		id, rest, _ := strings.Cut(line, " ")
		day, reason, _ := strings.Cut(strings.TrimSpace(rest), " ")
		until, err := time.Parse(time.DateOnly, day)
		if err != nil || strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("line %d: want an id, a day such as 2027-01-31 and a reason: %s", n, line)
		}
		if _, ok := accept[id]; ok {
			return nil, fmt.Errorf("line %d: %s is there twice", n, id)
		}
		accept[id] = acceptance{until, strings.TrimSpace(reason)}
	}
	return accept, lines.Err()
}
