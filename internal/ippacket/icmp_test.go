package ippacket

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// allKinds are all values of ICMPError.
var allKinds = []ICMPError{SourceNotAssigned, NoRoute, NoSession, Prohibited, HopLimitExceeded,
	TooBig, HeaderChain, BeyondScope}

// icmp4 returns an ICMP message over IPv4 from host4 to server4.
func icmp4(t testing.TB, typ, code uint8, payload []byte) []byte {
	return serialize(t, ip4(layers.IPProtocolICMPv4),
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, code)}, gopacket.Payload(payload))
}

// icmp6 returns an ICMPv6 message from host6 to server6.
func icmp6(typ, code uint8, payload []byte) []byte {
	b := packet6(protocolICMPv6, []byte{typ, code, 0, 0, 0, 0, 0, 0}, payload)
	binary.BigEndian.PutUint16(b[42:],
		referenceChecksum(b[8:40], []byte{byte((len(b) - 40) >> 8), byte(len(b) - 40), 0,
			protocolICMPv6}, b[40:]))
	return b
}

func dontFragment(ip *layers.IPv4) { ip.Flags = layers.IPv4DontFragment }

// TestAppendICMPErrorMessages checks the message for each ICMPError in both IP
// versions.
func TestAppendICMPErrorMessages(t *testing.T) {
	type message struct{ typ, code uint8 }
	silent := message{}
	firstFragment := packet6(headerFragment, fragmentHeader(headerDestination, 0, true))
	truncated := packet6(headerDestination)
	good4, good6 := udp4(t, 30, dontFragment), packet6(17, pattern(30))
	for _, tt := range []struct {
		kind     ICMPError
		invoking []byte
		want     message
	}{
		{SourceNotAssigned, good4, message{3, 13}},
		{SourceNotAssigned, good6, message{1, 5}},
		{NoRoute, good4, message{3, 0}},
		{NoRoute, good6, message{1, 0}},
		{NoSession, good4, message{3, 1}},
		{NoSession, good6, message{1, 3}},
		{Prohibited, good4, message{3, 13}},
		{Prohibited, good6, message{1, 1}},
		{HopLimitExceeded, good4, message{11, 0}},
		{HopLimitExceeded, good6, message{3, 0}},
		{TooBig, good4, message{3, 4}},
		{TooBig, good6, message{2, 0}},
		{HeaderChain, good4, silent},
		{HeaderChain, truncated, message{1, 1}},
		{HeaderChain, firstFragment, message{4, 3}},
		{BeyondScope, good4, silent},
		{BeyondScope, withSource(good6, "fe80::1"), message{1, 2}},
		{0, good4, silent},
		{0, good6, silent},
		{BeyondScope + 1, good4, silent},
		{255, good6, silent},
	} {
		t.Run(fmt.Sprintf("%d about IPv%d", tt.kind, tt.invoking[0]>>4), func(t *testing.T) {
			p, _ := Parse(tt.invoking)
			src := router4
			if p.Version == 6 {
				src = router6
			}
			const mtu = 1321
			prefix := []byte("prefix")
			b, ok := AppendICMPError(prefix, tt.invoking, p, tt.kind, src, mtu)
			if ok != (tt.want != silent) {
				t.Fatalf("sent: %v, want %v", ok, tt.want != silent)
			}
			b, found := bytes.CutPrefix(b, prefix)
			if !found {
				t.Fatal("AppendICMPError changed the bytes already in dst")
			}
			if !ok {
				if len(b) != 0 {
					t.Fatalf("%x was appended", b)
				}
				return
			}
			e := mustParse(t, b)
			if e.Src != src || e.Dst != p.Src || e.HopLimit != 64 || !e.DontFragment ||
				!e.isICMP() {
				t.Errorf("header: %+v", e)
			}
			m := b[e.HeaderLen:]
			if got := (message{m[0], m[1]}); got != tt.want {
				t.Errorf("message %v, want %v", got, tt.want)
			}
			word2 := uint32(0)
			if tt.kind == TooBig {
				word2 = mtu
			}
			if got := binary.BigEndian.Uint32(m[4:]); got != word2 {
				t.Errorf("second word %d, want %d", got, word2)
			}
			if !bytes.Equal(m[8:], tt.invoking) {
				t.Errorf("quotes %x, want %x", m[8:], tt.invoking)
			}
			if got := icmpChecksumOff(b, e); got != 0 {
				t.Errorf("checksum is off by %#04x", got)
			}
		})
	}
}

// icmpChecksumOff returns the checksum over an ICMP message with its checksum,
// which is 0 if that is correct.
func icmpChecksumOff(b []byte, p Packet) uint16 {
	m := b[p.HeaderLen:]
	if p.Version == 4 {
		return referenceChecksum(m)
	}
	return referenceChecksum(b[8:40], binary.BigEndian.AppendUint32(nil, uint32(len(m))),
		[]byte{0, 0, 0, protocolICMPv6}, m)
}

// TestAppendICMPErrorDecodes decodes the errors with gopacket.
func TestAppendICMPErrorDecodes(t *testing.T) {
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			p := mustParse(t, c.b)
			src := router4
			if p.Version == 6 {
				src = router6
			}
			b, ok := AppendICMPError(nil, c.b, p, HopLimitExceeded, src, 0)
			if !ok {
				return
			}
			packet := decode(t, b)
			if p.Version == 4 {
				ip := packet.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
				m := packet.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
				if ip.TOS != 0xc0 || ip.Flags != layers.IPv4DontFragment || ip.FragOffset != 0 ||
					ip.IHL != 5 {
					t.Errorf("header %+v", ip)
				}
				if m.TypeCode != layers.CreateICMPv4TypeCode(layers.ICMPv4TypeTimeExceeded,
					layers.ICMPv4CodeTTLExceeded) {
					t.Errorf("%s", m.TypeCode)
				}
				return
			}
			ip := packet.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
			m := packet.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
			if ip.TrafficClass != 0 || ip.FlowLabel != 0 {
				t.Errorf("header %+v", ip)
			}
			if m.TypeCode != layers.CreateICMPv6TypeCode(layers.ICMPv6TypeTimeExceeded,
				layers.ICMPv6CodeHopLimitExceeded) {
				t.Errorf("%s", m.TypeCode)
			}
		})
	}
}

// TestAppendICMPErrorQuote checks that quotes have the greatest allowed length,
// like quotes of Linux.
func TestAppendICMPErrorQuote(t *testing.T) {
	for _, name := range []string{"udp4", "udp4-frag", "udp4-options", "udp4-options-frag", "udp6",
		"udp6-frag", "udp6-ext-frag"} {
		t.Run(name, func(t *testing.T) {
			b := linuxPacket(t, name)
			p := mustParse(t, b)
			limit, header, src := 576, 28, router4
			if p.Version == 6 {
				limit, header, src = 1280, 48, router6
			}
			got, ok := AppendICMPError(nil, b, p, NoRoute, src, 0)
			if !ok {
				t.Fatal("no error")
			}
			if want := min(limit, header+len(b)); len(got) != want {
				t.Errorf("%d bytes, want %d", len(got), want)
			}
			if !bytes.HasPrefix(b, got[header:]) {
				t.Error("the quote is not the beginning of the packet")
			}
		})
	}
}

func TestAppendICMPErrorSource(t *testing.T) {
	b4, b6 := udp4(t, 10, nil), packet6(17, pattern(10))
	for _, src := range []netip.Addr{{}, router6, netip.MustParseAddr("::ffff:192.0.2.1")} {
		b, ok := AppendICMPError(nil, b4, mustParse(t, b4), NoRoute, src, 0)
		if want := netip.MustParseAddr("192.0.0.8"); !ok || mustParse(t, b).Src != want {
			t.Errorf("IPv4 error from %v: %v, %x, want one from %s", src, ok, b, want)
		}
	}
	for _, src := range []netip.Addr{{}, router4} {
		if b, ok := AppendICMPError(nil, b6, mustParse(t, b6), NoRoute, src, 0); ok {
			t.Errorf("IPv6 error from %v: %x", src, b)
		}
	}
}

func TestAppendICMPErrorMTU(t *testing.T) {
	b4, b6 := udp4(t, 1400, dontFragment), packet6(17, pattern(1400))
	for mtu, want := range map[int][2]uint32{
		-1: {0, 0}, 0: {0, 0}, 68: {68, 68}, 1280: {1280, 1280}, 65535: {65535, 65535},
		70000: {65535, 70000},
	} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			e4, ok4 := AppendICMPError(nil, b4, mustParse(t, b4), TooBig, router4, mtu)
			e6, ok6 := AppendICMPError(nil, b6, mustParse(t, b6), TooBig, router6, mtu)
			if !ok4 || !ok6 {
				t.Fatal("no error")
			}
			got := [2]uint32{binary.BigEndian.Uint32(e4[24:]), binary.BigEndian.Uint32(e6[44:])}
			if got != want {
				t.Errorf("reported MTU %d, want %d", got, want)
			}
		})
	}
}

// TestAppendICMPErrorSilence has packets about which no error may be sent, for
// whatever reason.
func TestAppendICMPErrorSilence(t *testing.T) {
	good4, good6 := udp4(t, 30, dontFragment), packet6(17, pattern(30))
	quote4, quote6 := pattern(28), pattern(48)
	silent := map[string][]byte{
		"IPv4 later fragment": udp4(t, 30, func(ip *layers.IPv4) {
			ip.FragOffset = 1
			ip.Flags = layers.IPv4DontFragment
		}),
		"IPv4 later fragment of ICMP": serialize(t, func() *layers.IPv4 {
			ip := ip4(1)
			ip.FragOffset = 100
			return ip
		}(), gopacket.Payload(pattern(40))),
		"IPv6 later fragment of ICMPv6": packet6(headerFragment,
			fragmentHeader(protocolICMPv6, 1480, true), pattern(40)),
		"ICMP without a type":   serialize(t, ip4(layers.IPProtocolICMPv4)),
		"ICMPv6 without a type": packet6(protocolICMPv6),
		"ICMPv6 error behind a header": packet6(headerHopByHop, extension(protocolICMPv6, 8),
			[]byte{1, 0, 0, 0, 0, 0, 0, 0}, quote6),
		"ICMPv6 error in first fragment": packet6(headerFragment,
			fragmentHeader(protocolICMPv6, 0, true), []byte{1, 0, 0, 0, 0, 0, 0, 0}, quote6),
		"the IPv4 error of Linux": linuxPacket(t, "udp4-error"),
		"the IPv6 error of Linux": linuxPacket(t, "udp6-error"),
		"IPv4 error with options": linuxPacket(t, "udp4-options-error"),
		"to 255.255.255.255":      withDestination(good4, "255.255.255.255"),
	}
	for _, typ := range []uint8{3, 4, 5, 11, 12} {
		silent[fmt.Sprintf("ICMP type %d", typ)] = icmp4(t, typ, 0, quote4)
	}
	for _, typ := range []uint8{0, 1, 2, 3, 4, 5, 100, 127, 137} {
		silent[fmt.Sprintf("ICMPv6 type %d", typ)] = icmp6(typ, 0, quote6)
	}
	for _, src := range []string{"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "224.0.0.1",
		"239.1.2.3", "240.0.0.1", "255.255.255.255"} {
		silent["from "+src] = withSource(good4, src)
	}
	for _, src := range []string{"::", "::1", "ff02::1", "ff0e::1", "::ffff:192.0.2.1"} {
		silent["from "+src] = withSource(good6, src)
	}
	for _, dst := range []string{"224.0.0.1", "239.255.255.250"} {
		silent["to "+dst] = withDestination(good4, dst)
	}
	for name, b := range silent {
		t.Run(name, func(t *testing.T) {
			p := mustParse(t, b)
			for _, kind := range allKinds {
				if e, ok := AppendICMPError(nil, b, p, kind, router4, 1280); ok && p.Version == 4 {
					t.Errorf("kind %v: %x", kind, e)
				}
				if e, ok := AppendICMPError(nil, b, p, kind, router6, 1280); ok {
					t.Errorf("kind %v: %x", kind, e)
				}
			}
		})
	}
}

// TestAppendICMPErrorAnswers has packets about which errors must be sent. They
// resemble the packets of TestAppendICMPErrorSilence.
func TestAppendICMPErrorAnswers(t *testing.T) {
	good4, good6 := udp4(t, 30, nil), packet6(17, pattern(30))
	answered := map[string][]byte{
		"first fragment": udp4(t, 32, func(ip *layers.IPv4) {
			ip.Flags = layers.IPv4MoreFragments
		}),
		"IPv6 later fragment": packet6(headerFragment, fragmentHeader(17, 1480, true),
			pattern(40)),
		"IPv6 first fragment": packet6(headerFragment, fragmentHeader(17, 0, true),
			pattern(40)),
		"protocol 58 over IPv4":         serialize(t, ip4(58), gopacket.Payload{1, 0, 0, 0}),
		"protocol 1 over IPv6":          packet6(1, []byte{3, 0, 0, 0}),
		"empty packet":                  packet6(17),
		"ping4":                         linuxPacket(t, "ping4"),
		"ping6":                         linuxPacket(t, "ping6"),
		"link-local IPv6 source":        withSource(good6, "fe80::1"),
		"destination next to multicast": withDestination(good4, "223.255.255.255"),
	}
	for _, src := range []string{"1.0.0.0", "126.255.255.255", "128.0.0.1", "223.255.255.255",
		"10.0.0.1"} {
		answered["from "+src] = withSource(good4, src)
	}
	for _, typ := range []uint8{0, 8, 13, 17} {
		answered[fmt.Sprintf("ICMP type %d", typ)] = icmp4(t, typ, 0, pattern(8))
	}
	for _, typ := range []uint8{128, 129, 133, 136, 138, 255} {
		answered[fmt.Sprintf("ICMPv6 type %d", typ)] = icmp6(typ, 0, pattern(8))
	}
	for name, b := range answered {
		t.Run(name, func(t *testing.T) {
			src := router4
			if b[0]>>4 == 6 {
				src = router6
			}
			if _, ok := AppendICMPError(nil, b, mustParse(t, b), NoRoute, src, 0); !ok {
				t.Error("no error")
			}
		})
	}
}

// TestAppendICMPErrorMulticast checks that Packet Too Big is the only error
// about IPv6 multicast packets.
func TestAppendICMPErrorMulticast(t *testing.T) {
	b := withDestination(packet6(17, pattern(1400)), "ff0e::1")
	for _, kind := range allKinds {
		if _, ok := AppendICMPError(nil, b, mustParse(t, b), kind, router6,
			1280); ok != (kind == TooBig) {
			t.Errorf("kind %v: sent is %v", kind, ok)
		}
	}
}

// TestAppendICMPErrorFragmentable has an IPv4 packet without the DF flag, which
// must be fragmented instead.
func TestAppendICMPErrorFragmentable(t *testing.T) {
	b := udp4(t, 1400, nil)
	if e, ok := AppendICMPError(nil, b, mustParse(t, b), TooBig, router4, 1280); ok {
		t.Errorf("got %x", e)
	}
}

func TestIsICMPError(t *testing.T) {
	for typ := range 256 {
		typ := uint8(typ)
		b := icmp4(t, typ, 0, pattern(28))
		if got, want := IsICMPError(b, mustParse(t, b)), typ == 3 || typ == 4 || typ == 11 ||
			typ == 12; got != want {
			t.Errorf("ICMP type %d: %v, want %v", typ, got, want)
		}
		b = icmp6(typ, 0, pattern(48))
		if got, want := IsICMPError(b, mustParse(t, b)), typ < 128; got != want {
			t.Errorf("ICMPv6 type %d: %v, want %v", typ, got, want)
		}
	}
	for name, b := range map[string][]byte{
		"UDP":                   udp4(t, 3, nil),
		"UDP6":                  packet6(17, []byte{1}),
		"protocol 1 over IPv6":  packet6(1, []byte{3, 0, 0, 0}),
		"protocol 58 over IPv4": serialize(t, ip4(58), gopacket.Payload{1, 0, 0, 0}),
		"no type":               packet6(protocolICMPv6),
		"later fragment": packet6(headerFragment, fragmentHeader(protocolICMPv6, 8, false),
			[]byte{1, 0, 0, 0}),
	} {
		t.Run(name, func(t *testing.T) {
			if IsICMPError(b, mustParse(t, b)) {
				t.Error("IsICMPError() = true")
			}
		})
	}
}
