package ippacket

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var (
	host4   = netip.MustParseAddr("198.51.100.7")
	server4 = netip.MustParseAddr("203.0.113.9")
	router4 = netip.MustParseAddr("192.0.2.1")
	host6   = netip.MustParseAddr("2001:db8::7")
	server6 = netip.MustParseAddr("2001:db8:1::9")
	router6 = netip.MustParseAddr("2001:db8:2::1")
)

// capture is a named packet in testdata/linux.txt.
type capture struct {
	name string
	b    []byte
}

func linuxPackets(t testing.TB) []capture {
	t.Helper()
	text, err := os.ReadFile("testdata/linux.txt")
	if err != nil {
		t.Fatal(err)
	}
	var captures []capture
	for line := range bytes.Lines(text) {
		if line[0] == '#' {
			continue
		}
		name, digits, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		b, err := hex.DecodeString(string(digits))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		captures = append(captures, capture{string(name), b})
	}
	if len(captures) == 0 {
		t.Fatal("no packets")
	}
	return captures
}

// linuxPacket returns the first packet with the name.
func linuxPacket(t testing.TB, name string) []byte {
	t.Helper()
	for _, c := range linuxPackets(t) {
		if c.name == name {
			return c.b
		}
	}
	t.Fatalf("no packet %q", name)
	return nil
}

// serialize encodes a packet with gopacket.
func serialize(t testing.TB, l ...gopacket.SerializableLayer) []byte {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf,
		gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...); err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(buf.Bytes())
}

// decode decodes the packet b with gopacket and verifies the checksums of IPv4
// and ICMP. It ignores checksums of UDP and TCP, which captured packets often
// do not have.
func decode(t testing.TB, b []byte) gopacket.Packet {
	t.Helper()
	first := layers.LayerTypeIPv4
	if b[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	packet := gopacket.NewPacket(b, first, gopacket.Default)
	if e := packet.ErrorLayer(); e != nil {
		t.Fatalf("gopacket on %x: %v", b, e.Error())
	}
	for _, l := range packet.Layers() {
		switch l := l.(type) {
		case *layers.ICMPv6:
			if err := l.SetNetworkLayerForChecksum(packet.NetworkLayer()); err != nil {
				t.Fatal(err)
			}
		case *layers.IPv4, *layers.ICMPv4:
		default:
			continue
		}
		if err, result := l.(gopacket.LayerWithChecksum).VerifyChecksum(); err != nil ||
			!result.Valid {
			t.Fatalf("gopacket on %x: checksum of %s: %v, %+v", b, l.LayerType(), err, result)
		}
	}
	return packet
}

// ip4 returns an IPv4 header from host4 to server4, for serialize.
func ip4(protocol layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{
		Version: 4, Id: 0x1234, TTL: 64, Protocol: protocol,
		SrcIP: net.IP(host4.AsSlice()), DstIP: net.IP(server4.AsSlice()),
	}
}

// udp4 returns a UDP packet over IPv4 with n bytes of data. modify may change
// the IP header before it is encoded; it may be nil.
func udp4(t testing.TB, n int, modify func(*layers.IPv4)) []byte {
	t.Helper()
	ip := ip4(layers.IPProtocolUDP)
	if modify != nil {
		modify(ip)
	}
	udp := &layers.UDP{SrcPort: 1000, DstPort: 2000}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	return serialize(t, ip, udp, gopacket.Payload(pattern(n)))
}

// packet6 returns an IPv6 packet from host6 to server6. next is its Next
// Header, and parts are its payload.
func packet6(next uint8, parts ...[]byte) []byte {
	payload := bytes.Join(parts, nil)
	b := []byte{0x60, 0, 0, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	b = append(b, next, 64)
	b = append(b, host6.AsSlice()...)
	b = append(b, server6.AsSlice()...)
	return append(b, payload...)
}

// withSource returns b with another source address. It updates the IPv4 header
// checksum, but not the checksum of the upper layer.
func withSource(b []byte, src string) []byte {
	b = bytes.Clone(b)
	a := netip.MustParseAddr(src)
	if a.Is4() {
		copy(b[12:], a.AsSlice())
	} else {
		copy(b[8:], a.AsSlice())
	}
	repair(b)
	return b
}

// withDestination returns b with another destination address, like withSource.
func withDestination(b []byte, dst string) []byte {
	b = bytes.Clone(b)
	a := netip.MustParseAddr(dst)
	if a.Is4() {
		copy(b[16:], a.AsSlice())
	} else {
		copy(b[24:], a.AsSlice())
	}
	repair(b)
	return b
}

// repair corrects the version, lengths and header checksum of b, if b is long
// enough.
func repair(b []byte) {
	switch {
	case len(b) >= 40 && len(b) <= 40+65535 && b[0]>>4 == 6:
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
	case len(b) >= 20 && len(b) <= 65535:
		words := min(max(int(b[0]&0xf), 5), len(b)/4)
		b[0] = 4<<4 | uint8(words)
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], referenceChecksum(b[:words*4]))
	}
}

// referenceChecksum computes the Internet checksum like the code in RFC 1071
// section 4.1.
func referenceChecksum(parts ...[]byte) uint16 {
	b := bytes.Join(parts, nil)
	if len(b)%2 != 0 {
		b = append(b, 0)
	}
	sum := 0
	for i := 0; i < len(b); i += 2 {
		sum += int(b[i])<<8 + int(b[i+1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(^sum)
}

// pattern returns n bytes that differ at nearby offsets.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8*37)
	}
	return b
}

// mustParse parses the valid packet b.
func mustParse(t testing.TB, b []byte) Packet {
	t.Helper()
	p, err := Parse(b)
	if err != nil {
		t.Fatalf("Parse(%x): %v", b, err)
	}
	return p
}
