// Package pkitest makes the certificates of a proxy and its users for tests.
// Its functions panic when they fail, because only a fault of package pki makes
// them fail.
package pkitest

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"masquevpn/internal/pki"
)

// Installation holds a certificate authority and the certificate that it issued
// to a proxy.
type Installation struct {
	Authority *pki.Authority
	CA        pki.Pair        // certificate and key of the authority
	Roots     *x509.CertPool  // holds the authority's certificate
	Proxy     tls.Certificate // the proxy's certificate
}

// New returns an installation whose proxy has the given name.
func New(name string) Installation {
	authority, ca, err := pki.NewAuthority("test CA", time.Now())
	if err != nil {
		panic(err)
	}
	in := Installation{Authority: authority, CA: ca, Roots: x509.NewCertPool()}
	if !in.Roots.AppendCertsFromPEM(ca.Cert) {
		panic("the authority has no certificate")
	}
	server, err := authority.Server(name, nil, time.Now())
	if err != nil {
		panic(err)
	}
	in.Proxy = KeyPair(server)
	return in
}

// KeyPair returns p in the form that package tls uses.
func KeyPair(p pki.Pair) tls.Certificate {
	c, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		panic(err)
	}
	return c
}
