package agent

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
)

// What a shim and a hook of the first version said to the agent, to the byte. An upgrade
// replaces programs one after the other, and a job that runs meanwhile has some of
// each: these texts never change, and every later agent must understand them.
const (
	firstCall = `{"id":"01a22f91-b97f-7242-8864-6d728cdd73f5","ts":"2026-12-01T03:06:49.187141300Z","kind":"invocation","schema":1,"by":"environment",` +
		`"ci":{"repository":"acme/shop","repository_id":"11","owner":"acme","owner_id":"12","workflow":"CI","job":"build","run_id":"4711","run_number":3,` +
		`"run_attempt":1,"event_name":"push","ref":"refs/heads/main","sha":"0123456789012345678901234567890123456789","actor":"octocat","step":"__run",` +
		`"tracking_id":"github_6b2c","runner":{"name":"runner-1","os":"Linux","arch":"X64"}},"host":{"name":"vm"},"invocation":{"tool":"docker",` +
		`"command":"build","images":["registry.example.com/acme/shop:1"],"flags":["--tag","--platform"],"platform":"linux/amd64","argc":7,"pid":12638,` +
		`"ppid":12576,"uid":0,"daemon":"default","mono_ns":4185237818810}}` + "\n"
	firstContext = `{"schema":1,"key":"run4711-1-3a8a710a99e06b4a7267","ci":{"repository":"acme/shop","repository_id":"11","owner":"acme","owner_id":"12",` +
		`"workflow":"CI","job":"build","run_id":"4711","run_number":3,"run_attempt":1,"event_name":"push","ref":"refs/heads/main",` +
		`"sha":"0123456789012345678901234567890123456789","actor":"octocat","tracking_id":"github_6b2c","runner":{"name":"runner-1","os":"Linux","arch":"X64"}},` +
		`"host":{"name":"vm","boot_id":"9d8a662e-ddaf-4cbb-ba3a-fd0bf9db6373"},"started":"2026-12-01T03:06:49.154228674Z","boot":4185304904638,"version":"650163a"}`
	firstStart  = `{"control":"job-start","context":` + firstContext + `,"timeout_ms":299}`
	firstFlush  = `{"control":"flush","timeout_ms":2231}`
	firstEnd    = `{"control":"job-end","key":"run4711-1-3a8a710a99e06b4a7267","outcome":"completed","timeout_ms":2231}`
	firstStatus = `{"control":"status","timeout_ms":2997}`
)

// say sends one message and returns the answer.
func (r *running) say(msg string) string {
	r.t.Helper()
	conn, err := net.Dial("unixpacket", r.opts.Config.Socket())
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(msg)); err != nil {
		r.t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, maxControl)
	n, err := conn.Read(answer)
	if err != nil {
		r.t.Fatalf("no answer to %.60s: %v", msg, err)
	}
	return string(answer[:n])
}

func TestOldShimAndHook(t *testing.T) {
	r := start(t, options(t))
	defer r.end()
	if err := os.MkdirAll(r.opts.Store.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	sealed := filepath.Join(r.opts.Store.Dir, "run4711-1-3a8a710a99e06b4a7267.json")
	if err := os.WriteFile(sealed, []byte(firstContext+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	control := func(msg string) {
		t.Helper()
		if got := r.say(msg); got != "{}" {
			t.Errorf("%.40s was answered by %s, and an old hook takes {} alone for yes", msg, got)
		}
	}
	control(firstStart)
	// The process of the call is another one than in the text.
	call := strings.Replace(firstCall, `"pid":12638`, `"pid":`+jsonNumber(os.Getpid()), 1)
	if got := r.say(call); got != string(handover.AckClose) && got != string(handover.AckKeep) {
		t.Errorf("a call was answered by %q, which an old shim takes for no", got)
	}
	control(firstFlush)
	var status struct {
		Status struct {
			Version string
			PID     int
			Job     string
			Counts  struct{ Socket int64 }
		}
	}
	if err := json.Unmarshal([]byte(r.say(firstStatus)), &status); err != nil || status.Status.PID != os.Getpid() || status.Status.Counts.Socket != 1 {
		t.Errorf("the status: %+v, %v", status, err)
	}
	ended := strings.Replace(firstContext, `"boot":`, `"ended":"2026-12-01T03:06:50Z","outcome":"completed","boot":`, 1)
	if err := os.WriteFile(sealed, []byte(ended+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	control(firstEnd)
	r.waitFor(1, "the job's end", kind(record.KindJobEnd))
	all := r.records()
	i := slices.IndexFunc(all, func(r record.Record) bool { return r.Kind == record.KindInvocation })
	if i < 0 {
		t.Fatalf("%+v", all)
	}
	got := all[i]
	if got.ID != "01a22f91-b97f-7242-8864-6d728cdd73f5" || got.By != record.BySealed || got.CI.Repository != "acme/shop" || got.CI.Step != "__run" ||
		got.Invocation.Command != "build" || !slices.Equal(got.Invocation.Images, []string{"registry.example.com/acme/shop:1"}) || got.Invocation.Platform != "linux/amd64" {
		t.Errorf("%+v %+v %+v", got, got.CI, got.Invocation)
	}
}

func jsonNumber(n int) string { b, _ := json.Marshal(n); return string(b) }

// A newer shim or hook may say more. What this version does not know is kept in the
// record, and refused as a control message: the connection and the agent stay.
func TestNewerShimAndHook(t *testing.T) {
	r := start(t, options(t))
	defer r.end()
	call := strings.NewReplacer(`"schema":1`, `"schema":2`, `"pid":12638`, `"pid":`+jsonNumber(os.Getpid()),
		`"tool":"docker"`, `"tool":"docker","colour":{"red":[1,2.5,null]}`, `"host":{`, `"quorum":"x","host":{"cpu":"m7",`).Replace(firstCall)
	if got := r.say(call); got != string(handover.AckClose) && got != string(handover.AckKeep) {
		t.Errorf("a newer call was answered by %q", got)
	}
	if got := r.say(`{"control":"pause","for":{"seconds":3}}`); !strings.Contains(got, "unknown control message") {
		t.Errorf("an unknown control message was answered by %s", got)
	}
	if got := r.say(`{"control":"flush","timeout_ms":1000,"sinks":["a"]}`); got != "{}" {
		t.Errorf("a newer flush was answered by %s", got)
	}
	names, err := filepath.Glob(r.opts.Config.Journal() + "/records-*.jsonl")
	if err != nil || len(names) == 0 {
		t.Fatal(err)
	}
	data, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"schema":2`, `"colour":{"red":[1,2.5,null]}`, `"quorum":"x"`, `"cpu":"m7"`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("%s is gone from the journal: %s", want, data)
		}
	}
}

// An older or newer agent answers this version's hooks and tallyman status.
func TestAnswersOfOtherAgents(t *testing.T) {
	for name, test := range map[string]struct {
		answer string
		want   string // of the error
	}{
		"an old yes":         {`{}`, ""},
		"a newer yes":        {`{"queued":{"records":3},"notes":["x"]}`, ""},
		"an old status":      {`{"status":{"version":"1.0.0","pid":7}}`, ""},
		"a newer status":     {`{"status":{"version":"9.0.0","pid":7,"counts":{"records":1,"colours":2},"sinks":[{"name":"x","mood":"good"}]}}`, ""},
		"it does not know":   {`{"error":"unknown control message \"status\""}`, "unknown control message"},
		"no form of ours":    {`OK`, "read its answer"},
		"it closes, saying:": {``, "ask the agent for status"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(options(t).Config.RunDir, "agent.sock")
			l, err := net.Listen("unixpacket", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				if _, err := conn.Read(make([]byte, maxControl)); err == nil && test.answer != "" {
					conn.Write([]byte(test.answer))
				}
			}()
			client, err := Dial(t.Context(), socket)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			status, err := client.Status(t.Context())
			<-done
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%v", err)
			}
			if strings.Contains(test.answer, `"pid"`) && status.PID != 7 {
				t.Errorf("%+v", status)
			}
		})
	}
}
