package sinks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// picky refuses some records, and is away after some batches.
type picky struct {
	refuse map[string]string // reason by id
	away   func(batch int) error
	got    []string
	n      int
}

func (p *picky) Write(_ context.Context, batch []Entry) error {
	p.n++
	if p.away != nil {
		if err := p.away(p.n); err != nil {
			return err
		}
	}
	var no []Refused
	for i, e := range batch {
		if why := p.refuse[e.ID]; why != "" {
			no = append(no, Refused{i, why})
			continue
		}
		p.got = append(p.got, e.ID)
	}
	if no != nil {
		return &RefusedError{no}
	}
	return nil
}

func (*picky) Close(context.Context) error { return nil }

func quarantined(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	all := map[string]string{}
	for line := range strings.Lines(string(b)) {
		var q Quarantined
		var r struct{ ID string }
		if json.Unmarshal([]byte(line), &q) != nil || json.Unmarshal(q.Record, &r) != nil {
			all[strings.TrimSuffix(line, "\n")] = "unreadable"
			continue
		}
		all[r.ID] = q.Reason
	}
	return all
}

func fill(t *testing.T, path string, ids ...string) {
	t.Helper()
	q := quarantine{path: path, sink: "s", maxBytes: 1 << 20}
	for _, id := range ids {
		if err := q.add(Entry{ID: id, Line: fmt.Appendf(nil, `{"id":%q,"kind":"event"}`, id)}, "because", time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.sync(); err != nil {
		t.Fatal(err)
	}
}

func same(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
}

func TestReplayOfAQuarantine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quarantine", "s.jsonl")
	if r, err := ReplayQuarantine(t.Context(), path, &picky{}, ReplayOptions{}); err != nil || r != (Replayed{}) {
		t.Errorf("without a quarantine: %+v, %v", r, err)
	}
	fill(t, path, "a", "b", "c")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString("half a li")
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	s := &picky{refuse: map[string]string{"b": "still not"}}
	r, err := ReplayQuarantine(t.Context(), path, s, ReplayOptions{})
	if err != nil || r != (Replayed{Delivered: 2, Refused: 1, Unreadable: 1}) {
		t.Errorf("%+v, %v", r, err)
	}
	equal(t, s.got, []string{"a", "c"})
	same(t, "quarantine", quarantined(t, path), map[string]string{"b": "still not", "half a li": "unreadable"})
	if _, err := os.Stat(path + ".replay"); !os.IsNotExist(err) {
		t.Error("the taken file is still there")
	}
}

// A sink that goes away in the middle: what it took is not sent again, the rest is.
func TestReplayGoesOnWhereItStopped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.jsonl")
	fill(t, path, "a", "b", "c", "d", "e")
	s := &picky{refuse: map[string]string{"b": "no"}, away: func(n int) error {
		if n > 2 {
			return errors.New("away")
		}
		return nil
	}}
	o := ReplayOptions{MaxRecords: 2, Patience: time.Millisecond}
	r, err := ReplayQuarantine(t.Context(), path, s, o)
	if err == nil || !strings.Contains(err.Error(), "away") || r != (Replayed{Delivered: 3, Refused: 1, Left: 1}) {
		t.Errorf("%+v, %v", r, err)
	}
	fill(t, path, "f") // an agent adds to it meanwhile
	var held []string
	if _, err := Held(path, func(e Entry, _ string) error { held = append(held, e.ID); return nil }); err != nil {
		t.Error(err)
	}
	equal(t, held, []string{"e", "b", "f"})
	s.away = nil
	r, err = ReplayQuarantine(t.Context(), path, s, o)
	if err != nil || r != (Replayed{Delivered: 2, Refused: 1}) {
		t.Errorf("%+v, %v", r, err)
	}
	equal(t, s.got, []string{"a", "c", "d", "e", "f"})
	same(t, "quarantine", quarantined(t, path), map[string]string{"b": "no"})
}

func TestOneReplayAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.jsonl")
	fill(t, path, "a")
	s := &picky{}
	s.away = func(int) error {
		if _, err := ReplayQuarantine(t.Context(), path, &picky{}, ReplayOptions{}); !errors.Is(err, ErrReplaying) {
			t.Errorf("a second replay: %v", err)
		}
		return nil
	}
	if _, err := ReplayQuarantine(t.Context(), path, s, ReplayOptions{}); err != nil {
		t.Error(err)
	}
	equal(t, s.got, []string{"a"})
}

// An agent refuses on while its quarantine is taken away again and again: each record
// is replayed or still there.
func TestReplayBesideAnAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.jsonl")
	const n = 200
	var agent sync.WaitGroup
	agent.Go(func() {
		for i := range n {
			fill(t, path, fmt.Sprintf("%03d", i))
		}
	})
	s := &picky{}
	ended := make(chan struct{})
	go func() { agent.Wait(); close(ended) }()
	for over := false; !over; {
		select {
		case <-ended:
			over = true
		default:
		}
		if _, err := ReplayQuarantine(t.Context(), path, s, ReplayOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(s.got)
	equal(t, s.got, numbered3(n))
}

func numbered3(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("%03d", i)
	}
	return all
}
