// Package ippacket parses IP packets as a router does, decrements their hop
// limit, fragments them, and makes the ICMP errors about them (RFC 791, RFC 792,
// RFC 1812, RFC 4443, RFC 8200).
//
// No function of this package allocates memory, except to extend a slice it was
// given that is too small, or keeps a slice it was given.
package ippacket

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// The IP protocol numbers of ICMP. Protocol 1 is ICMP in IPv4 only, and 58 in
// IPv6 only.
const (
	protocolICMP   = 1
	protocolICMPv6 = 58
)

const (
	ipv4HeaderLen = 20    // without options
	ipv6HeaderLen = 40    // without extension headers
	maxPacket     = 65535 // bytes of an IPv4 packet, and of the payload of an IPv6 packet
)

// Errors of [Parse].
var (
	ErrVersion       = errors.New("neither IPv4 nor IPv6")
	ErrTruncated     = errors.New("IP packet is cut short")
	ErrLength        = errors.New("a length in the IP header is wrong")
	ErrChecksum      = errors.New("the IPv4 header checksum is wrong")
	ErrHeaderChain   = errors.New("the IPv6 header chain is cut or too long")
	ErrRoutingHeader = errors.New("IPv6 routing header that leads elsewhere") // RFC 5095, RFC 9288 section 3.5.2
	ErrSourceRoute   = errors.New("IPv4 source route")                        // RFC 7126 section 4.3
)

// Packet is what a router needs to know of the headers of an IP packet.
type Packet struct {
	Version  uint8 // 4 or 6
	Src, Dst netip.Addr

	// Protocol is that of the upper layer. In IPv6 it is the first Next Header
	// that is none of an extension header that can be walked (RFC 9484 section
	// 4.8): ESP counts as an upper layer. In a fragment that is not the first it
	// is the Next Header of the fragment header.
	Protocol uint8

	HopLimit  uint8 // or time to live
	HeaderLen int   // offset of the upper layer, or of what a fragment holds of it, in bytes
	TotalLen  int   // header and payload, in bytes

	DontFragment   bool // always true in IPv6: routers do not fragment it
	FragmentOffset int  // in bytes; 0 also in a packet that is whole
	MoreFragments  bool
}

// Parse parses and validates the headers of the packet b, which must hold that
// packet and nothing else: a length that is not that of b is an error, and so are
// jumbograms (RFC 2675), which have none. In IPv4 it checks the header checksum.
// In IPv6 it walks the header chain, of at most 8 extension headers.
//
// The errors are those of this package, as they are. With ErrHeaderChain and
// ErrRoutingHeader the Packet is that of the headers before the one in question,
// Protocol and HeaderLen are the type and the offset of that one, and
// [AppendICMPError] may be called; with any other error the Packet is worthless.
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
	case p.FragmentOffset+p.TotalLen > maxPacket: // would be too long once reassembled
		return Packet{}, ErrLength
	case hasSourceRoute(b[ipv4HeaderLen:p.HeaderLen]):
		return Packet{}, ErrSourceRoute
	}
	return p, nil
}

// hasSourceRoute looks for a source route among the options of an IPv4 header
// (RFC 791 section 3.1). Such a packet is not bound for its destination address.
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
			return false // nobody can make sense of what follows
		}
		options = options[options[1]:]
	}
	return false
}

// header4 reads an IPv4 header. It checks no more than that the header is there.
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

// The fields of the 16 bits at offset 6 of an IPv4 header. The offset is in units
// of 8 bytes.
const (
	flagDF     = 0x4000
	flagMF     = 0x2000
	maskOffset = 0x1fff
)

// Destination returns the destination address of the packet b, and false when b is
// too short to hold an IP header. It checks nothing else.
func Destination(b []byte) (netip.Addr, bool) {
	switch {
	case len(b) >= ipv4HeaderLen && b[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(b[16:20])), true
	case len(b) >= ipv6HeaderLen && b[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(b[24:40])), true
	}
	return netip.Addr{}, false
}

// IsICMP reports whether protocol is that of ICMP in packets between addresses of
// a's family.
func IsICMP(a netip.Addr, protocol uint8) bool {
	if a.Is4() {
		return protocol == protocolICMP
	}
	return protocol == protocolICMPv6
}

// IsLinkLocal reports whether packets from or to a must not leave the link they
// are on: addresses of 169.254.0.0/16 (RFC 3927), 224.0.0.0/24 (RFC 5771),
// fe80::/10 and IPv6 multicast of interface-local or link-local scope, whatever
// its flags (RFC 4291), and 255.255.255.255 (RFC 1812 section 5.3.5.1).
func IsLinkLocal(a netip.Addr) bool {
	return a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsInterfaceLocalMulticast() || a == broadcast
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
