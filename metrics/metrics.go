// Package metrics counts records in a DogStatsD agent.
//
// A record goes in at Observe, becomes at most two counter or distribution
// samples, and leaves in a datagram of the DogStatsD client, which merges equal
// counters for two seconds. Nothing waits for the agent: where it is absent, slow
// or stuck, samples are dropped and the drops are counted.
//
// What may become a tag is the concern of tags.go: the DogStatsD client sends what
// it is given, so a workflow named "Build, test | deploy #1" would break the line,
// and each new value of a tag is a new time series that someone pays for. Where the
// agent is, is the concern of address.go.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/DataDog/datadog-go/v5/statsd"

	"github.com/tallyman-ci/tallyman/record"
)

// The metrics.
const (
	// Events counts events of the Docker daemon; tags: Options.EventTags.
	Events = "docker.events"
	// ContainerDuration is a distribution of seconds from a container's start to its
	// end; tags: image (repository, no tag or digest), exit, and Options.Tags.
	ContainerDuration = "docker.container.duration"
	// Invocations counts calls of wrapped tools, without those that a CLI plugin
	// made; tags: tool, command, and Options.Tags.
	Invocations = "docker.invocations"
	// InvocationDuration is a distribution of seconds from call to end, where the
	// end was seen; tags: tool, command, exit, and Options.Tags.
	InvocationDuration = "docker.invocation.duration"
	// Losses counts records of kind loss; tags: cause, source.
	Losses = "tallyman.losses"
	// LostRecords counts the records that these losses stand for, where the number
	// is known; tags: cause, source.
	LostRecords = "tallyman.lost_records"
	// DroppedPayloads counts the datagrams that could not be handed to the agent,
	// sent with the next that could.
	DroppedPayloads = "tallyman.metrics.dropped_payloads"
)

// Options say where metrics go and how they are tagged. The zero value finds the
// agent by the environment.
type Options struct {
	// Addr is the agent's address: host:port, udp://host:port, unix:///path (a
	// datagram or stream socket), unixgram:///path, unixstream:///path, or off.
	// Empty means, in this order: DD_DOGSTATSD_URL; the socket
	// /var/run/datadog/dsd.socket if it exists; DD_AGENT_HOST with
	// DD_DOGSTATSD_PORT (8125); else off.
	Addr string
	// EventTags are the tags of docker.events. Default: event_type, action, repo,
	// workflow, run_id.
	//
	// run_id makes new time series with each run, for ever: on a busy fleet it is by
	// far the largest part of the bill for custom metrics. Leave it out where the
	// run can be found in the records (it always is there).
	EventTags []string
	// Tags are the tags of the job on all other metrics. Default: repo, workflow.
	Tags []string
	// Tools are wrapped tools that the tag tool names beside the well-known ones, which
	// need not stand here. Any other tool is counted as "other".
	Tools []string
	// MaxValues is the number of values that one tag without a closed set may have at a
	// time; further ones become __other__. A value that was not seen for an hour gives
	// its place to a new one. Default 200.
	MaxValues int
	// Logger gets where the agent is, once, and why it cannot be reached, once.
	Logger *slog.Logger
	// Now is the clock. Default: time.Now.
	Now func() time.Time
	// Getenv reads the environment. Default: os.Getenv.
	Getenv func(string) string
}

// Drops are counts of what did not reach the agent, since New.
type Drops struct {
	// Payloads are datagrams, of up to some dozen samples each, that were not
	// written because the agent was absent or slow. Of UDP to another host no one
	// ever knows.
	Payloads int64 `json:"payloads"`
	// Samples are samples that were not taken because the agent's host name could
	// not be resolved yet.
	Samples int64 `json:"samples"`
}

// Emitter sends metrics. Its methods are safe for concurrent use.
type Emitter struct {
	opts   Options
	log    *slog.Logger
	target target

	client   atomic.Pointer[statsd.Client] // nil while off or not resolved
	payloads atomic.Int64
	samples  atomic.Int64
	failed   atomic.Bool // a failure was logged

	stop context.CancelFunc // ends resolving
	wait sync.WaitGroup

	mu       sync.Mutex // guards what follows
	tags     tagger
	scratch  []string
	closed   bool
	reported int64 // drops already sent as DroppedPayloads
	reportAt time.Time
}

// reportEvery is the least time between two samples of DroppedPayloads.
const reportEvery = 10 * time.Second

// New makes an Emitter. It never waits for the agent; an agent that comes later is
// found then. The error is one of the options, never of the agent.
func New(o Options) (*Emitter, error) {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	if o.MaxValues <= 0 {
		o.MaxValues = 200
	}
	if o.EventTags == nil {
		o.EventTags = []string{"event_type", "action", "repo", "workflow", "run_id"}
	}
	if o.Tags == nil {
		o.Tags = []string{"repo", "workflow"}
	}
	if err := known("event tags", o.EventTags, eventTags, jobTags); err != nil {
		return nil, err
	}
	if err := known("tags", o.Tags, jobTags); err != nil {
		return nil, err
	}
	to, err := findAgent(o.Addr, o.Getenv, socketFile)
	if err != nil {
		return nil, err
	}
	for _, w := range to.warnings {
		o.Logger.Warn("DogStatsD", "problem", w)
	}
	e := &Emitter{opts: o, log: o.Logger, target: to, tags: newTagger(o.MaxValues, o.Tools), stop: func() {}}
	if to.addr == "" {
		o.Logger.Info("DogStatsD metrics are off", "why", to.source)
		return e, nil
	}
	o.Logger.Info("DogStatsD metrics are on", "address", to.addr, "from", to.source)
	if !to.resolve {
		client, err := e.dial(to.addr)
		if err != nil {
			return nil, fmt.Errorf("set up DogStatsD for %s: %w", to.addr, err)
		}
		e.client.Store(client)
		return e, nil
	}
	ctx, stop := context.WithCancel(context.Background())
	e.stop = stop
	e.wait.Go(func() { e.resolve(ctx) })
	return e, nil
}

// dial makes a client for an address that needs no look-up.
func (e *Emitter) dial(addr string) (*statsd.Client, error) {
	// The client's own metrics would come every 10 s, from each runner.
	return statsd.New(addr, append(e.clientOptions(), statsd.WithoutTelemetry())...)
}

func (e *Emitter) clientOptions() []statsd.Option {
	return []statsd.Option{
		// Without telemetry only the error handler knows of drops: it is called
		// once for each payload that was not written.
		statsd.WithErrorHandler(e.dropped),
		// The defaults are for servers: 32 workers with a buffer each, and up to
		// 4 MB of buffers made in advance.
		statsd.WithWorkersCount(1),
		statsd.WithBufferPoolSize(64),
		statsd.WithSenderQueueSize(256),
		statsd.WithWriteTimeout(100 * time.Millisecond),
		statsd.WithConnectTimeout(500 * time.Millisecond),
	}
}

// resolve waits for the agent's host name to resolve: in a pod that starts, DNS may
// come later. The client itself would resolve once, in New, and fail for good.
func (e *Emitter) resolve(ctx context.Context) {
	host, port, _ := net.SplitHostPort(e.target.addr)
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		look, cancel := context.WithTimeout(ctx, 10*time.Second)
		addrs, err := net.DefaultResolver.LookupHost(look, host)
		cancel()
		if err == nil && len(addrs) > 0 {
			var client *statsd.Client
			if client, err = e.dial(net.JoinHostPort(addrs[0], port)); err == nil {
				e.client.Store(client)
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		if !e.failed.Swap(true) {
			e.log.Warn("DogStatsD agent not found yet, metrics are dropped until it is", "host", host, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// dropped is called by the client for each payload that it gave up.
func (e *Emitter) dropped(err error) {
	e.payloads.Add(1)
	if !e.failed.Swap(true) {
		e.log.Warn("DogStatsD agent not reached, metrics are dropped until it is", "address", e.target.addr, "error", err)
	}
}

// Enabled reports whether metrics are sent at all.
func (e *Emitter) Enabled() bool { return e.target.addr != "" }

// Address returns where metrics go, and by which setting; the address is empty when
// they are off.
func (e *Emitter) Address() (addr, source string) { return e.target.addr, e.target.source }

// Dropped returns what did not reach the agent so far.
func (e *Emitter) Dropped() Drops {
	return Drops{Payloads: e.payloads.Load(), Samples: e.samples.Load()}
}

// Observe counts r. It does not wait and does not keep r.
func (e *Emitter) Observe(r *record.Record) {
	if e.target.addr == "" {
		return
	}
	client := e.client.Load()
	if client == nil {
		e.samples.Add(1)
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	now := e.opts.Now()
	e.tags.now = now.Unix()
	switch {
	case r.Kind == record.KindEvent && r.Event != nil:
		_ = client.Count(Events, 1, e.set(r, e.opts.EventTags), 1)
		if ev := r.Event; ev.Action == "die" && ev.DurationNS > 0 {
			_ = client.Distribution(ContainerDuration, seconds(ev.DurationNS), e.set(r, containerTags, e.opts.Tags), 1)
		}
	case r.Kind == record.KindInvocation && r.Invocation != nil:
		if !r.Invocation.Nested {
			_ = client.Count(Invocations, 1, e.set(r, invocationTags, e.opts.Tags), 1)
		}
	case r.Kind == record.KindInvocationEnd && r.End != nil:
		if r.End.DurationNS > 0 {
			_ = client.Distribution(InvocationDuration, seconds(r.End.DurationNS), e.set(r, endTags, e.opts.Tags), 1)
		}
	case r.Kind == record.KindLoss && r.Loss != nil:
		tags := e.set(r, lossTags)
		_ = client.Count(Losses, 1, tags, 1)
		if r.Loss.Count > 0 {
			_ = client.Count(LostRecords, r.Loss.Count, tags, 1)
		}
	}
	if n := e.payloads.Load(); n != e.reported && now.Sub(e.reportAt) >= reportEvery {
		_ = client.Count(DroppedPayloads, n-e.reported, nil, 1)
		e.reported, e.reportAt = n, now
	}
}

// Gauge sends a number of the agent's own. tags are name:value with values from closed
// sets, the configured sinks for one.
func (e *Emitter) Gauge(name string, v float64, tags []string) {
	if client := e.own(); client != nil {
		_ = client.Gauge(name, v, cleanTags(tags), 1)
	}
}

// Count adds to a counter of the agent's own; see Gauge.
func (e *Emitter) Count(name string, added int64, tags []string) {
	if client := e.own(); client != nil {
		_ = client.Count(name, added, cleanTags(tags), 1)
	}
}

// cleanTags makes tags that do not break a DogStatsD line.
func cleanTags(tags []string) []string {
	cleaned := make([]string, 0, len(tags))
	for _, t := range tags {
		name, value, _ := strings.Cut(t, ":")
		cleaned = append(cleaned, name+":"+clean(value, maxTag-len(name)-1))
	}
	return cleaned
}

// own is the client for samples that are of no record, or nil.
func (e *Emitter) own() *statsd.Client {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || e.target.addr == "" {
		return nil
	}
	return e.client.Load()
}

// set returns the tags of r by their names. The result is good until the next call;
// the client copies what it keeps.
func (e *Emitter) set(r *record.Record, names ...[]string) []string {
	e.scratch = e.scratch[:0]
	for _, list := range names {
		for _, name := range list {
			e.scratch = append(e.scratch, e.tags.tag(r, name))
		}
	}
	return e.scratch
}

func seconds(ns int64) float64 { return time.Duration(ns).Seconds() }

// Close sends what is waiting and ends the Emitter, until ctx ends: with an agent
// that does not read, the client's own Close took 4.5 s (each payload waits its
// write timeout). Then Close returns ctx's error, and what was waiting is dropped
// in the background.
func (e *Emitter) Close(ctx context.Context) error {
	e.mu.Lock()
	closed := e.closed
	e.closed = true
	e.mu.Unlock()
	if closed {
		return nil
	}
	e.stop()
	done := make(chan error, 1)
	go func() {
		e.wait.Wait()
		if client := e.client.Load(); client != nil {
			done <- client.Close()
			return
		}
		done <- nil
	}()
	select {
	case err := <-done:
		if err != nil && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("close DogStatsD client: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("flush DogStatsD metrics to %s: %w", e.target.addr, ctx.Err())
	}
}

// known checks names of tags against those that there are.
func known(what string, names []string, sets ...[]string) error {
	var all []string
	for _, s := range sets {
		all = append(all, s...)
	}
next:
	for _, n := range names {
		for _, k := range all {
			if n == k {
				continue next
			}
		}
		return fmt.Errorf("DogStatsD %s: no tag %q; there are: %s", what, n, strings.Join(all, ", "))
	}
	return nil
}
