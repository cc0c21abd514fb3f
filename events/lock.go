package events

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// streamLock is the lock on one daemon's events. It is kept over the end of a
// session, so that two streamers do not take turns when the daemon restarts. The
// kernel releases it with the process.
type streamLock struct {
	dir  string
	log  *slog.Logger
	key  string // of the daemon
	file *os.File
	said bool
}

// acquire locks the daemon with this engine id, which is the same by whatever
// address it is reached; where a proxy hides it, the address counts. It returns an
// error that wraps ErrStreamed where another process has the lock.
func (l *streamLock) acquire(engine, host string) error {
	key := engine
	if key == "" {
		key = host
	}
	if l.dir == "" || l.file != nil && l.key == key {
		return nil
	}
	l.release()
	hash := sha256.Sum256([]byte(key))
	name := filepath.Join(l.dir, "events-"+hex.EncodeToString(hash[:8])+".lock")
	// Not readable for others: whoever can open it can hold the lock and stop the stream.
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		l.without(err)
		return nil
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	switch err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &whole); {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		defer f.Close()
		var b [20]byte
		n, _ := f.ReadAt(b[:], 0)
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n]))); err == nil {
			return fmt.Errorf("%w, by process %d (lock %s)", ErrStreamed, pid, name)
		}
		return fmt.Errorf("%w (lock %s)", ErrStreamed, name)
	case err != nil:
		l.without(err)
		f.Close()
		return nil
	}
	// For the message of a second one.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	l.key, l.file = key, f
	return nil
}

// without says once that nothing keeps a second streamer away.
func (l *streamLock) without(err error) {
	if !l.said {
		l.log.Warn("no lock on the daemon's events: a second streamer would count them twice", "error", err)
		l.said = true
	}
}

func (l *streamLock) release() {
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}
