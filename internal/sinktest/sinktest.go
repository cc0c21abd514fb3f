// Package sinktest strains a sink: a load of records that are all different goes
// through a journal and a pump to a server that is killed on the way, and an oracle
// that can make each record again judges what the server took.
//
// A test calls Run with the sink's URL and a Process, which is its own test binary
// as a server (Serve), or any other program that can be killed and started again.
package sinktest

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
)

// RecordsVariable sets the size of the loads, for benchmarks.
const RecordsVariable = "TALLYMAN_SINK_RECORDS"

// Records is how many records a load has: usual, or what RecordsVariable says.
func Records(t testing.TB, usual int) int {
	t.Helper()
	s := os.Getenv(RecordsVariable)
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 8 {
		t.Fatalf("%s=%q: want a number from 8", RecordsVariable, s)
	}
	return n
}

// epoch is the time of the first record of a load.
var epoch = time.Date(2026, 11, 1, 8, 0, 0, 123_456_789, time.UTC)

// Record is the i-th record of a load. It is the same in each call, so that nobody
// needs to keep the load in memory.
func Record(i int) *record.Record {
	ts := epoch.Add(time.Duration(i) * 1_000_003)
	number := strconv.Itoa(i)
	r := &record.Record{
		ID: record.DeriveID(ts, "sinktest", number), TS: ts, Kind: record.KindInvocation, Schema: record.SchemaVersion, By: record.BySealed,
		CI: &record.CI{
			Repository: "acme/service-" + strconv.Itoa(i%97), Owner: "acme", Workflow: "build", Job: "test",
			JobID: strconv.Itoa(70_000_000_000 + i%1013), RunID: strconv.Itoa(17_000_000_000 + i%1013), RunAttempt: 1,
			Ref: "refs/heads/main", SHA: "0123456789abcdef0123456789abcdef01234567", Actor: "octocat",
			Runner: &record.Runner{Name: "runner-" + strconv.Itoa(i%31), OS: "Linux", Arch: "X64"},
		},
		Host: &record.Host{Name: "runner-" + strconv.Itoa(i%31)},
	}
	switch i % 4 {
	case 0:
		r.Invocation = &record.Invocation{Tool: "docker", Command: "run", Images: []string{"alpine:" + number}, Flags: []string{"--rm", "-v"}, Argc: 7, PID: int64(i%32768 + 1), UID: 1001}
	case 1:
		code := int64(i % 3)
		r.Kind, r.End = record.KindInvocationEnd, &record.End{Tool: "docker", Command: "run", DurationNS: int64(i) * 1e6, ExitCode: &code, Source: "pidfd_info"}
	case 2:
		r.Kind, r.Event = record.KindEvent, &record.Event{Type: "container", Action: "die", Image: "alpine:" + number, TimeNano: ts.UnixNano(), Labels: []record.Attr{{Key: "team", Value: "ü\n\"" + number}}}
	case 3:
		r.Kind, r.Loss = record.KindLoss, &record.Loss{Cause: "queue_full", Count: int64(i), From: ts, To: ts.Add(time.Second), Source: "events"}
	}
	return r
}

// Line is the line of the i-th record, without a newline.
func Line(i int) []byte {
	line := record.Append(nil, Record(i))
	return line[:len(line)-1]
}

// Sum is a sum of what a server took for a record.
func Sum(payload []byte) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(payload) // never fails
	return h.Sum64()
}

// Oracle knows what a load must become at the server.
type Oracle struct {
	place   map[string]int // of an id in the load
	times   []int          // that the record arrived
	want    func(i int) []byte
	figures Figures
	first   string // the first thing that is wrong
}

// NewOracle makes the oracle of a load of n records. want is the form that the
// server gets of the i-th, or nil where that is not compared.
func NewOracle(n int, want func(i int) []byte) *Oracle {
	o := &Oracle{place: make(map[string]int, n), times: make([]int, n), want: want}
	for i := range n {
		o.place[Record(i).ID] = i
	}
	return o
}

// Saw tells the oracle of one record that the server took.
func (o *Oracle) Saw(id string, sum uint64) {
	i, known := o.place[id]
	switch {
	case !known:
		o.figures.Invented++
		o.wrong("the id %q is invented", id)
		return
	case o.want != nil && Sum(o.want(i)) != sum:
		o.figures.Changed++
		o.wrong("record %d (%s) arrived in another form", i, id)
	}
	if o.times[i]++; o.times[i] > 1 {
		o.figures.Duplicates++
	}
}

func (o *Oracle) wrong(format string, args ...any) {
	if o.first == "" {
		o.first = fmt.Sprintf(format, args...)
	}
}

// Judge counts.
func (o *Oracle) Judge() Figures {
	f := o.figures
	f.Records = len(o.times)
	for i, n := range o.times {
		if n == 0 {
			f.Lost++
			o.wrong("record %d did not arrive", i)
		}
	}
	f.Wrong = o.first
	return f
}

// Figures are what a run showed.
type Figures struct {
	Records    int
	Lost       int // never arrived
	Invented   int // arrived, and are not of the load
	Changed    int // arrived in another form
	Duplicates int // arrivals of an id beyond its first; allowed
	Wrong      string

	Kills     int
	Retries   int64
	Elapsed   time.Duration
	CPU       time.Duration // of the whole process, oracle excluded
	PeakBytes int64         // most resident memory of the process during the run
}

// Header is the header of the table whose lines String makes.
const Header = "| sink | records | lost | invented | changed | duplicates | kills | records/s | CPU per record | peak memory |\n" +
	"| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"

// Row is f as a line of the table.
func (f Figures) Row(name string) string {
	return fmt.Sprintf("| %s | %d | %d | %d | %d | %d | %d | %.0f | %s | %.0f MB |", name, f.Records, f.Lost, f.Invented, f.Changed, f.Duplicates, f.Kills,
		float64(f.Records)/f.Elapsed.Seconds(), (f.CPU / time.Duration(f.Records)).Round(100*time.Nanosecond), float64(f.PeakBytes)/1e6)
}

// Server is what a run disturbs.
type Server interface {
	// Kill ends the server as SIGKILL does.
	Kill()
	// Start starts it again at the same address.
	Start()
}

// Run sends n records to the sink of rawURL. The server is killed and started again
// three times while records are on their way; nil leaves that out. When Run returns
// the pump has delivered everything and has ended; what arrived is for the caller to
// tell an Oracle.
func Run(t testing.TB, rawURL string, n int, server Server, schemes ...sinks.Scheme) Figures {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir := t.TempDir()
	j, err := journal.Open(filepath.Join(dir, "journal"), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	target, err := sinks.Parse(rawURL, schemes...)
	if err != nil {
		t.Fatal(err)
	}
	sink, err := target.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(testWriter{t}, nil))
	p, err := target.NewPump(j, sink, dir, func(l record.Loss) { t.Errorf("lost: %+v", l) }, log)
	if err != nil {
		t.Fatal(err)
	}
	run, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- p.Run(run) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	forgetPeak(t)
	began, cpu := time.Now(), cpuTime()
	f := Figures{Records: n}
	const parts = 4
	sent := 0
	feed := func(until int) {
		var lines []byte
		for ; sent < until; sent++ {
			if lines = record.Append(lines, Record(sent)); len(lines) > 256<<10 || sent == until-1 {
				if err := j.Append(lines); err != nil {
					t.Error(err)
					return
				}
				lines = lines[:0]
			}
		}
	}
	for part := range parts {
		feed(n * (part + 1) / parts)
		if part == parts-1 || server == nil {
			continue
		}
		// In the middle of the part: whatever is on its way then finds no server.
		for middle := int64(n*part/parts + n/parts/2); p.Status().Delivered < middle; {
			select {
			case <-ctx.Done():
				t.Fatalf("part %d is not delivered: %+v", part, p.Status())
			case err := <-ended:
				t.Fatalf("the pump ended: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
		server.Kill()
		f.Kills++
		retries := p.Status().Retries
		feed(n*(part+1)/parts + 1) // something that must meet the dead server
		for p.Status().Retries == retries {
			select {
			case <-ctx.Done():
				t.Fatalf("the pump does not see that the server is gone: %+v", p.Status())
			case <-time.After(time.Millisecond):
			}
		}
		server.Start()
	}
	if err := p.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	f.Elapsed, f.CPU = time.Since(began), cpuTime()-cpu
	s := p.Status()
	f.Retries, f.PeakBytes = s.Retries, peak()
	if s.Refused > 0 || s.Delivered != int64(n) {
		t.Errorf("the pump has delivered %d of %d, and %d are refused: %s", s.Delivered, n, s.Refused, s.LastError)
	}
	return f
}

// maxPeak is the most memory that an agent may need, tested with large loads: below
// that the test itself is the larger part, with the race detector above all.
const maxPeak = 64 << 20

// Check fails the test where f shows a fault, and prints its line of the table.
func Check(t testing.TB, name string, run Figures, o *Oracle) {
	t.Helper()
	f := o.Judge()
	f.Kills, f.Retries, f.Elapsed, f.CPU, f.PeakBytes = run.Kills, run.Retries, run.Elapsed, run.CPU, run.PeakBytes
	if f.Lost > 0 || f.Invented > 0 || f.Changed > 0 {
		t.Errorf("%d lost, %d invented, %d changed; the first: %s", f.Lost, f.Invented, f.Changed, f.Wrong)
	}
	if f.Records >= 100_000 && f.PeakBytes > maxPeak {
		t.Errorf("the process needed %d KiB, which is more than an agent may have: %d KiB", f.PeakBytes>>10, int64(maxPeak>>10))
	}
	t.Logf("%d retries\n%s\n%s", f.Retries, Header, f.Row(name))
}

// cpuTime is the processor time of this process.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// forgetPeak makes peak count from here on (proc_pid_clear_refs(5)): what other tests
// of the process needed is not the sink's.
func forgetPeak(t testing.TB) {
	t.Helper()
	runtime.GC() // pools let go of their buffers at the second collection
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		t.Logf("the peak of memory is that of the whole process: %v", err)
	}
}

// peak is the most resident memory since forgetPeak.
func peak() int64 {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), "VmHWM:")
	kb, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, _ := strconv.ParseInt(kb, 10, 64)
	return n << 10
}

// testWriter is a test's log as a Writer.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Helper()
	w.t.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}
