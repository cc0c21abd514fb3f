package health

import (
	"fmt"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/agent/adopt"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// Sample is one number.
type Sample struct {
	Name, Help string
	Counter    bool // it only grows while the process lives; else a gauge
	Labels     []Label
	Value      float64
}

// Label is one label of a sample.
type Label struct{ Name, Value string }

// OfAgent is the report of an agent on host.
func OfAgent(st agent.Status, host record.Host) Report {
	var r Report
	r.add("tallyman_build_info", "1, with the agent's version.", 1, Label{"version", st.Version})
	r.add("tallyman_start_time_seconds", "When the agent started, in seconds since 1970.", float64(st.Started.UnixNano())/1e9)
	if ci := st.CI; ci != nil {
		// Metrics of Kubernetes know the pod and not the job; this one joins them:
		//   container_cpu_usage_seconds_total * on (pod) group_left (repository) tallyman_job_info
		r.add("tallyman_job_info", "1 while a job runs, with its pod, node and names.", 1,
			Label{"pod", host.Pod}, Label{"namespace", host.Namespace}, Label{"node", host.Node},
			Label{"repository", ci.Repository}, Label{"workflow", ci.Workflow}, Label{"job", ci.Job})
	}
	r.add("tallyman_commands_running", "Commands whose end is waited for.", float64(st.Running))
	r.count("tallyman_records_total", "Records appended to the journal.", st.Counts.Records)
	r.count("tallyman_records_duplicate_total", "Records that came twice and were dropped.", st.Counts.Duplicates)
	r.count("tallyman_records_refused_total", "Messages that were no records of an invocation.", st.Counts.Refused)
	r.count("tallyman_records_rejected_total", "Records that the journal had no room for and the sender kept.", st.Counts.Rejected)
	r.count("tallyman_records_received_total", "Records of shims, by how they came.", st.Counts.Socket, Label{"way", "socket"})
	r.count("tallyman_records_received_total", "Records of shims, by how they came.", st.Counts.Spooled, Label{"way", "spool"})
	r.count("tallyman_command_ends_total", "Ends of commands that were seen.", st.Counts.Ends)
	r.add("tallyman_records_pending", "Records of the agent's own that wait for room in the journal.", float64(st.Counts.Pending))
	r.add("tallyman_journal_bytes", "Size of the journal.", float64(st.Journal.Bytes))
	r.add("tallyman_journal_max_bytes", "Bound of the journal; beyond it the oldest segment goes.", float64(st.Journal.MaxBytes))
	r.add("tallyman_journal_segments", "Segments of the journal.", float64(st.Journal.Segments))
	if e := st.Events; e != nil {
		r.add("tallyman_events_connected", "1 while the Docker daemon's event stream is open.", boolean(e.Connected))
		r.count("tallyman_events_total", "Events of the Docker daemon.", e.Events)
		r.count("tallyman_events_replayed_total", "Events read again from the daemon's buffer.", e.Replayed)
		r.count("tallyman_events_dropped_total", "Events dropped because the queue was full.", e.Dropped)
		r.count("tallyman_events_gaps_total", "Times that events were missed for good.", e.Gaps)
		if !e.Connected {
			r.Degraded = append(r.Degraded, "no event stream of the Docker daemon: "+e.Error)
		}
	}
	r.count("tallyman_statsd_dropped_payloads_total", "DogStatsD datagrams that were not taken.", st.Metrics.Dropped.Payloads)
	for _, s := range st.Sinks {
		r.sink(s)
	}
	r.Degraded = append(r.Degraded, st.Problems...)
	if st.Counts.Pending > 0 {
		r.Failing = append(r.Failing, fmt.Sprintf("the journal has no room: %d records wait (see tallyman doctor)", st.Counts.Pending))
	}
	return r
}

// OfAdopter is the report of an adopter.
func OfAdopter(st adopt.Status, version string) Report {
	var r Report
	r.add("tallyman_build_info", "1, with the agent's version.", 1, Label{"version", version})
	r.add("tallyman_adopt_journals", "Journals of dead runners in delivery.", float64(len(st.Journals)))
	r.count("tallyman_adopted_total", "Journals of dead runners that were delivered and removed.", st.Adopted)
	r.count("tallyman_adopted_delivered_total", "Records of dead runners that sinks took.", st.Delivered)
	r.count("tallyman_adopted_refused_total", "Records of dead runners that sinks refused.", st.Refused)
	r.count("tallyman_adopt_errors_total", "Attempts to adopt that failed; they are tried again.", st.Errors)
	// By sink, not by journal: a node sees thousands of these.
	behind := map[string]float64{}
	var names []string
	for _, j := range st.Journals {
		for _, s := range j.Sinks {
			if _, ok := behind[s.Name]; !ok {
				names = append(names, s.Name)
			}
			behind[s.Name] += float64(s.BehindRecords)
			if s.State == sinks.StateRetrying || s.State == sinks.StateStuck {
				r.Degraded = append(r.Degraded, fmt.Sprintf("journal %s: %s", j.Name, trouble(s)))
			}
		}
	}
	for _, name := range names {
		r.add("tallyman_adopt_behind_records", "Records of dead runners that a sink has not taken yet.", behind[name], Label{"sink", name})
	}
	return r
}

func (r *Report) sink(s sinks.Status) {
	l := Label{"sink", s.Name}
	r.add("tallyman_sink_up", "0 while the last attempt to deliver failed.", boolean(s.State != sinks.StateRetrying && s.State != sinks.StateStuck), l)
	r.add("tallyman_sink_behind_records", "Records in the journal that the sink has not taken.", float64(s.BehindRecords), l)
	r.add("tallyman_sink_behind_seconds", "Age of the oldest of these.", s.BehindSeconds, l)
	r.count("tallyman_sink_delivered_total", "Records that the sink took.", s.Delivered, l)
	r.count("tallyman_sink_refused_total", "Records that the sink refused for good.", s.Refused, l)
	r.count("tallyman_sink_unkept_total", "Refused records that the quarantine could not hold.", s.Unkept, l)
	r.count("tallyman_sink_retries_total", "Attempts that failed.", s.Retries, l)
	if s.State == sinks.StateRetrying || s.State == sinks.StateStuck {
		r.Degraded = append(r.Degraded, trouble(s))
	}
}

func trouble(s sinks.Status) string {
	return fmt.Sprintf("sink %s is %s, %d records behind: %s", s.Name, s.State, s.BehindRecords, s.LastError)
}

func (r *Report) add(name, help string, v float64, labels ...Label) {
	r.Samples = append(r.Samples, Sample{Name: name, Help: help, Labels: labels, Value: v})
}

func (r *Report) count(name, help string, v int64, labels ...Label) {
	r.Samples = append(r.Samples, Sample{Name: name, Help: help, Counter: true, Labels: labels, Value: float64(v)})
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
