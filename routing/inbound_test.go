package routing

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// tracker makes the kernel track connections.
const tracker = "add table inet fw; add chain inet fw in { type filter hook input priority 0; }; add rule inet fw in ct state established accept"

// echo listens on the host, sends back what it receives, and returns the port.
func (h *host) echo(addr string) (port uint16) {
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

// connectTo opens a TCP connection.
func (h *host) connectTo(from, to string, port uint16) (c net.Conn) {
	h.t.Helper()
	h.do(func() {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0)), Timeout: patience}
		var err error
		if c, err = d.DialContext(context.Background(), "tcp", netip.AddrPortFrom(netip.MustParseAddr(to), port).String()); err != nil {
			h.t.Fatalf("from %s to %s: %v", from, to, err)
		}
	})
	h.t.Cleanup(func() { c.Close() })
	return c
}

// echoes checks that a connection carries text there and back within a time.
func echoes(c net.Conn, text string, within time.Duration) error {
	c.SetDeadline(time.Now().Add(within))
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("%q came back", b)
	}
	return nil
}

// Connections that come in from outside the tunnel go on and come about under a
// full tunnel, from wherever, tracked before or not, with strict reverse path
// filters.
func TestInboundConnectionsSurvive(t *testing.T) {
	for _, tracked := range []bool{false, true} {
		t.Run(fmt.Sprintf("tracked=%t", tracked), func(t *testing.T) {
			h, router := connect(t)
			router.ip("addr add fe80::1/64 dev down0 nodad") // to look for its neighbours
			h.tun("masque0")
			h.sysctl("net/ipv4/conf/all/rp_filter", "1")
			if tracked {
				h.run("nft", tracker)
			}
			before := h.snapshot()
			m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
			ssh, high := h.echo(":22"), h.echo(":50022")
			wireguard := h.listen(":51820", 0)
			for _, family := range []struct{ far, near, host string }{
				{proxyAddr4, routerAddr4, hostAddr4}, {proxyAddr6, routerAddr6, hostAddr6},
			} {
				old := router.connectTo(family.far, family.host, ssh)
				lan := router.connectTo(family.near, family.host, ssh)
				silent := router.connectTo(family.far, family.host, ssh)
				for _, c := range []net.Conn{old, lan} {
					if err := echoes(c, "before", patience); err != nil {
						t.Fatal(err)
					}
				}
				h.apply(m, full())
				for what, c := range map[string]net.Conn{
					"from before": old, "from the LAN": lan, "silent so far": silent,
					"after": router.connectTo(family.far, family.host, ssh), "from the LAN, after": router.connectTo(family.near, family.host, ssh),
					"to a high port": router.connectTo(family.far, family.host, high),
				} {
					for range 3 {
						if err := echoes(c, "after", patience); err != nil {
							t.Errorf("%s: a connection %s: %v", family.host, what, err)
						}
					}
				}
				far := router.listen(net.JoinHostPort(family.far, "0"), 0)
				send(t, far, "question", netip.AddrPortFrom(netip.MustParseAddr(family.host), port(wireguard)))
				receive(t, wireguard) // and is not dropped for the way back to its source
				dns := h.listen(net.JoinHostPort(family.host, "53"), 0)
				send(t, far, "question", netip.AddrPortFrom(netip.MustParseAddr(family.host), port(dns)))
				_, from := receive(t, dns)
				send(t, dns, "answer", from)
				if text, _ := receive(t, far); text != "answer" {
					t.Errorf("received %q", text)
				}
				h.apply(m, State{})
			}
			h.close(m)
			h.same(before)
		})
	}
}

// Connections that the host itself has opened do not stay outside.
func TestOutboundConnectionsDoNotStayOutside(t *testing.T) {
	for _, tracked := range []bool{false, true} {
		h, router := connect(t)
		h.tun("masque0")
		if tracked {
			h.run("nft", tracker)
		}
		m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
		for _, family := range []struct{ host, far string }{{hostAddr4, proxyAddr4}, {hostAddr6, proxyAddr6}} {
			far := router.echo(net.JoinHostPort(family.far, "0"))
			c := h.connectTo(family.host, family.far, far)
			if err := echoes(c, "before", patience); err != nil {
				t.Fatal(err)
			}
			h.apply(m, full())
			if err := echoes(c, "after", time.Second); err == nil {
				t.Errorf("tracked %t: the connection to %s goes on outside", tracked, family.far)
			}
			h.apply(m, State{})
		}
	}
}

// The tunnel's routes win over those of the host where that is wanted, and
// connections from the LAN are answered there.
func TestOverride(t *testing.T) {
	h, router := connect(t)
	up := h.index("up0")
	tunnel, _ := h.tun("masque0")
	h.ip("route add 10.1.2.0/24 dev up0")
	before := h.snapshot()
	m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark})
	s := State{
		Addresses: prefixes("10.77.0.2/32", "fd77::2/128"), Routes: prefixes("0.0.0.0/0", "::/0", "10.0.0.0/8"),
		Exclude: prefixes("203.0.113.0/24"), Override: true,
	}
	h.apply(m, s)
	for dst, want := range map[string]int{
		routerAddr4: tunnel, routerAddr6: tunnel, "10.1.2.3": tunnel, "8.8.8.8": tunnel, "203.0.113.1": up, "127.0.0.1": 1, hostAddr4: 1,
	} {
		if got := h.lookup(dst, 0); got != want {
			t.Errorf("%s leads to interface %d, want %d", dst, got, want)
		}
		for _, mark := range []uint32{DefaultMark, DefaultMark + 1} {
			if got := h.lookup(dst, mark); want == tunnel && got != up {
				t.Errorf("%s with mark %d leads to interface %d, want %d", dst, mark, got, up)
			}
		}
	}
	ssh := h.echo(":22")
	for _, family := range []struct{ near, host string }{{routerAddr4, hostAddr4}, {routerAddr6, hostAddr6}} {
		c := router.connectTo(family.near, family.host, ssh)
		if err := echoes(c, "from the LAN", patience); err != nil {
			t.Error(err)
		}
	}
	s.Override = false
	h.apply(m, s)
	for dst, want := range map[string]int{routerAddr4: up, "10.1.2.3": up, "10.1.3.3": tunnel} {
		if got := h.lookup(dst, 0); got != want {
			t.Errorf("not overridden, %s leads to interface %d, want %d", dst, got, want)
		}
	}
	h.close(m)
	h.same(before)
}

func TestConflicts(t *testing.T) {
	h := newHost(t)
	h.uplink() // 192.168.5.2/24, 2001:db8:5::2/64
	h.tun("masque0")
	for _, tt := range []struct {
		name  string
		state State
		says  []string
	}{
		{"none", State{Addresses: prefixes("10.77.0.2/32"), Routes: prefixes("0.0.0.0/0", "10.0.0.0/8", "::/0")}, nil},
		{"the LAN in a route", State{Routes: prefixes("192.168.0.0/16")}, []string{
			"the tunnel's route 192.168.0.0/16 holds 192.168.5.0/24, the network of up0, which goes first",
		}},
		{"the same network", State{Routes: prefixes("2001:db8:5::/64")}, []string{
			"the tunnel's route 2001:db8:5::/64 holds 2001:db8:5::/64, the network of up0, which goes first",
		}},
		{"overridden", State{Routes: prefixes("192.168.0.0/16"), Override: true}, nil},
		{"a part of the LAN", State{Routes: prefixes("192.168.5.128/25")}, []string{
			"the tunnel's route 192.168.5.128/25 takes addresses out of 192.168.5.0/24, the network of up0: put them into routes.exclude",
		}},
		{"a part that is excluded", State{Routes: prefixes("192.168.5.128/25"), Exclude: prefixes("192.168.5.0/24")}, nil},
		{"an address of the LAN", State{Addresses: prefixes("192.168.5.77/32")}, []string{
			"the tunnel's address 192.168.5.77 lies in 192.168.5.0/24, the network of up0",
		}},
	} {
		var log logBuffer
		m := h.open(Config{Instance: "one", Interface: "masque0", Mark: DefaultMark, Logger: log.logger()})
		h.apply(m, tt.state)
		h.apply(m, tt.state)
		for _, want := range tt.says {
			if strings.Count(log.String(), want) != 1 {
				t.Errorf("%s: the log does not say once %q:\n%s", tt.name, want, log.String())
			}
		}
		if got := strings.Count(log.String(), "level=WARN"); got != len(tt.says) {
			t.Errorf("%s: %d warnings, want %d:\n%s", tt.name, got, len(tt.says), log.String())
		}
		h.close(m)
	}
	if _, err := h.tryOpen(Config{Instance: "one", Interface: "masque0", Mark: 7}); err == nil || !strings.Contains(err.Error(), "even") {
		t.Errorf("an odd mark: %v", err)
	}
}
