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

// The classes of failures to authenticate, as the log has them.
const (
	classMissing     = "no_credentials"
	classUnknownUser = "unknown_user"
	// that of nobody, perhaps of a user who was removed
	classWrongToken         = "wrong_token"
	classOldCertificate     = "old_certificate"     // not that of the last invitation
	classExpiredCertificate = "expired_certificate" // found by TLS, as is the next
	// signed by another authority, or not for this use
	classBadCertificate = "bad_certificate"
	classMismatch       = "mismatch" // certificate and token are those of two users
	classExpiredUser    = "expired_user"
	classRevoked        = "revoked" // between the request and its answer
)

// methodMissing is what a failure is counted under when there were no
// credentials.
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

// authFailure is why somebody is not let in. It is for the log and never has a
// secret in it: the client is told nothing but that it failed.
type authFailure struct {
	method string // whose credentials were not good, or methodMissing
	class  string
	user   string // whom it is about, "" if that is not known
	reason string
}

func (f *authFailure) Error() string { return f.reason }

// attemptsKey is the key of the turns of a connection, a chan struct{} with
// room for one, in the context of a request.
type attemptsKey struct{}

// identify finds out whose request r is. A connection tries one set of
// credentials at a time, and who fails too often waits for the answer: that
// holds up nobody with good credentials, not even behind the same address.
func (h handler) identify(r *http.Request) (user User, method string, refused *refusal) {
	conn := r.Context().Value(connKey{}).(*quic.Conn)
	turn := r.Context().Value(attemptsKey{}).(chan struct{})
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-r.Context().Done():
		return user, "", refuse(http.StatusUnauthorized, "", "the client went away")
	}
	user, method, failure := h.s.auth.authenticate(r)
	if failure == nil {
		return user, method, nil
	}
	h.s.auth.refused(conn.RemoteAddr(), failure)
	delay, ok := h.s.auth.throttle.Begin(source.Key(conn.RemoteAddr()), failure.user)
	if !ok {
		_ = conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), "")
		return User{}, "", &refusal{status: http.StatusUnauthorized, reason: failure}
	}
	defer h.s.auth.throttle.End()
	wait := time.NewTimer(delay)
	defer wait.Stop()
	select { // whether or not the client still waits for this one
	case <-wait.C:
	case <-conn.Context().Done():
	}
	return User{}, "", &refusal{status: http.StatusUnauthorized, reason: failure}
}

// authenticator finds out whose requests the proxy receives, and counts and logs
// failures.
type authenticator struct {
	cfg      func() *Config
	log      *slog.Logger // for events that clients cause
	failed   authFailures
	throttle auththrottle.Throttle
}

// refused counts and logs a failure.
func (a *authenticator) refused(remote net.Addr, f *authFailure) {
	a.failed.of(f.method).Add(1)
	log := a.log
	if f.user != "" {
		log = log.With("user", f.user)
	}
	log.Warn("authentication failed", "remote", remote.String(), "method", f.method, "class",
		f.class, "reason", shorten(f))
}

// authenticate finds out whose credentials r has, and by which method.
func (a *authenticator) authenticate(r *http.Request) (user User, method string, failure *authFailure) {
	if slices.Contains(a.cfg().Methods, MethodNone) {
		return User{}, MethodNone, nil
	}
	method = methodMissing
	fail := func(class, user, format string, args ...any) (User, string, *authFailure) {
		return User{}, method, &authFailure{method, class, user, fmt.Sprintf(format, args...)}
	}
	if slices.Contains(a.cfg().Methods, MethodMTLS) && r.TLS != nil &&
		len(r.TLS.VerifiedChains) > 0 {
		method = MethodMTLS
		leaf := r.TLS.VerifiedChains[0][0]
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
			return fail(classWrongToken, user.Name, "the token is not that of any user")
		}
		if user.Name != "" && user.Name != u.Name {
			return fail(classMismatch, user.Name,
				"the certificate is that of %q and the token that of %q", user.Name, u.Name)
		}
		user = u
	}
	if user.Name == "" {
		return fail(classMissing, "", "no credentials were given")
	}
	if user.expired(time.Now()) {
		return fail(classExpiredUser, user.Name, "the time of the user %q was over at %s",
			user.Name, user.Expires.UTC().Format(time.RFC3339))
	}
	return user, method, nil
}

// watchHandshake has it counted and logged when TLS refuses the certificate of
// c's client, which no request tells of.
func (a *authenticator) watchHandshake(c *quic.Conn) {
	if !slices.Contains(a.cfg().Methods, MethodMTLS) {
		return
	}
	context.AfterFunc(c.Context(), func() {
		if f := handshakeFailure(context.Cause(c.Context())); f != nil {
			a.refused(c.RemoteAddr(), f)
		}
	})
}

// cryptoError is what an alert of TLS is added to in the error code of a
// connection (RFC 9001 section 4.8).
const cryptoError = 0x100

// alertCertificateRequired is that by which TLS refuses a client without a
// certificate, and certificateAlerts are those by which it refuses the
// certificate of one (RFC 8446 section 6.2).
const alertCertificateRequired = tls.AlertError(116)

var certificateAlerts = []tls.AlertError{42, 43, 44, 45, 46, 48}

// handshakeFailure returns the failure to authenticate for which a connection
// ended, nil if that is not why.
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
	f := &authFailure{method: MethodMTLS, class: classBadCertificate, reason: transport.Error()}
	if unverified, ok := errors.AsType[*tls.CertificateVerificationError](err); ok &&
		len(unverified.UnverifiedCertificates) > 0 {
		f.reason = fmt.Sprintf("the certificate says %q: %s",
			unverified.UnverifiedCertificates[0].Subject.CommonName, unverified.Err.Error())
	}
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		f.class = classExpiredCertificate
	}
	return f
}
