package dial

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/discovery"
)

// tlsConfig returns the configuration for a handshake with the server of a
// record. The name that the server proves is written to name.
func (d *Dialer) tlsConfig(r *discovery.Record, name *string) *tls.Config {
	t := &tls.Config{}
	if d.TLS != nil {
		t = d.TLS.Clone()
	}
	t.ServerName = r.SNI
	t.NextProtos = []string{http3.NextProtoH3}
	t.MinVersion = tls.VersionTLS13
	// VerifyConnection replaces the verification, as a server may have to prove
	// one of two names, and its name may be no SNI.
	t.InsecureSkipVerify = true
	t.VerifyConnection = func(s tls.ConnectionState) (err error) {
		if d.Verify != nil {
			*name, err = d.Verify(s, r)
			return err
		}
		*name, err = VerifyServer(s.PeerCertificates, r.Verify, t.RootCAs, d.now())
		return err
	}
	if len(t.Certificates) > 0 && t.GetClientCertificate == nil {
		// Without this, a certificate of an authority that the server does not
		// name is silently left out, and the server's refusal says nothing of
		// it.
		cert := t.Certificates[0]
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &cert, nil
		}
	}
	return t
}

// now returns the time by which certificates are judged.
func (d *Dialer) now() time.Time {
	if d.TLS != nil && d.TLS.Time != nil {
		return d.TLS.Time()
	}
	return time.Now()
}

// VerifyServer verifies a chain of certificates for one of names, and returns
// the first of them that it is for. roots are the authorities, nil for the
// system's. The error is a *tls.CertificateVerificationError, that of the first
// name.
func VerifyServer(chain []*x509.Certificate, names []string, roots *x509.CertPool, now time.Time) (
	string, error) {
	var first error
	for _, name := range names {
		err := verifyName(chain, name, roots, now)
		if err == nil {
			return name, nil
		}
		if first == nil {
			first = err
		}
	}
	return "", &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: first}
}

// verifyName verifies a chain for one name.
func verifyName(chain []*x509.Certificate, name string, roots *x509.CertPool, now time.Time) error {
	opts := x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: now,
		Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}
