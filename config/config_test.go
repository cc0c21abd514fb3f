package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	for _, test := range []struct {
		name, file string
		change     func(c *Config)
		problems   []string
	}{
		{"an empty file is the defaults", "", func(*Config) {}, nil},
		{"comments and blank lines", "# a comment\n\n   \nenabled = false # no comment here", func(*Config) {}, []string{"4 enabled: want true or false"}},
		{"values of each kind", "enabled=false\nrun_dir = /run/t/\ncanary = 25\nspool_max_bytes = 2 MiB\nsinks = stdout: file:///x?a=b\nsegment_max_age = 90m\nsummary = always",
			func(c *Config) {
				c.Enabled, c.RunDir, c.Canary, c.SpoolMaxBytes, c.SegmentMaxAge, c.Summary = false, "/run/t", 25, 2<<20, 90*time.Minute, "always"
				c.Sinks = []string{"stdout:", "file:///x?a=b"}
			}, nil},
		{"real binaries", "real.docker = /usr/bin/docker.original\nreal.podman=/opt/podman",
			func(c *Config) {
				c.Real = map[string]string{"docker": "/usr/bin/docker.original", "podman": "/opt/podman"}
			}, nil},
		{"/var/run is a link, its target is taken", "run_dir = /var/run/tallyman", func(*Config) {}, nil},
		{"a typing error costs its line alone", "runn_dir = /x\nenabled\ncanary = 25", func(c *Config) { c.Canary = 25 },
			[]string{"1 runn_dir: unknown key", "2 enabled: want key = value"}},
		{"a bound without its unit", "journal_max_bytes = 512\nsegment_max_bytes = 16\nspool_max_bytes = 64\njob_rate = 0",
			func(c *Config) { c.JobRate = 0 },
			[]string{"1 journal_max_bytes: want a number from 1 MiB to", "2 segment_max_bytes: want a number from 4 KiB to", "3 spool_max_bytes: want a number from 1 KiB to"}},
		{"values out of range", "canary = 101\nspool_max_bytes = -1\nrun_dir = run\nreal. = /x\nreal.a/b = /x\nsummary = maybe\nsegment_max_age = 0s\njournal_max_bytes = 99999999999999999999",
			func(*Config) {}, []string{"1 canary: want", "2 spool_max_bytes: want", "3 run_dir: want an absolute path", "4 real.: want", "5 real.a/b: want", "6 summary: want", "7 segment_max_age: want", "8 journal_max_bytes: want"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			want, got := Default(), Default()
			test.change(&want)
			problems := Parse(&got, test.file)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			if len(problems) != len(test.problems) {
				t.Fatalf("problems %+v", problems)
			}
			for i, p := range problems {
				if s := strings.TrimSpace(string(rune('0'+p.Line)) + " " + p.Key + ": " + p.Text); !strings.HasPrefix(s, test.problems[i]) {
					t.Errorf("problem %q, want %q", s, test.problems[i])
				}
			}
		})
	}
}

// FuzzParse: any file gives a configuration, never a panic, and never a relative
// path, at which the shim would look below the job's own folder.
func FuzzParse(f *testing.F) {
	f.Add("enabled = true\nreal.docker=/x\nrun_dir=/var/run/\n")
	f.Add("canary=9999999999999999999999\nsinks=\x00\nsegment_max_age=-1h")
	f.Add("=\n = \n==\nreal.=\n")
	f.Fuzz(func(t *testing.T, file string) {
		c := Default()
		Parse(&c, file)
		for _, path := range append([]string{c.RunDir, c.StateDir}, values(c.Real)...) {
			if !filepath.IsAbs(path) {
				t.Errorf("relative path %q", path)
			}
		}
		if c.Canary < 0 || c.Canary > 100 || c.SegmentMaxAge <= 0 {
			t.Errorf("out of range: %+v", c)
		}
	})
}

func values(m map[string]string) (v []string) {
	for _, x := range m {
		v = append(v, x)
	}
	return v
}

// TestKeysRoundTrip: what Value prints is what Parse reads, and each default stands in
// the list that the README's table is made from.
func TestKeysRoundTrip(t *testing.T) {
	d := Default()
	d.ChainStarted, d.ChainCompleted, d.DockerHost, d.Statsd = "/a", "/b", "unix:///x", "off"
	var file strings.Builder
	for _, k := range Keys() {
		if k.Doc == "" || !strings.HasSuffix(k.Doc, ".") {
			t.Errorf("%s: documentation %q", k.Name, k.Doc)
		}
		if v := k.Value(&d); v != "" {
			file.WriteString(k.Name + " = " + v + "\n")
		}
	}
	var got Config
	if problems := Parse(&got, file.String()); len(problems) != 0 {
		t.Fatalf("%+v in\n%s", problems, file.String())
	}
	if !reflect.DeepEqual(got, d) {
		t.Errorf("got  %+v\nwant %+v", got, d)
	}
}

func TestLoadTrustsOnlyItsOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), FileName)
	owner := uint32(os.Getuid())
	write := func(content string, mode fs.FileMode) {
		t.Helper()
		os.Remove(path)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := Load(path, owner); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	write("canary = 7", 0o644)
	if c, _, err := Load(path, owner); err != nil || c.Canary != 7 {
		t.Errorf("good file: %v, canary %d", err, c.Canary)
	}
	for _, mode := range []fs.FileMode{0o664, 0o646, 0o666} {
		write("canary = 7", mode)
		if c, _, err := Load(path, owner); !errors.Is(err, ErrUntrusted) || c.Canary != 100 {
			t.Errorf("mode %v: %v, canary %d", mode, err, c.Canary)
		}
	}
	write("canary = 7", 0o644)
	if os.Getuid() == 0 {
		os.Chown(path, 1234, 0)
	}
	if _, _, err := Load(path, 4321); !errors.Is(err, ErrUntrusted) {
		t.Errorf("another owner: %v", err)
	}
	write(strings.Repeat("#", maxFile+1), 0o644)
	if _, _, err := Load(path, owner); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	os.Remove(path)
	os.Mkdir(path, 0o755)
	if _, _, err := Load(path, owner); !errors.Is(err, ErrUntrusted) {
		t.Errorf("a folder: %v", err)
	}
}

// A line of sha256sum is a pin as it stands.
func TestPins(t *testing.T) {
	sum := strings.Repeat("0aF9", 16)
	c := Default()
	problems := Parse(&c, "pin = "+sum+"  /usr/bin/docker\npin = "+sum+" */opt/a file\n"+
		"pin = "+sum+"\npin = "+sum+" relative\npin = "+sum[1:]+"  /x\npin = "+sum[1:]+"g  /x\npin =\n")
	if len(c.Pins) != 2 || c.Pins[0] != (Pin{"/usr/bin/docker", sum}) || c.Pins[1].Path != "/opt/a file" {
		t.Errorf("pins %+v", c.Pins)
	}
	if len(problems) != 5 {
		t.Errorf("problems %+v, want five", problems)
	}
}
