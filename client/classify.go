package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/connectip"
	"masquevpn/internal/dial"
	"masquevpn/internal/discovery"
)

// classify returns an Error for a failure before the request was accepted. conn
// may be nil.
func classify(err error, conn *quic.Conn, to target) error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var d *dial.Error
	if errors.As(err, &d) {
		return to.explain(d.Failure, d.Alert, d)
	}
	failure, alert := dial.Classify(err, conn)
	return to.explain(failure, alert, err)
}

// explain returns the Error for a failure of a connection.
func (to target) explain(failure dial.Failure, alert tls.AlertError, err error) *Error {
	switch failure {
	case dial.Unsent:
		return fail(causeNetwork, err,
			unsentText(unwrapDial(err)),
			"check this host's network and firewall")
	case dial.Identity:
		if e := identityError(err, to); e != nil {
			return e
		}
		return fail(to.identityCause(), err,
			fmt.Sprintf("%s does not have the name %s", to.server, to.nameList()),
			to.identityRemedy())
	case dial.Credentials, dial.EarlyRefusal:
		cause := causeEarlyRefusal
		if failure == dial.Credentials {
			cause = causeCredentials
		}
		return fail(cause, err,
			fmt.Sprintf("the proxy does not accept the client certificate (%s)", alert),
			"ask its operator for a new invitation")
	case dial.Protocol:
		return fail(causeProtocol, err, to.server+" does not speak HTTP/3",
			"check the name and the port of the proxy")
	case dial.NoMASQUE:
		cause, missing := causeNoProxy, "HTTP Datagrams"
		if to.mayChange {
			cause = causeNoProxyFound
		}
		var d *dial.Error
		if errors.As(err, &d) && d.NoConnect() {
			missing = "Extended CONNECT"
		}
		return fail(cause, nil,
			fmt.Sprintf("%s does not offer %s, so it is no MASQUE proxy", to.server, missing),
			"check the name and the port of the proxy")
	case dial.Silence:
		return fail(causeSilence, err,
			fmt.Sprintf("the proxy %s does not answer on UDP port %s", to.server, to.port),
			"check that it runs, and that no firewall on the way blocks UDP")
	case dial.Privileges:
		return fail(causePrivileges, err, unwrapDial(err).Error(),
			"run as root or with the capability CAP_NET_ADMIN")
	}
	return fail(causeHandshake, err,
		fmt.Sprintf("connecting to %s port %s failed (%v)", to.server, to.port,
			connectip.Explain(unwrapDial(err))), "")
}

// unsentText returns the text for packets that the kernel does not send.
func unsentText(why error) string {
	return fmt.Sprintf("packets to the proxy do not leave this host (%v)", why)
}

// unwrapDial returns the error of the connection in a *dial.Error.
func unwrapDial(err error) error {
	var d *dial.Error
	if errors.As(err, &d) {
		return d.Err
	}
	return err
}

// nameList returns the names that the certificate may have.
func (to target) nameList() string { return strings.Join(to.names, " or ") }

// identityCause returns the cause of a certificate for another name or of
// another authority.
func (to target) identityCause() cause {
	if to.mayChange {
		return causeIdentityFound
	}
	return causeIdentity
}

// identityRemedy returns the remedy for a certificate with another name.
func (to target) identityRemedy() string {
	if to.mayChange && to.query.ServerName == "" {
		return fmt.Sprintf("the operator of %s has to give the proxy a certificate for %s, publish %s, or sign the zone",
			to.host, to.nameList(), discovery.FilePath)
	}
	return "correct proxy or tls.server_name"
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
			fmt.Sprintf("nothing came from the proxy for %v", dial.IdleTimeout), "")
	}
	if conn.Context().Err() == nil {
		return fail(causeEnded, err,
			fmt.Sprintf("the session ended (%v)", connectip.Explain(err)), "")
	}
	return classify(cause, conn, to)
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
		return fail(to.identityCause(), err,
			fmt.Sprintf("the certificate of %s is from an unknown authority", to.server),
			"set tls.ca to the authority of the proxy; if it is set, do not connect, and ask the operator")
	case errors.As(err, &host):
		return fail(to.identityCause(), err,
			fmt.Sprintf("the certificate of %s is not for the name %s, but for %s", to.server,
				to.nameList(), subjects(host.Certificate)), to.identityRemedy())
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
	return fail(to.identityCause(), err,
		fmt.Sprintf("the certificate of %s could not be verified (%v)", to.server, verify.Err),
		"do not connect, and ask its operator")
}

// verifyAt verifies a chain like the handshake, but at another time.
func (to target) verifyAt(chain []*x509.Certificate, at time.Time) error {
	_, err := dial.VerifyServer(chain, to.names, to.roots, at)
	var e *tls.CertificateVerificationError
	if errors.As(err, &e) {
		return e.Err
	}
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
				to.server, date(cert.NotBefore), date(now)),
			"set this host's clock; a kill switch keeps time servers out unless kill_switch.allow names them")
	}
	reason := fmt.Sprintf("the certificate of %s has expired or is not valid yet: it ended on %s, and it is %s here", to.server, date(cert.NotAfter), date(now))
	if !to.clock.synchronised() {
		return fail(causeClock, err, reason, remedy)
	}
	return fail(causeExpired, err, reason, remedy)
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }
