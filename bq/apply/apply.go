// Package apply makes in Google Cloud what Tallyman's rows need: the data set with the
// table of records, the kept answers and the views, the Pub/Sub topic, the subscription
// that writes to the table, and the topic for what it could not write.
//
// New reads what there is and makes a plan; Run carries it out. Nothing is ever deleted,
// columns are only added, and a second run finds nothing to do. A run that was cut short
// is finished by the next.
package apply

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	pubsubapi "cloud.google.com/go/pubsub/v2/apiv1"
	"google.golang.org/api/bigquery/v2"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/bq"
)

// patience is how long one call may take, its retries included: the Pub/Sub client
// would try for ever.
const patience = 30 * time.Second

// Clients are the services' clients. BigQuery's is the one that Google generates for its
// REST API: the hand-written one makes this binary 4.5 MB larger, this one 0.25 MB.
type Clients struct {
	BigQuery      *bigquery.Service
	Topics        *pubsubapi.TopicAdminClient
	Subscriptions *pubsubapi.SubscriptionAdminClient
}

// Connect makes clients with the application default credentials, or for emulators on
// the addresses bigQuery and pubSub (host:port), which are given both or neither.
func Connect(ctx context.Context, bigQuery, pubSub string) (*Clients, error) {
	if (bigQuery == "") != (pubSub == "") {
		return nil, errors.New("BIGQUERY_EMULATOR_HOST and PUBSUB_EMULATOR_HOST: set both or neither, or half of what is made would be real")
	}
	options := []option.ClientOption{option.WithUserAgent("tallyman")}
	rest, rpc := options, options
	if bigQuery != "" {
		rest = append(options[:1:1], option.WithoutAuthentication(), option.WithEndpoint("http://"+bigQuery+"/bigquery/v2/"))
		rpc = append(options[:1:1], option.WithoutAuthentication(), option.WithEndpoint(pubSub),
			option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	}
	var c Clients
	var err error
	if c.BigQuery, err = bigquery.NewService(ctx, rest...); err != nil {
		return nil, fmt.Errorf("connect to BigQuery: %w (credentials: gcloud auth application-default login)", err)
	}
	if c.Topics, err = pubsubapi.NewTopicAdminClient(ctx, rpc...); err != nil {
		return nil, fmt.Errorf("connect to Pub/Sub: %w", err)
	}
	if c.Subscriptions, err = pubsubapi.NewSubscriptionAdminClient(ctx, rpc...); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to Pub/Sub: %w", err), c.Topics.Close())
	}
	return &c, nil
}

// Close ends the connections.
func (c *Clients) Close() error { return errors.Join(c.Topics.Close(), c.Subscriptions.Close()) }

// Action says what a step does.
type Action string

// What steps do.
const (
	Create Action = "create"
	Change Action = "change"
	Keep   Action = "keep"
)

// Step is one resource of the plan.
type Step struct {
	Action  Action
	What    string   // table, topic, ...
	Name    string   // as gcloud and bq write it
	Details []string // what changes, or must be known

	role string // that lets its caller do the step
	do   func(context.Context) error
}

// Plan is what has to be done, in this order, and the grants that are missing.
type Plan struct {
	Steps  []Step
	Grants []Grant
	Notes  []string

	o bq.Options
	c *Clients
}

// New reads what there is. Where something is there that cannot become what is wanted,
// the error says so for all such resources, and there is no plan.
func New(ctx context.Context, c *Clients, o bq.Options) (*Plan, error) {
	return plan(ctx, c, o, bq.Views())
}

func plan(ctx context.Context, c *Clients, o bq.Options, views []bq.View) (*Plan, error) {
	o, err := o.Complete()
	if err != nil {
		return nil, err
	}
	p := &Plan{o: o, c: c}
	var refused []error
	add := func(s Step, err error) bool {
		if err != nil {
			refused = append(refused, p.explain(s, "read", err))
			return false
		}
		p.Steps = append(p.Steps, s)
		return true
	}
	if add(p.dataset(ctx)) { // where it cannot be read, nothing in it can
		for _, t := range bq.Tables(views) {
			add(p.table(ctx, t))
		}
		for _, v := range views {
			if !v.Table {
				add(p.view(ctx, v))
			}
		}
	}
	if add(p.topic(ctx, o.Topic, "topic")) {
		add(p.topic(ctx, o.DeadLetter, "dead-letter topic"))
		add(p.deadSubscription(ctx))
		add(p.subscription(ctx))
	}
	if len(refused) > 0 {
		return nil, errors.Join(refused...)
	}
	p.grants(ctx)
	p.own(ctx)
	return p, nil
}

// Pending tells whether there is something to do.
func (p *Plan) Pending() bool {
	for _, s := range p.Steps {
		if s.Action != Keep {
			return true
		}
	}
	return false
}

// Run carries out the plan and calls done after each step that did something. It stops at the
// first error; the next run goes on from there.
func (p *Plan) Run(ctx context.Context, done func(Step)) error {
	for _, s := range p.Steps {
		if s.Action == Keep {
			continue
		}
		call, cancel := context.WithTimeout(ctx, patience)
		err := s.do(call)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return p.explain(s, string(s.Action), err)
		}
		done(s)
	}
	return nil
}

// explain says what an error means and what helps.
func (p *Plan) explain(s Step, doing string, err error) error {
	what := fmt.Sprintf("%s %s %s", doing, s.What, s.Name)
	var answer *googleapi.Error
	var refusal refusal
	st, isStatus := status.FromError(err)
	switch {
	case errors.As(err, &refusal):
		return fmt.Errorf("%s %s: %w", s.What, s.Name, err)
	case errors.As(err, &answer):
		err = errors.New(answer.Message) // its own text has the answer's headers and body
		switch {
		case answer.Code == http.StatusUnauthorized:
			return fmt.Errorf("%s: the credentials are not accepted: %w (gcloud auth application-default login)", what, err)
		case answer.Code == http.StatusForbidden:
			return p.denied(what, s.role, err)
		case answer.Code == http.StatusConflict, answer.Code == http.StatusPreconditionFailed:
			return fmt.Errorf("%s: somebody else changed it meanwhile: %w (run the command again)", what, err)
		case answer.Code == http.StatusNotFound && strings.Contains(answer.Message, "Not found: Project"):
			return fmt.Errorf("%s: %w (is %s the project's id?)", what, err, p.o.Project)
		case answer.Code >= 500 || answer.Code == http.StatusTooManyRequests:
			return fmt.Errorf("%s: BigQuery answers %d: %w (run the command again)", what, answer.Code, err)
		}
		return fmt.Errorf("%s: BigQuery refuses it: %w", what, err)
	case isStatus:
		told := errors.New(st.Message())
		switch st.Code() {
		case codes.PermissionDenied:
			return p.denied(what, s.role, told)
		case codes.AlreadyExists, codes.Aborted:
			return fmt.Errorf("%s: somebody else changed it meanwhile: %w (run the command again)", what, told)
		case codes.Unauthenticated:
			return fmt.Errorf("%s: the credentials are not accepted: %w (gcloud auth application-default login)", what, told)
		case codes.Unavailable, codes.DeadlineExceeded, codes.Internal:
			return fmt.Errorf("%s: Pub/Sub does not answer: %w (run the command again)", what, told)
		}
		return fmt.Errorf("%s: Pub/Sub refuses it: %w", what, told)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// denied says which grants help. To make a subscription that writes to BigQuery, the
// service agent's grants are needed as well as the caller's.
func (p *Plan) denied(what, role string, err error) error {
	service := "bigquery.googleapis.com"
	if strings.HasPrefix(role, "roles/pubsub.") {
		service = "pubsub.googleapis.com"
	}
	text := fmt.Sprintf("%s: permission denied: %s\n  Grant it to yourself: gcloud projects add-iam-policy-binding %s --member MEMBER --role %s\n  Where the service is not switched on: gcloud services enable %s --project %s",
		what, err, p.o.Project, role, service, p.o.Project)
	for _, g := range p.Grants {
		text += "\n  " + g.Why + ":\n    " + g.Command
	}
	return errors.New(text)
}

// refusal is what is there and cannot become what is wanted.
type refusal struct{ error }

func refuse(format string, args ...any) error { return refusal{fmt.Errorf(format, args...)} }

// isNotFound leaves out that there is no such project: in it nothing can be made.
func isNotFound(err error) bool {
	var answer *googleapi.Error
	return errors.As(err, &answer) && answer.Code == http.StatusNotFound && !strings.Contains(answer.Message, "Not found: Project") || status.Code(err) == codes.NotFound
}
