package wrapper

import (
	"strconv"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
)

// What follows makes the redacted command line, which is kept only where the
// configuration says record_argv. Default deny holds here too: a value is shown for the
// flags of flagValues alone, and whatever is shown has gone through scrubber.redact.

const (
	redacted   = "[REDACTED]"    // a value, or the part of one, that was dropped
	invalidRef = "[INVALID-REF]" // something that stands where an image should, and is none
)

// Bounds of the redacted line. What does not fit is left out, and the record says
// truncated.
const (
	maxWord     = 4 << 10 // a longer word is dropped whole: a cut could go through a secret
	maxArgv     = 8 << 10 // bytes of all words together
	maxRedacted = 64 << 10
)

// A valueKind says what is shown of a flag's value.
type valueKind uint8

const (
	dropped   valueKind = iota // nothing
	asKey                      // KEY of KEY=value
	asText                     // the value, without what looks like a secret
	asImage                    // the value, if it is an image reference
	asWord                     // the value, if it is one of a closed set
	asMembers                  // some members of a list such as type=image,name=x
	asContext                  // NAME of NAME=value, and the value if it is a URL
)

// where a flagValue holds.
type place uint8

const (
	anywhere place = iota
	inBuild        // docker build and its other names, imagetools create for tags
	inBake         // the same, and bake
)

// flagValues are the flags of which more than the name is shown. docs/redaction.md
// repeats the list; a test compares the two.
var flagValues = [...]struct {
	flag  string
	kind  valueKind
	in    place
	words string // the closed set of asWord
}{
	{"platform", asText, anywhere, ""},
	{"target", asText, inBuild, ""},
	{"tag", asImage, inBuild, ""},
	{"file", asText, inBake, ""},
	{"builder", asText, anywhere, ""},
	{"progress", asWord, anywhere, "auto plain tty quiet rawjson json none"},
	{"pull", asWord, anywhere, "always missing never true false"},
	{"network", asWord, anywhere, "bridge host none default"},
	{"driver", asWord, anywhere, "local bridge host overlay macvlan ipvlan none docker docker-container kubernetes remote cloud"},
	{"image", asImage, anywhere, ""},

	{"annotation", asKey, anywhere, ""},
	{"build-arg", asKey, anywhere, ""},
	{"change", asKey, anywhere, ""},
	{"container-label", asKey, anywhere, ""},
	{"container-label-add", asKey, anywhere, ""},
	{"driver-opt", asKey, anywhere, ""},
	{"env", asKey, anywhere, ""},
	{"env-add", asKey, anywhere, ""},
	{"env-rm", asKey, anywhere, ""},
	{"label", asKey, anywhere, ""},
	{"label-add", asKey, anywhere, ""},
	{"label-rm", asKey, anywhere, ""},
	{"log-opt", asKey, anywhere, ""},
	{"opt", asKey, anywhere, ""},
	{"set", asKey, anywhere, ""},
	{"ssh", asKey, anywhere, ""},
	{"storage-opt", asKey, anywhere, ""},
	{"sysctl", asKey, anywhere, ""},
	{"ulimit", asKey, anywhere, ""},
	{"var", asKey, anywhere, ""},

	{"attest", asMembers, anywhere, ""},
	{"cache-from", asMembers, anywhere, ""},
	{"cache-to", asMembers, anywhere, ""},
	{"docker", asMembers, anywhere, ""},
	{"mount", asMembers, anywhere, ""},
	{"output", asMembers, anywhere, ""},
	{"provenance", asMembers, anywhere, ""},
	{"sbom", asMembers, anywhere, ""},
	{"secret", asMembers, anywhere, ""},

	{"build-context", asContext, anywhere, ""},
}

// members are what is shown of a list of members: the values that are one of a closed
// set, texts, names of variables and image references.
var members = [...]struct {
	key   string
	kind  valueKind
	words string
}{
	{"type", asWord, "registry local inline gha s3 azblob image docker oci tar cacheonly bind volume tmpfs npipe cluster file env sbom provenance"},
	{"mode", asWord, "min max 0400 0440 0444 0600 0640 0644 0700 0755"},
	{"id", asText, ""},
	{"env", asKey, ""},
	{"ref", asImage, ""},
	{"name", asImage, ""},
	{"generator", asImage, ""},
	{"image", asImage, ""},
	{"push", asWord, "true false"},
	{"load", asWord, "true false"},
	{"unpack", asWord, "true false"},
	{"store", asWord, "true false"},
	{"readonly", asWord, "true false"},
	{"required", asWord, "true false"},
	{"disabled", asWord, "true false"},
	{"compression", asWord, "uncompressed gzip estargz zstd"},
	{"force-compression", asWord, "true false"},
	{"oci-mediatypes", asWord, "true false"},
	{"image-manifest", asWord, "true false"},
	{"ignore-error", asWord, "true false"},
	{"rewrite-timestamp", asWord, "true false"},
}

// emit appends a word to the redacted line. What it is given is clean already.
func (p *parser) emit(word string) {
	if !p.whole {
		return
	}
	if len(p.argv) == maxList || p.emitted+len(word) > maxArgv || p.examined > maxRedacted {
		p.clipped, p.whole = true, false
		return
	}
	p.emitted += len(word)
	p.argv = append(p.argv, word)
}

// emitPair appends --name=value.
func (p *parser) emitPair(name, value string) {
	if p.whole {
		p.emit(name + "=" + value)
	}
}

// emitCount stands for words that are only counted: those behind the image belong to
// the container. No hash of them either, since that of a weak secret gives it away.
func (p *parser) emitCount(n int) {
	if p.whole {
		p.emit("[ARGS:" + strconv.Itoa(n) + "]")
	}
}

func (p *parser) emitImage(ref string, kept bool) {
	switch {
	case !p.whole:
	case kept:
		p.emit(ref)
	case validReference(ref):
		p.emit(redacted)
	default:
		p.emit(invalidRef)
	}
}

// emitOperand appends a path, a name, a URL, or the name of NAME=value.
func (p *parser) emitOperand(arg string) {
	if !p.whole {
		return
	}
	if key, _, ok := strings.Cut(arg, "="); ok && !strings.Contains(key, "://") && !headerShape(arg) && !jsonShape(arg) {
		switch key = p.scrub.redact(key); {
		case p.scrub.cutsSecret(arg, "="), strings.ContainsAny(key, "@ "):
			key = redacted
		case strings.ContainsAny(key, "?;") && !strings.Contains(key, redacted): // a.test/x?token=
			key = key[:strings.IndexAny(key, "?;")+1] + redacted
		}
		p.emitPair(key, redacted)
		return
	}
	p.emit(p.scrub.redact(arg))
}

// emitStrange appends an operand of a command that is in no table: only what looks
// like a further word of it, since it may as well be a prompt or a password.
func (p *parser) emitStrange(arg string) {
	if p.whole {
		if strings.Trim(arg, "abcdefghijklmnopqrstuvwxyz-") != "" || len(arg) > 32 || !p.scrub.keepText(arg) {
			arg = redacted
		}
		p.emit(arg)
	}
}

// boolean shows the value of a flag that is on or off.
func boolean(value string) string { return wordOf(value, "true false 1 0") }

// wordOf shows a value that is one of a closed set, apart by spaces.
func wordOf(value, set string) string {
	if value == "" {
		return ""
	}
	for set != "" {
		var word string
		word, set, _ = strings.Cut(set, " ")
		if word == value {
			return word
		}
	}
	return redacted
}

// redactValue returns what is shown of a flag's value.
func (p *parser) redactValue(flag, value string) string {
	kind, words := dropped, ""
	for i := range flagValues {
		f := &flagValues[i]
		if f.flag != flag {
			continue
		}
		switch f.in {
		case inBuild:
			if !p.isBuild() && p.command != "buildx imagetools create" {
				return redacted
			}
		case inBake:
			if !p.isBuild() && !p.isBake() {
				return redacted
			}
		}
		kind, words = f.kind, f.words
		break
	}
	switch kind {
	case asKey, asMembers, asContext:
		if p.scrub.cutsSecret(value, "=,") {
			return redacted // a part of the secret would be shown for a name
		}
	}
	switch kind {
	case asText, asImage, asWord:
		return p.scrub.show(kind, value, words)
	case asKey:
		key, _, ok := strings.Cut(value, "=")
		if !ok {
			return p.scrub.bareName(value, flag == "env" || flag == "build-arg" || flag == "env-add" || flag == "env-rm")
		}
		return p.scrub.key(key) + "=" + redacted
	case asMembers:
		return p.scrub.redactMembers(value, flag == "cache-from" || flag == "cache-to")
	case asContext:
		key, v, ok := strings.Cut(value, "=")
		if !ok || !strings.Contains(v, "://") {
			v = redacted
		} else {
			v = p.scrub.redact(v)
		}
		if !ok {
			return redacted
		}
		return p.scrub.key(key) + "=" + v
	}
	return redacted
}

// show returns what is shown of a value by its kind.
func (s *scrubber) show(kind valueKind, value, words string) string {
	switch kind {
	case asText:
		return s.redact(value)
	case asImage:
		switch {
		case !validReference(value):
			return invalidRef
		case s.keep(value):
			return value
		}
	case asWord:
		return wordOf(value, words)
	}
	return redacted
}

// key returns the key of KEY=value, if it looks like one.
func (s *scrubber) key(key string) string {
	if !nameLike(key, "_.-*/") || !s.keepText(key) {
		return redacted
	}
	return key
}

// bareName returns a name that stands alone because its value comes from elsewhere.
// Names of variables have fewer characters than those of labels.
func (s *scrubber) bareName(name string, variable bool) string {
	more := "_.-/"
	if variable {
		more = "_"
	}
	if !nameLike(name, more) || !s.keepText(name) {
		return redacted
	}
	return name
}

// nameLike tells whether s is a letter, or one of more but a dash, and then letters,
// digits and more.
func nameLike(s, more string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; !letterOrDigit(c) && strings.IndexByte(more, c) < 0 || i == 0 && (c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return s != "" && len(s) <= 128
}

// redactMembers shows of a list such as type=image,name=x,push=true the keys, and the
// values of members. A cache may be named by an image reference alone.
func (s *scrubber) redactMembers(list string, cache bool) string {
	if len(list) > maxWord {
		return redacted
	}
	if !strings.Contains(list, "=") {
		if cache && s.imageList(list) == list {
			return list
		}
		return wordOf(list, "true false") // --provenance=false
	}
	var b strings.Builder
	for list != "" {
		var item string
		item, list = csvField(list)
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		key, value, ok := strings.Cut(item, "=")
		if !ok {
			b.WriteString(wordOf(key, "readonly ro rw required"))
			continue
		}
		shown := redacted
		for i := range members {
			if m := &members[i]; m.key == key {
				switch {
				case m.kind == asKey:
					shown = s.bareName(value, true)
				case m.kind == asImage && strings.Contains(value, ","):
					shown = s.imageList(value)
				case strings.ContainsAny(value, ",=\""): // a list in the list
				default:
					shown = s.show(m.kind, value, m.words)
				}
				break
			}
		}
		part := s.key(key) + "=" + shown
		if strings.ContainsAny(shown, ",\"") {
			part = `"` + strings.ReplaceAll(part, `"`, `""`) + `"`
		}
		b.WriteString(part)
	}
	return b.String()
}

// imageList shows image references that are apart by commas, if all may be shown.
func (s *scrubber) imageList(refs string) string {
	for rest := refs; rest != ""; {
		var ref string
		ref, rest, _ = strings.Cut(rest, ",")
		if !validReference(ref) || !s.keep(ref) {
			return redacted
		}
	}
	return refs
}

// csvField cuts the first field off a list in the manner of RFC 4180, which docker
// reads its lists by: a quoted field may hold commas, and doubled quotes.
func csvField(list string) (field, rest string) {
	if list[0] != '"' {
		field, rest, _ = strings.Cut(list, ",")
		return field, rest
	}
	for i := 1; i < len(list); i++ {
		if list[i] != '"' {
			continue
		}
		if i+1 < len(list) && list[i+1] == '"' {
			i++
			continue
		}
		_, rest, _ = strings.Cut(list[i+1:], ",")
		return strings.ReplaceAll(list[1:i], `""`, `"`), rest
	}
	return list[1:], ""
}

// csvValue returns the value of key in a list such as type=image,name=x,push=true.
func csvValue(list, key string) string {
	for list != "" {
		var item string
		item, list = csvField(list)
		if k, v, ok := strings.Cut(item, "="); ok && k == key {
			return v
		}
	}
	return ""
}

// redactURL drops from a URL whatever can be a secret: userinfo even without a colon (a
// token may be the user), the values of the query. A URL that does not come apart
// cleanly is dropped whole, up to its scheme.
func (s *scrubber) redactURL(url string) string {
	scheme, rest, _ := strings.Cut(url, "://")
	if !nameLike(scheme, "+-.") || !s.keepText(scheme) {
		return redacted
	}
	if scheme == "docker-image" {
		if !validReference(rest) || !s.keep(rest) {
			rest = redacted
		}
		return scheme + "://" + rest
	}
	unclear := scheme + "://" + redacted
	rest, fragment, hasFragment := strings.Cut(rest, "#")
	rest, query, hasQuery := strings.Cut(rest, "?")
	authority, path, hasPath := strings.Cut(rest, "/")
	// An unescaped slash, question mark or hash in a password ends the authority
	// before the real host: then the @ is behind it.
	if strings.Contains(path, "@") || strings.Contains(query, "@") || !linkText(fragment, "._/:-+~") {
		return unclear
	}
	var b strings.Builder
	b.WriteString(scheme)
	b.WriteString("://")
	host := authority
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		host = authority[at+1:]
		if host == "" {
			return unclear
		}
		b.WriteString(redacted + "@")
	}
	if host != "" && !validDomain(host) || !linkText(path, "._/:-+~,%[]") || !cleanEscapes(path) {
		return unclear
	}
	b.WriteString(host)
	if hasPath {
		b.WriteByte('/')
		b.WriteString(path)
	}
	for separator, more := "?", hasQuery; more; separator = "&" {
		var pair string
		pair, query, more = strings.Cut(query, "&")
		b.WriteString(separator)
		if key, _, ok := strings.Cut(pair, "="); ok {
			b.WriteString(s.key(key) + "=")
		}
		b.WriteString(redacted)
	}
	if hasFragment {
		b.WriteByte('#')
		b.WriteString(fragment)
	}
	return b.String()
}

// linkText tells whether s is made of letters, digits and more alone.
func linkText(s, more string) bool {
	for i := 0; i < len(s); i++ {
		if !letterOrDigit(s[i]) && strings.IndexByte(more, s[i]) < 0 {
			return false
		}
	}
	return true
}

// cleanEscapes tells whether each percent sign starts an escape.
func cleanEscapes(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && (i+2 >= len(s) || unhex(s[i+1]) < 0 || unhex(s[i+2]) < 0) {
			return false
		}
	}
	return true
}

func unhex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// headerNames are those whose values are credentials, in lower case.
var headerNames = [...]string{"authorization", "x-registry-auth", "x-registry-config", "private-token", "job-token", "deploy-token",
	"x-auth-token", "x-api-key", "x-vault-token", "api-key", "apikey", "cookie"}

// headerShape tells whether s has the form of an HTTP header with a credential, or a
// part of one.
func headerShape(s string) bool {
	colon := strings.IndexByte(s, ':')
	space := strings.IndexByte(s, ' ')
	if colon < 0 && space < 0 {
		return false
	}
	lower := strings.ToLower(s)
	if colon > 0 && strings.HasPrefix(lower, "x-") && nameLike(lower[:colon], "-_") && secretName(lower[:colon]) {
		return true
	}
	if colon >= 0 {
		for _, name := range headerNames {
			for rest := lower; ; {
				i := strings.Index(rest, name)
				if i < 0 {
					break
				}
				rest = rest[i+len(name):]
				if strings.HasPrefix(strings.TrimLeft(rest, " \t\"'"), ":") {
					return true
				}
			}
		}
	}
	for _, scheme := range [...]string{"bearer ", "basic ", "token "} {
		if i := strings.Index(lower, scheme); space >= 0 && i >= 0 && len(lower)-i-len(scheme) >= minNeedle {
			return true
		}
	}
	return false
}

// jsonShape tells whether s is a JSON object or list, which is nowhere a name or path.
func jsonShape(s string) bool {
	s = strings.TrimLeft(s, " \t\r\n'")
	return s != "" && (s[0] == '{' || s[0] == '[')
}

// assignment tells whether s has a name that says of its value that it is secret, and a
// value: password=x, "token": "x", ?sig_token=x. A path behind a colon is none: that is
// how docker cp names what is in a container.
func assignment(s string) bool {
	for at := 0; ; {
		i := strings.IndexAny(s[at:], ":=")
		if i < 0 {
			return false
		}
		i += at
		at = i + 1
		end := len(strings.TrimRight(s[:i], " \"'"))
		start := end
		for start > 0 && (letterOrDigit(s[start-1]) || s[start-1] == '_' || s[start-1] == '-' || s[start-1] == '.') {
			start--
		}
		value := strings.TrimLeft(s[i+1:], " \"'")
		host := start > 0 && s[start-1] == '@' // git@auth.example.com:acme/app.git
		if value != "" && !host && (s[i] == '=' || value[0] != '/') && secretName(s[start:end]) {
			return true
		}
	}
}

// cutsSecret tells whether one of the job's own secrets in value has one of these
// separators in it, so that value does not come apart at them.
func (s *scrubber) cutsSecret(value, separators string) bool {
	s.secrets()
	for _, part := range s.ownSecrets(value) {
		if strings.ContainsAny(value[part.from:part.to], separators) {
			return true
		}
	}
	return false
}

// redact returns value without what looks like a secret, as one line of at most
// maxWord bytes.
func (s *scrubber) redact(value string) string {
	if value == "" {
		return ""
	}
	if s.secrets(); len(value) > maxWord || s.blind || s.tired || headerShape(value) || jsonShape(value) {
		return redacted
	}
	if !strings.Contains(value, "://") && !validReference(value) {
		s.spend(2 * len(value))
		if assignment(value) {
			return redacted
		}
	}
	// The job's own secrets first, while they are in one piece.
	value = cutOut(value, s.ownSecrets(value))
	if strings.Contains(value, "://") {
		value = s.redactURL(value)
	} else if at := strings.LastIndexByte(value, '@'); at >= 0 && !validReference(value) && value[:at] != "git" {
		value = redacted + value[at:] // user:password@host/path without a scheme
	}
	value = cutOut(value, s.shapes(value))
	value = cutOut(value, s.random(value, true))
	if s.tired {
		return redacted
	}
	return record.Clean(value, maxWord)
}

// span is a part of a value, from a byte to the one before another.
type span struct{ from, to int }

// maxSpans bounds the sorting of parts; a value with more is nothing but secrets.
const maxSpans = 64

// cutOut replaces parts of a value. They may overlap and be in any order.
func cutOut(value string, parts []span) string {
	if len(parts) == 0 {
		return value
	}
	if len(parts) > maxSpans {
		return redacted
	}
	for i := 1; i < len(parts); i++ {
		for j := i; j > 0 && parts[j].from < parts[j-1].from; j-- {
			parts[j], parts[j-1] = parts[j-1], parts[j]
		}
	}
	var b strings.Builder
	end := 0
	for i := 0; i < len(parts); {
		from, to := parts[i].from, parts[i].to
		for i++; i < len(parts) && parts[i].from <= to; i++ {
			to = max(to, parts[i].to)
		}
		b.WriteString(value[end:from])
		b.WriteString(redacted)
		end = to
	}
	b.WriteString(value[end:])
	return b.String()
}

// firstBytes returns as many of the first words as fit max bytes together.
func firstBytes(words []string, max int) []string {
	for i, word := range words {
		if max -= len(word); max < 0 {
			return words[:i]
		}
	}
	return words
}
