package ippacket

import "encoding/binary"

const (
	protocolTCP  = 6
	tcpHeaderLen = 20 // bytes, excluding options
	tcpChecksum  = 16 // offset in the header
	flagSYN      = 2
)

// Options of TCP (RFC 9293 section 3.1).
const (
	optionEnd = 0
	optionNop = 1
	optionMSS = 2
	lenMSS    = 4
)

// ClampMSS lowers the maximum segment size in b if b is a TCP SYN with a larger
// one than packets of mtu bytes can carry (RFC 9293 section 3.7.1, RFC 6691),
// and updates the checksum. p is the result of [Parse] for b. ClampMSS reports
// whether it changed b.
func ClampMSS(b []byte, p Packet, mtu int) bool {
	if p.Protocol != protocolTCP || p.FragmentOffset != 0 {
		return false
	}
	tcp := b[p.HeaderLen:]
	if len(tcp) < tcpHeaderLen || tcp[13]&flagSYN == 0 {
		return false
	}
	size := mtu - tcpHeaderLen - ipv4HeaderLen
	if p.Version == 6 {
		size = mtu - tcpHeaderLen - ipv6HeaderLen
	}
	end := int(tcp[12]>>4) * 4
	if size <= 0 || end > len(tcp) {
		return false
	}
	for i := tcpHeaderLen; i < end; {
		switch tcp[i] {
		case optionEnd:
			return false
		case optionNop:
			i++
			continue
		}
		if i+1 >= end || tcp[i+1] < 2 || i+int(tcp[i+1]) > end {
			return false // malformed, so no receiver parses the options after it
		}
		if tcp[i] == optionMSS && tcp[i+1] == lenMSS {
			return lowerMSS(tcp, i+2, size)
		}
		i += int(tcp[i+1])
	}
	return false
}

// lowerMSS sets the 16 bits at offset of a TCP header to size, unless they are
// lower already. It reports whether it changed them.
func lowerMSS(tcp []byte, offset, size int) bool {
	old := binary.BigEndian.Uint16(tcp[offset:])
	if int(old) <= size {
		return false
	}
	binary.BigEndian.PutUint16(tcp[offset:], uint16(size))
	from, to := old, uint16(size)
	if offset%2 != 0 { // the value spans two words of the sum
		from, to = from<<8|from>>8, to<<8|to>>8
	}
	// HC' = ~(~HC + ~m + m') (RFC 1624 equation 3).
	sum := uint32(^binary.BigEndian.Uint16(tcp[tcpChecksum:])) + uint32(^from) + uint32(to)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(tcp[tcpChecksum:], ^uint16(sum))
	return true
}
