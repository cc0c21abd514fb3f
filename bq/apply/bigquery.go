package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/api/bigquery/v2"

	"github.com/tallyman-ci/tallyman/bq"
)

// The roles with which a caller can do the steps.
const (
	bigQueryRole = "roles/bigquery.dataOwner"
	pubSubRole   = "roles/pubsub.editor"
)

// defaultLocation is where a data set is made if nobody says otherwise; it cannot be moved.
const defaultLocation = "US"

func (p *Plan) dataset(ctx context.Context) (Step, error) {
	s := Step{Action: Keep, What: "data set", Name: p.o.Project + ":" + p.o.Dataset, role: bigQueryRole}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	have, err := p.c.BigQuery.Datasets.Get(p.o.Project, p.o.Dataset).Context(ctx).Do()
	if isNotFound(err) {
		location := p.o.Location
		if location == "" {
			location = defaultLocation
		}
		s.Action = Create
		s.Details = []string{"location " + location + ", for good"}
		s.do = func(ctx context.Context) error {
			_, err := p.c.BigQuery.Datasets.Insert(p.o.Project, &bigquery.Dataset{
				DatasetReference: &bigquery.DatasetReference{ProjectId: p.o.Project, DatasetId: p.o.Dataset},
				Location:         location,
				Description:      bq.DatasetDescription,
			}).Context(ctx).Do()
			return err
		}
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if p.o.Location != "" && !strings.EqualFold(have.Location, p.o.Location) {
		return s, refuse("it is in %s and cannot move to %s: name another data set, or leave the location out", have.Location, p.o.Location)
	}
	if have.DefaultTableExpirationMs > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("the data set deletes each new table after %s, these too; to change that: bq update --default_table_expiration 0 %s",
			days(time.Duration(have.DefaultTableExpirationMs)*time.Millisecond), s.Name))
	}
	return s, nil
}

func (p *Plan) table(ctx context.Context, want bq.Table) (Step, error) {
	s := Step{Action: Keep, What: "table", Name: p.o.Project + ":" + p.o.Dataset + "." + want.Name, role: bigQueryRole}
	expiration := want.Expiration
	if want.Name == bq.Records && p.o.Expiration != 0 {
		expiration = max(p.o.Expiration, 0)
	}
	if err := bq.Valid(want.Fields); err != nil {
		return s, refusal{err}
	}
	have, err := p.get(ctx, want.Name)
	if isNotFound(err) {
		s.Action = Create
		s.Details = append(s.Details, fmt.Sprintf("%d columns", count(want.Fields)))
		if want.PartitionBy != "" {
			s.Details = append(s.Details, "days expire: "+days(expiration))
		}
		s.do = func(ctx context.Context) error {
			_, err := p.c.BigQuery.Tables.Insert(p.o.Project, p.o.Dataset, p.newTable(want, expiration)).Context(ctx).Do()
			return err
		}
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if have.Type != "TABLE" {
		return s, refuse("it is a %s, and a table is wanted: name another data set, or drop it first", have.Type)
	}
	patch := &bigquery.Table{}
	if err := partition(&s, patch, have, want, p.o, expiration); err != nil {
		return s, err
	}
	var columns []*bigquery.TableFieldSchema
	if have.Schema != nil {
		columns = have.Schema.Fields
	}
	merged, changes, err := bq.Evolve(fields(columns), want.Fields)
	if err != nil {
		return s, refusal{fmt.Errorf("BigQuery would refuse the new columns: %w (make another data set, and a view over both)", err)}
	}
	described, foreign := 0, 0
	for _, c := range changes {
		switch c.Kind {
		case bq.Foreign:
			foreign++
		case bq.Described:
			described++
		case bq.Added:
			s.Details = append(s.Details, "add column "+c.Path)
		case bq.Relaxed:
			s.Details = append(s.Details, "column "+c.Path+" may be NULL")
		}
	}
	if described > 0 {
		s.Details = append(s.Details, fmt.Sprintf("describe %d columns", described))
	}
	if len(changes) > foreign {
		patch.Schema = &bigquery.TableSchema{Fields: overlay(columns, merged)}
	}
	if len(s.Details) > 0 {
		s.Action = Change
		s.do = func(ctx context.Context) error { return p.patch(ctx, want.Name, have.Etag, patch) }
	}
	if foreign > 0 {
		s.Details = append(s.Details, fmt.Sprintf("leave %d columns that this release does not know", foreign))
	}
	return s, nil
}

// partition plans what may change about a table's days, and refuses the rest.
func partition(s *Step, patch, have *bigquery.Table, want bq.Table, o bq.Options, expiration time.Duration) error {
	if want.PartitionBy != "" {
		tp := have.TimePartitioning
		if tp == nil || tp.Type != "DAY" || tp.Field != want.PartitionBy {
			return refuse("it is not partitioned by day of %s, and that cannot change: name another data set, or drop the table", want.PartitionBy)
		}
		if ms := expiration.Milliseconds(); want.Name == bq.Records && o.Expiration != 0 && tp.ExpirationMs != ms {
			text := fmt.Sprintf("days expire: %s in place of %s", days(expiration), days(time.Duration(tp.ExpirationMs)*time.Millisecond))
			if ms > 0 && (tp.ExpirationMs == 0 || ms < tp.ExpirationMs) {
				text += "; OLDER RECORDS ARE DELETED"
			}
			s.Details = append(s.Details, text)
			patch.TimePartitioning = &bigquery.TimePartitioning{Type: tp.Type, Field: tp.Field, ExpirationMs: ms}
			if ms == 0 {
				patch.TimePartitioning.NullFields = []string{"ExpirationMs"}
			}
		}
	}
	var cluster []string
	if have.Clustering != nil {
		cluster = have.Clustering.Fields
	}
	if len(want.ClusterBy) > 0 && !slices.Equal(cluster, want.ClusterBy) {
		s.Details = append(s.Details, "cluster new days by "+strings.Join(want.ClusterBy, ", "))
		patch.Clustering = &bigquery.Clustering{Fields: want.ClusterBy}
	}
	required := have.RequirePartitionFilter || have.TimePartitioning != nil && have.TimePartitioning.RequirePartitionFilter
	if want.RequireFilter && !required {
		s.Details = append(s.Details, "refuse queries that name no days")
		patch.RequirePartitionFilter = true
	}
	return nil
}

func (p *Plan) view(ctx context.Context, v bq.View) (Step, error) {
	s := Step{Action: Keep, What: "view", Name: p.o.Project + ":" + p.o.Dataset + "." + v.Name, role: bigQueryRole}
	query := bq.In(v.SQL, p.o.Project, p.o.Dataset)
	want := &bigquery.Table{
		TableReference: p.reference(v.Name),
		Description:    v.Description(),
		View:           &bigquery.ViewDefinition{Query: query, ForceSendFields: []string{"UseLegacySql"}}, // absent means true
	}
	have, err := p.get(ctx, v.Name)
	switch {
	case isNotFound(err):
		s.Action = Create
		s.do = func(ctx context.Context) error {
			_, err := p.c.BigQuery.Tables.Insert(p.o.Project, p.o.Dataset, want).Context(ctx).Do()
			return err
		}
		return s, nil
	case err != nil:
		return s, err
	case have.Type != "VIEW" || have.View == nil:
		return s, refuse("it is a %s, and a view is wanted: name another data set, or drop it first", have.Type)
	}
	patch := &bigquery.Table{}
	if have.View.Query != query || have.View.UseLegacySql {
		s.Details = append(s.Details, "another query")
		patch.View = want.View
	}
	if have.Description != want.Description {
		s.Details = append(s.Details, "another description")
		patch.Description = want.Description
	}
	if len(s.Details) > 0 {
		s.Action = Change
		s.do = func(ctx context.Context) error { return p.patch(ctx, v.Name, have.Etag, patch) }
	}
	return s, nil
}

func (p *Plan) get(ctx context.Context, name string) (*bigquery.Table, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return p.c.BigQuery.Tables.Get(p.o.Project, p.o.Dataset, name).Context(ctx).Do()
}

// patch changes what was read, and nothing that another has changed since.
func (p *Plan) patch(ctx context.Context, name, etag string, t *bigquery.Table) error {
	call := p.c.BigQuery.Tables.Patch(p.o.Project, p.o.Dataset, name, t).Context(ctx)
	call.Header().Set("If-Match", etag)
	_, err := call.Do()
	return err
}

func (p *Plan) reference(name string) *bigquery.TableReference {
	return &bigquery.TableReference{ProjectId: p.o.Project, DatasetId: p.o.Dataset, TableId: name}
}

func (p *Plan) newTable(want bq.Table, expiration time.Duration) *bigquery.Table {
	t := &bigquery.Table{
		TableReference:         p.reference(want.Name),
		Description:            want.Description,
		Schema:                 &bigquery.TableSchema{Fields: overlay(nil, want.Fields)},
		RequirePartitionFilter: want.RequireFilter,
	}
	if want.PartitionBy != "" {
		t.TimePartitioning = &bigquery.TimePartitioning{Type: "DAY", Field: want.PartitionBy, ExpirationMs: expiration.Milliseconds()}
	}
	if len(want.ClusterBy) > 0 {
		t.Clustering = &bigquery.Clustering{Fields: want.ClusterBy}
	}
	return t
}

// fields is a table's schema without what we do not set.
func fields(columns []*bigquery.TableFieldSchema) []bq.Field {
	var out []bq.Field
	for _, c := range columns {
		out = append(out, bq.Field{Name: c.Name, Type: c.Type, Mode: c.Mode, Description: c.Description, Fields: fields(c.Fields)})
	}
	return out
}

// overlay writes want over have, whose columns keep what bq.Field does not hold: policy
// tags, collations, defaults.
func overlay(have []*bigquery.TableFieldSchema, want []bq.Field) []*bigquery.TableFieldSchema {
	var out []*bigquery.TableFieldSchema
	for _, w := range want {
		f := &bigquery.TableFieldSchema{Name: w.Name, Type: w.Type}
		if i := slices.IndexFunc(have, func(h *bigquery.TableFieldSchema) bool { return h.Name == w.Name }); i >= 0 {
			*f = *have[i]
		}
		f.Mode, f.Description, f.Fields = w.Mode, w.Description, overlay(f.Fields, w.Fields)
		out = append(out, f)
	}
	return out
}

func count(fields []bq.Field) int {
	n := len(fields)
	for _, f := range fields {
		n += count(f.Fields)
	}
	return n
}

func days(d time.Duration) string {
	if d <= 0 {
		return "never"
	}
	return fmt.Sprintf("%gd", d.Hours()/24)
}
