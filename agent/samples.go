package agent

import (
	"strings"

	"github.com/tallyman-ci/tallyman/sinks"
)

// Sample is one number about the agent.
type Sample struct {
	Name, Help string // the name as Prometheus wants it
	Counter    bool   // it only grows while the process lives; else a gauge
	Labels     []Label
	Value      float64
}

// Label is one label of a sample.
type Label struct{ Name, Value string }

// Samples are a list of samples in the making.
type Samples []Sample

// Gauge adds a number that goes up and down.
func (s *Samples) Gauge(name, help string, v float64, labels ...Label) {
	*s = append(*s, Sample{Name: name, Help: help, Labels: labels, Value: v})
}

// Counter adds a number that only grows.
func (s *Samples) Counter(name, help string, v int64, labels ...Label) {
	*s = append(*s, Sample{Name: name, Help: help, Counter: true, Labels: labels, Value: float64(v)})
}

// Samples are the numbers of a status.
func (st Status) Samples() Samples {
	var s Samples
	s.Gauge("tallyman_start_time_seconds", "When the agent started, in seconds since 1970.", float64(st.Started.UnixNano())/1e9)
	s.Gauge("tallyman_commands_running", "Commands whose end is waited for.", float64(st.Running))
	s.Counter("tallyman_records_total", "Records appended to the journal.", st.Counts.Records)
	s.Counter("tallyman_records_duplicate_total", "Records that came twice and were dropped.", st.Counts.Duplicates)
	s.Counter("tallyman_records_refused_total", "Messages that were no records of an invocation.", st.Counts.Refused)
	s.Counter("tallyman_records_rejected_total", "Records that the journal had no room for and the sender kept.", st.Counts.Rejected)
	const received, way = "tallyman_records_received_total", "Records of shims, by how they came."
	s.Counter(received, way, st.Counts.Socket, Label{"way", "socket"})
	s.Counter(received, way, st.Counts.Spooled, Label{"way", "spool"})
	s.Counter("tallyman_command_ends_total", "Ends of commands that were seen.", st.Counts.Ends)
	s.Gauge("tallyman_records_pending", "Records of the agent's own that wait for room in the journal.", float64(st.Counts.Pending))
	s.Gauge("tallyman_journal_bytes", "Size of the journal.", float64(st.Journal.Bytes))
	s.Gauge("tallyman_journal_max_bytes", "Bound of the journal; beyond it the oldest segment goes.", float64(st.Journal.MaxBytes))
	s.Gauge("tallyman_journal_segments", "Segments of the journal.", float64(st.Journal.Segments))
	if e := st.Events; e != nil {
		s.Gauge("tallyman_events_connected", "1 while the Docker daemon's event stream is open.", boolean(e.Connected))
		s.Counter("tallyman_events_total", "Events of the Docker daemon.", e.Events)
		s.Counter("tallyman_events_replayed_total", "Events read again from the daemon's buffer.", e.Replayed)
		s.Counter("tallyman_events_dropped_total", "Events dropped because the queue was full.", e.Dropped)
		s.Counter("tallyman_events_gaps_total", "Times that events were missed for good.", e.Gaps)
	}
	s.Counter("tallyman_statsd_dropped_payloads_total", "DogStatsD datagrams that were not taken.", st.Metrics.Dropped.Payloads)
	for _, sink := range st.Sinks {
		l := Label{"sink", sink.Name}
		s.Gauge("tallyman_sink_up", "0 while the last attempt to deliver failed.", boolean(!Troubled(sink)), l)
		s.Gauge("tallyman_sink_behind_records", "Records in the journal that the sink has not taken.", float64(sink.BehindRecords), l)
		s.Gauge("tallyman_sink_behind_seconds", "Age of the oldest of these.", sink.BehindSeconds, l)
		s.Counter("tallyman_sink_delivered_total", "Records that the sink took.", sink.Delivered, l)
		s.Counter("tallyman_sink_refused_total", "Records that the sink refused for good.", sink.Refused, l)
		s.Counter("tallyman_sink_dropped_total", "Records that the sink will not get: gone from the journal before, or unkept.", sink.Dropped, l)
		s.Counter("tallyman_sink_unkept_total", "Refused records that the quarantine could not hold.", sink.Unkept, l)
		s.Counter("tallyman_sink_retries_total", "Attempts that failed.", sink.Retries, l)
	}
	return s
}

// Troubled says that a sink's last attempt to deliver failed.
func Troubled(s sinks.Status) bool {
	return s.State == sinks.StateRetrying || s.State == sinks.StateStuck
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// gauges sends the samples to DogStatsD: gauges as they are, counters as what was
// added since the last time. tallyman_sink_up is tallyman.sink_up there, and
// tallyman_records_total is tallyman.records.
func (a *Agent) gauges() {
	if !a.metrics.Enabled() {
		return
	}
	for _, s := range a.Status().Samples() {
		name, ok := strings.CutPrefix(s.Name, "tallyman_")
		if !ok || name == "start_time_seconds" {
			continue
		}
		name = "tallyman." + strings.TrimSuffix(name, "_total")
		var tags []string
		for _, l := range s.Labels {
			tags = append(tags, l.Name+":"+l.Value)
		}
		if !s.Counter {
			a.metrics.Gauge(name, s.Value, tags)
			continue
		}
		key := strings.Join(append(tags, name), ",")
		if added := int64(s.Value) - a.sampled[key]; added > 0 {
			a.metrics.Count(name, added, tags)
		}
		a.sampled[key] = int64(s.Value)
	}
}
