package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/selftest"
	"github.com/tallyman-ci/tallyman/wrapper"
)

// probeCommand makes this program the probe of the self test. It is no command of the
// app, because a probe looks before anything is opened.
const probeCommand = "selftest-probe"

// privateMounts says to a second start of this program that its mounts are its own.
const privateMounts = "TALLYMAN_SELFTEST_PRIVATE_MOUNTS"

// copyFlags say which shim is tested, and where.
func copyFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "shim", Category: placesFlags, EnvVars: []string{"TALLYMAN_SHIM"}, TakesFile: true,
			Usage: "the shim in `FILE`; without it, the first docker in PATH that is Tallyman's, or docker-shim beside this program"},
		&cli.StringFlag{Name: "dir", Category: placesFlags, EnvVars: []string{"TALLYMAN_SELFTEST_DIR"}, TakesFile: true,
			Usage: "put the temporary copy into `FOLDER`, in place of TMPDIR"},
		&cli.StringFlag{Name: "config", Category: placesFlags, EnvVars: []string{"TALLYMAN_CONFIG"}, TakesFile: true,
			Usage: "judge the run_dir of the configuration in `FILE`; without it, of " + config.FileName + " beside this program, then " + config.DefaultPath},
	}
}

func (p *program) selftestCommand() *cli.Command {
	return &cli.Command{
		Name: "selftest", Category: forPeople, Usage: "prove the shim's promises on this machine, on one page",
		Description: `It injects faults into a copy of the installed shim in a folder of its own, with an
agent of its own: nothing of the installation or of a running job is touched, and
nothing stays. It needs no root and no Docker daemon. It exits 1 when a check failed;
"not possible here" is no failure, and no time but a hang's is one.

Examples:
  tallyman selftest
  tallyman selftest --markdown > proof.md
  kubectl exec runner-pod -c runner -- tallyman selftest --json
  sudo tallyman selftest --thorough`,
		Flags: append([]cli.Flag{
			&cli.DurationFlag{Name: "duration", Category: "Checks", EnvVars: []string{"TALLYMAN_SELFTEST_DURATION"}, Value: 10 * time.Second,
				Usage: "measure latency for this `LONG`; the checks take some seconds more"},
			&cli.StringSliceFlag{Name: "only", Category: "Checks", EnvVars: []string{"TALLYMAN_SELFTEST_ONLY"},
				Usage: "make only the check of this `ID`: shim, ends, transparency, latency, SH-36, ...; may be repeated"},
			&cli.BoolFlag{Name: "thorough", Category: "Checks", EnvVars: []string{"TALLYMAN_SELFTEST_THOROUGH"},
				Usage: "also try what needs file systems of its own (root; in a mount namespace of its own)"},
			&cli.BoolFlag{Name: "json", Category: "Output", EnvVars: []string{"TALLYMAN_SELFTEST_JSON"}, Usage: "write one JSON object"},
			&cli.BoolFlag{Name: "markdown", Category: "Output", EnvVars: []string{"TALLYMAN_SELFTEST_MARKDOWN"}, Usage: "write GitHub Flavored Markdown"},
		}, copyFlags()...),
		Action: p.selftest,
	}
}

func (p *program) selftest(c *cli.Context) error {
	switch {
	case c.Duration("duration") <= 0:
		return commandline.BadUsage(c, "--duration %s: it must be longer than nothing", c.Duration("duration"))
	case c.Bool("json") && c.Bool("markdown"):
		return commandline.BadUsage(c, "--json and --markdown: use one of them")
	}
	for _, id := range c.StringSlice("only") {
		if !slices.Contains(selftest.IDs(), id) {
			return commandline.BadUsage(c, "--only %q: there are %s", id, strings.Join(selftest.IDs(), " "))
		}
	}
	o, cfg, err := p.selftestOptions(c)
	if err != nil {
		return err
	}
	ctx, stop := untilHangup(c.Context)
	defer stop()
	o.Only = c.StringSlice("only")
	if o.Thorough = c.Bool("thorough"); o.Thorough && os.Getenv(privateMounts) == "" {
		return p.withPrivateMounts(ctx)
	}
	o.Duration, o.RunDir, o.SpoolOnDisk = c.Duration("duration"), cfg.RunDir, cfg.SpoolOnDisk
	if terminalWidth(p.stderr) > 0 {
		o.Progress = func(doing string) { fmt.Fprintf(p.stderr, "\r\x1b[Ktallyman: %s", doing) }
	}
	page, err := selftest.Run(ctx, o)
	if o.Progress != nil {
		fmt.Fprint(p.stderr, "\r\x1b[K")
	}
	if err != nil {
		return interrupted(ctx, err)
	}
	write := page.Text
	switch {
	case c.Bool("json"):
		write = page.JSON
	case c.Bool("markdown"):
		write = page.Markdown
	}
	if err := write(p.stdout); err != nil {
		return fmt.Errorf("write the page: %w", err)
	}
	if page.Verdict != selftest.Pass {
		return errSaid
	}
	return nil
}

// withPrivateMounts runs this command line again in a mount namespace of its own: what
// is mounted there is gone with the process, whatever ends it.
func (p *program) withPrivateMounts(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), privateMounts+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.stdin, p.stdout, p.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return errSaid
	case err != nil:
		return fmt.Errorf("make a mount namespace for --thorough: %w (run it as root, or leave --thorough out)", err)
	}
	return nil
}

// untilHangup also ends a test in order when its terminal goes away.
func untilHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, syscall.SIGHUP, syscall.SIGQUIT)
}

// interrupted says so where a test ended because it was told to.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return errors.New("interrupted")
	}
	return err
}

func (p *program) selftestOptions(c *cli.Context) (selftest.Options, config.Config, error) {
	cfg, err := p.loadConfig(c)
	if err != nil {
		// The test brings its own configuration; that this one is unusable is for
		// tallyman doctor to say.
		cfg = config.Default()
	}
	exe, err := os.Executable()
	if err != nil {
		return selftest.Options{}, cfg, fmt.Errorf("find this program: %w", err)
	}
	shim := c.String("shim")
	if shim == "" {
		if shim = findShim(os.Getenv("PATH"), exe); shim == "" {
			return selftest.Options{}, cfg, errors.New("there is no shim: no docker in PATH is Tallyman's, and no docker-shim is beside this program (name one with --shim)")
		}
	}
	if shim, err = filepath.Abs(shim); err != nil {
		return selftest.Options{}, cfg, err
	}
	v, commit := commandline.Built(version, commit)
	return selftest.Options{Shim: shim, Tallyman: exe, Probe: []string{probeCommand}, Dir: c.String("dir"), Version: v, Commit: commit}, cfg, nil
}

// findShim finds the installed shim.
func findShim(path, exe string) string {
	for _, dir := range filepath.SplitList(path) {
		if p := filepath.Join(dir, "docker"); filepath.IsAbs(dir) && isShim(p) {
			return p
		}
	}
	if p := filepath.Join(filepath.Dir(exe), "docker-shim"); isShim(p) {
		return p
	}
	return ""
}

// isShim looks for the marker in what may be a shim by its size; the real docker has
// forty megabytes.
func isShim(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	const most = 16 << 20
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > most {
		return false
	}
	b, err := io.ReadAll(f)
	return err == nil && bytes.Contains(b, []byte(wrapper.Marker))
}
