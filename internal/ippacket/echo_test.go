package ippacket

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"pgregory.net/rapid"
)

// TestEchoLinux parses ping packets captured on Linux and builds them again.
func TestEchoLinux(t *testing.T) {
	want := make([]byte, 16)
	for i := range want {
		want[i] = byte(i)
	}
	n := 0
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			if c.name != "ping4" && c.name != "ping6" {
				return
			}
			p := mustParse(t, c.b)
			request, id, seq, data, ok := ParseEcho(c.b, p)
			if !ok || request != (n%2 == 0) || id != 0x1234 || seq != 1 ||
				!bytes.Equal(data, want) {
				t.Errorf("%v, request %v, id %#x, seq %d, data %x", ok, request, id,
					seq, data)
			}
			b := AppendEcho(nil, p.Src, p.Dst, p.HopLimit, request, id, seq, data)
			if !bytes.Equal(b[p.HeaderLen:], c.b[p.HeaderLen:]) {
				t.Errorf("wrote %x, Linux %x", b[p.HeaderLen:], c.b[p.HeaderLen:])
			}
			n++
		})
	}
	if n != 4 {
		t.Errorf("%d pings, want 4: a request and a reply of both IP versions", n)
	}
}

func TestEchoRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		src, dst := host4, server4
		if rapid.Bool().Draw(rt, "IPv6") {
			src, dst = host6, netip.MustParseAddr("ff02::1")
		}
		hopLimit := rapid.Uint8().Draw(rt, "hop limit")
		request := rapid.Bool().Draw(rt, "request")
		id, seq := rapid.Uint16().Draw(rt, "id"), rapid.Uint16().Draw(rt, "seq")
		data := rapid.SliceOf(rapid.Byte()).Draw(rt, "data")
		b := AppendEcho([]byte("prefix"), src, dst, hopLimit, request, id, seq, data)
		b, ok := bytes.CutPrefix(b, []byte("prefix"))
		if !ok {
			rt.Fatal("AppendEcho changed the bytes already in dst")
		}
		p := mustParse(t, b)
		if p.Src != src || p.Dst != dst || p.HopLimit != hopLimit || !p.DontFragment ||
			IsICMPError(b, p) {
			rt.Fatalf("header: %+v", p)
		}
		gotRequest, gotID, gotSeq, gotData, ok := ParseEcho(b, p)
		if !ok || gotRequest != request || gotID != id || gotSeq != seq ||
			!bytes.Equal(gotData, data) {
			rt.Fatalf("%v, request %v, id %d, seq %d, data %x", ok, gotRequest, gotID, gotSeq,
				gotData)
		}
		decode(t, b)
	})
}

func TestAppendEchoImpossible(t *testing.T) {
	mapped := netip.MustParseAddr("::ffff:192.0.2.1")
	for _, tt := range []struct {
		name     string
		src, dst netip.Addr
		n        int
	}{
		{"two families", host4, host6, 8},
		{"two families, IPv6 source", host6, host4, 8},
		{"IPv4-mapped source", mapped, host4, 8},
		{"no source", netip.Addr{}, host4, 8},
		{"no destination", host6, netip.Addr{}, 8},
		{"too long", host4, server4, 65535 - 28 + 1},
		{"too long for IPv6", host6, server6, 65535 - 8 + 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dst := []byte("before")
			if b := AppendEcho(dst, tt.src, tt.dst, 64, true, 1, 2,
				make([]byte, tt.n)); !bytes.Equal(b, dst) {
				t.Errorf("%d bytes were appended", len(b)-len(dst))
			}
		})
	}
	for name, b := range map[string][]byte{
		"longest":      AppendEcho(nil, host4, server4, 64, true, 1, 2, make([]byte, 65535-28)),
		"longest IPv6": AppendEcho(nil, host6, server6, 64, true, 1, 2, make([]byte, 65535-8)),
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, _, _, ok := ParseEcho(b, mustParse(t, b)); !ok {
				t.Error("ParseEcho refuses the packet")
			}
		})
	}
}

func TestParseEchoRefuses(t *testing.T) {
	flip := func(b []byte, i int) []byte {
		b = bytes.Clone(b)
		b[i] ^= 1
		return b
	}
	ping4, ping6 := linuxPacket(t, "ping4"), linuxPacket(t, "ping6")
	for name, b := range map[string][]byte{
		"checksum":         flip(ping4, 22),
		"data":             flip(ping4, len(ping4)-1),
		"ICMPv6 checksum":  flip(ping6, 42),
		"ICMPv6 data":      flip(ping6, len(ping6)-1),
		"ICMPv6 source":    flip(ping6, 23),
		"code 1":           icmp4(t, 8, 1, nil),
		"ICMPv6 code 1":    icmp6(128, 1, nil),
		"timestamp":        icmp4(t, 13, 0, nil),
		"type 128 in IPv4": icmp4(t, 128, 0, nil),
		"type 8 in IPv6":   icmp6(8, 0, nil),
		"type 0 in IPv6":   icmp6(0, 0, nil),
		"error":            icmp4(t, 3, 0, pattern(28)),
		"7 bytes":          packet6(protocolICMPv6, []byte{128, 0, 0, 0, 0, 0, 0}),
		"no bytes":         packet6(protocolICMPv6),
		"UDP":              udp4(t, 10, nil),
		"first fragment": serialize(t, func() *layers.IPv4 {
			ip := ip4(1)
			ip.Flags = layers.IPv4MoreFragments
			return ip
		}(), gopacket.Payload(ping4[20:])),
		"later fragment": serialize(t, func() *layers.IPv4 {
			ip := ip4(1)
			ip.FragOffset = 1
			return ip
		}(), gopacket.Payload(ping4[20:])),
		"protocol 58, IPv4": serialize(t, ip4(58), gopacket.Payload(ping6[40:])),
	} {
		t.Run(name, func(t *testing.T) {
			if request, id, seq, data, ok := ParseEcho(b, mustParse(t, b)); ok || request ||
				id != 0 ||
				seq != 0 || data != nil {
				t.Errorf("%v, request %v, id %d, seq %d, data %x", ok, request, id, seq, data)
			}
		})
	}
}

// TestParseEchoExtensionHeaders has an echo request behind extension headers.
func TestParseEchoExtensionHeaders(t *testing.T) {
	message := AppendEcho(nil, host6, server6, 64, true, 7, 8, pattern(10))[40:]
	b := packet6(headerHopByHop, extension(headerFragment, 8),
		fragmentHeader(protocolICMPv6, 0, false), message)
	request, id, seq, data, ok := ParseEcho(b, mustParse(t, b))
	if !ok || !request || id != 7 || seq != 8 || !bytes.Equal(data, pattern(10)) {
		t.Errorf("%v, request %v, id %d, seq %d, data %x", ok, request, id, seq, data)
	}
}
