package routing

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// tracker is an nftables ruleset that makes the kernel track connections.
const tracker = "add table inet fw; " +
	"add chain inet fw in { type filter hook input priority 0; }; " +
	"add rule inet fw in ct state established accept"

// echoServer runs a TCP echo server on the host and returns its port.
func (h *host) echoServer(addr string) (port uint16) {
	h.t.Helper()
	var ln net.Listener
	h.do(func() {
		var err error
		if ln, err = net.Listen("tcp", addr); err != nil {
			h.t.Fatal(err)
		}
	})
	h.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

// connectTo opens a TCP connection from the address from.
func (h *host) connectTo(from, to string, port uint16) (c net.Conn) {
	h.t.Helper()
	h.do(func() {
		local := netip.AddrPortFrom(netip.MustParseAddr(from), 0)
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(local), Timeout: patience}
		var err error
		if c, err = d.DialContext(context.Background(), "tcp",
			netip.AddrPortFrom(netip.MustParseAddr(to), port).String()); err != nil {
			h.t.Fatalf("from %s to %s: %v", from, to, err)
		}
	})
	h.t.Cleanup(func() { c.Close() })
	return c
}

// checkEcho sends text to an echo server and waits for it to come back.
func checkEcho(c net.Conn, text string, within time.Duration) error {
	c.SetDeadline(time.Now().Add(within))
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("received %q, want %q", b, text)
	}
	return nil
}

// Connections to this host from outside a full tunnel keep working, and new
// ones can be opened, from any address, whether or not the kernel tracked them
// before, and with strict reverse path filters.
func TestInboundConnectionsSurvive(t *testing.T) {
	for _, tracked := range []bool{false, true} {
		t.Run(fmt.Sprintf("tracked=%t", tracked), func(t *testing.T) {
			h, router := connect(t)
			router.ip("addr add fe80::1/64 dev down0 nodad") // for neighbour discovery
			h.tun("masque0")
			h.sysctl("net/ipv4/conf/all/rp_filter", "1")
			if tracked {
				h.run("nft", tracker)
			}
			before := h.snapshot()
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			ssh, high := h.echoServer(":22"), h.echoServer(":50022")
			wireguard := h.listen(":51820", 0)
			for _, family := range []struct{ far, near, host string }{
				{proxyAddr4, routerAddr4, hostAddr4}, {proxyAddr6, routerAddr6, hostAddr6},
			} {
				old := router.connectTo(family.far, family.host, ssh)
				lan := router.connectTo(family.near, family.host, ssh)
				silent := router.connectTo(family.far, family.host, ssh)
				for _, c := range []net.Conn{old, lan} {
					if err := checkEcho(c, "before", patience); err != nil {
						t.Fatal(err)
					}
				}
				h.apply(m, fullState())
				for name, c := range map[string]net.Conn{
					"existing": old, "existing, from the LAN": lan, "existing, unused": silent,
					"new":                 router.connectTo(family.far, family.host, ssh),
					"new, from the LAN":   router.connectTo(family.near, family.host, ssh),
					"new, to a high port": router.connectTo(family.far, family.host, high),
				} {
					t.Run(family.host+", "+name, func(t *testing.T) {
						for range 3 {
							if err := checkEcho(c, "after", patience); err != nil {
								t.Error(err)
							}
						}
					})
				}
				far := router.listen(net.JoinHostPort(family.far, "0"), 0)
				send(t, far, "question",
					netip.AddrPortFrom(netip.MustParseAddr(family.host), port(wireguard)))
				receive(t, wireguard) // although its source is routed into the tunnel
				dns := h.listen(net.JoinHostPort(family.host, "53"), 0)
				send(t, far, "question",
					netip.AddrPortFrom(netip.MustParseAddr(family.host), port(dns)))
				_, from := receive(t, dns)
				send(t, dns, "answer", from)
				if text, _ := receive(t, far); text != "answer" {
					t.Errorf("received %q", text)
				}
				h.apply(m, State{})
			}
			h.close(m)
			h.wantSnapshot(before)
		})
	}
}

// Connections that this host opened before a full tunnel do not continue
// outside it.
func TestOutboundConnectionsDoNotStayOutside(t *testing.T) {
	for _, tracked := range []bool{false, true} {
		t.Run(fmt.Sprintf("tracked=%t", tracked), func(t *testing.T) {
			h, router := connect(t)
			h.tun("masque0")
			if tracked {
				h.run("nft", tracker)
			}
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			for _, tt := range []struct{ name, host, far string }{
				{"IPv4", hostAddr4, proxyAddr4},
				{"IPv6", hostAddr6, proxyAddr6},
			} {
				t.Run(tt.name, func(t *testing.T) {
					h, router := h.in(t), router.in(t)
					far := router.echoServer(net.JoinHostPort(tt.far, "0"))
					c := h.connectTo(tt.host, tt.far, far)
					if err := checkEcho(c, "before", patience); err != nil {
						t.Fatal(err)
					}
					h.apply(m, fullState())
					if err := checkEcho(c, "after", time.Second); err == nil {
						t.Errorf("the connection to %s continues outside", tt.far)
					}
					h.apply(m, State{})
				})
			}
		})
	}
}

// With HostNone the tunnel's routes take precedence over all routes of the
// host, and connections from the LAN are still answered there.
func TestHostNone(t *testing.T) {
	h, router := connect(t)
	up := h.index("up0")
	tunnel, _ := h.tun("masque0")
	h.ip("route add 10.1.2.0/24 dev up0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := State{
		Addresses: prefixes("10.77.0.2/32", "fd77::2/128"),
		Routes:    prefixes("0.0.0.0/0", "::/0", "10.0.0.0/8"),
		Exclude:   prefixes("203.0.113.0/24"), HostRoutes: HostNone,
	}
	h.apply(m, s)
	for dst, want := range map[string]int{
		routerAddr4: tunnel, routerAddr6: tunnel, "10.1.2.3": tunnel, "8.8.8.8": tunnel,
		"203.0.113.1": up, "127.0.0.1": 1, hostAddr4: 1,
	} {
		t.Run(dst, func(t *testing.T) {
			h := h.in(t)
			if got := h.lookup(dst, 0); got != want {
				t.Errorf("routed to interface %d, want %d", got, want)
			}
			for _, mark := range []uint32{DefaultMark, outsideMark(DefaultMark),
				DefaultMark | 0x4080} {
				if got := h.lookup(dst, mark); want == tunnel && got != up {
					t.Errorf("routed to interface %d with mark %d, want %d", got, mark, up)
				}
			}
		})
	}
	ssh := h.echoServer(":22")
	for _, tt := range []struct{ name, near, host string }{
		{"from the LAN, IPv4", routerAddr4, hostAddr4},
		{"from the LAN, IPv6", routerAddr6, hostAddr6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := router.in(t).connectTo(tt.near, tt.host, ssh)
			if err := checkEcho(c, tt.name, patience); err != nil {
				t.Error(err)
			}
		})
	}
	s.HostRoutes = HostPrivate
	h.apply(m, s)
	h.wantInterfaces(map[string]int{routerAddr4: up, "10.1.2.3": up, "10.1.3.3": tunnel})
	h.close(m)
	h.wantSnapshot(before)
}

// A host whose own network is routed into the tunnel still answers ARP requests
// with a strict reverse path filter, so that its gateway can reach it.
func TestStrictFilterOnOwnNetwork(t *testing.T) {
	for _, tt := range []struct {
		name, sysctl string
		host         HostRoutes
		to           string
	}{
		{"public network", "up0", HostPrivate, "198.51.100.2"},
		{"public network, strict for all interfaces", "all", HostPrivate, "198.51.100.2"},
		{"private network in the tunnel", "up0", HostNone, hostAddr4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, router := connect(t)
			h.tun("masque0")
			h.ip("addr add 198.51.100.2/24 dev up0")
			router.ip("addr add 198.51.100.1/24 dev down0")
			h.sysctl("net/ipv4/conf/"+tt.sysctl+"/rp_filter", "1")
			before := h.snapshot()
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			s := State{Addresses: prefixes("10.77.0.2/32"), Routes: prefixes("0.0.0.0/0"),
				HostRoutes: tt.host}
			for range 2 { // the second Apply must not change it
				h.apply(m, s)
				if got := h.readSysctl("net/ipv4/conf/up0/rp_filter"); got != "2" {
					t.Errorf("rp_filter of up0 is %s, want 2", got)
				}
				router.ip("neigh flush all")
				router.run("ping", "-c1", "-W2", tt.to)
			}
			s.HostRoutes = HostAll
			h.apply(m, s)
			if now := h.readSysctl("net/ipv4/conf/up0/rp_filter"); now == "2" {
				t.Error("rp_filter is still 2 with the network outside the tunnel")
			}
			h.close(m)
			h.wantSnapshot(before)
		})
	}
}

// FollowHost adapts rp_filter to changed addresses of the host.
func TestStrictFilterFollowsNetworks(t *testing.T) {
	h, _ := connect(t)
	h.tun("masque0")
	h.sysctl("net/ipv4/conf/up0/rp_filter", "1")
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	h.apply(m, State{Addresses: prefixes("10.77.0.2/32"), Routes: prefixes("0.0.0.0/0")})
	for _, tt := range []struct{ change, want string }{
		{"addr add 10.1.0.2/24 dev up0", "1"},
		{"addr add 198.51.100.2/24 dev up0", "2"},
		{"addr add 198.18.0.2/24 dev up0", "2"},
		{"addr del 198.51.100.2/24 dev up0", "2"},
		{"addr del 198.18.0.2/24 dev up0", "1"},
	} {
		t.Run(tt.change, func(t *testing.T) {
			h := h.in(t)
			h.ip(tt.change)
			h.conflicts(m)
			if got := h.readSysctl("net/ipv4/conf/up0/rp_filter"); got != tt.want {
				t.Errorf("rp_filter is %s, want %s", got, tt.want)
			}
		})
	}
}
