package wrapper

import (
	"slices"
	"strings"

	"github.com/tallyman-ci/tallyman/record"
)

// Redactor takes what looks like a secret out of texts that no running call brought: the
// daemon's events, imported logs and tables. It knows the shapes of tokens and random strings; of the
// secrets of the jobs behind the texts it knows nothing. The zero value is ready. It is
// not safe for concurrent use.
type Redactor struct{ s scrubber }

// Redact returns value as one line of at most 4 KiB with [REDACTED] for what looks like
// a secret.
func (r *Redactor) Redact(value string) string {
	r.s.work, r.s.tired = 0, false // the bound is for one value
	return r.s.redact(value)
}

// Name returns a name (of a container, an image, a volume) with [REDACTED] for the tokens
// and random strings in it. Hexadecimal digits are an id there, however many they are.
func (r *Redactor) Name(name string) string {
	r.s.work, r.s.tired = 0, false
	name = cutOut(name, r.s.shapes(name))
	random := slices.DeleteFunc(r.s.random(name, false), func(part span) bool {
		return strings.Trim(name[part.from:part.to], "0123456789abcdef") == ""
	})
	return cutOut(name, random)
}

// DescribeArgs returns what may be kept of a command line that was run some time ago:
// the command, the images and the names of flags, as the shim keeps them. args holds
// the tool's own name first.
func (r *Redactor) DescribeArgs(tool string, args []string) *record.Invocation {
	r.s.work, r.s.tired = 0, false
	inv := &record.Invocation{Tool: record.Clean(tool, 64), Argc: int64(len(args))}
	describeArgs(inv, args, &r.s, false)
	return inv
}
