package sinks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/record"
)

// ErrReplaying is returned by ReplayQuarantine while another process replays the
// same file.
var ErrReplaying = errors.New("another replay of this quarantine is running")

// ReplayOptions bound a replay. The zero value gives the defaults.
type ReplayOptions struct {
	MaxRecords int           // in a batch; default 500
	MaxBytes   int64         // in a batch; default 1 MiB
	Timeout    time.Duration // of one attempt; default 30 s
	Patience   time.Duration // with a sink that does not take anything; default 1 min
}

// Replayed says how a replay ended.
type Replayed struct {
	Delivered  int64 `json:"delivered"`
	Refused    int64 `json:"refused"`    // once more
	Unreadable int64 `json:"unreadable"` // lines that hold no record; they are kept
	Left       int64 `json:"left"`       // not taken; they are kept for the next replay
}

// Replay hands s the entries that next returns until io.EOF; their lines must stay as
// they are until Replay returns. The sink may have them already: they come under their
// own ids. refused is told of what the sink refuses.
//
// An error of next, or of a sink that took nothing within the patience, ends the
// replay; Replayed then counts in Left the entries in hand.
func Replay(ctx context.Context, next func() (Entry, error), s Sink, o ReplayOptions, refused func(Entry, string) error) (r Replayed, err error) {
	var p PumpOptions
	p.MaxRecords, p.MaxBytes, p.Timeout = o.MaxRecords, o.MaxBytes, o.Timeout
	p.defaults()
	if o.Patience <= 0 {
		o.Patience = time.Minute
	}
	var batch []Entry
	size := int64(0)
	for end := false; !end; {
		e, err := next()
		switch {
		case errors.Is(err, io.EOF):
			end = true
		case err != nil:
			r.Left = int64(len(batch))
			return r, err
		default:
			batch, size = append(batch, e), size+int64(len(e.Line))
		}
		if len(batch) == 0 || !end && len(batch) < p.MaxRecords && size < p.MaxBytes {
			continue
		}
		var no *RefusedError
		if err := persist(ctx, s, batch, p.Timeout, o.Patience); err != nil && !errors.As(err, &no) {
			r.Left = int64(len(batch))
			return r, err
		}
		count := int64(0)
		if no != nil {
			for _, bad := range no.Refused {
				if bad.Index < 0 || bad.Index >= len(batch) {
					continue
				}
				if err := refused(batch[bad.Index], bad.Reason); err != nil {
					r.Left = int64(len(batch)) // all of it comes again
					return r, err
				}
				count++
			}
		}
		r.Delivered += int64(len(batch)) - count
		r.Refused += count
		batch, size = batch[:0], 0
	}
	return r, nil
}

// persist offers a batch until it is taken, or for as long as patience.
func persist(ctx context.Context, s Sink, batch []Entry, timeout, patience time.Duration) error {
	begin := time.Now()
	for wait := 250 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		within, cancel := context.WithTimeout(ctx, timeout)
		err := s.Write(within, batch)
		cancel()
		var refused *RefusedError
		if err == nil || errors.As(err, &refused) {
			return err
		}
		pause := max(wait/2+rand.N(wait/2+1), retryAfter(err))
		if time.Since(begin)+pause > patience {
			return fmt.Errorf("the sink takes nothing: %w", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ReplayQuarantine sends what a quarantine file holds to s again. What s refuses once
// more goes back into the quarantine, with the new reason; what it does not take, and
// what a killed replay left, is sent by the next replay. A file that is missing holds
// nothing. An agent may run beside it.
func ReplayQuarantine(ctx context.Context, path string, s Sink, o ReplayOptions) (Replayed, error) {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(path + ".replay"); errors.Is(err, fs.ErrNotExist) {
			return Replayed{}, nil
		}
	}
	only, err := lockFile(path+".replay.lock", unix.F_OFD_SETLK)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return Replayed{}, ErrReplaying
	}
	if err != nil {
		return Replayed{}, fmt.Errorf("replay: %w", err)
	}
	defer only.Close()

	var sum Replayed
	for _, take := range []func(string) error{func(string) error { return nil }, takeQuarantine} {
		// First what an earlier replay left, then the quarantine of now.
		if err := take(path); err != nil {
			return sum, fmt.Errorf("replay: %w", err)
		}
		r, err := replayTaken(ctx, path, s, o)
		sum.Delivered += r.Delivered
		sum.Refused += r.Refused
		sum.Unreadable += r.Unreadable
		sum.Left += r.Left
		if err != nil {
			return sum, fmt.Errorf("replay %s: %w", path, err)
		}
	}
	return sum, nil
}

// takeQuarantine moves the file away from agents that add to it.
func takeQuarantine(path string) error {
	lock, err := lockFile(path+".lock", unix.F_OFD_SETLKW)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.Rename(path, path+".replay"); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// replayTaken replays path.replay, which is removed when all of it is in its place.
func replayTaken(ctx context.Context, path string, s Sink, o ReplayOptions) (r Replayed, err error) {
	taken := path + ".replay"
	b, err := os.ReadFile(taken)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	var lines [][]byte
	var entries []Entry
	// No bound: what goes back in came out of it.
	back := quarantine{path: path, maxBytes: 1 << 50}
	unreadable := int64(0)
	for line := range bytes.Lines(b) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		q, e, ok := parseQuarantined(line)
		if !ok {
			// A person may make something of it.
			unreadable++
			if err := back.addLine(bytes.Clone(line)); err != nil {
				return r, err
			}
			continue
		}
		if back.sink == "" {
			back.sink = q.Sink
		}
		lines = append(lines, line)
		entries = append(entries, e)
	}
	at := 0
	r, err = Replay(ctx, func() (Entry, error) {
		if at == len(entries) {
			return Entry{}, io.EOF
		}
		at++
		return entries[at-1], nil
	}, s, o, func(e Entry, reason string) error { return back.add(e, reason, time.Now()) })
	r.Unreadable = unreadable
	if err := errors.Join(err, back.sync()); err != nil {
		rest := lines[r.Delivered+r.Refused:]
		r.Left = int64(len(rest))
		if len(rest) < len(lines) || unreadable > 0 {
			err = errors.Join(err, rewrite(taken, rest))
		}
		return r, err
	}
	return r, os.Remove(taken)
}

// parseQuarantined reads one line of a quarantine file.
func parseQuarantined(line []byte) (q Quarantined, e Entry, ok bool) {
	var known struct {
		ID   string
		Kind record.Kind
	}
	if json.Unmarshal(line, &q) != nil || json.Unmarshal(q.Record, &known) != nil || known.ID == "" {
		return q, e, false
	}
	return q, Entry{ID: known.ID, Kind: known.Kind, Line: q.Record}, true
}

// Held calls each for every record that ReplayQuarantine would send from path now, with
// the reason why it was refused. unreadable counts the lines that hold no record. Nothing
// is changed.
func Held(path string, each func(e Entry, reason string) error) (unreadable int64, err error) {
	for _, name := range []string{path + ".replay", path} {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return unreadable, fmt.Errorf("read a quarantine: %w", err)
		}
		for line := range bytes.Lines(b) {
			q, e, ok := parseQuarantined(line)
			switch {
			case ok:
				if err := each(e, q.Reason); err != nil {
					return unreadable, err
				}
			case len(bytes.TrimSpace(line)) > 0:
				unreadable++
			}
		}
	}
	return unreadable, nil
}

// rewrite replaces a file's lines in one step.
func rewrite(path string, lines [][]byte) error {
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	_, err = f.Write(append(bytes.Join(lines, []byte("\n")), '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
