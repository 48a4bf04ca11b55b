package client

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/proxy"
)

var (
	lan4 = netip.MustParsePrefix("10.1.0.0/24")
	lan6 = netip.MustParsePrefix("2001:db8:a::/64")
)

// startSite runs a proxy with a site, lan4 and lan6 behind alice, and the
// client that is their gateway.
func startSite(t *testing.T, changeProxy func(*proxy.Config), change func(*Config)) (*testProxy,
	*testClient) {
	t.Helper()
	f := startProxy(t, func(c *proxy.Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		c.Sites = []proxy.Site{{User: "alice", Networks: []netip.Prefix{lan4, lan6}}}
		if changeProxy != nil {
			changeProxy(c)
		}
	})
	n := startClient(t, f, func(c *Config) {
		c.AdvertiseRoutes = []netip.Prefix{lan4, lan6}
		if change != nil {
			change(c)
		}
	})
	return f, n
}

// awaitNetworks waits until the proxy has accepted the networks want.
func (f *testProxy) awaitNetworks(t *testing.T, want ...netip.Prefix) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		sessions := f.Sessions()
		if len(sessions) == 1 && slices.Equal(sessions[0].Networks, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the sessions are %+v, want networks %v", sessions, want)
		}
	}
}

// A gateway advertises its networks, also after a reconnect. It forwards
// packets from them as a router, so it decrements the hop limit.
func TestGateway(t *testing.T) {
	peer := netip.MustParsePrefix("10.1.0.200/32")
	f, n := startSite(t, nil, func(c *Config) { c.AssignPeer = []netip.Prefix{peer} })
	n.awaitConnected(t)
	f.awaitNetworks(t, lan4, lan6)
	if s := n.network.Last(); !s.Forward || !slices.Contains(s.Routes, peer) ||
		!slices.Contains(s.Routes, netip.MustParsePrefix("192.0.2.0/24")) {
		t.Errorf("the kernel has %+v", s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	beyond := netip.MustParseAddr("192.0.2.9")
	forwarded := func(inside netip.Addr) {
		t.Helper()
		// The proxy reports networks before it accepts packets from them, so it
		// may drop the first.
		for arrived := false; !arrived; {
			n.device.Inject(ippacket.AppendEcho(nil, inside, beyond, 64, true, 99, 1, nil))
			again, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			for !arrived {
				pkt, err := f.device.Receive(again)
				if ctx.Err() != nil {
					t.Fatal(err)
				}
				if err != nil {
					break
				}
				p, err := ippacket.Parse(pkt)
				if err != nil {
					t.Fatal(err)
				}
				if p.Src != inside {
					continue // a probe
				}
				arrived = true
				if p.HopLimit != 63 {
					t.Errorf("got hop limit %d, want 63", p.HopLimit)
				}
			}
			cancel()
		}
		f.device.Inject(ippacket.AppendEcho(nil, beyond, inside, 64, false, 99, 1, nil))
		receive(t, ctx, n.device, beyond, inside)
	}
	forwarded(netip.MustParseAddr("10.1.0.5"))
	for _, s := range f.Sessions() {
		f.Kick(s.ID)
	}
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
	f.awaitNetworks(t, lan4, lan6)
	forwarded(netip.MustParseAddr("10.1.0.6"))
}

// A client without networks does not make its host a router.
func TestNoGateway(t *testing.T) {
	n := startClient(t, startProxy(t, nil), nil)
	n.awaitConnected(t)
	if n.network.Last().Forward {
		t.Error("the host is made a router")
	}
}

// The client does not install routes of the proxy into the networks behind its
// host, and drops packets from the tunnel with sources in them.
func TestOwnNetworksAreNotTheProxys(t *testing.T) {
	within := netip.MustParsePrefix("10.1.0.128/25")
	f, n := startSite(t, func(c *proxy.Config) {
		c.Advertise, c.Sites[0].Networks = []netip.Prefix{within,
			netip.MustParsePrefix("10.2.0.0/24")}, []netip.Prefix{lan6}
	}, nil)
	n.awaitConnected(t)
	f.awaitNetworks(t, lan6)
	if routes := n.network.Last().Routes; slices.Contains(routes, within) ||
		!slices.Contains(routes, netip.MustParsePrefix("10.2.0.0/24")) {
		t.Errorf("installed %v", routes)
	}
	own, spoofed, valid := n.Status().Addresses[0].Addr(), netip.MustParseAddr("10.1.0.130"),
		netip.MustParseAddr("10.2.0.5")
	for _, src := range []netip.Addr{spoofed, valid} {
		f.device.Inject(ippacket.AppendEcho(nil, src, own, 64, true, 99, 1, nil))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		pkt, err := n.device.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		p, err := ippacket.Parse(pkt)
		if err != nil {
			t.Fatal(err)
		}
		if p.Src == spoofed {
			t.Error("a packet from the network behind this host came out of the tunnel")
		}
		if p.Src == valid {
			break
		}
	}
	// A packet to such a network that the kernel routes into the tunnel does
	// not reach the proxy, which would send it back. It is answered with an
	// ICMP error.
	n.device.Inject(ippacket.AppendEcho(nil, own, spoofed, 64, true, 99, 1, nil))
	for {
		pkt, err := n.device.Receive(ctx)
		if err != nil {
			t.Fatalf("not answered: %v", err)
		}
		if p, err := ippacket.Parse(pkt); err == nil && ippacket.IsICMPError(pkt, p) {
			break
		}
	}
}

// Only routes that lie within a network behind this host are left out.
func TestExcludeOwn(t *testing.T) {
	c, err := New(Config{Proxy: "p", AdvertiseRoutes: []netip.Prefix{lan4}})
	if err != nil {
		t.Fatal(err)
	}
	s := &session{c: c}
	var routes []netip.Prefix
	for _, p := range []string{"10.0.0.0/8", "10.1.0.0/24", "10.1.0.64/26", "10.1.1.0/24", "::/0"} {
		routes = append(routes, netip.MustParsePrefix(p))
	}
	if got, want := s.excludeOwn(slices.Clone(routes)),
		slices.Delete(slices.Clone(routes), 1, 3); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A network that contains the tunnel's own address is a mistake in the
// configuration, so the client ends.
func TestAdvertisesItsOwnAddress(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"routes.advertise": func(c *Config) {
			c.AdvertiseRoutes = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16")}
		},
		"routes.assign": func(c *Config) {
			c.AssignPeer = []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, n := startSite(t, nil, change)
			if e := n.failure(t); e.Kind != KindRefused ||
				!strings.HasPrefix(e.Reason, name+": ") ||
				!strings.Contains(e.Reason, "10.77.0.2") {
				t.Errorf("got %v", e)
			}
		})
	}
}

// A proxy that requests addresses is assigned each address of routes.assign
// once; its other requests are refused. Every answer is the complete list.
func TestProxyAsksForAddresses(t *testing.T) {
	answers := make(chan []capsule.Address, 4)
	f := scripted(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		reader := capsule.NewReader(str, 1<<16)
		write(str, &capsule.AddressRequest{Addresses: []capsule.Address{
			{RequestID: 1, Prefix: netip.MustParsePrefix("::/128")},
			{RequestID: 2, Prefix: netip.MustParsePrefix("10.1.0.201/32")},
			{RequestID: 3, Prefix: netip.MustParsePrefix("0.0.0.0/32")},
			{RequestID: 4, Prefix: netip.MustParsePrefix("::/128")},
		}})
		for {
			c, err := reader.Next()
			if err != nil {
				return
			}
			if a, ok := c.(*capsule.AddressAssign); ok {
				answers <- a.Addresses
			}
		}
	})
	startClient(t, f, func(c *Config) {
		for _, p := range []string{"10.1.0.200/32", "10.1.0.201/32", "2001:db8:a::200/128"} {
			c.AssignPeer = append(c.AssignPeer, netip.MustParsePrefix(p))
		}
	})
	want := []capsule.Address{
		{RequestID: 3, Prefix: netip.MustParsePrefix("10.1.0.200/32")},
		{RequestID: 2, Prefix: netip.MustParsePrefix("10.1.0.201/32")},
		{RequestID: 1, Prefix: netip.MustParsePrefix("2001:db8:a::200/128")},
		{RequestID: 4, Prefix: netip.MustParsePrefix("::/128")},
	}
	select {
	case got := <-answers:
		if !slices.Equal(got, want) {
			t.Errorf("assigned %v, want %v", got, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("not answered")
	}
}
