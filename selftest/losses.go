package selftest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/journal/handover"
)

// The shim counts what it loses in a file or, where no file can be, in a set of
// System V semaphores, which outlives it: see package handover.

const (
	semGetAll = 13 // GETALL of linux/sem.h
	ipcRemove = 0  // IPC_RMID of linux/ipc.h
)

// semaphores opens the counters of uid for a spool, where there are some.
func semaphores(spool string, uid int) (id uintptr, ok bool) {
	id, _, errno := unix.Syscall(unix.SYS_SEMGET, uintptr(handover.LossKey(spool, uid)), 0, 0)
	return id, errno == 0
}

// losses is how many records of uid are counted as lost here.
func (p *place) losses(uid int) (n int) {
	if b, err := os.ReadFile(filepath.Join(p.spool, strconv.Itoa(uid)+".lost")); err == nil {
		n += len(b) - bytes.Count(b, []byte("\n"))
	}
	if id, ok := semaphores(p.spool, uid); ok {
		values := make([]uint16, 256) // more than the set has
		if _, _, errno := unix.Syscall6(unix.SYS_SEMCTL, id, 0, semGetAll, uintptr(unsafe.Pointer(&values[0])), 0, 0); errno == 0 {
			for _, v := range values {
				n += int(v)
			}
		}
	}
	return n
}

// expectLost is an error where not exactly n records of uid are counted as lost.
func (p *place) expectLost(n, uid int) error {
	if p.r.off != "" {
		return nil
	}
	if got := p.losses(uid); got != n {
		return fmt.Errorf("%d records are counted as lost, want %d", got, n)
	}
	return nil
}

// release removes the counters of this place from the kernel.
func (p *place) release() error {
	var errs []error
	for _, uid := range []int{os.Getuid(), stranger()} {
		if id, ok := semaphores(p.spool, uid); ok {
			if _, _, errno := unix.Syscall(unix.SYS_SEMCTL, id, 0, ipcRemove); errno != 0 {
				errs = append(errs, fmt.Errorf("remove a counter of the test: %w", errno))
			}
		}
	}
	return errors.Join(errs...)
}
