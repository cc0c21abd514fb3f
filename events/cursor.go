package events

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/tallyman-ci/tallyman/internal/statefile"
)

// bufferedEvents is the number of events that dockerd keeps for a replay (eventsLimit in
// moby, daemon/events/events.go, unchanged since 2016). An API before 1.46 hides
// some of them, never adds any.
const bufferedEvents = 256

// cursor is the place in the daemon's events up to which they were handed on.
type cursor struct {
	// TimeNano is the daemon's time of the last event; 0 where there is none yet.
	TimeNano int64 `json:"time_nano"`
	// Key is the hash of that event; 0 where TimeNano is no event's but a time
	// after which nothing is known to be missing.
	Key uint64 `json:"key,omitempty"`
	// Engine and Life are those of the daemon that sent it.
	Engine string `json:"engine,omitempty"`
	Life   string `json:"life,omitempty"`
	// Recent are the hashes of the events before it, which a replay returns again.
	Recent []uint64 `json:"recent,omitempty"`
}

// loadCursor reads a cursor file. A file that is not there is no error and gives
// the zero cursor.
func loadCursor(name string) (cursor, error) {
	var c cursor
	data, err := statefile.Read(name, 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read event cursor: %w", err)
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return cursor{}, fmt.Errorf("read event cursor %s: %w", name, err)
	}
	if c.TimeNano <= 0 {
		return cursor{}, fmt.Errorf("read event cursor %s: no time in it", name)
	}
	return c, nil
}

// saveCursor replaces a cursor file. It does not sync: what a power cut takes is
// replayed with the same ids, and after a power cut the daemon's buffer is empty.
func saveCursor(name string, c cursor) error {
	data, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode event cursor: %w", err)
	}
	err = statefile.Replace(name, name+".tmp", data) // one writer: the streamer that holds the agent's lock
	if err != nil {
		return fmt.Errorf("save event cursor: %w", err)
	}
	return nil
}

// recent remembers the keys of the last events, as many as a replay can return.
type recent struct {
	keys [2 * bufferedEvents]uint64
	next int
}

func (r *recent) add(key uint64) {
	r.keys[r.next] = key
	r.next = (r.next + 1) % len(r.keys)
}

// newest returns up to n keys, the oldest first.
func (r *recent) newest(n int) []uint64 {
	var keys []uint64
	for i := len(r.keys) - n; i < len(r.keys); i++ {
		if k := r.keys[(r.next+i)%len(r.keys)]; k != 0 {
			keys = append(keys, k)
		}
	}
	return keys
}
