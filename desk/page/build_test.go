package page

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

// answers is a source that gives each panel as many rows as it is told, with the
// longest texts there can be, and breaks where it is told.
type answers struct {
	rows   int
	text   string
	broken string // part of a query that has no answer

	mu    sync.Mutex // panels are asked at the same time
	asked []string
}

func (a *answers) Dialect() panels.Dialect { return panels.DuckDB }

func (a *answers) Query(_ context.Context, sql string, params ...panels.Param) (panels.Table, error) {
	a.mu.Lock()
	a.asked = append(a.asked, sql)
	a.mu.Unlock()
	for _, p := range params {
		if t, ok := p.Value.(time.Time); ok && t.IsZero() {
			return panels.Table{}, errors.New("asked without a range")
		}
	}
	if a.broken != "" && strings.Contains(sql, a.broken) {
		return panels.Table{}, errors.New("no answer to " + a.broken)
	}
	for _, p := range append(panels.All(), panels.Trust(), panels.Bounds()) {
		if narrowed, _ := panels.Parameters(strings.TrimSpace(p.SQL), panels.DuckDB, panels.Filter{}); narrowed != sql {
			continue
		}
		var t panels.Table
		for _, c := range p.Columns {
			t.Columns = append(t.Columns, c.Name)
		}
		rows := a.rows
		if p.Chart == panels.Figures || p.ID == "bounds" {
			rows = 1
		}
		for i := range rows {
			var row []any
			for _, c := range p.Columns {
				switch c.Unit {
				case panels.Text:
					row = append(row, a.text)
				case panels.URL:
					row = append(row, "https://github.com/"+a.text)
				case panels.Time:
					row = append(row, noon.Add(time.Duration(i-a.rows)*time.Hour))
				default:
					row = append(row, int64(1e15)-int64(i))
				}
			}
			t.Rows = append(t.Rows, row)
		}
		if a.rows == 0 {
			t.Rows = nil
		}
		return t, nil
	}
	return panels.Table{}, errors.New("no panel asks " + sql)
}

// The page stays under 1 MB whatever was recorded: months of hours, and lists of
// thousands of names that are as long as texts of the page can be.
func TestWholePageSize(t *testing.T) {
	for _, text := range []string{strings.Repeat(`"`, 1000), strings.Repeat("W", 900)} {
		p, err := Build(t.Context(), &answers{rows: 3000, text: text}, panels.Filter{}, panels.All(), 2)
		if err != nil {
			t.Fatal(err)
		}
		if failed := p.Failed(); len(failed) > 0 {
			t.Fatal(failed)
		}
		for _, live := range []*Live{nil, {Every: time.Second}} {
			p.Live = live
			if n := len(render(t, p)); n > 1_000_000 || n < 100_000 {
				t.Errorf("the page has %d bytes", n)
			}
		}
	}
}

// A page about nothing says so in each panel, and what to do.
func TestNothing(t *testing.T) {
	p, err := Build(t.Context(), &answers{}, panels.Filter{}, panels.All(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Count(render(t, p), "Nothing recorded."), len(panels.All()); got != want {
		t.Errorf("%d of %d panels say that nothing was recorded", got, want)
	}
}

// One answer that cannot be had takes no other with it, and is not passed over in silence.
func TestOneFails(t *testing.T) {
	p, err := Build(t.Context(), &answers{rows: 3, text: "x", broken: "tallyman.dockerhub_limit"}, panels.Filter{}, panels.All(), 2)
	if err != nil {
		t.Fatal(err)
	}
	if failed := p.Failed(); len(failed) != 1 || !strings.Contains(failed[0].Error(), "rate-limit") {
		t.Errorf("failed: %v", failed)
	}
	if got := render(t, p); strings.Count(got, "This answer could not be had") != 1 || !strings.Contains(got, "no answer to tallyman.dockerhub_limit") {
		t.Error("the page does not say which answer is missing, or says it of others")
	}
	p, err = Build(t.Context(), &answers{rows: 3, text: "x", broken: "tallyman.jobs"}, panels.Filter{}, panels.All(), 2)
	if err != nil {
		t.Fatal(err)
	}
	if got := render(t, p); !strings.Contains(got, "coverage unknown") || len(p.Failed()) != 1 {
		t.Error("a page that knows nothing of its coverage does not say so")
	}
}

// An open end of the range is that of the records; a given one stays.
func TestRange(t *testing.T) {
	src := &answers{rows: 1, text: "x"}
	p, err := Build(t.Context(), src, panels.Filter{From: noon.Add(-72 * time.Hour)}, panels.All(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if !p.From.Equal(noon.Add(-72*time.Hour)) || !p.To.Equal(noon.Add(-time.Hour+time.Microsecond)) {
		t.Errorf("the page is about %s to %s", p.From, p.To)
	}
	src.asked = nil
	if _, err := Build(t.Context(), src, panels.Filter{From: noon.Add(-time.Hour), To: noon}, panels.All(), 1); err != nil {
		t.Fatal(err)
	}
	if len(src.asked) != len(panels.All())+1 {
		t.Errorf("%d queries for %d panels and the coverage", len(src.asked), len(panels.All()))
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := Build(ctx, src, panels.Filter{}, panels.All(), 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a page that nobody wants any more: %v", err)
	}
}
