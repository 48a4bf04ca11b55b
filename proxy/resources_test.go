package proxy

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"masquevpn/internal/ippacket"
)

// atProcs runs f with one, two and many processors: what is shared by goroutines of several peers often has a size that
// follows from their number.
func atProcs(t *testing.T, f func(t *testing.T)) {
	for _, n := range []int{1, 2, 16} {
		t.Run(fmt.Sprintf("processors=%d", n), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(n))
			f(t)
		})
	}
}

// One client that sends into many tunnels of one connection in turn holds up nobody else.
func TestManyTunnelsOfOneConnection(t *testing.T) {
	const tunnels, rounds = 40, 100
	atProcs(t, func(t *testing.T) {
		h := newHub(t, func(c *Config) { c.MaxSessionsPerUser = tunnels })
		other := h.connect("a", "", netA)
		h.installs(netA)
		h.lets(other, "10.1.0.5", "192.0.2.9")

		attacker := *h
		_, attacker.h3 = h.dial(t, nil)
		var all []*gateway
		for range tunnels {
			all = append(all, attacker.connect("c", ""))
		}
		for range rounds {
			for _, g := range all {
				pkt := ippacket.AppendEcho([]byte{0}, g.own[0], netip.MustParseAddr("192.0.2.9"), 64, true, 1, 1, nil)
				if err := g.str.SendDatagram(pkt); err != nil {
					t.Fatal(err)
				}
			}
		}
		h.lets(other, "10.1.0.5", "192.0.2.77")
	})
}
