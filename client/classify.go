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
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/connectip"
)

// TLS alerts by which a server refuses the client (RFC 8446 section 6.2); QUIC
// carries them as CRYPTO_ERROR (RFC 9001 section 4.8).
const (
	cryptoError         = 0x100
	alertBadCertificate = 42
	alertUnknownCert    = 46
	alertUnknownCA      = 48
	alertAccessDenied   = 49
	alertNoProtocol     = 120
	alertCertRequired   = 116
)

// classify turns what went wrong on the way to an accepted request into an
// Error. conn may be nil.
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
	if e := identityError(err, to); e != nil {
		return e
	}
	var t *quic.TransportError
	if errors.As(err, &t) && t.ErrorCode.IsCryptoError() {
		alert := int(t.ErrorCode) - cryptoError
		switch {
		case t.Remote && (alert >= alertBadCertificate && alert <= alertUnknownCert ||
			alert == alertUnknownCA ||
			alert == alertAccessDenied || alert == alertCertRequired):
			cause := causeEarlyRefusal
			if authenticated(conn) {
				cause = causeCredentials
			}
			return fail(cause, err,
				fmt.Sprintf("the proxy does not accept the client certificate (%s)",
					tls.AlertError(alert)),
				"ask its operator for a new invitation")
		case alert == alertNoProtocol && !authenticated(conn):
			return fail(causeProtocol, err, to.host+" does not speak HTTP/3",
				"check the name and the port of the proxy")
		}
	}
	var handshake *quic.HandshakeTimeoutError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(err, &handshake), errors.As(err, &idle),
		errors.Is(err, context.DeadlineExceeded):
		return fail(causeSilence, err,
			fmt.Sprintf("the proxy %s does not answer on UDP port %s", to.host, to.port),
			"check that it runs, and that no firewall on the way blocks UDP")
	case errors.Is(err, os.ErrPermission):
		return fail(causePrivileges, err, err.Error(),
			"run as root or with the capability CAP_NET_ADMIN")
	}
	return fail(causeHandshake, err,
		fmt.Sprintf("connecting to %s port %s failed (%v)", to.host, to.port,
			connectip.Explain(err)), "")
}

// proven reports whether the far end of conn has proved that it is the proxy.
// Until then, anybody on the way can end the connection, with any error: all
// know the keys of Initial packets (RFC 9001 section 5.2), and whoever answers
// in the proxy's place has those of Handshake packets.
func authenticated(conn *quic.Conn) bool {
	if conn == nil {
		return false
	}
	select {
	case <-conn.HandshakeComplete():
		return true
	default:
		return false
	}
}

// whyEnded explains the end of a stream on conn by that of the connection,
// where that ended first.
func explainEnd(err error, conn *quic.Conn, to target) error {
	cause := err // that of the connection, but its context may end a little later
	if conn.Context().Err() != nil {
		cause = context.Cause(conn.Context())
	}
	var app *quic.ApplicationError
	var transport *quic.TransportError
	var reset *quic.StatelessResetError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(cause, &app) && app.Remote, errors.As(cause, &transport) && transport.Remote &&
		transport.ErrorCode == quic.NoError:
		return fail(causeEnded, cause, "the proxy closed the connection", "")
	case errors.As(cause, &transport) && transport.Remote && !transport.ErrorCode.IsCryptoError():
		return fail(causeEnded, cause,
			fmt.Sprintf("the session ended (%v)", connectip.Explain(cause)), "")
	case errors.As(cause, &reset):
		return fail(causeEnded, cause, "the proxy was restarted", "")
	case errors.As(cause, &idle):
		return fail(causeLost, cause,
			fmt.Sprintf("nothing came from the proxy for %v", idleTimeout), "")
	}
	if conn.Context().Err() == nil {
		return fail(causeEnded, err,
			fmt.Sprintf("the session ended (%v)", connectip.Explain(err)), "")
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

// identity explains a certificate of the proxy that does not verify, or returns
// nil.
func identityError(err error, to target) *Error {
	var verify *tls.CertificateVerificationError
	if !errors.As(err, &verify) {
		return nil
	}
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fail(causeIdentity, err,
			fmt.Sprintf("the certificate of %s is from an unknown authority", to.host),
			"set tls.ca to the authority of the proxy; if it is set, do not connect, and ask the operator")
	case errors.As(err, &host):
		return fail(causeIdentity, err,
			fmt.Sprintf("the certificate of %s is not for the name %s, but for %s", to.host,
				to.verify, subjects(host.Certificate)),
			"correct proxy or tls.server_name")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		// Dates are looked at first, but whose certificate it is says more.
		at := invalid.Cert.NotAfter
		if to.clock.now().Before(invalid.Cert.NotBefore) {
			at = invalid.Cert.NotBefore
		}
		if also := to.verifyAt(verify.UnverifiedCertificates, at); also != nil && !isExpired(also) {
			return identityError(&tls.CertificateVerificationError{UnverifiedCertificates: verify.UnverifiedCertificates, Err: also}, to)
		}
		return outOfTime(err, invalid.Cert, to)
	}
	return fail(causeIdentity, err,
		fmt.Sprintf("the certificate of %s could not be verified (%v)", to.host, verify.Err),
		"do not connect, and ask its operator")
}

// verifyAt verifies a chain as the handshake does, for another time.
func (to target) verifyAt(chain []*x509.Certificate, at time.Time) error {
	opts := x509.VerifyOptions{Roots: to.roots, DNSName: to.verify, CurrentTime: at,
		Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}

func isExpired(err error) bool {
	var invalid x509.CertificateInvalidError
	return errors.As(err, &invalid) && invalid.Reason == x509.Expired
}

// outOfTime explains a certificate that is not valid at this time. A clock that
// is behind, as that of a host without a battery is when it boots, will be set,
// and time passes: what is not valid yet will be. The certificate does not
// count for that: nobody has proved yet to have its key.
func outOfTime(err error, cert *x509.Certificate, to target) *Error {
	now := to.clock.now()
	const remedy = "check this host's clock, and ask the operator for a new certificate"
	if now.Before(cert.NotBefore) {
		return fail(causeClock, err,
			fmt.Sprintf("the certificate of %s has expired or is not valid yet: it is valid from %s, and it is %s here",
				to.host, date(cert.NotBefore), date(now)),
			"set this host's clock; a kill switch keeps time servers out unless kill_switch.allow names them")
	}
	reason := fmt.Sprintf("the certificate of %s has expired or is not valid yet: it ended on %s, and it is %s here", to.host, date(cert.NotAfter), date(now))
	if !to.clock.synchronised() {
		return fail(causeClock, err, reason, remedy)
	}
	return fail(causeExpired, err, reason, remedy)
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }
