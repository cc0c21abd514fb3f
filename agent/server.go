package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

const (
	// maxSlow is how many connections may wait to send, or talk to the agent, at the
	// same time. The shim sends right after connecting, so it is one of them only where
	// the machine is so busy that it lost its processor in between.
	maxSlow = 256
	// slowTimeout is how long a connection may take to send its first message.
	slowTimeout = 2 * time.Second
	// maxWatched is how many running commands are watched for their end; beyond it
	// an end is recorded as unknown.
	maxWatched = 4096
	// backlog is how many shims can leave their records while the agent is stopped;
	// net.core.somaxconn bounds it.
	backlog = 4096
)

// server receives on the agent's socket.
//
// One thread accepts, reads, journals and answers, each with a plain blocking call:
// a docker command waits for that answer, and the way through the runtime's poller
// and a goroutine of its own took two to three times as long. Whatever may take
// longer, a sender that has not sent yet, a control message, the end of a command,
// goes on in a goroutine.
type server struct {
	a       *Agent
	path    string
	fd      int
	buf     [handover.MaxMessage + 1]byte // of the accepting thread; one byte more tells a message too long
	slow    chan struct{}
	conns   sync.WaitGroup
	watched atomic.Int64
}

// listen makes the socket. The agent holds the journal's lock by now, so a socket
// that is there is a dead agent's; it is replaced by a rename, and at no moment
// missing.
func listen(a *Agent) (*server, error) {
	s := &server{a: a, path: a.o.Config.Socket(), slow: make(chan struct{}, maxSlow)}
	if err := s.bind(); err != nil {
		return nil, fmt.Errorf("make the agent's socket %s: %w", s.path, err)
	}
	return s, nil
}

func (s *server) bind() (err error) {
	if s.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			unix.Close(s.fd)
		}
	}()
	temp := s.path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := unix.Bind(s.fd, &unix.SockaddrUnix{Name: temp}); err != nil {
		return err
	}
	// Every user of the runner calls docker; what a message may do is decided by the
	// credentials of its sender.
	if err := os.Chmod(temp, 0o666); err != nil {
		return err
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return err
	}
	return os.Rename(temp, s.path)
}

// run receives until ctx ends, then lets the goroutines finish. Watched commands do
// not hold it up: their ends are recorded as unknown.
func (s *server) run(ctx context.Context) {
	// accept(2) returns EINVAL after this, and what waits in the backlog is read first.
	stop := context.AfterFunc(ctx, func() { unix.Shutdown(s.fd, unix.SHUT_RD) })
	defer stop()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		fd, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			s.receive(ctx, fd)
		case err == unix.EINTR || err == unix.ECONNABORTED:
		case ctx.Err() != nil:
			s.conns.Wait()
			return
		default:
			// Out of descriptors or memory: the backlog keeps the records.
			s.a.intake.trouble("accept a connection", err)
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func (s *server) close() error {
	err := unix.Close(s.fd)
	// The file goes with the agent, so that the shim's connect fails at once. A next
	// agent cannot have put its own there yet: this one still holds the lock.
	return errors.Join(err, os.Remove(s.path))
}

// receive takes a new connection. A shim's record is there already, or a moment
// later.
func (s *server) receive(ctx context.Context, fd int) {
	p := peerOf(fd)
	n, _, err := unix.Recvfrom(fd, s.buf[:], unix.MSG_DONTWAIT)
	if err == nil {
		s.message(ctx, fd, s.buf[:n], p)
		return
	}
	if err != unix.EAGAIN {
		s.drop(fd, p)
		return
	}
	s.aside(fd, p, func() {
		pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(pfd, int(slowTimeout.Milliseconds()))
		if n != 1 || err != nil {
			s.drop(fd, p)
			return
		}
		buf := make([]byte, handover.MaxMessage+1)
		if n, _, err = unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err != nil {
			s.drop(fd, p)
			return
		}
		s.message(ctx, fd, buf[:n], p)
	})
}

// aside does something slow with a connection in a goroutine, where there is a place
// for it.
func (s *server) aside(fd int, p peer, do func()) {
	select {
	case s.slow <- struct{}{}:
		s.conns.Go(func() {
			defer func() { <-s.slow }()
			do()
		})
	default:
		s.drop(fd, p)
	}
}

func (s *server) drop(fd int, p peer) {
	unix.Close(fd)
	p.close()
}

// message takes the first message of a connection, and the connection with it.
func (s *server) message(ctx context.Context, fd int, msg []byte, p peer) {
	switch {
	case len(msg) == 0:
		s.drop(fd, p)
	case len(msg) > handover.MaxMessage:
		s.refuse("a message is too long", p)
		s.drop(fd, p)
	case bytes.HasPrefix(msg, []byte(record.Marker)):
		r := s.take(msg, fd, p)
		if r == nil {
			s.drop(fd, p)
			return
		}
		s.conns.Go(func() { s.watch(ctx, r, fd, p) })
	default:
		first := bytes.Clone(msg)
		s.aside(fd, p, func() { s.control(ctx, fd, first, p) })
	}
}

// take brings a shim's record into the journal, answers, and returns the record
// where its end is to be watched.
func (s *server) take(line []byte, fd int, peer peer) *record.Record {
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
	// The sender's buffer is empty, so this cannot wait; the sender may be gone.
	unix.SendmsgN(fd, []byte{ack}, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
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
func (s *server) control(ctx context.Context, fd int, first []byte, p peer) {
	defer p.close()
	unix.SetNonblock(fd, true)
	conn := os.NewFile(uintptr(fd), "control")
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })
	defer stop()
	buf := make([]byte, maxControl)
	for msg := first; ; {
		var q request
		var r reply
		if err := json.Unmarshal(msg, &q); err != nil {
			r.Error = "not a control message"
		} else {
			r = s.answer(ctx, q, p)
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

func peerOf(fd int) peer {
	p := peer{pidfd: -1}
	if cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
		p.cred, p.known = *cred, true
	}
	// EINVAL where the sender was reaped already (before Linux 6.16), ENOPROTOOPT
	// before 6.5. The kernel sets close-on-exec on it.
	if pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, soPeerPIDFD); err == nil {
		p.pidfd = pidfd
	}
	return p
}

func (p peer) close() {
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
	}
}
