package install

import "github.com/tallyman-ci/tallyman/config"

// Where an installation lies. Packages, images and machines use the same paths.
const (
	// BinDir holds the programs and the hook scripts: root's, 0755. In packages these
	// files belong to the package.
	BinDir = "/opt/tallyman/bin"
	// Program is the tallyman command.
	Program = BinDir + "/tallyman"
	// Shim is the docker-shim as it was built. In the tools' places stand copies of it,
	// not links: who resolves a link, as `readlink -f $(which docker)` does, would call
	// it by a name that is none of a tool.
	Shim = BinDir + "/docker-shim"
	// HookStarted and HookCompleted are the values for ACTIONS_RUNNER_HOOK_JOB_STARTED and
	// ACTIONS_RUNNER_HOOK_JOB_COMPLETED.
	HookStarted   = BinDir + "/job-started.sh"
	HookCompleted = BinDir + "/job-completed.sh"

	// Link makes the command tallyman known to shells. It is made by install, also for
	// packages, which may not ship files below /usr/local.
	Link = "/usr/local/bin/tallyman"

	// ConfigFile is root's, 0644, written only where there is none.
	ConfigFile = config.DefaultPath
	// OffFile is the kill switch; install never makes it.
	OffFile = config.OffPath

	// StateDir holds the journal: the runner's user's, 0755. What is in it stays at an
	// uninstall, unless it is told to purge.
	StateDir = "/var/lib/tallyman"
	// RunDirOnDisk holds socket and spool (RunDirOnDisk/spool, 1733) where /run cannot be
	// relied on: in images, because ARC's dind mode mounts a volume over /var/run.
	RunDirOnDisk = StateDir + "/run"
	// RunDir is the same on a machine that systemd runs; TmpfilesConf makes it at each boot.
	RunDir       = "/run/tallyman"
	TmpfilesConf = "/etc/tmpfiles.d/tallyman.conf"

	// Manifest is what install did, for uninstall and doctor: root's, 0644. It lies in no
	// folder of ours, so that its removal is the last step of an uninstall, and not in
	// StateDir, which jobs can write to.
	Manifest = "/var/lib/tallyman-installed.json"

	// OriginalSuffix is added to a tool's path for the real one.
	OriginalSuffix = ".original"

	// User owns StateDir and the run folder where no other is named.
	User = "runner"
)

// Drop-in folders of images that run all scripts in them (ARC's legacy runners); where
// they are, the hook scripts are put there too, as DropInName.
const (
	DropInStarted   = "/etc/arc/hooks/job-started.d"
	DropInCompleted = "/etc/arc/hooks/job-completed.d"
	DropInName      = "tallyman.sh"
)
