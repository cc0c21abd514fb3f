// Package sim plays a fleet of CI runners whose guilty are known: jobs by the hundred
// at once, their docker builds, and the log of a server that some builds ask without
// credentials. What package blame makes of it can then be held against the truth.
//
// A value flows one way: Run draws workflows, then jobs with their builds on hosts, then
// the requests of guilty builds and of others outside of the fleet, and last what gets
// lost and what the clocks falsify. The same Config gives the same Fleet, always.
//
// It is meant to be unkind to the method: requests come in bursts and not one by one
// as Poisson's law has it, each workflow asks at another moment of its builds, innocent
// workflows are started by the same push as guilty ones, and busy ones overlap
// everything. What it does not have: workflows whose guilt changes in the time that is
// looked at, and builds that wait for each other.
package sim

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Config says what is played. The zero value of each field but Seed means the value
// behind it.
type Config struct {
	Seed       uint64
	Hours      float64       // 24
	Jobs       int           // 500: mean number of jobs at once
	Workflows  int           // 200
	Guilty     int           // 3; negative: none
	Addresses  int           // 1: egress addresses that the hosts share
	Missing    float64       // share of builds that are not recorded: half of them whole hosts without shim
	Skew       time.Duration // each host's clock is off by up to this, and drifts by up to 20 ppm
	Offset     time.Duration // the server's clock is ahead of the true time by this
	Background float64       // 1: requests of others, for each one of the guilty builds; negative: none
	UserAgents bool          // the log names user agents, and images differ in their git
	Addressed  bool          // records of builds name the egress address
}

// Fleet is what was played.
type Fleet struct {
	Config    Config
	Workflows []Workflow
	Builds    []Build   // by time of start
	Requests  []Request // by time
}

// Workflow is one workflow with one kind of job that builds.
type Workflow struct {
	Repository, Name, Job string
	Image                 string
	UserAgent             string        // of the git in its base image
	Rate                  float64       // mean number of requests of a build; 0: innocent
	Delay                 time.Duration // usual time from a build's start to its requests
	Partner               int           // the workflow that the same push starts; -1: none
	Weight                float64       // share of the starts
}

// Guilty says whether builds of the workflow make requests.
func (w *Workflow) Guilty() bool { return w.Rate > 0 }

// Build is one docker build. Its times are those of the runner's clock.
type Build struct {
	Workflow   int // index into Workflows
	Host       int
	Start      time.Time
	Duration   time.Duration
	EndKnown   bool
	RunNumber  int64
	RunAttempt int64
	Recorded   bool  // false: nothing of it is in the journal
	Requests   int64 // that it made

	start float64 // in seconds by the true clock
}

// Request is one row of the server's log.
type Request struct {
	Time      time.Time // the server's clock, whole seconds
	Addr      string
	UserAgent string
	Asked     string // the repository that was asked for
	Status    int
	Workflow  int // whose build it was; -1: background
	Build     int // index into Builds; -1: background
}

// Begin is the time at which every fleet starts.
var Begin = time.Date(2026, 3, 2, 8, 0, 0, 0, time.UTC)

const (
	jobMinutes = 10 // mean duration of a job
	retryShare = 0.03
	noEndShare = 0.05
	hourly     = 0.15 // share of workflows that a timetable starts, most of them on the hour
	partners   = 0.3  // share of workflows that another one starts with
)

var agents = []string{"git/2.30.2", "git/2.34.1", "git/2.39.5", "git/2.43.0", "git/2.47.3", "git/2.49.1"}

// Run plays a fleet.
func Run(c Config) *Fleet {
	c = c.withDefaults()
	p := &player{Config: c, r: rand.New(rand.NewPCG(c.Seed, 0x7a11)), seconds: c.Hours * 3600}
	f := &Fleet{Config: c}
	p.workflows(f)
	p.builds(f)
	p.requests(f)
	return f
}

func (c Config) withDefaults() Config {
	if c.Hours == 0 {
		c.Hours = 24
	}
	if c.Jobs == 0 {
		c.Jobs = 500
	}
	if c.Workflows == 0 {
		c.Workflows = 200
	}
	if c.Guilty == 0 {
		c.Guilty = 3
	}
	if c.Addresses == 0 {
		c.Addresses = 1
	}
	if c.Background == 0 {
		c.Background = 1
	}
	return c
}

type player struct {
	Config
	r       *rand.Rand
	seconds float64
}

// workflows draws them; how often they run follows Zipf's law, and which of them are
// guilty has nothing to do with that.
func (p *player) workflows(f *Fleet) {
	total := 0.0
	for i := range p.Workflows {
		w := Workflow{
			Repository: fmt.Sprintf("acme/app-%03d", i/2),
			Name:       []string{"CI", "Nightly"}[i%2],
			Job:        "build",
			Image:      fmt.Sprintf("registry.acme.test/app-%03d", i/2),
			UserAgent:  agents[p.r.IntN(len(agents))],
			Partner:    -1,
			Delay:      time.Duration(1e9 * p.logNormal(12, 0.8)),
			Weight:     1 / math.Pow(float64(i+3), 0.9),
		}
		if i > 0 && p.r.Float64() < partners {
			w.Partner = p.r.IntN(i)
		}
		total += w.Weight
		f.Workflows = append(f.Workflows, w)
	}
	for i := range f.Workflows {
		f.Workflows[i].Weight /= total
	}
	for _, i := range p.r.Perm(p.Workflows)[:min(max(p.Guilty, 0), p.Workflows)] {
		f.Workflows[i].Rate = math.Exp(math.Log(3) + p.r.Float64()*math.Log(10)) // 3 to 30
	}
}

// builds draws jobs: most of them at any time of a day that has a noon, those of a
// timetable close to the hour, and partners a few seconds after the other.
func (p *player) builds(f *Fleet) {
	jobs := float64(p.Jobs) * p.seconds / (jobMinutes * 60)
	// One start can be two jobs.
	share := 0.0
	for _, w := range f.Workflows {
		if w.Partner >= 0 {
			share += f.Workflows[w.Partner].Weight
		}
	}
	starts := jobs / (1 + share)
	scheduled := make([]bool, len(f.Workflows))
	for i := range scheduled {
		scheduled[i] = p.r.Float64() < hourly
	}
	hosts := p.Jobs + p.Jobs/10
	offset, drift := make([]float64, hosts), make([]float64, hosts)
	bare := make([]bool, hosts)
	for h := range offset {
		offset[h] = (2*p.r.Float64() - 1) * p.Skew.Seconds()
		if p.Skew > 0 {
			drift[h] = (2*p.r.Float64() - 1) * 20e-6
		}
		bare[h] = p.r.Float64() < p.Missing/2
	}
	lost := 0.0 // of the builds on other hosts
	if p.Missing > 0 {
		lost = p.Missing / 2 / (1 - p.Missing/2)
	}
	numbers := make([]int64, len(f.Workflows))
	add := func(w int, at float64, attempt, number int64) {
		h := p.r.IntN(hosts)
		start := at + 5 + 40*p.r.Float64() // checkout, set-up
		b := Build{
			Workflow: w, Host: h, start: start, RunNumber: number, RunAttempt: attempt,
			Duration: time.Duration(1e9 * min(p.logNormal(150, 0.7), 1500)),
			EndKnown: p.r.Float64() >= noEndShare,
			Recorded: !bare[h] && p.r.Float64() >= lost,
		}
		b.Start = at2time(start + offset[h] + drift[h]*start)
		f.Builds = append(f.Builds, b)
	}
	byPartner := make([][]int, len(f.Workflows))
	for i, w := range f.Workflows {
		if w.Partner >= 0 {
			byPartner[w.Partner] = append(byPartner[w.Partner], i)
		}
	}
	type job struct {
		w  int
		at float64
	}
	var queue []job
	for i, w := range f.Workflows {
		for range p.poisson(starts * w.Weight) {
			at := p.seconds * p.hour(0.3)
			if scheduled[i] && p.r.Float64() < 0.7 {
				at = math.Floor(at/3600)*3600 + p.r.ExpFloat64()*40
			}
			queue = append(queue, job{i, at})
			for _, other := range byPartner[i] {
				queue = append(queue, job{other, at + 3*p.r.Float64()})
			}
		}
	}
	slices.SortStableFunc(queue, func(a, b job) int {
		switch {
		case a.at < b.at:
			return -1
		case a.at > b.at:
			return 1
		}
		return a.w - b.w
	})
	for _, j := range queue {
		numbers[j.w]++
		add(j.w, j.at, 1, numbers[j.w])
		if p.r.Float64() < retryShare {
			add(j.w, j.at+60*jobMinutes*(0.5+p.r.Float64()), 2, numbers[j.w])
		}
	}
	slices.SortStableFunc(f.Builds, func(a, b Build) int { return a.Start.Compare(b.Start) })
}

// requests draws what the server wrote down. A guilty build asks in one burst, some time
// after its start, never evenly; one in ten does not ask at all, because a cache spared it.
func (p *player) requests(f *Fleet) {
	guilty := 0
	for n := range f.Builds {
		b := &f.Builds[n]
		w := &f.Workflows[b.Workflow]
		if w.Rate == 0 || p.r.Float64() < 0.1 {
			continue
		}
		// The number of a burst spreads more than Poisson's: its mean is drawn, too.
		k := p.poisson(w.Rate * (0.5 + p.r.Float64()))
		at := b.start + w.Delay.Seconds()*(0.8+0.4*p.r.Float64())
		for range k {
			t := at + p.r.ExpFloat64()*8
			if t > b.start+b.Duration.Seconds() {
				continue // the build has ended
			}
			b.Requests++
			guilty++
			p.request(f, t, b.Host, w.UserAgent, fmt.Sprintf("acme/lib-%d", p.r.IntN(6)), b.Workflow, n)
		}
	}
	others := max(0, p.Background) * float64(guilty)
	if p.Guilty < 0 {
		others = max(0, p.Background) * 5000
	}
	// A third of the background comes in bursts of others: mirrors, laptops, cron.
	for range p.poisson(others * 2 / 3) {
		p.request(f, p.seconds*p.hour(0.6), p.r.IntN(1<<16), agents[p.r.IntN(len(agents))], fmt.Sprintf("acme/lib-%d", p.r.IntN(12)), -1, -1)
	}
	for left := int(others / 3); left > 0; {
		k := min(left, 2+p.poisson(8))
		left -= k
		at, host, agent := p.seconds*p.hour(0.6), p.r.IntN(1<<16), agents[p.r.IntN(len(agents))]
		if p.r.Float64() < 0.3 {
			at = math.Floor(at/3600)*3600 + 30*p.r.Float64()
		}
		for range k {
			p.request(f, at+p.r.ExpFloat64()*8, host, agent, fmt.Sprintf("acme/lib-%d", p.r.IntN(12)), -1, -1)
		}
	}
	slices.SortStableFunc(f.Requests, func(a, b Request) int { return a.Time.Compare(b.Time) })
}

func (p *player) request(f *Fleet, at float64, host int, agent, asked string, workflow, build int) {
	q := Request{
		Time: at2time(math.Floor(at + p.Offset.Seconds())), Addr: Address(host % p.Addresses),
		Asked: asked, Status: 200, Workflow: workflow, Build: build,
	}
	if p.UserAgents {
		q.UserAgent = agent
	}
	if p.r.Float64() < 0.4 {
		q.Status = 401
	}
	f.Requests = append(f.Requests, q)
}

// Address is the egress address with a number, from 0.
func Address(n int) string { return fmt.Sprintf("192.0.2.%d", n+1) }

// hour draws a part of the time, 0 to 1, with a noon in its middle that is higher than
// its ends by depth.
func (p *player) hour(depth float64) float64 {
	for {
		x := p.r.Float64()
		if p.r.Float64()*(1+depth) <= 1-depth*math.Cos(2*math.Pi*x) {
			return x
		}
	}
}

func (p *player) logNormal(median, sigma float64) float64 {
	return median * math.Exp(sigma*p.r.NormFloat64())
}

// poisson draws by the sum of waiting times (up to 30, and halves what is more).
func (p *player) poisson(mean float64) int {
	if mean <= 0 {
		return 0
	}
	if mean > 30 {
		return p.poisson(mean/2) + p.poisson(mean-mean/2)
	}
	n := 0
	for t := p.r.ExpFloat64(); t < mean; t += p.r.ExpFloat64() {
		n++
	}
	return n
}

func at2time(seconds float64) time.Time {
	return Begin.Add(time.Duration(seconds * float64(time.Second)))
}
