package sinks

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/internal/nearest"
	"github.com/tallyman-ci/tallyman/journal"
	"github.com/tallyman-ci/tallyman/record"
)

// Scheme is a kind of sink that can be opened from a URL.
type Scheme struct {
	Name   string // of the URL: file, stdout, ...
	Form   string // how a URL of this kind looks, for messages and documentation
	Params []Param
	// Open makes the sink. It checks the configuration only, and leaves connecting to
	// Write: a server that is down now must not keep the agent from starting.
	Open func(ctx context.Context, t *Target) (Sink, error)
}

// Param is a query parameter of a sink's URL.
type Param struct {
	Name, Default, Doc string
}

// Builtin are the kinds of sinks that need no library.
func Builtin() []Scheme { return []Scheme{fileScheme(), stdoutScheme()} }

// CommonParams are the query parameters that every sink's URL may have.
func CommonParams() []Param {
	var o PumpOptions
	o.defaults()
	return []Param{
		{"name", "from the URL", "name of the sink in its cursor, its quarantine and its status"},
		{"batch_records", strconv.Itoa(o.MaxRecords), "most records in one batch"},
		{"batch_bytes", formatBytes(o.MaxBytes), "most bytes in one batch"},
		{"batch_delay", o.MaxDelay.String(), "longest time that a record waits for its batch to fill"},
		{"timeout", o.Timeout.String(), "time for one attempt to deliver a batch"},
	}
}

// Target is a sink's URL, taken apart and checked.
type Target struct {
	URL  *url.URL
	Pump PumpOptions // its Name is set, and what the URL says of batches

	scheme Scheme
	query  url.Values
	errs   []error
}

// Open opens the sink that rawURL names, of the kinds that are built in and those in
// more.
func Open(ctx context.Context, rawURL string, more ...Scheme) (Sink, error) {
	t, err := Parse(rawURL, more...)
	if err != nil {
		return nil, err
	}
	return t.Open(ctx)
}

// Check tells what is wrong with a sink's URL, down to the values that only its kind
// knows. It connects to nothing.
func Check(rawURL string, more ...Scheme) error {
	ctx := context.Background()
	s, err := Open(ctx, rawURL, more...)
	if err != nil {
		return err
	}
	return s.Close(ctx)
}

// CheckAll is Check for the sinks of one configuration: the error at each place is that
// of the URL there, nil for a good one. Two that deliver to one place, or have one name,
// would share a cursor: the second one is wrong.
func CheckAll(urls []string, more ...Scheme) []error {
	errs := make([]error, len(urls))
	names := map[string]bool{}
	for i, raw := range urls {
		if errs[i] = Check(raw, more...); errs[i] != nil {
			continue
		}
		t, err := Parse(raw, more...)
		if err == nil && names[t.Pump.Name] {
			err = sameName(t.Pump.Target, t.Pump.Name)
		}
		if errs[i] = err; err == nil {
			names[t.Pump.Name] = true
		}
	}
	return errs
}

func sameName(target, name string) error {
	return fmt.Errorf("sink %s: another sink has the name %s: give this one a name of its own by the parameter name", target, name)
}

// Parse takes a sink's URL apart. An unknown kind of sink and an unknown parameter are
// errors that name the nearest known one. No error repeats the URL's user or query,
// where secrets may stand.
func Parse(rawURL string, more ...Scheme) (*Target, error) {
	schemes := append(Builtin(), more...)
	u, err := url.Parse(strings.TrimSpace(rawURL))
	if err != nil {
		return nil, notAURL(rawURL, err)
	}
	at := slices.IndexFunc(schemes, func(s Scheme) bool { return s.Name == u.Scheme })
	if at < 0 {
		names, forms := []string{}, []string{}
		for _, s := range schemes {
			names, forms = append(names, s.Name), append(forms, s.Form)
		}
		if u.Scheme == "" {
			return nil, fmt.Errorf("sink %q: a URL is wanted: %s", redact(u), strings.Join(forms, ", "))
		}
		return nil, fmt.Errorf("sink %s: unknown kind %q, did you mean %q? (known: %s)", redact(u), u.Scheme, meant(u.Scheme, names), strings.Join(forms, ", "))
	}
	t := &Target{URL: u, scheme: schemes[at]}
	if t.query, err = url.ParseQuery(u.RawQuery); err != nil {
		return nil, fmt.Errorf("sink %s: the part behind the question mark cannot be read", redact(u))
	}
	var known []string
	for _, p := range append(CommonParams(), t.scheme.Params...) {
		known = append(known, p.Name)
	}
	for name, values := range t.query {
		switch {
		case !slices.Contains(known, name):
			return nil, fmt.Errorf("sink %s: unknown parameter %q, did you mean %q? (known: %s)", redact(u), name, meant(name, known), strings.Join(known, ", "))
		case len(values) > 1:
			return nil, fmt.Errorf("sink %s: parameter %q is given %d times", redact(u), name, len(values))
		}
	}
	t.Pump = PumpOptions{
		Name:       t.String("name", defaultName(u)),
		Target:     redact(u),
		MaxRecords: int(t.Int("batch_records", 0, 1, 1_000_000)),
		MaxBytes:   t.Bytes("batch_bytes", 0),
		MaxDelay:   t.Duration("batch_delay", 0),
		Timeout:    t.Duration("timeout", 0),
	}
	if !journal.IsCursorName(t.Pump.Name) {
		t.fail("name", "up to 100 letters, digits and ._-")
	}
	return t, t.Err()
}

// Open makes the sink.
func (t *Target) Open(ctx context.Context) (Sink, error) {
	s, err := t.scheme.Open(ctx, t)
	if err == nil {
		err = t.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("open sink %s: %w", t.Pump.Name, err)
	}
	return s, nil
}

// NewPump makes the pump that delivers j to s, the sink that t names. Its cursor and
// its quarantine lie in dir, the journal's folder, and so go where the journal goes.
func (t *Target) NewPump(j *journal.Journal, s Sink, dir string, onLoss func(record.Loss), log *slog.Logger) (*Pump, error) {
	o := t.Pump
	o.CursorDir, o.QuarantineDir = filepath.Join(dir, "cursors"), filepath.Join(dir, "quarantine")
	o.OnLoss, o.Logger = onLoss, log
	return NewPump(j, s, o)
}

// Err tells of the parameters whose values could not be used by the calls of
// String, Int, Bytes, Duration and Bool before.
func (t *Target) Err() error { return errors.Join(t.errs...) }

func (t *Target) fail(name, want string) {
	t.errs = append(t.errs, fmt.Errorf("sink %s: parameter %s: want %s", redact(t.URL), name, want))
}

// String is the value of a parameter, or missing where it is not given.
func (t *Target) String(name, missing string) string {
	if !t.query.Has(name) {
		return missing
	}
	return t.query.Get(name)
}

// Int is the value of a parameter between low and high.
func (t *Target) Int(name string, missing, low, high int64) int64 {
	if !t.query.Has(name) {
		return missing
	}
	n, err := strconv.ParseInt(t.query.Get(name), 10, 64)
	if err != nil || n < low || n > high {
		t.fail(name, fmt.Sprintf("a number from %d to %d", low, high))
	}
	return n
}

// Bytes is the value of a parameter that is a size: 1000, 64KiB, 16MiB, 1GiB.
func (t *Target) Bytes(name string, missing int64) int64 {
	if !t.query.Has(name) {
		return missing
	}
	s := t.query.Get(name)
	unit := int64(1)
	for i, suffix := range []string{"KiB", "MiB", "GiB"} {
		if rest, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = rest, 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > 1<<50/unit {
		t.fail(name, "a size such as 65536, 64KiB or 16MiB")
		return missing
	}
	return n * unit
}

func formatBytes(n int64) string {
	for _, unit := range []string{"", "KiB", "MiB"} {
		if n%1024 != 0 {
			return strconv.FormatInt(n, 10) + unit
		}
		n /= 1024
	}
	return strconv.FormatInt(n, 10) + "GiB"
}

// maxDuration bounds what a parameter may make a sink wait: more is a slip, and would
// leave records lying for days.
const maxDuration = time.Hour

// Duration is the value of a parameter that is a time: 200ms, 5s, 1m.
func (t *Target) Duration(name string, missing time.Duration) time.Duration {
	if !t.query.Has(name) {
		return missing
	}
	d, err := time.ParseDuration(t.query.Get(name))
	if err != nil || d <= 0 || d > maxDuration {
		t.fail(name, "a duration such as 200ms, 5s or 1m, and no more than 1h")
	}
	return d
}

// Bool is the value of a parameter that is true or false.
func (t *Target) Bool(name string, missing bool) bool {
	if !t.query.Has(name) {
		return missing
	}
	b, err := strconv.ParseBool(t.query.Get(name))
	if err != nil {
		t.fail(name, "true or false")
	}
	return b
}

// notAURL tells what is wrong with a URL. The parser's reason quotes a piece of it, which
// is one of a password where that has a /, ?, # or % in it.
func notAURL(raw string, err error) error {
	if strings.Contains(raw, "@") {
		return errors.New("sink: not a URL: what stands before the @ cannot be read, and no kind of sink takes a user or password there")
	}
	var parse *url.Error
	if errors.As(err, &parse) {
		err = parse.Err // without the URL
	}
	reason, rest, quotes := strings.Cut(err.Error(), ` "`)
	if _, after, ok := cutLast(rest, `"`); quotes && ok {
		reason += after
	}
	return fmt.Errorf("sink: not a URL: %s", reason)
}

// redact is the URL without what may be secret: a user and password, which stand in
// its path or are all of it where slashes are missing.
func redact(u *url.URL) string {
	r := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, Opaque: u.Opaque}
	if _, after, ok := cutLast(r.Opaque, "@"); ok {
		r.Opaque = after
	}
	if before, after, ok := cutLast(r.Path, "@"); ok && strings.Contains(before, ":") { // a file's name may have an @
		r.Path = "/" + after
	}
	return r.String()
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// defaultName is a name that stays the same while the place of delivery does: a
// changed parameter must not begin a new cursor.
func defaultName(u *url.URL) string {
	place := u.Host + u.Path + u.Opaque
	if place == "" {
		return u.Scheme
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(place)) // never fails
	return fmt.Sprintf("%s-%08x", u.Scheme, h.Sum32())
}

// meant is the known word with the smallest edit distance from word, where an
// unfinished word is near to its whole. Unlike nearest.Word it always names one.
func meant(word string, known []string) string {
	best, least := "", 0
	for _, k := range known {
		d := nearest.Distance(word[:min(len(word), 100)], k)
		if word != "" && strings.HasPrefix(k, word) {
			d = 1
		}
		if best == "" || d < least {
			best, least = k, d
		}
	}
	return best
}
