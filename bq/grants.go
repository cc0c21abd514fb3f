package bq

import "fmt"

// Grant is a role that somebody needs, and the command that gives it.
type Grant struct {
	Why     string
	Member  string
	Role    string
	On      Resource
	Name    string // of the table, topic or subscription
	Command string
}

// Resource is what a role is granted on.
type Resource string

// What roles are granted on.
const (
	OnTable        Resource = "table"
	OnTopic        Resource = "topic"
	OnSubscription Resource = "subscription"
)

// MemberUnknown stands in commands for who publishes, where that is not known.
const MemberUnknown = "MEMBER"

// Grants returns what the service agent of Pub/Sub and the runners need, beside what the caller
// of apply needs. Each is on one resource, so that it gives nothing more.
func (o Options) Grants() []Grant {
	runners := o.Runners
	if runners == "" {
		runners = MemberUnknown
	}
	agent := o.Agent()
	return []Grant{
		o.grant("Pub/Sub writes to the table", agent, "roles/bigquery.dataEditor", OnTable, Records),
		o.grant("Pub/Sub reads the table's columns", agent, "roles/bigquery.metadataViewer", OnTable, Records),
		o.grant("Pub/Sub publishes what it could not write", agent, "roles/pubsub.publisher", OnTopic, o.DeadLetter),
		o.grant("Pub/Sub takes that from the subscription", agent, "roles/pubsub.subscriber", OnSubscription, o.Subscription),
		o.grant("the runners publish", runners, "roles/pubsub.publisher", OnTopic, o.Topic),
	}
}

func (o Options) grant(why, member, role string, on Resource, name string) Grant {
	g := Grant{Why: why, Member: member, Role: role, On: on, Name: name}
	if on == OnTable {
		g.Command = fmt.Sprintf(`bq add-iam-policy-binding --table=true --member="%s" --role=%s %s:%s.%s`, member, role, o.Project, o.Dataset, name)
		return g
	}
	g.Command = fmt.Sprintf(`gcloud pubsub %ss add-iam-policy-binding %s --project %s --member="%s" --role=%s`, on, name, o.Project, member, role)
	return g
}
