package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
)

// TestSite checks that networks within its [[site]] are routed to a gateway,
// which may send from them, and that others are refused with one log line.
func TestSite(t *testing.T) {
	h := newHub(t, nil)
	a := h.connect("a", "", netA, netA6, netip.MustParsePrefix("10.5.0.0/24"))
	h.awaitInstalled(netA, netA6)
	h.awaitDelivery(a, "192.0.2.9", "10.1.0.5")
	a.send("10.5.0.5", "192.0.2.9")
	a.awaitProhibited("10.5.0.5", "192.0.2.9")
	a.send("10.1.0.5", "192.0.2.9")
	h.awaitForwarded("10.1.0.5", "192.0.2.9")
	h.inject("192.0.2.9", "10.1.0.6")
	a.awaitPacket("192.0.2.9", "10.1.0.6")

	for range 3 {
		a.advertise(netA, netA6, netip.MustParsePrefix("10.5.0.0/24"))
	}
	a.advertise(netA, netip.MustParsePrefix("10.5.0.0/24"))
	h.awaitInstalled(netA)
	if lines := h.log.Lines("10.5.0.0/24 is not within"); len(lines) != 1 ||
		!strings.Contains(lines[0], "user=a") {
		t.Errorf("the refusal is logged as\n%s", strings.Join(lines, "\n"))
	}
	a.advertise()
	h.awaitInstalled()
	a.send("10.1.0.5", "192.0.2.9")
	a.awaitProhibited("10.1.0.5", "192.0.2.9")
	a.advertise(netA)
	h.awaitInstalled(netA)
	a.close()
	h.awaitInstalled()
}

// TestNoSite checks that a client without a site may advertise nothing, and
// that the refusal is logged once.
func TestNoSite(t *testing.T) {
	h := newHub(t, nil)
	c := h.connect("c", "", netA)
	c.advertise(netB)
	c.send("10.1.0.5", "192.0.2.9")
	c.awaitProhibited("10.1.0.5", "192.0.2.9")
	if lines := h.log.Lines("no [[site]] names this user"); len(lines) != 1 {
		t.Errorf("%d lines are logged", len(lines))
	}
	if n := len(h.kernel.States()); n != 1 {
		t.Errorf("the kernel was configured %d times", n)
	}
	// A request with a scope is refused too.
	rsp, str := request(t, h.h3, "CONNECT", "connect-ip", "/.well-known/masque/ip/192.0.2.9/*/",
		http.Header{"Authorization": {"Bearer a"}})
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	if _, err := str.Write((&capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{netA},
		0)}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	h.eventually("a line about the scope", func() bool {
		return len(h.log.Lines("a request with a scope")) == 1
	})
}

// TestSiteConflicts checks that a network in use is not installed until it is
// free, and that the refusal is logged.
func TestSiteConflicts(t *testing.T) {
	h := newHub(t, func(c *Config) {
		c.Sites[0].Networks = append(c.Sites[0].Networks, netip.MustParsePrefix("10.77.0.0/16"))
	})
	other := netip.MustParsePrefix("172.17.0.0/24")
	a := h.connect("a", "", netA, hostNetwork, other, netip.MustParsePrefix("10.77.0.0/28"))
	h.awaitInstalled(netA, other)
	for _, want := range []string{
		`10.77.0.0/28 overlaps 10.77.0.0/24, the pool of addresses for clients`,
		`172.16.0.0/24 overlaps 172.16.0.0/24, a network of the proxy's host`,
	} {
		h.eventually(want, func() bool { return len(h.log.Lines(want)) == 1 })
	}
	b := h.connect("b", "", netB, netip.MustParsePrefix("10.1.0.0/16"))
	want := `10.1.0.0/16 overlaps the networks of the site \"a\"`
	h.eventually(want, func() bool { return len(h.log.Lines(want)) == 1 })
	h.awaitInstalled(netA, other, netB)
	b.send("10.1.7.5", "192.0.2.9")
	b.awaitProhibited("10.1.7.5", "192.0.2.9")
	a.close()
	h.awaitInstalled(netB, netip.MustParsePrefix("10.1.0.0/16"))
	h.connect("a", "", netA)
	h.eventually("the refusal of a", func() bool {
		return len(h.log.Lines(`10.1.0.0/24 overlaps the networks of the site \"b\"`)) == 1
	})
}

// TestSitesReachEachOther checks that sites are told of each other's networks
// and gateways, and reach them, while they are connected.
func TestSitesReachEachOther(t *testing.T) {
	h := newHub(t, nil)
	a := h.connect("a", "", netA)
	a.awaitRoutes(netProxy)
	b := h.connect("b", "", netB)
	aOwn, bOwn := netip.PrefixFrom(a.own[0], 32), netip.PrefixFrom(b.own[0], 32)
	a.awaitRoutes(netProxy, netB, bOwn)
	b.awaitRoutes(netProxy, netA, aOwn)
	h.awaitAllowed(a, "10.1.0.5", "10.2.0.5")
	h.awaitAllowed(a, "10.1.0.5", bOwn.Addr().String())
	h.awaitDelivery(b, "10.1.0.5", "10.2.0.5")

	b.advertise()
	a.awaitRoutes(netProxy, bOwn)
	b.close()
	a.awaitRoutes(netProxy)
}

// TestSitesAreNotForClients checks that clients and sites do not reach each
// other, even if the proxy advertises everything.
func TestSitesAreNotForClients(t *testing.T) {
	h := newHub(t, func(c *Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	})
	a := h.connect("a", "", netA)
	h.awaitInstalled(netA)
	c := h.connect("c", "")
	for _, dst := range []string{"10.1.0.5", a.own[0].String()} {
		c.send(c.own[0].String(), dst)
		c.awaitProhibited(c.own[0].String(), dst)
	}
	a.send(a.own[0].String(), c.own[0].String())
	a.awaitProhibited(a.own[0].String(), c.own[0].String())
	a.advertise()
	h.awaitInstalled()
	h.awaitAllowed(c, c.own[0].String(), "10.1.0.5") // no longer the network of a site
}

// TestSiteReach checks that Site.Reach limits the routes that a site is told,
// and its destinations.
func TestSiteReach(t *testing.T) {
	h := newHub(t, func(c *Config) {
		c.Advertise = append(c.Advertise, netip.MustParsePrefix("198.51.100.0/24"))
		c.Sites[0].Reach = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25"),
			netip.MustParsePrefix("10.2.0.0/28")}
	})
	a := h.connect("a", "", netA)
	a.awaitRoutes(netip.MustParsePrefix("192.0.2.0/25"))
	h.connect("b", "", netB)
	a.awaitRoutes(netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("10.2.0.0/28"))
	a.send("10.1.0.5", "10.2.0.200")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	select {
	case pkt := <-a.packets:
		if p, err := ippacket.Parse(pkt); err != nil || !ippacket.IsICMPError(pkt, p) {
			t.Errorf("%+v, %v", p, err)
		}
	case <-ctx.Done():
		t.Error("a packet beyond reach is not answered")
	}
}

// TestSitesAndClients checks that clients and sites reach each other with
// client_to_client.
func TestSitesAndClients(t *testing.T) {
	h := newHub(t, func(c *Config) {
		c.ClientToClient, c.Advertise = true, append(c.Advertise, netA)
	})
	a := h.connect("a", "", netA)
	h.awaitInstalled(netA)
	c := h.connect("c", "")
	c.send(c.own[0].String(), "10.1.0.5")
	h.awaitForwarded(c.own[0].String(), "10.1.0.5")
	a.advertise()
	h.awaitInstalled()
}

// TestSiteNetworksAreNotDenied checks that the built-in denied destinations do
// not apply to networks of sites, but the configured ones do.
func TestSiteNetworksAreNotDenied(t *testing.T) {
	ula := netip.MustParsePrefix("fd00:ec2::/64") // has the address of a metadata service
	h := newHub(t, func(c *Config) {
		c.Sites[0].Networks = append(c.Sites[0].Networks, ula)
		c.Deny = []netip.Prefix{netip.MustParsePrefix("10.1.0.128/25")}
	})
	h.connect("a", "", netA, ula)
	b := h.connect("b", "", netip.MustParsePrefix("10.2.0.0/24"))
	h.awaitInstalled(netA, netB, ula)
	h.awaitAllowed(b, "10.2.0.5", "10.1.0.5")
	b.send("10.2.0.5", "10.1.0.200")
	b.awaitProhibited("10.2.0.5", "10.1.0.200")
	pkt := ippacket.AppendEcho([]byte{0}, netip.MustParseAddr("fd77::2"),
		netip.MustParseAddr("fd00:ec2::254"), 64, true, 1, 1, nil)
	b.write(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 2,
		Prefix: netip.MustParsePrefix("fd77::2/128")}}})
	b.write(&capsule.Datagram{Payload: pkt})
	h.awaitForwarded("fd77::2", "fd00:ec2::254")
}

// TestSiteTakesOver checks that a client that reconnects has its networks and
// their packets at once, and that the kernel and other sites do not notice.
func TestSiteTakesOver(t *testing.T) {
	for name, tc := range map[string]struct{ first, second string }{
		"same client":                {"1", "1"},
		"same user, new run":         {"1", "2"},
		"no instance at all":         {"", ""},
		"another client of the user": {"1", "3"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t, nil)
			a := h.connect("a", tc.first, netA)
			h.awaitInstalled(netA)
			// takes over once it is free
			b := h.connect("b", "", netip.MustParsePrefix("10.1.0.0/16"))
			applied := len(h.kernel.States())
			again := h.connect("a", tc.second)
			if name == "same client" { // again inherits without advertising
				h.awaitDelivery(again, "10.77.0.1", "10.1.0.5")
			}
			again.advertise(netA)
			h.awaitDelivery(again, "10.77.0.1", "10.1.0.5")
			if n := len(h.kernel.States()); n != applied {
				t.Errorf("the kernel was configured %d more times", n-applied)
			}
			if name == "same client" {
				return
			}
			// The older session takes over when the newer one ends.
			again.close()
			h.awaitDelivery(a, "10.77.0.1", "10.1.0.5")
			a.close()
			h.awaitInstalled(netip.MustParsePrefix("10.1.0.0/16"))
			b.close()
		})
	}
}

// TestSiteAssignsAddresses checks that the proxy takes only the addresses that
// a site may assign, each with the prefix length of its network.
func TestSiteAssignsAddresses(t *testing.T) {
	h := newHub(t, nil)
	a := h.connect("a", "", netA)
	h.awaitInstalled(netA)
	assign := func(prefixes ...string) {
		var c capsule.AddressAssign
		for _, p := range prefixes {
			c.Addresses = append(c.Addresses, capsule.Address{Prefix: netip.MustParsePrefix(p)})
		}
		a.write(&c)
	}
	has := func(want ...string) {
		t.Helper()
		h.eventually(fmt.Sprintf("addresses %v", want), func() bool {
			var got []string
			for _, p := range h.kernel.Last().Addresses {
				got = append(got, p.String())
			}
			return slices.Equal(got, append([]string{"10.77.0.1/24", "fd77::1/64"}, want...))
		})
	}
	assign("10.1.0.200/32", "10.9.0.7/32", "127.0.0.1/32", "172.16.0.1/32", "10.1.0.0/28",
		"0.0.0.0/32")
	has("10.1.0.200/24", "10.9.0.7/32")
	for _, refused := range []string{
		"address 127.0.0.1 is not within",
		"address 172.16.0.1 is within 172.16.0.0/24, a network of the proxy's host",
		"10.1.0.0/28, which it assigns, is not a single address",
	} {
		if len(h.log.Lines(refused)) != 1 {
			t.Errorf("not logged once: %s", refused)
		}
	}
	h.awaitAllowed(a, "10.1.0.5", "10.1.0.200")
	h.awaitDelivery(a, "10.1.0.200", "10.1.0.5")
	// Another site does not reach it, because it is an address of the proxy.
	b := h.connect("b", "", netB)
	b.awaitRoutes(netProxy, netA, netip.PrefixFrom(a.own[0], 32))
	h.awaitAllowed(b, "10.2.0.5", "10.1.0.7")
	b.send("10.2.0.5", "10.1.0.200")
	b.awaitProhibited("10.2.0.5", "10.1.0.200")
	a.advertise()
	has("10.1.0.200/32", "10.9.0.7/32")
	assign()
	has()
}

// TestSiteInstallFails checks that the proxy goes on after the kernel refused
// routes, and tries again.
func TestSiteInstallFails(t *testing.T) {
	h := newHub(t, nil)
	h.kernel.FailApply(errors.New("no room"))
	a := h.connect("a", "", netA)
	h.eventually("a log line", func() bool { return len(h.log.Lines("no room")) > 0 })
	h.kernel.FailApply(nil)
	a.advertise(netA)
	h.awaitInstalled(netA)
}

// TestSiteChangesArePaced checks that a site that changes its networks all the
// time does not keep the kernel and other clients busy, and that its last
// change is applied.
func TestSiteChangesArePaced(t *testing.T) {
	h := newHub(t, nil)
	a := h.connect("a", "")
	begin := time.Now()
	for i := range 30 {
		networks := []netip.Prefix{netA}
		if i%2 == 1 {
			networks = append(networks, netA6)
		}
		before := len(h.kernel.States())
		a.advertise(networks...)
		for wait := time.Now(); len(h.kernel.States()) == before &&
			time.Since(wait) < 50*time.Millisecond; {
			time.Sleep(time.Millisecond)
		}
	}
	applied, most := len(h.kernel.States())-1,
		changeBurst+1+int(time.Since(begin).Seconds()*changeRate)
	if applied > most {
		t.Errorf("the kernel was configured %d times, want at most %d", applied, most)
	}
	h.awaitInstalled(netA, netA6)
}

// TestSiteReload checks that a reload changes the rights of sites without
// ending their sessions, and ends sessions of users who become a site or no
// longer are one.
func TestSiteReload(t *testing.T) {
	h := newHub(t, nil)
	reload := func(sites ...Site) {
		t.Helper()
		h.cfg.Sites = sites
		if restart, err := h.Reload(h.cfg); err != nil || restart != nil {
			t.Fatalf("reload: %v, %v", restart, err)
		}
	}
	sites := h.cfg.Sites
	a := h.connect("a", "", netA, netA6)
	h.connect("c", "", netB)
	h.awaitInstalled(netA, netA6)
	reload(Site{User: "a", Networks: []netip.Prefix{netA6}}, sites[1])
	h.awaitInstalled(netA6)
	a.send("10.1.0.5", "192.0.2.9")
	a.awaitProhibited("10.1.0.5", "192.0.2.9")
	reload(sites...)
	h.awaitInstalled(netA, netA6)
	h.awaitAllowed(a, "10.1.0.5", "192.0.2.9")

	reload(sites[0], Site{User: "c", Networks: []netip.Prefix{netB}})
	h.eventually("the session of c ends", func() bool { return len(h.Sessions()) == 1 })
	h.connect("c", "", netB)
	h.awaitInstalled(netA, netA6, netB)
	reload(sites[0])
	h.eventually("the session of c ends again", func() bool { return len(h.Sessions()) == 1 })
	h.awaitInstalled(netA, netA6)
	h.awaitAllowed(a, "10.1.0.5", "192.0.2.9")
}
