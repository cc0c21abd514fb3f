package dashboards

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

var update = flag.Bool("update", false, "write the checked-in dashboard again")

// The dashboard in bq/grafana is that of today's panels. Write it again with
// go test ./desk/dashboards -update.
func TestCheckedIn(t *testing.T) {
	name := filepath.Join("..", "..", "bq", "grafana", "tallyman.json")
	want, err := Grafana(panels.All(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("bq/grafana/tallyman.json is stale: go test ./desk/dashboards -update")
	}
	for _, p := range read(t, got).Panels {
		for _, q := range p.Targets {
			if strings.ContainsAny(q.RawSQL, "@") {
				t.Errorf("%s has a placeholder left: %s", p.Title, q.RawSQL)
			}
		}
	}
}

// list has one panel of each chart, and two of those that stand side by side.
func list() []panels.Panel {
	text := panels.Column{Name: "repository", Title: "repository", Unit: panels.Text, Sets: "repository"}
	n := panels.Column{Name: "calls", Title: "calls", Unit: panels.Count, Bar: true, Tone: panels.Bad}
	sql := "SELECT repository, calls FROM tallyman.calls WHERE hour >= @from AND hour < @to AND @only(repository) LIMIT 15"
	p := func(id, section string, c panels.Chart, wide bool, columns ...panels.Column) panels.Panel {
		return panels.Panel{ID: id, Section: section, Title: id, Question: "Who?", Views: []string{"calls"}, SQL: sql, Chart: c, Wide: wide, Columns: columns}
	}
	return []panels.Panel{
		p("totals", "Overview", panels.Figures, true, n), p("activity", "Overview", panels.Activity, true, panels.Column{Name: "hour", Unit: panels.Time}, n),
		p("a", "Who", panels.Bars, false, text, panels.Column{Name: "url", Unit: panels.URL}, n), p("b", "Who", panels.Spread, false, text, n), p("c", "Who", panels.Bars, false, text, n),
		p("d", "Last", panels.Bars, true, text, n),
	}
}

type dashboard struct {
	Panels []struct {
		ID      int
		Type    string
		Title   string
		GridPos struct{ X, Y, W, H int }
		Targets []struct {
			RawSQL     string `json:"rawSql"`
			Format     int
			Datasource struct{ Type, UID string }
		}
		FieldConfig struct {
			Overrides []struct {
				Matcher    struct{ Options string }
				Properties []struct{ ID string }
			}
		}
	}
	Templating struct{ List []struct{ Name, Type string } }
}

func read(t *testing.T, text []byte) dashboard {
	t.Helper()
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// Panels lie beside and below each other, never on each other, and each asks the
// chosen data source for its own time range.
func TestGrafana(t *testing.T) {
	text, err := Grafana(list(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	d := read(t, text)
	ids, taken := map[int]bool{}, map[[2]int]string{}
	queries := 0
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		g := p.GridPos
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s lies on %s, or outside", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		queries++
		q := p.Targets[0]
		if q.Datasource.UID != "${datasource}" || q.Datasource.Type != "grafana-bigquery-datasource" {
			t.Errorf("%s asks a data source of its own", p.Title)
		}
		if (p.Type == "timeseries") != (q.Format == 0) {
			t.Errorf("%s of type %s has the format %d", p.Title, p.Type, q.Format)
		}
		if want := "SELECT repository, calls FROM `${project}.${dataset}.calls` WHERE hour >= $__timeFrom() AND hour < $__timeTo() AND (${repository:singlequote} = '' OR repository = ${repository:singlequote}) LIMIT 15"; q.RawSQL != want {
			t.Errorf("%s asks %s", p.Title, q.RawSQL)
		}
	}
	if queries != len(list()) {
		t.Errorf("%d of %d panels are in the dashboard", queries, len(list()))
	}
	names := map[string]bool{}
	for _, v := range d.Templating.List {
		names[v.Name] = true
	}
	for _, name := range []string{"datasource", "project", "dataset", "repository", "workflow", "image"} {
		if !names[name] {
			t.Errorf("the dashboard has no variable %s", name)
		}
	}
	text, err = Grafana(list(), "my-project", "ds")
	if err != nil {
		t.Fatal(err)
	}
	if s := string(text); strings.Contains(s, "${project}") || !strings.Contains(s, "`my-project.ds.calls`") {
		t.Error("the dashboard does not ask the data set that was named")
	}
}

func TestLooker(t *testing.T) {
	links := Looker(list(), "my-project", "ds", "")
	if len(links) != 1 {
		t.Fatalf("%d links for one view", len(links))
	}
	u, err := url.Parse(links[0].URL)
	if err != nil {
		t.Fatal(err)
	}
	if u.Scheme+"://"+u.Host+u.Path != "https://lookerstudio.google.com/reporting/create" {
		t.Errorf("link to %s", u)
	}
	for name, want := range map[string]string{
		"ds.ds0.connector": "bigQuery", "ds.ds0.type": "TABLE", "ds.ds0.projectId": "my-project", "ds.ds0.datasetId": "ds", "ds.ds0.tableId": "calls",
		"ds.ds0.billingProjectId": "my-project", "r.reportName": "Tallyman: totals", "c.mode": "edit",
	} {
		if got := u.Query().Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if strings.Contains(links[0].URL, "+") {
		t.Error("a blank is a plus sign")
	}
}
