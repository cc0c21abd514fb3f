package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/internal/commandline"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/report"
)

// blameCommand ranks whose builds explain requests that a server counted.
func blameCommand() *cli.Command {
	levels := make([]string, 0, 4)
	for _, l := range blame.Levels() {
		levels = append(levels, string(l))
	}
	return &cli.Command{
		Name:      "blame",
		Usage:     "rank whose docker builds explain the requests that GitHub's support lists",
		ArgsUsage: "JOURNAL...",
		Description: `Counts the anonymous git requests of the file, and says which repository, workflow and job
has builds that explain them, how sure that is, and which part nobody here explains.
JOURNAL is a journal's folder or a file of records. docs/blame.md says how to read it.

Examples:
  tallyman-desk blame --csv requests.csv.gz /var/log/tallyman
  tallyman-desk blame --csv requests.csv --status 401 --timezone Europe/Berlin records.jsonl
  tallyman-desk blame --csv requests.csv --by image --egress 'pool-a-*=192.0.2.7' records.jsonl`,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "csv", Usage: "the requests in `FILE` (CSV, gzip or not; - is standard input); may be repeated"},
			&cli.StringSliceFlag{Name: "status", Usage: "only requests answered with `CODE`, such as 401 or 4xx; may be repeated"},
			&cli.BoolFlag{Name: "all", Usage: "also requests with an account, and those that are no git traffic"},
			&cli.StringFlag{Name: "by", Value: string(blame.ByJob), Usage: "one candidate is one `LEVEL`: " + strings.Join(levels, ", ")},
			&cli.StringFlag{Name: "from", Usage: "only from `TIME` on: RFC 3339, a date, or a length before now (7d)"},
			&cli.StringFlag{Name: "to", Usage: "only before `TIME`"},
			&cli.StringFlag{Name: "format", Value: "table", Usage: "`FORM` of the answer: table or json"},
			&cli.IntFlag{Name: "top", Value: 10, Usage: "show the first `N`"},
			&cli.StringFlag{Name: "timezone", Aliases: []string{"zone"}, Value: "UTC", Usage: "`ZONE` of times in the file that name none, such as Europe/Berlin"},
			&cli.StringFlag{Name: "time-format", Usage: "`FORM` of the file's times: rfc3339, unix, unix-ms, '%Y-%m-%d %H:%M:%S', ...; without it, found out"},
			&cli.StringSliceFlag{Name: "column", Usage: "`FIELD=HEADING` of the file, or FIELD=#3 for the third column; may be repeated"},
			&cli.StringFlag{Name: "delimiter", Usage: "`CHARACTER` between cells (tab for a tab); without it, found out"},
			&cli.StringSliceFlag{Name: "egress", Usage: "`PATTERN=ADDRESS`: builds on runners, pods or nodes like PATTERN (pool-a-*) leave by ADDRESS; may be repeated"},
			&cli.DurationFlag{Name: "skew", Usage: "the server's clock is ahead of the runners' by `DURATION`; without it, estimated"},
			&cli.StringFlag{Name: "bad", Usage: "list all bad rows in `FILE`; without it the first 20 are shown"},
			&cli.Uint64Flag{Name: "seed", Usage: "`SEED` of resamples; the same input and seed give the same answer"},
			&cli.IntFlag{Name: "resamples", Value: 100, Usage: "`N` bootstrap resamples for the intervals"},
			&cli.IntFlag{Name: "placebos", Value: 19, Usage: "at most `N` fits to moved requests, to learn what chance brings forth"},
		},
		Action: func(c *cli.Context) error {
			x, err := newInquiry(c)
			if err != nil {
				return err
			}
			return x.run(c.Context)
		},
	}
}

// inquiry is one call of blame.
type inquiry struct {
	c        *cli.Context
	from, to time.Time
	table    importer.Options
	status   func(int64) bool
	egress   []egressRule
	requests *blame.Requests
	builds   *blame.Builds
	rows     rowCounts
}

type egressRule struct{ pattern, addr string }

// rowCounts say what became of the rows of the files.
type rowCounts struct {
	Rows          int64 `json:"rows"`
	Used          int64 `json:"used"`
	Bad           int64 `json:"bad"`
	OtherStatus   int64 `json:"other_status"`
	Authenticated int64 `json:"authenticated"`
	NotGit        int64 `json:"not_git"`
	OutOfTime     int64 `json:"out_of_time"`
}

func newInquiry(c *cli.Context) (*inquiry, error) {
	x := &inquiry{c: c, requests: blame.NewRequests(), builds: blame.NewBuilds()}
	if len(c.StringSlice("csv")) == 0 {
		return nil, commandline.BadUsage(c, "blame wants --csv FILE, the requests to explain")
	}
	if !c.Args().Present() {
		return nil, commandline.BadUsage(c, "blame wants the journals of the runners: folders or files of records")
	}
	if f := c.String("format"); f != "table" && f != "json" {
		return nil, commandline.BadUsage(c, "--format is table or json, not %s", strconv.Quote(f))
	}
	if l := blame.Level(c.String("by")); !slices.Contains(blame.Levels(), l) {
		return nil, commandline.BadUsage(c, "--by wants one of %v, not %s", blame.Levels(), strconv.Quote(string(l)))
	}
	if c.Int("top") < 1 || c.Int("resamples") < 20 || c.Int("placebos") < 3 {
		return nil, commandline.BadUsage(c, "--top wants at least 1, --resamples at least 20 and --placebos at least 3")
	}
	now := time.Now()
	var err error
	if x.from, err = report.ParseTime(c.String("from"), now); err != nil {
		return nil, commandline.BadUsage(c, "--from: %v", err)
	}
	if x.to, err = report.ParseTime(c.String("to"), now); err != nil {
		return nil, commandline.BadUsage(c, "--to: %v", err)
	}
	if !x.from.IsZero() && !x.to.IsZero() && !x.from.Before(x.to) {
		return nil, commandline.BadUsage(c, "--from is not before --to")
	}
	if x.table, err = tableOptions(c, importer.GitHubCSV); err != nil {
		return nil, err
	}
	if x.status, err = statusFilter(c.StringSlice("status")); err != nil {
		return nil, commandline.BadUsage(c, "%v", err)
	}
	for _, rule := range c.StringSlice("egress") {
		pattern, addr, ok := strings.Cut(rule, "=")
		if _, err := filepath.Match(pattern, ""); !ok || err != nil || pattern == "" || addr == "" {
			return nil, commandline.BadUsage(c, "--egress wants PATTERN=ADDRESS, such as pool-a-*=192.0.2.7")
		}
		x.egress = append(x.egress, egressRule{pattern, addr})
	}
	return x, nil
}

// statusFilter understands 401 and 4xx; without any, all pass.
func statusFilter(wanted []string) (func(int64) bool, error) {
	var low, high []int64
	for _, w := range wanted {
		a, b := w, w
		if len(w) == 3 && strings.HasSuffix(strings.ToLower(w), "xx") {
			a, b = w[:1]+"00", w[:1]+"99"
		}
		from, err := strconv.ParseInt(a, 10, 64)
		to, err2 := strconv.ParseInt(b, 10, 64)
		if err != nil || err2 != nil || from < 100 || to > 599 {
			return nil, fmt.Errorf("--status wants a code such as 401, or a class such as 4xx, not %s", strconv.Quote(w))
		}
		low, high = append(low, from), append(high, to)
	}
	return func(s int64) bool {
		for i := range low {
			if s >= low[i] && s <= high[i] {
				return true
			}
		}
		return len(low) == 0
	}, nil
}

func (x *inquiry) run(ctx context.Context) error {
	if list := x.c.String("bad"); list != "" { // each file adds to it
		if err := os.WriteFile(list, nil, 0o644); err != nil {
			return err
		}
	}
	for _, name := range x.c.StringSlice("csv") {
		if err := x.readRequests(ctx, name); err != nil {
			return fmt.Errorf("%s: %w", report.Safe(name), err)
		}
	}
	if x.requests.Total() == 0 {
		return fmt.Errorf("none of the requests is left to explain: %s", x.rows.text())
	}
	if err := x.readBuilds(ctx); err != nil {
		return err
	}
	if x.builds.Len() == 0 {
		return errors.New("the journals hold no docker build in that time: is the shim installed where builds run? (tallyman doctor)")
	}
	o := blame.Options{Level: blame.Level(x.c.String("by")), Top: x.c.Int("top"), Resamples: x.c.Int("resamples"), Placebos: x.c.Int("placebos"), Seed: x.c.Uint64("seed")}
	if x.c.IsSet("skew") {
		d := x.c.Duration("skew")
		o.Shift = &d
	}
	r, err := blame.Rank(ctx, x.requests, x.builds, o)
	var apart *blame.NoOverlapError
	if errors.As(err, &apart) {
		const form = "2006-01-02 15:04:05"
		return fmt.Errorf("the file covers %s to %s, the journals %s to %s (UTC), and they have no time in common: is the file in another time zone? (--timezone), or are these the journals of other days?",
			apart.RequestsFrom.Format(form), apart.RequestsTo.Format(form), apart.BuildsFrom.Format(form), apart.BuildsTo.Format(form))
	}
	if err != nil {
		return err
	}
	if x.c.String("format") == "json" {
		data, err := json.MarshalIndent(struct {
			*blame.Result
			Rows rowCounts `json:"rows"`
		}{r, x.rows}, "", "  ")
		if err != nil {
			return err
		}
		_, err = x.c.App.Writer.Write(append(report.SafeJSON(data), '\n'))
		return err
	}
	w := bufio.NewWriter(x.c.App.Writer)
	printBlame(w, r, x.rows)
	return w.Flush()
}

const maxBadShown = 20

// readRequests counts the rows of a file.
func (x *inquiry) readRequests(ctx context.Context, name string) (err error) {
	f, err := openInput(name, x.c.App.Reader)
	if err != nil {
		return err
	}
	defer f.Close()
	bad := x.c.App.ErrWriter
	all := false
	if list := x.c.String("bad"); list != "" {
		file, err := os.OpenFile(list, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		out := bufio.NewWriter(file)
		defer func() { err = errors.Join(err, out.Flush(), file.Close()) }()
		bad, all = out, true
	}
	var badHere int64
	for r, err := range importer.Requests(ctx, f, x.table) {
		var row *importer.BadRow
		switch {
		case errors.As(err, &row):
			x.rows.Rows++
			x.rows.Bad++
			if badHere++; all || badHere <= maxBadShown {
				fmt.Fprintln(bad, report.Safe(name+": "+row.Error()))
			}
		case err != nil:
			return err
		default:
			x.request(r)
		}
	}
	if !all && badHere > maxBadShown {
		fmt.Fprintf(bad, "%s: and %d bad rows more (--bad FILE lists all)\n", report.Safe(name), badHere-maxBadShown)
	}
	return nil
}

// request counts one row where it is of the traffic that is asked for. A row that says
// nothing of account, path or status is taken for what was asked for.
func (x *inquiry) request(r *record.Record) {
	h := r.HTTP
	x.rows.Rows++
	git := h.Class == "" || strings.HasPrefix(h.Class, "git-")
	switch {
	case !x.from.IsZero() && r.TS.Before(x.from), !x.to.IsZero() && !r.TS.Before(x.to):
		x.rows.OutOfTime++
	case !x.status(h.Status):
		x.rows.OtherStatus++
	case !x.c.Bool("all") && (h.User != "" || h.TokenName != "") && !h.Anonymous:
		x.rows.Authenticated++
	case !x.c.Bool("all") && !git:
		x.rows.NotGit++
	default:
		x.rows.Used++
		m := blame.Mark{UserAgent: h.UserAgent, Asked: h.Repository, Addr: h.RemoteAddr}
		x.requests.Add(r.TS, max(h.Count, 1), m)
	}
}

func (c rowCounts) text() string {
	text := fmt.Sprintf("%d rows, %d used", c.Rows, c.Used)
	for _, part := range []struct {
		n    int64
		what string
	}{
		{c.Bad, "bad"}, {c.OtherStatus, "with another status"}, {c.Authenticated, "with an account (--all takes them)"},
		{c.NotGit, "no git traffic (--all takes them)"}, {c.OutOfTime, "before --from or after --to"},
	} {
		if part.n > 0 {
			text += fmt.Sprintf(", %d %s", part.n, part.what)
		}
	}
	return text
}

// readBuilds collects the builds of the time that the requests cover. Those that began
// hours before can still run.
func (x *inquiry) readBuilds(ctx context.Context) error {
	x.builds.From, x.builds.To = x.from, x.to
	if len(x.egress) > 0 {
		x.builds.Egress = x.egressOf
	}
	sources, closeAll, err := report.OpenPaths(x.c.Args().Slice(), x.from, x.c.App.Reader)
	if err != nil {
		return err
	}
	defer closeAll()
	for _, s := range sources {
		for n := 0; ; n++ {
			if n&1023 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			line, err := s.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				return fmt.Errorf("read %s: %w", report.Safe(s.Name()), err)
			}
			var r record.Record
			if recordjson.Unmarshal(line, &r) == nil { // a torn line is no build
				x.builds.Add(&r)
			}
		}
	}
	return nil
}

// egressOf is the address of the first rule that fits the runner, pod, node or host.
func (x *inquiry) egressOf(r *record.Record) string {
	var names []string
	if r.Host != nil {
		names = append(names, r.Host.Name, r.Host.Pod, r.Host.Node)
	}
	if r.CI != nil && r.CI.Runner != nil {
		names = append(names, r.CI.Runner.Name)
	}
	for _, rule := range x.egress {
		for _, n := range names {
			if ok, _ := filepath.Match(rule.pattern, n); ok && n != "" {
				return rule.addr
			}
		}
	}
	return ""
}

// verdicts are for people.
var verdicts = map[blame.Verdict]string{
	blame.Named:       "These stand out.",
	blame.Indications: "There are indications, no more.",
	blame.CannotTell:  "Cannot tell.",
}

func printBlame(w io.Writer, r *blame.Result, rows rowCounts) {
	const form = "2006-01-02 15:04:05"
	fmt.Fprintf(w, "%s\n", verdicts[r.Verdict])
	for _, reason := range r.Reasons {
		fmt.Fprintf(w, "  %s\n", report.Safe(reason))
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "time\t%s to %s (UTC)\n", r.From.Format(form), r.To.Format(form))
	fmt.Fprintf(tw, "rows\t%s\n", rows.text())
	fmt.Fprintf(tw, "requests\t%d in that time, %d outside of it\n", r.Requests, r.Outside)
	fmt.Fprintf(tw, "explained\t%s by builds of those who stand out at all; the others are background\n", estimate(r.Explained))
	fmt.Fprintf(tw, "builds\t%d of %d candidates", r.Builds, r.Candidates)
	if r.AssumedEnds > 0 {
		fmt.Fprintf(tw, "; the end of %d is assumed", r.AssumedEnds)
	}
	if c := r.Coverage; c.Share >= 0 {
		fmt.Fprintf(tw, "\ncoverage\t%.0f %%: %s\n", 100*c.Share, c.From)
	} else {
		fmt.Fprintf(tw, "\ncoverage\tnot known: %s\n", c.From)
	}
	fmt.Fprintf(tw, "clocks\tthe server's is taken to be ahead by %s (a start-up delay of builds looks the same)\n", r.Shift)
	tw.Flush()
	if len(r.Suspects) == 0 {
		return
	}
	fmt.Fprintln(w, "\nSuspects, by evidence")
	tw = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  rank\t90 %\tnamed\trequests\t90 %\tshare\tbuilds\tper build\tevidence\tby chance\toverlaps\trank by overlaps\tcandidate")
	for _, s := range r.Suspects {
		named := "no"
		if s.Named {
			named = "yes"
		}
		fmt.Fprintf(tw, "  %d\t%d-%d\t%s\t%.0f\t%.0f-%.0f\t%.1f %%\t%d\t%.1f\t%.1f sd\t%.4f\t%d\t%d\t%s\n", s.Rank, s.RankLow, s.RankHigh, named,
			s.Requests.Value, s.Requests.Low, s.Requests.High, 100*s.Share, s.Builds, s.PerBuild, s.Evidence, s.PValue, s.Overlaps, s.OverlapRank, report.Safe(memberNames(s)))
	}
	tw.Flush()
	for _, s := range r.Suspects {
		if s.Named {
			printSuspect(w, s)
		}
	}
	fmt.Fprintln(w, "\nBeside it, the plain count of overlaps (it ranks who is busy)")
	tw = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  overlaps\tlift\tcandidate")
	for _, b := range r.ByOverlap[:min(5, len(r.ByOverlap))] {
		fmt.Fprintf(tw, "  %d\t%.2f\t%s\n", b.Overlaps, b.Lift, report.Safe(b.Candidate.String()))
	}
	tw.Flush()
}

func estimate(e blame.Estimate) string {
	return fmt.Sprintf("%.0f (90 %%: %.0f to %.0f)", e.Value, e.Low, e.High)
}

func memberNames(s blame.Suspect) string {
	names := make([]string, len(s.Members))
	for i, m := range s.Members {
		names[i] = m.String()
	}
	if len(names) > 1 {
		return "one or some of: " + strings.Join(names, "; ")
	}
	return names[0]
}

// printSuspect shows what a named suspect's requests and builds look like.
func printSuspect(w io.Writer, s blame.Suspect) {
	fmt.Fprintf(w, "\n%d. %s\n", s.Rank, report.Safe(memberNames(s)))
	lists := map[string][]blame.Part{"1 builds": s.Steps, "2 user agents": s.UserAgents, "3 asked for": s.Asked}
	for _, title := range slices.Sorted(maps.Keys(lists)) {
		var words []string
		for _, p := range lists[title][:min(3, len(lists[title]))] {
			words = append(words, fmt.Sprintf("%s (%.0f)", p.Name, p.Requests))
		}
		if len(words) > 0 {
			fmt.Fprintf(w, "   %s: %s\n", title[2:], report.Safe(strings.Join(words, "; ")))
		}
	}
	for _, e := range s.Examples {
		where := e.JobURL
		if where == "" && e.RunID != "" {
			where = "run " + e.RunID
		}
		fmt.Fprintf(w, "   look at: %s UTC, about %.0f requests, %s\n", e.Start.Format("2006-01-02 15:04:05"), e.Requests, report.Safe(strings.TrimSpace(where+" on "+e.Runner)))
	}
}
