package gcp

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/sinks"
)

// slow is the time between attempts where only a person can help.
const slow = 30 * time.Second

// Advice is what a person can do about a server's refusal.
type Advice struct {
	Service string // Cloud Pub/Sub
	API     string // pubsub.googleapis.com
	Project string
	// Grant is the command that gives the permission, with %s for the member.
	Grant string
	// Role and On say the same in words.
	Role, On string
	// Create says how to make what is not found.
	Create string
	// Principal is who asks, "" where unknown.
	Principal string
}

// Explain turns the error of a call into one for Sink.Write: transient in each case,
// so that no record is lost to a missing permission, and with the server's wish for
// a pause. Its text stays the same as long as the reason does.
func (a Advice) Explain(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	var told error
	wait := time.Duration(0)
	switch st.Code() {
	case codes.Unauthenticated:
		// No fixed pause: so ends also a call of which the metadata server did not give
		// the token in time, and that passes.
		told = fmt.Errorf("%s does not accept the credentials, or there are none: %s (%s)", a.Service, st.Message(),
			"an expired or revoked key wants a new one; a wrong clock makes each token invalid")
	case codes.PermissionDenied:
		wait, told = slow, a.denied(st)
	case codes.NotFound:
		wait, told = slow, fmt.Errorf("%s: not found: %s (%s)", a.Service, st.Message(), a.Create)
	case codes.FailedPrecondition:
		wait, told = slow, fmt.Errorf("%s: %s", a.Service, st.Message())
	case codes.InvalidArgument:
		wait, told = slow, fmt.Errorf("%s refuses every record: %s", a.Service, st.Message())
	case codes.DeadlineExceeded, codes.Canceled:
		told = fmt.Errorf("%s: no answer in time: %s", a.Service, st.Message())
	default:
		told = fmt.Errorf("%s: %s: %s", a.Service, st.Code(), st.Message())
	}
	told = &withCause{told, err}
	if asked := retryInfo(st); asked > 0 {
		wait = asked
	}
	if wait > 0 {
		return &sinks.RetryAfterError{After: wait, Err: told}
	}
	return told
}

func (a Advice) denied(st *status.Status) error {
	what := fmt.Sprintf("%s denies permission: %s", a.Service, st.Message())
	switch reason(st) {
	case "SERVICE_DISABLED":
		return fmt.Errorf("%s (switch the API on: gcloud services enable %s --project %s)", what, a.API, a.Project)
	case "BILLING_DISABLED":
		return fmt.Errorf("%s (link a billing account to project %s)", what, a.Project)
	case "ACCESS_TOKEN_SCOPE_INSUFFICIENT":
		return fmt.Errorf("%s (the virtual machine's access scopes leave this API out: stop it, and set the scope cloud-platform)", what)
	}
	who, member := a.Principal, "serviceAccount:"+a.Principal
	if who == "" {
		who, member = "the account of these credentials", "MEMBER"
	}
	return fmt.Errorf("%s (grant %s on %s to %s: %s)", what, a.Role, a.On, who, fmt.Sprintf(a.Grant, member))
}

// withCause says the one and unwraps to the other.
type withCause struct{ told, cause error }

func (e *withCause) Error() string { return e.told.Error() }
func (e *withCause) Unwrap() error { return e.cause }

func retryInfo(st *status.Status) time.Duration {
	for _, d := range st.Details() {
		if i, ok := d.(*errdetails.RetryInfo); ok {
			return max(i.GetRetryDelay().AsDuration(), 0)
		}
	}
	return 0
}

func reason(st *status.Status) string {
	for _, d := range st.Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			return i.GetReason()
		}
	}
	// Older answers of the services say it in words alone.
	if strings.Contains(st.Message(), "insufficient authentication scopes") {
		return "ACCESS_TOKEN_SCOPE_INSUFFICIENT"
	}
	return ""
}

// invalid tells whether a server says that the request itself is wrong.
func invalid(err error) bool {
	c := code(err)
	return c == codes.InvalidArgument || c == codes.OutOfRange
}

func code(err error) codes.Code {
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Code()
	}
	return codes.Unknown
}
