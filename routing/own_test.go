package routing

import (
	"errors"
	"net/netip"
	"os"
	"testing"
)

// otherNames contains the addresses of a proxy's host, except the tunnel's
// addresses. The tests add the new addresses after Apply.
var otherNames = []struct{ name, addr string }{
	{"address", hostAddr4}, {"IPv6 address", hostAddr6},
	{"directed broadcast", "192.168.5.255"}, {"limited broadcast", "255.255.255.255"},
	{"multicast", "224.0.0.1"}, {"all nodes", "ff02::1"}, {"all routers of the site", "ff05::2"},
	{"subnet-router anycast", "2001:db8:5::"},
	{"new address", "192.168.5.77"}, {"new IPv6 address", "2001:db8:5::77"},
}

// Clients reach the proxy's host by the tunnel's addresses only.
func TestClientsReachOnlyTunnelAddresses(t *testing.T) {
	h, _ := connect(t)
	device := h.device("masque0")
	m := h.open(Config{Instance: "one", Interface: "masque0"})
	h.apply(m, State{
		Addresses: prefixes("10.77.0.1/32", "fd77::1/128"),
		Routes:    prefixes("10.77.0.0/24", "fd77::/64"), Forward: true,
	})
	h.ip("addr add 192.168.5.77/24 dev up0")
	h.ip("addr add 2001:db8:5::77/64 dev up0 nodad")
	h.settle()
	for _, tt := range otherNames {
		t.Run(tt.name, func(t *testing.T) {
			service := h.listen(":0", 0)
			client, own := netip.MustParseAddr("10.77.0.9"), netip.MustParseAddr("10.77.0.1")
			to := netip.MustParseAddr(tt.addr)
			if to.Is6() {
				client, own = netip.MustParseAddr("fd77::9"), netip.MustParseAddr("fd77::1")
			}
			for _, p := range []struct {
				to   netip.Addr
				text string
			}{{to, "to " + tt.name}, {own, "to the tunnel"}} {
				pkt := udpPacket(t, netip.AddrPortFrom(client, 4000),
					netip.AddrPortFrom(p.to, port(service)), p.text)
				if _, err := device.Write(pkt); err != nil {
					t.Fatal(err)
				}
			}
			if text, _ := receive(t, service); text != "to the tunnel" {
				t.Errorf("the host received %q", text)
			}
		})
	}
}

// LeavesHost accepts addresses only if the kernel routes them to another host.
func TestLeavesHost(t *testing.T) {
	h, _ := connect(t)
	h.ip("addr add 192.168.5.77/24 dev up0")
	h.ip("addr add 2001:db8:5::77/64 dev up0 nodad")
	h.settle()
	h.sysctl("net/ipv6/conf/all/forwarding", "1") // adds the anycast addresses of routers
	h.ip("route add prohibit 198.51.100.0/24")
	leaves := func(addr string) (err error) {
		h.do(func() { err = LeavesHost(netip.MustParseAddr(addr)) })
		return err
	}
	for _, tt := range otherNames {
		t.Run(tt.name, func(t *testing.T) {
			if err := leaves(tt.addr); !errors.Is(err, os.ErrPermission) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("loopback", func(t *testing.T) {
		for _, addr := range []string{"127.0.0.1", "::1"} {
			if err := leaves(addr); !errors.Is(err, os.ErrPermission) {
				t.Errorf("%s: got %v", addr, err)
			}
		}
	})
	t.Run("other hosts", func(t *testing.T) {
		for _, addr := range []string{proxyAddr4, proxyAddr6, routerAddr4} {
			if err := leaves(addr); err != nil {
				t.Errorf("%s: got %v", addr, err)
			}
		}
	})
	t.Run("prohibited", func(t *testing.T) {
		if leaves("198.51.100.7") == nil {
			t.Error("got no error")
		}
	})
}
