package test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/lab"
)

// If the proxy assigns addresses of one family only, packets of the other
// family do not leave outside a full tunnel. They are answered at once with an
// ICMP error, so that programs fall back to the family that works. If the
// tunnel is not a full tunnel for the other family, its packets leave as
// before.
func TestOneFamily(t *testing.T) {
	router4, router6 := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:2::1")
	no4, no6 := fmt.Sprintf("ipv4 = %q", pool4), fmt.Sprintf("ipv6 = %q", pool6)
	for name, tc := range map[string]struct {
		drop      string // line to remove from the proxy's pool
		routes    string
		inside    netip.Addr // reached through the tunnel
		outside   netip.Addr // other family; answers without a tunnel
		typ, code int        // ICMP error about packets to outside; 0: outside answers
	}{
		"IPv4":                    {no6, "", lab.TargetIPv4, router6, 1, 0},
		"IPv6":                    {no4, "", lab.TargetIPv6, router4, 3, 0},
		"IPv4, IPv6 not accepted": {no6, `accept = ["0.0.0.0/0"]`, lab.TargetIPv4, router6, 0, 0},
		"IPv4, not a full tunnel": {no6, `accept = ["192.0.2.0/24", "::/0"]`, lab.TargetIPv4,
			router6, 0, 0},
		"IPv4, IPv6 excluded": {no6, `exclude = ["2001:db8:2::/64"]`, lab.TargetIPv4,
			router6, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, options{routes: tc.routes})
			p.stopProxy()
			p.editProxyConfig(tc.drop, "")
			p.startProxy()
			p.ping(p.Client, tc.outside)
			before := p.snapshot(p.Client)
			p.connect(p.Client, "alice")
			p.ping(p.Client, tc.inside)
			logged := strings.Contains(p.clientLog("alice"),
				"it has no address of this family, which is therefore unreachable")
			if want := !strings.Contains(tc.routes, "accept"); logged != want {
				t.Errorf("the log has the unreachable family: %t, want %t", logged, want)
			}
			if tc.typ == 0 {
				p.ping(p.Client, tc.outside)
				return
			}
			c, err := p.Client.Capture("eth0", nil)
			check(t, err)
			p.wantUnreachable(p.Client, tc.outside, tc.typ, tc.code)
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			defer cancel()
			conn, err := p.Client.DialContext(ctx, "tcp",
				netip.AddrPortFrom(tc.outside, 80).String())
			if err == nil || ctx.Err() != nil {
				t.Errorf("TCP to %v: %v, %v", tc.outside, conn, err)
			}
			check(t, c.Close())
			for _, pkt := range c.Packets() {
				if l := pkt.NetworkLayer(); l != nil &&
					l.NetworkFlow().Dst().String() == tc.outside.String() {
					t.Errorf("outside the tunnel: %v", pkt)
				}
			}
			p.down(p.Client, "alice")
			p.wantUnchanged(p.Client, before)
			p.ping(p.Client, tc.outside)
		})
	}
}

// If the kernel disables IPv6 on the tunnel's interface of a host with IPv6, no
// IPv6 packets leave outside a full tunnel, and the status names the reason.
func TestInterfaceWithoutIPv6(t *testing.T) {
	router6 := netip.MustParseAddr("2001:db8:2::1")
	p := newPair(t, options{})
	check(t, p.Client.Sysctl("net.ipv6.conf.default.disable_ipv6", "1"))
	p.ping(p.Client, router6)
	before := p.snapshot(p.Client)
	p.connect(p.Client, "alice")
	c, err := p.Client.Capture("eth0", nil)
	check(t, err)
	p.ping(p.Client, lab.TargetIPv4)
	for _, to := range []netip.Addr{router6, lab.TargetIPv6} {
		if out, err := p.Client.Command(p.ctx, "ping", "-c1", "-W1",
			to.String()).CombinedOutput(); err == nil {
			t.Errorf("%v is reached:\n%s", to, out)
		}
	}
	check(t, c.Close())
	for _, pkt := range c.Packets() {
		l := pkt.NetworkLayer()
		if l == nil {
			continue
		}
		if to := l.NetworkFlow().Dst().String(); to == router6.String() ||
			to == lab.TargetIPv6.String() {
			t.Errorf("outside the tunnel: %v", pkt)
		}
	}
	s := p.status(p.Client, "alice")
	if !strings.Contains(strings.Join(s.Warnings, "\n"), "net.ipv6.conf.masque0.disable_ipv6") {
		t.Errorf("the warnings are %q, want one that names the sysctl", s.Warnings)
	}
	for _, r := range s.Routes {
		if r.Start.Is6() {
			t.Errorf("the status lists the route %v", r)
		}
	}
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
	p.ping(p.Client, router6)
}

// A tunnel over one family carries both. On a host with IPv6 turned off, it
// carries IPv4 only, whatever the proxy offers.
func TestUnderlayOfOneFamily(t *testing.T) {
	off := []string{"net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6"}
	for name, tc := range map[string]struct {
		flush  string // option of ip that selects the family to remove from the underlay
		sysctl []string
		outer  netip.Addr   // the proxy's outer address
		inside []netip.Addr // addresses that answer through the tunnel
	}{
		"IPv4": {"-6", nil, lab.ProxyIPv4,
			[]netip.Addr{lab.TargetIPv4, lab.TargetIPv6}},
		"IPv6": {"-4", nil, lab.ProxyIPv6,
			[]netip.Addr{lab.TargetIPv4, lab.TargetIPv6}},
		"IPv4, IPv6 turned off": {"-6", off, lab.ProxyIPv4, []netip.Addr{lab.TargetIPv4}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, options{})
			check(t, p.Client.Command(p.ctx, "ip", tc.flush, "addr", "flush", "dev", "eth0").Run())
			for _, key := range tc.sysctl {
				check(t, p.Client.Sysctl(key, "1"))
			}
			before := p.snapshot(p.Client)
			c, err := p.Client.Capture("eth0", func(p lab.Packet) bool {
				return p.Outgoing && p.Layer(layers.LayerTypeUDP) != nil
			})
			check(t, err)
			p.connect(p.Client, "alice")
			if s := p.status(p.Client, "alice"); len(s.Addresses) != len(tc.inside) {
				t.Errorf("the tunnel has the addresses %v", s.Addresses)
			}
			p.ping(p.Client, tc.inside...)
			for _, to := range tc.inside {
				p.transfer(p.Client, p.Target, to, 1<<20)
			}
			check(t, c.Close())
			if len(c.Packets()) == 0 {
				t.Error("no packet was captured")
			}
			for _, pkt := range c.Packets() {
				if to := pkt.NetworkLayer().NetworkFlow().Dst().String(); to != tc.outer.String() {
					t.Errorf("not a packet of the tunnel: %v", pkt)
				}
			}
			p.down(p.Client, "alice")
			p.wantUnchanged(p.Client, before)
		})
	}
}
