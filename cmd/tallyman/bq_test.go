//go:build !slim && !nobq

package main

import (
	"bytes"
	"net/http"
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/pubsub/v2/pstest"

	"github.com/tallyman-ci/tallyman/internal/fakebq"
)

// The scripts that the commands print are of the place that was named.
func TestBQScripts(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"owners", "--project", "acme-ci", "-"}, exitOK, "INSERT INTO `acme-ci.tallyman.owners` (pattern, team, line) VALUES\n(\"acme/*\", \"@acme/all\", 1);\n"},
		{[]string{"owners", "--project", "acme-ci"}, exitUsage, "wants one file"},
		{[]string{"owners", "--project", "acme-ci", "none"}, exitError, "read owners: open none"},
		{[]string{"refresh", "--project", "acme-ci", "--dataset", "fleet", "--days", "3"}, exitOK, "INTERVAL 3 DAY"},
		{[]string{"refresh", "--project", "acme-ci", "--days", "0"}, exitUsage, "want 1 to 4000"},
		{[]string{"views", "traffic"}, exitOK, "Which repository, workflow, job and actor call docker"},
	} {
		var out bytes.Buffer
		p := program{stdin: strings.NewReader("acme/* @acme/all\n"), stdout: &out, stderr: &out}
		if code := p.run(t.Context(), append([]string{"tallyman", "bq"}, c.args...)); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%q ends with %d, want %d with %q: %s", c.args, code, c.code, c.want, out.String())
		}
	}
}

// The command in an empty project, against servers of both services: a dry run, the run, a second
// one, and one that is refused. Google's fake of Pub/Sub has no policies to read.
func TestBQApply(t *testing.T) {
	bigQuery, pubSub := fakebq.New(), pstest.NewServerWithAddress("127.0.0.1:0")
	t.Cleanup(func() {
		bigQuery.Close()
		if err := pubSub.Close(); err != nil {
			t.Error(err)
		}
	})
	run := func(want int, args ...string) (stdout, stderr string) {
		t.Helper()
		var out, errs bytes.Buffer
		p := program{stdin: strings.NewReader(""), stdout: &out, stderr: &errs,
			environ: []string{"BIGQUERY_EMULATOR_HOST=" + bigQuery.Listener.Addr().String(), "PUBSUB_EMULATOR_HOST=" + pubSub.Addr}}
		if code := p.run(t.Context(), append([]string{"tallyman", "bq", "apply"}, args...)); code != want {
			t.Fatalf("exit code %d, want %d: %s%s", code, want, out.String(), errs.String())
		}
		return out.String(), errs.String()
	}
	has := func(text string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !slices.ContainsFunc(strings.Split(text, "\n"), func(l string) bool { return strings.Join(strings.Fields(l), " ") == w }) {
				t.Errorf("no line %q in\n%s", w, text)
			}
		}
	}
	flags := []string{"--project", "acme-ci", "--location", "EU", "--expiration", "30d", "--runners", "serviceAccount:r@acme-ci.iam.gserviceaccount.com", "--project-number", "4711"}

	out, _ := run(exitOK, append(flags, "--dry-run")...)
	has(out, "create data set acme-ci:tallyman location EU, for good",
		"create view acme-ci:tallyman.traffic",
		"create subscription projects/acme-ci/subscriptions/tallyman-to-bigquery writes to acme-ci.tallyman.records; gives up after 20 attempts, to tallyman-to-bigquery-dead",
		`gcloud pubsub topics add-iam-policy-binding tallyman --project acme-ci --member="serviceAccount:r@acme-ci.iam.gserviceaccount.com" --role=roles/pubsub.publisher`,
		`bq add-iam-policy-binding --table=true --member="serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com" --role=roles/bigquery.dataEditor acme-ci:tallyman.records`,
		"This was the plan; nothing was done.")
	if w := bigQuery.Writes(); len(w) > 0 || strings.Contains(out, "created ") {
		t.Errorf("the dry run sent %q", w)
	}
	out, _ = run(exitOK, flags...)
	has(out, "created data set acme-ci:tallyman", "created topic projects/acme-ci/topics/tallyman", "Everything is there.",
		"The answers are empty until a scheduled query fills their tables: tallyman bq refresh --help")
	bigQuery.Writes()
	out, _ = run(exitOK, flags...)
	has(out, "keep table acme-ci:tallyman.records", "Everything is there.",
		"# the runners publish (you may not read what is granted: perhaps it is)")
	if w := bigQuery.Writes(); len(w) > 0 || strings.Contains(out, "scheduled") || strings.Contains(out, "create") || strings.Contains(out, "change") {
		t.Errorf("the second run sent %q and said\n%s", w, out)
	}
	_, errs := run(exitError, "--project", "acme-ci", "--location", "US")
	has(errs, "tallyman: data set acme-ci:tallyman: it is in EU and cannot move to US: name another data set, or leave the location out")
	bigQuery.Fail = func(string, string) (int, string) { return http.StatusForbidden, "Access Denied" }
	_, errs = run(exitError, flags...)
	has(errs, "Grant it to yourself: gcloud projects add-iam-policy-binding acme-ci --member MEMBER --role roles/bigquery.dataOwner")
}
