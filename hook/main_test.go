package hook

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary plays every process there is around a hook. Which one it is shows
// in its arguments or, for the runner, in its name:
//
//	hook job-started | job-completed | work   the command line tool
//	agent                                      an agent that answers on its socket
//	Runner.Worker                              the runner (runner_test.go)
func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == "Runner.Worker":
		playRunner()
	case len(os.Args) > 2 && os.Args[1] == "hook":
		playTool(os.Args[2])
	case len(os.Args) > 1 && os.Args[1] == "agent":
		playAgent()
	default:
		goleak.VerifyTestMain(m)
	}
}

// exit ends a played process. os.Exit waits a second in a binary with the race
// detector, which would be the runner's wait for every hook.
func exit(code int) { syscall.Exit(code) }

// setup is what the played processes are told, in the variable TALLYMAN_TEST.
type setup struct {
	RunDir, StateDir string
	Off              bool
	OffFile          string
	Canary           *float64
	Summary          string
	Markdown         string        // what the summary of a job is
	MarkdownPanics   bool          //
	NoWorker         bool          // the hook does its work itself
	NoAgent          bool          // there is none to start
	Worker           string        // another worker: "missing", "crash", "silent"
	WorkerSleeps     time.Duration // before it begins
	AgentHangs       bool          // the agent accepts and never answers
	AgentFlush       time.Duration // how long a flush takes
	Agent            []string      // another agent
	Pins             []Pin
	CompletedTimeout time.Duration
	StartedTimeout   time.Duration
	ConnectPanics    bool
}

func (s setup) env() string {
	b, _ := json.Marshal(s)
	return "TALLYMAN_TEST=" + string(b)
}

func readSetup() (s setup) {
	if err := json.Unmarshal([]byte(os.Getenv("TALLYMAN_TEST")), &s); err != nil {
		fmt.Fprintln(os.Stderr, "TALLYMAN_TEST:", err)
		exit(3)
	}
	return s
}

// playTool is `tallyman hook ...` as cmd/tallyman wires it.
func playTool(op string) {
	s := readSetup()
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	o := Options{
		RunDir: s.RunDir, StateDir: s.StateDir, Enabled: !s.Off, OffFile: s.OffFile, Canary: 100, Summary: s.Summary,
		Version: "test", RunnerLabels: []string{"linux"}, Pins: s.Pins, Environ: os.Environ(), Out: os.Stdout,
		Worker: []string{self, "hook", "work"}, Agent: []string{self, "agent"},
		CompletedTimeout: s.CompletedTimeout, StartedTimeout: s.StartedTimeout,
		Connect: func(ctx context.Context, socket string) (Agent, error) {
			if s.ConnectPanics {
				panic("connect\n::error::boom")
			}
			return dialAgent(ctx, socket)
		},
		SummaryMarkdown: func(_ context.Context, c Context) (string, error) {
			if s.MarkdownPanics {
				panic("summary")
			}
			return strings.ReplaceAll(s.Markdown, "{repository}", c.CI.Repository), nil
		},
	}
	if s.Canary != nil {
		o.Canary = *s.Canary
	}
	if s.NoWorker {
		o.Worker = nil
	}
	if s.NoAgent {
		o.Agent = nil
	}
	if len(s.Agent) > 0 {
		o.Agent = s.Agent
	}
	switch s.Worker {
	case "missing":
		o.Worker = []string{"/nonexistent/tallyman", "hook", "work"}
	case "crash":
		o.Worker = []string{"/bin/sh", "-c", "exit 3"}
	case "silent":
		o.Worker = []string{"/bin/sleep", "2"}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch op {
	case "job-started":
		_ = JobStarted(ctx, o)
	case "job-completed":
		_ = JobCompleted(ctx, o)
	case "work":
		time.Sleep(s.WorkerSleeps)
		_ = Work(ctx, os.Stdin, os.Stdout, o)
	}
	exit(0)
}

// agentReport is what a played agent says of itself when it starts.
type agentReport struct {
	PID, PPID, Session int
	Cwd                string
	Environ            []string
	Files              []string // what its descriptors are, from 0 on
	Umask              int
	OOMScoreAdj        string
}

// playAgent answers on the socket and writes down what it was told. It ends after
// half a minute, if nobody ends it before.
func playAgent() {
	s := readSetup()
	r := agentReport{PID: os.Getpid(), PPID: os.Getppid(), Environ: os.Environ()}
	r.Session, _ = unix.Getsid(0)
	r.Cwd, _ = os.Getwd()
	r.Umask = syscall.Umask(0o077)
	for fd := range 32 {
		if target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "/sys/fs/cgroup") { // the Go runtime's own
			r.Files = append(r.Files, fmt.Sprintf("%d %s", fd, target))
		}
	}
	b, _ := os.ReadFile("/proc/self/oom_score_adj")
	r.OOMScoreAdj = strings.TrimSpace(string(b))
	_ = os.MkdirAll(s.RunDir, 0o755)
	socket := filepath.Join(s.RunDir, "agent.sock")
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		exit(4)
	}
	b, _ = json.Marshal(r)
	_ = os.WriteFile(filepath.Join(s.StateDir, "agent.report.tmp"), b, 0o600)
	_ = os.Rename(filepath.Join(s.StateDir, "agent.report.tmp"), filepath.Join(s.StateDir, "agent.report"))
	time.AfterFunc(30*time.Second, func() { exit(0) })
	said, _ := os.OpenFile(filepath.Join(s.StateDir, "agent.said"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	for {
		c, err := l.Accept()
		if err != nil {
			exit(0)
		}
		go func() {
			defer c.Close()
			if s.AgentHangs {
				time.Sleep(time.Minute)
			}
			in := bufio.NewScanner(c)
			for in.Scan() {
				if strings.HasPrefix(in.Text(), "flush") {
					time.Sleep(s.AgentFlush)
				}
				fmt.Fprintln(said, in.Text())
				fmt.Fprintln(c, "ok")
			}
		}()
	}
}

// testAgent is the client of playAgent.
type testAgent struct {
	net.Conn
	in *bufio.Reader
}

func dialAgent(ctx context.Context, socket string) (Agent, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	return &testAgent{c, bufio.NewReader(c)}, nil
}

func (a *testAgent) say(ctx context.Context, text string) error {
	if t, ok := ctx.Deadline(); ok {
		_ = a.SetDeadline(t)
	}
	fmt.Fprintln(a, text)
	answer, err := a.in.ReadString('\n')
	if err != nil {
		return err
	}
	if answer != "ok\n" {
		return errors.New(answer)
	}
	return nil
}

func (a *testAgent) JobStart(ctx context.Context, c Context) error {
	return a.say(ctx, "start "+c.Key)
}

func (a *testAgent) JobEnd(ctx context.Context, key, outcome string) error {
	return a.say(ctx, "end "+key+" "+outcome)
}

func (a *testAgent) Flush(ctx context.Context) error { return a.say(ctx, "flush") }

// recorder is an agent inside the test process.
type recorder struct {
	mu   sync.Mutex
	said []string
	err  error
}

func (r *recorder) add(format string, args ...any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = append(r.said, fmt.Sprintf(format, args...))
	return r.err
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.said...)
}

func (r *recorder) JobStart(_ context.Context, c Context) error { return r.add("start %s", c.CI.Job) }
func (r *recorder) JobEnd(_ context.Context, _, outcome string) error {
	return r.add("end %s", outcome)
}
func (r *recorder) Flush(context.Context) error { return r.add("flush") }
func (r *recorder) Close() error                { return nil }
func (r *recorder) connect(context.Context, string) (Agent, error) {
	return r, nil
}
