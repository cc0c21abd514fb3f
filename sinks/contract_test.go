package sinks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

// A sink is down for four hours. Nothing is lost, the disk keeps to its bound,
// memory does not grow with the backlog, and the order is kept.
func TestSinkDownForHours(t *testing.T) {
	faults.Case(t, "SP-10")
	const hours = 4
	each := 2 // records a second; with all points of the crash tests, as many as a busy runner makes
	if os.Getenv(inject.AllVariable) == "all" {
		each = 50
	}
	dir := t.TempDir()
	total := hours * 3600 * each
	var lost int64
	bound := journal.Options{MaxBytes: 256 << 20, MaxSegmentBytes: 4 << 20, OnLoss: func(l record.Loss) { lost += l.Count }}
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, dir, bound)
		p, _ := b.pump(&memory{fail: func(int, []string) error { return errors.New("connection refused") }}, b.options("m"))
		var before, after runtime.MemStats
		for second := range hours * 3600 {
			var block []byte
			for i := range each {
				block = append(block, line(fmt.Sprintf("r%06d", second*each+i), 1)...)
			}
			if err := b.j.Append(block); err != nil {
				t.Fatal(err)
			}
			if second == 600 {
				runtime.GC()
				runtime.ReadMemStats(&before)
			}
			time.Sleep(time.Second)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
			t.Errorf("the heap grew by %d bytes while the sink was down", grown)
		}
		if s := p.Status(); s.State != StateRetrying || s.BehindRecords != int64(total) || s.Retries < 100 || s.Retries > 1000 {
			t.Errorf("%+v", s)
		}
		if s := b.j.Status(); s.Bytes > s.MaxBytes {
			t.Errorf("%d bytes on the disk, the bound is %d", s.Bytes, s.MaxBytes)
		}
		b.end()
	})
	// By the machine's clock: the next start drains.
	b := newBench(t, dir, bound)
	m := &memory{}
	start := time.Now()
	p, _ := b.pump(m, b.options("m"))
	ctx, cancel := context.WithTimeout(t.Context(), hours*time.Hour/10)
	defer cancel()
	if err := p.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	b.end()
	got := m.ids()
	if len(got) != total || !slices.IsSorted(got) || lost != 0 {
		t.Errorf("%d delivered and %d lost of %d, in order: %v", len(got), lost, total, slices.IsSorted(got))
	}
	t.Logf("%d records of %d hours drained in %v: %.0f times as fast as they came", total, hours, took.Round(time.Millisecond), (hours*time.Hour).Seconds()/took.Seconds())
}

// Two fast sinks get each record as soon beside a slow, a dead and a hanging sink as
// alone. The clock is the test's: it stands still while anything computes, so what is
// measured is waiting, and a wait for another sink would be seen whole.
func TestSlowSinkBesideFastOnes(t *testing.T) {
	faults.Case(t, "SP-12")
	const records = 500
	delays := func(beside bool) (sorted []time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, t.TempDir(), journal.Options{MaxSegmentBytes: 20_000})
			var mu sync.Mutex
			made := map[string]time.Time{}
			fast := sinkFunc(func(_ context.Context, batch []Entry) error {
				time.Sleep(3 * time.Millisecond)
				mu.Lock()
				defer mu.Unlock()
				for _, e := range batch {
					sorted = append(sorted, time.Since(made[e.ID]))
				}
				return nil
			})
			b.pump(fast, b.options("fast-1"))
			b.pump(fast, b.options("fast-2"))
			var others []*Pump
			if beside {
				for name, write := range map[string]sinkFunc{
					"slow": func(ctx context.Context, _ []Entry) error {
						select {
						case <-time.After(time.Second):
							return nil
						case <-ctx.Done():
							return ctx.Err()
						}
					},
					"dead": func(context.Context, []Entry) error { return errors.New("connection refused") },
					"hanging": func(ctx context.Context, _ []Entry) error {
						<-ctx.Done()
						return ctx.Err()
					},
				} {
					o := b.options(name)
					o.MaxRecords, o.Timeout, o.MaxBackoff = 1, 2*time.Second, time.Second
					p, _ := b.pump(write, o)
					others = append(others, p)
				}
			}
			for i := range records {
				id := fmt.Sprintf("r%06d", i)
				mu.Lock()
				made[id] = time.Now()
				mu.Unlock()
				b.append(id)
				time.Sleep(17 * time.Millisecond)
			}
			time.Sleep(time.Second)
			for _, p := range others {
				// Else nothing was in the way of the fast ones.
				if s := p.Status(); s.BehindRecords < records/2 || s.Name == "dead" && s.Retries < 5 {
					t.Errorf("the sink %s is no trouble: %+v", s.Name, s)
				}
			}
			b.end()
		})
		if len(sorted) != 2*records {
			t.Fatalf("%d deliveries to the fast sinks, want %d", len(sorted), 2*records)
		}
		slices.Sort(sorted)
		return sorted
	}
	alone, beside := delays(false), delays(true)
	for _, percent := range []int{50, 99, 100} {
		at := 2*records*percent/100 - 1
		t.Logf("p%d of the fast sinks: %v alone, %v beside the others", percent, alone[at], beside[at])
		if beside[at] > alone[at]*11/10 {
			t.Errorf("the fast sinks wait for the others: p%d is %v, and %v without them", percent, beside[at], alone[at])
		}
	}
}

// Whatever happens to the clock, waits keep their length, and ids stay unique.
func TestClockSteps(t *testing.T) {
	faults.Case(t, "SP-18")
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		step := time.Duration(0)
		now := func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			// Without the monotonic reading, as after a suspend or from a file.
			return time.Now().Add(step).Round(0)
		}
		b := newBench(t, t.TempDir(), journal.Options{Now: now, MaxSegmentBytes: 20_000, MaxSegmentAge: time.Hour})
		m := &memory{}
		o := b.options("m")
		o.Now = now
		p, _ := b.pump(m, o)
		down := b.options("down")
		down.Now, down.MaxBackoff = now, 10*time.Second
		failing := &memory{fail: func(int, []string) error { return errors.New("down") }}
		b.pump(failing, down)
		n, ids := 0, map[string]bool{}
		for _, s := range []time.Duration{0, 24 * time.Hour, -24 * time.Hour, time.Second, -time.Second, 365 * 24 * time.Hour, -20 * 365 * 24 * time.Hour} {
			mu.Lock()
			step = s
			mu.Unlock()
			before := failing.attempts()
			for range 10 {
				b.append(fmt.Sprintf("r%06d", n))
				n++
				for range 1000 {
					ids[record.NewID(now())] = true
				}
				time.Sleep(10 * time.Millisecond)
			}
			time.Sleep(o.MaxDelay + 300*time.Millisecond)
			synctest.Wait()
			if got := len(m.ids()); got != n {
				t.Errorf("after a step of %v: %d of %d records delivered in time", s, got, n)
			}
			if st := p.Status(); st.BehindSeconds < 0 {
				t.Errorf("after a step of %v: %+v", s, st)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if tries := failing.attempts() - before; tries < 5 || tries > 30 {
				t.Errorf("after a step of %v: %d attempts at a dead sink in a minute", s, tries)
			}
		}
		if len(ids) != n*1000 {
			t.Errorf("%d different ids of %d", len(ids), n*1000)
		}
		if s := b.j.Status(); s.Segments > 12 {
			t.Errorf("%d segments: each look at the clock ended one", s.Segments)
		}
		b.end()
	})
}

// A newer version wrote the second half of the journal, and the cursor; then the old
// one comes back. It delivers what it does not know, byte for byte.
func TestNewerVersionWroteTheJournal(t *testing.T) {
	faults.Case(t, "SP-21")
	dir := t.TempDir()
	m := &memory{}
	b := newBench(t, dir, journal.Options{})
	p, _ := b.pump(m, b.options("m"))
	b.append("old-1", "old-2")
	b.flush(p)
	b.end()

	newer := []string{
		`{"id":"new-1","ts":"2031-01-01T00:00:00.000000000Z","kind":"invocation","schema":2,"by":"oracle","invocation":{"tool":"docker","colour":{"red":[1,2.5,null]}},"quorum":"x"}`,
		`{"id":"new-2","ts":"2031-01-01T00:00:00.000000000Z","kind":"weather","schema":2,"rain":true}`,
	}
	header := `{"kind":"segment","id":"01a3185c-5000-7000-b9d3-0caa3b3949eb","schema":2,"segment":2,"ts":"2031-01-01T00:00:00Z","first":2,"compression":"none"}`
	if err := os.WriteFile(filepath.Join(dir, "journal", "records-00000000000000000002.jsonl"), []byte(header+"\n"+strings.Join(newer, "\n")+"\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "cursors", "m.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file map[string]json.RawMessage
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	file["cursor"] = append(bytes.TrimSuffix(file["cursor"], []byte("}")), `,"shard":{"n":3}}`...)
	file["crc32c"] = fmt.Appendf(nil, `"%08x"`, crc32.Checksum(file["cursor"], crc32.MakeTable(crc32.Castagnoli)))
	file["signed_by"] = []byte(`"v2"`)
	if data, err = json.Marshal(file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}

	var lines []string
	var losses []record.Loss
	b = newBench(t, dir, journal.Options{OnLoss: func(l record.Loss) { losses = append(losses, l) }})
	p, _ = b.pump(sinkFunc(func(_ context.Context, batch []Entry) error {
		for _, e := range batch {
			lines = append(lines, string(e.Line))
		}
		return nil
	}), b.options("m"))
	b.append("old-3")
	b.flush(p)
	b.end()
	want := append(newer, strings.TrimSuffix(string(line("old-3", 300)), "\n"))
	if !slices.Equal(lines, want) || len(losses) != 0 {
		t.Errorf("delivered %q\nwant %q\nlosses %+v", lines, want, losses)
	}
}

// What a volume that vanishes takes along is what no sink has: with the defaults a
// healthy one has each record within a second.
func TestDefaultsDeliverWithinASecond(t *testing.T) {
	faults.Case(t, "SP-35")
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, t.TempDir(), journal.Options{})
		m := &memory{}
		b.pump(m, b.options("m"))
		for i := range 50 {
			b.append(numbered(i, 1)...)
			time.Sleep(time.Second)
			synctest.Wait()
			if n := len(m.ids()); n != i+1 {
				t.Fatalf("a second after record %d the sink has %d", i+1, n)
			}
		}
		b.end()
	})
}
