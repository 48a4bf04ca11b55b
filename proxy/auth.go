package proxy

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/proxy/internal/auththrottle"
	"masquevpn/proxy/internal/source"
)

// Classes of failures to authenticate, for the log.
const (
	classMissing     = "no_credentials"
	classUnknownUser = "unknown_user"

	// classWrongToken is a token without a user, who may have been removed.
	classWrongToken = "wrong_token"

	// classOldCertificate is a certificate other than the user's current one.
	classOldCertificate = "old_certificate"

	// TLS refuses the certificates of these classes, unless there are peers. A
	// bad one is signed by another authority or not valid for this use.
	classExpiredCertificate = "expired_certificate"
	classBadCertificate     = "bad_certificate"

	// classMismatch is a certificate and a token of different users.
	classMismatch = "mismatch"

	classExpiredUser = "expired_user"

	// classRevoked is a user who was removed between request and response.
	classRevoked = "revoked"
)

// methodMissing stands for the method in counts if there are no credentials.
const methodMissing = "missing"

// authFailures counts failures of authentication by method.
type authFailures struct{ mtls, token, missing atomic.Uint64 }

func (f *authFailures) of(method string) *atomic.Uint64 {
	switch method {
	case MethodMTLS:
		return &f.mtls
	case MethodToken:
		return &f.token
	}
	return &f.missing
}

func (f *authFailures) counts() map[string]uint64 {
	m := make(map[string]uint64)
	for _, method := range []string{MethodMTLS, MethodToken, methodMissing} {
		m[method] = f.of(method).Load()
	}
	return m
}

// authFailure is the reason why authentication failed. It is for the log and
// contains no secret. The client does not learn it.
type authFailure struct {
	method string // MethodMTLS, MethodToken or methodMissing
	class  string
	user   string // empty if unknown
	reason string
}

func (f *authFailure) Error() string { return f.reason }

// authTurnKey is the context key of a chan struct{} with a capacity of 1, which
// allows one authentication at a time on a connection.
type authTurnKey struct{}

// identify returns the user of r. A connection has one authentication at a
// time, and the throttle delays the response to a failure. Clients with valid
// credentials do not wait, even if they share an address with a guesser.
func (h handler) identify(r *http.Request) (user User, method string, refused *refusal) {
	conn := r.Context().Value(connKey{}).(*quic.Conn)
	done, refused := h.takeAuthTurn(r)
	if refused != nil {
		return user, "", refused
	}
	defer done()
	user, method, failure := h.s.auth.authenticate(r)
	if failure == nil {
		return user, method, nil
	}
	h.s.auth.noteFailure(conn.RemoteAddr(), failure)
	return User{}, "", h.refuseLate(conn, failure.user, failure)
}

// takeAuthTurn waits until no other request of the connection is being
// authenticated. The caller calls done at the end.
func (h handler) takeAuthTurn(r *http.Request) (done func(), refused *refusal) {
	turn := r.Context().Value(authTurnKey{}).(chan struct{})
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-r.Context().Done():
		return nil, refuse(http.StatusUnauthorized, "", "the client went away")
	}
}

// refuseLate returns the refusal of a client that failed to authenticate, after
// the delay of the throttle for the client's address and for name.
func (h handler) refuseLate(conn *quic.Conn, name string, reason error) *refusal {
	refused := &refusal{status: http.StatusUnauthorized, reason: reason}
	delay, ok := h.s.auth.throttle.Begin(source.Key(conn.RemoteAddr()), name)
	if !ok {
		_ = conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), "")
		return refused
	}
	defer h.s.auth.throttle.End()
	wait := time.NewTimer(delay)
	defer wait.Stop()
	select { // even if the client has cancelled the request
	case <-wait.C:
	case <-conn.Context().Done():
	}
	return refused
}

// authenticator authenticates requests, and counts, logs and delays failures.
type authenticator struct {
	cfg      func() *Config
	log      *slog.Logger // for events that clients cause
	failed   authFailures
	throttle auththrottle.Throttle
}

// noteFailure counts and logs a failure.
func (a *authenticator) noteFailure(remote net.Addr, f *authFailure) {
	a.failed.of(f.method).Add(1)
	log := a.log
	if f.user != "" {
		log = log.With("user", f.user)
	}
	log.Warn("authentication failed", "remote", remote.String(), "method", f.method, "class",
		f.class, "reason", shorten(f))
}

// authenticate returns the user whose credentials r has, and the method.
func (a *authenticator) authenticate(r *http.Request) (user User, method string,
	failure *authFailure) {
	if slices.Contains(a.cfg().Methods, MethodNone) {
		return User{}, MethodNone, nil
	}
	method = methodMissing
	fail := func(class, user, format string, args ...any) (User, string, *authFailure) {
		return User{}, method, &authFailure{method, class, user, fmt.Sprintf(format, args...)}
	}
	leaf, err := a.userCertificate(r.TLS)
	if err != nil {
		f := certificateFailure(err)
		return user, f.method, f
	}
	if leaf != nil {
		method = MethodMTLS
		name := leaf.Subject.CommonName
		u, ok := a.cfg().Users.ByName(name)
		if !ok {
			return fail(classUnknownUser, name,
				"the certificate is for %q, who is not a user", name)
		}
		if u.Certificate != ([32]byte{}) && u.Certificate != sha256.Sum256(leaf.Raw) {
			return fail(classOldCertificate, name,
				"the certificate is for %q, but not the one that the user has now", name)
		}
		user = u
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	given := strings.EqualFold(scheme, "Bearer")
	if slices.Contains(a.cfg().Methods, MethodToken) && given {
		method = MethodToken
		u, ok := a.cfg().Users.ByToken(token)
		if !ok {
			return fail(classWrongToken, user.Name, "no user has this token")
		}
		if user.Name != "" && user.Name != u.Name {
			return fail(classMismatch, user.Name,
				"the certificate is for %q and the token for %q", user.Name, u.Name)
		}
		user = u
	}
	if user.Name == "" {
		return fail(classMissing, "", "the request has no credentials")
	}
	if user.expired(time.Now()) {
		return fail(classExpiredUser, user.Name, "access of the user %q ended at %s",
			user.Name, user.Expires.UTC().Format(time.RFC3339))
	}
	return user, method, nil
}

// userCertificate returns the certificate of a user, nil without one. TLS
// verified it, unless there are peers, whose certificates TLS does not judge.
// The error is a *tls.CertificateVerificationError.
func (a *authenticator) userCertificate(state *tls.ConnectionState) (*x509.Certificate, error) {
	switch {
	case !slices.Contains(a.cfg().Methods, MethodMTLS) || state == nil ||
		len(state.PeerCertificates) == 0:
		return nil, nil
	case len(state.VerifiedChains) > 0:
		return state.VerifiedChains[0][0], nil
	}
	chain, t := state.PeerCertificates, a.cfg().TLS
	opts := x509.VerifyOptions{Roots: t.ClientCAs, Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if t.Time != nil {
		opts.CurrentTime = t.Time()
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(opts); err != nil {
		return nil, &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: err}
	}
	return chain[0], nil
}

// watchHandshake notes the failure if TLS refuses the certificate of the client
// of c. There is no request then.
func (a *authenticator) watchHandshake(c *quic.Conn) {
	if !slices.Contains(a.cfg().Methods, MethodMTLS) {
		return
	}
	context.AfterFunc(c.Context(), func() {
		if f := handshakeFailure(context.Cause(c.Context())); f != nil {
			a.noteFailure(c.RemoteAddr(), f)
		}
	})
}

// cryptoError is the QUIC error code of TLS alert 0 (RFC 9001 section 4.8).
const cryptoError = 0x100

// alertCertificateRequired is the alert for a client without a certificate (RFC
// 8446 section 6.2).
const alertCertificateRequired = tls.AlertError(116)

// certificateAlerts are the alerts for a certificate that is not accepted (RFC
// 8446 section 6.2).
var certificateAlerts = []tls.AlertError{42, 43, 44, 45, 46, 48}

// handshakeFailure returns the failure to authenticate that ended a connection
// with err, or nil if the connection ended for another reason.
func handshakeFailure(err error) *authFailure {
	var transport *quic.TransportError
	if !errors.As(err, &transport) || transport.Remote || !transport.ErrorCode.IsCryptoError() {
		return nil
	}
	switch alert := tls.AlertError(transport.ErrorCode - cryptoError); {
	case alert == alertCertificateRequired:
		return &authFailure{method: methodMissing, class: classMissing,
			reason: "the client has no certificate"}
	case !slices.Contains(certificateAlerts, alert):
		return nil
	}
	f := certificateFailure(err)
	if f.reason == "" {
		f.reason = transport.Error()
	}
	return f
}

// certificateFailure returns the failure to authenticate by a certificate that
// does not verify, because of err. Its reason may be empty.
func certificateFailure(err error) *authFailure {
	f := &authFailure{method: MethodMTLS, class: classBadCertificate}
	if unverified, ok := errors.AsType[*tls.CertificateVerificationError](err); ok &&
		len(unverified.UnverifiedCertificates) > 0 {
		f.reason = fmt.Sprintf("the certificate is for %q: %s",
			unverified.UnverifiedCertificates[0].Subject.CommonName, unverified.Err.Error())
	}
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		f.class = classExpiredCertificate
	}
	return f
}
