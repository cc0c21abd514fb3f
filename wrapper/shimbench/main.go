// Command shimbench is `tallyman bench` for a clone of the repository: it measures the
// built shim in front of true and, where there is one, of docker --version.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tallyman-ci/tallyman/selftest"
)

func main() {
	shim := flag.String("shim", "bin/docker-shim", "the shim")
	tallyman := flag.String("tallyman", "bin/tallyman", "the agent's binary")
	rounds := flag.Int("rounds", 500, "rounds per command")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, *shim, *tallyman, *rounds)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "shimbench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, shim, tallyman string, rounds int) error {
	tallyman, err := filepath.Abs(tallyman)
	if err != nil {
		return err
	}
	commands := [][]string{nil}
	if docker, err := exec.LookPath("docker"); err == nil {
		commands = append(commands, []string{docker, "--version"})
	}
	for _, command := range commands {
		l, err := selftest.Bench(ctx, selftest.Options{Shim: shim, Tallyman: tallyman},
			selftest.Measure{Rounds: rounds, Duration: 5 * time.Minute, Command: command})
		if err != nil {
			return err
		}
		if err := l.Text(os.Stdout); err != nil {
			return err
		}
		fmt.Println()
	}
	return nil
}
