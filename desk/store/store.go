// Package store answers the questions of package bq from journals on this machine, by
// DuckDB: the same views, and the same rows, as BigQuery gives for a fleet.
//
// The records are copied to a database in a temporary folder, which Close removes. It is
// linked into tallyman-desk only: DuckDB makes a binary larger by sixty megabytes and wants
// cgo, which has no place on a runner.
package store

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	_ "github.com/duckdb/duckdb-go/v2" // the driver

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/report"
	"github.com/tallyman-ci/tallyman/sinks/row"
)

// Options are what a store may use. The zero value is good for a desk.
type Options struct {
	Memory  int64     // bytes that DuckDB may take before it writes to the temporary folder; 0 is 2 GiB
	Threads int       // 0 is one for each processor
	Temp    string    // folder for the database; empty is the system's
	Owners  io.Reader // rules that say which team owns a repository, as CODEOWNERS has them; may be nil
	Stdin   io.Reader // what the path "-" reads
}

// Store holds the records of some journals. Its methods may be called by several
// goroutines, but for Refresh, of which one may run beside queries, and Close. A query
// sees the records of one moment.
type Store struct {
	db      *sql.DB
	dir     string
	sources []report.Source
	close   func()
	records int64
	refused int64 // lines that a source gave and that DuckDB could not read as a record
}

// Stats is what was read so far.
type Stats struct {
	Records int64 // in the database, doubles included
	Unread  int64 // lines that are no record
}

// chunk is how much is written for DuckDB to read at once, in bytes.
const chunk = 256 << 20

// Open reads journals (folders) and files of records. The error says what to do.
func Open(ctx context.Context, paths []string, o Options) (_ *Store, err error) {
	if len(paths) == 0 {
		return nil, errors.New("no journal was named")
	}
	s := &Store{close: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.sources, s.close, err = report.OpenPaths(paths, time.Time{}, o.Stdin); err != nil {
		s.close = func() {}
		return nil, err
	}
	if s.dir, err = os.MkdirTemp(o.Temp, "tallyman-desk-"); err != nil {
		return nil, fmt.Errorf("make a folder for the database: %w", err)
	}
	if s.db, err = sql.Open("duckdb", filepath.Join(s.dir, "db")); err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	memory, threads := o.Memory, o.Threads
	if memory <= 0 {
		memory = 2 << 30
	}
	if threads <= 0 {
		threads = runtime.NumCPU()
	}
	setup := []string{
		"SET TimeZone = 'UTC'",
		"SET memory_limit = '" + strconv.FormatInt(memory>>20, 10) + "MiB'",
		"SET threads = " + strconv.Itoa(threads),
		"SET preserve_insertion_order = false",
		// The database does not outlive the process. To make it fit for that after each load
		// would take longer than the load, and at the end a minute for ten million records.
		"SET checkpoint_threshold = '1TB'",
		"PRAGMA disable_checkpoint_on_shutdown",
		"SET temp_directory = " + quote(filepath.Join(s.dir, "spill")),
		// A query of somebody's own reads no file and no address, and changes none of this.
		"SET allowed_directories = [" + quote(s.dir) + "]",
		"SET enable_external_access = false",
		"SET lock_configuration = true",
		"CREATE SCHEMA tallyman",
		"CREATE TABLE tallyman.records (" + columns(func(name, kind string) string { return `"` + name + `" ` + kind }) + ")",
		"CREATE TABLE tallyman." + bq.Owners + ` (pattern VARCHAR, team VARCHAR, line BIGINT)`,
	}
	for _, q := range append(setup, macros...) {
		if _, err := s.db.ExecContext(ctx, q); err != nil {
			return nil, fmt.Errorf("prepare the database: %w", err)
		}
	}
	if err := s.owners(ctx, o.Owners); err != nil {
		return nil, err
	}
	for _, v := range bq.Views() {
		q := "CREATE VIEW tallyman." + v.Name + " AS " + Translate(v.SQL)
		if v.Table {
			// A query without rows gives the table its columns.
			q = "CREATE TABLE tallyman." + v.Name + " AS " + between(Translate(v.SQL), time.Unix(0, 0), time.Unix(0, 0)) + " LIMIT 0"
		}
		if _, err := s.db.ExecContext(ctx, q); err != nil {
			return nil, fmt.Errorf("make the view %s: %w", v.Name, err)
		}
	}
	if _, err := s.Refresh(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// columns writes the table's columns one by one.
func columns(write func(name, kind string) string) string {
	var out []string
	for _, c := range row.Columns() {
		out = append(out, write(c.Name, kind(c)))
	}
	return strings.Join(out, ", ")
}

// kind is a column's type in DuckDB.
func kind(c row.Column) string {
	t := map[row.Type]string{row.String: "VARCHAR", row.Integer: "BIGINT", row.Boolean: "BOOLEAN", row.Timestamp: "TIMESTAMP"}[c.Type]
	if c.Type == row.Record {
		var fields []string
		for _, f := range c.Fields {
			fields = append(fields, `"`+f.Name+`" `+kind(f))
		}
		t = "STRUCT(" + strings.Join(fields, ", ") + ")"
	}
	if c.Mode == row.Repeated {
		t += "[]"
	}
	return t
}

// between puts times into a translated query: a statement that makes a table takes no
// parameters.
func between(sql string, from, to time.Time) string {
	return strings.NewReplacer("$from", timestamp(from), "$to", timestamp(to)).Replace(sql)
}

func timestamp(t time.Time) string {
	return "TIMESTAMP '" + t.UTC().Format("2006-01-02 15:04:05.999999") + "'"
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// owners fills the table of owners.
func (s *Store) owners(ctx context.Context, r io.Reader) error {
	if r == nil {
		return nil
	}
	rules, err := bq.ParseOwners(r)
	if err != nil {
		return err
	}
	for _, o := range rules {
		if _, err := s.db.ExecContext(ctx, "INSERT INTO tallyman."+bq.Owners+" VALUES (?, ?, ?)", o.Pattern, o.Team, o.Line); err != nil {
			return fmt.Errorf("owners, line %d: %w", o.Line, err)
		}
	}
	return nil
}

// Refresh reads what was appended to the journals since, and returns a word that changes
// with the answers.
func (s *Store) Refresh(ctx context.Context) (string, error) {
	var first, last time.Time
	for done := false; !done; {
		path := filepath.Join(s.dir, "new.jsonl")
		lines, all, err := s.copy(path)
		if err != nil {
			return "", err
		}
		done = all
		if lines == 0 {
			break
		}
		from, to, rows, err := s.load(ctx, path)
		if err != nil {
			return "", fmt.Errorf("read records: %w", err)
		}
		s.refused += lines - rows
		s.records += rows
		if rows > 0 {
			if first.IsZero() || from.Before(first) {
				first = from
			}
			if to.After(last) {
				last = to
			}
		}
	}
	if !first.IsZero() {
		if err := s.keep(ctx, first, last.Add(time.Second)); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d %d", s.records, s.Stats().Unread), nil
}

// copy writes lines for DuckDB to read, and says whether those were all.
func (s *Store) copy(path string) (lines int64, all bool, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, false, fmt.Errorf("copy records for the database: %w", err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	size := 0
	all = true
read:
	for _, src := range s.sources {
		for {
			line, err := src.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return 0, false, errors.Join(fmt.Errorf("read %s: %w", src.Name(), err), f.Close())
			}
			if bytes.Contains(line, []byte(`"kind":"segment"`)) {
				continue // a segment's header
			}
			lines++
			size += len(line) + 1
			w.Write(line) // an error stays until Flush
			w.WriteByte('\n')
			if size >= chunk {
				all = false
				break read
			}
		}
	}
	if err := errors.Join(w.Flush(), f.Close()); err != nil {
		return 0, false, fmt.Errorf("copy records for the database (is the disk of %s full? TMPDIR names another): %w", filepath.Dir(path), err)
	}
	return lines, all, nil
}

// load adds the records of a file, and returns their times and how many they are.
func (s *Store) load(ctx context.Context, path string) (from, to time.Time, rows int64, err error) {
	defer os.Remove(path) // its room is wanted before the database is closed
	types := columns(func(name, kind string) string { return quote(name) + ": " + quote(kind) })
	q := "INSERT INTO tallyman.records SELECT * REPLACE (ci.repository AS repository, ci.workflow AS workflow) FROM read_json(" + quote(path) +
		", format = 'newline_delimited', ignore_errors = true, maximum_object_size = 4194304, columns = {" + types + "}) WHERE id IS NOT NULL AND ts IS NOT NULL AND kind IS NOT NULL"
	if _, err := s.db.ExecContext(ctx, q); err != nil {
		return from, to, 0, err
	}
	// Rows are only ever added, so that their numbers follow each other.
	var first, last sql.NullTime
	if err := s.db.QueryRowContext(ctx, "SELECT MIN(ts), MAX(ts), COUNT(*) FROM tallyman.records WHERE rowid >= $1", s.records).Scan(&first, &last, &rows); err != nil {
		return from, to, 0, err
	}
	return first.Time, last.Time, rows, nil
}

// keep brings the kept answers up to date for the records between two times. A call's row
// changes when its end comes, so that it begins a day before.
func (s *Store) keep(ctx context.Context, from, to time.Time) error {
	from = from.Add(-24 * time.Hour)
	for _, v := range bq.Views() {
		if !v.Table {
			continue
		}
		tx, err := s.db.BeginTx(ctx, nil)
		if err != nil {
			return fmt.Errorf("answer %s: %w", v.Name, err)
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM tallyman."+v.Name+" WHERE ts >= "+timestamp(from)+" AND ts < "+timestamp(to))
		if err == nil {
			_, err = tx.ExecContext(ctx, "INSERT INTO tallyman."+v.Name+" "+between(Translate(v.SQL), from, to))
		}
		if err != nil {
			return errors.Join(fmt.Errorf("answer %s: %w", v.Name, err), tx.Rollback())
		}
		if err := tx.Commit(); err != nil {
			return fmt.Errorf("answer %s: %w", v.Name, err)
		}
	}
	return nil
}

// Stats says what was read.
func (s *Store) Stats() Stats {
	st := Stats{Records: s.records, Unread: s.refused}
	for _, src := range s.sources {
		st.Unread += report.Torn(src)
	}
	return st
}

// Dialect is the SQL that Query wants.
func (s *Store) Dialect() panels.Dialect { return panels.DuckDB }

// Query runs one query. Integers that need more than 64 bits come as text, and so do lists
// and structs.
func (s *Store) Query(ctx context.Context, query string, params ...panels.Param) (panels.Table, error) {
	var t panels.Table
	err := s.Each(ctx, query, func(columns []string) error {
		t.Columns = columns
		return nil
	}, func(row []any) error {
		for i, v := range row {
			switch v.(type) {
			case []any, map[string]any:
				row[i] = fmt.Sprint(v)
			}
		}
		t.Rows = append(t.Rows, row)
		return nil
	}, params...)
	return t, err
}

// Each runs one query like Query and keeps no rows: it hands head the names of the columns,
// once, and row each row. An error of theirs ends it and is returned. Lists come as []any
// and structs as map[string]any, without the members that are NULL.
func (s *Store) Each(ctx context.Context, query string, head func(columns []string) error, row func(values []any) error, params ...panels.Param) error {
	var args []any
	for _, p := range params {
		args = append(args, sql.Named(p.Name, p.Value))
	}
	rows, err := s.db.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return err
	}
	if err := head(columns); err != nil {
		return err
	}
	for rows.Next() {
		values := make([]any, len(columns))
		into := make([]any, len(values))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return err
		}
		for i, v := range values {
			values[i] = plain(v)
		}
		if err := row(values); err != nil {
			return err
		}
	}
	return rows.Err()
}

// plain is a value as Table has it.
func plain(v any) any {
	switch v := v.(type) {
	case *big.Int:
		if v.IsInt64() {
			return v.Int64()
		}
		return v.String()
	case int32:
		return int64(v)
	case int16:
		return int64(v)
	case int8:
		return int64(v)
	case uint64:
		return plain(new(big.Int).SetUint64(v))
	case uint32:
		return int64(v)
	case float32:
		return float64(v)
	case time.Time:
		return v.UTC()
	case nil, string, int64, float64, bool:
		return v
	case fmt.Stringer: // decimals, intervals, UUIDs
		return v.String()
	case []byte:
		return string(v)
	case []any:
		for i, e := range v {
			v[i] = plain(e)
		}
		return v
	case map[string]any:
		for name, e := range v {
			if e == nil {
				delete(v, name)
				continue
			}
			v[name] = plain(e)
		}
		return v
	default:
		return fmt.Sprint(v)
	}
}

// Close removes the database.
func (s *Store) Close() error {
	s.close()
	var err error
	if s.db != nil {
		err = s.db.Close()
	}
	if s.dir != "" {
		err = errors.Join(err, os.RemoveAll(s.dir))
	}
	return err
}
