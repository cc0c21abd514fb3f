package adopt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/sinks"
)

func line(id string) []byte {
	return fmt.Appendf(nil, `{"id":%q,"ts":"2026-11-24T10:00:00Z","kind":"invocation","schema":1,"by":"sealed"}`+"\n", id)
}

// node is a folder of runners' state folders.
type node struct {
	t   *testing.T
	dir string
	out string // the file sink
}

func newNode(t *testing.T) *node {
	dir := t.TempDir()
	return &node{t: t, dir: dir, out: filepath.Join(t.TempDir(), "out.jsonl")}
}

func (n *node) journal(runner string, ids ...string) *journal.Journal {
	n.t.Helper()
	j, err := journal.Open(filepath.Join(n.dir, runner, "journal"), journal.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, id := range ids {
		if err := j.Append(line(id)); err != nil {
			n.t.Fatal(err)
		}
	}
	return j
}

func (n *node) dead(runner string, ids ...string) {
	n.t.Helper()
	if err := n.journal(runner, ids...).Close(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) fileURL() string { return "file://" + n.out + "?batch_delay=1ms&keep=0" }

// adopt runs an adopter until until says so, or 30 s have passed.
func (n *node) adopt(o Options, until func(Status) bool) Status {
	n.t.Helper()
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(n.t.Output(), nil))
	}
	o.Dir, o.Quiet, o.Every = n.dir, time.Nanosecond, 5*time.Millisecond
	if o.Sinks == nil {
		o.Sinks = []string{n.fileURL()}
	}
	a, err := New(o)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(n.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	deadline := time.Now().Add(30 * time.Second)
	for !until(a.Status()) {
		if time.Now().After(deadline) {
			n.t.Errorf("the adopter does not come to its end: %+v", a.Status())
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	stop()
	if err := <-ended; err != nil {
		n.t.Error(err)
	}
	return a.Status()
}

func adopted(n int64) func(Status) bool { return func(s Status) bool { return s.Adopted >= n } }

// got is what the file sink has: ids of invocations, and losses.
func (n *node) got() (ids []string, losses []record.Loss) {
	n.t.Helper()
	b, err := os.ReadFile(n.out)
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	for l := range bytes.Lines(b) {
		var r record.Record
		if err := recordjson.Unmarshal(bytes.TrimSuffix(l, []byte("\n")), &r); err != nil {
			n.t.Fatal(err)
		}
		if r.Loss != nil {
			losses = append(losses, *r.Loss)
		} else {
			ids = append(ids, r.ID)
		}
	}
	slices.Sort(ids)
	return ids, losses
}

func (n *node) left() []string {
	n.t.Helper()
	var all []string
	err := filepath.WalkDir(n.dir, func(path string, d os.DirEntry, err error) error {
		if rel, _ := filepath.Rel(n.dir, path); !d.IsDir() {
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return all
}

func TestDeadJournalsAreDeliveredAndRemoved(t *testing.T) {
	n := newNode(t)
	n.dead("pod-1", "a", "b")
	n.dead("pod-2", "c")
	s := n.adopt(Options{}, adopted(2))
	if ids, losses := n.got(); !slices.Equal(ids, []string{"a", "b", "c"}) || losses != nil {
		t.Errorf("delivered %v, lost %v", ids, losses)
	}
	if left := n.left(); left != nil || s.Delivered != 3 || s.Errors != 0 {
		t.Errorf("left %v, %+v", left, s)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "pod-1")); err != nil {
		t.Errorf("a runner may have its folder mounted: %v", err)
	}
}

// What a living agent has open is its own.
func TestALivingAgentIsLeftAlone(t *testing.T) {
	n := newNode(t)
	j := n.journal("alive", "a")
	n.dead("dead", "b")
	n.adopt(Options{}, adopted(1))
	if err := j.Append(line("c")); err != nil {
		t.Fatal(err)
	}
	if ids, _ := n.got(); !slices.Equal(ids, []string{"b"}) {
		t.Errorf("delivered %v", ids)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "alive", "journal", "records.jsonl")); err != nil {
		t.Error(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	n.adopt(Options{}, adopted(1))
	if ids, _ := n.got(); !slices.Equal(ids, []string{"a", "b", "c"}) {
		t.Errorf("delivered %v", ids)
	}
}

func TestAJournalThatWasWrittenAMomentAgoIsLeftAlone(t *testing.T) {
	n := newNode(t)
	n.dead("pod", "a")
	a, err := New(Options{Dir: n.dir, Sinks: []string{n.fileURL()}, Quiet: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.take(); err != nil {
		t.Fatal(err)
	}
	if names, err := a.waiting(); err != nil || names != nil {
		t.Errorf("%v, %v", names, err)
	}
}

// The dead agent had delivered a part: the adopter goes on behind it.
func TestTheDeadAgentsCursorIsTakenOver(t *testing.T) {
	n := newNode(t)
	j := n.journal("pod", "a", "b")
	target, err := sinks.Parse(n.fileURL())
	if err != nil {
		t.Fatal(err)
	}
	s, err := target.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p, err := target.NewPump(j, s, filepath.Join(n.dir, "pod", "journal"), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := errors.Join(<-ended, j.Append(line("c")), j.Close()); err != nil {
		t.Fatal(err)
	}
	n.adopt(Options{}, adopted(1))
	if ids, _ := n.got(); !slices.Equal(ids, []string{"a", "b", "c"}) {
		t.Errorf("delivered %v", ids)
	}
}

// A killed writer leaves half a line: what is whole is delivered, the rest is a loss.
func TestATornTailIsALossRecord(t *testing.T) {
	n := newNode(t)
	n.dead("pod", "a", "b")
	segment, err := filepath.EvalSymlinks(filepath.Join(n.dir, "pod", "journal", "records.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(segment)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(segment, st.Size()-10); err != nil {
		t.Fatal(err)
	}
	n.adopt(Options{}, adopted(1))
	ids, losses := n.got()
	if !slices.Equal(ids, []string{"a"}) || len(losses) != 1 || losses[0].Cause != "torn_line" || !strings.Contains(losses[0].Detail, "adopted") {
		t.Errorf("delivered %v, losses %+v", ids, losses)
	}
}

func TestTwoAdoptersDeliverEachRecordOnce(t *testing.T) {
	n := newNode(t)
	var want []string
	for i := range 40 {
		id := fmt.Sprintf("%03d", i)
		want = append(want, id)
		n.dead("pod-"+id, id)
	}
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			n.adopt(Options{Parallel: 4}, func(Status) bool {
				entries, err := os.ReadDir(filepath.Join(n.dir, adoptedDir))
				ids, _ := n.got()
				return err == nil && len(entries) == 0 && len(ids) >= 40
			})
		})
	}
	both.Wait()
	if ids, _ := n.got(); !slices.Equal(ids, want) {
		t.Errorf("delivered %v", ids)
	}
	if left := n.left(); left != nil {
		t.Errorf("left %v", left)
	}
}

// scheme delivers to a server that may be away or refuse.
func scheme(addr string) sinks.Scheme {
	return sinks.Scheme{Name: "http", Form: "http:", Open: func(context.Context, *sinks.Target) (sinks.Sink, error) {
		return post{addr}, nil
	}}
}

type post struct{ addr string }

func (p post) Write(ctx context.Context, batch []sinks.Entry) error {
	for i, e := range batch {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+p.addr, bytes.NewReader(e.Line))
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusBadRequest {
			return &sinks.RefusedError{Refused: []sinks.Refused{{Index: i, Reason: "the server says no"}}}
		}
	}
	return nil
}

func (post) Close(context.Context) error { return nil }

// One sink is away: the other has everything at once, the journal stays, and a later
// adopter brings the first one only what it lacks.
func TestADeadSinkKeepsTheJournal(t *testing.T) {
	n := newNode(t)
	n.dead("pod", "a", "b")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	o := Options{Sinks: []string{"http:", n.fileURL()}, Schemes: []sinks.Scheme{scheme(addr)}}
	n.adopt(o, func(s Status) bool {
		ids, _ := n.got()
		return len(ids) == 2 && len(s.Journals) == 1 && len(s.Journals[0].Sinks) == 2 && s.Journals[0].Sinks[0].LastError != ""
	})
	if len(n.left()) == 0 {
		t.Fatal("the journal is gone")
	}
	var mu sync.Mutex
	var bodies []string
	server := &httptest.Server{Config: &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		bodies = append(bodies, string(b))
		mu.Unlock()
	})}}
	if server.Listener, err = net.Listen("tcp", addr); err != nil {
		t.Skip("somebody took the port in between") // nothing of the test is lost by another run
	}
	server.Start()
	defer server.Close()
	n.adopt(o, adopted(1))
	if ids, _ := n.got(); !slices.Equal(ids, []string{"a", "b"}) {
		t.Errorf("the healthy sink got %v", ids)
	}
	if len(bodies) != 2 {
		t.Errorf("the sink that was away got %q", bodies)
	}
	if left := n.left(); left != nil {
		t.Errorf("left %v", left)
	}
}

// One sink is away for long, and more runners die than journals are delivered at the
// same time: the other sink gets the records of all of them, without waiting for it.
func TestADeadSinkKeepsNoOtherJournalWaiting(t *testing.T) {
	n := newNode(t)
	var want []string
	for i := range 30 {
		id := fmt.Sprintf("%03d", i)
		want = append(want, id)
		n.dead("pod-"+id, id)
	}
	dead := sinks.Scheme{Name: "dead", Form: "dead:", Open: func(context.Context, *sinks.Target) (sinks.Sink, error) { return away{}, nil }}
	o := Options{Sinks: []string{"dead:", n.fileURL()}, Schemes: []sinks.Scheme{dead}, Parallel: 2, Patience: 20 * time.Millisecond}
	s := n.adopt(o, func(Status) bool {
		ids, _ := n.got()
		return len(ids) >= len(want)
	})
	if ids, _ := n.got(); !slices.Equal(ids, want) || s.Adopted != 0 || s.Errors != 0 {
		t.Errorf("delivered %v, %+v", ids, s)
	}
	if waiting, err := os.ReadDir(filepath.Join(n.dir, adoptedDir)); err != nil || len(waiting) != len(want) {
		t.Errorf("%d journals wait for the dead sink, want %d: %v", len(waiting), len(want), err)
	}
	// It is back.
	dead.Open = func(ctx context.Context, t *sinks.Target) (sinks.Sink, error) { return sinks.Open(ctx, n.fileURL()) }
	o.Schemes = []sinks.Scheme{dead}
	n.adopt(o, adopted(int64(len(want))))
	if ids, _ := n.got(); len(ids) != 2*len(want) {
		t.Errorf("both sinks together have %d records, want each of %d twice", len(ids), len(want))
	}
}

// away is a sink whose server is not there.
type away struct{}

func (away) Write(context.Context, []sinks.Entry) error { return errors.New("nobody there") }
func (away) Close(context.Context) error                { return nil }

func TestWhatSinksRefusedOutlivesTheJournal(t *testing.T) {
	n := newNode(t)
	n.dead("pod", "a")
	dir := filepath.Join(n.dir, "pod", "journal", "quarantine")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"old.jsonl":             "{\"old\":1}\n",
		"old.jsonl.lock":        "no quarantine",
		"old.jsonl.replay":      "{\"replay\":1}", // of a replay that was killed
		"old.jsonl.replay.lock": "no quarantine",
		"old.jsonl.replay.new":  "no quarantine",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) }))
	defer server.Close()
	var log bytes.Buffer
	s := n.adopt(Options{Sinks: []string{"http:"}, Schemes: []sinks.Scheme{scheme(server.Listener.Addr().String())}, Logger: slog.New(slog.NewTextHandler(&log, nil))}, adopted(1))
	left := n.left()
	if len(left) != 2 || !strings.HasPrefix(left[0], ".quarantine/pod-") || !strings.HasSuffix(left[1], "-old.jsonl") || s.Refused != 1 {
		t.Fatalf("left %v, %+v", left, s)
	}
	b, err := os.ReadFile(filepath.Join(n.dir, left[1]))
	lines := strings.Split(string(b), "\n")
	slices.Sort(lines)
	if err != nil || !slices.Equal(lines, []string{"", `{"old":1}`, `{"replay":1}`}) {
		t.Errorf("%q, %v", b, err)
	}
	if strings.Contains(log.String(), ".lock") {
		t.Errorf("a lock is told as a quarantine: %s", &log)
	}
}

// A runner whose clock was wrong left files of next year. They rest, too.
func TestAJournalOfTheFuture(t *testing.T) {
	n := newNode(t)
	n.dead("pod", "a")
	later := time.Now().AddDate(1, 0, 0)
	journal := filepath.Join(n.dir, "pod", "journal")
	names, err := filepath.Glob(journal + "/*")
	if err != nil || len(names) == 0 {
		t.Fatalf("the journal holds %v, %v", names, err)
	}
	for _, name := range append(names, journal) {
		if err := os.Chtimes(name, later, later); err != nil {
			t.Fatal(err)
		}
	}
	n.adopt(Options{}, adopted(1))
	if ids, _ := n.got(); !slices.Equal(ids, []string{"a"}) {
		t.Errorf("delivered %v", ids)
	}
}

// An agent's quarantine ends at 64 MiB; what a replay brings back comes on top of that.
func TestAQuarantineLargerThanAnAgentMakes(t *testing.T) {
	n := newNode(t)
	n.dead("pod", "a")
	dir := filepath.Join(n.dir, "pod", "journal", "quarantine")
	refused := bytes.Repeat(append(bytes.Repeat([]byte("x"), 1<<20-1), '\n'), 70)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "old.jsonl"), refused, 0o644)); err != nil {
		t.Fatal(err)
	}
	st := n.adopt(Options{}, adopted(1))
	left := n.left()
	if len(left) != 1 || st.Unkept != 0 {
		t.Fatalf("left %v, %+v", left, st.Counts)
	}
	if b, err := os.ReadFile(filepath.Join(n.dir, left[0])); err != nil || !bytes.Equal(b, refused) {
		t.Errorf("%d bytes of %d are kept, %v", len(b), len(refused), err)
	}
}

// What sinks refused of all runners has one bound. Beyond it nothing is kept, and loss
// records say so.
func TestAllThatWasRefusedIsBounded(t *testing.T) {
	n := newNode(t)
	line := `{"refused":"` + strings.Repeat("x", 85) + "\"}\n" // 100 bytes
	for _, pod := range []string{"pod1", "pod2", "pod3"} {
		n.dead(pod, pod)
		dir := filepath.Join(n.dir, pod, "journal", "quarantine")
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "old.jsonl"), []byte(line+line), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	st := n.adopt(Options{QuarantineBytes: 450, Parallel: 1}, adopted(3))
	var kept int64
	for _, name := range n.left() {
		if info, err := os.Stat(filepath.Join(n.dir, name)); err == nil {
			kept += info.Size()
		}
	}
	ids, losses := n.got()
	if kept != 400 || st.Unkept != 2 || len(ids) != 3 {
		t.Errorf("%d bytes are kept, want 400; delivered %v; %+v", kept, ids, st.Counts)
	}
	if len(losses) != 1 || losses[0].Cause != "quarantine_full" || losses[0].Count != 2 || losses[0].Source != "old" {
		t.Errorf("losses %+v", losses)
	}

	// What the adopter's own sink refuses finds as little room.
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) }))
	defer server.Close()
	n.dead("pod4", "a", "b", "c")
	st = n.adopt(Options{QuarantineBytes: 450, Sinks: []string{"http:"}, Schemes: []sinks.Scheme{scheme(server.Listener.Addr().String())}}, adopted(1))
	if st.Refused == 0 || st.Unkept != st.Refused {
		t.Errorf("%+v", st.Counts)
	}
}

// A runner's folder is written by jobs. Links in it lead nowhere.
func TestLinksInARunnersFolder(t *testing.T) {
	victim := t.TempDir()
	secret := filepath.Join(victim, "secret")
	if err := os.WriteFile(secret, []byte("do not touch\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(pod string) error{
		"the journal is a link":    func(pod string) error { return os.Symlink(victim, pod+"/journal") },
		"the cursors are a link":   func(pod string) error { return os.Symlink(victim, pod+"/journal/cursors") },
		"the quarantine is a link": func(pod string) error { return os.Symlink(victim, pod+"/journal/quarantine") },
		"a cursor is a link": func(pod string) error {
			return errors.Join(os.Mkdir(pod+"/journal/cursors", 0o755), os.Symlink(secret, pod+"/journal/cursors/file-1.json"))
		},
		"a cursor is a FIFO": func(pod string) error {
			return errors.Join(os.Mkdir(pod+"/journal/cursors", 0o755), unix.Mkfifo(pod+"/journal/cursors/file-1.json", 0o644))
		},
		"a segment is a link": func(pod string) error {
			return os.Symlink(secret, pod+"/journal/records-00000000000000000007.jsonl")
		},
		"the runner is a link": func(pod string) error { return os.Symlink(victim, pod+"-link") },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			pod := filepath.Join(n.dir, "pod")
			if name == "the journal is a link" {
				if err := os.Mkdir(pod, 0o755); err != nil {
					t.Fatal(err)
				}
			} else {
				n.dead("pod", "a")
			}
			if err := plant(pod); err != nil {
				t.Fatal(err)
			}
			n.dead("other", "b")
			n.adopt(Options{}, func(Status) bool {
				ids, _ := n.got()
				return slices.Contains(ids, "b")
			})
			if b, err := os.ReadFile(secret); err != nil || string(b) != "do not touch\n" {
				t.Errorf("%q, %v", b, err)
			}
			if entries, err := os.ReadDir(victim); err != nil || len(entries) != 1 {
				t.Errorf("%v, %v", entries, err)
			}
			if b, err := os.ReadFile(n.out); err != nil || bytes.Contains(b, []byte("touch")) {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

// A job can put a link in the place of its journal between the adopter's look at it and
// the rename. Then the link is taken away, and nothing that it leads to.
func TestALinkThatWasTakenAway(t *testing.T) {
	n, other := newNode(t), newNode(t)
	other.dead("victim", "secret")
	victim := filepath.Join(other.dir, "victim", "journal")
	to := filepath.Join(n.dir, adoptedDir, "pod-1")
	if err := errors.Join(os.MkdirAll(to, 0o700), os.Symlink(victim, filepath.Join(to, journalDir))); err != nil {
		t.Fatal(err)
	}
	before := other.left()
	n.dead("other", "b")
	var log bytes.Buffer
	st := n.adopt(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(s Status) bool { return s.Adopted+s.Removed >= 2 })
	if st.Adopted != 1 || st.Removed != 1 || strings.Count(log.String(), "delivered and removed") != 1 {
		t.Errorf("%+v, and the log says:\n%s", st.Counts, &log)
	}
	if _, err := os.Lstat(to); !os.IsNotExist(err) {
		t.Errorf("the link is still there: %v", err)
	}
	if ids, _ := n.got(); !slices.Equal(ids, []string{"b"}) {
		t.Errorf("delivered %v", ids)
	}
	if after := other.left(); !slices.Equal(before, after) {
		t.Errorf("the victim's folder had %v and has %v", before, after)
	}
}

func TestOldFoldersOfRunnersAreForgotten(t *testing.T) {
	n := newNode(t)
	for _, name := range []string{"old", "new"} {
		if err := os.Mkdir(filepath.Join(n.dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-48 * time.Hour)
	if err := os.Chtimes(filepath.Join(n.dir, "old"), past, past); err != nil {
		t.Fatal(err)
	}
	n.adopt(Options{Forget: 24 * time.Hour}, func(Status) bool {
		_, err := os.Stat(filepath.Join(n.dir, "old"))
		return os.IsNotExist(err)
	})
	if _, err := os.Stat(filepath.Join(n.dir, "new")); err != nil {
		t.Error(err)
	}
}

func TestOptionsThatCannotWork(t *testing.T) {
	for _, row := range []struct {
		o    Options
		want string
	}{
		{Options{Dir: t.TempDir()}, "no sinks"},
		{Options{Dir: t.TempDir(), Sinks: []string{"fil:///x"}}, `did you mean "file"`},
		{Options{Dir: t.TempDir(), Sinks: []string{"stdout:?format=fluentd"}}, "want record or gke"},
		{Options{Dir: t.TempDir(), Sinks: []string{"stdout:", "stdout:?format=gke"}}, "another sink has the name stdout"},
		{Options{Dir: "/nonexistent/tallyman", Sinks: []string{"stdout:"}}, "mount"},
	} {
		if _, err := New(row.o); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%v, want %q", err, row.want)
		}
	}
}

// The log says which journal, so that somebody can look.
func TestALogLineNamesTheJournal(t *testing.T) {
	n := newNode(t)
	n.dead("pod-7", "a")
	var log bytes.Buffer
	n.adopt(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, adopted(1))
	if s := bufio.NewScanner(&log); !s.Scan() || !strings.Contains(s.Text(), "journal=pod-7-") {
		t.Errorf("%q", s.Text())
	}
}
