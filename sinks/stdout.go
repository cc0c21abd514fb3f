package sinks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// stdoutScheme writes the records as JSON lines to standard output, for collectors
// that read a container's log.
func stdoutScheme() Scheme {
	return Scheme{Name: "stdout", Form: "stdout:", Params: []Param{
		{"format", "record", "record (the lines of the journal) or gke (structured entries for the logging agent of Google Kubernetes Engine)"},
	}, Open: func(_ context.Context, t *Target) (Sink, error) {
		if t.URL.Host != "" || t.URL.Path != "" || t.URL.Opaque != "" {
			return nil, errors.New("want stdout: and nothing behind it but parameters")
		}
		format := t.String("format", "record")
		if format != "record" && format != "gke" {
			return nil, fmt.Errorf("parameter format: want record or gke, not %q", format)
		}
		s, err := newWriterSink(unix.Stdout)
		if err == nil && format == "gke" {
			s = &gkeSink{Sink: s}
		}
		return s, err
	}}
}

// newWriterSink writes to a descriptor of its own for what fd refers to. Not to fd
// itself, because Go ends the process when a write to descriptor 1 or 2 meets a
// closed pipe (os/signal, SIGPIPE), and a log collector that went away must not end
// the agent.
func newWriterSink(fd int) (Sink, error) {
	own, err := reopenPipe(fd)
	if err != nil {
		own, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	}
	if err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	return &writerSink{f: os.NewFile(uintptr(own), "standard output")}, nil
}

// reopenPipe opens the pipe behind fd once more, without blocking: only then does a
// write to a reader that does not read end at its deadline. To set O_NONBLOCK on fd
// would set it for every process that shares the description.
func reopenPipe(fd int) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return -1, unix.ESPIPE // a file would be written from its beginning
	}
	return unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

type writerSink struct {
	f    *os.File
	enc  encoder
	torn bool // the last write ended in a line
}

func (s *writerSink) Write(ctx context.Context, batch []Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	lines := s.enc.encode(batch)
	// The deadline is kept where the descriptor is a pipe. A terminal that is stopped
	// holds this call, and only this sink.
	deadline, _ := ctx.Deadline()
	if err := s.f.SetWriteDeadline(deadline); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		return fmt.Errorf("standard output: %w", err)
	}
	// The end of the agent does not wait for the deadline.
	stop := context.AfterFunc(ctx, func() { _ = s.f.SetWriteDeadline(time.Now()) })
	defer stop()
	if s.torn {
		if _, err := s.f.Write([]byte{'\n'}); err != nil {
			return err
		}
		s.torn = false
	}
	n, err := s.f.Write(lines)
	if err != nil {
		if n > 0 {
			s.enc.done += bytes.LastIndexByte(lines[:n], '\n') + 1
			s.torn = lines[n-1] != '\n'
		}
		return err
	}
	s.enc.reset()
	return nil
}

func (s *writerSink) Close(context.Context) error {
	// A write that still waits gets an end with it.
	_ = s.f.SetWriteDeadline(time.Now())
	return s.f.Close()
}
