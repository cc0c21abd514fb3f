package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/e2e/dockertest"
	"github.com/tallyman-ci/tallyman/e2e/image/report"
	"github.com/tallyman-ci/tallyman/e2e/standin"
	"github.com/tallyman-ci/tallyman/install"
)

// The images of the tests.
const (
	official = "standin/actions-runner:official" // docker belongs to no package, as in the official image
	packaged = "standin/actions-runner:packaged" // docker comes from a package
	baked    = "tallyman/runner:official"
	bakedPkg = "tallyman/runner:packaged"
	carrier  = "tallyman/carrier:test"
)

// fixture is the daemon with the two bases.
type fixture struct {
	*dockertest.Daemon
	ctx    context.Context
	dir    string // on this machine, shared with containers as /shared
	bin    string // the binaries under test
	upDeb  string // docker's package, a later version
	inside string
}

var docker *fixture

// TestImage has one daemon for all its parts.
func TestImage(t *testing.T) {
	docker = &fixture{Daemon: dockertest.Require(t), dir: t.TempDir()}
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	docker.ctx = ctx
	docker.prepare(t)
	t.Run("builds", testBuilds)
	t.Run("job", testJob)
	t.Run("pod", testPod)
	t.Run("upgrade and uninstall", testUpgradeAndUninstall)
	t.Run("package after the image", testPackageAfterTheImage)
	t.Run("no daemon", testNoDaemon)
	t.Run("init container", testInitContainer)
}

// prepare builds the programs and the two bases.
func (d *fixture) prepare(t *testing.T) {
	t.Helper()
	if err := os.Chmod(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if d.bin = os.Getenv("TALLYMAN_E2E_BIN"); d.bin == "" {
		t.Fatal("TALLYMAN_E2E_BIN is not set: run make e2e, or make build and TALLYMAN_E2E_BIN=$PWD/bin go test ./e2e/image")
	}
	d.inside = filepath.Join(d.dir, "inside")
	build := exec.Command("go", "build", "-trimpath", "-o", d.inside, "./inside")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The runner's user reaches the daemon as one of the group docker.
	if err := errors.Join(os.Chmod(filepath.Dir(d.Socket()), 0o711), os.Chown(d.Socket(), 0, standin.DockerGID), os.Chmod(d.Socket(), 0o660)); err != nil {
		t.Fatal(err)
	}
	root := standin.Require(t)
	if err := withLibraries(root, d.CLI()); err != nil {
		t.Fatal(err)
	}
	debs := t.TempDir()
	version := func(number string) string { // the real client, and another file in each version
		program := filepath.Join(debs, "docker-"+number)
		if err := standin.CopyFile(d.CLI(), program); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(program, os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString("\nversion " + number + "\n")
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		deb, err := standin.Package(debs, "docker-ce-cli", number, map[string]string{"usr/bin/docker": program})
		if err != nil {
			t.Fatal(err)
		}
		return deb
	}
	first := version("1")
	d.upDeb = filepath.Join(d.dir, "docker-2.deb")
	if err := os.Rename(version("2"), d.upDeb); err != nil {
		t.Fatal(err)
	}

	inRoot := filepath.Join(root, "usr/bin/docker")
	if err := standin.CopyFile(d.CLI(), inRoot); err != nil {
		t.Fatal(err)
	}
	d.load(t, root, official)
	if err := os.Remove(inRoot); err != nil {
		t.Fatal(err)
	}
	if err := standin.CopyFile(first, filepath.Join(root, "tmp/1.deb")); err != nil {
		t.Fatal(err)
	}
	if _, err := standin.Run(root, "dpkg", "--install", "/tmp/1.deb"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(root, "tmp/1.deb")); err != nil {
		t.Fatal(err)
	}
	d.load(t, root, packaged)

	src := t.TempDir()
	if err := dockertest.WriteImage(src, d.Busybox(), "job"); err != nil {
		t.Fatal(err)
	}
	d.docker(t, "build", "--quiet", "--tag", "acme/tool:1", src)
}

// withLibraries copies the shared libraries that a program needs.
func withLibraries(root, program string) error {
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil // static
	}
	for line := range strings.Lines(string(out)) {
		for _, word := range strings.Fields(line) {
			if !strings.HasPrefix(word, "/") {
				continue
			}
			to := filepath.Join(root, word)
			if _, err := os.Stat(to); err == nil {
				continue
			}
			if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), standin.CopyFile(word, to)); err != nil {
				return err
			}
		}
	}
	return nil
}

// load makes an image of a root, with the official image's settings.
func (d *fixture) load(t *testing.T, root, ref string) {
	t.Helper()
	tar := exec.Command("tar", "--create", "--numeric-owner", "--directory", root, ".")
	pipe, err := tar.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tar.Start(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(d.ctx, d.CLI(), "import",
		"--change", "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "--change", "ENV ImageOS=ubuntu24",
		"--change", "WORKDIR /home/runner", "--change", "USER runner", "-", ref)
	cmd.Env, cmd.Stdin = d.env(), pipe
	out, err := cmd.CombinedOutput()
	if err := errors.Join(err, tar.Wait()); err != nil {
		t.Fatalf("import %s: %v: %s", ref, err, out)
	}
}

func (d *fixture) env(more ...string) []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.dir, "DOCKER_HOST=" + d.Host()}, more...)
}

func (d *fixture) docker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := d.Docker(d.ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// container runs an image as a pod runs it, until the test's end: with the daemon's
// socket where ARC has it, and this test's folder as /shared.
func (d *fixture) container(t *testing.T, image string, options ...string) (id string) {
	t.Helper()
	args := append([]string{"run", "--detach", "--volume", d.dir + ":/shared:ro", "--env", "DOCKER_HOST=unix:///var/run/docker.sock"}, options...)
	if !slices.Contains(options, "no-daemon=1") {
		args = append(args, "--volume", d.Socket()+":/var/run/docker.sock")
	}
	args = append(args, image, "/home/runner/run.sh")
	id = strings.TrimSpace(d.docker(t, args...))
	t.Cleanup(func() {
		if _, err := d.Docker(d.ctx, "rm", "--force", "--volumes", id); err != nil {
			t.Error(err)
		}
	})
	return id
}

// exec runs a command in a container as its user, or as root.
func (d *fixture) exec(t *testing.T, id string, argv ...string) string {
	t.Helper()
	return d.docker(t, append([]string{"exec", id}, argv...)...)
}

func (d *fixture) execRoot(t *testing.T, id string, argv ...string) string {
	t.Helper()
	return d.docker(t, append([]string{"exec", "--user", "0", id}, argv...)...)
}

func ask[T any](t *testing.T, d *fixture, options []string, id string, argv ...string) (value T) {
	t.Helper()
	out := d.docker(t, slices.Concat([]string{"exec"}, options, []string{id, "/shared/inside"}, argv)...)
	if err := json.Unmarshal([]byte(out), &value); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return value
}

// builder is one of the two that a docker command can have.
type builder struct {
	name string
	cli  string
	env  string
	args []string
}

// builders finds those that work here. The clients of Debian and of Docker differ in
// which they have.
var builders = sync.OnceValue(func() (found []builder) {
	clis := []string{docker.CLI(), "/usr/bin/docker", "/usr/local/bin/docker"}
	slices.Sort(clis)
	for _, b := range []builder{{name: "BuildKit", env: "DOCKER_BUILDKIT=1"}, {name: "classic", env: "DOCKER_BUILDKIT=0", args: []string{"--build-arg", "TARGETARCH=" + runtime.GOARCH}}} {
		for _, cli := range slices.Compact(clis) {
			b.cli = cli
			if _, err := b.build("-", strings.NewReader("FROM scratch\nLABEL a=b\n"), "--tag", "tallyman/probe"); err == nil {
				found = append(found, b)
				break
			}
		}
	}
	return found
})

func (b builder) build(context string, stdin io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(docker.ctx, b.cli, slices.Concat([]string{"build"}, b.args, args, []string{context})...)
	cmd.Env, cmd.Stdin = docker.env(b.env), stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", b.name, err, out)
	}
	return string(out), nil
}

// testBuilds builds each image with each builder; the last builder's images are used.
func testBuilds(t *testing.T) {
	if len(builders()) == 0 {
		t.Fatal("no docker client here can build anything")
	}
	dist := filepath.Join(t.TempDir(), "dist")
	files := filepath.Join(dist, "linux_"+runtime.GOARCH)
	if err := os.MkdirAll(files, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tallyman", "docker-shim"} {
		if err := standin.CopyFile(filepath.Join(docker.bin, name), filepath.Join(files, name)); err != nil {
			t.Fatal(err)
		}
	}
	for i, b := range builders() {
		for _, image := range []struct{ file, base, tag string }{
			{"Dockerfile", official, baked}, {"Dockerfile", packaged, bakedPkg}, {"carrier.Dockerfile", "", carrier},
		} {
			if image.tag == bakedPkg && i < len(builders())-1 {
				continue // once is enough
			}
			began := time.Now()
			if _, err := b.build(dist, nil, "--file", "../../runner-image/"+image.file, "--build-arg", "BASE="+image.base, "--tag", image.tag); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s builds %s in %.1f s", b.name, image.tag, time.Since(began).Seconds())
		}
	}
	size := func(ref string) (bytes int64) {
		if _, err := fmt.Sscan(docker.docker(t, "image", "inspect", "--format", "{{.Size}}", ref), &bytes); err != nil {
			t.Fatal(err)
		}
		return bytes
	}
	t.Logf("the image adds %.1f MB to its base, of which docker.original is %.1f MB, in a layer of its own; the carrier has %.1f MB",
		float64(size(baked)-size(official))/1e6, float64(fileSize(t, docker.CLI()))/1e6, float64(size(carrier))/1e6)
	var config []struct {
		Config struct {
			User       string
			Env        []string
			WorkingDir string
		}
	}
	if err := json.Unmarshal([]byte(docker.docker(t, "image", "inspect", baked)), &config); err != nil {
		t.Fatal(err)
	}
	c := config[0].Config
	if c.User != "runner" || c.WorkingDir != "/home/runner" || !slices.Contains(c.Env, "ImageOS=ubuntu24") {
		t.Errorf("the image does not end as its base does: %+v", c)
	}
	for _, want := range []string{"ACTIONS_RUNNER_HOOK_JOB_STARTED=" + install.HookStarted, "ACTIONS_RUNNER_HOOK_JOB_COMPLETED=" + install.HookCompleted} {
		if !slices.Contains(c.Env, want) {
			t.Errorf("%s is not in %v", want, c.Env)
		}
	}
}

func fileSize(t *testing.T, file string) int64 {
	t.Helper()
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// steps are a job that uses docker, without a network.
var steps = []string{"docker version", "docker run --rm --network none acme/tool:1 echo hello", "docker run --rm --network none acme/tool:1 false"}

// wantJob: the job ran as the runner's user, and nothing of ours failed it.
func wantJob(t *testing.T, job report.Job, codes ...int) {
	t.Helper()
	if job.UID != standin.RunnerUID {
		t.Errorf("the job ran as uid %d", job.UID)
	}
	if job.Started.Code != 0 || job.Completed.Code != 0 || job.Started.Held || job.Completed.Held {
		t.Errorf("hooks: %+v\n%+v", job.Started, job.Completed)
	}
	if len(job.Orphans) > 0 {
		t.Errorf("the runner killed %v", job.Orphans)
	}
	for i, want := range codes {
		if job.Steps[i].Code != want {
			t.Errorf("step %d ended with %d: %s%s", i+1, job.Steps[i].Code, job.Steps[i].Stdout, job.Steps[i].Stderr)
		}
	}
}

// call is what the tests look at in a record.
type call struct {
	ID   string `json:"id"`
	Kind string `json:"kind"`
	By   string `json:"by"`
	CI   struct {
		Repository string `json:"repository"`
		Workflow   string `json:"workflow"`
		Job        string `json:"job"`
	} `json:"ci"`
	Invocation struct {
		Tool    string `json:"tool"`
		Command string `json:"command"`
		UID     int    `json:"uid"`
	} `json:"invocation"`
}

// calls are the journal's records of docker calls, in the order of the calls.
func calls(t *testing.T, id string) (all []call) {
	t.Helper()
	for _, line := range ask[[]json.RawMessage](t, docker, []string{"--user", "0"}, id, "records", install.StateDir+"/journal") {
		var c call
		if err := json.Unmarshal(line, &c); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if c.Kind == "invocation" {
			all = append(all, c)
		}
	}
	// A call that the agent was too busy to acknowledge comes later, from the spool.
	slices.SortFunc(all, func(a, b call) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// wantCalls waits until these calls are in the journal, and no others: each with the
// name of its job and the runner's user.
func wantCalls(t *testing.T, id string, commands ...string) {
	t.Helper()
	var all []call
	for deadline := time.Now().Add(time.Minute); len(all) < len(commands) && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		all = calls(t, id)
	}
	var have []string
	for _, c := range all {
		have = append(have, c.Invocation.Command)
		if c.By != "sealed" || c.CI.Repository != "acme/shop" || c.CI.Workflow != "CI" || c.CI.Job != "build" ||
			c.Invocation.Tool != "docker" || c.Invocation.UID != standin.RunnerUID {
			t.Errorf("not the record of a call of this job: %+v", c)
		}
	}
	if !slices.Equal(have, commands) {
		t.Errorf("recorded %v, not %v", have, commands)
	}
}

// testJob runs a job in the image that is like the official one.
func testJob(t *testing.T) {
	id := docker.container(t, baked)
	job := ask[report.Job](t, docker, nil, id, append([]string{"job"}, steps...)...)
	wantJob(t, job, 0, 0, 1)
	if got := job.Steps[1].Stdout; got != "hello\n" {
		t.Errorf("the job's container said %q", got)
	}
	wantCalls(t, id, "version", "run", "run")
	if !strings.Contains(job.Summary, "docker") {
		t.Errorf("the job summary: %q", job.Summary)
	}
	out, err := docker.Docker(docker.ctx, "exec", id, "tallyman", "doctor")
	if err != nil || strings.Contains(out, "FAIL") || !strings.Contains(out, "is Tallyman's shim, and the first docker in PATH") || !strings.Contains(out, "(shims: 1, ") {
		t.Errorf("doctor: %v: %s", err, out)
	}
}

// testPod runs a job in the pod of arc/values-dind.yaml: an emptyDir over the folder for
// records, the ConfigMap over the configuration, and the volume with the daemon's socket
// over /var/run.
func testPod(t *testing.T) {
	etc, state, run := filepath.Join(docker.dir, "configmap"), filepath.Join(docker.dir, "emptydir"), filepath.Join(docker.dir, "dind-sock")
	for _, volume := range []string{state, run} {
		if err := errors.Join(os.Mkdir(volume, 0o777), os.Chmod(volume, 0o777)); err != nil {
			t.Fatal(err)
		}
	}
	conf := "run_dir = " + install.RunDirOnDisk + "\nspool_on_disk = true\nstatsd_tags = event_type action repo workflow\n"
	// As the kubelet lays out a ConfigMap: links, in a folder of mode 0777.
	data := filepath.Join(etc, "..2026_12_01")
	if err := errors.Join(os.MkdirAll(data, 0o755), os.WriteFile(filepath.Join(data, "tallyman.conf"), []byte(conf), 0o644),
		os.Symlink("..2026_12_01", filepath.Join(etc, "..data")), os.Symlink("..data/tallyman.conf", filepath.Join(etc, "tallyman.conf")),
		os.Chmod(etc, 0o777)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(run, "docker.sock"), nil, 0o666); err != nil { // what the socket is mounted over
		t.Fatal(err)
	}
	id := docker.container(t, baked, "--volume", etc+":/etc/tallyman:ro", "--volume", state+":"+install.StateDir, "--volume", run+":/var/run")
	docker.exec(t, id, "docker", "version") // as the runner does until the daemon answers
	job := ask[report.Job](t, docker, nil, id, append([]string{"job"}, steps...)...)
	wantJob(t, job, 0, 0, 1)
	wantCalls(t, id, "version", "run", "run")
	if out, err := docker.Docker(docker.ctx, "exec", id, "tallyman", "doctor"); err != nil || strings.Contains(out, "FAIL") {
		t.Errorf("doctor: %v: %s", err, out)
	}
}

// testUpgradeAndUninstall upgrades docker by its package manager, and then removes
// Tallyman: the tree is the base's, with the upgrade, to the byte.
func testUpgradeAndUninstall(t *testing.T) {
	plain := docker.container(t, packaged)
	docker.execRoot(t, plain, "dpkg", "--install", "/shared/docker-2.deb")

	id := docker.container(t, bakedPkg)
	docker.execRoot(t, id, "dpkg", "--install", "/shared/docker-2.deb")
	if out := docker.execRoot(t, id, "tail", "-c", "10", "/usr/bin/docker.original"); out != "version 2\n" {
		t.Errorf("after the upgrade the real docker ends in %q", out)
	}
	job := ask[report.Job](t, docker, nil, id, append([]string{"job"}, steps...)...)
	wantJob(t, job, 0, 0, 1)
	wantCalls(t, id, "version", "run", "run")
	docker.execRoot(t, id, "rm", "-rf", "/home/runner/_work", "/home/runner/_diag", "/home/runner/bin/Runner.Worker")
	wantRemoved(t, plain, id)
	if out := docker.execRoot(t, id, "dpkg-divert", "--list"); out != "" {
		t.Errorf("diversions that are left: %s", out)
	}

	// And where docker belongs to no package.
	wantRemoved(t, docker.container(t, official), docker.container(t, baked))
}

// wantRemoved removes Tallyman from a container: then all is as in the plain one.
func wantRemoved(t *testing.T, plain, id string) {
	t.Helper()
	docker.execRoot(t, id, "tallyman", "uninstall", "--purge")
	docker.execRoot(t, id, "rm", "-r", "/opt/tallyman") // what the Dockerfile's COPY brought
	root := []string{"--user", "0"}
	sameTree(t, ask[map[string]string](t, docker, root, plain, "tree"), ask[map[string]string](t, docker, root, id, "tree"))
	docker.exec(t, id, "docker", "version")
}

// sameTree compares trees of two containers, without what the daemon writes itself.
func sameTree(t *testing.T, before, after map[string]string) {
	t.Helper()
	for _, tree := range []map[string]string{before, after} {
		for name := range tree {
			switch {
			case slices.Contains([]string{"/.dockerenv", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/etc/mtab", "/"}, name),
				strings.HasPrefix(name, "/dev"), strings.HasPrefix(name, "/shared"), strings.HasPrefix(name, "/run"):
				delete(tree, name)
			}
		}
	}
	if len(before) < 100 {
		t.Errorf("a tree of %d files", len(before))
	}
	for _, said := range standin.Differences(before, after) {
		t.Error(said)
	}
}

// testPackageAfterTheImage: the official image's docker belongs to no package. One that
// is installed on top of ours is docker then, and install takes its place again.
func testPackageAfterTheImage(t *testing.T) {
	id := docker.container(t, baked)
	docker.execRoot(t, id, "dpkg", "--install", "/shared/docker-2.deb")
	docker.execRoot(t, id, "docker", "version")
	docker.execRoot(t, id, "tallyman", "install")
	if out := docker.execRoot(t, id, "tail", "-c", "10", "/usr/bin/docker.original"); out != "version 2\n" {
		t.Errorf("the real docker ends in %q", out)
	}
	job := ask[report.Job](t, docker, nil, id, append([]string{"job"}, steps...)...)
	wantJob(t, job, 0, 0, 1)
	wantCalls(t, id, "version", "run", "run")
}

// testNoDaemon is Kubernetes mode, where the runner has no daemon.
func testNoDaemon(t *testing.T) {
	id := docker.container(t, baked, "--env", "no-daemon=1", "--env", "ACTIONS_RUNNER_CONTAINER_HOOKS=/home/runner/k8s/index.js")
	job := ask[report.Job](t, docker, nil, id, "job", "echo no docker here", "docker version")
	wantJob(t, job, 0, 1)
	if len(job.Steps[1].Stderr) == 0 || !strings.Contains(job.Steps[1].Stderr, "docker.sock") {
		t.Errorf("docker's own message: %q", job.Steps[1].Stderr)
	}
	wantCalls(t, id, "version")
	if out, err := docker.Docker(docker.ctx, "exec", id, "tallyman", "doctor"); err != nil || strings.Contains(out, "FAIL") || !strings.Contains(out, "Kubernetes mode") {
		t.Errorf("doctor: %v: %s", err, out)
	}
	quiet := ask[report.Job](t, docker, nil, id, "job", "echo no docker here")
	wantJob(t, quiet, 0)
	if quiet.Summary != "" {
		t.Errorf("a job without docker got the summary %q", quiet.Summary)
	}
}

// testInitContainer runs the official image as it is, with what the carrier brought to
// volumes.
func testInitContainer(t *testing.T) {
	programs, node := filepath.Join(docker.dir, "programs"), filepath.Join(docker.dir, "node")
	state := filepath.Join(node, "runner-x7f2")
	for _, volume := range []string{programs, node} {
		if err := errors.Join(os.Mkdir(volume, 0o777), os.Chmod(volume, 0o777)); err != nil { // as an emptyDir
			t.Fatal(err)
		}
	}
	for range 2 { // a restarted pod runs it again
		docker.docker(t, "run", "--rm", "--network", "none", "--volume", programs+":/tallyman", "--volume", node+":/node",
			carrier, "carry", "--to", "/tallyman", "--state", "/node/runner-x7f2", "--user", "1001")
	}
	id := docker.container(t, official,
		"--volume", programs+":/opt/tallyman:ro", "--volume", programs+"/shims/docker:/usr/local/bin/docker:ro",
		"--volume", programs+"/etc:/etc/tallyman:ro", "--volume", state+":"+install.StateDir,
		"--env", "ACTIONS_RUNNER_HOOK_JOB_STARTED="+install.HookStarted, "--env", "ACTIONS_RUNNER_HOOK_JOB_COMPLETED="+install.HookCompleted)
	job := ask[report.Job](t, docker, nil, id, append([]string{"job"}, steps...)...)
	wantJob(t, job, 0, 0, 1)
	wantCalls(t, id, "version", "run", "run")
	if !strings.Contains(job.Summary, "docker") {
		t.Errorf("the job summary: %q", job.Summary)
	}
	if out, err := docker.Docker(docker.ctx, "exec", id, install.Program, "doctor"); strings.Contains(out, "FAIL") {
		t.Errorf("doctor: %v: %s", err, out)
	}

	docker.docker(t, "kill", id)
	adopt(t, node)
}

// adopt delivers what a dead pod left on the node, with the rights of the DaemonSet in
// runner-image/arc.
func adopt(t *testing.T, node string) {
	t.Helper()
	etc, out := filepath.Join(docker.dir, "adopter"), filepath.Join(docker.dir, "delivered")
	if err := errors.Join(os.Mkdir(etc, 0o755), os.Mkdir(out, 0o755), os.WriteFile(filepath.Join(etc, "tallyman.conf"), []byte("sinks = file:///out/records.jsonl\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	id := strings.TrimSpace(docker.docker(t, "run", "--detach", "--read-only", "--user", "0", "--network", "none",
		"--cap-drop", "ALL", "--cap-add", "DAC_OVERRIDE", "--cap-add", "FOWNER", "--security-opt", "no-new-privileges",
		"--volume", etc+":/etc/tallyman:ro", "--volume", node+":/var/lib/tallyman-runners", "--volume", out+":/out",
		carrier, "agent", "--adopt", "/var/lib/tallyman-runners", "--adopt-after", "1s", "--health", "127.0.0.1:9464", "--no-events"))
	t.Cleanup(func() {
		if _, err := docker.Docker(docker.ctx, "rm", "--force", id); err != nil {
			t.Error(err)
		}
	})
	deadline := time.Now().Add(time.Minute)
	for {
		data, _ := os.ReadFile(filepath.Join(out, "records.jsonl"))
		_, err := os.Stat(filepath.Join(node, "runner-x7f2/journal"))
		if n := strings.Count(string(data), `"kind":"invocation",`); n == len(steps) && errors.Is(err, os.ErrNotExist) {
			return
		} else if time.Now().After(deadline) {
			log, _ := docker.Docker(docker.ctx, "logs", id)
			t.Fatalf("%d calls were delivered, and the journal: %v\n%s", n, err, log)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
