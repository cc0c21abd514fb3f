package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"slices"
	"strings"

	"github.com/tallyman-ci/tallyman/blame"
	"github.com/tallyman-ci/tallyman/desk/page"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/report"
)

// suspects ranks whose builds explain the imported git requests among the records. It is
// nil where there are none. The ranking is about the whole fleet: a filter on a
// repository would take the innocent's explanation away.
func suspects(ctx context.Context, src panels.Source, paths []string, f panels.Filter) (*page.Suspects, error) {
	t, err := src.Query(ctx, "SELECT COUNT(*) AS n FROM tallyman.requests WHERE class LIKE 'git-%'")
	if err != nil {
		return nil, fmt.Errorf("count requests: %w", err)
	}
	if len(t.Rows) != 1 || t.Rows[0][0] == int64(0) {
		return nil, nil
	}
	if slices.Contains(paths, "-") {
		return &page.Suspects{Title: "Whose builds explain the requests", Verdict: "Nobody was looked for.",
			Why: "Standard input can be read only once: name files, or ask tallyman-desk blame."}, nil
	}
	sources, closeAll, err := report.OpenPaths(paths, f.From, nil)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	requests, builds := blame.NewRequests(), blame.NewBuilds()
	builds.From, builds.To = f.From, f.To
	// A request that was imported twice was made once. Ids are kept as hashes: there can be
	// millions, and two of ten million are alike by chance once in 300,000 pages.
	seen, hash := map[uint64]struct{}{}, maphash.MakeSeed()
	for _, s := range sources {
		for n := 0; ; n++ {
			if n&1023 == 0 && ctx.Err() != nil {
				return nil, ctx.Err()
			}
			line, err := s.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", report.Safe(s.Name()), err)
			}
			var r record.Record
			if recordjson.Unmarshal(line, &r) != nil {
				continue // a torn line is neither
			}
			if r.HTTP == nil {
				builds.Add(&r)
				continue
			}
			within := (f.From.IsZero() || !r.TS.Before(f.From)) && (f.To.IsZero() || r.TS.Before(f.To))
			if h := r.HTTP; within && h.PeriodNS == 0 && anonymousGit(h) {
				id := maphash.String(hash, r.ID)
				if _, twice := seen[id]; twice {
					continue
				}
				seen[id] = struct{}{}
				requests.Add(r.TS, max(h.Count, 1), blame.Mark{UserAgent: h.UserAgent, Asked: h.Repository, Addr: h.RemoteAddr})
			}
		}
	}
	r := &blame.Result{Verdict: blame.CannotTell, Coverage: blame.Coverage{Share: -1}, Requests: requests.Total(), Builds: builds.Len()}
	var apart *blame.NoOverlapError
	switch {
	case requests.Total() == 0:
		r.Reasons = []string{"None of the imported git requests in this time was anonymous."}
	case builds.Len() == 0:
		r.Reasons = []string{"No docker build was recorded in this time: is the shim installed where builds run?"}
	default:
		ranked, err := blame.Rank(ctx, requests, builds, blame.Options{Top: page.MaxRows})
		switch {
		case errors.As(err, &apart):
			r.Reasons = []string{"The requests and the recorded builds have no time in common: is the table of another time zone, or of other days?"}
		case err != nil:
			return nil, err
		default:
			r = ranked
		}
	}
	return page.Blamed(*r), nil
}

// anonymousGit says whether a request is of the traffic that servers throttle: git's,
// with no account. What says nothing of an account had none.
func anonymousGit(h *record.HTTP) bool {
	return strings.HasPrefix(h.Class, "git-") && (h.Anonymous || h.User == "" && h.TokenName == "")
}
