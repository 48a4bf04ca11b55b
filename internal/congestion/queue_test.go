package congestion

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/internal/pki/pkitest"
)

// TestDatagramsWaitBeforeQUIC checks that only few datagrams wait in QUIC when
// its congestion control is on, so that flows take turns in their flow queue.
func TestDatagramsWaitBeforeQUIC(t *testing.T) {
	// most is above the 32 of stock quic-go, and far below queues sized for
	// throughput.
	const most = 64
	synctest.Test(t, func(t *testing.T) {
		conn, wire := controlled(t)
		// From now on there are no acknowledgments, as on a slow path.
		wire.mute.Store(true)
		sent := wire.sent.Load()
		var queued atomic.Int64
		full := make(chan struct{})
		go func() {
			defer close(full)
			// Two datagrams of 1000 bytes do not fit one packet.
			for conn.SendDatagram(make([]byte, 1000)) == nil {
				queued.Add(1)
			}
		}()
		// The pacer sends all that the window allows.
		time.Sleep(time.Second)
		synctest.Wait()
		if n := queued.Load() - (wire.sent.Load() - sent); n < 1 || n > most {
			t.Errorf("%d datagrams wait in QUIC, want 1 to %d", n, most)
		}
		_ = conn.CloseWithError(0, "")
		<-full
	})
}

// controlled returns a connection with QUIC's congestion control and its
// socket.
func controlled(t *testing.T) (*quic.Conn, *memory) {
	in := pkitest.New("a.example")
	config := &quic.Config{EnableDatagrams: true}
	Outer.Apply(config)

	here, there := newMemory(1), newMemory(2)
	here.peer, there.peer = there, here
	client, server := &quic.Transport{Conn: here}, &quic.Transport{Conn: there}
	t.Cleanup(func() {
		_, _, _, _ = here.Close(), there.Close(), client.Close(), server.Close()
	})
	ln, err := server.Listen(&tls.Config{Certificates: []tls.Certificate{in.Proxy},
		NextProtos: []string{"test"}}, config)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := client.Dial(context.Background(), there.LocalAddr(),
		&tls.Config{RootCAs: in.Roots, ServerName: "a.example", NextProtos: []string{"test"}}, config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ln.Accept(context.Background()); err != nil {
		t.Fatal(err)
	}
	// Wait for the end of the handshake and of path MTU discovery.
	time.Sleep(time.Second)
	return conn, here
}

// memory is an in-memory socket whose packets go to its peer.
type memory struct {
	addr *net.UDPAddr
	peer *memory
	in   chan []byte
	mute atomic.Bool // sent packets are lost
	sent atomic.Int64

	closed chan struct{}
	once   sync.Once
}

func newMemory(port int) *memory {
	return &memory{addr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port},
		in: make(chan []byte, 1000), closed: make(chan struct{})}
}

func (m *memory) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-m.in:
		return copy(b, p), m.peer.addr, nil
	case <-m.closed:
		return 0, nil, net.ErrClosed
	}
}

func (m *memory) WriteTo(b []byte, _ net.Addr) (int, error) {
	m.sent.Add(1)
	if !m.mute.Load() {
		m.peer.in <- append([]byte(nil), b...)
	}
	return len(b), nil
}

func (m *memory) Close() error {
	m.once.Do(func() { close(m.closed) })
	return nil
}

func (m *memory) LocalAddr() net.Addr              { return m.addr }
func (m *memory) SetDeadline(time.Time) error      { return nil }
func (m *memory) SetReadDeadline(time.Time) error  { return nil }
func (m *memory) SetWriteDeadline(time.Time) error { return nil }
