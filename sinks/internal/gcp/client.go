// Package gcp is what the sinks for Google Cloud have in common: how their clients
// connect and find credentials, what their servers' errors mean, and how a batch is
// handed over of which a server may refuse parts.
package gcp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloud.google.com/go/compute/metadata"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/tallyman-ci/tallyman/sinks"
)

// Dial says how a client finds its server.
type Dial struct {
	Endpoint    string // host:port in place of Google's, "" for that
	Plaintext   bool   // no TLS and no credentials, for servers on this machine
	Credentials string // path of a JSON file, "" for the application default
}

// Params are the query parameters that ParseDial reads.
func Params() []sinks.Param {
	return []sinks.Param{
		{Name: "endpoint", Default: "Google's", Doc: "host:port of the service, for Private Service Connect or a local emulator"},
		{Name: "plaintext", Default: "false", Doc: "no TLS and no credentials; only with an endpoint on this machine"},
		{Name: "credentials", Default: "application default", Doc: "path of a credentials file, in place of GOOGLE_APPLICATION_CREDENTIALS and the metadata server"},
	}
}

// ParseDial reads the parameters of Params from t.
func ParseDial(t *sinks.Target) (Dial, error) {
	d := Dial{Endpoint: t.String("endpoint", ""), Plaintext: t.Bool("plaintext", false), Credentials: t.String("credentials", "")}
	if d.Endpoint != "" {
		if _, _, err := net.SplitHostPort(d.Endpoint); err != nil {
			return d, fmt.Errorf("parameter endpoint: want host:port: %w", err)
		}
	}
	if d.Plaintext && !onThisMachine(d.Endpoint) {
		return d, errors.New("parameter plaintext: only with an endpoint on this machine, such as 127.0.0.1:8085: records would cross the network for all to read")
	}
	if d.Credentials != "" && !filepath.IsAbs(d.Credentials) {
		return d, errors.New("parameter credentials: want an absolute path")
	}
	return d, nil
}

func onThisMachine(endpoint string) bool {
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// Options are the client's options. Where it needs credentials that are not there,
// the error says what to do; it is transient, because the metadata server of a young
// pod answers late. It may take some seconds, whatever ctx says.
func (d Dial) Options(ctx context.Context) ([]option.ClientOption, error) {
	o := append(dialOptions(), option.WithTelemetryDisabled())
	if d.Endpoint != "" {
		o = append(o, option.WithEndpoint(d.Endpoint))
	}
	switch {
	case d.Plaintext:
		return append(o, option.WithoutAuthentication(), option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials()))), nil
	case d.Credentials != "":
		kind, err := kindOf(d.Credentials)
		if err != nil {
			return nil, err
		}
		return append(o, option.WithAuthCredentialsFile(kind, d.Credentials)), nil
	case !haveCredentials(ctx):
		return nil, errors.New("no Google credentials here: no GOOGLE_APPLICATION_CREDENTIALS, no parameter credentials, and the metadata server does not answer" +
			" (on GKE use Workload Identity, on a VM attach a service account, elsewhere name a credentials file)")
	}
	return o, nil
}

// dialOptions replace two defaults of gRPC. A channel whose server was away waits
// up to two minutes before it looks again, and the pump has its own patience. And
// only with keepalive does the kernel give up a connection into nothing
// (TCP_USER_TIMEOUT, 20 s here) before it has sent again for a quarter of an hour;
// pings more often than each five minutes would have Google's servers hang up.
func dialOptions() []option.ClientOption {
	return []option.ClientOption{
		option.WithGRPCDialOption(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		})),
		option.WithGRPCDialOption(grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 5 * time.Minute, Timeout: 20 * time.Second})),
	}
}

// kindOf reads what kind of credentials a file holds, and nothing else of it.
func kindOf(path string) (option.CredentialsType, error) {
	var file struct{ Type option.CredentialsType }
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("credentials: %w", err)
	}
	if json.Unmarshal(data, &file) != nil || file.Type == "" { // its error could quote the file
		return "", fmt.Errorf("credentials: %s is not a Google credentials file", path)
	}
	return file.Type, nil
}

// haveCredentials asks the metadata server anew each time. The client library asks
// it once in a process and remembers a no for ever.
func haveCredentials(ctx context.Context) bool {
	if os.Getenv("GOOGLE_APPLICATION_CREDENTIALS") != "" {
		return true
	}
	if home, err := os.UserHomeDir(); err == nil {
		if _, err := os.Stat(filepath.Join(home, ".config", "gcloud", "application_default_credentials.json")); err == nil {
			return true
		}
	}
	return Metadata().OnGCEWithContext(ctx)
}

// Metadata is a client for the metadata server that gives up soon.
func Metadata() *metadata.Client {
	return metadata.NewClient(&http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}})
}

// Principal names who the credentials stand for, for the message about a missing
// permission; "" where that cannot be told.
func (d Dial) Principal(ctx context.Context) string {
	if d.Plaintext {
		return ""
	}
	path := d.Credentials
	if path == "" {
		path = os.Getenv("GOOGLE_APPLICATION_CREDENTIALS")
	}
	if path != "" {
		var file struct {
			Email string `json:"client_email"`
		}
		if data, err := os.ReadFile(path); err == nil && json.Unmarshal(data, &file) == nil {
			return file.Email
		}
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // the client would ask again and again
	defer cancel()
	email, err := Metadata().EmailWithContext(ctx, "default")
	if err != nil {
		return ""
	}
	return email
}

// Lazy makes a client when it is first wanted. To look for credentials can take
// longer than the caller has time, and some libraries do not heed a context there:
// then the caller goes, and the next one finds the result. Its methods are not for
// concurrent use.
type Lazy[C any] struct {
	Open func(ctx context.Context) (C, error)

	made    *C
	pending chan opened[C]
}

type opened[C any] struct {
	client C
	err    error
}

// Get returns the client.
func (l *Lazy[C]) Get(ctx context.Context) (C, error) {
	if l.made != nil {
		return *l.made, nil
	}
	if l.pending == nil {
		// The goroutine ends when Open does, and holds nothing but its result.
		l.pending = make(chan opened[C], 1)
		go func(result chan<- opened[C]) {
			client, err := l.Open(context.WithoutCancel(ctx))
			result <- opened[C]{client, err}
		}(l.pending)
	}
	select {
	case r := <-l.pending:
		l.pending = nil
		if r.err == nil {
			l.made = &r.client
		}
		return r.client, r.err
	case <-ctx.Done():
		var none C
		return none, fmt.Errorf("look for credentials: %w", ctx.Err())
	}
}

// Close closes the client, also one that is still being made.
func (l *Lazy[C]) Close(ctx context.Context, closeClient func(C) error) error {
	if l.made != nil {
		defer func() { l.made = nil }()
		return closeClient(*l.made)
	}
	if l.pending == nil {
		return nil
	}
	select {
	case r := <-l.pending:
		l.pending = nil
		if r.err == nil {
			return closeClient(r.client)
		}
	case <-ctx.Done():
	}
	return nil
}

const alphanumeric = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// Named tells whether s is of min to max letters, digits and the characters of more.
// (To compile a regular expression with such bounds takes the better part of a
// millisecond, at each start of the program, the hooks' included.)
func Named(s string, min, max int, more string) bool {
	foreign := func(r rune) bool { return !strings.ContainsRune(alphanumeric+more, r) }
	return len(s) >= min && len(s) <= max && !strings.ContainsFunc(s, foreign)
}

// IsProject tells whether s may be the id of a project
// (https://cloud.google.com/resource-manager/docs/creating-managing-projects).
func IsProject(s string) bool {
	return Named(s, 3, 63, "-") && s == strings.ToLower(s) && s[0] != '-' && s[len(s)-1] != '-'
}
