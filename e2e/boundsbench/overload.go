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

// overload does so with the bounds of a job as they are by default, which hold most of
// the flood back, and without them.
func (b *bench) overload(duration time.Duration) error {
	for _, row := range []struct {
		name   string
		config []string
	}{{"one job, default bounds", nil}, {"no bound of a job", []string{"job_rate = 0"}}} {
		if err := b.flood(row.name, row.config, duration/2); err != nil {
			return err
		}
	}
	return nil
}

// flood sends records as the shim does, at ten times the load, for as long as
// duration, to an agent whose journal is far smaller than that, and whose sink is dead.
// The commands of all records are this process, which does not end: so the agent also
// watches as many as it ever does.
func (b *bench) flood(name string, config []string, duration time.Duration) error {
	undo := len(b.undo)
	defer func() {
		for i := len(b.undo) - 1; i >= undo; i-- {
			if err := b.undo[i](); err != nil {
				fmt.Fprintln(os.Stderr, "boundsbench:", err)
			}
		}
		b.undo = b.undo[:undo]
	}()
	ram, err := b.tmpfs("ram-"+strings.Fields(name)[0], "512m")
	if err != nil {
		return err
	}
	dead, err := b.tmpfs("dead-"+strings.Fields(name)[0], "64k")
	if err != nil {
		return err
	}
	if err := fill(dead); err != nil {
		return err
	}
	p, err := b.install("overload-"+strings.Fields(name)[0], ram, "/bin/true",
		append(config, "journal_max_bytes = 32 MiB", "segment_max_bytes = 4 MiB", "sinks = file://"+dead+"/records.jsonl")...)
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
	spent, err := processorTime(a.Pid)
	if err != nil {
		return err
	}
	fmt.Printf("Overload, %s: %d records in %s, %.0f a second (%d wanted), with a dead sink; load %s\n", name, sent.Load(), took.Round(time.Second), float64(sent.Load())/took.Seconds(), wantedRate, load())
	fmt.Printf("  acknowledged %d, by queue or append file %d; journaled %d, ends and losses too; held back and counted %d\n",
		acked.Load(), other.Load(), status.Counts.Records, status.Counts.Suppressed)
	fmt.Printf("  agent's processor time              %6.1f us a record\n", float64(spent.Microseconds())/float64(sent.Load()))
	fmt.Printf("  agent's memory at its peak (VmHWM)  %6.1f MiB, target %d MiB: ratio %.2f\n", float64(peak)/(1<<20), memoryTarget>>20, float64(peak)/memoryTarget)
	fmt.Printf("  journal at its peak                 %6.1f MiB, cap %d MiB: ratio %.2f\n", float64(journalPeak)/(1<<20), journalMax>>20, float64(journalPeak)/journalMax)
	fmt.Printf("  append files at their peak          %6.1f MiB, cap 8 MiB, and as much being read\n\n", float64(spoolPeak)/(1<<20))
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

// processorTime is what a process has used, user and system (proc_pid_stat(5)).
func processorTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks int64
	for _, text := range f[11:13] {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil // USER_HZ is 100 everywhere
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
