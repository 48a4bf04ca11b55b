package proxy

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"masquevpn/internal/connectip"
	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
)

const (
	// maxPeers and maxOwnDomains limit Config.Peers and Federation.Domains.
	maxPeers, maxOwnDomains = 256, 16
)

// Federation is what the proxies of other owners know of this one, and how
// their identity is found.
type Federation struct {
	// Domains are the domains that this proxy stands for, in lower case without
	// a final dot. The default is Config.Name if it is the name of a host.
	Domains []string

	// CA has the authorities of peers; nil for the system's.
	CA *x509.CertPool

	// DNSSEC says what signatures of DNS answers are for.
	DNSSEC discovery.DNSSEC

	// Private allows peers to be in private networks.
	Private bool

	// Resolver asks for delegations by the domains of peers. It is required if
	// a peer may be delegated. Its cache lasts until Reload replaces it.
	Resolver *discovery.Resolver
}

// Peer is a domain of another owner whose networks are linked with networks of
// this proxy.
type Peer struct {
	// Domain is the peer's domain, in lower case without a final dot.
	Domain string

	// Local is the domain of Federation.Domains that it is linked with. The
	// default is the first.
	Local string

	// Networks are the networks that the peer may advertise and send from.
	Networks []netip.Prefix

	// Reach are the networks of this proxy that the peer is told of and may
	// send to.
	Reach []netip.Prefix

	// Policy is the identity that the peer has to have.
	Policy federation.Policy

	// WellKnown and DNSSEC let the delegation file of the domain, and its
	// signed SRV records, name a server that stands for it.
	WellKnown, DNSSEC bool

	// Pins are the SHA-256 hashes of the peer's keys (SubjectPublicKeyInfo in
	// DER), which need no authority.
	Pins [][sha256.Size]byte

	// CA replaces Federation.CA for this peer, unless it is nil.
	CA *x509.CertPool

	// Connect makes the proxy connect to the peer, instead of waiting for it.
	Connect bool

	// Server is where the peer is; the zero Name if discovery finds it.
	Server discovery.Name

	// Dialback lets the peer prove its domain by a connection back to it, which
	// is weak.
	Dialback bool

	// RateUp and RateDown limit the IP packets from and to the peer, in bits
	// per second. 0 means no limit.
	RateUp, RateDown int64

	// Expires is the wall clock time at which the link ends. Zero means never.
	Expires time.Time
}

// expired reports whether the link with p has ended at the time now. Only the
// wall clock counts, because Expires has no monotonic clock.
func (p *Peer) expired(now time.Time) bool { return !p.Expires.IsZero() && !now.Before(p.Expires) }

// proofs returns the proofs of the peer's domain that count.
func (p *Peer) proofs(f *Federation) *federation.Peer {
	proofs := &federation.Peer{Domain: p.Domain, Server: p.Server, Roots: p.CA, Pins: p.Pins,
		WellKnown: p.WellKnown, DNSSEC: p.DNSSEC}
	if proofs.Roots == nil {
		proofs.Roots = f.CA
	}
	return proofs
}

// pairKey names a pair: the domain of a peer and one of the proxy's own.
type pairKey struct{ domain, local string }

// checkFederation checks c.Federation and c.Peers, and sets their defaults.
func (c *Config) checkFederation() error {
	if n, err := discovery.ParseName(c.Name); len(c.Federation.Domains) == 0 && err == nil &&
		n.Host() != "" && n.Port() == 0 {
		c.Federation.Domains = []string{n.Host()}
	}
	if n := len(c.Federation.Domains); n > maxOwnDomains {
		return usage("federation.domains", "%d domains, and %d are possible", n, maxOwnDomains)
	}
	for i, d := range c.Federation.Domains {
		if name, ok := federation.ParseDomain(d); !ok || name != d {
			return usage(fmt.Sprintf("federation.domains[%d]", i), "%q is not a domain name", d)
		}
	}
	if len(c.Peers) > maxPeers {
		return usage("peer", "%d peers, and %d are possible", len(c.Peers), maxPeers)
	}
	c.Peers = slices.Clone(c.Peers)
	seen := make(map[pairKey]bool)
	for i := range c.Peers {
		p := &c.Peers[i]
		if p.Local == "" && len(c.Federation.Domains) > 0 {
			p.Local = c.Federation.Domains[0]
		}
		if err := c.checkPeer(p, peerKey(i)); err != nil {
			return err
		}
		if k := (pairKey{p.Domain, p.Local}); seen[k] {
			return usage(peerKey(i)("domain"),
				"%q has a [[peer]] with %q already: write all of its networks there", p.Domain,
				p.Local)
		} else {
			seen[k] = true
		}
		if err := c.checkOverlap(i); err != nil {
			return err
		}
	}
	return nil
}

// peerKey returns the function for the keys of the peer with index i.
func peerKey(i int) func(string) string {
	return func(name string) string { return fmt.Sprintf("peer[%d].%s", i, name) }
}

// checkPeer checks one peer. key returns the configuration key of one of its
// fields.
func (c *Config) checkPeer(p *Peer, key func(string) string) error {
	switch domain, ok := federation.ParseDomain(p.Domain); {
	case !ok || domain != p.Domain:
		return usage(key("domain"), "%q is not a domain name", p.Domain)
	case slices.Contains(c.Methods, MethodNone):
		return usage(key("domain"), "nobody proves a domain when auth.methods is %q", MethodNone)
	case p.Local == "":
		return usage("federation.domains",
			"the domain that peers know is missing, and %q is no domain name", c.Name)
	case !slices.Contains(c.Federation.Domains, p.Local):
		return usage(key("local"), "%q is not in federation.domains", p.Local)
	case slices.Contains(c.Federation.Domains, p.Domain):
		return usage(key("domain"), "%q is this proxy's own domain", p.Domain)
	case len(p.Networks) == 0:
		return usage(key("networks"), "the networks of %q are missing", p.Domain)
	case p.Dialback && p.Policy != federation.Encrypted:
		return usage(key("dialback"),
			`it is weak identity, which policy "trusted" does not accept: `+
				`write policy = "encrypted", or remove it`)
	case p.Policy == federation.Encrypted && len(p.Pins) == 0 && !p.Dialback:
		return usage(key("policy"), "accepts nobody: add pins, or dialback = true")
	case p.DNSSEC && c.Federation.DNSSEC == discovery.DNSSECOff:
		return usage(key("delegation"),
			`"dnssec" has no effect when federation.dnssec is "off": set that to "use"`)
	case (p.WellKnown || p.DNSSEC) && c.Federation.Resolver == nil:
		return usage(key("delegation"), "there is no resolver to ask for delegations")
	}
	for name, list := range map[string][]netip.Prefix{"networks": p.Networks, "reach": p.Reach} {
		for _, n := range list {
			if !n.IsValid() || n.Addr().Is4In6() || n != n.Masked() {
				return usage(key(name), "%v is not a prefix without bits beyond its length", n)
			}
			if reserved, overlaps := connectip.Reserved(n); overlaps && name == "networks" {
				return usage(key(name), "%v overlaps %v, which is never behind a gateway", n,
					reserved)
			}
		}
	}
	return nil
}

// checkOverlap checks that the networks of the peer with index i belong to
// nobody else.
func (c *Config) checkOverlap(i int) error {
	p := &c.Peers[i]
	taken := func(others []netip.Prefix, owner string) error {
		for _, n := range p.Networks {
			for _, other := range others {
				if n.Overlaps(other) {
					return usage(peerKey(i)("networks"), "%v overlaps %v, %s", n, other, owner)
				}
			}
		}
		return nil
	}
	for _, pool := range []netip.Prefix{c.Pool4, c.Pool6} {
		if err := taken([]netip.Prefix{pool}, "the pool"); pool.IsValid() && err != nil {
			return err
		}
	}
	for _, s := range c.Sites {
		if err := taken(s.Networks, fmt.Sprintf("a network of the site %q", s.User)); err != nil {
			return err
		}
	}
	for j := range c.Peers[:i] {
		other := &c.Peers[j]
		owner := fmt.Sprintf("a network of the peer %q", other.Domain)
		if err := taken(other.Networks, owner); err != nil {
			return err
		}
	}
	return nil
}
