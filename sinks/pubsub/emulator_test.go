package pubsub

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pubsubapi "cloud.google.com/go/pubsub/v2/apiv1"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"

	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/sinks"
)

// emulator starts Google's own emulator and sets PUBSUB_EMULATOR_HOST. It is a part
// of the Cloud SDK and comes by no registry of packages, so a machine may well be
// without it; then pstest is all there is, and the test says so.
func emulator(t *testing.T) {
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
				t.Cleanup(func() {
					_ = cmd.Process.Kill()
					_ = cmd.Wait() // killed
				})
				go func() {
					for lines.Scan() { // or the emulator would wait for its reader
					}
				}()
				t.Setenv("PUBSUB_EMULATOR_HOST", addr)
				return
			}
		}
		_ = cmd.Wait() // it says why it ended
		if try == 4 {
			t.Fatalf("the emulator does not start: %s", said)
		}
	}
}

// The real emulator takes our records, holds them until they are pulled, and
// answers our mistakes as the service does.
func TestEmulator(t *testing.T) {
	emulator(t)
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
	const subscription = "projects/ci-test/subscriptions/all"
	if _, err := subscriptions.CreateSubscription(ctx, &pubsubpb.Subscription{Name: subscription, Topic: topicName, AckDeadlineSeconds: 60}); err != nil {
		t.Fatal(err)
	}
	run := sinktest.Run(t, "pubsub://ci-test/records", n, nil, Scheme())
	o := sinktest.NewOracle(n, rowOf)
	for got := 0; got < n; {
		answer, err := subscriptions.Pull(ctx, &pubsubpb.PullRequest{Subscription: subscription, MaxMessages: 1000})
		if err != nil {
			t.Fatalf("%d of %d pulled: %v", got, n, err)
		}
		var acks []string
		for _, m := range answer.ReceivedMessages {
			o.Saw(m.Message.Attributes["id"], sinktest.Sum(m.Message.Data))
			acks = append(acks, m.AckId)
		}
		if got += len(acks); len(acks) > 0 {
			if err := subscriptions.Acknowledge(ctx, &pubsubpb.AcknowledgeRequest{Subscription: subscription, AckIds: acks}); err != nil {
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
