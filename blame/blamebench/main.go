// Command blamebench holds the ranking of suspects against simulated fleets whose
// guilty are known, at several loads, and the plain count of overlaps beside it.
//
// For each load it prints, over all seeds: the share of guilty ones at rank 1 and among
// the first five (precision; of five with three guilty, 0.60 is all), how often exactly
// the guilty are on top, and how far the method's own word holds: which share of those
// it named is guilty, which share of the guilty it named, and how often the true number
// of requests lies in the 90 % interval.
package main

import (
	"context"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/blame/sim"
	"github.com/tallyman-ci/tallyman/record"
)

type load struct {
	name   string
	config sim.Config
	seeds  int
	full   bool // with intervals and with naming, which cost ten times the ranking
}

func loads(seeds, headline int) []load {
	base := sim.Config{Missing: 0.1, Skew: 2 * time.Second}
	with := func(name string, change func(*sim.Config)) load {
		c := base
		c.Hours = 8
		change(&c)
		return load{name: name, config: c, seeds: seeds}
	}
	full := func(l load) load {
		l.full, l.seeds = true, (seeds+1)/2
		return l
	}
	nothing := func(*sim.Config) {}
	return []load{
		{name: "500 jobs, 24 h", config: base, seeds: headline},
		with("8 h", nothing),
		with("8 h, 50 jobs", func(c *sim.Config) { c.Jobs = 50 }),
		with("8 h, 1000 jobs", func(c *sim.Config) { c.Jobs = 1000 }),
		with("8 h, 0 % missing", func(c *sim.Config) { c.Missing = 0 }),
		with("8 h, 40 % missing", func(c *sim.Config) { c.Missing = 0.4 }),
		with("8 h, 60 % missing", func(c *sim.Config) { c.Missing = 0.6 }),
		with("8 h, no skew", func(c *sim.Config) { c.Skew = 0 }),
		with("8 h, 10 s skew", func(c *sim.Config) { c.Skew = 10 * time.Second }),
		with("8 h, server 45 s behind", func(c *sim.Config) { c.Offset = -45 * time.Second }),
		with("8 h, 4 addresses, unknown", func(c *sim.Config) { c.Addresses = 4 }),
		with("8 h, 4 addresses, known", func(c *sim.Config) { c.Addresses, c.Addressed = 4, true }),
		with("8 h, user agents", func(c *sim.Config) { c.UserAgents = true }),
		with("8 h, 4 times the background", func(c *sim.Config) { c.Background = 4 }),
		full(with("full: 8 h", nothing)),
		full(with("full: 8 h, 40 % missing", func(c *sim.Config) { c.Missing = 0.4 })),
		full(with("full: 8 h, nobody is guilty", func(c *sim.Config) { c.Guilty = -1 })),
		full(with("full: 8 h, 50 jobs, the same", func(c *sim.Config) { c.Jobs, c.Workflows, c.Guilty, c.Background = 50, 40, -1, 0.1 })),
	}
}

// score is what one fleet gave.
type score struct {
	guilty                       int
	one, five, exact             float64
	countOne, countFive, countEx float64
	liftOne, liftFive, liftEx    float64
	named, rightly               int
	inside, intervals            int
	ratio                        float64
	took                         time.Duration
	verdict                      blame.Verdict
	coverage, truth              float64
}

func main() {
	seeds := flag.Int("seeds", 20, "fleets for each load")
	headline := flag.Int("headline", 100, "fleets for the first load")
	only := flag.Int("only", -1, "number of the only load to run, from 0")
	first := flag.Uint64("first", 0, "seed of the first fleet of each load, to play a load in pieces")
	workers := flag.Int("workers", runtime.GOMAXPROCS(0), "fleets at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, *seeds, *headline, *only, *workers, *first)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "blamebench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, seeds, headline, only, workers int, first uint64) error {
	fmt.Println("200 workflows, 3 guilty, 500 jobs, one address, 10 % missing, 2 s skew, as much background as guilt, where a load says nothing else")
	fmt.Printf("%-34s %5s | %-17s | %-17s | %-17s | %-31s | %s\n", "", "", "likelihood", "count of overlaps", "lift", "what the method says of itself", "")
	fmt.Printf("%-34s %5s | %5s %5s %5s | %5s %5s %5s | %5s %5s %5s | %7s %7s %8s %5s | %s\n", "load", "seeds",
		"p@1", "p@5", "top", "p@1", "p@5", "top", "p@1", "p@5", "top", "right", "found", "in 90 %", "cover", "s")
	for i, l := range loads(seeds, headline) {
		if only >= 0 && i != only {
			continue
		}
		n := l.seeds
		scores := make([]score, n)
		errs := make([]error, n)
		var wg sync.WaitGroup
		var done atomic.Int64
		for w := range workers {
			wg.Go(func() {
				for s := w; s < n; s += workers {
					c := l.config
					c.Seed = first + uint64(s)
					scores[s], errs[s] = one(ctx, c, l.full)
					if k := done.Add(1); k%10 == 0 {
						fmt.Fprintf(os.Stderr, "%s: %d of %d fleets\n", l.name, k, n)
					}
				}
			})
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		print(l, scores)
	}
	return nil
}

func one(ctx context.Context, c sim.Config, full bool) (score, error) {
	f := sim.Run(c)
	requests, builds := blame.NewRequests(), blame.NewBuilds()
	if c.Addressed {
		builds.Egress = func(r *record.Record) string {
			var n int
			if _, err := fmt.Sscanf(r.Host.Name, "runner-%d", &n); err != nil {
				return ""
			}
			return f.Egress(n)
		}
	}
	for _, q := range f.Requests {
		m := blame.Mark{UserAgent: q.UserAgent}
		if c.Addresses > 1 {
			m.Addr = q.Addr
		}
		requests.Add(q.Time, 1, m)
	}
	for r := range f.Records() {
		builds.Add(r)
	}
	began := time.Now()
	o := blame.Options{Resamples: -1, Placebos: -1, Top: len(f.Workflows)}
	if full {
		o.Resamples, o.Placebos = 40, 0 // as many as usual
	}
	r, err := blame.Rank(ctx, requests, builds, o)
	if err != nil {
		return score{}, err
	}
	s := score{took: time.Since(began), verdict: r.Verdict, coverage: r.Coverage.Share}
	guilty := map[blame.Candidate]float64{}
	recorded := 0.0
	for i := range f.Workflows {
		if f.Workflows[i].Guilty() {
			var c blame.Candidate
			c.Repository, c.Workflow, c.Job = f.Candidate(i)
			guilty[c] = 0
		}
	}
	for _, b := range f.Builds {
		if b.Recorded {
			recorded++
			var c blame.Candidate
			c.Repository, c.Workflow, c.Job = f.Candidate(b.Workflow)
			if _, ok := guilty[c]; ok {
				guilty[c] += float64(b.Requests)
			}
		}
	}
	s.truth = recorded / float64(len(f.Builds))
	s.guilty = len(guilty)
	is := func(c blame.Candidate) bool { _, ok := guilty[c]; return ok }
	var ranked []blame.Candidate
	for _, x := range r.Suspects {
		// Of those that cannot be told apart, the guilty is as likely as not the last.
		for at := len(x.Members) - 1; at >= 0; at-- {
			ranked = append(ranked, x.Members[at])
		}
		hit := false
		for _, m := range x.Members {
			hit = hit || is(m)
		}
		if x.Named {
			s.named++
			if hit {
				s.rightly++
			}
		}
		if hit && len(x.Members) == 1 {
			s.intervals++
			if n := guilty[x.Members[0]]; n > 0 {
				s.ratio += x.Requests.Value / n
			}
			if n := guilty[x.Members[0]]; n >= x.Requests.Low && n <= x.Requests.High {
				s.inside++
			}
		}
	}
	s.one, s.five, s.exact = precision(ranked, is, s.guilty)
	var count []blame.Candidate
	for _, b := range r.ByOverlap {
		count = append(count, b.Candidate)
	}
	s.countOne, s.countFive, s.countEx = precision(count, is, s.guilty)
	byLift := append([]blame.Baseline(nil), r.ByOverlap...)
	for i := range byLift {
		for j := i; j > 0 && byLift[j].Lift > byLift[j-1].Lift; j-- {
			byLift[j], byLift[j-1] = byLift[j-1], byLift[j]
		}
	}
	var lift []blame.Candidate
	for _, b := range byLift {
		lift = append(lift, b.Candidate)
	}
	s.liftOne, s.liftFive, s.liftEx = precision(lift, is, s.guilty)
	return s, nil
}

// precision is the share of guilty ones at rank 1 and among the first five, and whether
// the guilty are exactly those on top.
func precision(ranked []blame.Candidate, is func(blame.Candidate) bool, guilty int) (one, five, exact float64) {
	hits := 0
	exact = 1
	for i := range max(5, guilty) {
		ok := i < len(ranked) && is(ranked[i])
		if ok {
			if i < 5 {
				hits++
			}
			if i == 0 {
				one = 1
			}
		} else if i < guilty {
			exact = 0
		}
	}
	return one, float64(hits) / 5, exact
}

func print(l load, scores []score) {
	var t score
	n := float64(len(scores))
	coverage, off := 0.0, 0.0
	verdicts := map[blame.Verdict]int{}
	for _, s := range scores {
		t.guilty += s.guilty
		t.one, t.five, t.exact = t.one+s.one, t.five+s.five, t.exact+s.exact
		t.countOne, t.countFive, t.countEx = t.countOne+s.countOne, t.countFive+s.countFive, t.countEx+s.countEx
		t.liftOne, t.liftFive, t.liftEx = t.liftOne+s.liftOne, t.liftFive+s.liftFive, t.liftEx+s.liftEx
		t.named, t.rightly = t.named+s.named, t.rightly+s.rightly
		t.inside, t.intervals = t.inside+s.inside, t.intervals+s.intervals
		t.took += s.took
		t.ratio += s.ratio
		coverage += s.coverage / n
		off += math.Abs(s.coverage-s.truth) / n
		verdicts[s.verdict]++
	}
	part := func(a, b int) string {
		if b == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f", float64(a)/float64(b))
	}
	self := func(a, b int) string {
		if !l.full {
			return "-"
		}
		return part(a, b)
	}
	mean := func(sum float64) string {
		if t.guilty == 0 {
			return "-" // nobody can be found
		}
		return fmt.Sprintf("%.2f", sum/n)
	}
	fmt.Printf("%-34s %5d | %5s %5s %5s | %5s %5s %5s | %5s %5s %5s | %7s %7s %8s %5.2f | %.1f\n", l.name, len(scores),
		mean(t.one), mean(t.five), mean(t.exact), mean(t.countOne), mean(t.countFive), mean(t.countEx), mean(t.liftOne), mean(t.liftFive), mean(t.liftEx),
		self(t.rightly, t.named), self(t.rightly, t.guilty), self(t.inside, t.intervals), coverage, t.took.Seconds()/n)
	if !l.full {
		return
	}
	fmt.Printf("%-34s       | verdicts: named %d, indications %d, cannot tell %d; named in all %d; coverage off by %.3f; requests of the guilty over the truth %.2f\n", "",
		verdicts[blame.Named], verdicts[blame.Indications], verdicts[blame.CannotTell], t.named, off, t.ratio/float64(max(1, t.intervals)))
}
