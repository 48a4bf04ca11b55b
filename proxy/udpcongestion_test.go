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

// A flow of UDP is sent at the pace of the client's acknowledgments, whatever
// the proxy does for tunnels (RFC 9298 section 6).
func TestUDPIsCongestionControlled(t *testing.T) {
	// of 1000 bytes; the last is the initial congestion window
	const packets, most, window = 2000, 400, 32
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
	time.Sleep(400 * time.Millisecond) // in which all could be sent
	if sent := ss.quic.ConnectionStats().BytesSent - before; sent > most*1000 {
		t.Errorf("%d bytes were sent without an acknowledgment", sent)
	}
}

// mutable is a socket that can be kept from sending.
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

// flood is a target that sends packets of 1000 bytes, 10,000 a second.
type flood struct {
	net.Conn
	left       int
	on, closed chan struct{}
	once       sync.Once
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
