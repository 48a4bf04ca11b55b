package ippacket

import "encoding/binary"

// checksum returns the Internet checksum (RFC 1071) of b, starting from sum,
// which is 0 or the sum of a pseudo-header. If b includes a correct checksum,
// the result is 0.
func checksum(b []byte, sum uint64) uint16 {
	sum = add(b, sum)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// add adds the 16-bit words of b to sum. No carry is lost if b has less than
// 2^32 bytes. It adds two words at a time, which makes no difference after
// folding.
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

// pseudoHeader6 returns the sum of the IPv6 pseudo-header for an upper layer of
// n bytes (RFC 8200 section 8.1). addresses are the 32 bytes of source and
// destination from the header.
func pseudoHeader6(addresses []byte, n int, protocol uint8) uint64 {
	return add(addresses, uint64(n)+uint64(protocol))
}
