package ippacket

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// appendHeader appends an IP header without options for n bytes of ICMP, and
// reserves capacity for these. Both addresses have the same family. In IPv4 the
// header has the DF flag and thus needs no identification (RFC 6864).
func appendHeader(dst []byte, from, to netip.Addr, trafficClass, hopLimit uint8, n int) []byte {
	if from.Is4() {
		dst = slices.Grow(dst, ipv4HeaderLen+n)
		start := len(dst)
		dst = append(dst, 4<<4|ipv4HeaderLen/4, trafficClass)
		dst = binary.BigEndian.AppendUint16(dst, uint16(ipv4HeaderLen+n))
		dst = append(dst, 0, 0, flagDF>>8, 0, hopLimit, protocolICMP, 0, 0)
		src4, dst4 := from.As4(), to.As4()
		dst = append(dst, src4[:]...)
		dst = append(dst, dst4[:]...)
		binary.BigEndian.PutUint16(dst[start+10:], checksum(dst[start:], 0))
		return dst
	}
	dst = slices.Grow(dst, ipv6HeaderLen+n)
	dst = append(dst, 6<<4|trafficClass>>4, trafficClass<<4, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, uint16(n))
	dst = append(dst, protocolICMPv6, hopLimit)
	src16, dst16 := from.As16(), to.As16()
	dst = append(dst, src16[:]...)
	return append(dst, dst16[:]...)
}

// setICMPChecksum sets the checksum of the ICMP message in the packet b, whose
// IP header has no options or extension headers.
func setICMPChecksum(b []byte) {
	if b[0]>>4 == 4 {
		m := b[ipv4HeaderLen:]
		binary.BigEndian.PutUint16(m[2:], checksum(m, 0))
		return
	}
	m := b[ipv6HeaderLen:]
	binary.BigEndian.PutUint16(m[2:], checksum(m, pseudoHeader6(b[8:40], len(m), protocolICMPv6)))
}
