package fluent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tallyman-ci/tallyman/internal/forwardtest"
	"github.com/tallyman-ci/tallyman/internal/sinktest"
	"github.com/tallyman-ci/tallyman/sinks"
)

// trusted is a certificate that the process trusts as it trusts the system's roots, which
// are read once: hence before any test.
var trusted struct{ certFile, keyFile string }

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "fluent")
	if err == nil {
		trusted.certFile, trusted.keyFile, err = selfSigned(dir)
	}
	if err == nil {
		err = os.Setenv("SSL_CERT_FILE", trusted.certFile)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

func openSink(t *testing.T, url string) sinks.Sink {
	t.Helper()
	s, err := sinks.Open(t.Context(), url, Scheme())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	return s
}

const whole = `{"id":"0192","ts":"2026-11-24T10:00:00.123456789Z","kind":"invocation.end","schema":1,"by":"sealed",` +
	`"ci":{"repository":"acme/shop","owner":"acme","run_number":9007199254740993,"runner":{"name":"r 1","labels":["a","b"]}},` +
	`"end":{"exit_code":0,"duration_ns":1500000000},"later":{"ratio":0.25,"flag":true,"none":null,"huge":123456789012345678901234567890}}`

func TestARecordArrivesWhole(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Start()
	s := openSink(t, r.URL("tag=ci.{owner}.{kind}.{runner}"))
	if err := s.Write(t.Context(), []sinks.Entry{{ID: "0192", Line: []byte(whole)}}); err != nil {
		t.Fatal(err)
	}
	got := r.Received()
	if len(got) != 1 {
		t.Fatalf("%d events", len(got))
	}
	if want := "ci.acme.invocation.end.r_1"; got[0].Tag != want {
		t.Errorf("tag %q, want %q", got[0].Tag, want)
	}
	if at := time.Unix(got[0].Time.Seconds, got[0].Time.Nanoseconds).UTC(); at.Format(time.RFC3339Nano) != "2026-11-24T10:00:00.123456789Z" {
		t.Errorf("time %s", at)
	}
	var have, want map[string]any
	if err := errors.Join(json.Unmarshal(got[0].Record, &have), json.Unmarshal([]byte(whole), &want)); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(have, want) {
		t.Errorf("got  %v\nwant %v", have, want)
	}
}

func TestWhatIsNoRecordIsRefused(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Start()
	s := openSink(t, r.URL(""))
	err := s.Write(t.Context(), []sinks.Entry{
		{ID: "a", Line: line("a")},
		{ID: "b", Line: []byte(`not json`)},
		{ID: "c", Line: []byte(`[1]`)},
		{ID: "d", Line: []byte(`{"id":"d","ts":"yesterday"}`)},
		{ID: "e", Line: []byte(`{"id":"e"} {}`)},
		{ID: "f", Line: line("f")},
	})
	var refused *sinks.RefusedError
	if !errors.As(err, &refused) || len(refused.Refused) != 4 {
		t.Fatalf("%v", err)
	}
	for i, want := range []int{1, 2, 3, 4} {
		if refused.Refused[i].Index != want {
			t.Errorf("refused %+v", refused.Refused)
		}
	}
	if got := ids(t, r); !reflect.DeepEqual(got, []string{"a", "f"}) {
		t.Errorf("delivered %v", got)
	}
}

// Batches of records without an id, which a job can make, are not taken for one batch
// that comes again.
func TestBatchesOfRecordsWithoutIDs(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Start()
	s := openSink(t, r.URL(""))
	for range 2 {
		if err := s.Write(t.Context(), []sinks.Entry{{Line: line("")}}); err != nil {
			t.Fatal(err)
		}
	}
	if got := r.Received(); len(got) != 2 {
		t.Errorf("%d events, want 2", len(got))
	}
}

// A job sends a member that is nested deeper than receivers decode. It must not stop
// the sink for everybody, and stays readable.
func TestDeeplyNestedMembersBecomeText(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Start()
	s := openSink(t, r.URL(""))
	deep := strings.Repeat(`{"a":[`, 500) + `1,"x"` + strings.Repeat(`]}`, 500)
	hostile := append(line("a")[:len(line("a"))-1], `,"later":`+deep+`}`...)
	if err := s.Write(t.Context(), []sinks.Entry{{ID: "a", Line: hostile}, {ID: "b", Line: line("b")}}); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, r); !reflect.DeepEqual(got, []string{"a", "b"}) {
		t.Fatalf("delivered %v", got)
	}
	var message map[string]any
	if err := json.Unmarshal(r.Received()[0].Record, &message); err != nil {
		t.Fatal(err)
	}
	depth, v := 1, message["later"]
	for text := ""; text == ""; depth++ {
		switch inner := v.(type) {
		case map[string]any:
			v = inner["a"]
		case []any:
			v = inner[0]
		case string:
			if text = inner; !strings.HasSuffix(deep, strings.TrimRight(text, "]}")+strings.Repeat(`]}`, 500)) || !json.Valid([]byte(text)) {
				t.Errorf("the rest is %q", text)
			}
		default:
			t.Fatalf("%T at depth %d", v, depth)
		}
	}
	if depth > 20 {
		t.Errorf("the message is nested %d deep; receivers in C take 32, the protocol's own levels included", depth)
	}
}

func TestUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "fluent") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := forwardtest.New(t, dir+"/fluent.sock")
	r.Start()
	s := openSink(t, r.URL(""))
	if err := s.Write(t.Context(), []sinks.Entry{{ID: "a", Line: line("a")}}); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, r); !reflect.DeepEqual(got, []string{"a"}) {
		t.Errorf("delivered %v", got)
	}
}

func TestTLS(t *testing.T) {
	known := forwardtest.New(t, "0")
	known.CertFile, known.KeyFile = trusted.certFile, trusted.keyFile
	known.Start()
	if err := openSink(t, known.URL("tls=true")).Write(t.Context(), []sinks.Entry{{ID: "a", Line: line("a")}}); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, known); !reflect.DeepEqual(got, []string{"a"}) {
		t.Errorf("delivered %v", got)
	}

	batch := []sinks.Entry{{ID: "a", Line: line("a")}}
	r := forwardtest.New(t, "0")
	var err error
	if r.CertFile, r.KeyFile, err = selfSigned(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	r.Start()
	// Nobody signed the one, the other is for 127.0.0.1.
	for url, why := range map[string]string{
		r.URL("tls=true"): "unknown authority",
		strings.Replace(known.URL("tls=true"), "127.0.0.1", "localhost", 1): "localhost",
	} {
		err := openSink(t, url).Write(t.Context(), batch)
		if err == nil || !strings.Contains(err.Error(), "is not accepted") || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "SSL_CERT_FILE") {
			t.Errorf("%s: %v", url, err)
		}
	}
	if err := openSink(t, r.URL("tls=true&tls_skip_verify=true")).Write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, r); !reflect.DeepEqual(got, []string{"a"}) {
		t.Errorf("delivered %v", got)
	}
}

// selfSigned makes a certificate for 127.0.0.1 in dir.
func selfSigned(dir string) (certFile, keyFile string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return "", "", err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", err
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			return "", "", err
		}
	}
	return certFile, keyFile, nil
}

// A receiver that accepts and never answers must not hold Write over its deadline.
func TestAStalledReceiver(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Start()
	s := openSink(t, r.URL(""))
	if err := s.Write(t.Context(), []sinks.Entry{{ID: "a", Line: line("a")}}); err != nil {
		t.Fatal(err)
	}
	r.Signal(syscall.SIGSTOP)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	batch := []sinks.Entry{{ID: "b", Line: line("b")}, {ID: "c", Line: line("c")}}
	begin := time.Now()
	err := s.Write(ctx, batch)
	if err == nil || !strings.Contains(err.Error(), "did not acknowledge") && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if d := time.Since(begin); d > 4*time.Second { // ack_timeout is 5 s
		t.Errorf("Write held its caller for %s, %s after its deadline", d, d-200*time.Millisecond)
	}
	r.Signal(syscall.SIGCONT)
	if err := s.Write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, id := range ids(t, r) {
		seen[id]++
	}
	if seen["a"] != 1 || seen["b"] < 1 || seen["c"] != 1 || len(seen) != 3 {
		t.Errorf("delivered %v", seen)
	}
}

// A slow receiver is waited for, within ack_timeout for each event; one that is slower
// is told, with the setting.
func TestASlowReceiver(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Delay = 100 * time.Millisecond
	r.Start()
	var batch []sinks.Entry
	want := []string{"a", "b", "c", "d", "e"}
	for _, id := range want {
		batch = append(batch, sinks.Entry{ID: id, Line: line(id)})
	}
	if err := openSink(t, r.URL("ack_timeout=1m")).Write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, r); !reflect.DeepEqual(got, want) {
		t.Errorf("delivered %v", got)
	}
	err := openSink(t, r.URL("ack_timeout=10ms")).Write(t.Context(), batch[:1])
	if err == nil || !strings.Contains(err.Error(), "did not acknowledge an event within 10ms") {
		t.Errorf("%v", err)
	}
}

func TestAMissingReceiverIsToldClearly(t *testing.T) {
	r := forwardtest.New(t, "0")
	r.Start()
	r.Kill()
	err := openSink(t, r.URL("")).Write(t.Context(), []sinks.Entry{{ID: "a", Line: line("a")}})
	if err == nil || !strings.Contains(err.Error(), "no Forward receiver at 127.0.0.1:"+r.Listen) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("%v", err)
	}
}

// The receiver is killed in the middle, three times, while the pump goes on: each
// record arrives at least once and unchanged, and none is invented.
func TestNothingIsLostWhenTheReceiverIsKilled(t *testing.T) {
	n := sinktest.Records(t, 2000)
	r := forwardtest.New(t, "0")
	r.Start()
	run := sinktest.Run(t, r.URL("name=fluent"), n, r, Scheme())
	o := sinktest.NewOracle(n, func(i int) []byte { return canonical(t, sinktest.Line(i)) })
	for _, e := range r.Received() {
		o.Saw(e.ID(), sinktest.Sum(canonical(t, e.Record)))
	}
	sinktest.Check(t, "fluent (tcp, ack)", run, o)
}

// canonical is JSON in one form, whoever wrote it.
func canonical(t *testing.T, b []byte) []byte {
	t.Helper()
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBadURLs(t *testing.T) {
	for _, row := range []struct{ url, want string }{
		{"fluent:", "want a host"},
		{"fluent:///", "want a host"},
		{"fluent://host:0", "port"},
		{"fluent://host:99999", "port"},
		{"fluent://host/tag", "tag="},
		{"fluent://user:hunter2@host", "not supported"},
		{"fluent:/user:hunter2@host", "not supported"},
		{"fluent:///run/f.sock?tls=true", "needs none"},
		{"fluent://host?tag=a{b}", "known: {host}"},
		{"fluent://host?tag=a{kind", "unknown place"},
		{"fluent://host?tag=a*", "letters"},
		{"fluent://host?tag=", "empty"},
		{"fluent://host?ack_timeout=0s", "duration"},
		{"fluent://host?tags=a", `did you mean "tag"`},
	} {
		_, err := sinks.Open(t.Context(), row.url, Scheme())
		if err == nil || !strings.Contains(err.Error(), row.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v, want %q", row.url, err, row.want)
		}
	}
	for _, url := range []string{"fluent://host", "fluent://[::1]:24225", "fluent:///var/run/fluent.sock", "fluent://host?tls=true"} {
		if _, err := sinks.Open(t.Context(), url, Scheme()); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// A job chose what the tag is made of: it must stay one tag of plain letters.
func FuzzTag(f *testing.F) {
	f.Add("../../etc", "a.b*", "x{kind}")
	f.Add("\x00\n", strings.Repeat("é", 200), "")
	f.Fuzz(func(t *testing.T, repository, workflow, kind string) {
		template, err := parseTag("ci.{repository}.{workflow}.{kind}.end")
		if err != nil {
			t.Fatal(err)
		}
		got := template.of(map[string]any{"kind": kind, "ci": map[string]any{"repository": repository, "workflow": workflow}})
		parts := strings.Split(got, ".")
		if len(got) > 3*maxTagPart+20 || parts[0] != "ci" || parts[len(parts)-1] != "end" || clean(got, len(got), ".") != got || strings.Count(parts[1]+parts[2], ".") != 0 {
			t.Errorf("%q", got)
		}
	})
}

func line(id string) []byte {
	return fmt.Appendf(nil, `{"id":%q,"ts":"2026-11-24T10:00:00.000000001Z","kind":"invocation","schema":1,"by":"sealed","ci":{"repository":"acme/shop"}}`, id)
}

func ids(t *testing.T, r *forwardtest.Receiver) []string {
	t.Helper()
	var all []string
	for _, e := range r.Received() {
		all = append(all, e.ID())
	}
	return all
}
