package proxy

import (
	"net"
	"testing"
	"time"

	"golang.org/x/net/ipv4"

	"masquevpn/internal/connectip"
)

// What the kernel drops because a UDP socket is full is counted, over all
// sockets, and shown.
func TestFullSocketsAreCounted(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Listen = []string{"127.0.0.1:0", "[::1]:0"} })
	if n, ok := s.Status().Drops["socket_full"]; ok {
		t.Fatalf("%d packets dropped at the start", n)
	}
	sockets, err := s.listen(t.Context()) // more of them, that QUIC does not read from
	if err != nil {
		t.Fatal(err)
	}
	dropped := uint64(0)
	for _, c := range sockets {
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if err := c.SetReadBuffer(1); err != nil { // the least that there is
			t.Fatal(err)
		}
		from, err := net.Dial("udp", c.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		for before := dropped; dropped == before; dropped = s.Status().Drops[connectip.DropSocketFull.String()] {
			for range 100 {
				if _, err := from.Write(make([]byte, 500)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := c.ReadBatch([]ipv4.Message{{Buffers: [][]byte{make([]byte, 1500)}}},
				0); err != nil {
				t.Fatal(err)
			}
		}
	}
}
