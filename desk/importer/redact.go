package importer

import (
	"net/netip"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/wrapper"
)

const redacted = "[REDACTED]"

// sanitizer takes secrets out of cells. Cells repeat, so what was found is kept for a
// while: user agents and paths are examined once and not ten million times.
type sanitizer struct {
	redactor wrapper.Redactor
	texts    map[string]string
	paths    map[string]string
	targets  map[string]target
	images   map[string]string
}

// maxCached bounds each of the maps; a full one begins anew.
const maxCached = 32 << 10

func newSanitizer() *sanitizer {
	return &sanitizer{texts: map[string]string{}, paths: map[string]string{}, targets: map[string]target{}, images: map[string]string{}}
}

func cached[T any](m map[string]T, key string, f func(string) T) T {
	if v, ok := m[key]; ok {
		return v
	}
	v := f(key)
	if len(m) >= maxCached {
		clear(m)
	}
	if len(key) <= 1024 {
		m[strings.Clone(key)] = v // the key is a part of its row, which would stay with it
	}
	return v
}

// maxText is the longest text that is kept, in bytes.
const maxText = 512

// text is a cell without what looks like a secret.
func (s *sanitizer) text(v string) string {
	if v == "" {
		return ""
	}
	return cached(s.texts, v, func(v string) string { return record.Clean(s.redactor.Redact(v), maxText) })
}

// target is what is kept of a URL.
type target struct {
	method string // of a request line
	host   string
	path   string
	push   bool // service=git-receive-pack
}

// target reads a URL, a path, or the first line of a request.
func (s *sanitizer) target(v string) target {
	if v == "" {
		return target{}
	}
	return cached(s.targets, v, s.parseTarget)
}

func (s *sanitizer) parseTarget(v string) (t target) {
	if method, rest, ok := strings.Cut(v, " "); ok && isMethod(method) {
		t.method = strings.ToUpper(method)
		v, _, _ = strings.Cut(strings.TrimSpace(rest), " ")
	}
	_, rest, absolute := strings.Cut(v, "://")
	if !absolute {
		rest = v
	}
	rest, _, _ = strings.Cut(rest, "#")
	rest, query, _ := strings.Cut(rest, "?")
	t.push = strings.Contains("&"+query+"&", "&service=git-receive-pack&")
	if !absolute && !strings.HasPrefix(rest, "//") {
		first, _, _ := strings.Cut(rest, "/")
		if !strings.Contains(first, ".") || strings.HasPrefix(rest, "/") || !validHost(first) {
			if !strings.HasPrefix(rest, "/") {
				rest = "/" + rest
			}
			if strings.Contains(first, "@") { // user:password@host/path
				t.path = redacted
				return t
			}
			t.path = s.path(rest)
			return t
		}
	}
	authority, path, hasPath := strings.Cut(strings.TrimPrefix(rest, "//"), "/")
	host := authority
	if at := strings.LastIndexByte(host, '@'); at >= 0 {
		host = host[at+1:]
	}
	// An unescaped slash, question mark or hash in a password ends the authority before
	// the real host; then an @ is behind it, and the host is no host.
	_, fragment, _ := strings.Cut(v, "#")
	later := strings.Contains(query, "@") || strings.Contains(fragment, "@") || slugAt(path)
	if !validHost(host) || later && !strings.Contains(authority, "@") && (!strings.Contains(host, ".") || strings.Contains(host, ":")) {
		t.path = redacted
		return t
	}
	t.host = s.host(host)
	if hasPath {
		t.path = s.path("/" + path)
	}
	return t
}

// slugAt tells whether a segment holds an @ behind its first character; @scope and
// @v are names in package registries.
func slugAt(path string) bool {
	for segment := range strings.SplitSeq(path, "/") {
		if strings.LastIndexByte(segment, '@') > 0 {
			return true
		}
	}
	return false
}

// validHost tells whether s is a domain or an address, with or without a port.
func validHost(s string) bool {
	if _, err := netip.ParseAddrPort(s); err == nil {
		return true
	}
	if _, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return true
	}
	name, port, hasPort := strings.Cut(s, ":")
	if hasPort && (port == "" || len(port) > 5 || strings.Trim(port, "0123456789") != "") {
		return false
	}
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || strings.Trim(strings.ToLower(label), "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}

// host is a valid host in lower case without the port of http and https, or nothing.
func (s *sanitizer) host(v string) string {
	if !validHost(v) {
		return ""
	}
	if s.text(v) != v { // in small letters a token would have another shape
		return redacted
	}
	v = strings.ToLower(strings.TrimSuffix(strings.TrimSuffix(v, ":443"), ":80"))
	return strings.TrimSuffix(v, ".")
}

// path is an absolute path without secrets. It never holds a query.
func (s *sanitizer) path(v string) string {
	return cached(s.paths, v, func(v string) string {
		v, _, _ = strings.Cut(v, "#")
		v, _, _ = strings.Cut(v, "?")
		if strings.Contains(v, "://") || len(v) > 4096 {
			return redacted
		}
		segments := strings.Split(v, "/")
		length := 0
		for i, segment := range segments {
			if segment == "" {
				continue
			}
			switch bare, _, more := strings.Cut(segment, ";"); {
			case more: // parameters such as ;jsessionid=
				segments[i] = s.segment(bare) + ";" + redacted
			case i > 1 && tells(segments[i-1]) && !strings.Contains(wellKnown, " "+segment+" "):
				segments[i] = redacted
			default:
				segments[i] = s.segment(segment)
			}
			if length += len(segments[i]) + 1; length > maxText {
				segments = append(segments[:i], "...")
				break
			}
		}
		joined := strings.Join(segments, "/")
		// Shapes that span segments, such as those of web hooks.
		if lower := strings.ToLower(v); strings.Contains(lower, "/services/t") || strings.Contains(lower, "/api/webhooks/") {
			return redacted
		}
		return record.Clean(joined, maxText+64)
	})
}

// tells tells whether what follows a segment is a secret.
func tells(segment string) bool {
	switch strings.ToLower(segment) {
	case "token", "tokens", "access_token", "secret", "password", "passwd", "apikey", "api_key", "api-key":
		return true
	}
	return false
}

// wellKnown are segments that may follow a repository whose name tells.
const wellKnown = " info manifests blobs tags git-upload-pack git-receive-pack archive releases tarball zipball contents git raw pulls issues actions tree blob commits branches refs "

func (s *sanitizer) segment(v string) string {
	if at := strings.LastIndexByte(v, '@'); at > 0 && strings.Contains(v[:at], ":") {
		return redacted // user:password@host
	}
	if key, value, ok := strings.Cut(v, "="); ok && value != "" {
		return s.text(key) + "=" + redacted
	}
	if bare := strings.TrimPrefix(v, "@"); s.text(bare) != bare { // @scope is a name in package registries
		return redacted
	}
	return v
}
