package sinks

import (
	"context"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
	"github.com/tallyman-ci/tallyman/sinks/internal/logform"
)

// gkeSink gives its inner sink the records as structured entries for the logging
// agent of Google Kubernetes Engine.
type gkeSink struct {
	Sink
	buf   []byte
	lines []Entry
	rec   record.Record
}

func (s *gkeSink) Write(ctx context.Context, batch []Entry) error {
	var refused []Refused
	s.buf, s.lines = s.buf[:0], s.lines[:0]
	for i, e := range batch {
		start := len(s.buf)
		err := recordjson.Unmarshal(e.Line, &s.rec)
		if err == nil {
			s.buf, err = logform.AppendGKE(s.buf, &s.rec)
		}
		if err != nil {
			s.buf = s.buf[:start]
			refused = append(refused, Refused{Index: i, Reason: err.Error()})
			continue
		}
		s.lines = append(s.lines, Entry{ID: e.ID, Kind: e.Kind, Line: s.buf[start:len(s.buf):len(s.buf)]})
	}
	if len(s.lines) > 0 {
		if err := s.Sink.Write(ctx, s.lines); err != nil {
			return err
		}
	}
	if refused != nil {
		return &RefusedError{Refused: refused}
	}
	return nil
}
