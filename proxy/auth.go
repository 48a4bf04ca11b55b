package proxy

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/quic-go/quic-go"
)

// methodMissing is what a failure is counted under when there were no credentials.
const methodMissing = "missing"

// authError is why somebody is not let in.
type authError struct {
	method string // whose credentials were not good, or methodMissing
	error
}

func failed(method, format string, args ...any) error {
	return &authError{method, fmt.Errorf(format, args...)}
}

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

// count counts err, which authenticate returned.
func (f *authFailures) count(err error) {
	if e, ok := errors.AsType[*authError](err); ok {
		f.of(e.method).Add(1)
	}
}

func (f *authFailures) counts() map[string]uint64 {
	m := make(map[string]uint64)
	for _, method := range []string{MethodMTLS, MethodToken, methodMissing} {
		m[method] = f.of(method).Load()
	}
	return m
}

// watchHandshake has a handshake of c that fails for the client's certificate counted and logged: no request tells of it.
func (s *Server) watchHandshake(c *quic.Conn) {
	if !slices.Contains(s.cfg().Methods, MethodMTLS) {
		return
	}
	context.AfterFunc(c.Context(), func() {
		select {
		case <-c.HandshakeComplete():
			return
		default:
		}
		var e *quic.TransportError
		if !errors.As(context.Cause(c.Context()), &e) || e.Remote || !e.ErrorCode.IsCryptoError() {
			return
		}
		switch alert := tls.AlertError(e.ErrorCode - cryptoError); {
		case alert == alertCertificateRequired:
			s.authFailed.missing.Add(1)
		case slices.Contains(certificateAlerts, alert):
			s.authFailed.mtls.Add(1)
		default:
			return
		}
		s.peerLog.Info("client certificate refused", "remote", c.RemoteAddr().String(), "reason", shorten(e))
	})
}

// cryptoError is what an alert of TLS is added to in the error code of a connection (RFC 9001 section 4.8).
const cryptoError = 0x100

// alertCertificateRequired is that by which TLS refuses a client without a certificate, and certificateAlerts are those by which it
// refuses the certificate of one (RFC 8446 section 6.2).
const alertCertificateRequired = tls.AlertError(116)

var certificateAlerts = []tls.AlertError{42, 43, 44, 45, 46, 48}

// authenticate finds out whose request r is. The error is for the log: the client is told nothing but that it failed.
func (s *Server) authenticate(r *http.Request) (User, error) {
	if slices.Contains(s.cfg().Methods, MethodNone) {
		return User{}, nil
	}
	var user User
	if slices.Contains(s.cfg().Methods, MethodMTLS) && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		leaf := r.TLS.VerifiedChains[0][0]
		name := leaf.Subject.CommonName
		u, ok := s.cfg().Users.ByName(name)
		if !ok {
			return User{}, failed(MethodMTLS, "the certificate is for %q, who is not a user", name)
		}
		if u.Certificate != ([32]byte{}) && u.Certificate != sha256.Sum256(leaf.Raw) {
			return User{}, failed(MethodMTLS, "the certificate is for %q, but not the one that the user has now", name)
		}
		user = u
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	given := strings.EqualFold(scheme, "Bearer")
	if slices.Contains(s.cfg().Methods, MethodToken) && given {
		u, ok := s.cfg().Users.ByToken(token)
		if !ok {
			return User{}, failed(MethodToken, "the token is not that of any user")
		}
		if user.Name != "" && user.Name != u.Name {
			return User{}, failed(MethodToken, "the certificate is that of %q and the token that of %q", user.Name, u.Name)
		}
		user = u
	}
	if user.Name == "" {
		return User{}, failed(methodMissing, "no credentials were given")
	}
	return user, nil
}

// revoked returns why a user who was let in before is not any more, nil when all is as it was.
func (s *Server) revoked(user User) error {
	if user.Name == "" { // without authentication
		return nil
	}
	now, ok := s.cfg().Users.ByName(user.Name)
	switch {
	case !ok:
		return errRevoked
	case now.TokenHash != user.TokenHash || now.Certificate != user.Certificate:
		return errRenewed
	}
	return nil
}

// UsersChanged ends the sessions of users that are no more, or have other credentials than when the session began.
func (s *Server) UsersChanged() {
	for _, ss := range s.sessions.list() {
		if err := s.revoked(ss.user); err != nil {
			ss.stop(err)
		}
	}
}
