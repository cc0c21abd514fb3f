// Package dataset answers panels from a data set of BigQuery, within a bound of bytes
// that each query may be billed for.
//
// What a query would read is known before it runs: Estimate asks BigQuery for a dry run, which
// costs nothing. Query runs it with maximumBytesBilled, so that BigQuery itself refuses
// what the estimate missed (https://cloud.google.com/bigquery/docs/best-practices-costs).
package dataset

import (
	"context"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"cloud.google.com/go/bigquery"
	"cloud.google.com/go/civil"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"

	"github.com/tallyman-ci/tallyman/desk/panels"
)

// Place is a data set and how it is asked.
type Place struct {
	Project, Dataset string
	// Billing is the project that pays for the queries; Project where empty.
	Billing string
	// Location is the data set's; empty lets BigQuery find it.
	Location string
}

var (
	projectID = regexp.MustCompile(`^[a-z0-9.:-]{2,100}$`) // old projects have a domain: example.com:name
	datasetID = regexp.MustCompile(`^[A-Za-z0-9_]+$`)
)

// Parse reads bigquery://project/dataset, with location and billing_project as
// parameters.
func Parse(text string) (Place, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "bigquery" {
		return Place{}, fmt.Errorf("%q is no data set: write bigquery://project/dataset", text)
	}
	p := Place{Project: u.Host, Dataset: strings.Trim(u.Path, "/")}
	if p.Project == "" { // a project with a domain is no host
		p.Project, p.Dataset, _ = strings.Cut(u.Opaque, "/")
	}
	for name, values := range u.Query() {
		switch name {
		case "location":
			p.Location = values[0]
		case "billing_project":
			p.Billing = values[0]
		default:
			return Place{}, fmt.Errorf("%q: there is no parameter %s, only location and billing_project", text, name)
		}
	}
	switch {
	case u.User != nil || u.Fragment != "":
		return Place{}, fmt.Errorf("%q is no data set: write bigquery://project/dataset", text)
	case !projectID.MatchString(p.Project) || p.Billing != "" && !projectID.MatchString(p.Billing):
		return Place{}, fmt.Errorf("%q names no project: write bigquery://project/dataset", text)
	case !datasetID.MatchString(p.Dataset):
		return Place{}, fmt.Errorf("%q names no data set: write bigquery://project/dataset", text)
	}
	return p, nil
}

// Dataset is a data set that can be asked. It is safe for concurrent use.
type Dataset struct {
	place    Place
	client   *bigquery.Client
	maxBytes int64
	maxRows  int
	read     atomic.Int64
}

var _ panels.Stream = (*Dataset)(nil)

// Open makes a client. It does not ask anything yet. maxBytes bounds each query.
func Open(ctx context.Context, p Place, maxBytes int64, options ...option.ClientOption) (*Dataset, error) {
	payer := p.Billing
	if payer == "" {
		payer = p.Project
	}
	c, err := bigquery.NewClient(ctx, payer, options...)
	if err != nil {
		return nil, fmt.Errorf("log on to BigQuery: %w (gcloud auth application-default login makes credentials)", err)
	}
	return &Dataset{place: p, client: c, maxBytes: maxBytes, maxRows: 100_000}, nil
}

// Close ends the client.
func (d *Dataset) Close() error { return d.client.Close() }

// Dialect is GoogleSQL.
func (d *Dataset) Dialect() panels.Dialect { return panels.GoogleSQL }

// Shown writes a query with the names of this data set.
func (d *Dataset) Shown(sql string) string { return panels.In(sql, d.place.Project, d.place.Dataset) }

// Read is the number of bytes that were billed until now.
func (d *Dataset) Read() int64 { return d.read.Load() }

func (d *Dataset) query(sql string, params []panels.Param) *bigquery.Query {
	q := d.client.Query(d.Shown(sql))
	q.Location = d.place.Location
	q.MaxBytesBilled = d.maxBytes
	q.Labels = map[string]string{"tallyman": "desk"}
	for _, p := range params {
		q.Parameters = append(q.Parameters, bigquery.QueryParameter{Name: p.Name, Value: p.Value})
	}
	return q
}

// Estimate is the number of bytes that a query would read.
func (d *Dataset) Estimate(ctx context.Context, sql string, params ...panels.Param) (int64, error) {
	q := d.query(sql, params)
	q.DryRun = true
	job, err := q.Run(ctx)
	if err != nil {
		return 0, d.explain(err)
	}
	s := job.LastStatus()
	if s == nil || s.Statistics == nil {
		return 0, errors.New("BigQuery answered a dry run without statistics")
	}
	return s.Statistics.TotalBytesProcessed, nil
}

// Query runs a query.
func (d *Dataset) Query(ctx context.Context, sql string, params ...panels.Param) (panels.Table, error) {
	var t panels.Table
	err := d.Each(ctx, sql, func(columns []string) error {
		t.Columns = columns
		return nil
	}, func(row []any) error {
		if len(t.Rows) == d.maxRows {
			return fmt.Errorf("more than %d rows", d.maxRows)
		}
		t.Rows = append(t.Rows, row)
		return nil
	}, params...)
	if err != nil {
		return panels.Table{}, err
	}
	return t, nil
}

// Each runs a query and keeps no rows: it hands head the names of the columns, once, and row
// each row. An error of theirs ends it and is returned.
func (d *Dataset) Each(ctx context.Context, sql string, head func(columns []string) error, row func(values []any) error, params ...panels.Param) error {
	it, err := d.query(sql, params).Read(ctx)
	if err != nil {
		return d.explain(err)
	}
	told := false
	tell := func() error { // the schema is known from the first page on
		if told {
			return nil
		}
		told = true
		var columns []string
		for _, f := range it.Schema {
			columns = append(columns, f.Name)
		}
		return head(columns)
	}
	for {
		var values []bigquery.Value
		err := it.Next(&values)
		if errors.Is(err, iterator.Done) {
			break
		}
		if err != nil {
			return d.explain(err)
		}
		if err := tell(); err != nil {
			return err
		}
		out := make([]any, len(values))
		for i, v := range values {
			out[i] = plain(v)
		}
		if err := row(out); err != nil {
			return err
		}
	}
	if err := tell(); err != nil {
		return err
	}
	if job := it.SourceJob(); job != nil {
		if s := job.LastStatus(); s != nil && s.Statistics != nil {
			if q, ok := s.Statistics.Details.(*bigquery.QueryStatistics); ok {
				d.read.Add(q.TotalBytesBilled)
			}
		}
	}
	return nil
}

// plain is a value of BigQuery as a Table holds it.
func plain(v bigquery.Value) any {
	switch v := v.(type) {
	case nil, string, int64, float64, bool:
		return v
	case time.Time:
		return v.UTC()
	case civil.Date:
		return v.In(time.UTC)
	case civil.DateTime:
		return v.In(time.UTC)
	case *big.Rat:
		f, _ := v.Float64()
		return f
	}
	return fmt.Sprint(v)
}

// explain says what to do about an error.
func (d *Dataset) explain(err error) error {
	var e *googleapi.Error
	reason := ""
	switch {
	case errors.As(err, &e):
		if len(e.Errors) > 0 {
			reason = e.Errors[0].Reason
		}
	default:
		var b *bigquery.Error
		if !errors.As(err, &b) {
			return fmt.Errorf("ask BigQuery: %w", err)
		}
		reason = b.Reason
	}
	hint := ""
	switch {
	case reason == "bytesBilledLimitExceeded":
		hint = fmt.Sprintf(" (each query may read %d bytes: narrow the time range, or raise --max-bytes)", d.maxBytes)
	case reason == "accessDenied" || e != nil && e.Code == http.StatusForbidden:
		hint = fmt.Sprintf(" (wanted: roles/bigquery.dataViewer on %s.%s and roles/bigquery.jobUser on the project that pays)", d.place.Project, d.place.Dataset)
	case reason == "notFound" || e != nil && e.Code == http.StatusNotFound:
		hint = " (tallyman bq apply makes the tables and views)"
	}
	return fmt.Errorf("ask BigQuery: %w%s", err, hint)
}
