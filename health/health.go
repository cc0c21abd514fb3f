// Package health tells monitoring what the agent does: /healthz for probes and
// /metrics for Prometheus, on a unix socket or a loopback port.
//
//	status of the agent or adopter ─▶ samples  ─▶ /metrics
//	                              └▶ problems ─▶ /healthz
//
// It is off unless an address is set, because whatever listens on a runner can be
// reached by the job that runs there. It tells counts and the job's name, no records.
package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/tallyman-ci/tallyman/agent"
)

// Report is what a source says at one moment.
type Report struct {
	Samples agent.Samples
	// Failing says why records cannot be kept; empty is healthy. A sink that is away
	// is no failure: the journal keeps what it lacks, and a restart would not help.
	Failing []string
	// Degraded says what else is wrong, for people.
	Degraded []string
}

// Listen opens addr: unix:///path of a socket, or host:port where host is a loopback
// address. The socket is for its owner and group only (0660); a dead one is replaced.
func Listen(addr string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		return listenUnix(path)
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("health %q: %w (want unix:///path or 127.0.0.1:9464)", addr, err)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("health %q: only a unix socket or a loopback address is taken, as 127.0.0.1:9464", addr)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("health: %w", err)
	}
	return l, nil
}

func listenUnix(path string) (net.Listener, error) {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("health: %w", err)
	case st.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("health: %s is there and is no socket: name another path", path)
	default:
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = c.Close() // only to see whether somebody answers
			return nil, fmt.Errorf("health: another process listens on %s", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("health: replace a dead socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("health: %w", err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("health: %w", err), l.Close())
	}
	return l, nil
}

// maxConns is how many clients have a connection at the same time; others wait.
const maxConns = 32

// Serve answers on l until ctx ends. It closes l.
func Serve(ctx context.Context, l net.Listener, report func() Report, log *slog.Logger) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{report})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4,
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { healthz(w, report()) })
	server := &http.Server{
		Handler: mux,
		// Whoever connects and says nothing holds a connection for this long only.
		ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 5 * time.Second,
		MaxHeaderBytes: 8 << 10,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	// A job that opens connections by the thousand must not take the agent's descriptors.
	if err := server.Serve(netutil.LimitListener(l, maxConns)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("health: %w", err)
	}
	return nil
}

// healthz answers 200 while records are kept, else 503; the body says why, in words.
func healthz(w http.ResponseWriter, r Report) {
	body := struct {
		Status   string   `json:"status"`
		Failing  []string `json:"failing,omitempty"`
		Degraded []string `json:"degraded,omitempty"`
	}{"ok", r.Failing, r.Degraded}
	code := http.StatusOK
	switch {
	case len(r.Failing) > 0:
		body.Status, code = "failing", http.StatusServiceUnavailable
	case len(r.Degraded) > 0:
		body.Status = "degraded"
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client went away
}

// collector makes Prometheus' metrics of samples.
type collector struct{ report func() Report }

// Describe sends nothing: which samples there are depends on the moment.
func (collector) Describe(chan<- *prometheus.Desc) {}

func (c collector) Collect(out chan<- prometheus.Metric) {
	for _, s := range c.report().Samples {
		var names, values []string
		for _, l := range s.Labels {
			// Prometheus refuses a whole answer for one value that is no UTF-8.
			names, values = append(names, l.Name), append(values, strings.ToValidUTF8(l.Value, "\ufffd"))
		}
		kind := prometheus.GaugeValue
		if s.Counter {
			kind = prometheus.CounterValue
		}
		m, err := prometheus.NewConstMetric(prometheus.NewDesc(s.Name, s.Help, names, nil), kind, s.Value, values...)
		if err != nil {
			m = prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
		}
		out <- m
	}
}
