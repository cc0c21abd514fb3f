package agent

import (
	"fmt"
	"math"
	"time"

	"github.com/tallyman-ci/tallyman/record"
)

// maxBuckets bounds the buckets. There is one for each job that is known here, and one
// for each uid whose calls are no known job's; a job that can take on many uids shares
// the last bucket with all others beyond.
const maxBuckets = 256

// longLine is the size, in bytes, beyond which a record costs more than one token: 20,000
// of the 64 KiB that the socket takes would push everybody's records out of the journal.
const longLine = 4 << 10

// limiter bounds what one job can have recorded, by a token bucket for each: rate
// tokens come in each second, burst of them fit. What is above is not recorded but
// counted, and the count is a record of kind loss.
type limiter struct {
	source      string // of the losses
	what        string // that is lost, for people
	rate, burst float64
	now         func() time.Time

	buckets    map[string]*bucket
	suppressed int64     // in all
	looked     time.Time // when forget last looked at all buckets
}

type bucket struct {
	tokens float64
	filled time.Time

	// What was suppressed and not yet told.
	count    int64
	from, to time.Time
	by       record.By
	ci       *record.CI
	host     *record.Host
}

func newLimiter(source, what string, rate, burst int64, now func() time.Time) *limiter {
	return &limiter{source: source, what: what, rate: float64(rate), burst: math.Max(float64(burst), 1), now: now, buckets: make(map[string]*bucket)}
}

// admit takes a token of a bucket for r, or counts r as suppressed. A line of size
// bytes that is longer than any honest one costs as many tokens as it has pages of it.
func (l *limiter) admit(key string, r *record.Record, size int) bool {
	if l.rate <= 0 {
		return true
	}
	now := l.now()
	b := l.buckets[key]
	if b == nil {
		if len(l.buckets) >= maxBuckets && !l.forget(now) {
			key = "everybody else"
			b = l.buckets[key]
		}
		if b == nil {
			b = &bucket{tokens: l.burst, filled: now}
			l.buckets[key] = b
		}
	}
	b.fill(l, now)
	if cost := float64(1 + size/longLine); b.tokens >= math.Min(cost, l.burst) {
		b.tokens -= cost
		return true
	}
	if b.count == 0 {
		b.from, b.by, b.host = now, r.By, r.Host
		// Whose it is, but not the step: the records of several steps are counted here.
		if b.ci = nil; r.CI != nil {
			ci := *r.CI
			ci.Step, ci.ActionRepository, ci.ActionRef = "", "", ""
			b.ci = &ci
		}
	}
	b.count++
	b.to = now
	l.suppressed++
	return false
}

func (b *bucket) fill(l *limiter, now time.Time) {
	// A clock that was set back fills nothing, and does not empty.
	if passed := now.Sub(b.filled); passed > 0 {
		b.tokens = math.Min(l.burst, b.tokens+passed.Seconds()*l.rate)
	}
	b.filled = now
}

// forget gives up the buckets that are full and owe no loss: a new one would be the
// same. It says whether there were any.
func (l *limiter) forget(now time.Time) bool {
	if passed := now.Sub(l.looked); passed >= 0 && passed < time.Second {
		return false
	}
	l.looked = now
	before := len(l.buckets)
	for key, b := range l.buckets {
		if b.fill(l, now); b.tokens >= l.burst && b.count == 0 {
			delete(l.buckets, key)
		}
	}
	return len(l.buckets) < before
}

// losses returns a record of what each job had suppressed since the last call.
func (l *limiter) losses() []*record.Record {
	var told []*record.Record
	for _, b := range l.buckets {
		if b.count == 0 {
			continue
		}
		told = append(told, &record.Record{
			ID: record.NewID(b.to), TS: b.to.UTC(), Kind: record.KindLoss, By: b.by, CI: b.ci, Host: b.host,
			Loss: &record.Loss{
				Cause: "rate_limited", Count: b.count, From: b.from.UTC(), To: b.to.UTC(), Source: l.source,
				Detail: fmt.Sprintf("%s beyond %.0f at once and %.0f per second", l.what, l.burst, l.rate),
			},
		})
		b.count, b.ci, b.host = 0, nil, nil
	}
	return told
}
