package pubsub

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	pubsubapi "cloud.google.com/go/pubsub/v2/apiv1"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/sinks"
)

// runEmulator starts Google's own emulator and returns its address. It ends with the
// test, or with kill. It is a part of the Cloud SDK and comes by no registry of
// packages, so a machine may well be without it; then pstest is all there is, and the
// test says so.
func runEmulator(t *testing.T) (addr string, kill func()) {
	t.Helper()
	var jars []string
	for _, root := range []string{os.Getenv("CLOUDSDK_ROOT_DIR"), "/usr/lib/google-cloud-sdk", "/opt/google-cloud-sdk", "/usr/share/google-cloud-sdk", filepath.Join(os.Getenv("HOME"), "google-cloud-sdk")} {
		found, err := filepath.Glob(filepath.Join(root, "platform/pubsub-emulator/lib/cloud-pubsub-emulator-*-all.jar"))
		if err == nil && root != "" {
			jars = append(jars, found...)
		}
	}
	java, err := exec.LookPath("java")
	if len(jars) == 0 || err != nil {
		why := "no Pub/Sub emulator or no java here; only pstest stands in for the service (gcloud components install pubsub-emulator)"
		fmt.Fprintf(os.Stderr, "\n*** %s SKIPPED: %s ***\n\n", t.Name(), why)
		t.Skip(why)
	}
	// The emulator takes a port, not a listener, so another process can be faster.
	for try := 0; ; try++ {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		_, port, _ := net.SplitHostPort(addr)
		l.Close()
		cmd := exec.Command(java, "-XX:TieredStopAtLevel=1", "-Xmx256m", "-jar", jars[0], "--host=127.0.0.1", "--port="+port)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = cmd.Stdout
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		said := ""
		for lines := bufio.NewScanner(out); lines.Scan(); {
			said += lines.Text() + "\n"
			if strings.Contains(lines.Text(), "Server started") {
				kill := sync.OnceFunc(func() {
					_ = cmd.Process.Kill()
					_ = cmd.Wait() // killed
				})
				t.Cleanup(kill)
				go func() {
					for lines.Scan() { // or the emulator would wait for its reader
					}
				}()
				return addr, kill
			}
		}
		_ = cmd.Wait() // it says why it ended
		if try == 4 {
			t.Fatalf("the emulator does not start: %s", said)
		}
	}
}

const subscriptionName = "projects/ci-test/subscriptions/all"

// broker is the real emulator as a server that can be killed. It keeps messages in
// memory, so they are pulled before a kill; what the sink believes to be taken must be
// among them. Between the sink and the emulator is a relay, because the emulator's next
// life has another port, and no topic at first.
type broker struct {
	t      *testing.T
	addr   string   // of the relay, the same after each Start
	pulled *os.File // a line for each message; not in memory, which counts as the sink's

	kill          func()
	subscriptions *pubsubapi.SubscriptionAdminClient
	listener      net.Listener

	mu     sync.Mutex
	conns  []net.Conn
	relays sync.WaitGroup
}

func (b *broker) Start() {
	b.t.Helper()
	ctx := b.t.Context()
	var emulator string
	emulator, b.kill = runEmulator(b.t)
	options := []option.ClientOption{option.WithEndpoint(emulator), option.WithoutAuthentication(), option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials()))}
	topics, err := pubsubapi.NewTopicAdminClient(ctx, options...)
	if err != nil {
		b.t.Fatal(err)
	}
	defer topics.Close()
	if b.subscriptions, err = pubsubapi.NewSubscriptionAdminClient(ctx, options...); err != nil {
		b.t.Fatal(err)
	}
	if _, err := topics.CreateTopic(ctx, &pubsubpb.Topic{Name: topicName}); err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.subscriptions.CreateSubscription(ctx, &pubsubpb.Subscription{Name: subscriptionName, Topic: topicName, AckDeadlineSeconds: 60}); err != nil {
		b.t.Fatal(err)
	}
	// The kernel gives the port of a connection that was cut a moment ago, too.
	for try := 0; ; try++ {
		if b.listener, err = net.Listen("tcp", b.addr); err == nil {
			break
		}
		if try == 100 {
			b.t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	b.addr = b.listener.Addr().String()
	b.relays.Go(func() { b.accept(b.listener, emulator) })
}

func (b *broker) accept(l net.Listener, emulator string) {
	for {
		from, err := l.Accept()
		if err != nil {
			return // closed
		}
		to, err := net.Dial("tcp", emulator)
		if err != nil {
			from.Close()
			continue
		}
		b.mu.Lock()
		b.conns = append(b.conns, from, to)
		b.mu.Unlock()
		for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
			b.relays.Go(func() {
				_, _ = io.Copy(way[0], way[1]) // until the cut
				way[0].Close()
			})
		}
	}
}

// Kill cuts all connections, in the middle of whatever they carry, pulls what the
// emulator took, and kills it.
func (b *broker) Kill() {
	b.t.Helper()
	b.listener.Close()
	b.mu.Lock()
	for _, c := range b.conns {
		c.Close()
	}
	b.conns = nil
	b.mu.Unlock()
	b.relays.Wait()
	for {
		// An empty subscription answers when the caller gives up.
		ctx, cancel := context.WithTimeout(b.t.Context(), time.Second)
		answer, err := b.subscriptions.Pull(ctx, &pubsubpb.PullRequest{Subscription: subscriptionName, MaxMessages: 250})
		cancel()
		if status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) || err == nil && len(answer.ReceivedMessages) == 0 {
			break
		}
		if err != nil {
			b.t.Fatal(err)
		}
		var acks []string
		var lines []byte
		for _, m := range answer.ReceivedMessages {
			lines = fmt.Appendf(lines, "%s %d\n", m.Message.Attributes["id"], sinktest.Sum(m.Message.Data))
			acks = append(acks, m.AckId)
		}
		if _, err := b.pulled.Write(lines); err != nil {
			b.t.Fatal(err)
		}
		if err := b.subscriptions.Acknowledge(b.t.Context(), &pubsubpb.AcknowledgeRequest{Subscription: subscriptionName, AckIds: acks}); err != nil {
			b.t.Fatal(err)
		}
	}
	b.subscriptions.Close()
	b.kill()
}

// tell tells the oracle of what was pulled.
func (b *broker) tell(o *sinktest.Oracle) {
	b.t.Helper()
	if _, err := b.pulled.Seek(0, io.SeekStart); err != nil {
		b.t.Fatal(err)
	}
	lines := bufio.NewScanner(b.pulled)
	for lines.Scan() {
		var id string
		var sum uint64
		if _, err := fmt.Sscan(lines.Text(), &id, &sum); err != nil {
			b.t.Fatalf("%v in %q", err, lines.Text())
		}
		o.Saw(id, sum)
	}
	if err := lines.Err(); err != nil {
		b.t.Fatal(err)
	}
}

// The real emulator is killed on the way three times, and forgets its topic with that.
func TestNothingIsLostWhenTheEmulatorIsKilled(t *testing.T) {
	n := sinktest.Records(t, 4000)
	pulled, err := os.Create(filepath.Join(t.TempDir(), "pulled"))
	if err != nil {
		t.Fatal(err)
	}
	defer pulled.Close()
	b := &broker{t: t, addr: "127.0.0.1:0", pulled: pulled}
	b.Start()
	run := sinktest.Run(t, "pubsub://ci-test/records?plaintext=true&endpoint="+b.addr, n, b, Scheme())
	b.Kill()
	o := sinktest.NewOracle(n, rowOf)
	b.tell(o)
	sinktest.Check(t, "pubsub (emulator, killed)", run, o)
	if run.Kills != 3 {
		t.Errorf("the emulator was killed %d times", run.Kills)
	}
}

// The real emulator takes our records, holds them until they are pulled, and
// answers our mistakes as the service does.
func TestEmulator(t *testing.T) {
	addr, _ := runEmulator(t)
	t.Setenv("PUBSUB_EMULATOR_HOST", addr)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	n := sinktest.Records(t, 1000)

	s := openURL(t, "pubsub://ci-test/records")
	err := s.Write(ctx, load(0, 1))
	if err == nil || !strings.Contains(err.Error(), "gcloud pubsub topics create records --project ci-test") {
		t.Errorf("without the topic: %v", err)
	}

	topics, err := pubsubapi.NewTopicAdminClient(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer topics.Close()
	subscriptions, err := pubsubapi.NewSubscriptionAdminClient(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer subscriptions.Close()
	if _, err := topics.CreateTopic(ctx, &pubsubpb.Topic{Name: topicName}); err != nil {
		t.Fatal(err)
	}
	if _, err := subscriptions.CreateSubscription(ctx, &pubsubpb.Subscription{Name: subscriptionName, Topic: topicName, AckDeadlineSeconds: 60}); err != nil {
		t.Fatal(err)
	}
	run := sinktest.Run(t, "pubsub://ci-test/records", n, nil, Scheme())
	o := sinktest.NewOracle(n, rowOf)
	for got := 0; got < n; {
		answer, err := subscriptions.Pull(ctx, &pubsubpb.PullRequest{Subscription: subscriptionName, MaxMessages: 1000})
		if err != nil {
			t.Fatalf("%d of %d pulled: %v", got, n, err)
		}
		var acks []string
		for _, m := range answer.ReceivedMessages {
			o.Saw(m.Message.Attributes["id"], sinktest.Sum(m.Message.Data))
			acks = append(acks, m.AckId)
		}
		if got += len(acks); len(acks) > 0 {
			if err := subscriptions.Acknowledge(ctx, &pubsubpb.AcknowledgeRequest{Subscription: subscriptionName, AckIds: acks}); err != nil {
				t.Fatal(err)
			}
		}
	}
	sinktest.Check(t, "pubsub (emulator)", run, o)

	// A topic with a schema of its own: nothing goes to quarantine for that.
	schemas, err := pubsubapi.NewSchemaClient(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer schemas.Close()
	schema, err := schemas.CreateSchema(ctx, &pubsubpb.CreateSchemaRequest{Parent: "projects/ci-test", SchemaId: "other",
		Schema: &pubsubpb.Schema{Type: pubsubpb.Schema_AVRO, Definition: `{"type":"record","name":"Other","fields":[{"name":"n","type":"long"}]}`}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := topics.CreateTopic(ctx, &pubsubpb.Topic{Name: "projects/ci-test/topics/strict",
		SchemaSettings: &pubsubpb.SchemaSettings{Schema: schema.Name, Encoding: pubsubpb.Encoding_JSON}}); err != nil {
		t.Fatal(err)
	}
	err = openURL(t, "pubsub://ci-test/strict").Write(ctx, load(0, 20))
	var refused *sinks.RefusedError
	if err == nil || errors.As(err, &refused) || !strings.Contains(err.Error(), "refuses every record") {
		t.Errorf("a topic with another schema: %v", err)
	}
}
