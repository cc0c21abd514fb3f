package selftest

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// secretCases search everything that Tallyman wrote for a canary.
var secretCases = []fault{
	{"SE-01", "a canary as the value of many kinds of arguments", "it is in no record, journal, log or output, in no form", secretArguments},
	{"SE-03", "a canary in 60 variables that are not on the list of recorded ones", "it is in no record, journal, log or output", secretVariables},
	{"SE-07", "nothing", "append files are 0600, and the folder cannot be listed by others", fileModes},
}

// canary is a secret of this run, and the forms in which it could get out.
func canary() (secret string, forms [][]byte) {
	b := make([]byte, 9)
	rand.Read(b)
	secret = "cAn4ry" + hex.EncodeToString(b)
	forms = [][]byte{[]byte(secret), []byte(url.QueryEscape(secret)), []byte(hex.EncodeToString([]byte(secret)))}
	for i := range 3 { // base64 in its three alignments, without what neighbours change
		text := base64.StdEncoding.EncodeToString(append(make([]byte, i), secret...))
		forms = append(forms, []byte(strings.TrimRight(text, "=")[4:len(text)-4]))
	}
	return secret, forms
}

// commands are command lines in which $ stands for the secret.
var commands = [][]string{
	{"login", "-u", "someone", "-p", "$", "registry.example"},
	{"login", "--password=$", "-u$", "registry.example"},
	{"build", "--build-arg", "NPM_TOKEN=$", "--secret", "id=npm,env=$", "-t", "app:1", "https://user:$@git.example/r.git#main"},
	{"build", "--build-arg=A=$", "--label", "x=$", "--cache-to", "type=registry,ref=r/x,token=$", "."},
	{"run", "-e", "PASSWORD=$", "--env=B=$", "-v", "/run/$:/x", "--name", "$", "alpine:3", "sh", "-c", "curl -H 'Authorization: Bearer $'"},
	{"run", "--unknown-flag", "$", "--other=$", "alpine:3", "$"},
	{"exec", "-it", "-e", "K=$", "web", "psql", "postgres://u:$@db/x"},
	{"-H", "tcp://user:$@10.0.0.1:2376", "--config", "/home/$", "ps", "--filter", "label=$"},
	{"buildx", "build", "--build-context", "a=https://$@h/x", "--output", "type=image,push=true,x=$", "--opt", "$", "."},
	{"compose", "-f", "$.yml", "-p", "$", "run", "-e", "T=$", "web", "$"},
	{"pull", "registry.example/x@$"},
	{"$", "$", "--$=1", "-$"},
	{"service", "create", "--with-registry-auth", "--env", "A=$", "--host", "h:$", "nginx"},
	{"swarm", "join", "--token", "SWMTKN-1-$", "10.0.0.1:2377"},
}

func secretArguments(ctx context.Context, r *rig) (string, error) {
	secret, forms := canary()
	var calls []call
	for _, c := range commands {
		args := []string{"true"}
		for _, a := range c {
			args = append(args, strings.ReplaceAll(a, "$", secret))
		}
		// The job has it in a variable too, as the runner's secrets are (rule R6).
		calls = append(calls, call{args: args, env: []string{"REGISTRY_TOKEN=" + secret}})
	}
	encoded := base64.StdEncoding.EncodeToString([]byte("user:" + secret))
	calls = append(calls, call{args: []string{"true", "run", "--label", encoded, "alpine:3"}, env: []string{"REGISTRY_TOKEN=" + secret}})
	return r.search(ctx, calls, forms)
}

func secretVariables(ctx context.Context, r *rig) (string, error) {
	secret, forms := canary()
	env := []string{"GITHUB_REPOSITORY=octo/shop", "GITHUB_RUN_ID=42"}
	for _, name := range []string{"GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_CACHE_URL", "INPUT_PASSWORD", "AWS_SECRET_ACCESS_KEY",
		"GITHUB_ENV", "GITHUB_PATH", "GITHUB_STATE", "GITHUB_EVENT_PATH", "DOCKER_AUTH_CONFIG", "DOCKER_PASSWORD", "NPM_TOKEN", "SUDO_COMMAND", "LD_LIBRARY", "DD_API_KEY"} {
		env = append(env, name+"="+secret)
	}
	for i := range 44 {
		env = append(env, fmt.Sprintf("JOB_VARIABLE_%d=%s", i, secret))
	}
	env = append(env, "DOCKER_HOST=tcp://u:"+secret+"@10.0.0.1:2376", "DOCKER_CONTEXT="+secret)
	return r.search(ctx, []call{{args: []string{"true", "pull", "alpine:3"}, env: env}, {args: []string{"true", "build", "-t", "app", "."}, env: env}}, forms)
}

// search makes calls once with an agent and once without, and looks for the needles in
// all that came of them.
func (r *rig) search(ctx context.Context, calls []call, needles [][]byte) (string, error) {
	if r.off != "" {
		return "", cannot("%s", r.off)
	}
	plain, err := trivial(nil)
	if err != nil {
		return "", err
	}
	looked := 0
	for _, withAgent := range []bool{true, false} {
		p, err := r.newPlace(plain.Path)
		if err != nil {
			return "", err
		}
		var a *agentProcess
		if withAgent {
			if a, err = p.agent(ctx); err != nil {
				return "", err
			}
			defer a.stop()
		}
		for _, c := range calls {
			c.path = p.docker
			if !strings.HasSuffix(plain.Path, "true") {
				c.args[0] = "sh"
			}
			o, err := r.do(ctx, c)
			if err != nil {
				return "", err
			}
			if strings.HasSuffix(plain.Path, "true") && (o.status != 0 || o.stdout+o.stderr != "") {
				return "", fmt.Errorf("the command: %s", o)
			}
			if contains([]byte(o.stdout+o.stderr), needles) && strings.HasSuffix(plain.Path, "true") {
				return "", errors.New("the canary is in the shim's own output")
			}
		}
		if a != nil {
			if err := wait(ctx, func() error {
				ended, err := endsByPID(p)
				if err == nil && len(ended) < len(calls) {
					err = fmt.Errorf("the journal has the ends of %d of %d commands", len(ended), len(calls))
				}
				return err
			}); err != nil {
				return "", err
			}
			if err := a.stop(); err != nil {
				return "", err
			}
		} else if err := p.expectSpooled(len(calls)); err != nil {
			return "", err
		}
		for _, dir := range []string{p.state, p.run} {
			n, err := searchFiles(dir, needles)
			if err != nil {
				return "", err
			}
			looked += n
		}
	}
	if looked == 0 {
		return "", errors.New("there was nothing to search: no record was written")
	}
	return fmt.Sprintf("%d command lines, twice; not found in %d bytes of journal, append files and the agent's debug log", len(calls), looked), nil
}

// searchFiles returns how many bytes it looked at.
func searchFiles(dir string, needles [][]byte) (n int, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil && contains(b, needles) {
			err = fmt.Errorf("the canary is in %s", filepath.Base(path))
		}
		n += len(b)
		return err
	})
	return n, err
}

func fileModes(ctx context.Context, r *rig) (string, error) {
	p, err := r.newPlace("")
	if err != nil {
		return "", err
	}
	o, err := p.unharmed(ctx, func(c *call) {
		c.args = []string{"sh", "-c", `umask 0; exec "$0" -c "exit 23"`, c.path}
		c.path = r.sh
	})
	if err == nil {
		err = p.expectSpooled(1)
	}
	if err != nil {
		return "", err
	}
	st, err := os.Stat(p.file)
	if err == nil && st.Mode().Perm() != 0o600 {
		err = fmt.Errorf("the append file has mode %v", st.Mode())
	}
	return told(o, "0600 with umask 0 too"), err
}
