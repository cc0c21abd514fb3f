package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/api/option"

	"github.com/tallyman-ci/tallyman/blame/sim"
	"github.com/tallyman-ci/tallyman/desk/panels"
)

// warehouse speaks jobs.query and dry runs of BigQuery's REST API. It knows no SQL: each
// panel's query gets one row that fits its columns, and the ranking's those of a fleet.
type warehouse struct {
	t     *testing.T
	bytes int64 // what each query would read
	fleet *sim.Fleet

	mu      sync.Mutex
	dry     int
	queries []map[string]any
}

func (h *warehouse) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); r.Method == http.MethodPost && err != nil {
		h.t.Error(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch r.Method + " " + r.URL.Path {
	case "POST /projects/my-project/jobs":
		h.dry++
		fmt.Fprintf(w, `{"jobReference":{"projectId":"my-project","jobId":"dry"},"status":{"state":"DONE"},"configuration":{"dryRun":true,"query":{}},"statistics":{"totalBytesProcessed":"%d"}}`, h.bytes)
	case "POST /projects/my-project/queries":
		h.queries = append(h.queries, body)
		for _, p := range append(panels.All(), panels.Trust()) {
			sql, _ := panels.Parameters(strings.TrimSpace(p.SQL), panels.GoogleSQL, panels.Filter{Repository: "acme/shop"})
			if panels.In(sql, "my-project", "ds") != body["query"] {
				continue
			}
			var fields, values []string
			for _, c := range p.Columns {
				kind, value := "INTEGER", "7"
				switch c.Unit {
				case panels.Text, panels.URL:
					kind, value = "STRING", "acme/shop"
				case panels.Time:
					kind, value = "TIMESTAMP", "1793865600000000"
				case panels.Share:
					kind, value = "FLOAT", "0.5"
				}
				fields = append(fields, fmt.Sprintf(`{"name":%q,"type":%q}`, c.Name, kind))
				values = append(values, fmt.Sprintf(`{"v":%q}`, value))
			}
			fmt.Fprintf(w, `{"jobReference":{"projectId":"my-project","jobId":"q"},"jobComplete":true,"totalRows":"1","schema":{"fields":[%s]},"rows":[{"f":[%s]}]}`, strings.Join(fields, ","), strings.Join(values, ","))
			return
		}
		requests, builds := panels.Suspects()
		switch asked := body["query"]; asked {
		case panels.In(strings.TrimSpace(requests.SQL), "my-project", "ds"):
			h.requests(w)
			return
		case panels.In(strings.TrimSpace(builds.SQL), "my-project", "ds"):
			h.builds(w)
			return
		}
		h.t.Errorf("no panel asks %s", body["query"])
		http.Error(w, "{}", http.StatusBadRequest)
	case "GET /projects/my-project/jobs/q":
		fmt.Fprint(w, `{"jobReference":{"projectId":"my-project","jobId":"q"},"status":{"state":"DONE"},"configuration":{"query":{}},"statistics":{"query":{"totalBytesBilled":"10485760"}}}`)
	default:
		h.t.Errorf("%s %s is not a call that a report makes", r.Method, r.URL)
		http.NotFound(w, r)
	}
}

func (h *warehouse) requests(w http.ResponseWriter) {
	var rows [][]any
	for _, q := range h.fleet.Requests {
		rows = append(rows, []any{true, micros(q.Time), q.UserAgent, q.Asked, q.Addr, 1})
	}
	h.answer(w, "anonymous BOOLEAN, ts TIMESTAMP, user_agent STRING, asked STRING, addr STRING, n INTEGER", rows)
}

func (h *warehouse) builds(w http.ResponseWriter) {
	var rows [][]any
	for i, b := range h.fleet.Builds {
		if !b.Recorded {
			continue
		}
		repository, workflow, job := h.fleet.Candidate(b.Workflow)
		id := fmt.Sprint("build-", i)
		rows = append(rows, []any{micros(b.Start), id, "invocation", repository, workflow, job, b.RunNumber, "buildx build", nil, nil})
		if b.EndKnown {
			rows = append(rows, []any{micros(b.Start.Add(b.Duration)), id + "-end", "invocation.end", repository, workflow, job, b.RunNumber, "buildx build", id, b.Duration.Nanoseconds()})
		}
	}
	h.answer(w, "ts TIMESTAMP, id STRING, kind STRING, repository STRING, workflow STRING, job STRING, run_number INTEGER, command STRING, invocation_id STRING, duration_ns INTEGER", rows)
}

func micros(t time.Time) int64 { return t.UnixMicro() }

// answer writes rows as jobs.query does: every value is a text, or null.
func (h *warehouse) answer(w http.ResponseWriter, schema string, rows [][]any) {
	type cell struct {
		V any `json:"v"`
	}
	type field struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	type line struct {
		F []cell `json:"f"`
	}
	var fields []field
	for _, f := range strings.Split(schema, ", ") {
		name, kind, _ := strings.Cut(f, " ")
		fields = append(fields, field{name, kind})
	}
	var lines []line
	for _, r := range rows {
		var l line
		for _, v := range r {
			if v != nil {
				v = fmt.Sprint(v)
			}
			l.F = append(l.F, cell{v})
		}
		lines = append(lines, l)
	}
	err := json.NewEncoder(w).Encode(map[string]any{
		"jobReference": map[string]string{"projectId": "my-project", "jobId": "q"}, "jobComplete": true, "totalRows": fmt.Sprint(len(rows)),
		"schema": map[string]any{"fields": fields}, "rows": lines,
	})
	if err != nil {
		h.t.Error(err)
	}
}

// The fleet's page: estimated first, bounded, with the same panels as the local one.
func TestPictureFromBigQuery(t *testing.T) {
	h := &warehouse{t: t, bytes: 3 << 20, fleet: smallFleet()}
	server := httptest.NewServer(h)
	defer server.Close()
	datasetOptions = []option.ClientOption{option.WithEndpoint(server.URL + "/"), option.WithHTTPClient(server.Client())}
	defer func() { datasetOptions = nil }()
	name := filepath.Join(t.TempDir(), "fleet.html")
	run := func(args ...string) (string, error) {
		var out, say bytes.Buffer
		app := &cli.App{Commands: []*cli.Command{reportCommand()}, Writer: &out, ErrWriter: &say, ExitErrHandler: func(*cli.Context, error) {}}
		err := app.RunContext(t.Context(), append([]string{"tallyman-desk", "report", "--from", "bigquery://my-project/ds", "--repository", "acme/shop"}, args...))
		return say.String(), err
	}
	all := len(panels.All()) + 3 // with how far it can be trusted, and two for the suspects

	if _, err := run("--dry-run", "--owners", name); err == nil || !strings.Contains(err.Error(), "tallyman bq owners") || h.dry != 0 {
		t.Errorf("a file of owners beside BigQuery: %v, and %d estimates", err, h.dry)
	}

	say, err := run("--dry-run")
	if err != nil || len(h.queries) != 0 || h.dry != all {
		t.Errorf("a dry run made %d queries and %d estimates: %v", len(h.queries), h.dry, err)
	}
	if want := fmt.Sprintf("%d queries will read %d MiB, at most 10 GiB each", all, 3*all); !strings.Contains(say, want) {
		t.Errorf("%q does not say %q", say, want)
	}

	if _, err := run("--html", name, "--max-bytes", "1000000"); err == nil || !strings.Contains(err.Error(), "raise --max-bytes") || len(h.queries) != 0 {
		t.Errorf("more than allowed: %v, and %d queries", err, len(h.queries))
	}
	if _, err := os.Stat(name); err == nil {
		t.Error("a page without answers was written")
	}

	if say, err = run("--html", name); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(say, "BigQuery billed ") {
		t.Errorf("%q does not say what was billed", say)
	}
	if len(h.queries) != all {
		t.Errorf("%d queries for %d panels", len(h.queries), all)
	}
	for _, q := range h.queries {
		if q["maximumBytesBilled"] != fmt.Sprint(10<<30) {
			t.Errorf("a query without a bound: %v", q)
		}
		if strings.Contains(q["query"].(string), "acme/shop") {
			t.Errorf("a text of the user in the query: %s", q["query"])
		}
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	_, ranking, _ := strings.Cut(string(text), `<section id="suspects"`)
	ranking, _, _ = strings.Cut(ranking, "</section>")
	for _, w := range h.fleet.Workflows {
		if w.Guilty() && !strings.Contains(ranking, ">"+w.Repository+"<") {
			t.Errorf("%s is guilty and not among the suspects", w.Repository)
		}
	}
	for _, want := range []string{"7 of 7 jobs recorded", "FROM `my-project.ds.calls`", "repository = &#39;acme/shop&#39;", "from <bdi>bigquery://my-project/ds</bdi>"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the page does not hold %s", want)
		}
	}
}
