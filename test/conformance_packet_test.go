package test

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sys/unix"

	"masquevpn/capsule"
	"masquevpn/client"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
)

var (
	linkLocal6  = netip.MustParseAddr("fe80::77")
	linkLocal4  = netip.MustParseAddr("169.254.7.7")
	allNodes    = netip.MustParseAddr("ff02::1")
	elsewhere4  = netip.MustParseAddr("198.51.100.7") // outside the advertised routes
	elsewhere6  = netip.MustParseAddr("2001:db8:9::7")
	notAssigned = netip.MustParseAddr("10.77.0.200")
)

// icmp is the type and code of an ICMP error.
type icmp struct{ typ, code uint8 }

// wantICMP waits for the ICMP error about pkt. The error must come from src and
// quote pkt up to the maximum length (RFC 1812 section 4.3.2.3, RFC 4443
// section 2.4 c). wantICMP returns the second word of the ICMP header, which
// holds the MTU of a "too big" error.
func wantICMP(t *testing.T, read func(context.Context) ([]byte, error), pkt []byte, src netip.Addr,
	want icmp) uint32 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	invoking := sourceOf(pkt)
	for {
		got, err := read(ctx)
		if err != nil {
			t.Errorf("no ICMP error %v about a packet from %v: %v", want, invoking, err)
			return 0
		}
		p, err := ippacket.Parse(got)
		if err != nil {
			t.Fatalf("%v in % x", err, got)
		}
		if !ippacket.IsICMPError(got, p) || p.Dst != invoking {
			continue
		}
		limit := 576
		if p.Version == 6 {
			limit = 1280
		}
		quote := got[p.HeaderLen+8:]
		if is := (icmp{got[p.HeaderLen], got[p.HeaderLen+1]}); is != want || p.Src != src {
			t.Errorf("ICMP %v from %v about a packet from %v, want %v from %v", is, p.Src, invoking,
				want, src)
		}
		if len(got) > limit || len(quote) != min(len(pkt), limit-p.HeaderLen-8) ||
			!bytes.Equal(quote, pkt[:len(quote)]) {
			t.Errorf("ICMP %v quotes %d bytes of %d: % x", want, len(quote), len(pkt), quote)
		}
		return binary.BigEndian.Uint32(got[p.HeaderLen+4:])
	}
}

// sourceOf returns the source address of a packet that may be malformed
// otherwise.
func sourceOf(pkt []byte) netip.Addr {
	if pkt[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(pkt[12:16]))
	}
	return netip.AddrFrom16([16]byte(pkt[8:24]))
}

// packet returns a packet of the given protocol with n bytes after the IP
// header.
func packet(src, dst netip.Addr, protocol, hopLimit uint8, n int) []byte {
	pkt := ippacket.AppendEcho(nil, src, dst, hopLimit, true, 1, 1, make([]byte, max(0, n-8)))
	if src.Is4() {
		pkt[9] = protocol
		return checksum4(pkt)
	}
	pkt[6] = protocol
	return pkt
}

// checksum4 corrects the checksum of an IPv4 header without options.
func checksum4(pkt []byte) []byte {
	pkt[10], pkt[11] = 0, 0
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pkt[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(pkt[10:], ^uint16(sum>>16+sum))
	return pkt
}

const (
	protoTCP = 6
	protoUDP = 17
)

// withHeaders inserts extension headers after the IPv6 header of pkt.
func withHeaders(pkt []byte, headers ...extension) []byte {
	out := slices.Clone(pkt[:40])
	next := &out[6]
	upper := *next
	for _, h := range headers {
		*next = h.typ
		at := len(out)
		out = append(out, upper, byte((len(h.content)+2)/8-1))
		out = append(out, h.content...)
		next = &out[at]
	}
	out = append(out, pkt[40:]...)
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

// extension is an IPv6 extension header.
type extension struct {
	typ uint8

	// content begins at the third byte of the header. Its length is 6 bytes
	// plus a multiple of 8.
	content []byte
}

// errorInterval is a little longer than the rate limit of ICMP errors delays
// the next error.
const errorInterval = 110 * time.Millisecond

// The proxy answers with the ICMP errors that RFC 1812 and RFC 4443 require of
// a router: into the tunnel about packets of the client, and to the network
// about packets for the client.
func TestWireICMP(t *testing.T) {
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("2001:db8:3::/48")}
		c.Deny = []netip.Prefix{netip.MustParsePrefix("192.0.2.66/32"),
			netip.MustParsePrefix("2001:db8:3::66/128")}
	})
	denied4, denied6 := netip.MustParseAddr("192.0.2.66"), netip.MustParseAddr("2001:db8:3::66")
	nobody4, nobody6 := netip.MustParseAddr("10.77.0.99"), netip.MustParseAddr("fd77::99")
	u := p.tunnelFor(p.dial(masqueSettings), connectIP("/.well-known/masque/ip/*/6/"))
	v := u.addr6
	tooMany := slices.Repeat([]extension{{60, make([]byte, 6)}}, 9)
	// The first fragment holds 8 of the 20 bytes of the TCP header.
	cutFirst := withHeaders(packet(v, beyond6, protoTCP, 64, 8),
		extension{44, []byte{0, 1, 0, 0, 0, 7}})
	cut := packet(v, beyond6, 60, 64, 8)
	cut[40], cut[41] = protoTCP, 200

	for _, tc := range []struct {
		name string
		pkt  []byte
		want icmp
		src  netip.Addr
	}{
		{"source not assigned", packet(notAssigned, beyond4, protoTCP, 64, 900), icmp{3, 13},
			proxy4Inside},
		{"source not assigned, IPv6", packet(elsewhere6, beyond6, protoTCP, 64, 1300), icmp{1, 5},
			proxy6Inside},
		{"no route", packet(u.addr4, elsewhere4, protoTCP, 64, 40), icmp{3, 0}, proxy4Inside},
		{"no route, IPv6", packet(v, elsewhere6, protoTCP, 64, 40), icmp{1, 0}, proxy6Inside},
		{"denied", packet(u.addr4, denied4, protoTCP, 64, 40), icmp{3, 13}, proxy4Inside},
		{"denied, IPv6", packet(v, denied6, protoTCP, 64, 40), icmp{1, 1}, proxy6Inside},
		{"not in the scope", packet(u.addr4, beyond4, protoUDP, 64, 40), icmp{3, 13}, proxy4Inside},
		{"not in the scope, IPv6", packet(v, beyond6, protoUDP, 64, 40), icmp{1, 1}, proxy6Inside},
		{"not in the scope, behind headers",
			withHeaders(packet(v, beyond6, protoUDP, 64, 40), extension{0, make([]byte, 6)},
				extension{60, make([]byte, 14)}), icmp{1, 1}, proxy6Inside},
		{"first fragment with its header chain cut", cutFirst, icmp{4, 3}, proxy6Inside},
		{"header chain cut", cut, icmp{1, 1}, proxy6Inside},
		{"header chain too long", withHeaders(packet(v, beyond6, protoTCP, 64, 40), tooMany...),
			icmp{1, 1}, proxy6Inside},
		{"link-local source", packet(linkLocal6, beyond6, protoTCP, 64, 40), icmp{1, 2},
			proxy6Inside},
	} {
		t.Run("up/"+tc.name, func(t *testing.T) {
			time.Sleep(errorInterval)
			u.sendPacket(tc.pkt)
			wantICMP(t, u.readPacket, tc.pkt, tc.src, tc.want)
		})
	}
	for _, tc := range []struct {
		name string
		pkt  []byte
		want icmp
		src  netip.Addr
	}{
		{"no session", packet(beyond4, nobody4, protoTCP, 64, 40), icmp{3, 1}, proxy4Inside},
		{"no session, IPv6", packet(beyond6, nobody6, protoTCP, 64, 40), icmp{1, 3}, proxy6Inside},
		{"source not advertised", packet(elsewhere4, u.addr4, protoTCP, 64, 40), icmp{3, 13},
			proxy4Inside},
		{"source not advertised, IPv6", packet(elsewhere6, v, protoTCP, 64, 40), icmp{1, 5},
			proxy6Inside},
		{"not in the scope", packet(beyond4, u.addr4, protoUDP, 64, 40), icmp{3, 13}, proxy4Inside},
		{"not in the scope, IPv6", packet(beyond6, v, protoUDP, 64, 40), icmp{1, 1}, proxy6Inside},
		{"hop limit", packet(beyond4, u.addr4, protoTCP, 1, 40), icmp{11, 0}, proxy4Inside},
		{"hop limit, IPv6", packet(beyond6, v, protoTCP, 1, 40), icmp{3, 0}, proxy6Inside},
		{"too big", packet(beyond4, u.addr4, protoTCP, 64, 1470), icmp{3, 4}, proxy4Inside},
		{"too big, IPv6", packet(beyond6, v, protoTCP, 64, 1450), icmp{2, 0}, proxy6Inside},
		{"header chain too long", withHeaders(packet(beyond6, v, protoTCP, 64, 40), tooMany...),
			icmp{1, 1}, proxy6Inside},
		{"link-local source", packet(linkLocal6, v, protoTCP, 64, 40), icmp{1, 2}, proxy6Inside},
	} {
		t.Run("down/"+tc.name, func(t *testing.T) {
			time.Sleep(errorInterval)
			p.device.Inject(tc.pkt)
			mtu := wantICMP(t, p.device.Receive, tc.pkt, tc.src, tc.want)
			if tooBig := len(tc.pkt) > 1400; tooBig && (mtu < 1280 || int(mtu) >= len(tc.pkt)) {
				t.Errorf("the MTU in the error is %d", mtu)
			}
		})
	}
}

// The proxy drops packets without an ICMP error where routers do: malformed
// packets, errors about errors, and packets that are not from or to a single
// host (RFC 1122 section 3.2.2, RFC 4443 section 2.4 e). It also drops routing
// headers that lead elsewhere, such as type 0 (RFC 5095), without an error.
func TestWireNoICMP(t *testing.T) {
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), allIPv6}
	})
	u := p.tunnel()
	edit := func(pkt []byte, at int, with ...byte) []byte {
		copy(pkt[at:], with)
		return pkt
	}
	plain4 := func(dst netip.Addr) []byte { return packet(u.addr4, dst, protoTCP, 64, 40) }
	refused4 := packet(notAssigned, beyond4, protoTCP, 64, 40)
	q, err := ippacket.Parse(refused4)
	check(t, err)
	// An ICMP error from an unassigned address, about a packet that did not
	// pass through this tunnel.
	about, ok := ippacket.AppendICMPError(nil, refused4, q, ippacket.NoRoute, elsewhere4, 0)
	if !ok {
		t.Fatal("no ICMP error was made")
	}
	silent := map[string][]byte{
		"bad checksum":       edit(plain4(elsewhere4), 10, 1, 2),
		"version 5":          edit(plain4(elsewhere4), 0, 0x55),
		"too long a length":  checksum4(edit(plain4(elsewhere4), 2, 0xff, 0xff)),
		"too short a length": checksum4(edit(plain4(elsewhere4), 2, 0, 30)),
		"half a header":      plain4(elsewhere4)[:10],
		"empty":              {},
		"later fragment":     checksum4(edit(plain4(elsewhere4), 6, 0, 5)),
		"ICMP error":         about,
		"multicast":          plain4(netip.MustParseAddr("239.1.2.3")),
		"broadcast":          plain4(netip.MustParseAddr("255.255.255.255")),
		"from nowhere":       packet(netip.IPv4Unspecified(), beyond4, protoTCP, 64, 40),
		"from loopback":      packet(netip.MustParseAddr("127.0.0.1"), beyond4, protoTCP, 64, 40),
		"from multicast":     packet(netip.MustParseAddr("239.1.2.3"), beyond4, protoTCP, 64, 40),
		"from broadcast": packet(netip.MustParseAddr("255.255.255.255"), beyond4, protoTCP,
			64, 40),
		"link-local, IPv4":   packet(linkLocal4, beyond4, protoTCP, 64, 40),
		"to link-local":      packet(u.addr6, linkLocal6, protoTCP, 64, 40),
		"from ::":            packet(netip.IPv6Unspecified(), beyond6, protoTCP, 64, 40),
		"from ::1":           packet(netip.IPv6Loopback(), beyond6, protoTCP, 64, 40),
		"wrong length, IPv6": edit(packet(u.addr6, beyond6, protoTCP, 64, 40), 4, 0, 20),
		"routing header 0": withHeaders(packet(u.addr6, beyond6, protoTCP, 64, 40),
			extension{43, make([]byte, 6)}),
		"segment routing": withHeaders(packet(u.addr6, beyond6, protoTCP, 64, 40),
			extension{43, append([]byte{4, 1}, make([]byte, 20)...)}),
		"router solicitation": packet(linkLocal6, netip.MustParseAddr("ff02::2"), 58, 255, 8),
	}
	marked := uint8(0)
	for name, pkt := range silent {
		t.Run(name, func(t *testing.T) {
			u.sendPacket(pkt)
			marked++
			last := plain4(elsewhere4)
			last[4] = marked
			checksum4(last)
			time.Sleep(errorInterval)
			u.sendPacket(last)
			wantOnlyICMP(t, u.readPacket, last)
		})
	}
	pkt, id := newEcho(u.addr4, beyond4)
	u.sendPacket(pkt)
	// None of the packets reached the network.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if got, err := p.device.Receive(ctx); err != nil || !hasID(got, id) {
		t.Errorf("the network received % x, %v", got, err)
	}
}

// wantOnlyICMP waits for an ICMP error of any type that quotes about. No other
// packet may arrive before it.
func wantOnlyICMP(t *testing.T, read func(context.Context) ([]byte, error), about []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		got, err := read(ctx)
		check(t, err)
		if bytes.HasSuffix(got, about) {
			return
		}
		t.Errorf("answered with % x", got)
	}
}

// The proxy sends at most 10 ICMP errors per second in each direction, after a
// burst of 10. Packet Too Big has a limit of its own.
func TestWireICMPRate(t *testing.T) {
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	})
	u := p.tunnel()
	start := time.Now()
	const n = 200
	for i := range uint64(2) {
		for range n {
			p.device.Inject(packet(elsewhere4, u.addr4, protoTCP, 64, 40))
		}
		awaitDrops(t, func() map[string]uint64 { return p.Status().Drops }, "source", (i+1)*n)
		time.Sleep(3 * errorInterval) // allows a few more errors
	}
	sent, most := p.Status().ICMPSent, 10+uint64(10*time.Since(start).Seconds())+1
	if sent < 10 || sent > most {
		t.Errorf("%d ICMP errors about %d packets, want 10 to %d", sent, 2*n, most)
	}
	for range n { // use up the limit of other errors
		p.device.Inject(packet(elsewhere4, u.addr4, protoTCP, 64, 40))
	}
	big := packet(beyond4, u.addr4, protoTCP, 64, 1470)
	p.device.Inject(big)
	wantICMP(t, p.device.Receive, big, proxy4Inside, icmp{3, 4})
}

// The client answers like the proxy: its host through the device, and the proxy
// through the tunnel. It accepts packets only from advertised sources (BCP 38)
// and only for its own addresses.
func TestWireClientPolicy(t *testing.T) {
	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	c := r.startClient(nil)
	s := r.establish(c)
	// An address of the client that lies within an advertised route.
	advertised6 := netip.MustParseAddr("2001:db8:3::99")
	s.send(&capsule.AddressAssign{Addresses: []capsule.Address{
		{Prefix: netip.PrefixFrom(inside4, 32)}, {Prefix: netip.PrefixFrom(inside6, 128)},
		{Prefix: netip.PrefixFrom(advertised6, 128)},
	}}, &capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:3::/48")}, 0)})
	s.checkAlive()
	for name, tc := range map[string]struct {
		pkt  []byte
		want icmp
		src  netip.Addr
	}{
		"source not advertised": {packet(elsewhere4, inside4, protoTCP, 64, 40), icmp{3, 13},
			inside4},
		"source not advertised, IPv6": {packet(elsewhere6, inside6, protoTCP, 64, 40), icmp{1, 5},
			inside6},
		"own source": {packet(inside4, inside4, protoTCP, 64, 40), icmp{3, 13},
			inside4},
		"own source, advertised": {packet(advertised6, inside6, protoTCP, 64, 40), icmp{1, 5},
			inside6},
		"not for this host": {packet(beyond4, notAssigned, protoTCP, 64, 40), icmp{3, 0},
			inside4},
		"not for this host, IPv6": {packet(beyond6, elsewhere6, protoTCP, 64, 40), icmp{1, 0},
			inside6},
		"link-local source": {packet(linkLocal6, inside6, protoTCP, 64, 40), icmp{1, 2}, inside6},
	} {
		t.Run("down/"+name, func(t *testing.T) {
			s.sendPacket(tc.pkt)
			wantICMP(t, s.readPacket, tc.pkt, tc.src, tc.want)
		})
	}
	for name, tc := range map[string]struct {
		pkt  []byte
		want icmp
		src  netip.Addr
	}{
		"source not assigned": {packet(elsewhere4, beyond4, protoTCP, 64, 40), icmp{3, 13},
			inside4},
		"source not assigned, IPv6": {packet(elsewhere6, beyond6, protoTCP, 64, 40), icmp{1, 5},
			inside6},
		"no route":          {packet(inside4, elsewhere4, protoTCP, 64, 40), icmp{3, 0}, inside4},
		"no route, IPv6":    {packet(inside6, elsewhere6, protoTCP, 64, 40), icmp{1, 0}, inside6},
		"link-local source": {packet(linkLocal6, beyond6, protoTCP, 64, 40), icmp{1, 2}, inside6},
		"too big":           {packet(inside4, beyond4, protoTCP, 64, 1470), icmp{3, 4}, inside4},
		"too big, IPv6":     {packet(inside6, beyond6, protoTCP, 64, 1450), icmp{2, 0}, inside6},
	} {
		t.Run("up/"+name, func(t *testing.T) {
			c.device.Inject(tc.pkt)
			wantICMP(t, c.device.Receive, tc.pkt, tc.src, tc.want)
		})
	}
	pkt, id := newEcho(beyond4, inside4)
	s.send(packetCapsule(pkt))
	awaitOnly(t, c.device.Receive, id)
}

// Each end answers an echo request to the all-nodes address of the link itself,
// with the complete data, and does not forward it (RFC 9484 section 7.2).
func TestWireLinkEcho(t *testing.T) {
	p := startWireProxy(t, nil)
	u := p.tunnel()
	data := bytes.Repeat([]byte{7}, 1232)
	u.sendPacket(ippacket.AppendEcho(nil, linkLocal6, allNodes, 255, true, 99, 5, data))
	wantEchoReply(t, u.readPacket, data)

	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	c := r.startClient(nil)
	s := r.establish(c)
	s.sendPacket(ippacket.AppendEcho(nil, linkLocal6, allNodes, 255, true, 99, 5, data))
	wantEchoReply(t, s.readPacket, data)

	u.checkAlive() // fails if the network received the echo request
}

// wantEchoReply waits for the reply to an echo request from linkLocal6 with
// data.
func wantEchoReply(t *testing.T, read func(context.Context) ([]byte, error), data []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		pkt, err := read(ctx)
		check(t, err)
		p, err := ippacket.Parse(pkt)
		check(t, err)
		request, id, seq, got, ok := ippacket.ParseEcho(pkt, p)
		if !ok || request || id != 99 {
			continue
		}
		if p.Dst != linkLocal6 || !p.Src.IsLinkLocalUnicast() || seq != 5 ||
			!bytes.Equal(got, data) {
			t.Errorf("answered with %+v, sequence number %d, %d bytes", p, seq, len(got))
		}
		return
	}
}

// If clients share an external address, an ICMP error goes only to the client
// that sent the quoted packet (RFC 9484 section 11).
func TestWireICMPErrorsReachTheirTunnel(t *testing.T) {
	p := startWireProxy(t, nil)
	a, b := p.tunnel(), p.tunnel()
	router := elsewhere4
	sent, _ := newEcho(a.addr4, beyond4)
	parsed, err := ippacket.Parse(sent)
	check(t, err)
	about, ok := ippacket.AppendICMPError(nil, sent, parsed, ippacket.HopLimitExceeded, router, 0)
	if !ok {
		t.Fatal("no ICMP error was made")
	}
	// The same error, addressed to b by a faulty or malicious router.
	other := slices.Clone(about)
	copy(other[16:20], b.addr4.AsSlice())
	p.device.Inject(checksum4(other))
	awaitDrops(t, func() map[string]uint64 { return p.Status().Drops }, "source", 1)
	b.checkAlive()
	p.device.Inject(about)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	got, err := a.readPacket(ctx)
	check(t, err)
	if q, err := ippacket.Parse(got); err != nil || q.Src != router ||
		!ippacket.IsICMPError(got, q) {
		t.Errorf("%+v, %v", q, err)
	}
}

// relay forwards UDP packets between one client and a server and counts them by
// traffic class.
type relay struct {
	addr string // for the client to dial

	mu  sync.Mutex    // guards tos
	tos map[uint8]int // number of packets by traffic class
}

// startRelay runs a relay to server until the test ends.
func startRelay(t *testing.T, server string) *relay {
	t.Helper()
	r := &relay{tos: make(map[uint8]int)}
	to, err := net.ResolveUDPAddr("udp4", server)
	check(t, err)
	listen := func() *net.UDPConn {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		check(t, err)
		raw, err := c.SyscallConn()
		check(t, err)
		check(t, raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
		}))
		check(t, err)
		return c
	}
	near, far := listen(), listen()
	r.addr = near.LocalAddr().String()
	var client sync.Map
	pass := func(from, out *net.UDPConn, dst func(*net.UDPAddr) *net.UDPAddr) {
		buf, oob := make([]byte, 2048), make([]byte, 128)
		for {
			n, o, _, src, err := from.ReadMsgUDP(buf, oob)
			if err != nil {
				return
			}
			r.note(oob[:o])
			if d := dst(src); d != nil {
				_, _ = out.WriteToUDP(buf[:n], d)
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		pass(near, far, func(src *net.UDPAddr) *net.UDPAddr { client.Store("", src); return to })
	})
	wg.Go(func() {
		pass(far, near, func(*net.UDPAddr) *net.UDPAddr {
			src, _ := client.Load("")
			d, _ := src.(*net.UDPAddr)
			return d
		})
	})
	t.Cleanup(func() {
		near.Close()
		far.Close()
		wg.Wait()
	})
	return r
}

// note counts a packet with the given control messages.
func (r *relay) note(oob []byte) {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TOS && len(m.Data) > 0 {
			r.tos[m.Data[0]]++
		}
	}
}

// The outer packets do not show the inner DSCP, and the inner DSCP and ECN
// arrive unchanged (RFC 9484 section 10.3).
func TestWireTrafficClass(t *testing.T) {
	p := startWireProxy(t, nil)
	relay := startRelay(t, p.Addrs()[0].String())
	c := (&rawServer{t: t, pki: p.pki, addr: relay.addr}).startClient(nil)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	awaitState(t, ctx, c.Client, client.StateConnected)
	for _, class := range []byte{46<<2 | 3, 10<<2 | 1, 2, 0} {
		// EF with CE, AF11 with ECT(1), ECT(0), none.
		for _, dir := range []struct {
			src, dst netip.Addr
			in, out  interface {
				Inject([]byte)
				Receive(context.Context) ([]byte, error)
			}
		}{
			{inside4, beyond4, c.device, p.device}, {inside6, beyond6, c.device, p.device},
			{beyond4, inside4, p.device, c.device}, {beyond6, inside6, p.device, c.device},
		} {
			pkt, id := newEcho(dir.src, dir.dst)
			if dir.src.Is4() {
				pkt[1] = class
				checksum4(pkt)
			} else {
				pkt[0], pkt[1] = 6<<4|class>>4, class<<4
			}
			dir.in.Inject(pkt)
			got := awaitID(t, dir.out.Receive, id)
			if !bytes.Equal(got[:2], pkt[:2]) {
				t.Errorf("traffic class %#x from %v begins with % x on arrival, sent % x", class,
					dir.src, got[:2], pkt[:2])
			}
		}
	}
	relay.mu.Lock()
	defer relay.mu.Unlock()
	if len(relay.tos) == 0 {
		t.Error("the relay saw no packet")
	}
	for tos, n := range relay.tos {
		if tos>>2 != 0 {
			t.Errorf("%d packets outside have the DSCP %d", n, tos>>2)
		}
	}
}
