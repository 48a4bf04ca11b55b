package proxy

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/gaissmai/bart"
	"go4.org/netipx"

	"masquevpn/internal/connectip"
	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
)

const (
	// maxPeers and maxOwnDomains limit the domains in Config.Peers and in
	// Federation.Domains.
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

	// RateUp and RateDown limit the IP packets from and to the peer, in bits
	// per second. 0 means no limit.
	RateUp, RateDown int64

	// Expires is the wall clock time at which the link ends. Zero means never.
	Expires time.Time
}

// expired reports whether the link with p has ended at the time now. Only the
// wall clock counts, because Expires has no monotonic clock.
func (p *Peer) expired(now time.Time) bool { return !p.Expires.IsZero() && !now.Before(p.Expires) }

// pair returns the pair that p links.
func (p *Peer) pair() pairKey { return pairKey{p.Domain, p.Local} }

// user returns the user that stands for p in its sessions.
func (p *Peer) user() User {
	return User{Name: p.Domain, RateUp: p.RateUp, RateDown: p.RateDown, Expires: p.Expires}
}

// addPeerRights adds the rights of the peers to all. A peer reaches no network
// of a peer.
func (c *Config) addPeerRights(all map[owner]*rights) {
	var networks []netip.Prefix
	for i := range c.Peers {
		networks = append(networks, c.Peers[i].Networks...)
	}
	withheld := setOf(networks)
	for i := range c.Peers {
		p := &c.Peers[i]
		all[owner{pair: p.pair()}] = &rights{networks: p.Networks, assign: new(netipx.IPSet),
			reach: setOf(p.Reach), withheld: withheld, beyond: p.beyond(withheld)}
	}
}

// beyond returns all addresses except those in p.Reach, and those in withheld.
func (p *Peer) beyond(withheld *netipx.IPSet) []netip.Prefix {
	var b netipx.IPSetBuilder
	b.AddPrefix(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	b.AddPrefix(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	for _, n := range p.Reach {
		b.RemovePrefix(n)
	}
	for _, n := range p.Reach {
		for _, x := range withheld.Ranges() {
			if part, ok := intersection(netipx.RangeOfPrefix(n), x); ok {
				b.AddRange(part)
			}
		}
	}
	set, _ := b.IPSet() // the prefixes are valid
	return set.Prefixes()
}

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
	domains := make(map[string]bool)
	for _, p := range c.Peers {
		domains[p.Domain] = true
	}
	if n := len(domains); n > maxPeers {
		return usage("peer", "%d peers, and %d are possible", n, maxPeers)
	}
	c.Peers = slices.Clone(c.Peers)
	seen := make(map[pairKey]bool)
	var taken bart.Table[string]
	for _, p := range []netip.Prefix{c.Pool4, c.Pool6} {
		if p.IsValid() {
			taken.Insert(p, "the pool")
		}
	}
	for _, s := range c.Sites {
		for _, n := range s.Networks {
			taken.Insert(n, fmt.Sprintf("a network of the site %q", s.User))
		}
	}
	for i := range c.Peers {
		p := &c.Peers[i]
		if p.Local == "" && len(c.Federation.Domains) > 0 {
			p.Local = c.Federation.Domains[0]
		}
		if err := c.checkPeer(p, peerKey(i)); err != nil {
			return err
		}
		if seen[p.pair()] {
			return usage(peerKey(i)("domain"),
				"%q has a [[peer]] with %q already: write all of its networks there", p.Domain,
				p.Local)
		}
		seen[p.pair()] = true
		for _, n := range p.Networks {
			if other, owner, overlaps := overlapping(&taken, n); overlaps {
				return usage(peerKey(i)("networks"), "%v overlaps %v, %s", n, other, owner)
			}
		}
		for _, n := range p.Networks {
			taken.Insert(n, fmt.Sprintf("a network of the peer %q", p.Domain))
		}
	}
	return nil
}

// overlapping returns a prefix of taken that overlaps n and its value, and
// reports whether there is one.
func overlapping(taken *bart.Table[string], n netip.Prefix) (netip.Prefix, string, bool) {
	if taken.OverlapsPrefix(n) {
		for other, owner := range taken.All() {
			if other.Overlaps(n) {
				return other, owner, true
			}
		}
	}
	return netip.Prefix{}, "", false
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
	case p.Policy == federation.Encrypted && len(p.Pins) == 0:
		return usage(key("policy"),
			`the keys of the peer are missing: add pins, or write "trusted"`)
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
