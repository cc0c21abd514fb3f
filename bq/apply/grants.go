package apply

import (
	"context"
	"regexp"
	"slices"
	"strings"

	"cloud.google.com/go/iam/apiv1/iampb"
	"google.golang.org/api/bigquery/v2"

	"github.com/tallyman-ci/tallyman/bq"
)

// Grant is a role that is missing, or of which that cannot be told.
type Grant struct {
	bq.Grant
	Unsure bool // the policy could not be read
}

// stronger are the roles that a role is part of.
var stronger = map[string][]string{
	"roles/bigquery.dataEditor":     {"roles/bigquery.dataOwner", "roles/bigquery.admin", "roles/editor", "roles/owner", "WRITER", "OWNER"},
	"roles/bigquery.metadataViewer": {"roles/bigquery.dataEditor", "roles/bigquery.dataOwner", "roles/bigquery.dataViewer", "roles/bigquery.admin", "roles/editor", "roles/owner", "WRITER", "OWNER", "READER"},
	"roles/pubsub.publisher":        {"roles/pubsub.editor", "roles/pubsub.admin", "roles/editor", "roles/owner"},
	"roles/pubsub.subscriber":       {"roles/pubsub.editor", "roles/pubsub.admin", "roles/editor", "roles/owner"},
}

// binding is what a policy says, in the words that all policies share.
type binding struct {
	role    string
	members []string
}

// grants looks which of the needed grants the resources' own policies lack. What a whole
// project grants is not looked at: that would take a permission that few have, and the
// grants here are small ones.
func (p *Plan) grants(ctx context.Context) {
	var dataset []binding
	for _, g := range p.o.Grants() {
		missing := Grant{Grant: g}
		var have []binding
		var err error
		if p.exists(g) {
			have, err = p.policy(ctx, g)
		}
		if g.On == bq.OnTable && dataset == nil {
			dataset = p.access(ctx)
		}
		if g.On == bq.OnTable {
			have = append(have, dataset...)
		}
		if p.granted(have, g) {
			continue
		}
		missing.Unsure = err != nil
		p.Grants = append(p.Grants, missing)
	}
}

// exists tells whether the resource was there when the plan was made.
func (p *Plan) exists(g bq.Grant) bool {
	return slices.ContainsFunc(p.Steps, func(s Step) bool {
		return s.Action != Create && (strings.HasSuffix(s.Name, "/"+string(g.On)+"s/"+g.Name) || g.On == bq.OnTable && s.What == "table" && strings.HasSuffix(s.Name, "."+g.Name))
	})
}

func (p *Plan) policy(ctx context.Context, g bq.Grant) ([]binding, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var out []binding
	if g.On == bq.OnTable {
		name := "projects/" + p.o.Project + "/datasets/" + p.o.Dataset + "/tables/" + g.Name
		answer, err := p.c.BigQuery.Tables.GetIamPolicy(name, &bigquery.GetIamPolicyRequest{}).Context(ctx).Do()
		if err != nil {
			return nil, err
		}
		for _, b := range answer.Bindings {
			if b.Condition == nil {
				out = append(out, binding{b.Role, b.Members})
			}
		}
		return out, nil
	}
	request := &iampb.GetIamPolicyRequest{Resource: p.path(string(g.On)+"s", g.Name)}
	get := p.c.Topics.GetIamPolicy
	if g.On == bq.OnSubscription {
		get = p.c.Subscriptions.GetIamPolicy
	}
	answer, err := get(ctx, request)
	if err != nil {
		return nil, err
	}
	for _, b := range answer.GetBindings() {
		if b.GetCondition() == nil {
			out = append(out, binding{b.GetRole(), b.GetMembers()})
		}
	}
	return out, nil
}

// access is what the data set grants for all of its tables; nothing where that cannot be read.
func (p *Plan) access(ctx context.Context) []binding {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out := []binding{}
	d, err := p.c.BigQuery.Datasets.Get(p.o.Project, p.o.Dataset).Context(ctx).Do()
	if err != nil {
		return out
	}
	for _, a := range d.Access {
		switch {
		case a.Condition != nil:
		case a.IamMember != "":
			out = append(out, binding{a.Role, []string{a.IamMember}})
		case a.UserByEmail != "":
			out = append(out, binding{a.Role, []string{"serviceAccount:" + a.UserByEmail}})
		}
	}
	return out
}

// granted tells whether the bindings give what g wants. Where the project's number is not known,
// any project's agent of Pub/Sub is taken for ours; where the runners' identity is not, any publisher.
func (p *Plan) granted(have []binding, g bq.Grant) bool {
	agent := regexp.MustCompile(`^serviceAccount:service-[0-9]+@gcp-sa-pubsub\.iam\.gserviceaccount\.com$`)
	return slices.ContainsFunc(have, func(b binding) bool {
		return (b.role == g.Role || slices.Contains(stronger[g.Role], b.role)) && slices.ContainsFunc(b.members, func(m string) bool {
			switch {
			case g.Member == p.o.Agent() && p.o.Number == "":
				return agent.MatchString(m)
			case g.Member == bq.MemberUnknown:
				return !agent.MatchString(m)
			}
			return m == g.Member
		})
	})
}

// own looks whether the caller may do what the plan says to resources that are there. For new
// ones the services have no such question; there their answer to the step tells.
func (p *Plan) own(ctx context.Context) {
	attaches := slices.ContainsFunc(p.Steps, func(s Step) bool { return s.Action == Create && s.What == "subscription" })
	for _, s := range p.Steps {
		permission := ""
		switch {
		case s.Action == Change && (s.What == "table" || s.What == "view"):
			permission = "bigquery.tables.update"
		case s.Action == Change && s.What == "subscription":
			permission = "pubsub.subscriptions.update"
		case s.Action == Keep && s.What == "topic" && attaches:
			permission = "pubsub.topics.attachSubscription"
		}
		if permission == "" || p.may(ctx, s, permission) {
			continue
		}
		p.Grants = append(p.Grants, Grant{Grant: bq.Grant{
			Why: "you need " + permission + " on " + s.Name, Member: bq.MemberUnknown, Role: s.role,
			Command: "gcloud projects add-iam-policy-binding " + p.o.Project + ` --member="` + bq.MemberUnknown + `" --role=` + s.role,
		}})
	}
}

// may is true also where that cannot be asked.
func (p *Plan) may(ctx context.Context, s Step, permission string) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var granted []string
	var err error
	if strings.HasPrefix(permission, "bigquery.") {
		table := strings.TrimPrefix(s.Name, p.o.Project+":"+p.o.Dataset+".")
		var answer *bigquery.TestIamPermissionsResponse
		answer, err = p.c.BigQuery.Tables.TestIamPermissions("projects/"+p.o.Project+"/datasets/"+p.o.Dataset+"/tables/"+table,
			&bigquery.TestIamPermissionsRequest{Permissions: []string{permission}}).Context(ctx).Do()
		if err == nil {
			granted = answer.Permissions
		}
	} else {
		test := p.c.Topics.TestIamPermissions
		if s.What == "subscription" {
			test = p.c.Subscriptions.TestIamPermissions
		}
		var answer *iampb.TestIamPermissionsResponse
		answer, err = test(ctx, &iampb.TestIamPermissionsRequest{Resource: s.Name, Permissions: []string{permission}})
		granted = answer.GetPermissions()
	}
	return err != nil || slices.Contains(granted, permission)
}
