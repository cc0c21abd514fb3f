package health

import (
	"fmt"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/agent/adopt"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// OfAgent is the report of an agent on host.
func OfAgent(st agent.Status, host record.Host) Report {
	var r Report
	s := st.Samples()
	version(&s, st.Version)
	if ci := st.CI; ci != nil {
		// Metrics of Kubernetes know the pod and not the job; this one joins them:
		//   container_cpu_usage_seconds_total * on (pod) group_left (repository) tallyman_job_info
		s.Gauge("tallyman_job_info", "1 while a job runs, with its pod, node and names.", 1,
			agent.Label{Name: "pod", Value: host.Pod}, agent.Label{Name: "namespace", Value: host.Namespace}, agent.Label{Name: "node", Value: host.Node},
			agent.Label{Name: "repository", Value: ci.Repository}, agent.Label{Name: "workflow", Value: ci.Workflow}, agent.Label{Name: "job", Value: ci.Job})
	}
	r.Samples = s
	if e := st.Events; e != nil && !e.Connected {
		r.Degraded = append(r.Degraded, "no event stream of the Docker daemon: "+e.Error)
	}
	for _, sink := range st.Sinks {
		if agent.Troubled(sink) {
			r.Degraded = append(r.Degraded, trouble(sink))
		}
	}
	r.Degraded = append(r.Degraded, st.Problems...)
	if st.Counts.Pending > 0 {
		r.Failing = append(r.Failing, fmt.Sprintf("the journal takes nothing, its disk is full or its folder gone: %d records wait (see tallyman doctor)", st.Counts.Pending))
	}
	return r
}

func version(s *agent.Samples, v string) {
	s.Gauge("tallyman_build_info", "1, with the agent's version.", 1, agent.Label{Name: "version", Value: v})
}

// OfAdopter is the report of an adopter.
func OfAdopter(st adopt.Status, v string) Report {
	var r Report
	var s agent.Samples
	version(&s, v)
	s.Gauge("tallyman_adopt_journals", "Journals of dead runners in delivery.", float64(len(st.Journals)))
	s.Gauge("tallyman_adopt_waiting", "Journals of dead runners that wait for their turn.", float64(st.Waiting))
	s.Counter("tallyman_adopted_total", "Journals of dead runners that were delivered and removed.", st.Adopted)
	s.Counter("tallyman_adopted_delivered_total", "Records of dead runners that sinks took.", st.Delivered)
	s.Counter("tallyman_adopted_refused_total", "Records of dead runners that sinks refused.", st.Refused)
	s.Counter("tallyman_adopted_unkept_total", "Of those refused, the records that the quarantine had no room for.", st.Unkept)
	s.Counter("tallyman_adopt_errors_total", "Attempts to adopt that failed; they are tried again.", st.Errors)
	// By sink, not by journal: a node sees thousands of these.
	behind := map[string]float64{}
	var names []string
	for _, j := range st.Journals {
		for _, sink := range j.Sinks {
			if _, ok := behind[sink.Name]; !ok {
				names = append(names, sink.Name)
			}
			behind[sink.Name] += float64(sink.BehindRecords)
			if agent.Troubled(sink) {
				r.Degraded = append(r.Degraded, fmt.Sprintf("journal %s: %s", j.Name, trouble(sink)))
			}
		}
	}
	for _, name := range names {
		s.Gauge("tallyman_adopt_behind_records", "Records of dead runners that a sink has not taken yet.", behind[name], agent.Label{Name: "sink", Value: name})
	}
	r.Samples = s
	return r
}

func trouble(s sinks.Status) string {
	return fmt.Sprintf("sink %s is %s, %d records behind: %s", s.Name, s.State, s.BehindRecords, s.LastError)
}
