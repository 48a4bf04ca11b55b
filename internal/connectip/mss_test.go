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

// synPacket returns a TCP SYN that announces an MSS, behind tun.Headroom bytes.
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

// announcedMSS returns what a packet with one TCP option announces.
func announcedMSS(t *testing.T, pkt []byte) int {
	t.Helper()
	p := parse(t, pkt)
	return int(binary.BigEndian.Uint16(pkt[p.HeaderLen+22:]))
}

// sent keeps the datagrams of a QUIC connection.
type sent struct {
	discard
	datagrams [][]byte
}

func (s *sent) SendDatagram(b []byte) error {
	s.datagrams = append(s.datagrams, b)
	return nil
}

// offlineConn makes a Conn of a proxy, of which nothing runs.
func offlineConn(t *testing.T, cfg Config) (*Conn, *sent) {
	t.Helper()
	cfg.Device, cfg.Stats, cfg.Self = make(device, 1), &Stats{},
		[]netip.Addr{proxyAddr4, proxyAddr6}
	c, conn := New(fakeStream{}, nil, cfg), &sent{}
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

// A TCP SYN announces no more than the tunnel carries, whichever end lets it in
// and whichever end lets it out.
func TestMSSIsClamped(t *testing.T) {
	for _, tc := range []struct {
		name     string
		src, dst netip.Addr // addresses of a packet in either direction
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

// What a peer without a network behind it passes on comes from its own
// addresses, ICMP errors too.
func TestErrorsOfOthers(t *testing.T) {
	for _, tc := range []struct {
		name string
		own  bool
		src  netip.Addr
		want Drop
	}{
		{"another's, of a network's gateway", false, elsewhere4, DropNone},
		{"another's", true, elsewhere4, DropSource},
		{"the proxy's", true, proxyAddr4, DropSource},
		{"the proxy's, of a network's gateway", false, proxyAddr4, DropSource},
		{"its own", true, clientAddr4, DropNone},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, _ := offlineConn(t, Config{PeerIsHost: tc.own})
			about := echoPacket(target4, clientAddr4, 1, 64)[tun.Headroom:]
			pkt, ok := ippacket.AppendICMPError(nil, about, parse(t, about),
				ippacket.HopLimitExceeded, tc.src, 0)
			if !ok {
				t.Fatal("no ICMP error was made")
			}
			if got := c.admit(pkt); got != tc.want {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
}
