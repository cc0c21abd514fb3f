package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/tallyman-ci/tallyman/hook"
)

// The socket carries one message per connection, or several control messages one
// after the other (SOCK_SEQPACKET keeps them apart). A message that begins with
// record.Marker is a record and is answered by one byte, handover.AckClose or
// handover.AckKeep; a connection closed without that byte means that the agent does
// not have it. Everything else is a control message of the form below.

// request is a control message.
type request struct {
	Control   string        `json:"control"` // job-start, job-end, flush, status
	Context   *hook.Context `json:"context,omitempty"`
	Key       string        `json:"key,omitempty"`
	Outcome   string        `json:"outcome,omitempty"`
	TimeoutMS int64         `json:"timeout_ms,omitempty"`
}

// reply answers a control message.
type reply struct {
	Error  string  `json:"error,omitempty"`
	Status *Status `json:"status,omitempty"`
}

// maxControl is the longest control message or reply, far below the 212,960 bytes
// that one message of a unix socket may have by default.
const maxControl = 128 << 10

// Client talks to a running agent. It is not safe for concurrent use.
type Client struct {
	conn *net.UnixConn
}

// Dial connects to the agent at socket. The error is fs.ErrNotExist where there
// is no socket and syscall.ECONNREFUSED where nobody listens on it.
func Dial(ctx context.Context, socket string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to the agent: %w", err)
	}
	return &Client{conn.(*net.UnixConn)}, nil
}

// Close closes the connection, not the agent.
func (c *Client) Close() error { return c.conn.Close() }

// JobStart says that a context is sealed and its job begins now.
func (c *Client) JobStart(ctx context.Context, job hook.Context) error {
	_, err := c.ask(ctx, request{Control: "job-start", Context: &job})
	return err
}

// JobEnd says that the context with this key was closed with this outcome.
func (c *Client) JobEnd(ctx context.Context, key, outcome string) error {
	_, err := c.ask(ctx, request{Control: "job-end", Key: key, Outcome: outcome})
	return err
}

// Flush returns when everything received is journalled and the sinks have had their
// chance, at the latest at ctx's deadline.
func (c *Client) Flush(ctx context.Context) error {
	_, err := c.ask(ctx, request{Control: "flush"})
	return err
}

// Status asks what the agent is doing.
func (c *Client) Status(ctx context.Context) (Status, error) {
	r, err := c.ask(ctx, request{Control: "status"})
	if err != nil || r.Status == nil {
		return Status{}, errors.Join(err)
	}
	return *r.Status, nil
}

func (c *Client) ask(ctx context.Context, q request) (reply, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(10 * time.Second)
	}
	q.TimeoutMS = time.Until(deadline).Milliseconds()
	// The deadline of the connection leaves the agent's answer time to arrive.
	c.conn.SetDeadline(deadline.Add(100 * time.Millisecond))
	stop := context.AfterFunc(ctx, func() {
		if ctx.Err() == context.Canceled {
			c.conn.SetDeadline(time.Now())
		}
	})
	defer stop()
	b, err := json.Marshal(q)
	if err != nil {
		return reply{}, fmt.Errorf("ask the agent for %s: %w", q.Control, err)
	}
	if _, err := c.conn.Write(b); err != nil {
		return reply{}, fmt.Errorf("ask the agent for %s: %w", q.Control, err)
	}
	buf := make([]byte, maxControl)
	n, err := c.conn.Read(buf)
	if err == nil && n == 0 {
		err = errors.New("it closed the connection")
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errors.New("no answer in time")
	}
	if err != nil {
		return reply{}, fmt.Errorf("ask the agent for %s: %w", q.Control, err)
	}
	var r reply
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return reply{}, fmt.Errorf("ask the agent for %s: read its answer: %w", q.Control, err)
	}
	if r.Error != "" {
		return r, fmt.Errorf("the agent answered to %s: %s", q.Control, r.Error)
	}
	return r, nil
}
