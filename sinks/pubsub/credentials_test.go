package pubsub

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/sinks"
)

// trusted is a certificate for this machine that the process trusts as it trusts the
// system's roots, which are read once: hence before any test.
var trusted tls.Certificate

func trustOne(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	trusted = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	file := filepath.Join(dir, "cert.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return err
	}
	return os.Setenv("SSL_CERT_FILE", file)
}

// A key that is not accepted, a permission that is missing, and a machine's token that
// gets none of Google's, with the real client's own credentials over TLS: told with who
// is meant and what to do, without the key or a token, and nothing is refused.
func TestAKeyThatIsNotAccepted(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	private := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	file, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "ci-test", "private_key_id": "0123456789abcdef", "private_key": private,
		"client_email": "runners@ci-test.iam.gserviceaccount.com", "client_id": "1", "universe_domain": "googleapis.com",
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &topic{addr: l.Addr().String()}
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&trusted)))
	pubsubpb.RegisterPublisherServer(server, f)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	defer func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	batch := load(0, 3)
	told := func(s sinks.Sink, wants ...string) {
		t.Helper()
		err := s.Write(within(t), batch)
		var refused *sinks.RefusedError
		if err == nil || errors.As(err, &refused) {
			t.Fatalf("got %v", err)
		}
		for _, want := range wants {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error does not say %q: %v", want, err)
			}
		}
		if strings.Contains(err.Error(), "PRIVATE") || strings.Contains(err.Error(), private[60:100]) || strings.Contains(err.Error(), "token-of-the-test") {
			t.Errorf("the error tells a secret: %v", err)
		}
		if again := s.Write(within(t), batch); again == nil || again.Error() != err.Error() {
			t.Errorf("it is told anew with each attempt: %v", again)
		}
	}
	s := openURL(t, "pubsub://ci-test/records?endpoint="+f.addr+"&credentials="+path)
	f.set(func(*pubsubpb.PublishRequest) error {
		return status.Error(codes.Unauthenticated, "Request had invalid authentication credentials.")
	})
	told(s, "does not accept the credentials", "Request had invalid authentication credentials.", "an expired or revoked key wants a new one")
	f.set(func(*pubsubpb.PublishRequest) error {
		return status.Error(codes.PermissionDenied, "User not authorized to perform this action.")
	})
	told(s, "grant roles/pubsub.publisher on projects/ci-test/topics/records to runners@ci-test.iam.gserviceaccount.com",
		"--member serviceAccount:runners@ci-test.iam.gserviceaccount.com --role roles/pubsub.publisher")
	f.set(nil)
	if err := s.Write(within(t), batch); err != nil {
		t.Fatal(err)
	}
	if ids := f.ids(); len(ids) != len(batch) {
		t.Errorf("%d messages arrived", len(ids))
	}

	// Workload identity federation: a token of the machine's is exchanged for one of Google's.
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"error":"invalid_grant","error_description":"ID Token issued at 0 is stale to sign-in."}`)
	}))
	defer tokens.Close()
	subject, federated := filepath.Join(t.TempDir(), "token"), filepath.Join(t.TempDir(), "federated.json")
	file, err = json.Marshal(map[string]any{
		"type": "external_account", "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/x",
		"subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "token_url": tokens.URL, "credential_source": map[string]string{"file": subject},
	})
	if err := errors.Join(err, os.WriteFile(subject, []byte("token-of-the-test"), 0o600), os.WriteFile(federated, file, 0o600)); err != nil {
		t.Fatal(err)
	}
	told(openURL(t, "pubsub://ci-test/records?endpoint="+f.addr+"&credentials="+federated), "stale to sign-in", "an expired or revoked key wants a new one")
}
