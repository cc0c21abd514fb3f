package probe

import (
	"encoding/json"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"strings"
	"testing"
)

func init() { runtime.LockOSThread() }

// TestMain makes the test's binary a probe too, so that the tests can start one.
func TestMain(m *testing.M) {
	if os.Getenv("PROBE_TEST") != "" {
		json.NewEncoder(os.Stdout).Encode(Collect())
		return
	}
	os.Exit(m.Run())
}

func see(t *testing.T, script string, env ...string) State {
	t.Helper()
	cmd := exec.Command("sh", "-c", script, "sh", os.Args[0]) // not bash, which sets the variable _
	cmd.Env = append(os.Environ(), append(env, "PROBE_TEST=1", "GORACE=atexit_sleep_ms=0")...)
	out, err := cmd.Output()
	var s State
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return s
}

// TestCollect: two starts in the same way are the same, and each change of the start is
// seen under its name, and nothing else.
func TestCollect(t *testing.T) {
	const start = `exec "$1"`
	plain := see(t, start)
	if again := see(t, start); len(Compare(plain, again)) != 0 {
		t.Errorf("two plain starts differ: %v", Compare(plain, again))
	}
	for _, test := range []struct{ name, script string }{
		{"umask", `umask 0135; ` + start},
		{"working directory, working directory's inode", `exec env -C /usr "$1"`},
		{"arguments, number of arguments", start + ` more`},
		{"environment", `export A=1; ` + start},
		{"limit NOFILE", `ulimit -Sn 99; ` + start},
		{"descriptor 7", start + ` 7</dev/null`},
		{"descriptor 0", start + ` 0</etc/passwd`},
		{"nice", `exec nice -n 3 "$1"`},
		{"parent-death signal", `exec setpriv --pdeathsig TERM "$1"`},
		{"no_new_privs", `exec setpriv --no-new-privs "$1"`},
		{"leads its process group, leads its session", `exec setsid -w "$1"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var names []string
			for _, d := range Compare(plain, see(t, test.script)) {
				if d.Name != "controlling terminal" && d.Name != "in the terminal's foreground" {
					names = append(names, d.Name)
				}
			}
			if got := strings.Join(names, ", "); got != test.name {
				t.Errorf("%s changes %q", test.script, got)
			}
		})
	}
}

// TestStateHoldsNoSecret: a state is printed where many can read it.
func TestStateHoldsNoSecret(t *testing.T) {
	b, err := json.Marshal(see(t, `exec "$1"`, "API_TOKEN=canary-9d1f"))
	if err != nil || strings.Contains(string(b), "canary") {
		t.Errorf("%v: %s", err, b)
	}
}

func TestCompare(t *testing.T) {
	got := Compare(State{"a": "1", "b": "2", "pid": "7", "c": "3"}, State{"a": "1", "b": "3", "pid": "8", "d": "4"})
	want := []Difference{{"b", "2", "3"}, {"c", "3", Absent}, {"d", Absent, "4"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
