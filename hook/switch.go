package hook

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// TurnsOff reports whether this value of TALLYMAN in the runner's environment
// switches Tallyman off.
func TurnsOff(value string) bool {
	switch strings.ToLower(value) {
	case "off", "0", "false":
		return true
	}
	return false
}

// offReason says in a few words why Tallyman is switched off on this runner, or ""
// when it is on, and whether it is the canary's share that says so. The pod's
// environment counts and the job's does not: a hook's environment holds nothing of the
// workflow's env (actions/runner JobHookProvider.cs).
func (o *Options) offReason(env environment) (reason string, canary bool) {
	if TurnsOff(env.get("TALLYMAN")) {
		return "TALLYMAN in the runner's environment", false
	}
	if !o.Enabled {
		return "enabled in the configuration", false
	}
	if OffFile(o.OffFile) {
		return o.OffFile, false
	}
	name := env.get("RUNNER_NAME")
	if name == "" {
		name, _ = os.Hostname()
	}
	if !inCanary(name, o.Canary) {
		return fmt.Sprintf("canary %g %%", o.Canary), true
	}
	return "", false
}

// OffFile reports whether the kill switch at path is set; "" is no switch.
func OffFile(path string) bool { return path != "" && ownedByRoot(path) }

// ownedByRoot is true when the file exists and is root's: a job must not be able
// to switch its own account off by creating it.
func ownedByRoot(path string) bool {
	fi, err := os.Lstat(path)
	if err != nil {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && st.Uid == 0
}

// inCanary is true for about percent of all names, and always for the same ones: a
// name that is in at 5 % is in at every higher figure.
func inCanary(name string, percent float64) bool {
	sum := sha256.Sum256([]byte(name))
	share := float64(binary.BigEndian.Uint64(sum[:8])>>11) / (1 << 53)
	return share*100 < percent
}

// offMarker tells the shim and the agent that Tallyman is off on this runner.
func (o *Options) offMarker() string { return filepath.Join(o.RunDir, "off") }

func (o *Options) writeOffMarker(reason string) error {
	if _, err := os.Lstat(o.RunDir); errors.Is(err, fs.ErrNotExist) {
		// The shim of every user must see the marker, whatever the umask is.
		err := os.MkdirAll(o.RunDir, 0o755)
		if err == nil {
			err = os.Chmod(o.RunDir, 0o755)
		}
		if err != nil {
			return fmt.Errorf("create the run directory: %w", err)
		}
	}
	// O_EXCL: whatever stands there already, a link included, says off as well.
	f, err := os.OpenFile(o.offMarker(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mark the runner as off: %w", err)
	}
	// The marker's being there is the message; its text is for people.
	_, _ = f.WriteString("off: " + reason + "\n")
	return errors.Join(f.Chmod(0o644), f.Close())
}

func (o *Options) removeOffMarker() error {
	if err := os.Remove(o.offMarker()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the off marker: %w", err)
	}
	return nil
}
