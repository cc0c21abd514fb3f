package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// adoptRuns is how many runners die. TALLYMAN_ADOPT_RUNS changes it (make crash: 200).
func adoptRuns(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("TALLYMAN_ADOPT_RUNS"))
	if err != nil {
		return 25
	}
	return n
}

// Runner pods die at random moments, with all their processes, while an adopter runs on
// the node: each record that an agent acknowledged reaches the sink.
func TestRecordsOfDeadRunnersAreAdopted(t *testing.T) {
	dir := shm(t)
	node, out := filepath.Join(dir, "node"), filepath.Join(dir, "out.jsonl")
	if err := os.Mkdir(node, 0o755); err != nil {
		t.Fatal(err)
	}
	sink := "sinks = file://" + out + "?batch_delay=5ms&keep=0"
	adopter, err := newLone(filepath.Join(dir, "adopter"), sink)
	if err != nil {
		t.Fatal(err)
	}
	cmd := adopter.command("--adopt", node, "--adopt-after", "50ms")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })

	runs, acked, sent := adoptRuns(t), map[string]bool{}, map[string]bool{}
	for i := range runs {
		pod := fmt.Sprintf("pod-%d", i)
		l, err := newLone(filepath.Join(dir, pod), sink, "state_dir = "+filepath.Join(node, pod))
		if err != nil {
			t.Fatal(err)
		}
		p, err := l.start(l.command())
		if err != nil || p.pid == 0 {
			t.Fatalf("%v: %s", err, p.output.String())
		}
		var senders sync.WaitGroup
		var mu sync.Mutex
		for s := range 3 {
			senders.Go(func() {
				for k := 0; !p.ended(); k++ {
					id, line := callRecord(fmt.Sprintf("%s-%d-%d", pod, s, k))
					mu.Lock()
					sent[id] = true
					mu.Unlock()
					if l.send(line) != "acked" {
						return
					}
					mu.Lock()
					acked[id] = true
					mu.Unlock()
				}
			})
		}
		time.Sleep(rand.N(60 * time.Millisecond))
		p.kill()
		senders.Wait()
		// The pod's own folder goes with it; the node's stays.
		if err := os.RemoveAll(l.dir); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(2 * time.Minute)
	for left := -1; left != 0; time.Sleep(20 * time.Millisecond) {
		journals, err := filepath.Glob(filepath.Join(node, "*", "journal"))
		adopted, err2 := filepath.Glob(filepath.Join(node, ".adopted", "*"))
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		if left = len(journals) + len(adopted); left > 0 && time.Now().After(deadline) {
			log, _ := os.ReadFile(adopter.log())
			t.Fatalf("%d journals are still there: %s", left, log)
		}
	}
	if err := stopAdopter(cmd); err != nil {
		t.Error(err)
	}
	got, again, err := readAll(out)
	if err != nil {
		t.Fatal(err)
	}
	lost, invented := 0, 0
	for id := range acked {
		if _, ok := got[id]; !ok {
			lost++
		}
	}
	for id, r := range got {
		if r.Invocation != nil && !sent[id] {
			invented++
		}
	}
	if lost > 0 || invented > 0 || len(acked) == 0 {
		t.Errorf("%d of %d acknowledged records lost, %d invented", lost, len(acked), invented)
	}
	t.Logf("adoption: %d runners killed, %d records acknowledged, %d lost, %d came twice", runs, len(acked), lost, again)
}

func stopAdopter(cmd *exec.Cmd) error {
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return cmd.Wait()
}
