package bq

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The golden file is looked at by people, and its text is that of a few views only, so that
// it does not change with each of them.
func TestTerraform(t *testing.T) {
	few := []View{
		{Name: "calls", Question: "What did each call do?", Table: true, SQL: "SELECT 1",
			Columns: []Column{{"ts", "TIMESTAMP", "the time"}, {"repository", "STRING", "owner/name"}, {"images", "ARRAY<STRING>", "images"}, {"n", "INT64", "number"}, {"share", "FLOAT64", "share"}, {"ok", "BOOL", "ok"}}},
		{Name: "traffic", Question: `Who "calls"?`, Note: "A note with ${x}.", SQL: "SELECT r'^%{2}${' AS x\nFROM tallyman.calls\nJOIN tallyman.records ON TRUE"},
	}
	for file, o := range map[string]Options{
		"testdata/default.tf": {Project: "acme-ci", Dataset: "tallyman"},
		"testdata/options.tf": {Project: "acme-ci", Dataset: "fleet", Location: "EU", Topic: "records", Subscription: "to-bq", DeadLetter: "dead", Expiration: Never,
			Runners: "serviceAccount:runners@acme-ci.iam.gserviceaccount.com", Number: "4711"},
	} {
		got, err := terraform(o, few)
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s is not what is written now (go test ./bq -run Terraform -update)", file)
		}
	}
}

var (
	declared = regexp.MustCompile(`(?m)^resource "([a-z_]+)" "([a-z_]+)" \{$`)
	referred = regexp.MustCompile(`\b(google_[a-z_]+\.[a-z_]+)\b`)
)

// Each resource is declared once, each that is named is declared, and what apply makes is there.
func TestTerraformIsWhole(t *testing.T) {
	got, err := Terraform(Options{Project: "acme-ci", Dataset: "tallyman", Expiration: 30 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	for _, m := range declared.FindAllStringSubmatch(got, -1) {
		name := m[1] + "." + m[2]
		if all[name] {
			t.Errorf("%s is declared twice", name)
		}
		all[name] = true
	}
	for _, m := range referred.FindAllStringSubmatch(got, -1) {
		if !all[m[1]] && !strings.HasPrefix(m[1], "google_project.") {
			t.Errorf("%s is named and not declared", m[1])
		}
	}
	for _, v := range Views() {
		if !all["google_bigquery_table."+v.Name] {
			t.Errorf("%s is missing", v.Name)
		}
	}
	if !strings.Contains(got, "expiration_ms = 2592000000") || !strings.Contains(got, "require_partition_filter = true") {
		t.Error("the table of records is not as wanted")
	}
}

func TestOptionsRefused(t *testing.T) {
	good := Options{Project: "acme-ci", Dataset: "tallyman"}
	if _, err := good.Complete(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Options){
		"no project is named":                     func(o *Options) { o.Project = "" },
		"no data set is named":                    func(o *Options) { o.Dataset = "" },
		`"a b" cannot be the name of a project`:   func(o *Options) { o.Project = "a b" },
		`"a-b" cannot be the name of a data set`:  func(o *Options) { o.Dataset = "a-b" },
		`"a/b" cannot be the name of a topic`:     func(o *Options) { o.Topic = "a/b" },
		`"google" cannot be the name of a topic`:  func(o *Options) { o.Topic = "google" },
		`"1ab" cannot be the name of a subscript`: func(o *Options) { o.Subscription = "1ab" },
		"would go round for ever":                 func(o *Options) { o.DeadLetter = "tallyman" },
		"both the subscription and that":          func(o *Options) { o.Subscription, o.DeadLetter = "same", "same" },
		"is under a day":                          func(o *Options) { o.Expiration = time.Hour },
		`"me" is no IAM member`:                   func(o *Options) { o.Runners = "me" },
		"is no IAM member: want":                  func(o *Options) { o.Runners = "user:$(reboot)" },
		"cannot be the name of a project's numb":  func(o *Options) { o.Number = "12a" },
	} {
		o := good
		change(&o)
		if _, err := o.Complete(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error is %v, want %q", err, want)
		}
	}
}
