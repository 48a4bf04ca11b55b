package test

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// site is a gateway with two hosts behind it.
type site struct {
	name     string
	gateway  *lab.Host
	hosts    []*lab.Host
	networks []netip.Prefix
	addrs4   []netip.Addr // IPv4 address of each host
	addrs6   []netip.Addr // IPv6 address of each host
	config   string       // path of the gateway's configuration
}

// sites is a proxy with two sites, a and b.
type sites struct {
	*pair
	a, b *site
}

// siteConfig allows each site to advertise its networks.
const siteConfig = `
[routes]
advertise = ["192.0.2.0/24", "2001:db8:3::/64"]
[[site]]
user = "a"
networks = ["10.1.0.0/24", "2001:db8:a::/64"]
[[site]]
user = "b"
networks = ["10.2.0.0/24", "2001:db8:b::/64"]
`

// newSites makes the hosts and starts the proxy with config, or siteConfig if
// it is empty.
func newSites(t *testing.T, config string) *sites {
	t.Helper()
	networks := lab.Prefixes("10.1.0.0/24", "2001:db8:a::/64", "10.2.0.0/24", "2001:db8:b::/64")
	if config == "" {
		config = siteConfig
	}
	s := &sites{pair: newPair(t, options{clients: 2, proxy: config, behind: networks})}
	s.a = s.newSite("a", s.Clients[0], networks[:2])
	s.b = s.newSite("b", s.Clients[1], networks[2:])
	return s
}

// newSite makes the LAN of a site. The gateway has host number 1, and the hosts
// have numbers 11 and 12.
func (s *sites) newSite(name string, gateway *lab.Host, networks []netip.Prefix) *site {
	s.t.Helper()
	x := &site{name: name, gateway: gateway, networks: networks}
	at := func(network netip.Prefix, n byte) netip.Addr {
		b := network.Addr().AsSlice()
		b[len(b)-1] = n
		a, _ := netip.AddrFromSlice(b)
		return a
	}
	end := func(h *lab.Host, iface string, n byte) lab.End {
		var addrs []netip.Prefix
		for _, p := range networks {
			addrs = append(addrs, netip.PrefixFrom(at(p, n), p.Bits()))
		}
		return lab.End{Host: h, Name: iface, Addrs: addrs}
	}
	ends := []lab.End{end(gateway, "lan0", 1)}
	for i := range byte(2) {
		h, err := s.Lab.Host(fmt.Sprintf("%s%d", name, i+1))
		check(s.t, err)
		x.hosts = append(x.hosts, h)
		x.addrs4, x.addrs6 = append(x.addrs4, at(networks[0], 11+i)),
			append(x.addrs6, at(networks[1], 11+i))
		ends = append(ends, end(h, "eth0", 11+i))
	}
	_, err := s.Lab.Bridge("lan-"+name, lab.LinkOptions{}, ends...)
	check(s.t, err)
	for _, h := range x.hosts {
		for _, p := range networks {
			check(s.t, h.AddDefaultRoute(at(p, 1)))
		}
	}
	return x
}

// file makes the configuration of a site's gateway, which advertises its
// networks and more.
func (s *sites) file(x *site, more ...string) string {
	s.t.Helper()
	f := s.invite(x.name)
	var list []string
	for _, p := range x.networks {
		list = append(list, fmt.Sprintf("%q", p))
	}
	for _, p := range more {
		list = append(list, fmt.Sprintf("%q", p))
	}
	appendTo(s.t, f, "\n[routes]\nadvertise = ["+strings.Join(list, ", ")+"]\n")
	x.config = f
	return f
}

// awaitNetworks waits until the proxy routes exactly these networks to a site.
func (s *sites) awaitNetworks(x *site, want ...netip.Prefix) {
	s.t.Helper()
	s.eventually(fmt.Sprintf("the proxy routes %v to %s", want, x.name), func() bool {
		list := s.sessions()
		for _, ss := range list {
			if ss.User == x.name {
				return slices.Equal(ss.Networks, want)
			}
		}
		return len(want) == 0
	})
}

// awaitRoute waits until host sends packets to an address through an interface.
func (s *sites) awaitRoute(host *lab.Host, to netip.Addr, iface string) {
	s.t.Helper()
	var out []byte
	s.eventually(fmt.Sprintf("%s reaches %v through %s", host.Name(), to, iface), func() bool {
		out, _ = host.Command(s.ctx, "ip", "route", "get", to.String()).CombinedOutput()
		return strings.Contains(string(out), " dev "+iface+" ")
	})
}

// upBoth connects both gateways and waits until each routes the networks of the
// other into the tunnel.
func (s *sites) upBoth() {
	s.t.Helper()
	s.up(s.a.gateway, s.file(s.a))
	s.up(s.b.gateway, s.file(s.b))
	for _, to := range []netip.Addr{s.b.addrs4[0], s.b.addrs6[0]} {
		s.awaitRoute(s.a.gateway, to, "masque0")
	}
	for _, to := range []netip.Addr{s.a.addrs4[0], s.a.addrs6[0]} {
		s.awaitRoute(s.b.gateway, to, "masque0")
	}
}

// udpSizes are the sizes of datagrams between sites, in bytes. The last one is
// sent in fragments.
var udpSizes = []int{1, 1000, 1900}

// Hosts behind two gateways reach each other and the network of the proxy, in
// both families. Afterwards the hosts are as before.
func TestTwoSites(t *testing.T) {
	s := newSites(t, "")
	s.stopProxy()
	before := make(map[*lab.Host]string)
	for _, h := range []*lab.Host{s.Proxy, s.a.gateway, s.b.gateway} {
		before[h] = s.snapshot(h)
	}
	s.startProxy()
	s.upBoth()
	s.awaitNetworks(s.a, s.a.networks...)
	a1, a2, b1, b2 := s.a.hosts[0], s.a.hosts[1], s.b.hosts[0], s.b.hosts[1]
	near4, near6 := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("2001:db8:a::1")

	t.Run("ping", func(t *testing.T) {
		s.ping(a1, s.b.addrs4[0], s.b.addrs6[0], s.b.addrs4[1], s.b.addrs6[1], lab.TargetIPv4,
			lab.TargetIPv6)
		s.ping(b2, s.a.addrs4[0], s.a.addrs6[0], s.a.addrs4[1], s.a.addrs6[1], lab.TargetIPv4,
			lab.TargetIPv6)
		s.ping(s.Target, s.a.addrs4[1], s.a.addrs6[1], s.b.addrs4[1], s.b.addrs6[1])
		s.ping(s.Proxy, s.a.addrs4[0], s.b.addrs6[0])
		s.ping(s.a.gateway, s.b.addrs4[0], s.b.addrs6[0], lab.TargetIPv4)
		s.ping(b1, near4, near6) // address of the other gateway in its LAN
	})
	t.Run("TCP", func(t *testing.T) {
		s.transfer(a1, b1, s.b.addrs4[0], 20<<20)
		s.transfer(b2, a2, s.a.addrs6[1], 20<<20)
		s.transfer(s.Target, b1, s.b.addrs4[0], 20<<20)
		s.transfer(a2, s.Target, lab.TargetIPv6, 20<<20)
	})
	t.Run("UDP", func(t *testing.T) {
		s.exchangeUDP(a1, b1, s.b.addrs4[0], udpSizes...)
		s.exchangeUDP(b2, a2, s.a.addrs6[1], udpSizes...)
		s.exchangeUDP(s.Target, b2, s.b.addrs4[1], udpSizes...)
	})
	t.Run("hop limit", func(t *testing.T) {
		// Each of the three routers decrements the hop limit, and so does each
		// entry into a tunnel. An error of an endpoint comes from its address
		// in the tunnel.
		own := s.status(s.a.gateway, "a").Addresses
		far := s.status(s.b.gateway, "b").Addresses
		if got, want := s.hops(a1, s.b.addrs4[0]),
			[]netip.Addr{near4, own[0].Addr(), proxy4, proxy4, far[0].Addr(),
				s.b.addrs4[0]}; !slices.Equal(got, want) {
			t.Errorf("hops %v, want %v", got, want)
		}
		if got, want := s.hops(a1, s.b.addrs6[0]),
			[]netip.Addr{near6, own[1].Addr(), proxy6, proxy6, far[1].Addr(),
				s.b.addrs6[0]}; !slices.Equal(got, want) {
			t.Errorf("hops %v, want %v", got, want)
		}
		s.wantHopLimit(a1, s.b.addrs4[0], b1, "eth0", 59)
		s.wantHopLimit(a1, lab.TargetIPv6, s.Target, "eth0", 61)
		s.wantHopLimit(s.a.gateway, s.b.addrs4[0], b1, "eth0", 61)
	})

	s.down(s.a.gateway, "a")
	s.down(s.b.gateway, "b")
	s.stopProxy()
	for h, snapshot := range before {
		s.wantUnchanged(h, snapshot)
	}
}

// The routes to the networks of a gateway that disconnects are withdrawn from
// the other gateway and the proxy. Other traffic continues.
func TestSiteWithdrawn(t *testing.T) {
	s := newSites(t, "")
	s.upBoth()
	a1 := s.a.hosts[0]
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	watch := a1.Command(ctx, "ping", "-i", "0.05", "-q", lab.TargetIPv4.String())
	check(t, watch.Start())
	s.ping(a1, s.b.addrs4[0], s.b.addrs6[0])

	s.down(s.b.gateway, "b")
	s.awaitRoute(s.a.gateway, s.b.addrs4[0], "eth0")
	s.awaitRoute(s.a.gateway, s.b.addrs6[0], "eth0")
	s.awaitRoute(s.Proxy, s.b.addrs4[0], "eth0")
	s.awaitRoute(s.a.gateway, lab.TargetIPv4, "masque0")

	s.up(s.b.gateway, s.b.config)
	s.awaitRoute(s.a.gateway, s.b.addrs4[0], "masque0")
	s.ping(a1, s.b.addrs4[0], s.b.addrs6[0])
	check(t, watch.Signal(syscall.SIGINT))
	<-watch.Done()
	if text := s.log(watch); !strings.Contains(text, " 0% packet loss") {
		t.Errorf("traffic of the other site was disturbed:\n%s", text)
	}
}

// The proxy does not route networks that overlap another site's or its own
// host's, nor networks outside the [[site]] table, and logs the reason.
func TestSiteRefused(t *testing.T) {
	s := newSites(t, strings.Replace(siteConfig, `networks = ["10.2.0.0/24", `,
		`networks = ["10.2.0.0/24", "10.1.0.0/16", "192.0.2.0/24", "10.77.0.0/16", `, 1))
	s.up(s.a.gateway, s.file(s.a))
	s.awaitNetworks(s.a, s.a.networks...)
	before := s.snapshot(s.Proxy)
	s.up(s.b.gateway, s.file(s.b, "10.1.0.0/25", "192.0.2.128/25", "10.77.128.0/17",
		"172.20.0.0/16"))
	s.awaitNetworks(s.b, s.b.networks[0], netip.MustParsePrefix("10.77.128.0/17"), s.b.networks[1])
	for _, want := range []string{
		`10.1.0.0/25 overlaps the networks of the site`,
		`192.0.2.128/25 overlaps 192.0.2.0/24, a network of the proxy's host`,
		`172.20.0.0/16 is not within the networks of its [[site]]`,
	} {
		if n := strings.Count(s.log(s.server), want); n != 1 {
			t.Errorf("the log contains this %d times, want once: %s\n%s", n, want, s.log(s.server))
		}
	}
	s.awaitRoute(s.Proxy, netip.MustParseAddr("192.0.2.200"), "eth1")
	s.awaitRoute(s.Proxy, netip.MustParseAddr("172.20.0.1"), "eth0")
	s.ping(s.Target, s.a.addrs4[0])
	// A host of site b with a source address of site a is not forwarded.
	check(t, s.b.hosts[0].AddAddr("eth0", netip.MustParsePrefix("10.1.0.77/32")))
	out, _ := s.b.hosts[0].Command(s.ctx, "ping", "-c", "2", "-i", "0.2", "-W", "2", "-I",
		"10.1.0.77", lab.TargetIPv4.String()).CombinedOutput()
	if !strings.Contains(string(out), "100% packet loss") {
		t.Errorf("a source of another site gets through:\n%s", out)
	}
	s.down(s.b.gateway, "b")
	s.awaitNetworks(s.b)
	s.eventually("the proxy's host is as before b connected", func() bool {
		return lab.Diff(before, s.snapshot(s.Proxy)) == ""
	})
}

// The proxy is killed and restarted during a TCP connection between two sites,
// and the connection continues.
func TestSitesProxyRestart(t *testing.T) {
	s := newSites(t, "")
	s.upBoth()
	a1, b1 := s.a.hosts[0], s.b.hosts[0]
	conn, received := s.flow(a1, b1, s.b.addrs4[0], 3*patience)
	const size = 40 << 20
	all := content(size)
	if _, err := io.CopyN(conn, all, size/2); err != nil {
		t.Fatal(err)
	}
	s.killProxy()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, all)
		sent <- err
	}()
	s.startProxy()
	for _, x := range []*site{s.a, s.b} {
		s.eventually(x.name+" has reconnected", func() bool {
			st := s.status(x.gateway, x.name)
			return st.State == client.StateConnected && st.Reconnects > 0
		})
		s.awaitNetworks(x, x.networks...)
	}
	if err := <-sent; err != nil {
		t.Errorf("the connection broke: %v", err)
	}
	check(t, conn.CloseWrite())
	if got, want := <-received, digest(content(size)); got != want {
		t.Errorf("received %s, sent %s", got, want)
	}
	s.ping(b1, s.a.addrs4[0], s.a.addrs6[0])
}

// A gateway assigns the proxy an address in its network. With it the proxy
// reaches hosts that answer their own network only (RFC 9484 section 8.2).
func TestSiteAssignsAddress(t *testing.T) {
	s := newSites(t, "")
	given4, given6 := netip.MustParseAddr("10.1.0.200"), netip.MustParseAddr("2001:db8:a::200")
	// The hosts of the LAN resolve the address by ARP and neighbour discovery,
	// and the gateway answers for the proxy.
	s.run(s.a.gateway, "sysctl", "-w", "net.ipv6.conf.lan0.proxy_ndp=1")
	for _, a := range []netip.Addr{given4, given6} {
		s.run(s.a.gateway, "ip", "neigh", "add", "proxy", a.String(), "dev", "lan0")
	}
	a1 := s.a.hosts[0]
	s.run(a1, "ip", "route", "del", "default")
	s.run(a1, "ip", "-6", "route", "del", "default")

	s.stopProxy()
	before := s.snapshot(s.Proxy)
	s.startProxy()
	f := s.file(s.a)
	appendTo(t, f, fmt.Sprintf("assign = [\"%v/32\", \"%v/128\"]\n", given4, given6))
	s.up(s.a.gateway, f)
	s.awaitNetworks(s.a, s.a.networks...)
	s.eventually("the proxy has the addresses", func() bool {
		out, _ := s.Proxy.Command(s.ctx, "ip", "addr", "show", "dev", "masque0").Output()
		return strings.Contains(string(out), given4.String()) &&
			strings.Contains(string(out), given6.String())
	})
	s.ping(s.Proxy, s.a.addrs4[0], s.a.addrs6[0])
	s.ping(a1, given4, given6)
	// The proxy's other addresses stay denied.
	s.wantUnreachable(s.a.gateway, netip.MustParseAddr("192.0.2.1"), 3, 13)
	s.down(s.a.gateway, "a")
	s.stopProxy()
	s.wantUnchanged(s.Proxy, before)
}

// A gateway with an impossible advertisement exits with an error that names it.
func TestSiteMistakes(t *testing.T) {
	s := newSites(t, "")
	for want, tc := range map[string]struct {
		networks string
		code     int
	}{
		"10.77.0.0/16 holds 10.77.0.2":                 {"10.77.0.0/16", 8},
		"127.0.0.0/8, which is never behind a gateway": {"127.0.0.0/16", 2},
	} {
		t.Run(tc.networks, func(t *testing.T) {
			f := s.file(s.a, tc.networks)
			c := s.a.gateway.Command(s.ctx, program("masque-client"), "up", f, "--wait")
			out, err := c.CombinedOutput()
			if err == nil || c.ExitCode() != tc.code || !strings.Contains(lastLine(out), want) {
				t.Errorf("exit code %d, want %d and %q:\n%s", c.ExitCode(), tc.code, want, out)
			}
			s.must(s.Proxy, "masque-proxy", "user", "remove", "a", "-c", s.config())
		})
	}
}
