package importer_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/record"
)

var update = flag.Bool("update", false, "write the golden files again")

// read imports a text and returns its records, its bad rows and the error that ended it.
func read(text string, o importer.Options) (records []*record.Record, bad []*importer.BadRow, err error) {
	for r, e := range importer.Requests(context.Background(), strings.NewReader(text), o) {
		var b *importer.BadRow
		switch {
		case errors.As(e, &b):
			bad = append(bad, b)
		case e != nil:
			return records, bad, e
		default:
			records = append(records, r)
		}
	}
	return records, bad, nil
}

var github = importer.Options{Format: importer.GitHubCSV}

// brief is what the tables below want of a record.
func brief(r *record.Record) string {
	h := r.HTTP
	size := "-"
	if h.Bytes != nil {
		size = fmt.Sprint(*h.Bytes)
	}
	return strings.Join([]string{r.TS.Format("2006-01-02T15:04:05.999Z"), h.Method, h.Host, h.Path, fmt.Sprint(h.Status), h.UserAgent, size, h.RemoteAddr}, " ")
}

const wanted = "2026-11-23T10:11:12Z GET github.com /acme/app.git/info/refs 401 git/2.43.0 381 203.0.113.7"

// The same request, in the tables of twenty imaginable sources.
func TestTheSameRequestInAllForms(t *testing.T) {
	for _, row := range []struct {
		name, text string
		o          importer.Options
		want       string
	}{
		{"as issue trackers show it", "method,url,status,user_agent,content_length,timestamp,address\nGET,https://github.com/acme/app.git/info/refs?service=git-upload-pack,401,git/2.43.0,381,2026-11-23T10:11:12Z,203.0.113.7\n", github, wanted},
		{"capitals, spaces and CRLF", "Method,Request URL,Status Code,User Agent,Content Length,Timestamp (UTC),IP Address\r\nGET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,2026-11-23 10:11:12,203.0.113.7\r\n", github, wanted},
		{"camel case, all quoted", `"requestTime","httpMethod","requestUrl","statusCode","userAgent","responseSize","clientIp"` + "\n" + `"2026-11-23T10:11:12.000Z","GET","https://github.com/acme/app.git/info/refs","401","git/2.43.0","381","203.0.113.7"`, github, wanted},
		{"Splunk", "_time,http_method,url,http_status,http_user_agent,bytes_sent,src_ip\n2026-11-23T11:11:12.000+01:00,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"Kibana", "@timestamp,http.request.method,url.full,http.response.status_code,user_agent.original,http.response.body.size,source.address\n\"Nov 23, 2026 @ 10:11:12.000\",GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n",
			importer.Options{Format: importer.GitHubCSV, Columns: map[string]string{"bytes": "http.response.body.size"}}, wanted},
		{"seconds since 1970, semicolons", "ts;verb;host;path;code;ua;size;ip\n1795428672;get;GitHub.com;/acme/app.git/info/refs;401;git/2.43.0;381;203.0.113.7\n", github, wanted},
		{"milliseconds since 1970, tabs", "time_ms\tmethod\thost\trequest_path\tstatus\tuser_agent\tbytes\tremote_addr\n1795428672000\tGET\tgithub.com:443\t/acme/app.git/info/refs?x=1\t401\tgit/2.43.0\t381\t203.0.113.7:51234\n", github, wanted},
		{"seconds with a fraction", "timestamp,method,url,status,user_agent,content_length,address\n1795428672.5,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, strings.Replace(wanted, "12Z", "12.5Z", 1)},
		{"Common Log Format's time and request line", "[time],request,host,status,agent,bytes,client_ip\n[23/Nov/2026:11:11:12 +0100],GET /acme/app.git/info/refs HTTP/2,github.com,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"a spreadsheet in the USA", "Date,Method,URL,Status,User-Agent,Bytes,Address\n11/23/2026 10:11:12,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,\"381\",203.0.113.7\n", github, wanted},
		{"a spreadsheet in Europe", "Date;Method;URL;Status;User-Agent;Bytes;Address\n23/11/2026 10:11:12;GET;https://github.com/acme/app.git/info/refs;401;git/2.43.0;381;203.0.113.7\n", github, wanted},
		{"AM and PM", "created_at,method,url,status,ua,bytes,ip\n\"Nov 23, 2026, 10:11:12 AM\",GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"date and time apart", "date,time,method,url,status,ua,bytes,ip\n2026-11-23,10:11:12,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"another zone", "timestamp,method,url,status,ua,bytes,ip\n2026-11-23 11:11:12,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", importer.Options{Format: importer.GitHubCSV, Location: time.FixedZone("", 3600)}, wanted},
		{"BigQuery's console", "timestamp,method,url,status,ua,bytes,ip\n2026-11-23 10:11:12.000000 UTC,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"lines before the heading", "Report for acme\n\"made 2026-11-24, confidential\"\n\ntimestamp,method,url,status,ua,bytes,ip\n2026-11-23 10:11:12,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"a comma before the heading, semicolons in it", "Report for acme, Inc.\ntimestamp;method;url;status;ua;bytes;ip\n2026-11-23 10:11:12;GET;https://github.com/acme/app.git/info/refs;401;git/2.43.0;381;203.0.113.7\n2026-11-23 10:11:13;GET;/;401;x;1;::1\n", github, wanted},
		{"semicolons in user agents", "timestamp,ua,url\n2026-11-23T10:11:12Z,Mozilla/5.0 (X11; Linux; x86_64; rv:1),https://github.com/a\n2026-11-23T10:11:13Z,Mozilla/5.0 (X11; Linux; x86_64; rv:2),/\n", github,
			"2026-11-23T10:11:12Z  github.com /a 0 Mozilla/5.0 (X11; Linux; x86_64; rv:1) - "},
		{"no heading", "2026-11-23T10:11:12Z,203.0.113.7,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0\n2026-11-23T10:11:13Z,203.0.113.7,GET,https://github.com/acme/app.git/info/refs,200,git/2.43.0\n", github, strings.Replace(wanted, "381", "-", 1)},
		{"headings in another language", "Zeitpunkt,Methode,Adresse,Antwort,Programm,Herkunft\n2026-11-23T10:11:12Z,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,203.0.113.7\n", github, strings.Replace(wanted, "381", "-", 1)},
		{"named by the caller", "a,b,c,d,e,f,g\n2026-11-23T10:11:12Z,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n",
			importer.Options{Format: importer.CSV, Columns: map[string]string{"time": "a", "method": "#2", "url": "c", "status": "D", "user_agent": "e", "bytes": "f", "remote_addr": "g"}}, wanted},
		{"time format by the caller", "timestamp,method,url,status,ua,bytes,ip\n10.11.12 23/11/26,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", importer.Options{Format: importer.GitHubCSV, TimeFormat: "%H.%M.%S %d/%m/%y"}, wanted},
		{"byte order mark", "\ufefftimestamp,method,url,status,ua,bytes,ip\n2026-11-23T10:11:12Z,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", github, wanted},
		{"UTF-16 as Excel writes it", wide("timestamp\tmethod\turl\tstatus\tua\tbytes\tip\r\n2026-11-23T10:11:12Z\tGET\thttps://github.com/acme/app.git/info/refs\t401\tgit/2.43.0\t381\t203.0.113.7\r\n", binary.LittleEndian, true), github, wanted},
		{"UTF-16 big end first, no mark", wide("timestamp,method,url,status,ua,bytes,ip\n2026-11-23T10:11:12Z,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n", binary.BigEndian, false), github, wanted},
		{"gzip", zipped("timestamp,method,url,status,ua,bytes,ip\n2026-11-23T10:11:12Z,GET,https://github.com/acme/app.git/info/refs,401,git/2.43.0,381,203.0.113.7\n"), github, wanted},
		{"JSON Lines", `{"timestamp":"2026-11-23T10:11:12Z","request":{"method":"GET","url":"https://github.com/acme/app.git/info/refs"},"status":401,"user_agent":"git/2.43.0","bytes":381,"ip":"203.0.113.7"}` + "\n",
			importer.Options{Format: importer.JSONL, Columns: map[string]string{"url": "request.url"}}, wanted},
	} {
		t.Run(row.name, func(t *testing.T) {
			records, bad, err := read(row.text, row.o)
			if err != nil || len(bad) > 0 || len(records) == 0 {
				t.Fatalf("%d records, bad rows %v, error %v", len(records), bad, err)
			}
			if got := brief(records[0]); got != row.want {
				t.Errorf("got  %s\nwant %s", got, row.want)
			}
		})
	}
}

func wide(text string, order binary.ByteOrder, mark bool) string {
	units := utf16.Encode([]rune(text))
	if mark {
		units = append([]uint16{0xfeff}, units...)
	}
	b := make([]byte, 2*len(units))
	for i, u := range units {
		order.PutUint16(b[2*i:], u)
	}
	return string(b)
}

func zipped(text string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	io.WriteString(z, text)
	z.Close()
	return b.String()
}

func TestBadRowsAreNamed(t *testing.T) {
	const head = "timestamp,method,url,status,user_agent,bytes,ip\n"
	const good = "2026-11-23T10:11:12Z,GET,/a/b.git/info/refs,200,\"curl/8.5, with\na line end \"\"inside\"\"\",1,203.0.113.7\n"
	for _, row := range []struct{ name, text, reason string }{
		{"no time", ",GET,/,200,x,1,203.0.113.7\n", "the time is missing"},
		{"strange time", "yesterday s3cr3t,GET,/,200,x,1,203.0.113.7\n", "the time is not understood"},
		{"strange status", "2026-11-23T10:11:12Z,GET,/,s3cr3t,x,1,203.0.113.7\n", "the status is no number from 100 to 599"},
		{"strange address", "2026-11-23T10:11:12Z,GET,/,200,x,1,s3cr3t\n", "the address is no IP address"},
		{"negative bytes", "2026-11-23T10:11:12Z,GET,/,200,x,-1,203.0.113.7\n", "the number of bytes is none"},
		{"strange method", "2026-11-23T10:11:12Z,s3 cr3t,/,200,x,1,203.0.113.7\n", "the method is no word"},
		{"cut", "2026-11-23T10:11:12Z,GET,/\n", "has 3 cells, and column 7 is wanted"},
		{"a comma too many", "2026-11-23T10:11:12Z,GET,/,200,curl, s3cr3t,1,203.0.113.7\n", "has 8 cells for 7 columns"},
		{"text behind a quote", "2026-11-23T10:11:12Z,GET,\"/\"s3cr3t,200,x,1,203.0.113.7\n", "text behind the quote that ends a cell"},
		{"too long", "2026-11-23T10:11:12Z,GET,/" + strings.Repeat("s3cr3t", importer.MaxRow/5) + ",200,x,1,203.0.113.7\n", "longer than 256 KiB"},
	} {
		t.Run(row.name, func(t *testing.T) {
			records, bad, err := read(head+good+row.text+good, github)
			if err != nil || len(records) != 2 || len(bad) != 1 {
				t.Fatalf("%d records, bad rows %v, error %v", len(records), bad, err)
			}
			if b := bad[0]; b.Row != 2 || b.Line != 4 || b.Reason != row.reason || strings.Contains(b.Error(), "s3cr3t") {
				t.Errorf("got %v", b)
			}
			if records[0].ID == records[1].ID || records[1].HTTP.Row != 3 || records[1].HTTP.UserAgent == "" {
				t.Errorf("the row after it: %+v", records[1].HTTP)
			}
		})
	}
	t.Run("a quote that nobody closes costs its own line alone", func(t *testing.T) {
		rest := strings.Repeat("2026-11-23T10:11:12Z,GET,/,200,x,1,203.0.113.7\n", 20_000) // far more than a row may have
		records, bad, err := read(head+"2026-11-23T10:11:12Z,GET,\"/,200,x,1,203.0.113.7\n"+rest, github)
		if err != nil || len(records) != 20_000 || len(bad) != 1 || bad[0].Row != 1 {
			t.Errorf("%d records, bad rows %v, error %v", len(records), bad, err)
		}
	})
	t.Run("and so at the end", func(t *testing.T) {
		records, bad, err := read(head+"2026-11-23T10:11:12Z,GET,\"/,200,x,1,203.0.113.7\n"+strings.Repeat("2026-11-23T10:11:12Z,GET,/,200,x,1,203.0.113.7\n", 3), github)
		if err != nil || len(records) != 3 || len(bad) != 1 {
			t.Errorf("%d records, bad rows %v, error %v", len(records), bad, err)
		}
	})
}

func TestFilesThatAreNotUnderstood(t *testing.T) {
	for _, row := range []struct {
		name, text string
		o          importer.Options
		want       string
	}{
		{"no time", "method,url\nGET,/x\n", github, "--column time="},
		{"no request", "timestamp,colour\n2026-11-23T10:11:12Z,red\n", github, "is it a request table?"},
		{"day or month", "timestamp,url\n01/02/2026 10:11:12,/\n", github, "--time-format"},
		{"no such column", "timestamp,url\n2026-11-23T10:11:12Z,/\n", importer.Options{Format: importer.GitHubCSV, Columns: map[string]string{"status": "Statuz"}}, `no column is called "Statuz"`},
		{"no such field", "timestamp,url\n2026-11-23T10:11:12Z,/\n", importer.Options{Format: importer.GitHubCSV, Columns: map[string]string{"colour": "url"}}, `no field is called "colour"`},
		{"time format", "timestamp,url\n2026-11-23T10:11:12Z,/\n", importer.Options{Format: importer.GitHubCSV, TimeFormat: "%Q"}, "%Q"},
		{"Docker Hub without counts", "datehour,repository\n2026/11/23/10,library/alpine\n", importer.Options{Format: importer.DockerHubCSV}, "pulls"},
	} {
		t.Run(row.name, func(t *testing.T) {
			records, _, err := read(row.text, row.o)
			if !errors.Is(err, importer.ErrLayout) || !strings.Contains(err.Error(), row.want) || len(records) > 0 {
				t.Errorf("%d records, error %v", len(records), err)
			}
		})
	}
	for _, empty := range []string{"", "\n\n", "timestamp,url,status\n"} {
		if records, bad, err := read(empty, github); err != nil || len(records)+len(bad) > 0 {
			t.Errorf("%q: %d records, %v, error %v", empty, len(records), bad, err)
		}
	}
}

func TestWhatURLsKeep(t *testing.T) {
	for _, row := range []struct{ url, host, path, class, repository string }{
		{"https://github.com/acme/app/info/refs?service=git-upload-pack", "github.com", "/acme/app/info/refs", "git-refs", "acme/app"},
		{"https://github.com/acme/app.git/info/refs?service=git-receive-pack", "github.com", "/acme/app.git/info/refs", "git-push", "acme/app"},
		{"https://github.com/acme/app.git/git-upload-pack", "github.com", "/acme/app.git/git-upload-pack", "git-fetch", "acme/app"},
		{"https://github.com/acme/app.git/info/lfs/objects/batch", "github.com", "/acme/app.git/info/lfs/objects/batch", "git-lfs", "acme/app"},
		{"https://codeload.github.com/acme/app/tar.gz/refs/tags/v1", "codeload.github.com", "/acme/app/tar.gz/refs/tags/v1", "archive", "acme/app"},
		{"https://raw.githubusercontent.com/acme/app/main/install.sh?token=ABCDEF", "raw.githubusercontent.com", "/acme/app/main/install.sh", "raw", "acme/app"},
		{"https://api.github.com/repos/acme/app/contents/x", "api.github.com", "/repos/acme/app/contents/x", "api", "acme/app"},
		{"https://api.github.com/rate_limit", "api.github.com", "/rate_limit", "api", ""},
		{"https://github.com/acme/app/releases/download/v1/app.tgz", "github.com", "/acme/app/releases/download/v1/app.tgz", "release", "acme/app"},
		{"https://ghcr.io/v2/acme/app/manifests/latest", "ghcr.io", "/v2/acme/app/manifests/latest", "registry-manifest", ""},
		{"https://ghcr.io/token?scope=repository:acme/app:pull", "ghcr.io", "/token", "token", ""},
		{"github.com/acme/app.git/info/refs", "github.com", "/acme/app.git/info/refs", "git-refs", "acme/app"},
		{"/acme/app.git/info/refs", "", "/acme/app.git/info/refs", "git-refs", "acme/app"},
		{"https://u:p@github.com/acme/app", "github.com", "/acme/app", "web", "acme/app"},
		{"https://x-access-token:ghs_AbCdEfGh12345678@github.com/acme/app.git/info/refs", "github.com", "/acme/app.git/info/refs", "git-refs", "acme/app"},
		{"https://u:pa/ss@github.com/acme/app", "", "[REDACTED]", "other", ""},
		{"https://user:12/ss@github.com/acme/app", "", "[REDACTED]", "other", ""},
		{"https://s3cr3t/word@github.com/acme/app", "", "[REDACTED]", "other", ""},
		{"https://s3cr3t?word@github.com/acme/app", "", "[REDACTED]", "other", ""},
		{"u:s3cr3t@github.com/acme/app", "", "[REDACTED]", "other", ""},
		{"https://registry.npmjs.org/@acme/app", "registry.npmjs.org", "/@acme/app", "other", ""},
		{"https://github.com/acme/ghp_AbCdEfGh12345678901234/x", "github.com", "/acme/[REDACTED]/x", "web", ""},
		{"https://github.com/hook/token/s3cr3t/x", "github.com", "/hook/token/[REDACTED]/x", "web", ""},
		{"https://github.com/a;jsessionid=s3cr3t/b", "github.com", "/a;[REDACTED]/b", "web", ""},
		{"https://github.com/a/key=s3cr3t", "github.com", "/a/key=[REDACTED]", "web", ""},
		{"https://github.com/a/%67hp_AbCdEfGh12345678901234", "github.com", "/a/[REDACTED]", "web", ""},
		{"https://github.com/acme/app/commit/0123456789abcdef0123456789abcdef01234567", "github.com", "/acme/app/commit/0123456789abcdef0123456789abcdef01234567", "web", "acme/app"},
		{"https://hooks.slack.com/services/T00000000/B00000000/s3cr3t", "hooks.slack.com", "[REDACTED]", "other", ""},
	} {
		records, bad, err := read("timestamp,url\n2026-11-23T10:11:12Z,"+row.url+"\n", github)
		if err != nil || len(bad) > 0 || len(records) != 1 {
			t.Errorf("%s: %v, %v", row.url, bad, err)
			continue
		}
		h := records[0].HTTP
		if h.Host != row.host || h.Path != row.path || h.Class != row.class || h.Repository != row.repository {
			t.Errorf("%s:\ngot  %q %q %q %q\nwant %q %q %q %q", row.url, h.Host, h.Path, h.Class, h.Repository, row.host, row.path, row.class, row.repository)
		}
		if line := string(record.Append(nil, records[0])); strings.Contains(line, "s3cr3t") || strings.Contains(line, "AbCdEfGh") {
			t.Errorf("a secret is in %s", line)
		}
	}
}

// A column of tokens is not one of their names, and one of clients may hold addresses.
func TestHeadingsThatMislead(t *testing.T) {
	records, _, err := read("time,client,token,url\n2026-11-23T10:11:12Z,203.0.113.7,hunter2,/a\n", github)
	if err != nil || len(records) != 1 {
		t.Fatal(err)
	}
	if h := records[0].HTTP; h.TokenName != "" || h.RemoteAddr != "203.0.113.7" || h.UserAgent != "" {
		t.Errorf("got %+v", h)
	}
}

// A file that was cut on its way is an error, not a shorter table.
func TestCutFilesAreErrors(t *testing.T) {
	whole := zipped("timestamp,url\n" + strings.Repeat("2026-11-23T10:11:12Z,/a\n", 1000))
	for _, n := range []int{len(whole) / 2, len(whole) - 1} {
		if records, _, err := read(whole[:n], github); err == nil || len(records) == 1000 && n < len(whole)/2 {
			t.Errorf("%d of %d bytes: %d records, no error", n, len(whole), len(records))
		}
	}
}

// Secrets are put into each cell in turn; neither a record nor an error may hold one.
func TestSecretsReachNothing(t *testing.T) {
	const head = "timestamp,method,url,host,status,user_agent,bytes,ip,user,request_id,repository,token_name,tag,digest"
	good := []string{"2026-11-23T10:11:12Z", "GET", "/a/b", "github.com", "200", "git/2.43.0", "1", "203.0.113.7", "octocat", "AB12:34", "acme/app", "ci", "latest", "sha256:00"}
	for _, secret := range []string{"ghp_Canary1234567890abcdefABCDEF12345678", "dckr_pat_Canary0123456789abcdefgh", "AKIACANARY7EXAMPLE22",
		"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlY2FuYXJ5", "Bearer ghs_Canary1234567890abcdef12345678"} {
		for i := range good {
			for _, form := range []string{"%s", "https://x:%s@github.com/acme/app", "https://%s@github.com/a", "https://github.com/a?token=%s", "https://github.com/a/%s/b#%s", "git/2.43.0 (%s)"} {
				cells := slices.Clone(good)
				cells[i] = strings.ReplaceAll(form, "%s", secret)
				records, bad, err := read(head+"\n"+strings.Join(cells, ",")+"\n", github)
				var out []byte
				for _, r := range records {
					out = record.Append(out, r)
				}
				for _, b := range bad {
					out = append(out, b.Error()...)
				}
				if strings.Contains(strings.ToLower(string(out)+fmt.Sprint(err)), "canary") {
					t.Errorf("column %d, %s: %s %v", i, form, out, err)
				}
			}
		}
		// In a heading, which errors list.
		_, _, err := read("method,url,"+secret+"\nGET,/,\n", github)
		if strings.Contains(strings.ToLower(fmt.Sprint(err)), "canary") {
			t.Errorf("heading: %v", err)
		}
	}
}

func TestIDsFollowTheRows(t *testing.T) {
	const text = "timestamp,url\n2026-11-23T10:11:12Z,/a\n2026-11-23T10:11:12Z,/a\nbad,/a\n2026-11-23T10:11:13Z,/b\n"
	first, _, _ := read(text, github)
	again, _, _ := read(zipped(strings.ReplaceAll(text, "\n", "\r\n")), github)
	seen := map[string]bool{}
	for i, r := range first {
		if r.ID != again[i].ID {
			t.Errorf("row %d: %s, and %s again", i+1, r.ID, again[i].ID)
		}
		if _, ok := record.InvocationID(r.ID); !ok || seen[r.ID] {
			t.Errorf("row %d: id %s is no UUIDv7 of its own", i+1, r.ID)
		}
		seen[r.ID] = true
	}
	if len(first) != 3 {
		t.Errorf("%d records", len(first))
	}
}

// golden compares lines with a file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("not as in %s (go test ./desk/importer -update writes it again):\n%s", path, got)
	}
}

func TestGoldenTables(t *testing.T) {
	for name, format := range map[string]importer.Format{"github": importer.GitHubCSV, "dockerhub": importer.DockerHubCSV} {
		text, err := os.ReadFile(filepath.Join("testdata", name+".csv"))
		if err != nil {
			t.Fatal(err)
		}
		records, bad, err := read(string(text), importer.Options{Format: format})
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		for _, r := range records {
			got = record.Append(got, r)
		}
		for _, b := range bad {
			got = append(append(got, b.Error()...), '\n')
		}
		golden(t, name+".golden", got)
	}
}

// Cancelled imports end.
func TestImportsEndWithTheirContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	endless := io.MultiReader(strings.NewReader("timestamp,url\n"), repeat("2026-11-23T10:11:12Z,/a\n"))
	n := 0
	for _, err := range importer.Requests(ctx, endless, github) {
		if n++; n == 1000 {
			cancel()
		}
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			return
		}
	}
	t.Error("an endless input ended")
}

type repeat string

func (r repeat) Read(p []byte) (int, error) {
	n := 0
	for n+len(r) <= len(p) {
		n += copy(p[n:], r)
	}
	if n == 0 {
		n = copy(p, r)
	}
	return n, nil
}
