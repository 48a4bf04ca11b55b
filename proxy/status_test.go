package proxy

import (
	"net"
	"testing"
	"time"

	"golang.org/x/net/ipv4"

	"masquevpn/internal/connectip"
)

// TestFullSocketsAreCounted checks that the status has the packets that the
// kernel drops because a UDP socket is full, for all sockets.
func TestFullSocketsAreCounted(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Listen = []string{"127.0.0.1:0", "[::1]:0"} })
	if n, ok := s.Status().Drops["socket_full"]; ok {
		t.Fatalf("%d packets dropped at the start", n)
	}
	sockets, err := s.listen(t.Context()) // further sockets, which QUIC does not read
	if err != nil {
		t.Fatal(err)
	}
	dropped := uint64(0)
	for _, c := range sockets {
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if err := c.SetReadBuffer(1); err != nil { // the kernel uses its minimum
			t.Fatal(err)
		}
		from, err := net.Dial("udp", c.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		for before := dropped; dropped == before; {
			for range 100 {
				if _, err := from.Write(make([]byte, 500)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := c.ReadBatch([]ipv4.Message{{Buffers: [][]byte{make([]byte, 1500)}}},
				0); err != nil {
				t.Fatal(err)
			}
			dropped = s.Status().Drops[connectip.DropSocketFull.String()]
		}
	}
}
