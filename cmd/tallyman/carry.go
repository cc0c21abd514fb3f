package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/install"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	hooks "github.com/tallyman-ci/tallyman/runner-image/hooks"
)

// carryCommand is what the carrier image starts as a pod's init container.
func (p *program) carryCommand() *cli.Command {
	return &cli.Command{
		Name: "carry", Category: forRunner, Usage: "bring the programs into a pod whose runner image is not ours",
		Description: `Writes what the runner mounts into a volume:

  DIR/bin      the programs and the hook scripts, for ` + filepath.Dir(install.BinDir) + `
  DIR/shims    docker, for /usr/local/bin/docker (the real one is elsewhere, see --real)
  DIR/etc      tallyman.conf, for ` + filepath.Dir(config.DefaultPath) + `

and makes the folder for records with its rights (--state). It may run again.
runner-image/README.md shows the pod.

Examples:
  tallyman carry --to /tallyman --state /state
  tallyman carry --state /node/runner-x7f2 --user 1001     the folder for records only`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "to", EnvVars: []string{"TALLYMAN_CARRY_TO"}, TakesFile: true, Usage: "the volume, mounted at `DIR`, for programs and configuration"},
			&cli.StringFlag{Name: "state", EnvVars: []string{"TALLYMAN_CARRY_STATE"}, TakesFile: true, Usage: "the folder for records, to be " + install.StateDir + ", mounted or to be made at `DIR`"},
			&cli.StringFlag{Name: "real", EnvVars: []string{"TALLYMAN_CARRY_REAL"}, Value: "/usr/bin/docker", TakesFile: true, Usage: "the `PATH` of docker in the runner's image"},
			&cli.IntFlag{Name: "user", EnvVars: []string{"TALLYMAN_CARRY_USER"}, Value: 1001, Usage: "the `NUMBER` of the runner's user, who owns the folder for records"},
		},
		Action: func(c *cli.Context) error {
			to, state, real := c.String("to"), c.String("state"), c.String("real")
			if to == "" && state == "" {
				return commandline.BadUsage(c, "carry wants --to DIR, --state DIR, or both")
			}
			if to != "" {
				if !filepath.IsAbs(real) {
					return commandline.BadUsage(c, "--real %q: want an absolute path", real)
				}
				exe, err := os.Executable()
				if err != nil {
					return fmt.Errorf("find this program: %w", err)
				}
				if err := carry(filepath.Dir(exe), to, real); err != nil {
					return err
				}
			}
			if state != "" {
				return stateFolders(state, c.Int("user"))
			}
			return nil
		},
	}
}

// carry fills a volume. Other containers may have programs of it open already, so each
// file comes whole, by a rename.
func carry(from, to, real string) error {
	text := "# Written by tallyman carry. A ConfigMap mounted here in its place keeps these lines.\n" +
		"real.docker = " + real + "\nrun_dir = " + install.RunDirOnDisk + "\nspool_on_disk = true\n"
	shim, err := os.ReadFile(filepath.Join(from, "docker-shim"))
	if err != nil {
		return fmt.Errorf("read the shim beside this program: %w", err)
	}
	program, err := os.ReadFile(filepath.Join(from, "tallyman"))
	if err != nil {
		return fmt.Errorf("read this program: %w", err)
	}
	// An emptyDir is 0777, and what holds programs should not be.
	if err := os.Chmod(to, 0o755); err != nil && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: mount a volume there, for programs and configuration", err)
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{
		{"bin/tallyman", program, 0o755},
		{"bin/docker-shim", shim, 0o755},
		{"bin/job-started.sh", hooks.JobStarted, 0o755},
		{"bin/job-completed.sh", hooks.JobCompleted, 0o755},
		{"shims/docker", shim, 0o755},
		{"etc/" + config.FileName, []byte(text), 0o644},
	} {
		name := filepath.Join(to, f.name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		temp := filepath.Join(filepath.Dir(name), ".tallyman-new-"+filepath.Base(name))
		err := os.WriteFile(temp, f.data, f.mode)
		if err == nil {
			err = errors.Join(os.Chmod(temp, f.mode), os.Rename(temp, name)) // chmod: whatever the umask is
		}
		if err != nil {
			_ = os.Remove(temp)
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// stateFolders makes the folder for records, the run folder and the spool. As root it
// gives them to the user; a user makes them for itself.
func stateFolders(dir string, uid int) error {
	for _, d := range []struct {
		name string
		mode fs.FileMode
	}{{dir, 0o755}, {filepath.Join(dir, "run"), 0o755}, {filepath.Join(dir, "run/spool"), 0o733 | fs.ModeSticky}} {
		if err := os.MkdirAll(d.name, 0o755); err != nil {
			return err
		}
		// A pod's containers may have run before, and a job have put a link there.
		if st, err := os.Lstat(d.name); err != nil || !st.IsDir() {
			return fmt.Errorf("%s is no folder, but a link to one (remove it)", d.name)
		}
		if os.Geteuid() == 0 {
			if err := os.Lchown(d.name, uid, uid); err != nil {
				return fmt.Errorf("give %s to user %s: %w", d.name, strconv.Itoa(uid), err)
			}
		}
		// The volume itself may be another user's; that the agent can write there is enough.
		if err := os.Chmod(d.name, d.mode); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}
