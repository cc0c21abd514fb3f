package main

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// command is a call of the program in a folder.
func command(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), asProgram+"=1", "TMPDIR="+dir)
	return cmd
}

// Where requests were imported into the records, the page ranks who caused them.
func TestPictureOfSuspects(t *testing.T) {
	dir := t.TempDir()
	fleet := writeFleet(t, dir)
	run := func(args ...string) {
		t.Helper()
		if out, err := command(t, dir, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	run("import", "github-csv", "--to", "requests.jsonl", "requests.csv")
	run("report", "--html", "page.html", "records.jsonl", "requests.jsonl")
	text, err := os.ReadFile(filepath.Join(dir, "page.html"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), `<section id="suspects"`)
	if !found {
		t.Fatal("the page has no suspects")
	}
	section, _, _ = strings.Cut(section, "</section>")
	for _, w := range fleet.Workflows {
		if w.Rate > 0 && !strings.Contains(section, ">"+w.Repository+"<") {
			t.Errorf("%s is guilty and not among the suspects", w.Repository)
		}
	}
	for _, want := range []string{"believed to be recorded", "up to", "at least", `href="#query-suspects"`} {
		if !strings.Contains(section, want) {
			t.Errorf("the ranking does not say %q", want)
		}
	}
	named := `{"id":"0198f3f0-0000-7000-8000-000000000001","ts":"2026-03-02T10:00:00Z","kind":"http","schema":1,"by":"none","http":{"class":"git-fetch","user":"bot","count":12}}`
	if err := os.WriteFile(filepath.Join(dir, "named.jsonl"), []byte(named+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run("report", "--html", "named.html", "records.jsonl", "named.jsonl")
	if text, err = os.ReadFile(filepath.Join(dir, "named.html")); err != nil || !bytes.Contains(text, []byte("12 git requests, none of them anonymous.")) {
		t.Errorf("the page does not say that all requests named somebody: %v", err)
	}
	run("report", "--html", "without.html", "records.jsonl")
	if text, err = os.ReadFile(filepath.Join(dir, "without.html")); err != nil || bytes.Contains(text, []byte(`id="suspects"`)) {
		t.Errorf("suspects without requests: %v", err)
	}
}

// The live page does not wait for the ranking, which comes by itself.
func TestLiveSuspects(t *testing.T) {
	dir := t.TempDir()
	fleet := writeFleet(t, dir)
	if out, err := command(t, dir, "import", "github-csv", "--to", "requests.jsonl", "requests.csv").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := command(t, dir, "serve", "--every", "1s", "records.jsonl", "requests.jsonl")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt) // Wait tells whether it was there
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	address, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	section := func(query string) string {
		r, err := http.Get(strings.TrimSpace(address) + query)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("%s, %v", r.Status, err)
		}
		_, s, _ := strings.Cut(string(b), `<section id="suspects"`)
		s, _, _ = strings.Cut(s, "</section>")
		return s
	}
	for _, query := range []string{"", "?repository=nobody/nothing"} {
		deadline := time.Now().Add(time.Minute)
		s := section(query)
		for !strings.Contains(s, "believed to be recorded") && time.Now().Before(deadline) {
			time.Sleep(100 * time.Millisecond)
			s = section(query)
		}
		for _, w := range fleet.Workflows {
			if w.Rate > 0 && !strings.Contains(s, ">"+w.Repository+"<") {
				t.Errorf("%q: %s is guilty and not among the suspects: %s", query, w.Repository, s)
			}
		}
		if told := strings.Contains(s, "about the whole fleet"); told != (query != "") {
			t.Errorf("%q: says that it is about the whole fleet: %v", query, told)
		}
	}
	if s := section("?kind=event"); s != "" {
		t.Errorf("suspects on a page of events: %s", s)
	}
}
