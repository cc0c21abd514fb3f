package events

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/dockertest"
	"github.com/tallyman-ci/tallyman/e2e/fakedockerd"
	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

const testImage = dockertest.Registry + "/events/app:1"

// dockerd starts a real private daemon whose registry has testImage.
func dockerd(t *testing.T) *dockertest.Daemon {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real daemon; left out by -short")
	}
	d := dockertest.Require(t)
	if err := d.Publish(t.Context(), testImage); err != nil {
		t.Fatal(err)
	}
	return d
}

func startReal(t *testing.T, d *dockertest.Daemon, o Options, change ...func(*running)) *running {
	t.Helper()
	o.Host = d.Host()
	r := start(t, &fakedockerd.Daemon{}, o, append([]func(*running){func(r *running) {
		r.s.timing.settle = 500 * time.Millisecond // a loaded machine starts a stream slowly
		r.s.timing.idle, r.s.timing.probe = 2*time.Second, time.Second
	}}, change...)...)
	eventually(t, "a stream", func() bool { return r.s.Status().Connected })
	return r
}

// find returns the events that match, in order.
func (r *running) find(match func(*record.Event) bool) []*record.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*record.Event
	for _, rec := range r.records {
		if rec.Event != nil && match(rec.Event) {
			found = append(found, rec.Event)
		}
	}
	return found
}

func (r *running) one(typ, action, name string) *record.Event {
	r.t.Helper()
	var got []*record.Event
	eventually(r.t, fmt.Sprint(typ, " ", action, " of ", name), func() bool {
		got = r.find(func(e *record.Event) bool {
			return e.Type == typ && e.Action == action && (e.Name == name || name == "" || e.Image == name)
		})
		return len(got) > 0
	})
	return got[0]
}

func docker(t *testing.T, d *dockertest.Daemon, args ...string) string {
	t.Helper()
	out, err := d.Docker(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// tag tags testImage n times as fast as the daemon goes and returns the time each
// call took. The names repeat, because each further one makes the next call slower.
func tag(t *testing.T, d *dockertest.Daemon, prefix string, n int) []time.Duration {
	t.Helper()
	api, err := openDaemon(d.Host())
	if err != nil {
		t.Fatal(err)
	}
	defer api.close()
	var took []time.Duration
	for i := range n {
		begin := time.Now()
		if err := api.cli.ImageTag(t.Context(), testImage, fmt.Sprintf("tagged:%s-%d", prefix, i%50)); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}
	return took
}

func (r *running) tagged(prefix string) []string {
	var names []string
	for _, e := range r.find(func(e *record.Event) bool {
		return e.Action == "tag" && strings.HasPrefix(e.Image, "tagged:"+prefix+"-")
	}) {
		names = append(names, e.Image)
	}
	return names
}

func TestRealDaemon(t *testing.T) {
	d := dockerd(t)
	docker(t, d, "pull", testImage)
	docker(t, d, "run", "-d", "--network=none", "--name=before", testImage, "sleep", "300")
	time.Sleep(time.Second)
	r := startReal(t, d, Options{Labels: []string{"team"}})
	eventually(t, "the list of containers", func() bool { return strings.Contains(r.logs.String(), "running=1") })

	if _, err := d.Docker(t.Context(), "run", "--rm", "--network=none", "--name=fails", "--label=team=ci", "--label=token=t0ken", testImage, "sh", "-c", "sleep 0.3; exit 3"); err == nil {
		t.Error("exit 3 was no error")
	}
	die := r.one("container", "die", "fails")
	if die.ExitCode == nil || *die.ExitCode != 3 || die.Image != testImage || die.OOM || time.Duration(die.DurationNS) < 300*time.Millisecond || time.Duration(die.DurationNS) > 30*time.Second {
		t.Errorf("die: %+v", die)
	}
	if len(die.Labels) != 1 || die.Labels[0].Key != "team" || die.Labels[0].Value != "ci" {
		t.Errorf("labels %v", die.Labels)
	}
	docker(t, d, "exec", "before", "echo", "--password=hunter2")
	if e := r.one("container", "exec_die", "before"); e.ExitCode == nil || *e.ExitCode != 0 || len(e.ExecID) != 64 {
		t.Errorf("exec_die: %+v", e)
	}
	docker(t, d, "kill", "before")
	if e := r.one("container", "kill", "before"); e.Signal != 9 {
		t.Errorf("kill: %+v", e)
	}
	if e := r.one("container", "die", "before"); time.Duration(e.DurationNS) < time.Second || *e.ExitCode != 137 {
		t.Errorf("the end of a container that ran before: %+v", e)
	}
	docker(t, d, "pull", testImage)
	if e := r.one("image", "pull", testImage); e.ActorID != testImage {
		t.Errorf("pull: %+v", e)
	}
	docker(t, d, "network", "create", "github_network_0123456789abcdef0123456789abcdef")
	if e := r.one("network", "create", "github_network_0123456789abcdef0123456789abcdef"); !e.RunnerMade {
		t.Errorf("network: %+v", e)
	}
	docker(t, d, "volume", "create", "vol")
	r.one("volume", "create", "vol")
	docker(t, d, "container", "prune", "-f")
	r.one("container", "prune", "")

	r.set(func() {
		for _, rec := range r.records {
			line := string(record.Append(nil, rec))
			if strings.Contains(line, "hunter2") || strings.Contains(line, "t0ken") {
				t.Errorf("a secret is in %s", line)
			}
			if rec.Event != nil && (rec.Event.Type == Other || rec.Event.Action == Other || rec.Event.Engine == "") {
				t.Errorf("not known: %s", line)
			}
		}
	})
	r.wantNoLoss()
	if st := r.s.Status(); st.APIVersion == "" || st.ServerVersion == "" || st.Unreadable != 0 {
		t.Errorf("status %+v", st)
	}
}

// A real daemon that is killed or stopped and comes back: one loss, and everything
// after it. Also EV-01: the streamer waits while it is away.
func TestRealDaemonRestarts(t *testing.T) {
	faults.Case(t, "EV-02", "EV-03", "EV-04", "EV-07")
	d := dockerd(t)
	docker(t, d, "pull", testImage)
	state := filepath.Join(t.TempDir(), "events.json")
	r := startReal(t, d, Options{StatePath: state})
	tag(t, d, "a", 5)
	eventually(t, "5 tags", func() bool { return len(r.tagged("a")) == 5 })

	d.Kill()
	eventually(t, "the end of the stream", func() bool { return !r.s.Status().Connected })
	// EV-03: the socket file stays, and nobody listens on it.
	if _, err := net.Dial("unix", d.Socket()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after SIGKILL: %v, want the socket file left behind", err)
	}
	eventually(t, "the reason in the status", func() bool { return strings.Contains(r.s.Status().Error, "Cannot connect to the Docker daemon") })
	if err := d.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	tag(t, d, "b", 5)
	eventually(t, "5 tags of the restarted daemon", func() bool { return len(r.tagged("b")) == 5 })
	eventually(t, "a loss", func() bool { return len(r.losses()) == 1 })

	if err := d.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of the stream", func() bool { return !r.s.Status().Connected })
	<-d.Done()
	// EV-02: the socket file goes with the daemon.
	if _, err := os.Stat(d.Socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after SIGTERM: %v, want no socket file", err)
	}
	if err := d.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a second loss", func() bool { return len(r.losses()) == 2 })
	tag(t, d, "c", 5)
	eventually(t, "5 tags after that", func() bool { return len(r.tagged("c")) == 5 })
	for _, l := range r.losses() {
		if l.Cause != "daemon_restarted" || !l.From.Before(l.To) || time.Since(l.From) > 2*time.Minute {
			t.Errorf("loss %+v", l)
		}
	}
	if len(r.losses()) != 2 {
		t.Errorf("%d losses, want 2", len(r.losses()))
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// More events missed than the real daemon keeps.
func TestRealGap(t *testing.T) {
	faults.Case(t, "EV-05", "EV-06")
	d := dockerd(t)
	docker(t, d, "pull", testImage)
	state := filepath.Join(t.TempDir(), "events.json")
	r := startReal(t, d, Options{StatePath: state})
	tag(t, d, "a", 10)
	eventually(t, "10 tags", func() bool { return len(r.tagged("a")) == 10 })
	r.stop()
	tag(t, d, "b", 200) // within the buffer

	r = startReal(t, d, Options{StatePath: state})
	eventually(t, "200 tags", func() bool { return len(r.tagged("b")) >= 200 })
	time.Sleep(time.Second)
	if n, ls := len(r.tagged("b")), r.losses(); n != 200 || len(ls) != 0 || len(r.tagged("a")) != 0 {
		t.Errorf("%d of 200 events, losses %v, %d events again", n, ls, len(r.tagged("a")))
	}
	r.stop()
	tag(t, d, "c", 300) // beyond it

	r = startReal(t, d, Options{StatePath: state})
	eventually(t, "256 tags", func() bool { return len(r.tagged("c")) >= 256 })
	eventually(t, "a loss", func() bool { return len(r.losses()) == 1 })
	l := r.losses()[0]
	first := r.find(func(e *record.Event) bool { return strings.HasPrefix(e.Image, "tagged:c-") })[0]
	if l.Cause != "stream_gap" || l.To.UnixNano() != first.TimeNano || len(r.tagged("c")) != 256 {
		t.Errorf("loss %+v, %d events, the first at %d", l, len(r.tagged("c")), first.TimeNano)
	}
}

// EV-16: a daemon that hangs is noticed, and nothing is lost when it goes on.
func TestRealDaemonHangs(t *testing.T) {
	faults.Case(t, "EV-16", "EV-27")
	d := dockerd(t)
	docker(t, d, "pull", testImage)
	r := startReal(t, d, Options{}, func(r *running) { r.s.timing.idle = 500 * time.Millisecond })
	tag(t, d, "a", 3)
	eventually(t, "3 tags", func() bool { return len(r.tagged("a")) == 3 })
	if err := d.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(40 * time.Second); r.s.Status().Connected; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a daemon that hangs was not noticed within 40 s")
		}
	}
	if err := d.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	tag(t, d, "b", 3)
	for deadline := time.Now().Add(30 * time.Second); len(r.tagged("b")) < 3 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	if n, ls := len(r.tagged("b")), r.losses(); n != 3 || len(ls) != 0 {
		t.Errorf("%d of 3 events, losses %v", n, ls)
	}
}

// EV-08: with a stuck sink the daemon goes as fast as without us, and every event
// is either handed out or counted. (A subscriber that stops reading slowed it from
// 2 ms to 204 ms a call.)
func TestRealDaemonIsNotSlowed(t *testing.T) {
	faults.Case(t, "EV-08")
	d := dockerd(t)
	docker(t, d, "pull", testImage)
	median := func(ds []time.Duration) time.Duration { slices.Sort(ds); return ds[len(ds)/2] }
	alone := median(tag(t, d, "alone", 500))
	block := make(chan struct{})
	r := startReal(t, d, Options{QueueSize: 100}, func(r *running) { r.block = block })
	const n = 3000 // beyond the daemon's 1024 for a subscriber and the socket's buffers
	stuck := median(tag(t, d, "stuck", n))
	t.Logf("median of a tag call: %v without us, %v with a stuck sink", alone, stuck)
	if stuck > 2*alone+20*time.Millisecond {
		t.Errorf("a stuck sink slows the daemon from %v to %v", alone, stuck)
	}
	close(block)
	lost := func() (count int64) {
		for _, l := range r.losses() {
			if l.Cause != "queue_full" {
				t.Errorf("loss %+v", l)
			}
			count += l.Count
		}
		return count
	}
	eventually(t, "all events, handed out or counted", func() bool { return int64(len(r.tagged("stuck")))+lost() >= n })
	time.Sleep(200 * time.Millisecond)
	if got := len(r.tagged("stuck")); int64(got)+lost() != n || lost() == 0 {
		t.Errorf("%d handed out and %d lost of %d", got, lost(), n)
	}
}
