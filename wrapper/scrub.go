package wrapper

import (
	"math/bits"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
)

// scrubber finds secrets in what a record may hold: the shapes of known tokens, random
// strings, and the job's own secrets in the forms in which they are passed around. For
// the default record a value with a secret in it is dropped whole (keep); in the
// redacted command line only the secret is (redact).
//
// Each byte is looked at a bounded number of times, and all that is done is counted:
// whoever writes a command line to make the shim think gets a record without one.
type scrubber struct {
	environ []string
	own     index // the job's own secrets, made at first use
	known   index // beginnings of known tokens, made at first use
	ready   bool
	blind   bool // there are more secrets than can be searched for
	work    int  // bytes looked at so far
	tired   bool // work went beyond maxWork: nothing is examined any more, nor kept
}

const (
	// maxValue is the longest value that is kept in a field of its own.
	maxValue = 512
	// maxSecrets bounds the secrets that are searched for, and maxSecretBytes their
	// length together. With more nothing is kept.
	maxSecrets     = 512
	maxSecretBytes = 48 << 10
	// maxWork bounds the bytes looked at for one record; it stands for 2 ms.
	maxWork = 1 << 20
)

// spend counts n bytes that are looked at.
func (s *scrubber) spend(n int) {
	s.work += n
	s.tired = s.tired || s.work > maxWork
}

// keep tells whether a value may go into the record as it is.
func (s *scrubber) keep(value string) bool {
	if len(value) > maxValue || value != record.Clean(value, maxValue) || strings.Contains(value, "://") {
		return false
	}
	s.secrets()
	return !s.blind && !s.tired && len(s.shapes(value)) == 0 && len(s.random(value, false)) == 0 && len(s.ownSecrets(value)) == 0 && !s.tired
}

// keepText is keep for what is no image reference: of names and paths less is expected
// to look random.
func (s *scrubber) keepText(value string) bool {
	return s.keep(value) && len(s.random(value, true)) == 0
}

// A token is how the tokens of one service begin, and what follows at least.
type token struct {
	prefix string
	head   int    // letters and digits right behind the prefix, before anything else
	min    int    // characters of the body in all
	body   string // characters of the body besides letters and digits; "A" for capitals and digits alone, "*" for everything
}

// tokens are what services give out: GitHub, GitLab, Docker Hub and swarm, npm, PyPI,
// RubyGems, crates.io, NuGet, AWS, Azure, Google, Slack, Discord, Stripe, Vault, SendGrid,
// Hugging Face, Anthropic, OpenAI, Groq, Shopify, DigitalOcean, Databricks, Grafana,
// Pulumi, Atlassian, Sentry, SonarQube, Supabase, Artifactory, Buildkite, CircleCI, Linear,
// Doppler, Tailscale, Postman, New Relic, age, JSON Web Tokens and PEM.
//
// A prefix may stand within a word, as in x-ghp_..., so that many are also parts of
// harmless ones (highs_and_lows, task_test_unit, pypi-server): head tells the two apart,
// since a token goes on with letters and digits where words have an underscore or dash.
var tokens = [...]token{
	{"ghp_", 6, 8, "_.-"}, {"gho_", 6, 8, "_.-"}, {"ghu_", 6, 8, "_.-"}, {"ghs_", 6, 8, "_.-"}, {"ghr_", 6, 8, "_.-"}, {"github_pat_", 6, 8, "_.-"},
	{"glpat-", 0, 8, "_.-"}, {"gldt-", 0, 8, "_.-"}, {"glptt-", 0, 8, "_.-"}, {"glrt-", 0, 8, "_.-"}, {"glrtr-", 0, 8, "_.-"}, {"glcbt-", 0, 8, "_.-"},
	{"gloas-", 0, 8, "_.-"}, {"glsoat-", 0, 8, "_.-"}, {"glft-", 0, 8, "_.-"}, {"glimt-", 0, 8, "_.-"}, {"glagent-", 8, 8, "_.-"}, {"glffct-", 0, 8, "_.-"},
	{"GR1348941", 0, 8, "_.-"}, {"_gitlab_session=", 0, 8, "_.-"},
	{"dckr_pat_", 0, 8, "_.-"}, {"dckr_oat_", 0, 8, "_.-"}, {"SWMTKN-", 0, 8, "_.-"}, {"SWMKEY-", 0, 8, "_.-+/="},
	{"npm_", 16, 16, ""}, {"NpmToken.", 0, 16, "_.-"}, {"pypi-", 16, 16, "_.-"}, {"rubygems_", 16, 16, "_.-"}, {"cio", 30, 30, ""}, {"oy2", 40, 40, ""},
	{"AKIA", 0, 12, "A"}, {"ASIA", 0, 12, "A"}, {"ABIA", 0, 12, "A"}, {"ACCA", 0, 12, "A"},
	{"AIza", 0, 20, "_-"}, {"ya29.", 0, 8, "_.-+/="}, {"GOCSPX-", 0, 8, "_.-"}, {"GOOG", 0, 20, "A"}, {"1//0", 12, 20, "_-"},
	{"xoxb-", 0, 8, "_.-"}, {"xoxp-", 0, 8, "_.-"}, {"xoxa-", 0, 8, "_.-"}, {"xoxr-", 0, 8, "_.-"}, {"xoxs-", 0, 8, "_.-"}, {"xoxc-", 0, 8, "_.-"},
	{"xoxd-", 0, 8, "_.-+/=%"}, {"xoxe-", 0, 8, "_.-"}, {"xoxe.", 0, 8, "_.-"},
	{"xapp-", 0, 8, "_.-"}, {"hooks.slack.com/services/", 0, 8, "_.-/"}, {"discord.com/api/webhooks/", 0, 8, "_.-/"},
	{"sk_live_", 8, 8, "_.-"}, {"sk_test_", 16, 16, "_.-"}, {"rk_live_", 8, 8, "_.-"}, {"rk_test_", 16, 16, "_.-"}, {"whsec_", 8, 16, "_.-+/="},
	{"hvs.", 8, 16, "_.-"}, {"hvb.", 8, 16, "_.-"}, {"hvr.", 8, 16, "_.-"}, {"SG.", 12, 16, "_.-"}, {"hf_", 16, 16, ""},
	{"sk-ant-", 0, 16, "_.-"}, {"sk-proj-", 8, 16, "_.-"}, {"sk-svcacct-", 8, 16, "_.-"}, {"gsk_", 20, 20, ""},
	{"shpat_", 16, 16, ""}, {"shpss_", 16, 16, ""}, {"shpca_", 16, 16, ""}, {"shppa_", 16, 16, ""},
	{"dop_v1_", 16, 16, ""}, {"doo_v1_", 16, 16, ""}, {"dor_v1_", 16, 16, ""}, {"dapi", 32, 32, ""}, {"glsa_", 16, 16, "_.-"}, {"glc_", 24, 24, "_.-+/="},
	{"pul-", 30, 30, ""}, {"ATATT3", 16, 16, "_.-+/="}, {"sntrys_", 16, 16, "_.-+/="}, {"sntryu_", 16, 16, ""}, {"tskey-", 0, 16, "_.-"},
	{"sqp_", 20, 20, ""}, {"squ_", 20, 20, ""}, {"sqa_", 20, 20, ""}, {"sbp_", 20, 20, ""}, {"AKCp", 20, 20, ""}, {"bkua_", 20, 20, ""}, {"CCIPAT_", 8, 16, "_"},
	{"lin_api_", 16, 16, ""}, {"dp.pt.", 16, 16, ""}, {"dp.st.", 2, 16, "_.-"},
	{"PMAK-", 0, 16, "_.-"}, {"NRAK-", 0, 16, "_.-"}, {"AGE-SECRET-KEY-", 0, 16, ""}, {"eyJ", 12, 12, "_.-+/="}, {"-----BEGIN", 0, 0, "*"},
}

// bodyLength returns how many characters of the token stand at the beginning of rest,
// or -1 if they are too few.
func (t *token) bodyLength(rest string) int {
	if t.body == "*" {
		return len(rest)
	}
	head := 0
	for head < len(rest) && letterOrDigit(rest[head]) && (t.body != "A" || rest[head] < 'a') {
		head++
	}
	n := head
	if t.body != "A" {
		for n < len(rest) && (letterOrDigit(rest[n]) || strings.IndexByte(t.body, rest[n]) >= 0) {
			n++
		}
	}
	if head < t.head || n < t.min {
		return -1
	}
	return n
}

// shapes returns the parts of value that have the shape of a token.
func (s *scrubber) shapes(value string) []span {
	if s.known.width == 0 {
		s.known.width = 3
		for i := range tokens {
			s.known.add(tokens[i].prefix)
		}
	}
	return s.forms(value, false, func(text string) (found []span) {
		s.known.search(s, text, func(at, n int) {
			if len(found) > 0 && at < found[len(found)-1].to {
				return
			}
			t := &tokens[n]
			if body := t.bodyLength(text[at+len(t.prefix):]); body >= 0 {
				found = append(found, span{at, at + len(t.prefix) + body})
			}
		})
		return found
	})
}

// random returns the parts of value that look random. Where loose is false, those are
// long runs of letters and digits alone, as names of images and platforms hardly have
// them; otherwise other characters of encoded keys may be among them.
func (s *scrubber) random(value string, loose bool) []span {
	s.spend(3 * len(value))
	return randomRuns(value, loose)
}

// ownSecrets returns the parts of value that are the job's own secrets.
func (s *scrubber) ownSecrets(value string) []span {
	if s.own.width == 0 {
		return nil
	}
	return s.forms(value, true, func(text string) (found []span) {
		s.own.search(s, text, func(at, n int) {
			to := at + len(s.own.items[n])
			if last := len(found) - 1; last >= 0 && at <= found[last].to {
				found[last].to = max(found[last].to, to)
			} else {
				found = append(found, span{at, to})
			}
		})
		return found
	})
}

// forms searches a value as it is and without the escapes of URLs and JSON in it, and
// returns what was found as parts of the value itself.
func (s *scrubber) forms(value string, spaces bool, search func(string) []span) []span {
	found := search(value)
	escaped := strings.IndexByte(value, '%') >= 0 || strings.IndexByte(value, '\\') >= 0
	for _, plus := range [...]bool{false, true} {
		if plus && (!spaces || strings.IndexByte(value, '+') < 0) || !plus && !escaped {
			continue
		}
		s.spend(2 * len(value))
		text, origin := unescape(value, plus)
		for _, part := range search(text) {
			found = append(found, span{origin[part.from], origin[part.to]})
		}
	}
	return found
}

// unescape replaces %41, \n and \u0041, and with plus also + for a space. origin tells
// for each byte of text, and for its end, where in s it comes from.
func unescape(s string, plus bool) (text string, origin []int) {
	b := make([]byte, 0, len(s))
	origin = make([]int, 0, len(s)+1)
	for i := 0; i < len(s); {
		c, n := s[i], 1
		switch {
		case c == '%' && i+2 < len(s) && unhex(s[i+1]) >= 0 && unhex(s[i+2]) >= 0:
			c, n = byte(unhex(s[i+1])<<4|unhex(s[i+2])), 3
		case c == '+' && plus:
			c = ' '
		case c == '\\' && i+1 < len(s):
			n = 2
			switch c = s[i+1]; c {
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 't':
				c = '\t'
			case 'u':
				code := 0
				for j := i + 2; j < i+6; j++ {
					if j >= len(s) || unhex(s[j]) < 0 {
						code = -1
						break
					}
					code = code<<4 | unhex(s[j])
				}
				if code < 0 {
					break
				}
				for _, r := range []byte(string(rune(code))) {
					b, origin = append(b, r), append(origin, i)
				}
				i += 6
				continue
			}
		}
		b, origin = append(b, c), append(origin, i)
		i += n
	}
	return string(b), append(origin, len(s))
}

// An index finds which of many strings begin where in a text, in one pass: by a table
// of their first bytes. None may be shorter than width.
type index struct {
	width int // 3 or 6
	items []string
	next  []int16        // the next item with the same place in heads, counted from 1
	heads [1 << 11]int16 // the first item, counted from 1
}

func (x *index) place(window uint64) uint64 { return window * 0x9e3779b97f4a7c15 >> (64 - 11) }

func (x *index) add(item string) {
	var window uint64
	for i := 0; i < x.width; i++ {
		window = window<<8 | uint64(item[i])
	}
	head := &x.heads[x.place(window)]
	x.items = append(x.items, item)
	x.next = append(x.next, *head)
	*head = int16(len(x.items))
}

// search calls found for each item that stands in text, in the order of their ends of
// the first width bytes.
func (x *index) search(s *scrubber, text string, found func(at, n int)) {
	s.spend(len(text))
	var window uint64
	mask := uint64(1)<<(8*x.width) - 1
	for i := 0; i < len(text) && !s.tired; i++ {
		window = (window<<8 | uint64(text[i])) & mask
		for n := x.heads[x.place(window)]; n > 0; n = x.next[n-1] {
			at := i + 1 - x.width
			if at < 0 {
				break
			}
			item := x.items[n-1]
			s.spend(8) // a comparison
			if strings.HasPrefix(text[at:], item) {
				s.spend(len(item))
				found(at, int(n-1))
			}
		}
	}
}

// randomRuns returns the runs of characters that are as random as keys are and names
// and words are not, by Shannon's entropy: at least 20 with 4.0 bits for each. Digests
// and commit ids, hex of 40 or 64 digits, are no secrets.
func randomRuns(s string, loose bool) (found []span) {
	if len(s) < minRandom {
		return nil
	}
	eachRun(s, "", func(from, to int) {
		if run := s[from:to]; !commitOrDigest(run) && entropyAtLeast(run, 4<<16) {
			if loose { // the whole word
				for from > 0 && (letterOrDigit(s[from-1]) || strings.IndexByte(encoded, s[from-1]) >= 0) {
					from--
				}
				for to < len(s) && (letterOrDigit(s[to]) || strings.IndexByte(encoded, s[to]) >= 0) {
					to++
				}
			}
			if last := len(found) - 1; last < 0 || found[last] != (span{from, to}) {
				found = append(found, span{from, to})
			}
		}
	})
	if !loose {
		// In a tag dashes and underscores may be those of base64url, or part words. Words
		// keep to one kind of character for a while, keys do not.
		eachRun(s, "_-", func(from, to int) {
			if run := s[from:to]; restless(run) && mixed(run) && entropyAtLeast(run, 4<<16) {
				found = append(found, span{from, to})
			}
		})
		return found
	}
	eachRun(s, encoded, func(from, to int) {
		if run := s[from:to]; mixed(run) && entropyAtLeast(run, 4<<16) {
			found = append(found, span{from, to})
		}
	})
	// Standard base64 has slashes too, and so have paths, which are less random.
	eachRun(s, encoded+"/", func(from, to int) {
		if run := s[from:to]; len(run) >= 32 && mixed(run) && entropyAtLeast(run, 9<<15) {
			found = append(found, span{from, to})
		}
	})
	return found
}

const (
	minRandom = 20     // the shortest run that can be called random
	encoded   = "_-+=" // what encoded keys hold besides letters and digits
)

// eachRun calls f for the runs of letters, digits and more of at least minRandom.
func eachRun(s, more string, f func(from, to int)) {
	for start := 0; start < len(s); {
		end := start
		for end < len(s) && (letterOrDigit(s[end]) || more != "" && strings.IndexByte(more, s[end]) >= 0) {
			end++
		}
		if end-start >= minRandom {
			f(start, end)
		}
		start = end + 1
	}
}

func commitOrDigest(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}

// mixed tells whether s has capitals, small letters and digits.
func mixed(s string) bool {
	var capital, small, digit bool
	for i := 0; i < len(s); i++ {
		c := s[i]
		capital = capital || c >= 'A' && c <= 'Z'
		small = small || c >= 'a' && c <= 'z'
		digit = digit || c >= '0' && c <= '9'
	}
	return capital && small && digit
}

// restless tells whether at least every third letter or digit is of another kind
// (capital, small, digit) than the one before, and every fourth differs in being a
// capital: an id of digits and small letters is as restless as a key otherwise.
func restless(s string) bool {
	kind := func(c byte) int {
		switch {
		case c >= 'a':
			return 1
		case c >= 'A':
			return 2
		}
		return 3
	}
	changes, capitals, n, last := 0, 0, 0, 0
	for i := 0; i < len(s); i++ {
		if !letterOrDigit(s[i]) {
			continue
		}
		n++
		k := kind(s[i])
		if k != last {
			changes++
		}
		if (k == 2) != (last == 2) {
			capitals++
		}
		last = k
	}
	return 3*changes >= n && 4*capitals >= n
}

// entropyAtLeast computes n*H = n*log2(n) - sum(c*log2(c)) with 16 binary digits after
// the point and compares it with n times limit.
func entropyAtLeast(s string, limit int) bool {
	var counts [128]int
	for i := 0; i < len(s); i++ {
		counts[s[i]]++ // ASCII only
	}
	sum := len(s) * log2(len(s))
	for _, c := range counts {
		if c > 1 {
			sum -= c * log2(c)
		}
	}
	return sum >= limit*len(s)
}

// log2 returns the binary logarithm of n >= 1 with 16 binary digits after the point,
// by repeated squaring; it keeps package math and its tables out of the shim.
func log2(n int) int {
	exponent := bits.Len(uint(n)) - 1
	x := uint64(n) << 31 >> exponent // 1 <= x < 2 with 31 digits after the point, so that x*x fits
	result := exponent << 16
	for bit := 1 << 15; bit > 0; bit >>= 1 {
		x = x * x >> 31
		if x >= 2<<31 {
			x >>= 1
			result |= bit
		}
	}
	return result
}

// minNeedle is the length from which the value of a secret variable is searched for;
// shorter ones (true, none, 8080) would hide half of all records.
const minNeedle = 6

// secrets finds out what must not occur in a value: the values of the caller's
// variables whose names look secret, each line of them alone too, and their base64 in
// its three alignments and both alphabets, and their hexadecimal digits.
func (s *scrubber) secrets() {
	if s.ready {
		return
	}
	s.ready = true
	count, size := 0, 0
	add := func(secret string) {
		if len(secret) < minNeedle || len(secret) > maxWord || s.blind {
			return
		}
		if count, size = count+1, size+len(secret); count > maxSecrets || size > maxSecretBytes {
			s.blind, s.own = true, index{}
			return
		}
		if s.own.width == 0 {
			s.own.width = minNeedle
			s.own.items, s.own.next = make([]string, 0, 64), make([]int16, 0, 64)
		}
		s.own.add(secret)
		for shift := range 3 {
			b := base64Core(secret, shift)
			if len(b) < minNeedle {
				continue
			}
			s.own.add(b)
			if strings.ContainsAny(b, "+/") {
				s.own.add(strings.NewReplacer("+", "-", "/", "_").Replace(b))
			}
		}
		lower, upper := hexForms(secret)
		s.own.add(lower)
		if upper != lower {
			s.own.add(upper)
		}
	}
	for _, kv := range s.environ {
		if s.blind {
			return
		}
		name, value, ok := strings.Cut(kv, "=")
		if !ok || len(value) < minNeedle || !secretName(name) {
			continue
		}
		s.secretsIn(name, value, add)
	}
}

// secretsIn calls add for a secret variable's value and the parts of it that may be on a
// command line alone: its lines, what quotes enclose, the password of a URL or of
// user:password, what is secret by name in JSON, and the values of a list of secrets
// (NAME=value in each line, as docker/build-push-action takes it).
func (s *scrubber) secretsIn(name, value string, add func(string)) {
	if value = strings.TrimSpace(value); value == "" {
		return
	}
	if strings.Contains(value, `\n`) && !strings.Contains(value, "\n") && value[0] != '{' && value[0] != '[' {
		add(value)
		value = strings.ReplaceAll(strings.ReplaceAll(value, `\r\n`, "\n"), `\n`, "\n") // a file in one line
	}
	if strings.ContainsAny(value, "\r\n") {
		add(value)
	}
	if value[0] == '{' || value[0] == '[' {
		s.spend(2 * len(value))
		jsonSecrets(value, add)
	}
	list := strings.Contains(strings.ToUpper(name), "SECRETS")
	for rest := value; rest != "" && !s.blind; {
		line := rest
		if end := strings.IndexAny(rest, "\r\n"); end >= 0 {
			line, rest = rest[:end], rest[end+1:]
		} else {
			rest = ""
		}
		if line = strings.TrimSpace(line); len(line) < minNeedle {
			continue
		}
		add(line)
		bare := strings.Trim(line, "\"'")
		if bare != line {
			add(bare)
		}
		if padless := strings.TrimRight(bare, "="); padless != bare {
			add(padless) // base64, whose padding may be left out, or taken for KEY=
		}
		if key, v, ok := strings.Cut(bare, "="); ok && nameLike(key, "_.-") && (list || secretName(key)) {
			add(strings.Trim(v, "\"'"))
		}
		if strings.IndexByte(bare, ' ') >= 0 {
			credential := false // Authorization: Bearer x, or a line of .netrc
			for word := range strings.SplitSeq(bare, " ") {
				if credential {
					add(word)
				}
				word = strings.ToLower(word)
				credential = word == "bearer" || word == "basic" || word == "token" || word == "password"
			}
		}
		if scheme, v, ok := strings.Cut(bare, "://"); ok && nameLike(scheme, "+-.") {
			v, _, _ = strings.Cut(v, "?")
			if at := strings.LastIndexByte(v, '@'); at >= 0 {
				user, password, _ := strings.Cut(v[:at], ":")
				add(password)
				if password == "" {
					add(user)
				}
			}
		} else if user, password, ok := strings.Cut(bare, ":"); ok && user != "" && !strings.ContainsAny(bare, " /{\"") {
			add(password)
		}
	}
}

// jsonSecrets calls add for the strings in a JSON text whose keys say that they are
// secret. Others, such as the id of a cloud's project, are parts of harmless names.
func jsonSecrets(text string, add func(string)) {
	key := ""
	for i := 0; i < len(text); i++ {
		if text[i] != '"' {
			if strings.IndexByte(" \t\r\n:", text[i]) < 0 {
				key = "" // a number, an object, or the end of one
			}
			continue
		}
		end := i + 1
		for end < len(text) && text[end] != '"' {
			if text[end] == '\\' {
				end++
			}
			end++
		}
		if end >= len(text) {
			return
		}
		word := text[i+1 : end]
		after := strings.TrimLeft(text[end+1:], " \t\r\n")
		switch {
		case after != "" && after[0] == ':':
			key = word
		case key != "" && secretName(key) && len(word) >= minNeedle:
			if strings.IndexByte(word, '\\') >= 0 {
				word, _ = unescape(word, false)
				for line := range strings.SplitSeq(word, "\n") {
					add(strings.TrimSpace(line))
				}
			}
			add(word)
			key = ""
		default:
			key = ""
		}
		i = end
	}
}

// secretName tells whether a name, of a variable or a key, says that the value is secret.
func secretName(name string) bool {
	name = strings.ToUpper(name)
	if strings.HasSuffix(name, "PUBLIC_KEY") || strings.HasSuffix(name, "CACHE_KEY") {
		return false
	}
	for _, part := range [...]string{"PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "CREDENTIAL", "PRIVATE_KEY", "PRIVATEKEY", "ACCESS_KEY", "ACCESSKEY",
		"ACCOUNTKEY", "API_KEY", "APIKEY", "API-KEY", "CONNECTION_STRING", "CONNECTIONSTRING", "WEBHOOK"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	for first := true; name != ""; first = false {
		word := name
		if end := strings.IndexAny(name, "_-."); end >= 0 { // INPUT_MY-PAT is how an action gets my-pat
			word, name = name[:end], name[end+1:]
		} else {
			name = ""
		}
		switch word {
		case "PAT", "AUTH", "DSN", "JWT":
			return true
		case "PASS", "PW":
			if name == "" {
				return true
			}
		case "KEY", "PWD": // not alone: PWD is the shell's own
			if name == "" && !first {
				return true
			}
		}
	}
	return false
}

const base64Digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

// base64Core returns the digits of base64 that depend on s alone when s starts shift
// bytes after a multiple of three. The last digit of all is left out: what follows s may
// share it.
func base64Core(s string, shift int) string {
	n := (8*(shift+len(s)) - 1) / 6 // digits whose six bits lie within shift and s, not at its very end
	skip := (8*shift + 5) / 6       // the first ones mix with the bytes before
	if n <= skip {
		return ""
	}
	out := make([]byte, 0, n)
	acc, nbits := uint(0), uint(8*shift)
	for nbits >= 6 {
		nbits -= 6
		out = append(out, 'A')
	}
	for i := 0; i < len(s) && len(out) < n; i++ {
		acc = acc<<8 | uint(s[i])
		nbits += 8
		for nbits >= 6 && len(out) < n {
			nbits -= 6
			out = append(out, base64Digits[acc>>nbits&63])
		}
	}
	return string(out[skip:])
}

// hexForms returns the hexadecimal digits of s, small and capital.
func hexForms(s string) (lower, upper string) {
	const small, capital = "0123456789abcdef", "0123456789ABCDEF"
	l, u := make([]byte, 0, 2*len(s)), make([]byte, 0, 2*len(s))
	for i := 0; i < len(s); i++ {
		l = append(l, small[s[i]>>4], small[s[i]&15])
		u = append(u, capital[s[i]>>4], capital[s[i]&15])
	}
	return string(l), string(u)
}
