package fluent

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/tallyman-ci/tallyman/sinks"
)

// A receiver acknowledges what was not sent, or answers with what is no acknowledgement.
// Each time the event counts as not delivered, within the time for one, and the
// connection is made anew.
func TestReceiversThatAnswerWrong(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer string // "" closes
		slowly bool   // a byte each 50 ms
	}{
		{"closes without an answer", "", false},
		{"acknowledges another event", "\x81\xa3ack\xa5other", false},
		{"acknowledges nothing by name", "\x81\xa3ack\xa0", false},
		{"answers an empty map", "\x80", false},
		{"answers with nil", "\xc0", false},
		{"speaks HTTP", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", false},
		{"announces an acknowledgement of 4 GiB", "\x81\xa3ack\xdb\xff\xff\xff\xff", false},
		{"announces a map of 4 billion members", "\xdf\xff\xff\xff\xff\xa3ack", false},
		{"answers byte by byte for ever", "\xdf\xff\xff\xff\xff" + strings.Repeat("\xa1a\xc0", 1000), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			connections := make(chan net.Conn, 10)
			go func() {
				defer close(connections)
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					connections <- c
					go func() {
						defer c.Close()
						if _, err := c.Read(make([]byte, 64<<10)); err != nil || tt.answer == "" {
							return
						}
						for rest := tt.answer; rest != ""; {
							n := len(rest)
							if tt.slowly {
								n = 1
								time.Sleep(50 * time.Millisecond)
							}
							if _, err := io.WriteString(c, rest[:n]); err != nil {
								return
							}
							rest = rest[n:]
						}
						_, _ = io.Copy(io.Discard, c) // until the sink hangs up
					}()
				}
			}()
			s := openSink(t, "fluent://"+l.Addr().String()+"?ack_timeout=300ms")
			for range 2 {
				begun := time.Now()
				err := s.Write(t.Context(), []sinks.Entry{{ID: "a", Line: line("a")}})
				if err == nil || !strings.Contains(err.Error(), "did not acknowledge") {
					t.Errorf("the sink says %v", err)
				}
				if took := time.Since(begun); took > 30*time.Second { // the library alone would try for two minutes
					t.Errorf("the sink gave up after %s", took)
				}
			}
			_ = s.Close(context.Background())
			if n := len(connections); n != 2 {
				t.Errorf("%d connections, want one for each attempt", n)
			}
		})
	}
}
