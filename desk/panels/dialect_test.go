package panels

import (
	"testing"
	"time"
)

var filter = Filter{From: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), To: time.Date(2026, 11, 8, 0, 0, 0, 500000, time.UTC), Repository: `o'neil\x`, Image: "a\nb*"}

const asked = "SELECT 1 FROM tallyman.calls WHERE ts >= @from AND ts < @to\n  AND @only(repository, workflow, image)\nLIMIT 1"

func TestParameters(t *testing.T) {
	sql, params := Parameters(asked, DuckDB, filter)
	if want := "SELECT 1 FROM tallyman.calls WHERE ts >= $from AND ts < $to\n  AND repository = $repository\n  AND STARTS_WITH(image, $image)\nLIMIT 1"; sql != want {
		t.Errorf("DuckDB: %s", sql)
	}
	if len(params) != 4 || params[2].Value != filter.Repository || params[3].Value != "a\nb" {
		t.Errorf("parameters %v: each once, in order", params)
	}
	sql, params = Parameters(asked, GoogleSQL, Filter{From: filter.From, To: filter.To})
	if sql != "SELECT 1 FROM tallyman.calls WHERE ts >= @from AND ts < @to\nLIMIT 1" || len(params) != 2 {
		t.Errorf("GoogleSQL: %s %v", sql, params)
	}
}

func TestLiteral(t *testing.T) {
	for d, want := range map[Dialect]string{
		DuckDB: "SELECT 1 FROM tallyman.calls WHERE ts >= TIMESTAMP '2026-11-01 00:00:00+00' AND ts < TIMESTAMP '2026-11-08 00:00:00.0005+00'" +
			"\n  AND repository = 'o''neil\\x'\n  AND STARTS_WITH(image, 'a\nb')\nLIMIT 1",
		GoogleSQL: "SELECT 1 FROM tallyman.calls WHERE ts >= TIMESTAMP '2026-11-01 00:00:00+00' AND ts < TIMESTAMP '2026-11-08 00:00:00.0005+00'" +
			"\n  AND repository = 'o\\'neil\\\\x'\n  AND STARTS_WITH(image, 'a\\nb')\nLIMIT 1",
	} {
		if got := Literal(asked, d, filter); got != want {
			t.Errorf("%s:\n got %s\nwant %s", d, got, want)
		}
	}
}

func TestIn(t *testing.T) {
	if got, want := In("SELECT a.x FROM tallyman.calls AS a JOIN tallyman.records", "my-project", "ds"), "SELECT a.x FROM `my-project.ds.calls` AS a JOIN `my-project.ds.records`"; got != want {
		t.Errorf("got %s", got)
	}
	if got, want := Dashboard(asked), "SELECT 1 FROM tallyman.calls WHERE ts >= $__timeFrom() AND ts < $__timeTo()\n  AND (${repository:singlequote} = '' OR repository = ${repository:singlequote})"+
		"\n  AND (${workflow:singlequote} = '' OR workflow = ${workflow:singlequote})\n  AND (${image:singlequote} = '' OR image = ${image:singlequote})\nLIMIT 1"; got != want {
		t.Errorf("got %s", got)
	}
}

func TestQuantile(t *testing.T) {
	const sql = "SELECT @quantile(duration_ns, 50), @quantile(duration_ns, 5)"
	for d, want := range map[Dialect]string{
		DuckDB:    "SELECT QUANTILE_DISC(duration_ns, 0.50), QUANTILE_DISC(duration_ns, 0.05)",
		GoogleSQL: "SELECT APPROX_QUANTILES(duration_ns, 100)[OFFSET(50)], APPROX_QUANTILES(duration_ns, 100)[OFFSET(5)]",
	} {
		if got, _ := Parameters(sql, d, Filter{}); got != want {
			t.Errorf("%s: %s", d, got)
		}
	}
	if got := Dashboard(sql); got != "SELECT APPROX_QUANTILES(duration_ns, 100)[OFFSET(50)], APPROX_QUANTILES(duration_ns, 100)[OFFSET(5)]" {
		t.Errorf("Grafana: %s", got)
	}
}
