package cli

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"os"

	"masquevpn/internal/config"
	"masquevpn/internal/pki"
)

// Keys makes problems of the keys of a configuration file; *config.Client and
// *config.Proxy do. Errors of the functions below name the key, its line and
// its value.
type Keys interface {
	Problem(key, reason, remedy string) *config.Error
}

// ReadNamed reads the file that a key names. A secret must not be readable by
// others.
func ReadNamed(keys Keys, key, path string, secret bool) ([]byte, error) {
	data, shared, err := ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, err
	case err != nil:
		return nil, keys.Problem(key, err.Error(), "correct the name, or put the file there")
	case secret && shared:
		return nil, keys.Problem(key, "is a secret that others can read", "chmod 600 "+path)
	}
	return data, nil
}

// ParseCertificates reads the certificates that a key holds or names.
func ParseCertificates(keys Keys, key string, data []byte) ([]*x509.Certificate, error) {
	certs, err := pki.ParseCertificates(data)
	if err != nil {
		return nil, keys.Problem(key, err.Error(), "write certificates in PEM form")
	}
	return certs, nil
}

// ParsePrivateKey reads the private key that a key of the configuration holds
// or names, and makes it and its certificates one.
func ParsePrivateKey(keys Keys, key string, data []byte,
	chain []*x509.Certificate) (tls.Certificate, error) {
	signer, err := pki.ParseKey(data)
	if err != nil {
		return tls.Certificate{}, keys.Problem(key, err.Error(),
			"write the private key of the certificate in PEM form")
	}
	if !pki.Matches(chain[0], signer) {
		return tls.Certificate{}, keys.Problem(key, "not the key of the certificate",
			"put certificate and key of one pair together")
	}
	pair := tls.Certificate{PrivateKey: signer, Leaf: chain[0]}
	for _, cert := range chain {
		pair.Certificate = append(pair.Certificate, cert.Raw)
	}
	return pair, nil
}

// Signer is the private key of a certificate that ParsePrivateKey made.
func Signer(c tls.Certificate) crypto.Signer { return c.PrivateKey.(crypto.Signer) }

// Pool makes a pool of certificates.
func Pool(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool
}

// OpenKeyLog opens the file of log.key_log, if one is named, and makes TLS
// write its secrets there. The function closes it.
func OpenKeyLog(keys Keys, path string, c *tls.Config, logger *slog.Logger) (func(), error) {
	if path == "" {
		return func() {}, nil
	}
	f, err := OpenSecret(path, os.O_WRONLY|os.O_APPEND)
	if err != nil {
		return nil, keys.Problem("log.key_log", err.Error(), "name a file that can be written")
	}
	c.KeyLogWriter = f
	logger.Warn("TLS secrets are written to a file: whoever reads it can read the traffic",
		"file", path)
	return func() { f.Close() }, nil
}
