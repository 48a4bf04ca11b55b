package ippacket

import (
	"encoding/binary"
	"net/netip"
)

// The IPv6 extension headers that have a Next Header field in the clear.
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

// maxExtensionHeaders is how many extension headers a packet may have. RFC 8200
// section 4.1 knows of no good reason for more than seven.
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
	if p.FragmentOffset+p.TotalLen-p.HeaderLen > maxPacket { // would be too long once reassembled
		return Packet{}, ErrLength
	}
	return p, nil
}

// header6 reads an IPv6 header without what follows it.
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

// walk follows the header chain of b, from where p is to the upper layer.
func (p *Packet) walk(b []byte) error {
	fragmented := false
	for n := 0; isExtension(p.Protocol); n++ {
		h := b[p.HeaderLen:]
		if n == maxExtensionHeaders || len(h) < 8 { // none is shorter
			return ErrHeaderChain
		}
		size := 8 + int(h[1])*8
		switch p.Protocol {
		case headerRouting:
			if leadsElsewhere(h[2], h[3]) {
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
			return nil // what follows is from the middle of something
		}
	}
	// The first fragment has the whole chain, the header of the upper layer
	// included (RFC 8200 section 4.5).
	if p.MoreFragments && len(b)-p.HeaderLen < minUpperLayer(p.Protocol) {
		return ErrHeaderChain
	}
	return nil
}

// leadsElsewhere reports whether a packet with a routing header of the type is
// refused, as one with an IPv4 source route is: one with segments left is not
// bound for its destination address. Headers of type 0 are refused in any case
// (RFC 5095), and those of type 2 never: the one segment that they have is
// another address of the destination itself (RFC 6275 section 6.4).
func leadsElsewhere(routingType, segmentsLeft uint8) bool {
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

// minUpperLayer returns how many bytes of the upper layer a first fragment has at
// least. Fragments are of multiples of 8 bytes.
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
