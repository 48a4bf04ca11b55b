package ippacket

import (
	"bytes"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// TestQuotedLinux checks the quotes in ICMP errors captured on Linux.
func TestQuotedLinux(t *testing.T) {
	for _, name := range []string{"udp4", "udp4-options", "udp6", "udp6-ext"} {
		t.Run(name, func(t *testing.T) {
			sent := mustParse(t, linuxPacket(t, name))
			b := linuxPacket(t, name+"-error")
			p := mustParse(t, b)
			if !IsICMPError(b, p) {
				t.Fatal("not an error")
			}
			q, ok := Quoted(b, p)
			if !ok || q != sent {
				t.Errorf("quoted %v, %+v, want %+v", ok, q, sent)
			}
		})
	}
	// The receiver reassembled these packets and quotes their first bytes.
	for _, name := range []string{"udp4-frag", "udp4-options-frag", "udp6-frag", "udp6-ext-frag"} {
		t.Run(name, func(t *testing.T) {
			sent := mustParse(t, linuxPacket(t, name))
			b := linuxPacket(t, name+"-error")
			q, ok := Quoted(b, mustParse(t, b))
			if !ok || q.Src != sent.Src || q.Dst != sent.Dst || q.Protocol != 17 ||
				q.TotalLen < 3000 {
				t.Errorf("quoted %v, %+v", ok, q)
			}
		})
	}
}

// TestQuotedOwn applies Quoted to results of AppendICMPError.
func TestQuotedOwn(t *testing.T) {
	for _, c := range linuxPackets(t) {
		t.Run(c.name, func(t *testing.T) {
			p := mustParse(t, c.b)
			for _, kind := range allKinds {
				src := router4
				if p.Version == 6 {
					src = router6
				}
				b, ok := AppendICMPError(nil, c.b, p, kind, src, 1280)
				if !ok {
					continue
				}
				if q, ok := Quoted(b, mustParse(t, b)); !ok || q != p {
					t.Errorf("kind %v: quoted %v, %+v, want %+v", kind, ok, q, p)
				}
			}
		})
	}
}

func TestQuotedLenient(t *testing.T) {
	good4 := udp4(t, 100, func(ip *layers.IPv4) {
		ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4,
			OptionData: []byte{0, 0}}}
	})
	wrong := bytes.Clone(good4)
	wrong[8], wrong[3], wrong[2] = 1, 7, 0 // time to live and total length
	good6 := packet6(headerHopByHop, extension(headerDestination, 8),
		extension(headerFragment, 16), fragmentHeader(6, 0, true), pattern(100))
	const chain = 40 + 8 + 16 + 8
	for _, tt := range []struct {
		name     string
		b        []byte
		protocol uint8
		header   int
		total    int
	}{
		{"IPv4 header and 8 bytes", icmp4(t, 3, 0, good4[:32]), 17, 24, 132},
		{"IPv4 header alone", icmp4(t, 11, 0, good4[:24]), 17, 24, 132},
		{"IPv4 with a wrong length and checksum", icmp4(t, 3, 4, wrong), 17, 24, 7},
		{"IPv6 with 8 bytes of TCP", icmp6(1, 0, good6[:chain+8]), 6, chain, len(good6)},
		{"IPv6 up to the upper layer", icmp6(1, 0, good6[:chain]), 6, chain, len(good6)},
		{"IPv6 truncated in the fragment header", icmp6(2, 0, good6[:chain-1]), headerFragment,
			chain - 8, len(good6)},
		{"IPv6 truncated in the second header", icmp6(2, 0, good6[:chain-9]), headerDestination, 48,
			len(good6)},
		{"IPv6 header alone", icmp6(3, 0, good6[:40]), headerHopByHop, 40, len(good6)},
		{"IPv6 with padding behind it",
			icmp6(3, 0, append(packet6(headerHopByHop), pattern(50)...)), headerHopByHop, 40, 40},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q, ok := Quoted(tt.b, mustParse(t, tt.b))
			if !ok || q.Protocol != tt.protocol || q.HeaderLen != tt.header ||
				q.TotalLen != tt.total {
				t.Errorf("%v, %+v, want protocol %d at %d, total length %d", ok, q,
					tt.protocol, tt.header, tt.total)
			}
		})
	}
}

func TestQuotedNothing(t *testing.T) {
	good4 := udp4(t, 100, func(ip *layers.IPv4) {
		ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4,
			OptionData: []byte{0, 0}}}
	})
	good6 := packet6(17, pattern(100))
	for name, b := range map[string][]byte{
		"no quote":                 icmp4(t, 3, 0, nil),
		"no quote in IPv6":         icmp6(1, 0, nil),
		"ICMP header of 7 bytes":   packet6(protocolICMPv6, []byte{1, 0, 0, 0, 0, 0, 0}),
		"19 bytes":                 icmp4(t, 3, 0, good4[:19]),
		"truncated in the options": icmp4(t, 3, 0, good4[:23]),
		"39 bytes":                 icmp6(1, 0, good6[:39]),
		"IPv6 quoted by ICMP":      icmp4(t, 3, 0, good6),
		"IPv4 quoted by ICMPv6":    icmp6(1, 0, good4),
		"no IP":                    icmp4(t, 3, 0, make([]byte, 100)),
		"IPv4 header of 16 bytes":  icmp4(t, 3, 0, append([]byte{0x44}, good4[1:]...)),
		"routing header of type 0": icmp6(1, 0,
			packet6(headerRouting, make([]byte, 8), pattern(20))),
		"echo request":        icmp4(t, 8, 0, good4),
		"ICMPv6 echo request": icmp6(128, 0, good6),
		"redirect":            icmp4(t, 5, 0, good4),
		"ICMPv6 redirect":     icmp6(137, 0, good6),
		"no ICMP":             packet6(17, []byte{1, 0, 0, 0, 0, 0, 0, 0}, good6),
		"later fragment of an error": serialize(t, func() *layers.IPv4 {
			ip := ip4(1)
			ip.FragOffset = 1
			return ip
		}(), gopacket.Payload(append([]byte{3, 0, 0, 0, 0, 0, 0, 0}, good4...))),
	} {
		t.Run(name, func(t *testing.T) {
			if q, ok := Quoted(b, mustParse(t, b)); ok || q != (Packet{}) {
				t.Errorf("%v, %+v", ok, q)
			}
		})
	}
}
