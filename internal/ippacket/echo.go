package ippacket

import (
	"encoding/binary"
	"net/netip"
)

// Types of ICMP echo messages (RFC 792, RFC 4443 section 4).
const (
	echoReply     = 0
	echoRequest   = 8
	echoRequestV6 = 128
	echoReplyV6   = 129
)

// AppendEcho appends a packet with an ICMP echo request or reply to dst. It is
// an ICMPv6 packet if the addresses are IPv6. In IPv4 it has the DF flag.
// AppendEcho returns dst unchanged if the addresses have different families or
// the packet would exceed the length of an IP packet.
func AppendEcho(dst []byte, from, to netip.Addr, hopLimit uint8, request bool, id, seq uint16,
	data []byte) []byte {
	n := icmpHeaderLen + len(data)
	var typ uint8
	switch {
	case from.Is4() && to.Is4() && ipv4HeaderLen+n <= maxPacket:
		typ = echoReply
		if request {
			typ = echoRequest
		}
	case from.Is6() && to.Is6() && n <= maxPacket:
		typ = echoReplyV6
		if request {
			typ = echoRequestV6
		}
	default:
		return dst
	}
	start := len(dst)
	dst = appendHeader(dst, from, to, 0, hopLimit, n)
	dst = append(dst, typ, 0, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, id)
	dst = binary.BigEndian.AppendUint16(dst, seq)
	dst = append(dst, data...)
	setICMPChecksum(dst[start:])
	return dst
}

// ParseEcho returns the fields of an ICMP echo request or reply. p is the
// result of [Parse] for b, and data is a part of b. ok is false if b is neither
// a request nor a reply, is a fragment, or has a wrong ICMP checksum.
func ParseEcho(b []byte, p Packet) (request bool, id, seq uint16, data []byte, ok bool) {
	typ, ok := p.icmpType(b)
	if !ok || p.MoreFragments || len(b) < p.HeaderLen+icmpHeaderLen {
		return false, 0, 0, nil, false
	}
	m := b[p.HeaderLen:]
	if m[1] != 0 {
		return false, 0, 0, nil, false
	}
	var pseudo uint64
	switch {
	case p.Version == 4 && (typ == echoRequest || typ == echoReply):
		request = typ == echoRequest
	case p.Version == 6 && (typ == echoRequestV6 || typ == echoReplyV6):
		request = typ == echoRequestV6
		pseudo = pseudoHeader6(b[8:40], len(m), protocolICMPv6)
	default:
		return false, 0, 0, nil, false
	}
	if checksum(m, pseudo) != 0 {
		return false, 0, 0, nil, false
	}
	return request, binary.BigEndian.Uint16(m[4:]), binary.BigEndian.Uint16(m[6:]),
		m[icmpHeaderLen:], true
}
