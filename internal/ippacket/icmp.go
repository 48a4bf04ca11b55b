package ippacket

import (
	"encoding/binary"
	"net/netip"
)

// ICMPError is a reason why a packet is not forwarded, as far as its sender is to
// know it.
type ICMPError uint8

// The reasons, with type and code of the message in IPv4 and in IPv6.
const (
	SourceNotAssigned ICMPError = iota + 1 // 3/13, 1/5: the sender may not use its source address
	NoRoute                                // 3/0, 1/0
	NoSession                              // 3/1, 1/3: nobody has the destination address now
	Prohibited                             // 3/13, 1/1: the policy denies the destination or the protocol
	HopLimitExceeded                       // 11/0, 3/0
	TooBig                                 // 3/4, 2/0: Fragmentation Needed, Packet Too Big
	HeaderChain                            // none, 4/3 about a first fragment and otherwise 1/1: [ErrHeaderChain]
	BeyondScope                            // none, 1/2: a link-local source and a destination beyond the link

	// NumICMPErrors is more than each of them.
	NumICMPErrors
)

// icmpNames are the words under which they are counted.
var icmpNames = [NumICMPErrors]string{
	SourceNotAssigned: "source_not_assigned", NoRoute: "no_route", NoSession: "no_session", Prohibited: "prohibited",
	HopLimitExceeded: "hop_limit_exceeded", TooBig: "too_big", HeaderChain: "header_chain", BeyondScope: "beyond_scope",
}

// String returns the word under which e is counted.
func (e ICMPError) String() string { return icmpNames[e] }

// icmpMessages holds type and code of the message for each ICMPError in IPv4 and
// in IPv6. Type 0 stands for none.
var icmpMessages = [NumICMPErrors]struct{ type4, code4, type6, code6 uint8 }{
	SourceNotAssigned: {3, 13, 1, 5},
	NoRoute:           {3, 0, 1, 0},
	NoSession:         {3, 1, 1, 3},
	Prohibited:        {3, 13, 1, 1},
	HopLimitExceeded:  {11, 0, 3, 0},
	TooBig:            {3, 4, 2, 0},
	HeaderChain:       {0, 0, 4, 3},
	BeyondScope:       {0, 0, 1, 2},
}

// message returns type and code of the message about p, and false when there is
// none for it.
func (e ICMPError) message(p Packet) (typ, code uint8, ok bool) {
	if int(e) >= len(icmpMessages) {
		return 0, 0, false
	}
	m := icmpMessages[e]
	switch {
	case p.Version == 4 && e == TooBig && !p.DontFragment: // to be fragmented
		return 0, 0, false
	case p.Version == 4:
		return m.type4, m.code4, m.type4 != 0
	case e == HeaderChain && !(p.MoreFragments && p.FragmentOffset == 0):
		m = icmpMessages[Prohibited] // 4/3 is about first fragments
	}
	return m.type6, m.code6, m.type6 != 0
}

const (
	icmpHeaderLen = 8
	icmpHopLimit  = 64

	// The longest ICMP error, in bytes (RFC 1812 section 4.3.2.3, RFC 4443
	// section 2.4 c).
	maxICMPError4 = 576
	maxICMPError6 = 1280

	// internetControl is the precedence that RFC 1812 section 4.3.2.5 asks for in
	// the errors of a router.
	internetControl = 6 << 5
)

// dummyAddr is the source of ICMP errors of a router without IPv4 address
// (RFC 7600 section 4.8).
var dummyAddr = netip.AddrFrom4([4]byte{192, 0, 0, 8})

// AppendICMPError appends the whole packet of an ICMP error about invoking, from
// src to the source of invoking, to dst. p is what [Parse] returned for invoking,
// which is quoted as it is: the error is made before anything in it is changed.
// The memory of dst must not overlap that of invoking, and nothing is allocated
// when 1280 bytes are free behind dst.
//
// src is an address of the endpoint that sends the error. When it is no IPv4
// address, errors about IPv4 packets come from 192.0.0.8. mtu is what the link
// carries, in bytes, and used with TooBig alone.
//
// The result is dst as it was, and false, where no error may be sent: about an
// ICMP error or redirect or what may be a later part of one, a fragment of IPv4
// that is not the first, a source that is not the address of one host, a multicast
// or broadcast destination (IPv6 Packet Too Big excepted), or a packet of IPv4
// that may be fragmented when the kind is TooBig; when src is no IPv6 address and
// the packet is one of IPv6; and for a kind that has no message in the IP version
// of the packet (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7, RFC 4443
// section 2.4 e). Limiting the rate is up to the caller.
func AppendICMPError(dst, invoking []byte, p Packet, kind ICMPError, src netip.Addr, mtu int) ([]byte, bool) {
	typ, code, ok := kind.message(p)
	if !ok || !mayAnswer(invoking, p, kind) {
		return dst, false
	}
	at := len(dst)
	quote := invoking[:min(len(invoking), p.TotalLen)]
	if p.Version == 4 {
		if !src.Is4() {
			src = dummyAddr
		}
		quote = quote[:min(len(quote), maxICMPError4-ipv4HeaderLen-icmpHeaderLen)]
		dst = appendHeader(dst, src, p.Src, internetControl, icmpHopLimit, icmpHeaderLen+len(quote))
	} else {
		if !src.Is6() {
			return dst, false
		}
		quote = quote[:min(len(quote), maxICMPError6-ipv6HeaderLen-icmpHeaderLen)]
		dst = appendHeader(dst, src, p.Src, 0, icmpHopLimit, icmpHeaderLen+len(quote))
	}
	dst = append(dst, typ, code, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, icmpRest(p.Version, kind, mtu))
	dst = append(dst, quote...)
	setICMPChecksum(dst[at:])
	return dst, true
}

// icmpRest returns the second word of the ICMP header. It is the MTU in Packet Too
// Big (RFC 4443 section 3.2), the MTU in the low half in Fragmentation Needed
// (RFC 1191 section 4), and otherwise 0: that is also the pointer of the message
// about a header chain that is cut (RFC 8200 section 4.5).
func icmpRest(version uint8, kind ICMPError, mtu int) uint32 {
	switch {
	case kind != TooBig:
		return 0
	case version == 4:
		return uint32(min(max(mtu, 0), maxPacket))
	}
	return uint32(max(mtu, 0))
}

// mayAnswer reports whether an ICMP error about b may be sent at all.
func mayAnswer(b []byte, p Packet, kind ICMPError) bool {
	if p.Version == 4 && p.FragmentOffset > 0 {
		return false
	}
	if !isHost(p.Src) || p.Dst == broadcast {
		return false
	}
	if p.Dst.IsMulticast() && !(p.Version == 6 && kind == TooBig) {
		return false
	}
	if !p.isICMP() {
		return true
	}
	// Of a later fragment nobody knows whether it is one of an error.
	typ, ok := p.icmpType(b)
	return ok && !isErrorType(p.Version, typ) && !isRedirect(p.Version, typ)
}

// isHost reports whether a can be the address of one host on a network.
func isHost(a netip.Addr) bool {
	if a.Is4() {
		first := a.As4()[0]
		return first != 0 && first != 127 && first < 224
	}
	return !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.Is4In6()
}

// isICMP reports whether the upper layer is the ICMP of the packet's IP version.
func (p *Packet) isICMP() bool {
	return p.Version == 4 && p.Protocol == protocolICMP || p.Version == 6 && p.Protocol == protocolICMPv6
}

// icmpType returns the type of the ICMP message in b, and false when b does not
// hold one, or does not hold its beginning.
func (p *Packet) icmpType(b []byte) (uint8, bool) {
	if !p.isICMP() || p.FragmentOffset > 0 || len(b) <= p.HeaderLen {
		return 0, false
	}
	return b[p.HeaderLen], true
}

// isErrorType reports whether ICMP messages of the type quote the packet they are
// about: Destination Unreachable, Source Quench, Time Exceeded and Parameter
// Problem, and in IPv6 all types below 128 (RFC 4443 section 2.1).
func isErrorType(version, typ uint8) bool {
	if version == 6 {
		return typ < 128
	}
	return typ == 3 || typ == 4 || typ == 11 || typ == 12
}

func isRedirect(version, typ uint8) bool {
	return version == 4 && typ == 5 || version == 6 && typ == 137
}

// IsICMPError reports whether b, for which [Parse] returned p, is an ICMP error
// that quotes a packet, or the first fragment of one. Redirects are none: they do
// not leave the link they are about.
func IsICMPError(b []byte, p Packet) bool {
	typ, ok := p.icmpType(b)
	return ok && isErrorType(p.Version, typ)
}

// Quoted returns the headers of the packet that the ICMP error b is about. p is
// what [Parse] returned for b. The result is false when b is no ICMP error or
// quotes less than an IP header of its own version.
//
// Whoever sent the error also wrote the quote, and routers change and cut what
// they quote: checksum and lengths are not checked. TotalLen is what the quoted
// header says. HeaderLen is within the quote, and Protocol is that of an extension
// header when the quote ends before, or in, the header after it.
func Quoted(b []byte, p Packet) (Packet, bool) {
	if !IsICMPError(b, p) || len(b) < p.HeaderLen+icmpHeaderLen {
		return Packet{}, false
	}
	quote := b[p.HeaderLen+icmpHeaderLen:]
	if len(quote) == 0 || quote[0]>>4 != p.Version {
		return Packet{}, false
	}
	if p.Version == 4 {
		q, err := header4(quote)
		return q, err == nil
	}
	q, err := header6(quote)
	if err != nil {
		return Packet{}, false
	}
	if q.walk(quote[:min(len(quote), q.TotalLen)]) == ErrRoutingHeader { // never forwarded
		return Packet{}, false
	}
	return q, true
}
