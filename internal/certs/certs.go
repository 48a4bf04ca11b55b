// Package certs reads certificates and private keys from files, reads them
// again when the files change, and warns before a certificate expires.
package certs

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"

	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
)

// Parse parses the certificates that a configuration key holds or names. The
// error is a *fault.Error with the key.
func Parse(key string, data []byte) ([]*x509.Certificate, error) {
	certs, err := pki.ParseCertificates(data)
	if err != nil {
		return nil, &fault.Error{Kind: fault.Usage, Key: key, Reason: err.Error(),
			Remedy: "write certificates in PEM form", Err: err}
	}
	return certs, nil
}

// ParseKey parses the private key that a configuration key holds or names, and
// returns it with its certificates. The error is a *fault.Error with the key.
func ParseKey(key string, data []byte, chain []*x509.Certificate) (tls.Certificate, error) {
	signer, err := pki.ParseKey(data)
	if err != nil {
		return tls.Certificate{}, &fault.Error{Kind: fault.Usage, Key: key, Reason: err.Error(),
			Remedy: "write the private key of the certificate in PEM form", Err: err}
	}
	if !pki.Matches(chain[0], signer) {
		return tls.Certificate{}, &fault.Error{Kind: fault.Usage, Key: key,
			Reason: "not the key of the certificate",
			Remedy: "put certificate and key of one pair together"}
	}
	cert := tls.Certificate{PrivateKey: signer, Leaf: chain[0]}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}

// Signer returns the private key of a certificate that ParseKey returned.
func Signer(c tls.Certificate) crypto.Signer { return c.PrivateKey.(crypto.Signer) }

// Pool returns a pool of the certificates.
func Pool(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool
}

// Locator adds to an error about a configuration key its place in the file.
// *config.Client and *config.Proxy implement it.
type Locator interface {
	Locate(error) error
}

// KeyPair is a certificate with its private key from the files that tls.cert
// and tls.key name. It is immutable.
type KeyPair struct {
	tls.Certificate
	Chain []*x509.Certificate // leaf first

	config            Locator
	certFile, keyFile string
	version           pairVersion
}

// pairVersion identifies a state of the two files.
type pairVersion struct{ cert, key files.Version }

// ReadKeyPair reads the files of tls.cert and tls.key. Errors have their place
// in config.
func ReadKeyPair(config Locator, certFile, keyFile string) (*KeyPair, error) {
	p := &KeyPair{config: config, certFile: certFile, keyFile: keyFile}
	p.version = p.currentVersion() // before reading, so that no change is missed
	if err := p.read(); err != nil {
		return nil, config.Locate(err)
	}
	return p, nil
}

func (p *KeyPair) read() error {
	cert, err := files.ReadNamed("tls.cert", p.certFile, false)
	if err != nil {
		return err
	}
	if p.Chain, err = Parse("tls.cert", cert); err != nil {
		return err
	}
	key, err := files.ReadNamed("tls.key", p.keyFile, true)
	if err != nil {
		return err
	}
	p.Certificate, err = ParseKey("tls.key", key, p.Chain)
	return err
}

// currentVersion returns the version of the files as they are now.
func (p *KeyPair) currentVersion() pairVersion {
	cert, _ := files.VersionOf(p.certFile)
	key, _ := files.VersionOf(p.keyFile)
	return pairVersion{cert, key}
}
