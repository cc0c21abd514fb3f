// Package config reads the one configuration file of Tallyman, `key = value` lines
// in /etc/tallyman/tallyman.conf or beside the shim. The docker shim reads it at
// every call, so the package parses by hand and imports next to nothing.
//
// The file belongs to whoever installed Tallyman: a file that a job could have
// written is refused (see Load), and no environment variable changes what the shim
// does.
package config

import (
	"errors"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// DefaultPath is where the configuration is looked for when none lies beside the
// binary.
const DefaultPath = "/etc/tallyman/tallyman.conf"

// FileName is the name of a configuration file beside the binary. It is looked at
// first, so that several installations can live on one machine.
const FileName = "tallyman.conf"

// OffPath is the kill switch: where this file exists, nothing is recorded.
const OffPath = "/etc/tallyman/off"

// Config is what an installation sets. The zero value is not useful; start from
// Default.
type Config struct {
	Enabled         bool              // false: the shim only execs, the hooks do nothing
	RunDir          string            // socket and spool; best on tmpfs
	StateDir        string            // journal, contexts, cursors
	Real            map[string]string // the real binary of a tool, where it is not <shim>.original
	SpoolMaxBytes   int64             // a spool file at this size takes no more records
	SpoolOnDisk     bool              // without an agent, spool on a disk too
	Canary          int64             // 0 to 100: the share of runners, by name, that record
	Summary         string            // job summary: off, auto (only where docker was used) or always
	ChainStarted    string            // a job-started hook to run after ours
	ChainCompleted  string            // a job-completed hook to run after ours
	Pins            []Pin             // files whose content and owner are checked at each job's start
	RunnerLabels    []string          // labels or scale set of this runner, for ci.runner.labels
	Sinks           []string          // URLs of sinks beside the journal
	RecordArgv      bool              // keep the redacted command line too
	DockerHost      string            // the daemon whose events are recorded; "" asks the environment
	EventLabels     []string          // container and image labels to keep
	Statsd          string            // DogStatsD address; "" asks the environment, "off" sends nothing
	Health          string            // address of /healthz and /metrics, "" for none
	StatsdTags      []string          // tags of docker.events
	JournalMaxBytes int64             // the journal's share of the disk
	SegmentMaxBytes int64             // size at which a segment is closed
	SegmentMaxAge   time.Duration     // age at which a segment is closed
	JobRate         int64             // calls per second that one job may have recorded for ever; 0 is no bound
	JobBurst        int64             // calls that one job may have recorded at once
	EventRate       int64             // daemon events per second of one job; 0 is no bound
	EventBurst      int64             // daemon events of one job at once
}

// Default returns the configuration of an installation without a file.
func Default() Config {
	return Config{
		Enabled:         true,
		RunDir:          "/run/tallyman",
		StateDir:        "/var/lib/tallyman",
		SpoolMaxBytes:   64 << 20,
		Canary:          100,
		Summary:         "auto",
		StatsdTags:      []string{"event_type", "action", "repo", "workflow", "run_id"},
		JournalMaxBytes: 512 << 20,
		SegmentMaxBytes: 16 << 20,
		SegmentMaxAge:   time.Hour,
		// An honest job makes some hundred calls in all, and a daemon about 1,000 events a
		// second as fast as it can.
		JobRate:    200,
		JobBurst:   20000,
		EventRate:  1000,
		EventBurst: 100000,
	}
}

// Pin is a file that must be what it was when it was installed.
type Pin struct {
	Path   string
	SHA256 string // in hex
}

// Key describes one key of the file.
type Key struct {
	Name string // as written in the file; "real." stands for real.<tool>
	Doc  string // one sentence for the user
	set  func(c *Config, key, value string) error
	get  func(c *Config) string
}

// Keys are all keys that the file may hold, in the order in which they are
// documented.
func Keys() []Key {
	str := func(name, doc string, field func(*Config) *string) Key {
		return Key{name, doc,
			func(c *Config, _, v string) error { *field(c) = v; return nil },
			func(c *Config) string { return *field(c) }}
	}
	dir := func(name, doc string, field func(*Config) *string) Key {
		return Key{name, doc,
			func(c *Config, _, v string) error { return assign(field(c))(absolute(v)) },
			func(c *Config) string { return *field(c) }}
	}
	list := func(name, doc string, field func(*Config) *[]string) Key {
		return Key{name, doc,
			func(c *Config, _, v string) error { *field(c) = strings.Fields(v); return nil },
			func(c *Config) string { return strings.Join(*field(c), " ") }}
	}
	boolean := func(name, doc string, field func(*Config) *bool) Key {
		return Key{name, doc,
			func(c *Config, _, v string) error { return assign(field(c))(parseBool(v)) },
			func(c *Config) string { return strconv.FormatBool(*field(c)) }}
	}
	number := func(name, doc string, min, max int64, field func(*Config) *int64) Key {
		return Key{name, doc,
			func(c *Config, _, v string) error { return assign(field(c))(parseSize(v, min, max)) },
			func(c *Config) string { return formatSize(*field(c)) }}
	}
	return []Key{
		boolean("enabled", "`false` turns everything off: the shim only starts the real binary, the hooks do nothing.", func(c *Config) *bool { return &c.Enabled }),
		dir("run_dir", "Folder of the agent's socket and of the shim's spool; best on tmpfs.", func(c *Config) *string { return &c.RunDir }),
		dir("state_dir", "Folder of the journal, the sealed job contexts and the cursors.", func(c *Config) *string { return &c.StateDir }),
		{"real.", "Absolute path of the real binary of a tool, as in `real.docker`; the default is the shim's own path with `.original` added.",
			func(c *Config, key, v string) error {
				tool := strings.TrimPrefix(key, "real.")
				path, err := absolute(v)
				if err != nil || tool == "" || strings.Contains(tool, "/") {
					return errors.Join(err, errors.New("want real.<tool> = /absolute/path"))
				}
				if c.Real == nil {
					c.Real = map[string]string{}
				}
				c.Real[tool] = path
				return nil
			},
			func(*Config) string { return "" }},
		number("spool_max_bytes", "Size at which a spool file takes no more records while no agent empties it.", 1<<10, 1<<50, func(c *Config) *int64 { return &c.SpoolMaxBytes }),
		boolean("spool_on_disk", "`true` uses the spool on a disk too, where `run_dir` is not on tmpfs. A disk that freezes or stalls then makes docker wait while no agent runs.", func(c *Config) *bool { return &c.SpoolOnDisk }),
		number("canary", "Percentage of runners, chosen by a hash of the runner's name, that record at all.", 0, 100, func(c *Config) *int64 { return &c.Canary }),
		{"summary", "Job summary: `off`, `auto` (only where docker was used) or `always`.",
			func(c *Config, _, v string) error {
				if v != "off" && v != "auto" && v != "always" {
					return errors.New("want off, auto or always")
				}
				c.Summary = v
				return nil
			},
			func(c *Config) string { return c.Summary }},
		dir("chain_started", "A job-started hook that was there before and is run after ours.", func(c *Config) *string { return &c.ChainStarted }),
		dir("chain_completed", "A job-completed hook that was there before and is run after ours.", func(c *Config) *string { return &c.ChainCompleted }),
		{"pin", "SHA-256 and path of an installed file, as sha256sum prints them; one line for each file. At each job's start its content is checked, and that nobody but root can replace it.",
			func(c *Config, _, v string) error {
				sum, path, _ := strings.Cut(v, " ")
				path, err := absolute(strings.TrimLeft(path, " *"))
				if err != nil || !isSHA256(sum) {
					return errors.New("want the 64 hexadecimal digits of a SHA-256 and an absolute path")
				}
				c.Pins = append(c.Pins, Pin{Path: path, SHA256: sum})
				return nil
			},
			func(*Config) string { return "" }},
		list("runner_labels", "Labels or scale set of this runner, kept in each record.", func(c *Config) *[]string { return &c.RunnerLabels }),
		list("sinks", "URLs of the sinks that get the records beside the journal, apart by spaces.", func(c *Config) *[]string { return &c.Sinks }),
		boolean("record_argv", "`true` also keeps the redacted command line of each call (docs/redaction.md).", func(c *Config) *bool { return &c.RecordArgv }),
		str("docker_host", "The Docker daemon whose events are recorded; empty takes DOCKER_HOST or the default socket.", func(c *Config) *string { return &c.DockerHost }),
		list("event_labels", "Container and image labels that event records keep.", func(c *Config) *[]string { return &c.EventLabels }),
		str("statsd", "DogStatsD address (`host:port`, `unix:///path`); empty takes DD_DOGSTATSD_URL, the socket /var/run/datadog/dsd.socket where it is, or DD_AGENT_HOST; `off` sends nothing.", func(c *Config) *string { return &c.Statsd }),
		str("health", "Where `/healthz` and Prometheus `/metrics` are answered: `unix:///path` or a loopback `127.0.0.1:9464`; empty is nowhere.", func(c *Config) *string { return &c.Health }),
		list("statsd_tags", "Tags of `docker.events`. `run_id` starts a new series with every run, which Datadog bills: leave it out on a large fleet.", func(c *Config) *[]string { return &c.StatsdTags }),
		number("journal_max_bytes", "Space that the journal may take; beyond it the oldest segment goes.", 1<<20, 1<<50, func(c *Config) *int64 { return &c.JournalMaxBytes }),
		number("segment_max_bytes", "Size at which a journal segment is closed.", 4<<10, 1<<40, func(c *Config) *int64 { return &c.SegmentMaxBytes }),
		{"segment_max_age", "Age at which a journal segment is closed.",
			func(c *Config, _, v string) error {
				d, err := time.ParseDuration(v)
				if err != nil || d <= 0 {
					return errors.New("want a duration such as 1h or 30m")
				}
				c.SegmentMaxAge = d
				return nil
			},
			func(c *Config) string { return c.SegmentMaxAge.String() }},
		number("job_rate", "Calls per second that one job may have recorded in the long run; what is above is counted as a loss `rate_limited`. `0` is no bound.", 0, 1<<30, func(c *Config) *int64 { return &c.JobRate }),
		number("job_burst", "Calls that one job may have recorded before `job_rate` applies.", 0, 1<<30, func(c *Config) *int64 { return &c.JobBurst }),
		number("event_rate", "The same as `job_rate` for the daemon's events of one job.", 0, 1<<30, func(c *Config) *int64 { return &c.EventRate }),
		number("event_burst", "The same as `job_burst` for the daemon's events of one job.", 0, 1<<30, func(c *Config) *int64 { return &c.EventBurst }),
	}
}

// assign sets a field where its value could be read, and leaves it where not.
func assign[T any](field *T) func(T, error) error {
	return func(v T, err error) error {
		if err == nil {
			*field = v
		}
		return err
	}
}

// Value returns the value of a key as the file would hold it.
func (k Key) Value(c *Config) string { return k.get(c) }

// Problem is one line of the file that could not be used. The rest of the file is
// used all the same: a typing error must not turn the account off.
type Problem struct {
	Line int // counted from 1
	Key  string
	Text string // what is wrong and what is wanted
}

// Parse reads the lines of a configuration file into c. Empty lines and lines that
// start with # are passed over.
func Parse(c *Config, data string) (problems []Problem) {
	var keys []Key
	for n := 1; data != ""; n++ {
		var line string
		line, data, _ = strings.Cut(data, "\n")
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok {
			problems = append(problems, Problem{n, name, "want key = value"})
			continue
		}
		if keys == nil {
			keys = Keys()
		}
		if err := set(c, keys, name, value); err != nil {
			problems = append(problems, Problem{n, name, err.Error()})
		}
	}
	return problems
}

var errUnknown = errors.New("unknown key")

func set(c *Config, keys []Key, name, value string) error {
	for _, k := range keys {
		if k.Name == name || k.Name == "real." && strings.HasPrefix(name, k.Name) {
			return k.set(c, name, value)
		}
	}
	return errUnknown
}

// ErrUntrusted is returned for a file that someone else than root or the
// installation's owner could have written.
var ErrUntrusted = errors.New("not trusted: it must be a regular file, owned by root or by the owner of the binary, and writable by nobody else")

// ErrTooLarge is returned for a file over 64 KiB.
var ErrTooLarge = errors.New("larger than 64 KiB")

const maxFile = 64 << 10

// Load reads the configuration file at path into the defaults. The file must belong
// to root or to owner, the user who owns the installed binary, and be writable by
// them alone: whoever can write it could send the shim to another real binary. A
// missing file is syscall.ENOENT (errors.Is also knows it as fs.ErrNotExist).
func Load(path string, owner uint32) (Config, []Problem, error) {
	c := Default()
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return c, nil, err
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return c, nil, err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Mode&0o022 != 0 || st.Uid != 0 && st.Uid != owner {
		return c, nil, ErrUntrusted
	}
	if st.Size > maxFile {
		return c, nil, ErrTooLarge
	}
	buf := make([]byte, st.Size)
	n := 0
	for n < len(buf) {
		m, err := syscall.Read(fd, buf[n:])
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return c, nil, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	problems := Parse(&c, string(buf[:n]))
	return c, problems, nil
}

// Socket, Spool and Off are the paths below the run folder.
func (c *Config) Socket() string { return c.RunDir + "/agent.sock" }

// Spool is the folder of the shim's append files.
func (c *Config) Spool() string { return c.RunDir + "/spool" }

// Off is the marker that the job-started hook leaves where the pod's environment or
// the canary says that this runner does not record.
func (c *Config) Off() string { return c.RunDir + "/off" }

// Journal is the folder of the journal.
func (c *Config) Journal() string { return c.StateDir + "/journal" }

// Contexts is the folder of the sealed job contexts.
func (c *Config) Contexts() string { return c.StateDir + "/contexts" }

// absolute checks a path. /var/run is a link to /run on every distribution that
// runners use; the shim opens its files without following links, so the target is
// taken at once.
func absolute(v string) (string, error) {
	if v == "" || v[0] != '/' {
		return "", errors.New("want an absolute path")
	}
	if rest, ok := strings.CutPrefix(v, "/var/run/"); ok {
		v = "/run/" + rest
	}
	for len(v) > 1 && v[len(v)-1] == '/' {
		v = v[:len(v)-1]
	}
	return v, nil
}

func isSHA256(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i] | 0x20; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func parseBool(v string) (bool, error) {
	switch v {
	case "true", "yes", "on", "1":
		return true, nil
	case "false", "no", "off", "0":
		return false, nil
	}
	return false, errors.New("want true or false")
}

var units = []struct {
	suffix string
	factor int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

// parseSize reads a number from min to max with an optional unit KiB, MiB or GiB. A
// bound of bytes has a min, because `journal_max_bytes = 512` has lost its unit: taken at
// its word, it would keep nothing.
func parseSize(v string, min, max int64) (int64, error) {
	for _, u := range units {
		digits, ok := strings.CutSuffix(v, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > max/u.factor || n*u.factor < min {
			break
		}
		return n * u.factor, nil
	}
	text := "want a number from " + formatSize(min) + " to " + formatSize(max)
	if min > 0 {
		text += ", with its unit KiB, MiB or GiB"
	}
	return 0, errors.New(text)
}

func formatSize(n int64) string {
	for _, u := range units {
		if n >= u.factor && n%u.factor == 0 && n != 0 {
			return strconv.FormatInt(n/u.factor, 10) + strings.TrimSuffix(" "+u.suffix, " ")
		}
	}
	return strconv.FormatInt(n, 10)
}
