package selftest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// fault is one case of the catalogue that can be tried on a machine in use.
type fault struct {
	id       string // as in docs/faults.md
	injected string
	promised string
	run      func(context.Context, *rig) (detail string, err error)
}

// cases are all of them, in the order of the page.
var cases = append(append(append(append([]fault{}, shimCases...), secretCases...), hookCases...), mountCases...)

// IDs are the checks that there are: words, and faults by their ids in docs/faults.md.
func IDs() []string {
	all := []string{"shim", "ends", "transparency", "latency"}
	for _, c := range cases {
		all = append(all, c.id)
	}
	return all
}

// impossible is the error of a case that this machine cannot inject.
type impossible struct{ why string }

func (e impossible) Error() string { return e.why }

func cannot(why string, args ...any) error { return impossible{fmt.Sprintf(why, args...)} }

// try runs one case.
func (r *rig) try(ctx context.Context, f fault) Check {
	c := Check{ID: f.id, Injected: f.injected, Promised: f.promised}
	c.run(func() (string, error) { return f.run(ctx, r) })
	return c
}

// run fills in the result.
func (c *Check) run(f func() (string, error)) {
	start := time.Now()
	detail, err := f()
	c.TookMS = float64(time.Since(start).Microseconds()) / 1e3
	var no impossible
	switch {
	case errors.As(err, &no):
		c.Result, c.Detail = NotPossible, no.why
	case err != nil:
		c.Result, c.Detail = Fail, err.Error()
	default:
		c.Result, c.Detail = Pass, detail
	}
}

// witness is what most cases run as the real tool: it uses all three streams, its
// arguments and an odd exit code.
const witness = `read -r line; echo "out: $line $*"; echo "err" >&2; exit 23`

func witnessCall(path string) call {
	return call{path: path, args: []string{"sh", "-c", witness, "sh", "a", "", "b c"}, stdin: "in\n"}
}

// unharmed runs the witness through the shim of a place and directly, and compares.
func (p *place) unharmed(ctx context.Context, change func(*call)) (outcome, error) {
	direct, through := witnessCall(p.real), witnessCall(p.docker)
	if change != nil {
		change(&direct)
		change(&through)
	}
	want, err := p.r.do(ctx, direct)
	if err != nil {
		return want, fmt.Errorf("without the shim: %w", err)
	}
	got, err := p.r.do(ctx, through)
	if err == nil && !got.same(want) {
		err = fmt.Errorf("through the shim: %s; without it: %s", got, want)
	}
	if err == nil && change == nil && got.status.ExitStatus() != 23 {
		err = fmt.Errorf("the witness itself: %s", got)
	}
	return got, err
}

// expectSpooled is an error where the append file has not n records. Where the machine
// records nothing it cannot be told.
func (p *place) expectSpooled(n int) error {
	if p.r.off != "" {
		return cannot("%s; the command was not harmed", p.r.off)
	}
	all, err := p.spooled()
	if err == nil && len(all) != n {
		err = fmt.Errorf("%d records in the append file, want %d", len(all), n)
	}
	return err
}

// told says how a case was lived through.
func told(o outcome, more string) string {
	text := fmt.Sprintf("the command is as without the shim, %.1f ms", float64(o.took.Microseconds())/1e3)
	if more != "" {
		text += "; " + more
	}
	return text
}

// stranger is a user without rights: ourselves, or for root a user that no machine has.
func stranger() int {
	if os.Getuid() == 0 {
		return 64999
	}
	return 0 // as call.uid: no change
}
