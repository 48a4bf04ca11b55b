package connectip

import (
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
)

// policy says what may pass, in both directions. It is immutable: a change makes a new one.
type policy struct {
	self     []netip.Addr // this endpoint's own tunnel addresses
	sendFrom *netipx.IPSet
	sendTo   destinations
	recvFrom *netipx.IPSet
	recvTo   destinations
}

// link is the state of both ends of a stream, from which the policy follows.
type link struct {
	self     []netip.Addr    // addresses of this endpoint besides the assigned ones
	denied   []netip.Prefix  // where the peer's packets may not go, whatever is advertised
	assigned []netip.Prefix  // to this endpoint, by the peer
	routes   []capsule.Route // advertised by this endpoint
	peer     []netip.Prefix  // assigned to the peer, by this endpoint
	peerSend []capsule.Route // advertised by the peer
}

// policy computes what may pass on l.
func (l *link) policy() (*policy, error) {
	p := &policy{self: slices.Clone(l.self)}
	for _, a := range l.assigned {
		p.self = append(p.self, a.Addr())
	}
	var err error
	build := func(prefixes []netip.Prefix, routes []capsule.Route) *netipx.IPSet {
		var b netipx.IPSetBuilder
		for _, x := range prefixes {
			b.AddPrefix(x)
		}
		for _, r := range routes {
			b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
		}
		s, e := b.IPSet()
		if e != nil && err == nil {
			err = fmt.Errorf("policy: %w", e)
		}
		return s
	}
	p.sendFrom = build(l.assigned, l.routes)
	p.recvFrom = build(l.peer, l.peerSend)
	if err != nil {
		return nil, err
	}
	if p.sendTo, err = newDestinations(l.peer, l.peerSend, nil); err != nil {
		return nil, err
	}
	if p.recvTo, err = newDestinations(l.assigned, l.routes, l.denied); err != nil {
		return nil, err
	}
	return p, nil
}

// isSelf reports whether a is an address of this endpoint.
func (p *policy) isSelf(a netip.Addr) bool { return slices.Contains(p.self, a) }

// selfFor returns this endpoint's address of a's family; invalid when there is none.
func (p *policy) selfFor(a netip.Addr) netip.Addr {
	for _, s := range p.self {
		if s.Is4() == a.Is4() {
			return s
		}
	}
	return netip.Addr{}
}

// destinations is a set of addresses, each for every protocol or for one (RFC 9484 section 4.8).
type destinations struct {
	any     *netipx.IPSet
	byProto map[uint8]*netipx.IPSet // nil when no route names a protocol
	named   *netipx.IPSet           // the union of byProto
}

func newDestinations(prefixes []netip.Prefix, routes []capsule.Route, denied []netip.Prefix) (destinations, error) {
	var d destinations
	builders := map[uint8]*netipx.IPSetBuilder{0: {}}
	for _, x := range prefixes {
		builders[0].AddPrefix(x)
	}
	var named netipx.IPSetBuilder
	for _, r := range routes {
		b := builders[r.Protocol]
		if b == nil {
			b = &netipx.IPSetBuilder{}
			builders[r.Protocol] = b
		}
		b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
		if r.Protocol != 0 {
			named.AddRange(netipx.IPRangeFrom(r.Start, r.End))
		}
	}
	finish := func(b *netipx.IPSetBuilder) (*netipx.IPSet, error) {
		for _, x := range denied {
			b.RemovePrefix(x)
		}
		s, err := b.IPSet()
		if err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
		return s, nil
	}
	for proto, b := range builders {
		s, err := finish(b)
		if err != nil {
			return d, err
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
	var err error
	d.named, err = finish(&named)
	return d, err
}

// allow reports whether a packet of the upper-layer protocol proto may go to a. ICMP may go wherever any protocol may.
func (d *destinations) allow(a netip.Addr, proto uint8) bool {
	if d.any.Contains(a) {
		return true
	}
	if d.byProto == nil {
		return false
	}
	if ippacket.IsICMP(proto) {
		return d.named.Contains(a)
	}
	s := d.byProto[proto]
	return s != nil && s.Contains(a)
}

// some returns an address of d that a packet can be sent to; it prefers one that is reserved for documentation.
func (d *destinations) some(v4 bool) (netip.Addr, bool) {
	for _, set := range []*netipx.IPSet{d.any, d.named} {
		for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, 1}), netip.MustParseAddr("2001:db8::1")} {
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
