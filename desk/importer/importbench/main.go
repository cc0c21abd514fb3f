// Command importbench prints how fast tables are imported, and that memory does not
// follow their length: rows per second and the peak of the resident set, for each size
// in a process of its own. Beside it stands the floor: encoding/csv reading the same
// table and doing nothing with it.
package main

import (
	"bufio"
	"context"
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/record"
)

func main() {
	sizes := flag.String("rows", "1000000,10000000", "sizes of the tables, in rows")
	one := flag.String("one", "", "in a process of its own: FORMAT:ROWS")
	flag.Parse()
	if err := run(*sizes, *one); err != nil {
		fmt.Fprintln(os.Stderr, "importbench:", err)
		os.Exit(1)
	}
}

func run(sizes, one string) error {
	if one != "" {
		format, rows, _ := strings.Cut(one, ":")
		n, err := strconv.Atoi(rows)
		if err != nil {
			return err
		}
		return measure(format, n)
	}
	fmt.Printf("%-15s %10s %10s %12s %10s %10s\n", "format", "rows", "seconds", "rows/s", "peak RSS", "bad rows")
	for _, format := range []string{"encoding/csv", string(importer.GitHubCSV), string(importer.DockerHubCSV), string(importer.JSONL)} {
		for _, size := range strings.Split(sizes, ",") {
			c := exec.Command(os.Args[0], "-one", format+":"+size)
			c.Stdout, c.Stderr = os.Stdout, os.Stderr
			if err := c.Run(); err != nil {
				return fmt.Errorf("%s with %s rows: %w", format, size, err)
			}
		}
	}
	return nil
}

func measure(format string, rows int) error {
	r, w := io.Pipe()
	go func() { w.CloseWithError(table(w, format, rows)) }()
	began := time.Now()
	records, bad := 0, 0
	if format == "encoding/csv" {
		c := csv.NewReader(r)
		c.ReuseRecord = true
		for {
			if _, err := c.Read(); err == io.EOF {
				break
			} else if err != nil {
				return err
			}
			records++
		}
		records-- // the heading
	} else {
		out := bufio.NewWriterSize(io.Discard, 64<<10)
		var line []byte
		for rec, err := range importer.Requests(context.Background(), r, importer.Options{Format: importer.Format(format)}) {
			var b *importer.BadRow
			switch {
			case errors.As(err, &b):
				bad++
			case err != nil:
				return err
			default:
				records++
				line = record.Append(line[:0], rec)
				out.Write(line)
			}
		}
	}
	took := time.Since(began)
	if records+bad != rows {
		return fmt.Errorf("%d records and %d bad rows of %d", records, bad, rows)
	}
	fmt.Printf("%-15s %10d %10.1f %12.0f %7.1f MB %10d\n", format, rows, took.Seconds(), float64(rows)/took.Seconds(), float64(peak())/1024, bad)
	return nil
}

// table writes a table as it comes from a fleet: many paths and addresses, few user
// agents, a bad row in a thousand, and now and then a quoted cell with a line's end.
func table(w io.Writer, format string, rows int) error {
	b := bufio.NewWriterSize(w, 64<<10)
	start := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	switch format {
	case string(importer.DockerHubCSV):
		b.WriteString("datehour,user_name,repository,access_token_name,ips,repository_privacy,tag,digest,version_checks,pulls\n")
	case string(importer.JSONL):
	default:
		b.WriteString("method,url,status,user_agent,content_length,timestamp,address\n")
	}
	for i := range rows {
		ts := start.Add(time.Duration(i) * 8 * time.Millisecond)
		status := "401"
		if i%1000 == 999 && format != "encoding/csv" {
			status = "teapot"
		}
		var err error
		switch format {
		case string(importer.DockerHubCSV):
			pulls := strconv.Itoa(i % 50)
			if i%1000 == 999 {
				pulls = "many"
			}
			_, err = fmt.Fprintf(b, "%s,acmebot,acme/image-%d,ci-%d,\"203.0.113.%d, 198.51.100.%d\",private,v%d,,%d,%s\n", ts.Format("2006/01/02/15"), i%5000, i%20, i%250, i%200, i%900, i%3, pulls)
		case string(importer.JSONL):
			_, err = fmt.Fprintf(b, `{"timestamp":"%s","method":"GET","url":"https://github.com/acme/repo-%d/info/refs?service=git-upload-pack","status":"%s","user_agent":"git/2.%d.0","address":"203.0.113.%d"}`+"\n",
				ts.Format(time.RFC3339Nano), i%20_000, status, i%40, i%250)
		default:
			agent := fmt.Sprintf("git/2.%d.0", i%40)
			if i%5000 == 7 {
				agent = "\"curl, with a\nline's end\""
			}
			_, err = fmt.Fprintf(b, "GET,https://github.com/acme/repo-%d/info/refs?service=git-upload-pack,%s,%s,%d,%s,203.0.113.%d\n", i%20_000, status, agent, i%4096, ts.Format(time.RFC3339Nano), i%250)
		}
		if err != nil {
			return err
		}
	}
	return b.Flush()
}

// peak is the highest resident set of this process, in KiB (VmHWM, proc_pid_status(5)).
func peak() int {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, _ := strconv.Atoi(kib)
	return n
}
