package connectip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

func TestPacketsBothWays(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	for _, tc := range []struct {
		name     string
		from, to netip.Addr
	}{
		{"IPv4", clientAddr4, target4},
		{"IPv6", clientAddr6, target6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up := echoPacket(tc.from, tc.to, 64, 100)
			if d := client.Send(up, tun.Headroom); d != DropNone {
				t.Fatalf("to the proxy: dropped, %v", d)
			}
			if got := proxy.device.next(t); !bytes.Equal(got, up[tun.Headroom:]) {
				t.Errorf("to the proxy: got % x, sent % x", got, up[tun.Headroom:])
			}
			down := echoPacket(tc.to, tc.from, 64, 100)
			if d := proxy.Send(down, tun.Headroom); d != DropNone {
				t.Fatalf("to the client: dropped, %v", d)
			}
			if got := parse(t, client.device.next(t)); got.Src != tc.to || got.Dst != tc.from {
				t.Errorf("to the client: got %+v", got)
			}
		})
	}
	if n := proxy.stats.Receive.Packets.Load(); n != 2 {
		t.Errorf("proxy counted %d packets, want 2", n)
	}
}

// The hop limit is decremented when a packet is sent in a datagram, unless this
// host made the packet (RFC 9484 section 7.2).
func TestHopLimit(t *testing.T) {
	for _, tc := range []struct {
		name      string
		src       netip.Addr
		kernel    bool
		sent, got uint8 // got 0: dropped
	}{
		{"forwarded", target4, false, 64, 63},
		{"forwarded IPv6", target6, false, 2, 1},
		{"exceeded", target4, false, 1, 0},
		{"own address", proxyAddr4, false, 1, 1},
		{"left to the kernel", target4, true, 1, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client, proxy := remoteAccess(t, Config{KernelHopLimit: tc.kernel})
			dst := clientAddr4
			if tc.src.Is6() {
				dst = clientAddr6
			}
			d := proxy.Send(echoPacket(tc.src, dst, tc.sent, 64), tun.Headroom)
			if tc.got == 0 {
				answer := proxy.device.next(t)
				if p := parse(t, answer); d != DropHopLimit || p.Src != proxyAddr4 ||
					p.Dst != tc.src || answer[p.HeaderLen] != 11 {
					t.Errorf("%v, answered with %+v % x", d, p, answer)
				}
				return
			}
			if got := parse(t, client.device.next(t)).HopLimit; got != tc.got {
				t.Errorf("hop limit %d, want %d", got, tc.got)
			}
		})
	}
}

func TestPolicyRefuses(t *testing.T) {
	denied := netip.MustParseAddr("169.254.169.254")
	client, proxy := remoteAccess(t,
		Config{Denied: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"),
			host(netip.MustParseAddr("203.0.113.5"))}})
	t.Run("client refuses a source that is not its own", func(t *testing.T) {
		if d := client.Send(echoPacket(elsewhere4, target4, 64, 64),
			tun.Headroom); d != DropSource {
			t.Errorf("got %v", d)
		}
		wantICMP(t, client.device.next(t), elsewhere4, 3, 13)
	})
	t.Run("proxy refuses a spoofed source, and answers into the tunnel", func(t *testing.T) {
		sendRaw(t, client, echoPacket(elsewhere4, target4, 64, 64))
		waitDrop(t, &proxy.stats.Receive, DropSource)
	})
	t.Run("proxy refuses its own address as a source", func(t *testing.T) {
		before := proxy.stats.Receive.drops[DropSource].Load()
		sendRaw(t, client, echoPacket(proxyAddr4, target4, 64, 64))
		waitCount(t, func() bool { return proxy.stats.Receive.drops[DropSource].Load() > before })
	})
	t.Run("client refuses packets from itself", func(t *testing.T) {
		sendRaw(t, proxy, echoPacket(clientAddr4, clientAddr4, 64, 64))
		waitDrop(t, &client.stats.Receive, DropSource)
	})
	t.Run("denied destination", func(t *testing.T) {
		if d := client.Send(echoPacket(clientAddr4, netip.MustParseAddr("10.77.0.3"), 64, 64),
			tun.Headroom); d != DropNone {
			t.Fatalf("client dropped it, %v", d)
		}
		wantICMP(t, client.device.next(t), clientAddr4, 3, 13)
		waitDrop(t, &proxy.stats.Receive, DropDestination)
	})
	t.Run("own tunnel address of the proxy stays reachable", func(t *testing.T) {
		if d := client.Send(echoPacket(clientAddr4, proxyAddr4, 64, 64),
			tun.Headroom); d != DropNone {
			t.Fatalf("client dropped it, %v", d)
		}
		if p := parse(t, proxy.device.next(t)); p.Dst != proxyAddr4 {
			t.Errorf("got %+v", p)
		}
	})
	t.Run("link-local", func(t *testing.T) {
		if d := client.Send(echoPacket(clientAddr4, denied, 64, 64),
			tun.Headroom); d != DropLinkLocal {
			t.Errorf("got %v", d)
		}
		sendRaw(t, client, echoPacket(clientAddr4, denied, 64, 64))
		waitDrop(t, &proxy.stats.Receive, DropLinkLocal)
	})
	t.Run("malformed", func(t *testing.T) {
		sendRaw(t, client, make([]byte, tun.Headroom+20))
		waitDrop(t, &proxy.stats.Receive, DropMalformed)
	})
}

// An ICMP error passes, from any source, if the packet that it quotes could
// have been sent through the tunnel (RFC 9484 section 7.2.1).
func TestICMPErrorsAreJudgedByTheirQuote(t *testing.T) {
	client, proxy := newPair(t, Config{}, Config{Self: []netip.Addr{proxyAddr4}})
	if err := proxy.Assign([]capsule.Address{{Prefix: host(clientAddr4)}}); err != nil {
		t.Fatal(err)
	}
	if err := proxy.Advertise(capsule.Routes([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
		0)); err != nil {
		t.Fatal(err)
	}
	<-client.assigns
	<-client.routes
	router := netip.MustParseAddr("203.0.113.77")
	errorAbout := func(src, dst netip.Addr) []byte {
		invoking := echoPacket(src, dst, 1, 64)[tun.Headroom:]
		buf, ok := ippacket.AppendICMPError(make([]byte, tun.Headroom), invoking,
			parse(t, invoking), ippacket.HopLimitExceeded, router, 0)
		if !ok {
			t.Fatal("no ICMP error was made")
		}
		return buf
	}
	if d := proxy.Send(errorAbout(clientAddr4, target4), tun.Headroom); d != DropNone {
		t.Fatalf("proxy dropped an error about a packet of the client, %v", d)
	}
	if p := parse(t, client.device.next(t)); p.Src != router {
		t.Errorf("client got %+v", p)
	}
	if d := proxy.Send(errorAbout(clientAddr4, elsewhere4), tun.Headroom); d != DropSource {
		t.Errorf("error about a packet that could not have come from the client: %v", d)
	}
	sendRaw(t, proxy, errorAbout(clientAddr4, elsewhere4))
	waitDrop(t, &client.stats.Receive, DropSource)
}

func TestTooBig(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	mtu := proxy.MTU()
	if mtu < 1280 {
		t.Fatalf("MTU %d", mtu)
	}
	t.Run("IPv6", func(t *testing.T) {
		if d := proxy.Send(echoPacket(target6, clientAddr6, 64, 1500),
			tun.Headroom); d != DropTooBig {
			t.Fatalf("got %v", d)
		}
		answer := proxy.device.next(t)
		p := parse(t, answer)
		if got := binary.BigEndian.Uint32(answer[p.HeaderLen+4:]); answer[p.HeaderLen] != 2 ||
			int(got) < mtu || got >= 1500 {
			t.Errorf("type %d, MTU %d, want %d or a little more", answer[p.HeaderLen], got, mtu)
		}
	})
	t.Run("IPv4 with DF", func(t *testing.T) {
		if d := proxy.Send(echoPacket(target4, clientAddr4, 64, 1500),
			tun.Headroom); d != DropTooBig {
			t.Fatalf("got %v", d)
		}
		answer := proxy.device.next(t)
		p := parse(t, answer)
		if got := binary.BigEndian.Uint16(answer[p.HeaderLen+6:]); answer[p.HeaderLen+1] != 4 ||
			int(got) < mtu || got >= 1500 {
			t.Errorf("code %d, MTU %d, want %d or a little more", answer[p.HeaderLen+1], got, mtu)
		}
	})
	t.Run("IPv4 without DF", func(t *testing.T) {
		pkt := echoPacket(target4, clientAddr4, 64, 1500)
		clearDontFragment(pkt[tun.Headroom:])
		if d := proxy.Send(pkt, tun.Headroom); d != DropNone {
			t.Fatalf("got %v", d)
		}
		first, second := parse(t, client.device.next(t)), parse(t, client.device.next(t))
		if !first.MoreFragments || second.MoreFragments ||
			second.FragmentOffset != first.TotalLen-20 ||
			first.TotalLen+second.TotalLen-40 != 1480 || first.HopLimit != 63 {
			t.Errorf("fragments %+v and %+v", first, second)
		}
	})
}

// fakeQUIC is a QUIC connection that records datagrams.
type fakeQUIC struct {
	limit int      // maximum length of a datagram in bytes
	sent  [][]byte // copies of the datagrams
}

func (f *fakeQUIC) SendDatagram(b []byte) error {
	if len(b) > f.limit {
		return &quic.DatagramTooLargeError{MaxDatagramPayloadSize: int64(f.limit)}
	}
	f.sent = append(f.sent, bytes.Clone(b))
	return nil
}

// fakeStream is a request stream that receives nothing and discards writes.
type fakeStream struct{ Stream }

func (fakeStream) StreamID() quic.StreamID          { return 4 }
func (fakeStream) Write(b []byte) (int, error)      { return len(b), nil }
func (fakeStream) SetWriteDeadline(time.Time) error { return nil }

func (f *fakeQUIC) CloseWithError(quic.ApplicationErrorCode, string) error { return nil }
func (f *fakeQUIC) ConnectionStats() (s quic.ConnectionStats)              { return s }

// newFake returns a Conn without a network.
func newFake(f *fakeQUIC, cfg Config) *Conn {
	c := New(fakeStream{}, nil, cfg)
	c.datagrams.conn = f
	c.updateMTU()
	return c
}

// A peer may accept only datagrams that are too short for a packet.
func TestNoRoomForPackets(t *testing.T) {
	c := newFake(&fakeQUIC{limit: 0},
		Config{Device: make(device, 8), Stats: &Stats{}, Self: []netip.Addr{proxyAddr4}})
	if err := c.Assign([]capsule.Address{{Prefix: host(clientAddr4)}}); err != nil {
		t.Fatal(err)
	}
	pkt := echoPacket(proxyAddr4, clientAddr4, 64, 64)
	clearDontFragment(pkt[tun.Headroom:])
	if d := c.Send(pkt, tun.Headroom); d != DropTooBig || c.MTU() != 0 {
		t.Errorf("%v with an MTU of %d", d, c.MTU())
	}
}

func clearDontFragment(pkt []byte) {
	pkt[6] &^= 0x40
	sum := uint32(binary.BigEndian.Uint16(pkt[10:])) + 0x4000
	binary.BigEndian.PutUint16(pkt[10:], uint16(sum+sum>>16))
}

// Each ADDRESS_ASSIGN and ROUTE_ADVERTISEMENT replaces the previous one.
func TestCapsulesReplace(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	if err := proxy.Assign([]capsule.Address{{Prefix: host(clientAddr6)}}); err != nil {
		t.Fatal(err)
	}
	<-client.assigns
	if d := client.Send(echoPacket(clientAddr4, target4, 64, 64), tun.Headroom); d != DropSource {
		t.Errorf("after the address was taken away: %v", d)
	}
	if err := proxy.Advertise(nil); err != nil {
		t.Fatal(err)
	}
	<-client.routes
	if d := client.Send(echoPacket(clientAddr6, target6, 64, 64),
		tun.Headroom); d != DropDestination {
		t.Errorf("after the routes were withdrawn: %v", d)
	}
}

func TestRequestIsAnswered(t *testing.T) {
	client, _ := newPair(t, Config{}, Config{}) // this proxy assigns nothing
	if err := client.Request([]netip.Prefix{host(netip.IPv4Unspecified()),
		host(clientAddr6)}); err != nil {
		t.Fatal(err)
	}
	got := <-client.assigns
	if len(got) != 2 || !got[0].Refused() || !got[1].Refused() ||
		got[0].RequestID == got[1].RequestID || client.Unanswered() {
		t.Errorf("got %v, unanswered %v", got, client.Unanswered())
	}
}

// An invalid capsule resets the stream with the code of RFC 9297 section 3.3.
func TestMalformedCapsuleResetsTheStream(t *testing.T) {
	for name, tc := range map[string]struct {
		capsules []byte
		code     http3.ErrCode
	}{
		"malformed": {(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 0,
			Prefix: host(clientAddr4)}}}).Append(nil), http3.ErrCodeMessageError},
		"request ID reused": {bytes.Repeat((&capsule.AddressRequest{
			Addresses: []capsule.Address{{RequestID: 1, Prefix: host(clientAddr4)}},
		}).Append(nil), 2), http3.ErrCodeMessageError},
		"malformed DNS": {
			[]byte("\x9a\xce\x79\xec\x0e\x01\x00\x00\x01\xc0\x00\x02\x21\x00\x00\x00\x01\x00\x00"),
			http3.ErrCodeMessageError,
		},
		"malformed PREF64": {[]byte("\xa7\x4c\x0f\xbc\x01\x60"), http3.ErrCodeMessageError},
		"too large DNS": {append([]byte("\x9a\xce\x79\xec"),
			quicvarint.Append(nil, MaxCapsule+1)...), http3.ErrCodeExcessiveLoad},
		"too large": {append([]byte{1}, quicvarint.Append(nil, 1<<30)...),
			http3.ErrCodeExcessiveLoad},
	} {
		t.Run(name, func(t *testing.T) {
			client, proxy := rawPair(t, Config{}, Config{})
			proxy.start(t.Context())
			if _, err := client.stream.Write(tc.capsules); err != nil {
				t.Fatal(err)
			}
			if err := proxy.wait(t); err == nil {
				t.Error("Run returned nil")
			}
			buf := make([]byte, 100)
			var err error
			for err == nil {
				_, err = client.stream.Read(buf)
			}
			var reset *http3.Error
			if !errors.As(err, &reset) || reset.ErrorCode != tc.code {
				t.Errorf("the stream ended with %v, want %v", err, tc.code)
			}
			client.start(t.Context())
			client.wait(t)
		})
	}
}

// A DATAGRAM capsule carries a packet like a QUIC datagram does, and unknown
// capsules are skipped.
func TestDatagramCapsule(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	pkt := echoPacket(clientAddr4, target4, 64, 64)[tun.Headroom:]
	unknown := append(quicvarint.Append(nil, 0x2b), 3, 1, 2, 3)
	b := (&capsule.Datagram{Payload: append([]byte{contextIPPacket}, pkt...)}).Append(unknown)
	if _, err := client.stream.Write(b); err != nil {
		t.Fatal(err)
	}
	if got := proxy.device.next(t); !bytes.Equal(got, pkt) {
		t.Errorf("got % x, sent % x", got, pkt)
	}
}

// A packet in a capsule may be longer than any datagram.
func TestLongestPacket(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	pkt := echoPacket(clientAddr4, target4, 64, 65530)[tun.Headroom:]
	if _, err := client.stream.Write((&capsule.Datagram{Payload: append([]byte{contextIPPacket},
		pkt...)}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	if got := proxy.device.next(t); !bytes.Equal(got, pkt) {
		t.Errorf("got %d bytes of %d", len(got), len(pkt))
	}
}

func TestUnknownContextIsDropped(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	prefix := quicvarint.Append(nil, uint64(client.stream.StreamID())/4)
	// Context ID 2, no context ID, and half a context ID.
	for _, payload := range [][]byte{{2, 0x45}, {}, {0x40}} {
		if err := client.quic.SendDatagram(append(bytes.Clone(prefix), payload...)); err != nil {
			t.Fatal(err)
		}
	}
	waitCount(t, func() bool { return proxy.stats.Receive.drops[DropUnknownContext].Load() == 3 })
	if d := client.Send(echoPacket(clientAddr4, target4, 64, 64), tun.Headroom); d != DropNone {
		t.Fatalf("the stream ended: %v", d)
	}
	proxy.device.next(t)
}

func TestProbe(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client.Probe(ctx)
	select {
	case <-client.FirstPacket():
	default:
		t.Error("Probe returned before a packet was received")
	}
	// The other probe is for peers that answer with their IP stack. Its hop
	// limit expires there.
	p := parse(t, proxy.device.next(t))
	if p.HopLimit != 1 || p.Src != clientAddr4 {
		t.Errorf("got %+v", p)
	}
	select {
	case pkt := <-client.device:
		t.Errorf("the answer was given to the device: % x", pkt)
	default:
	}
}

func TestEnds(t *testing.T) {
	t.Run("finished by the peer", func(t *testing.T) {
		client, proxy := newPair(t, Config{}, Config{})
		client.stop()
		if err := client.wait(t); err != nil {
			t.Errorf("client: %v", err)
		}
		if err := proxy.wait(t); !errors.Is(err, ErrClosedByPeer) {
			t.Errorf("proxy: %v", err)
		}
		if d := client.Send(echoPacket(clientAddr4, target4, 64, 64), tun.Headroom); d == DropNone {
			t.Error("a packet was sent after the end")
		}
	})
	for _, code := range []quic.ApplicationErrorCode{0,
		quic.ApplicationErrorCode(http3.ErrCodeNoError)} {
		t.Run(fmt.Sprintf("connection closed by the peer with %#x", code), func(t *testing.T) {
			client, proxy := newPair(t, Config{}, Config{})
			_ = client.datagrams.conn.CloseWithError(code, "")
			if err := proxy.wait(t); !errors.Is(err, ErrClosedByPeer) {
				t.Errorf("proxy: %v", err)
			}
		})
	}
	t.Run("reset by the peer", func(t *testing.T) {
		client, proxy := newPair(t, Config{}, Config{})
		client.stream.CancelWrite(quic.StreamErrorCode(http3.ErrCodeInternalError))
		if err := proxy.wait(t); err == nil || errors.Is(err, ErrClosedByPeer) {
			t.Errorf("proxy: %v", err)
		}
	})
}

// stuckQUIC is a QUIC connection whose queue of datagrams is full until the
// connection is closed.
type stuckQUIC struct{ closed chan struct{} }

func (q stuckQUIC) SendDatagram([]byte) error {
	<-q.closed
	return errors.New("closed")
}

func (q stuckQUIC) CloseWithError(quic.ApplicationErrorCode, string) error {
	close(q.closed)
	return nil
}

func (q stuckQUIC) ConnectionStats() quic.ConnectionStats { return quic.ConnectionStats{} }

// A Conn ends even if the peer accepts no packets.
func TestEndsThoughPacketsAreStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(fakeStream{}, nil, Config{})
		c.datagrams.conn = stuckQUIC{make(chan struct{})}
		var wg sync.WaitGroup
		wg.Go(func() {
			_ = c.datagrams.send(echoPacket(clientAddr4, target4, 64, 64), tun.Headroom)
		})
		c.Drain(wg.Wait)
	})
}

// blockedStream is a request stream whose peer does not read. A write closes
// writing and waits until ended is closed.
type blockedStream struct {
	fakeStream
	writing, ended chan struct{}
}

func (s blockedStream) Write([]byte) (int, error) {
	close(s.writing)
	<-s.ended
	return 0, errors.New("ended")
}

// A peer that does not read delays its capsules, but no change of the policy.
func TestPolicyChangesWhileTheStreamIsBlocked(t *testing.T) {
	str := blockedStream{writing: make(chan struct{}), ended: make(chan struct{})}
	c := New(str, nil, Config{})
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Advertise(nil) })
	<-str.writing
	changed := make(chan error, 1)
	go func() { changed <- c.SetDenied([]netip.Prefix{host(target4)}, nil) }()
	select {
	case err := <-changed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the policy does not change")
	}
	close(str.ended)
	wg.Wait()
}

// wantICMP checks that pkt is an ICMP error to dst.
func wantICMP(t *testing.T, pkt []byte, dst netip.Addr, typ, code uint8) {
	t.Helper()
	p := parse(t, pkt)
	if p.Dst != dst || !ippacket.IsICMPError(pkt, p) || pkt[p.HeaderLen] != typ ||
		pkt[p.HeaderLen+1] != code {
		t.Errorf("got an answer to %v with type %d, code %d, want to %v, %d, %d", p.Dst,
			pkt[p.HeaderLen], pkt[p.HeaderLen+1], dst, typ, code)
	}
}

// sendRaw sends the packet behind buf's headroom without checking e's policy.
func sendRaw(t *testing.T, e *end, buf []byte) {
	t.Helper()
	if err := e.datagrams.send(buf, tun.Headroom); err != nil {
		t.Fatal(err)
	}
}

func waitDrop(t *testing.T, traffic *Traffic, d Drop) {
	t.Helper()
	waitCount(t, func() bool { return traffic.drops[d].Load() > 0 })
}

func waitCount(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the packet was not counted")
		}
	}
}

// A host that sends from any address of a family learns at once that the tunnel
// carries no packets of that family.
func TestFamilyWithoutAddress(t *testing.T) {
	for _, tc := range []struct {
		name               string
		assigned, src, dst netip.Addr
		typ, code          uint8
	}{
		{"IPv6 through a tunnel for IPv4", clientAddr4, clientAddr6, target6, 1, 0},
		{"IPv4 through a tunnel for IPv6", clientAddr6, clientAddr4, target4, 3, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client, proxy := newPair(t, Config{},
				Config{Self: []netip.Addr{proxyAddr4, proxyAddr6}})
			if err := proxy.Assign([]capsule.Address{{Prefix: host(tc.assigned)}}); err != nil {
				t.Fatal(err)
			}
			<-client.assigns
			if d := client.Send(echoPacket(tc.src, tc.dst, 64, 100),
				tun.Headroom); d != DropSource {
				t.Errorf("from %v: %v", tc.src, d)
			}
			got := client.device.next(t)
			p := parse(t, got)
			if !ippacket.IsICMPError(got, p) || got[p.HeaderLen] != tc.typ ||
				got[p.HeaderLen+1] != tc.code || p.Dst != tc.src {
				t.Errorf("from %v: answered with % x", tc.src, got)
			}
			if tc.src.Is6() && !p.Src.IsLinkLocalUnicast() {
				t.Errorf("answered from %v", p.Src)
			}
		})
	}
}

// Packets that must not be forwarded are answered with the ICMP errors of a
// router (RFC 4443 section 3.1, code 2, and RFC 7112 section 5).
func TestRouterICMPErrors(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	linkLocal := netip.MustParseAddr("fe80::77")
	if d := client.Send(echoPacket(linkLocal, target6, 64, 64), tun.Headroom); d != DropLinkLocal {
		t.Errorf("link-local source from the host: %v", d)
	}
	wantICMP(t, client.device.next(t), linkLocal, 1, 2)

	// A destination options header that is longer than the packet.
	truncated := echoPacket(clientAddr6, target6, 64, 56)
	truncated[tun.Headroom+6] = 60
	truncated[tun.Headroom+41] = 200
	if d := client.Send(truncated, tun.Headroom); d != DropMalformed {
		t.Errorf("truncated header chain: %v", d)
	}
	answer := client.device.next(t)
	if p := parse(t, answer); answer[p.HeaderLen] != 1 && answer[p.HeaderLen] != 4 {
		t.Errorf("answered with type %d", answer[p.HeaderLen])
	}
	sendRaw(t, client, echoPacket(linkLocal, target6, 64, 64))
	waitDrop(t, &proxy.stats.Receive, DropLinkLocal)
	waitCount(t, func() bool { return proxy.stats.ICMPSent.Total() > 0 })
}

// A link whose connection starts with small packets, because the path may be
// narrow, becomes large enough for IPv6 without any traffic.
func TestIdleLinkGrows(t *testing.T) {
	grown := func(e *end) bool {
		n, err := e.datagrams.mtu()
		if err != nil {
			t.Fatal(err)
		}
		return n >= MinIPv6MTU
	}
	client, proxy := rawPairSize(t, Config{}, Config{}, 1200)
	for tries := 1; grown(client) || grown(proxy); tries++ {
		// On a busy machine QUIC may increase its packet size before grown is
		// called.
		if tries == 20 {
			t.Fatalf("no pair started with small packets")
		}
		client, proxy = rawPairSize(t, Config{}, Config{}, 1200)
	}
	for _, e := range []*end{client, proxy} {
		e.start(t.Context())
		defer e.wait(t)
		defer e.stop()
	}
	waitCount(t, func() bool { return client.MTU() >= MinIPv6MTU && proxy.MTU() >= MinIPv6MTU })
}

// Config.MaxCapsule of the receiver limits the length of capsules.
func TestLongCapsule(t *testing.T) {
	var many []capsule.Route
	for i := range 3000 {
		a := netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0, byte(i >> 7), byte(i << 1)})
		many = append(many, capsule.Route{Start: a, End: a})
	}
	for _, tc := range []struct {
		name    string
		limit   int
		refused bool
	}{
		{"default", 0, true},
		{"long enough", len(many) * capsule.MaxRouteLen, false},
		{"a byte less", len(many)*capsule.MaxRouteLen - 1, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client, proxy := newPair(t, Config{MaxCapsule: tc.limit}, Config{})
			err := proxy.Advertise(many)
			if tc.refused {
				if err := client.wait(t); !errors.Is(err, capsule.ErrTooLarge) {
					t.Errorf("Run: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := len(<-client.routes); n != len(many) {
				t.Errorf("received %d routes, want %d", n, len(many))
			}
		})
	}
}
