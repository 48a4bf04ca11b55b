package acme

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"

	"github.com/mholt/acmez/v3/acme"

	"masquevpn/internal/fault"
)

// explain adds a remedy for the operator to err.
func explain(err error, cfg Config) *fault.Error {
	if e, ok := errors.AsType[*fault.Error](err); ok {
		return e
	}
	if p, ok := errors.AsType[acme.Problem](err); ok {
		return &fault.Error{Kind: fault.Failure,
			Reason: fmt.Sprintf("the ACME server refuses: %s (%s)",
				strings.TrimSpace(p.Detail), strings.TrimPrefix(p.Type, acme.ProblemTypeNamespace)),
			Remedy: remedy(p, cfg), Err: err}
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return &fault.Error{Kind: fault.Failure,
			Reason: "the folder of the certificate: " + e.Error(),
			Remedy: "make " + cfg.Storage +
				" a folder of the user that the proxy runs as, or change tls.acme.storage",
			Err: err}
	}
	reason := "the ACME server " + cfg.Directory + " cannot be asked: " + innermost(err).Error()
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &fault.Error{Kind: fault.Failure, Reason: reason,
			Remedy: "for a server of your own, name its authority with tls.acme.ca", Err: err}
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return &fault.Error{Kind: fault.Failure, Reason: reason,
			Remedy: "for a server of your own, name its authority with tls.acme.ca", Err: err}
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return &fault.Error{Kind: fault.Failure, Reason: reason,
			Remedy: "check tls.acme.directory, and this host's DNS",
			Err:    err}
	}
	if _, ok := errors.AsType[*url.Error](err); ok {
		return &fault.Error{Kind: fault.Failure, Reason: reason,
			Remedy: "check tls.acme.directory, and that this host and its firewall let HTTPS out",
			Err:    err}
	}
	return &fault.Error{Kind: fault.Failure, Reason: strings.TrimSpace(err.Error()),
		Remedy: "check tls.acme.directory",
		Err:    err}
}

// remedy returns the remedy for a refusal (RFC 8555 section 6.7).
func remedy(p acme.Problem, cfg Config) string {
	switch p.Type {
	case acme.ProblemTypeCAA:
		return fmt.Sprintf("a CAA record of %s names other authorities: add this one", cfg.Name)
	case acme.ProblemTypeRateLimited:
		return "wait: each further attempt counts too"
	case acme.ProblemTypeRejectedIdentifier:
		return fmt.Sprintf("the server gives no certificates for %s: change name, or tls.acme.directory", cfg.Name)
	case acme.ProblemTypeInvalidContact, acme.ProblemTypeUnsupportedContact:
		return "change tls.acme.email"
	case acme.ProblemTypeExternalAccountRequired:
		return "the server requires external account binding, which is not supported: choose another tls.acme.directory"
	}
	if _, ok := p.Resource.(acme.Authorization); ok {
		// Servers use different types for a failed challenge.
		return fmt.Sprintf("let all A and AAAA records of %s lead to this host, and TCP port %d in; nothing else may answer there", cfg.Name, cfg.Challenge.Port())
	}
	return ""
}

// explainListen explains why a challenge cannot be answered.
func explainListen(err error, cfg Config) *fault.Error {
	where := fmt.Sprintf("TCP %s, where the ACME server asks for the challenge %s,", cfg.Listen,
		cfg.Challenge)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		other := HTTP
		if cfg.Challenge == HTTP {
			other = TLSALPN
		}
		return &fault.Error{Kind: fault.Failure, Reason: where + " is in use",
			Remedy: fmt.Sprintf("stop what uses it (ss -tlnp), change tls.acme.listen, or set tls.acme.challenge to %q, on port %d", other, other.Port()), Err: err}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return &fault.Error{Kind: fault.Failure, Reason: where + " is not an address of this host",
			Remedy: "change tls.acme.listen", Err: err}
	case errors.Is(err, os.ErrPermission):
		return &fault.Error{Kind: fault.Failure, Reason: where + " may not be listened on",
			Remedy: "run as root or with the capability CAP_NET_BIND_SERVICE", Err: err}
	}
	return &fault.Error{Kind: fault.Failure,
		Reason: where + " cannot be listened on: " + err.Error(),
		Remedy: "change tls.acme.listen", Err: err}
}

// innermost returns the cause at the end of a chain of errors. The wrapping
// errors name the request several times.
func innermost(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}
