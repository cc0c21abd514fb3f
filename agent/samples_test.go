package agent

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/config"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
)

// The agent's own numbers reach DogStatsD at its end at the latest: gauges as they are,
// counters as what was added.
func TestOwnNumbersReachDogStatsD(t *testing.T) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	o := options(t)
	o.Config.Statsd = conn.LocalAddr().String()
	o.Config.Sinks = []string{fmt.Sprintf("file://%s/out.jsonl?name=out", t.TempDir())}
	o.Config.Real = map[string]string{"wrapped": "/usr/bin/wrapped"} // then the tag tool names it
	r := start(t, o)
	for _, tool := range []string{"wrapped", "unheard-of"} {
		call := invocation(time.Now())
		call.Invocation.Tool = tool
		r.agent.metrics.Observe(call)
	}
	r.end()
	var got strings.Builder
	buf := make([]byte, 64<<10)
	for {
		if err := conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			break
		}
		got.Write(append(buf[:n], '\n'))
	}
	for _, want := range []string{"tallyman.journal_segments:1|g", "tallyman.sink_up:1|g|#sink:out", "#tool:wrapped,", "#tool:other,"} {
		if !strings.Contains(got.String(), want) {
			t.Errorf("no %s in\n%s", want, got.String())
		}
	}
	if strings.Contains(got.String(), "start_time") || strings.Contains(got.String(), "tallyman.records:0") {
		t.Errorf("more than was wanted:\n%s", got.String())
	}
}

// A mistyped tag or address costs the metrics, never the account.
func TestMistypedMetricsCostNoRecord(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(*config.Config)
		says string
	}{
		{"tag", func(c *config.Config) { c.StatsdTags = []string{"event_type", "acton"} }, `no tag "acton"`},
		{"address", func(c *config.Config) { c.Statsd = "http://127.0.0.1:8125" }, `scheme "http"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options(t)
			c.set(&o.Config)
			r := start(t, o)
			target := handover.Target{Socket: o.Config.Socket(), Spool: o.Config.Spool(), SpoolMaxBytes: 1 << 20}
			if handover.Deliver(target, record.Append(nil, invocation(time.Now())), os.Getuid(), os.Geteuid()) == handover.Lost {
				t.Error("nobody took the call")
			}
			said := r.agent.Status().Problems
			if len(said) != 1 || !strings.Contains(said[0], c.says) {
				t.Errorf("the status says %q, want %q", said, c.says)
			}
			r.end()
			if n := len(r.records()); n == 0 {
				t.Error("the call was not recorded")
			}
		})
	}
}
