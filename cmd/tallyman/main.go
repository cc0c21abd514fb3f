// Command tallyman keeps the account of docker calls on a runner and answers from
// it: the agent, the hooks of the runner, and the questions.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"syscall"

	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/report"
	"github.com/tallyman-ci/tallyman/selftest"
)

// version and commit are set by the linker (-X main.version=...).
var version, commit string

// Exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == probeCommand {
		os.Exit(selftest.ProbeMain(os.Args[2:])) // first: it looks at how this process was started
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	p := program{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, environ: os.Environ()}
	quietLibraries()
	code := p.run(ctx, os.Args)
	stop()
	os.Exit(code)
}

// program is what the commands share with the outside.
type program struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	environ        []string
	problems       []string // of a start that went on in spite of them, see runForHook
}

// run runs one command line and returns its exit code.
func (p *program) run(ctx context.Context, args []string) int {
	// The runner fails a job whose hook does not exit 0, whatever went wrong in it.
	hook := len(args) > 1 && args[1] == "hook"
	var err error
	if startedByHook(args) {
		err = p.runForHook(ctx, args)
	} else {
		err = p.app().RunContext(ctx, args)
	}
	var usage *commandline.UsageError
	switch {
	case hook:
		if err != nil && !errors.Is(err, errSaid) {
			fmt.Fprintln(p.stderr, "tallyman: "+report.Safe(err.Error()))
		}
		return exitOK
	case err == nil:
		return exitOK
	case errors.Is(err, errSaid):
		return exitError
	case errors.As(err, &usage):
		fmt.Fprintf(p.stderr, "tallyman: %s\nRun '%s --help' for what there is.\n", report.Safe(usage.Error()), usage.Command)
		return exitUsage
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(p.stderr, "tallyman: interrupted")
		return exitError
	}
	fmt.Fprintln(p.stderr, "tallyman: "+report.Safe(err.Error()))
	return exitError
}

// startedByHook tells whether this is the agent that a job-started hook started.
func startedByHook(args []string) bool {
	return len(args) > 1 && args[1] == "agent" && slices.Contains(args, "--exit-on-job-end")
}

var badVariable = regexp.MustCompile(`from environment variable "(TALLYMAN_\w+)"`)

// runForHook runs an agent that nobody watches start: a variable of the pod that makes no
// sense (TALLYMAN_NO_EVENTS=yes) is passed over and told by the agent's log and status.
// As an error it would cost the whole account, and be read by nobody.
func (p *program) runForHook(ctx context.Context, args []string) error {
	for {
		err := p.app().RunContext(ctx, args)
		if err == nil {
			return nil
		}
		m := badVariable.FindStringSubmatch(err.Error())
		if m == nil || os.Getenv(m[1]) == "" {
			return err
		}
		p.problems = append(p.problems, report.Safe(fmt.Sprintf("%s=%s makes no sense and is not used", m[1], os.Getenv(m[1]))))
		if err := os.Unsetenv(m[1]); err != nil {
			return fmt.Errorf("unset %s: %w", m[1], err)
		}
	}
}

// errSaid ends a command with exit code 1 when its output has told why.
var errSaid = errors.New("already said")
