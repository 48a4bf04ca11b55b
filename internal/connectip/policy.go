package connectip

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
)

// reserved contains the addresses that no host behind a router has (RFC 6890).
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/127"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// Reserved returns a reserved prefix that overlaps p, such as loopback,
// link-local or multicast, and whether there is one. No network behind an
// endpoint may use it.
func Reserved(p netip.Prefix) (netip.Prefix, bool) {
	i := slices.IndexFunc(reserved, p.Overlaps)
	if i < 0 {
		return netip.Prefix{}, false
	}
	return reserved[i], true
}

// policy determines which packets may pass in either direction. It is
// immutable: every change computes a new one.
type policy struct {
	self []netip.Addr // this endpoint's tunnel addresses

	// delegated contains the prefixes of more than one address that are
	// assigned to this endpoint. Their hosts are on this side of the tunnel.
	// nil: none.
	delegated *netipx.IPSet

	sendFrom ranges // sources of packets to the peer
	sendTo   ranges // destinations of packets to the peer
	recvFrom ranges // sources of packets from the peer
	recvTo   ranges // destinations of packets from the peer
}

// link is the state of both endpoints that determines the policy.
type link struct {
	self       []netip.Addr    // addresses of this endpoint, except assigned ones
	assigned   []netip.Prefix  // assigned to this endpoint
	advertised []capsule.Route // advertised by this endpoint

	peerAssigned   []netip.Prefix  // assigned to the peer
	peerAdvertised []capsule.Route // advertised by the peer

	// denied and withheld are Config.Denied and Config.Withheld. The addresses
	// of this endpoint are exempt.
	denied, withheld []netip.Prefix
}

// policy computes the policy of l.
func (l *link) policy() (*policy, error) {
	p := &policy{self: slices.Clone(l.self)}
	var delegated, b netipx.IPSetBuilder
	delegates := false
	for _, a := range l.assigned {
		p.self = append(p.self, HostAddr(a))
		if !a.IsSingleIP() && a == a.Masked() {
			delegated.AddPrefix(a)
			delegates = true
		}
	}
	for _, x := range slices.Concat(l.denied, l.withheld) {
		b.AddPrefix(x)
	}
	for _, a := range p.self {
		b.Remove(a)
	}
	denied, err := b.IPSet()
	if err == nil && delegates {
		p.delegated, err = delegated.IPSet()
	}
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	for _, x := range []struct {
		to       *ranges
		prefixes []netip.Prefix
		routes   []capsule.Route
		denied   *netipx.IPSet
		withheld []netip.Prefix
	}{
		{&p.sendFrom, l.assigned, l.advertised, nil, nil},
		{&p.sendTo, l.peerAssigned, l.peerAdvertised, nil, nil},
		{&p.recvFrom, l.peerAssigned, l.peerAdvertised, nil, nil},
		{&p.recvTo, l.assigned, l.advertised, denied, l.withheld},
	} {
		if *x.to, err = newRanges(x.prefixes, x.routes, x.denied, x.withheld); err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
	}
	return p, nil
}

// HostAddr returns the address that an endpoint uses for itself if p is
// assigned to it: the first host address of p. If p has bits set beyond its
// length, it is the address of a host with the length of its network, and
// HostAddr returns that address.
func HostAddr(p netip.Prefix) netip.Addr {
	a := p.Addr()
	if p != p.Masked() || a.BitLen()-p.Bits() < 2 {
		// In a prefix of two addresses, both are hosts (RFC 3021, RFC 6164).
		return a
	}
	return a.Next()
}

// isSelf reports whether a is an address of this endpoint.
func (p *policy) isSelf(a netip.Addr) bool { return slices.Contains(p.self, a) }

// selfFor returns this endpoint's first address of a's family, or the zero Addr
// if it has none.
func (p *policy) selfFor(a netip.Addr) netip.Addr {
	for _, s := range p.self {
		if s.Is4() == a.Is4() {
			return s
		}
	}
	return netip.Addr{}
}

// ranges is a set of addresses, each allowed for all upper-layer protocols or
// for some (RFC 9484 section 4.8).
type ranges struct {
	// anyProtocol contains the addresses that are allowed for all protocols.
	anyProtocol *netipx.IPSet

	// byProtocol contains the addresses that are allowed for one protocol. It
	// is nil if no route is limited to a protocol.
	byProtocol map[uint8]*netipx.IPSet

	// oneProtocol is the union of byProtocol.
	oneProtocol *netipx.IPSet

	// covered contains all allowed addresses, and those that are withheld, or
	// denied although a prefix or route contains them.
	covered *netipx.IPSet
}

// newRanges returns the set of addresses in prefixes and routes, except denied
// ones. A nil denied contains no address. withheld is a part of denied.
func newRanges(prefixes []netip.Prefix, routes []capsule.Route, denied *netipx.IPSet,
	withheld []netip.Prefix) (ranges, error) {
	var covered, named netipx.IPSetBuilder
	for _, x := range withheld {
		covered.AddPrefix(x)
	}
	builders := map[uint8]*netipx.IPSetBuilder{0: {}}
	for _, x := range prefixes {
		builders[0].AddPrefix(x)
		covered.AddPrefix(x)
	}
	for _, r := range routes {
		b := builders[r.Protocol]
		if b == nil {
			b = &netipx.IPSetBuilder{}
			builders[r.Protocol] = b
		}
		addresses := netipx.IPRangeFrom(r.Start, r.End)
		b.AddRange(addresses)
		covered.AddRange(addresses)
		if r.Protocol != 0 {
			named.AddRange(addresses)
		}
	}
	var d ranges
	var errs [3]error
	d.covered, errs[0] = covered.IPSet()
	without := func(b *netipx.IPSetBuilder) (*netipx.IPSet, error) {
		if denied != nil {
			b.RemoveSet(denied)
		}
		return b.IPSet()
	}
	d.oneProtocol, errs[1] = without(&named)
	for proto, b := range builders {
		s, err := without(b)
		if err != nil {
			errs[2] = err
		}
		if proto == 0 {
			d.anyProtocol = s
			continue
		}
		if d.byProtocol == nil {
			d.byProtocol = make(map[uint8]*netipx.IPSet)
		}
		d.byProtocol[proto] = s
	}
	return d, errors.Join(errs[:]...)
}

// verdict is the result of looking up a packet's address in ranges.
type verdict uint8

const (
	// outside means that no range contains the address.
	outside verdict = iota

	// forbidden means that the address is allowed for other protocols only, or
	// denied, or withheld.
	forbidden

	// allowed means that the packet may pass.
	allowed
)

// judge looks up a packet of upper-layer protocol proto with address a. ICMP is
// allowed for every address that is allowed for some protocol.
func (d *ranges) judge(a netip.Addr, proto uint8) verdict {
	if d.anyProtocol.Contains(a) {
		return allowed
	}
	if d.byProtocol != nil {
		s := d.byProtocol[proto]
		if s != nil && s.Contains(a) || ippacket.IsICMP(a, proto) && d.oneProtocol.Contains(a) {
			return allowed
		}
	}
	if d.covered.Contains(a) {
		return forbidden
	}
	return outside
}

// allow reports whether the verdict of judge is allowed.
func (d *ranges) allow(a netip.Addr, proto uint8) bool { return d.judge(a, proto) == allowed }

// probeTarget returns an address of d to which Probe can send a packet. It
// prefers addresses for documentation (RFC 5737, RFC 3849).
func (d *ranges) probeTarget(v4 bool) (netip.Addr, bool) {
	for _, set := range []*netipx.IPSet{d.anyProtocol, d.oneProtocol} {
		for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, 1}),
			netip.MustParseAddr("2001:db8::1")} {
			if a.Is4() == v4 && set.Contains(a) {
				return a, true
			}
		}
		for _, r := range set.Ranges() {
			if r.From().Is4() == v4 && !r.From().IsUnspecified() {
				return r.From(), true
			}
		}
	}
	return netip.Addr{}, false
}
