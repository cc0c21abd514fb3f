package importer_test

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// Whatever the bytes: no panic, each row is one record or one bad row in rising order,
// each record is one line that reads back, and a second read gives the same.
func fuzzRequests(f *testing.F, o importer.Options) {
	f.Fuzz(func(t *testing.T, data []byte) {
		import1 := func() (out []byte, rows int64) {
			for r, err := range importer.Requests(context.Background(), bytes.NewReader(data), o) {
				var bad *importer.BadRow
				switch {
				case errors.As(err, &bad):
					if rows++; bad.Row != rows {
						t.Fatalf("bad row %d is number %d", bad.Row, rows)
					}
				case err != nil:
					return out, rows
				default:
					if rows++; r.HTTP.Row != rows {
						t.Fatalf("row %d is number %d", r.HTTP.Row, rows)
					}
					from := len(out)
					out = record.Append(out, r)
					var again record.Record
					if err := recordjson.Unmarshal(out[from:], &again); err != nil || again.ID != r.ID {
						t.Fatalf("%s: %v", out[from:], err)
					}
					if strings.ContainsAny(r.HTTP.Path, "?#") || strings.Contains(r.HTTP.Host, "@") {
						t.Fatalf("host %q, path %q", r.HTTP.Host, r.HTTP.Path)
					}
				}
			}
			return out, rows
		}
		out, rows := import1()
		if again, n := import1(); !bytes.Equal(out, again) || n != rows {
			t.Fatalf("%d rows, and %d again:\n%s\n%s", rows, n, out, again)
		}
	})
}

func FuzzGitHubCSV(f *testing.F) {
	f.Add([]byte("method,url,status,user_agent,content_length,timestamp,address\nGET,https://github.com/a/b?c,401,\"git\n/2\",1,2026-11-23T10:11:12Z,203.0.113.7\n"))
	f.Add([]byte("ts;url\n1795428672;\"a\"\"b\"\n1795428672;\"open\n"))
	f.Add([]byte(wide("timestamp\turl\n2026-11-23T10:11:12Z\t/ü\n", order, true)))
	f.Add([]byte(zipped("timestamp,url\n2026-11-23T10:11:12Z,/\n")))
	fuzzRequests(f, github)
}

func FuzzDockerHubCSV(f *testing.F) {
	f.Add([]byte("datehour,user_name,repository,access_token_name,ips,tag,digest,version_checks,pulls\n2026/11/23/10,bot,library/alpine,ci,\"203.0.113.7,203.0.113.8\",3,,1,2\n"))
	fuzzRequests(f, importer.Options{Format: importer.DockerHubCSV})
}

func FuzzJSONL(f *testing.F) {
	f.Add([]byte(`{"timestamp":"2026-11-23T10:11:12Z","url":"https://github.com/a/b","http":{"status":200},"ips":["203.0.113.7"]}` + "\n{}\n[]\n"))
	fuzzRequests(f, importer.Options{Format: importer.JSONL})
}

// A table that encoding/csv writes has as many rows as were written, whatever is in the
// cells, and none of them is bad for how it was split.
func FuzzSplit(f *testing.F) {
	f.Add("git/2.43.0", "a,b\n\"c\"\r\nd", 3)
	f.Fuzz(func(t *testing.T, agent, user string, n int) {
		if n < 0 || n > 100 || len(agent)+len(user) > 10_000 {
			return
		}
		var b bytes.Buffer
		w := csv.NewWriter(&b)
		w.Write([]string{"timestamp", "url", "user_agent", "user"})
		for range n {
			w.Write([]string{"2026-11-23T10:11:12Z", "/a", agent, user})
		}
		w.Flush()
		records, bad, err := read(b.String(), github)
		if err != nil || len(records) != n || len(bad) > 0 {
			t.Fatalf("%d rows: %d records, %v, %v\n%q", n, len(records), bad, err, b.String())
		}
	})
}

// A Worker log of any bytes gives records that read back, or an error.
func FuzzWorkerLog(f *testing.F) {
	f.Add([]byte(workerLog))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = importer.WorkerLog(context.Background(), bytes.NewReader(data), func(r *record.Record) error {
			var again record.Record
			if err := recordjson.Unmarshal(record.Append(nil, r), &again); err != nil || r.By != record.ByInferred {
				t.Fatal(err)
			}
			return nil
		})
	})
}
