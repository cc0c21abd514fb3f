// Package store answers the questions of package bq from journals on this machine, by
// DuckDB: the same views, and the same rows, as BigQuery gives for a fleet.
//
// The records are copied to a database in a temporary folder, which Close removes, or to
// one that stays and is only brought up to date (Options.Database). The package is linked
// into tallyman-desk only: DuckDB makes a binary larger by sixty megabytes and wants cgo,
// which has no place on a runner.
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
	Memory  int64  // bytes that DuckDB may take before it writes to the temporary folder; 0 is 2 GiB
	Threads int    // 0 is one for each processor
	Temp    string // folder for the database, and for what does not fit memory; empty is the system's
	// Database is a file that keeps what was read, for the next call: it reads only what
	// is new then. Empty keeps nothing.
	Database string
	// Follow says that Refresh is called again. Without it a database that stays can only
	// be read after Open, whatever the query.
	Follow bool
	Owners io.Reader // rules that say which team owns a repository, as CODEOWNERS has them; may be nil
	Stdin  io.Reader // what the path "-" reads
}

// Store holds the records of some journals. Its methods may be called by several
// goroutines, but for Refresh, of which one may run beside queries, and Close. A query
// sees the records of one moment.
type Store struct {
	db       *sql.DB
	dir      string
	replaced []string // sources of which another file stands in the place of the one that was read before
	sources  []report.Source
	close    func()
	records  int64
	refused  int64 // lines that a source gave and that DuckDB could not read as a record
}

// Stats is what was read so far.
type Stats struct {
	Records int64 // in the database, doubles included
	Unread  int64 // lines that are no record
	// Replaced are the paths where another file stands now than the database has read. The
	// database has the records of both.
	Replaced []string
}

// chunk is how much is written for DuckDB to read at once, in bytes.
const chunk = 256 << 20

// Open reads journals (folders) and files of records. A database that was there may be
// asked without any. The error says what to do.
func Open(ctx context.Context, paths []string, o Options) (_ *Store, err error) {
	if len(paths) == 0 && o.Database == "" {
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
	isNew := true
	if o.Database == "" {
		if s.db, err = sql.Open("duckdb", filepath.Join(s.dir, "db")); err != nil {
			return nil, fmt.Errorf("open the database: %w", err)
		}
	} else if s.db, isNew, err = openKept(ctx, o.Database); err != nil {
		return nil, err
	}
	if isNew && len(paths) == 0 {
		return nil, fmt.Errorf("the database %s is new: name the journals that it shall read", o.Database)
	}
	memory, threads := o.Memory, o.Threads
	if memory <= 0 {
		memory = 2 << 30
	}
	if threads <= 0 {
		threads = runtime.NumCPU()
	}
	settings := []string{
		"SET TimeZone = 'UTC'",
		"SET memory_limit = '" + strconv.FormatInt(memory>>20, 10) + "MiB'",
		"SET threads = " + strconv.Itoa(threads),
		"SET preserve_insertion_order = false",
		// Rows are written to the file as they come; the log holds little but where they are.
		// To fold it in after each load would take longer than the load.
		"SET checkpoint_threshold = '1TB'",
		"SET temp_directory = " + quote(filepath.Join(s.dir, "spill")),
		// A query of somebody's own reads no file and no address, and changes none of this.
		"SET allowed_directories = [" + quote(s.dir) + "]",
		"SET enable_external_access = false",
		"SET lock_configuration = true",
	}
	if o.Database == "" {
		settings = append(settings, "PRAGMA disable_checkpoint_on_shutdown") // nobody reads it again
	}
	if err := s.run(ctx, settings); err != nil {
		return nil, err
	}
	if isNew {
		if err := s.lay(ctx); err != nil {
			return nil, fmt.Errorf("make the database: %w", err)
		}
	}
	if err := s.owners(ctx, o.Owners); err != nil {
		return nil, err
	}
	if !isNew {
		if err := s.resume(ctx); err != nil {
			return nil, fmt.Errorf("go on with the database %s: %w", o.Database, err)
		}
	}
	if _, err := s.Refresh(ctx); err != nil {
		return nil, err
	}
	if o.Database != "" && !o.Follow {
		if err := s.db.Close(); err != nil {
			return nil, fmt.Errorf("finish the database: %w", err)
		}
		if s.db, err = sql.Open("duckdb", o.Database+"?access_mode=read_only"); err != nil {
			return nil, fmt.Errorf("open the database: %w", err)
		}
		return s, s.run(ctx, settings)
	}
	return s, nil
}

func (s *Store) run(ctx context.Context, statements []string) error {
	for _, q := range statements {
		if _, err := s.db.ExecContext(ctx, q); err != nil {
			return fmt.Errorf("prepare the database: %w", err)
		}
	}
	return nil
}

// lay makes all that a new database has, or nothing.
func (s *Store) lay(ctx context.Context) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	for _, q := range layout() {
		if _, err := tx.ExecContext(ctx, q); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// tables are the statements that make the tables and views of a new database.
func tables() []string {
	out := append([]string{
		"CREATE SCHEMA tallyman",
		"CREATE TABLE tallyman.records (" + columns(func(name, kind string) string { return `"` + name + `" ` + kind }) + ")",
		"CREATE TABLE tallyman." + bq.Owners + ` (pattern VARCHAR, team VARCHAR, line BIGINT)`,
	}, macros...)
	for _, v := range bq.Views() {
		q := "CREATE VIEW tallyman." + v.Name + " AS " + Translate(v.SQL)
		if v.Table {
			// A query without rows gives the table its columns.
			q = "CREATE TABLE tallyman." + v.Name + " AS " + between(Translate(v.SQL), time.Unix(0, 0), time.Unix(0, 0)) + " LIMIT 0"
		}
		out = append(out, q)
	}
	return out
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
	if _, err := s.db.ExecContext(ctx, "DELETE FROM tallyman."+bq.Owners); err != nil {
		return fmt.Errorf("owners: %w", err)
	}
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
		if err := s.load(ctx, path, lines); err != nil {
			return "", fmt.Errorf("read records: %w", err)
		}
	}
	if err := s.keep(ctx); err != nil {
		return "", err
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

// load adds the records of a file of so many lines, and notes in the same transaction
// how far the sources are read and what the kept answers lack now.
func (s *Store) load(ctx context.Context, path string, lines int64) error {
	defer os.Remove(path) // its room is wanted before the database is closed
	types := columns(func(name, kind string) string { return quote(name) + ": " + quote(kind) })
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	q := "INSERT INTO tallyman.records SELECT * REPLACE (ci.repository AS repository, ci.workflow AS workflow) FROM read_json(" + quote(path) +
		", format = 'newline_delimited', ignore_errors = true, maximum_object_size = 4194304, columns = {" + types + "}) WHERE id IS NOT NULL AND ts IS NOT NULL AND kind IS NOT NULL"
	if _, err := tx.ExecContext(ctx, q); err != nil {
		return err
	}
	// Rows are only ever added, so that their numbers follow each other.
	var first, last sql.NullTime
	var rows int64
	if err := tx.QueryRowContext(ctx, "SELECT MIN(ts), MAX(ts), COUNT(*) FROM tallyman.records WHERE rowid >= $1", s.records).Scan(&first, &last, &rows); err != nil {
		return err
	}
	if err := s.note(ctx, tx, s.Stats().Unread+lines-rows, first, last); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	s.refused += lines - rows
	s.records += rows
	return nil
}

// keep brings the kept answers up to date for the records that were loaded since it last
// did. A call's row changes when its end comes, so that it begins a day before.
func (s *Store) keep(ctx context.Context) error {
	from, to, err := s.lacking(ctx)
	if err != nil || from.IsZero() {
		return err
	}
	from, to = from.Add(-24*time.Hour), to.Add(time.Second)
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
	return s.nothingLacks(ctx)
}

// Stats says what was read.
func (s *Store) Stats() Stats {
	st := Stats{Records: s.records, Unread: s.refused, Replaced: s.replaced}
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
