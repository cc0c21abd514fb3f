package journal

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// Locked says whether a process has the journal in dir open for writing. It changes
// nothing there. A journal that was never opened is not locked.
func Locked(dir string) (bool, error) {
	d, err := openFolder(dir)
	if err != nil {
		return false, err
	}
	defer d.f.Close()
	f, err := d.open(lockName, unix.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &whole); err != nil {
		return false, fmt.Errorf("ask for the lock of %s: %w", f.Name(), err)
	}
	return whole.Type != unix.F_UNLCK, nil
}
