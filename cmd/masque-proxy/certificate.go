package main

import (
	"cmp"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"masquevpn/internal/acme"
	"masquevpn/internal/certs"
	"masquevpn/internal/config"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
)

// acmeConfig returns [tls.acme] with its defaults and the authority that it
// names.
func acmeConfig(f *config.Proxy, logger *slog.Logger) (*acme.Config, error) {
	challenge := acme.Challenge(f.ACME.Challenge)
	c := &acme.Config{
		Name:      strings.TrimSuffix(f.Name, "."),
		Directory: cmp.Or(f.ACME.Directory, acme.LetsEncrypt), Email: f.ACME.Email,
		Challenge: challenge, Listen: cmp.Or(f.ACME.Listen, challenge.Listen()),
		Storage: f.ACME.Storage, Logger: logger,
	}
	if f.ACME.CA != "" {
		data, err := files.ReadNamed("tls.acme.ca", f.ACME.CA, false)
		if err != nil {
			return nil, err
		}
		roots, err := certs.Parse("tls.acme.ca", data)
		if err != nil {
			return nil, err
		}
		c.Roots = certs.Pool(roots)
	}
	return c, nil
}

// resetKey returns the key for stateless resets (RFC 9000 section 10.3), which
// is the same after a restart. It is derived from the private key of the
// certificate if that is in a file: a renewal keeps the key. ACME does not, so
// there the key comes from a secret in the folder of the account.
func (l *loaded) resetKey() (*[32]byte, error) {
	if l.acme == nil {
		return pki.ResetKey(certs.Signer(l.pair.Certificate))
	}
	path := filepath.Join(l.acme.Storage, "reset.key")
	storageError := func(err error) error {
		kind := fault.Failure
		if errors.Is(err, fs.ErrPermission) {
			kind = fault.Privileges
		}
		return &fault.Error{Kind: kind, Key: "tls.acme.storage", Reason: err.Error(),
			Remedy: "make it a folder of the user that the proxy runs as, or change it"}
	}
	text, err := files.ReadSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		var secret [32]byte
		rand.Read(secret[:]) // never fails
		text = []byte(hex.EncodeToString(secret[:]) + "\n")
		if err := os.MkdirAll(l.acme.Storage, 0o700); err != nil {
			return nil, storageError(err)
		}
		err = files.Create(path, text, 0o600)
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return nil, err
	}
	if err != nil {
		return nil, storageError(err)
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(key) != 32 {
		return nil, fault.Errorf(fault.Usage,
			"%s is not 32 bytes in hexadecimal: remove it, and the proxy creates another one", path)
	}
	return (*[32]byte)(key), nil
}

// certificateSource returns the origin of the certificate, for people.
func (l *loaded) certificateSource() string {
	if l.acme != nil {
		return l.acme.Directory
	}
	return l.file.Cert
}

// renewal returns the remedy for a certificate that expires.
func (l *loaded) renewal() string {
	if l.acme != nil {
		return "the log says why it is not renewed; when that is mended: " + program + " reload"
	}
	return program + " init --renew DIR, or what made it"
}

// certificate returns the certificate for new connections, nil if ACME has not
// obtained one yet.
func (p *process) certificate() *tls.Certificate {
	if p.acme != nil {
		return p.acme.Certificate()
	}
	return &p.pair.Pair().Certificate
}

// starting describes a proxy that is not ready yet.
func (p *process) starting() string {
	if why := p.waiting(); why != "" {
		return "the proxy is still starting: " + why
	}
	return "the proxy is still starting"
}

// waiting returns the reason for a missing certificate, "" if there is one.
func (p *process) waiting() string {
	if p.certificate() != nil {
		return ""
	}
	s := p.acme.Status()
	if s.Problem == nil {
		return "the first certificate is being obtained"
	}
	return fmt.Sprintf("no certificate yet, tried again at %s: %v", s.Next.Format(time.TimeOnly),
		s.Problem)
}

// certificateUntil returns the end of the certificate for new connections, zero
// if there is none yet.
func (p *process) certificateUntil() time.Time {
	if c := p.certificate(); c != nil {
		return c.Leaf.NotAfter
	}
	return time.Time{}
}

// until formats the end of a certificate for the log.
func until(t time.Time) any {
	if t.IsZero() {
		return "none yet"
	}
	return t
}

// checkCertificate reads changed files, and warns of a certificate that
// expires.
func (p *process) checkCertificate() {
	if p.pair != nil {
		p.pair.Check()
	}
	if c := p.certificate(); c != nil {
		p.expiry.Check(c.Leaf, time.Now())
	}
}

// certificateStatus describes the certificate in the status of the proxy.
type certificateStatus struct {
	Until   time.Time  `json:"until"`             // NotAfter
	From    string     `json:"from"`              // a file, or the directory of an ACME server
	Problem string     `json:"problem,omitempty"` // reason for a failed renewal
	Next    *time.Time `json:"next,omitempty"`    // time of the next attempt
}

// certificateStatus returns the status of the certificate, which must exist.
func (p *process) certificateStatus() certificateStatus {
	s := certificateStatus{Until: p.certificateUntil(), From: p.loaded.certificateSource()}
	if p.acme != nil {
		if a := p.acme.Status(); a.Problem != nil {
			s.Problem, s.Next = a.Problem.Error(), &a.Next
		}
	}
	return s
}
