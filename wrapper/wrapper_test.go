package wrapper

import (
	"bufio"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/distribution/reference"

	"github.com/tallyman-ci/tallyman/internal/faults"
	"github.com/tallyman-ci/tallyman/record"
)

// describeLine returns the line that the shim would write for a call.
func describeLine(t testing.TB, args, environ []string) (string, record.Invocation) {
	t.Helper()
	return describeWith(args, environ, false)
}

// describeWith does so with or without the redacted command line.
func describeWith(args, environ []string, argv bool) (string, record.Invocation) {
	r := describe(self{path: "/usr/bin/docker", tool: "docker"}, args, environ, 1001, argv)
	return string(encode(r, environ)), *r.Invocation
}

// TestRedactionCorpus runs the shared corpus of command lines that must not leak, with
// and without the redacted command line in the record. argv is read as the shim gets
// it; expect_images are what the docker CLI would send.
func TestRedactionCorpus(t *testing.T) {
	faults.Case(t, "SE-01")
	n := 0
	for _, name := range []string{"testdata/redaction-corpus.jsonl", "testdata/redaction-more.jsonl"} {
		file, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		lines := bufio.NewScanner(file)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var c corpusCase
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				t.Fatalf("%s: %v: %s", name, err, lines.Text())
			}
			n++
			t.Run(c.ID, c.check)
		}
	}
	if n < 120 {
		t.Errorf("only %d cases read", n)
	}
}

// corpusCase is one line of the corpus.
type corpusCase struct {
	ID             string
	Argv           []string
	MustNotContain []string `json:"must_not_contain"`
	MustContain    []string `json:"must_contain"` // of the redacted command line
	ExpectCommand  string   `json:"expect_command"`
	ExpectImages   []string `json:"expect_images"`
	ExpectRedacted []string `json:"expect_redacted"`
	Env            map[string]string
}

func (c corpusCase) check(t *testing.T) {
	var environ []string
	for k, v := range c.Env {
		environ = append(environ, k+"="+v)
	}
	for _, argv := range []bool{false, true} {
		line, inv := describeWith(c.Argv, environ, argv)
		if inv.Command != c.ExpectCommand {
			t.Errorf("command %q, want %q", inv.Command, c.ExpectCommand)
		}
		if !slices.Equal(inv.Images, c.ExpectImages) {
			t.Errorf("images %q, want %q", inv.Images, c.ExpectImages)
		}
		for _, secret := range c.MustNotContain {
			for _, form := range forms(secret) {
				if strings.Contains(strings.TrimSuffix(line, "\n"), form) {
					t.Errorf("leaked %q in %s", form, line)
				}
			}
		}
		if strings.Count(line, "\n") != 1 || !json.Valid([]byte(line)) {
			t.Errorf("not one line of JSON: %q", line)
		}
		if !argv {
			if inv.Argv != nil {
				t.Errorf("argv %q is kept unasked", inv.Argv)
			}
			continue
		}
		if c.ExpectRedacted != nil && !slices.Equal(inv.Argv, c.ExpectRedacted) {
			t.Errorf("redacted line\n got %q\nwant %q", inv.Argv, c.ExpectRedacted)
		}
		for _, kept := range c.MustContain {
			if !strings.Contains(strings.Join(inv.Argv, " "), kept) {
				t.Errorf("%q is gone from %q", kept, inv.Argv)
			}
		}
	}
}

// forms are the ways in which a secret could stand in a record: as it is, escaped for
// JSON or for a URL, as base64 in its three alignments, and as hexadecimal digits.
func forms(secret string) []string {
	quoted, _ := json.Marshal(secret)
	all := []string{secret, string(quoted[1 : len(quoted)-1]), url.QueryEscape(secret), url.PathEscape(secret)}
	if len(secret) < minNeedle {
		return all
	}
	return append(append(all, hex.EncodeToString([]byte(secret)), strings.ToUpper(hex.EncodeToString([]byte(secret)))), base64Forms(secret)...)
}

// base64Forms are the digits that base64 of any text with the secret in it has, in both
// alphabets: those of whole groups of three bytes.
func base64Forms(secret string) (all []string) {
	for shift := range 3 {
		whole := secret[shift:]
		whole = whole[:len(whole)/3*3]
		if len(whole) >= minNeedle {
			all = append(all, base64.StdEncoding.EncodeToString([]byte(whole)), base64.URLEncoding.EncodeToString([]byte(whole)))
		}
	}
	return all
}

// TestCommandsAgainstTheCLI compares the parser with what docker/cli's own command
// tree made of the same arguments.
func TestCommandsAgainstTheCLI(t *testing.T) {
	file, err := os.Open("testdata/argv-oracle.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var c struct {
			Argv    []string
			Command string
			Args    []string
			Error   string
		}
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			t.Fatal(err)
		}
		if c.Error != "" {
			continue // the CLI itself refuses these; for us they only must not panic
		}
		want := c.Command
		if want == "(none)" {
			want = ""
		}
		if rest, ok := strings.CutPrefix(want, "(plugin or unknown) "); ok {
			want = rest
			if rest == "compose" || rest == "help" {
				continue // plugins have a table of their own here
			}
		}
		got := parse(c.Argv, &scrubber{}, false)
		if got.command != want {
			t.Errorf("%q: command %q, want %q", c.Argv, got.command, want)
		}
		switch want {
		case "run", "create", "container run", "pull", "push", "image pull":
			var image []string
			if len(c.Args) > 0 {
				image = c.Args[:1]
			}
			if !slices.Equal(got.images, image) {
				t.Errorf("%q: images %q, want %q", c.Argv, got.images, image)
			}
		}
	}
}

// TestImagesAgainstTheTree compares commands and images with what docker's own command
// tree, with buildx and compose in it, made of the same command lines. The file is
// written by internal/gen/clitree -parse.
func TestImagesAgainstTheTree(t *testing.T) {
	file, err := os.Open("testdata/argv-tree.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	n := 0
	for lines := bufio.NewScanner(file); lines.Scan(); n++ {
		var c struct {
			Argv    []string
			Command string
			Args    []string
			Flags   map[string]string
			Error   string
		}
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			t.Fatal(err)
		}
		if c.Error != "" {
			t.Errorf("the CLI refuses %q: %s", c.Argv, c.Error)
		}
		// Where the CLI takes its images from.
		var want []string
		values := func(flag string) []string {
			return strings.FieldsFunc(c.Flags[flag], func(r rune) bool { return strings.ContainsRune(`[]", `, r) })
		}
		args := func(from, to int) { want = append(want, c.Args[min(from, len(c.Args)):min(to, len(c.Args))]...) }
		switch c.Command {
		case "run", "create", "container run", "container create", "service create", "pull", "push", "image pull", "images", "image ls", "compose publish":
			args(0, 1)
		case "commit", "import":
			args(1, 2)
		case "tag", "image tag":
			args(0, 2)
		case "rmi", "save", "history", "image rm", "image inspect", "manifest create", "manifest annotate", "manifest push", "manifest inspect", "buildx imagetools inspect":
			args(0, len(c.Args))
		case "build", "image build", "buildx build":
			want = append(want, values("tag")...)
			want = append(want, values("cache-from")...)
			for _, output := range values("output") {
				if name, ok := strings.CutPrefix(output, "name="); ok {
					want = append(want, name)
				}
			}
		case "buildx imagetools create":
			want = append(values("tag"), c.Args...)
		case "service update":
			want = values("image")
		case "buildx create":
			for _, option := range values("driver-opt") {
				if name, ok := strings.CutPrefix(option, "image="); ok {
					want = append(want, name)
				}
			}
		case "buildx bake":
			for _, set := range values("set") {
				if _, name, ok := strings.Cut(set, ".tags="); ok {
					want = append(want, name)
				}
			}
		}
		got := parse(c.Argv, &scrubber{}, false)
		slices.Sort(want)
		slices.Sort(got.images)
		if got.command != c.Command || !slices.Equal(got.images, want) {
			t.Errorf("%q: %q with images %q, want %q with %q", c.Argv, got.command, got.images, c.Command, want)
		}
		if slices.Contains(got.flags, unknownFlag) {
			t.Errorf("%q: a flag that the CLI knows is unknown: %q", c.Argv, got.flags)
		}
	}
	if n < 140 {
		t.Errorf("only %d command lines read", n)
	}
}

func TestWhatIsKeptOfACommandLine(t *testing.T) {
	for _, test := range []struct {
		name string
		args string
		want call
	}{
		{"flags by name, in order, clusters apart", "run -itv /a:/b --name=web -e A=1 alpine:3 sh -c x",
			call{command: "run", images: []string{"alpine:3"}, flags: []string{"-i", "-t", "-v", "--name", "-e"}}},
		{"what follows the image belongs to the container", "run alpine -t other:1 --platform linux/arm64",
			call{command: "run", images: []string{"alpine"}}},
		{"a boolean never takes the next word", "run --rm false", call{command: "run", images: []string{"false"}, flags: []string{"--rm"}}},
		{"a value may look like a flag", "run --env --rm img", call{command: "run", images: []string{"img"}, flags: []string{"--env"}}},
		{"platform and target", "build --platform linux/amd64,linux/arm64 --target=release -t a:1 .",
			call{command: "build", images: []string{"a:1"}, flags: []string{"--platform", "--target", "-t"}, platform: "linux/amd64,linux/arm64", target: "release"}},
		{"build takes the flags of buildx too", "build --secret id=x --push --tag=reg.test:5000/a:1 .",
			call{command: "build", images: []string{"reg.test:5000/a:1"}, flags: []string{"--secret", "--push", "--tag"}}},
		{"caches in registries are images", "buildx build --cache-from type=registry,ref=r.test/c:1 --cache-to type=local,dest=/x --cache-from r.test/d .",
			call{command: "buildx build", images: []string{"r.test/c:1", "r.test/d"}, flags: []string{"--cache-from", "--cache-to", "--cache-from"}}},
		{"an unknown flag ends the search for images", "run --brand-new alpine sh", call{command: "run", flags: []string{"--?"}}},
		{"an unknown flag with its value does not", "run --brand-new=1 alpine sh", call{command: "run", flags: []string{"--?"}, images: []string{"alpine"}}},
		{"an unknown command keeps its name alone", "frobnicate --token x alpine", call{command: "frobnicate"}},
		{"a word that is no command name is not kept", "HUNTER2 x", call{}},
		{"the path ends where the words end", "compose -f a.yml up -d web", call{command: "compose up", flags: []string{"-f", "-d"}}},
		{"the host's class, not its address", "-H tcp://10.0.0.1:2375 ps", call{command: "ps", flags: []string{"-H"}, daemon: "tcp"}},
		{"ssh in one word", "-Hssh://me@host ps", call{command: "ps", flags: []string{"-H"}, daemon: "ssh"}},
		{"a context", "-c prod run -c 5 img", call{command: "run", flags: []string{"-c", "-c"}, images: []string{"img"}, daemon: "context"}},
		{"containers are no images", "container rm -f web", call{command: "container rm", flags: []string{"-f"}}},
		{"removed images", "image rm a b:2", call{command: "image rm", images: []string{"a", "b:2"}}},
		{"both names of a tag", "tag a:1 reg.test/a:2", call{command: "tag", images: []string{"a:1", "reg.test/a:2"}}},
		{"the new image of a service", "service update --image reg.test/w:2 web", call{command: "service update", images: []string{"reg.test/w:2"}, flags: []string{"--image"}}},
		{"a flag without its value", "--log-level", call{flags: []string{"--log-level"}}},
		{"operands after two dashes", "run --rm -- alpine sh", call{command: "run", images: []string{"alpine"}, flags: []string{"--rm"}}},
		{"a table's own marks are no flags", "run --pull|rm --/t alpine", call{command: "run", flags: []string{"--?", "--?"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := scrubber{}
			if got := parse(strings.Fields(test.args), &s, false); !reflect.DeepEqual(got, test.want) {
				t.Errorf("%s\n got %+v\nwant %+v", test.args, got, test.want)
			}
		})
	}
}

// FuzzParse: no command line makes the parser panic, and a canary planted as value
// of a random flag or as operand of a container never reaches the record.
func FuzzParse(f *testing.F) {
	f.Add("run -e X=%s --rm alpine %s", "")
	f.Add("build --build-arg\x00A=%s -t a:1 https://%s@host/", "\x00")
	f.Add("login -u%s -p %s reg.test", "")
	f.Add("buildx build --output type=image,name=%s --cache-to=ref=%s .", "")
	f.Add("compose -p %s run -e %s x", "")
	f.Fuzz(func(t *testing.T, template, separator string) {
		if separator == "" {
			separator = " "
		}
		const canary = "ghp_c4naryC4naryC4naryC4naryC4nary"
		args := append([]string{"docker"}, strings.Split(strings.ReplaceAll(template, "%s", canary), separator)...)
		line, _ := describeLine(t, args, []string{"MY_TOKEN=" + canary})
		if strings.Contains(line, canary) || strings.Contains(line, canary[4:]) {
			t.Fatalf("leaked: %q -> %s", args, line)
		}
		if strings.Count(line, "\n") != 1 || !json.Valid([]byte(line)) || len(line) > maxRecord {
			t.Fatalf("not one line of JSON of at most %d bytes: %q", maxRecord, line)
		}
	})
}

// FuzzReference: what we take for an image reference is one for the reference
// implementation too, so that no other text can pass as an image.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"alpine", "a:1", "localhost:5000/a/b:tag", "r.test/a@sha256:" + strings.Repeat("0f", 32), "[::1]:5000/a", "A/b", "a..b", "a___b", "a:", "a@b", "-a", "x/y/", "UPPER.test/a", "a__b/c-_-d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, err := reference.ParseNormalizedNamed(s)
		if validReference(s) && err != nil && err != reference.ErrNameContainsUppercase && !strings.Contains(err.Error(), "64-byte hexadecimal") {
			t.Errorf("%q passes here, the reference implementation says %v", s, err)
		}
		if !validReference(s) && err == nil && len(s) < 200 {
			t.Errorf("%q is refused here, but is a reference", s)
		}
	})
}

func TestSecretNames(t *testing.T) {
	for name, want := range map[string]bool{
		"NPM_TOKEN": true, "NPMTOKEN": true, "DB_PASSWORD": true, "GH_PAT": true, "SSH_PRIVATE_KEY": true, "MY_API_KEY": true, "SENTRY_DSN": true,
		"SLACK_WEBHOOK_URL": true, "DB_PWD": true, "AZURE_CREDENTIALS": true, "HTTP_AUTH": true,
		"PWD": false, "OLDPWD": false, "PATH": false, "GIT_AUTHOR_NAME": false, "GITHUB_REPOSITORY": false, "KEYBOARD": false, "KEY": false, "PATTERN": false,
	} {
		if secretName(name) != want {
			t.Errorf("%s: got %v", name, !want)
		}
	}
}

// TestMoreSecretsThanCanBeSearchedFor: then nothing is kept that could hold one.
func TestMoreSecretsThanCanBeSearchedFor(t *testing.T) {
	var environ []string
	for i := range 5000 {
		environ = append(environ, fmt.Sprintf("S%d_TOKEN=secret-%d-value", i, i))
	}
	_, inv := describeLine(t, strings.Fields("docker build --platform linux/amd64 -t secret-4999-value:1 ."), environ)
	if inv.Command != "build" || len(inv.Images) != 0 || inv.Platform != "" {
		t.Errorf("kept %+v", inv)
	}
}

func TestEntropyTellsKeysFromNames(t *testing.T) {
	for s, want := range map[string]bool{
		"9f8A7b6C5d4E3f2G1h0JkLmNpQrS":                                            true,
		"my-very-long-service-name-for-production":                                false,
		"internationalizationandlocalization":                                     false,
		"da39a3ee5e6b4b0d3255bfef95601890afd80709":                                false,
		"sha256:" + strings.Repeat("0123456789abcdef", 4):                         false,
		"ghcr.io/octo-org/build-tools:2026.11.23-rc1":                             false,
		"registry.example.com/team/" + "aB3dE6gH9jK2mN5pQ8rS" + "vX" + ":v1":      true,
		"123456789012.dkr.ecr.eu-central-1.amazonaws.com/backend/payments:abc123": false,
	} {
		if (randomRuns(s, false) != nil) != want {
			t.Errorf("%s: got %v", s, !want)
		}
	}
}

func TestWorkingDirectoryIsToldOnlyBelowTheWorkspace(t *testing.T) {
	for _, test := range []struct{ workspace, wd, want string }{
		{"/w/shop/shop", "/w/shop/shop", "."},
		{"/w/shop/shop/", "/w/shop/shop/deploy/eu", "deploy/eu"},
		{"/w/shop/shop", "/w/shop/shopping", ""},
		{"/w/shop/shop", "/home/runner", ""},
		{"/w/shop/shop", "/w/shop/shop/ghp_FAKE0000000000000000000000000000abcd", ""},
	} {
		if got := relative(test.workspace, test.wd, &scrubber{}); got != test.want {
			t.Errorf("%s in %s: got %q, want %q", test.wd, test.workspace, got, test.want)
		}
	}
}

// TestRecordsStayShort: whatever a job puts into its environment and arguments, the
// line fits one write and one message.
func TestRecordsStayShort(t *testing.T) {
	huge := strings.Repeat("\u2028x", 1<<19)
	environ := []string{"GITHUB_WORKSPACE=" + huge, "POD_NAME=" + huge}
	for _, name := range []string{"REPOSITORY", "WORKFLOW", "WORKFLOW_REF", "JOB", "REF", "HEAD_REF", "ACTOR", "SHA", "ACTION", "RUN_ID", "EVENT_NAME", "REPOSITORY_OWNER"} {
		environ = append(environ, "GITHUB_"+name+"="+huge)
	}
	args := []string{"docker", "rmi"}
	for range 5000 {
		args = append(args, "-f", "registry.example.com/"+strings.Repeat("a", 200))
	}
	line, inv := describeLine(t, args, environ)
	if len(line) > maxRecord || !inv.Truncated || !json.Valid([]byte(line)) {
		t.Errorf("%d bytes, truncated %v", len(line), inv.Truncated)
	}
}

// TestDependencies is the promise of what a docker command starts with: the shim's
// import graph may shrink, never grow.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "../cmd/docker-shim").Output()
	if err != nil {
		t.Fatal(err)
	}
	allowed := strings.Fields(`unsafe math/bits runtime errors unicode/utf8 strconv sync/atomic sync io iter unicode strings cmp slices
		syscall time hash hash/maphash
		github.com/tallyman-ci/tallyman/config github.com/tallyman-ci/tallyman/journal/handover
		github.com/tallyman-ci/tallyman/record github.com/tallyman-ci/tallyman/wrapper github.com/tallyman-ci/tallyman/cmd/docker-shim`)
	for _, dep := range strings.Fields(string(out)) {
		if !slices.Contains(allowed, dep) && !strings.HasPrefix(dep, "internal/") {
			t.Errorf("the shim now carries %s", dep)
		}
	}
}

// BenchmarkWorstCase is the most that a command line can make the shim think: SE-08 of
// the fault catalogue wants 200 us for 64 KiB, and nothing that grows faster than the
// line.
func BenchmarkWorstCase(b *testing.B) {
	var environ []string
	for i := range 50 {
		environ = append(environ, fmt.Sprintf("SECRET_%d=%s%d", i, strings.Repeat("correct horse ", 20), i))
	}
	var hostile []string
	for i := range 40000 {
		hostile = append(hostile, fmt.Sprintf("S%d_TOKEN=secret-%d-value", i, i))
	}
	hostile = append(hostile, "BIG_TOKEN="+strings.Repeat("x y\n", 1<<18), "LONG_SECRET="+strings.Repeat("x", 1<<20))
	for _, argv := range []bool{false, true} {
		suffix := map[bool]string{true: "-argv"}[argv]
		b.Run("secrets-2048KiB"+suffix, func(b *testing.B) {
			args := []string{"docker", "rmi"}
			for i := range 256 {
				args = append(args, fmt.Sprintf("registry.example.com/image-%d", i))
			}
			for b.Loop() {
				r := describe(self{path: "/usr/bin/docker", tool: "docker"}, args, hostile, 1001, argv)
				encode(r, hostile)
			}
		})
		for _, size := range []int{64 << 10, 256 << 10, 2 << 20} {
			for name, word := range map[string]string{"images": "registry.example.com/" + strings.Repeat("a/", 90) + "a", "flags": "--force", "clusters": "-fffffff", "noise": strings.Repeat("\xff", 100)} {
				args := []string{"docker", "rmi"}
				for n := 0; n < size; n += len(word) + 1 {
					args = append(args, word)
				}
				b.Run(fmt.Sprintf("%s-%dKiB%s", name, size>>10, suffix), func(b *testing.B) {
					for b.Loop() {
						r := describe(self{path: "/usr/bin/docker", tool: "docker"}, args, environ, 1001, argv)
						encode(r, environ)
					}
				})
			}
		}
	}
}

func BenchmarkDescribe(b *testing.B) {
	args := strings.Fields("docker buildx build --platform linux/amd64 --build-arg A=1 --cache-from type=registry,ref=r.test/c:1 -t r.test/app:1 -f Dockerfile .")
	environ := os.Environ()
	environ = append(environ, "GITHUB_REPOSITORY=octo-org/octo-repo", "GITHUB_RUN_ID=1", "GITHUB_TOKEN=ghs_xxxxxxxxxxxxxxxxxxxx", "DB_PASSWORD=correct horse")
	b.ReportAllocs()
	for b.Loop() {
		r := describe(self{path: "/usr/bin/docker", tool: "docker"}, args, environ, 1001, false)
		encode(r, environ)
	}
}
