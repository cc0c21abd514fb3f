package pubsub

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"cloud.google.com/go/pubsub/v2/pstest"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/internal/gcp"
	"github.com/tallyman-ci/tallyman/sinks/row"
)

const topicName = "projects/ci-test/topics/records"

func TestMain(m *testing.M) {
	sinktest.Serve(map[string]func(string, *sinktest.Took, func(string)) error{"pstest": servePstest})
	for _, name := range []string{"PUBSUB_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"} {
		os.Unsetenv(name)
	}
	dir, err := os.MkdirTemp("", "pubsub")
	if err == nil {
		err = trustOne(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// servePstest is Google's fake of the service in a process of its own. It forgets all
// when it is killed, as the real emulator does, but for the book.
func servePstest(addr string, took *sinktest.Took, ready func(string)) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fake := pstest.NewServerWithAddress("127.0.0.1:0") // its own listener cannot be asked whether the port is free
	ctx := context.Background()
	if _, err := fake.GServer.CreateTopic(ctx, &pubsubpb.Topic{Name: topicName}); err != nil {
		return err
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(20<<20), grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		answer, err := handler(ctx, req)
		if publish, ok := req.(*pubsubpb.PublishRequest); ok && err == nil {
			err = took.Request(func() {
				for _, m := range publish.Messages {
					took.Note(m.Attributes["id"], m.Data)
				}
			})
		}
		return answer, err
	}))
	pubsubpb.RegisterPublisherServer(server, &fake.GServer)
	ready(l.Addr().String())
	return server.Serve(l)
}

// rowOf is the message that the i-th record of a load must become.
func rowOf(i int) []byte {
	line, err := row.Append(nil, sinktest.Record(i))
	if err != nil {
		panic(err)
	}
	return line
}

// A broker that is killed on the way costs time and duplicates, and no record.
func TestNothingIsLostWhenTheServerIsKilled(t *testing.T) {
	n := sinktest.Records(t, 10_000)
	server := sinktest.Launch(t, "pstest")
	run := sinktest.Run(t, "pubsub://ci-test/records?plaintext=true&endpoint="+server.Addr, n, server, Scheme())
	o := sinktest.NewOracle(n, rowOf)
	server.Tell(o)
	sinktest.Check(t, "pubsub (pstest)", run, o)
	if run.Kills != 3 {
		t.Errorf("the server was killed %d times", run.Kills)
	}
}

// topic is a server of the Publish call that answers as a test wants.
type topic struct {
	pubsubpb.UnimplementedPublisherServer
	addr string

	mu          sync.Mutex
	answer      func(*pubsubpb.PublishRequest) error // nil takes all
	requests    []*pubsubpb.PublishRequest           // that were taken
	compression []string
}

func newTopic(t *testing.T) *topic {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &topic{addr: l.Addr().String()}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(20<<20), grpc.StatsHandler(f))
	pubsubpb.RegisterPublisherServer(server, f)
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

func (f *topic) Publish(_ context.Context, r *pubsubpb.PublishRequest) (*pubsubpb.PublishResponse, error) {
	f.mu.Lock()
	answer := f.answer
	f.mu.Unlock()
	if answer != nil {
		if err := answer(r); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, r)
	return &pubsubpb.PublishResponse{MessageIds: make([]string, len(r.Messages))}, nil
}

func (f *topic) set(answer func(*pubsubpb.PublishRequest) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

// messages are those of the taken requests.
func (f *topic) messages() []*pubsubpb.PubsubMessage {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*pubsubpb.PubsubMessage
	for _, r := range f.requests {
		all = append(all, r.Messages...)
	}
	return all
}

func (f *topic) ids() []string {
	var ids []string
	for _, m := range f.messages() {
		ids = append(ids, m.Attributes["id"])
	}
	return ids
}

// The stats handler sees how a request was compressed.
func (f *topic) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (f *topic) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (f *topic) HandleConn(context.Context, stats.ConnStats)                       {}
func (f *topic) HandleRPC(_ context.Context, s stats.RPCStats) {
	if h, ok := s.(*stats.InHeader); ok {
		f.mu.Lock()
		f.compression = append(f.compression, h.Compression)
		f.mu.Unlock()
	}
}

func (f *topic) open(t *testing.T, more string) sinks.Sink {
	t.Helper()
	return openURL(t, "pubsub://ci-test/records?plaintext=true&endpoint="+f.addr+more)
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
		r := sinktest.Record(i)
		batch = append(batch, sinks.Entry{ID: r.ID, Kind: r.Kind, Line: sinktest.Line(i)})
	}
	return batch
}

func idsOf(batch []sinks.Entry) []string {
	var ids []string
	for _, e := range batch {
		ids = append(ids, e.ID)
	}
	return ids
}

func TestAMessageIsARowWithAttributes(t *testing.T) {
	f := newTopic(t)
	long := sinktest.Record(4)
	long.CI.Repository = strings.Repeat("ü", 1000) // 2,000 bytes
	line := record.Append(nil, long)
	batch := append(load(0, 4), sinks.Entry{ID: long.ID, Kind: long.Kind, Line: line})
	if err := f.open(t, "").Write(within(t), batch); err != nil {
		t.Fatal(err)
	}
	if n := len(f.requests); n != 1 || f.requests[0].Topic != topicName {
		t.Fatalf("%d requests, the first for %s", n, f.requests[0].GetTopic())
	}
	for i, m := range f.messages() {
		r := sinktest.Record(i)
		want := map[string]string{"id": r.ID, "kind": string(r.Kind), "schema": "1", "repository": r.CI.Repository}
		if i == 4 {
			want["repository"] = strings.Repeat("ü", 512) // the limit is 1,024 bytes
		} else if string(m.Data) != string(rowOf(i)) {
			t.Errorf("message %d is %s", i, m.Data)
		}
		if fmt.Sprint(m.Attributes) != fmt.Sprint(want) || m.OrderingKey != "" {
			t.Errorf("message %d: attributes %.200v, ordering key %q", i, m.Attributes, m.OrderingKey)
		}
	}
}

func refusing(ids ...string) func(*pubsubpb.PublishRequest) error {
	return func(r *pubsubpb.PublishRequest) error {
		for _, m := range r.Messages {
			if slices.Contains(ids, m.Attributes["id"]) {
				return status.Error(codes.InvalidArgument, "one of the messages is not valid")
			}
		}
		return nil
	}
}

// The service refuses a request as a whole for one message in it.
func TestOnlyTheBadRecordsAreRefused(t *testing.T) {
	for _, bad := range [][]int{{0}, {99}, {0, 1, 50, 99}, {33, 34}} {
		t.Run(fmt.Sprint(bad), func(t *testing.T) {
			f := newTopic(t)
			batch := load(0, 100)
			good := slices.Clone(idsOf(batch))
			var poison []string
			for _, i := range bad {
				poison = append(poison, batch[i].ID)
				good = slices.DeleteFunc(good, func(id string) bool { return id == batch[i].ID })
			}
			f.set(refusing(poison...))
			err := f.open(t, "").Write(within(t), batch)
			var refused *sinks.RefusedError
			if !errors.As(err, &refused) {
				t.Fatalf("got %v", err)
			}
			var got []int
			for _, r := range refused.Refused {
				got = append(got, r.Index)
				if !strings.Contains(r.Reason, "one of the messages is not valid") {
					t.Errorf("the reason is %q", r.Reason)
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, bad) {
				t.Errorf("refused are %d, want %d", got, bad)
			}
			if ids := f.ids(); !slices.Equal(ids, good) {
				t.Errorf("%d messages arrived, want the %d good ones once each, in order", len(ids), len(good))
			}
		})
	}
}

// A topic with a schema that our rows do not fit refuses all of them. To quarantine
// them would be to lose what a changed configuration lets through.
func TestATopicThatRefusesAllQuarantinesNothing(t *testing.T) {
	for _, n := range []int{1, 3, 200} {
		f := newTopic(t)
		f.set(func(*pubsubpb.PublishRequest) error {
			return status.Error(codes.InvalidArgument, "message does not match the schema")
		})
		s, batch := f.open(t, ""), load(0, n)
		for range 3 {
			err := s.Write(within(t), batch)
			var refused *sinks.RefusedError
			var after *sinks.RetryAfterError
			if errors.As(err, &refused) || !errors.As(err, &after) || after.After < 10*time.Second || !strings.Contains(err.Error(), "refuses every record: message does not match") {
				t.Fatalf("%d records: got %v", n, err)
			}
		}
		f.set(nil)
		if err := s.Write(within(t), batch); err != nil {
			t.Fatal(err)
		}
		if ids := f.ids(); !slices.Equal(ids, idsOf(batch)) {
			t.Errorf("%d records: %d arrived once the topic was mended", n, len(ids))
		}
	}
}

// Only an answer that got lost makes a record come twice.
func TestAnAttemptGoesOnWhereTheLastOneStopped(t *testing.T) {
	f := newTopic(t)
	s, batch := f.open(t, ""), load(0, 2500)
	requests := 0
	f.set(func(*pubsubpb.PublishRequest) error {
		if requests++; requests == 2 {
			return status.Error(codes.Unavailable, "try again")
		}
		return nil
	})
	if err := s.Write(within(t), batch); err == nil {
		t.Fatal("no error")
	}
	if err := s.Write(within(t), batch); err != nil {
		t.Fatal(err)
	}
	if ids := f.ids(); !slices.Equal(ids, idsOf(batch)) {
		t.Errorf("%d messages arrived for 2500 records", len(ids))
	}
	for _, r := range f.requests {
		if len(r.Messages) > 1000 {
			t.Errorf("a request has %d messages; the service takes 1000", len(r.Messages))
		}
	}
	// Another batch begins anew.
	if err := s.Write(within(t), load(2500, 2501)); err != nil {
		t.Fatal(err)
	}
	if ids := f.ids(); len(ids) != 2501 {
		t.Errorf("%d messages arrived", len(ids))
	}
}

// withDetails is a server's error with machine-readable details.
func withDetails(code codes.Code, text string, info *errdetails.ErrorInfo, retry time.Duration) error {
	st := status.New(code, text)
	if info != nil {
		st, _ = st.WithDetails(info)
	}
	if retry > 0 {
		st, _ = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	return st.Err()
}

// What is not the record's fault is never held against it, and a person is told
// what to do.
func TestErrors(t *testing.T) {
	f := newTopic(t)
	s, batch := f.open(t, ""), load(0, 10)
	for _, tt := range []struct {
		name  string
		err   error
		after time.Duration // 0: the pump's own patience
		want  string
	}{
		{"permission", withDetails(codes.PermissionDenied, "User not authorized to perform this action.", nil, 0), 30 * time.Second,
			"grant roles/pubsub.publisher on projects/ci-test/topics/records to the account of these credentials: gcloud pubsub topics add-iam-policy-binding records --project ci-test --member MEMBER --role roles/pubsub.publisher"},
		{"API off", withDetails(codes.PermissionDenied, "Cloud Pub/Sub API has not been used", &errdetails.ErrorInfo{Reason: "SERVICE_DISABLED"}, 0), 30 * time.Second,
			"gcloud services enable pubsub.googleapis.com --project ci-test"},
		{"scopes", withDetails(codes.PermissionDenied, "Request had insufficient authentication scopes.", nil, 0), 30 * time.Second, "access scopes"},
		{"billing", withDetails(codes.PermissionDenied, "This API method requires billing", &errdetails.ErrorInfo{Reason: "BILLING_DISABLED"}, 0), 30 * time.Second, "link a billing account to project ci-test"},
		{"no topic", status.Error(codes.NotFound, "Resource not found (resource=records)."), 30 * time.Second, "gcloud pubsub topics create records --project ci-test"},
		{"expired", status.Error(codes.Unauthenticated, "Request had invalid authentication credentials."), 0, "does not accept the credentials"},
		{"quota", withDetails(codes.ResourceExhausted, "quota exceeded", nil, 7*time.Second), 7 * time.Second, "quota exceeded"},
		{"quota without a time", status.Error(codes.ResourceExhausted, "quota exceeded"), 0, "quota exceeded"},
		{"key disabled", status.Error(codes.FailedPrecondition, "KMS key is disabled"), 30 * time.Second, "KMS key is disabled"},
		{"away", status.Error(codes.Unavailable, "the service is away"), 0, "the service is away"},
		{"broken", status.Error(codes.Internal, "internal"), 0, "internal"},
		{"unknown", errors.New("something else"), 0, "something else"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			calls := 0
			f.set(func(*pubsubpb.PublishRequest) error { calls++; return tt.err })
			err := s.Write(within(t), batch)
			var refused *sinks.RefusedError
			if err == nil || errors.As(err, &refused) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got  %v\nwant %s", err, tt.want)
			}
			var after *sinks.RetryAfterError
			if errors.As(err, &after); cmp.Or(after, &sinks.RetryAfterError{}).After != tt.after {
				t.Errorf("come again after %v, want %v", cmp.Or(after, &sinks.RetryAfterError{}).After, tt.after)
			}
			if calls != 1 {
				t.Errorf("%d calls: the library retries out of sight", calls)
			}
			// The pump tells an error once as long as its text stays the same.
			if again := s.Write(within(t), batch); again == nil || again.Error() != err.Error() {
				t.Errorf("the second time it is %v", again)
			}
		})
	}
	f.set(nil)
	if err := s.Write(within(t), batch); err != nil {
		t.Fatal(err)
	}
	if ids := f.ids(); !slices.Equal(ids, idsOf(batch)) {
		t.Errorf("%d arrived in the end, want 10", len(ids))
	}
}

// A server that takes the call and does not answer must not hold the agent's end.
func TestAStalledServer(t *testing.T) {
	f := newTopic(t)
	release := make(chan struct{})
	defer close(release)
	f.set(func(*pubsubpb.PublishRequest) error { <-release; return nil })
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

func TestNobodyListens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	s := openURL(t, "pubsub://ci-test/records?plaintext=true&endpoint="+addr)
	err = s.Write(within(t), load(0, 1))
	if status.Code(errors.Unwrap(errors.Unwrap(err))) != codes.Unavailable && !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
}

func TestWhatIsNoRecordIsRefused(t *testing.T) {
	f := newTopic(t)
	batch := load(0, 3)
	batch[1].Line = []byte(`{"id":"x","ts":"yesterday","kind":"event"}`)
	err := f.open(t, "").Write(within(t), batch)
	var refused *sinks.RefusedError
	if !errors.As(err, &refused) || len(refused.Refused) != 1 || refused.Refused[0].Index != 1 || !strings.Contains(refused.Refused[0].Reason, `member "ts"`) {
		t.Errorf("got %v", err)
	}
	if got := f.ids(); !slices.Equal(got, []string{batch[0].ID, batch[2].ID}) {
		t.Errorf("arrived are %q", got)
	}
}

// The service's limit of 10 MB holds for a message and for a request. Here it is
// lower, because to make 10 MB takes long.
func TestLargeMessages(t *testing.T) {
	f := newTopic(t)
	s := f.open(t, "").(*sink)
	if s.limit < 9<<20 || s.limit > 10_000_000+512<<10 {
		t.Errorf("the limit is %d", s.limit)
	}
	s.limit = 100 << 10
	large := func(id string, n int) sinks.Entry {
		r := &record.Record{ID: id, Kind: record.KindLoss, Loss: &record.Loss{Detail: strings.Repeat("x", n)}}
		return sinks.Entry{ID: id, Kind: r.Kind, Line: record.Append(nil, r)}
	}
	batch := []sinks.Entry{large("a", 40<<10), large("b", 40<<10), large("c", 100<<10), large("d", 40<<10)}
	err := s.Write(within(t), batch)
	var refused *sinks.RefusedError
	if !errors.As(err, &refused) || len(refused.Refused) != 1 || refused.Refused[0].Index != 2 || !strings.Contains(refused.Refused[0].Reason, "bytes") {
		t.Errorf("got %v", err)
	}
	if got := f.ids(); !slices.Equal(got, []string{"a", "b", "d"}) || len(f.requests) != 2 {
		t.Errorf("%q arrived in %d requests", got, len(f.requests))
	}
}

func TestOrdering(t *testing.T) {
	f := newTopic(t)
	if err := f.open(t, "&ordering=runner").Write(within(t), load(0, 200)); err != nil {
		t.Fatal(err)
	}
	last := map[string]string{}
	for _, r := range f.requests {
		for _, m := range r.Messages {
			var rec record.Record
			if err := recordjson.Unmarshal(m.Data, &rec); err != nil && !strings.Contains(err.Error(), "_n") { // time_nano and mono_ns are strings in a row
				t.Fatal(err)
			}
			if m.OrderingKey == "" || m.OrderingKey != r.Messages[0].OrderingKey {
				t.Fatalf("a request holds the keys %q and %q", r.Messages[0].OrderingKey, m.OrderingKey)
			}
			if id := m.Attributes["id"]; id <= last[m.OrderingKey] { // ids sort by time
				t.Errorf("%s comes after %s", id, last[m.OrderingKey])
			}
			last[m.OrderingKey] = m.Attributes["id"]
		}
	}
	if len(last) != 31 || len(f.messages()) != 200 {
		t.Errorf("%d messages with %d keys, want 200 with 31", len(f.messages()), len(last))
	}
	for name, key := range keys {
		if got := key(&record.Record{}); got != "" {
			t.Errorf("the key %s of an empty record is %q", name, got)
		}
		if got := key(sinktest.Record(1)); got == "" {
			t.Errorf("the key %s of a record is empty", name)
		}
	}
}

func TestGzip(t *testing.T) {
	f := newTopic(t)
	if err := f.open(t, "&gzip=true").Write(within(t), load(0, 5)); err != nil {
		t.Fatal(err)
	}
	if err := f.open(t, "").Write(within(t), load(0, 5)); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.compression, []string{"gzip", ""}) {
		t.Errorf("the compression is %q", f.compression)
	}
}

func TestURLs(t *testing.T) {
	good := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(good, []byte(`{"type":"service_account","private_key":"secret"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ url, want string }{
		{"pubsub://ci-test/records", ""},
		{"pubsub://ci-test/records?ordering=job&gzip=true&endpoint=pubsub.example.com:443&credentials=" + good, ""},
		{"pubsub://ci-test/records?plaintext=true&endpoint=localhost:8085", ""},
		{"pubsub://ci-test", "want pubsub://project/topic"},
		{"pubsub:///records", "want pubsub://project/topic"},
		{"pubsub:records", "want pubsub://project/topic"},
		{"pubsub://CI_test/records", `"CI_test" is not the id of a project`},
		{"pubsub://-ci-test/records", "is not the id of a project"},
		{"pubsub://ci-test/1records", "a letter first"},
		{"pubsub://ci-test/reco rds", "is not the name of a topic"},
		{"pubsub://ci-test/" + strings.Repeat("x", 256), "is not the name of a topic"},
		{"pubsub://ci-test/re", `"re" is not the name of a topic`},
		{"pubsub://ci-test/google-records", "not goog"},
		{"pubsub://ci-test/records/more", "is not the name of a topic"},
		{"pubsub://user:secret@ci-test/records", "credentials by the parameter"},
		{"pubsub://ci-test/records?order=job", `did you mean "ordering"?`},
		{"pubsub://ci-test/records?ordering=yes", "want none, runner, repository or job"},
		{"pubsub://ci-test/records?gzip=very", "parameter gzip: want true or false"},
		{"pubsub://ci-test/records?plaintext=true", "only with an endpoint on this machine"},
		{"pubsub://ci-test/records?plaintext=true&endpoint=pubsub.example.com:443", "only with an endpoint on this machine"},
		{"pubsub://ci-test/records?endpoint=8085", "want host:port"},
		{"pubsub://ci-test/records?credentials=key.json", "want an absolute path"},
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

// Missing credentials are told by the first Write, not by Open, and come to be used
// when they are there.
func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key.json")
	s := openURL(t, "pubsub://ci-test/records?credentials="+path)
	for _, tt := range []struct{ content, want string }{
		{"", "no such file"},
		{"secret", "is not a Google credentials file"},
		{`{"type":"service_account","private_key":"secret"}`, ""},
	} {
		if tt.content != "" {
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := s.Write(within(t), load(0, 1))
		var refused *sinks.RefusedError
		if err == nil || errors.As(err, &refused) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: got %v, want %q", tt.content, err, tt.want)
		}
	}
	if got := (gcp.Dial{Credentials: path}).Principal(t.Context()); got != "" {
		t.Errorf("the principal is %q", got)
	}
	data, _ := json.Marshal(map[string]string{"client_email": "ci@acme.iam.gserviceaccount.com"})
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := (gcp.Dial{Credentials: path}).Principal(t.Context()); got != "ci@acme.iam.gserviceaccount.com" {
		t.Errorf("the principal is %q", got)
	}
}
