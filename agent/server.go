package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

const (
	// maxReading is how many connections are read at the same time. More wait in the
	// kernel's backlog, where the shim can leave its record and go on.
	maxReading = 64
	// readTimeout is how long a connection may hold one of these places without
	// sending. The shim sends right after connecting.
	readTimeout = 250 * time.Millisecond
	// maxWatched is how many running commands are watched for their end; beyond it
	// an end is recorded as unknown.
	maxWatched = 4096
)

// server receives on the agent's socket.
type server struct {
	a       *Agent
	path    string
	ln      *net.UnixListener
	reading chan struct{}
	conns   sync.WaitGroup
	watched atomic.Int64
}

// listen makes the socket. The agent holds the journal's lock by now, so a socket
// that is there is a dead agent's; it is replaced by a rename, and at no moment
// missing.
func listen(a *Agent) (*server, error) {
	path := a.o.Config.Socket()
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make the agent's socket: %w", err)
	}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: temp, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("make the agent's socket: %w", err)
	}
	ln.SetUnlinkOnClose(false)
	// Every user of the runner calls docker; what a message may do is decided by the
	// credentials of its sender.
	err = os.Chmod(temp, 0o666)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		ln.Close()
		return nil, fmt.Errorf("make the agent's socket: %w", err)
	}
	return &server{a: a, path: path, ln: ln, reading: make(chan struct{}, maxReading)}, nil
}

// run accepts until ctx ends, then lets those who are being read finish. Watched
// commands do not hold it up: their ends are recorded as unknown.
func (s *server) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { s.ln.SetDeadline(time.Now()) })
	defer stop()
	for ctx.Err() == nil {
		s.reading <- struct{}{}
		conn, err := s.ln.AcceptUnix()
		if err != nil {
			<-s.reading
			if ctx.Err() == nil {
				// Out of descriptors or memory: the backlog keeps the records.
				s.a.intake.trouble("accept a connection", err)
				time.Sleep(10 * time.Millisecond)
			}
			continue
		}
		s.conns.Go(func() { s.serve(ctx, conn) })
	}
	s.conns.Wait()
}

func (s *server) close() error {
	err := s.ln.Close()
	// The file goes with the agent, so that the shim's connect fails at once; a next
	// agent may have put its own there already only after this one's lock is gone.
	return errors.Join(err, os.Remove(s.path))
}

var buffers = sync.Pool{New: func() any { return new([handover.MaxMessage]byte) }}

// serve takes one connection. It gives its place among maxReading back before it
// waits for anything but the sender's message.
func (s *server) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	var once sync.Once
	release := func() { once.Do(func() { <-s.reading }) }
	defer release()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })
	defer stop()

	peer := peerOf(conn)
	defer peer.close()
	buf := buffers.Get().(*[handover.MaxMessage]byte)
	defer buffers.Put(buf)
	conn.SetReadDeadline(time.Now().Add(readTimeout))
	n, _, flags, _, err := conn.ReadMsgUnix(buf[:], nil)
	switch {
	case err != nil || n == 0:
		return
	case flags&unix.MSG_TRUNC != 0:
		s.refuse("a message is too long", peer)
	case bytes.HasPrefix(buf[:n], []byte(record.Marker)):
		r := s.take(buf[:n], conn, peer)
		release()
		if r != nil {
			s.watch(ctx, r, conn, peer)
		}
	default:
		release()
		s.control(ctx, conn, buf[:n], peer)
	}
}

// take brings a shim's record into the journal, answers, and returns the record
// where its end is to be watched.
func (s *server) take(line []byte, conn *net.UnixConn, peer peer) *record.Record {
	r := new(record.Record)
	if err := s.a.decodeInvocation(line, r); err != nil {
		s.refuse(err.Error(), peer)
		return nil
	}
	r.Invocation.Path = "socket"
	if peer.known {
		// What the kernel says of the sender, the sender need not be asked.
		r.Invocation.UID = int64(peer.cred.Uid)
		if peer.cred.Pid != 0 {
			r.Invocation.PID = int64(peer.cred.Pid)
		}
	}
	s.a.stamp(r)
	if s.a.intake.write([]*record.Record{r}) != nil {
		return nil // no answer: the shim's append file takes it
	}
	s.a.intake.count(func(c *Counts) { c.Socket++ })
	ack := byte(handover.AckClose)
	if peer.pidfd < 0 {
		ack = handover.AckKeep
	}
	conn.SetWriteDeadline(time.Now().Add(readTimeout))
	conn.Write([]byte{ack})
	return r
}

// decodeInvocation reads a line that a shim wrote. Whoever may connect or write a
// spool file may call docker, and no more: only invocations are taken.
func (a *Agent) decodeInvocation(line []byte, r *record.Record) error {
	if err := recordjson.Unmarshal(line, r); err != nil {
		return err
	}
	if r.Kind != record.KindInvocation || r.Invocation == nil || len(r.ID) != 36 {
		return errors.New("not the record of an invocation")
	}
	if r.Event != nil || r.End != nil || r.Loss != nil || r.Job != nil || r.Claim != nil {
		return errors.New("more than an invocation in one record")
	}
	if r.By != record.ByEnvironment {
		r.By = record.ByNone
	}
	if r.Host == nil {
		r.Host = &record.Host{}
	}
	for _, f := range []struct {
		field *string
		own   string
	}{{&r.Host.Name, a.o.Host.Name}, {&r.Host.Pod, a.o.Host.Pod}, {&r.Host.Namespace, a.o.Host.Namespace}, {&r.Host.Node, a.o.Host.Node}, {&r.Host.BootID, a.o.Host.BootID}} {
		if f.own != "" {
			*f.field = f.own
		}
	}
	return nil
}

func (s *server) refuse(why string, peer peer) {
	s.a.intake.count(func(c *Counts) { c.Refused++ })
	s.a.log.Warn("refused a message", "why", why, "uid", peer.cred.Uid, "pid", peer.cred.Pid)
}

// control answers control messages until the other side closes.
func (s *server) control(ctx context.Context, conn *net.UnixConn, first []byte, peer peer) {
	buf := make([]byte, maxControl)
	for msg := first; ; {
		var q request
		var r reply
		if err := json.Unmarshal(msg, &q); err != nil {
			r.Error = "not a control message"
		} else {
			r = s.answer(ctx, q, peer)
		}
		b, err := json.Marshal(r)
		if err != nil {
			b = []byte(`{"error":"internal error"}`)
		}
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := conn.Write(b); err != nil || ctx.Err() != nil {
			return
		}
		conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := conn.Read(buf)
		if err != nil || n == 0 {
			return
		}
		msg = buf[:n]
	}
}

func (s *server) answer(ctx context.Context, q request, peer peer) reply {
	ctx, cancel := context.WithTimeout(ctx, min(time.Duration(q.TimeoutMS)*time.Millisecond, time.Minute))
	defer cancel()
	var err error
	switch q.Control {
	case "status":
		st := s.a.Status()
		return reply{Status: &st}
	case "flush":
		err = s.a.Flush(ctx)
	case "job-start", "job-end":
		// Whose job this is, is for root and for the user the agent runs as to say.
		if !peer.known || peer.cred.Uid != 0 && int(peer.cred.Uid) != os.Geteuid() {
			return reply{Error: "only root and the agent's own user may say that"}
		}
		if q.Control == "job-start" && q.Context != nil {
			s.a.jobStart(*q.Context)
		} else {
			err = s.a.endJob(q.Key, q.Outcome)
		}
	default:
		err = fmt.Errorf("unknown control message %q", q.Control)
	}
	if err != nil {
		return reply{Error: err.Error()}
	}
	return reply{}
}

// endJob records the end of the context with this key, which the hook has closed.
func (a *Agent) endJob(key, outcome string) error {
	for _, c := range a.contexts.all() {
		if c.Key == key {
			if outcome == "" {
				outcome = hook.Completed
			}
			a.jobEnd(c, outcome)
			return nil
		}
	}
	return fmt.Errorf("no context %q", key)
}

// peer is the other end of a connection, as the kernel knows it.
type peer struct {
	cred  unix.Ucred
	known bool
	pidfd int // -1 where the kernel gives none
}

// soPeerPIDFD is SO_PEERPIDFD (Linux 6.5), which golang.org/x/sys does not name on
// every architecture.
const soPeerPIDFD = 77

func peerOf(conn *net.UnixConn) peer {
	p := peer{pidfd: -1}
	raw, err := conn.SyscallConn()
	if err != nil {
		return p
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			p.cred, p.known = *cred, true
		}
		// EINVAL where the sender was reaped already (before Linux 6.16), ENOPROTOOPT
		// before 6.5.
		if pidfd, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, soPeerPIDFD); err == nil {
			p.pidfd = pidfd
			syscall.CloseOnExec(pidfd)
		}
	})
	return p
}

func (p peer) close() {
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
	}
}
