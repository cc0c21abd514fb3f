package events

import (
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// joint finds out whether what a stream brings joins up with what was read before.
//
// The replay asked for includes the last event read. The daemon's buffer is in
// order, so if that event comes, everything after it comes too. If others come and
// it does not, or nothing comes at all, events are missing: the buffer is too short
// or was lost with the daemon. The protocol says neither where the replay ends nor
// that the daemon restarted.
type joint struct {
	from   cursor // the last event read before
	again  bool   // this is not the first stream of all
	since  int64  // where the replay was asked to begin
	opened int64  // the daemon's time when the stream was opened
	daemon identity

	lines   int   // events seen until settled
	old     int   // of these, from before the stream was opened
	oldest  int64 // time of the first
	unknown int64 // time of the first that was not read before; 0: none yet
	joined  bool  // the last event read came again
	settled bool
}

func newJoint(from cursor, since int64, id identity, again bool) joint {
	return joint{from: from, again: again || from.Key != 0, since: since, opened: id.Now.UnixNano(), daemon: id}
}

// see takes the next event of the stream.
func (j *joint) see(m *message, known bool) {
	if j.settled {
		return
	}
	if j.lines++; j.lines == 1 {
		j.oldest = m.nano
	}
	if m.nano <= j.opened {
		j.old++
	}
	if !known && j.unknown == 0 {
		j.unknown = m.nano
	}
	if j.from.Key != 0 && m.key == j.from.Key {
		j.joined, j.settled = true, true
	}
}

// restarted reports whether another daemon, or another life of it, is there now.
func (j *joint) restarted() bool {
	differ := func(a, b string) bool { return a != "" && b != "" && a != b }
	return differ(j.from.Engine, j.daemon.Engine) || differ(j.from.Life, j.daemon.Life)
}

// certain reports whether waiting longer would change nothing in the decision.
func (j *joint) certain() bool {
	return !j.settled && (j.from.Key == 0 || j.unknown != 0 || j.restarted())
}

// settle decides, once. It returns nil when nothing is missing, and the cursor
// behind the gap if no event came after it that moves the cursor.
func (j *joint) settle() (*record.Loss, cursor) {
	if j.settled {
		return nil, cursor{}
	}
	j.settled = true
	var at cursor
	if j.unknown == 0 {
		at = j.end()
	}
	loss := &record.Loss{Count: -1, Source: source, From: time.Unix(0, j.from.TimeNano).UTC()}
	to := j.opened
	if j.unknown != 0 {
		to = j.unknown
	}
	switch {
	case j.restarted():
		loss.Cause, loss.Detail = "daemon_restarted", "the Docker daemon restarted: its events from before are gone"
	case j.from.Key == 0 && (j.old < bufferedEvents || j.oldest <= j.since):
		return nil, at
	case j.lines >= bufferedEvents:
		loss.Cause, loss.Detail = "stream_gap", "more events were missed than the 256 that the Docker daemon keeps"
	case j.from.Life == "" || j.daemon.Life == "":
		loss.Cause, loss.Detail = "daemon_restarted", "the Docker daemon no longer has the last event that was read: it must have restarted"
	default:
		loss.Cause, loss.Detail = "stream_gap", "the Docker daemon no longer has the last event that was read, though its socket is the same: its clock was set back, or it restarted under socket activation"
	}
	loss.To = time.Unix(0, max(to, j.from.TimeNano)).UTC()
	return loss, at
}

// end is the cursor of a settled stream that brought no new event.
func (j *joint) end() cursor {
	at := cursor{TimeNano: max(j.opened, 1), Engine: j.daemon.Engine, Life: j.daemon.Life}
	if !j.again {
		at.TimeNano = j.since
	}
	return at
}
