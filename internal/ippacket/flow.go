package ippacket

import (
	"encoding/binary"
	"hash/maphash"
)

// FlowHash returns a hash of the addresses, the protocol and the ports of a
// packet, so that packets of one flow have the same hash. It uses ports only if
// they directly follow the IP header and the packet is no fragment. b need not
// be a valid packet.
func FlowHash(seed maphash.Seed, b []byte) uint64 {
	var key [37]byte // addresses, protocol, ports
	n := 0
	if len(b) == 0 {
		return 0
	}
	switch b[0] >> 4 {
	case 4:
		if len(b) < 20 {
			return 0
		}
		n = copy(key[:], b[12:20])
		key[n] = b[9]
		n++
		if binary.BigEndian.Uint16(b[6:])&0x3fff == 0 {
			// Without ports, all fragments of a packet have the same hash.
			n += ports(key[n:], b[9], b, int(b[0]&0xf)*4)
		}
	case 6:
		if len(b) < 40 {
			return 0
		}
		n = copy(key[:], b[8:40])
		key[n] = b[6]
		n++
		n += ports(key[n:], b[6], b, 40)
	}
	return maphash.Bytes(seed, key[:n])
}

// ports copies the ports at b[offset:] to dst and returns their length. It is 0
// if protocol has no ports or b is too short.
func ports(dst []byte, protocol uint8, b []byte, offset int) int {
	switch protocol {
	case 6, 17, 33, 132, 136: // TCP, UDP, DCCP, SCTP, UDP-Lite
		if len(b) >= offset+4 {
			return copy(dst[:4], b[offset:])
		}
	}
	return 0
}
