package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tallyman-ci/tallyman/agent"
	"github.com/tallyman-ci/tallyman/e2e/dockertest"
	"github.com/tallyman-ci/tallyman/e2e/prefix"
	"github.com/tallyman-ci/tallyman/selftest"
)

const (
	apiBlocks = 10  // of each kind, in turns
	apiCalls  = 200 // of each kind of call in a block
)

// api prints what the daemon's API takes, with an agent attached whose sinks are all
// dead, and without.
func (b *bench) api() error {
	d, err := dockertest.Start(b.ctx)
	if err != nil {
		return err
	}
	b.later(d.Stop)
	ram, err := b.tmpfs("ram", "256m")
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
	p, err := b.install("api", ram, d.CLI(), "docker_host = "+d.Host(), "sinks = file://"+dead+"/a.jsonl file://"+dead+"/b.jsonl")
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.Socket())
	}}}
	defer client.CloseIdleConnections()

	// Events all the time, by a client of its own.
	busy, stop := context.WithCancel(b.ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer stop()
	var made atomic.Int64
	background.Go(func() {
		for n := 0; busy.Err() == nil; n++ {
			name := fmt.Sprintf("bench-%d", n)
			if request(busy, client, http.MethodPost, "/volumes/create", `{"Name":"`+name+`"}`) == nil && request(busy, client, http.MethodDelete, "/volumes/"+name, "") == nil {
				made.Add(2)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})

	paths := []string{"/_ping", "/version", "/containers/json?all=1"}
	with, without := make([][]float64, len(paths)), make([][]float64, len(paths))
	ratios := make([][]float64, len(paths))
	var seen int64
	for block := range apiBlocks {
		var medians [2][]float64
		for _, attached := range [][]bool{{true, false}, {false, true}}[block%2] {
			n, times, err := b.apiBlock(p, client, paths, attached)
			if err != nil {
				return err
			}
			seen += n
			into, i := without, 0
			if attached {
				into, i = with, 1
			}
			for k := range paths {
				into[k] = append(into[k], times[k]...)
				medians[i] = append(medians[i], selftest.Summarise("", times[k], nil).P50)
			}
		}
		for k := range paths {
			ratios[k] = append(ratios[k], medians[1][k]/medians[0][k])
		}
	}
	fmt.Printf("Docker API, microseconds, %d blocks of %d calls each way in turns, %d events made meanwhile, %d seen by the agent; load %s\n", apiBlocks, apiCalls, made.Load(), seen, load())
	fmt.Printf("  %-24s %10s %10s %10s %10s  %s\n", "", "p50 with", "p50 without", "p99 with", "p99 without", "ratio of p50: median of the blocks (lowest to highest)")
	for k, path := range paths {
		w, o := selftest.Summarise("", with[k], nil), selftest.Summarise("", without[k], nil)
		slices.Sort(ratios[k])
		fmt.Printf("  %-24s %10.0f %11.0f %10.0f %11.0f  %.2f (%.2f to %.2f), target 1.10\n", path, w.P50, o.P50, w.P99, o.P99,
			ratios[k][len(ratios[k])/2], ratios[k][0], ratios[k][len(ratios[k])-1])
	}
	fmt.Println()
	return nil
}

// apiBlock measures one block, and returns how many events the agent saw in it.
func (b *bench) apiBlock(p *prefix.Prefix, client *http.Client, paths []string, attached bool) (seen int64, times [][]float64, err error) {
	if attached {
		undo := len(b.undo)
		if _, err := b.agent(p); err != nil {
			return 0, nil, err
		}
		defer func() {
			for i := len(b.undo) - 1; i >= undo; i-- {
				err = errors.Join(err, b.undo[i]())
			}
			b.undo = b.undo[:undo]
		}()
		if err := b.connected(p); err != nil {
			return 0, nil, err
		}
	}
	times = make([][]float64, len(paths))
	for range apiCalls {
		for k, path := range paths {
			start := time.Now()
			if err := request(b.ctx, client, http.MethodGet, path, ""); err != nil {
				return 0, nil, err
			}
			times[k] = append(times[k], float64(time.Since(start).Microseconds()))
		}
	}
	if attached {
		status, err := b.status(p)
		if err != nil {
			return 0, nil, err
		}
		seen = int64(status.Events.Events)
	}
	return seen, times, nil
}

func (b *bench) status(p *prefix.Prefix) (agent.Status, error) {
	client, err := agent.Dial(b.ctx, p.Socket())
	if err != nil {
		return agent.Status{}, err
	}
	defer client.Close()
	return client.Status(b.ctx)
}

// connected waits until the agent has the daemon's stream.
func (b *bench) connected(p *prefix.Prefix) error {
	for range 1000 {
		status, err := b.status(p)
		if err == nil && status.Events != nil && status.Events.Connected {
			return nil
		}
		if b.ctx.Err() != nil {
			return b.ctx.Err()
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("the agent did not connect to the daemon")
}

func request(ctx context.Context, client *http.Client, method, path, body string) error {
	r, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	response, err := client.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err
	}
	if response.StatusCode >= 400 {
		return fmt.Errorf("%s %s: %s", method, path, response.Status)
	}
	return nil
}
