// Package page draws the account as one HTML page that needs nothing else: no
// network, no scripts, no fonts. A page that was mailed to somebody, printed, or
// opened in ten years shows the same.
//
// Results of panels go in, HTML comes out (Render). Charts are SVG without a fixed
// size, so that their text stays readable on a phone. Each panel says how far it can be
// trusted and leads to its query at the end of the page.
//
// Every text of a record is somebody else's: an image or a workflow can hold markup,
// characters that turn the direction of writing, or a megabyte. Text is written out
// (report.Safe), cut, set apart from its surroundings (bdi) and escaped. The page's
// Content-Security-Policy names the hash of its own style sheet and lets nothing else in.
package page

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/figures"
)

// Page is what is drawn. The same Page gives the same bytes.
type Page struct {
	Title     string
	Sources   []string // what was read
	Version   string
	Generated time.Time
	Filter    panels.Filter // From and To are the range that was asked for; zero is open
	From, To  time.Time     // the range that the answers are about
	Results   []panels.Result
	Trust     Trust
	Asked     *panels.Result // the query behind Trust; nil where there was none
	Suspects  *Suspects      // nil where no requests were given
	Live      *Live          // nil for a page that stands alone
}

// Trust says how much of the truth the records hold. It stands beside every answer.
type Trust struct {
	Known bool // false where it could not be computed
	// Jobs is the number of jobs that are known to have run, Recorded that of jobs
	// whose docker calls or events reached the account.
	Jobs, Recorded int64
	// How the context of records was found.
	Sealed, Environment, Inferred, None int64
	// Lost is the number of records that are known to be lost, Holes the number of
	// losses of unknown size.
	Lost, Holes int64
}

// Live is what a page of the live server has besides.
type Live struct {
	Every time.Duration // between two looks
	Query string        // the URL's own query, without the question mark
	Form  []Field       // the filters
	Notes []string      // what could not be done as asked
}

// Field is one filter in the form.
type Field struct {
	Name, Label, Value, Hint string
	Options                  []string // a choice; empty for free text
}

// MaxRows bounds the rows of one panel, whatever its query returned.
const MaxRows = 15

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

//go:embed live.js
var liveJS string

var pageTemplate = template.Must(template.New("page").Parse(pageHTML))

// Policy is the Content-Security-Policy of the page, for the live server's header
// too. Nothing may be fetched by a page that stands alone.
func Policy(live bool) string {
	p := "default-src 'none'; style-src '" + hash(pageCSS) + "'; base-uri 'none'"
	if live {
		return p + "; script-src '" + hash(liveJS) + "'; connect-src 'self'; form-action 'self'"
	}
	return p + "; form-action 'none'"
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// Render writes the page.
func Render(w io.Writer, p Page) error {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, p.view()); err != nil {
		return fmt.Errorf("draw the page: %w", err)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// view is what the template sees: text that is ready to be shown.
type view struct {
	Title, Policy, Version, Range, Asked string
	Generated                            string
	Nothing                              bool // no record is in the time that the page is about
	Sources                              []string
	More                                 int
	Style, Script                        template.HTML
	Live                                 *liveView
	Trust                                trustView
	Sections                             []sectionView
	Queries                              []queryView
	Suspects                             *suspectsView
}

type liveView struct {
	*Live
	Seconds int
	Reset   bool
}

type sectionView struct {
	ID, Title string
	Groups    []groupView
}

// groupView is one panel of the whole width, or those that share columns.
type groupView struct {
	Columns bool
	Panels  []panelView
}

type queryView struct {
	ID, Title, Question, SQL string
	Views                    []string
}

type panelView struct {
	ID, Title, Question, Note, Error, Empty string
	Figures                                 []figureView
	List                                    *listView
	Chart                                   *chartView
}

type figureView struct {
	Value, Title, Note, Tone string
}

func (p *Page) view() view {
	v := view{
		Title: text(p.Title), Policy: Policy(p.Live != nil), Version: p.Version,
		Generated: stamp(p.Generated), Range: rangeText(p.From, p.To), Asked: asked(p.Filter),
		Nothing: !p.From.IsZero() && !p.From.Before(p.To),
		// The hash in the policy is that of the element's text, to the byte.
		Style: template.HTML("<style>" + pageCSS + "</style>"),
		Trust: p.trustView(),
	}
	for i, s := range p.Sources {
		if i == maxSources {
			v.More = len(p.Sources) - i
			break
		}
		v.Sources = append(v.Sources, text(s))
	}
	if p.Live != nil {
		v.Script = template.HTML("<script>" + liveJS + "</script>")
		l := *p.Live
		l.Form = slices.Clone(l.Form)
		for i := range l.Form {
			l.Form[i].Value = text(l.Form[i].Value)
		}
		l.Notes = slices.Clone(l.Notes)
		for i := range l.Notes {
			l.Notes[i] = text(l.Notes[i])
		}
		v.Live = &liveView{Live: &l, Seconds: int(p.Live.Every / time.Second), Reset: p.Filter != panels.Filter{}}
	}
	for _, r := range p.Results {
		if n := len(v.Sections); n == 0 || v.Sections[n-1].Title != r.Section {
			v.Sections = append(v.Sections, sectionView{ID: "section-" + slug(r.Section), Title: r.Section})
		}
		s := &v.Sections[len(v.Sections)-1]
		if n := len(s.Groups); r.Wide || n == 0 || !s.Groups[n-1].Columns {
			s.Groups = append(s.Groups, groupView{Columns: !r.Wide})
		}
		g := &s.Groups[len(s.Groups)-1]
		g.Panels = append(g.Panels, p.panelView(r))
		v.Queries = append(v.Queries, queryView{ID: r.ID, Title: r.Title, Question: r.Question, SQL: lines(strings.TrimSpace(r.Query)), Views: r.Views})
	}
	if r := p.Asked; r != nil {
		v.Queries = append(v.Queries, queryView{ID: "trust", Title: r.Title, Question: r.Question, SQL: lines(strings.TrimSpace(r.Query)), Views: r.Views})
		v.Trust.Query = true
	}
	v.Suspects = p.suspectsView()
	return v
}

// maxSources is how many names of sources the page's head shows.
const maxSources = 4

func (p *Page) panelView(r panels.Result) panelView {
	v := panelView{ID: r.ID, Title: r.Title, Question: r.Question, Note: r.Note}
	switch {
	case r.Err != nil:
		v.Error = text(r.Err.Error())
		return v
	case empty(r):
		v.Empty = r.Empty
		if v.Empty == "" {
			v.Empty = "Nothing of this kind happened in this time, or nothing of it was recorded."
		}
		return v
	}
	switch r.Chart {
	case panels.Figures:
		for i, c := range r.Columns {
			f := figureView{Value: value(c.Unit, r.Table.Rows[0][i]), Title: c.Title, Note: c.Note}
			f.Tone = tone(c, r.Table.Rows[0][i])
			v.Figures = append(v.Figures, f)
		}
	case panels.Activity:
		v.Chart = activity(r, p.From, p.To)
	default:
		v.List = list(r, p.Live)
	}
	return v
}

// empty says whether an answer has nothing to show: no row, or one row of figures
// that are all nothing.
func empty(r panels.Result) bool {
	if len(r.Table.Rows) == 0 {
		return true
	}
	if r.Chart == panels.Bars || r.Chart == panels.Spread {
		return false
	}
	for _, row := range r.Table.Rows {
		for i, c := range r.Columns {
			if c.Unit != panels.Time && c.Unit != panels.Text && number(row[i]) != 0 {
				return false
			}
		}
	}
	return true
}

type trustView struct {
	Line  string // one line beside every answer
	Parts []partView
	Known bool
	Query bool // it is at the end of the page
	Hole  string
}

type partView struct {
	Title, Share, Class string
	X, Width            string
}

func (p *Page) trustView() trustView {
	t := p.Trust
	if !t.Known {
		return trustView{Line: "coverage unknown"}
	}
	all := t.Sealed + t.Environment + t.Inferred + t.None
	v := trustView{Known: all > 0}
	var words []string
	switch {
	case t.Jobs > 0 && t.Recorded == 0: // "0 of 9 recorded" would read as if all were missing
		words = append(words, figures.Plural(t.Jobs, "job")+" known by records alone, none by the runner's hook")
	case t.Jobs > 0:
		words = append(words, fmt.Sprintf("%s of %s recorded", figures.Count(t.Recorded), figures.Plural(t.Jobs, "job")))
	case all == 0 && t.Lost == 0 && t.Holes == 0:
		v.Line = "nothing recorded" // that nothing was lost is more than anybody knows
		return v
	default:
		words = append(words, "no job recorded")
	}
	at := int64(0)
	for _, part := range []struct {
		title, class string
		n            int64
	}{{"sealed by the hook", "t-sealed", t.Sealed}, {"from the environment", "t-environment", t.Environment}, {"inferred by time", "t-inferred", t.Inferred}, {"no job found", "t-none", t.None}} {
		if all == 0 {
			break
		}
		v.Parts = append(v.Parts, partView{Title: part.title, Share: figures.Share(float64(part.n) / float64(all)), Class: part.class, X: percent(float64(at) / float64(all)), Width: percent(float64(part.n) / float64(all))})
		at += part.n
	}
	if all > 0 {
		words = append(words, figures.Share(float64(all-t.None)/float64(all))+" of records have a job")
	}
	switch {
	case t.Lost == 0 && t.Holes == 0:
		words = append(words, "nothing lost")
	case t.Holes == 0:
		words = append(words, figures.Count(t.Lost)+" lost")
	default:
		words = append(words, fmt.Sprintf("%s lost and %s of unknown size", figures.Count(t.Lost), figures.Plural(t.Holes, "hole")))
		v.Hole = "A hole of unknown size means that nobody can say how many records are missing there."
	}
	v.Line = strings.Join(words, " · ")
	return v
}

// asked says what the account was narrowed to.
func asked(f panels.Filter) string {
	var words []string
	for _, p := range []struct{ name, value string }{{"repository", f.Repository}, {"workflow", f.Workflow}, {"image", f.Image}} {
		if p.value != "" {
			words = append(words, p.name+" "+text(p.value))
		}
	}
	return strings.Join(words, ", ")
}
