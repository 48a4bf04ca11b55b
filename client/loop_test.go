package client

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"

	"masquevpn/internal/flowqueue"
	"masquevpn/tun"
)

// udpHeader returns an IP header and a UDP header. Fields that outerSockets
// ignores are zero.
func udpHeader(protocol byte, src, dst netip.AddrPort) []byte {
	var b []byte
	if dst.Addr().Is4() {
		b = append([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0},
			append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)...)
	} else {
		b = append([]byte{0x60, 0, 0, 0, 0, 8, protocol, 64},
			append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)...)
	}
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	return append(b, 0, 8, 0, 0)
}

// Packets of an outer socket are distinguished from other packets to the same
// proxy.
func TestOuterSocketsSent(t *testing.T) {
	proxy4, proxy6 := netip.MustParseAddrPort("203.0.113.5:443"),
		netip.MustParseAddrPort("[2001:db8::5]:443")
	host4, host6 := netip.MustParseAddrPort("192.168.1.10:50000"),
		netip.MustParseAddrPort("[fd00::10]:50001")
	for _, tt := range []struct {
		name string
		pkt  []byte
		want bool
	}{
		{"IPv4", udpHeader(17, host4, proxy4), true},
		{"IPv6", udpHeader(17, host6, proxy6), true},
		{"another port of this host",
			udpHeader(17, netip.MustParseAddrPort("192.168.1.10:50002"), proxy4), false},
		{"another port of the proxy",
			udpHeader(17, host4, netip.MustParseAddrPort("203.0.113.5:53")), false},
		{"another host", udpHeader(17, host4, netip.MustParseAddrPort("203.0.113.6:443")), false},
		{"TCP", udpHeader(6, host4, proxy4), false},
		{"cut short", udpHeader(17, host4, proxy4)[:22], false},
		{"nothing", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var o outerSockets
			if o.sent(tt.pkt) {
				t.Error("got true without sockets")
			}
			o.add(&net.UDPAddr{Port: 50000}, proxy4)
			o.add(&net.UDPAddr{Port: 50001}, proxy6)
			if got := o.sent(tt.pkt); got != tt.want {
				t.Errorf("got %t, want %t", got, tt.want)
			}
		})
	}
}

// Packets of an outer socket that the device reads are dropped. The log and the
// notice name the remedy.
func TestLoop(t *testing.T) {
	var log bytes.Buffer
	c, err := New(Config{Proxy: "203.0.113.5", Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	c.dialer.outer.add(&net.UDPAddr{Port: 50000}, netip.MustParseAddrPort("203.0.113.5:443"))
	for range 2 {
		packets := []*flowqueue.Packet{flowqueue.Get(), flowqueue.Get()}
		for i, from := range []string{"192.168.1.10:50000", "192.168.1.10:50001"} {
			packets[i].Size = copy(packets[i].Buffer()[tun.Headroom:],
				udpHeader(17, netip.MustParseAddrPort(from),
					netip.MustParseAddrPort("203.0.113.5:443")))
		}
		if !c.dropLoops(packets) || packets[0] != nil || packets[1] != nil {
			t.Errorf("got packets %v, want none", packets)
		}
	}
	const want = "have it leave the bits 0xa0000000 alone, or name others in routes.mark"
	if n := strings.Count(log.String(), want); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, log.String())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.notices[noticeLoop]; !n.degrades || !strings.Contains(n.text, want) {
		t.Errorf("got notice %+v", n)
	}
	c.loopTimer.Stop()
}
