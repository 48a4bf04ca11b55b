package proxy

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
)

// With these flags, TestAttackByHand attacks another proxy on this host:
//
//	go test ./proxy -run TestAttackByHand -attack 127.0.0.1:443 -attack-connections 5000
var (
	attackProxy       = flag.String("attack", "", "address and port of a proxy to attack")
	attackConnections = flag.Int("attack-connections", 1, "how many connections attack it")
	attackBytes       = flag.Int("attack-bytes", 1<<20,
		"how many bytes of datagrams each of them sends")
	attackHeader = flag.Int("attack-header", 3<<10,
		"how many bytes of a header each request of theirs has")
	attackTime = flag.Duration("attack-time", 20*time.Second, "for how long")
)

// halfRequests opens a connection without credentials from local and calls
// sendHalfRequests. It does not close the connection.
func halfRequests(ctx context.Context, local net.IP, proxy string, bytes int) (*quic.Conn, func(),
	error) {
	to, err := net.ResolveUDPAddr("udp", proxy)
	if err != nil {
		return nil, nil, err
	}
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: local})
	if err != nil {
		return nil, nil, err
	}
	transport := &quic.Transport{Conn: udp}
	free := func() {
		_ = transport.Close()
		_ = udp.Close()
	}
	conn, err := transport.Dial(ctx, to,
		&tls.Config{InsecureSkipVerify: true, NextProtos: []string{http3.NextProtoH3}},
		&quic.Config{EnableDatagrams: true, KeepAlivePeriod: time.Second})
	if err != nil {
		free()
		return nil, nil, err
	}
	// The control stream with SETTINGS: HTTP Datagrams are on.
	if control, err := conn.OpenUniStream(); err == nil {
		_, _ = control.Write([]byte{0, 4, 2, 0x33, 1})
	}
	sendHalfRequests(conn, bytes)
	return conn, free, nil
}

// sendHalfRequests opens as many requests on conn as the proxy allows, sends a
// part of each, and then datagrams for them, until it has sent the given number
// of bytes or the connection ends.
func sendHalfRequests(conn *quic.Conn, bytes int) {
	var streams []uint64
	for {
		str, err := conn.OpenStream()
		if err != nil {
			break
		}
		// A HEADERS frame without its end.
		_ = str.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		_, _ = str.Write(append(quicvarint.Append([]byte{1}, maxHeaderBytes),
			make([]byte, *attackHeader)...))
		streams = append(streams, uint64(str.StreamID())/4)
	}
	for i := 0; bytes > 0 && len(streams) > 0; i++ {
		datagram := append(quicvarint.Append(nil, streams[i%len(streams)]), make([]byte, 1100)...)
		if conn.SendDatagram(datagram) != nil {
			break
		}
		bytes -= len(datagram)
	}
}

// TestHalfRequests checks that clients without credentials use little memory of
// the proxy and do not affect other clients.
func TestHalfRequests(t *testing.T) {
	const (
		perAddress = 4
		attackers  = 12
		each       = 8 << 20  // bytes that an attacker sends
		most       = 16 << 20 // bytes that may be kept
	)
	s, device := hostile(t, func(c *Config) { c.MaxPendingPerAddress = perAddress })
	p := tunnel(t, s, device, nil)
	before := heap()
	var attack sync.WaitGroup
	for range attackers {
		attack.Go(func() {
			_, free, err := halfRequests(t.Context(), net.IPv4(127, 0, 0, 1),
				s.Addrs()[0].String(), each)
			if err == nil {
				t.Cleanup(free)
			}
		})
	}
	attack.Wait()
	if grown := int64(heap()) - int64(before); grown > most {
		t.Errorf("the proxy keeps %d bytes, want %d at most", grown, most)
	}
	if n := s.Counters().PendingConnections; n > perAddress {
		t.Errorf("%d connections are pending, want %d at most", n, perAddress)
	}
	p.lives(t)
	if got, want := s.Counters().Sessions, 1; got != want {
		t.Errorf("%d sessions, want %d", got, want)
	}
}

// TestUnreadDatagrams checks that the proxy bounds the datagrams of streams
// that nobody reads, which a user with an accepted request may open.
func TestUnreadDatagrams(t *testing.T) {
	const (
		sent = 64 << 20 // bytes
		most = 16 << 20 // bytes that may be kept
	)
	s, device := hostile(t, nil)
	attacker, other := tunnel(t, s, device, nil), tunnel(t, s, device, nil)
	before := heap()
	sendHalfRequests(attacker.conn, sent)
	if grown := int64(heap()) - int64(before); grown > most {
		t.Errorf("the proxy keeps %d bytes, want %d at most", grown, most)
	}
	other.lives(t)
}

// TestRefusedRequestsAreNone checks that a connection stays pending after a
// refused request, and not after an accepted one.
func TestRefusedRequestsAreNone(t *testing.T) {
	s, _ := hostile(t, nil)
	conn, h3 := s.dial(t, nil)
	if rsp, _ := request(t, h3, "GET", "", "/", nil); rsp.StatusCode != http.StatusNotFound {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	if n := s.Counters().PendingConnections; n != 1 {
		t.Errorf("%d connections are pending after a refused request, want 1", n)
	}
	if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
		nil); rsp.StatusCode != http.StatusOK {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	if n := s.Counters().PendingConnections; n != 0 {
		t.Errorf("%d connections are pending after an accepted request, want 0", n)
	}
	if conn.Context().Err() != nil {
		t.Error("the connection has ended")
	}
}

// TestStreamsAfterAcceptance checks that a connection has its full number of
// streams after an accepted request.
func TestStreamsAfterAcceptance(t *testing.T) {
	s, _ := hostile(t, nil)
	conn, h3 := s.dial(t, nil)
	if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
		nil); rsp.StatusCode != http.StatusOK {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	for range maxStreams - 1 {
		if _, err := conn.OpenStreamSync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAttackByHand attacks the proxy that the flags name.
func TestAttackByHand(t *testing.T) {
	if *attackProxy == "" {
		t.Skip("needs -attack")
	}
	ctx, cancel := context.WithTimeout(t.Context(), *attackTime)
	defer cancel()
	var running sync.WaitGroup
	var made, failed atomic.Int64
	next := make(chan int)
	for range min(*attackConnections, 64) {
		running.Go(func() {
			for i := range next {
				// The connections come from a thousand addresses.
				local := net.IPv4(127, 1, byte(i%1000>>8), byte(1+i%250))
				_, free, err := halfRequests(ctx, local, *attackProxy, *attackBytes)
				if err != nil {
					failed.Add(1)
					continue
				}
				made.Add(1)
				running.Go(func() {
					<-ctx.Done()
					free()
				})
			}
		})
	}
	for i := range *attackConnections {
		next <- i
	}
	close(next)
	<-ctx.Done()
	running.Wait()
	fmt.Println("connections:", made.Load(), "refused:", failed.Load())
}
