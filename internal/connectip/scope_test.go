package connectip

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

// Protocol numbers (IANA, Assigned Internet Protocol Numbers).
const (
	protoTCP         = 6
	protoUDP         = 17
	protoDestOptions = 60
)

// packetOf returns a packet of the given upper-layer protocol behind
// tun.Headroom bytes.
func packetOf(src, dst netip.Addr, proto uint8) []byte {
	pkt := echoPacket(src, dst, 64, 100)
	ip := pkt[tun.Headroom:]
	if src.Is6() {
		ip[6] = proto
		return pkt
	}
	sum := uint32(binary.BigEndian.Uint16(ip[10:])) + uint32(ip[9]) + 0xffff - uint32(proto)
	ip[9] = proto
	binary.BigEndian.PutUint16(ip[10:], uint16(sum+sum>>16))
	return pkt
}

// withOptions inserts a destination options header into an IPv6 packet.
func withOptions(pkt []byte) []byte {
	ip := pkt[tun.Headroom:]
	options := []byte{ip[6], 0, 1, 4, 0, 0, 0, 0} // one PadN
	out := slices.Insert(slices.Clone(pkt), tun.Headroom+40, options...)
	out[tun.Headroom+6] = protoDestOptions
	binary.BigEndian.PutUint16(out[tun.Headroom+4:], uint16(len(ip)-40+len(options)))
	return out
}

// udpPair connects a pair with the scope of UDP to one host of each family. At
// an endpoint that does not run, the test can send and receive all packets.
func udpPair(t *testing.T, runClient, runProxy bool) (client, proxy *end) {
	t.Helper()
	client, proxy = rawPair(t, Config{}, Config{
		Self: []netip.Addr{proxyAddr4, proxyAddr6},
		Denied: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"),
			netip.MustParsePrefix("fd77::/64")},
	})
	for e, run := range map[*end]bool{client: runClient, proxy: runProxy} {
		if run {
			e.start(t.Context())
			t.Cleanup(func() {
				e.stop()
				e.wait(t)
			})
		}
	}
	if err := proxy.Assign([]capsule.Address{{Prefix: host(clientAddr4)},
		{Prefix: host(clientAddr6)}}); err != nil {
		t.Fatal(err)
	}
	if err := proxy.Advertise(capsule.Routes([]netip.Prefix{host(target4), host(target6)},
		protoUDP)); err != nil {
		t.Fatal(err)
	}
	if runClient {
		<-client.assigns
		<-client.routes
	}
	return client, proxy
}

// fromWire waits for a packet in a datagram to e, which does not run.
func (e *end) fromWire(t *testing.T) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	b, err := e.stream.ReceiveDatagram(ctx)
	if err != nil || len(b) == 0 || b[0] != contextIPPacket {
		t.Fatalf("got % x, %v", b, err)
	}
	return b[1:]
}

func TestScopeAllows(t *testing.T) {
	client, proxy := udpPair(t, true, true)
	for name, tc := range map[string]struct {
		pkt  func(src, dst netip.Addr) []byte
		from netip.Addr
		to   netip.Addr
	}{
		"UDP": {func(a, b netip.Addr) []byte {
			return packetOf(a, b, protoUDP)
		}, clientAddr4, target4},
		"UDP over IPv6": {func(a, b netip.Addr) []byte {
			return packetOf(a, b, protoUDP)
		}, clientAddr6, target6},
		"UDP behind extension header": {func(a, b netip.Addr) []byte {
			return withOptions(packetOf(a, b, protoUDP))
		}, clientAddr6, target6},
		"ICMP": {func(a, b netip.Addr) []byte {
			return echoPacket(a, b, 64, 100)
		}, clientAddr4, target4},
		"ICMPv6": {func(a, b netip.Addr) []byte {
			return echoPacket(a, b, 64, 100)
		}, clientAddr6, target6},
	} {
		t.Run(name, func(t *testing.T) {
			if d := client.Send(tc.pkt(tc.from, tc.to), tun.Headroom); d != DropNone {
				t.Fatalf("to the proxy: %v", d)
			}
			if p := parse(t, proxy.device.next(t)); p.Dst != tc.to {
				t.Errorf("to the proxy: got %+v", p)
			}
			if d := proxy.Send(tc.pkt(tc.to, tc.from), tun.Headroom); d != DropNone {
				t.Fatalf("to the client: %v", d)
			}
			if p := parse(t, client.device.next(t)); p.Src != tc.to {
				t.Errorf("to the client: got %+v", p)
			}
		})
	}
}

// Packets outside of the scope are refused by the sending endpoint, and by the
// receiving endpoint if they arrive nevertheless.
func TestScopeRefuses(t *testing.T) {
	elsewhere6 := netip.MustParseAddr("2001:db8:9::9")
	for name, tc := range map[string]struct {
		from, to  netip.Addr
		proto     uint8
		typ, code uint8
		reason    Drop
	}{
		"protocol":                      {clientAddr4, target4, protoTCP, 3, 13, DropDestination},
		"protocol, IPv6":                {clientAddr6, target6, protoTCP, 1, 1, DropDestination},
		"destination":                   {clientAddr4, elsewhere4, protoUDP, 3, 0, DropDestination},
		"destination, IPv6":             {clientAddr6, elsewhere6, protoUDP, 1, 0, DropDestination},
		"the proxy's own address":       {clientAddr4, proxyAddr4, protoUDP, 3, 0, DropDestination},
		"protocol, to the client":       {target4, clientAddr4, protoTCP, 3, 13, DropDestination},
		"protocol, to the client, IPv6": {target6, clientAddr6, protoTCP, 1, 1, DropDestination},
		"source beyond the scope":       {elsewhere4, clientAddr4, protoUDP, 3, 13, DropSource},
		"source beyond the scope, IPv6": {elsewhere6, clientAddr6, protoUDP, 1, 5, DropSource},
	} {
		down := tc.to == clientAddr4 || tc.to == clientAddr6
		t.Run(name, func(t *testing.T) {
			sender, receiver := udpPair(t, true, true)
			if down {
				sender, receiver = receiver, sender
			}
			if d := sender.Send(packetOf(tc.from, tc.to, tc.proto), tun.Headroom); d != tc.reason {
				t.Errorf("got %v, want %v", d, tc.reason)
			}
			wantICMP(t, sender.device.next(t), tc.from, tc.typ, tc.code)
			if n := len(receiver.device); n != 0 {
				t.Errorf("%d packets came through", n)
			}
		})
		t.Run(name+", by the receiver", func(t *testing.T) {
			sender, receiver := udpPair(t, down, !down)
			if down {
				sender, receiver = receiver, sender
			}
			sendRaw(t, sender, packetOf(tc.from, tc.to, tc.proto))
			wantICMP(t, sender.fromWire(t), tc.from, tc.typ, tc.code)
			waitDrop(t, &receiver.stats.Receive, tc.reason)
			if n := len(receiver.device); n != 0 {
				t.Errorf("%d packets came through", n)
			}
		})
	}
}

// The ICMP errors for a denied destination and for one without a route differ.
func TestDeniedIsProhibited(t *testing.T) {
	client, proxy := rawPair(t, Config{},
		Config{Denied: []netip.Prefix{host(target4)}, Self: []netip.Addr{proxyAddr4}})
	proxy.start(t.Context())
	t.Cleanup(func() {
		proxy.stop()
		proxy.wait(t)
	})
	if err := proxy.Assign([]capsule.Address{{Prefix: host(clientAddr4)}}); err != nil {
		t.Fatal(err)
	}
	if err := proxy.Advertise(capsule.Routes([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
		0)); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		dst  netip.Addr
		code uint8
	}{"denied": {target4, 13}, "no route": {elsewhere4, 0}} {
		t.Run(name, func(t *testing.T) {
			sendRaw(t, client, packetOf(clientAddr4, tc.dst, protoUDP))
			wantICMP(t, client.fromWire(t), clientAddr4, 3, tc.code)
		})
	}
}

// An ICMP error from any source passes if the packet that it quotes is in the
// scope (RFC 9484 section 7.2.1).
func TestScopeOfICMPErrors(t *testing.T) {
	client, proxy := udpPair(t, true, true)
	router := netip.MustParseAddr("203.0.113.77")
	for name, tc := range map[string]struct {
		proto uint8
		want  Drop
	}{"in scope": {protoUDP, DropNone}, "out of scope": {protoTCP, DropSource}} {
		t.Run(name, func(t *testing.T) {
			invoking := packetOf(clientAddr4, target4, tc.proto)[tun.Headroom:]
			buf, ok := ippacket.AppendICMPError(make([]byte, tun.Headroom), invoking,
				parse(t, invoking), ippacket.HopLimitExceeded, router, 0)
			if !ok {
				t.Fatal("no ICMP error was made")
			}
			if d := proxy.Send(buf, tun.Headroom); d != tc.want {
				t.Fatalf("got %v, want %v", d, tc.want)
			}
			if tc.want == DropNone {
				wantICMP(t, client.device.next(t), clientAddr4, 11, 0)
			}
		})
	}
}
