// Package fluent delivers records over the Forward protocol to Fluent Bit, Fluentd or
// the Ops Agent's fluent_forward receiver.
//
// A record becomes one event: the time is the record's ts with its nanoseconds, the
// tag is made from a template, and the message is the record, nested as it is. Each
// event asks for an acknowledgement, because without one a restart of the receiver
// loses what the client believes to have sent. Events go one by one, so throughput is
// one event for each round trip; prefer the unix socket of a receiver on the node.
package fluent

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fluent/fluent-logger-golang/fluent"

	"github.com/tallyman-ci/tallyman/sinks"
)

// defaultPort is the one of the Forward protocol.
const defaultPort = 24224

// Scheme is `fluent://host:port` and `fluent:///path/of/a/unix/socket`.
func Scheme() sinks.Scheme {
	return sinks.Scheme{
		Name: "fluent",
		Form: "fluent://host:24224",
		Params: []sinks.Param{
			{Name: "tag", Default: defaultTag, Doc: "tag of an event; {kind}, {repository}, {owner}, {workflow}, {job}, {runner} and {host} stand for the record's"},
			{Name: "tls", Default: "false", Doc: "true speaks TLS; the receiver's certificate is checked against the system's roots (SSL_CERT_FILE)"},
			{Name: "tls_skip_verify", Default: "false", Doc: "true takes any certificate: for tests"},
			{Name: "dial_timeout", Default: "3s", Doc: "time to connect"},
			{Name: "ack_timeout", Default: "5s", Doc: "time to send one event, and again to wait for its acknowledgement"},
			{Name: "ack", Default: "true", Doc: "false does not wait for acknowledgements, for receivers that send none: a restart of the receiver loses records"},
		},
		Open: open,
	}
}

func open(_ context.Context, t *sinks.Target) (sinks.Sink, error) {
	u := t.URL
	s := &sink{dial: t.Duration("dial_timeout", 3*time.Second), wait: t.Duration("ack_timeout", 5*time.Second)}
	s.config = fluent.Config{
		// The library's own waits are none of ours: one attempt, and the pump decides
		// about the next. A zero of any of these stands for a default that blocks for
		// ever or for minutes.
		MaxRetry:           1,
		RetryWait:          1,
		MaxRetryWait:       1,
		Timeout:            s.dial,
		RequestAck:         t.Bool("ack", true),
		SubSecondPrecision: true, // without it Fluent Bit gets whole seconds
	}
	switch {
	case u.Opaque != "" || u.Host == "" && (u.Path == "" || u.Path == "/"):
		return nil, errors.New("want a host, as in fluent://host:24224, or the path of a unix socket, as in fluent:///var/run/fluent.sock")
	case u.User != nil, u.Host == "" && strings.Contains(u.Path, "@"): // fluent:/user:password@host
		return nil, errors.New("user and password (and shared_key) are not supported by the client library: use the receiver's unix socket, or TLS on a network that only runners reach")
	case u.Host == "":
		s.config.FluentNetwork, s.config.FluentSocketPath = "unix", filepath.Clean(u.Path)
		s.address = s.config.FluentSocketPath
	case u.Path != "" && u.Path != "/":
		return nil, fmt.Errorf("nothing may follow the host and port, and %q does: set the tag by tag=", u.Path)
	default:
		port := defaultPort
		if p := u.Port(); p != "" {
			n, err := strconv.Atoi(p)
			if err != nil || n < 1 || n > 65535 {
				return nil, fmt.Errorf("port %q is none", p)
			}
			port = n
		}
		host := u.Hostname()
		if strings.Contains(host, ":") {
			host = "[" + host + "]" // the library joins host and port by a colon
		}
		s.config.FluentNetwork, s.config.FluentHost, s.config.FluentPort = "tcp", host, port
		s.address = net.JoinHostPort(u.Hostname(), strconv.Itoa(port))
	}
	if t.Bool("tls", false) {
		if s.config.FluentNetwork == "unix" {
			return nil, errors.New("tls=true is for hosts; a unix socket needs none")
		}
		s.config.FluentNetwork = "tls"
	}
	s.config.TlsInsecureSkipVerify = t.Bool("tls_skip_verify", false)
	var err error
	s.tag, err = parseTag(t.String("tag", defaultTag))
	return s, err
}

type sink struct {
	config     fluent.Config
	address    string // for messages
	tag        tag
	dial, wait time.Duration

	client *fluent.Fluent // nil before the first event and after an error
	// What of the batch went out before an error: the next attempt goes on there.
	first   string
	n, done int
	refused []sinks.Refused
}

// Write sends the batch event by event. An acknowledged event is one that the
// receiver has put into its buffer, which is on disk where it is configured so.
func (s *sink) Write(ctx context.Context, batch []sinks.Entry) error {
	if len(batch) == 0 {
		return nil
	}
	if s.first != batch[0].ID || s.n != len(batch) {
		s.first, s.n, s.done, s.refused = batch[0].ID, len(batch), 0, nil
	}
	for ; s.done < len(batch); s.done++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		event, err := s.decode(batch[s.done].Line)
		if err != nil {
			s.refused = append(s.refused, sinks.Refused{Index: s.done, Reason: err.Error()})
			continue
		}
		if err := s.post(ctx, event); err != nil {
			s.disconnect()
			return err
		}
	}
	refused := s.refused
	s.n, s.refused = 0, nil // the next batch is another one, whatever its ids
	if len(refused) > 0 {
		return &sinks.RefusedError{Refused: refused}
	}
	return nil
}

// post sends one event within ctx's deadline: the library knows no contexts.
func (s *sink) post(ctx context.Context, e event) error {
	left := func(most time.Duration) time.Duration {
		if deadline, ok := ctx.Deadline(); ok {
			// Zero would be no limit at all.
			most = max(min(most, time.Until(deadline)), time.Millisecond)
		}
		return most
	}
	if s.client == nil {
		config := s.config
		config.Timeout = left(s.dial)
		client, err := fluent.New(config)
		if err != nil {
			_ = client.Close() // it was made all the same, and has no connection
			var certificate *tls.CertificateVerificationError
			if errors.As(err, &certificate) {
				return fmt.Errorf("the certificate of the Forward receiver at %s is not accepted: %w (name the host as the certificate does; one of your own authority is trusted by SSL_CERT_FILE in the agent's environment)", s.address, certificate.Err)
			}
			return fmt.Errorf("no Forward receiver at %s: %w (is the in_forward input on, and reachable from here?)", s.address, err)
		}
		s.client = client
	}
	s.client.Config.WriteTimeout, s.client.Config.ReadTimeout = left(s.wait), left(s.wait)
	if err := s.client.EncodeAndPostData(e.tag, e.time, e.message); err != nil {
		// The library's text says how often it tried, never why.
		return fmt.Errorf("the Forward receiver at %s did not acknowledge an event within %s: it ended, is slow, wants a shared_key, or sends no acknowledgements (then ack=false)", s.address, s.wait)
	}
	return nil
}

func (s *sink) disconnect() {
	if s.client != nil {
		_ = s.client.Close() // nothing is in it
		s.client = nil
	}
}

// Close ends the connection.
func (s *sink) Close(context.Context) error {
	s.disconnect()
	return nil
}

// An event is a record as the Forward protocol carries it.
type event struct {
	tag     string
	time    time.Time
	message map[string]any
}

// decode makes an event of a record. The library encodes maps of plain values only:
// a number becomes an integer where it is one, for receivers tell them apart.
func (s *sink) decode(line []byte) (event, error) {
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	var message map[string]any
	if err := d.Decode(&message); err != nil || message == nil {
		return event{}, errors.New("the record is no JSON object")
	}
	if _, err := d.Token(); err != io.EOF {
		return event{}, errors.New("something follows the record's JSON object")
	}
	text, _ := message["ts"].(string)
	ts, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return event{}, errors.New("the record has no ts in the form of RFC 3339")
	}
	for k, v := range message {
		message[k] = plain(v, 2)
	}
	return event{tag: s.tag.of(message), time: ts, message: message}, nil
}

// maxDepth is how deep a message is nested at most; the members of a record come to
// four. An agent lets little more than that into its journal, but one that an adopter
// found was within reach of a job and can hold anything, and receivers stop at some
// depth: decoders in C at 32, in Ruby at 128. They hang up then without an
// acknowledgement, for ever, because the same event comes again.
const maxDepth = 16

// plain replaces the numbers in v by values that the library can encode, and what lies
// deeper than maxDepth by its JSON, as text. v itself lies at depth.
func plain(v any, depth int) any {
	switch v := v.(type) {
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		if f, err := v.Float64(); err == nil {
			return f
		}
		return v.String() // too large for any number
	case map[string]any:
		if depth > maxDepth {
			return asText(v)
		}
		for k, inner := range v {
			v[k] = plain(inner, depth+1)
		}
	case []any:
		if depth > maxDepth {
			return asText(v)
		}
		for i, inner := range v {
			v[i] = plain(inner, depth+1)
		}
	}
	return v
}

// asText is the JSON of what was decoded from JSON.
func asText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error() // no such value comes out of the decoder
	}
	return string(b)
}
