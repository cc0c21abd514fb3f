package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tallyman-ci/tallyman/hook"
	"github.com/tallyman-ci/tallyman/internal/statefile"
	"github.com/tallyman-ci/tallyman/journal/handover"
	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

const (
	// maxSlow is how many connections may wait to send. The shim sends right after
	// connecting, so it is one of them only where the machine is so busy that it lost
	// its processor in between.
	maxSlow = 1024
	// maxTalkers is how many control connections there may be of the agent's own user
	// and root, and as many of all others together.
	maxTalkers = 64
	// slowTimeout is how long a connection may take to send its first message, and
	// talkTimeout how long a control connection may be silent.
	slowTimeout = 5 * time.Second
	talkTimeout = 10 * time.Second
	// maxWatched is how many running commands are watched for their end; beyond it
	// an end is recorded as unknown.
	maxWatched = 2048
	// backlog is how many shims can leave their records while the agent is stopped;
	// net.core.somaxconn bounds it.
	backlog = 4096
	// ownFiles are the descriptors that the agent wants for itself: journal, spool,
	// sinks, the daemon.
	ownFiles = 160
)

// server receives on the agent's socket.
//
// One thread accepts, reads, journals and answers, each with a plain call: a docker
// command waits for that answer, and the way through the runtime's poller and a
// goroutine of its own took two to three times as long. Whatever may take longer, a
// sender that has not sent yet, a control message, the end of a command, goes on in a
// goroutine.
type server struct {
	a     *Agent
	path  string
	fd    int
	buf   [handover.MaxMessage + 1]byte // of the accepting thread; one byte more tells a message too long
	conns sync.WaitGroup
	ctx   context.Context // of run

	slow    guests
	own     guests // control connections of root and of the agent's user
	foreign guests // and of all others
	watches watches
	// drained is when the accepting thread last saw the backlog empty: no connection in
	// it is older.
	drained time.Time
	refusal refusalLog
	flush   flushes
	buffers sync.Pool // for messages that the accepting thread does not read

	statusMu   sync.Mutex
	lastStatus *Status
	statusAt   time.Time
}

// listen makes the socket. The agent holds the journal's lock by now, so a socket
// that is there is a dead agent's; it is replaced by a rename, and at no moment
// missing.
func listen(a *Agent) (*server, error) {
	s := &server{a: a, path: a.o.Config.Socket(), slow: guests{max: maxSlow}, own: guests{max: maxTalkers}, foreign: guests{max: maxTalkers},
		watches: newWatches(maxWatched)}
	s.fitDescriptors()
	s.flush.do = a.Flush
	s.buffers.New = func() any { return new([handover.MaxMessage + 1]byte) }
	if err := s.bind(); err != nil {
		return nil, fmt.Errorf("make the agent's socket %s: %w", s.path, err)
	}
	return s, nil
}

// fitDescriptors makes the bounds fit the limit of open files (the runtime has raised
// it to the hard limit): who holds connections open must not keep accept from working.
func (s *server) fitDescriptors() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil || limit.Cur > 1<<20 {
		return
	}
	// A waiting connection holds two descriptors, its own and its sender's pidfd.
	free := max(int(limit.Cur)-ownFiles, 16)
	s.slow.max = min(s.slow.max, max(free/8, 1))
	s.own.max = min(s.own.max, max(free/16, 1))
	s.foreign.max = s.own.max
	free -= 2 * (s.slow.max + s.own.max + s.foreign.max)
	if s.watches.max = min(s.watches.max, max(free-2, 1)); s.watches.max < maxWatched {
		s.a.log.Info("the limit of open files bounds how many commands are watched at once", "files", limit.Cur, "commands", s.watches.max)
	}
}

func (s *server) bind() (err error) {
	if s.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			unix.Close(s.fd)
		}
	}()
	temp := s.path + ".new"
	if err := statefile.Vacate(temp); err != nil {
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
	return statefile.Rename(temp, s.path)
}

// run receives until ctx ends, then lets the goroutines finish. Watched commands do
// not hold it up.
func (s *server) run(ctx context.Context) {
	s.ctx = ctx
	// This wakes poll(2) below; what waits in the backlog is read first.
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
		case err == unix.EAGAIN:
			s.drained = time.Now()
			unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, -1)
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
	p.since = s.drained
	n, _, err := unix.Recvfrom(fd, s.buf[:], unix.MSG_DONTWAIT)
	if err == nil {
		s.message(ctx, fd, s.buf[:n], p)
		return
	}
	if err != unix.EAGAIN {
		s.drop(fd, p)
		return
	}
	s.wait(ctx, fd, p)
}

// wait gives a sender that has not sent yet a moment to do so.
func (s *server) wait(ctx context.Context, fd int, p peer) {
	// The runtime's poller waits, not a thread: a cgroup bounds those too.
	unix.SetNonblock(fd, true)
	conn := os.NewFile(uintptr(fd), "sender")
	seat := s.slow.enter(conn, p.cred.Pid)
	s.conns.Go(func() {
		defer s.slow.leave(seat)
		defer conn.Close()
		conn.SetReadDeadline(time.Now().Add(slowTimeout))
		stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })
		defer stop()
		msg, own := s.firstMessage(conn)
		if own < 0 {
			p.close()
			return
		}
		s.message(ctx, own, msg, p)
	})
}

// firstMessage waits for a message on conn, and returns it with a descriptor of the
// connection that is the caller's to close; -1 where none came.
func (s *server) firstMessage(conn *os.File) (msg []byte, own int) {
	own = -1
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, -1
	}
	raw.Read(func(fd uintptr) bool {
		buf := s.buffers.Get().(*[handover.MaxMessage + 1]byte)
		defer s.buffers.Put(buf)
		n, _, err := unix.Recvfrom(int(fd), buf[:], unix.MSG_DONTWAIT)
		if err == unix.EAGAIN || err == unix.EINTR {
			return false
		}
		if err != nil {
			return true
		}
		msg = bytes.Clone(buf[:n])
		if fd, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3); err == nil {
			own = fd
		}
		return true
	})
	return msg, own
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
		r, share := s.take(msg, fd, &p)
		if r == nil {
			s.drop(fd, p)
			return
		}
		s.watch(ctx, r, fd, p, share)
	default:
		s.talk(ctx, fd, bytes.Clone(msg), p)
	}
}

// take brings a shim's record into the journal, answers, and returns what its end needs
// where that is to be watched.
func (s *server) take(line []byte, fd int, peer *peer) (r *record.Record, share string) {
	r = new(record.Record)
	if err := s.a.decodeInvocation(line, r); err != nil {
		s.refuse(err.Error(), *peer)
		return nil, ""
	}
	r.Invocation.Path = "socket"
	now := time.Now()
	w := witness{uid: -1, latest: now}
	if !peer.since.IsZero() {
		w.earliest = now.Add(-now.Sub(peer.since)) // by the clock that nobody sets, on that of now
	}
	if peer.known {
		// What the kernel says of the sender, the sender need not be asked.
		r.Invocation.UID = int64(peer.cred.Uid)
		w.uid = int(peer.cred.Uid)
		if w.pid = int(peer.cred.Pid); w.pid != 0 {
			r.Invocation.PID = int64(w.pid)
			if r.Invocation.Nested {
				r.Invocation.ParentID = s.watches.parentOf(w.pid)
			}
		}
	}
	share = s.a.stamp(r, w)
	arrivals := []arrival{{r: r, share: share, limiter: s.a.intake.calls, size: len(line), from: sender{pid: int32(w.pid)}}}
	if s.a.intake.take(arrivals) != nil {
		return nil, "" // no answer: the shim's append file takes it
	}
	got := &arrivals[0]
	if got.verdict == refused {
		s.refuse("no line that a journal can hold", *peer)
		return nil, ""
	}
	if got.verdict == journalled {
		s.a.intake.count(func(c *Counts) { c.Socket++ })
	}
	ack := byte(handover.AckClose)
	if peer.pidfd < 0 && got.verdict != suppressed {
		// Linux 5.3 to 6.4: by its number, while the sender waits for the answer. Before
		// that, or in another pid namespace, the socket must stay open.
		if pidfd, ok := find(r); ok && w.pid != 0 {
			peer.pidfd = pidfd
		} else {
			ack = handover.AckKeep
		}
	}
	// The sender's buffer is empty, so this cannot wait; the sender may be gone, or it
	// waited no longer and has closed the socket, which then tells nothing of the command.
	_, err := unix.SendmsgN(fd, []byte{ack}, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	peer.left = err != nil
	switch {
	case got.verdict == suppressed:
		return nil, "" // its end is suppressed with it
	case got.verdict == duplicate && !(got.first.byFile && got.first.pid != 0 && got.first.pid == int32(w.pid)):
		// Only the second copy of a command's own record tells more than the first. Who
		// sends another's id again must not end that one's command.
		return nil, ""
	}
	return slim(r, len(line)), share
}

// decodeInvocation reads a line that a shim wrote. Whoever may connect or write a
// spool file may call docker, and no more: only invocations are taken.
func (a *Agent) decodeInvocation(line []byte, r *record.Record) error {
	if err := recordjson.Unmarshal(line, r); err != nil {
		return err
	}
	id, ok := record.InvocationID(r.ID)
	if r.Kind != record.KindInvocation || r.Invocation == nil || !ok {
		return errors.New("not the record of an invocation")
	}
	if r.Event != nil || r.End != nil || r.Loss != nil || r.Job != nil || r.Claim != nil {
		return errors.New("more than an invocation in one record")
	}
	unknown := [][]byte{r.Unknown, r.Invocation.Unknown}
	if r.CI != nil {
		unknown = append(unknown, r.CI.Unknown)
		if r.CI.Runner != nil {
			unknown = append(unknown, r.CI.Runner.Unknown)
		}
	}
	if r.Host != nil {
		unknown = append(unknown, r.Host.Unknown)
	}
	if slices.ContainsFunc(unknown, deep) {
		return errors.New("nested too deeply")
	}
	r.ID = id
	// What the agent alone can say is not the caller's to say.
	r.By, r.OutsideJob, r.Invocation.ParentID = record.ByNone, false, ""
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

// deep says whether members nest deeper than anything that a shim of any version
// writes. Other readers of the account count on their stacks.
func deep(members []byte) bool {
	const most = 8
	depth, inString := 0, false
	for i := 0; i < len(members); i++ {
		switch c := members[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > most {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// refusalLog keeps a job that sends nonsense from filling the log.
type refusalLog struct {
	mu     sync.Mutex
	begun  time.Time
	n      int
	silent int64
}

// allow says whether to log another one, and how many were passed over in silence.
func (l *refusalLog) allow(now time.Time) (silent int64, ok bool) {
	const perMinute = 10
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.begun) >= time.Minute || now.Before(l.begun) {
		silent, l.begun, l.n, l.silent = l.silent, now, 0, 0
	}
	if l.n++; l.n > perMinute {
		l.silent++
		return 0, false
	}
	return silent, true
}

func (s *server) refuse(why string, peer peer) {
	s.a.intake.count(func(c *Counts) { c.Refused++ })
	if silent, ok := s.refusal.allow(s.a.now()); ok {
		s.a.log.Warn("refused a message", "why", why, "uid", peer.cred.Uid, "pid", peer.cred.Pid, "not_logged_before", silent)
	}
}

// talk answers control messages until the other side closes.
func (s *server) talk(ctx context.Context, fd int, first []byte, p peer) {
	unix.SetNonblock(fd, true)
	conn := os.NewFile(uintptr(fd), "control")
	table := &s.foreign
	if p.trusted() {
		table = &s.own
	}
	seat := table.enter(conn, p.cred.Pid)
	s.conns.Go(func() {
		defer table.leave(seat)
		defer p.close()
		defer conn.Close()
		s.control(ctx, conn, first, p)
	})
}

func (s *server) control(ctx context.Context, conn *os.File, first []byte, p peer) {
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })
	defer stop()
	buf := make([]byte, maxControl)
	if !p.trusted() {
		buf = buf[:4<<10] // nothing that they may say is longer
	}
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
		conn.SetReadDeadline(time.Now().Add(talkTimeout))
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
		return reply{Status: s.status(peer)}
	case "flush", "job-start", "job-end":
		// Whose job this is, is for root and for the user the agent runs as to say; and a
		// flush makes the disk and the sinks work.
		if !peer.trusted() {
			return reply{Error: "only root and the agent's own user may say that"}
		}
		switch {
		case q.Control == "flush":
			err = s.flush.join(ctx, s)
		case q.Control == "job-start" && q.Context != nil:
			s.a.jobStart(*q.Context)
		default:
			err = s.a.endJob(q.Key, q.Outcome)
		}
	default:
		err = fmt.Errorf("unknown control message %q", clip(q.Control))
	}
	if err != nil {
		return reply{Error: err.Error()}
	}
	return reply{}
}

// status is a new one for who may have the agent do anything, and for others one of the
// last moment: asking must cost the agent nothing.
func (s *server) status(peer peer) *Status {
	s.statusMu.Lock()
	defer s.statusMu.Unlock()
	if peer.trusted() || s.lastStatus == nil || time.Since(s.statusAt) > 250*time.Millisecond {
		st := s.a.Status()
		s.lastStatus, s.statusAt = &st, time.Now()
	}
	return s.lastStatus
}

// clip cuts what a stranger sent to what an answer or a log line may hold of it.
func clip(s string) string { return record.Clean(s, 64) }

// flushes lets those who ask for a flush at the same time share one: each gets one that
// began after it had asked.
type flushes struct {
	do func(context.Context) error

	mu      sync.Mutex
	running bool
	next    *flushing // asked for while one is running
}

type flushing struct {
	until time.Time // the latest deadline of those who wait
	done  chan struct{}
	err   error
}

func (f *flushes) join(ctx context.Context, s *server) error {
	until, ok := ctx.Deadline()
	if !ok {
		until = time.Now().Add(time.Minute)
	}
	f.mu.Lock()
	mine := f.next
	if mine == nil {
		mine = &flushing{done: make(chan struct{})}
		f.next = mine
	}
	if until.After(mine.until) {
		mine.until = until
	}
	if !f.running {
		f.running = true
		s.conns.Go(func() { f.run(s.ctx) }) // the caller is one of conns itself
	}
	f.mu.Unlock()
	select {
	case <-mine.done:
		return mine.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *flushes) run(serving context.Context) {
	for {
		f.mu.Lock()
		now := f.next
		f.next = nil
		f.running = now != nil
		f.mu.Unlock()
		if now == nil {
			return
		}
		// Its end leaves those who wait the time to hear how it went.
		left := time.Until(now.until)
		ctx, cancel := context.WithTimeout(serving, left-min(left/10, 300*time.Millisecond))
		now.err = f.do(ctx)
		cancel()
		close(now.done)
	}
}

// endJob records the end of the context with this key, which the hook has closed. Of
// one that is open in the store only the store's word counts.
func (a *Agent) endJob(key, outcome string) error {
	if outcome == "" {
		outcome = hook.Completed
	}
	if !a.contexts.stored(key) {
		a.contexts.end(key, outcome, a.now())
	}
	for _, c := range a.contexts.all() {
		if c.Key != key {
			continue
		}
		if c.Open() {
			return fmt.Errorf("the context %q is not closed", key)
		}
		a.jobEnd(c, outcome)
		return nil
	}
	return fmt.Errorf("no context %q", clip(key))
}

// peer is the other end of a connection, as the kernel knows it.
type peer struct {
	cred  unix.Ucred
	known bool
	pidfd int // -1 where the kernel gives none
	// since is a time at which it was not connected yet; zero where none is known.
	since time.Time
	// left says that it did not wait for its answer.
	left bool
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

// trusted says whether the peer may tell the agent what to do: root and the agent's own
// user, whom nothing keeps from doing worse.
func (p peer) trusted() bool {
	return p.known && (p.cred.Uid == 0 || int(p.cred.Uid) == os.Geteuid())
}

func (p peer) close() {
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
	}
}
