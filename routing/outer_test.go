package routing

import (
	"net/netip"
	"testing"
	"time"
)

// The outer socket hears the proxy although the network has given this host the
// address that it has in the tunnel; other sockets do not hear others there.
func TestOuterSocketAtTheTunnelsAddress(t *testing.T) {
	h, router := connect(t)
	h.tun("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := fullState()
	s.Addresses = prefixes(hostAddr4+"/32", hostAddr6+"/128")
	h.apply(m, s)
	for _, family := range []struct{ host, near string }{{hostAddr4, routerAddr4},
		{hostAddr6, routerAddr6}} {
		proxy := router.listen(netip.AddrPortFrom(netip.MustParseAddr(family.near), 0).String(), 0)
		outer, other := h.listen(":0", DefaultMark), h.listen(":0", 0)
		send(t, outer, "question", netip.AddrPortFrom(netip.MustParseAddr(family.near),
			port(proxy)))
		_, from := receive(t, proxy)
		if from.Addr() != netip.MustParseAddr(family.host) {
			t.Fatalf("the question is from %v, want %s", from, family.host)
		}
		send(t, proxy, "to another socket", netip.AddrPortFrom(from.Addr(), port(other)))
		send(t, proxy, "answer", from)
		if text, _ := receive(t, outer); text != "answer" {
			t.Errorf("%s: got %q, want the answer", family.host, text)
		}
		_ = other.SetReadDeadline(time.Now()) // what was sent before the answer is there by now
		if n, _, err := other.ReadFromUDPAddrPort(make([]byte, 100)); err == nil {
			t.Errorf("%s: %d bytes passed the guard", family.host, n)
		}
	}
}
