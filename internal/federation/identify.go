package federation

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"masquevpn/internal/discovery"
)

// recheck is the longest time for which a delegation is believed before it is
// looked up again.
const recheck = time.Hour

// A Trust is what an owner believes about the servers of a domain.
type Trust struct {
	Domain string
	// Server is the host that the owner named in place of discovery; "" for
	// none. A certificate for it proves the domain.
	Server string
	// Roots are the authorities of certificates; nil for the system's.
	Roots *x509.CertPool
	// Pins are the SHA-256 hashes of public keys (SubjectPublicKeyInfo) that
	// were exchanged beforehand.
	Pins [][sha256.Size]byte
	// WellKnown lets the domain's delegation file name a server with another
	// name, and DNSSEC a signed SRV record.
	WellKnown, DNSSEC bool
}

// A Finder resolves the domain of a Trust as a peer, with the given method.
type Finder func(ctx context.Context, m discovery.Method) (*discovery.Result, error)

// A Proof is the outcome of Identify.
type Proof struct {
	Identity Identity
	// Until is when the identity has to be looked at again: the end of the
	// certificate, or of the delegation.
	Until time.Time
}

// Classes of refusals, for logs and metrics.
const (
	ClassUnknownPeer  = "unknown_peer"
	ClassBad          = "bad_certificate"
	ClassExpired      = "expired_certificate"
	ClassNotDelegated = "not_delegated"
	ClassWeak         = "weak_identity"
	ClassOtherKey     = "other_key"
)

// A Refusal says why a server has no strong identity. It has no secret.
type Refusal struct {
	Class  string
	Reason string
	// Temporary is set if a lookup failed, so that the identity is not known.
	Temporary bool
}

// Error returns the reason.
func (r *Refusal) Error() string { return r.Reason }

// Identify finds the strongest identity of the far end of a connection, which
// presented a chain of certificates. Proofs are tried in this order: the
// certificate itself, a pinned key, the domain's delegation file, and a signed
// SRV record. find is called for the latter two alone; it may be nil if neither
// is allowed. The error is a *Refusal.
func (t *Trust) Identify(ctx context.Context, chain []*x509.Certificate, now time.Time,
	find Finder) (Proof, error) {
	if len(chain) == 0 {
		return Proof{}, &Refusal{Class: ClassBad, Reason: "the far end has no certificate"}
	}
	leaf := chain[0]
	proof := Proof{Until: leaf.NotAfter}
	invalid := verify(chain, t.Roots, now)
	if invalid == nil && t.isFor(leaf) {
		proof.Identity = Certificate
		return proof, nil
	}
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return Proof{}, &Refusal{Class: ClassExpired, Reason: fmt.Sprintf(
			"the certificate is valid from %s to %s", date(leaf.NotBefore), date(leaf.NotAfter))}
	}
	if slices.Contains(t.Pins, Fingerprint(leaf)) {
		proof.Identity = Pin
		return proof, nil
	}
	if invalid != nil {
		return Proof{}, &Refusal{Class: ClassBad,
			Reason: fmt.Sprintf("the certificate for %s does not verify: %v", names(leaf), invalid)}
	}
	return t.delegated(ctx, leaf, proof, now, find)
}

// isFor reports whether a certificate is for the domain itself, or for the host
// that the owner named.
func (t *Trust) isFor(leaf *x509.Certificate) bool {
	return leaf.VerifyHostname(t.Domain) == nil ||
		t.Server != "" && leaf.VerifyHostname(t.Server) == nil
}

// delegated looks for a delegation of the domain to a name of a good
// certificate.
func (t *Trust) delegated(ctx context.Context, leaf *x509.Certificate, proof Proof, now time.Time,
	find Finder) (Proof, error) {
	var failed error
	if t.WellKnown {
		r, err := find(ctx, discovery.Auto)
		if host, until := delegatedHost(r, err); host != "" && leaf.VerifyHostname(host) == nil {
			proof.Identity, proof.Until = WellKnown, t.until(leaf, until, now)
			return proof, nil
		}
		failed = fileFailure(r, err)
	}
	if t.DNSSEC {
		r, err := find(ctx, discovery.DNSOnly)
		if err == nil && slices.ContainsFunc(r.Groups, func(g discovery.Group) bool {
			return slices.ContainsFunc(g.Records, func(rec discovery.Record) bool {
				return rec.Signed && leaf.VerifyHostname(rec.Target) == nil
			})
		}) {
			proof.Identity, proof.Until = DNSSEC, t.until(leaf, r.Until, now)
			return proof, nil
		}
		if e, ok := errors.AsType[*discovery.Error](err); err != nil &&
			(!ok || e.Code == discovery.DNSFailure) {
			failed = err
		}
	}
	refusal := &Refusal{Class: ClassNotDelegated,
		Reason: fmt.Sprintf("the certificate is for %s, and %s does not delegate to it",
			names(leaf), t.Domain)}
	if failed != nil {
		refusal.Temporary = true
		refusal.Reason += fmt.Sprintf(" as far as is known (%v)", failed)
	}
	return Proof{}, refusal
}

// delegatedHost returns the host that a delegation file names, or "", and the
// end of the file's lifetime, if it is known. A file that leads nowhere at the
// moment names its host all the same.
func delegatedHost(r *discovery.Result, err error) (string, time.Time) {
	if err == nil {
		return r.Delegated.Host(), r.FileUntil
	}
	if e, ok := errors.AsType[*discovery.Error](err); ok {
		return e.Delegated.Host(), time.Time{}
	}
	return "", time.Time{}
}

// fileFailure returns the temporary failure that kept the delegation file from
// being read, or nil.
func fileFailure(r *discovery.Result, err error) error {
	status, unknown := "", false
	if e, ok := errors.AsType[*discovery.Error](err); ok {
		status, unknown = e.WellKnown, e.FileUnknown
	} else if err != nil {
		return err
	} else {
		status, unknown = r.WellKnown, r.FileUnknown
	}
	if !unknown {
		return nil
	}
	return errors.New("its delegation file: " + status)
}

// until returns when a delegation is looked up again.
func (t *Trust) until(leaf *x509.Certificate, answer, now time.Time) time.Time {
	until := now.Add(recheck)
	for _, other := range []time.Time{leaf.NotAfter, answer} {
		if !other.IsZero() && other.Before(until) {
			until = other
		}
	}
	return until
}

// Fingerprint returns the SHA-256 hash of a certificate's public key.
func Fingerprint(c *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(c.RawSubjectPublicKeyInfo)
}

// verify verifies a chain for the use at either end of a connection: public
// authorities issue certificates for servers alone.
func verify(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) error {
	opts := x509.VerifyOptions{Roots: roots, CurrentTime: now, Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}

// names returns the names of a certificate for a message.
func names(c *x509.Certificate) string {
	if len(c.DNSNames) == 0 {
		return "no name"
	}
	return strings.Join(c.DNSNames[:min(len(c.DNSNames), 3)], ", ")
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }
