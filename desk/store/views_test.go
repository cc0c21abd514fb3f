package store

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
)

// small is a day on which two jobs ran. Its answers are worked out by hand below.
//
// acme/shop has its hooks and a sealed context: four calls (a pull of 2 s; a run of 10 s; a
// pull of 1 s that failed; a build whose end nobody saw, delivered twice), and a nested
// call that is not its own. acme/billing has no hooks: a login of 1 s, then a run of 60 s
// that ended with 137 because its container was told to stop. A container started on r2 at
// noon without any call, two losses, and two rows of imported requests.
var small = []string{
	line("a-start", at("10:00:00"), "job.start", shop+`,"job":{"version":"1"}`),
	line("a1", at("10:00:10"), "invocation", shop+`,"invocation":{"tool":"docker","command":"pull","images":["alpine:3"]}`),
	line("a1-pull", at("10:00:12"), "event", shop+`,"event":{"type":"image","action":"pull","image":"alpine:3"}`),
	line("a1-end", at("10:00:12"), "invocation.end", shop+`,"end":{"invocation_id":"a1","duration_ns":2000000000,"exit_code":0,"source":"pidfd_info"}`),
	line("a2", at("10:01:00"), "invocation", shop+`,"invocation":{"tool":"docker","command":"run","images":["docker.io/library/alpine:3"]}`),
	line("k1-create", at("10:01:01"), "event", shop+`,"event":{"type":"container","action":"create","image":"alpine:3","actor_id":"k1"}`),
	line("k1-start", at("10:01:02"), "event", shop+`,"event":{"type":"container","action":"start","image":"alpine:3","actor_id":"k1"}`),
	line("k1-die", at("10:01:09"), "event", shop+`,"event":{"type":"container","action":"die","image":"alpine:3","actor_id":"k1","exit_code":0,"duration_ns":7000000000}`),
	line("a2-end", at("10:01:10"), "invocation.end", shop+`,"end":{"invocation_id":"a2","duration_ns":10000000000,"exit_code":0,"source":"pidfd_info"}`),
	line("a3", at("10:02:00"), "invocation", shop+`,"invocation":{"tool":"docker","command":"pull","images":["acme/private"]}`),
	line("a3-end", at("10:02:01"), "invocation.end", shop+`,"end":{"invocation_id":"a3","duration_ns":1000000000,"exit_code":1,"source":"pidfd_info"}`),
	line("a4", at("11:05:00"), "invocation", shop+`,"invocation":{"tool":"docker","command":"build"}`),
	line("a4", at("11:05:00"), "invocation", shop+`,"invocation":{"tool":"docker","command":"build"}`),
	line("a4-end", at("11:06:00"), "invocation.end", shop+`,"end":{"invocation_id":"a4","source":"unknown"}`),
	line("a5", at("11:05:01"), "invocation", shop+`,"invocation":{"tool":"docker","command":"version","nested":true}`),
	line("a-end", at("11:30:00"), "job.end", shop+`,"job":{"outcome":"completed","duration_ns":5400000000000}`),

	line("b1", at("10:10:00"), "invocation", billing+`,"invocation":{"tool":"docker","command":"login"}`),
	line("b1-end", at("10:10:01"), "invocation.end", billing+`,"end":{"invocation_id":"b1","duration_ns":1000000000,"exit_code":0,"source":"pidfd_info"}`),
	line("b2", at("10:10:10"), "invocation", billing+`,"invocation":{"tool":"docker","command":"run","images":["ghcr.io/acme/base:7"]}`),
	line("b2-pull", at("10:10:11"), "event", billing+`,"event":{"type":"image","action":"pull","image":"ghcr.io/acme/base:7"}`),
	line("k2-create", at("10:10:11"), "event", billing+`,"event":{"type":"container","action":"create","image":"ghcr.io/acme/base:7","actor_id":"k2"}`),
	line("k2-start", at("10:10:12"), "event", billing+`,"event":{"type":"container","action":"start","image":"ghcr.io/acme/base:7","actor_id":"k2"}`),
	line("b3-pull", at("10:10:30"), "event", billing+`,"event":{"type":"image","action":"pull","image":"index.docker.io/library/alpine:3"}`),
	line("k2-kill", at("10:11:09"), "event", billing+`,"event":{"type":"container","action":"kill","image":"ghcr.io/acme/base:7","actor_id":"k2","signal":15}`),
	line("k2-die", at("10:11:10"), "event", billing+`,"event":{"type":"container","action":"die","image":"ghcr.io/acme/base:7","actor_id":"k2","exit_code":137,"duration_ns":58000000000}`),
	line("b2-end", at("10:11:10"), "invocation.end", billing+`,"end":{"invocation_id":"b2","duration_ns":60000000000,"exit_code":137,"source":"pidfd_info"}`),
	line("k3-start", at("12:00:00"), "event", `"by":"none","host":{"name":"r2","node":"n1"},"event":{"type":"container","action":"start","image":"busybox","actor_id":"k3"}`),
	line("wait", at("09:59:00"), "invocation", `"by":"none","outside_job":true,"host":{"name":"r1","node":"n1"},"invocation":{"tool":"docker","command":"ps"}`),

	line("l1", at("10:20:00"), "loss", `"loss":{"cause":"queue_full","source":"events","count":5,"from":"2026-11-23T10:19:00Z","to":"2026-11-23T10:20:00Z"}`),
	line("l2", at("10:21:00"), "loss", `"loss":{"cause":"torn_line","source":"journal","count":-1}`),
	line("h1", at("10:30:00"), "http", `"http":{"source":"github-csv","row":1,"count":1,"host":"github.com","class":"git-refs","repository":"acme/lib","status":401,"user_agent":"git/2.39.5 proactive","remote_addr":"192.0.2.1","anonymous":true}`),
	line("h2", at("10:31:00"), "http", `"http":{"source":"github-csv","row":2,"count":3,"host":"github.com","class":"git-fetch","repository":"acme/lib","status":200,"user_agent":"git/2.47.1"}`),
}

const (
	shop    = `"by":"sealed","ci":{"repository":"acme/shop","workflow":"CI","job":"build","run_id":"1","run_attempt":1,"actor":"ann","tracking_id":"t1"},"host":{"name":"r1","node":"n1"}`
	billing = `"by":"environment","ci":{"repository":"acme/billing","workflow":"Nightly","job":"scan","run_id":"2","run_attempt":1,"actor":"bob"},"host":{"name":"r2","node":"n1"}`
)

func at(clock string) time.Time {
	t, err := time.Parse(time.DateTime, "2026-11-23 "+clock)
	if err != nil {
		panic(err)
	}
	return t
}

// answers are the rows of each view on the small day, in the order of their columns, times
// as clock times. Durations are nanoseconds.
var answers = map[string][]string{
	// Five calls: a nested one, the double and the runner's own are none.
	"calls": {
		"a1|10:00:10|10:00:00|acme/shop|CI|build|ann|1|1/1/build/t1|||sealed|n1|r1|docker|pull|[alpine:3]|ok|0|-|2000000000",
		"a2|10:01:00|10:00:00|acme/shop|CI|build|ann|1|1/1/build/t1|||sealed|n1|r1|docker|run|[docker.io/library/alpine:3]|ok|0|-|10000000000",
		"a3|10:02:00|10:00:00|acme/shop|CI|build|ann|1|1/1/build/t1|||sealed|n1|r1|docker|pull|[acme/private]|failed|1|-|1000000000",
		"a4|11:05:00|11:00:00|acme/shop|CI|build|ann|1|1/1/build/t1|||sealed|n1|r1|docker|build|[]|unknown|-|-|-",
		"b1|10:10:00|10:00:00|acme/billing|Nightly|scan|bob|2|2/1/scan/|||environment|n1|r2|docker|login|[]|ok|0|-|1000000000",
		"b2|10:10:10|10:00:00|acme/billing|Nightly|scan|bob|2|2/1/scan/|||environment|n1|r2|docker|run|[ghcr.io/acme/base:7]|failed|137|-|60000000000",
	},
	"pulls": {
		"a1-pull|10:00:12|10:00:00|acme/shop|CI|build|ann|1|1/1/build/t1|sealed|n1|alpine:3|docker.io|false",
		"b2-pull|10:10:11|10:00:00|acme/billing|Nightly|scan|bob|2|2/1/scan/|environment|n1|ghcr.io/acme/base:7|ghcr.io|true",
		"b3-pull|10:10:30|10:00:00|acme/billing|Nightly|scan|bob|2|2/1/scan/|environment|n1|alpine:3|docker.io|true",
	},
	// k2 ended with 137 and was told to stop, so that it did not fail.
	"containers": {
		"k1-create|10:01:01|10:00:00|acme/shop|CI|build|1|1/1/build/t1||sealed|n1|k1|alpine:3|create|false||-|false|-",
		"k1-die|10:01:09|10:00:00|acme/shop|CI|build|1|1/1/build/t1||sealed|n1|k1|alpine:3|die|false|ok|0|false|7000000000",
		"k1-start|10:01:02|10:00:00|acme/shop|CI|build|1|1/1/build/t1||sealed|n1|k1|alpine:3|start|false||-|false|-",
		"k2-create|10:10:11|10:00:00|acme/billing|Nightly|scan|2|2/1/scan/||environment|n1|k2|ghcr.io/acme/base:7|create|false||-|false|-",
		"k2-die|10:11:10|10:00:00|acme/billing|Nightly|scan|2|2/1/scan/||environment|n1|k2|ghcr.io/acme/base:7|die|false|stopped|137|false|58000000000",
		"k2-start|10:10:12|10:00:00|acme/billing|Nightly|scan|2|2/1/scan/||environment|n1|k2|ghcr.io/acme/base:7|start|false||-|false|-",
		"k3-start|12:00:00|12:00:00|||||-||none|n1|k3|busybox:latest|start|false||-|false|-",
	},
	"jobs": {
		"1/1/build/t1|10:00:00|10:00:00|acme/shop|CI|build|ann|1||n1|true|true|completed|5400000000000|1",
		"2/1/scan/|10:10:00|10:00:00|acme/billing|Nightly|scan|bob|2||n1|false|false||-|",
	},
	"losses": {
		"l1|10:20:00|10:00:00|queue_full|events|5|10:19:00|10:20:00||",
		"l2|10:21:00|10:00:00|torn_line|journal|-|-|-||",
	},
	"requests": {
		"h1|10:30:00|10:00:00|github-csv|1|github.com|git-refs|acme/lib|401|git/2.39.5 proactive|2.39|true|192.0.2.1|true||0|||",
		"h2|10:31:00|10:00:00|github-csv|3|github.com|git-fetch|acme/lib|200|git/2.47.1|2.47|false||false||0|||",
	},
	// k3 started two hours after the last call on r2 had ended.
	"explained": {
		"a1-pull|10:00:12|10:00:00|acme/shop|CI|build|sealed|n1|image|pull|false|true",
		"b2-pull|10:10:11|10:00:00|acme/billing|Nightly|scan|environment|n1|image|pull|false|true",
		"b3-pull|10:10:30|10:00:00|acme/billing|Nightly|scan|environment|n1|image|pull|false|true",
		"k1-create|10:01:01|10:00:00|acme/shop|CI|build|sealed|n1|container|create|false|true",
		"k1-start|10:01:02|10:00:00|acme/shop|CI|build|sealed|n1|container|start|false|true",
		"k2-create|10:10:11|10:00:00|acme/billing|Nightly|scan|environment|n1|container|create|false|true",
		"k2-start|10:10:12|10:00:00|acme/billing|Nightly|scan|environment|n1|container|start|false|true",
		"k3-start|12:00:00|12:00:00||||none|n1|container|start|false|false",
	},
	// shop: 2 + 10 + 1 s; billing: 1 + 60 s.
	"traffic": {
		"00:00:00|acme/billing|Nightly|scan|bob|2|1|1|61000000000",
		"00:00:00|acme/shop|CI|build|ann|4|1|1|13000000000",
	},
	"activity": {"10:00:00|5|3|2|0", "11:00:00|1|0|0|1"},
	// Two pulls, of 1 and 2 s: the median is the first, what 95 of 100 stay under the second.
	"commands": {
		"00:00:00|docker|build|1|0|1|0|-|-|-",
		"00:00:00|docker|login|1|0|0|1000000000|1000000000|1000000000|1000000000",
		"00:00:00|docker|pull|2|1|0|3000000000|1000000000|2000000000|2000000000",
		"00:00:00|docker|run|2|1|0|70000000000|10000000000|60000000000|60000000000",
	},
	"pulls_by_image": {"00:00:00|alpine:3|docker.io|2|2|2|1", "00:00:00|ghcr.io/acme/base:7|ghcr.io|1|1|1|1"},
	// b3-pull came after a login.
	"dockerhub_limit": {"n1|10:00:00|1|1|0.01"},
	"containers_per_job": {
		"10:01:01|acme/shop|CI|build|1/1/build/t1|1|1|0|0|1|7000000000",
		"10:10:11|acme/billing|Nightly|scan|2/1/scan/|1|1|0|0|1|58000000000",
	},
	"failures": {
		"00:00:00|acme/billing|Nightly|scan|docker|run|137|-|1|10:10:10",
		"00:00:00|acme/shop|CI|build|docker|pull|1|-|1|10:02:00",
	},
	"failed_pulls": {"10:02:00|10:00:00|acme/shop|CI|build|1||n1|1|acme/private:latest|docker.io"},
	"slow_pulls":   {"00:00:00|alpine:3|docker.io|1|2000000000|2000000000|2000000000"},
	"heavy_workflows": {
		"00:00:00|acme/billing|Nightly|1|2|2|1|61000000000|61000000000",
		"00:00:00|acme/shop|CI|1|4|1|1|13000000000|13000000000",
	},
	// Of three starts one, k3, has no job.
	"unattributed": {"00:00:00|calls|6|0|0", "00:00:00|containers|3|1|0.3333", "00:00:00|pulls|3|0|0"},
	"lost":         {"00:00:00|queue_full|events|1|5|0", "00:00:00|torn_line|journal|1|0|1"},
	"coverage": {
		"00:00:00|n1|container|create|2|2|1",
		"00:00:00|n1|container|start|3|2|0.6667",
		"00:00:00|n1|image|pull|3|3|1",
	},
	// Two jobs, one with its start; four calls sealed, two by the environment.
	"recording":       {"00:00:00|2|1|6|4|2|0|0|5|1"},
	"golden_images":   {"00:00:00|2.39|true|1|1|1|true", "00:00:00|2.47|false|3|0|0|false"},
	"teams":           {"acme/billing|@acme/money", "acme/shop|@acme/all"},
	"traffic_by_team": {"00:00:00|@acme/all|1|4|1|13000000000", "00:00:00|@acme/money|1|2|1|61000000000"},
}

const owners = `
# who owns what
acme/*        @acme/all
acme/billing  @acme/money
`

func rows(t testing.TB, s *Store, sql string) []string {
	t.Helper()
	table, err := s.Query(t.Context(), sql)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return text(table)
}

func text(table panels.Table) []string {
	var out []string
	for _, r := range table.Rows {
		var cells []string
		for _, v := range r {
			switch v := v.(type) {
			case nil:
				cells = append(cells, "-")
			case time.Time:
				cells = append(cells, v.Format("15:04:05"))
			case float64:
				cells = append(cells, strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.4f", v), "0"), "."))
			default:
				cells = append(cells, fmt.Sprint(v))
			}
		}
		out = append(out, strings.Join(cells, "|"))
	}
	slices.Sort(out)
	return out
}

func TestViewsOnASmallDay(t *testing.T) {
	s, err := Open(t.Context(), []string{journalOf(t, small...)}, Options{Owners: strings.NewReader(owners)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, v := range bq.Views() {
		if v.Name == "records_unique" {
			if got := rows(t, s, "SELECT COUNT(*) FROM tallyman.records_unique"); got[0] != fmt.Sprint(len(small)-1) {
				t.Errorf("records_unique has %s rows, want %d", got[0], len(small)-1)
			}
			continue
		}
		want, ok := answers[v.Name]
		if !ok {
			t.Errorf("%s: no answer was worked out", v.Name)
			continue
		}
		want = slices.Clone(want)
		slices.Sort(want)
		if got := rows(t, s, "SELECT * FROM tallyman."+v.Name); !slices.Equal(got, want) {
			t.Errorf("%s:\n%s\nwant:\n%s", v.Name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestViewsOnAFleet holds the views against the counts that the corpus kept of itself.
func TestViewsOnAFleet(t *testing.T) {
	path := journalOf(t)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	want, err := write(f, 3, 30_000, at("00:00:00"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	s, err := Open(t.Context(), []string{path}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	one := func(sql string) string { return strings.Join(rows(t, s, sql), " ") }
	for sql, w := range map[string]int64{
		"SELECT COUNT(*) FROM tallyman.records":                                                          want.records,
		"SELECT COUNT(*) FROM tallyman.records_unique":                                                   want.records - want.doubles,
		"SELECT COUNT(*) FROM tallyman.calls":                                                            want.calls,
		"SELECT SUM(calls) FROM tallyman.traffic":                                                        want.calls,
		"SELECT COUNT(duration_ns) FROM tallyman.calls":                                                  want.ends,
		"SELECT COUNT(*) FROM tallyman.pulls":                                                            want.pulls,
		"SELECT SUM(pulls) FROM tallyman.heavy_workflows":                                                want.pulls,
		"SELECT SUM(started) FROM tallyman.containers_per_job":                                           want.starts,
		"SELECT COUNT(*) FROM tallyman.containers WHERE action = 'die'":                                  want.deaths,
		"SELECT SUM(jobs) FROM tallyman.recording":                                                       want.jobs,
		"SELECT SUM(recorded) FROM tallyman.recording":                                                   want.jobs,
		"SELECT SUM(lost) FROM tallyman.lost":                                                            want.lost,
		"SELECT COUNT(*) FROM tallyman.losses":                                                           want.losses,
		"SELECT COALESCE(SUM(unattributed), 0) FROM tallyman.unattributed":                               0,
		"SELECT SUM(calls) FROM tallyman.failures":                                                       want.exits[1] + want.exits[2] + want.exits[3],
		"SELECT COUNT(*) FROM tallyman.containers_per_job WHERE failed > started":                        0,
		"SELECT COUNT(*) FROM (SELECT hour FROM tallyman.activity WHERE ok + failed + unknown <> calls)": 0,
	} {
		if got := one(sql); got != fmt.Sprint(w) {
			t.Errorf("%s: %s, want %d", sql, got, w)
		}
	}
	var repositories []string
	for name, c := range want.byRepository {
		repositories = append(repositories, fmt.Sprintf("%s|%d|%d|%d", name, c.calls, c.failed, c.timeNS))
	}
	slices.Sort(repositories)
	if got := rows(t, s, "SELECT repository, SUM(calls), SUM(failed), SUM(time_ns) FROM tallyman.traffic GROUP BY 1"); !slices.Equal(got, repositories) {
		t.Errorf("traffic by repository: %d rows differ from the corpus's own %d", len(got), len(repositories))
	}
	var images []string
	for name, n := range want.byImage {
		images = append(images, fmt.Sprintf("%s|%d", name, n))
	}
	slices.Sort(images)
	if got := rows(t, s, "SELECT image, SUM(pulls) FROM tallyman.pulls_by_image GROUP BY 1"); !slices.Equal(got, images) {
		t.Errorf("pulls by image: %v, want %v", got, images)
	}
	var hours []string
	for h, n := range want.perHour {
		hours = append(hours, fmt.Sprintf("%s|%d", h.Format("2006-01-02T15"), n))
	}
	slices.Sort(hours)
	if got := rows(t, s, "SELECT STRFTIME(hour, '%Y-%m-%dT%H'), calls FROM tallyman.activity"); !slices.Equal(got, hours) {
		t.Errorf("activity: %v, want %v", got, hours)
	}
}
