package events

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
)

// Address reads an address of a daemon, in the form of DOCKER_HOST, as the docker
// command does: of host:port without a scheme, and of tcp:// without a host or a port,
// it completes what is missing. User, password and query, which docker does not use
// either, are left out, because the address is shown. Empty, the default socket, stays
// empty.
//
// The error says what is wrong with an address that no waiting makes right, and does
// not repeat it. Nothing is dialled.
func Address(host string) (string, error) {
	if host == "" {
		return "", nil
	}
	unreadable := errors.New("the address of the Docker daemon cannot be read: write it as unix:///path or tcp://host:port")
	scheme, addr, ok := strings.Cut(host, "://")
	if !ok {
		// docker reads any word as a host. A word alone is rather a mistake, and one that
		// would be waited for without end.
		if _, port, err := net.SplitHostPort(host); err != nil || port == "" {
			return "", unreadable
		}
		scheme, addr = "tcp", host
	}
	switch {
	case scheme == "":
		return "", unreadable
	case scheme != "unix" && scheme != "tcp":
		return "", fmt.Errorf("cannot reach a Docker daemon over %s: write its address as unix:///path or tcp://host:port", schemeName(scheme))
	case addr == "" && scheme == "unix":
		return "", errors.New("the address of the Docker daemon names no socket behind unix://: write it as unix:///path")
	case scheme == "unix":
		return host, nil
	}
	u, err := url.Parse("tcp://" + addr)
	if err != nil {
		return "", unreadable
	}
	name, port := u.Hostname(), u.Port()
	if strings.ContainsAny(name, " \t\r\n") {
		return "", unreadable
	}
	if name == "" && port == "" && u.Path != "" {
		return "", errors.New("the address of the Docker daemon names no host behind tcp://: write it as tcp://host:port")
	}
	if name == "" {
		name = "localhost"
	}
	if port == "" {
		port = "2375"
		if os.Getenv("DOCKER_TLS_VERIFY") != "" {
			port = "2376"
		}
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", errors.New("the address of the Docker daemon names a port that is none: take one of 1 to 65535")
	}
	return "tcp://" + net.JoinHostPort(name, port) + u.EscapedPath(), nil
}

// schemeName is what may be shown of a scheme: in user:secret://x it is more than that.
func schemeName(s string) string {
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '+' && c != '-' && c != '.' {
			return "its scheme"
		}
	}
	if len(s) > 16 {
		return "its scheme"
	}
	return s + "://"
}
