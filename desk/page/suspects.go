package page

import "github.com/tallyman-ci/tallyman/desk/panels"

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
	v := &suspectsView{Title: s.Title, Question: s.Question, Verdict: text(s.Verdict), Why: text(s.Why)}
	for _, n := range s.Notes {
		v.Notes = append(v.Notes, text(n))
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
