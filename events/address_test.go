package events

import (
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

// The first rows are what `docker -H` of docker/cli 28 connects to.
func TestAddress(t *testing.T) {
	faults.Case(t, "EV-24")
	for _, row := range []struct{ in, tls, want, says string }{
		{"tcp://127.0.0.1", "", "tcp://127.0.0.1:2375", ""},
		{"tcp://127.0.0.1", "1", "tcp://127.0.0.1:2376", ""},
		{"tcp://:1", "", "tcp://localhost:1", ""},
		{"tcp://", "", "tcp://localhost:2375", ""},
		{"tcp://user:hunter2@127.0.0.1:1", "", "tcp://127.0.0.1:1", ""},
		{"tcp://127.0.0.1:1?token=hunter2", "", "tcp://127.0.0.1:1", ""},
		{"127.0.0.1:1", "", "tcp://127.0.0.1:1", ""},
		{"user:hunter2@dind:1", "", "", "cannot be read"},

		{"", "", "", ""},
		{"unix:///var/run/docker.sock", "", "unix:///var/run/docker.sock", ""},
		{"unix://docker.sock", "", "unix://docker.sock", ""},
		{"tcp://[::1]:2376", "", "tcp://[::1]:2376", ""},
		{"tcp://[::1]", "", "tcp://[::1]:2375", ""},
		{"tcp://dind:2376/base%20path", "", "tcp://dind:2376/base%20path", ""},
		{"dind:2375", "1", "tcp://dind:2375", ""},

		{"foo", "", "", "unix:///path or tcp://host:port"},
		{"hunter2", "", "", "cannot be read"},
		{"/var/run/docker.sock", "", "", "unix:///path or tcp://host:port"},
		{"://x", "", "", "cannot be read"},
		{" ", "", "", "cannot be read"},
		{"unix://", "", "", "names no socket"},
		{"tcp:///x", "", "", "names no host"},
		{"tcp://host:port", "", "", "cannot be read"},
		{"host:port", "", "", "cannot be read"},
		{"tcp://h:99999", "", "", "1 to 65535"},
		{"tcp://h:0", "", "", "1 to 65535"},
		{"h:99999", "", "", "1 to 65535"},
		{"tcp://user:hunter2@ho st:1", "", "", "cannot be read"},
		{"ssh://user:hunter2@host", "", "", "over ssh://"},
		{"npipe:////./pipe/docker_engine", "", "", "over npipe://"},
		{"fd://", "", "", "over fd://"},
		{"http://127.0.0.1:2375", "", "", "over http://"},
		{"user:hunter2://host", "", "", "over its scheme"},
		{"hunter2hunter2hunter2://host", "", "", "over its scheme"},
	} {
		t.Setenv("DOCKER_TLS_VERIFY", row.tls)
		got, err := Address(row.in)
		if got != row.want || (err == nil) != (row.says == "") || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%q: %q, %v; want %q, %q", row.in, got, err, row.want, row.says)
			continue
		}
		if strings.Contains(got, "hunter2") || err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: the password is shown: %q, %v", row.in, got, err)
		}
		if again, err := Address(got); got != "" && (again != got || err != nil) {
			t.Errorf("%q read again is %q, %v", got, again, err)
		}
		if row.want == "" {
			continue
		}
		d, err := openDaemon(row.in)
		if err != nil {
			if row.tls == "" { // else there are no certificates
				t.Errorf("%q: %v", row.in, err)
			}
			continue
		}
		if d.host() != row.want {
			t.Errorf("%q: the client talks to %q", row.in, d.host())
		}
		d.close()
	}
}
