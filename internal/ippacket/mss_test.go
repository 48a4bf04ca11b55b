package ippacket

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// mss returns a TCP option for a maximum segment size of n bytes.
func mss(n uint16) layers.TCPOption {
	return layers.TCPOption{OptionType: layers.TCPOptionKindMSS, OptionLength: 4,
		OptionData: binary.BigEndian.AppendUint16(nil, n)}
}

// tcpPacket returns a TCP packet without data.
func tcpPacket(t testing.TB, ipv6, syn bool, options ...layers.TCPOption) []byte {
	t.Helper()
	tcp := &layers.TCP{SrcPort: 40000, DstPort: 443, Seq: 0x01020304, SYN: syn, ACK: !syn,
		Window: 64240, Options: options}
	var ip interface {
		gopacket.NetworkLayer
		gopacket.SerializableLayer
	} = ip4(layers.IPProtocolTCP)
	if ipv6 {
		ip = &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolTCP, HopLimit: 64,
			SrcIP: net.IP(host6.AsSlice()), DstIP: net.IP(server6.AsSlice())}
	}
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	return serialize(t, ip, tcp)
}

// announced verifies the checksum of a TCP packet and returns its MSS, or 0 if
// it has none.
func announced(t testing.TB, b []byte) uint16 {
	t.Helper()
	packet := decode(t, b)
	tcp := packet.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if err := tcp.SetNetworkLayerForChecksum(packet.NetworkLayer()); err != nil {
		t.Fatal(err)
	}
	if err, result := tcp.VerifyChecksum(); err != nil || !result.Valid {
		t.Errorf("TCP checksum: %v, %+v", err, result)
	}
	for _, o := range tcp.Options {
		if o.OptionType == layers.TCPOptionKindMSS {
			return binary.BigEndian.Uint16(o.OptionData)
		}
	}
	return 0
}

func TestClampMSS(t *testing.T) {
	nop := layers.TCPOption{OptionType: layers.TCPOptionKindNop}
	sack := layers.TCPOption{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2}
	for _, tt := range []struct {
		name      string
		ipv6, syn bool
		options   []layers.TCPOption
		want      uint16
	}{
		{"IPv4", false, true, []layers.TCPOption{mss(1460)}, 1360},
		{"IPv6", true, true, []layers.TCPOption{mss(1440)}, 1340},
		{"behind other options", false, true, []layers.TCPOption{sack, nop, nop, mss(1460)}, 1360},
		{"at an odd offset", false, true, []layers.TCPOption{nop, mss(8960), nop}, 1360},
		{"small enough", false, true, []layers.TCPOption{mss(1360)}, 1360},
		{"smaller", true, true, []layers.TCPOption{mss(536)}, 536},
		{"none", false, true, []layers.TCPOption{sack}, 0},
		{"no SYN", false, false, []layers.TCPOption{mss(1460)}, 1460},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := tcpPacket(t, tt.ipv6, tt.syn, tt.options...)
			before := announced(t, b)
			if changed := ClampMSS(b, mustParse(t, b), 1400); changed != (before != tt.want) {
				t.Errorf("changed %t, from %d to %d", changed, before, tt.want)
			}
			if got := announced(t, b); got != tt.want {
				t.Errorf("announces %d, want %d", got, tt.want)
			}
		})
	}
}

// TestClampMSSLeavesAlone has packets without a complete, well-formed MSS
// option.
func TestClampMSSLeavesAlone(t *testing.T) {
	good := tcpPacket(t, true, true, mss(1440))[ipv6HeaderLen:]
	with := func(change func(tcp []byte)) []byte {
		tcp := bytes.Clone(good)
		change(tcp)
		return tcp
	}
	for _, tt := range []struct {
		name string
		b    []byte
	}{
		{"a UDP packet", packet6(17, good)},
		{"a later fragment", packet6(headerFragment, fragmentHeader(protocolTCP, 8, false), good)},
		{"a truncated header", packet6(protocolTCP, good[:19])},
		{"truncated options", packet6(protocolTCP, good[:22])},
		{"an option without length", packet6(protocolTCP, with(func(tcp []byte) {
			copy(tcp[20:], []byte{1, 1, 1, 2})
		}))},
		{"an option of length 0", packet6(protocolTCP, with(func(tcp []byte) { tcp[21] = 0 }))},
		{"an option beyond the header", packet6(protocolTCP, with(func(tcp []byte) {
			tcp[20], tcp[21] = 8, 5
		}))},
		{"an option of another length", packet6(protocolTCP, with(func(tcp []byte) {
			tcp[21] = 3
		}))},
		{"an option behind the end", packet6(protocolTCP, with(func(tcp []byte) { tcp[20] = 0 }))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := bytes.Clone(tt.b)
			if ClampMSS(b, mustParse(t, b), 1280) || !bytes.Equal(b, tt.b) {
				t.Errorf("changed to %x", b)
			}
		})
	}
}

func FuzzClampMSS(f *testing.F) {
	f.Add(tcpPacket(f, false, true, mss(1460)), 1400)
	f.Add(tcpPacket(f, true, true, mss(1440)), 1280)
	f.Add(packet6(headerDestination, extension(protocolTCP, 8),
		tcpPacket(f, true, true, mss(1440))[ipv6HeaderLen:]), 1280)
	f.Fuzz(func(t *testing.T, b []byte, mtu int) {
		repair(b)
		p, err := Parse(b)
		if err != nil {
			return
		}
		c := bytes.Clone(b)
		changed := ClampMSS(c, p, mtu)
		if changed == bytes.Equal(b, c) {
			t.Fatalf("changed %t: from %x to %x", changed, b, c)
		}
		if !changed {
			return
		}
		if got, err := Parse(c); err != nil || got != p {
			t.Fatalf("%v, %+v, want %+v", err, got, p)
		}
		if ClampMSS(c, p, mtu) {
			t.Fatalf("%x is changed again", c)
		}
		// A wrong checksum stays wrong by the same amount. 0 and 0xffff are the
		// same number in ones' complement.
		sum := func(b []byte) uint16 { return checksum(b[p.HeaderLen:], 0) }
		if was, is := sum(b), sum(c); was != is && was^is != 0xffff {
			t.Fatalf("sum %#x, was %#x", is, was)
		}
	})
}
