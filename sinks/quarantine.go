package sinks

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/journal"
)

// errQuarantineFull is the reason for a loss, not seen outside.
var errQuarantineFull = errors.New("the quarantine is full")

// maxReason bounds what a server's words take in the quarantine.
const maxReason = 1024

// Quarantined is a line of a quarantine file.
type Quarantined struct {
	At     time.Time       `json:"quarantined"`
	Sink   string          `json:"sink"`
	Reason string          `json:"reason"`
	Record json.RawMessage `json:"record"`
}

// quarantine is the file of the records that a sink refused. The first refusals
// tell the most, so when it is full it takes no more.
//
// The file is open only from the first add of a batch to the sync behind it, under a
// lock on a file beside it: ReplayQuarantine takes the whole file away in between.
type quarantine struct {
	path     string
	sink     string
	maxBytes int64
	f        *journal.LineFile
	lock     *os.File
}

// add keeps a record, durably after sync.
func (q *quarantine) add(e Entry, reason string, now time.Time) error {
	if len(reason) > maxReason {
		reason = reason[:maxReason]
	}
	line, err := json.Marshal(Quarantined{now.UTC(), q.sink, reason, e.Line})
	if err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	return q.addLine(line)
}

func (q *quarantine) addLine(line []byte) error {
	if err := q.open(); err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	if q.f.Size()+int64(len(line))+1 > q.maxBytes {
		return errQuarantineFull
	}
	if _, err := q.f.Append(append(line, '\n')); err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	return nil
}

func (q *quarantine) open() (err error) {
	if q.f != nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(q.path), 0o750); err != nil {
		return err
	}
	if q.lock, err = lockFile(q.path+".lock", unix.F_OFD_SETLKW); err != nil {
		return err
	}
	if q.f, err = journal.OpenLineFile(q.path, 0o640); err != nil {
		_ = q.lock.Close() // nothing was written
		q.lock = nil
	}
	return err
}

// sync makes what was added durable, and lets others have the file.
func (q *quarantine) sync() error {
	if q.f == nil {
		return nil
	}
	err := errors.Join(q.f.Sync(), q.f.Close(), q.lock.Close())
	q.f, q.lock = nil, nil
	return err
}

// lockFile opens path and takes an open file description lock on it (fcntl(2)), which
// ends with the returned file. The file stays: a lock on a removed one keeps nobody
// away.
func lockFile(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	for {
		err = unix.FcntlFlock(f.Fd(), how, &whole)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
