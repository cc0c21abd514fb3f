package health

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/agent/adopt"
	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var busy = agent.Status{
	Version: "1.2.3", Started: time.Unix(1_700_000_000, 0), Running: 2,
	CI:     &record.CI{Repository: "acme/shop", Workflow: "Build \"it\"\n", Job: "test\xff"},
	Counts: agent.Counts{Records: 10, Socket: 7, Spooled: 3},
	Events: &events.Status{Connected: true, Events: 5},
	Sinks: []sinks.Status{
		{Name: "file", State: sinks.StateIdle, Delivered: 10},
		{Name: "pubsub", State: sinks.StateRetrying, BehindRecords: 4, BehindSeconds: 1.5, LastError: "permission denied"},
	},
}

var host = record.Host{Name: "n1", Pod: "runner-abc", Namespace: "arc", Node: "node-7"}

func serve(t *testing.T, addr string, report func() Report) *http.Client {
	t.Helper()
	l, err := Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, report, slog.New(slog.DiscardHandler)) }()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, l.Addr().Network(), l.Addr().String())
		},
	}}
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return client
}

func get(t *testing.T, c *http.Client, path string) (int, string) {
	t.Helper()
	resp, err := c.Get("http://tallyman" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestMetrics(t *testing.T) {
	c := serve(t, "127.0.0.1:0", func() Report { return OfAgent(busy, host) })
	code, body := get(t, c, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d: %s", code, body)
	}
	for _, want := range []string{
		`tallyman_build_info{version="1.2.3"} 1`,
		`tallyman_job_info{job="test` + "\ufffd" + `",namespace="arc",node="node-7",pod="runner-abc",repository="acme/shop",workflow="Build \"it\"\n"} 1`,
		`tallyman_records_received_total{way="spool"} 3`,
		`tallyman_sink_up{sink="pubsub"} 0`,
		`tallyman_sink_behind_seconds{sink="pubsub"} 1.5`,
		"# TYPE tallyman_records_total counter",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in\n%s", want, body)
		}
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{}
	for _, l := range families["tallyman_job_info"].GetMetric()[0].GetLabel() {
		labels[l.GetName()] = l.GetValue()
	}
	if labels["workflow"] != busy.CI.Workflow || labels["pod"] != host.Pod {
		t.Errorf("a parser reads the labels %q", labels)
	}

	// After the job there is nothing to join to.
	ended := busy
	ended.CI = nil
	if _, body := get(t, serve(t, "127.0.0.1:0", func() Report { return OfAgent(ended, host) }), "/metrics"); strings.Contains(body, "tallyman_job_info") {
		t.Errorf("no job runs, and its metric is there:\n%s", body)
	}
}

// The names and helps follow Prometheus' own conventions.
func TestPrometheusHasNothingToSay(t *testing.T) {
	for name, r := range map[string]Report{
		"agent":   OfAgent(busy, host),
		"adopter": OfAdopter(adopt.Status{Journals: []adopt.Journal{{Name: "x", Sinks: busy.Sinks}, {Name: "y", Sinks: busy.Sinks}}}, "1"),
	} {
		registry := prometheus.NewRegistry()
		registry.MustRegister(collector{func() Report { return r }})
		problems, err := testutil.GatherAndLint(registry)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, p := range problems {
			t.Errorf("%s: %+v", name, promlint.Problem(p))
		}
	}
}

func TestHealthz(t *testing.T) {
	full := busy
	full.Counts.Pending = 3
	healthy := busy
	healthy.Sinks = nil
	for _, row := range []struct {
		name   string
		status agent.Status
		code   int
		want   []string
	}{
		{"all is well", healthy, 200, []string{`"status":"ok"`}},
		{"a sink is away", busy, 200, []string{`"status":"degraded"`, "pubsub is retrying, 4 records behind: permission denied"}},
		{"the disk is full", full, 503, []string{`"status":"failing"`, "3 records wait"}},
	} {
		c := serve(t, "127.0.0.1:0", func() Report { return OfAgent(row.status, host) })
		code, body := get(t, c, "/healthz")
		if code != row.code || !json.Valid([]byte(body)) {
			t.Errorf("%s: %d: %s", row.name, code, body)
		}
		for _, want := range row.want {
			if !strings.Contains(body, want) {
				t.Errorf("%s: no %s in %s", row.name, want, body)
			}
		}
		if code, _ := get(t, c, "/debug/pprof/"); code != http.StatusNotFound {
			t.Errorf("/debug/pprof/ is %d", code)
		}
	}
}

func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "health") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]string{
		"0.0.0.0:0":         "loopback",
		"10.1.2.3:9464":     "loopback",
		":9464":             "loopback",
		"example.com:80":    "loopback",
		"9464":              "want unix:///path",
		"unix://" + file:    "no socket",
		"unix:///nosuch/so": "no such file",
	} {
		l, err := Listen(addr)
		if err == nil {
			t.Errorf("%s is taken", addr)
			_ = l.Close()
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", addr, err, want)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}

	socket := filepath.Join(dir, "health.sock")
	dead, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	c := serve(t, "unix://"+socket, func() Report { return OfAgent(busy, host) })
	if code, _ := get(t, c, "/healthz"); code != 200 {
		t.Errorf("a dead socket was not replaced: %d", code)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := Listen("unix://" + socket); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a living socket was taken: %v", err)
	}
}

// A client that connects and says nothing keeps nobody else waiting.
func TestASilentClient(t *testing.T) {
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, func() Report { return Report{} }, slog.New(slog.DiscardHandler)) }()
	for range 20 {
		silent, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + l.Addr().String() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A job can open connections without end; the agent has a bounded number of them.
func TestManyClients(t *testing.T) {
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, func() Report { return Report{} }, slog.New(slog.DiscardHandler)) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	get := func(patience time.Duration) error {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
		resp, err := client.Get("http://" + l.Addr().String() + "/healthz")
		if err == nil {
			err = resp.Body.Close()
		}
		return err
	}
	var silent []net.Conn
	for range maxConns {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	if err := get(200 * time.Millisecond); err == nil {
		t.Errorf("the connection beyond %d is answered", maxConns)
	}
	silent[0].Close()
	if err := get(time.Minute); err != nil {
		t.Errorf("nobody is answered when there is room again: %v", err)
	}
}

// docs/operations.md names every metric; `_total` after a comma stands for a name with
// the first one's beginning.
func TestMetricsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for line := range strings.Lines(string(doc)) {
		cell, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " | ")
		if !ok || !strings.HasPrefix(cell, "`tallyman_") {
			continue
		}
		first := ""
		for _, name := range strings.Split(cell, ", ") {
			name = strings.Trim(name, "`")
			if rest, ok := strings.CutPrefix(name, "_"); ok {
				// tallyman_records_total, _refused_total; tallyman_sink_up, _retries_total
				name = first + "_" + rest
			} else if first = name[:strings.LastIndexByte(name, '_')]; strings.HasPrefix(name, "tallyman_events_") {
				first = "tallyman_events"
			}
			documented[name] = true
		}
	}
	var all []agent.Sample
	for _, r := range []Report{OfAgent(busy, host), OfAdopter(adopt.Status{Journals: []adopt.Journal{{Sinks: busy.Sinks}}}, "1")} {
		all = append(all, r.Samples...)
	}
	for _, s := range all {
		if !documented[s.Name] {
			t.Errorf("docs/operations.md does not name %s", s.Name)
		}
		documented[s.Name] = true
	}
}
