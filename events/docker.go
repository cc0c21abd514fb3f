package events

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
)

// This file is all that knows the Docker client. github.com/docker/docker ended
// with v28.5.2; its successor is github.com/moby/moby/client, whose calls differ
// only in their option structs.

const (
	// callTimeout bounds each call but the stream.
	callTimeout = 5 * time.Second
	// maxInspected bounds the containers whose start is looked up in a resync.
	maxInspected = 256
)

// daemon is a connection to one Docker daemon, made anew for each session: the
// daemon that comes back on a socket may be another one with another API version.
type daemon struct {
	cli *client.Client
	// stream carries the event stream. It goes through the client's dialer but not
	// through client.Events, which decodes each event into maps with a
	// json.Decoder: six to ten times of what decode.go takes (BenchmarkDecode).
	stream *http.Transport
	// opening bounds the calls that open a session.
	opening time.Duration
}

// identity says which daemon this is, and which life of it.
type identity struct {
	Engine  string // the daemon's id, kept in its data root
	Life    string // changes when the daemon restarts; empty where nothing tells
	Version string
	API     string
	Now     time.Time // the daemon's clock
}

// statusError is an answer of the daemon, or of a proxy before it, that is no
// stream.
type statusError struct {
	code    int
	status  string
	message string
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("the daemon answered %s", e.status)
	if e.message != "" {
		s += ": " + e.message
	}
	switch e.code {
	case http.StatusForbidden, http.StatusUnauthorized:
		s += " (a proxy before the socket must allow GET /events, /info and /_ping)"
	case http.StatusBadRequest:
		s += " (is DOCKER_API_VERSION set? unset it)"
	}
	return s
}

// openDaemon prepares a connection; nothing is dialled yet. host is in the form of
// DOCKER_HOST; empty means the environment's DOCKER_HOST, else the default socket.
func openDaemon(host string) (*daemon, error) {
	host, err := Address(cmp.Or(host, os.Getenv("DOCKER_HOST")))
	if err != nil {
		return nil, err
	}
	opts := []client.Opt{client.FromEnv}
	if host != "" {
		opts = append(opts, client.WithHost(host))
	}
	cli, err := client.NewClientWithOpts(append(opts, client.WithAPIVersionNegotiation())...)
	if err != nil {
		return nil, fmt.Errorf("set up the Docker client: %w (check DOCKER_CERT_PATH and DOCKER_TLS_VERIFY)", err)
	}
	dial := cli.Dialer()
	return &daemon{cli: cli, opening: 2 * callTimeout, stream: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dial(ctx)
			if err != nil {
				return nil, err
			}
			keepAlive(conn)
			return conn, nil
		},
		DisableKeepAlives:     true, // one connection, one stream
		DisableCompression:    true,
		ResponseHeaderTimeout: 2 * callTimeout,
		ReadBufferSize:        64 << 10,
	}}, nil
}

// keepAlive makes a dead peer known after 10 + 4 x 5 s. The kernel's default, and
// Go's, take minutes.
func keepAlive(conn net.Conn) {
	if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok { // TLS
		conn = wrapped.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 4})
	}
}

func (d *daemon) host() string { return d.cli.DaemonHost() }

// identify negotiates the API version and asks who is there. It fails when the
// daemon is not up. A daemon whose proxy refuses /info has no engine id.
func (d *daemon) identify(ctx context.Context) (identity, error) {
	ctx, cancel := context.WithTimeout(ctx, d.opening)
	defer cancel()
	ping, err := d.cli.Ping(ctx)
	if err != nil {
		return identity{}, fmt.Errorf("reach the Docker daemon: %w", err)
	}
	d.cli.NegotiateAPIVersionPing(ping)
	id := identity{API: d.cli.ClientVersion(), Life: d.life()}
	resp, err := d.get(ctx, "/info", nil)
	var refused *statusError
	switch {
	case err == nil:
	case errors.As(err, &refused) && refused.code >= 400 && refused.code < 500:
		return id, nil
	default:
		return identity{}, fmt.Errorf("ask the Docker daemon who it is: %w", err)
	}
	defer resp.Body.Close()
	// Not client.Info: it decodes some hundred fields, of which three are needed.
	var info struct{ ID, ServerVersion, SystemTime string }
	if err := json.NewDecoder(io.LimitReader(resp.Body, 4<<20)).Decode(&info); err != nil {
		return identity{}, fmt.Errorf("read the Docker daemon's /info: %w (is that a Docker daemon, or a proxy before it?)", err)
	}
	id.Engine, id.Version = cutTo(info.ID, maxName), cutTo(info.ServerVersion, maxName)
	id.Now, _ = time.Parse(time.RFC3339Nano, info.SystemTime)
	return id, nil
}

// life tells one life of the daemon from the next by the socket's inode and
// change time: dockerd makes a new socket when it starts. Under socket activation
// (-H fd://) the socket stays, and over TCP there is none; then the replay must
// tell (see joint).
func (d *daemon) life() string {
	file, ok := strings.CutPrefix(d.host(), "unix://")
	if !ok {
		return ""
	}
	info, err := os.Stat(file)
	if err != nil {
		return ""
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%d:%d.%09d", st.Ino, st.Ctim.Sec, st.Ctim.Nsec)
}

// events opens the stream with all buffered events since the daemon's time since
// (nanoseconds since 1970), inclusive. Closing the body ends it.
func (d *daemon) events(ctx context.Context, since int64) (io.ReadCloser, error) {
	// The deadline is for the opening alone: a context's own would end the stream.
	ctx, cancel := context.WithCancel(ctx)
	opening := time.AfterFunc(d.opening, cancel)
	resp, err := d.get(ctx, "/events", url.Values{"since": {fmt.Sprintf("%d.%09d", since/1e9, since%1e9)}})
	if err == nil && !opening.Stop() {
		resp.Body.Close()
		err = context.DeadlineExceeded
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open the event stream: %w", err)
	}
	if err := streamable(resp.Header); err != nil {
		cancel()
		resp.Body.Close()
		return nil, err
	}
	return &body{ReadCloser: resp.Body, cancel: cancel}, nil
}

// streamable tells an event stream from what a proxy may answer in its place, with
// the status 200: a page to log in, or the stream compressed, though we never ask for
// that. The daemon sends application/json, and other kinds of JSON since API 1.52.
func streamable(h http.Header) error {
	if encoding := h.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return fmt.Errorf("%w: it is encoded as %q (a proxy before the daemon must not compress)", errNoStream, text(encoding))
	}
	if kind, _, _ := strings.Cut(h.Get("Content-Type"), ";"); strings.EqualFold(strings.TrimSpace(kind), "text/html") {
		return fmt.Errorf("%w but a web page (is there a proxy before the daemon?)", errNoStream)
	}
	return nil
}

// body is the body of a stream; its Close also ends the request.
type body struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b *body) Close() error {
	b.cancel()
	return b.ReadCloser.Close()
}

// get sends one GET on a connection of its own.
func (d *daemon) get(ctx context.Context, call string, query url.Values) (*http.Response, error) {
	host, err := client.ParseHostURL(d.host())
	if err != nil {
		return nil, err
	}
	// The dialer does TLS itself, so the scheme is always http here.
	u := url.URL{Scheme: "http", Host: client.DummyHost, Path: path.Join("/", host.Path, "/v"+d.cli.ClientVersion(), call), RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if host.Scheme != "unix" {
		req.Host = host.Host
	}
	resp, err := d.stream.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		var body struct{ Message string }
		_ = json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&body)
		return nil, &statusError{code: resp.StatusCode, status: text(resp.Status), message: text(body.Message)}
	}
	return resp, nil
}

// running lists the running containers with their starts (daemon's time) and
// counts the images. Of more than maxInspected containers the newest are looked up.
func (d *daemon) running(ctx context.Context) (started map[string]int64, images int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 6*callTimeout)
	defer cancel()
	list, err := d.cli.ContainerList(ctx, container.ListOptions{Limit: 0})
	if err != nil {
		return nil, 0, fmt.Errorf("list containers: %w", err)
	}
	started = make(map[string]int64, len(list))
	for i, c := range list {
		started[c.ID] = 0
		if i >= maxInspected {
			continue
		}
		one, err := d.cli.ContainerInspect(ctx, c.ID)
		if err != nil || one.ContainerJSONBase == nil || one.State == nil {
			continue // gone meanwhile
		}
		if at, err := time.Parse(time.RFC3339Nano, one.State.StartedAt); err == nil && at.Year() > 1 {
			started[c.ID] = at.UnixNano()
		}
	}
	all, err := d.cli.ImageList(ctx, image.ListOptions{})
	if err != nil {
		return started, 0, fmt.Errorf("list images: %w", err)
	}
	return started, len(all), nil
}

// close lets go of idle connections.
func (d *daemon) close() {
	_ = d.cli.Close()
	d.stream.CloseIdleConnections()
}
