package federation

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"masquevpn/internal/discovery"
)

// recheckInterval is how often a delegation is looked at again at least.
const recheckInterval = time.Hour

// A Peer is a domain and the proofs of it that count.
type Peer struct {
	Domain string
	// Server is where the operator says that the peer is, the zero Name without
	// that. Its host may stand for the domain.
	Server discovery.Name
	// Roots are the authorities of its certificate; nil for the system's.
	Roots *x509.CertPool
	// Pins are the SHA-256 hashes of keys (SubjectPublicKeyInfo in DER).
	Pins [][sha256.Size]byte
	// WellKnown and DNSSEC let the domain's delegation file and its signed SRV
	// records name another server.
	WellKnown, DNSSEC bool
}

// A Proof is the identity that a chain of certificates proves.
type Proof struct {
	Identity Identity
	// Name is the name in the certificate that counts; empty with Pin.
	Name string
	// Until is when the identity has to be looked at again.
	Until time.Time
	// Stale is set if the owner of the domain could not be asked, so that a
	// former answer serves.
	Stale bool
}

// Classes of Failure, for the log.
const (
	ClassMissing      = "no_credentials"
	ClassBad          = "bad_certificate"
	ClassExpired      = "expired_certificate"
	ClassNotDelegated = "not_delegated"
)

// A Failure is the reason why a chain proves nothing.
type Failure struct {
	Class string
	// Temporary is set if the owner of the domain could not be asked.
	Temporary bool
	// ChainGood is set if the certificate leads to an authority of the peer's,
	// so that a delegation to one of its names would prove the domain.
	ChainGood bool
	Err       error
}

// Error returns the reason.
func (f *Failure) Error() string { return f.Err.Error() }

// Unwrap returns f.Err.
func (f *Failure) Unwrap() error { return f.Err }

var errNoCertificate = errors.New("there is no certificate")

// VerifyChain verifies that the first certificate of chain leads to an
// authority in roots (nil for the system's), for a server or a client: public
// authorities issue certificates for servers alone.
func VerifyChain(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) error {
	if len(chain) == 0 {
		return errNoCertificate
	}
	opts := x509.VerifyOptions{Roots: roots, CurrentTime: now,
		Intermediates: x509.NewCertPool(),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}

// ServerNames returns the DNS names in a certificate, in lower case. Its common
// name is none.
func ServerNames(leaf *x509.Certificate) []string {
	var names []string
	for _, n := range leaf.DNSNames {
		if n = strings.ToLower(strings.TrimSuffix(n, ".")); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// PinOf returns the pin of a certificate's key.
func PinOf(leaf *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
}

// firstName returns the first of names that leaf is for, and reports whether
// there is one.
func firstName(leaf *x509.Certificate, names ...string) (string, bool) {
	for _, n := range names {
		if n != "" && leaf.VerifyHostname(n) == nil {
			return n, true
		}
	}
	return "", false
}

// hostOf returns the name that a certificate of the server n has, or "".
func hostOf(n discovery.Name) string {
	if a := n.Addr(); a.IsValid() {
		return a.String()
	}
	return n.Host()
}

// Direct returns the identity that chain proves by itself, without a
// delegation: a certificate for the peer's domain, or a pin. It asks for
// nothing.
func (p *Peer) Direct(chain []*x509.Certificate, now time.Time) (Proof, *Failure) {
	if len(chain) == 0 {
		return Proof{}, &Failure{Class: ClassMissing, Err: errNoCertificate}
	}
	leaf := chain[0]
	err := VerifyChain(chain, p.Roots, now)
	if err == nil {
		if name, ok := firstName(leaf, p.Domain, hostOf(p.Server)); ok {
			return Proof{Identity: Certificate, Name: name, Until: leaf.NotAfter}, nil
		}
	}
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return Proof{}, &Failure{Class: ClassExpired, Err: fmt.Errorf(
			"the certificate is valid from %s to %s", leaf.NotBefore.UTC().Format(time.RFC3339),
			leaf.NotAfter.UTC().Format(time.RFC3339))}
	}
	if slices.Contains(p.Pins, PinOf(leaf)) {
		return Proof{Identity: Pin, Until: leaf.NotAfter}, nil
	}
	if err != nil {
		class := ClassBad
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired { // an authority's
			class = ClassExpired
		}
		return Proof{}, &Failure{Class: class, Err: err}
	}
	return Proof{}, &Failure{Class: ClassNotDelegated, ChainGood: true, Err: fmt.Errorf(
		"the certificate is for %s, not for %s", nameList(leaf), p.Domain)}
}

// nameList returns the names in a certificate, for a message.
func nameList(leaf *x509.Certificate) string {
	names := ServerNames(leaf)
	if len(names) == 0 {
		return "no name"
	}
	const most = 4
	text := strings.Join(names[:min(len(names), most)], ", ")
	if len(names) > most {
		text += " and more"
	}
	return Printable(text)
}

// ByResult returns the identity of a server that discovery found for the peer's
// domain, in record r of result. It asks for nothing.
func (p *Peer) ByResult(chain []*x509.Certificate, result *discovery.Result, r *discovery.Record,
	now time.Time) (Proof, *Failure) {
	proof, failure := p.Direct(chain, now)
	if failure == nil || !failure.ChainGood {
		return proof, failure
	}
	leaf, file := chain[0], result.Delegated != discovery.Name{}
	if file && !p.WellKnown {
		return Proof{}, failure
	}
	if file {
		if name, ok := firstName(leaf, hostOf(result.Delegated)); ok {
			return Proof{Identity: WellKnown, Name: name,
				Until: until(now, leaf, result.FileUntil)}, nil
		}
	}
	if p.DNSSEC && r.Signed {
		if name, ok := firstName(leaf, r.Target); ok {
			end := result.Until
			if file && result.FileUntil.Before(end) {
				end = result.FileUntil
			}
			return Proof{Identity: DNSSEC, Name: name, Until: until(now, leaf, end)}, nil
		}
	}
	return Proof{}, failure
}

// until returns when an identity by delegation is looked at again, if the
// answer counts until end.
func until(now time.Time, leaf *x509.Certificate, end time.Time) time.Time {
	at := now.Add(recheckInterval)
	if end.Before(at) && end.After(now) {
		at = end
	}
	if leaf.NotAfter.Before(at) {
		at = leaf.NotAfter
	}
	return at
}

// A Verifier asks the owners of domains which servers may stand for them.
type Verifier struct {
	Resolver *discovery.Resolver
	Private  bool // names from the network may lead into private networks
}

// An Answer is what the owner of a domain says of the servers that may stand
// for it: by its delegation file, and by signed SRV records. Only the ways that
// count for the peer were asked.
type Answer struct{ File, SRV discovery.Delegation }

// Ask asks the owner of the peer's domain, as far as p allows delegations.
func (v *Verifier) Ask(ctx context.Context, p *Peer) Answer {
	var a Answer
	name, err := discovery.ParseName(p.Domain)
	if err != nil {
		return a
	}
	q := discovery.Query{Name: name, Purpose: discovery.Peer, Private: v.Private,
		Transports: []discovery.Transport{discovery.H3}, DNSSEC: discovery.DNSSECUse}
	var asking sync.WaitGroup
	if p.WellKnown {
		asking.Go(func() { a.File = v.Resolver.DelegatedByFile(ctx, q) })
	}
	if p.DNSSEC {
		asking.Go(func() { a.SRV = v.Resolver.DelegatedBySRV(ctx, q) })
	}
	asking.Wait()
	return a
}

// ByAnswer returns the identity that a delegation gives to chain, after Direct
// failed with failure.
func (p *Peer) ByAnswer(chain []*x509.Certificate, a Answer, failure *Failure,
	now time.Time) (Proof,
	*Failure) {
	if !failure.ChainGood {
		return Proof{}, failure
	}
	failed := &Failure{Class: failure.Class, ChainGood: true, Err: failure.Err}
	for _, way := range []struct {
		allowed  bool
		identity Identity
		name     string
		said     discovery.Delegation
	}{
		{p.WellKnown, WellKnown, "delegation file", a.File},
		{p.DNSSEC, DNSSEC, "signed SRV records", a.SRV},
	} {
		if !way.allowed {
			continue
		}
		if name, ok := firstName(chain[0], way.said.Names...); ok {
			return Proof{Identity: way.identity, Name: name, Stale: way.said.Temporary,
				Until: until(now, chain[0], way.said.Until)}, nil
		}
		failed.Temporary = failed.Temporary || way.said.Temporary
		failed.Err = fmt.Errorf("%w (%s: %s)", failed.Err, way.name, way.said.Status)
	}
	return Proof{}, failed
}

// Delegable reports whether the owner of the peer's domain could still give
// chain an identity, after Direct failed with f.
func (p *Peer) Delegable(f *Failure) bool { return f.ChainGood && (p.WellKnown || p.DNSSEC) }

// Identify returns the identity that chain proves for p: by itself, or by
// delegation.
func (v *Verifier) Identify(ctx context.Context, p *Peer, chain []*x509.Certificate) (Proof,
	*Failure) {
	proof, failure := p.Direct(chain, v.Resolver.Now())
	if failure == nil || !p.Delegable(failure) {
		return proof, failure
	}
	return p.ByAnswer(chain, v.Ask(ctx, p), failure, v.Resolver.Now())
}

// Equal reports whether the same proofs count for p and o.
func (p *Peer) Equal(o *Peer) bool {
	sameRoots := p.Roots == o.Roots || p.Roots != nil && o.Roots != nil && p.Roots.Equal(o.Roots)
	return sameRoots && p.Domain == o.Domain && p.Server == o.Server &&
		p.WellKnown == o.WellKnown && p.DNSSEC == o.DNSSEC && slices.Equal(p.Pins, o.Pins)
}
