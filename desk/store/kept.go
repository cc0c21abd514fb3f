package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/tallyman-ci/tallyman/report"
)

// This file is what a database needs to be brought up to date by a later process: it
// notes in the schema desk what made it, how far each source is read, and for which time
// the kept answers do not have the records yet. All of that is committed with the
// records it is about, so that a process may end at any moment.

// layout are the statements that make a new database.
func layout() []string {
	return append(tables(),
		"CREATE SCHEMA desk",
		"CREATE TABLE desk.sources (path VARCHAR, segment UBIGINT, read_to BIGINT, head VARCHAR)",
		"CREATE TABLE desk.database (stamp VARCHAR, unread BIGINT, first TIMESTAMP, last TIMESTAMP)",
		"INSERT INTO desk.database VALUES ("+quote(stamp())+", 0, NULL, NULL)",
	)
}

// stamp tells a layout from those of other versions, which cannot be gone on with.
func stamp() string {
	sum := sha256.Sum256([]byte(strings.Join(tables(), ";\n")))
	return hex.EncodeToString(sum[:])
}

// openKept opens a database that stays, and says whether it is a new one.
func openKept(ctx context.Context, path string) (_ *sql.DB, isNew bool, err error) {
	if st, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		isNew = true
	} else if err != nil {
		return nil, false, fmt.Errorf("open the database: %w", err)
	} else if !st.Mode().IsRegular() {
		return nil, false, fmt.Errorf("%s is no file: name one for the database, which need not be there", path)
	}
	if !isNew && !isDatabase(path) {
		// DuckDB would open a text as well, and keep what it is given in memory.
		return nil, false, fmt.Errorf("%s is no database: name another file, or remove it, and it is made from the journals", path)
	}
	db, err := sql.Open("duckdb", path)
	if err == nil {
		err = db.PingContext(ctx)
	}
	if err != nil {
		if strings.Contains(err.Error(), "Could not set lock") {
			return nil, false, fmt.Errorf("the database %s is in use by another process: wait for it, or name another file", path)
		}
		return nil, false, fmt.Errorf("%s is no database that can be read: name another file, or remove it, and it is made again from the journals: %w", path, err)
	}
	if isNew {
		// What jobs did is for the same eyes only as the journals.
		if err := os.Chmod(path, 0o600); err != nil {
			return nil, false, errors.Join(fmt.Errorf("make the database: %w", err), db.Close())
		}
		return db, true, nil
	}
	var tables int
	if err := db.QueryRowContext(ctx, "SELECT COUNT(*) FROM duckdb_tables()").Scan(&tables); err != nil {
		return nil, false, errors.Join(fmt.Errorf("read the database %s: %w", path, err), db.Close())
	}
	if tables == 0 { // a process ended before it had made anything
		return db, true, nil
	}
	var made string
	if err := db.QueryRowContext(ctx, "SELECT stamp FROM desk.database").Scan(&made); err != nil || made != stamp() {
		return nil, false, errors.Join(fmt.Errorf("the database %s was made by another program, or by another version of this one: name another file, or remove it, and it is made again from the journals", path), db.Close())
	}
	return db, false, nil
}

// isDatabase looks for DuckDB's mark (duckdb.org, "Storage Versions and Format").
func isDatabase(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return true // to open it says more
	}
	defer f.Close()
	mark := make([]byte, 12)
	_, err = io.ReadFull(f, mark)
	return err == nil && string(mark[8:]) == "DUCK"
}

// resume goes on where the process before came to.
func (s *Store) resume(ctx context.Context) error {
	if err := s.db.QueryRowContext(ctx, "SELECT COUNT(*) FROM tallyman.records").Scan(&s.records); err != nil {
		return err
	}
	if err := s.db.QueryRowContext(ctx, "SELECT unread FROM desk.database").Scan(&s.refused); err != nil {
		return err
	}
	rows, err := s.db.QueryContext(ctx, "SELECT path, segment, read_to, head FROM desk.sources")
	if err != nil {
		return err
	}
	defer rows.Close()
	marks := map[string]report.Mark{}
	for rows.Next() {
		var m report.Mark
		if err := rows.Scan(&m.Path, &m.At.Segment, &m.At.Offset, &m.Head); err != nil {
			return err
		}
		marks[m.Path] = m
	}
	for _, src := range s.sources {
		m, known := marks[report.PathOf(src)]
		if known && !report.Resume(src, m) {
			s.replaced = append(s.replaced, src.Name())
		}
	}
	return rows.Err()
}

// note notes, with the records that were just loaded, what is known besides.
func (s *Store) note(ctx context.Context, tx *sql.Tx, unread int64, first, last sql.NullTime) error {
	if _, err := tx.ExecContext(ctx, "UPDATE desk.database SET unread = $1, first = LEAST(first, $2), last = GREATEST(last, $3)", unread, first, last); err != nil {
		return err
	}
	for _, src := range s.sources {
		m, ok := report.MarkOf(src)
		if !ok {
			continue
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM desk.sources WHERE path = $1", m.Path); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO desk.sources VALUES ($1, $2, $3, $4)", m.Path, m.At.Segment, m.At.Offset, m.Head); err != nil {
			return err
		}
	}
	return nil
}

// lacking is the time of the records that the kept answers do not have, zero where they
// have all.
func (s *Store) lacking(ctx context.Context) (first, last time.Time, err error) {
	var from, to sql.NullTime
	if err := s.db.QueryRowContext(ctx, "SELECT first, last FROM desk.database").Scan(&from, &to); err != nil {
		return first, last, fmt.Errorf("read what the answers lack: %w", err)
	}
	return from.Time, to.Time, nil
}

func (s *Store) nothingLacks(ctx context.Context) error {
	if _, err := s.db.ExecContext(ctx, "UPDATE desk.database SET first = NULL, last = NULL"); err != nil {
		return fmt.Errorf("note what the answers have: %w", err)
	}
	return nil
}
