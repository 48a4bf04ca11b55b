package routing

import (
	"net/netip"
	"testing"
	"time"
)

// If the host has the tunnel's address on its network too, outer sockets
// receive packets of the proxy there, and other sockets receive none.
func TestOuterSocketAtTheTunnelsAddress(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := fullState()
	s.Addresses = prefixes(hostAddr4+"/32", hostAddr6+"/128")
	h.apply(m, s)
	for _, tt := range []struct{ name, host, near string }{
		{"IPv4", hostAddr4, routerAddr4},
		{"IPv6", hostAddr6, routerAddr6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, router := h.in(t), router.in(t)
			proxy := router.listen(netip.AddrPortFrom(netip.MustParseAddr(tt.near), 0).String(), 0)
			outer, other := h.listen(":0", DefaultMark), h.listen(":0", 0)
			send(t, outer, "question",
				netip.AddrPortFrom(netip.MustParseAddr(tt.near), port(proxy)))
			_, from := receive(t, proxy)
			if from.Addr() != netip.MustParseAddr(tt.host) {
				t.Fatalf("the question is from %v, want %s", from, tt.host)
			}
			send(t, proxy, "to another socket", netip.AddrPortFrom(from.Addr(), port(other)))
			send(t, proxy, "answer", from)
			if text, _ := receive(t, outer); text != "answer" {
				t.Errorf("got %q, want the answer", text)
			}
			_ = other.SetReadDeadline(time.Now()) // earlier packets have arrived before the answer
			if n, _, err := other.ReadFromUDPAddrPort(make([]byte, 100)); err == nil {
				t.Errorf("%d bytes passed the guard", n)
			}
		})
	}
}
