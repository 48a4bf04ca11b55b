package proxy

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/congestion"
)

// TestUDPIsCongestionControlled checks that UDP flows are congestion
// controlled, whatever mode tunnels have (RFC 9298 section 6).
func TestUDPIsCongestionControlled(t *testing.T) {
	const (
		packets = 2000 // packets of the target, of 1000 bytes
		most    = 400  // packets that may be sent without an acknowledgment
		window  = 32   // packets in the initial congestion window
	)
	source := &flood{left: packets, on: make(chan struct{}), closed: make(chan struct{})}
	s := startServer(t, withUDP(echo(t), func(c *Config) {
		c.Congestion = congestion.Inner
		c.DialUDP = func(context.Context, netip.AddrPort) (net.Conn, error) { return source, nil }
	}))
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	client := &mutable{PacketConn: socket}
	transport := &quic.Transport{Conn: client}
	defer transport.Close()
	conn, err := transport.Dial(t.Context(), s.Addrs()[0],
		&tls.Config{RootCAs: s.roots, ServerName: "localhost",
			NextProtos: []string{http3.NextProtoH3}}, &quic.Config{EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	openFlow(t, (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn), nil)
	client.mute.Store(true) // no acknowledgments from now on
	ss := s.sessions.list()[0].base()
	before := ss.quic.ConnectionStats().BytesSent
	close(source.on)
	for s.Sessions()[0].Packets.TX < window {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(400 * time.Millisecond) // enough to send all packets
	if sent := ss.quic.ConnectionStats().BytesSent - before; sent > most*1000 {
		t.Errorf("%d bytes were sent without an acknowledgment", sent)
	}
}

// mutable is a socket that drops all packets while mute is set.
type mutable struct {
	net.PacketConn
	mute atomic.Bool
}

func (m *mutable) WriteTo(b []byte, to net.Addr) (int, error) {
	if m.mute.Load() {
		return len(b), nil
	}
	return m.PacketConn.WriteTo(b, to)
}

// flood is a target that sends packets of 1000 bytes, 10,000 in a second.
type flood struct {
	net.Conn
	left   int           // packets to send
	on     chan struct{} // closed to start
	closed chan struct{} // closed by Close
	once   sync.Once
}

func (f *flood) Read(b []byte) (int, error) {
	select {
	case <-f.on:
	case <-f.closed:
	}
	pause := 100 * time.Microsecond
	if f.left == 0 {
		pause = time.Hour
	}
	select {
	case <-f.closed:
		return 0, net.ErrClosed
	case <-time.After(pause):
		f.left--
		return 1000, nil
	}
}

func (f *flood) Write(b []byte) (int, error) { return len(b), nil }

func (f *flood) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}
