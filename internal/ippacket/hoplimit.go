package ippacket

import "encoding/binary"

// DecrementHopLimit takes one off the hop limit or time to live of b, a packet
// that [Parse] accepted, and keeps the IPv4 header checksum right. When it is 1 or
// 0 already, the packet must not be forwarded: the result is false, and b is as it
// was.
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
	// HC' = ~(~HC + ~m + m'), equation 3 of RFC 1624, where m is the word of time
	// to live and protocol: ~m + m' = ~m + m - 0x100 = 0xfeff.
	sum := uint32(^binary.BigEndian.Uint16(b[10:])) + 0xfeff
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	return true
}
