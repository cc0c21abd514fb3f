package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/DataDog/datadog-go/v5/statsd"
	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// emitter makes an Emitter that closes with the test.
func emitter(t testing.TB, o Options) *Emitter {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet()
	}
	if o.Getenv == nil {
		o.Getenv = func(string) string { return "" }
	}
	e, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close(context.Background()) })
	return e
}

// agent is a socket that keeps every line it gets.
type agent struct {
	conn net.PacketConn
	addr string
	mu   sync.Mutex
	got  []string
	wg   sync.WaitGroup
}

func listen(t testing.TB, network, addr string) *agent {
	t.Helper()
	conn, err := net.ListenPacket(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{conn: conn, addr: conn.LocalAddr().String()}
	a.wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			a.mu.Lock()
			a.got = append(a.got, strings.Split(strings.TrimSuffix(string(buf[:n]), "\n"), "\n")...)
			a.mu.Unlock()
		}
	})
	t.Cleanup(func() { conn.Close(); a.wg.Wait() })
	return a
}

func (a *agent) lines() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.got)
}

// flush closes e and waits until its last lines have come.
func (a *agent) flush(t testing.TB, e *Emitter) []string {
	t.Helper()
	if err := e.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	for n := -1; n != len(a.lines()); time.Sleep(50 * time.Millisecond) {
		n = len(a.lines())
	}
	return a.lines()
}

// stripOrigin removes the fields of origin detection, which depend on the machine.
func stripOrigin(line string) string {
	return regexp.MustCompile(`\|[ce]:[^|]*`).ReplaceAllString(line, "")
}

func code(n int64) *int64 { return &n }

func job(workflow string) *record.CI {
	return &record.CI{Repository: "Octo-Org/App", Workflow: workflow, RunID: "42", Job: "build"}
}

func event(typ, action, image string, ci *record.CI) *record.Record {
	return &record.Record{Kind: record.KindEvent, CI: ci, Event: &record.Event{Type: typ, Action: action, Image: image}}
}

func TestLines(t *testing.T) {
	ci := job("Build")
	die := event("container", "die", "registry.test:5000/team/App:1@sha256:537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33", ci)
	die.Event.Image = strings.Replace(die.Event.Image, "App", "app", 1)
	die.Event.DurationNS, die.Event.ExitCode = 2500*int64(time.Millisecond), code(3)
	oom := event("container", "die", "docker.io/library/alpine:3", ci)
	oom.Event.DurationNS, oom.Event.ExitCode, oom.Event.OOM = int64(time.Second), code(137), true
	rows := []struct {
		name string
		o    Options
		r    *record.Record
		want []string
	}{
		{"an event", Options{}, event("image", "pull", "a:1", ci),
			[]string{"docker.events:1|c|#event_type:image,action:pull,repo:octo-org/app,workflow:build,run_id:42"}},
		{"an event of no job", Options{}, event("image", "pull", "a:1", nil),
			[]string{"docker.events:1|c|#event_type:image,action:pull,repo:none,workflow:none,run_id:none"}},
		{"type and action outside their sets", Options{}, event("image\n", "exec_start: sh -c secret", "", ci),
			[]string{"docker.events:1|c|#event_type:other,action:other,repo:octo-org/app,workflow:build,run_id:42"}},
		{"chosen tags", Options{EventTags: []string{"event_type", "action", "job", "image", "exit"}}, event("image", "pull", "a:1", ci),
			[]string{"docker.events:1|c|#event_type:image,action:pull,job:build,image:a,exit:none"}},
		{"the end of a container", Options{EventTags: []string{"action"}}, die,
			[]string{"docker.events:1|c|#action:die", "docker.container.duration:2.5|d|#image:registry.test:5000/team/app,exit:error,repo:octo-org/app,workflow:build"}},
		{"out of memory", Options{EventTags: []string{"action"}, Tags: []string{}}, oom,
			[]string{"docker.events:1|c|#action:die", "docker.container.duration:1|d|#image:alpine,exit:oom"}},
		{"an invocation", Options{}, &record.Record{Kind: record.KindInvocation, CI: ci, Invocation: &record.Invocation{Tool: "docker", Command: "buildx build"}},
			[]string{"docker.invocations:1|c|#tool:docker,command:buildx_build,repo:octo-org/app,workflow:build"}},
		{"no command", Options{}, &record.Record{Kind: record.KindInvocation, CI: ci, Invocation: &record.Invocation{Tool: "docker"}},
			[]string{"docker.invocations:1|c|#tool:docker,command:none,repo:octo-org/app,workflow:build"}},
		{"a command that is none", Options{}, &record.Record{Kind: record.KindInvocation, CI: ci, Invocation: &record.Invocation{Tool: "docker", Command: "hunter2"}},
			[]string{"docker.invocations:1|c|#tool:docker,command:other,repo:octo-org/app,workflow:build"}},
		{"a nested call is not counted", Options{}, &record.Record{Kind: record.KindInvocation, CI: ci, Invocation: &record.Invocation{Tool: "docker", Nested: true}}, nil},
		{"the end of an invocation", Options{}, &record.Record{Kind: record.KindInvocationEnd, CI: ci, End: &record.End{Tool: "docker", Command: "run", DurationNS: 1e9, ExitCode: code(125)}},
			[]string{"docker.invocation.duration:1|d|#tool:docker,command:run,exit:not_started,repo:octo-org/app,workflow:build"}},
		{"an end without a duration", Options{}, &record.Record{Kind: record.KindInvocationEnd, End: &record.End{Tool: "docker", Source: "unknown"}}, nil},
		{"a loss", Options{}, &record.Record{Kind: record.KindLoss, Loss: &record.Loss{Cause: "queue_full", Count: 17, Source: "events"}},
			[]string{"tallyman.losses:1|c|#cause:queue_full,source:events", "tallyman.lost_records:17|c|#cause:queue_full,source:events"}},
		{"a loss of unknown size", Options{}, &record.Record{Kind: record.KindLoss, Loss: &record.Loss{Cause: "stream_gap", Count: -1, Source: "events"}},
			[]string{"tallyman.losses:1|c|#cause:stream_gap,source:events"}},
		{"a job's start", Options{}, &record.Record{Kind: record.KindJobStart, Job: &record.Job{}}, nil},
		{"a record without its object", Options{}, &record.Record{Kind: record.KindEvent}, nil},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			a := listen(t, "udp", "127.0.0.1:0")
			row.o.Addr = a.addr
			e := emitter(t, row.o)
			e.Observe(row.r)
			var got []string
			for _, l := range a.flush(t, e) {
				got = append(got, stripOrigin(l))
			}
			slices.Sort(got)
			want := slices.Sorted(slices.Values(row.want))
			if !slices.Equal(got, want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

// grammar is one line of DogStatsD with nothing in it that a parser could take for
// more than one name, value or tag.
var grammar = regexp.MustCompile(`^[a-z][a-z0-9_.]*:[0-9.]+\|[cd]\|#[a-z_]+:[a-z0-9_\-:./]+(,[a-z_]+:[a-z0-9_\-:./]+)*$`)

var hostileWorkflows = []string{
	"Build, test | deploy #1", "a\nb:1|c|#x:y", "ci\r\n", "日本語", "部署", "naïve ☕", "|c|#", ",,,", "\x00\x1b[31m", strings.Repeat("long ", 1000),
	"__other__", "tab\there", "a\u2028b", "\xff\xfe", "UPPER", "@0.1", "#", "e:1", "trailing_", " ", ".",
}

func TestHostileValues(t *testing.T) {
	faults.Case(t, "SE-10")
	a := listen(t, "udp", "127.0.0.1:0")
	e := emitter(t, Options{Addr: a.addr, Tags: jobTags, EventTags: append(slices.Clone(eventTags), jobTags...)})
	for _, w := range hostileWorkflows {
		ci := &record.CI{Repository: w, Owner: w, Workflow: w, Job: w, RunID: w, EventName: w, Runner: &record.Runner{Name: w}}
		die := event(w, w, w, ci)
		e.Observe(die)
		die = event("container", "die", w, ci)
		die.Event.DurationNS = 1
		e.Observe(die)
		e.Observe(&record.Record{Kind: record.KindInvocation, CI: ci, By: record.By(w), Invocation: &record.Invocation{Tool: w, Command: w}})
		e.Observe(&record.Record{Kind: record.KindLoss, Loss: &record.Loss{Cause: w, Source: w, Count: math.MaxInt64}})
	}
	lines := a.flush(t, e)
	if len(lines) < 3*len(hostileWorkflows)-10 {
		t.Errorf("only %d lines", len(lines))
	}
	for _, l := range lines {
		if l = stripOrigin(l); !grammar.MatchString(l) {
			t.Errorf("line is outside the grammar: %q", l)
		}
		_, tags, _ := strings.Cut(l, "#")
		for tag := range strings.SplitSeq(tags, ",") {
			if len(tag) > maxTag {
				t.Errorf("tag of %d bytes", len(tag))
			}
		}
	}
}

func TestClean(t *testing.T) {
	rows := []struct{ in, want string }{
		{"", "none"},
		{"Build, test | deploy #1", "build_test_deploy_1"},
		{"octo-org/App", "octo-org/app"},
		{"registry:5000/a.b", "registry:5000/a.b"},
		{"a\nb", "a_b"},
		{"  x  ", "x"},
		{"__other__", "other"},
		{"naïve", "na_ve"},
		{"日本語", "unnamed_805f5ce7"},
		{strings.Repeat("x", 300), strings.Repeat("x", 190)},
	}
	for _, r := range rows {
		if got := clean(r.in, 190); got != r.want {
			t.Errorf("clean(%q) = %q, want %q", r.in, got, r.want)
		}
	}
	if clean("日本語", 190) == clean("部署", 190) {
		t.Error("two names became one")
	}
}

// FuzzClean: every value is a legal one, not empty, not too long, never the
// overflow's, and cleaning twice changes nothing.
func FuzzClean(f *testing.F) {
	for _, w := range hostileWorkflows {
		f.Add(w)
	}
	legal := regexp.MustCompile(`^[a-z0-9\-:./][a-z0-9_\-:./]*$`)
	f.Fuzz(func(t *testing.T, s string) {
		got := clean(s, 190)
		if !legal.MatchString(got) || len(got) > 190 || strings.Contains(got, "__") || got == overflow {
			t.Errorf("clean(%q) = %q", s, got)
		}
		if again := clean(got, 190); again != got {
			t.Errorf("clean(%q) = %q", got, again)
		}
	})
}

func TestRepository(t *testing.T) {
	for in, want := range map[string]string{
		"": "none", "alpine": "alpine", "alpine:3": "alpine", "docker.io/library/alpine": "alpine", "grafana/grafana:1": "grafana/grafana",
		"r.test:5000/a/b": "r.test:5000/a/b", "r.test:5000/a/b:c@sha256:537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33": "r.test:5000/a/b",
		"sha256:537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33": "image_id", "user:pw@host/x": "other",
	} {
		if got := repository(in); got != want {
			t.Errorf("repository(%q) = %q, want %q", in, got, want)
		}
	}
}

// The closed sets are those of package events, so that neither grows alone.
func TestClosedSets(t *testing.T) {
	faults.Case(t, "SE-10")
	for _, s := range []struct {
		name string
		got  map[string]bool
		want []string
	}{{"types", eventTypes, events.Types()}, {"actions", eventActions, events.Actions()}} {
		for _, w := range s.want {
			if !s.got[w] {
				t.Errorf("%s: %q is missing here", s.name, w)
			}
		}
		if len(s.got) != len(s.want) {
			t.Errorf("%s: %d here, %d in events", s.name, len(s.got), len(s.want))
		}
	}
}

// Whatever a job names its links to the shim, and whatever it sends the agent as
// commands: the tags tool and command have no value that is not ours, and none of ours
// loses its place to those.
func TestToolsAndCommandsAreClosed(t *testing.T) {
	faults.Case(t, "SE-10")
	a := listen(t, "udp", "127.0.0.1:0")
	e := emitter(t, Options{Addr: a.addr, Tags: []string{}, MaxValues: 5, Tools: []string{"Terraform"}})
	call := func(tool, command string) {
		e.Observe(&record.Record{Kind: record.KindInvocation, By: record.BySealed, CI: job("w"), Invocation: &record.Invocation{Tool: tool, Command: command}})
	}
	for i := range 1000 {
		call(fmt.Sprint("docker", i), "pull")
		call("docker", fmt.Sprint("pull", i))
		call("docker", strings.Repeat("pull ", i)+"run")
	}
	known := 0
	for command := range commands {
		if command != "" && command != other {
			call("podman", command)
			known++
		}
	}
	if known < 300 {
		t.Errorf("only %d commands are known", known)
	}
	call("Terraform", "")
	call("docker-compose", "up")
	call("docker", "buildx imagetools create")
	call("other", "other")
	call("", "run")
	got := map[string]string{}
	podman := 0
	for _, l := range a.flush(t, e) {
		name, tags, _ := strings.Cut(stripOrigin(l), "|c|#")
		if strings.HasPrefix(tags, "tool:podman,") {
			podman++
			continue
		}
		got[tags] = strings.TrimPrefix(name, "docker.invocations:")
	}
	want := map[string]string{
		"tool:other,command:pull": "1000", "tool:docker,command:other": "1999", "tool:docker,command:run": "1",
		"tool:terraform,command:none": "1", "tool:docker-compose,command:up": "1", "tool:docker,command:buildx_imagetools_create": "1",
		"tool:other,command:other": "1", "tool:none,command:run": "1",
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	if podman != known {
		t.Errorf("%d of %d commands have a series", podman, known)
	}
}

// workflows are the values of the tag in lines of docker.events that have no other.
func workflows(lines []string) map[string]bool {
	values := map[string]bool{}
	for _, l := range lines {
		_, tag, _ := strings.Cut(stripOrigin(l), "|c|#workflow:")
		values[tag] = true
	}
	return values
}

func TestCardinality(t *testing.T) {
	faults.Case(t, "SE-10")
	a := listen(t, "udp", "127.0.0.1:0")
	now := time.Unix(1_800_000_000, 0)
	e := emitter(t, Options{Addr: a.addr, MaxValues: 5, EventTags: []string{"workflow"}, Now: func() time.Time { return now }})
	for i := range 1000 {
		e.Observe(event("image", "pull", "", job(fmt.Sprint("w", i))))
		e.Observe(event("image", "pull", "", job(fmt.Sprint("W", i%5)))) // same values, other case: still one place
	}
	now = now.Add(2 * time.Hour) // all idle: their places are free
	for i := range 5 {
		e.Observe(event("image", "pull", "", job(fmt.Sprint("late", i))))
	}
	e.Observe(event("image", "pull", "", job("later still")))
	count := map[string]string{}
	for _, l := range a.flush(t, e) {
		value, tag, _ := strings.Cut(stripOrigin(l), "|c|#workflow:")
		count[tag] = strings.TrimPrefix(value, "docker.events:")
	}
	want := map[string]string{"w0": "201", "w1": "201", "w2": "201", "w3": "201", "w4": "201", "__other__": "996",
		"late0": "1", "late1": "1", "late2": "1", "late3": "1", "late4": "1"}
	for k, v := range want {
		if count[k] != v {
			t.Errorf("workflow:%s counted %q, want %q", k, count[k], v)
		}
	}
	if len(count) != len(want) {
		t.Errorf("%d values, want %d: %v", len(count), len(want), count)
	}
}

// README and SECURITY.md promise this bound where nothing else is set.
func TestPlacesOfATag(t *testing.T) {
	a := listen(t, "udp", "127.0.0.1:0")
	e := emitter(t, Options{Addr: a.addr, EventTags: []string{"workflow"}})
	for i := range 300 {
		r := event("image", "pull", "", job(fmt.Sprint("w", i)))
		r.By = record.BySealed
		e.Observe(r)
	}
	values := workflows(a.flush(t, e))
	if len(values) != 201 || !values["__other__"] {
		t.Errorf("%d values, want 200 and __other__", len(values))
	}
}

// A job that no hook sealed can call itself anything; with a thousand names it must
// not make the others nameless.
func TestClaimedNamesDoNotTakeAllPlaces(t *testing.T) {
	faults.Case(t, "AB-10")
	a := listen(t, "udp", "127.0.0.1:0")
	e := emitter(t, Options{Addr: a.addr, MaxValues: 10, EventTags: []string{"workflow"}})
	for i := range 1000 {
		r := event("image", "pull", "", job(fmt.Sprint("claimed", i)))
		r.By = record.ByEnvironment
		e.Observe(r)
	}
	for i := range 5 {
		r := event("image", "pull", "", job(fmt.Sprint("sealed", i)))
		r.By = record.BySealed
		e.Observe(r)
	}
	values := workflows(a.flush(t, e))
	for i := range 5 {
		if !values[fmt.Sprint("sealed", i)] {
			t.Errorf("workflow sealed%d lost its name: %v", i, values)
		}
	}
	if len(values) != 11 {
		t.Errorf("%d values, want 5 claimed, 5 sealed and the rest: %v", len(values), values)
	}
}

func TestAddress(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "dsd.socket")
	env := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	rows := []struct {
		name     string
		explicit string
		env      map[string]string
		socket   bool
		addr     string
		source   string
		resolve  bool
		warn     bool
	}{
		{name: "nothing is set", addr: "", source: "no DD_DOGSTATSD_URL"},
		{name: "off beats all", explicit: "off", env: env("DD_AGENT_HOST", "10.0.0.1"), socket: true, addr: "", source: "configured off"},
		{name: "explicit beats all", explicit: "127.0.0.1:9125", env: env("DD_DOGSTATSD_URL", "udp://10.0.0.1"), socket: true, addr: "127.0.0.1:9125", source: "configuration"},
		{name: "explicit name", explicit: "udp://statsd.monitoring", addr: "statsd.monitoring:8125", source: "configuration", resolve: true},
		{name: "explicit stream socket", explicit: "unixstream:///run/dsd", addr: "unixstream:///run/dsd", source: "configuration"},
		{name: "URL beats socket and host", env: env("DD_DOGSTATSD_URL", "udp://10.0.0.1:1234", "DD_AGENT_HOST", "10.0.0.2"), socket: true, addr: "10.0.0.1:1234", source: "DD_DOGSTATSD_URL"},
		{name: "URL with IPv6", env: env("DD_DOGSTATSD_URL", "udp://[fd00::1]:8125"), addr: "[fd00::1]:8125", source: "DD_DOGSTATSD_URL"},
		{name: "URL that the client ignores", env: env("DD_DOGSTATSD_URL", "unixgram:///run/dsd.socket"), addr: "unixgram:///run/dsd.socket", source: "DD_DOGSTATSD_URL"},
		{name: "URL of no use falls through", env: env("DD_DOGSTATSD_URL", "tcp://10.0.0.1", "DD_AGENT_HOST", "10.0.0.2"), addr: "10.0.0.2:8125", source: "DD_AGENT_HOST", warn: true},
		{name: "socket beats host", env: env("DD_AGENT_HOST", "10.0.0.2"), socket: true, addr: "unix://" + socket, source: "the socket file exists"},
		{name: "host", env: env("DD_AGENT_HOST", "10.0.0.2"), addr: "10.0.0.2:8125", source: "DD_AGENT_HOST"},
		{name: "host and port", env: env("DD_AGENT_HOST", "10.0.0.2", "DD_DOGSTATSD_PORT", "18125"), addr: "10.0.0.2:18125", source: "DD_AGENT_HOST"},
		{name: "IPv6 host", env: env("DD_AGENT_HOST", "fd00::1"), addr: "[fd00::1]:8125", source: "DD_AGENT_HOST"},
		{name: "IPv6 host in brackets", env: env("DD_AGENT_HOST", "[fd00::1]"), addr: "[fd00::1]:8125", source: "DD_AGENT_HOST"},
		{name: "service name", env: env("DD_AGENT_HOST", "datadog-agent.datadog.svc"), addr: "datadog-agent.datadog.svc:8125", source: "DD_AGENT_HOST", resolve: true},
		{name: "port that is none", env: env("DD_AGENT_HOST", "10.0.0.2", "DD_DOGSTATSD_PORT", "x"), addr: "", source: "no DD_DOGSTATSD_URL", warn: true},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			path := socket + ".none"
			if r.socket {
				path = socket
				l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
				if err != nil {
					t.Fatal(err)
				}
				defer os.Remove(socket)
				defer l.Close()
			}
			got, err := findAgent(r.explicit, func(k string) string { return r.env[k] }, path)
			if err != nil {
				t.Fatal(err)
			}
			if got.addr != r.addr || !strings.HasPrefix(got.source, r.source) || got.resolve != r.resolve || (len(got.warnings) > 0) != r.warn {
				t.Errorf("got %+v", got)
			}
		})
	}
	for _, bad := range []string{"tcp://x", "unix://relative", "host:0", "host:port", "a b", "user@host:1", "udp://"} {
		if got, err := findAgent(bad, os.Getenv, ""); err == nil {
			t.Errorf("%q was accepted: %+v", bad, got)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{{EventTags: []string{"sha"}}, {Tags: []string{"event_type"}}, {Addr: "tcp://x"}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
	var logs bytes.Buffer
	e := emitter(t, Options{Addr: "off", Logger: slog.New(slog.NewTextHandler(&logs, nil))})
	e.Observe(event("image", "pull", "", nil))
	if e.Enabled() || e.Dropped() != (Drops{}) || strings.Count(logs.String(), "\n") != 1 {
		t.Errorf("off: %v %+v %s", e.Enabled(), e.Dropped(), &logs)
	}
}

// observeMany observes n events and returns the longest time one took.
func observeMany(e *Emitter, n int) (worst time.Duration) {
	r := event("image", "pull", "", job("w"))
	for range n {
		begin := time.Now()
		e.Observe(r)
		worst = max(worst, time.Since(begin))
	}
	return worst
}

// An absent agent costs the caller nothing, and its payloads are counted as
// the client's own telemetry counts them.
func TestAbsentAgent(t *testing.T) {
	faults.Case(t, "SP-33")
	free := listen(t, "udp", "127.0.0.1:0")
	addr := free.addr
	free.conn.Close()
	for name, addr := range map[string]string{"udp": addr, "socket": "unix://" + filepath.Join(t.TempDir(), "none.socket")} {
		t.Run(name, func(t *testing.T) {
			e := emitter(t, Options{Addr: addr})
			e.client.Load().Close()
			// The same client with its telemetry, without merging, so that many
			// payloads leave soon.
			client, err := statsd.New(addr, append(e.clientOptions(), statsd.WithoutClientSideAggregation(), statsd.WithMaxMessagesPerPayload(10))...)
			if err != nil {
				t.Fatal(err)
			}
			e.client.Store(client)
			// Waiting for the network would do so thousands of times; a busy machine alone
			// may take some of one call.
			if worst := observeMany(e, 5000); worst > 3*time.Second {
				t.Errorf("one Observe took %v", worst)
			}
			if err := e.Close(context.Background()); err != nil {
				t.Error(err)
			}
			tel := client.GetTelemetry()
			if got := e.Dropped().Payloads; got == 0 || uint64(got) != tel.TotalPayloadsDroppedWriter+tel.TotalPayloadsDroppedQueueFull {
				t.Errorf("%d payloads counted as dropped, the client's telemetry says %d and %d", got, tel.TotalPayloadsDroppedWriter, tel.TotalPayloadsDroppedQueueFull)
			}
		})
	}
}

// An agent that does not read blocks neither Observe nor, for long, Close.
func TestStuckAgent(t *testing.T) {
	faults.Case(t, "SP-34")
	dir := t.TempDir()
	gram := filepath.Join(dir, "gram")
	g, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: gram, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	stream := filepath.Join(dir, "stream")
	s, err := net.Listen("unix", stream)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, addr := range []string{"unix://" + gram, "unix://" + stream} {
		e := emitter(t, Options{Addr: addr, MaxValues: 1 << 20, EventTags: []string{"workflow"}})
		var worst time.Duration
		ci := job("")
		for i := range 30000 { // each its own series: merging would save the day
			ci.Workflow = fmt.Sprintf("%s-%d", strings.Repeat("w", 150), i)
			begin := time.Now()
			e.Observe(event("image", "pull", "", ci))
			worst = max(worst, time.Since(begin))
		}
		// Waiting for the agent would take the client's write timeout, 100 ms, for each
		// of hundreds of payloads; a busy machine alone may take some of one.
		if worst > 3*time.Second {
			t.Errorf("%s: one Observe took %v", addr, worst)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		begin := time.Now()
		err := e.Close(ctx)
		cancel()
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("%s: Close took %v", addr, took)
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: Close returned %v: was the agent not stuck?", addr, err)
		}
		t.Logf("%s: worst Observe %v, dropped %+v", addr, worst, e.Dropped())
	}
	// The abandoned closings end by themselves: let goleak see it.
	g.Close()
	s.Close()
	for deadline := time.Now().Add(30 * time.Second); goleak.Find(goleak.IgnoreCurrent()) != nil && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
	}
}

// An agent that comes late gets what happens from then on, and the count of what
// it missed.
func TestLateAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dsd.socket")
	now := time.Now()
	var mu sync.Mutex
	e := emitter(t, Options{Addr: "unix://" + path, Now: func() time.Time { mu.Lock(); defer mu.Unlock(); return now }})
	e.Observe(event("image", "pull", "", job("early")))
	for e.Dropped().Payloads == 0 {
		time.Sleep(20 * time.Millisecond)
	}
	missed := e.Dropped().Payloads
	a := listen(t, "unixgram", path)
	mu.Lock()
	now = now.Add(reportEvery)
	mu.Unlock()
	e.Observe(event("image", "pull", "", job("late")))
	all := strings.Join(a.flush(t, e), "\n")
	if !strings.Contains(all, "workflow:late") || strings.Contains(all, "workflow:early") {
		t.Errorf("the late agent got\n%s", all)
	}
	if want := fmt.Sprintf("tallyman.metrics.dropped_payloads:%d|c", missed); !strings.Contains(all, want) {
		t.Errorf("no %s in\n%s", want, all)
	}
}

func TestNameThatDoesNotResolve(t *testing.T) {
	e := emitter(t, Options{Addr: "no-such-host.invalid:8125"})
	observeMany(e, 7)
	if got := e.Dropped().Samples; got != 7 {
		t.Errorf("%d samples counted, want 7", got)
	}
	begin := time.Now()
	if err := e.Close(context.Background()); err != nil || time.Since(begin) > 10*time.Second {
		t.Errorf("Close: %v after %v", err, time.Since(begin))
	}
	// localhost needs no DNS server.
	a := listen(t, "udp", "127.0.0.1:0")
	_, port, _ := net.SplitHostPort(a.addr)
	e = emitter(t, Options{Addr: "localhost:" + port})
	for e.client.Load() == nil {
		time.Sleep(5 * time.Millisecond)
	}
	observeMany(e, 3)
	if lines := a.flush(t, e); len(lines) != 1 || !strings.HasPrefix(lines[0], "docker.events:3|c") {
		t.Errorf("got %q", lines)
	}
}

// DD_ENTITY_ID, by which the agent finds the pod, is on every line.
func TestEntityID(t *testing.T) {
	t.Setenv("DD_ENTITY_ID", "0b4e5c5a-pod-uid")
	a := listen(t, "udp", "127.0.0.1:0")
	e := emitter(t, Options{Addr: a.addr})
	observeMany(e, 1)
	if lines := a.flush(t, e); len(lines) != 1 || !strings.Contains(lines[0], "dd.internal.entity_id:0b4e5c5a-pod-uid") {
		t.Errorf("got %q", lines)
	}
}

func TestConcurrentUse(t *testing.T) {
	a := listen(t, "udp", "127.0.0.1:0")
	e := emitter(t, Options{Addr: a.addr})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 500 {
				e.Observe(event("image", "pull", "", job(fmt.Sprint("w", i, j%20))))
				e.Dropped()
			}
		})
	}
	wg.Wait()
	total := 0
	for _, l := range a.flush(t, e) {
		var n int
		fmt.Sscanf(l, "docker.events:%d|c", &n)
		total += n
	}
	if total != 4000 {
		t.Errorf("%d events counted, want 4000", total)
	}
	e.Observe(event("image", "pull", "", nil)) // after Close: nothing, and no panic
}

// TestRealParser sends hostile workflow names and the events of a real daemon
// through a real parser, prometheus/statsd_exporter, and reads its page.
func TestRealParser(t *testing.T) {
	bin := exporter(t)
	udp, web := freePort(t, "udp"), freePort(t, "tcp")
	var logs bytes.Buffer
	cmd := exec.Command(bin, "--statsd.listen-udp="+udp, "--statsd.listen-tcp=", "--web.listen-address="+web, "--log.level=debug")
	cmd.Stdout, cmd.Stderr = &logs, &logs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	page := func() string {
		resp, err := http.Get("http://" + web + "/metrics")
		if err != nil {
			return ""
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	defer http.DefaultClient.CloseIdleConnections()
	for deadline := time.Now().Add(20 * time.Second); page() == ""; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("statsd_exporter did not come up:\n%s", &logs)
		}
	}

	e := emitter(t, Options{Addr: udp})
	for i, w := range hostileWorkflows {
		for range i + 1 {
			e.Observe(event("image", "pull", "", job(w)))
		}
	}
	data, err := os.ReadFile("../events/testdata/events-sample.golden.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	real := 0
	for line := range bytes.Lines(data) {
		var r record.Record
		if err := recordjson.Unmarshal(line, &r); err != nil {
			t.Fatal(err)
		}
		r.CI = job("real")
		e.Observe(&r)
		real++
	}
	e.Observe(&record.Record{Kind: record.KindInvocation, CI: job("real"), Invocation: &record.Invocation{Tool: "docker", Command: "image pull"}})
	if err := e.Close(context.Background()); err != nil {
		t.Fatal(err)
	}

	want := []string{
		`docker_events{action="pull",event_type="image",repo="octo-org/app",run_id="42",workflow="build_test_deploy_1"} 1`,
		`docker_events{action="pull",event_type="image",repo="octo-org/app",run_id="42",workflow="a_b:1_c_x:y"} 2`,
		`docker_events{action="die",event_type="container",repo="octo-org/app",run_id="42",workflow="real"} `,
		`docker_events{action="exec_create",event_type="container",repo="octo-org/app",run_id="42",workflow="real"} `,
		`docker_invocations{command="image_pull",repo="octo-org/app",tool="docker",workflow="real"} 1`,
		`docker_container_duration_count{exit="error",image="evt-bk",repo="octo-org/app",workflow="real"} `,
		`statsd_exporter_tag_errors_total 0`,
	}
	var got string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		got = page()
		if strings.Contains(got, want[4]) {
			break
		}
	}
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("not on the page: %s", w)
		}
	}
	// Every sample arrived, and none broke into pieces.
	total := 0.0
	for l := range strings.Lines(got) {
		if strings.HasPrefix(l, "docker_events{") {
			var n float64
			fmt.Sscan(l[strings.LastIndex(l, " ")+1:], &n)
			total += n
		}
		if strings.HasPrefix(l, "statsd_exporter_sample_errors_total") && !strings.HasSuffix(strings.TrimSpace(l), " 0") {
			t.Errorf("the parser refused a line: %s", l)
		}
	}
	if n := len(hostileWorkflows); int(total) != n*(n+1)/2+real {
		t.Errorf("%v events on the page, want %d", total, n*(n+1)/2+real)
	}
	if t.Failed() {
		for l := range strings.Lines(got) {
			if strings.HasPrefix(l, "docker_") || strings.HasPrefix(l, "tallyman_") || strings.Contains(l, "error") {
				t.Log(strings.TrimSpace(l))
			}
		}
	}
}

// exporter returns the path of statsd_exporter, built from its module.
func exporter(t *testing.T) string {
	t.Helper()
	const version = "v0.31.0"
	dir, err := filepath.Abs("../.cache/bin/statsd_exporter-" + version)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "statsd_exporter")
	if _, err := os.Stat(bin); err == nil {
		return bin
	}
	cmd := exec.Command("go", "install", "github.com/prometheus/statsd_exporter@"+version)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=-mod=mod")
	if out, err := cmd.CombinedOutput(); err != nil {
		require.Missing(t, fmt.Sprintf("a real DogStatsD parser, for which the Go module proxy is asked once (statsd_exporter %s): %v\n%s", version, err, out))
	}
	return bin
}

func freePort(t *testing.T, network string) string {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.LocalAddr().String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// BenchmarkObserve is the cost of one event, without the sending, which merging
// makes rare.
func BenchmarkObserve(b *testing.B) {
	a := listen(b, "udp", "127.0.0.1:0")
	e := emitter(b, Options{Addr: a.addr})
	r := event("image", "pull", "alpine:3", job("Build, test | deploy #1"))
	b.ReportAllocs()
	for b.Loop() {
		e.Observe(r)
	}
}
