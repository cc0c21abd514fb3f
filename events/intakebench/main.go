// Command intakebench compares what an event of the Docker daemon costs to take in:
//
//	tallyman: events.Streamer -> record.Append -> a file, metrics.Observe -> DogStatsD over UDP
//	script:   docker events --format '{{json .}}' | a Python loop that sends one UDP packet per event
//
// Run it from the repository's root with: go run ./events/intakebench
//
// A fake daemon in a process of its own, which speaks the real HTTP API on a unix
// socket, sends the real lines of events/testdata as fast as they are taken. Both
// sides run as child processes, in turns; their CPU is what the kernel accounted to
// them (getrusage of the ended child, user and system, start-up included), so what
// else the machine does matters only through its caches. The peak memory is the
// largest resident set of the child. A burst is the worst case for it: at a moderate
// rate the queue stays empty.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/fakedockerd"
	"github.com/tallyman-ci/tallyman/events"
	"github.com/tallyman-ci/tallyman/metrics"
	"github.com/tallyman-ci/tallyman/record"
)

// script is the other side: what people write first.
const script = `
import json, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
to = ("127.0.0.1", int(sys.argv[1]))
for line in sys.stdin:
    e = json.loads(line)
    tags = "event_type:%s,action:%s" % (e.get("Type"), e.get("Action", "").split(":")[0])
    sock.sendto(("docker.events:1|c|#" + tags).encode(), to)
`

// chunk is the number of lines made ahead and sent again and again.
const chunk = 10000

func main() {
	count := flag.Int("events", 200000, "number of events")
	rounds := flag.Int("rounds", 3, "rounds of both sides")
	docker := flag.String("docker", "docker", "the docker CLI")
	python := flag.String("python", "python3", "the Python interpreter")
	sample := flag.String("sample", "events/testdata/events-sample.jsonl", "real event lines")
	role := flag.String("role", "", "for the child processes: daemon or tallyman")
	socket := flag.String("socket", "", "for the child processes: the daemon's socket")
	statsd := flag.String("statsd", "", "for the child processes: the DogStatsD address")
	out := flag.String("out", "", "for the child processes: the file for records")
	flag.Parse()
	var err error
	switch *role {
	case "":
		err = bench(*count, *rounds, *docker, *python, *sample)
	case "daemon":
		err = daemon(*socket, *sample, *count)
	case "tallyman":
		err = tallyman(*socket, *statsd, *out, *count)
	default:
		err = fmt.Errorf("no role %q", *role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "intakebench:", err)
		os.Exit(1)
	}
}

// daemon is the fake daemon's process. It ends when its stdin does.
func daemon(socket, sample string, count int) error {
	data, err := os.ReadFile(sample)
	if err != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	var blast []byte
	now := time.Now().UnixNano()
	for i := range chunk {
		var e map[string]any
		dec := json.NewDecoder(bytes.NewReader(lines[i%len(lines)]))
		dec.UseNumber()
		if err := dec.Decode(&e); err != nil {
			return err
		}
		old := []byte(fmt.Sprintf(`"timeNano":%s`, e["timeNano"]))
		blast = append(blast, bytes.Replace(lines[i%len(lines)], old, strconv.AppendInt([]byte(`"timeNano":`), now+int64(i)*1000, 10), 1)...)
		blast = append(blast, '\n')
	}
	d := fakedockerd.Daemon{Socket: socket, Engine: "BENCH", API: "1.41", Blast: blast, BlastCount: count / chunk}
	if err := d.Start(); err != nil {
		return err
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	d.Stop()
	return nil
}

// result is what a child of our side reports of itself.
type result struct {
	Events, Lost, Bytes int64
	Dropped             int64
	HeapSys             uint64
}

// tallyman is our side: what the agent does with an event.
func tallyman(socket, statsd, out string, count int) error {
	ctx, done := context.WithCancel(context.Background())
	defer done()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	m, err := metrics.New(metrics.Options{Addr: statsd, Logger: quiet})
	if err != nil {
		return err
	}
	file, err := os.Create(out)
	if err != nil {
		return err
	}
	defer file.Close()
	ci := &record.CI{Repository: "octo-org/app", RepositoryID: "1296269", Owner: "octo-org", Workflow: "Build, test | deploy #1", Job: "build", RunID: "1658821493", RunNumber: 3, RunAttempt: 1, SHA: "ffac537e6cbbf934b08745a378932722df287a53"}
	host := &record.Host{Name: "runner-x7k2p", BootID: "a0a0a0a0-a0a0-4a0a-8a0a-a0a0a0a0a0a0"}
	var res result
	var buf []byte
	s := events.New(events.Options{Host: "unix://" + socket, Logger: quiet})
	err = s.Run(ctx, func(batch []*record.Record) error {
		buf = buf[:0]
		for _, r := range batch {
			if r.Loss != nil {
				res.Lost += max(r.Loss.Count, 0)
			} else {
				res.Events++
			}
			r.CI, r.Host, r.By = ci, host, record.BySealed
			buf = record.Append(buf, r)
			m.Observe(r)
		}
		res.Bytes += int64(len(buf))
		if _, err := file.Write(buf); err != nil {
			return err
		}
		if res.Events+res.Lost >= int64(count) {
			done()
		}
		return nil
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := m.Close(ctx); err != nil {
		return err
	}
	res.Dropped = m.Dropped().Payloads
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	res.HeapSys = mem.HeapSys
	return json.NewEncoder(os.Stdout).Encode(res)
}

// usage is what the kernel accounted to ended processes.
type usage struct {
	cpu  time.Duration
	peak int64 // bytes, of the largest
	wall time.Duration
}

func (u *usage) add(p *os.ProcessState) {
	u.cpu += p.UserTime() + p.SystemTime()
	if r, ok := p.SysUsage().(*syscall.Rusage); ok {
		u.peak = max(u.peak, r.Maxrss<<10)
	}
}

func bench(count, rounds int, docker, python, sample string) error {
	count -= count % chunk
	if count == 0 {
		return fmt.Errorf("-events must be at least %d", chunk)
	}
	for _, tool := range []string{docker, python} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is needed for the comparison: %w (apt-get install docker.io python3)", tool, err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "intakebench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "docker.sock")
	fake := exec.Command(self, "-role", "daemon", "-socket", socket, "-sample", sample, "-events", fmt.Sprint(count))
	fake.Stderr = os.Stderr
	stdin, err := fake.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := fake.StdoutPipe()
	if err != nil {
		return err
	}
	if err := fake.Start(); err != nil {
		return err
	}
	defer fake.Wait()
	defer stdin.Close()
	if _, err := stdout.Read(make([]byte, 16)); err != nil {
		return fmt.Errorf("the fake daemon did not start: %w", err)
	}
	sink, err := newSink()
	if err != nil {
		return err
	}
	defer sink.close()

	// Past a version manager's wrapper script, which would cost a shell.
	if real, err := exec.Command(python, "-c", "import sys; print(sys.executable)").Output(); err == nil {
		python = strings.TrimSpace(string(real))
	}
	version, _ := exec.Command(docker, "--version").CombinedOutput()
	pyVersion, _ := exec.Command(python, "--version").CombinedOutput()
	fmt.Printf("%d events, %d rounds, %d CPUs, %s, %s\n\n", count, rounds, runtime.NumCPU(), strings.TrimSpace(string(version)), strings.TrimSpace(string(pyVersion)))
	var ratios []float64
	var peak int64
	for i := range rounds {
		theirs, err := runScript(docker, python, socket, sink.port)
		if err != nil {
			return err
		}
		packets := sink.packets()
		ours, res, err := runTallyman(self, socket, fmt.Sprintf("127.0.0.1:%d", sink.port), filepath.Join(dir, "records.jsonl"), count)
		if err != nil {
			return err
		}
		ratio := float64(ours.cpu) / float64(theirs.cpu)
		ratios = append(ratios, ratio)
		peak = max(peak, ours.peak)
		fmt.Printf("round %d  script   %6.2f us CPU per event  %5.2f s wall  %5.1f MB peak  (%d packets arrived)\n", i+1, per(theirs.cpu, count), theirs.wall.Seconds(), mb(theirs.peak), packets)
		fmt.Printf("         tallyman %6.2f us CPU per event  %5.2f s wall  %5.1f MB peak  (%d events, %d dropped and counted, %d MB of records)\n",
			per(ours.cpu, count), ours.wall.Seconds(), mb(ours.peak), res.Events, res.Lost, res.Bytes>>20)
		sink.packets()
	}
	slices.Sort(ratios)
	fmt.Printf("\nratio %.3f (median of %d; target at most 0.2), peak memory %.1f MB (target below 40 MB)\n", ratios[len(ratios)/2], rounds, mb(peak))
	return nil
}

func per(d time.Duration, count int) float64 {
	return float64(d.Nanoseconds()) / 1000 / float64(count)
}
func mb(bytes int64) float64 { return float64(bytes) / (1 << 20) }

func runScript(docker, python, socket string, port int) (usage, error) {
	begin := time.Now()
	d := exec.Command(docker, "-H", "unix://"+socket, "events", "--since", "0", "--format", "{{json .}}")
	py := exec.Command(python, "-c", script, fmt.Sprint(port))
	pipe, err := d.StdoutPipe()
	if err != nil {
		return usage{}, err
	}
	var said bytes.Buffer
	py.Stdin, py.Stderr, d.Stderr = pipe, os.Stderr, &said
	if err := py.Start(); err != nil {
		return usage{}, err
	}
	if err := d.Start(); err != nil {
		return usage{}, err
	}
	pyErr := py.Wait()
	dErr := d.Wait()
	var exit *exec.ExitError
	if dErr != nil && !errors.As(dErr, &exit) { // it may call the end of the stream an error
		return usage{}, fmt.Errorf("docker events: %w: %s", dErr, &said)
	}
	if pyErr != nil {
		return usage{}, fmt.Errorf("python: %w", pyErr)
	}
	var u usage
	u.add(d.ProcessState)
	u.add(py.ProcessState)
	u.wall = time.Since(begin)
	return u, nil
}

func runTallyman(self, socket, statsd, out string, count int) (usage, result, error) {
	begin := time.Now()
	var res result
	c := exec.Command(self, "-role", "tallyman", "-socket", socket, "-statsd", statsd, "-out", out, "-events", fmt.Sprint(count))
	c.Stderr = os.Stderr
	stdout, err := c.Output()
	if err != nil {
		return usage{}, res, fmt.Errorf("tallyman: %w", err)
	}
	if err := json.Unmarshal(stdout, &res); err != nil {
		return usage{}, res, err
	}
	var u usage
	u.add(c.ProcessState)
	u.wall = time.Since(begin)
	return u, res, nil
}

// sink takes the UDP packets of both sides.
type sink struct {
	conn  *net.UDPConn
	port  int
	count chan int64
	ended chan struct{}
}

func newSink() (*sink, error) {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	s := &sink{conn: conn, port: conn.LocalAddr().(*net.UDPAddr).Port, count: make(chan int64, 1), ended: make(chan struct{})}
	s.count <- 0
	go func() {
		defer close(s.ended)
		buf := make([]byte, 64<<10)
		for {
			if _, err := conn.Read(buf); err != nil {
				return
			}
			s.count <- <-s.count + 1
		}
	}()
	return s, nil
}

// packets returns the number of packets since the last call.
func (s *sink) packets() int64 {
	n := <-s.count
	s.count <- 0
	return n
}

func (s *sink) close() {
	s.conn.Close()
	<-s.ended
}
