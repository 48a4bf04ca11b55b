package connectip

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

// synPacket returns a TCP SYN with the given MSS, behind tun.Headroom bytes.
func synPacket(t testing.TB, src, dst netip.Addr, mss uint16) []byte {
	t.Helper()
	tcp := &layers.TCP{SrcPort: 40000, DstPort: 443, SYN: true, Options: []layers.TCPOption{{
		OptionType: layers.TCPOptionKindMSS, OptionLength: 4,
		OptionData: binary.BigEndian.AppendUint16(nil, mss),
	}}}
	var ip interface {
		gopacket.NetworkLayer
		gopacket.SerializableLayer
	} = &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP,
		SrcIP: net.IP(src.AsSlice()), DstIP: net.IP(dst.AsSlice())}
	if src.Is6() {
		ip = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP,
			SrcIP: net.IP(src.AsSlice()), DstIP: net.IP(dst.AsSlice())}
	}
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf,
		gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, tcp); err != nil {
		t.Fatal(err)
	}
	return append(make([]byte, tun.Headroom), buf.Bytes()...)
}

// announcedMSS returns the MSS of a TCP SYN with one option.
func announcedMSS(t *testing.T, pkt []byte) int {
	t.Helper()
	p := parse(t, pkt)
	return int(binary.BigEndian.Uint16(pkt[p.HeaderLen+22:]))
}

// recordingQUIC is a QUIC connection that records datagrams without a copy.
type recordingQUIC struct {
	discard
	datagrams [][]byte
}

func (s *recordingQUIC) SendDatagram(b []byte) error {
	s.datagrams = append(s.datagrams, b)
	return nil
}

// offlineConn returns a Conn of a proxy without a network, which does not run.
func offlineConn(t *testing.T, cfg Config) (*Conn, *recordingQUIC) {
	t.Helper()
	cfg.Device, cfg.Stats, cfg.Self = make(device, 1), &Stats{},
		[]netip.Addr{proxyAddr4, proxyAddr6}
	c, conn := New(fakeStream{}, nil, cfg), &recordingQUIC{}
	t.Cleanup(func() { c.stop(nil) })
	c.datagrams.conn = conn
	c.link.peerAssigned = []netip.Prefix{host(clientAddr4), host(clientAddr6)}
	c.link.advertised = capsule.Routes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"),
		netip.MustParsePrefix("::/0")}, 0)
	if err := c.updatePolicy(); err != nil {
		t.Fatal(err)
	}
	c.maxPacket.Store(1300)
	return c, conn
}

// Both endpoints clamp the MSS of TCP SYNs in both directions to the MTU.
func TestMSSIsClamped(t *testing.T) {
	for _, tc := range []struct {
		name     string
		src, dst netip.Addr
		mss      uint16
		want     int
	}{
		{"from the peer", clientAddr4, target4, 1460, 1260},
		{"from the peer, IPv6", clientAddr6, target6, 1440, 1240},
		{"from the peer, small enough", clientAddr4, target4, 1200, 1200},
		{"to the peer", target4, clientAddr4, 1460, 1260},
		{"to the peer, IPv6", target6, clientAddr6, 1440, 1240},
		{"to the peer, small enough", target4, clientAddr4, 1200, 1200},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, conn := offlineConn(t, Config{})
			buf := synPacket(t, tc.src, tc.dst, tc.mss)
			pkt := buf[tun.Headroom:]
			if tc.src == clientAddr4 || tc.src == clientAddr6 {
				if d := c.admit(pkt); d != DropNone {
					t.Fatalf("dropped, %v", d)
				}
			} else {
				if d := c.Send(buf, tun.Headroom); d != DropNone {
					t.Fatalf("dropped, %v", d)
				}
				b := conn.datagrams[0]
				pkt = b[len(b)-len(pkt):]
			}
			if got := announcedMSS(t, pkt); got != tc.want {
				t.Errorf("MSS %d, want %d", got, tc.want)
			}
		})
	}
}

// ICMP errors of a peer that is a host must come from its own addresses. Behind
// a gateway they may come from any router.
func TestForwardedICMPErrors(t *testing.T) {
	for _, tc := range []struct {
		name string
		host bool // Config.PeerIsHost
		src  netip.Addr
		want Drop
	}{
		{"gateway, from a router", false, elsewhere4, DropNone},
		{"host, from a router", true, elsewhere4, DropSource},
		{"host, from the proxy's address", true, proxyAddr4, DropSource},
		{"gateway, from the proxy's address", false, proxyAddr4, DropSource},
		{"host, from its own address", true, clientAddr4, DropNone},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, _ := offlineConn(t, Config{PeerIsHost: tc.host})
			about := echoPacket(target4, clientAddr4, 1, 64)[tun.Headroom:]
			pkt, ok := ippacket.AppendICMPError(nil, about, parse(t, about),
				ippacket.HopLimitExceeded, tc.src, 0)
			if !ok {
				t.Fatal("no ICMP error was made")
			}
			if got := c.admit(pkt); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}
