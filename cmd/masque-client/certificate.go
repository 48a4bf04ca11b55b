package main

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"

	"masquevpn/internal/certs"
)

// renewal is the remedy for a certificate of the client that expires.
const renewal = "ask the operator of the proxy for a new invitation"

// follow makes each new session present the current contents of tls.cert and
// tls.key.
func (l *loaded) follow(logger *slog.Logger) {
	if l.pair == nil {
		return
	}
	l.reloader = certs.NewReloader(l.pair, logger)
	l.config.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate,
		error) {
		return &l.reloader.Current().Certificate, nil
	}
}

// leaf returns the client's current certificate, nil if it has none.
func (l *loaded) leaf() *x509.Certificate {
	switch {
	case l.reloader != nil:
		return l.reloader.Current().Leaf
	case len(l.chain) > 0:
		return l.chain[0]
	}
	return nil
}
