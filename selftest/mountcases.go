package selftest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// mountCases need file systems of their own. They run with --thorough as root, in a
// mount namespace that ends with this process, so that no mount can stay behind.
var mountCases = []fault{
	{"SH-03", "the spool is on a read-only file system", sameAndLost, readOnly},
	{"SH-04", "the spool is on a full tmpfs", "the command runs; nothing is written twice or in part after a short write", fullTmpfs},
	{"SH-59", "a read-only file system everywhere but for the socket of an agent", "the record goes to the socket", readOnlyWithSocket},
}

// mount mounts a tmpfs over the run folder of a new place.
func (r *rig) mount(ctx context.Context, options string) (*place, func() error, error) {
	if !r.o.Thorough {
		return nil, nil, cannot("it mounts a file system: run it as root with --thorough")
	}
	p, err := r.newPlace("")
	if err != nil {
		return nil, nil, err
	}
	if err := unix.Mount("tmpfs", p.run, "tmpfs", 0, options); err != nil {
		return nil, nil, cannot("mount a tmpfs: %v", err)
	}
	return p, func() error { return unix.Unmount(p.run, unix.MNT_DETACH) }, errors.Join(os.Mkdir(p.spool, 0o733), os.Chmod(p.spool, 0o733|os.ModeSticky))
}

func readOnly(ctx context.Context, r *rig) (string, error) {
	p, done, err := r.mount(ctx, "size=1m,mode=755")
	if err != nil {
		return "", err
	}
	defer done()
	if err := unix.Mount("", p.run, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return "", cannot("mount read-only: %v", err)
	}
	o, err := p.unharmed(ctx, nil)
	return told(o, "counted"), errors.Join(err, nothingIn(p.spool), p.expectLost(1, os.Getuid()))
}

func fullTmpfs(ctx context.Context, r *rig) (string, error) {
	p, done, err := r.mount(ctx, "size=64k,mode=755")
	if err != nil {
		return "", err
	}
	defer done()
	if _, err := p.unharmed(ctx, nil); err != nil { // makes the append file
		return "", err
	}
	ballast, err := os.Create(filepath.Join(p.run, "ballast"))
	if err != nil {
		return "", err
	}
	defer ballast.Close()
	for chunk := make([]byte, 4096); err == nil; {
		_, err = ballast.Write(chunk)
	}
	if !errors.Is(err, unix.ENOSPC) {
		return "", fmt.Errorf("fill the tmpfs: %w", err)
	}
	var o outcome
	for range 20 {
		if o, err = p.unharmed(ctx, nil); err != nil {
			return "", err
		}
	}
	st, err := os.Stat(p.file)
	if err != nil {
		return "", err
	}
	more := fmt.Sprintf("the append file has %d bytes", st.Size())
	if lost := p.losses(os.Getuid()); r.off == "" {
		if lost == 0 {
			return "", errors.New("no loss was counted")
		}
		more += fmt.Sprintf(", %d lost records are counted", lost)
	}
	return told(o, more), nil
}

func readOnlyWithSocket(ctx context.Context, r *rig) (string, error) {
	p, done, err := r.mount(ctx, "size=1m,mode=755")
	if err != nil {
		return "", err
	}
	defer done()
	l, err := p.listen('1')
	if err != nil {
		return "", err
	}
	defer l.close()
	if err := unix.Mount("", p.run, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return "", cannot("mount read-only: %v", err)
	}
	o, err := p.unharmed(ctx, nil)
	if err != nil || r.off != "" {
		return told(o, ""), err
	}
	_, err = l.record(ctx)
	return told(o, "the record came by the socket"), errors.Join(err, nothingIn(p.spool))
}
