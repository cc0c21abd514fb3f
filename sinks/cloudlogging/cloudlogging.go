// Package cloudlogging delivers records to Google Cloud Logging, one structured
// entry for each record. The entry's insertId is the record's id and its timestamp
// the record's, so the service itself drops an entry that comes twice.
//
// The package uses the generated client of cloud.google.com/go/logging (its apiv2),
// not the Logger above it. A Logger buffers up to 1 GiB, drops a batch after one
// RESOURCE_EXHAUSTED, tells of it by a callback, and its Flush waits for as long as
// the service is away. The generated call takes the pump's batch, comes back with
// what was taken, and names with partial_success each entry that was refused.
package cloudlogging

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"

	logging "cloud.google.com/go/logging/apiv2"
	"cloud.google.com/go/logging/apiv2/loggingpb"
	"google.golang.org/genproto/googleapis/api/monitoredres"
	ltype "google.golang.org/genproto/googleapis/logging/type"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/internal/gcp"
	"github.com/tallyman-ci/tallyman/sinks/internal/logform"
)

// The service's limits (https://cloud.google.com/logging/quotas#log-limits). Both
// are approximate there, by the service's own measure, so we stay well below.
const (
	maxEntry   = 200 << 10 // bytes; the service's limit is 256 KB
	maxRequest = 8 << 20   // bytes; the service's limit is 10 MB
)

// Scheme is `cloudlogging://project/log`.
func Scheme() sinks.Scheme {
	return sinks.Scheme{
		Name: "cloudlogging", Form: "cloudlogging://project/log",
		Params: append(resourceParams(), gcp.Params()...),
		Open:   open,
	}
}

// isLog tells whether s may be the name of a log
// (https://cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry: less than 512
// characters once it is escaped, and an escaped one is three).
func isLog(s string) bool { return gcp.Named(s, 1, 160, "/_.-") }

func open(_ context.Context, t *sinks.Target) (sinks.Sink, error) {
	project, log := t.URL.Host, strings.TrimPrefix(t.URL.Path, "/")
	switch {
	case t.URL.User != nil || t.URL.Opaque != "" || t.URL.Fragment != "":
		return nil, errors.New("want cloudlogging://project/log, and credentials by the parameter of that name")
	case !gcp.IsProject(project):
		return nil, fmt.Errorf("want cloudlogging://project/log: %q is not the id of a project", project)
	case !isLog(log):
		return nil, fmt.Errorf("want cloudlogging://project/log: %q is not the name of a log: up to 160 letters, digits and /_.-", log)
	}
	d, err := gcp.ParseDial(t)
	if err != nil {
		return nil, err
	}
	r, err := parseResource(t, project)
	if err != nil {
		return nil, err
	}
	s := &sink{logName: "projects/" + project + "/logs/" + url.PathEscape(log)}
	s.box.Advice = gcp.Advice{
		Service: "Cloud Logging", API: "logging.googleapis.com", Project: project,
		Role: "roles/logging.logWriter", On: "project " + project,
		Grant:  fmt.Sprintf("gcloud projects add-iam-policy-binding %s --member %%s --role roles/logging.logWriter", project),
		Create: "is the id of the project right?",
	}
	s.client.Open = func(ctx context.Context) (connection, error) { return connect(ctx, d, r) }
	return s, nil
}

// connection is a client, who it is, and where it runs.
type connection struct {
	*logging.Client
	principal string
	resource  *monitoredres.MonitoredResource
}

func connect(ctx context.Context, d gcp.Dial, r resource) (connection, error) {
	options, err := d.Options(ctx)
	if err != nil {
		return connection{}, err
	}
	c, err := logging.NewClient(ctx, options...)
	if err != nil {
		return connection{}, fmt.Errorf("connect to Cloud Logging: %w", err)
	}
	// The pump retries, with its own patience and in sight of tallyman status.
	c.CallOptions.WriteLogEntries = nil
	return connection{c, d.Principal(ctx), r.detect(ctx)}, nil
}

// sized is an entry with the most bytes that it can have in a request.
type sized struct {
	entry *loggingpb.LogEntry
	bytes int
}

// growth is how much larger a row can be as a Struct. Measuring costs as much as
// encoding, so it is left to rows that could come near a limit. The worst are numbers
// of one digit: the 8 bytes of "uid":0, become 18.
const growth = 3

type sink struct {
	logName string

	client gcp.Lazy[connection]
	box    gcp.Outbox[sized]
	rec    record.Record
}

// Write writes the batch. It holds the entries of one batch in memory, and of these
// one request more while it is on its way.
func (s *sink) Write(ctx context.Context, batch []sinks.Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c, err := s.client.Get(ctx)
	if err != nil {
		return err
	}
	s.box.Advice.Principal = c.principal
	if s.box.Begin(batch) {
		for i, e := range batch {
			if entry, err := s.entry(e, c.resource); err != nil {
				s.box.Refuse(i, err.Error())
			} else {
				s.box.Add(i, entry)
			}
		}
	}
	return s.box.Send(fits, func(items []gcp.Item[sized]) gcp.Answer {
		request := &loggingpb.WriteLogEntriesRequest{LogName: s.logName, Resource: c.resource, PartialSuccess: true}
		for _, i := range items {
			request.Entries = append(request.Entries, i.M.entry)
		}
		_, err := c.WriteLogEntries(ctx, request)
		return answer(err)
	})
}

// answer reads the errors of single entries out of the error of a request that was
// otherwise taken.
func answer(err error) gcp.Answer {
	a := gcp.Answer{Err: err}
	if err == nil {
		return a
	}
	st, _ := status.FromError(err)
	for _, d := range st.Details() {
		partial, ok := d.(*loggingpb.WriteLogEntriesPartialErrors)
		if !ok || len(partial.GetLogEntryErrors()) == 0 {
			continue
		}
		a.Partial, a.Each = true, map[int]*status.Status{}
		for i, s := range partial.GetLogEntryErrors() {
			a.Each[int(i)] = status.FromProto(s)
		}
	}
	return a
}

// entry is the log entry of a record. An error means that it will never be one.
func (s *sink) entry(e sinks.Entry, where *monitoredres.MonitoredResource) (sized, error) {
	if err := recordjson.Unmarshal(e.Line, &s.rec); err != nil {
		return sized{}, err
	}
	r := &s.rec
	entry := &loggingpb.LogEntry{
		InsertId: r.ID, Timestamp: timestamppb.New(r.TS), Severity: ltype.LogSeverity_INFO,
		Resource: ofRecord(where, r.Host),
	}
	if logform.Severity(r) == logform.Warning {
		entry.Severity = ltype.LogSeverity_WARNING
	}
	message := logform.Message(r)
	for max := maxEntry; ; max /= 2 {
		data, truncated, err := logform.Shrink(r, max)
		if err != nil {
			return sized{}, err
		}
		payload, err := payload(data, message)
		if err != nil {
			return sized{}, err
		}
		entry.Payload = &loggingpb.LogEntry_JsonPayload{JsonPayload: payload}
		entry.Labels = map[string]string{}
		for _, l := range logform.Labels(r, truncated) {
			entry.Labels[l.Key] = l.Value
		}
		size := growth*len(data) + 4096 // labels and resource
		if size > maxEntry {
			size = proto.Size(entry)
		}
		if size <= maxEntry {
			return sized{entry, size}, nil
		}
	}
}

// payload is a row as a Struct, with message, by which the log's viewer names the
// entry.
func payload(row []byte, message string) (*structpb.Struct, error) {
	d := json.NewDecoder(bytes.NewReader(row))
	var members map[string]any
	if err := d.Decode(&members); err != nil {
		return nil, fmt.Errorf("encode the entry: %w", err)
	}
	members["message"] = message
	return structpb.NewStruct(members)
}

// fits says how many of the entries make one request.
func fits(items []gcp.Item[sized]) int {
	size := 0
	for i, item := range items {
		if size += item.M.bytes + 8; i > 0 && size > maxRequest {
			return i
		}
	}
	return len(items)
}

// Close ends the connection. Nothing is buffered here that could be lost.
func (s *sink) Close(ctx context.Context) error {
	return s.client.Close(ctx, func(c connection) error { return c.Close() })
}
