package cloudlogging

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/logging/apiv2/loggingpb"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/internal/gcp"
)

var update = flag.Bool("update", false, "write the golden files again")

const logName = "projects/ci-test/logs/runners%2Frecords"

func TestMain(m *testing.M) {
	sinktest.Serve(map[string]func(string, *sinktest.Took, func(string)) error{"logging": serveLogging})
	for _, name := range []string{"GOOGLE_APPLICATION_CREDENTIALS", "KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_NAMESPACE", "CONTAINER_NAME", "GCE_METADATA_HOST"} {
		os.Unsetenv(name)
	}
	goleak.VerifyTestMain(m)
}

// service is a LoggingServiceV2 that answers as a test wants. Of the service it
// models the call WriteLogEntries and its limits, and nothing else.
type service struct {
	loggingpb.UnimplementedLoggingServiceV2Server
	addr string

	mu       sync.Mutex
	answer   func(*loggingpb.WriteLogEntriesRequest) error // nil takes all
	requests []*loggingpb.WriteLogEntriesRequest           // also those that were refused
}

func (f *service) WriteLogEntries(_ context.Context, r *loggingpb.WriteLogEntriesRequest) (*loggingpb.WriteLogEntriesResponse, error) {
	f.mu.Lock()
	f.requests = append(f.requests, r)
	answer := f.answer
	f.mu.Unlock()
	if proto.Size(r) > 10<<20 {
		return nil, status.Error(codes.InvalidArgument, "Request payload size exceeds the limit: 10485760 bytes.")
	}
	for _, e := range r.Entries {
		if proto.Size(e) > 256<<10 {
			return nil, status.Error(codes.InvalidArgument, "Log entry with size exceeds maximum size of 256.0K")
		}
	}
	if answer != nil {
		if err := answer(r); err != nil {
			return nil, err
		}
	}
	return &loggingpb.WriteLogEntriesResponse{}, nil
}

func (f *service) set(answer func(*loggingpb.WriteLogEntriesRequest) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer, f.requests = answer, nil
}

func (f *service) entries() []*loggingpb.LogEntry {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*loggingpb.LogEntry
	for _, r := range f.requests {
		all = append(all, r.Entries...)
	}
	return all
}

func (f *service) ids() []string {
	var ids []string
	for _, e := range f.entries() {
		ids = append(ids, e.InsertId)
	}
	return ids
}

func newService(t *testing.T) *service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &service{addr: l.Addr().String()}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(20 << 20))
	loggingpb.RegisterLoggingServiceV2Server(server, f)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return f
}

// serveLogging is the service in a process of its own.
func serveLogging(addr string, took *sinktest.Took, ready func(string)) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	f := &service{answer: func(r *loggingpb.WriteLogEntriesRequest) error {
		return took.Request(func() {
			for _, e := range r.Entries {
				took.Note(e.InsertId, formOf(e))
			}
		})
	}}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(20 << 20))
	loggingpb.RegisterLoggingServiceV2Server(server, f)
	ready(l.Addr().String())
	return server.Serve(l)
}

// formOf is an entry in a form that can be compared.
func formOf(e *loggingpb.LogEntry) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		panic(err)
	}
	return data
}

const nodeURL = "cloudlogging://ci-test/runners/records?resource=generic_node&plaintext=true&endpoint="

func (f *service) open(t *testing.T, more string) sinks.Sink {
	t.Helper()
	return openURL(t, nodeURL+f.addr+more)
}

func openURL(t *testing.T, url string) sinks.Sink {
	t.Helper()
	s, err := sinks.Open(t.Context(), url, Scheme())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return s
}

// within gives a call of Write much more time than it needs.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// load is a batch of the records from to until.
func load(from, until int) []sinks.Entry {
	var batch []sinks.Entry
	for i := from; i < until; i++ {
		batch = append(batch, entryOf(sinktest.Record(i)))
	}
	return batch
}

func entryOf(r *record.Record) sinks.Entry {
	line := record.Append(nil, r)
	return sinks.Entry{ID: r.ID, Kind: r.Kind, Line: line[:len(line)-1]}
}

func idsOf(batch []sinks.Entry) []string {
	var ids []string
	for _, e := range batch {
		ids = append(ids, e.ID)
	}
	return ids
}

// A service that is killed on the way costs time and duplicates, and no entry.
func TestNothingIsLostWhenTheServerIsKilled(t *testing.T) {
	n := sinktest.Records(t, 3000)
	server := sinktest.Launch(t, "logging")
	run := sinktest.Run(t, nodeURL+server.Addr, n, server, Scheme())
	var s sink
	o := sinktest.NewOracle(n, func(i int) []byte {
		e, err := s.entry(entryOf(sinktest.Record(i)), nil)
		if err != nil {
			panic(err)
		}
		return formOf(e.entry)
	})
	server.Tell(o)
	sinktest.Check(t, "cloudlogging (local server)", run, o)
	if run.Kills != 3 {
		t.Errorf("the server was killed %d times", run.Kills)
	}
}

// What is written of each kind of record, with its severity and labels.
func TestEntries(t *testing.T) {
	f := newService(t)
	if err := f.open(t, "&location=dc1&namespace=build").Write(within(t), load(0, 6)); err != nil {
		t.Fatal(err)
	}
	if len(f.requests) != 1 {
		t.Fatalf("%d requests", len(f.requests))
	}
	r := f.requests[0]
	host, _ := os.Hostname()
	if r.LogName != logName || !r.PartialSuccess || r.Resource.GetType() != "generic_node" ||
		!maps.Equal(r.Resource.Labels, map[string]string{"project_id": "ci-test", "location": "dc1", "namespace": "build", "node_id": host}) {
		t.Errorf("log %s, partial success %v, resource %v", r.LogName, r.PartialSuccess, r.Resource)
	}
	var got bytes.Buffer
	for _, e := range r.Entries {
		data, err := protojson.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		// Members in a fixed order and form, which protojson does not promise.
		var members any
		if err := json.Unmarshal(data, &members); err != nil {
			t.Fatal(err)
		}
		data, err = json.MarshalIndent(members, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		got.Write(append(data, '\n'))
	}
	const golden = "testdata/entries.json"
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("the entries are not those of %s (go test ./sinks/cloudlogging -update writes it again):\n%s", golden, got.Bytes())
	}
}

// partially answers as the service does with partial_success: an error for the
// request, and in it one for each entry that was not written.
func partially(t *testing.T, each map[int32]codes.Code) error {
	details := &loggingpb.WriteLogEntriesPartialErrors{LogEntryErrors: map[int32]*rpcstatus.Status{}}
	for i, c := range each {
		details.LogEntryErrors[i] = status.New(c, fmt.Sprintf("entry %d is not good", i)).Proto()
	}
	st, err := status.New(codes.InvalidArgument, "some entries are not written").WithDetails(details)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestOnlyTheBadEntriesAreRefused(t *testing.T) {
	f := newService(t)
	f.set(func(*loggingpb.WriteLogEntriesRequest) error {
		return partially(t, map[int32]codes.Code{1: codes.InvalidArgument, 9: codes.OutOfRange})
	})
	batch := load(0, 10)
	err := f.open(t, "").Write(within(t), batch)
	var refused *sinks.RefusedError
	if !errors.As(err, &refused) {
		t.Fatalf("got %v", err)
	}
	got := map[int]string{}
	for _, r := range refused.Refused {
		got[r.Index] = r.Reason
	}
	if len(got) != 2 || !strings.Contains(got[1], "InvalidArgument: entry 1 is not good") || !strings.Contains(got[9], "OutOfRange: entry 9 is not good") {
		t.Errorf("refused: %v", got)
	}
	if n := len(f.requests); n != 1 {
		t.Errorf("%d requests: what was written is written again", n)
	}
}

// An entry that only a permission keeps out comes again, and the others do not.
func TestAnEntryThatIsDeniedComesAgain(t *testing.T) {
	f := newService(t)
	f.set(func(*loggingpb.WriteLogEntriesRequest) error {
		return partially(t, map[int32]codes.Code{2: codes.PermissionDenied, 3: codes.InvalidArgument})
	})
	s, batch := f.open(t, ""), load(0, 5)
	err := s.Write(within(t), batch)
	var refused *sinks.RefusedError
	if errors.As(err, &refused) || err == nil || !strings.Contains(err.Error(), "grant roles/logging.logWriter on project ci-test") {
		t.Fatalf("got %v", err)
	}
	f.set(func(r *loggingpb.WriteLogEntriesRequest) error {
		if len(r.Entries) > 1 && slices.ContainsFunc(r.Entries, func(e *loggingpb.LogEntry) bool { return e.InsertId == batch[3].ID }) ||
			len(r.Entries) == 1 && r.Entries[0].InsertId == batch[3].ID {
			return status.Error(codes.InvalidArgument, "entry 3 is not good")
		}
		return nil
	})
	err = s.Write(within(t), batch)
	if !errors.As(err, &refused) || len(refused.Refused) != 1 || refused.Refused[0].Index != 3 {
		t.Fatalf("got %v", err)
	}
	for _, id := range f.ids() {
		if id != batch[2].ID && id != batch[3].ID {
			t.Errorf("the entry %s was written and comes again", id)
		}
	}
}

// A request of which no entry is written has no errors of single entries.
func TestARequestThatIsRefusedAsAWhole(t *testing.T) {
	f := newService(t)
	batch := load(0, 64)
	bad := batch[17].ID
	f.set(func(r *loggingpb.WriteLogEntriesRequest) error {
		if slices.ContainsFunc(r.Entries, func(e *loggingpb.LogEntry) bool { return e.InsertId == bad }) {
			return status.Error(codes.InvalidArgument, "timestamp is too far in the future")
		}
		return nil
	})
	s := f.open(t, "")
	err := s.Write(within(t), batch)
	var refused *sinks.RefusedError
	if !errors.As(err, &refused) || len(refused.Refused) != 1 || refused.Refused[0].Index != 17 {
		t.Fatalf("got %v", err)
	}
	// A fault of the configuration is not a record's.
	f = newService(t)
	f.set(func(*loggingpb.WriteLogEntriesRequest) error {
		return status.Error(codes.InvalidArgument, "the resource type is unknown")
	})
	err = f.open(t, "").Write(within(t), batch)
	if err == nil || !strings.Contains(err.Error(), "refuses every record: the resource type is unknown") {
		t.Fatalf("got %v", err)
	}
}

func TestErrors(t *testing.T) {
	f := newService(t)
	s, batch := f.open(t, ""), load(0, 3)
	quota, err := status.New(codes.ResourceExhausted, "Quota exceeded for WriteLogEntries").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(11 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		err   error
		after time.Duration // 0: the pump's own patience
		want  string
	}{
		{status.Error(codes.PermissionDenied, "Permission 'logging.logEntries.create' denied"), 30 * time.Second,
			"gcloud projects add-iam-policy-binding ci-test --member MEMBER --role roles/logging.logWriter"},
		{status.Error(codes.Unauthenticated, "Request had invalid authentication credentials."), 0, "does not accept the credentials"},
		{status.Error(codes.NotFound, "Project does not exist: ci-test"), 30 * time.Second, "is the id of the project right?"},
		{quota.Err(), 11 * time.Second, "Quota exceeded"},
		{status.Error(codes.Unavailable, "away"), 0, "away"},
		{status.Error(codes.Internal, "internal"), 0, "internal"},
	} {
		calls := 0
		f.set(func(*loggingpb.WriteLogEntriesRequest) error { calls++; return tt.err })
		err := s.Write(within(t), batch)
		var refused *sinks.RefusedError
		if err == nil || errors.As(err, &refused) || !strings.Contains(err.Error(), tt.want) {
			t.Fatalf("got  %v\nwant %s", err, tt.want)
		}
		after := time.Duration(0)
		if asked := (*sinks.RetryAfterError)(nil); errors.As(err, &asked) {
			after = asked.After
		}
		if after != tt.after || calls != 1 {
			t.Errorf("%v: come again after %v, want %v; %d calls, want 1", tt.err, after, tt.after, calls)
		}
	}
	f.set(nil)
	if err := s.Write(within(t), batch); err != nil {
		t.Fatal(err)
	}
	if got := f.ids(); !slices.Equal(got, idsOf(batch)) {
		t.Errorf("%d arrived in the end", len(got))
	}
}

// A server that takes the call and does not answer must not hold the agent's end.
func TestAStalledServer(t *testing.T) {
	f := newService(t)
	release := make(chan struct{})
	defer close(release)
	f.set(func(*loggingpb.WriteLogEntriesRequest) error { <-release; return nil })
	s := f.open(t, "")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		err := s.Write(ctx, load(0, 10))
		done <- errors.Join(err, s.Close(ctx))
	}()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "no answer in time") {
			t.Errorf("got %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Write does not come back long after its deadline")
	}
}

// The service takes 256 KB in an entry and 10 MB in a request, and refuses more.
func TestSizes(t *testing.T) {
	f := newService(t)
	large := sinktest.Record(0)
	large.Invocation.Cwd = strings.Repeat("ü", 150_000)
	large.Invocation.Images = slices.Repeat([]string{"a"}, 5000)
	many := sinktest.Record(4)
	many.Invocation.Flags = slices.Repeat([]string{"-"}, 49_000) // fits as JSON, and not as a Struct
	batch := append([]sinks.Entry{entryOf(large), entryOf(many)}, load(8, 10)...)
	if err := f.open(t, "").Write(within(t), batch); err != nil {
		t.Fatal(err)
	}
	if got := f.ids(); !slices.Equal(got, idsOf(batch)) {
		t.Fatalf("%d of %d arrived", len(got), len(batch))
	}
	for i, e := range f.entries() {
		if cut := i < 2; (e.Labels["truncated"] == "true") != cut {
			t.Errorf("entry %d is marked %q", i, e.Labels["truncated"])
		}
		if e.Labels["repository"] == "" || e.GetJsonPayload().Fields["ci"] == nil {
			t.Errorf("entry %d does not say whose it is", i)
		}
	}
	// Entries of the largest size make requests below the limit.
	items := slices.Repeat([]gcp.Item[sized]{{M: sized{bytes: maxEntry}}}, 100)
	if n := fits(items); n < 30 || n*maxEntry > 10<<20 {
		t.Errorf("a request would have %d entries of %d bytes", n, maxEntry)
	}
}

// The size that is guessed without measuring is never less than the true one.
func TestGuessedSizes(t *testing.T) {
	var s sink
	r := &record.Record{ID: "a", Kind: "x", Invocation: &record.Invocation{Images: slices.Repeat([]string{""}, 500)},
		Event: &record.Event{Labels: slices.Repeat([]record.Attr{{Key: "k"}}, 500)}}
	batch := append(load(0, 4), entryOf(r), entryOf(&record.Record{ID: "b", Kind: "y"}))
	for _, e := range batch {
		got, err := s.entry(e, nil)
		if err != nil {
			t.Fatal(err)
		}
		if is := proto.Size(got.entry); is > got.bytes {
			t.Errorf("%s: %d bytes, %d were guessed", e.Line, is, got.bytes)
		}
	}
}

// metadataServer is one with these values.
func metadataServer(t *testing.T, values map[string]string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Metadata-Flavor", "Google")
		value, ok := values[strings.TrimPrefix(r.URL.Path, "/computeMetadata/v1/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintln(w, value)
	}))
	t.Cleanup(s.Close)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(s.URL, "http://"))
}

func TestResources(t *testing.T) {
	host, _ := os.Hostname()
	gke := map[string]string{"instance/attributes/cluster-name": "fleet", "instance/attributes/cluster-location": "europe-west1", "instance/zone": "projects/1/zones/europe-west1-b", "instance/id": "123"}
	vm := map[string]string{"instance/id": "123", "instance/zone": "projects/1/zones/europe-west1-b"}
	pod := map[string]string{"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "runner-1", "POD_NAMESPACE": "ci"}
	for _, tt := range []struct {
		name     string
		metadata map[string]string
		env      map[string]string
		query    string
		want     map[string]string // type and labels
	}{
		{"GKE", gke, pod, "", map[string]string{"type": "k8s_container", "project_id": "ci-test", "location": "europe-west1", "cluster_name": "fleet",
			"namespace_name": "ci", "pod_name": "runner-1", "container_name": "runner"}},
		{"GKE, said otherwise", gke, pod, "&cluster=other&location=here&container=agent&namespace=elsewhere", map[string]string{"type": "k8s_container", "project_id": "ci-test",
			"location": "here", "cluster_name": "other", "namespace_name": "elsewhere", "pod_name": "runner-1", "container_name": "agent"}},
		{"another Kubernetes", nil, pod, "&cluster=own", map[string]string{"type": "k8s_container", "project_id": "ci-test", "location": "", "cluster_name": "own",
			"namespace_name": "ci", "pod_name": "runner-1", "container_name": "runner"}},
		{"VM", vm, nil, "", map[string]string{"type": "gce_instance", "project_id": "ci-test", "instance_id": "123", "zone": "europe-west1-b"}},
		{"a node of GKE, by hand", gke, pod, "&resource=gce_instance", map[string]string{"type": "gce_instance", "project_id": "ci-test", "instance_id": "123", "zone": "europe-west1-b"}},
		{"elsewhere", nil, nil, "&location=dc1", map[string]string{"type": "generic_node", "project_id": "ci-test", "location": "dc1", "namespace": "", "node_id": host}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.metadata != nil {
				metadataServer(t, tt.metadata)
			} else {
				t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1") // refuses
			}
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			f := newService(t)
			s := openURL(t, "cloudlogging://ci-test/runners?plaintext=true&endpoint="+f.addr+tt.query)
			if err := s.Write(within(t), load(0, 1)); err != nil {
				t.Fatal(err)
			}
			got := f.requests[0].Resource
			want := maps.Clone(tt.want)
			delete(want, "type")
			if got.GetType() != tt.want["type"] || !maps.Equal(got.GetLabels(), want) {
				t.Errorf("got %v\nwant %v", got, tt.want)
			}
		})
	}
}

// A node's agent delivers the journals of pods that are gone: their entries belong
// to those pods.
func TestTheEntryOfAnotherPod(t *testing.T) {
	metadataServer(t, map[string]string{})
	t.Setenv("POD_NAME", "collector")
	t.Setenv("POD_NAMESPACE", "kube-system")
	f := newService(t)
	own, other := sinktest.Record(0), sinktest.Record(1)
	own.Host = &record.Host{Pod: "collector", Namespace: "kube-system"}
	other.Host = &record.Host{Pod: "runner-1", Namespace: "ci"}
	s := openURL(t, "cloudlogging://ci-test/runners?plaintext=true&endpoint="+f.addr)
	if err := s.Write(within(t), []sinks.Entry{entryOf(own), entryOf(other)}); err != nil {
		t.Fatal(err)
	}
	e := f.entries()
	if e[0].Resource != nil {
		t.Errorf("the own entry has the resource %v beside the request's", e[0].Resource)
	}
	if l := e[1].GetResource().GetLabels(); l["pod_name"] != "runner-1" || l["namespace_name"] != "ci" {
		t.Errorf("the other pod's entry has the resource %v", e[1].Resource)
	}
	if l := f.requests[0].Resource.Labels; l["pod_name"] != "collector" {
		t.Errorf("the request's resource became %v", l)
	}
}

// A metadata server that hangs must not hold Write, nor the agent's end.
func TestAMetadataServerThatHangs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("GCE_METADATA_HOST", l.Addr().String())
	f := newService(t)
	began := time.Now()
	s := openURL(t, "cloudlogging://ci-test/runners?plaintext=true&endpoint="+f.addr)
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("Open took %v", d)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Write(ctx, load(0, 1)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	// In the end it does without.
	if err := s.Write(within(t), load(0, 1)); err != nil {
		t.Fatal(err)
	}
	if got := f.requests[0].Resource.GetType(); got != "generic_node" {
		t.Errorf("the resource is a %s", got)
	}
}

func TestURLs(t *testing.T) {
	for _, tt := range []struct{ url, want string }{
		{"cloudlogging://ci-test/runners", ""},
		{"cloudlogging://ci-test/runners/records.v1?resource=k8s_container&cluster=c&location=l&namespace=n&container=r", ""},
		{"cloudlogging://ci-test", "want cloudlogging://project/log"},
		{"cloudlogging://ci-test/a%20b", "is not the name of a log"},
		{"cloudlogging://ci-test/" + strings.Repeat("x", 161), "is not the name of a log"},
		{"cloudlogging:///runners", "is not the id of a project"},
		{"cloudlogging://me:secret@ci-test/runners", "credentials by the parameter"},
		{"cloudlogging://ci-test/runners?resource=pod", "want auto, k8s_container, gce_instance, generic_node"},
		{"cloudlogging://ci-test/runners?ressource=auto", `did you mean "resource"?`},
		{"cloudlogging://ci-test/runners?plaintext=true", "only with an endpoint on this machine"},
	} {
		s, err := sinks.Open(t.Context(), tt.url, Scheme())
		if err == nil {
			if err := s.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if (err == nil) != (tt.want == "") || err != nil && (!strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: got %v, want %q", tt.url, err, tt.want)
		}
	}
	for _, p := range Scheme().Params {
		if p.Doc == "" || p.Default == "" {
			t.Errorf("parameter %+v is not documented", p)
		}
	}
}
