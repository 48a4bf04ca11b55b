package client

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
	"masquevpn/proxy"
	"masquevpn/routing"
)

// home returns the networks of a host with a LAN, containers and a public
// address.
func home(string) ([]routing.HostNetwork, error) {
	return []routing.HostNetwork{
		{Address: netip.MustParsePrefix("127.0.0.1/8"), Interface: "lo"},
		{Address: netip.MustParsePrefix("203.0.113.7/32"), Interface: "lo"},
		{Address: netip.MustParsePrefix("192.168.1.10/24"), Interface: "eth0"},
		{Address: netip.MustParsePrefix("fd00:1::10/64"), Interface: "eth0"},
		{Address: netip.MustParsePrefix("172.17.0.1/16"), Interface: "docker0"},
	}, nil
}

// assigning starts a proxy that answers each request with addresses, refuses
// the remaining requests, and advertises routes.
func assigning(t *testing.T, addresses, routes []netip.Prefix) *testProxy {
	return scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		reader := capsule.NewReader(str, 1<<16)
		var assigned []capsule.Address
		asked := requested(reader)
		for _, p := range addresses {
			a := capsule.Address{Prefix: p}
			if i := slices.IndexFunc(asked, func(x capsule.Address) bool {
				return x.Prefix.Addr().Is4() == p.Addr().Is4()
			}); i >= 0 {
				a.RequestID = asked[i].RequestID
				asked = slices.Delete(asked, i, i+1)
			}
			assigned = append(assigned, a)
		}
		for _, a := range asked {
			a.Prefix = netip.PrefixFrom(a.Prefix.Addr(), a.Prefix.Addr().BitLen()) // refused
			if !a.Prefix.Addr().IsUnspecified() {
				a.Prefix = map[bool]netip.Prefix{true: netip.MustParsePrefix("0.0.0.0/32"),
					false: netip.MustParsePrefix("::/128")}[a.Prefix.Addr().Is4()]
			}
			assigned = append(assigned, a)
		}
		write(str, &capsule.AddressAssign{Addresses: assigned},
			&capsule.RouteAdvertisement{Routes: capsule.Routes(routes, 0)})
		for _, p := range addresses { // packets for the client
			if p.Addr().Is4() && len(routes) > 0 {
				go keepSending(r.Context(), str,
					append([]byte{0},
						ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"), p.Addr(), 64,
							true, 1, 1, nil)...))
			}
		}
		_ = requested(reader)
	})
}

// The client refuses addresses that would cut the host off from its networks or
// give the proxy access to them, before it changes the kernel.
func TestAssignedAddressesAreRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		assigned []netip.Prefix
		request  []netip.Prefix // nil: any of each family
		want     string
	}{
		"an address of the host": {prefixes("192.168.1.10/32"), nil,
			"which holds 192.168.1.10, an address of eth0"},
		"an address of the host for others": {prefixes("203.0.113.7/32"), nil,
			"which holds 203.0.113.7, an address of lo"},
		"an IPv6 address of the host": {prefixes("10.77.0.2/32", "fd00:1::10/128"), nil,
			"which holds fd00:1::10, an address of eth0"},
		"an address of the LAN": {prefixes("192.168.1.99/32"), nil,
			"which lies in 192.168.1.0/24, the network of eth0"},
		"an address of a container's network": {prefixes("172.17.3.4/32"), nil,
			"which lies in 172.17.0.0/16, the network of docker0"},
		"the LAN": {prefixes("192.168.1.0/24"), prefixes("0.0.0.0/24"),
			"which holds 192.168.1.10, an address of eth0"},
		"a part of the LAN": {prefixes("192.168.1.128/25"), prefixes("0.0.0.0/24"),
			"which lies in 192.168.1.0/24, the network of eth0"},
		"a prefix around the LAN": {prefixes("192.168.0.0/16"), prefixes("0.0.0.0/16"),
			"which holds 192.168.1.10, an address of eth0"},
		"a prefix for an address": {prefixes("10.77.0.0/24"), nil,
			"which is larger than addresses.request allows"},
		"an IPv6 prefix for an address": {prefixes("fd77::/64"), nil,
			"which is larger than addresses.request allows"},
		"loopback":                {prefixes("127.0.0.5/32"), nil, "which overlaps 127.0.0.0/8"},
		"the proxy's own address": {prefixes("127.0.0.1/32"), nil, "which overlaps 127.0.0.0/8"},
		"broadcast": {prefixes("255.255.255.255/32"), nil,
			"which overlaps 224.0.0.0/3"},
		"multicast": {prefixes("ff02::1/128"), nil, "which overlaps ff00::/8"},
		"IPv4 mapped into IPv6": {prefixes("::ffff:10.0.0.1/128"), nil,
			"which overlaps ::ffff:0.0.0.0/96"},
		"IPv4 in IPv6": {prefixes("::10.0.0.1/128"), nil, "which overlaps ::/96"},
		"an address of a translator": {prefixes("64:ff9b::a00:1/128"), nil,
			"which overlaps 64:ff9b::/96"},
		"discard":         {prefixes("100::1/128"), nil, "which overlaps 100::/64"},
		"a dummy address": {prefixes("192.0.0.8/32"), nil, "which overlaps 192.0.0.8/29"},
		"link-local":      {prefixes("fe80::2/128"), nil, "which overlaps fe80::/10"},
		"everything": {prefixes("0.0.0.0/0"), prefixes("0.0.0.0/0"),
			"which overlaps 0.0.0.0/8"},
	} {
		t.Run(name, func(t *testing.T) {
			f := assigning(t, tc.assigned, prefixes("0.0.0.0/0", "::/0"))
			n := startClient(t, f, func(c *Config) { c.HostNetworks, c.Request = home, tc.request })
			e := n.failure(t)
			if e.Kind != KindRefused || !strings.Contains(e.Error(), tc.want) {
				t.Errorf("got kind %d, %q, want kind %d and %q", e.Kind, e, KindRefused, tc.want)
			}
			if states := n.network.States(); len(states) > 0 {
				t.Errorf("the kernel has %+v, want no change", states)
			}
		})
	}
}

// The client refuses the outer address of the proxy.
func TestOuterAddressIsRefused(t *testing.T) {
	s := &session{c: &Client{}, proxyAddrs: []netip.AddrPort{netip.MustParseAddrPort("198.51.100.2:443")}}
	if got, want := s.whyUnusable(netip.MustParsePrefix("198.51.100.2/32")),
		"holds 198.51.100.2, where the proxy is reached outside the tunnel"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// The client ignores an address of a family that it did not request.
func TestUnrequestedFamily(t *testing.T) {
	f := assigning(t, prefixes("10.77.0.2/32", "fd77::2/128"), prefixes("0.0.0.0/0", "::/0"))
	n := startClient(t, f, func(c *Config) {
		c.HostNetworks, c.Request = home, prefixes("0.0.0.0/32")
	})
	n.awaitConnected(t)
	if got, want := n.network.Last().Addresses, prefixes("10.77.0.2/32"); !slices.Equal(got, want) {
		t.Errorf("addresses in the kernel %v, want %v", got, want)
	}
}

// travelling is a host that a test moves to other networks.
type travelling struct {
	mu sync.Mutex
	at []routing.HostNetwork
}

func (h *travelling) networks(string) ([]routing.HostNetwork, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.at, nil
}

func (h *travelling) moveTo(network string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.at = []routing.HostNetwork{{Address: netip.MustParsePrefix(network), Interface: "wlan0"}}
}

// A session survives, with a warning, when the host moves to a network with the
// addresses of the tunnel. The next session has the warning too.
func TestHostNetworkOverlapsTunnel(t *testing.T) {
	f := startProxy(t, nil)
	h := &travelling{}
	h.moveTo("192.168.1.10/24")
	up := newFakeUnderlay()
	n := startClient(t, f, func(c *Config) { c.HostNetworks, c.OpenUnderlay = h.networks, up.open })
	n.awaitConnected(t)
	h.moveTo("10.77.0.99/24")
	up.set("10.77.0.99", nil)
	warned := func(s Status) bool {
		return s.State == StateConnected && slices.ContainsFunc(s.Warnings, func(w string) bool {
			return strings.HasPrefix(w,
				"the tunnel's address 10.77.0.2 lies in 10.77.0.0/24, the network of wlan0: ")
		})
	}
	n.await(t, "warned", warned)
	f.Kick(f.Sessions()[0].ID)
	n.await(t, "warned in its next session", func(s Status) bool {
		return warned(s) && s.Reconnects > 0
	})
	h.moveTo("192.168.1.10/24")
	up.set("192.168.1.10", nil)
	n.await(t, "without a warning", func(s Status) bool {
		return s.State == StateConnected && len(s.Warnings) == 0
	})
}

// When another network assigns the tunnel's address to the host, the client
// removes it from the tunnel and keeps the tunnel's routes.
func TestHostGetsTunnelAddress(t *testing.T) {
	f := startProxy(t, nil)
	h := &travelling{}
	h.moveTo("192.168.1.10/24")
	up := newFakeUnderlay()
	n := startClient(t, f, func(c *Config) { c.HostNetworks, c.OpenUnderlay = h.networks, up.open })
	n.awaitConnected(t)
	routes := n.network.Last().Routes
	h.moveTo("10.77.0.2/24")
	up.set("10.77.0.2", nil)
	n.await(t, "without its address", func(s Status) bool {
		return s.State == StateReconnecting &&
			strings.Contains(s.Reason, "which holds 10.77.0.2, an address of wlan0")
	})
	if last := n.network.Last(); !slices.Equal(last.Addresses, prefixes("fd77::2/128")) ||
		!slices.Equal(last.Routes, routes) {
		t.Errorf("the kernel has %+v", last)
	}
	h.moveTo("192.168.1.10/24")
	up.set("192.168.1.10", nil)
	n.await(t, "connected again", func(s Status) bool { return s.State == StateConnected })
}

// The client accepts packets from the advertised ranges that the configuration
// accepts and that do not belong to this host.
func TestAcceptable(t *testing.T) {
	for name, tc := range map[string]struct {
		advertised, accept, exclude []netip.Prefix
		lan, install                bool
		pass, drop                  []string // source addresses
	}{
		"split": {
			prefixes("0.0.0.0/0"), prefixes("10.0.0.0/8"), nil, true, true,
			[]string{"10.1.2.3"}, []string{"192.0.2.1", "192.168.1.20", "192.168.1.10"},
		},
		"full": {
			prefixes("0.0.0.0/0", "::/0"), nil, nil, true, true,
			[]string{"192.0.2.1", "192.168.2.1", "2001:db8::1"},
			[]string{"192.168.1.20", "192.168.1.10", "172.17.0.9", "fd00:1::99", "203.0.113.7"},
		},
		"full, before the LAN": {
			prefixes("0.0.0.0/0"), nil, nil, false, true,
			[]string{"192.0.2.1", "192.168.1.20"}, []string{"192.168.1.10", "203.0.113.7"},
		},
		"longer than the LAN": {
			prefixes("192.168.1.128/25", "192.168.2.0/24"), nil, nil, true, true,
			[]string{"192.168.1.200", "192.168.2.1"}, []string{"192.168.1.20", "10.1.2.3"},
		},
		"excluded": {
			prefixes("0.0.0.0/0"), nil, prefixes("192.0.2.0/24"), true, true,
			[]string{"198.51.100.1"}, []string{"192.0.2.1"},
		},
		"routes of the user's own": {
			prefixes("0.0.0.0/0"), nil, nil, true, false,
			[]string{"192.168.1.20"}, []string{"192.168.1.10"},
		},
		"nothing": {
			prefixes("0.0.0.0/0"), []netip.Prefix{}, nil, true, true,
			nil, []string{"192.0.2.1", "192.168.1.20"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := New(Config{Proxy: "p", Accept: tc.accept, Exclude: tc.exclude,
				HostRoutes:    map[bool]routing.HostRoutes{false: routing.HostNone}[tc.lan],
				InstallRoutes: tc.install})
			if err != nil {
				t.Fatal(err)
			}
			networks, _ := home("")
			c.networks.Store(&networks)
			got := c.acceptableRoutes(capsule.Routes(tc.advertised, 0))
			for _, s := range tc.pass {
				if !covers(got, s) {
					t.Errorf("nothing may come from %s: %v", s, got)
				}
			}
			for _, s := range tc.drop {
				if covers(got, s) {
					t.Errorf("the proxy may send from %s: %v", s, got)
				}
			}
		})
	}
}

func covers(routes []capsule.Route, addr string) bool {
	a := netip.MustParseAddr(addr)
	return slices.ContainsFunc(routes, func(r capsule.Route) bool {
		return r.Start.Compare(a) <= 0 && a.Compare(r.End) <= 0
	})
}

// The routes of different protocols are kept apart.
func TestAcceptableByProtocol(t *testing.T) {
	c, err := New(Config{Proxy: "p", InstallRoutes: true, Accept: prefixes("192.0.2.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	all := prefixes("192.0.2.0/24", "198.51.100.0/24")
	got := c.acceptableRoutes(slices.Concat(capsule.Routes(all[:1], 6), capsule.Routes(all, 17)))
	if want := slices.Concat(capsule.Routes(all[:1], 6),
		capsule.Routes(all[:1], 17)); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// The client drops packets of the proxy with a source address in the host's LAN
// or outside the routes of a split tunnel.
func TestSplitTunnelSources(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, func(c *Config) {
		c.HostNetworks, c.Accept = home, prefixes("192.0.2.0/24", "192.168.0.0/16")
	})
	n.awaitConnected(t)
	inside := netip.MustParseAddr("10.77.0.2")
	for _, from := range []string{"192.168.1.20", "198.51.100.1"} {
		f.device.Inject(ippacket.AppendEcho(nil, netip.MustParseAddr(from), inside, 64, true, 7,
			1, nil))
	}
	n.eventually(t, "dropped", func() bool { return n.Status().Drops["source"] == 2 })
	carries(t, n, f, "10.77.0.2", "192.0.2.2")
}

// eventually waits until ok returns true. It is for changes without an event.
func (n *testClient) eventually(t *testing.T, state string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the client was not %s in time: %+v", state, n.Status())
		}
	}
}

// The client does not install routes to link-local, multicast, loopback and
// IPv4-mapped addresses.
func TestReservedRoutes(t *testing.T) {
	f := assigning(t, prefixes("10.77.0.2/32"),
		prefixes("192.0.2.0/24", "127.0.0.0/8", "169.254.1.0/24", "224.0.0.0/4",
			"::ffff:10.0.0.0/104", "fe80::/64", "ff00::/8"))
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	if got, want := n.network.Last().Routes, prefixes("192.0.2.0/24"); !slices.Equal(got, want) {
		t.Errorf("routes in the kernel %v, want %v", got, want)
	}
}

// The resolver asks the proxy's nameservers about all names in a full tunnel,
// or if the configuration lists all names. Otherwise it asks them about the
// proxy's domains.
func TestSplitTunnelDNS(t *testing.T) {
	servers := []netip.Addr{netip.MustParseAddr("192.0.2.53")}
	split := prefixes("192.0.2.0/24")
	for name, tc := range map[string]struct {
		pushed proxy.DNS
		accept []netip.Prefix
		dns    DNS
		want   string
		reason string // part of the status's reason
	}{
		"full": {pushed: proxy.DNS{Servers: servers},
			want: "servers [192.0.2.53:53] search [] domains [.]"},
		"full for one family": {pushed: proxy.DNS{Servers: servers},
			accept: prefixes("0.0.0.0/0"), want: "servers [192.0.2.53:53] search [] domains [.]"},
		"all names": {pushed: proxy.DNS{Servers: servers}, accept: split,
			want: "no servers", reason: "set dns.domains"},
		"search domains": {pushed: proxy.DNS{Servers: servers,
			Search: []string{"corp.example"}}, accept: split,
			want: "servers [192.0.2.53:53] search [corp.example] domains [corp.example]"},
		"listed": {pushed: proxy.DNS{Servers: servers,
			Domains: []string{"corp.example"}}, accept: split,
			want: "servers [192.0.2.53:53] search [] domains [corp.example]"},
		"another search domain": {pushed: proxy.DNS{Servers: servers,
			Search: []string{"a.corp.example", "other.example"}, Domains: []string{"corp.example"}},
			accept: split, want: "servers [192.0.2.53:53] search [a.corp.example] domains [corp.example]"},
		"the file names all": {pushed: proxy.DNS{Servers: servers}, accept: split,
			dns:  DNS{Domains: []string{"."}},
			want: "servers [192.0.2.53:53] search [] domains [.]"},
		"the file's servers": {accept: split, dns: DNS{Servers: servers},
			want: "servers [192.0.2.53:53] search [] domains [.]"},
	} {
		t.Run(name, func(t *testing.T) {
			f := startProxy(t, pushing(tc.pushed))
			r := &fakeResolver{}
			n := startClient(t, f, func(c *Config) {
				r.config(c)
				c.Accept, c.DNS = tc.accept, tc.dns
			})
			n.await(t, "configured", func(s Status) bool {
				calls := slices.DeleteFunc(r.all(), func(s string) bool {
					return strings.HasSuffix(s, " routes")
				})
				return s.State == StateConnected && len(s.DNS.Servers) > 0 && len(calls) > 0 &&
					calls[len(calls)-1] == tc.want &&
					s.DNS.Applied == (tc.reason == "") && strings.Contains(s.DNS.Reason, tc.reason)
			})
		})
	}
}

// A nameserver with an address of this host is not used.
func TestOwnAddressAsNameserver(t *testing.T) {
	f := startProxy(t, pushing(proxy.DNS{Servers: []netip.Addr{netip.MustParseAddr("192.168.1.10"),
		netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("192.0.2.53")}}))
	r := &fakeResolver{}
	n := startClient(t, f, func(c *Config) { r.config(c); c.HostNetworks = home })
	n.await(t, "configured", func(s Status) bool { return s.DNS.Applied })
	if calls := r.all(); !slices.Contains(calls, "servers [192.0.2.53:53] search [] domains [.]") ||
		slices.ContainsFunc(calls, func(s string) bool {
			return strings.Contains(s, "192.168.1.10") || strings.Contains(s, "10.77.0.2")
		}) {
		t.Errorf("the resolver got %q, want 192.0.2.53 alone", calls)
	}
}

// A prefix that the proxy delegates stays acceptable when this host makes
// networks of it, in the same session and in the next one. A network that the
// host had before, or that leads to the proxy, is no such network.
func TestNetworksOfDelegatedPrefix(t *testing.T) {
	delegated := netip.MustParsePrefix("10.77.0.224/28")
	network := func(address, iface string) routing.HostNetwork {
		return routing.HostNetwork{Address: netip.MustParsePrefix(address), Interface: iface}
	}
	for name, tc := range map[string]struct {
		request  string
		networks []routing.HostNetwork
		held     bool // the client had the prefix in an earlier session
		want     string
	}{
		"an address on lo": {"0.0.0.0/28", []routing.HostNetwork{network("10.77.0.238/32", "lo")},
			true, ""},
		"a network on another interface": {"0.0.0.0/28",
			[]routing.HostNetwork{network("10.77.0.233/29", "eth1")}, true, ""},
		"all of it on another interface": {"0.0.0.0/28",
			[]routing.HostNetwork{network("10.77.0.225/28", "eth1")}, true, ""},
		"requested by name, after a restart": {"10.77.0.224/28",
			[]routing.HostNetwork{network("10.77.0.225/28", "eth1")}, false, ""},
		"not held before": {"0.0.0.0/28",
			[]routing.HostNetwork{network("10.77.0.225/28", "eth1")}, false,
			"holds 10.77.0.225, an address of eth1"},
		"the network that leads to the proxy": {"10.77.0.224/28",
			[]routing.HostNetwork{network("10.77.0.225/28", "eth0")}, true,
			"holds 10.77.0.225, an address of eth0"},
		"a larger network": {"0.0.0.0/28",
			[]routing.HostNetwork{network("10.77.0.225/24", "eth1")}, true,
			"holds 10.77.0.225, an address of eth1"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := New(Config{Name: "test", Proxy: "192.0.2.1",
				Request: []netip.Prefix{netip.MustParsePrefix(tc.request)}})
			if err != nil {
				t.Fatal(err)
			}
			c.status.Underlay = &connectip.Underlay{Interface: "eth0"}
			if tc.held {
				c.noteDelegated([]netip.Prefix{delegated})
			}
			c.networks.Store(&tc.networks)
			s := &session{c: c, requests: true}
			if got := s.whyUnusable(delegated); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
