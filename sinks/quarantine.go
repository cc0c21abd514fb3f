package sinks

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

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
type quarantine struct {
	path     string
	sink     string
	maxBytes int64
	f        *journal.LineFile
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
	if q.f == nil {
		if err := os.MkdirAll(filepath.Dir(q.path), 0o750); err != nil {
			return fmt.Errorf("quarantine: %w", err)
		}
		if q.f, err = journal.OpenLineFile(q.path, 0o640); err != nil {
			return fmt.Errorf("quarantine: %w", err)
		}
	}
	if q.f.Size()+int64(len(line))+1 > q.maxBytes {
		return errQuarantineFull
	}
	if _, err = q.f.Append(append(line, '\n')); err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	return nil
}

func (q *quarantine) sync() error {
	if q.f == nil {
		return nil
	}
	return q.f.Sync()
}

func (q *quarantine) close() error {
	if q.f == nil {
		return nil
	}
	return q.f.Close()
}
