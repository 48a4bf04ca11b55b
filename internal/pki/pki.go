// Package pki makes the credentials of a small installation: a certificate
// authority, the proxy's certificate, and certificates and tokens for users. It
// reads and writes PEM in memory, no files.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// Validity of certificates.
const (
	AuthorityValidity = 10 * 365 * 24 * time.Hour
	ServerValidity    = 2 * 365 * 24 * time.Hour
	ClientValidity    = 365 * 24 * time.Hour
)

// backdate makes certificates valid for peers whose clocks are slow.
const backdate = time.Hour

// Pair is a certificate with its private key, both in PEM. Key is PKCS #8 and
// secret.
type Pair struct {
	Cert, Key []byte
}

// Authority signs certificates.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewAuthority makes an authority with a new key and a self-signed certificate.
func NewAuthority(name string, now time.Time) (*Authority, Pair, error) {
	key, err := newKey()
	if err != nil {
		return nil, Pair{}, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(AuthorityValidity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a := &Authority{cert: template, key: key}
	pair, err := a.sign(template, key)
	if err != nil {
		return nil, Pair{}, err
	}
	a, err = ParseAuthority(pair)
	return a, pair, err
}

// ParseAuthority reads an authority's certificate and key.
func ParseAuthority(p Pair) (*Authority, error) {
	certs, err := ParseCertificates(p.Cert)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	key, err := ParseKey(p.Key)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	cert := certs[0]
	if !cert.IsCA {
		return nil, errors.New("the certificate does not belong to an authority")
	}
	if !Matches(cert, key) {
		return nil, errors.New("the key does not belong to the certificate")
	}
	return &Authority{cert: cert, key: key}, nil
}

// Server issues the certificate of a server. The host is a domain name or an IP
// address. A nil key makes a new one; a renewal passes the existing key.
func (a *Authority) Server(host string, key crypto.Signer, now time.Time) (Pair, error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: host},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if len(host) > 64 { // maximum length of a common name, which clients ignore
		template.Subject.CommonName = ""
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{strings.TrimSuffix(host, ".")}
	}
	return a.issue(template, key, now, ServerValidity)
}

// Client issues the certificate of a user, with the user's name as common name.
// It does not outlive the authority's certificate.
func (a *Authority) Client(user string, now time.Time, validity time.Duration) (Pair, error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: user},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	return a.issue(template, nil, now, validity)
}

func (a *Authority) issue(template *x509.Certificate, key crypto.Signer, now time.Time,
	validity time.Duration) (Pair, error) {
	if !now.Before(a.cert.NotAfter) {
		return Pair{}, fmt.Errorf("the authority's own certificate ended on %s",
			a.cert.NotAfter.Format(time.DateOnly))
	}
	if key == nil {
		var err error
		if key, err = newKey(); err != nil {
			return Pair{}, err
		}
	}
	template.NotBefore = now.Add(-backdate)
	template.NotAfter = now.Add(validity)
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	return a.sign(template, key)
}

func (a *Authority) sign(template *x509.Certificate, key crypto.Signer) (Pair, error) {
	// CreateCertificate chooses a random serial number.
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return Pair{}, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Pair{}, err
	}
	return Pair{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
	}, nil
}

func newKey() (crypto.Signer, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// ParseCertificates reads one or more certificates and refuses other blocks.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %s where certificates belong", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("holds no certificate in PEM form")
	}
	return certs, nil
}

// ParseKey reads a private key: PKCS #8, or the older forms of RSA and EC.
func ParseKey(data []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, errors.New("holds no private key in PEM form")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			err = errors.New("the private key is encrypted, which is not supported")
		default: // such as EC PARAMETERS
			continue
		}
		if err != nil {
			return nil, err
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a %T cannot sign", key)
		}
		return signer, nil
	}
}

// Matches reports whether key is the private key of the certificate.
func Matches(cert *x509.Certificate, key crypto.Signer) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(cert.PublicKey)
}

// Fingerprint returns the SHA-256 of the whole certificate.
func Fingerprint(cert *x509.Certificate) [32]byte {
	return sha256.Sum256(cert.Raw)
}

// NewToken returns a token of 256 random bits, in characters permitted in a
// bearer token (RFC 6750 section 2.1).
func NewToken() string {
	var b [32]byte
	rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// HashToken returns the stored form of a token. A plain hash suffices because
// tokens are random.
func HashToken(token string) [32]byte {
	return sha256.Sum256([]byte(token))
}

// ResetKey derives the key of QUIC's stateless resets (RFC 9000 section 10.3)
// from the server's private key, so that it survives a restart without another
// file. HKDF is one-way and reveals nothing about the private key.
func ResetKey(key crypto.Signer) (*[32]byte, error) {
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	derived, err := hkdf.Key(sha256.New, secret, nil, "masque stateless reset key", 32)
	if err != nil {
		return nil, err
	}
	return (*[32]byte)(derived), nil
}
