package page

import (
	"fmt"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/figures"
)

// Suspects is the ranking of those whose builds explain imported requests.
type Suspects struct {
	Title, Question string
	// Verdict says what can be concluded, Why what that rests on; Sure is false where
	// nobody can be named.
	Verdict, Why string
	Sure         bool
	Ranking      panels.Result
	Notes        []string
	Method       []string // how it was found, for the appendix
}

const suspectsTitle = "Whose builds explain the requests"

// Unsuspected says that requests were imported and that none of them is anonymous.
func Unsuspected(requests int64) *Suspects {
	return &Suspects{Title: suspectsTitle, Sure: true,
		Verdict: "There is nobody to look for.",
		Why:     fmt.Sprintf("Imported of this time: %s, none of them anonymous.", figures.Plural(requests, "git request"))}
}

// Unranked says why the requests are not ranked, or not yet.
func Unranked(verdict, why string) *Suspects {
	return &Suspects{Title: suspectsTitle, Verdict: verdict, Why: why}
}

type suspectsView struct {
	Title, Question, Verdict, Why, Tone string
	List                                *listView
	Notes, Method                       []string
}

func (p *Page) suspectsView() *suspectsView {
	s := p.Suspects
	if s == nil {
		return nil
	}
	v := &suspectsView{Title: s.Title, Question: s.Question, Verdict: text(s.Verdict), Why: lines(s.Why)}
	for _, n := range s.Notes {
		v.Notes = append(v.Notes, lines(n))
	}
	for _, m := range s.Method {
		v.Method = append(v.Method, lines(m))
	}
	if !s.Sure {
		v.Tone = "warn"
	}
	if len(s.Ranking.Table.Rows) > 0 {
		v.List = list(s.Ranking, p.Live)
	}
	return v
}

// Blamed shows a ranking on a page.
func Blamed(r blame.Result) *Suspects {
	s := &Suspects{
		Title: suspectsTitle, Method: r.Method,
		Question: fmt.Sprintf("%s from %s to %s UTC, beside %s of %s.", figures.Plural(r.Requests, "imported request"), stamp(r.From), stamp(r.To), figures.Plural(r.Builds, "recorded build"), figures.Plural(r.Candidates, "candidate")),
		Sure:     r.Verdict == blame.Named,
		Why:      strings.Join(r.Reasons, " "),
	}
	switch r.Verdict {
	case blame.Named:
		s.Verdict = "Somebody can be named."
	case blame.Indications:
		s.Verdict = "There are indications, and no more than that."
	default:
		s.Verdict = "Nobody can be named."
	}
	s.Notes = append(s.Notes, fmt.Sprintf("All recorded builds together explain %s of %s requests (90 %% of resamples: %s to %s); the rest comes from elsewhere.",
		round(r.Explained.Value), figures.Count(r.Requests), round(r.Explained.Low), round(r.Explained.High)))
	switch c := r.Coverage; {
	case c.Share < 0:
		s.Notes = append(s.Notes, "Nothing tells which share of the builds was recorded. What a missing build caused is laid at the door of others.")
	default:
		s.Notes = append(s.Notes, fmt.Sprintf("%s of the builds are believed to be recorded (%s). What a missing build caused is laid at the door of others.", figures.Share(c.Share), c.From))
	}
	if r.Shift.Abs() >= time.Second {
		s.Notes = append(s.Notes, fmt.Sprintf("The server’s clock is %s off the runners’; the ranking has that taken out.", length(float64(r.Shift.Abs()))))
	}
	s.Ranking = panels.Result{Panel: panels.Panel{ID: "suspects", Chart: panels.Bars, Columns: []panels.Column{
		{Title: "repository", Unit: panels.Text, Sets: "repository"},
		{Title: "workflow", Unit: panels.Text, Sets: "workflow"},
		{Title: "job", Unit: panels.Text},
		{Title: "step or image", Unit: panels.Text},
		{Unit: panels.URL},
		{Title: "requests", Unit: panels.Count, Bar: true, Tone: panels.Bad, Note: "that its recorded builds explain"},
		{Title: "up to", Unit: panels.Count, Bar: true, Note: "upper bound of the 90 % interval"},
		{Title: "at least", Unit: panels.Count, Note: "lower bound of the 90 % interval"},
		{Title: "per build", Unit: panels.Number},
		{Title: "evidence", Unit: panels.Text, Note: "standard deviations above what the same builds get when they are moved in time; it ranks"},
		{Title: "by chance", Unit: panels.Text, Note: "how likely evidence this strong is if it had nothing to do with the requests"},
		{Title: "rank", Unit: panels.Text, Note: "where it lies in 90 % of the resamples"},
		{Title: "by overlaps", Unit: panels.Text, Note: "its rank by the plain count of requests during its builds, which ranks who is busy"},
		{Title: "stands out", Unit: panels.Text, Note: "beyond the strongest evidence that chance gave anybody; the verdict says whether that names somebody"},
	}}}
	for _, x := range r.Suspects {
		if len(x.Members) == 0 {
			continue
		}
		first := x.Members[0]
		what := strings.Join(filled(first.Step, first.Image, first.Target), " ")
		if others := x.Members[1:]; len(others) > 0 {
			what = strings.TrimSpace(what + " " + twins(others))
		}
		link := ""
		if len(x.Examples) > 0 {
			link = x.Examples[0].JobURL
		}
		rank := fmt.Sprint(x.Rank)
		if x.RankLow != x.RankHigh {
			rank = fmt.Sprintf("%d (%d to %d)", x.Rank, x.RankLow, x.RankHigh)
		}
		chance := fmt.Sprintf("%.2g", x.PValue)
		named := "no"
		if x.Named {
			named = "yes"
		}
		s.Ranking.Table.Rows = append(s.Ranking.Table.Rows, []any{first.Repository, first.Workflow, first.Job, what, link,
			x.Requests.Value, x.Requests.High, x.Requests.Low, x.PerBuild, fmt.Sprintf("%.1f sd", x.Evidence), chance, rank, fmt.Sprint(x.OverlapRank), named})
	}
	return s
}

// maxTwins is how many are named of those that cannot be told apart from the first.
const maxTwins = 2

// twins names those whose builds always ran at the same time, any of whom may be it.
func twins(others []blame.Candidate) string {
	var names []string
	for _, c := range others[:min(maxTwins, len(others))] {
		names = append(names, "or "+text(c.String()))
	}
	if n := len(others) - maxTwins; n > 0 {
		names = append(names, "or "+figures.Plural(n, "other"))
	}
	return strings.Join(names, ", ") + ": their builds always ran at the same time"
}

func round(f float64) string { return value(panels.Count, f) }

func filled(texts ...string) []string {
	var out []string
	for _, s := range texts {
		if s != "" {
			out = append(out, s)
		}
	}
	return out
}
