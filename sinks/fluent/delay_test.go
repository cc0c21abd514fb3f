package fluent

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/forwardtest"
	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// timed is a sink that notes how long each record took from the journal's Append to
// the sink's word that it is delivered.
type timed struct {
	sinks.Sink
	made   []time.Time // of the i-th record, written before its Append
	place  map[string]int
	delays []time.Duration
}

func (s *timed) Write(ctx context.Context, batch []sinks.Entry) error {
	err := s.Sink.Write(ctx, batch)
	if err == nil {
		for _, e := range batch {
			s.delays = append(s.delays, time.Since(s.made[s.place[e.ID]]))
		}
	}
	return err
}

// BenchmarkHealthySinksBesideADeadAndASlowOne prints the delay of two healthy sinks, a
// file and a Forward server, alone and beside a Forward server that is gone and one
// that takes 200 ms for each event. Both ways take turns in one run, each time with a
// new journal, so that whatever else the machine does falls on both.
func BenchmarkHealthySinksBesideADeadAndASlowOne(b *testing.B) {
	const rounds, perRound, every = 10, 300, 5 * time.Millisecond
	healthy := forwardtest.New(b, "0")
	healthy.Start()
	slow := forwardtest.New(b, "0")
	slow.Delay = 200 * time.Millisecond
	slow.Start()
	dead := forwardtest.New(b, "0")
	dead.Start()
	dead.Kill()
	place := map[string]int{}
	var lines [][]byte
	for i := range perRound {
		place[sinktest.Record(i).ID] = i
		lines = append(lines, record.Append(nil, sinktest.Record(i)))
	}

	run := func(query string, beside bool) (file, forward []time.Duration) {
		ctx, stop := context.WithTimeout(context.Background(), 5*time.Minute)
		defer stop()
		dir := b.TempDir()
		j, err := journal.Open(filepath.Join(dir, "journal"), journal.Options{})
		if err != nil {
			b.Fatal(err)
		}
		defer j.Close()
		made := make([]time.Time, perRound)
		var ended []chan error
		begin := func(url string) (*sinks.Pump, *timed) {
			target, err := sinks.Parse(url, Scheme())
			if err != nil {
				b.Fatal(err)
			}
			s, err := target.Open(ctx)
			if err != nil {
				b.Fatal(err)
			}
			t := &timed{Sink: s, made: made, place: place}
			p, err := target.NewPump(j, t, dir, func(record.Loss) {}, nil)
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- p.Run(ctx) }()
			ended = append(ended, done)
			return p, t
		}
		filePump, f := begin("file://" + filepath.Join(dir, "out.jsonl") + "?keep=0&" + query)
		forwardPump, w := begin(healthy.URL("name=healthy&" + query))
		var others []*sinks.Pump
		if beside {
			for _, url := range []string{dead.URL("name=dead"), slow.URL("name=slow")} {
				p, _ := begin(url)
				others = append(others, p)
			}
		}
		tick := time.NewTicker(every)
		defer tick.Stop()
		for i, line := range lines {
			<-tick.C
			made[i] = time.Now()
			if err := j.Append(line); err != nil {
				b.Fatal(err)
			}
		}
		for _, p := range []*sinks.Pump{filePump, forwardPump} {
			if err := p.Flush(ctx); err != nil {
				b.Fatal(err)
			}
		}
		for _, p := range others {
			if s := p.Status(); s.BehindRecords < perRound/2 {
				b.Errorf("the sink %s is no trouble: %+v", s.Name, s)
			}
		}
		stop()
		for _, done := range ended {
			if err := <-done; err != nil {
				b.Error(err)
			}
		}
		return f.delays, w.delays
	}

	for b.Loop() {
		var table strings.Builder
		fmt.Fprintln(&table, "\n| healthy sink | batch_delay | records | p50 alone | beside | ratio | p99 alone | beside | ratio |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
		for _, delay := range []string{"200ms", "1ms"} {
			var all [2][2][]time.Duration // by sink, by way
			for round := range rounds {
				for way := range 2 {
					way = (way + round) % 2 // neither is always the first
					file, forward := run("batch_delay="+delay, way == 1)
					all[0][way] = append(all[0][way], file...)
					all[1][way] = append(all[1][way], forward...)
				}
			}
			for i, name := range []string{"file", "fluent"} {
				alone, beside := all[i][0], all[i][1]
				if len(alone) != rounds*perRound || len(beside) != rounds*perRound {
					b.Fatalf("%s: %d and %d deliveries of %d", name, len(alone), len(beside), rounds*perRound)
				}
				slices.Sort(alone)
				slices.Sort(beside)
				fmt.Fprintf(&table, "| %s | %s | %d |", name, delay, len(alone))
				for _, percent := range []int{50, 99} {
					at := len(alone)*percent/100 - 1
					fmt.Fprintf(&table, " %.1f ms | %.1f ms | %.2f |", alone[at].Seconds()*1e3, beside[at].Seconds()*1e3, beside[at].Seconds()/alone[at].Seconds())
				}
				fmt.Fprintln(&table)
			}
		}
		b.Log(table.String())
	}
}
