package faults

import (
	"errors"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// listen makes a SOCK_SEQPACKET socket that everybody may connect to.
func listen(t testing.TB, path string, kind, backlog int) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	must(t, os.Chmod(path, 0o666))
	if backlog > 0 {
		must(t, unix.Listen(fd, backlog))
	}
	return fd
}

// serve answers connections at path, one after the other, until stop or the test's end.
func serve(t testing.TB, path string, answer func(fd int)) (stop func()) {
	t.Helper()
	listener := listen(t, path, unix.SOCK_SEQPACKET, 4096)
	var done sync.WaitGroup
	done.Go(func() {
		for {
			fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return
			}
			answer(fd)
			unix.Close(fd)
		}
	})
	var once sync.Once
	stop = func() {
		once.Do(func() {
			unix.Shutdown(listener, unix.SHUT_RDWR)
			done.Wait()
			unix.Close(listener)
		})
	}
	t.Cleanup(stop)
	return stop
}

// receive reads one message.
func receive(fd int) string {
	b := make([]byte, 1<<17)
	n, err := unix.Read(fd, b)
	if err != nil {
		return err.Error()
	}
	return string(b[:n])
}
