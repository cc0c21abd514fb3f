package blame

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// What a ranking needs at least. Below sureCoverage the missing builds are so many that
// others are blamed for them too often (docs/blame.md has the figures).
const (
	leastRequests = 30
	leastBuilds   = 20
	leastTime     = 30 * time.Minute
	sureCoverage  = 0.8
	leastCoverage = 0.5
)

// tell writes suspects and baseline into the result.
func (k *ranking) tell() {
	byCount := make([]int, len(k.candidates))
	for i := range byCount {
		byCount[i] = i
	}
	byLift := slices.Clone(byCount)
	slices.SortStableFunc(byLift, func(a, b int) int { return cmp.Compare(k.candidates[b].lift, k.candidates[a].lift) })
	slices.SortStableFunc(byCount, func(a, b int) int { return cmp.Compare(k.candidates[b].overlaps, k.candidates[a].overlaps) })
	for place, i := range byCount {
		k.candidates[i].byCount = place + 1
		if place < k.Top {
			c := &k.candidates[i]
			k.result.ByOverlap = append(k.result.ByOverlap, Baseline{c.Candidate, c.overlaps, c.lift})
		}
	}
	for place, i := range byLift {
		k.candidates[i].byLift = place + 1
	}
	intensity := k.p.intensities(k.m)
	for i, l := range k.leads {
		if i == k.Top {
			break
		}
		k.result.Suspects = append(k.result.Suspects, k.suspect(i, l, intensity))
	}
	k.result.Method = method
}

func (k *ranking) suspect(i int, l *lead, intensity []float64) Suspect {
	requests := Estimate{Value: l.n, High: l.n} // who does not stand out may well have none
	if l.lean {
		requests = k.interval(l.n, l.samples)
	}
	ranks := slices.Clone(l.ranks)
	slices.Sort(ranks)
	s := Suspect{
		Rank: i + 1, RankLow: i + 1, RankHigh: i + 1,
		Named: l.named, PValue: l.p, Evidence: l.ev.z,
		Requests: requests, Share: l.n / k.p.total,
	}
	if n := len(ranks); n > 0 {
		s.RankLow = min(s.Rank, ranks[int(0.05*float64(n-1)+0.5)])
		s.RankHigh = max(s.Rank, ranks[int(0.95*float64(n-1)+0.5)])
	}
	for at, j := range l.members {
		c := &k.candidates[j]
		s.Members = append(s.Members, c.Candidate)
		s.Builds += len(c.builds)
		s.Active = max(s.Active, c.active)
		if at == 0 || c.overlaps > s.Overlaps {
			s.Overlaps, s.OverlapRank, s.Lift, s.LiftRank = c.overlaps, c.byCount, c.lift, c.byLift
		}
	}
	s.PerBuild = l.n / float64(max(1, s.Builds))
	k.parts(&s, l, intensity)
	return s
}

// parts says which builds of a suspect explain its requests, and what these look like.
func (k *ranking) parts(s *Suspect, l *lead, intensity []float64) {
	p := k.p
	steps, agents, asked := map[string]*Part{}, map[string]*Part{}, map[string]*Part{}
	add := func(to map[string]*Part, name string, builds int, n float64) {
		if name == "" {
			return
		}
		if to[name] == nil {
			to[name] = &Part{Name: name}
		}
		to[name].Builds += builds
		to[name].Requests += n
	}
	first := make([]int32, len(p.rows)+1) // of the cells of a row
	for i, r := range p.rows {
		first[i+1] = r.cells
	}
	var examples []Example
	next := map[int]int{} // builds of a candidate are spread over its units in their order
	for _, j := range l.members {
		c := &k.candidates[j]
		clear(next)
		unitOf := map[string]int{}
		for _, u := range c.units {
			unitOf[p.units[u].addr] = u
		}
		for _, n := range c.builds {
			b := &k.builds[n]
			u := unitOf[b.Addr]
			at := next[u]
			next[u]++
			own := 0.0
			start, end := p.units[u].starts[at], p.units[u].ends[at]
			for class := range classes {
				from, to := p.span(start, end, class)
				rho := k.m.rho[u*classes+class]
				if from >= to || rho <= 0 {
					continue
				}
				for i := searchRow(p.rows, from-p.width); i < len(p.rows) && p.rows[i].t < to; i++ {
					w := min(to, p.rows[i].t+p.width) - max(from, p.rows[i].t)
					if w <= 0 {
						continue
					}
					for x := first[i]; x < first[i+1]; x++ {
						mark := p.cells[x].mark
						v := p.cells[x].y * rho * w * k.m.marks[u*p.marks+int(mark)] / intensity[x]
						own += v
						add(agents, k.q.marks[mark].UserAgent, 0, v)
						add(asked, k.q.marks[mark].Asked, 0, v)
					}
				}
			}
			add(steps, b.Candidate.part(), 1, own)
			examples = append(examples, Example{Start: b.Start.UTC(), RunID: b.RunID, JobURL: b.JobURL, Runner: b.Runner, Requests: own})
		}
	}
	slices.SortStableFunc(examples, func(a, b Example) int { return cmp.Compare(b.Requests, a.Requests) })
	for _, e := range examples[:min(3, len(examples))] {
		if e.Requests >= 0.5 {
			s.Examples = append(s.Examples, e)
		}
	}
	s.Steps, s.UserAgents, s.Asked = most(steps), most(agents), most(asked)
}

// most are the five largest parts.
func most(parts map[string]*Part) (list []Part) {
	for _, p := range parts {
		if p.Requests >= 0.5 {
			list = append(list, *p)
		}
	}
	slices.SortFunc(list, func(a, b Part) int {
		return cmp.Or(cmp.Compare(b.Requests, a.Requests), cmp.Compare(a.Name, b.Name))
	})
	return list[:min(5, len(list))]
}

// conclude finds the verdict.
func (k *ranking) conclude(ctx context.Context, b *Builds) error {
	r := k.result
	weak := func(v Verdict, format string, args ...any) {
		r.Reasons = append(r.Reasons, fmt.Sprintf(format, args...))
		if r.Verdict == Named || v == CannotTell {
			r.Verdict = v
		}
	}
	r.Verdict = Named
	if r.Requests < leastRequests {
		weak(CannotTell, "There are only %d requests while builds are known; at least %d are needed.", r.Requests, leastRequests)
	}
	if r.Builds < leastBuilds {
		weak(CannotTell, "There are only %d builds while requests are known; at least %d are needed.", r.Builds, leastBuilds)
	}
	if d := r.To.Sub(r.From); d < leastTime {
		weak(CannotTell, "Requests and builds have only %s in common; at least %s are needed.", d.Round(time.Second), leastTime)
	}
	named, constant := 0, 0
	for _, s := range r.Suspects {
		if s.Named {
			named++
		}
	}
	for i := range k.candidates {
		if k.candidates[i].active > 0.98 {
			constant++
		}
	}
	if named == 0 {
		weak(CannotTell, "Nobody stands out: moved in time, the same builds explain as many requests.")
		if constant > 0 && 2*constant > len(k.candidates) {
			weak(CannotTell, "%d of %d candidates have a build running all of the time: there is no time without them to compare with.", constant, len(k.candidates))
		}
		off, err := k.zone(ctx, b)
		if err != nil {
			return err
		}
		if off != 0 {
			weak(CannotTell, "Builds fit the requests far better if the requests' times are moved by %+d hours: is the file in another time zone (--timezone)?", -off)
		}
	}
	c := r.Coverage
	switch {
	case c.Share < 0:
		weak(Indications, "Which share of the builds was recorded is not known: %s.", c.From)
	case c.Share < leastCoverage:
		weak(CannotTell, "Only %.0f %% of the builds are believed to be recorded: the guilty may be among the others. %s.", 100*c.Share, c.From)
	case c.Share < sureCoverage:
		weak(Indications, "Only %.0f %% of the builds are believed to be recorded: what the others caused may be laid at the door of those here. %s.", 100*c.Share, c.From)
	}
	if c.Lost > 0 || c.LostUnknown {
		more := ""
		if c.LostUnknown {
			more = " or more"
		}
		weak(r.Verdict, "%d%s records were lost on the way, by the journals' own account.", c.Lost, more)
	}
	if r.AssumedEnds*3 > r.Builds {
		weak(Indications, "Of %d of %d builds the end is not known; that of alike builds was taken.", r.AssumedEnds, r.Builds)
	}
	for _, s := range r.Suspects {
		if s.Named && len(s.Members) > 1 {
			weak(r.Verdict, "Rank %d is %d candidates that always start together: which of them it is cannot be told.", s.Rank, len(s.Members))
		}
	}
	if r.Verdict == Named || r.Verdict == Indications {
		first := fmt.Sprintf("%d of %d candidates stand out beyond what chance gives anybody; those who stand out at all explain %.0f %% of %d requests.", named, r.Candidates, 100*r.Explained.Value/float64(max(1, r.Requests)), r.Requests)
		// The strongest in as many placebos is passed by chance in one of one more.
		second := fmt.Sprintf("Where nobody is guilty, chance names somebody in about one of %d such files: a build's log is the proof.", 1+k.Placebos)
		r.Reasons = slices.Insert(r.Reasons, 0, first, second)
	}
	return nil
}

var method = []string{
	"Requests are taken for a Poisson process whose rate is the sum of a background, constant within half an hour, and of what each candidate's running builds add: its rate by the time since a build's start, and by what a request looks like (user agent, repository asked for, egress address). Rates are those of the greatest likelihood, found by expectation-maximisation (Dempster, Laird and Rubin 1977, J. R. Stat. Soc. B 39:1-38), which for such sums is the iteration of Richardson (1972, J. Opt. Soc. Am. 62:55-59), Lucy (1974, Astron. J. 79:745-754) and Shepp and Vardi (1982, IEEE Trans. Med. Imaging 1:113-122). That counts of a whole tell of its parts is network tomography (Vardi 1996, J. Am. Stat. Assoc. 91:365-377); sharing events among those that may have caused them, with a kernel found from the same data, is due to Marsan and Lengline (2008, Science 319:1076-1079).",
	"Evidence is how much better a candidate's builds meet the requests than the same builds moved by ten to ninety minutes, in standard deviations of such moves, corrected for the skewness of sums over few builds (Pearson's type III by the cube root of Wilson and Hilferty 1931, Proc. Natl. Acad. Sci. 17:684-688). Each build of the strongest candidates has a size of its own, with a gamma prior, so that what a large burst has above the usual is not laid at the door of others; a build is judged by the rates of other builds of the same candidate, not by those that were fitted to it; and whose builds start when those of a much stronger candidate do is judged by the builds at which the stronger one is recorded.",
	"What chance brings forth is known from moving all requests and fitting anew, nine to nineteen times: those stand out who are beyond the strongest that this gave any candidate (the maximum statistic of Westfall and Young 1993, Resampling-Based Multiple Testing, Wiley).",
	"Intervals are the middle 90 % of Bayesian bootstrap resamples (Rubin 1981, Ann. Stat. 9:130-134) of blocks of ten minutes, because requests come in bursts.",
}
