package page

import (
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/blame"
)

func ranking(verdict blame.Verdict, name string) blame.Result {
	return blame.Result{
		Verdict: verdict, Reasons: []string{"1,204 of 1,310 requests fall into builds.", "Coverage is " + name + "."},
		From: noon.Add(-24 * time.Hour), To: noon, Requests: 1310, Builds: 412, Candidates: 61,
		Explained: blame.Estimate{Value: 1150, Low: 1090, High: 1204}, Coverage: blame.Coverage{Share: 0.9, From: "run numbers"}, Shift: 2 * time.Second,
		Method: []string{"Requests are counted in bins.\nPoisson maximum likelihood, " + name},
		Suspects: []blame.Suspect{
			{Rank: 1, RankLow: 1, RankHigh: 1, Named: true, PValue: 0.001, Evidence: 12.34, OverlapRank: 57, PerBuild: 12.5, Requests: blame.Estimate{Value: 800, Low: 760, High: 850},
				Members: []blame.Candidate{{Repository: name, Workflow: name, Job: "build", Image: name}}, Examples: []blame.Example{{JobURL: "https://github.com/acme/x/actions/runs/1"}}},
			{Rank: 2, RankLow: 1, RankHigh: 4, PValue: 0.2, PerBuild: 1.5, Requests: blame.Estimate{Value: 40, Low: 0, High: 90},
				Members: []blame.Candidate{{Repository: "acme/a"}, {Repository: "acme/b"}}, Examples: []blame.Example{{JobURL: "javascript:alert(1)"}}},
		},
	}
}

// The ranking never stands there without its verdict, its reasons, its intervals and the coverage.
func TestBlamed(t *testing.T) {
	for verdict, say := range map[blame.Verdict]string{blame.Named: "Somebody can be named.", blame.Indications: "no more than that", blame.CannotTell: "Nobody can be named."} {
		p := sample()
		p.Suspects = Blamed(ranking(verdict, "acme/x"))
		got := render(t, p)
		for _, want := range []string{say, "1,204 of 1,310 requests fall into builds.", "90 % of the builds are believed to be recorded (run numbers)", "2 (1 to 4)", "up to", "850", "760", "0.001",
			"or acme/b: their builds always ran at the same time", "12.3 sd", ">57<", "Poisson maximum likelihood", "The server’s clock is 2.0 s off", `href="https://github.com/acme/x/actions/runs/1"`} {
			if !strings.Contains(got, want) {
				t.Errorf("%s: the page does not say %q", verdict, want)
			}
		}
		if strings.Contains(got, "javascript:") {
			t.Error("a link that is none")
		}
	}
	p := sample()
	p.Suspects = Blamed(blame.Result{Verdict: blame.CannotTell, Coverage: blame.Coverage{Share: -1}})
	if got := render(t, p); !strings.Contains(got, "Nobody can be named.") || !strings.Contains(got, "Nothing tells which share") {
		t.Error("a ranking of nothing does not say so")
	}
}

func TestBlamedHostile(t *testing.T) {
	p := sample()
	p.Suspects = Blamed(ranking(blame.Named, "plain"))
	want := skeleton(render(t, p))
	for _, s := range hostile {
		p.Suspects = Blamed(ranking(blame.Named, s))
		if skeleton(render(t, p)) != want {
			t.Errorf("%.60q changes the page's structure", s)
		}
	}
}
