package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

// canaries are secrets of a job, each in one place, by the place's name.
type canaries struct {
	all   map[string]string
	count int
}

// strange returns a secret that nothing tells from other text but the place it stands in.
func (c *canaries) strange(place string) string {
	c.count++
	secret := fmt.Sprintf("Wk%04dcanary%dq", 7919*c.count%10000, c.count)
	c.all[place] = secret
	return secret
}

// token returns a secret that has the shape of one, for places where other text is shown.
func (c *canaries) token(place string) string {
	c.count++
	secret := fmt.Sprintf("canary%dxQ7zR2mK9pL4vT8w", c.count)
	c.all[place] = secret
	return "ghp_" + secret
}

// TestNoSecretLeavesTheShim plants secrets in all places of command lines, environments,
// images, containers and events that a job has, takes the records through everything that
// Tallyman is made of, and searches every file and stream of its own for them.
func TestNoSecretLeavesTheShim(t *testing.T) {
	for _, argv := range []bool{false, true} {
		t.Run(fmt.Sprintf("record_argv=%v", argv), func(t *testing.T) {
			faults.Case(t, "SE-01", "SE-03")
			noSecretLeaves(t, argv)
		})
	}
}

func noSecretLeaves(t *testing.T, argv bool) {
	statsd := captureStatsd(t)
	copied := filepath.Join(t.TempDir(), "records.jsonl")
	r := newRig(t, "statsd = "+statsd.address, "event_labels = com.example.team", fmt.Sprintf("record_argv = %v", argv),
		"sinks = file://"+copied+" stdout:", "summary = always")
	r.runner.Env = append(r.runner.Env, "TALLYMAN_LOG_LEVEL=debug")

	plant := &canaries{all: map[string]string{}}
	streams := &outputs{text: map[string]string{}}

	// What other programs of the job may leave where the agent reads. It stays in that file,
	// and the beginning of the file in spool.json, by which the agent knows it again.
	junk := &canaries{all: map[string]string{}, count: 1000}
	spool := filepath.Join(r.inst.Spool(), "0.jsonl")
	if err := os.WriteFile(spool, []byte(`{"id":"broken","secret":"`+junk.strange("a torn line of the spool")+"\n"+junk.strange("no record in the spool")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	agent := r.agentWithOutput(streams)

	// Not r.job: how long hooks take is the business of other tests.
	job, err := r.runner.Start(t.Context(), shopBuild)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(job.Kill)
	streams.add("job-started", job.Started.Stdout+job.Started.Stderr)
	env := []string{"COMPOSE_PROJECT_NAME=x"}
	for _, name := range strings.Fields(`GITHUB_TOKEN ACTIONS_RUNTIME_TOKEN ACTIONS_ID_TOKEN_REQUEST_TOKEN ACTIONS_CACHE_URL INPUT_TOKEN INPUT_ANYTHING
		GITHUB_SOMETHING_NEW GITHUB_API_URL GITHUB_BASE_REF RUNNER_SOMETHING NPM_TOKEN NODE_AUTH_TOKEN PYPI_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
		AZURE_CLIENT_SECRET GOOGLE_CREDENTIALS DB_PASSWORD DATABASE_URL REDIS_URL SENTRY_DSN SLACK_WEBHOOK SSH_PRIVATE_KEY VAULT_TOKEN GH_PAT API_KEY
		MY_SETTING MY_OTHER_SETTING TWINE_PASSWORD GPG_PASSPHRASE DOCKER_PASSWORD DOCKER_AUTH_CONFIG BUILDX_METADATA KUBE_TOKEN SONAR_TOKEN SNYK_TOKEN
		CODECOV_TOKEN DATADOG_API_KEY NEW_RELIC_KEY STRIPE_KEY TWILIO_TOKEN SENDGRID_KEY HF_TOKEN OPENAI_KEY CARGO_TOKEN GEM_TOKEN NUGET_KEY COSIGN_PASSWORD
		SIGNING_KEY LICENSE_KEY PROXY_AUTH LDAP_PASS SMTP_PASS SERVICE_PWD`) {
		env = append(env, name+"="+plant.strange("the variable "+name))
	}
	own := plant.strange("a secret of the job in argv")
	env = append(env, "DEPLOY_SECRET="+own)

	base := filepath.Join(r.runner.Root, "context")
	if err := os.MkdirAll(base, 0o755); err != nil {
		t.Fatal(err)
	}
	dockerfile := "FROM " + image + "\nARG PASSWORD\nLABEL built.secret=" + plant.strange("a label in a Dockerfile") + "\nENV BAKED=" + plant.strange("a variable of an image") + "\n"
	if err := os.WriteFile(filepath.Join(base, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	// '|| true': what these answer is docker's affair.
	steps := []string{
		"docker build -q --build-arg PASSWORD=" + plant.strange("a build argument") + " --label a.b=" + plant.strange("a label of a build") + " -t app:1 " + base,
		"docker run --rm -e A=" + plant.strange("a variable of a container") + " --label x=" + plant.strange("a label of a container") +
			" --label com.example.team=payments -l y=" + plant.strange("another label") + " app:1 sh -c 'echo " + plant.strange("an argument of a container") + " >/dev/null'",
		"docker run --name worker -d -h " + plant.strange("a host name") + " app:1 sleep 600",
		"docker exec -e B=" + plant.strange("a variable of an exec") + " worker sh -c 'true " + plant.strange("an argument of an exec") + "'",
		"docker exec worker true --password=" + plant.strange("a flag of an exec's command"),
		"docker exec worker " + plant.strange("a command that is missing") + " || true",
		"docker commit --change 'ENV C=" + plant.strange("a change of a commit") + "' -m " + plant.strange("a message of a commit") + " worker app:2",
		"docker rm -f worker",
		"docker run --rm --name job-" + plant.token("a token in a container's name") + " --label com.example.team=" + plant.token("a token in a label that is recorded") + " app:1 true",
		"docker tag app:1 app:" + plant.token("a token in a tag"),
		"docker volume create v-" + plant.token("a token in a volume's name"),
		"docker network create n-" + plant.token("a token in a network's name"),
		"docker volume create --label v=" + plant.strange("a label of a volume") + " vol1",
		"docker network create --label n=" + plant.strange("a label of a network") + " net1",
		"docker login -u " + plant.strange("a user of a login") + " -p" + plant.strange("a password of a login") + " 127.0.0.1:1 || true",
		"docker -H tcp://u:" + plant.strange("a password of a daemon's address") + "@127.0.0.1:1 ps || true",
		"docker build https://u:" + plant.strange("a password in a URL") + "@127.0.0.1:1/x.git?sig=" + plant.strange("a query") + " || true",
		"docker build https://" + plant.token("a token as user of a URL") + "@127.0.0.1:1/x.git || true",
		"docker pull localhost:5000/" + plant.token("a token in an image") + ":1 || true",
		"docker frobnicate --token " + plant.strange("a flag of an unknown command") + " || true",
		"docker run --future-flag=" + plant.strange("an unknown flag") + " app:1 || true",
		"docker volume rm " + own + " || true",
		"docker volume rm " + base64.StdEncoding.EncodeToString([]byte("user:"+own)) + " || true",
		"docker volume rm " + hex.EncodeToString([]byte(own)) + " || true",
		"docker build -f /x/" + own + " " + base + " || true",
		"docker build 'Authorization: Basic " + plant.strange("a header") + "' || true",
	}
	for i, script := range steps {
		result := r.step(job, fmt.Sprintf("step-%d", i), 0, script, env...)
		if i == 0 && result.Code != 0 {
			t.Fatal("nothing was built")
		}
	}
	// One command of which even the name of the calling folder is a secret.
	hidden := filepath.Join(job.Workspace, plant.token("a folder's name"))
	if err := os.MkdirAll(hidden, 0o755); err != nil {
		t.Fatal(err)
	}
	r.step(job, "folder", 0, "cd "+hidden+" && docker version", env...)
	// What is no message of ours on the agent's socket.
	for _, text := range []string{plant.strange("junk on the socket"), `{"id":"` + plant.strange("a broken record on the socket")} {
		if err := sendToSocket(r.inst.Socket(), text); err != nil {
			t.Fatal(err)
		}
	}

	want := len(steps) + 1
	eventually(t, 60*time.Second, func() error {
		records, err := r.inst.Records()
		if err != nil {
			return err
		}
		calls, ends, execs := 0, 0, 0
		for _, rec := range distinct(t, records) {
			switch {
			case rec.Kind == record.KindInvocation:
				calls++
			case rec.Kind == record.KindInvocationEnd:
				ends++
			case rec.Kind == record.KindEvent && rec.Event.Action == "exec_die":
				execs++
			}
		}
		if calls < want || ends < want || execs < 2 {
			return fmt.Errorf("%d calls, %d ends, %d execs recorded; want %d, %d, 2", calls, ends, execs, want, want)
		}
		return nil
	})
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"doctor"}, {"doctor", "--json"}, {"report"}, {"report", "--json"}, {"report", "--markdown"},
		{"report", "--summary"}, {"report", "--kind", "event", "--json"}} {
		out, err := r.tallyman(args...)
		if err != nil && args[0] != "doctor" { // which finds faults with every test's installation
			t.Error(err)
		}
		streams.add("tallyman "+strings.Join(args, " "), out)
	}
	completed, _, err := job.Complete(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	streams.add("job-completed", completed.Stdout+completed.Stderr)
	summary, err := os.ReadFile(job.Summary)
	if err != nil {
		t.Fatal(err)
	}
	streams.add("job summary", string(summary))
	if err := agent(); err != nil {
		t.Fatal(err)
	}

	// The record is what it should be, or nothing would be found in it either.
	var lines []record.Record
	for _, rec := range ofKind(r.records(), record.KindInvocation) {
		if (len(rec.Invocation.Argv) > 0) != argv {
			t.Errorf("record_argv = %v: argv %q", argv, rec.Invocation.Argv)
		}
		lines = append(lines, rec)
	}
	if len(lines) < want {
		t.Errorf("%d invocations, want %d", len(lines), want)
	}
	if argv && !slices.ContainsFunc(lines, func(rec record.Record) bool {
		return slices.Contains(rec.Invocation.Argv, "PASSWORD=[REDACTED]") && slices.Contains(rec.Invocation.Argv, "app:1")
	}) {
		t.Error("no redacted command line of the build")
	}
	if !slices.ContainsFunc(r.records(), func(rec record.Record) bool {
		return rec.Event != nil && slices.ContainsFunc(rec.Event.Labels, func(a record.Attr) bool { return a.Key == "com.example.team" && a.Value == "payments" })
	}) {
		t.Error("the label that the configuration lists is gone")
	}

	streams.add("DogStatsD", statsd.text())
	searched := streams.search(t, plant) + streams.search(t, junk)
	for _, dir := range []string{r.inst.State(), r.inst.Run, r.inst.Bin(), filepath.Dir(copied)} {
		searched += searchFiles(t, dir, "", plant)
	}
	for _, dir := range []string{r.inst.State(), filepath.Dir(copied)} {
		searched += searchFiles(t, dir, "spool.json", junk)
	}
	for _, stream := range []string{"stdout of the agent", "stderr of the agent", "DogStatsD", "job summary"} {
		if streams.size(stream) == 0 {
			t.Errorf("nothing was caught of %s", stream)
		}
	}
	if info, err := os.Stat(copied); err != nil || info.Size() == 0 {
		t.Errorf("the file sink wrote nothing: %v", err)
	}
	t.Logf("%d secrets searched for in %d bytes", len(plant.all), searched)
}

// agentWithOutput runs the agent in the foreground with all that it writes caught, and
// returns what ends it.
func (r *rig) agentWithOutput(streams *outputs) (stop func() error) {
	r.t.Helper()
	cmd := exec.Command(r.inst.Tallyman(), "agent", "--log-level", "debug")
	cmd.Env, cmd.Dir = r.runner.Env, "/"
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	stop = sync.OnceValue(func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		var err error
		select {
		case err = <-done:
		case <-time.After(60 * time.Second):
			cmd.Process.Kill()
			err = errors.Join(errors.New("the agent did not end on SIGTERM"), <-done)
		}
		streams.add("stdout of the agent", stdout.String())
		streams.add("stderr of the agent", stderr.String())
		return err
	})
	r.t.Cleanup(func() { stop() })
	eventually(r.t, 30*time.Second, r.agentAnswers)
	return stop
}

// outputs are the streams that were caught, by name.
type outputs struct {
	mu   sync.Mutex
	text map[string]string
}

func (o *outputs) add(name, text string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text[name] += text
}

func (o *outputs) size(name string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.text[name])
}

func (o *outputs) search(t *testing.T, plant *canaries) (bytes int) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, text := range o.text {
		searchText(t, name, text, plant)
		bytes += len(text)
	}
	return bytes
}

// searchFiles searches every file below dir, and the names of files. Programs are left
// out, and links, and files of one name.
func searchFiles(t *testing.T, dir, except string, plant *canaries) (bytes int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || entry.Name() == except {
			return err
		}
		info, err := entry.Info()
		if err != nil || info.Mode()&0o111 != 0 {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		searchText(t, path, path+"\n"+string(data), plant)
		bytes += len(data)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return bytes
}

// searchText looks for each secret as it is, escaped for a URL, in hexadecimal, and in
// base64 at any alignment.
func searchText(t *testing.T, name, text string, plant *canaries) {
	t.Helper()
	for place, secret := range plant.all {
		forms := []string{secret, url.QueryEscape(secret), hex.EncodeToString([]byte(secret)), strings.ToUpper(hex.EncodeToString([]byte(secret)))}
		for shift := range 3 {
			whole := secret[shift:]
			forms = append(forms, base64.StdEncoding.EncodeToString([]byte(whole[:len(whole)/3*3])))
		}
		for _, form := range forms {
			if i := strings.Index(text, form); i >= 0 {
				t.Errorf("%s is in %s: ...%s...", place, name, text[max(0, i-200):min(len(text), i+len(form)+60)])
				break
			}
		}
	}
}

// sendToSocket sends one message to the agent's socket, and waits for nothing.
func sendToSocket(path, text string) error {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	return syscall.Sendto(fd, []byte(text), syscall.MSG_NOSIGNAL, nil)
}

// statsdCapture keeps every packet.
type statsdCapture struct {
	address string
	mu      sync.Mutex
	caught  strings.Builder
}

func captureStatsd(t *testing.T) *statsdCapture {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &statsdCapture{address: conn.LocalAddr().String()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.caught.Write(buf[:n])
			s.caught.WriteByte('\n')
			s.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return s
}

func (s *statsdCapture) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.caught.String()
}
