package metrics

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
)

// socketFile is where the Datadog agent's chart puts its socket.
const socketFile = "/var/run/datadog/dsd.socket"

const defaultPort = "8125"

// target is where metrics go.
type target struct {
	addr     string // as the DogStatsD client takes it; empty: off
	source   string // the setting it comes from, or why it is off
	resolve  bool   // addr has a host name
	warnings []string
}

// findAgent finds the agent: by the explicit address, else by the environment. The
// DogStatsD client could do the second itself, but takes no unixgram:// there, makes
// nothing of an IPv6 address, knows of no socket file, and stays silent about what
// it ignores.
func findAgent(explicit string, getenv func(string) string, socket string) (target, error) {
	var t target
	if explicit == "off" {
		t.source = "configured off"
		return t, nil
	}
	if explicit != "" {
		err := t.parse(explicit, defaultPort)
		t.source = "configuration"
		if err != nil {
			return target{}, fmt.Errorf("DogStatsD address %q: %w", explicit, err)
		}
		return t, nil
	}
	if v := getenv("DD_DOGSTATSD_URL"); v != "" {
		err := t.parse(v, defaultPort)
		if err == nil {
			t.source = "DD_DOGSTATSD_URL"
			return t, nil
		}
		t.warnings = append(t.warnings, fmt.Sprintf("DD_DOGSTATSD_URL ignored: %v", err))
	}
	if info, err := os.Stat(socket); err == nil && info.Mode().Type() == os.ModeSocket {
		t.addr, t.source = "unix://"+socket, "the socket file exists"
		return t, nil
	}
	if host := getenv("DD_AGENT_HOST"); host != "" {
		port := getenv("DD_DOGSTATSD_PORT")
		if port == "" {
			port = defaultPort
		}
		err := t.parseHost(host, port)
		if err == nil {
			t.source = "DD_AGENT_HOST"
			return t, nil
		}
		t.warnings = append(t.warnings, fmt.Sprintf("DD_AGENT_HOST ignored: %v", err))
	}
	t.addr, t.resolve = "", false
	t.source = "no DD_DOGSTATSD_URL, no " + socket + ", no DD_AGENT_HOST"
	return t, nil
}

// parse takes an address with or without a scheme.
func (t *target) parse(s, port string) error {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return t.parseHost(s, port)
	}
	switch scheme {
	case "unix", "unixgram", "unixstream":
		if !strings.HasPrefix(rest, "/") {
			return fmt.Errorf("the socket path must be absolute: %s:///var/run/datadog/dsd.socket", scheme)
		}
		t.addr, t.resolve = s, false
		return nil
	case "udp":
		u, err := url.Parse(s)
		if err != nil {
			return fmt.Errorf("not an URL such as udp://127.0.0.1:8125")
		}
		return t.parseHost(u.Host, port)
	}
	return fmt.Errorf("scheme %q is none of udp, unix, unixgram, unixstream", scheme)
}

// parseHost takes host, host:port, and IPv6 addresses with and without brackets.
func (t *target) parseHost(s, port string) error {
	host := s
	if _, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		host = strings.Trim(s, "[]")
	} else if h, p, err := net.SplitHostPort(s); err == nil {
		host, port = h, p
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("port %q is no number from 1 to 65535", port)
	}
	_, err := netip.ParseAddr(host)
	if err != nil && (host == "" || strings.ContainsAny(host, ":/[]@ \t\n")) {
		return fmt.Errorf("host %q is no host name or IP address", host)
	}
	t.addr, t.resolve = net.JoinHostPort(host, port), err != nil
	return nil
}
