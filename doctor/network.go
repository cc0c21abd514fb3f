package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/docker/docker/client"
	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/metrics"
)

func (x *examination) agent(ctx context.Context) {
	if x.in.Agent == nil {
		return
	}
	const name = "agent"
	socket := x.cfg.Socket()
	start := "the job-started hook starts it; by hand: tallyman agent (its log is " + x.cfg.StateDir + "/agent.log)"
	st, err := os.Lstat(socket)
	if errors.Is(err, fs.ErrNotExist) {
		calls := "calls go to the spool files"
		if !x.spoolWorks() {
			calls = "calls are lost (see run_dir and spool)"
		}
		x.add(Warn, name, "no agent runs: there is no socket "+socket+"; "+calls+", and events are not seen", start)
		return
	}
	if err == nil && st.Mode()&os.ModeSocket == 0 {
		x.add(Fail, name, socket+" is no socket: the shim cannot reach the agent", "remove it and start the agent again")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, x.in.Timeout)
	defer cancel()
	state, err := x.in.Agent(ctx, socket)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		x.add(Fail, name, "nobody listens at "+socket+": the agent ended without removing it", start)
	case errors.Is(err, fs.ErrPermission):
		x.add(Fail, name, fmt.Sprintf("uid %d may not connect to %s: calls of this user go to the spool files", x.uid, socket), "chmod 0666 "+socket+", and let its folder be searchable for all")
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded):
		x.add(Fail, name, fmt.Sprintf("the agent at %s does not answer within %s: it hangs", socket, x.in.Timeout), "end it (its pid is in "+x.cfg.StateDir+"/agent.lock); "+start)
	case err != nil:
		x.add(Fail, name, fmt.Sprintf("the agent at %s: %v", socket, err), start)
	case len(state.Problems) > 0:
		x.add(Warn, name, state.Summary+"; it says: "+strings.Join(state.Problems, "; "), "tallyman status tells more")
	default:
		x.ok(name, "%s", state.Summary)
	}
}

// defaultHost is where the docker CLI looks when nothing is set.
const defaultHost = "unix:///var/run/docker.sock"

func (x *examination) daemon(ctx context.Context) {
	const name = "daemon"
	host, from := x.cfg.DockerHost, "docker_host in the configuration"
	if host == "" {
		host, from = x.env["DOCKER_HOST"], "DOCKER_HOST"
	}
	if host == "" {
		host, from = defaultHost, "the default"
	}
	scheme, _, _ := strings.Cut(host, "://")
	if scheme == "ssh" || scheme == "npipe" || scheme == "fd" {
		x.add(Warn, name, "the daemon is reached by "+scheme+" ("+from+"): its events are not read", "set docker_host to a unix:// or tcp:// address for events")
		return
	}
	host, err := events.Address(host)
	if err != nil {
		x.add(Fail, name, err.Error(), "correct it (now from "+from+"): until then no events are recorded")
		return
	}
	scheme, rest, _ := strings.Cut(host, "://")
	ctx, cancel := context.WithTimeout(ctx, x.in.Timeout)
	defer cancel()
	before := x.in.Now()
	var state DaemonState
	err = dialUnix(ctx, scheme, rest)
	if err == nil {
		state, err = x.in.Daemon(ctx, host)
	}
	if err != nil && x.env["ACTIONS_RUNNER_CONTAINER_HOOKS"] != "" {
		x.add(Warn, name, "the runner is in Kubernetes mode, without a Docker daemon: jobs run in other pods, and what they start there is not seen",
			"nothing, if that is meant; no job is hindered")
		return
	}
	if err != nil {
		x.add(Fail, name, x.noDaemon(host, scheme, rest, err), "is the dind sidecar up, or dockerd? Set DOCKER_HOST, or docker_host in the configuration (now from "+from+")")
		return
	}
	if c := x.env["DOCKER_CONTEXT"]; c != "" && c != "default" && x.env["DOCKER_HOST"] == "" {
		x.add(Warn, name, fmt.Sprintf("docker %s at %s; but DOCKER_CONTEXT=%s sends docker's calls elsewhere", state.Version, host, c), "set docker_host to that context's address")
		return
	}
	x.ok(name, "docker %s at %s (%s)", state.Version, host, from)
	if !state.Time.IsZero() {
		if skew := state.Time.Sub(before); skew > skewLimit || skew < -skewLimit {
			x.add(Warn, "daemon clock", fmt.Sprintf("the daemon's clock differs by %s from ours: times of events and calls do not fit together", length(skew.Abs())), "set both clocks (chrony, systemd-timesyncd)")
		}
	}
}

// noDaemon says why a daemon cannot be reached.
func (x *examination) noDaemon(host, scheme, path string, err error) string {
	if scheme == "unix" {
		st, statErr := os.Stat(path)
		switch {
		case errors.Is(statErr, fs.ErrNotExist):
			return "no Docker daemon at " + host + ": there is no such socket"
		case statErr == nil && st.Mode()&os.ModeSocket == 0:
			return "no Docker daemon at " + host + ": it is no socket"
		case errors.Is(err, unix.EACCES):
			return fmt.Sprintf("uid %d may not use the Docker daemon at %s (group docker?)", x.uid, host)
		case errors.Is(err, unix.ECONNREFUSED):
			return "no Docker daemon at " + host + ": the socket is there, but nobody listens"
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Sprintf("the Docker daemon at %s does not answer within %s", host, x.in.Timeout)
	}
	return fmt.Sprintf("no Docker daemon at %s: %v", host, err)
}

// dialUnix connects to a unix socket and hangs up: Docker's client says of every
// failure only that it cannot connect.
func dialUnix(ctx context.Context, scheme, path string) error {
	if scheme != "unix" {
		return nil
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}

// askDaemon asks a daemon for its version and its time. The TLS settings are those
// of docker's own variables.
func askDaemon(ctx context.Context, host string) (DaemonState, error) {
	opts := []client.Opt{client.WithTLSClientConfigFromEnv(), client.WithHost(host), client.WithAPIVersionNegotiation()}
	c, err := client.NewClientWithOpts(opts...)
	if err != nil {
		return DaemonState{}, err
	}
	defer c.Close()
	v, err := c.ServerVersion(ctx)
	if err != nil {
		return DaemonState{}, err
	}
	state := DaemonState{Version: v.Version}
	if info, err := c.Info(ctx); err == nil {
		if t, err := time.Parse(time.RFC3339Nano, info.SystemTime); err == nil {
			state.Time = t
		}
	}
	return state, nil
}

// metrics checks the DogStatsD address that the agent finds.
func (x *examination) metrics(ctx context.Context) {
	const name = "metrics"
	e, err := metrics.New(metrics.Options{
		Addr: x.cfg.Statsd, EventTags: x.cfg.StatsdTags, Logger: slog.New(slog.DiscardHandler),
		Getenv: func(k string) string { return x.env[k] },
	})
	if err != nil {
		x.add(Fail, name, err.Error()+": no metrics are sent", "correct statsd and statsd_tags in the configuration")
		return
	}
	addr, from := e.Address()
	ctx, cancel := context.WithTimeout(ctx, x.in.Timeout)
	defer cancel()
	if err := e.Close(ctx); err != nil {
		x.add(Warn, name, fmt.Sprintf("DogStatsD at %s (%s): %v", addr, from, err), "is the Datadog agent up?")
		return
	}
	for _, v := range []string{"DD_DOGSTATSD_URL", "DD_AGENT_HOST"} {
		if x.cfg.Statsd == "" && x.env[v] != "" && addr == "" {
			x.add(Fail, name, v+"="+x.env[v]+" is no DogStatsD address: no metrics are sent", "use udp://host:port or unix:///path, or a host in DD_AGENT_HOST")
			return
		}
	}
	switch {
	case x.cfg.Statsd == "off":
		x.ok(name, "off (statsd = off)")
		return
	case addr == "":
		x.add(Warn, name, "no DogStatsD address ("+from+"): no metrics are sent",
			"set DD_AGENT_HOST or DD_DOGSTATSD_URL in the runner's environment, or statsd in the configuration (statsd = off where none is wanted)")
		return
	}
	scheme, path, isURL := strings.Cut(addr, "://")
	if !isURL {
		if err := knockUDP(addr, x.in.Timeout); err != nil {
			x.add(Warn, name, fmt.Sprintf("no DogStatsD at %s (%s): %v", addr, from, err), "is the Datadog agent up, with dogstatsd_non_local_traffic and its port open?")
			return
		}
		x.ok(name, "metrics go to %s (%s); UDP does not tell whether somebody listens on another host", addr, from)
		return
	}
	network := "unixgram"
	if scheme == "unixstream" {
		network = "unix"
	}
	c, err := net.DialTimeout(network, path, x.in.Timeout)
	if scheme == "unix" && errors.Is(err, unix.EPROTOTYPE) { // the client tries a stream next
		c, err = net.DialTimeout("unix", path, x.in.Timeout)
	}
	if err != nil {
		x.add(Warn, name, fmt.Sprintf("no DogStatsD at %s (%s): %v", addr, from, err), "is the Datadog agent up, and its socket's folder mounted here?")
		return
	}
	c.Close()
	x.ok(name, "DogStatsD at %s (%s)", addr, from)
}

// knockUDP sends two empty datagrams, which are no metric: on the same host the
// kernel answers the second one with ECONNREFUSED when nobody listens.
func knockUDP(addr string, timeout time.Duration) error {
	c, err := net.DialTimeout("udp", addr, timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	for range 2 {
		if _, err := c.Write(nil); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

func (x *examination) sinks() {
	const name = "sinks"
	if x.in.Sinks == nil {
		return
	}
	if len(x.cfg.Sinks) == 0 {
		x.ok(name, "none beside the journal")
		return
	}
	var good []string
	errs := x.in.Sinks(x.cfg.Sinks)
	for i, raw := range x.cfg.Sinks {
		if err := errs[i]; err != nil {
			x.add(Fail, name, err.Error(), "correct the sinks line of the configuration; the agent does not use this sink")
			continue
		}
		if u, err := url.Parse(raw); err == nil {
			raw = u.Redacted()
		}
		good = append(good, raw)
	}
	if len(good) > 0 {
		x.ok(name, "%s", strings.Join(good, ", "))
	}
}

// skewLimit is how far clocks may be apart before it is said.
const skewLimit = 5 * time.Second

// built is a time that lies surely in the past.
var built = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

func (x *examination) clock() {
	const name = "clock"
	now := x.in.Now()
	if now.Before(built) {
		x.add(Fail, name, "the clock says "+now.UTC().Format("2006-01-02 15:04:05 UTC"), "set it (chrony, systemd-timesyncd): records are ordered and found by time")
		return
	}
	x.ok(name, "%s", now.UTC().Format("2006-01-02 15:04:05 UTC"))
}

func length(d time.Duration) string {
	switch {
	case d < time.Minute:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
