package events

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	dockerevents "github.com/docker/docker/api/types/events"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// sample returns the 178 lines that dockerd 20.10.24 wrote in the scenarios of
// testdata/events-sample.index.tsv.
func sample(t testing.TB) [][]byte {
	t.Helper()
	data, err := os.ReadFile("testdata/events-sample.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n"))
}

// converted runs lines through decoder and converter like a stream.
func converted(t testing.TB, labels []string, lines ...[]byte) []*record.Record {
	t.Helper()
	d := decoder{labels: map[string]bool{}}
	for _, l := range labels {
		d.labels[l] = true
	}
	c := newConverter()
	var out []*record.Record
	for i, line := range lines {
		m, err := d.decode(line)
		if err != nil {
			t.Fatalf("line %d: %v", i+1, err)
		}
		m.daemon, m.received = &identity{Engine: "ENGINE"}, m.nano+1000
		r, ev := new(record.Record), new(record.Event)
		c.convert(&m, r, ev)
		out = append(out, r)
	}
	return out
}

// TestSampleGolden holds the records of all real events against a reviewed file.
// Rewrite it with: go test ./events -run Golden -update
func TestSampleGolden(t *testing.T) {
	lines := sample(t)
	if len(lines) != 178 {
		t.Fatalf("the sample has %d lines, want 178", len(lines))
	}
	var got []byte
	for _, r := range converted(t, []string{"org.example.team"}, lines...) {
		got = record.Append(got, r)
	}
	const golden = "testdata/events-sample.golden.jsonl"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	gotLines, wantLines := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(gotLines), len(wantLines)) {
		var g, w string
		if i < len(gotLines) {
			g = gotLines[i]
		}
		if i < len(wantLines) {
			w = wantLines[i]
		}
		if g != w {
			t.Fatalf("line %d\n got %s\nwant %s\n(if this is meant: go test ./events -run Golden -update, and review the diff)", i+1, g, w)
		}
	}
}

// TestSampleScenarios says in words what each scenario of the sample must yield,
// so that a wrong golden file is noticed.
func TestSampleScenarios(t *testing.T) {
	lines := sample(t)
	code := func(e *record.Event) string {
		if e.ExitCode == nil {
			return "-"
		}
		return fmt.Sprint(*e.ExitCode)
	}
	type row struct {
		scenario string
		action   string // type action
		check    func(e *record.Event) string
		want     string
	}
	rows := []row{
		{"build_classic_from_scratch", "image tag", func(e *record.Event) string { return e.Image }, "evt-classic:1"},
		{"pull", "image pull", func(e *record.Event) string { return e.Image + " " + e.ActorID }, "registry.test:5000/evt/base:1 registry.test:5000/evt/base:1"},
		{"pull_by_digest", "image pull", func(e *record.Event) string { return e.Image }, "registry.test:5000/evt/base@sha256:4a25ff9000cbe86cbbbd9a83cf5a80629b14214767a082af8f3cfabd2504d7f4"},
		{"push", "image push", func(e *record.Event) string { return e.Image }, "registry.test:5000/evt/base:1"},
		{"rmi", "image untag", func(e *record.Event) string { return e.Image + "|" + e.ActorID[:12] }, "|sha256:8622d"},
		{"run_rm_exit3", "container die", code, "3"},
		{"run_rm_exit3", "container die", func(e *record.Event) string { return fmt.Sprint(e.DurationNS) }, "23757597"},
		{"run_rm_exit3", "container start", func(e *record.Event) string { return e.Image + " " + e.Name }, "evt-bk:1 evt-x3"},
		{"run_rm_exit3", "network connect", func(e *record.Event) string { return e.Driver + " " + e.Container[:4] }, "null ae16"},
		{"run_label_clobber", "container die", code, "99"}, // the label wins: the daemon's doing
		{"run_label_clobber", "container create", code, "-"},
		{"exec_ok", "container exec_die", code, "0"},
		{"exec_exit7", "container exec_die", code, "7"},
		{"exec_with_secret_arg", "container exec_create", func(e *record.Event) string { return e.Action + "|" + e.Detail }, "exec_create|"},
		{"exec_with_secret_arg", "container exec_start", func(e *record.Event) string { return e.ExecID[:8] }, "38a567fd"},
		{"kill", "container kill", func(e *record.Event) string { return fmt.Sprint(e.Signal) }, "15"},
		{"kill", "container die", code, "137"},
		{"health", "container health_status", func(e *record.Event) string { return e.Action + " " + e.Detail }, "health_status healthy"},
		{"oom", "container die", func(e *record.Event) string { return fmt.Sprint(e.OOM) }, "false"}, // the daemon said nothing that time
		{"oom_event_emitted", "container die", func(e *record.Event) string { return fmt.Sprint(e.OOM) }, "true"},
		{"network_create", "network create", func(e *record.Event) string { return fmt.Sprint(e.Name, " ", e.RunnerMade) }, "github_network_0123456789abcdef0123456789abcdef true"},
		{"volume_create_mount_rm", "volume create", func(e *record.Event) string { return e.Name + " " + e.Driver }, "evt-vol local"},
		{"volume_create_mount_rm", "volume mount", func(e *record.Event) string { return fmt.Sprint(e.Name, len(e.Container)) }, "evt-vol64"},
		{"runner_like_create_start_rm", "container create", func(e *record.Event) string { return fmt.Sprint(e.RunnerMade) }, "true"},
		{"run_rm_exit3", "container create", func(e *record.Event) string { return fmt.Sprint(e.RunnerMade) }, "false"},
		{"builder_prune", "builder prune", func(e *record.Event) string { return fmt.Sprint(e.ReclaimedBytes) }, "2397436"},
		{"image_prune", "image prune", func(e *record.Event) string { return fmt.Sprint(e.ReclaimedBytes) }, "3964512"},
		{"commit_save_load_import_export", "container commit", func(e *record.Event) string { return e.Image }, "evt-bk:1"},
	}
	for _, r := range rows {
		t.Run(r.scenario+" "+r.action, func(t *testing.T) {
			from, to := scenario(t, r.scenario)
			for _, rec := range converted(t, nil, lines[from-1:to]...) {
				if e := rec.Event; e.Type+" "+e.Action == r.action {
					if got := r.check(e); got != r.want {
						t.Errorf("got %q, want %q", got, r.want)
					}
					return
				}
			}
			t.Errorf("no %s in lines %d to %d", r.action, from, to)
		})
	}
}

func scenario(t *testing.T, name string) (from, to int) {
	t.Helper()
	f, err := os.Open("testdata/events-sample.index.tsv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	for in.Scan() {
		var exit, n int
		var got string
		if _, err := fmt.Sscanf(in.Text(), "%s %d %d %d %d", &got, &exit, &from, &to, &n); err == nil && got == name {
			return from, to
		}
	}
	t.Fatalf("no scenario %s", name)
	return 0, 0
}

func TestNothingOfAnExecIsKept(t *testing.T) {
	for i, r := range converted(t, []string{"org.example.team"}, sample(t)...) {
		line := string(record.Append(nil, r))
		for _, secret := range []string{"hunter2", "busybox", "--password", "/bin/sh"} {
			if strings.Contains(line, secret) {
				t.Errorf("line %d: %q is in %s", i+1, secret, line)
			}
		}
	}
}

// event makes a line as the daemon writes it.
func event(t testing.TB, typ, action, id string, nano int64, attributes map[string]string) []byte {
	t.Helper()
	line, err := json.Marshal(dockerevents.Message{Type: dockerevents.Type(typ), Action: dockerevents.Action(action), Scope: "local",
		Actor: dockerevents.Actor{ID: id, Attributes: attributes}, Time: nano / 1e9, TimeNano: nano})
	if err != nil {
		t.Fatal(err)
	}
	return line
}

func TestConvert(t *testing.T) {
	const id = "ae163ef8ba7adb218e4b09e1765af12ed64ce07e4ca17bb3897634d03479486b"
	const nano = 1795419485932566174
	attr := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	rows := []struct {
		name string
		line []byte
		got  func(r *record.Record) any
		want any
	}{
		{"unknown type becomes other", event(t, "teapot", "create", "x", nano, nil),
			func(r *record.Record) any { return r.Event.Type + " " + r.Event.Action }, "other create"},
		{"swarm types become other", event(t, "secret", "create", "x", nano, attr("name", "db-password")),
			func(r *record.Record) any { return r.Event.Type + r.Event.Name }, "other"},
		{"unknown action becomes other", event(t, "container", "levitate: now", id, nano, nil),
			func(r *record.Record) any { return r.Event.Action + r.Event.Detail }, "other"},
		{"free text of a health check is dropped", event(t, "container", "health_status: curl -u user:pw", id, nano, nil),
			func(r *record.Record) any { return r.Event.Action + r.Event.Detail }, "health_status"},
		{"unhealthy is kept", event(t, "container", "health_status: unhealthy", id, nano, nil),
			func(r *record.Record) any { return r.Event.Detail }, "unhealthy"},
		{"the word healthy of a command is none of ours", event(t, "container", "exec_start: healthy", id, nano, nil),
			func(r *record.Record) any { return r.Event.Action + r.Event.Detail }, "exec_start"},
		{"an escaped colon still cuts", []byte(`{"Type":"container","Action":"exec_start\u003a --token=t0ken","Actor":{"ID":"` + id + `"},"timeNano":1}`),
			func(r *record.Record) any { return r.Event.Action }, "exec_start"},
		{"a password in an image is dropped", event(t, "container", "create", id, nano, attr("image", "https://user:hunter2@registry.test/app")),
			func(r *record.Record) any { return r.Event.Image }, ""},
		{"userinfo without a scheme too", event(t, "container", "create", id, nano, attr("image", "user:hunter2@registry.test/app")),
			func(r *record.Record) any { return r.Event.Image }, ""},
		{"userinfo without a password too", event(t, "image", "pull", "ghp_secret@registry.test/app:1", nano, nil),
			func(r *record.Record) any { return r.Event.Image + r.Event.ActorID }, ""},
		{"an image id passes", event(t, "container", "create", id, nano, attr("image", "sha256:537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33")),
			func(r *record.Record) any { return r.Event.Image }, "sha256:537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33"},
		{"an untag with a name (containerd store) keeps it", event(t, "image", "untag", "sha256:537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33", nano, attr("name", "app:1")),
			func(r *record.Record) any { return r.Event.Image }, "app:1"},
		{"the runner's action image", event(t, "image", "tag", "sha256:1", nano, attr("name", "5a1b2c:0123456789abcdef0123456789abcdef")),
			func(r *record.Record) any { return r.Event.RunnerMade }, true},
		{"the runner's label alone proves nothing", event(t, "container", "create", id, nano, attr("facade", "", "name", "web")),
			func(r *record.Record) any { return r.Event.RunnerMade }, false},
		{"a token in a container's name", event(t, "container", "create", id, nano, attr("name", "job-ghp_FAKEfake0000FAKEfake.x")),
			func(r *record.Record) any { return r.Event.Name }, "job-[REDACTED]"},
		{"a random string in a container's name", event(t, "container", "create", id, nano, attr("name", "job-9f8A7b6C5d4E3f2G1h0JkLmNpQrS")),
			func(r *record.Record) any { return r.Event.Name }, "[REDACTED]"},
		{"a token in the name of a network", event(t, "network", "create", id, nano, attr("name", "n-dckr_pat_FAKEfakeFAKEfake000")),
			func(r *record.Record) any { return r.Event.Name }, "n-[REDACTED]"},
		{"a token as a volume, whose id is its name", event(t, "volume", "create", "glpat-FAKEfakeFAKEfake0000", nano, nil),
			func(r *record.Record) any { return r.Event.Name + " " + r.Event.ActorID }, "[REDACTED] [REDACTED]"},
		{"a token as a plugin", event(t, "plugin", "enable", "AKIAFAKE000000000000", nano, attr("name", "AKIAFAKE000000000000")),
			func(r *record.Record) any { return r.Event.Name + " " + r.Event.ActorID }, "[REDACTED] [REDACTED]"},
		{"a token in an image", event(t, "container", "create", id, nano, attr("image", "registry.test/app:ghp_FAKEfake0000FAKEfake")),
			func(r *record.Record) any { return r.Event.Image }, ""},
		{"a token in a pulled image", event(t, "image", "pull", "registry.test/app:ghp_FAKEfake0000FAKEfake", nano, nil),
			func(r *record.Record) any { return r.Event.Image + r.Event.ActorID }, ""},
		{"a token in a label that is asked for", event(t, "container", "create", id, nano, attr("team", "https://ci:hunter2@git.test/x")),
			func(r *record.Record) any { return r.Event.Labels[0].Value }, "https://[REDACTED]@git.test/x"},
		{"names that only look long", event(t, "container", "create", id, nano, attr("name", "0123456789abcdef0123456789abcdef_registrytestappwebserver_0a1b2c")),
			func(r *record.Record) any { return r.Event.Name }, "0123456789abcdef0123456789abcdef_registrytestappwebserver_0a1b2c"},
		{"an anonymous volume", event(t, "volume", "create", "537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33", nano, nil),
			func(r *record.Record) any { return r.Event.Name }, "537a2e22a2c2d69036ea130effede14ebb6f3be955c015250fe185e31b3b1c33"},
		{"control bytes in a name", event(t, "container", "create", id, nano, attr("name", "a\x1b[31m\n\u2028\u202eb")),
			func(r *record.Record) any { return r.Event.Name }, "a\ufffd[31m\ufffd\ufffd\ufffdb"},
		{"a name of 1 MB is cut", event(t, "container", "create", id, nano, attr("name", strings.Repeat("é", 1<<19))),
			func(r *record.Record) any { return len(r.Event.Name) <= maxText && utf8.ValidString(r.Event.Name) }, true},
		{"labels are kept by name only", event(t, "container", "create", id, nano, attr("team", "ci", "token", "t0ken")),
			func(r *record.Record) any { return fmt.Sprint(r.Event.Labels) }, fmt.Sprint([]record.Attr{{Key: "team", Value: "ci"}})},
		{"exit code that is none", event(t, "container", "die", id, nano, attr("exitCode", "99999999999999")),
			func(r *record.Record) any { return r.Event.ExitCode == nil }, true},
		{"execDuration where the start was not seen", event(t, "container", "die", id, nano, attr("exitCode", "0", "execDuration", "61")),
			func(r *record.Record) any { return r.Event.DurationNS }, int64(61e9)},
		{"a signal out of range", event(t, "container", "kill", id, nano, attr("signal", "900")),
			func(r *record.Record) any { return r.Event.Signal }, int64(0)},
		{"seconds alone", []byte(`{"Type":"container","Action":"start","Actor":{"ID":"x"},"time":1795419485}`),
			func(r *record.Record) any { return r.TS.UnixNano() }, int64(1795419485e9)},
		{"no time at all takes ours", []byte(`{"Type":"container","Action":"start"}`),
			func(r *record.Record) any { return r.TS.UnixNano() }, int64(1000)},
		{"missing actor", []byte(`{"Type":"image","Action":"pull","timeNano":5}`),
			func(r *record.Record) any { return r.Event.Type + r.Event.ActorID }, "image"},
		{"actor that is no object", []byte(`{"Type":"image","Action":"pull","Actor":[1],"timeNano":5}`),
			func(r *record.Record) any { return r.Event.Type }, "image"},
		{"attributes null", []byte(`{"Type":"image","Action":"pull","Actor":{"ID":"a:1","Attributes":null},"timeNano":5}`),
			func(r *record.Record) any { return r.Event.Image }, "a:1"},
		{"extra members", []byte(`{"Type":"image","Action":"pull","Actor":{"ID":"a:1","New":{"x":[1,{}]}},"new":{"a":1},"timeNano":5}`),
			func(r *record.Record) any { return r.Event.Image }, "a:1"},
		{"numbers where text belongs", []byte(`{"Type":7,"Action":"pull","Actor":{"ID":9,"Attributes":{"name":3}},"timeNano":5}`),
			func(r *record.Record) any { return r.Event.Type + r.Event.Action }, "otherpull"},
		{"scope out of its set", []byte(`{"Type":"image","Action":"pull","scope":"galaxy","timeNano":5}`),
			func(r *record.Record) any { return r.Event.Scope }, ""},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			rec := converted(t, []string{"team"}, r.line)[0]
			if got := r.got(rec); !reflect.DeepEqual(got, r.want) {
				t.Errorf("got %#v, want %#v", got, r.want)
			}
		})
	}
}

func TestNotAnEvent(t *testing.T) {
	for _, line := range []string{``, `null`, `[]`, `{}`, `42`, `"x"`, `{"message":"page not found"}`, `<html>`, `{"Type":"container"`, "\x00"} {
		if m, err := new(decoder).decode([]byte(line)); err == nil {
			t.Errorf("%q was taken for an event: %+v", line, m)
		}
	}
}

// EV-13 and EV-28: whatever a job names its containers and writes into labels, the
// record is one line that a terminal may show and that the journal takes, stamped
// with the largest job context there is; and labels that nobody asked for stay out.
func TestHostileNamesAndLabels(t *testing.T) {
	faults.Case(t, "EV-13", "EV-28")
	control := "a\x1b[31m\r\n\x00\u2028\u202e\x7f\xff\"\\"
	many := func(n int, value string) map[string]string {
		all := map[string]string{"name": "n", "image": "a:1"}
		for i := range n {
			all[fmt.Sprintf("l%04d", i)] = value
		}
		return all
	}
	with := func(name, image string) map[string]string { return map[string]string{"name": name, "image": image} }
	for _, row := range []struct {
		name       string
		attributes map[string]string
		labels     int // that are kept
	}{
		{"1,000 labels", many(1000, "v"), maxLabels},
		{"1,000 labels of 5 KB", many(1000, strings.Repeat("v", 5000)), 1},
		{"1,000 labels of quotes", many(1000, strings.Repeat(`"`, 1000)), 8},
		{"labels of 1 MB", many(4, strings.Repeat("v", 1<<20)), 1},
		{"a label of control bytes", many(1, strings.Repeat(control, 1000)), 1},
		{"a name of control bytes", with(strings.Repeat(control, 10000), "a:1"), 0},
		{"a name of 1 MB", with(strings.Repeat("n", 1<<20), "a:1"), 0},
		{"an image of 1 MB", with("n", strings.Repeat("i", 1<<20)), 0},
		{"an image of control bytes", with("n", control), 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.attributes["secret.label"] = "s3cret"
			row.attributes["execID"] = strings.Repeat(`"`, 1<<16)
			var asked []string
			for i := range 1000 {
				asked = append(asked, fmt.Sprintf("l%04d", i))
			}
			for _, typ := range []string{"container", "image", "network", "volume", control} {
				line := event(t, typ, "create"+control, strings.Repeat(control, 5000), 5, row.attributes)
				r := converted(t, asked, line)[0]
				if got := len(r.Event.Labels); typ == "container" && got != row.labels {
					t.Errorf("%d labels, want %d", got, row.labels)
				}
				size, longest := 0, 0
				for _, l := range r.Event.Labels {
					size, longest = size+len(l.Key)+len(l.Value), max(longest, len(l.Value))
				}
				if size > maxLabelText || longest > maxText {
					t.Errorf("labels of %d bytes, the longest value of %d", size, longest)
				}
				// What the agent adds, every byte of it escaped.
				worst := strings.Repeat(`"`, 2<<10)
				r.CI = &record.CI{Repository: worst, Workflow: worst, WorkflowRef: worst, JobName: worst, Ref: worst, HeadRef: worst}
				encoded := record.Append(nil, r)
				if len(encoded) > journal.MaxLine {
					t.Errorf("%s: a record of %d bytes: the journal takes %d", typ, len(encoded), journal.MaxLine)
				}
				var back record.Record
				if err := recordjson.Unmarshal(encoded, &back); err != nil || bytes.Count(encoded, []byte("\n")) != 1 {
					t.Fatalf("not one line of JSON: %v", err)
				}
				if bytes.Contains(encoded, []byte("s3cret")) {
					t.Error("a label that was not asked for is in the record")
				}
				texts := []string{back.Event.Name, back.Event.Image, back.Event.ActorID, back.Event.ExecID, back.Event.Type, back.Event.Action}
				for _, l := range back.Event.Labels {
					texts = append(texts, l.Key, l.Value)
				}
				for _, s := range texts {
					if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 || r == 0x2028 || r == 0x202e }) {
						t.Errorf("a control character in %.60q", s)
					}
				}
			}
		})
	}
}

// EV-11: a daemon newer than this build, or one that is none. Type and action stay in
// their closed sets, for they become tags; members that are not known are passed over.
func TestUnknownEvents(t *testing.T) {
	faults.Case(t, "EV-11")
	types, actions := Types(), Actions()
	for _, row := range []struct{ line, typ, action, actor string }{
		{`{"Type":"galaxy","Action":"explode","Actor":{"ID":"x"},"timeNano":5}`, Other, Other, "x"},
		{`{"Type":"container","Action":"levitate","Actor":{"ID":"x"},"timeNano":5}`, "container", Other, "x"},
		{`{"Type":"galaxy","Action":"start","Actor":{"ID":"x"},"timeNano":5}`, Other, "start", "x"},
		{`{"Type":"CONTAINER","Action":"Start","timeNano":5}`, Other, Other, ""},
		{`{"Type":"container","Action":"start","timeNano":5}`, "container", "start", ""},
		{`{"Type":"container","Action":"start","Actor":null,"timeNano":5}`, "container", "start", ""},
		{`{"Type":"container","Action":"start","Actor":[1,2],"timeNano":5}`, "container", "start", ""},
		{`{"Type":"container","Action":"start","Actor":"x","timeNano":5}`, "container", "start", ""},
		{`{"Type":"container","Action":"start","Actor":{"ID":7,"Attributes":[]},"timeNano":5}`, "container", "start", ""},
		{`{"Type":"container","Action":"start","Actor":{"ID":"x","Attributes":{"name":{"a":1},"exitCode":3}},"timeNano":5}`, "container", "start", "x"},
		{`{"Type":"container","Action":"start","Actor":{"ID":"x","New":{"deep":[{}]}},"timeNano":5,"Extra":{"a":[1,null]},"more":1e3}`, "container", "start", "x"},
		{`{"Type":7,"Action":{},"Actor":{"ID":"x"},"timeNano":5}`, Other, Other, "x"},
		{`{"Action":"start","timeNano":5}`, Other, "start", ""},
		{`{"Type":"container"}`, "container", Other, ""},
		{`{"timeNano":5}`, Other, Other, ""},
		{`{"Type":"container","Action":"start","timeNano":"soon","time":-1}`, "container", "start", ""},
		{`{"Type":"container","Action":"start","timeNano":99999999999999999999}`, "container", "start", ""},
		{`{"Type":"container","Action":": --password=x","Actor":{"ID":"x"},"timeNano":5}`, "container", Other, "x"},
	} {
		r := converted(t, nil, []byte(row.line))[0]
		if e := r.Event; e.Type != row.typ || e.Action != row.action || e.ActorID != row.actor {
			t.Errorf("%s: type %q, action %q, actor %q; want %q, %q, %q", row.line, e.Type, e.Action, e.ActorID, row.typ, row.action, row.actor)
		}
		if !slices.Contains(types, r.Event.Type) || !slices.Contains(actions, r.Event.Action) {
			t.Errorf("%s: %q or %q is not of the closed sets", row.line, r.Event.Type, r.Event.Action)
		}
		if r.TS.IsZero() || r.TS.Year() > 2100 && r.Event.TimeNano == 0 {
			t.Errorf("%s: time %v", row.line, r.TS)
		}
	}
}

func TestDurations(t *testing.T) {
	start := func(id string, at int64) []byte { return event(t, "container", "start", id, at, nil) }
	die := func(id string, at int64) []byte { return event(t, "container", "die", id, at, nil) }
	rs := converted(t, nil, start("a", 1000), start("b", 2000), die("a", 4000), start("a", 5000), die("b", 2500), die("a", 5001), die("a", 9000))
	want := []int64{0, 0, 3000, 0, 500, 1, 0}
	for i, r := range rs {
		if r.Event.DurationNS != want[i] {
			t.Errorf("event %d: duration %d, want %d", i, r.Event.DurationNS, want[i])
		}
	}

	// The memory of starts is bounded, and a list after a gap fills it.
	c := newConverter()
	for i := range 3 * maxStarted {
		c.remember(fmt.Sprint(i), 1)
	}
	if len(c.started) != maxStarted {
		t.Errorf("%d starts remembered, want %d", len(c.started), maxStarted)
	}
	c = newConverter()
	c.remember("seen", 500)
	c.resync(map[string]int64{"seen": 400, "listed": 300})
	if c.started["seen"].start != 500 || c.started["listed"].start != 300 {
		t.Errorf("after a resync: %v", c.started)
	}
}

// TestSameEventSameID: a replayed duplicate carries the id of the first, and no
// two events of the sample share one.
func TestSameEventSameID(t *testing.T) {
	first, second := converted(t, nil, sample(t)...), converted(t, nil, sample(t)...)
	ids, keys := map[string]int{}, map[uint64]int{}
	for i := range first {
		if first[i].ID != second[i].ID {
			t.Errorf("line %d: ids %s and %s", i+1, first[i].ID, second[i].ID)
		}
		if j, ok := ids[first[i].ID]; ok {
			t.Errorf("lines %d and %d share the id %s", j+1, i+1, first[i].ID)
		}
		ids[first[i].ID] = i
		m, _ := new(decoder).decode(sample(t)[i])
		if j, ok := keys[m.hash()]; ok {
			t.Errorf("lines %d and %d share the key", j+1, i+1)
		}
		keys[m.hash()] = i
	}
}

// FuzzDecode: no line crashes the decoder; where the scanner takes a line, it
// understands what encoding/json understands; and the record of any event is one
// line of JSON that decodes to the same record.
func FuzzDecode(f *testing.F) {
	for _, line := range sample(f) {
		f.Add(line)
	}
	for _, s := range []string{`{}`, `null`, `{"Type":"a","Type":"b"}`, `{"type":"container","Action":"x"}`, `{"Action":"exec_start: \ud800 \u003c","timeNano":-5}`,
		`{"Type":"image","Actor":{"Attributes":{"b":"1","a":"2"}}}`, `{"Type":"image","Actor":null}`, `{"Type":"i\/mage","timeNano":01}`,
		` { "Type" : "image" , "time" : 1 } `, `{"Type":"container","Action":"die","Actor":{"ID":"x","Attributes":{"facade":"","org.example.team":"\n"}}}`} {
		f.Add([]byte(s))
	}
	d := decoder{labels: map[string]bool{"org.example.team": true}}
	f.Fuzz(func(t *testing.T, line []byte) {
		fast, ok := d.scan(string(line))
		slow, err := d.decodeAny(line)
		if ok && json.Valid(line) && utf8.Valid(line) {
			if err != nil {
				t.Fatalf("the scanner took what encoding/json refuses: %v", err)
			}
			if !reflect.DeepEqual(fast, slow) {
				t.Fatalf("the scanner reads\n%+v\nencoding/json reads\n%+v", fast, slow)
			}
		}
		m, err := d.decode(line)
		if err != nil {
			return
		}
		m.daemon, m.received = &identity{Engine: "E"}, 1
		var r, back record.Record
		var ev record.Event
		newConverter().convert(&m, &r, &ev)
		encoded := record.Append(nil, &r)
		if bytes.Count(encoded, []byte("\n")) != 1 || encoded[len(encoded)-1] != '\n' {
			t.Fatalf("not one line: %q", encoded)
		}
		if err := recordjson.Unmarshal(encoded, &back); err != nil {
			t.Fatalf("%v: %s", err, encoded)
		}
		if !reflect.DeepEqual(&r, &back) {
			t.Fatalf("round trip\n%+v %+v\n%+v %+v", r, r.Event, back, back.Event)
		}
		for _, s := range []string{ev.Name, ev.Image, ev.ActorID, ev.ExecID} {
			if len(s) > maxText {
				t.Fatalf("a text of %d bytes", len(s))
			}
		}
	})
}

// BenchmarkDecode compares what one event costs to decode: here, with
// encoding/json into the same shape, and as client.Events of the Docker client
// does it (a json.Decoder into events.Message, sent through a channel).
func BenchmarkDecode(b *testing.B) {
	lines := sample(b)
	b.Run("scan", func(b *testing.B) {
		b.ReportAllocs()
		var d decoder
		for i := 0; b.Loop(); i++ {
			if _, err := d.decode(lines[i%len(lines)]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encoding-json", func(b *testing.B) {
		b.ReportAllocs()
		var d decoder
		for i := 0; b.Loop(); i++ {
			if _, err := d.decodeAny(lines[i%len(lines)]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("docker-client", func(b *testing.B) {
		b.ReportAllocs()
		all := bytes.Join(lines, []byte("\n"))
		out := make(chan dockerevents.Message)
		defer close(out)
		go func() {
			for range out {
			}
		}()
		dec := json.NewDecoder(bytes.NewReader(all))
		for b.Loop() {
			var m dockerevents.Message
			if !dec.More() {
				dec = json.NewDecoder(bytes.NewReader(all))
			}
			if err := dec.Decode(&m); err != nil {
				b.Fatal(err)
			}
			out <- m
		}
	})
	b.Run("to-line", func(b *testing.B) { // decode, convert, encode
		b.ReportAllocs()
		var d decoder
		c := newConverter()
		var buf []byte
		var r record.Record
		var ev record.Event
		for i := 0; b.Loop(); i++ {
			m, err := d.decode(lines[i%len(lines)])
			if err != nil {
				b.Fatal(err)
			}
			m.key, m.daemon = m.hash(), &identity{Engine: "E"}
			c.convert(&m, &r, &ev)
			buf = record.Append(buf[:0], &r)
		}
	})
}
