package page

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

const (
	second = int64(time.Second)
	canary = "canary-7b1f"
)

// hostile are texts that somebody else chose.
var hostile = []string{
	`</script><script>alert("` + canary + `")</script>`,
	`"><img src=x onerror=alert(1)>` + canary,
	"acme/\u202egnp.exe\u2066" + canary,
	"\x1b[31mred\x00\x07" + canary,
	"עברית/مثال" + canary,
	"invalid\xff\xfe" + canary,
	strings.Repeat("very-long-", 50_000) + canary,
	"{{.Policy}}${jndi:ldap://x}" + canary,
	"javascript:alert(1)",
}

var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func totals() panels.Result {
	p := panels.Panel{
		ID: "totals", Section: "Overview", Title: "Totals", Question: "How much was there?", Chart: panels.Figures, Wide: true,
		SQL: "SELECT 1", Views: []string{"overview"},
		Columns: []panels.Column{
			{Name: "calls", Title: "Docker calls", Unit: panels.Count},
			{Name: "failed", Title: "failed", Unit: panels.Count, Tone: panels.Bad, Note: "exit code other than 0"},
			{Name: "busy", Title: "time taken", Unit: panels.Duration},
			{Name: "pulls", Title: "images pulled", Unit: panels.Count},
			{Name: "containers", Title: "containers started", Unit: panels.Count},
			{Name: "jobs", Title: "jobs", Unit: panels.Count},
			{Name: "unattributed", Title: "without a job", Unit: panels.Share, Tone: panels.Warn},
			{Name: "lost", Title: "records lost", Unit: panels.Count, Tone: panels.Bad},
		},
	}
	return panels.Result{Panel: p, Query: "SELECT COUNT(*) AS calls\nFROM tallyman.calls\nWHERE hour >= TIMESTAMP '2026-11-19 12:00:00+00'",
		Table: panels.Table{Rows: [][]any{{int64(1284311), int64(20317), int64(93) * 3600 * second, int64(48210), int64(210554), int64(9120), 0.018, int64(0)}}}}
}

func over() panels.Result {
	p := panels.Panel{ID: "activity", Section: "Overview", Title: "Activity", Question: "When was docker called, and how often did it fail?", Chart: panels.Activity, Wide: true,
		Columns: []panels.Column{{Name: "hour", Title: "hour", Unit: panels.Time}, {Name: "ok", Title: "ended well", Unit: panels.Count},
			{Name: "unknown", Title: "end not seen", Unit: panels.Count, Tone: panels.Quiet}, {Name: "failed", Title: "failed", Unit: panels.Count, Tone: panels.Bad}}}
	r := panels.Result{Panel: p, Query: "SELECT hour, ok\nFROM tallyman.activity\nORDER BY hour"}
	for i := range 48 {
		h := (i*7)%24 + 3
		day := 1 + (i%24)*(24-i%24)/24
		r.Table.Rows = append(r.Table.Rows, []any{noon.Add(time.Duration(i-48) * time.Hour), int64(900*day + h*90), int64(h * 8), int64(h * (i % 5) * 9)})
	}
	return r
}

func repositories(texts []string) panels.Result {
	p := panels.Panel{ID: "repositories", Section: "Who", Title: "Repositories and workflows", Question: "Whose workflows call docker most?", Chart: panels.Bars,
		Columns: []panels.Column{
			{Name: "repository", Title: "repository", Unit: panels.Text, Sets: "repository"}, {Name: "workflow", Title: "workflow", Unit: panels.Text, Sets: "workflow"}, {Name: "job", Title: "job", Unit: panels.Text},
			{Name: "url", Unit: panels.URL},
			{Name: "calls", Title: "calls", Unit: panels.Count, Bar: true}, {Name: "failed", Title: "failed", Unit: panels.Count, Tone: panels.Bad}, {Name: "time", Title: "time", Unit: panels.Duration}}}
	r := panels.Result{Panel: p, Query: "SELECT repository, workflow\nFROM tallyman.jobs\nORDER BY calls DESC\nLIMIT 15"}
	for i, s := range texts {
		link := fmt.Sprintf("https://github.com/acme/shop/actions/runs/%d", i)
		if i%3 == 2 {
			link = s
		}
		r.Table.Rows = append(r.Table.Rows, []any{s, "CI: build, test", "test", link, int64(90000 / (i + 1)), int64(i * 31), int64(90000/(i+1)) * second / 3})
	}
	return r
}

func durations() panels.Result {
	p := panels.Panel{ID: "durations", Section: "Who", Title: "How long commands take", Question: "Which commands do jobs wait for?", Chart: panels.Spread,
		Note:    "The full bar is the median, the pale one what 95 of 100 stay under.",
		Columns: []panels.Column{{Name: "command", Title: "command", Unit: panels.Text}, {Name: "p50", Title: "median", Unit: panels.Duration, Bar: true}, {Name: "p95", Title: "95 %", Unit: panels.Duration, Bar: true}, {Name: "n", Title: "calls", Unit: panels.Count}}}
	r := panels.Result{Panel: p, Query: "SELECT command"}
	for i, c := range []string{"docker build", "docker compose up", "docker run", "docker pull", "docker push", "docker ps"} {
		p50 := int64(200/(i*i+1)) * second
		r.Table.Rows = append(r.Table.Rows, []any{c, p50, p50*int64(i+2) + second/5, int64(4000 * (i + 1))})
	}
	return r
}

func sample() Page {
	none := panels.Result{Panel: panels.Panel{ID: "rate-limit", Section: "Images", Title: "Docker Hub's rate limit", Question: "Which egress host comes near the limit?", Chart: panels.Bars,
		Columns: []panels.Column{{Name: "host", Title: "host", Unit: panels.Text}, {Name: "n", Title: "pulls", Unit: panels.Count, Bar: true}},
		Empty:   "Import Docker Hub’s usage export with tallyman-desk import dockerhub-csv."}, Query: "SELECT host"}
	broken := none
	broken.ID, broken.Title, broken.Err = "broken", "A panel without an answer", errors.New("view tallyman.rates: "+hostile[1])
	return Page{
		Title: "The fleet’s docker account", Sources: []string{"journal"}, Version: "test", Generated: noon,
		From: noon.Add(-48 * time.Hour), To: noon, Filter: panels.Filter{Repository: "acme/*"},
		Trust:   Trust{Known: true, Jobs: 9120, Recorded: 8942, Sealed: 9200, Environment: 610, Inferred: 150, None: 40, Lost: 12, Holes: 1},
		Results: []panels.Result{totals(), over(), repositories([]string{"acme/shop", "acme/billing", "acme/platform-tools-with-a-rather-long-name", "acme/web", "other/infra"}), durations(), none, broken},
	}
}
