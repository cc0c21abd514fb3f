package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

// EV-24: a docker context is not followed, and this is said where it would have chosen
// the daemon.
func TestSelectedDockerContext(t *testing.T) {
	faults.Case(t, "EV-24")
	for _, row := range []struct {
		environ []string
		host    string
		said    bool
	}{
		{[]string{"DOCKER_CONTEXT=remote"}, "", true},
		{[]string{"DOCKER_CONTEXT=remote", "DOCKER_HOST="}, "", true},
		{[]string{"DOCKER_CONTEXT=remote", "DOCKER_HOST=tcp://h:1"}, "", false},
		{[]string{"DOCKER_CONTEXT=remote"}, "unix:///x", false},
		{[]string{"DOCKER_CONTEXT=default"}, "", false},
		{[]string{"DOCKER_CONTEXT="}, "", false},
		{nil, "", false},
	} {
		var out bytes.Buffer
		p := program{environ: row.environ}
		p.warnOfContext(slog.New(slog.NewTextHandler(&out, nil)), row.host)
		if said := strings.Contains(out.String(), "DOCKER_CONTEXT=remote"); said != row.said {
			t.Errorf("%q with --host %q: said %q", row.environ, row.host, out.String())
		}
	}
}

// The streamers of one machine meet in the run folder, or in a folder that is the
// user's alone.
func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	run := filepath.Join(dir, "run", "tallyman")
	if got := lockDir(run); got != run {
		t.Errorf("%q, want %q", got, run)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	none := filepath.Join(dir, "file", "run")
	own := lockDir(none)
	if st, err := os.Stat(own); err != nil || filepath.Dir(own) != dir || st.Mode().Perm() != 0o700 {
		t.Fatalf("%q, %v", own, err)
	}
	// One that others may write to is not taken, nor a link.
	if err := os.Chmod(own, 0o777); err != nil {
		t.Fatal(err)
	}
	if got := lockDir(none); got != "" {
		t.Errorf("%q, want none", got)
	}
	if err := os.Rename(own, own+"-moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(own+"-moved", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(own+"-moved", own); err != nil {
		t.Fatal(err)
	}
	if got := lockDir(none); got != "" {
		t.Errorf("%q by a link, want none", got)
	}
}

// An address that can never be right ends the command; a daemon that is not up yet, and
// certificates that are not written yet, are waited for.
func TestCheckDaemon(t *testing.T) {
	for _, row := range []struct {
		host, variable string
		says           string
	}{
		{"", "", ""},
		{"unix:///not/there.sock", "", ""},
		{"tcp://[::1]:2376", "", ""},
		{"tcp://dind", "nonsense", ""},
		{"foo", "", "unix:///path or tcp://host:port"},
		{"/var/run/docker.sock", "", "unix:///path or tcp://host:port"},
		{"unix://", "", "names no socket"},
		{"tcp://host:port", "", "unix:///path or tcp://host:port"},
		{"ssh://user@host", "", "over ssh://"},
		{"npipe:////./pipe/docker_engine", "", "over npipe://"},
		{"", "ssh://user@host", "DOCKER_HOST: cannot reach a Docker daemon over ssh://"},
		{"", "tcp://user:hunter2@ho st:1", "DOCKER_HOST: the address"},
	} {
		p := program{environ: []string{"DOCKER_HOST=" + row.variable}}
		err := p.checkDaemon(row.host)
		switch {
		case row.says == "" && err != nil, row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)):
			t.Errorf("--host %q, DOCKER_HOST=%q: %v, want %q", row.host, row.variable, err, row.says)
		case err != nil && strings.Contains(err.Error(), "hunter2"):
			t.Errorf("the error holds the password: %v", err)
		}
	}
}
