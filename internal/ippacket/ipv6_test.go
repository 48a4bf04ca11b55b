package ippacket

import (
	"bytes"
	"testing"
)

// extension returns an extension header of size bytes. Its length field counts
// units of 8 bytes.
func extension(next uint8, size int) []byte {
	h := make([]byte, size)
	h[0], h[1] = next, uint8(size/8-1)
	h[2] = 1 // routing type, because type 0 is refused
	return h
}

// routing returns a routing header with room for one address. Its Next Header
// is UDP.
func routing(routingType, segmentsLeft uint8) []byte {
	h := extension(17, 24)
	h[2], h[3] = routingType, segmentsLeft
	return h
}

// authentication returns an authentication header of size bytes.
func authentication(next uint8, size int) []byte {
	h := make([]byte, size)
	h[0], h[1] = next, uint8(size/4-2)
	return h
}

// fragmentHeader returns a fragment header; offset is in bytes.
func fragmentHeader(next uint8, offset int, more bool) []byte {
	// The second byte is reserved.
	h := []byte{next, 0xff, byte(offset >> 8), byte(offset), 0, 0, 0, 1}
	if more {
		h[3] |= 1
	}
	return h
}

func TestHeaderChain(t *testing.T) {
	upper := pattern(24)
	for _, tt := range []struct {
		name     string
		b        []byte
		protocol uint8
		offset   int // HeaderLen
	}{
		{"none", packet6(17, upper), 17, 40},
		{"no payload", packet6(17), 17, 40},
		{"hop-by-hop", packet6(headerHopByHop, extension(6, 8), upper), 6, 48},
		{"destination options", packet6(headerDestination, extension(6, 264), upper), 6, 304},
		{"longest", packet6(headerDestination, extension(6, 2048), upper), 6, 2088},
		{"routing", packet6(headerRouting, extension(58, 24), upper), 58, 64},
		{"home address of a mobile node", packet6(headerRouting, routing(2, 1), upper), 17, 64},
		{"RPL without segments left", packet6(headerRouting, routing(3, 0), upper), 17, 64},
		{"SRv6 without segments left", packet6(headerRouting, routing(4, 0), upper), 17, 64},
		{"authentication", packet6(headerAuth, authentication(6, 28), upper), 6, 68},
		{"shortest authentication", packet6(headerAuth, authentication(6, 8), upper), 6, 48},
		{"mobility", packet6(headerMobility, extension(59, 16)), 59, 56},
		{"HIP", packet6(headerHIP, extension(59, 40)), 59, 80},
		{"shim6", packet6(headerShim6, extension(17, 8), upper), 17, 48},
		{"ESP is an upper layer", packet6(headerHopByHop, extension(50, 8), upper), 50, 48},
		{"no next header", packet6(59, upper), 59, 40},
		{"unknown", packet6(headerDestination, extension(253, 8), upper), 253, 48},
		{"all", packet6(headerHopByHop,
			extension(headerDestination, 8), extension(headerRouting, 16),
			extension(headerFragment, 24),
			fragmentHeader(headerAuth, 0, false), authentication(headerDestination, 12),
			extension(headerMobility, 8), extension(headerShim6, 8),
			extension(17, 8), upper), 17, 40 + 8 + 16 + 24 + 8 + 12 + 8 + 8 + 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Parse(tt.b)
			if err != nil || p.Protocol != tt.protocol || p.HeaderLen != tt.offset {
				t.Errorf("%v, protocol %d at %d, want %d at %d", err, p.Protocol,
					p.HeaderLen, tt.protocol, tt.offset)
			}
			if p.FragmentOffset != 0 || p.MoreFragments {
				t.Errorf("is a fragment: %+v", p)
			}
		})
	}
}

func TestHeaderChainFragments(t *testing.T) {
	upper := pattern(24)
	for _, tt := range []struct {
		name     string
		b        []byte
		protocol uint8
		header   int
		offset   int
		more     bool
	}{
		{"first", packet6(headerFragment, fragmentHeader(6, 0, true), upper), 6, 48, 0, true},
		{"first with headers after it",
			packet6(headerFragment, fragmentHeader(headerDestination, 0, true), extension(17, 16),
				upper), 17, 64, 0, true},
		{"middle", packet6(headerFragment, fragmentHeader(6, 1480, true), upper), 6, 48,
			1480, true},
		{"last", packet6(headerFragment, fragmentHeader(6, 65480, false), upper), 6, 48,
			65480, false},
		// The payload of later fragments looks like headers.
		{"later with headers", packet6(headerHopByHop, extension(headerFragment, 8),
			fragmentHeader(headerRouting, 8, false), make([]byte, 8)), headerRouting, 56, 8, false},
		{"later, empty", packet6(headerFragment, fragmentHeader(headerDestination, 8, false)),
			headerDestination, 48, 8, false},
		{"first, no next header", packet6(headerFragment, fragmentHeader(59, 0, true)), 59, 48,
			0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Parse(tt.b)
			if err != nil || p.Protocol != tt.protocol || p.HeaderLen != tt.header ||
				p.FragmentOffset != tt.offset || p.MoreFragments != tt.more {
				t.Errorf("%v, %+v, want %+v", err, p, tt)
			}
		})
	}
}

func TestHeaderChainErrors(t *testing.T) {
	upper := pattern(24)
	nine := [][]byte{}
	for range 8 {
		nine = append(nine, extension(headerDestination, 8))
	}
	nine = append(nine, extension(17, 8), upper)
	truncated := extension(17, 8)
	truncated[1] = 1
	for _, tt := range []struct {
		name     string
		b        []byte
		want     error
		protocol uint8 // type of the offending header
		offset   int   // offset of the offending header
	}{
		{"no header", packet6(headerHopByHop), ErrHeaderChain, headerHopByHop, 40},
		{"7 bytes", packet6(headerFragment, fragmentHeader(17, 0, false)[:7]), ErrHeaderChain,
			headerFragment, 40},
		{"truncated", packet6(headerDestination, truncated), ErrHeaderChain, headerDestination, 40},
		{"second truncated", packet6(headerHopByHop, extension(headerShim6, 8), truncated),
			ErrHeaderChain,
			headerShim6, 48},
		{"authentication truncated", packet6(headerAuth, authentication(6, 12)[:11]),
			ErrHeaderChain,
			headerAuth, 40},
		{"nine headers", packet6(headerDestination, nine...), ErrHeaderChain,
			headerDestination, 104},
		{"fragment in fragment", packet6(headerFragment, fragmentHeader(headerFragment, 0, false),
			fragmentHeader(17, 8, false), upper), ErrHeaderChain, headerFragment, 48},
		{"first fragment truncated in the chain",
			packet6(headerFragment, fragmentHeader(headerDestination, 0, true), truncated),
			ErrHeaderChain, headerDestination, 48},
		{"first fragment without upper layer", packet6(headerFragment, fragmentHeader(17, 0, true)),
			ErrHeaderChain, 17, 48},
		{"first fragment with 7 bytes of UDP",
			packet6(headerFragment, fragmentHeader(17, 0, true), upper[:7]), ErrHeaderChain,
			17, 48},
		{"first fragment with 16 bytes of TCP",
			packet6(headerFragment, fragmentHeader(6, 0, true), upper[:16]), ErrHeaderChain, 6, 48},
		{"routing type 0", packet6(headerRouting, make([]byte, 24)), ErrRoutingHeader,
			headerRouting, 40},
		{"routing type 0 later", packet6(headerHopByHop, extension(headerRouting, 8),
			[]byte{17, 2, 0, 1}, make([]byte, 20), upper), ErrRoutingHeader, headerRouting, 48},
		{"routing type 0 without segments",
			packet6(headerRouting, []byte{17, 0, 0, 0, 0, 0, 0, 0}, upper), ErrRoutingHeader,
			headerRouting, 40},
		{"routing type 1 with a segment left", packet6(headerRouting, routing(1, 1), upper),
			ErrRoutingHeader, headerRouting, 40},
		{"routing type 2 with two segments left", packet6(headerRouting, routing(2, 2), upper),
			ErrRoutingHeader, headerRouting, 40},
		{"RPL with a segment left", packet6(headerRouting, routing(3, 1), upper), ErrRoutingHeader,
			headerRouting, 40},
		{"SRv6 with two segments left",
			packet6(headerHopByHop, extension(headerRouting, 8), routing(4, 2), upper),
			ErrRoutingHeader, headerRouting, 48},
		{"unknown routing type with a segment left", packet6(headerRouting, routing(200, 1), upper),
			ErrRoutingHeader, headerRouting, 40},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Parse(tt.b)
			if err != tt.want || p.Protocol != tt.protocol || p.HeaderLen != tt.offset {
				t.Errorf("%v, protocol %d at %d, want %v, %d at %d", err, p.Protocol,
					p.HeaderLen, tt.want, tt.protocol, tt.offset)
			}
			if p.Src != host6 || p.Dst != server6 || p.TotalLen != len(tt.b) || p.HopLimit != 64 {
				t.Errorf("the headers before the offending one are not reported: %+v", p)
			}
		})
	}
}

// TestHeaderChainTruncated truncates a header chain after each byte, with a
// correct payload length.
func TestHeaderChainTruncated(t *testing.T) {
	headers := bytes.Join([][]byte{
		extension(headerRouting, 16), extension(headerFragment, 8),
		fragmentHeader(headerAuth, 0, true),
		authentication(headerDestination, 16), extension(6, 24),
	}, nil)
	const tcp = 20
	full := packet6(headerHopByHop, headers, pattern(tcp))
	mustParse(t, full)
	for n := 40; n < len(full); n++ {
		b := bytes.Clone(full[:n])
		repair(b)
		if p, err := Parse(b); err != ErrHeaderChain {
			t.Fatalf("first %d bytes: %v, %+v, want ErrHeaderChain", n, err, p)
		}
	}
}
