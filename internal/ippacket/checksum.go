package ippacket

import "encoding/binary"

// checksum returns the Internet checksum (RFC 1071) of b and of what sum already
// adds up to. Over bytes that hold their own checksum it is 0 when that is right.
func checksum(b []byte, sum uint64) uint16 {
	sum = add(b, sum)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// add adds the 16-bit words of b to sum, without losing carries as long as there
// are less than 2^32 bytes. Two words at a time are the same after folding.
func add(b []byte, sum uint64) uint64 {
	for ; len(b) >= 4; b = b[4:] {
		sum += uint64(binary.BigEndian.Uint32(b))
	}
	if len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	return sum
}

// pseudoHeader6 returns the sum of the pseudo-header of an upper layer of n bytes
// in an IPv6 packet (RFC 8200 section 8.1). addresses are source and destination,
// as in the header.
func pseudoHeader6(addresses []byte, n int, protocol uint8) uint64 {
	return add(addresses, uint64(n)+uint64(protocol))
}
