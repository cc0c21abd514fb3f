package e2e

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/inject"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

// damages are what may stand in the place of a file. Each gets the path, which is
// vacant, what was there, and the path of another file of the folder.
var damages = map[string]func(path string, was []byte, other string) error{
	"nothing":               func(string, []byte, string) error { return nil },
	"no byte":               func(path string, _ []byte, _ string) error { return os.WriteFile(path, nil, 0o600) },
	"half of it":            func(path string, was []byte, _ string) error { return os.WriteFile(path, was[:len(was)/2], 0o600) },
	"random bytes":          func(path string, _ []byte, _ string) error { return os.WriteFile(path, noise(100_000), 0o600) },
	"random bytes in it":    func(path string, was []byte, _ string) error { return os.WriteFile(path, spoil(was), 0o600) },
	"a file of another one": func(path string, _ []byte, other string) error { return copyTo(path, other) },
	"a directory":           func(path string, _ []byte, _ string) error { return os.Mkdir(path, 0o700) },
	"a full directory":      func(path string, _ []byte, _ string) error { return os.MkdirAll(filepath.Join(path, "a", "b"), 0o700) },
	"a FIFO":                func(path string, _ []byte, _ string) error { return unix.Mkfifo(path, 0o600) },
	"a link to nothing":     func(path string, _ []byte, _ string) error { return os.Symlink("/nonexistent/file", path) },
	"a link to /dev/zero":   func(path string, _ []byte, _ string) error { return os.Symlink("/dev/zero", path) },
	"a link to itself":      func(path string, _ []byte, _ string) error { return os.Symlink(filepath.Base(path), path) },
	"a terabyte of nothing": func(path string, was []byte, _ string) error {
		return errors.Join(os.WriteFile(path, was, 0o600), os.Truncate(path, 1<<40))
	},
	"a socket": func(path string, _ []byte, _ string) error {
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		ln.SetUnlinkOnClose(false)
		return ln.Close()
	},
	"a device": func(path string, _ []byte, _ string) error {
		err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) // /dev/zero
		if errors.Is(err, unix.EPERM) {
			return os.Symlink("/dev/full", path)
		}
		return err
	},
}

func noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func spoil(was []byte) []byte {
	b := slices.Clone(was)
	for range 1 + len(b)/50 {
		if len(b) > 0 {
			b[rand.IntN(len(b))] = byte(rand.Uint32())
		}
	}
	return b
}

func copyTo(path, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// fullState makes a folder with one of everything that an agent leaves behind: an
// ended journal of three segments, a cursor in two generations, a quarantine, a
// sealed job, positions, and a spool with records that nobody has read.
func fullState(dir string) (*lone, error) {
	l, err := newLone(dir, "segment_max_bytes = 4KiB", "sinks = file://"+dir+"/out.jsonl?keep=0")
	if err != nil {
		return nil, err
	}
	p, err := l.start(l.command())
	if err != nil {
		return nil, err
	}
	defer p.kill()
	for i := range 12 {
		_, line := callRecord(fmt.Sprintf("old-%d", i))
		if i%3 == 2 {
			l.toSpool(line)
		} else if l.send(line) != "acked" {
			return nil, errors.New("the first agent acknowledges nothing")
		}
		if i%4 == 3 {
			if err := l.flush(time.Minute); err != nil {
				return nil, err
			}
		}
	}
	if err := p.stop(); err != nil {
		return nil, err
	}
	_, line := callRecord("in-the-spool")
	l.toSpool(line)
	store := hook.Options{StateDir: l.state()}
	if _, err := store.Store().Seal(hook.Context{CI: record.CI{Repository: "acme/shop", RunID: "7", TrackingID: "github_x", Runner: &record.Runner{Name: "runner-1"}}, Started: time.Now()}); err != nil {
		return nil, err
	}
	more := map[string]string{
		filepath.Join(l.journal(), "quarantine", "other.jsonl"): `{"quarantined":"2026-01-01T00:00:00Z","sink":"other","reason":"x","record":{}}` + "\n",
		filepath.Join(l.spool(), "1001.lost"):                   "\nxx",
		filepath.Join(l.state(), "events.json"):                 `{"time_nano":1,"engine":"x"}`,
	}
	for path, content := range more {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// names are the names that the agent uses, those of folders among them and of files
// that are there only for moments.
func (l *lone) names() ([]string, error) {
	var names []string
	for _, top := range []string{l.state(), l.run()} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if path != top && err == nil {
				names = append(names, path)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		if strings.HasSuffix(name, ".previous.json") {
			names = append(names, strings.TrimSuffix(name, ".previous.json")+".tmp", strings.TrimSuffix(name, ".previous.json")+".jsonl")
		}
	}
	return append(names, filepath.Join(l.journal(), ".records.new"), filepath.Join(l.journal(), ".records.link"),
		filepath.Join(l.state(), "spool.json.new"), l.socket(), l.socket()+".new"), nil
}

// Whatever stands in the place of a file or folder of the state and of the run
// folder, the agent starts without help, acknowledges and delivers; so does the next
// one. What it passes over, it says.
func TestAgentStartsOverAnyContent(t *testing.T) {
	memory := shm(t)
	old, err := fullState(filepath.Join(memory, "old"))
	if err != nil {
		t.Fatal(err)
	}
	names, err := old.names()
	if err != nil {
		t.Fatal(err)
	}
	type visit struct{ name, damage string }
	var all []visit
	for _, name := range names {
		for damage := range damages {
			rel, err := filepath.Rel(old.dir, name)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, visit{rel, damage})
		}
	}
	slices.SortFunc(all, func(a, b visit) int { return strings.Compare(a.damage+a.name, b.damage+b.name) })
	some := all
	if os.Getenv(inject.AllVariable) != "all" {
		some = nil
		for _, i := range rand.Perm(len(all))[:40] {
			some = append(some, all[i])
		}
	}
	var mu sync.Mutex
	var slowest time.Duration
	var slowestOf visit
	var dirs atomic.Int64
	next := make(chan visit)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for v := range next {
				dir := filepath.Join(memory, fmt.Sprint(dirs.Add(1)))
				took, err := startOver(old, dir, v.name, v.damage)
				mu.Lock()
				if err != nil {
					log, _ := os.ReadFile(filepath.Join(dir, "log"))
					t.Errorf("%s in the place of %s: %v\n%s", v.damage, v.name, err, log)
				}
				if took > slowest {
					slowest, slowestOf = took, v
				}
				mu.Unlock()
				if err := os.RemoveAll(dir); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, v := range some {
		next <- v
	}
	close(next)
	wg.Wait()
	t.Logf("%d of %d: any content of %d names starts; the slowest start took %v (%s in the place of %s)", len(some), len(all), len(names), slowest.Round(time.Millisecond), slowestOf.damage, slowestOf.name)
}

// startOver copies the state, damages one name of it, and starts an agent twice.
func startOver(old *lone, dir, name, damage string) (took time.Duration, err error) {
	l, err := newLone(dir, "segment_max_bytes = 4KiB", "sinks = file://"+dir+"/out.jsonl?keep=0&name=out")
	if err != nil {
		return 0, err
	}
	if err := os.RemoveAll(l.run()); err != nil {
		return 0, err
	}
	for _, top := range []string{"state", "run"} {
		if err := os.CopyFS(filepath.Join(dir, top), os.DirFS(filepath.Join(old.dir, top))); err != nil {
			return 0, err
		}
	}
	// The sink's name is a part of the names of its files.
	renamed, err := filepath.Glob(filepath.Join(l.journal(), "cursors", "file-*"))
	if err != nil {
		return 0, err
	}
	sink := ""
	for _, path := range renamed {
		sink, _, _ = strings.Cut(filepath.Base(path), ".")
		if err := os.Rename(path, strings.Replace(path, sink, "out", 1)); err != nil {
			return 0, err
		}
	}
	path := filepath.Join(dir, strings.Replace(name, sink, "out", 1))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return 0, err
	}
	was, _ := os.ReadFile(path) // nothing where it is a folder or not there
	if err := os.RemoveAll(path); err != nil {
		return 0, err
	}
	if err := damages[damage](path, was, filepath.Join(old.state(), "spool.json")); err != nil {
		return 0, err
	}
	for i := range 2 {
		start := time.Now()
		p, err := l.start(l.command())
		if err != nil {
			return 0, err
		}
		defer p.kill()
		took = max(took, time.Since(start))
		if p.ended() {
			return took, fmt.Errorf("the agent ended: %w", p.stop())
		}
		var ids []string
		for n := range 8 { // over the end of a segment
			id, line := callRecord(fmt.Sprintf("new-%d-%d", i, n))
			if l.send(line) != "acked" {
				return took, errors.New("a new record is not acknowledged")
			}
			ids = append(ids, id)
		}
		if err := l.flush(time.Minute); err != nil {
			return took, err
		}
		if err := p.stop(); err != nil {
			return took, err
		}
		got, err := l.deliveredIDs()
		if err != nil {
			return took, err
		}
		for _, id := range ids {
			if !got[id] {
				return took, fmt.Errorf("%s is not delivered", id)
			}
		}
	}
	return took, nil
}

// deliveredIDs are the ids of what the file sink wrote.
func (l *lone) deliveredIDs() (map[string]bool, error) {
	r, err := journal.OpenReader(l.out(), journal.Position{})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	ids := map[string]bool{}
	for {
		line, err := r.Next()
		if errors.Is(err, io.EOF) {
			return ids, nil
		}
		if err != nil {
			return nil, err
		}
		ids[string(line.ID())] = true
	}
}
