package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/logging/apiv2/loggingpb"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"cloud.google.com/go/pubsub/v2/pstest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/e2e/runnertest"
	"github.com/tallyman-ci/tallyman/internal/forwardtest"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// google is a Cloud Logging and a Pub/Sub of this machine: the one models the call
// WriteLogEntries, the other is Google's own fake. Both note what they took.
type google struct {
	loggingpb.UnimplementedLoggingServiceV2Server
	addr string

	mu      sync.Mutex
	refuse  string // Pub/Sub takes no message that has this in it
	entries map[string]string
	rows    map[string]string // the data of messages, by the attribute id
}

func (g *google) WriteLogEntries(_ context.Context, r *loggingpb.WriteLogEntriesRequest) (*loggingpb.WriteLogEntriesResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range r.Entries {
		g.entries[e.InsertId] = e.LogName + r.LogName
	}
	return &loggingpb.WriteLogEntriesResponse{}, nil
}

func (g *google) publish(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	request, ok := req.(*pubsubpb.PublishRequest)
	if !ok {
		return handler(ctx, req)
	}
	g.mu.Lock()
	refuse := g.refuse
	g.mu.Unlock()
	for _, m := range request.Messages {
		if refuse != "" && bytes.Contains(m.Data, []byte(refuse)) {
			return nil, status.Error(codes.InvalidArgument, "the message does not fit the schema")
		}
	}
	answer, err := handler(ctx, req)
	if err == nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, m := range request.Messages {
			g.rows[m.Attributes["id"]] = string(m.Data)
		}
	}
	return answer, err
}

func (g *google) set(refuse string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.refuse = refuse
}

// ids are the ids that Cloud Logging and Pub/Sub have.
func (g *google) ids() (logging, pubsub []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Sorted(maps.Keys(g.entries)), slices.Sorted(maps.Keys(g.rows))
}

func newGoogle(t *testing.T) *google {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &google{addr: l.Addr().String(), entries: map[string]string{}, rows: map[string]string{}}
	fake := pstest.NewServer()
	t.Cleanup(func() {
		if err := fake.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := fake.GServer.CreateTopic(t.Context(), &pubsubpb.Topic{Name: "projects/ci-test/topics/records"}); err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(20<<20), grpc.UnaryInterceptor(g.publish))
	loggingpb.RegisterLoggingServiceV2Server(server, g)
	pubsubpb.RegisterPublisherServer(server, &fake.GServer)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return g
}

// tallyman runs a command of the built program as the agent's user would.
func (l *lone) tallyman(args ...string) (output string, err error) {
	cmd := exec.Command(filepath.Join(built, "tallyman"), args...)
	cmd.Env = l.command().Env
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// sinkStatus is what the agent says of its sinks.
func (l *lone) sinkStatus(t *testing.T) map[string]sinks.Status {
	t.Helper()
	out, err := l.tallyman("status", "--json")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var s agent.Status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	byName := map[string]sinks.Status{}
	for _, k := range s.Sinks {
		byName[k.Name] = k
	}
	return byName
}

// One agent delivers the same records to a file, a Forward server, Cloud Logging and
// Pub/Sub. While one of them stalls and one refuses a record the others go on, and the
// status says of each how it stands; in the end all have the same records.
func TestTheSameRecordsReachEverySink(t *testing.T) {
	forward := forwardtest.New(t, "0")
	forward.Start()
	g := newGoogle(t)
	dir := shm(t)
	l, err := newLone(dir, "sinks = file://"+dir+"/out.jsonl?name=file&keep=0 "+forward.URL("name=fluent&ack_timeout=1s")+
		" pubsub://ci-test/records?name=pubsub&plaintext=true&endpoint="+g.addr+
		" cloudlogging://ci-test/records?name=logging&resource=generic_node&plaintext=true&endpoint="+g.addr)
	if err != nil {
		t.Fatal(err)
	}
	p := l.mustStart(t, l.command())
	send := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if _, line := callRecord(name); l.send(line) != "acked" {
				t.Fatalf("%s was not acknowledged", name)
			}
		}
	}
	sets := func() map[string][]string {
		t.Helper()
		file, _, err := l.delivered()
		if err != nil {
			t.Fatal(err)
		}
		journal, _, err := readAll(l.journal())
		if err != nil {
			t.Fatal(err)
		}
		events := map[string]bool{}
		for _, e := range forward.Received() {
			events[e.ID()] = true
		}
		all := map[string][]string{"journal": slices.Sorted(maps.Keys(journal)), "file": slices.Sorted(maps.Keys(file)), "fluent": slices.Sorted(maps.Keys(events))}
		all["logging"], all["pubsub"] = g.ids()
		return all
	}
	wantSame := func(least int) {
		t.Helper()
		all := sets()
		if n := len(all["journal"]); n < least {
			t.Errorf("%d records in the journal, want %d", n, least)
		}
		for name, ids := range all {
			if !slices.Equal(ids, all["journal"]) {
				t.Errorf("%s has %d records, or others than the %d of the journal", name, len(ids), len(all["journal"]))
			}
		}
	}

	var names []string
	for i := range 50 {
		names = append(names, fmt.Sprintf("call-%d", i))
	}
	send(names...)
	l.mustFlush(t)
	wantSame(50)
	total := int64(len(sets()["journal"]))
	for name, s := range l.sinkStatus(t) {
		if s.Delivered != total || s.BehindRecords != 0 || s.Refused != 0 || s.Dropped != 0 {
			t.Errorf("%s: %+v, want %d delivered", name, s, total)
		}
	}

	// One stalls, one refuses a record.
	forward.Signal(syscall.SIGSTOP)
	g.set("odd-one-out")
	send("more-1", "odd-one-out", "more-2")
	eventually(t, time.Minute, func() error {
		s := l.sinkStatus(t)
		f, ps := s["fluent"], s["pubsub"]
		switch {
		case s["file"].Delivered != total+3 || s["file"].State != sinks.StateIdle || s["logging"].Delivered != total+3:
		case ps.Delivered != total+2 || ps.State != sinks.StateIdle || ps.Refused != 1 || ps.Dropped != 0:
		case f.State != sinks.StateRetrying || f.BehindRecords != 3 || f.BehindSeconds <= 0 || !strings.Contains(f.LastError, "did not acknowledge"):
		default:
			return nil
		}
		return fmt.Errorf("status %+v", s)
	})
	out, err := l.tallyman("status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("sink      file: idle, 0 records and 0.0 s behind; %d delivered, 0 refused, 0 dropped\n", total+3),
		"sink      fluent: retrying, 3 records and ",
		fmt.Sprintf(" s behind; %d delivered, 0 refused, 0 dropped\n", total),
		"ago: the Forward receiver at 127.0.0.1:" + forward.Listen + " did not acknowledge",
		fmt.Sprintf("sink      pubsub: idle, 0 records and 0.0 s behind; %d delivered, 1 refused, 0 dropped\n", total+2),
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the status does not say %q:\n%s", want, out)
		}
	}

	// Both mend.
	forward.Signal(syscall.SIGCONT)
	g.set("")
	if out, err := l.tallyman("replay", "--quarantine"); err != nil || !strings.Contains(out, "pubsub: 1 delivered, 0 refused") {
		t.Errorf("replay: %v: %s", err, out)
	}
	l.mustFlush(t)
	wantSame(53)
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	if said := p.output.String(); said != "" {
		t.Errorf("the agent's output is its log's, and a library printed %q", said)
	}
}

// A hook starts the agent with its output on /dev/null. What is written there must not
// count as delivered.
func TestStandardOutputThatIsNowhere(t *testing.T) {
	dir := shm(t)
	l, err := newLone(dir, "sinks = stdout:?format=gke file://"+dir+"/out.jsonl?name=file&keep=0")
	if err != nil {
		t.Fatal(err)
	}
	cmd := l.command()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd.Stdout = null
	l.mustStart(t, cmd)
	if _, line := callRecord("a"); l.send(line) != "acked" {
		t.Fatal("the record was not acknowledged")
	}
	l.mustFlush(t)
	if s := l.sinkStatus(t); len(s) != 1 || s["file"].Delivered < 1 {
		t.Errorf("the sinks are %+v", s)
	}
	if out, err := l.tallyman("status"); err != nil || !strings.Contains(out, "problem   sink stdout: the agent's standard output is /dev/null") {
		t.Errorf("%v: %s", err, out)
	}
}

// A job ends while two of three sinks are dead. The hook keeps to its time, the job does
// not notice, and hook and log say of each sink how much it lacks.
func TestJobCompletedSaysWhatIsLeft(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // it takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	missing := filepath.Join(t.TempDir(), "missing")
	out := filepath.Join(t.TempDir(), "out.jsonl")
	r := newStubRig(t, "sinks = file://"+missing+"/out.jsonl?name=dead file://"+out+"?name=well&keep=0 fluent://"+silent.Addr().String()+"?name=silent&ack_timeout=300ms")
	// The hook's time is short, and a machine may be too busy for the answer to come in it:
	// then the next job's hook shall say it.
	said := ""
	for range 5 {
		j := r.job(runnertest.Spec{Repository: "acme/shop", Workflow: "CI", Job: "build"})
		for i := range 3 {
			r.step(j, fmt.Sprintf("s%d", i), 0, "docker pull code-0")
		}
		hook, _, err := j.Complete(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		said = hook.Stdout
		if hook.Code != 0 || hook.Held || strings.Count(hook.Stdout+hook.Stderr, "\n") != 1 {
			t.Errorf("exit code %d, held %v: %s%s", hook.Code, hook.Held, hook.Stdout, hook.Stderr)
		}
		if strings.Contains(said, "not delivered in time: ") {
			break
		}
	}
	for _, want := range []string{"not delivered in time: ", " records for dead", " records for silent", "they stay in the journal"} {
		if !strings.Contains(said, want) {
			t.Errorf("the hook does not say %q: %s", want, said)
		}
	}
	eventually(t, time.Minute, func() error {
		log, err := os.ReadFile(filepath.Join(r.inst.State(), "agent.log"))
		if err != nil {
			return err
		}
		for _, want := range []string{"sink=dead left=", "make the directory", "sink=silent left=", "did not acknowledge"} {
			if !strings.Contains(string(log), want) {
				return fmt.Errorf("the log does not say %q: %s", want, log)
			}
		}
		delivered, _, err := readAll(out)
		if err != nil || count(delivered, record.KindInvocation) < 3 {
			return fmt.Errorf("the healthy sink has %d records: %v", len(delivered), err)
		}
		return nil
	})
}
