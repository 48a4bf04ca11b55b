package test

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/gopacket/gopacket/layers"

	"masquevpn/internal/lab"
)

// Addresses of the router.
var (
	// in the client's LAN
	lan4, lan6 = netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")

	// behind the client's default route
	far4, far6 = netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:2::1")

	// added to the client's LAN by givePrivateLAN
	private4, private6 = netip.MustParseAddr("192.168.77.1"), netip.MustParseAddr("fd77:1::1")
)

// forLink are destinations on the local link: limited broadcast, SSDP and mDNS.
var forLink = []netip.Addr{netip.MustParseAddr("255.255.255.255"),
	netip.MustParseAddr("239.255.255.250"), netip.MustParseAddr("224.0.0.251")}

// givePrivateLAN gives the client's LAN a private network of each family in
// addition to the public ones.
func (p *pair) givePrivateLAN() {
	p.t.Helper()
	for _, end := range []struct {
		host        *lab.Host
		iface, last string
	}{{p.Client, "eth0", "2"}, {p.Router, "client1", "1"}} {
		for _, a := range []string{"192.168.77." + end.last + "/24",
			"fd77:1::" + end.last + "/64"} {
			args := []string{"addr", "add", a, "dev", end.iface}
			if strings.Contains(a, ":") {
				args = append(args, "nodad")
			}
			check(p.t, end.host.Command(p.ctx, "ip", args...).Run())
		}
	}
	p.ping(p.Client, private4, private6) // works without a tunnel
}

// routeProbe sends packets from the client and captures by which interface they
// leave.
type routeProbe struct {
	*pair
	at   map[string]*lab.Capture // key: name of the interface
	port layers.UDPPort          // destination of the last packet
}

// probeRoutes starts captures on the underlay and on the tunnel, which is up.
func (p *pair) probeRoutes() *routeProbe {
	p.t.Helper()
	w := &routeProbe{pair: p, at: make(map[string]*lab.Capture), port: 20000}
	for _, iface := range []string{"eth0", "masque0"} {
		c, err := p.Client.Capture(iface, func(p lab.Packet) bool {
			udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
			return p.Outgoing && udp != nil && udp.DstPort >= 20000 && udp.DstPort < 21000
		})
		check(p.t, err)
		w.at[iface] = c
	}
	return w
}

// close ends the captures.
func (w *routeProbe) close() {
	w.t.Helper()
	for _, c := range w.at {
		check(w.t, c.Close())
	}
}

// leavesBy sends a packet to each address and checks that it leaves through the
// interface.
func (w *routeProbe) leavesBy(iface string, to ...netip.Addr) {
	w.t.Helper()
	socket, err := w.Client.ListenPacket("udp", "[::]:0") // both families
	check(w.t, err)
	defer socket.Close()
	for _, a := range to {
		w.port++
		_, err := socket.WriteTo([]byte("which way?"),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, uint16(w.port))))
		check(w.t, err)
		var got []string
		w.eventually(fmt.Sprintf("a packet to %v leaves", a), func() bool {
			for name, c := range w.at {
				for _, pkt := range c.Packets() {
					if pkt.Layer(layers.LayerTypeUDP).(*layers.UDP).DstPort == w.port {
						got = append(got, name)
					}
				}
			}
			return len(got) > 0
		})
		if len(got) != 1 || got[0] != iface {
			w.t.Errorf("a packet to %v leaves by %v, want %s", a, got, iface)
		}
	}
}

// A full tunnel, a split tunnel, and a tunnel with excluded networks or without
// the LAN each carry the packets that they are configured for, and no others.
// Afterwards the host is as before.
func TestTunnelTraffic(t *testing.T) {
	p := newPair(t, options{})
	p.givePrivateLAN()
	before := p.snapshot(p.Client)
	targets := []netip.Addr{lab.TargetIPv4, lab.TargetIPv6}
	for i, tc := range []struct {
		name, routes   string
		direct, tunnel []netip.Addr // outside and inside the tunnel, which also has the targets
	}{
		// Of the packets to the proxy's address, only the tunnel's own leave
		// outside.
		{"full", "", []netip.Addr{private4, private6},
			[]netip.Addr{lan4, lan6, far4, far6, lab.ProxyIPv4, lab.ProxyIPv6}},
		{"full, without the LAN", `lan = "all"`, []netip.Addr{lan4, lan6, private4, private6},
			[]netip.Addr{far4, far6, lab.ProxyIPv4, lab.ProxyIPv6}},
		{"split", split, []netip.Addr{lan4, lan6, far4, far6, lab.ProxyIPv4}, nil},
		{"exclude", `exclude = ["203.0.113.0/24", "2001:db8:2::/64"]`,
			[]netip.Addr{private4, far4, far6, lab.ProxyIPv4}, []netip.Addr{lan4, lan6}},
		{"full, with the LAN", "lan = false", nil,
			[]netip.Addr{lan4, lan6, private4, private6, far4, far6}},
		{"full, with the LAN of one family", "lan = false\nexclude = [\"198.51.100.0/24\"]",
			[]netip.Addr{lan4}, []netip.Addr{lan6, far4, far6}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p.opts.routes = tc.routes
			user := fmt.Sprintf("alice%d", i)
			p.connect(p.Client, user)
			w := p.probeRoutes()
			w.leavesBy("eth0", tc.direct...)
			w.leavesBy("masque0", append(tc.tunnel, targets...)...)
			link := "eth0"
			if strings.Contains(tc.routes, "lan = false") {
				link = "masque0"
			}
			w.leavesBy(link, forLink...)
			w.close()
			p.ping(p.Client, targets...)
			if tc.name == "full" { // the proxy denies access to itself
				p.wantUnreachable(p.Client, lab.ProxyIPv4, 3, 13)
				p.wantUnreachable(p.Client, lab.ProxyIPv6, 1, 1)
			}
			for _, a := range tc.direct {
				p.ping(p.Client, a)
			}
			p.down(p.Client, user)
			p.wantUnchanged(p.Client, before)
			p.ping(p.Client, lan4, lan6)
		})
	}
}

// Routes that the network gives the host by DHCP or router advertisements, and
// a LAN with public addresses, take nothing out of a full tunnel, whether they
// exist before it or appear later. The status names them. With lan = "all" they
// take effect.
func TestRoutesOfTheNetwork(t *testing.T) {
	for _, tc := range []struct {
		name, routes string
		iface        string // interface by which packets leave
		warning      string // about each route; "": no warnings
	}{
		{"full", "", "masque0", "leads to public addresses, which stay in the tunnel"},
		{"all host routes", `lan = "all"`, "eth0",
			"takes public addresses out of the tunnel"},
		{"no host routes", "lan = false", "masque0", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, options{routes: tc.routes})
			ip := func(args string) {
				check(t, p.Client.Command(p.ctx, "ip", strings.Fields(args)...).Run())
			}
			early := "203.0.113.0/24 via 198.51.100.1 dev eth0"
			ip("route add " + early) // like DHCP option 121
			p.connect(p.Client, "alice")
			later := []string{
				// Two routes to all addresses, more specific than a default
				// route.
				"0.0.0.0/1 via 198.51.100.1 dev eth0", "128.0.0.0/1 via 198.51.100.1 dev eth0",
				// A public network on the link.
				"192.0.2.0/24 dev eth0",
				"2001:db8:2::/48 via 2001:db8:1::1 dev eth0 proto ra", // a route information option
			}
			for _, r := range later {
				ip("route add " + r)
			}
			w := p.probeRoutes()
			w.leavesBy(tc.iface, far4, netip.MustParseAddr("8.8.8.8"), far6)
			if tc.iface == "masque0" {
				w.leavesBy(tc.iface, lab.TargetIPv4)
			}
			w.close()
			warned := func(route string) bool {
				return strings.Contains(strings.Join(p.status(p.Client, "alice").Warnings, "\n"),
					"the host's route "+
						strings.ReplaceAll(strings.TrimSuffix(route, " proto ra"), " dev ", " on ")+
						" "+tc.warning)
			}
			for _, r := range append(later, early) {
				switch {
				case tc.warning == "":
					if w := p.status(p.Client, "alice").Warnings; len(w) != 0 {
						t.Errorf("the warnings are %q", w)
					}
					continue
				case strings.HasPrefix(r, "192.0.2.0/24"):
					r = "192.0.2.0/24 on eth0"
				}
				p.eventually("the status names "+r, func() bool { return warned(r) })
			}
			if tc.warning == "" {
				return
			}
			if log := p.clientLog("alice"); !strings.Contains(log,
				"128.0.0.0/1 via 198.51.100.1 on eth0") {
				t.Errorf("the log does not name the route that came later:\n%s", log)
			}
			ip("route del 128.0.0.0/1 via 198.51.100.1 dev eth0")
			p.eventually("the status no longer names the removed route", func() bool {
				return !warned(later[1])
			})
		})
	}
}

// If routes of the proxy and networks of the host overlap, the log states which
// one takes effect. A route to the proxy's own address does not cut off the
// proxy.
func TestConflictingRoutes(t *testing.T) {
	p := newPair(t, options{proxy: `
[routes]
advertise = ["198.51.100.0/24", "203.0.113.0/24", "192.0.2.0/24", "2001:db8:1:0:8000::/65", "2001:db8:2::/64", "2001:db8:3::/64"]
`})
	before := p.snapshot(p.Client)
	p.connect(p.Client, "alice")
	w := p.probeRoutes()
	w.leavesBy("eth0", lan4, lan6)
	w.leavesBy("masque0", netip.MustParseAddr("2001:db8:1:0:8000::1"), lab.ProxyIPv4, lab.ProxyIPv6,
		far4, lab.TargetIPv4)
	w.close()

	p.killProxy()
	p.startProxy()
	p.ping(p.Client, lan4, lan6, lab.TargetIPv4, lab.TargetIPv6)
	if s := p.status(p.Client, "alice"); s.Reconnects == 0 {
		t.Errorf("the client did not have to connect again: %+v", s)
	}
	log := p.clientLog("alice")
	for _, want := range []string{
		"the tunnel's route 198.51.100.0/24 holds 198.51.100.0/24, the network of eth0, which goes first: the same addresses in the tunnel are not reached",
		"the tunnel's route 2001:db8:1:0:8000::/65 takes addresses out of 2001:db8:1::/64, the network of eth0: put them into routes.exclude to keep them",
	} {
		if n := strings.Count(log, want); n != 1 {
			t.Errorf("the log contains this line %d times, want once: %s\n%s", n, want, log)
		}
	}
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
}

// With routes.install = false, the client adds only its interface with
// addresses to the host. Packets pass once another program adds a route.
func TestRoutesNotInstalled(t *testing.T) {
	p := newPair(t, options{routes: "install = false", proxy: "[dns]\nservers = [\"192.0.2.2\"]\n"})
	p.stopProxy()
	// A family without an address in the tunnel is left alone too.
	p.editProxyConfig(fmt.Sprintf("ipv6 = %q", pool6), "")
	p.startProxy()
	before := p.snapshot(p.Client)
	p.connect(p.Client, "alice")
	p.eventually("the status reports the DNS servers", func() bool {
		return p.status(p.Client, "alice").DNS.Reason != ""
	})
	own := false
	// The filter that guards the tunnel's addresses exists with any routes.
	// Chains that mark packets, or refuse packets outside the tunnel, do not.
	filter := regexp.MustCompile(`^\+ table (1|3) masque-alice (flags 0x0|chain (outer|guard|forward|arp) (type "filter" hook [0-9] .* policy 1|rule .*))\n$`)
	for line := range strings.Lines(lab.Diff(before, p.snapshot(p.Client))) {
		own = own || strings.Contains(line, client4.String())
		if !strings.HasPrefix(line, "+ ") ||
			!strings.Contains(line, "masque0") && !filter.MatchString(line) {
			t.Errorf("this has changed: %s", line)
		}
	}
	if !own {
		t.Error("the interface has no address")
	}
	w := p.probeRoutes()
	w.leavesBy("eth0", lan4, lan6, far4, far6, lab.TargetIPv4)
	w.close()
	check(t, p.Client.Command(p.ctx, "ip", "route", "add", "192.0.2.0/24", "dev", "masque0").Run())
	p.ping(p.Client, lab.TargetIPv4)
	p.ping(p.Target, client4)
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
}
