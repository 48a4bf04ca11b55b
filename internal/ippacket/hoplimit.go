package ippacket

import "encoding/binary"

// DecrementHopLimit decrements the hop limit or time to live of b, a packet
// that [Parse] accepted, and updates the IPv4 header checksum. It returns false
// and leaves b unchanged if the packet must not be forwarded because its hop
// limit is 1 or 0.
func DecrementHopLimit(b []byte) bool {
	if b[0]>>4 == 6 {
		if b[7] <= 1 {
			return false
		}
		b[7]--
		return true
	}
	if b[8] <= 1 {
		return false
	}
	b[8]--
	// HC' = ~(~HC + ~m + m') (RFC 1624 equation 3). m is the word of time to
	// live and protocol, so ~m + m' = ~m + m - 0x100 = 0xfeff.
	sum := uint32(^binary.BigEndian.Uint16(b[10:])) + 0xfeff
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	return true
}
