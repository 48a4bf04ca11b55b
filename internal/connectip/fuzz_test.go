package connectip

import (
	"bytes"
	"net/netip"
	"runtime"
	"testing"

	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

// recorder is a device that records packets.
type recorder struct{ packets [][]byte }

func (d *recorder) BatchSize() int { return 8 }

func (d *recorder) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		d.packets = append(d.packets, bytes.Clone(b[offset:]))
	}
	return len(bufs), nil
}

// FuzzDatagram passes data as a datagram of the peer and as a packet of the
// host to a proxy and a client. Only packets that the policy allows may reach
// the other side. Their senders may get ICMP errors, and nothing else.
func FuzzDatagram(f *testing.F) {
	addrs := []netip.Addr{clientAddr4, clientAddr6, proxyAddr4, proxyAddr6, target4, target6,
		elsewhere4, allNodes}
	for _, src := range addrs {
		for _, dst := range addrs {
			pkt := echoPacket(src, dst, 2, 64)[tun.Headroom:]
			if len(pkt) == 0 {
				continue
			}
			f.Add(append([]byte{contextIPPacket}, pkt...), uint16(1350), false)
			p, err := ippacket.Parse(pkt)
			if err != nil {
				f.Fatal(err)
			}
			from := elsewhere4
			if src.Is6() {
				from = target6
			}
			if pkt, ok := ippacket.AppendICMPError(nil, pkt, p, ippacket.HopLimitExceeded, from,
				0); ok {
				f.Add(append([]byte{contextIPPacket}, pkt...), uint16(1350), true)
			}
		}
	}
	large := echoPacket(target4, clientAddr4, 64, 1500)[tun.Headroom:]
	clearDontFragment(large)
	f.Add(append([]byte{contextIPPacket}, large...), uint16(600), true)
	f.Add([]byte{}, uint16(0), true)

	f.Fuzz(func(t *testing.T, data []byte, limit uint16, named bool) {
		var protocol uint8
		if named {
			protocol = 17
		}
		for _, client := range []bool{false, true} {
			checkDatagram(t, data, int(limit), protocol, client)
		}
	})
}

// checkDatagram does the checks of FuzzDatagram for a client or a proxy, with
// routes for one protocol.
func checkDatagram(t *testing.T, data []byte, limit int, protocol uint8, client bool) {
	device, conn := &recorder{}, &fakeQUIC{limit: limit}
	cfg := Config{Device: device, Stats: &Stats{}}
	assigned := []capsule.Address{{Prefix: host(clientAddr4)}, {Prefix: host(clientAddr6)}}
	routes := capsule.Routes([]netip.Prefix{host(proxyAddr4), netip.MustParsePrefix("192.0.2.0/24"),
		netip.MustParsePrefix("::/0")}, protocol)
	var c *Conn
	if client {
		cfg.Handler.Assigned = func([]capsule.Address) error { return nil }
		cfg.Handler.Routes = func([]capsule.Route) error { return nil }
		c = newFake(conn, cfg)
		check(t, c.handleAssign(assigned))
		check(t, c.handleRoutes(routes))
	} else {
		cfg.Self = []netip.Addr{proxyAddr4, proxyAddr6}
		cfg.Denied = []netip.Prefix{netip.MustParsePrefix("192.0.2.128/25"),
			netip.MustParsePrefix("fd77::/64")}
		c = newFake(conn, cfg)
		check(t, c.Assign(assigned))
		check(t, c.Advertise(routes))
	}
	pol := c.policy.Load()
	maySend := func(a netip.Addr, proto uint8) bool {
		return pol.isSelf(a) || pol.sendFrom.allow(a, proto)
	}

	// From the peer.
	in := newInbox(c)
	defer in.close()
	in.HandleDatagram(data)
	for !c.answerSender.Idle() {
		runtime.Gosched()
	}
	var sender netip.Addr
	if _, n, err := quicvarint.Parse(data); err == nil {
		sender = source(data[n:])
	}
	if in.batch != nil {
		pkt := in.batch.bufs[0][tun.Headroom:]
		p := parse(t, pkt)
		_, n, err := quicvarint.Parse(data)
		switch {
		case err != nil || !bytes.Equal(pkt, data[n:]):
			t.Errorf("delivered changed: % x", pkt)
		case pol.isSelf(p.Src) || !pol.recvFrom.allow(p.Src, p.Protocol) &&
			!quotes(pkt, p, maySend, pol.sendTo):
			t.Errorf("delivered from %v", p.Src)
		case !pol.recvTo.allow(p.Dst, p.Protocol):
			t.Errorf("delivered to %v", p.Dst)
		case ippacket.IsLinkLocal(p.Src) || ippacket.IsLinkLocal(p.Dst):
			t.Errorf("delivered from %v to %v", p.Src, p.Dst)
		}
	}
	for _, b := range conn.sent {
		pkt := b[2:]
		p := parse(t, pkt)
		_, _, _, _, echo := ippacket.ParseEcho(pkt, p)
		if !ippacket.IsICMPError(pkt, p) && !(echo && p.Src == c.echo.addr) || p.Dst != sender {
			t.Errorf("answered from %v to %v", p.Src, p.Dst)
		}
	}
	if len(device.packets) > 0 {
		t.Errorf("%d packets given to the device", len(device.packets))
	}

	// From the host.
	conn.sent = nil
	buf := append(make([]byte, tun.Headroom), data[min(1, len(data)):]...)
	original := bytes.Clone(buf[tun.Headroom:])
	c.Send(buf, tun.Headroom)
	for _, b := range conn.sent {
		pkt := b[2:]
		p := parse(t, pkt)
		o := parse(t, original)
		switch {
		case p.Src != o.Src || p.Dst != o.Dst || p.HopLimit > o.HopLimit || len(b) > limit:
			t.Errorf("sent %+v for %+v", p, o)
		case !maySend(p.Src, p.Protocol) && !quotes(original, o, pol.recvFrom.allow, pol.recvTo):
			t.Errorf("sent from %v", p.Src)
		case !pol.sendTo.allow(p.Dst, p.Protocol):
			t.Errorf("sent to %v", p.Dst)
		case !pol.isSelf(p.Src) && p.HopLimit+1 != o.HopLimit:
			t.Errorf("sent with hop limit %d after %d", p.HopLimit, o.HopLimit)
		case ippacket.IsLinkLocal(p.Src) || ippacket.IsLinkLocal(p.Dst):
			t.Errorf("sent from %v to %v", p.Src, p.Dst)
		}
	}
	for _, pkt := range device.packets {
		if p := parse(t, pkt); !ippacket.IsICMPError(pkt, p) || p.Dst != source(original) {
			t.Errorf("answered from %v to %v", p.Src, p.Dst)
		}
	}
}

// source returns the source address of pkt, which may be malformed.
func source(pkt []byte) netip.Addr {
	switch {
	case len(pkt) >= 20 && pkt[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(pkt[12:16]))
	case len(pkt) >= 40 && pkt[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(pkt[8:24]))
	}
	return netip.Addr{}
}

// quotes reports whether pkt is an ICMP error to the source of the packet that
// it quotes, and from and to allow that packet.
func quotes(pkt []byte, p ippacket.Packet, from func(netip.Addr, uint8) bool, to ranges) bool {
	q, ok := ippacket.Quoted(pkt, p)
	return ok && q.Src == p.Dst && from(q.Src, q.Protocol) && to.allow(q.Dst, q.Protocol)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
