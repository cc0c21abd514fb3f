package dockertest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDaemonBuildsRunsPullsAndMakesNetworks(t *testing.T) {
	d := Require(t)
	ctx := t.Context()
	const image = Registry + "/tools/hello:1"
	if err := d.Publish(ctx, image); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		args []string
		want string // in the output
		fail bool
	}{
		{args: []string{"image", "inspect", image}, fail: true, want: "No such image"},
		{args: []string{"pull", image}, want: "Downloaded newer image"},
		{args: []string{"pull", Registry + "/tools/absent:1"}, fail: true, want: "manifest unknown"},
		{args: []string{"pull", "example.com/far/away:1"}, fail: true, want: "example.com"},
		{args: []string{"run", "--rm", image, "cat", "/image"}, want: image},
		{args: []string{"run", "--rm", image, "sh", "-c", "exit 3"}, fail: true, want: "exit status 3"},
		{args: []string{"network", "create", "shop"}},
		{args: []string{"run", "--rm", "--network", "shop", image, "ls", "/sys/class/net"}, want: "eth0"},
		{args: []string{"network", "rm", "shop"}, want: "shop"},
	} {
		out, err := d.Docker(ctx, step.args...)
		if (err != nil) != step.fail {
			t.Fatalf("docker %v: error %v, want failure %v", step.args, err, step.fail)
		}
		if err != nil {
			out += err.Error()
		}
		if !strings.Contains(out, step.want) {
			t.Errorf("docker %v: output lacks %q:\n%s", step.args, step.want, out)
		}
	}
}

func TestKillEndsEverythingAndBootKeepsTheData(t *testing.T) {
	d := Require(t)
	ctx := t.Context()
	const image = Registry + "/tools/sleeper:1"
	if err := d.Publish(ctx, image); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Docker(ctx, "run", "--detach", "--name", "sleeper", image, "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	pid := d.proc.pid()
	inside := pidNamespace(t, pid)
	d.Kill()

	for deadline := time.Now().Add(5 * time.Second); ; {
		left := processesIn(t, inside)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes %v outlived dockerd", left)
		}
		time.Sleep(20 * time.Millisecond)
	}
	_, err := net.Dial("unix", d.Socket())
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("socket of a killed daemon: %v, want connection refused", err)
	}

	if err := d.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := d.Docker(ctx, "ps", "--all", "--format", "{{.Names}} {{.State}}")
	if err != nil || strings.TrimSpace(out) != "sleeper exited" {
		t.Errorf("after boot: %q, %v; want the container, exited", out, err)
	}
	if _, err := d.Docker(ctx, "pull", image); err != nil {
		t.Errorf("the registry lost its images: %v", err)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	d := Require(t)
	before := d.dir
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(before); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there (%v)", before, err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/" + d.cgroup, "/sys/fs/cgroup/*/" + d.cgroup} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("cgroups are still there: %v", left)
		}
	}
	if err := d.Stop(); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func TestBootSaysWhyTheDaemonEnded(t *testing.T) {
	d := Require(t)
	d.Kill()
	if err := os.RemoveAll(d.path("data")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.path("data"), nil, 0o644); err != nil { // a file where a directory must be
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := d.Boot(ctx)
	if err == nil || !strings.Contains(err.Error(), "dockerd ended") || !strings.Contains(err.Error(), "Unable to get the full path to root") {
		t.Errorf("Boot: %v, want the daemon's own words", err)
	}
}

func TestAMissingToolIsNamedWithItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Start(t.Context())
	if !errors.Is(err, ErrUnavailable) {
		t.Fatalf("Start without tools in PATH: %v, want ErrUnavailable", err)
	}
	want := "apt-get install"
	if os.Geteuid() != 0 {
		want = "sudo"
	}
	if !strings.Contains(err.Error(), want) {
		t.Errorf("Start: %v, want advice with %q", err, want)
	}
}

func pidNamespace(t *testing.T, pid int) string {
	t.Helper()
	ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns", "pid"))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func processesIn(t *testing.T, ns string) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	var in []string
	for _, link := range links {
		if got, err := os.Readlink(link); err == nil && got == ns {
			in = append(in, strings.Split(link, "/")[2])
		}
	}
	return in
}
