package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
)

// The agent is made for 500 records a second; ten times that is what it gets here.
const (
	wantedRate   = 5000
	journalMax   = 32 << 20
	memoryTarget = 64 << 20
)

// overload sends records as the shim does, at ten times the load, for as long as
// duration, to an agent whose journal is far smaller than that, and whose sink is dead.
// The commands of all records are this process, which does not end: so the agent also
// watches as many as it ever does.
func (b *bench) overload(duration time.Duration) error {
	ram, err := b.tmpfs("ram", "512m")
	if err != nil {
		return err
	}
	dead, err := b.tmpfs("dead", "64k")
	if err != nil {
		return err
	}
	if err := fill(dead); err != nil {
		return err
	}
	p, err := b.install("overload", ram, "/bin/true", "journal_max_bytes = 32 MiB", "segment_max_bytes = 4 MiB", "sinks = file://"+dead+"/records.jsonl")
	if err != nil {
		return err
	}
	a, err := b.agent(p, "--no-events")
	if err != nil {
		return err
	}
	var sent, acked, other atomic.Int64
	stop := make(chan struct{})
	var senders sync.WaitGroup
	start := time.Now()
	for range 8 {
		senders.Go(func() {
			for {
				n := sent.Add(1)
				// Paced by the clock, not by sleeps that a busy machine stretches.
				if wait := time.Until(start.Add(time.Duration(n) * time.Second / wantedRate)); wait > 0 {
					time.Sleep(wait)
				}
				select {
				case <-stop:
					sent.Add(-1)
					return
				default:
				}
				target := handover.Target{Socket: p.Socket(), Spool: p.Spool(), SpoolMaxBytes: 8 << 20}
				if handover.Deliver(target, line(n), os.Getuid(), os.Geteuid()) == handover.Acked {
					acked.Add(1)
				} else {
					other.Add(1)
				}
			}
		})
	}
	var journalPeak, spoolPeak int64
	for time.Since(start) < duration && b.ctx.Err() == nil {
		journalPeak = max(journalPeak, size(p.Journal()))
		spoolPeak = max(spoolPeak, size(p.Spool()))
		time.Sleep(50 * time.Millisecond)
	}
	close(stop)
	senders.Wait()
	took := time.Since(start)
	if b.ctx.Err() != nil {
		return b.ctx.Err()
	}
	client, err := agent.Dial(b.ctx, p.Socket())
	if err != nil {
		return err
	}
	defer client.Close()
	status, err := client.Status(b.ctx)
	if err != nil {
		return err
	}
	peak, err := peakMemory(a.Pid)
	if err != nil {
		return err
	}
	fmt.Printf("Overload: %d records in %s, %.0f a second (%d wanted), with a dead sink\n", sent.Load(), took.Round(time.Second), float64(sent.Load())/took.Seconds(), wantedRate)
	fmt.Printf("  acknowledged %d, by queue or append file %d; journaled %d\n", acked.Load(), other.Load(), status.Counts.Records)
	fmt.Printf("  agent's memory at its peak (VmHWM)  %6.1f MiB, target %d MiB: ratio %.2f\n", float64(peak)/(1<<20), memoryTarget>>20, float64(peak)/memoryTarget)
	fmt.Printf("  journal at its peak                 %6.1f MiB, cap %d MiB: ratio %.2f\n", float64(journalPeak)/(1<<20), journalMax>>20, float64(journalPeak)/journalMax)
	fmt.Printf("  append files at their peak          %6.1f MiB, cap 8 MiB each (uid %d)\n\n", float64(spoolPeak)/(1<<20), os.Getuid())
	return nil
}

// line is a record as a job's build gives it.
func line(n int64) []byte {
	now := time.Now()
	r := record.Record{ID: record.NewID(now), TS: now.UTC(), Kind: record.KindInvocation, Schema: record.SchemaVersion, By: record.ByEnvironment,
		CI: &record.CI{Repository: "acme/shop", RunID: "7001", RunAttempt: 1, Workflow: "CI: build, test", Job: "build", Step: "__run_" + strconv.FormatInt(n%7, 10),
			Ref: "refs/heads/main", SHA: "0123456789abcdef0123456789abcdef01234567", Actor: "someone", TrackingID: "github_3c1b2f0e-1111-2222-3333-444455556666"},
		Host: &record.Host{Name: "runner-1"},
		Invocation: &record.Invocation{Tool: "docker", Command: "build", Images: []string{"registry.example/shop/web:1"}, Flags: []string{"-t", "--build-arg"},
			Argc: 7, PID: int64(os.Getpid()), PPID: int64(os.Getppid()), UID: int64(os.Getuid()), Daemon: "unix", MonoNS: n},
	}
	return record.Append(nil, &r)
}

// size is what a folder's files hold.
func size(dir string) (n int64) {
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if st, err := d.Info(); err == nil {
				n += st.Size()
			}
		}
		return nil // files come and go
	})
	return n
}

// peakMemory is VmHWM of a process in bytes.
func peakMemory(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("no VmHWM in /proc")
}
