package bq

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Terraform returns what apply makes as a Terraform configuration for the provider
// hashicorp/google, the grants included.
func Terraform(o Options) (string, error) { return terraform(o, Views()) }

func terraform(o Options, views []View) (string, error) {
	o, err := o.Complete()
	if err != nil {
		return "", err
	}
	w := &hcl{}
	w.WriteString(`# Written by tallyman bq terraform. The same as tallyman bq apply makes.

terraform {
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0"
    }
  }
}

`)
	location := o.Location
	if location == "" {
		location = "US"
	}
	member := `"serviceAccount:service-` + o.Number + `@gcp-sa-pubsub.iam.gserviceaccount.com"`
	if o.Number == "" {
		w.block(`data "google_project" "tallyman"`, "project_id", text(o.Project))
		member = `"serviceAccount:service-${data.google_project.tallyman.number}@gcp-sa-pubsub.iam.gserviceaccount.com"`
	}
	runners := text(o.Runners)
	if o.Runners == "" {
		w.block(`variable "runners"`, "description", text("Who publishes records, as an IAM member: serviceAccount:NAME@PROJECT.iam.gserviceaccount.com"), "type", "string")
		runners = "var.runners"
	}

	const dataset = `google_bigquery_dataset.tallyman.dataset_id`
	w.block(`resource "google_bigquery_dataset" "tallyman"`, "project", text(o.Project), "dataset_id", text(o.Dataset), "location", text(location),
		"description", text(DatasetDescription))
	for _, t := range Tables(views) {
		if t.Name == Records && o.Expiration != 0 {
			t.Expiration = max(o.Expiration, 0)
		}
		schema, err := schemaJSON(t.Fields)
		if err != nil {
			return "", err
		}
		attributes := []string{"project", text(o.Project), "dataset_id", dataset, "table_id", text(t.Name), "description", text(t.Description)}
		if t.RequireFilter {
			attributes = append(attributes, "require_partition_filter", "true")
		}
		if len(t.ClusterBy) > 0 {
			attributes = append(attributes, "clustering", list(t.ClusterBy, text))
		}
		if t.PartitionBy != "" {
			partitioning := []string{"type", text("DAY"), "field", text(t.PartitionBy)}
			if t.Expiration > 0 {
				partitioning = append(partitioning, "expiration_ms", fmt.Sprint(t.Expiration.Milliseconds()))
			}
			attributes = append(attributes, "time_partitioning", nest(partitioning...))
		}
		w.block(`resource "google_bigquery_table" "`+t.Name+`"`, append(attributes, "schema", heredoc(schema))...)
	}
	for _, v := range views {
		if v.Table {
			continue
		}
		needs := map[string]bool{}
		for _, m := range relation.FindAllStringSubmatch(v.SQL, -1) {
			needs["google_bigquery_table."+m[1]] = true
		}
		w.block(`resource "google_bigquery_table" "`+v.Name+`"`, "project", text(o.Project), "dataset_id", dataset, "table_id", text(v.Name),
			"description", text(v.Description()), "deletion_protection", "false",
			"depends_on", list(slices.Sorted(maps.Keys(needs)), func(s string) string { return s }),
			"view", nest("query", heredoc(In(v.SQL, o.Project, o.Dataset)), "use_legacy_sql", "false"))
	}

	w.block(`resource "google_pubsub_topic" "tallyman"`, "project", text(o.Project), "name", text(o.Topic))
	w.block(`resource "google_pubsub_topic" "dead"`, "project", text(o.Project), "name", text(o.DeadLetter))
	w.block(`resource "google_pubsub_subscription" "dead"`, "project", text(o.Project), "name", text(o.DeadLetter), "topic", "google_pubsub_topic.dead.id",
		"message_retention_duration", seconds(MessageRetention), "expiration_policy", nest("ttl", `""`))
	w.block(`resource "google_pubsub_subscription" "tallyman"`, "project", text(o.Project), "name", text(o.Subscription), "topic", "google_pubsub_topic.tallyman.id",
		"message_retention_duration", seconds(MessageRetention), "depends_on", list(tableGrants(o), func(s string) string { return s }),
		"expiration_policy", nest("ttl", `""`),
		"bigquery_config", nest("table", `"${google_bigquery_table.records.project}.${google_bigquery_table.records.dataset_id}.${google_bigquery_table.records.table_id}"`,
			"use_table_schema", "true", "drop_unknown_fields", "true"),
		"dead_letter_policy", nest("dead_letter_topic", "google_pubsub_topic.dead.id", "max_delivery_attempts", fmt.Sprint(DeliveryAttempts)),
		"retry_policy", nest("minimum_backoff", seconds(MinBackoff), "maximum_backoff", seconds(MaxBackoff)))
	for _, g := range o.Grants() {
		who := runners
		if g.Member == o.Agent() {
			who = member
		}
		on := map[Resource][]string{
			OnTable:        {"dataset_id", dataset, "table_id", "google_bigquery_table." + g.Name + ".table_id"},
			OnTopic:        {"topic", topicOf(o, g.Name) + ".name"},
			OnSubscription: {"subscription", "google_pubsub_subscription.tallyman.name"},
		}[g.On]
		w.block(fmt.Sprintf(`resource "%s" "%s"`, iamType[g.On], grantName(g)), append(append([]string{"project", text(o.Project)}, on...), "role", text(g.Role), "member", who)...)
	}
	return strings.TrimSuffix(w.String(), "\n"), nil
}

// DatasetDescription is what BigQuery shows beside the data set.
const DatasetDescription = "Who called docker on the runners: records and answers of Tallyman."

var iamType = map[Resource]string{
	OnTable: "google_bigquery_table_iam_member", OnTopic: "google_pubsub_topic_iam_member", OnSubscription: "google_pubsub_subscription_iam_member",
}

func grantName(g Grant) string {
	_, role, _ := strings.Cut(g.Role, ".")
	if g.On == OnTable {
		return "agent_" + strings.ToLower(role)
	}
	if strings.HasPrefix(g.Why, "the runners") {
		return "runners_" + role
	}
	return "agent_" + role
}

func topicOf(o Options, name string) string {
	if name == o.DeadLetter {
		return "google_pubsub_topic.dead"
	}
	return "google_pubsub_topic.tallyman"
}

// hcl is a configuration that is being written.
type hcl struct{ strings.Builder }

// tableGrants are what must be there before Pub/Sub lets a subscription write to a table.
func tableGrants(o Options) []string {
	var out []string
	for _, g := range o.Grants() {
		if g.On == OnTable {
			out = append(out, iamType[g.On]+"."+grantName(g))
		}
	}
	return out
}

// block writes a block with these attributes, names and values by turns. A value that
// is a block of its own begins with a brace.
func (w *hcl) block(head string, attributes ...string) {
	w.WriteString(head + " {\n")
	write(&w.Builder, "  ", attributes)
	w.WriteString("}\n\n")
}

// write lines up the equal signs of neighbours, as terraform fmt does.
func write(b *strings.Builder, indent string, attributes []string) {
	width := 0
	for i := 0; i < len(attributes); i += 2 {
		name, value := attributes[i], attributes[i+1]
		switch {
		case isNested(value):
			fmt.Fprintf(b, "%s%s %s\n", indent, name, value)
			width = 0
			continue
		case width == 0:
			for j := i; j < len(attributes) && !isNested(attributes[j+1]); j += 2 {
				width = max(width, len(attributes[j]))
			}
		}
		fmt.Fprintf(b, "%s%-*s = %s\n", indent, width, name, value)
	}
}

func isNested(value string) bool { return strings.HasPrefix(value, "{\n") }

func nest(attributes ...string) string {
	var b strings.Builder
	b.WriteString("{\n")
	write(&b, "    ", attributes)
	b.WriteString("  }")
	return b.String()
}

// template doubles what Terraform would expand.
var template = strings.NewReplacer("${", "$${", "%{", "%%{")

func text(s string) string {
	quoted, _ := json.Marshal(s) // a string has no error; its escapes are HCL's too but for <, > and &
	return template.Replace(strings.NewReplacer(`\u003c`, "<", `\u003e`, ">", `\u0026`, "&").Replace(string(quoted)))
}

func heredoc(s string) string {
	return "<<EOT\n" + template.Replace(strings.TrimSuffix(s, "\n")) + "\nEOT"
}

func list(items []string, each func(string) string) string {
	var out []string
	for _, i := range items {
		out = append(out, each(i))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

func seconds(d time.Duration) string { return fmt.Sprintf(`"%ds"`, int64(d.Seconds())) }

func schemaJSON(fields []Field) (string, error) {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(fields); err != nil {
		return "", fmt.Errorf("write the schema: %w", err)
	}
	return b.String(), nil
}
