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

// AppendEcho appends the whole packet of an ICMP echo request or reply to dst: of
// ICMPv6 when both addresses are of IPv6. The packet is not to be fragmented.
// Nothing is appended when the addresses are not of one family, or the packet
// would be longer than an IP packet can be.
func AppendEcho(dst []byte, from, to netip.Addr, hopLimit uint8, request bool, id, seq uint16, data []byte) []byte {
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
	at := len(dst)
	dst = appendHeader(dst, from, to, 0, hopLimit, n)
	dst = append(dst, typ, 0, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, id)
	dst = binary.BigEndian.AppendUint16(dst, seq)
	dst = append(dst, data...)
	setICMPChecksum(dst[at:])
	return dst
}

// ParseEcho returns what an ICMP echo request or reply holds. p is what [Parse]
// returned for b, and data is part of b. ok is false when b is neither, is a
// fragment, or has a wrong ICMP checksum.
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
	return request, binary.BigEndian.Uint16(m[4:]), binary.BigEndian.Uint16(m[6:]), m[icmpHeaderLen:], true
}
