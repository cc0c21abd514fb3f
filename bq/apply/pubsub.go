package apply

import (
	"context"
	"strings"

	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/tallyman-ci/tallyman/bq"
)

func (p *Plan) path(kind, name string) string {
	return "projects/" + p.o.Project + "/" + kind + "/" + name
}

func (p *Plan) topic(ctx context.Context, name, what string) (Step, error) {
	path := p.path("topics", name)
	s := Step{Action: Keep, What: what, Name: path, role: pubSubRole}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	have, err := p.c.Topics.GetTopic(ctx, &pubsubpb.GetTopicRequest{Topic: path})
	if isNotFound(err) {
		s.Action = Create
		s.do = func(ctx context.Context) error {
			_, err := p.c.Topics.CreateTopic(ctx, &pubsubpb.Topic{Name: path})
			return err
		}
		return s, nil
	}
	if err == nil && name == p.o.Topic && have.GetSchemaSettings().GetEncoding() == pubsubpb.Encoding_BINARY {
		return s, refuse("it has a schema with binary messages, and rows are JSON: name another topic")
	}
	return s, err
}

// deadSubscription keeps what could not be written until somebody looks: without a
// subscription, a topic keeps nothing.
func (p *Plan) deadSubscription(ctx context.Context) (Step, error) {
	path, topic := p.path("subscriptions", p.o.DeadLetter), p.path("topics", p.o.DeadLetter)
	s := Step{Action: Keep, What: "subscription", Name: path, role: pubSubRole}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	have, err := p.c.Subscriptions.GetSubscription(ctx, &pubsubpb.GetSubscriptionRequest{Subscription: path})
	if isNotFound(err) {
		s.Action = Create
		s.Details = []string{"keeps for 7 days what could not be written"}
		s.do = func(ctx context.Context) error {
			_, err := p.c.Subscriptions.CreateSubscription(ctx, &pubsubpb.Subscription{
				Name: path, Topic: topic,
				MessageRetentionDuration: durationpb.New(bq.MessageRetention),
				ExpirationPolicy:         &pubsubpb.ExpirationPolicy{},
			})
			return err
		}
		return s, nil
	}
	if err == nil {
		err = sameTopic(have, topic)
	}
	return s, err
}

// sameTopic refuses a subscription that receives from another topic: that is settled when it is made.
func sameTopic(have *pubsubpb.Subscription, topic string) error {
	switch {
	case have.GetTopic() == topic:
		return nil
	case strings.HasPrefix(have.GetTopic(), "_deleted"):
		return refuse("its topic was deleted, and it cannot have another: delete it, and run the command again")
	}
	return refuse("it receives from %s, and cannot from %s: name another, or delete it", have.GetTopic(), topic)
}

func (p *Plan) subscription(ctx context.Context) (Step, error) {
	path := p.path("subscriptions", p.o.Subscription)
	s := Step{Action: Keep, What: "subscription", Name: path, role: pubSubRole}
	want := &pubsubpb.Subscription{
		Name:  path,
		Topic: p.path("topics", p.o.Topic),
		BigqueryConfig: &pubsubpb.BigQueryConfig{
			Table:          p.o.Project + "." + p.o.Dataset + "." + bq.Records,
			UseTableSchema: true,
			// A fleet is never of one release: without this, each row of a runner that is ahead
			// of the table would be a dead letter. What is dropped is in the journals still.
			DropUnknownFields: true,
		},
		DeadLetterPolicy: &pubsubpb.DeadLetterPolicy{DeadLetterTopic: p.path("topics", p.o.DeadLetter), MaxDeliveryAttempts: bq.DeliveryAttempts},
		// With these pauses the attempts last for more than an hour: an outage of BigQuery is
		// waited for, and only what is refused again and again is given up.
		RetryPolicy:              &pubsubpb.RetryPolicy{MinimumBackoff: durationpb.New(bq.MinBackoff), MaximumBackoff: durationpb.New(bq.MaxBackoff)},
		MessageRetentionDuration: durationpb.New(bq.MessageRetention),
		ExpirationPolicy:         &pubsubpb.ExpirationPolicy{}, // never; by default 31 quiet days end it
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	have, err := p.c.Subscriptions.GetSubscription(ctx, &pubsubpb.GetSubscriptionRequest{Subscription: path})
	if isNotFound(err) {
		s.Action = Create
		s.Details = []string{"writes to " + want.BigqueryConfig.Table, "gives up after 20 attempts, to " + p.o.DeadLetter}
		s.do = func(ctx context.Context) error {
			_, err := p.c.Subscriptions.CreateSubscription(ctx, want)
			return err
		}
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if err := sameTopic(have, want.Topic); err != nil {
		return s, err
	}
	config := have.GetBigqueryConfig()
	switch {
	case config == nil:
		return s, refuse("it does not write to BigQuery, and somebody may read from it: name another, or delete it")
	case strings.Replace(config.GetTable(), ":", ".", 1) != want.BigqueryConfig.Table:
		return s, refuse("it writes to %s, not to %s: name another, or delete it", config.GetTable(), want.BigqueryConfig.Table)
	case have.GetDetached():
		return s, refuse("it is detached from its topic for good: delete it, and run the command again")
	}
	p.state(config.GetState())
	update := proto.Clone(have).(*pubsubpb.Subscription)
	mask := &fieldmaskpb.FieldMask{}
	if !config.GetUseTableSchema() || !config.GetDropUnknownFields() {
		s.Details = append(s.Details, "write by the table's columns, and leave out what it has none for")
		update.BigqueryConfig.UseTopicSchema, update.BigqueryConfig.UseTableSchema, update.BigqueryConfig.DropUnknownFields = false, true, true
		update.BigqueryConfig.State = 0
		mask.Paths = append(mask.Paths, "bigquery_config")
	}
	// Its number of attempts and its pauses are the owner's once it is there.
	if have.GetDeadLetterPolicy().GetDeadLetterTopic() != want.DeadLetterPolicy.DeadLetterTopic {
		s.Details = append(s.Details, "give up after 20 attempts, to "+p.o.DeadLetter)
		update.DeadLetterPolicy = want.DeadLetterPolicy
		mask.Paths = append(mask.Paths, "dead_letter_policy")
	}
	if have.GetExpirationPolicy() == nil || have.GetExpirationPolicy().GetTtl().AsDuration() > 0 {
		s.Details = append(s.Details, "stay, however quiet it is")
		update.ExpirationPolicy = want.ExpirationPolicy
		mask.Paths = append(mask.Paths, "expiration_policy")
	}
	if len(mask.Paths) > 0 {
		s.Action = Change
		s.do = func(ctx context.Context) error {
			_, err := p.c.Subscriptions.UpdateSubscription(ctx, &pubsubpb.UpdateSubscriptionRequest{Subscription: update, UpdateMask: mask})
			return err
		}
	}
	return s, nil
}

// state notes why the service says that the subscription does not write.
func (p *Plan) state(s pubsubpb.BigQueryConfig_State) {
	why := map[pubsubpb.BigQueryConfig_State]string{
		pubsubpb.BigQueryConfig_PERMISSION_DENIED:               "Pub/Sub may not write to the table: see the grants below",
		pubsubpb.BigQueryConfig_NOT_FOUND:                       "the table was not there when Pub/Sub looked last",
		pubsubpb.BigQueryConfig_SCHEMA_MISMATCH:                 "rows do not fit the table's columns",
		pubsubpb.BigQueryConfig_IN_TRANSIT_LOCATION_RESTRICTION: "an organization's policy keeps messages in regions that the data set is not in",
	}[s]
	if why != "" {
		p.Notes = append(p.Notes, "the subscription "+p.o.Subscription+" writes nothing: "+why)
	}
}
