package importer_test

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/tallyman-ci/tallyman/desk/importer"
	"github.com/tallyman-ci/tallyman/record"
)

var order = binary.LittleEndian

// workerLog was written by hand after the runner's source; it holds what an attacker
// can put into a job's message and a command line.
//
//go:embed testdata/Worker_20261123-101112-utc.log
var workerLog string

func readLog(text string) (records []*record.Record, err error) {
	err = importer.WorkerLog(context.Background(), strings.NewReader(text), func(r *record.Record) error {
		records = append(records, r)
		return nil
	})
	return records, err
}

func TestGoldenWorkerLog(t *testing.T) {
	records, err := readLog(workerLog)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for _, r := range records {
		got = record.Append(got, r)
	}
	if strings.Contains(strings.ToLower(string(got)), "canary") || strings.Contains(string(got), "forged") {
		t.Errorf("a secret or a forgery in %s", got)
	}
	golden(t, "worker-log.golden", got)

	crlf, err := readLog(strings.ReplaceAll(workerLog, "\n", "\r\n"))
	if err != nil || len(crlf) != len(records) {
		t.Fatalf("with CRLF: %d records, %v", len(crlf), err)
	}
	for i, r := range crlf {
		if r.ID != records[i].ID {
			t.Errorf("with CRLF record %d has another id", i)
		}
	}
	prefixed, err := readLog(strings.ReplaceAll(workerLog, "[2026-", "[WORKER 2026-"))
	if err != nil || len(prefixed) != len(records) {
		t.Errorf("printed to the console: %d records, %v", len(prefixed), err)
	}
}

// A log can end anywhere. Then there is no job, or a job that was not seen to complete.
func TestWorkerLogsCutAnywhere(t *testing.T) {
	result := strings.Index(workerLog, "Job result after")
	jobs := 0
	for n := 0; n < result; n += 7 {
		records, err := readLog(workerLog[:n])
		if err != nil {
			if !errors.Is(err, importer.ErrWorkerLog) || len(records) > 0 {
				t.Fatalf("cut at %d: %d records, %v", n, len(records), err)
			}
			continue
		}
		jobs++
		last := records[len(records)-1]
		if records[0].Kind != record.KindJobStart || last.Kind != record.KindJobEnd || last.Job.Outcome != "abandoned" || last.Job.Result != "" {
			t.Fatalf("cut at %d: the last record is %s", n, record.Append(nil, last))
		}
	}
	if jobs == 0 {
		t.Error("no cut log had a job")
	}
}
