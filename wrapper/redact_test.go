package wrapper

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/internal/require"
	"github.com/tallyman-ci/tallyman/record"
)

// A lineMaker writes a docker command line with secrets in it. Its choices come from
// data, so that a fuzzer can change one of them without the others, and from a hash of
// data when that is used up.
type lineMaker struct {
	data    []byte
	hash    [32]byte
	hashed  int
	args    []string
	environ []string
	plants  []string // what must not be found in the record, in any form
	where   []string // where each was planted, for the failure's text
}

// n returns a number below max.
func (m *lineMaker) n(max int) int {
	if len(m.data) < 2 {
		if m.hashed%16 == 0 {
			m.hash = sha256.Sum256(m.hash[:])
		}
		v := binary.LittleEndian.Uint16(m.hash[2*(m.hashed%16):])
		m.hashed++
		return int(v) % max
	}
	v := binary.LittleEndian.Uint16(m.data)
	m.data = m.data[2:]
	return int(v) % max
}

func (m *lineMaker) one(in int) bool { return m.n(in) == 0 }

func pick[T any](m *lineMaker, from []T) T { return from[m.n(len(from))] }

const (
	lowerDigits = "abcdefghijklmnopqrstuvwxyz0123456789"
	letters     = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
)

func (m *lineMaker) chars(n int, from string) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = from[m.n(len(from))]
	}
	return string(b)
}

// distinct returns n different characters, which is as random as n characters can be.
func (m *lineMaker) distinct(n int, from string) string {
	b := []byte(from)
	for i := range n {
		j := i + m.n(len(b)-i)
		b[i], b[j] = b[j], b[i]
	}
	return string(b[:n])
}

func (m *lineMaker) plant(secret, where string) string {
	m.plants = append(m.plants, secret)
	m.where = append(m.where, where)
	return secret
}

// weak returns a secret that nothing tells from other text: it must not be seen where
// values are dropped unread. It is no name either.
func (m *lineMaker) weak(where string) string {
	return m.plant(pick(m, []string{"Wk!", "wk%", "wk ", "Wk;"})+m.chars(8, lowerDigits)+pick(m, []string{"", "=", ",x", ":1", "\n", "\"", "'", "\u2028", "\xff"}), where+" (weak)")
}

// weakWord is one without any character that means something to anybody.
func (m *lineMaker) weakWord(where string) string {
	return m.plant("hunter"+m.chars(8, lowerDigits), where+" (weak)")
}

// strong returns a secret that must be found wherever it stands: of a token's shape,
// random, or one of the job's own in some encoding.
func (m *lineMaker) strong(where string) string {
	switch m.n(4) {
	case 0:
		prefix := pick(m, []string{"ghp_", "github_pat_", "glpat-", "dckr_pat_", "AKIA", "xoxb-", "sk_live_", "SWMTKN-1-"})
		from := letters
		if prefix == "AKIA" {
			from = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
		}
		return prefix + m.plant(m.chars(16+m.n(20), from), where+" (token)")
	case 1:
		return m.plant(m.distinct(24, letters), where+" (random)")
	case 2:
		return m.plant(m.distinct(24, lowerDigits), where+" (random, small)")
	}
	return m.own(where)
}

// own makes a secret of the job, and returns it in one of its forms.
func (m *lineMaker) own(where string) string {
	secret := pick(m, []string{"", "p@ss ", "x+y/", "\u00f6\u00e4", "qu\"ote\\", "100%"}) + m.chars(6+m.n(24), letters)
	name := pick(m, []string{"NPM_TOKEN", "DB_PASSWORD", "MY_SECRET", "X_API_KEY", "GH_PAT", "A_DSN", "SLACK_WEBHOOK", "GITHUB_TOKEN", "INPUT_PASSWORD", "ACTIONS_RUNTIME_TOKEN",
		"INPUT_MY-PAT", "GPG_PASSPHRASE", "PASS"})
	plain := strings.Trim(secret, letters) == "" // no character that means something in a URL or a list
	value := secret
	switch m.n(12) {
	case 0, 1:
		value = "line one of it\n" + secret + "\nlast line here"
	case 2:
		value = "line one of it\r\n" + secret + "\r\n"
	case 3, 4:
		text, _ := json.MarshalIndent(map[string]any{"project": "acme", "hosts": []any{map[string]any{"user": "u", pick(m, []string{"password", "auth", "private_key"}): secret}}}, "", pick(m, []string{"", " "}))
		value = string(text)
	case 5:
		if plain {
			value = pick(m, []string{"user:", "postgres://u:", "https://"}) + secret
			if strings.Contains(value, "//") {
				value += "@h.test/x?y=1"
			}
		}
	case 6:
		if plain {
			name, value = "INPUT_SECRETS", "A=1\nGIT_AUTH="+secret+"\nB=\"2\""
		}
	case 7:
		if plain {
			value = "Authorization: Bearer " + secret
		}
	}
	m.environ = append(m.environ, name+"="+value)
	m.plant(secret, where+" (the job's own)")
	text := strings.Repeat("u", m.n(3)) + secret + strings.Repeat("z", m.n(3))
	switch m.n(9) {
	case 0:
		return base64.StdEncoding.EncodeToString([]byte(text))
	case 1:
		return base64.RawURLEncoding.EncodeToString([]byte(text))
	case 2:
		return url.QueryEscape(text)
	case 3:
		return url.PathEscape(text)
	case 4:
		return strings.ToLower(url.PathEscape(text)) // whoever escapes in small letters; only the escapes matter
	case 5:
		quoted, _ := json.Marshal(text)
		return string(quoted[1 : len(quoted)-1])
	case 6:
		return strings.ToUpper(hex.EncodeToString([]byte(text)))
	case 7:
		return hex.EncodeToString([]byte(text))
	}
	return text
}

// A cliFlag is one flag of a command as flags.tsv has it.
type cliFlag struct {
	long, short string
	takes       bool
}

type cliCommand struct {
	path  string
	flags []cliFlag
}

// cliCommands reads flags.tsv.
var cliCommands = sync.OnceValue(func() []cliCommand {
	tsv, err := os.ReadFile("flags.tsv")
	if err != nil {
		panic(err)
	}
	var all []cliCommand
	for line := range strings.Lines(string(tsv)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		switch {
		case line[0] == '#':
		case len(f) == 2:
			all = append(all, cliCommand{path: f[0]})
		default:
			c := &all[len(all)-1]
			c.flags = append(c.flags, cliFlag{f[1], strings.TrimPrefix(f[2], "-"), f[3] == "1"})
		}
	}
	return all
})

// usualCommands are the commands that most lines have.
var usualCommands = []string{"run", "build", "login", "exec", "create", "pull", "push", "tag", "buildx build", "buildx bake", "compose run", "compose up",
	"compose exec", "container run", "image build", "service create", "commit", "import", "plugin install", "volume create", "swarm join", "context create"}

func (m *lineMaker) command() cliCommand {
	all := cliCommands()
	if m.one(3) {
		return all[1+m.n(len(all)-1)] // the first are the global flags
	}
	path := pick(m, usualCommands)
	return all[slices.IndexFunc(all, func(c cliCommand) bool { return c.path == path })]
}

// line makes the arguments and the environment of one call.
func (m *lineMaker) line() {
	m.args = []string{"docker"}
	for range m.n(3) {
		m.flag("", cliCommands()[0].flags)
	}
	var c cliCommand
	known := !m.one(12)
	if known {
		c = m.command()
		m.args = append(m.args, strings.Fields(c.path)...)
	} else {
		m.args = append(m.args, pick(m, []string{"frobnicate", "model", "scout", "pass", m.strong("a command's name")}))
	}
	for range m.n(6) {
		m.flag(c.path, c.flags)
	}
	if m.one(6) {
		m.args = append(m.args, "--")
	}
	m.operands(c.path)
	if m.one(3) {
		m.environ = append(m.environ, "GITHUB_REPOSITORY=acme/shop", "GITHUB_RUN_ID=7", "GITHUB_WORKFLOW=CI")
	}
	if m.one(3) {
		m.environ = append(m.environ, pick(m, []string{"GITHUB_ENV", "HOME", "LC_ALL", "INPUT_X", "MY_VARIABLE", "DOCKER_CONFIG", "ACTIONS_CACHE_URL"})+"="+m.weak("a variable"))
	}
}

// flag adds one flag, in one of the ways in which it can be written.
func (m *lineMaker) flag(command string, flags []cliFlag) {
	if len(flags) == 0 || m.one(8) {
		m.unknownFlag()
		return
	}
	f := flags[m.n(len(flags))]
	if m.one(2) {
		// What most command lines have, if this command has it.
		name := pick(m, []string{"env", "build-arg", "label", "password", "secret", "output", "cache-to", "mount", "build-context", "tag", "token", "set", "opt"})
		if i := slices.IndexFunc(flags, func(f cliFlag) bool { return f.long == name }); i >= 0 {
			f = flags[i]
		}
	}
	cluster := ""
	if m.one(3) {
		for _, other := range flags {
			if !other.takes && other.short != "" && m.one(3) {
				cluster += other.short
			}
		}
	}
	if !f.takes {
		switch {
		case f.short != "" && m.one(2):
			m.args = append(m.args, "-"+cluster+f.short)
		case m.one(3):
			m.args = append(m.args, "--"+f.long+"="+m.weakWord("a boolean flag "+f.long))
		default:
			m.args = append(m.args, "--"+f.long)
		}
		return
	}
	value := m.value(command, f.long)
	switch short := f.short != ""; {
	case short && m.one(3):
		m.args = append(m.args, "-"+cluster+f.short+"="+value)
	case short && m.one(2) && value != "" && value[0] != '=':
		m.args = append(m.args, "-"+cluster+f.short+value)
	case short && m.one(2):
		m.args = append(m.args, "-"+cluster+f.short, value)
	case m.one(2):
		m.args = append(m.args, "--"+f.long+"="+value)
	default:
		m.args = append(m.args, "--"+f.long, value)
	}
}

func (m *lineMaker) unknownFlag() {
	name := pick(m, []string{"future-secret", "token", "api-key", "x", m.strong("an unknown flag's name")})
	name = strings.TrimRight(name, "=") // behind it would be the value
	switch m.n(5) {
	case 0:
		m.args = append(m.args, "--"+name, m.weakWord("an unknown flag's value"))
	case 1:
		m.args = append(m.args, "--"+name+"="+m.weak("an unknown flag's value"))
	case 2:
		m.args = append(m.args, "-Z"+m.weakWord("an unknown short flag's value"))
	case 3:
		m.args = append(m.args, "-Z", m.weakWord("an unknown short flag's value"))
	case 4:
		m.args = append(m.args, "-"+m.strong("a word like a cluster of flags"))
	}
}

// value makes the value of a flag, with a secret where it must not be seen.
func (m *lineMaker) value(command, flag string) string {
	if m.one(4) {
		return pick(m, []string{"", "x", "linux/amd64", "a=b", "=", "--rm", "1", "-"})
	}
	where := "the value of --" + flag + " of " + command
	switch flag {
	case "platform", "target", "file", "builder", "tag", "image":
		return m.around(m.strong(where)) // shown, if nothing tells that it is a secret
	case "annotation", "build-arg", "change", "container-label", "container-label-add", "driver-opt", "env", "env-add", "env-rm",
		"label", "label-add", "label-rm", "log-opt", "opt", "set", "ssh", "storage-opt", "sysctl", "ulimit", "var":
		switch m.n(4) {
		case 0:
			return m.strong(where) + "=" + m.weak(where)
		case 1:
			return "ENV NAME=" + m.weak(where)
		}
		return pick(m, []string{"KEY", "a.b-c", "*.args.TOKEN", "x/y", ""}) + "=" + m.weak(where)
	case "build-context":
		if m.one(2) {
			return "name=" + m.url(where)
		}
		return "name=" + m.weakWord(where)
	case "attest", "cache-from", "cache-to", "docker", "mount", "output", "provenance", "sbom", "secret":
		return m.list(where)
	}
	return m.around(m.weak(where))
}

// around puts text without a meaning around a secret.
func (m *lineMaker) around(secret string) string {
	return pick(m, []string{"", "", "x-", "./", "a/b.", "user@", "r.test/"}) + secret + pick(m, []string{"", "", ".txt", "/x", ":1", " y"})
}

// list makes a list such as type=registry,ref=x.
func (m *lineMaker) list(where string) string {
	var items []string
	for range 1 + m.n(4) {
		key := pick(m, []string{"type", "mode", "push", "secret_access_key", "token", "src", "dst", "dest", "x", "o", "id", "env", "ref", "name", ""})
		value := "x"
		switch key {
		case "id", "env", "ref", "name":
			if m.one(2) {
				value = strings.NewReplacer(",", "", "\"", "").Replace(m.strong(where + ", member " + key))
			}
		default:
			// Without a comma: what is behind it would be another member's name.
			value = "Wk!" + m.chars(8, lowerDigits)
			m.plant(value, where+", member "+key)
		}
		item := key + "=" + value
		if m.one(4) {
			item = `"` + item + `,more=` + m.weakWord(where+", quoted") + `"`
		}
		items = append(items, item)
	}
	return strings.Join(items, ",")
}

// url makes a URL with secrets in userinfo or query, or one to be found in its path.
func (m *lineMaker) url(where string) string {
	scheme := pick(m, []string{"https", "http", "ssh", "git", "tcp", "git+https", "s3"})
	rest := "h.example.com/acme/app.git"
	if m.one(4) {
		rest = "h.example.com/" + m.strong(where+", path") + "/x"
	}
	switch m.n(5) {
	case 0:
		rest = m.weakUser(where) + "@" + rest
	case 1:
		rest = "user:" + m.weakUser(where) + "@" + rest
	case 2:
		rest = "user:a" + pick(m, []string{"/", "#", "?", "@", "%zz"}) + m.weakUser(where) + "@" + rest
	}
	switch m.n(4) {
	case 0:
		rest += "?sig=" + m.weakUser(where) + "&b=" + m.weakUser(where)
	case 1:
		rest += "?" + m.weakUser(where)
	case 2:
		rest += "#" + m.strong(where+", fragment")
	}
	return scheme + "://" + rest
}

// weakUser is a weak secret without the characters that take a URL apart.
func (m *lineMaker) weakUser(where string) string {
	return m.plant("wk!"+m.chars(8, lowerDigits), where+", part of a URL")
}

// operands adds what follows the flags.
func (m *lineMaker) operands(command string) {
	image := "alpine:3"
	if m.one(3) {
		image = pick(m, []string{"r.test/", "a/", ""}) + m.strong("an image") + pick(m, []string{"", ":1"})
	}
	leaf := strings.TrimPrefix(command, "container ")
	switch leaf {
	case "run", "create", "exec", "top", "service create", "compose run", "compose exec":
		m.args = append(m.args, image)
		for range m.n(4) {
			m.args = append(m.args, pick(m, []string{"sh", "-c", "--env", "-p" + m.weakWord("behind the image"), m.weakWord("behind the image"), m.weak("behind the image")}))
		}
		return
	}
	for range m.n(4) {
		switch m.n(6) {
		case 0:
			m.args = append(m.args, m.url("an operand"))
		case 1:
			m.args = append(m.args, m.around(m.strong("an operand")))
		case 2:
			m.args = append(m.args, pick(m, []string{"NAME", "a.b", "./x"})+"="+m.weak("an operand with a value"))
		case 3:
			m.args = append(m.args, pick(m, []string{"Authorization", "X-Registry-Auth", "PRIVATE-TOKEN", "cookie"})+pick(m, []string{":", ": ", " : "})+m.weak("a header"))
		case 4:
			m.args = append(m.args, image)
		case 5:
			m.args = append(m.args, pick(m, []string{".", "-", "/x", "web", "https://github.com/acme/app.git#main"}))
		}
	}
}

// checkLine describes a line in both modes and fails when a secret is found.
func checkLine(t testing.TB, m *lineMaker) {
	t.Helper()
	var lines [2]string
	lines[0], _ = describeWith(m.args, m.environ, false)
	lines[1], _ = describeWith(m.args, m.environ, true)
	both := strings.TrimSuffix(lines[0], "\n") + strings.TrimSuffix(lines[1], "\n")
	for i, secret := range m.plants {
		for _, form := range forms(secret) {
			if strings.Contains(both, form) {
				t.Fatalf("%s: %q in %s%s\nargs %q\nenviron %q", m.where[i], form, lines[0], lines[1], m.args, m.environ)
			}
		}
	}
	for _, line := range lines {
		if len(line) > maxRecord || strings.Count(line, "\n") != 1 || !json.Valid([]byte(line)) {
			t.Fatalf("not one line of JSON of at most %d bytes: %q", maxRecord, line)
		}
	}
}

// TestNoGeneratedLineLeaks makes command lines of docker's own commands and flags in
// all their spellings, with secrets in every place, and searches the records for them.
// FuzzRedaction does the same for as long as it is let.
func TestNoGeneratedLineLeaks(t *testing.T) {
	faults.Case(t, "SE-02")
	var seed [8]byte
	planted, words := 0, map[string]bool{}
	for i := range 20000 {
		binary.LittleEndian.PutUint64(seed[:], uint64(i))
		m := &lineMaker{hash: sha256.Sum256(seed[:])}
		m.line()
		checkLine(t, m)
		planted += len(m.plants)
		for _, w := range m.where {
			words[w] = true
		}
	}
	if planted < 50000 || len(words) < 1000 {
		t.Errorf("only %d secrets in %d places", planted, len(words))
	}
}

// FuzzRedaction: whatever a command line looks like, no secret that was planted in it
// is in the record, with the redacted command line or without.
func FuzzRedaction(f *testing.F) {
	for i := range 64 {
		seed := sha256.Sum256([]byte{byte(i)})
		f.Add(bytes.Repeat(seed[:], 1+i%4))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m := &lineMaker{data: data, hash: sha256.Sum256(data)}
		m.line()
		checkLine(t, m)
	})
}

// TestVariablesThatAreRecorded plants a secret in each variable that a job has or could
// have: in the record are those of the allow-list, and no other.
func TestVariablesThatAreRecorded(t *testing.T) {
	faults.Case(t, "SE-03")
	recorded := strings.Fields(`GITHUB_REPOSITORY GITHUB_REPOSITORY_ID GITHUB_REPOSITORY_OWNER GITHUB_REPOSITORY_OWNER_ID GITHUB_WORKFLOW
		GITHUB_WORKFLOW_REF GITHUB_WORKFLOW_SHA GITHUB_JOB ACTIONS_ORCHESTRATION_ID GITHUB_RUN_ID GITHUB_EVENT_NAME
		GITHUB_REF GITHUB_HEAD_REF GITHUB_SHA GITHUB_ACTOR GITHUB_TRIGGERING_ACTOR GITHUB_ACTION GITHUB_ACTION_REPOSITORY GITHUB_ACTION_REF
		RUNNER_TRACKING_ID RUNNER_NAME RUNNER_OS RUNNER_ARCH RUNNER_ENVIRONMENT POD_NAME POD_NAMESPACE NODE_NAME`)
	// Numbers, or parts of what is recorded; text in them is not kept.
	others := strings.Fields(`JOB_CHECK_RUN_ID GITHUB_RUN_NUMBER GITHUB_RUN_ATTEMPT GITHUB_SERVER_URL GITHUB_ACTION_PATH GITHUB_WORKSPACE
		GITHUB_TOKEN GITHUB_ENV GITHUB_PATH GITHUB_OUTPUT GITHUB_STATE GITHUB_STEP_SUMMARY GITHUB_API_URL GITHUB_GRAPHQL_URL GITHUB_BASE_REF
		GITHUB_REF_NAME GITHUB_REF_TYPE GITHUB_REF_PROTECTED GITHUB_RETENTION_DAYS GITHUB_EVENT_PATH GITHUB_ACTIONS GITHUB_ANYTHING_ELSE
		RUNNER_TEMP RUNNER_TOOL_CACHE RUNNER_DEBUG RUNNER_WORKSPACE ACTIONS_RUNTIME_TOKEN ACTIONS_RUNTIME_URL ACTIONS_CACHE_URL
		ACTIONS_RESULTS_URL ACTIONS_ID_TOKEN_REQUEST_TOKEN ACTIONS_ID_TOKEN_REQUEST_URL ACTIONS_RUNNER_INPUT_JITCONFIG
		INPUT_TOKEN INPUT_PASSWORD INPUT_ANYTHING STATE_X AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN GOOGLE_APPLICATION_CREDENTIALS
		AZURE_CLIENT_SECRET NPM_TOKEN NODE_AUTH_TOKEN PYPI_TOKEN TWINE_PASSWORD DOCKER_HOST DOCKER_CONTEXT DOCKER_CONFIG DOCKER_AUTH_CONFIG
		DOCKER_CERT_PATH DOCKER_PASSWORD DOCKER_USERNAME DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND BUILDX_BUILDER COMPOSE_PROJECT_NAME
		HTTP_PROXY https_proxy NO_PROXY PATH HOME USER LOGNAME SHELL LANG LC_ALL TERM PWD OLDPWD HOSTNAME TMPDIR SUDO_USER SUDO_COMMAND SUDO_UID
		SSH_AUTH_SOCK GIT_ASKPASS DATABASE_URL REDIS_URL SENTRY_DSN SLACK_WEBHOOK MY_SETTING KUBECONFIG VAULT_ADDR VAULT_TOKEN CI TALLYMAN_CONFIG`)
	secret := func(i int) string { return fmt.Sprintf("canary-of-%03d-x", i) }
	var environ []string
	all := slices.Concat(recorded, others)
	for i, name := range all {
		environ = append(environ, name+"="+secret(i))
	}
	for _, argv := range []bool{false, true} {
		line, _ := describeWith([]string{"docker", "run", "-e", "HOME", "alpine"}, environ, argv)
		for i, name := range all {
			if found := strings.Contains(line, secret(i)); found != (i < len(recorded)) {
				t.Errorf("%s, argv %v: recorded %v", name, argv, found)
			}
		}
	}
}

// TestWhatRedactionCannotSee are the limits that docs/redaction.md names. When one of
// them is gone, the document has to change.
func TestWhatRedactionCannotSee(t *testing.T) {
	faults.Case(t, "SE-05")
	const secret = "correct-horse-batteries"
	reversed := []byte(secret)
	slices.Reverse(reversed)
	for limit, test := range map[string]struct {
		args, want []string
	}{
		"split over two arguments": {[]string{"volume", "rm", secret[:11], secret[11:]}, []string{"volume", "rm", secret[:11], secret[11:]}},
		"other letter case":        {[]string{"volume", "rm", strings.ToUpper(secret)}, []string{"volume", "rm", strings.ToUpper(secret)}},
		"reversed":                 {[]string{"volume", "rm", string(reversed)}, []string{"volume", "rm", string(reversed)}},
		"in one piece it is found": {[]string{"volume", "rm", secret}, []string{"volume", "rm", redacted}},
	} {
		_, inv := describeWith(append([]string{"docker"}, test.args...), []string{"A_PASSWORD=" + secret}, true)
		if !slices.Equal(inv.Argv, test.want) {
			t.Errorf("%s: %q, want %q", limit, inv.Argv, test.want)
		}
		if !strings.Contains(limits(t), limit) && !strings.Contains(limit, "found") {
			t.Errorf("docs/redaction.md does not say %q", limit)
		}
	}
	// In the record without the command line the words have no place at all.
	if line, _ := describeWith([]string{"docker", "volume", "rm", secret[:11], secret[11:]}, nil, false); strings.Contains(line, secret[:11]) {
		t.Errorf("recorded unasked: %s", line)
	}
}

// TestSecretsOfTheJobAreThoseOfItsEnvironment: a mask that a job adds on its way
// (::add-mask::) is known to the runner alone, the shim sees no more than the variables
// that the caller has.
func TestSecretsOfTheJobAreThoseOfItsEnvironment(t *testing.T) {
	faults.Case(t, "SE-09")
	args := []string{"docker", "volume", "rm", "masked-later"}
	_, before := describeWith(args, nil, true)
	_, after := describeWith(args, []string{"NEW_TOKEN=masked-later"}, true)
	if !slices.Contains(before.Argv, "masked-later") || slices.Contains(after.Argv, "masked-later") {
		t.Errorf("before the variable is set: %q; after: %q", before.Argv, after.Argv)
	}
	if !strings.Contains(limits(t), "add-mask") {
		t.Error("docs/redaction.md does not say so")
	}
}

// limits is what docs/redaction.md says of what is not covered.
func limits(t *testing.T) string {
	t.Helper()
	doc, err := os.ReadFile("../docs/redaction.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(doc), "\n## What is not covered\n")
	if !ok {
		t.Fatal("docs/redaction.md has no section on what is not covered")
	}
	return strings.Join(strings.Fields(text), " ")
}

// hostileLines are the command lines that make redaction think most, by the length of
// their words together.
func hostileLines(size int) map[string][]string {
	words := func(head string, word func(i int) string) []string {
		args := strings.Fields("docker " + head)
		for n, i := 0, 0; n < size; i++ {
			w := word(i)
			n += len(w) + 1
			args = append(args, w)
		}
		return args
	}
	always := func(w string) func(int) string { return func(int) string { return w } }
	return map[string][]string{
		"one long word":        append(strings.Fields("docker volume rm"), strings.Repeat("x", size)),
		"long words":           words("volume rm", always(strings.Repeat("x", 4000))),
		"images":               words("rmi", func(i int) string { return fmt.Sprintf("registry.example.com/team/image-%d:v1", i) }),
		"build args":           words("build", func(i int) string { return fmt.Sprintf("--build-arg=KEY_%d=some value of it", i) }),
		"beginnings of tokens": words("volume rm", always(strings.Repeat("ghp_", 900))),
		"nearly tokens":        words("volume rm", always(strings.Repeat("ghp_1234567 ", 300))),
		"nearly secrets":       words("volume rm", always(strings.Repeat("secret-horse ", 300))),
		"escapes":              words("volume rm", always(strings.Repeat("%41+", 900))),
		"random":               words("volume rm", always(strings.Repeat("aB3dE6gH9jK2mN5pQ8rS.", 180))),
		"urls":                 words("volume rm", always("https://h.test/"+strings.Repeat("a?b=c&", 600))),
		"lists":                words("build", always("--output="+strings.Repeat("type=local,dest=x,", 200))),
		"unknown flags":        words("run", func(i int) string { return "--flag-of-the-future=x" }),
		"clusters":             words("rmi", always("-fffffff")),
		"at signs":             words("volume rm", always(strings.Repeat("a@", 1800))),
		"control characters":   words("volume rm", always(strings.Repeat("\u2028", 1200))),
	}
}

// hostileEnviron are the secrets that make the search hardest: they all begin in the
// same way, as does what "nearly secrets" has.
func hostileEnviron() []string {
	var environ []string
	for i := range 100 {
		environ = append(environ, fmt.Sprintf("S_%d_TOKEN=secret-of-the-job-%d", i, i))
	}
	return environ
}

// TestWorkGrowsWithTheLine counts the bytes that are looked at, instead of measuring
// time on a machine that has other things to do: they must be a small multiple of the
// line's, however long it is, and never more than a record is worth.
func TestWorkGrowsWithTheLine(t *testing.T) {
	faults.Case(t, "SE-08")
	environ := hostileEnviron()
	for _, size := range []int{1 << 10, 8 << 10, 64 << 10, 1 << 20} {
		for name, args := range hostileLines(size) {
			s := scrubber{environ: environ}
			inv := record.Invocation{Tool: "docker"}
			describeArgs(&inv, args, &s, true)
			// A byte is looked at a dozen times: its control characters, tokens and
			// secrets each in three forms, randomness by three sets of characters. Where
			// all of the job's secrets begin like the text, each is compared.
			limit := 24*min(size+8<<10, maxExamined) + 1<<10
			if name == "nearly secrets" {
				limit = maxWork + maxWork/4
			}
			if s.work > limit {
				t.Errorf("%s, %d bytes: %d looked at, want at most %d", name, size, s.work, limit)
			}
			if s.tired != (inv.Redaction == "failed") || s.tired && (inv.Argv != nil || inv.Command != "") {
				t.Errorf("%s, %d bytes: work is over %v, redaction %q, argv %q", name, size, s.tired, inv.Redaction, inv.Argv)
			}
		}
	}
}

// TestRedactionFailsClosed: a line that takes too long to examine leaves the number of
// its arguments, and nothing else of it.
func TestRedactionFailsClosed(t *testing.T) {
	var environ []string
	for i := range 500 {
		environ = append(environ, fmt.Sprintf("S_%d_TOKEN=aaaaaaaaaaaa%d", i, i))
	}
	args := []string{"docker", "rmi"}
	for range 200 {
		args = append(args, strings.Repeat("a", 250))
	}
	for _, argv := range []bool{false, true} {
		line, inv := describeWith(args, environ, argv)
		if inv.Redaction != "failed" || inv.Argc != 202 || inv.Command != "" || inv.Images != nil || inv.Flags != nil || inv.Argv != nil || strings.Contains(line, "aaaaaa") {
			t.Errorf("argv %v: %s", argv, line)
		}
	}
}

// BenchmarkRedaction prints the time for each byte of a command line by its length:
// where it does not grow, nothing is quadratic. The job has ten secrets, but a hundred
// where the text is nearly made of them.
func BenchmarkRedaction(b *testing.B) {
	for _, name := range []string{"images", "build args", "long words", "escapes", "nearly secrets"} {
		for _, size := range []int{1 << 10, 8 << 10, 64 << 10} {
			args, environ := hostileLines(size)[name], hostileEnviron()
			if name != "nearly secrets" {
				environ = environ[:10]
			}
			b.Run(fmt.Sprintf("%s/%dKiB", strings.ReplaceAll(name, " ", "-"), size>>10), func(b *testing.B) {
				for b.Loop() {
					s := scrubber{environ: environ}
					inv := record.Invocation{Tool: "docker"}
					describeArgs(&inv, args, &s, true)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(size), "ns/byte")
			})
		}
	}
}

// TestDocumentOfRedaction: the table in docs/redaction.md is the one that the shim
// goes by.
func TestDocumentOfRedaction(t *testing.T) {
	doc, err := os.ReadFile("../docs/redaction.md")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("| flag | what is shown of its value |\n| --- | --- |\n")
	for _, f := range flagValues {
		shown := map[valueKind]string{
			asText: "the value, without what looks like a secret", asImage: "the value, if it is an image reference",
			asKey: "`KEY` of `KEY=value`", asMembers: "some members, see below", asContext: "`NAME` of `NAME=value`, and the value if it is a URL",
		}[f.kind]
		if f.kind == asWord {
			shown = "one of `" + strings.ReplaceAll(f.words, " ", "`, `") + "`"
		}
		shown += map[place]string{inBuild: "; of builds", inBake: "; of builds and bake"}[f.in]
		fmt.Fprintf(&b, "| `--%s` | %s |\n", f.flag, shown)
	}
	b.WriteString("\n| member | what is shown of it |\n| --- | --- |\n")
	for _, m := range members {
		shown := map[valueKind]string{asText: "the value, without what looks like a secret", asImage: "image references", asKey: "the name of a variable"}[m.kind]
		if m.kind == asWord {
			shown = "one of `" + strings.ReplaceAll(m.words, " ", "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s |\n", m.key, shown)
	}
	if !strings.Contains(string(doc), b.String()) {
		t.Errorf("docs/redaction.md does not have these tables:\n%s", b.String())
	}
}

// TestFlagTableIsCurrent: flags.tsv is what the command trees of the pinned versions of
// docker, buildx and compose say.
func TestFlagTableIsCurrent(t *testing.T) {
	table, err := os.ReadFile("flags.tsv")
	if err != nil {
		t.Fatal(err)
	}
	const clitree = "../internal/gen/clitree"
	inputs := sha256.New()
	for _, name := range []string{"main.go", "go.mod"} {
		b, err := os.ReadFile(filepath.Join(clitree, name))
		if err != nil {
			t.Fatal(err)
		}
		inputs.Write(b)
	}
	if want := fmt.Sprintf("# inputs %x\n", inputs.Sum(nil)); !strings.Contains(string(table), want) {
		t.Error("flags.tsv was made by another internal/gen/clitree: run `go generate ./wrapper`")
	}
	if out, err := exec.Command("go", "run", "../internal/gen/flagsgen", "-check").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	// The generator itself, which links docker, buildx and compose.
	download := exec.Command("go", "list", "-mod=readonly", "-deps", ".")
	download.Dir = clitree
	if out, err := download.CombinedOutput(); err != nil {
		require.Missing(t, fmt.Sprintf("a Go module proxy, to compare flags.tsv with docker's command tree (%s): %v: %s", clitree, err, out))
	}
	generate := exec.Command("go", "run", "-mod=readonly", ".")
	generate.Dir = clitree
	var stdout, stderr bytes.Buffer
	generate.Stdout, generate.Stderr = &stdout, &stderr
	if err := generate.Run(); err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	if !bytes.Equal(stdout.Bytes(), table) {
		t.Error("flags.tsv is stale: run `go generate ./wrapper`")
	}
}
