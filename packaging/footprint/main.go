// Command footprint prints what Tallyman takes: the size of the programs, what each
// sink adds to the agent, its memory, and what a runner image grows by.
//
//	go run ./packaging/footprint
//
// What a sink costs is measured by leaving it out: the agent is built once more with
// its line cut from the source, by go build -overlay. Costs do not add up, because
// the two Google sinks share most of their libraries.
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	maxShim = 2_500_000 // bytes; the promise
	calls   = 4000      // of the shim, for the agent's memory under load
	callers = 4         // at the same time
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "footprint:", err)
		os.Exit(1)
	}
}

// variants are the agents that are measured.
var variants = []struct {
	name, what string
	tags       string
	cuts       []cut
}{
	{"full", "`tallyman`", "", nil},
	// Both have Pub/Sub's library, so that leaving out one of them saves little.
	{"no-bq", "without `tallyman bq` (`-tags nobq`)", "nobq", nil},
	{"no-pubsub", "without `tallyman bq` and `pubsub:`", "nobq", []cut{
		{"cmd/tallyman/sinks_google.go", "pubsub.Scheme(), "}, {"cmd/tallyman/sinks_google.go", "\t\"github.com/tallyman-ci/tallyman/sinks/pubsub\"\n"}}},
	{"no-cloudlogging", "without `cloudlogging:`", "", []cut{
		{"cmd/tallyman/sinks_google.go", ", cloudlogging.Scheme()"}, {"cmd/tallyman/sinks_google.go", "\t\"github.com/tallyman-ci/tallyman/sinks/cloudlogging\"\n"}}},
	{"no-fluent", "without `fluent:`", "", []cut{
		{"cmd/tallyman/sinks.go", "fluent.Scheme()"}, {"cmd/tallyman/sinks.go", "\t\"github.com/tallyman-ci/tallyman/sinks/fluent\"\n"}}},
	{"slim", "`tallyman`, slim (`-tags slim`)", "slim", nil},
}

func run() error {
	dir, err := os.MkdirTemp("", "tallyman-footprint-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	shim := filepath.Join(dir, "docker-shim")
	if err := goRun("run", "./internal/leanbuild", "-o", shim, "./cmd/docker-shim"); err != nil {
		return err
	}
	shimSize, err := size(shim)
	if err != nil {
		return err
	}

	fmt.Println("| what | size | compressed | |")
	fmt.Println("| --- | --- | --- | --- |")
	if err := row("`docker-shim`", shim, fmt.Sprintf("bound: %s", megabytes(maxShim))); err != nil {
		return err
	}
	var full, slim string
	var fullSize int64
	for _, b := range variants {
		program := filepath.Join(dir, "tallyman-"+b.name)
		if err := build(dir, program, b.tags, b.cuts); err != nil {
			return fmt.Errorf("build the agent %s: %w", b.what, err)
		}
		n, err := size(program)
		if err != nil {
			return err
		}
		note := ""
		switch b.name {
		case "full":
			full, fullSize = program, n
		case "slim":
			slim = program
			note = fmt.Sprintf("saves %s", megabytes(fullSize-n))
		case "no-bq":
			note = fmt.Sprintf("so that command costs %s", megabytes(fullSize-n))
		case "no-pubsub":
			note = fmt.Sprintf("so the two cost %s", megabytes(fullSize-n))
		default:
			note = fmt.Sprintf("so that sink costs %s", megabytes(fullSize-n))
		}
		if err := row(b.what, program, note); err != nil {
			return err
		}
	}
	image := fullSize + shimSize*2
	fmt.Printf("| an image, beside a copy of its docker | %s | | agent, shim as it was built, shim in docker's place |\n", megabytes(image))
	if docker, err := exec.LookPath("docker"); err == nil {
		if err := row("that copy (here: this machine's docker)", docker, "a layer cannot rename: docker.original is written again; none in a pod with an init container"); err != nil {
			return err
		}
	}

	fmt.Println("\n| agent's memory | resident | private |")
	fmt.Println("| --- | --- | --- |")
	for _, a := range []struct{ name, program string }{{"`tallyman`", full}, {"slim", slim}} {
		if err := memory(dir, a.name, a.program, shim); err != nil {
			return fmt.Errorf("measure the memory of %s: %w", a.name, err)
		}
	}
	if shimSize > maxShim {
		return fmt.Errorf("the shim has %d bytes, more than %d", shimSize, maxShim)
	}
	return nil
}

// cut is a text to leave out of a file.
type cut struct{ file, text string }

// build builds the agent as a release does, with texts cut out.
func build(dir, out, tags string, cuts []cut) error {
	replace := map[string]string{}
	for _, c := range cuts {
		path, err := filepath.Abs(c.file)
		if err != nil {
			return err
		}
		from := path
		if replace[path] != "" {
			from = replace[path]
		}
		source, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if n := bytes.Count(source, []byte(c.text)); n != 1 {
			return fmt.Errorf("%s has %q %d times instead of once", c.file, c.text, n)
		}
		edited := filepath.Join(dir, filepath.Base(c.file))
		if err := os.WriteFile(edited, bytes.Replace(source, []byte(c.text), nil, 1), 0o644); err != nil {
			return err
		}
		replace[path] = edited
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, overlay, 0o644); err != nil {
		return err
	}
	return goRun("build", "-trimpath", "-overlay", file, "-tags", tags, "-ldflags", "-s -w", "-o", out, "./cmd/tallyman")
}

func goRun(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func size(file string) (int64, error) {
	st, err := os.Stat(file)
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// row prints one program.
func row(what, file, note string) error {
	n, err := size(file)
	if err != nil {
		return err
	}
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	var packed counter
	zip := gzip.NewWriter(&packed) // as layers of images are
	if _, err := io.Copy(zip, in); err != nil {
		return err
	}
	if err := zip.Close(); err != nil {
		return err
	}
	fmt.Printf("| %s | %s | %s | %s |\n", what, megabytes(n), megabytes(int64(packed)), note)
	return nil
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// memory starts an agent with a file sink, and prints its memory when it has nothing to
// do and after some thousand calls.
func memory(dir, name, program, shim string) (err error) {
	place, err := os.MkdirTemp(dir, "agent-")
	if err != nil {
		return err
	}
	run := filepath.Join(place, "run")
	conf := "run_dir = " + run + "\nstate_dir = " + filepath.Join(place, "state") + "\nsinks = file://" + filepath.Join(place, "out.jsonl") +
		"\nstatsd = off\nspool_on_disk = true\n"
	if err := os.WriteFile(filepath.Join(place, "tallyman.conf"), []byte(conf), 0o644); err != nil {
		return err
	}
	tool := filepath.Join(place, "docker")
	data, err := os.ReadFile(shim)
	if err != nil {
		return err
	}
	real, err := exec.LookPath("true")
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(tool, data, 0o755), os.Symlink(real, tool+".original")); err != nil {
		return err
	}
	agent := exec.Command(program, "agent", "--config", filepath.Join(place, "tallyman.conf"), "--no-events")
	agent.Env = []string{"PATH=" + os.Getenv("PATH")}
	if err := agent.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- agent.Wait() }()
	defer func() {
		_ = agent.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(15 * time.Second):
			_ = agent.Process.Kill()
			<-ended
		}
	}()
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(run, "agent.sock")); err == nil {
			break
		}
		if time.Since(began) > 30*time.Second {
			return errors.New("the agent does not listen")
		}
	}
	time.Sleep(2 * time.Second) // what it allocated for its start is collected or not, as in life
	if err := resident(name+", idle", agent.Process.Pid, "VmRSS"); err != nil {
		return err
	}
	var wait sync.WaitGroup
	errs := make(chan error, callers)
	began := time.Now()
	for range callers {
		wait.Go(func() {
			for range calls / callers {
				cmd := exec.Command(tool, "run", "--rm", "ghcr.io/acme/tool:1.2.3", "make", "test")
				cmd.Env = []string{"GITHUB_REPOSITORY=acme/shop", "GITHUB_RUN_ID=4711", "GITHUB_JOB=build", "GITHUB_WORKFLOW=CI"}
				if err := cmd.Run(); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wait.Wait()
	select {
	case err := <-errs:
		return err
	default:
	}
	rate := float64(calls) / time.Since(began).Seconds()
	return resident(fmt.Sprintf("%s, peak of %d calls at %.0f a second", name, calls, rate), agent.Process.Pid, "VmHWM")
}

// resident prints what proc_pid_status(5) says. Pages of the program's own file are
// resident too, and shared by all that run it.
func resident(what string, pid int, field string) error {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return err
	}
	kilobytes := func(name string) int64 {
		_, rest, _ := strings.Cut(string(data), "\n"+name+":")
		text, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		n, _ := strconv.ParseInt(text, 10, 64)
		return n
	}
	fmt.Printf("| %s | %s | %s |\n", what, megabytes(kilobytes(field)*1024), megabytes(kilobytes("RssAnon")*1024))
	return nil
}
