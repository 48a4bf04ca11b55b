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

// acmeConfig is [tls.acme] with its defaults, and what it refers to.
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

// resetKey is the key of stateless resets (RFC 9000 section 10.3), the same
// after a restart. Files keep their private key when the certificate is
// renewed, and it comes from that; ACME does not, and a secret is kept beside
// its account.
func (l *loaded) resetKey() (*[32]byte, error) {
	if l.acme == nil {
		return pki.ResetKey(certs.Signer(l.pair.Certificate))
	}
	path := filepath.Join(l.acme.Storage, "reset.key")
	storage := func(err error) error {
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
			return nil, storage(err)
		}
		err = files.Create(path, text, 0o600)
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return nil, err
	}
	if err != nil {
		return nil, storage(err)
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(key) != 32 {
		return nil, fault.Errorf(fault.Usage,
			"%s is not 32 bytes in hexadecimal: remove it, and it is made anew", path)
	}
	return (*[32]byte)(key), nil
}

// certificateSource is where the certificate comes from, for people.
func (l *loaded) certificateSource() string {
	if l.acme != nil {
		return l.acme.Directory
	}
	return l.file.Cert
}

// renewal is what to do about a certificate that ends.
func (l *loaded) renewal() string {
	if l.acme != nil {
		return "the log says why it is not renewed; when that is mended: " + program + " reload"
	}
	return program + " init --renew DIR, or what made it"
}

// certificate is what new connections use; nil as long as ACME has got none.
func (d *process) certificate() *tls.Certificate {
	if d.acme != nil {
		return d.acme.Certificate()
	}
	return &d.pair.Pair().Certificate
}

// starting says that the proxy is not ready yet, and why.
func (d *process) starting() string {
	if why := d.waiting(); why != "" {
		return "the proxy is still starting: " + why
	}
	return "the proxy is still starting"
}

// waiting says why there is no certificate yet; "" when there is one.
func (d *process) waiting() string {
	if d.certificate() != nil {
		return ""
	}
	s := d.acme.Status()
	if s.Problem == nil {
		return "the first certificate is being obtained"
	}
	return fmt.Sprintf("no certificate yet, tried again at %s: %v", s.Next.Format(time.TimeOnly),
		s.Problem)
}

// certificateUntil is when the certificate of new connections ends; zero if
// there is none yet.
func (d *process) certificateUntil() time.Time {
	if c := d.certificate(); c != nil {
		return c.Leaf.NotAfter
	}
	return time.Time{}
}

// until is the end of a certificate for the log.
func until(t time.Time) any {
	if t.IsZero() {
		return "none yet"
	}
	return t
}

// lookAtCertificate uses files that have changed, and warns of a certificate
// that ends.
func (d *process) lookAtCertificate() {
	if d.pair != nil {
		d.pair.Check()
	}
	if c := d.certificate(); c != nil {
		d.expiry.Check(c.Leaf, time.Now())
	}
}

// certificateStatus is the proxy's certificate in its status.
type certificateStatus struct {
	Until   time.Time  `json:"until"`             // its NotAfter
	From    string     `json:"from"`              // a file, or the directory of an ACME server
	Problem string     `json:"problem,omitempty"` // why it is not renewed
	Next    *time.Time `json:"next,omitempty"`    // when that is tried again
}

// certificateStatus describes the certificate, which is there.
func (d *process) certificateStatus() certificateStatus {
	s := certificateStatus{Until: d.certificateUntil(), From: d.loaded.certificateSource()}
	if d.acme != nil {
		if a := d.acme.Status(); a.Problem != nil {
			s.Problem, s.Next = a.Problem.Error(), &a.Next
		}
	}
	return s
}
