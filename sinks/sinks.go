// Package sinks delivers the journal to where people look.
//
// A Pump reads the journal from its own cursor, gathers records into batches and
// hands them to one Sink until the sink has taken them; then the cursor moves on.
// Each sink has its own pump, with its own goroutine, reader and cursor, so a slow
// or dead sink delays no other, and what it has not taken stays in the journal.
//
// Delivery is at least once: after a crash, or an acknowledgement that got lost, a
// record comes again under the same id, by which the far side removes duplicates.
// A record that a sink refuses for good goes to the sink's quarantine file with the
// reason, and the others go on.
//
// A sink is named by a URL (`file:///var/log/tallyman/records.jsonl`, `stdout:`).
// The kinds in this package need no library; a kind that does has its own folder,
// which holds its client code and a Scheme, and whoever wires the program names
// that Scheme in the call of Parse or Open.
package sinks

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// Entry is one record on its way to a sink.
type Entry struct {
	ID   string
	Kind record.Kind
	Line []byte // the record's JSON, without a newline
}

// Sink takes batches of records. Its methods are never called concurrently.
type Sink interface {
	// Write hands over a batch. nil says that all of it is durably taken where it
	// belongs, not in a buffer of the sink. A *RefusedError says that the records it
	// names will never be taken, and that all others of the batch are. Any other
	// error is transient: the whole batch comes again, after the time that
	// RetryAfter asks for where the error has such a method.
	//
	// Write returns soon after ctx ends; ctx has a deadline. It must not keep the
	// batch's slices after it returned.
	Write(ctx context.Context, batch []Entry) error
	// Close ends the sink. It returns soon after ctx ends.
	Close(ctx context.Context) error
}

// Refused names a record of a batch that a sink will never take.
type Refused struct {
	Index  int    // in the batch
	Reason string // for people; it is written to the quarantine beside the record
}

// RefusedError is returned by Sink.Write where some records of a batch were refused
// for good and the others were taken.
type RefusedError struct{ Refused []Refused }

func (e *RefusedError) Error() string {
	if len(e.Refused) == 0 {
		return "no record refused"
	}
	return fmt.Sprintf("%d records refused, the first: %s", len(e.Refused), e.Refused[0].Reason)
}

// RetryAfterError is a transient error of a server that said when to come again.
type RetryAfterError struct {
	After time.Duration
	Err   error
}

func (e *RetryAfterError) Error() string { return e.Err.Error() }

// Unwrap returns the server's error.
func (e *RetryAfterError) Unwrap() error { return e.Err }

// RetryAfter is the time that the server asked for.
func (e *RetryAfterError) RetryAfter() time.Duration { return e.After }

// retryAfter is the time that err asks for, or 0.
func retryAfter(err error) time.Duration {
	var r interface{ RetryAfter() time.Duration }
	if errors.As(err, &r) {
		return max(r.RetryAfter(), 0)
	}
	return 0
}
