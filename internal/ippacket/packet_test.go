package ippacket

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gopacket/gopacket/layers"
)

var compareAddrs = cmpopts.EquateComparable(netip.Addr{})

func TestParse(t *testing.T) {
	lo4 := netip.MustParseAddr("192.0.2.1")
	lo6 := netip.MustParseAddr("2001:db8::1")
	for name, want := range map[string]Packet{
		"udp4": {Version: 4, Src: lo4, Dst: lo4, Protocol: 17, HopLimit: 64, HeaderLen: 20,
			TotalLen: 38, DontFragment: true},
		"udp4-frag": {Version: 4, Src: lo4, Dst: lo4, Protocol: 17, HopLimit: 64, HeaderLen: 20,
			TotalLen: 1500, MoreFragments: true},
		"udp4-options": {Version: 4, Src: lo4, Dst: lo4, Protocol: 17, HopLimit: 64, HeaderLen: 36,
			TotalLen: 54, DontFragment: true},
		"igmp": {Version: 4, Src: netip.MustParseAddr("198.51.100.1"),
			Dst: netip.MustParseAddr("224.0.0.22"), Protocol: 2, HopLimit: 1, HeaderLen: 24,
			TotalLen: 40, DontFragment: true},
		"udp6": {Version: 6, Src: lo6, Dst: lo6, Protocol: 17, HopLimit: 64, HeaderLen: 40,
			TotalLen: 58, DontFragment: true},
		"udp6-frag": {Version: 6, Src: lo6, Dst: lo6, Protocol: 17, HopLimit: 64, HeaderLen: 48,
			TotalLen: 1496, DontFragment: true, MoreFragments: true},
		"udp6-ext": {Version: 6, Src: lo6, Dst: lo6, Protocol: 17, HopLimit: 64, HeaderLen: 56,
			TotalLen: 74, DontFragment: true},
		"udp6-ext-frag": {Version: 6, Src: lo6, Dst: lo6, Protocol: 17, HopLimit: 64, HeaderLen: 64,
			TotalLen: 1496, DontFragment: true, MoreFragments: true},
		"mld": {Version: 6, Src: netip.IPv6Unspecified(), Dst: netip.MustParseAddr("ff02::16"),
			Protocol: 58, HopLimit: 1, HeaderLen: 48, TotalLen: 76, DontFragment: true},
	} {
		t.Run(name, func(t *testing.T) {
			got := mustParse(t, linuxPacket(t, name))
			if diff := cmp.Diff(want, got, compareAddrs); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestParseLikeGopacket compares Parse with gopacket on captured packets.
func TestParseLikeGopacket(t *testing.T) {
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			p := mustParse(t, c.b)
			packet := decode(t, c.b)
			want := Packet{Version: p.Version, TotalLen: len(c.b), DontFragment: true}
			switch ip := packet.NetworkLayer().(type) {
			case *layers.IPv4:
				want.Src, _ = netip.AddrFromSlice(ip.SrcIP)
				want.Dst, _ = netip.AddrFromSlice(ip.DstIP)
				want.HopLimit, want.Protocol, want.HeaderLen = ip.TTL, uint8(ip.Protocol),
					int(ip.IHL)*4
				want.DontFragment = ip.Flags&layers.IPv4DontFragment != 0
				want.MoreFragments = ip.Flags&layers.IPv4MoreFragments != 0
				want.FragmentOffset = int(ip.FragOffset) * 8
			case *layers.IPv6:
				want.Src, _ = netip.AddrFromSlice(ip.SrcIP)
				want.Dst, _ = netip.AddrFromSlice(ip.DstIP)
				want.HopLimit, want.Protocol, want.HeaderLen = ip.HopLimit, uint8(ip.NextHeader), 40
				for _, l := range packet.Layers()[1:] {
					switch h := l.(type) {
					case *layers.IPv6HopByHop:
						want.Protocol = uint8(h.NextHeader)
					case *layers.IPv6Destination:
						want.Protocol = uint8(h.NextHeader)
					case *layers.IPv6Fragment:
						want.Protocol = uint8(h.NextHeader)
						want.MoreFragments, want.FragmentOffset = h.MoreFragments,
							int(h.FragmentOffset)*8
					default:
						continue
					}
					want.HeaderLen += len(l.LayerContents())
				}
			}
			if diff := cmp.Diff(want, p, compareAddrs); diff != "" {
				t.Errorf("(-gopacket +got):\n%s", diff)
			}
		})
	}
}

// TestParseExactLength checks that Parse refuses truncated packets and packets
// followed by more bytes.
func TestParseExactLength(t *testing.T) {
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			for n := range c.b {
				if _, err := Parse(c.b[:n]); err != ErrTruncated {
					t.Fatalf("first %d bytes: %v, want ErrTruncated", n, err)
				}
			}
			if _, err := Parse(append(bytes.Clone(c.b), 0)); err != ErrLength {
				t.Errorf("with one more byte: %v, want ErrLength", err)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	good4, good6 := linuxPacket(t, "udp4"), linuxPacket(t, "udp6")
	set := func(b []byte, i int, v byte) []byte {
		b = bytes.Clone(b)
		b[i] = v
		return b
	}
	// The payload of edge ends so that the reassembled packet, with its header,
	// has 65536 bytes.
	edge := udp4(t, 4, func(ip *layers.IPv4) { ip.FragOffset = 65504 / 8 })
	over := udp4(t, 5, func(ip *layers.IPv4) { ip.FragOffset = 65504 / 8 })
	if len(edge) != 32 {
		t.Fatalf("the packet has %d bytes", len(edge))
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want error
	}{
		{"no bytes", nil, ErrTruncated},
		{"version 0", set(good4, 0, 0x05), ErrVersion},
		{"version 5", set(good4, 0, 0x55), ErrVersion},
		{"version 15", set(good6, 0, 0xf0), ErrVersion},
		{"IPv4 header of 16 bytes", set(good4, 0, 0x44), ErrLength},
		{"IPv4 header of 60 bytes in 38", set(good4, 0, 0x4f), ErrTruncated},
		{"IPv4 total length below the header", set(good4, 3, 19), ErrLength},
		{"IPv4 total length above the packet", set(good4, 3, 39), ErrTruncated},
		{"IPv4 total length below the packet", set(good4, 3, 37), ErrLength},
		{"IPv4 checksum", set(good4, 10, good4[10]^1), ErrChecksum},
		{"IPv4 address changed", set(good4, 19, 77), ErrChecksum},
		{"IPv4 checksum not computed", set(set(good4, 10, 0), 11, 0), ErrChecksum},
		{"IPv4 options changed", set(linuxPacket(t, "udp4-options"), 25, 77), ErrChecksum},
		{"IPv4 fragment beyond 65535", over, ErrLength},
		{"IPv4 fragment up to 65535", edge, ErrLength}, // 65504 + 32 = 65536
		{"IPv6 payload length above", set(good6, 5, 19), ErrTruncated},
		{"IPv6 payload length below", set(good6, 5, 17), ErrLength},
		{"jumbogram", set(good6, 5, 0), ErrLength},
		{"IPv6 fragment beyond 65535",
			packet6(headerFragment, []byte{17, 0, 0xff, 0xf8, 0, 0, 0, 1}, pattern(8)), ErrLength},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if p, err := Parse(tt.b); err != tt.want || p != (Packet{}) {
				t.Errorf("%v, %+v, want %v and no packet", err, p, tt.want)
			}
		})
	}
}

func TestParseLastFragment(t *testing.T) {
	b := udp4(t, 3, func(ip *layers.IPv4) { ip.FragOffset = 65504 / 8 })
	if p := mustParse(t, b); p.FragmentOffset+p.TotalLen != maxPacket {
		t.Errorf("the fragment ends at %d, want %d", p.FragmentOffset+p.TotalLen, maxPacket)
	}
	b = packet6(headerFragment, []byte{17, 0, 0xff, 0xf8, 0, 0, 0, 1}, pattern(7))
	if p := mustParse(t, b); p.FragmentOffset != 65528 {
		t.Errorf("offset %d, want 65528", p.FragmentOffset)
	}
}

// TestParseLongest parses the longest packets of both IP versions.
func TestParseLongest(t *testing.T) {
	b4 := make([]byte, 65535)
	copy(b4, udp4(t, 0, nil))
	repair(b4)
	b6 := packet6(17, pattern(65535))
	for _, b := range [][]byte{b4, b6} {
		if p := mustParse(t, b); p.TotalLen != len(b) {
			t.Errorf("total length %d, want %d", p.TotalLen, len(b))
		}
	}
}

func TestDestination(t *testing.T) {
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			want := mustParse(t, c.b).Dst
			if got, ok := Destination(c.b); !ok || got != want {
				t.Errorf("%v, %v, want %v", got, ok, want)
			}
			header := 20
			if c.b[0]>>4 == 6 {
				header = 40
			}
			if got, ok := Destination(c.b[:header-1]); ok {
				t.Errorf("destination of a truncated header: %v", got)
			}
		})
	}
	if got, ok := Destination(make([]byte, 100)); ok {
		t.Errorf("version 0: %v", got)
	}
}

func TestIsICMP(t *testing.T) {
	for protocol := range 256 {
		v4, v6 := IsICMP(netip.IPv4Unspecified(), uint8(protocol)),
			IsICMP(netip.IPv6Unspecified(), uint8(protocol))
		if v4 != (protocol == 1) || v6 != (protocol == 58) {
			t.Errorf("protocol %d: ICMP %t in IPv4, %t in IPv6", protocol, v4, v6)
		}
	}
}

func TestIsLinkLocal(t *testing.T) {
	for addrs, want := range map[string]bool{
		"169.254.0.0 169.254.169.254 169.254.255.255":    true,
		"169.253.255.255 169.255.0.0":                    false,
		"224.0.0.0 224.0.0.1 224.0.0.255":                true,
		"223.255.255.255 224.0.1.0 239.255.255.250":      false,
		"255.255.255.255":                                true,
		"255.255.255.254 0.0.0.0 127.0.0.1 10.0.0.1":     false,
		"fe80:: fe80::1 febf:ffff::1":                    true,
		"fe7f:ffff::1 fec0::1 fc00::1 2001:db8::1 ::1":   false,
		"ff01::1 ff02::1 ff02:ffff::1 ff12::1 ff31::1":   true,
		"ff03::1 ff05::2 ff0e::1 ff00::1 ff1e::2 :: ::2": false,
	} {
		for a := range strings.FieldsSeq(addrs) {
			t.Run(a, func(t *testing.T) {
				if got := IsLinkLocal(netip.MustParseAddr(a)); got != want {
					t.Errorf("%v, want %v", got, want)
				}
			})
		}
	}
	if IsLinkLocal(netip.Addr{}) {
		t.Error("IsLinkLocal() = true for the zero Addr")
	}
}

func TestChecksum(t *testing.T) {
	b := pattern(2000)
	for n := range b {
		if got, want := checksum(b[:n], 0), referenceChecksum(b[:n]); got != want {
			t.Fatalf("of %d bytes: %#04x, want %#04x", n, got, want)
		}
	}
	ones := bytes.Repeat([]byte{0xff}, 65535)
	if got, want := checksum(ones, 0), referenceChecksum(ones); got != want {
		t.Errorf("of 65535 bytes of ones: %#04x, want %#04x", got, want)
	}
	length := binary.BigEndian.AppendUint32(nil, 70000)
	if got, want := checksum(b, pseudoHeader6(b[:32], 70000, 58)),
		referenceChecksum(b[:32], length, []byte{0, 0, 0, 58}, b); got != want {
		t.Errorf("with pseudo-header: %#04x, want %#04x", got, want)
	}
}

// TestParseRefusesSourceRoutes has packets that are not for their destination
// address.
func TestParseRefusesSourceRoutes(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []byte
		want    error
	}{
		{"loose", []byte{131, 7, 4, 192, 0, 2, 1, 0}, ErrSourceRoute},
		{"strict", []byte{1, 137, 7, 4, 192, 0, 2, 1}, ErrSourceRoute},
		{"behind record route", []byte{7, 4, 4, 0, 131, 4, 4, 0}, ErrSourceRoute},
		{"behind the end of options", []byte{0, 131, 7, 4}, nil},
		{"inside record route", []byte{7, 7, 4, 131, 131, 131, 131, 0}, nil},
		{"truncated option", []byte{7, 99, 4, 0}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := AppendEcho(nil, netip.MustParseAddr("192.0.2.1"),
				netip.MustParseAddr("192.0.2.2"), 64,
				true, 1, 1, nil)
			b = slices.Insert(b, 20, tt.options...)
			b[0] += byte(len(tt.options) / 4)
			binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
			binary.BigEndian.PutUint16(b[10:], 0)
			binary.BigEndian.PutUint16(b[10:], checksum(b[:20+len(tt.options)], 0))
			if _, err := Parse(b); err != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}
