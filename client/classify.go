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

// classify returns an Error for a failure before the request was accepted. conn
// may be nil.
func classify(err error, conn *quic.Conn, to target) error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	if conn != nil && conn.Context().Err() != nil {
		// The error of the connection is better than its consequence.
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

// authenticated reports whether the peer of conn has proved that it is the
// proxy. Until then, anybody on the path can close the connection with any
// error: the keys of Initial packets are public (RFC 9001 section 5.2), and a
// peer that answers in the proxy's place has the keys of Handshake packets.
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

// explainEnd returns an Error for the end of a stream on conn. If the
// connection has ended, its error is the reason.
func explainEnd(err error, conn *quic.Conn, to target) error {
	// The context of a broken connection may be done a little later than conn.
	cause := err
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

// isLocalClose reports whether err means that this side closed the connection.
func isLocalClose(err error) bool {
	var app *quic.ApplicationError
	return errors.As(err, &app) && !app.Remote || errors.Is(err, quic.ErrTransportClosed)
}

// maxSubjects limits the listed names of a certificate.
const maxSubjects = 5

// subjects lists the names and addresses of c.
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

// identityError returns an Error for a certificate that does not verify, or nil
// if err has another reason.
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
		// crypto/x509 checks the dates first, but a wrong name or authority is
		// the better explanation.
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

// verifyAt verifies a chain like the handshake, but at another time.
func (to target) verifyAt(chain []*x509.Certificate, at time.Time) error {
	opts := x509.VerifyOptions{Roots: to.roots, DNSName: to.verify, CurrentTime: at,
		Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}

// isExpired reports whether err is about the validity dates of a certificate.
func isExpired(err error) bool {
	var invalid x509.CertificateInvalidError
	return errors.As(err, &invalid) && invalid.Reason == x509.Expired
}

// outOfTime returns an Error for a certificate that is not valid now. It is not
// final if waiting helps: a clock that is behind, as on a host that boots
// without a battery, will be set. The certificate cannot serve as a clock,
// because the peer has not proved yet that it has the key.
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
