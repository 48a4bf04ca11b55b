package main

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"

	"masquevpn/internal/certs"
)

// renewal is what to do about the client's own certificate when it ends.
const renewal = "ask the operator of the proxy for a new invitation"

// follow has each new session present tls.cert and tls.key as they are then.
func (l *loaded) follow(logger *slog.Logger) {
	if l.pair == nil {
		return
	}
	l.watch = certs.NewReloader(l.pair, logger)
	l.config.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate,
		error) {
		return &l.watch.Current().Certificate, nil
	}
}

// leaf is the client's own certificate as it is now; nil if it has none.
func (l *loaded) leaf() *x509.Certificate {
	switch {
	case l.watch != nil:
		return l.watch.Current().Leaf
	case len(l.chain) > 0:
		return l.chain[0]
	}
	return nil
}
