// Package pubsub delivers records to a Google Cloud Pub/Sub topic, one message for
// each record. The message's data is the row of the BigQuery table (package row), so
// a BigQuery subscription with use_table_schema writes it with no code between.
//
// The package uses the generated client of cloud.google.com/go/pubsub/v2 (its
// apiv1), not the Publisher above it. A Publisher gathers messages in memory of its
// own, sends them by goroutines of its own under no context of ours, retries out of
// sight until its timeout, and its Stop takes no context. The pump has made a batch
// already and wants one thing told: whether it was taken. So one call of Write makes
// as many Publish requests as the service's limits ask for, one at a time, without
// hidden retries; nothing is held between two batches.
package pubsub

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	pubsubapi "cloud.google.com/go/pubsub/v2/apiv1"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/protobuf/proto"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/internal/gcp"
	"github.com/tallyman-ci/tallyman/sinks/row"
)

// The service's limits (https://cloud.google.com/pubsub/quotas#resource_limits).
const (
	maxMessages  = 1000     // in a request
	maxRequest   = 10 << 20 // bytes; kept below by the room below
	maxAttribute = 1024     // bytes of an attribute's value or of an ordering key
	room         = 64 << 10 // for the topic's name and the framing of messages
)

// Scheme is `pubsub://project/topic`.
func Scheme() sinks.Scheme {
	return sinks.Scheme{
		Name: "pubsub", Form: "pubsub://project/topic",
		Params: append([]sinks.Param{
			{Name: "ordering", Default: "none", Doc: "ordering key of messages: none, runner, repository or job"},
			{Name: "gzip", Default: "false", Doc: "compress requests on their way"},
		}, gcp.Params()...),
		Open: open,
	}
}

// isTopic tells whether s may be the name of a topic
// (https://cloud.google.com/pubsub/docs/pubsub-basics#resource_names).
func isTopic(s string) bool {
	return gcp.Named(s, 3, 255, "-._~+%") && gcp.Named(s[:1], 1, 1, "") && (s[0] < '0' || s[0] > '9') && !strings.HasPrefix(strings.ToLower(s), "goog")
}

func open(_ context.Context, t *sinks.Target) (sinks.Sink, error) {
	project, topic := t.URL.Host, strings.TrimPrefix(t.URL.Path, "/")
	switch {
	case t.URL.User != nil || t.URL.Opaque != "" || t.URL.Fragment != "":
		return nil, errors.New("want pubsub://project/topic, and credentials by the parameter of that name")
	case !gcp.IsProject(project):
		return nil, fmt.Errorf("want pubsub://project/topic: %q is not the id of a project", project)
	case !isTopic(topic):
		return nil, fmt.Errorf("want pubsub://project/topic: %q is not the name of a topic: 3 to 255 letters, digits and -._~+%%, a letter first and not goog", topic)
	}
	d, err := gcp.ParseDial(t)
	if err != nil {
		return nil, err
	}
	s := &sink{topic: "projects/" + project + "/topics/" + topic, limit: maxRequest - room}
	ordering := t.String("ordering", "none")
	if s.key = keys[ordering]; s.key == nil && ordering != "none" {
		return nil, fmt.Errorf("parameter ordering: want none, runner, repository or job, not %q", ordering)
	}
	if t.Bool("gzip", false) {
		s.call = append(s.call, gax.WithGRPCOptions(grpc.UseCompressor(gzip.Name)))
	}
	s.box.Advice = gcp.Advice{
		Service: "Cloud Pub/Sub", API: "pubsub.googleapis.com", Project: project,
		Role: "roles/pubsub.publisher", On: s.topic,
		Grant:  fmt.Sprintf("gcloud pubsub topics add-iam-policy-binding %s --project %s --member %%s --role roles/pubsub.publisher", strings.ReplaceAll(topic, "%", "%%"), project),
		Create: fmt.Sprintf("make it: gcloud pubsub topics create %s --project %s", topic, project),
	}
	s.client.Open = func(ctx context.Context) (connection, error) { return connect(ctx, d) }
	return s, nil
}

// keys are the ordering keys that can be chosen.
var keys = map[string]func(*record.Record) string{
	"runner": func(r *record.Record) string {
		if r.Host == nil {
			return ""
		}
		return cmp.Or(r.Host.Pod, r.Host.Name)
	},
	"repository": func(r *record.Record) string {
		if r.CI == nil {
			return ""
		}
		return r.CI.Repository
	},
	"job": func(r *record.Record) string {
		if r.CI == nil {
			return ""
		}
		return cmp.Or(r.CI.TrackingID, r.CI.JobID)
	},
}

// connection is a client and who it is.
type connection struct {
	*pubsubapi.TopicAdminClient
	principal string
}

func connect(ctx context.Context, d gcp.Dial) (connection, error) {
	if os.Getenv("PUBSUB_EMULATOR_HOST") != "" {
		d = gcp.Dial{Plaintext: true} // the client library takes the address from there too
	}
	options, err := d.Options(ctx)
	if err != nil {
		return connection{}, err
	}
	c, err := pubsubapi.NewTopicAdminClient(ctx, options...)
	if err != nil {
		return connection{}, fmt.Errorf("connect to Cloud Pub/Sub: %w", err)
	}
	// The pump retries, with its own patience and in sight of tallyman status.
	c.CallOptions.Publish = nil
	return connection{c, d.Principal(ctx)}, nil
}

type sink struct {
	topic string
	limit int                         // bytes of a request, and of a message
	key   func(*record.Record) string // nil without ordering
	call  []gax.CallOption

	client gcp.Lazy[connection]
	box    gcp.Outbox[*pubsubpb.PubsubMessage]
	rec    record.Record
}

// Write publishes the batch. It holds the messages of one batch in memory, and of
// these one request more while it is on its way.
func (s *sink) Write(ctx context.Context, batch []sinks.Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.box.Begin(batch) {
		s.fill(batch)
	}
	c, err := s.client.Get(ctx)
	if err != nil {
		return err
	}
	s.box.Advice.Principal = c.principal
	return s.box.Send(s.fits, func(items []gcp.Item[*pubsubpb.PubsubMessage]) gcp.Answer {
		request := &pubsubpb.PublishRequest{Topic: s.topic}
		for _, i := range items {
			request.Messages = append(request.Messages, i.M)
		}
		answer, err := c.Publish(ctx, request, s.call...)
		if err == nil && len(answer.GetMessageIds()) != len(items) {
			err = fmt.Errorf("the answer of Cloud Pub/Sub takes %d of %d messages and does not say which", len(answer.GetMessageIds()), len(items))
		}
		return gcp.Answer{Err: err}
	})
}

func (s *sink) fill(batch []sinks.Entry) {
	for i, e := range batch {
		m, err := s.message(e)
		if err != nil {
			s.box.Refuse(i, err.Error())
			continue
		}
		s.box.Add(i, m)
	}
	if s.key != nil {
		// A request holds messages of one key, in their order.
		s.box.Sort(func(a, b *pubsubpb.PubsubMessage) int { return cmp.Compare(a.OrderingKey, b.OrderingKey) })
	}
}

// message is the message of a record. An error means that it will never be one.
func (s *sink) message(e sinks.Entry) (*pubsubpb.PubsubMessage, error) {
	if err := recordjson.Unmarshal(e.Line, &s.rec); err != nil {
		return nil, err
	}
	data, err := row.Append(make([]byte, 0, len(e.Line)+256), &s.rec)
	if err != nil {
		return nil, err
	}
	m := &pubsubpb.PubsubMessage{Data: data, Attributes: map[string]string{
		"id": s.rec.ID, "kind": string(s.rec.Kind), "schema": strconv.FormatInt(s.rec.Schema, 10),
	}}
	if s.rec.CI != nil && s.rec.CI.Repository != "" {
		m.Attributes["repository"] = s.rec.CI.Repository
	}
	for name, value := range m.Attributes {
		m.Attributes[name] = cut(value)
	}
	if s.key != nil {
		m.OrderingKey = cut(s.key(&s.rec))
	}
	if size := proto.Size(m); size > s.limit {
		return nil, fmt.Errorf("the message has %d bytes; Cloud Pub/Sub takes %d", size, s.limit)
	}
	return m, nil
}

// cut keeps a value within the service's limit.
func cut(s string) string {
	if len(s) <= maxAttribute {
		return s
	}
	n := maxAttribute
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// fits says how many of the items make one request.
func (s *sink) fits(items []gcp.Item[*pubsubpb.PubsubMessage]) int {
	size := 0
	for i, item := range items {
		size += proto.Size(item.M) + 8 // its tag and length
		if i > 0 && (i == maxMessages || size > s.limit || item.M.OrderingKey != items[0].M.OrderingKey) {
			return i
		}
	}
	return len(items)
}

// Close ends the connection. Nothing is buffered here that could be lost.
func (s *sink) Close(ctx context.Context) error {
	return s.client.Close(ctx, func(c connection) error { return c.Close() })
}
