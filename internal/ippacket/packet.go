// Package ippacket has the functions that a router applies to IP packets (RFC
// 791, RFC 792, RFC 1812, RFC 4443, RFC 8200).
//
// [Parse] validates the headers of a packet and returns them as a [Packet],
// which most other functions take. [DecrementHopLimit], [ClampMSS] and
// [Fragment] prepare the packet for the next hop. If a router cannot forward
// it, [AppendICMPError] builds the error for its sender; [Quoted] reads such an
// error.
//
// The functions are for the packet path. They do not retain the slices given to
// them, and allocate memory only to extend a slice without enough capacity.
package ippacket

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// The IP protocol numbers of ICMP. Protocol 1 is ICMP only in IPv4, protocol 58
// only in IPv6.
const (
	protocolICMP   = 1
	protocolICMPv6 = 58
)

const (
	// Lengths in bytes of the headers without options or extension headers.
	ipv4HeaderLen = 20
	ipv6HeaderLen = 40

	// maxPacket is the longest IPv4 packet and the longest payload of an IPv6
	// packet, in bytes.
	maxPacket = 65535
)

// Errors of [Parse].
var (
	ErrVersion     = errors.New("neither IPv4 nor IPv6")
	ErrTruncated   = errors.New("the IP packet is truncated")
	ErrLength      = errors.New("a length in the IP header is wrong")
	ErrChecksum    = errors.New("the IPv4 header checksum is wrong")
	ErrHeaderChain = errors.New("the IPv6 header chain is truncated or too long")

	// ErrRoutingHeader means that an IPv6 routing header directs the packet to
	// another host than its destination (RFC 5095, RFC 9288 section 3.5.2).
	ErrRoutingHeader = errors.New("the IPv6 routing header is a source route")

	// ErrSourceRoute means that an IPv4 option does the same (RFC 7126 section
	// 4.3).
	ErrSourceRoute = errors.New("the IPv4 header has a source route")
)

// Packet has the header fields of an IP packet that a router needs.
type Packet struct {
	Version  uint8 // 4 or 6
	Src, Dst netip.Addr

	// Protocol is the protocol of the upper layer. In IPv6 it is the first Next
	// Header that is not an extension header with a Next Header field of its
	// own (RFC 9484 section 4.8), so ESP counts as an upper layer. In a
	// fragment other than the first it is the Next Header of the fragment
	// header.
	Protocol uint8

	HopLimit uint8 // time to live in IPv4

	// HeaderLen is the offset in bytes of the upper layer, or of the fragment's
	// data.
	HeaderLen int

	TotalLen int // bytes of header and payload

	// DontFragment is always true in IPv6, which routers do not fragment.
	DontFragment bool

	FragmentOffset int // bytes; 0 if the packet is no fragment
	MoreFragments  bool
}

// Parse parses and validates the headers of the packet b, which must hold
// nothing else. Packets whose length field differs from len(b) are an error,
// and so are jumbograms (RFC 2675), which have no length field. In IPv4 Parse
// verifies the header checksum. In IPv6 it walks the header chain, which may
// have at most 8 extension headers.
//
// Errors are the variables of this package, not wrapped. With ErrHeaderChain
// and ErrRoutingHeader the Packet describes the headers before the offending
// one, Protocol and HeaderLen are the type and offset of the offending header,
// and the Packet may be given to [AppendICMPError]. With any other error the
// Packet is zero.
func Parse(b []byte) (Packet, error) {
	if len(b) == 0 {
		return Packet{}, ErrTruncated
	}
	switch b[0] >> 4 {
	case 4:
		return parse4(b)
	case 6:
		return parse6(b)
	}
	return Packet{}, ErrVersion
}

func parse4(b []byte) (Packet, error) {
	p, err := header4(b)
	switch {
	case err != nil:
		return Packet{}, err
	case p.TotalLen < p.HeaderLen:
		return Packet{}, ErrLength
	case p.TotalLen > len(b):
		return Packet{}, ErrTruncated
	case p.TotalLen < len(b):
		return Packet{}, ErrLength
	case checksum(b[:p.HeaderLen], 0) != 0:
		return Packet{}, ErrChecksum
	case p.FragmentOffset+p.TotalLen > maxPacket: // the reassembled packet is too long
		return Packet{}, ErrLength
	case hasSourceRoute(b[ipv4HeaderLen:p.HeaderLen]):
		return Packet{}, ErrSourceRoute
	}
	return p, nil
}

// hasSourceRoute reports whether the options of an IPv4 header have a source
// route (RFC 791 section 3.1). Such a packet is not for its destination
// address.
func hasSourceRoute(options []byte) bool {
	const end, nop, loose, strict = 0, 1, 131, 137
	for len(options) > 0 {
		switch options[0] {
		case end:
			return false
		case nop:
			options = options[1:]
			continue
		case loose, strict:
			return true
		}
		if len(options) < 2 || options[1] < 2 || int(options[1]) > len(options) {
			return false // malformed, so no receiver parses the options after it
		}
		options = options[options[1]:]
	}
	return false
}

// header4 parses an IPv4 header. It checks only that b holds the header.
func header4(b []byte) (Packet, error) {
	if len(b) < ipv4HeaderLen {
		return Packet{}, ErrTruncated
	}
	headerLen := int(b[0]&0xf) * 4
	if headerLen < ipv4HeaderLen {
		return Packet{}, ErrLength
	}
	if len(b) < headerLen {
		return Packet{}, ErrTruncated
	}
	fragment := binary.BigEndian.Uint16(b[6:])
	return Packet{
		Version:        4,
		Src:            netip.AddrFrom4([4]byte(b[12:16])),
		Dst:            netip.AddrFrom4([4]byte(b[16:20])),
		Protocol:       b[9],
		HopLimit:       b[8],
		HeaderLen:      headerLen,
		TotalLen:       int(binary.BigEndian.Uint16(b[2:])),
		DontFragment:   fragment&flagDF != 0,
		FragmentOffset: int(fragment&maskOffset) * 8,
		MoreFragments:  fragment&flagMF != 0,
	}, nil
}

// The parts of the 16 bits at offset 6 of an IPv4 header. The fragment offset
// is in units of 8 bytes.
const (
	flagDF     = 0x4000
	flagMF     = 0x2000
	maskOffset = 0x1fff
)

// Destination returns the destination address of the packet b. ok is false if b
// is too short for an IP header. Destination checks nothing else.
func Destination(b []byte) (dst netip.Addr, ok bool) {
	switch {
	case len(b) >= ipv4HeaderLen && b[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(b[16:20])), true
	case len(b) >= ipv6HeaderLen && b[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(b[24:40])), true
	}
	return netip.Addr{}, false
}

// IsICMP reports whether protocol is ICMP in packets of a's address family.
func IsICMP(a netip.Addr, protocol uint8) bool {
	if a.Is4() {
		return protocol == protocolICMP
	}
	return protocol == protocolICMPv6
}

// IsLinkLocal reports whether routers must not forward packets from or to a.
// This holds for 169.254.0.0/16 (RFC 3927), 224.0.0.0/24 (RFC 5771), fe80::/10,
// IPv6 multicast of interface-local or link-local scope (RFC 4291), and
// 255.255.255.255 (RFC 1812 section 5.3.5.1).
func IsLinkLocal(a netip.Addr) bool {
	return a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsInterfaceLocalMulticast() ||
		a == broadcast
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
