package report_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/report"
)

// endless gives n lines made of a few thousand different ones, each with an id of
// its own; half of the lines are calls and the other half their ends.
type endless struct {
	n, i  int
	lines [][]byte
}

func (e *endless) Name() string { return "benchmark" }

func (e *endless) Next() ([]byte, error) {
	if e.i == e.n {
		return nil, io.EOF
	}
	l := e.lines[e.i%len(e.lines)]
	number(l[bytes.Index(l, []byte(`"id":"`))+6+24:], e.i)
	if at := bytes.Index(l, []byte(`"invocation_id":"`)); at >= 0 {
		number(l[at+17+24:], e.i-1)
	}
	e.i++
	return l, nil
}

// number writes the last twelve digits of a UUID, mixed as random ones would be.
func number(dst []byte, n int) {
	const hex = "0123456789abcdef"
	x := uint64(n) * 0x9e3779b97f4a7c15 >> 16
	for i := 11; i >= 0; i-- {
		dst[i] = hex[x&15]
		x >>= 4
	}
}

func fleet() [][]byte {
	s := &story{}
	for i := range 2000 {
		s.job(record.BySealed, fmt.Sprintf("acme/service-%d", i%50), "Build and test", fmt.Sprintf("job-%d", i%7), strconv.Itoa(100000+i))
		s.ci.Runner = &record.Runner{Name: "runner-" + strconv.Itoa(i%30), OS: "Linux", Arch: "X64", Environment: "self-hosted"}
		s.ci.SHA, s.ci.Ref, s.ci.Actor = strings.Repeat("0123456789", 4), "refs/heads/main", "octocat"
		image := fmt.Sprintf("registry.example/base-%d:1", i%300)
		call := s.call("run", image)
		s.end(call, "run", time.Duration(i)*time.Millisecond, code(int64(i%40/39)), image)
	}
	return s.lines
}

// BenchmarkMillionLines reads a million records (500,000 calls with their ends)
// and reports the time and bytes of a line, the throughput, and the memory that
// the aggregation holds at its end and that the process took at its most.
//
//	go test ./report -run xxx -bench MillionLines -benchtime 1x
func BenchmarkMillionLines(b *testing.B) {
	const n = 1_000_000
	lines := fleet()
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		start := time.Now()
		src := &endless{n: n, lines: lines}
		r, err := report.Build(context.Background(), []report.Source{src}, report.Options{})
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if r.Read.Records != n || r.Totals.Ended != n/2 || r.Read.Unreadable != 0 {
			b.Fatalf("%+v %+v", r.Read, r.Totals)
		}
		b.SetBytes(r.Read.Bytes)
		b.ReportMetric(float64(time.Since(start).Nanoseconds())/n, "ns/line")
		b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/n, "B-allocated/line")
		b.ReportMetric(float64(after.Sys)/(1<<20), "MiB-from-system")
		b.ReportMetric(peakRSS(b), "MiB-peak-RSS")
		runtime.KeepAlive(r)
	}
}

func peakRSS(b *testing.B) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				b.Fatal(err)
			}
			return float64(kb) / 1024
		}
	}
	b.Fatal("no VmHWM in /proc/self/status")
	return 0
}
