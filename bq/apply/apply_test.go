package apply

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/iam/apiv1/iampb"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"cloud.google.com/go/pubsub/v2/pstest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/internal/fakebq"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cloud is a project: our server of BigQuery's API and Google's fake of Pub/Sub, to which
// policies are added.
type cloud struct {
	bq     *fakebq.Server
	pubsub *pstest.Server
	c      *Clients

	mu       sync.Mutex
	writes   []string
	fail     func(method string, request any) error
	policies map[string][]*iampb.Binding
	denied   []string
}

func (c *cloud) GetIamPolicy(_ context.Context, r *iampb.GetIamPolicyRequest) (*iampb.Policy, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &iampb.Policy{Bindings: c.policies[r.Resource]}, nil
}

func (c *cloud) SetIamPolicy(context.Context, *iampb.SetIamPolicyRequest) (*iampb.Policy, error) {
	return nil, status.Error(codes.PermissionDenied, "apply sets no policy")
}

func (c *cloud) TestIamPermissions(_ context.Context, r *iampb.TestIamPermissionsRequest) (*iampb.TestIamPermissionsResponse, error) {
	return &iampb.TestIamPermissionsResponse{Permissions: slices.DeleteFunc(r.Permissions, func(p string) bool { return slices.Contains(c.denied, p) })}, nil
}

func (c *cloud) intercept(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	c.mu.Lock()
	fail := c.fail
	if !strings.HasPrefix(method, "Get") && method != "TestIamPermissions" {
		c.writes = append(c.writes, method)
	}
	c.mu.Unlock()
	if fail != nil {
		if err := fail(method, request); err != nil {
			return nil, err
		}
	}
	return handler(ctx, request)
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	c := &cloud{bq: fakebq.New(), pubsub: pstest.NewServerWithAddress("127.0.0.1:0"), policies: map[string][]*iampb.Binding{}}
	t.Cleanup(func() {
		c.bq.Close()
		if err := c.pubsub.Close(); err != nil {
			t.Error(err)
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(c.intercept))
	pubsubpb.RegisterPublisherServer(server, &c.pubsub.GServer)
	pubsubpb.RegisterSubscriberServer(server, &c.pubsub.GServer)
	iampb.RegisterIAMPolicyServer(server, c)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
	if c.c, err = Connect(t.Context(), c.bq.Listener.Addr().String(), l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.c.Close(); err != nil {
			t.Error(err)
		}
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return c
}

// written are the requests since the last call that were to change something.
func (c *cloud) written() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := append(c.bq.Writes(), c.writes...)
	c.writes = nil
	return out
}

const project, dataset = "acme-ci", "tallyman"

func options() bq.Options {
	return bq.Options{Project: project, Dataset: dataset, Runners: "serviceAccount:runners@acme-ci.iam.gserviceaccount.com", Number: "4711"}
}

// grantAll does what the printed commands do.
func (c *cloud) grantAll(t *testing.T, o bq.Options) {
	t.Helper()
	o, err := o.Complete()
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range o.Grants() {
		if g.On == bq.OnTable {
			c.bq.Bind(dataset, g.Name, g.Role, g.Member)
			continue
		}
		resource := "projects/" + project + "/" + string(g.On) + "s/" + g.Name
		c.policies[resource] = append(c.policies[resource], &iampb.Binding{Role: g.Role, Members: []string{g.Member}})
	}
}

// tell is the plan in few words: what is not kept.
func tell(p *Plan) []string {
	var out []string
	for _, s := range p.Steps {
		if s.Action != Keep {
			out = append(out, fmt.Sprintf("%s %s %s", s.Action, s.What, path.Base(strings.TrimPrefix(s.Name, project+":"))))
		}
	}
	return out
}

func (c *cloud) apply(t *testing.T, o bq.Options) (*Plan, error) {
	t.Helper()
	p, err := New(t.Context(), c.c, o)
	if err != nil {
		return nil, err
	}
	return p, p.Run(t.Context(), func(Step) {})
}

func (c *cloud) mustApply(t *testing.T, o bq.Options) {
	t.Helper()
	if _, err := c.apply(t, o); err != nil {
		t.Fatal(err)
	}
	c.written()
}

func nothingToDo(t *testing.T, c *cloud, o bq.Options) *Plan {
	t.Helper()
	p, err := New(t.Context(), c.c, o)
	if err != nil {
		t.Fatal(err)
	}
	if p.Pending() {
		t.Errorf("there is still to do: %q", tell(p))
	}
	return p
}

// In an empty project everything is made, in an order in which each finds what it builds on; then
// there is nothing to do, and once the printed commands ran no grant is missing.
func TestEmptyProject(t *testing.T) {
	c := newCloud(t)
	p, err := New(t.Context(), c.c, options())
	if err != nil {
		t.Fatal(err)
	}
	if w := c.written(); len(w) > 0 {
		t.Fatalf("the plan alone sent %q", w)
	}
	plan := tell(p)
	want := 4 + 1 + len(bq.Tables(bq.Views())) + len(bq.Views()) - len(keptOf(bq.Views()))
	if len(plan) != want || plan[0] != "create data set tallyman" || plan[1] != "create table tallyman.records" || plan[len(plan)-1] != "create subscription tallyman-to-bigquery" {
		t.Errorf("the plan has %d steps, want %d: %q", len(plan), want, plan)
	}
	if len(p.Grants) != 5 {
		t.Errorf("grants missing: %+v", p.Grants)
	}
	c.mustApply(t, options())
	if p := nothingToDo(t, c, options()); len(p.Grants) != 5 {
		t.Errorf("grants missing after the first run: %+v", p.Grants)
	}
	c.bq.Share(dataset, "WRITER", "service-4711@gcp-sa-pubsub.iam.gserviceaccount.com")
	if p := nothingToDo(t, c, options()); len(p.Grants) != 3 {
		t.Errorf("grants missing after the data set's: %+v", p.Grants)
	}
	c.grantAll(t, options())
	p = nothingToDo(t, c, options())
	if len(p.Grants) != 0 {
		t.Errorf("grants missing after they were given: %+v", p.Grants)
	}
	if w := c.written(); len(w) > 0 {
		t.Errorf("there was nothing to do, and it sent %q", w)
	}

	table := c.bq.Table(dataset, bq.Records)
	tp := table["timePartitioning"].(map[string]any)
	if tp["type"] != "DAY" || tp["field"] != "ts" || tp["expirationMs"] != "7776000000" || table["requirePartitionFilter"] != true ||
		fmt.Sprint(table["clustering"]) != "map[fields:[kind repository workflow]]" {
		t.Errorf("the table of records is %v, %v, %v", tp, table["requirePartitionFilter"], table["clustering"])
	}
	for _, v := range bq.Views() {
		o := c.bq.Table(dataset, v.Name)
		if v.Table {
			if o["type"] != "TABLE" || o["requirePartitionFilter"] == true || len(o["schema"].(map[string]any)["fields"].([]any)) != len(v.Columns) {
				t.Errorf("the kept answer %s is %v", v.Name, o)
			}
			continue
		}
		query := o["view"].(map[string]any)["query"].(string)
		if strings.Contains(query, " tallyman.") || !strings.Contains(query, "`"+project+"."+dataset+".") {
			t.Errorf("the view %s reads elsewhere: %s", v.Name, query)
		}
	}
	s, err := c.c.Subscriptions.GetSubscription(t.Context(), &pubsubpb.GetSubscriptionRequest{Subscription: "projects/acme-ci/subscriptions/tallyman-to-bigquery"})
	if err != nil {
		t.Fatal(err)
	}
	b := s.GetBigqueryConfig()
	if b.GetTable() != "acme-ci.tallyman.records" || !b.GetUseTableSchema() || b.GetUseTopicSchema() || !b.GetDropUnknownFields() || b.GetWriteMetadata() {
		t.Errorf("the subscription writes as %v", b)
	}
	if d := s.GetDeadLetterPolicy(); d.GetDeadLetterTopic() != "projects/acme-ci/topics/tallyman-to-bigquery-dead" || d.GetMaxDeliveryAttempts() != 20 ||
		s.GetExpirationPolicy() == nil || s.GetExpirationPolicy().GetTtl() != nil || s.GetMessageRetentionDuration().AsDuration() != 7*24*time.Hour {
		t.Errorf("the subscription is %v", s)
	}
}

func keptOf(views []bq.View) []bq.View {
	return slices.DeleteFunc(views, func(v bq.View) bool { return !v.Table })
}

// A first run that ends anywhere is finished by the next.
func TestInterrupted(t *testing.T) {
	c := newCloud(t)
	steps := 0
	for round := 1; ; round++ {
		p, err := New(t.Context(), c.c, options())
		if err != nil {
			t.Fatal(err)
		}
		if !p.Pending() {
			break
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := 0
		err = p.Run(ctx, func(Step) {
			steps++
			if done++; done == round { // 1, then 2, then 3, ...
				cancel()
			}
		})
		cancel()
		if err == nil {
			break
		}
	}
	nothingToDo(t, c, options())
	if w := c.written(); len(w) != steps {
		t.Errorf("%d steps sent %d writes: %q", steps, len(w), w)
	}
}

// What happens to a table of an older release, or one that somebody touched.
func TestChanges(t *testing.T) {
	c := newCloud(t)
	c.mustApply(t, options())
	type object = map[string]any
	fieldsOf := func(o object) []any { return o["schema"].(object)["fields"].([]any) }
	for _, test := range []struct {
		name    string
		table   string
		edit    func(object)
		options func(*bq.Options)
		plan    string // in the details
		refused string
	}{
		{name: "a column of the top is missing", table: bq.Records, plan: "add column http", edit: func(o object) {
			o["schema"] = object{"fields": slices.DeleteFunc(slices.Clone(fieldsOf(o)), func(f any) bool { return f.(object)["name"] == "http" })}
		}},
		{name: "a nested column is missing", table: bq.Records, plan: "add column ci.runner.labels", edit: func(o object) {
			for _, f := range fieldsOf(o) {
				for _, g := range subOf(f) {
					if g.(object)["name"] == "runner" && f.(object)["name"] == "ci" {
						g.(object)["fields"] = slices.DeleteFunc(slices.Clone(subOf(g)), func(h any) bool { return h.(object)["name"] == "labels" })
					}
				}
			}
		}},
		{name: "a column of a newer release", table: bq.Records, plan: "may be NULL", edit: func(o object) {
			o["schema"] = object{"fields": append(slices.Clone(fieldsOf(o)), object{"name": "later", "type": "STRING", "mode": "REQUIRED"})}
		}},
		{name: "a description", table: bq.Records, plan: "describe 1 columns", edit: func(o object) { fieldsOf(o)[0].(object)["description"] = "mine" }},
		{name: "no filter wanted", table: bq.Records, plan: "refuse queries that name no days", edit: func(o object) { delete(o, "requirePartitionFilter") }},
		{name: "not clustered", table: bq.Records, plan: "cluster new days by kind, repository, workflow", edit: func(o object) { delete(o, "clustering") }},
		{name: "a shorter expiration", table: bq.Records, plan: "days expire: 30d in place of 90d; OLDER RECORDS ARE DELETED",
			options: func(o *bq.Options) { o.Expiration = 30 * 24 * time.Hour }},
		{name: "no expiration", table: bq.Records, plan: "days expire: never in place of 30d", options: func(o *bq.Options) { o.Expiration = bq.Never }},
		{name: "a column of a kept answer", table: "calls", plan: "add column node", edit: func(o object) {
			o["schema"] = object{"fields": slices.DeleteFunc(slices.Clone(fieldsOf(o)), func(f any) bool { return f.(object)["name"] == "node" })}
		}},
		{name: "another query", table: "traffic", plan: "another query", edit: func(o object) { o["view"] = object{"query": "SELECT 1"} }},

		{name: "another type", table: bq.Records, refused: "table acme-ci:tallyman.records: BigQuery would refuse the new columns: schema: the type STRING cannot become INTEGER", edit: func(o object) {
			for _, f := range fieldsOf(o) {
				if f.(object)["name"] == "schema" {
					f.(object)["type"] = "STRING"
				}
			}
		}},
		{name: "another partitioning", table: bq.Records, refused: "not partitioned by day of ts", edit: func(o object) { o["timePartitioning"] = object{"type": "HOUR", "field": "ts"} }},
		{name: "a table where a view is wanted", table: "traffic", refused: "it is a TABLE, and a view is wanted", edit: func(o object) { o["type"] = "TABLE" }},
		{name: "a view where a table is wanted", table: bq.Records, refused: "it is a VIEW, and a table is wanted", edit: func(o object) { o["type"] = "VIEW" }},
		{name: "another location", table: bq.Records, refused: "it is in US and cannot move to EU", options: func(o *bq.Options) { o.Location = "EU" }},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := c.bq.Table(dataset, test.table)
			if test.edit != nil {
				c.bq.Edit(dataset, test.table, test.edit)
			}
			o := options()
			if test.options != nil {
				test.options(&o)
			}
			p, err := New(t.Context(), c.c, o)
			if test.refused != "" {
				if err == nil || !strings.Contains(err.Error(), test.refused) {
					t.Errorf("the error is %v, want %q", err, test.refused)
				}
				if w := c.written(); len(w) > 0 {
					t.Errorf("it sent %q", w)
				}
				c.bq.Edit(dataset, test.table, func(o object) { // as it was
					c := newCloud(t)
					c.mustApply(t, options())
					clear(o)
					for k, v := range c.bq.Table(dataset, test.table) {
						o[k] = v
					}
				})
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(p.Steps, func(s Step) bool { return strings.HasSuffix(s.Name, "."+test.table) })
			if s := p.Steps[i]; len(tell(p)) != 1 || s.Action != Change || !strings.Contains(strings.Join(s.Details, "\n"), test.plan) {
				t.Fatalf("the plan is %q, with %q; want %q", tell(p), s.Details, test.plan)
			}
			if w := c.written(); len(w) > 0 {
				t.Fatalf("the plan alone sent %q", w)
			}
			if err := p.Run(t.Context(), func(Step) {}); err != nil {
				t.Fatal(err)
			}
			if w := c.written(); len(w) != 1 {
				t.Errorf("it sent %q", w)
			}
			nothingToDo(t, c, o)
			if before["creationTime"] != c.bq.Table(dataset, test.table)["creationTime"] {
				t.Error("it is another table")
			}
		})
	}
}

func subOf(f any) []any {
	s, _ := f.(map[string]any)["fields"].([]any)
	return s
}

// What a column has beside its name, type and description is its owner's.
func TestPolicyTagsSurvive(t *testing.T) {
	c := newCloud(t)
	c.mustApply(t, options())
	type object = map[string]any
	actor := func() object {
		for _, f := range c.bq.Table(dataset, bq.Records)["schema"].(object)["fields"].([]any) {
			for _, g := range subOf(f) {
				if f.(object)["name"] == "ci" && g.(object)["name"] == "actor" {
					return g.(object)
				}
			}
		}
		t.Fatal("no column ci.actor")
		return nil
	}
	column := actor()
	c.bq.Edit(dataset, bq.Records, func(object) {
		column["policyTags"] = object{"names": []any{"projects/p/locations/us/taxonomies/1/policyTags/2"}}
		column["description"] = "who"
	})
	c.mustApply(t, options())
	if got := fmt.Sprint(actor()["policyTags"]); got != "map[names:[projects/p/locations/us/taxonomies/1/policyTags/2]]" || actor()["description"] == "who" {
		t.Errorf("the column is now %v", actor())
	}
}

// Two that run it at once: the later hears of it, and destroys nothing.
func TestChangedMeanwhile(t *testing.T) {
	c := newCloud(t)
	c.mustApply(t, options())
	c.bq.Edit(dataset, bq.Records, func(o map[string]any) { delete(o, "clustering") })
	p, err := New(t.Context(), c.c, options())
	if err != nil {
		t.Fatal(err)
	}
	c.bq.Edit(dataset, bq.Records, func(o map[string]any) { o["description"] = "theirs" })
	if err := p.Run(t.Context(), func(Step) {}); err == nil || !strings.Contains(err.Error(), "somebody else changed it meanwhile") {
		t.Errorf("the error is %v", err)
	}
	empty := newCloud(t)
	p, err = New(t.Context(), empty.c, options())
	if err != nil {
		t.Fatal(err)
	}
	empty.mustApply(t, options())
	if err := p.Run(t.Context(), func(Step) {}); err == nil || !strings.Contains(err.Error(), "somebody else changed it meanwhile") {
		t.Errorf("the error is %v", err)
	}
}

func TestSubscriptions(t *testing.T) {
	const sub = "projects/acme-ci/subscriptions/tallyman-to-bigquery"
	for _, test := range []struct {
		name    string
		edit    func(*pubsubpb.Subscription)
		changed string
		refused string
	}{
		{"unknown members stop it", func(s *pubsubpb.Subscription) { s.BigqueryConfig.DropUnknownFields = false }, "write by the table's columns", ""},
		{"the schema of the topic", func(s *pubsubpb.Subscription) {
			s.BigqueryConfig.UseTableSchema, s.BigqueryConfig.UseTopicSchema = false, true
		}, "write by the table's columns", ""},
		{"no dead letters", func(s *pubsubpb.Subscription) { s.DeadLetterPolicy = nil }, "give up after 20 attempts", ""},
		{"it ends when it is quiet", func(s *pubsubpb.Subscription) { s.ExpirationPolicy = nil }, "stay, however quiet", ""},
		{"other pauses and attempts", func(s *pubsubpb.Subscription) { s.RetryPolicy, s.DeadLetterPolicy.MaxDeliveryAttempts = nil, 5 }, "", ""},
		{"it is for somebody who pulls", func(s *pubsubpb.Subscription) { s.BigqueryConfig = nil }, "", "it does not write to BigQuery"},
		{"another table", func(s *pubsubpb.Subscription) { s.BigqueryConfig.Table = "acme-ci.other.records" }, "", "it writes to acme-ci.other.records, not to acme-ci.tallyman.records"},
		{"another topic", func(s *pubsubpb.Subscription) { s.Topic = "projects/acme-ci/topics/other" }, "", "it receives from projects/acme-ci/topics/other"},
		{"a deleted topic", func(s *pubsubpb.Subscription) { s.Topic = "_deleted-topic_" }, "", "its topic was deleted"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCloud(t)
			c.mustApply(t, options())
			s, err := c.pubsub.GServer.GetSubscription(t.Context(), &pubsubpb.GetSubscriptionRequest{Subscription: sub})
			if err != nil {
				t.Fatal(err)
			}
			test.edit(s) // the server's own
			p, err := c.apply(t, options())
			if test.refused != "" {
				if err == nil || !strings.Contains(err.Error(), "subscription "+sub+": "+test.refused) {
					t.Errorf("the error is %v, want %q", err, test.refused)
				}
				if w := c.written(); len(w) > 0 {
					t.Errorf("it sent %q", w)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if last := p.Steps[len(p.Steps)-1]; !strings.Contains(strings.Join(last.Details, "\n"), test.changed) || (last.Action == Change) != (test.changed != "") {
				t.Errorf("the step is %+v, want %q", last, test.changed)
			}
			nothingToDo(t, c, options())
		})
	}
}

// A refused permission names what to grant, and nothing of the answer's headers.
func TestDenied(t *testing.T) {
	c := newCloud(t)
	deny := func(method, path string) func(string, string) (int, string) {
		return func(m, p string) (int, string) {
			if m == method && strings.HasSuffix(p, path) {
				return http.StatusForbidden, "Access Denied: Permission bigquery.something denied"
			}
			return 0, ""
		}
	}
	check := func(name string, err error, want ...string) {
		t.Helper()
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: the error is %v, want %q", name, err, w)
			}
		}
	}
	bigQuery := "gcloud projects add-iam-policy-binding acme-ci --member MEMBER --role roles/bigquery.dataOwner"
	c.bq.Fail = deny(http.MethodGet, "/datasets/tallyman")
	_, err := c.apply(t, options())
	check("reading", err, "read data set acme-ci:tallyman: permission denied", bigQuery)
	if n := strings.Count(err.Error(), bigQuery); n != 1 {
		t.Errorf("it says %d times what to grant", n)
	}
	c.bq.Fail = deny(http.MethodPost, "/datasets")
	_, err = c.apply(t, options())
	check("making the data set", err, "create data set acme-ci:tallyman: permission denied", bigQuery)
	c.bq.Fail = nil
	c.fail = func(method string, request any) error {
		if s, ok := request.(*pubsubpb.Subscription); ok && s.GetBigqueryConfig() != nil {
			return status.Error(codes.PermissionDenied, "The caller does not have permission")
		}
		return nil
	}
	_, err = c.apply(t, options())
	check("making the subscription", err, "create subscription projects/acme-ci/subscriptions/tallyman-to-bigquery: permission denied",
		"--role roles/pubsub.editor", `bq add-iam-policy-binding --table=true --member="serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com" --role=roles/bigquery.dataEditor acme-ci:tallyman.records`)
	c.mu.Lock()
	c.fail, c.denied = nil, []string{"pubsub.topics.attachSubscription"}
	c.mu.Unlock()
	p, err := New(t.Context(), c.c, options())
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(p.Grants, func(g Grant) bool {
		return strings.Contains(g.Why, "pubsub.topics.attachSubscription") && strings.Contains(g.Command, "roles/pubsub.editor")
	}); i < 0 {
		t.Errorf("the plan does not say that the caller cannot attach a subscription: %+v", p.Grants)
	}
}

// Errors of the services are told with what helps.
func TestServerErrors(t *testing.T) {
	c := newCloud(t)
	for _, test := range []struct {
		status  int
		message string
		want    string
	}{
		{http.StatusUnauthorized, "Invalid Credentials", "gcloud auth application-default login"},
		{http.StatusNotFound, "Not found: Project acme-ci", "is acme-ci the project's id?"},
		{http.StatusInternalServerError, "oh", "BigQuery answers 500: oh (run the command again)"},
		{http.StatusBadRequest, "Invalid dataset ID", "BigQuery refuses it: Invalid dataset ID"},
	} {
		c.bq.Fail = func(string, string) (int, string) { return test.status, test.message }
		if _, err := c.apply(t, options()); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%d: the error is %v, want %q", test.status, err, test.want)
		}
	}
}

func TestConnectToHalfAnEmulator(t *testing.T) {
	if _, err := Connect(t.Context(), "127.0.0.1:1", ""); err == nil || !strings.Contains(err.Error(), "both or neither") {
		t.Errorf("the error is %v", err)
	}
}

// Which bindings count as what is needed.
func TestGranted(t *testing.T) {
	const ours, theirs, runner = "serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com", "serviceAccount:service-1@gcp-sa-pubsub.iam.gserviceaccount.com", "serviceAccount:r@acme-ci.iam.gserviceaccount.com"
	const writes, publishesDead, publishes = 0, 2, 4 // of bq.Options.Grants
	for _, test := range []struct {
		name            string
		number, runners string
		grant           int
		role, member    string
		want            bool
	}{
		{"the role itself", "4711", "", writes, "roles/bigquery.dataEditor", ours, true},
		{"a stronger one", "4711", "", writes, "roles/bigquery.admin", ours, true},
		{"the data set's old word for it", "4711", "", writes, "WRITER", ours, true},
		{"a weaker one", "4711", "", writes, "roles/bigquery.dataViewer", ours, false},
		{"another project's agent", "4711", "", writes, "roles/bigquery.dataEditor", theirs, false},
		{"an agent, and the number is not known", "", "", writes, "roles/bigquery.dataEditor", ours, true},
		{"no agent, and the number is not known", "", "", writes, "roles/bigquery.dataEditor", runner, false},
		{"the agent on the dead-letter topic", "4711", "", publishesDead, "roles/pubsub.publisher", ours, true},
		{"the runners on the topic", "4711", runner, publishes, "roles/pubsub.publisher", runner, true},
		{"somebody else on the topic", "4711", runner, publishes, "roles/pubsub.publisher", "user:x@example.com", false},
		{"somebody, and the runners are not known", "4711", "", publishes, "roles/pubsub.publisher", runner, true},
		{"the agent alone, and the runners are not known", "4711", "", publishes, "roles/pubsub.publisher", ours, false},
	} {
		o, err := bq.Options{Project: project, Dataset: dataset, Number: test.number, Runners: test.runners}.Complete()
		if err != nil {
			t.Fatal(err)
		}
		p := &Plan{o: o}
		if got := p.granted([]binding{{test.role, []string{test.member}}}, o.Grants()[test.grant]); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}
