// Command demo shows Tallyman at work on a machine without GitHub, and checks what
// it shows.
//
// It lays out an installation in a folder of its own, starts a private Docker daemon
// with a registry, and runs the workflows of two small repositories with act in host
// mode: the docker of their steps is the shim, and around each job the hooks are
// called as actions/runner calls them. Then it prints the report and holds the
// account against the workflow files: each of their docker commands must be there,
// under its repository, workflow and job.
//
// Run it with `make demo`, which builds and installs what it needs. It needs root,
// because a Docker daemon does, and leaves nothing behind but its folder.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/dockertest"
)

func main() {
	var o options
	flag.StringVar(&o.dir, "dir", ".demo", "folder of the demo; its content is deleted first")
	flag.StringVar(&o.built, "bin", "bin", "folder with docker-shim and tallyman")
	flag.StringVar(&o.hooks, "hooks", "runner-image/hooks", "folder with the runner's hooks")
	flag.StringVar(&o.act, "act", "act", "the act command")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "\n%s %v\n", red("demo failed:"), err)
		if errors.Is(err, dockertest.ErrUnavailable) {
			fmt.Fprintln(os.Stderr, "The demo needs root on a Linux machine where it may make namespaces: a VM, or a privileged container.")
		} else {
			fmt.Fprintf(os.Stderr, "What it left is in %s.\n", o.dir)
		}
		stop()
		os.Exit(1)
	}
}

type options struct {
	dir, built, hooks, act string
}

func run(ctx context.Context, o options) (err error) {
	for _, path := range []*string{&o.dir, &o.built, &o.hooks, &o.act} {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	began := time.Now()
	heading("A private Docker daemon and registry, and Tallyman in a folder of its own")
	s, err := newStage(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()

	var jobs []job
	for _, repo := range []string{"shop", "billing"} {
		found, err := s.checkout(ctx, repo)
		if err != nil {
			return fmt.Errorf("set up repository %s: %w", repo, err)
		}
		jobs = append(jobs, found...)
	}
	if err := s.waitForDocker(ctx); err != nil {
		return err
	}
	for _, j := range jobs {
		heading(fmt.Sprintf("Job %s of workflow %q in %s", j.name, j.workflow, j.repository))
		if err := s.runJob(ctx, j); err != nil {
			return fmt.Errorf("job %s of %s: %w", j.name, j.repository, err)
		}
	}

	heading("tallyman report")
	if err := s.report(ctx); err != nil {
		return err
	}

	heading("Where things lie")
	s.printPlaces()

	heading("Is it all there?")
	if err := s.check(ctx, jobs); err != nil {
		return err
	}
	fmt.Printf("\n%s in %.0f seconds\n", green("The demo is green"), time.Since(began).Seconds())
	return nil
}

// Colours are for terminals only.
func paint(code, text string) string {
	if info, err := os.Stdout.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 || os.Getenv("NO_COLOR") != "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func red(text string) string   { return paint("1;31", text) }
func green(text string) string { return paint("1;32", text) }

func heading(text string) { fmt.Printf("\n%s\n", paint("1;34", "== "+text)) }
