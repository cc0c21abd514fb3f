package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/internal/nearest"
	"github.com/tallyman-ci/tallyman/report"
)

// placeFlags name the configuration and the folders, for every command that needs them.
func placeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "config", Category: placesFlags, EnvVars: []string{"TALLYMAN_CONFIG"}, TakesFile: true,
			Usage: "read the configuration from `FILE`; without it, " + config.FileName + " beside this program, then " + config.DefaultPath},
		&cli.StringFlag{Name: "run-dir", Category: placesFlags, EnvVars: []string{"TALLYMAN_RUN_DIR"}, TakesFile: true,
			Usage: "`FOLDER` of the socket and the spool, in place of the configuration's (the shim reads the configuration only)"},
		&cli.StringFlag{Name: "state-dir", Category: placesFlags, EnvVars: []string{"TALLYMAN_STATE_DIR"}, TakesFile: true,
			Usage: "`FOLDER` of the journal and the job contexts, in place of the configuration's"},
	}
}

// configPath is the configuration file that holds here: the named one, else the
// one beside the program, else the default, which may not be there.
func configPath(c *cli.Context) string {
	if path := c.String("config"); path != "" {
		return path
	}
	if exe, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(exe), config.FileName); exists(beside) {
			return beside
		}
	}
	return config.DefaultPath
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// loadConfig reads the configuration and lets the flags override its folders. Lines
// that cannot be used are said on stderr; the others hold.
func (p *program) loadConfig(c *cli.Context) (config.Config, error) {
	path := configPath(c)
	cfg, problems, err := config.Load(path, ownerOfProgram())
	if errors.Is(err, fs.ErrNotExist) && c.String("config") == "" {
		err = nil
	}
	if err != nil {
		return cfg, fmt.Errorf("read the configuration %s: %w", path, err)
	}
	var known []string
	for _, k := range config.Keys() {
		known = append(known, k.Name)
	}
	for _, problem := range problems {
		fmt.Fprintf(p.stderr, "tallyman: %s, line %d: %s: %s%s\n", path, problem.Line,
			report.Safe(problem.Key), report.Safe(problem.Text), commandline.DidYouMean(unlessSame(nearest.Word(problem.Key, known), problem.Key)))
	}
	for flag, field := range map[string]*string{"run-dir": &cfg.RunDir, "state-dir": &cfg.StateDir} {
		if v := c.String(flag); v != "" {
			if *field, err = filepath.Abs(v); err != nil {
				return cfg, fmt.Errorf("find %s: %w", v, err)
			}
		}
	}
	return cfg, nil
}

func unlessSame(near, text string) string {
	if near == text {
		return ""
	}
	return near
}

// ownerOfProgram is who, beside root, may own the configuration: whoever could
// replace this program.
func ownerOfProgram() uint32 {
	var st syscall.Stat_t
	if err := syscall.Stat("/proc/self/exe", &st); err != nil {
		return 0
	}
	return st.Uid
}
