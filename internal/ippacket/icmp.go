package ippacket

import (
	"encoding/binary"
	"net/netip"
)

// ICMPError is a reason for not forwarding a packet that its sender is told.
type ICMPError uint8

// The reasons. Comments give the type and code of the message in IPv4 and IPv6.
const (
	// SourceNotAssigned (3/13, 1/5) means that the sender may not use its
	// source address.
	SourceNotAssigned ICMPError = iota + 1

	// NoRoute (3/0, 1/0) means that there is no route to the destination.
	NoRoute

	// NoSession (3/1, 1/3) means that no peer has the destination address.
	NoSession

	// Prohibited (3/13, 1/1) means that the policy denies the destination or
	// the protocol.
	Prohibited

	// HopLimitExceeded (11/0, 3/0) means that the hop limit reached 0.
	HopLimitExceeded

	// TooBig (3/4, 2/0) means that the packet exceeds the MTU. The message is
	// Fragmentation Needed or Packet Too Big.
	TooBig

	// HeaderChain means that Parse returned [ErrHeaderChain]. The IPv6 message
	// is 4/3 for a first fragment and 1/1 otherwise; IPv4 has none.
	HeaderChain

	// BeyondScope (1/2, none in IPv4) means that the source is link-local and
	// the destination is not.
	BeyondScope

	// NumICMPErrors is greater than every ICMPError.
	NumICMPErrors
)

// icmpNames are the label values of the ICMP metrics.
var icmpNames = [NumICMPErrors]string{
	SourceNotAssigned: "source_not_assigned", NoRoute: "no_route", NoSession: "no_session",
	Prohibited:       "prohibited",
	HopLimitExceeded: "hop_limit_exceeded", TooBig: "too_big", HeaderChain: "header_chain",
	BeyondScope: "beyond_scope",
}

// String returns the label value of e in metrics.
func (e ICMPError) String() string { return icmpNames[e] }

// icmpMessages has the type and code of each ICMPError in IPv4 and IPv6. Type 0
// means that there is no message.
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

// message returns the type and code of the message about p. ok is false if
// there is no message.
func (e ICMPError) message(p Packet) (typ, code uint8, ok bool) {
	if int(e) >= len(icmpMessages) {
		return 0, 0, false
	}
	m := icmpMessages[e]
	switch {
	case p.Version == 4 && e == TooBig && !p.DontFragment: // the router fragments it
		return 0, 0, false
	case p.Version == 4:
		return m.type4, m.code4, m.type4 != 0
	case e == HeaderChain && !(p.MoreFragments && p.FragmentOffset == 0):
		m = icmpMessages[Prohibited] // 4/3 is only for first fragments
	}
	return m.type6, m.code6, m.type6 != 0
}

const (
	icmpHeaderLen = 8
	icmpHopLimit  = 64

	// maxICMPError4 and maxICMPError6 are the lengths in bytes of the longest
	// ICMP error packets (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4 c).
	maxICMPError4 = 576
	maxICMPError6 = 1280

	// internetControl is the precedence of ICMP errors from routers (RFC 1812
	// section 4.3.2.5).
	internetControl = 6 << 5
)

// dummyAddr is the source address of ICMP errors from a router that has no IPv4
// address (RFC 7600 section 4.8).
var dummyAddr = netip.AddrFrom4([4]byte{192, 0, 0, 8})

// AppendICMPError appends a packet with an ICMP error about the packet invoking
// to dst. The error goes from src to the source of invoking. p is the result of
// [Parse] for invoking. The error quotes invoking, so it must be built before
// the packet is changed. dst and invoking must not overlap. Nothing is
// allocated if dst has 1280 bytes of free capacity.
//
// src is an address of the endpoint that sends the error. If src is not IPv4,
// errors about IPv4 packets come from 192.0.0.8. mtu is the MTU of the link in
// bytes; only TooBig uses it.
//
// AppendICMPError returns dst and false if no error may be sent (RFC 1122
// section 3.2.2, RFC 1812 section 4.3.2.7, RFC 4443 section 2.4 e):
//
//   - invoking is an ICMP error or a redirect, or a later fragment of ICMP.
//   - invoking is an IPv4 fragment other than the first.
//   - Its source is not the address of one host.
//   - Its destination is multicast or broadcast. IPv6 Packet Too Big is sent
//     nevertheless.
//   - kind is TooBig, but the IPv4 packet may be fragmented.
//   - kind has no message in the IP version of the packet.
//   - The packet is IPv6 and src is not.
//
// The caller limits the rate of errors.
func AppendICMPError(dst, invoking []byte, p Packet, kind ICMPError, src netip.Addr,
	mtu int) ([]byte, bool) {
	typ, code, ok := kind.message(p)
	if !ok || !mayAnswer(invoking, p, kind) {
		return dst, false
	}
	start := len(dst)
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
	dst = binary.BigEndian.AppendUint32(dst, icmpWord2(p.Version, kind, mtu))
	dst = append(dst, quote...)
	setICMPChecksum(dst[start:])
	return dst, true
}

// icmpWord2 returns the second word of the ICMP header. It is the MTU in Packet
// Too Big (RFC 4443 section 3.2) and has the MTU in its low half in
// Fragmentation Needed (RFC 1191 section 4). Otherwise it is 0, which is also
// the pointer about a truncated header chain (RFC 8200 section 4.5).
func icmpWord2(version uint8, kind ICMPError, mtu int) uint32 {
	switch {
	case kind != TooBig:
		return 0
	case version == 4:
		return uint32(min(max(mtu, 0), maxPacket))
	}
	return uint32(max(mtu, 0))
}

// mayAnswer reports whether an ICMP error of this kind may be sent about b.
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
	// A later fragment has no type, so it might belong to an ICMP error.
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

// isICMP reports whether the upper layer is ICMP of the packet's IP version.
func (p *Packet) isICMP() bool {
	return p.Version == 4 && p.Protocol == protocolICMP ||
		p.Version == 6 && p.Protocol == protocolICMPv6
}

// icmpType returns the type of the ICMP message in b. ok is false if b does not
// hold the start of an ICMP message.
func (p *Packet) icmpType(b []byte) (typ uint8, ok bool) {
	if !p.isICMP() || p.FragmentOffset > 0 || len(b) <= p.HeaderLen {
		return 0, false
	}
	return b[p.HeaderLen], true
}

// isErrorType reports whether ICMP messages of the type quote an invoking
// packet. In IPv4 these are Destination Unreachable, Source Quench, Time
// Exceeded and Parameter Problem, in IPv6 all types below 128 (RFC 4443 section
// 2.1).
func isErrorType(version, typ uint8) bool {
	if version == 6 {
		return typ < 128
	}
	return typ == 3 || typ == 4 || typ == 11 || typ == 12
}

func isRedirect(version, typ uint8) bool {
	return version == 4 && typ == 5 || version == 6 && typ == 137
}

// IsICMPError reports whether b is an ICMP error that quotes a packet, or the
// first fragment of one. p is the result of [Parse] for b. Redirects do not
// count, because they do not leave their link.
func IsICMPError(b []byte, p Packet) bool {
	typ, ok := p.icmpType(b)
	return ok && isErrorType(p.Version, typ)
}

// Quoted returns the headers of the packet that the ICMP error b quotes. p is
// the result of [Parse] for b. ok is false if b is no ICMP error or does not
// quote a full IP header of its own version.
//
// Quoted does not check the checksum and lengths, because routers change and
// truncate the packets they quote. The result is not trustworthy, since the
// sender of the error can quote anything. TotalLen is copied from the quoted
// header. HeaderLen is within the quote. If the quote ends in the header chain,
// Protocol is the type of the last extension header.
func Quoted(b []byte, p Packet) (quoted Packet, ok bool) {
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
	// This router does not forward packets with such a routing header.
	if q.walk(quote[:min(len(quote), q.TotalLen)]) == ErrRoutingHeader {
		return Packet{}, false
	}
	return q, true
}
