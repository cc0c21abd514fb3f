package documents

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// files returns the files of the repository whose names end in suffix, by their paths
// from its root. What git is told to ignore is in folders that begin with a dot.
func files(t *testing.T, suffix string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "node_modules" || name == "testdata") {
			return filepath.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(name, suffix) {
			rel, err := filepath.Rel(root, path)
			found = append(found, rel)
			return err
		}
		return nil
	})
	if err != nil || len(found) == 0 {
		t.Fatalf("no files *%s (%v)", suffix, err)
	}
	return found
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	fenced    = regexp.MustCompile("(?ms)^```.*?^```")
	heading   = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	link      = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	linkText  = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
	noAnchor  = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
	code      = regexp.MustCompile("`([^`\n]+)`")
	madeBy    = regexp.MustCompile("(?m)(?:`|^)make ([a-z][a-z0-9-]*)")
	makeRule  = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
	testName  = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*`)
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)`)
	firstCell = regexp.MustCompile(`(?m)^\| (.*?) \|`)
)

// anchors returns what GitHub makes of the headings of a document.
func anchors(document string) []string {
	var all []string
	times := map[string]int{}
	for _, h := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(document, ""), -1) {
		a := noAnchor.ReplaceAllString(strings.ToLower(linkText.ReplaceAllString(strings.TrimSpace(h[1]), "$1")), "")
		a = strings.ReplaceAll(a, " ", "-")
		if n := times[a]; n > 0 {
			all = append(all, fmt.Sprintf("%s-%d", a, n))
		} else {
			all = append(all, a)
		}
		times[a]++
	}
	return all
}

// A link to a file of the repository, and to a heading in it, leads there.
func TestLinks(t *testing.T) {
	links := 0
	for _, name := range files(t, ".md") {
		for _, l := range link.FindAllStringSubmatch(fenced.ReplaceAllString(read(t, name), ""), -1) {
			if strings.Contains(l[1], "://") {
				continue
			}
			links++
			path, anchor, _ := strings.Cut(l[1], "#")
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s: (%s) leads nowhere", name, l[1])
			} else if anchor != "" && !slices.Contains(anchors(read(t, target)), anchor) {
				t.Errorf("%s: (%s): %s has no such heading", name, l[1], target)
			}
		}
	}
	if links == 0 {
		t.Error("no links found")
	}
}

// A target of make that a document names is in the Makefile.
func TestMakeTargets(t *testing.T) {
	rules := map[string]bool{}
	for _, r := range makeRule.FindAllStringSubmatch(read(t, "Makefile"), -1) {
		rules[r[1]] = true
	}
	named := 0
	for _, name := range files(t, ".md") {
		for _, m := range madeBy.FindAllStringSubmatch(read(t, name), -1) {
			// Prose may begin a line with the word.
			if strings.HasPrefix(m[0], "make") && !inFence(read(t, name), m[0]) {
				continue
			}
			named++
			if !rules[m[1]] {
				t.Errorf("%s names make %s, which the Makefile does not have", name, m[1])
			}
		}
	}
	if named == 0 {
		t.Error("no targets found")
	}
}

// A test that a document calls as a witness is there.
func TestNamedTests(t *testing.T) {
	there := map[string]bool{}
	for _, name := range files(t, "_test.go") {
		for _, f := range testFunc.FindAllStringSubmatch(read(t, name), -1) {
			there[f[1]] = true
		}
	}
	named := 0
	for _, name := range files(t, ".md") {
		for _, test := range testName.FindAllString(read(t, name), -1) {
			named++
			if !there[test] {
				t.Errorf("%s names %s, which is no test", name, test)
			}
		}
	}
	if named == 0 {
		t.Error("no test is named")
	}
}

func inFence(document, what string) bool {
	return slices.ContainsFunc(fenced.FindAllString(document, -1), func(block string) bool { return strings.Contains(block, "\n"+what) })
}

// cells returns what stands as code in the first cells of the table below a heading of
// ARCHITECTURE.md.
func cells(t *testing.T, below string) []string {
	t.Helper()
	_, rest, found := strings.Cut(read(t, "ARCHITECTURE.md"), "\n## "+below+"\n")
	if !found {
		t.Fatalf("ARCHITECTURE.md has no heading %s", below)
	}
	part, _, _ := strings.Cut(rest, "\n## ")
	var all []string
	for _, row := range firstCell.FindAllStringSubmatch(part, -1) {
		for _, c := range code.FindAllStringSubmatch(row[1], -1) {
			all = append(all, c[1])
		}
	}
	return all
}

// Each package is in the table of rooms, or a room that it is a part of; and there are
// no rooms that do not exist. internal is no room: each of its parts is one.
func TestRooms(t *testing.T) {
	rooms := cells(t, "Rooms")
	for _, room := range rooms {
		if info, err := os.Stat(filepath.Join(root, room)); err != nil || !info.IsDir() {
			t.Errorf("there is no folder %s", room)
		}
	}
	seen := map[string]bool{}
	for _, name := range files(t, ".go") {
		if dir := filepath.Dir(name); !seen[dir] {
			seen[dir] = true
			if !slices.ContainsFunc(rooms, func(room string) bool { return dir == room || strings.HasPrefix(dir, room+"/") }) {
				t.Errorf("no room for %s", dir)
			}
		}
	}
}

// Each module that go.mod requires for our own imports has a row that says what it is for,
// and each row is of such a module.
func TestDependencies(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	var direct []string
	for _, r := range mod.Require {
		if !r.Indirect {
			direct = append(direct, r.Path)
		}
	}
	described := map[string]bool{}
	for _, row := range cells(t, "Dependencies") {
		module := "" // a row may name the one package of a module that is used
		for _, d := range direct {
			if (row == d || strings.HasPrefix(row, d+"/")) && len(d) > len(module) {
				module = d
			}
		}
		if module == "" {
			t.Errorf("%s is not required directly", row)
		}
		described[module] = true
	}
	for _, d := range direct {
		if !described[d] {
			t.Errorf("no row says what %s is for", d)
		}
	}
}
