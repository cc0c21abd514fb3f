package dataset

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/api/option"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// fake speaks the part of BigQuery's REST API that a query needs: jobs.query,
// jobs.getQueryResults and jobs.insert with dryRun
// (https://cloud.google.com/bigquery/docs/reference/rest/v2/jobs). It knows no SQL: it
// answers what it was given.
type fake struct {
	t      *testing.T
	answer func(w http.ResponseWriter, body map[string]any)

	mu   sync.Mutex
	asks []map[string]any // bodies of jobs.query
	dry  []map[string]any // configurations of jobs.insert
}

const schema = `{"fields":[{"name":"hour","type":"TIMESTAMP"},{"name":"repository","type":"STRING"},{"name":"calls","type":"INTEGER"},{"name":"share","type":"FLOAT"},{"name":"day","type":"DATE"},{"name":"sum","type":"NUMERIC"}]}`

func row(i int) string {
	return fmt.Sprintf(`{"f":[{"v":"%d"},{"v":"acme/r%d"},{"v":"%d"},{"v":"0.25"},{"v":"2026-11-20"},{"v":null}]}`, time.Date(2026, 11, 20, i, 0, 0, 0, time.UTC).UnixMicro(), i, i)
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	var body map[string]any
	if r.Method == http.MethodPost {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			f.t.Error(err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case r.Method == http.MethodPost && r.URL.Path == "/projects/payer/queries":
		f.asks = append(f.asks, body)
		if f.answer != nil {
			f.answer(w, body)
			return
		}
		// The answer is not ready yet: the client must come back for it.
		fmt.Fprint(w, `{"jobReference":{"projectId":"payer","jobId":"j1","location":"EU"},"jobComplete":false}`)
	case r.Method == http.MethodGet && r.URL.Path == "/projects/payer/queries/j1":
		if r.URL.Query().Get("pageToken") == "" {
			fmt.Fprintf(w, `{"jobReference":{"projectId":"payer","jobId":"j1","location":"EU"},"jobComplete":true,"totalRows":"3","pageToken":"next","schema":%s,"rows":[%s,%s]}`, schema, row(0), row(1))
			return
		}
		fmt.Fprintf(w, `{"jobReference":{"projectId":"payer","jobId":"j1","location":"EU"},"jobComplete":true,"totalRows":"3","schema":%s,"rows":[%s]}`, schema, row(2))
	case r.Method == http.MethodGet && r.URL.Path == "/projects/payer/jobs/j1":
		fmt.Fprint(w, `{"jobReference":{"projectId":"payer","jobId":"j1","location":"EU"},"status":{"state":"DONE"},"configuration":{"query":{"query":"SELECT 1"}},"statistics":{"query":{"totalBytesBilled":"10485760"}}}`)
	case r.Method == http.MethodPost && r.URL.Path == "/projects/payer/jobs":
		config := body["configuration"].(map[string]any)
		f.dry = append(f.dry, config)
		fmt.Fprint(w, `{"jobReference":{"projectId":"payer","jobId":"dry"},"status":{"state":"DONE"},"configuration":{"dryRun":true,"query":{"query":"SELECT 1"}},"statistics":{"totalBytesProcessed":"123456789"}}`)
	default:
		f.t.Errorf("%s %s is not a call that a report makes", r.Method, r.URL)
		http.NotFound(w, r)
	}
}

func start(t *testing.T, answer func(http.ResponseWriter, map[string]any)) (*fake, *Dataset) {
	t.Helper()
	f := &fake{t: t, answer: answer}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	client := server.Client()
	t.Cleanup(client.CloseIdleConnections)
	d, err := Open(context.Background(), Place{Project: "fleet", Dataset: "tallyman", Billing: "payer", Location: "EU"}, 1<<30,
		option.WithEndpoint(server.URL+"/"), option.WithHTTPClient(client))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, d
}

var (
	from   = time.Date(2026, 11, 19, 0, 0, 0, 0, time.UTC)
	params = []panels.Param{{Name: "from", Value: from}, {Name: "repository", Value: `a'; DROP TABLE records --`}}
)

const sql = "SELECT * FROM tallyman.calls WHERE hour >= @from AND repository = @repository"

// What is sent names the data set, carries texts of users as parameters only, and is bounded.
func TestQuery(t *testing.T) {
	f, d := start(t, nil)
	got, err := d.Query(t.Context(), sql, params...)
	if err != nil {
		t.Fatal(err)
	}
	day := time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)
	want := panels.Table{Columns: []string{"hour", "repository", "calls", "share", "day", "sum"}}
	for i := range 3 {
		want.Rows = append(want.Rows, []any{day.Add(time.Duration(i) * time.Hour), fmt.Sprintf("acme/r%d", i), int64(i), 0.25, day, nil})
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	if len(f.asks) != 1 {
		t.Fatalf("%d queries", len(f.asks))
	}
	ask := f.asks[0]
	if q := ask["query"]; q != "SELECT * FROM `fleet.tallyman.calls` WHERE hour >= @from AND repository = @repository" {
		t.Errorf("query %q", q)
	}
	if ask["maximumBytesBilled"] != "1073741824" || ask["useLegacySql"] != false || ask["location"] != "EU" {
		t.Errorf("the query is not bounded, or not GoogleSQL, or anywhere: %v", ask)
	}
	sent, err := json.Marshal(ask["queryParameters"])
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{`"name":"from"`, `"type":"TIMESTAMP"`, `2026-11-19`, `"name":"repository"`, `a'; DROP TABLE records --`} {
		if !strings.Contains(string(sent), part) {
			t.Errorf("parameters %s have no %s", sent, part)
		}
	}
}

func TestEstimate(t *testing.T) {
	f, d := start(t, nil)
	n, err := d.Estimate(t.Context(), sql, params...)
	if err != nil || n != 123456789 {
		t.Errorf("estimate %d, %v", n, err)
	}
	if len(f.dry) != 1 || f.dry[0]["dryRun"] != true || len(f.asks) != 0 {
		t.Errorf("an estimate must be a dry run: %v, %v", f.dry, f.asks)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name, answer string
		code         int
		want         []string
	}{
		{"too much", `{"error":{"code":400,"message":"Query exceeded limit for bytes billed","errors":[{"reason":"bytesBilledLimitExceeded","message":"x"}]}}`, 400, []string{"--max-bytes", "1073741824"}},
		{"not allowed", `{"error":{"code":403,"message":"Access Denied","errors":[{"reason":"accessDenied","message":"x"}]}}`, 403, []string{"roles/bigquery.dataViewer on fleet.tallyman"}},
		{"no such view", `{"error":{"code":404,"message":"Not found: Table fleet:tallyman.calls","errors":[{"reason":"notFound","message":"x"}]}}`, 404, []string{"tallyman bq apply"}},
		{"bad query", `{"error":{"code":400,"message":"Syntax error","errors":[{"reason":"invalidQuery","message":"x"}]}}`, 400, []string{"Syntax error"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, d := start(t, func(w http.ResponseWriter, _ map[string]any) {
				w.WriteHeader(tt.code)
				fmt.Fprint(w, tt.answer)
			})
			_, err := d.Query(t.Context(), sql, params...)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %s", err, want)
				}
			}
		})
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]Place{
		"bigquery://my-project/tallyman":                                  {Project: "my-project", Dataset: "tallyman"},
		"bigquery://my-project/tallyman/":                                 {Project: "my-project", Dataset: "tallyman"},
		"bigquery://my-project/ds_1?location=EU&billing_project=my-payer": {Project: "my-project", Dataset: "ds_1", Location: "EU", Billing: "my-payer"},
	} {
		if got, err := Parse(text); err != nil || got != want {
			t.Errorf("Parse(%q) = %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "bigquery://", "bigquery://p", "bigquery://project/", "bigquery://project/a`b", "bigquery://project/a/b", "bigquery://PRO`JECT/ds",
		"https://project/ds", "bigquery://u:p@project/ds", "bigquery://project/ds?token=x", "bigquery://project/ds?billing_project=a%60"} {
		if got, err := Parse(text); err == nil {
			t.Errorf("Parse(%q) = %v", text, got)
		}
	}
}
