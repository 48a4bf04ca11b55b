package doctor

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"time"

	"masquevpn/internal/certs"
	"masquevpn/internal/pki"
)

// Credential is a certificate and its requirements.
type Credential struct {
	Label   string              // such as tls.cert
	Chain   []*x509.Certificate // leaf first
	Key     crypto.Signer       // the key of the leaf; nil: not checked
	Name    string              // required name of a server; empty: not checked
	Usage   x509.ExtKeyUsage    // required usage; ExtKeyUsageAny: not checked
	Renewal string              // remedy for a certificate that expires
}

// Certificate checks validity, key, name and usage of a certificate. A wrong
// clock shows here too.
func (c *Report) Certificate(cred Credential, now time.Time) {
	leaf := cred.Chain[0]
	const clock = "check this host's clock (timedatectl)"
	switch {
	case cred.Key != nil && !pki.Matches(leaf, cred.Key):
		c.Fail(cred.Label+": the key belongs to another certificate",
			"put certificate and key of one pair together")
		return
	case now.Before(leaf.NotBefore):
		c.Fail(fmt.Sprintf("%s: valid only from %s, and it is %s here", cred.Label,
			leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)), clock)
		return
	case now.After(leaf.NotAfter):
		c.Fail(fmt.Sprintf("%s: ended on %s, and it is %s here", cred.Label,
			leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)),
			cred.Renewal+"; or "+clock)
		return
	case cred.Name != "" && leaf.VerifyHostname(cred.Name) != nil:
		c.Fail(fmt.Sprintf("%s: not for the name %s", cred.Label, cred.Name),
			"correct the name, or get a certificate for it")
		return
	case !allows(leaf, cred.Usage):
		c.Fail(cred.Label+": not valid for this use",
			"get a certificate with the right extended key usage")
		return
	case certs.ExpiresSoon(leaf, now):
		c.Warn(fmt.Sprintf("%s: ends on %s", cred.Label, leaf.NotAfter.Format(time.DateOnly)),
			cred.Renewal)
		return
	}
	c.OK("%s: valid until %s", cred.Label, leaf.NotAfter.Format(time.DateOnly))
}

// allows reports whether cert may be used for usage.
func allows(cert *x509.Certificate, usage x509.ExtKeyUsage) bool {
	if usage == x509.ExtKeyUsageAny ||
		len(cert.ExtKeyUsage) == 0 && len(cert.UnknownExtKeyUsage) == 0 {
		return true
	}
	for _, u := range cert.ExtKeyUsage {
		if u == usage || u == x509.ExtKeyUsageAny {
			return true
		}
	}
	return false
}
