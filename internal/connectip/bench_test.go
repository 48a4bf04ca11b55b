package connectip

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/quic-go/quic-go"

	"masquevpn/capsule"
	"masquevpn/tun"
)

// discard is a QUIC connection that discards all datagrams.
type discard struct{}

func (discard) SendDatagram([]byte) error                              { return nil }
func (discard) CloseWithError(quic.ApplicationErrorCode, string) error { return nil }
func (discard) ConnectionStats() (s quic.ConnectionStats)              { return s }

// discardDevice is a device that discards all packets.
type discardDevice struct{}

func (discardDevice) BatchSize() int                          { return maxBatch }
func (discardDevice) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }

// benchConn returns a Conn of a proxy without a network.
func benchConn(b *testing.B) *Conn {
	b.Helper()
	c := New(fakeStream{}, nil, Config{Device: discardDevice{}, Stats: &Stats{},
		Self: []netip.Addr{proxyAddr4}})
	c.datagrams.conn = discard{}
	c.link.peerAssigned = []netip.Prefix{host(clientAddr4)}
	c.link.advertised = capsule.Routes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, 0)
	if err := c.updatePolicy(); err != nil {
		b.Fatal(err)
	}
	c.maxPacket.Store(1400)
	return c
}

func BenchmarkSend(b *testing.B) {
	c := benchConn(b)
	pkt := echoPacket(target4, clientAddr4, 64, 1400)
	buf := make([]byte, len(pkt))
	b.SetBytes(int64(len(pkt) - tun.Headroom))
	for b.Loop() {
		copy(buf, pkt)
		if d := c.Send(buf, tun.Headroom); d != DropNone {
			b.Fatal(d)
		}
	}
}

// BenchmarkSendRoutes sends to the networks behind a peer that advertises many.
func BenchmarkSendRoutes(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("routes=%d", n), func(b *testing.B) {
			c := benchConn(b)
			prefixes := make([]netip.Prefix, n)
			pkts := make([][]byte, n)
			for i := range prefixes {
				// Every second /28, so that no two can be merged.
				var a [4]byte
				binary.BigEndian.PutUint32(a[:], 10<<24|uint32(i)<<5)
				prefixes[i] = netip.PrefixFrom(netip.AddrFrom4(a), 28)
				pkts[i] = echoPacket(target4, prefixes[i].Addr().Next(), 64, 100)
			}
			c.link.peerAdvertised = capsule.Routes(prefixes, 0)
			if err := c.updatePolicy(); err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, len(pkts[0]))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				copy(buf, pkts[i*7919%n])
				if d := c.Send(buf, tun.Headroom); d != DropNone {
					b.Fatal(d)
				}
			}
		})
	}
}

func BenchmarkReceive(b *testing.B) {
	c := benchConn(b)
	in := newInbox(c)
	defer c.stop(nil)
	go in.deliver()
	datagram := append([]byte{contextIPPacket},
		echoPacket(clientAddr4, target4, 64, 1400)[tun.Headroom:]...)
	b.SetBytes(int64(len(datagram) - 1))
	for b.Loop() {
		in.HandleDatagram(datagram)
	}
	in.FlushDatagrams()
}
