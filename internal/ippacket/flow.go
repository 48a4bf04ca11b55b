package ippacket

import (
	"encoding/binary"
	"hash/maphash"
)

// FlowHash returns a number that is the same for all packets of a flow, as far as headers of fixed place tell it: addresses,
// protocol, and ports when they follow. b need not be a valid packet.
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
		if binary.BigEndian.Uint16(b[6:])&0x3fff == 0 { // not a fragment: those of a packet stay together
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

// ports copies the ports at b[at:] when protocol has any, and returns their length.
func ports(dst []byte, protocol uint8, b []byte, at int) int {
	switch protocol {
	case 6, 17, 33, 132, 136: // TCP, UDP, DCCP, SCTP, UDP-Lite
		if len(b) >= at+4 {
			return copy(dst[:4], b[at:])
		}
	}
	return 0
}
