package ippacket

import (
	"encoding/binary"
	"net/netip"
)

// The IPv6 extension headers that have an unencrypted Next Header field.
const (
	headerHopByHop    = 0
	headerRouting     = 43
	headerFragment    = 44
	headerAuth        = 51
	headerDestination = 60
	headerMobility    = 135
	headerHIP         = 139
	headerShim6       = 140
)

// maxExtensionHeaders is the most extension headers that a packet may have. The
// order recommended by RFC 8200 section 4.1 needs no more than seven.
const maxExtensionHeaders = 8

func parse6(b []byte) (Packet, error) {
	p, err := header6(b)
	switch {
	case err != nil:
		return Packet{}, err
	case p.TotalLen > len(b):
		return Packet{}, ErrTruncated
	case p.TotalLen < len(b):
		return Packet{}, ErrLength
	}
	if err := p.walk(b); err != nil {
		return p, err
	}
	if p.FragmentOffset+p.TotalLen-p.HeaderLen > maxPacket { // too long when reassembled
		return Packet{}, ErrLength
	}
	return p, nil
}

// header6 parses an IPv6 header without its extension headers.
func header6(b []byte) (Packet, error) {
	if len(b) < ipv6HeaderLen {
		return Packet{}, ErrTruncated
	}
	return Packet{
		Version:      6,
		Src:          netip.AddrFrom16([16]byte(b[8:24])),
		Dst:          netip.AddrFrom16([16]byte(b[24:40])),
		Protocol:     b[6],
		HopLimit:     b[7],
		HeaderLen:    ipv6HeaderLen,
		TotalLen:     ipv6HeaderLen + int(binary.BigEndian.Uint16(b[4:])),
		DontFragment: true,
	}, nil
}

// walk follows the header chain of b from p.HeaderLen to the upper layer, and
// updates p.
func (p *Packet) walk(b []byte) error {
	fragmented := false
	for n := 0; isExtension(p.Protocol); n++ {
		h := b[p.HeaderLen:]
		if n == maxExtensionHeaders || len(h) < 8 { // every header has 8 bytes
			return ErrHeaderChain
		}
		size := 8 + int(h[1])*8
		switch p.Protocol {
		case headerRouting:
			if isSourceRoute(h[2], h[3]) {
				return ErrRoutingHeader
			}
		case headerAuth:
			size = 8 + int(h[1])*4
		case headerFragment:
			if fragmented {
				return ErrHeaderChain
			}
			fragmented = true
			size = 8
			field := binary.BigEndian.Uint16(h[2:])
			p.FragmentOffset = int(field &^ 7)
			p.MoreFragments = field&1 != 0
		}
		if len(h) < size {
			return ErrHeaderChain
		}
		p.Protocol = h[0]
		p.HeaderLen += size
		if p.FragmentOffset > 0 {
			return nil // no header follows in a later fragment
		}
	}
	// The first fragment must hold the full chain and the header of the upper
	// layer (RFC 8200 section 4.5).
	if p.MoreFragments && len(b)-p.HeaderLen < minUpperLayer(p.Protocol) {
		return ErrHeaderChain
	}
	return nil
}

// isSourceRoute reports whether a routing header directs the packet to another
// host than its destination address, which is the case if it has segments left.
// Type 0 is refused in any case (RFC 5095). Type 2 may have one segment left,
// because this is another address of the destination itself (RFC 6275 section
// 6.4).
func isSourceRoute(routingType, segmentsLeft uint8) bool {
	switch routingType {
	case 0:
		return true
	case 2:
		return segmentsLeft > 1
	}
	return segmentsLeft > 0
}

func isExtension(protocol uint8) bool {
	switch protocol {
	case headerHopByHop, headerRouting, headerFragment, headerAuth, headerDestination,
		headerMobility, headerHIP, headerShim6:
		return true
	}
	return false
}

// minUpperLayer returns the fewest bytes of the upper layer that a first
// fragment must hold. Apart from TCP this is the unit of fragments, 8 bytes.
func minUpperLayer(protocol uint8) int {
	const tcp, noNextHeader = 6, 59
	switch protocol {
	case tcp:
		return 20
	case noNextHeader:
		return 0
	}
	return 8
}
