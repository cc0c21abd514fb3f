// Package faults is the catalogue of faults that Tallyman answers for, and the book of
// which test proved which case.
//
// catalogue.tsv states each case. A test that proves one says so with Case; where the
// machine cannot inject the fault, it says that with CannotRun. With TALLYMAN_FAULTS_DIR
// set, each result becomes a file in that folder, from which internal/gen/faultsgen
// writes docs/faults.md and sees that no case was left out in silence.
package faults

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// DirVariable names the environment variable with the folder for results.
const DirVariable = "TALLYMAN_FAULTS_DIR"

// A Fault is one case of the catalogue.
type Fault struct {
	ID       string // SH-01: shim, SP: spool and delivery, EV: events, HK: hook, SE: secrets, EN: ends of commands, AB: abuse
	Injected string // what is done to us
	Answer   string // what must happen then, exactly
}

//go:embed catalogue.tsv
var catalogue string

// Catalogue returns all cases in their order.
func Catalogue() []Fault {
	var all []Fault
	for line := range strings.Lines(catalogue) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Split(line, "\t")
		if len(f) != 3 {
			panic(fmt.Sprintf("internal/faults/catalogue.tsv: %d columns in %q, want 3", len(f), line))
		}
		all = append(all, Fault{f[0], f[1], f[2]})
	}
	return all
}

// A Result is what one test found of one case.
type Result struct {
	ID      string `json:"id"`
	Test    string `json:"test"`              // name of the test or subtest
	Outcome string `json:"outcome"`           // one of the constants below
	Why     string `json:"why,omitempty"`     // why it could not run
	Package string `json:"package,omitempty"` // folder of the test, relative to the module
}

// Outcomes of a case.
const (
	Passed    = "passed"
	Failed    = "failed"
	CouldNot  = "could not run"
	NotRunYet = "not run"
)

// impossible holds the reasons of CannotRun until the test's end.
var impossible struct {
	sync.Mutex
	why map[string]string // by the test's name
}

// Case says that t proves these cases of the catalogue.
func Case(t testing.TB, ids ...string) {
	t.Helper()
	all := Catalogue()
	for _, id := range ids {
		if !slices.ContainsFunc(all, func(f Fault) bool { return f.ID == id }) {
			t.Fatalf("%s is not in internal/faults/catalogue.tsv", id)
		}
	}
	dir := os.Getenv(DirVariable)
	if dir == "" {
		return
	}
	pkg := folder() // now: the test may leave its folder
	t.Cleanup(func() {
		outcome, why := Passed, ""
		switch {
		case t.Failed():
			outcome = Failed
		case t.Skipped():
			impossible.Lock()
			outcome, why = CouldNot, impossible.why[t.Name()]
			impossible.Unlock()
			if why == "" {
				outcome = NotRunYet // skipped for another reason, which is none
			}
		}
		for _, id := range ids {
			if err := save(dir, Result{ID: id, Test: t.Name(), Outcome: outcome, Why: why, Package: pkg}); err != nil {
				t.Errorf("the result of %s is not written: %v", id, err)
			}
		}
	})
}

// CannotRun skips the test of a case because this machine cannot inject the fault, and
// says why where people look: on standard error and in the table of results.
func CannotRun(t testing.TB, why string) {
	t.Helper()
	impossible.Lock()
	if impossible.why == nil {
		impossible.why = map[string]string{}
	}
	impossible.why[t.Name()] = why
	impossible.Unlock()
	fmt.Fprintf(os.Stderr, "\n*** %s COULD NOT RUN HERE: %s ***\n\n", t.Name(), why)
	t.Skip(why)
}

func save(dir string, r Result) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	name := strings.NewReplacer("/", "_", " ", "_").Replace(r.ID + "." + r.Package + "." + r.Test + ".json")
	return os.WriteFile(filepath.Join(dir, name), append(b, '\n'), 0o644)
}

// Results reads the folder that tests wrote to.
func Results(dir string) ([]Result, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	var all []Result
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		var r Result
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		all = append(all, r)
	}
	return all, nil
}

// folder is that of the running test, relative to the module: go test runs each
// package's tests in the package's folder.
func folder() string {
	here, err := os.Getwd()
	if err != nil {
		return ""
	}
	for root := here; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			rel, err := filepath.Rel(root, here)
			if err != nil {
				return ""
			}
			return rel
		}
		if root == filepath.Dir(root) {
			return ""
		}
	}
}
