package wrapper

import (
	"math/bits"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
)

// scrubber decides which of the few values that a record may hold are kept. A value
// that looks like a secret, or holds one of the job's own, is dropped whole.
type scrubber struct {
	environ []string
	needles []string // values of secret-looking variables, made at first use
	ready   bool
	blind   bool // there are more secrets than can be searched for
}

const (
	// maxValue is the longest value that is kept, and so the longest secret that one
	// could hold.
	maxValue = 512
	// maxNeedles bounds the search. With more secrets than this nothing is kept.
	maxNeedles = 1024
)

// keep tells whether a value may go into the record.
func (s *scrubber) keep(value string) bool {
	if len(value) > maxValue || value != record.Clean(value, maxValue) {
		return false
	}
	if tokenShape(value) || highEntropy(value) || strings.Contains(value, "://") {
		return false
	}
	for _, needle := range s.secrets() {
		if strings.Contains(value, needle) {
			return false
		}
	}
	return !s.blind
}

// tokenPrefixes start the tokens that services give out: GitHub, GitLab, Docker Hub,
// npm, PyPI, AWS, Google, Slack, Stripe, Vault, SendGrid, Hugging Face, Docker swarm,
// JSON Web Tokens and PEM.
var tokenPrefixes = [...]string{
	"ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_",
	"glpat-", "gldt-", "glptt-", "glrt-", "glcbt-",
	"dckr_pat_", "dckr_oat_", "npm_", "pypi-",
	"AKIA", "ASIA", "AIza", "ya29.", "GOCSPX-",
	"xoxb-", "xoxp-", "xoxa-", "xoxr-", "xoxs-", "xapp-",
	"sk_live_", "sk_test_", "rk_live_", "rk_test_", "whsec_",
	"hvs.", "hvb.", "hvr.", "SG.", "hf_", "SWMTKN-", "eyJ", "-----BEGIN",
}

// tokenShape tells whether s holds something of the shape of a known token: a prefix
// with at least eight characters of a token behind it.
func tokenShape(s string) bool {
	for _, prefix := range tokenPrefixes {
		for rest := s; ; {
			i := strings.Index(rest, prefix)
			if i < 0 {
				break
			}
			rest = rest[i+len(prefix):]
			n := 0
			for n < len(rest) && (letterOrDigit(rest[n]) || strings.IndexByte("_-.+/= ", rest[n]) >= 0) {
				n++
			}
			if n >= 8 {
				return true
			}
		}
	}
	return false
}

// highEntropy tells whether s has a run of at least 20 letters and digits with 4.0 or
// more bits per character (Shannon), as random keys have and words do not. Digests
// and commit ids, hex of 40 or 64 digits, are no secrets.
func highEntropy(s string) bool {
	for start := 0; start < len(s); {
		end := start
		for end < len(s) && letterOrDigit(s[end]) {
			end++
		}
		if run := s[start:end]; len(run) >= 20 && !commitOrDigest(run) && entropyAbove4(run) {
			return true
		}
		start = end + 1
	}
	return false
}

func commitOrDigest(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}

// entropyAbove4 computes n*H = n*log2(n) - sum(c*log2(c)) in fixed point and
// compares it with 4n.
func entropyAbove4(s string) bool {
	var counts [128]int
	for i := 0; i < len(s); i++ {
		counts[s[i]]++ // letters and digits only
	}
	sum := len(s) * log2(len(s))
	for _, c := range counts {
		if c > 1 {
			sum -= c * log2(c)
		}
	}
	return sum >= 4*len(s)<<16
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

// secrets returns what must not occur in a value: the values of the caller's
// variables whose names look secret, each line of them alone too, and their base64
// in its three alignments.
func (s *scrubber) secrets() []string {
	if s.ready {
		return s.needles
	}
	s.ready = true
	for _, kv := range s.environ {
		name, value, ok := strings.Cut(kv, "=")
		if !ok || len(value) < minNeedle || !secretName(name) {
			continue
		}
		for value != "" {
			var line string
			line, value, _ = strings.Cut(value, "\n")
			if line = strings.TrimSpace(line); len(line) < minNeedle || len(line) > maxValue {
				continue
			}
			if len(s.needles) >= maxNeedles {
				s.needles, s.blind = nil, true
				return nil
			}
			s.needles = append(s.needles, line)
			for shift := range 3 {
				if b := base64Core(line, shift); len(b) >= minNeedle {
					s.needles = append(s.needles, b)
				}
			}
		}
	}
	return s.needles
}

// secretName tells whether a variable's name says that its value is secret.
func secretName(name string) bool {
	name = strings.ToUpper(name)
	for _, part := range [...]string{"PASSWORD", "PASSWD", "SECRET", "TOKEN", "CREDENTIAL", "PRIVATE_KEY", "ACCESS_KEY", "API_KEY", "APIKEY", "CONNECTION_STRING", "WEBHOOK"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	for first := true; name != ""; first = false {
		var word string
		word, name, _ = strings.Cut(name, "_")
		switch word {
		case "PAT", "AUTH", "DSN":
			return true
		case "KEY", "PASS", "PWD": // as last word alone, and PWD is the shell's own
			if name == "" && !first {
				return true
			}
		}
	}
	return false
}

const base64Digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

// base64Core returns the digits of base64 that depend on s alone when s starts shift
// bytes after a multiple of three.
func base64Core(s string, shift int) string {
	var out []byte
	var acc, nbits uint
	skip := 0
	if shift > 0 {
		// The first digits mix with the bytes before; of 8*shift bits, the started
		// digit is shared.
		skip = (8*shift + 5) / 6
		acc, nbits = 0, uint(8*shift)
		for nbits >= 6 {
			nbits -= 6
			out = append(out, 'A')
		}
	}
	for i := 0; i < len(s); i++ {
		acc = acc<<8 | uint(s[i])
		nbits += 8
		for nbits >= 6 {
			nbits -= 6
			out = append(out, base64Digits[acc>>nbits&63])
		}
	}
	return string(out[min(skip, len(out)):])
}
