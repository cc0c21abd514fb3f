package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/internal/figures"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// FileSystem is what doctor wants to know of a file system.
type FileSystem struct {
	Type       string // tmpfs, ext4, nfs, ...
	FreeBytes  uint64 // for users other than root
	FreeFiles  uint64
	TotalFiles uint64 // 0 where the file system does not count files
}

// fileSystems are the magic numbers of statfs(2) that matter here.
var fileSystems = map[int64]string{
	unix.TMPFS_MAGIC: "tmpfs", unix.RAMFS_MAGIC: "ramfs", unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.NFS_SUPER_MAGIC: "nfs",
	unix.SMB_SUPER_MAGIC: "smb", unix.CIFS_SUPER_MAGIC: "cifs", unix.SMB2_SUPER_MAGIC: "smb2", unix.FUSE_SUPER_MAGIC: "fuse",
	unix.V9FS_MAGIC: "9p", unix.CEPH_SUPER_MAGIC: "ceph",
}

// remote are file systems on which appending is not atomic among writers (NFS,
// open(2)) or can hang with the network.
var remote = map[string]bool{"nfs": true, "smb": true, "cifs": true, "smb2": true, "fuse": true, "9p": true, "ceph": true}

func statFS(path string) (FileSystem, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return FileSystem{}, err
	}
	name := fileSystems[int64(st.Type)]
	if name == "" {
		name = fmt.Sprintf("file system %#x", st.Type)
	}
	return FileSystem{Type: name, FreeBytes: st.Bavail * uint64(st.Bsize), FreeFiles: st.Ffree, TotalFiles: st.Files}, nil
}

// folder checks what run_dir and state_dir have in common. It returns false where
// there is nothing more to look at.
func (x *examination) folder(name, path, does string) bool {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		parent := filepath.Dir(path)
		for parent != "/" && !fileExists(parent) {
			parent = filepath.Dir(parent)
		}
		if unix.Faccessat(unix.AT_FDCWD, parent, unix.W_OK|unix.X_OK, unix.AT_EACCESS) == nil {
			x.add(Warn, name, path+" is not there yet; the agent makes it when it starts", "nothing, if no job has run yet")
		} else {
			x.add(Fail, name, fmt.Sprintf("%s is not there, and uid %d may not make it: %s", path, x.uid, does),
				fmt.Sprintf("make it in the image: install -d -m 0755 -o %d %s", x.uid, path))
		}
		return false
	case err != nil:
		x.add(Fail, name, fmt.Sprintf("%s: %v", path, err), "make the folder and those above it searchable for the runner's user")
		return false
	case st.Mode()&os.ModeSymlink != 0:
		x.add(Fail, name, path+" is a symbolic link, which the shim does not follow: "+does, "name the folder itself in the configuration")
		return false
	case !st.IsDir():
		x.add(Fail, name, path+" is no folder: "+does, "remove the file")
		return false
	case st.Mode().Perm()&0o002 != 0 && st.Mode()&os.ModeSticky == 0 && isMount(path):
		// The kubelet makes them 0777, and what runs in a pod is mostly one user.
		x.add(Warn, name+" mode", fmt.Sprintf("%s is a volume that everybody may write to (mode %v), as an emptyDir is: other users of this pod could put files of their own there", path, st.Mode().Perm()),
			"nothing, where the runner's user is the only one in the pod; else let an init container make the folder: tallyman carry --state DIR")
	case st.Mode().Perm()&0o002 != 0 && st.Mode()&os.ModeSticky == 0:
		x.add(Fail, name, fmt.Sprintf("%s may be written to by everybody (mode %v): a job could put its own files there", path, st.Mode().Perm()), "chmod 0755 "+path)
		return false
	case unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK|unix.X_OK, unix.AT_EACCESS) != nil:
		owner := uint32(0)
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			owner = sys.Uid
		}
		x.add(Fail, name, fmt.Sprintf("uid %d may not write to %s (mode %v, owner uid %d): an agent of this user cannot work", x.uid, path, st.Mode().Perm(), owner),
			fmt.Sprintf("chown %d %s, or run tallyman doctor as the user the agent runs as", x.uid, path))
		return false
	}
	return true
}

// isMount: a volume is mounted here.
func isMount(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 // Linux 5.8
}

func (x *examination) runDir() {
	const name = "run_dir"
	if socket := x.cfg.Socket(); len(socket) > maxSocket {
		x.add(Fail, name, fmt.Sprintf("the agent's socket %s has %d characters, and the kernel takes %d: no agent can start", socket, len(socket), maxSocket), "choose a shorter run_dir")
		return
	}
	if !x.folder(name, x.cfg.RunDir, "there is no place for the agent's socket and the shim's spool") {
		return
	}
	f, err := x.in.StatFS(x.cfg.RunDir)
	st, statErr := os.Stat(x.cfg.RunDir)
	switch {
	case statErr == nil && st.Mode().Perm()&0o011 != 0o011:
		x.add(Fail, name, fmt.Sprintf("%s has mode %v: other users than its owner and root reach neither the agent nor the spool, and their calls are lost", x.cfg.RunDir, st.Mode().Perm()),
			"chmod 0755 "+x.cfg.RunDir)
	case err != nil:
		x.add(Fail, name, fmt.Sprintf("%s: %v", x.cfg.RunDir, err), "choose another run_dir")
	case remote[f.Type]:
		x.add(Fail, name, x.cfg.RunDir+" is on "+f.Type+", where records of several writers can mix and a call can hang", "choose a run_dir on tmpfs")
	case f.Type != "tmpfs" && f.Type != "ramfs":
		x.runDirOnDisk(f)
	case f.FreeBytes < 1<<20:
		x.add(Fail, name, fmt.Sprintf("%s has only %s left: the shim's spool loses records", x.cfg.RunDir, figures.Bytes(f.FreeBytes)), "free space there, or make the tmpfs larger")
	default:
		x.ok(name, "%s is on %s, %s free", x.cfg.RunDir, f.Type, figures.Bytes(f.FreeBytes))
	}
}

// runDirOnDisk judges a run_dir that is on no tmpfs, as in each image. Only a call without
// an agent writes to it, so it matters where no hook starts one.
func (x *examination) runDirOnDisk(f FileSystem) {
	const name = "run_dir"
	env, _ := x.runnerEnvironment()
	switch {
	case !x.cfg.SpoolOnDisk:
		x.add(Warn, name, x.cfg.RunDir+" is on "+f.Type+": without an agent, records are lost, because the shim does not wait for a disk", "choose a run_dir on tmpfs, or set spool_on_disk = true")
	case f.FreeBytes < 1<<20:
		x.add(Fail, name, fmt.Sprintf("%s has only %s left: the shim's spool loses records", x.cfg.RunDir, figures.Bytes(f.FreeBytes)), "free space there")
	case env[startedVariable] == "":
		x.add(Warn, name, x.cfg.RunDir+" is on "+f.Type+", and no hook starts an agent: each docker call writes there, and waits if that disk freezes or stalls",
			"set the hooks, or choose a run_dir on tmpfs")
	default:
		x.ok(name, "%s is on %s, %s free: as spool_on_disk allows, calls write there while no agent runs, before and after jobs", x.cfg.RunDir, f.Type, figures.Bytes(f.FreeBytes))
	}
}

// maxSocket is the length of a socket's path (unix(7), sun_path without its end).
const maxSocket = 107

// spool checks the folder of the shim's append files: everybody may add a file,
// nobody may list or remove those of others (mode 1733).
// spoolWorks tells whether calls leave a record while no agent runs.
func (x *examination) spoolWorks() bool {
	f, err := x.in.StatFS(x.cfg.RunDir)
	st, statErr := os.Lstat(x.cfg.Spool())
	return err == nil && statErr == nil && st.IsDir() && (x.cfg.SpoolOnDisk || f.Type == "tmpfs" || f.Type == "ramfs")
}

func (x *examination) spool() {
	const name = "spool"
	dir := x.cfg.Spool()
	st, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.add(Warn, name, dir+" is not there: without an agent, records are lost", "the agent makes it when it starts; in an image: install -d -m 1733 "+dir)
		return
	case err != nil:
		x.add(Fail, name, err.Error(), "make the folders above it searchable for all")
		return
	case !st.IsDir():
		x.add(Fail, name, dir+" is no folder: without an agent, records are lost", "remove it; the agent makes it anew")
		return
	case st.Mode()&os.ModeSticky == 0 || st.Mode().Perm()&0o033 != 0o033:
		x.add(Fail, name, fmt.Sprintf("%s has mode %v: other users' calls (sudo docker) are lost, or could be removed by a job", dir, st.Mode()), "chmod 1733 "+dir)
		return
	case st.Mode().Perm()&0o044 != 0:
		x.add(Warn, name, fmt.Sprintf("%s may be listed by everybody (mode %v)", dir, st.Mode()), "chmod 1733 "+dir)
		return
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*.jsonl")) // nothing where we may not list it
	var waiting, most int64
	for _, f := range files {
		if st, err := os.Lstat(f); err == nil {
			waiting += st.Size()
			most = max(most, st.Size())
		}
	}
	switch {
	case x.cfg.SpoolMaxBytes > 0 && most >= x.cfg.SpoolMaxBytes:
		x.add(Fail, name, fmt.Sprintf("a file in %s has reached spool_max_bytes (%s): records are lost", dir, figures.Bytes(x.cfg.SpoolMaxBytes)), "start the agent, which empties the spool")
	default:
		x.ok(name, "%s, %s in %s", dir, figures.Bytes(waiting), figures.Plural(len(files), "file"))
	}
}

// lowSpace is what a state folder needs to be of any use.
const lowSpace = 16 << 20

func (x *examination) stateDir() {
	const name = "state_dir"
	dir := x.cfg.StateDir
	if !x.folder(name, dir, "there is no place for the journal") {
		return
	}
	if err := tryWrite(dir); err != nil {
		finding, do := fmt.Sprintf("%s cannot be written to: %v", dir, err), "look at the folder's owner and mode"
		switch {
		case errors.Is(err, unix.ENOSPC):
			finding, do = "the disk of "+dir+" is full: nothing can be journaled, records are lost", "free space there, or set a state_dir on another disk"
		case errors.Is(err, unix.EDQUOT):
			finding, do = "the quota on "+dir+" is used up: nothing can be journaled, records are lost", "raise the quota, or set a state_dir elsewhere"
		case errors.Is(err, unix.EROFS):
			finding, do = dir+" is on a file system that is mounted read-only: nothing can be journaled", "mount it writable, or set state_dir to a folder that is"
		}
		x.add(Fail, name, finding, do)
		return
	}
	f, err := x.in.StatFS(dir)
	switch {
	case err != nil:
		x.add(Fail, name, fmt.Sprintf("%s: %v", dir, err), "choose another state_dir")
	case f.FreeBytes < lowSpace:
		x.add(Fail, name, fmt.Sprintf("the disk of %s has only %s left", dir, figures.Bytes(f.FreeBytes)), "free space there, or set a state_dir on another disk")
	case f.TotalFiles > 0 && f.FreeFiles < 100:
		x.add(Fail, name, fmt.Sprintf("the file system of %s has only %d inodes left: no new segment can be made", dir, f.FreeFiles), "remove files there")
	case remote[f.Type]:
		x.add(Warn, name, dir+" is on "+f.Type+": the journal is as slow and as sure as the network", "choose a state_dir on a local disk")
	case x.cfg.JournalMaxBytes > 0 && f.FreeBytes < uint64(x.cfg.JournalMaxBytes) && !x.journalIsFull(f):
		x.add(Warn, name, fmt.Sprintf("%s has %s free, less than journal_max_bytes (%s)", dir, figures.Bytes(f.FreeBytes), figures.Bytes(x.cfg.JournalMaxBytes)), "lower journal_max_bytes, or free space")
	default:
		x.ok(name, "%s is on %s, %s free", dir, f.Type, figures.Bytes(f.FreeBytes))
	}
}

// journalIsFull says whether the journal already holds what is missing on the disk.
func (x *examination) journalIsFull(f FileSystem) bool {
	var used uint64
	names, _ := filepath.Glob(filepath.Join(x.cfg.Journal(), "records-*.jsonl"))
	for _, n := range names {
		if st, err := os.Lstat(n); err == nil {
			used += uint64(st.Size())
		}
	}
	return used+f.FreeBytes >= uint64(x.cfg.JournalMaxBytes)
}

// tryWrite writes a small file and removes it. A full disk shows only here: ext4
// keeps blocks for root, and quotas are no part of statfs(2).
func tryWrite(dir string) (err error) {
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close(), os.Remove(f.Name()))
	}()
	if _, err := f.Write(make([]byte, 64<<10)); err != nil {
		return err
	}
	return f.Sync()
}

// journal checks that there are records, and how old the last one is.
func (x *examination) journal() {
	const name = "journal"
	dir := x.cfg.Journal()
	names, err := filepath.Glob(filepath.Join(dir, "records-*.jsonl"))
	if err == nil {
		_, err = os.ReadDir(dir)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.add(Warn, name, "there is no journal at "+dir+": no agent has run here", "start a job, or `tallyman agent`")
		return
	case errors.Is(err, fs.ErrPermission):
		x.add(Fail, name, fmt.Sprintf("uid %d may not read %s", x.uid, dir), "run tallyman doctor and tallyman report as the agent's user, or as root")
		return
	case err != nil:
		x.add(Fail, name, fmt.Sprintf("%s: %v", dir, err), "remove what stands in the journal's place")
		return
	case len(names) == 0:
		x.add(Warn, name, dir+" is empty: no record was written yet", "call docker once through the shim, then look again")
		return
	}
	for i := len(names) - 1; i >= 0; i-- {
		last, err := lastRecord(names[i])
		if err != nil {
			x.add(Fail, name, fmt.Sprintf("the newest segment cannot be read: %v", err), "run as the agent's user, or as root")
			return
		}
		if last == nil {
			continue // only a header so far
		}
		age := x.in.Now().Sub(last.TS)
		when := "in the future by " + length(-age)
		if age >= 0 {
			when = length(age) + " ago"
		}
		x.ok(name, "%s in %s; the last record (%s) is of %s, %s", figures.Plural(len(names), "segment"), dir, last.Kind, last.TS.UTC().Format("2006-01-02 15:04:05 UTC"), when)
		if age < -5*skewLimit {
			x.add(Warn, "journal time", "the last record lies in the future", "set the clocks of this machine and of the Docker daemon (chrony, systemd-timesyncd)")
		}
		return
	}
	x.add(Warn, name, "the segments in "+dir+" hold no record", "call docker once through the shim, then look again")
}

// lastRecord reads the last whole record of a segment, or nil where there is none
// in its last 256 KiB.
func lastRecord(path string) (*record.Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	tail := make([]byte, min(st.Size(), 256<<10))
	if _, err := f.ReadAt(tail, st.Size()-int64(len(tail))); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	lines := strings.Split(string(tail), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		var r record.Record
		if recordjson.Unmarshal([]byte(lines[i]), &r) == nil && r.Kind != "segment" && !r.TS.IsZero() {
			return &r, nil
		}
	}
	return nil, nil
}
