package test

import (
	"crypto/rand"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/logtest"
	"masquevpn/proxy"
)

// The proxy drops datagrams that belong to no tunnel without logging each of
// them: datagrams that arrive before their request or its response, for unknown
// streams or streams of other connections, with an unknown context ID, and with
// a truncated one. Tunnels continue.
func TestWireStrayDatagrams(t *testing.T) {
	var log logtest.Buffer
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	})
	victim := p.tunnel()

	early := p.dial(masqueSettings)
	spoofed, _ := newEcho(victim.addr4, beyond4)
	spoofed = append([]byte{0}, spoofed...)
	early.sendDatagram(0, spoofed) // before its request
	s := early.open(connectIP(anyPath)...)
	early.sendDatagram(s.StreamID(), spoofed) // before its response
	if status, _ := s.response(); status != "200" {
		t.Fatalf("status %q", status)
	}
	u := p.tunnelOn(early)

	quiet := len(log.Lines(""))
	const n = 500
	for range n {
		early.sendDatagram(4*1000, spoofed)             // no such stream
		early.sendDatagram(victim.StreamID(), spoofed)  // a stream of another connection
		early.sendDatagram(u.StreamID(), []byte{2, 69}) // unknown context
		early.sendDatagram(u.StreamID(), []byte{0x40})  // half a context ID
		early.sendDatagram(u.StreamID(), nil)
		early.sendDatagram(u.StreamID(), spoofed)
	}
	for _, reason := range []string{"unknown_context", "source"} {
		awaitDrops(t, func() map[string]uint64 { return p.Status().Drops }, reason, 1)
	}
	pkt, id := newEcho(u.addr4, beyond4)
	u.send(packetCapsule(pkt))
	awaitOnly(t, p.device.Receive, id)
	victim.checkAlive()
	if lines := log.Lines("")[quiet:]; len(lines) > 0 {
		t.Errorf("%d lines in the log:\n%s", len(lines), lines[0])
	}
}

// By default, clients cannot reach the proxy's loopback and own addresses,
// metadata services, and other clients.
func TestWireDeniedDestinations(t *testing.T) {
	management4, management6 := netip.MustParseAddr("203.0.113.5"),
		netip.MustParseAddr("2001:db8:5::5")
	p := startWireProxy(t, func(c *proxy.Config) {
		c.LocalNetworks = func() ([]netip.Prefix, error) {
			return []netip.Prefix{netip.PrefixFrom(management4, 24),
				netip.PrefixFrom(management6, 64)}, nil
		}
	})
	u, other := p.tunnel(), p.tunnel()
	for _, dst := range []netip.Addr{
		netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.255.0.9"), netip.IPv6Loopback(),
		management4, management6,
		netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("168.63.129.16"),
		netip.MustParseAddr("fd00:ec2::254"),
		netip.MustParseAddr("64:ff9b::169.254.169.254"), netip.MustParseAddr("0.0.0.1"),
		other.addr4, other.addr6, notAssigned,
	} {
		t.Run(dst.String(), func(t *testing.T) {
			src, gateway, want := u.addr4, proxy4Inside, icmp{3, 13}
			if dst.Is6() {
				src, gateway, want = u.addr6, proxy6Inside, icmp{1, 1}
			}
			pkt, _ := newEcho(src, dst)
			time.Sleep(errorInterval)
			u.sendPacket(pkt)
			wantICMP(t, u.readPacket, pkt, gateway, want)
		})
	}
	for _, dst := range []string{"169.254.169.254", "255.255.255.255", "fe80::1"} {
		// Routers do not forward these destinations, so there is no ICMP error.
		src := u.addr4
		if a := netip.MustParseAddr(dst); a.Is6() {
			src = u.addr6
		}
		pkt, _ := newEcho(src, netip.MustParseAddr(dst))
		u.sendPacket(pkt)
	}
	awaitDrops(t, func() map[string]uint64 { return p.Status().Drops }, "link_local", 3)
	pkt, id := newEcho(u.addr4, beyond4)
	u.send(packetCapsule(pkt))
	awaitOnly(t, p.device.Receive, id)
}

// The proxy refuses requests above the user's limit, with the reason, and
// existing tunnels continue.
func TestWireThousandRequests(t *testing.T) {
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Methods, c.Users, c.MaxSessionsPerUser = []string{proxy.MethodToken}, wireUsers{}, 4
	})
	fields := connectIP(anyPath, "authorization: Bearer secret")
	u := p.tunnelFor(p.dial(masqueSettings), fields)
	statuses := map[string]int{}
	for range 1000 {
		s := u.conn.open(fields...)
		status, fields := s.response()
		statuses[status]++
		if status == "429" {
			if got := field(fields, "proxy-status"); !strings.Contains(got,
				"error=connection_limit_reached") {
				t.Fatalf("Proxy-Status %q", got)
			}
			_ = s.Close()
			s.CancelRead(0)
		}
	}
	if statuses["200"] != 3 || statuses["429"] != 997 {
		t.Errorf("answered with %v", statuses)
	}
	u.checkAlive()
}

// The proxy answers a flood of Initial packets with Retry, except for the first
// of them (RFC 9000 section 8.1.2), and tunnels continue.
func TestWireInitialFlood(t *testing.T) {
	p := startWireProxy(t, nil)
	u := p.tunnel()
	socket, err := net.Dial("udp", p.Addrs()[0].String())
	check(t, err)
	defer socket.Close()
	const n = 10000
	for range n {
		_, err := socket.Write(initial())
		check(t, err)
	}
	buf := make([]byte, 1500)
	check(t, socket.SetReadDeadline(time.Now().Add(patience)))
	for {
		n, err := socket.Read(buf)
		if err != nil {
			t.Fatalf("no Retry: %v", err)
		}
		if n > 5 && buf[0]>>4 == 0xf && binary.BigEndian.Uint32(buf[1:]) == 1 {
			// RFC 9000 section 17.2.5
			break
		}
	}
	u.checkAlive()
	p.tunnel() // a client that answers a Retry connects
}

// initial returns an Initial packet of QUIC version 1 whose payload cannot be
// decrypted (RFC 9000 section 17.2.2).
func initial() []byte {
	b := make([]byte, 1200)
	_, _ = rand.Read(b)
	b[0] = 0xc3
	binary.BigEndian.PutUint32(b[1:], 1)
	b[5], b[14] = 8, 8 // lengths of the connection IDs
	b[23] = 0          // no token
	binary.BigEndian.PutUint16(b[24:], 0x4000|uint16(len(b)-26))
	return b
}
