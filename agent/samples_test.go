package agent

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
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
	r := start(t, o)
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
	for _, want := range []string{"tallyman.journal_segments:1|g", "tallyman.sink_up:1|g|#sink:out"} {
		if !strings.Contains(got.String(), want) {
			t.Errorf("no %s in\n%s", want, got.String())
		}
	}
	if strings.Contains(got.String(), "start_time") || strings.Contains(got.String(), "tallyman.records:0") {
		t.Errorf("more than was wanted:\n%s", got.String())
	}
}
