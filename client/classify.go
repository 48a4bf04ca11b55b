package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/connectip"
)

// TLS alerts by which a server refuses the client (RFC 8446 section 6.2); QUIC carries them as CRYPTO_ERROR (RFC 9001 section 4.8).
const (
	cryptoError         = 0x100
	alertBadCertificate = 42
	alertUnknownCert    = 46
	alertUnknownCA      = 48
	alertAccessDenied   = 49
	alertNoProtocol     = 120
	alertCertRequired   = 116
)

// classify turns what went wrong on the way to an accepted request into an Error. conn may be nil.
func classify(err error, conn *quic.Conn, to target) error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	if conn != nil && conn.Context().Err() != nil {
		// What ended the connection says more than the call that noticed.
		if cause := context.Cause(conn.Context()); !isLocalClose(cause) {
			err = cause
		}
	}
	if e := identity(err, to); e != nil {
		return e
	}
	var t *quic.TransportError
	if errors.As(err, &t) && t.ErrorCode.IsCryptoError() {
		alert := int(t.ErrorCode) - cryptoError
		switch {
		case t.Remote && (alert >= alertBadCertificate && alert <= alertUnknownCert || alert == alertUnknownCA ||
			alert == alertAccessDenied || alert == alertCertRequired):
			return &Error{
				Kind: KindCredentials, Err: err, Reason: fmt.Sprintf("the proxy does not accept the client certificate (%s)", tls.AlertError(alert)),
				Remedy: "ask its operator for a new invitation",
			}
		case alert == alertNoProtocol:
			return &Error{Kind: KindUsage, Err: err, Reason: to.host + " does not speak HTTP/3", Remedy: "check the name and the port of the proxy"}
		}
	}
	var handshake *quic.HandshakeTimeoutError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(err, &handshake), errors.As(err, &idle), errors.Is(err, context.DeadlineExceeded):
		return &Error{
			Kind: KindUnreachable, Err: err, Reason: fmt.Sprintf("the proxy %s does not answer on UDP port %s", to.host, to.port),
			Remedy: "check that it runs, and that no firewall on the way blocks UDP",
		}
	case errors.Is(err, os.ErrPermission):
		return &Error{Kind: KindPrivileges, Err: err, Reason: err.Error(), Remedy: "run as root or with the capability CAP_NET_ADMIN"}
	}
	return &Error{Kind: KindUnreachable, Err: err, Reason: fmt.Sprintf("connecting to %s port %s failed (%v)", to.host, to.port, connectip.Explain(err))}
}

// whyEnded explains the end of a stream on conn by that of the connection, where that ended first.
func whyEnded(err error, conn *quic.Conn, to target) error {
	cause := err // that of the connection, but its context may end a little later
	if conn.Context().Err() != nil {
		cause = context.Cause(conn.Context())
	}
	var app *quic.ApplicationError
	var transport *quic.TransportError
	var reset *quic.StatelessResetError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(cause, &app) && app.Remote, errors.As(cause, &transport) && transport.Remote && transport.ErrorCode == quic.NoError:
		return &Error{Kind: KindFailure, Reason: "the proxy closed the connection", Err: cause}
	case errors.As(cause, &transport) && transport.Remote && !transport.ErrorCode.IsCryptoError():
		return &Error{Kind: KindFailure, Reason: fmt.Sprintf("the session ended (%v)", connectip.Explain(cause)), Err: cause}
	case errors.As(cause, &reset):
		return &Error{Kind: KindFailure, Reason: "the proxy was restarted", Err: cause}
	case errors.As(cause, &idle):
		return &Error{Kind: KindUnreachable, Reason: fmt.Sprintf("nothing came from the proxy for %v", idleTimeout), Err: cause}
	}
	if conn.Context().Err() == nil {
		return &Error{Kind: KindFailure, Reason: fmt.Sprintf("the session ended (%v)", connectip.Explain(err)), Err: err}
	}
	return classify(cause, conn, to)
}

// isLocalClose reports whether err is the end that this side made.
func isLocalClose(err error) bool {
	var app *quic.ApplicationError
	return errors.As(err, &app) && !app.Remote || errors.Is(err, quic.ErrTransportClosed)
}

// maxSubjects is how many of a certificate's names are said.
const maxSubjects = 5

// subjects says which names and addresses c is for.
func subjects(c *x509.Certificate) string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	switch n := len(names); {
	case n == 0:
		return "none"
	case n > maxSubjects:
		names = append(names[:maxSubjects], fmt.Sprintf("%d more", n-maxSubjects))
	}
	return strings.Join(names, ", ")
}

// identity explains a certificate of the proxy that does not verify, or returns nil.
func identity(err error, to target) *Error {
	var verify *tls.CertificateVerificationError
	if !errors.As(err, &verify) {
		return nil
	}
	e := &Error{Kind: KindIdentity, Err: err, Remedy: "do not connect, and ask its operator"}
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		e.Reason = fmt.Sprintf("the certificate of %s is from an unknown authority", to.host)
		e.Remedy = "set tls.ca to the authority of the proxy; if it is set, do not connect, and ask the operator"
	case errors.As(err, &host):
		e.Reason = fmt.Sprintf("the certificate of %s is not for the name %s, but for %s", to.host, to.verify, subjects(host.Certificate))
		e.Remedy = "correct proxy or tls.server_name"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		e.Reason = fmt.Sprintf("the certificate of %s has expired or is not valid yet", to.host)
		e.Remedy = "check this host's clock, and ask the operator for a new certificate"
	default:
		e.Reason = fmt.Sprintf("the certificate of %s could not be verified (%v)", to.host, verify.Err)
	}
	return e
}
