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

// reserved are addresses that are not those of hosts behind a router (RFC
// 6890).
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/127"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// Reserved returns the addresses in p that are never those of a network behind
// an endpoint, if there are some: loopback, link-local, multicast and the like.
func Reserved(p netip.Prefix) (netip.Prefix, bool) {
	i := slices.IndexFunc(reserved, p.Overlaps)
	if i < 0 {
		return netip.Prefix{}, false
	}
	return reserved[i], true
}

// policy says what may pass, in both directions. It is immutable: a change
// makes a new one.
type policy struct {
	self []netip.Addr // this endpoint's own tunnel addresses
	// prefixes assigned to this endpoint, longer than one address: they are on
	// this side; nil for none
	own      *netipx.IPSet
	sendFrom ranges
	sendTo   ranges
	recvFrom ranges
	recvTo   ranges
}

// link is the state of both ends of a stream, from which the policy follows.
type link struct {
	self []netip.Addr // addresses of this endpoint besides the assigned ones
	// where the peer's packets may not go, whatever is advertised, but for self
	// and assigned
	denied   []netip.Prefix
	assigned []netip.Prefix // prefixes that the peer assigned to this endpoint
	// what is not advertised to this peer, though to others: it is denied as
	// well
	withheld []netip.Prefix
	routes   []capsule.Route // advertised by this endpoint
	peer     []netip.Prefix  // assigned to the peer, by this endpoint
	peerSend []capsule.Route // advertised by the peer
}

// policy computes what may pass on l.
func (l *link) policy() (*policy, error) {
	p := &policy{self: slices.Clone(l.self)}
	var own, b netipx.IPSetBuilder
	blocks := false
	for _, a := range l.assigned {
		p.self = append(p.self, HostAddr(a))
		if !a.IsSingleIP() && a == a.Masked() {
			own.AddPrefix(a)
			blocks = true
		}
	}
	for _, x := range slices.Concat(l.denied, l.withheld) {
		b.AddPrefix(x)
	}
	for _, a := range p.self {
		b.Remove(a)
	}
	denied, err := b.IPSet()
	if err == nil && blocks {
		p.own, err = own.IPSet()
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
		{&p.sendFrom, l.assigned, l.routes, nil, nil},
		{&p.sendTo, l.peer, l.peerSend, nil, nil},
		{&p.recvFrom, l.peer, l.peerSend, nil, nil},
		{&p.recvTo, l.assigned, l.routes, denied, l.withheld},
	} {
		if *x.to, err = newRanges(x.prefixes, x.routes, x.denied, x.withheld); err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
	}
	return p, nil
}

// HostAddr returns the address that an endpoint uses for itself of a prefix
// that was assigned to it: the first one that stands for a host. A prefix with
// bits beyond its length is an address with the length of its network.
func HostAddr(p netip.Prefix) netip.Addr {
	a := p.Addr()
	if p != p.Masked() || a.BitLen()-p.Bits() < 2 {
		// two addresses are two hosts (RFC 3021, RFC 6164)
		return a
	}
	return a.Next()
}

// isSelf reports whether a is an address of this endpoint.
func (p *policy) isSelf(a netip.Addr) bool { return slices.Contains(p.self, a) }

// selfFor returns this endpoint's address of a's family; invalid when there is
// none.
func (p *policy) selfFor(a netip.Addr) netip.Addr {
	for _, s := range p.self {
		if s.Is4() == a.Is4() {
			return s
		}
	}
	return netip.Addr{}
}

// ranges is a set of addresses, each for every protocol or for one (RFC 9484
// section 4.8).
type ranges struct {
	any     *netipx.IPSet
	byProto map[uint8]*netipx.IPSet // nil when no route names a protocol
	named   *netipx.IPSet           // the union of byProto
	covered *netipx.IPSet           // all of it, with what is denied, and what is withheld
}

// newRanges makes the set of prefixes and routes without what is denied, nil
// for nothing. What is withheld is a part of that.
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
	d.named, errs[1] = without(&named)
	for proto, b := range builders {
		s, err := without(b)
		if err != nil {
			errs[2] = err
		}
		if proto == 0 {
			d.any = s
			continue
		}
		if d.byProto == nil {
			d.byProto = make(map[uint8]*netipx.IPSet)
		}
		d.byProto[proto] = s
	}
	return d, errors.Join(errs[:]...)
}

// verdict is what ranges say about an address of a packet.
type verdict uint8

const (
	outside verdict = iota // no range covers the address
	// one does, but not for the protocol, or the address is denied; or it is
	// withheld
	forbidden
	allowed
)

// judge says whether a packet of the upper-layer protocol proto may come from,
// or go to, a. ICMP may wherever any protocol may.
func (d *ranges) judge(a netip.Addr, proto uint8) verdict {
	if d.any.Contains(a) {
		return allowed
	}
	if d.byProto != nil {
		s := d.byProto[proto]
		if s != nil && s.Contains(a) || ippacket.IsICMP(a, proto) && d.named.Contains(a) {
			return allowed
		}
	}
	if d.covered.Contains(a) {
		return forbidden
	}
	return outside
}

// allow reports whether judge allows.
func (d *ranges) allow(a netip.Addr, proto uint8) bool { return d.judge(a, proto) == allowed }

// some returns an address of d that a packet can be sent to; it prefers one
// that is reserved for documentation.
func (d *ranges) some(v4 bool) (netip.Addr, bool) {
	for _, set := range []*netipx.IPSet{d.any, d.named} {
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
