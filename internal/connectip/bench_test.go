package connectip

import (
	"net/netip"
	"testing"

	"github.com/quic-go/quic-go"

	"masquevpn/capsule"
)

// discard is a QUIC connection that takes all datagrams and sends none.
type discard struct{}

func (discard) SendDatagram([]byte) error                              { return nil }
func (discard) CloseWithError(quic.ApplicationErrorCode, string) error { return nil }
func (discard) ConnectionStats() quic.ConnectionStats                  { return quic.ConnectionStats{} }

// benchConn makes a Conn as a proxy has it, without a network.
func benchConn(b *testing.B) *Conn {
	b.Helper()
	c := New(fakeStream{}, nil, Config{Device: make(device, 1), Stats: &Stats{}, Self: []netip.Addr{proxyAddr4}})
	c.datagrams.conn = discard{}
	c.link.peer = []netip.Prefix{host(clientAddr4)}
	c.link.routes = capsule.Routes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, 0)
	if err := c.update(); err != nil {
		b.Fatal(err)
	}
	c.maxPacket.Store(1400)
	return c
}

func BenchmarkSend(b *testing.B) {
	c := benchConn(b)
	pkt := echoPacket(target4, clientAddr4, 64, 1400)
	buf := make([]byte, len(pkt))
	b.SetBytes(int64(len(pkt) - Headroom))
	for b.Loop() {
		copy(buf, pkt)
		if d := c.Send(buf, Headroom); d != DropNone {
			b.Fatal(d)
		}
	}
}

func BenchmarkReceive(b *testing.B) {
	c := benchConn(b)
	in := inbox{packets: make(chan []byte, 1)}
	datagram := append([]byte{contextIPPacket}, echoPacket(clientAddr4, target4, 64, 1400)[Headroom:]...)
	b.SetBytes(int64(len(datagram) - 1))
	for b.Loop() {
		c.handleDatagram(datagram, in)
		<-in.packets
	}
}
