package dial

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/discovery"
)

// A Failure is the kind of an Error. The later ones say more about why an
// attempt failed.
type Failure int

// The failures.
const (
	Unsent       Failure = iota + 1 // packets do not leave this host
	Silence                         // nothing answers
	Broken                          // the connection ended for another reason
	Privileges                      // this process may not open the socket
	Protocol                        // the far end says that it does not speak HTTP/3
	NoMASQUE                        // the server offers no Extended CONNECT or no HTTP Datagrams
	Identity                        // the certificate does not verify
	EarlyRefusal                    // refused by somebody who has not proved to be the server
	Credentials                     // the server refuses the client's certificate
)

// An Error says why no connection came about.
type Error struct {
	Failure Failure
	Record  discovery.Record
	Addr    netip.AddrPort
	Alert   tls.AlertError // set for Protocol, EarlyRefusal and Credentials
	Err     error
}

// Error describes the failure.
func (e *Error) Error() string {
	return fmt.Sprintf("connecting to %v: %v", e.Addr, e.Err)
}

// Unwrap returns the error of the connection.
func (e *Error) Unwrap() error { return e.Err }

var (
	errNoConnect   = errors.New("it does not offer Extended CONNECT")
	errNoDatagrams = errors.New("it does not offer HTTP Datagrams")
)

// NoConnect reports whether e is the lack of Extended CONNECT.
func (e *Error) NoConnect() bool { return errors.Is(e.Err, errNoConnect) }

// asError returns err as an *Error, or nil.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// TLS alerts by which a server refuses the client (RFC 8446 section 6.2); QUIC
// carries them as CRYPTO_ERROR (RFC 9001 section 4.8).
const (
	cryptoError         = 0x100
	alertBadCertificate = 42
	alertUnknownCert    = 46
	alertUnknownCA      = 48
	alertAccessDenied   = 49
	alertUnrecognized   = 112
	alertCertRequired   = 116
	alertNoProtocol     = 120
)

// newError returns the Error for what went wrong with an address. conn is nil
// before there is a connection.
func newError(err error, conn *quic.Conn, r *discovery.Record, addr netip.AddrPort) *Error {
	if e := asError(err); e != nil {
		return e
	}
	e := &Error{Record: *r, Addr: addr, Err: err}
	e.Failure, e.Alert = Classify(err, conn)
	return e
}

// Classify returns the kind of an error of a connection, and the alert if there
// was one. conn may be nil.
func Classify(err error, conn *quic.Conn) (Failure, tls.AlertError) {
	if conn != nil && conn.Context().Err() != nil {
		// What ended the connection says more than the call that noticed.
		if cause := context.Cause(conn.Context()); !IsLocalClose(cause) {
			err = cause
		}
	}
	if errors.As(err, new(*tls.CertificateVerificationError)) {
		return Identity, 0
	}
	var t *quic.TransportError
	if errors.As(err, &t) && t.ErrorCode.IsCryptoError() {
		alert := int(t.ErrorCode) - cryptoError
		switch {
		case t.Remote && alert == alertUnrecognized && !authenticated(conn):
			return Identity, tls.AlertError(alert)
		case t.Remote && (alert >= alertBadCertificate && alert <= alertUnknownCert ||
			alert == alertUnknownCA || alert == alertAccessDenied || alert == alertCertRequired):
			if authenticated(conn) {
				return Credentials, tls.AlertError(alert)
			}
			return EarlyRefusal, tls.AlertError(alert)
		case alert == alertNoProtocol && !authenticated(conn):
			return Protocol, tls.AlertError(alert)
		}
	}
	switch {
	case errors.As(err, new(*quic.HandshakeTimeoutError)),
		errors.As(err, new(*quic.IdleTimeoutError)),
		errors.Is(err, context.DeadlineExceeded):
		return Silence, 0
	case errors.Is(err, os.ErrPermission):
		return Privileges, 0
	}
	return Broken, 0
}

// authenticated reports whether the far end of conn has proved that it is the
// server. Until then, anybody on the way can end the connection, with any
// error: all know the keys of Initial packets (RFC 9001 section 5.2), and
// whoever answers in the server's place has those of Handshake packets.
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

// IsLocalClose reports whether err is the end of a connection that this side
// made.
func IsLocalClose(err error) bool {
	var app *quic.ApplicationError
	return errors.As(err, &app) && !app.Remote || errors.Is(err, quic.ErrTransportClosed)
}
