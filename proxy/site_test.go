package proxy

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go4.org/netipx"
	"pgregory.net/rapid"

	"masquevpn/capsule"
	"masquevpn/routing"
)

// TestSiteConfig checks that the error for a wrong site names its key.
func TestSiteConfig(t *testing.T) {
	good := Site{User: "a", Networks: []netip.Prefix{netA}}
	for key, sites := range map[string][]Site{
		"site[0].user":     {{Networks: good.Networks}},
		"site[1].user":     {good, {User: "a", Networks: []netip.Prefix{netB}}},
		"site[0].networks": {{User: "a"}},
		"site[0].networks ": {{User: "a",
			Networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}}},
		"site[1].networks": {good, {User: "b",
			Networks: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}},
		"site[0].peer": {{User: "a", Networks: good.Networks,
			Peer: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/24")}}},
		"site[0].reach": {{User: "a", Networks: good.Networks, Reach: []netip.Prefix{{}}}},
	} {
		t.Run(key, func(t *testing.T) {
			_, err := Config{Methods: []string{MethodToken}, Sites: sites}.rights()
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindUsage ||
				e.Key != strings.TrimSpace(key) {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, err := (Config{Methods: []string{MethodNone},
		Sites: []Site{good}}).rights(); err == nil {
		t.Error("a site without authentication is accepted")
	}
}

// TestSiteProperties checks that for any order of changes each site is granted
// only networks that it advertised and may have, which are disjoint from the
// networks of other sites, the pool and the host.
func TestSiteProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
			a := netip.AddrFrom4([4]byte{10, byte(rapid.IntRange(0, 3).Draw(t, "net")),
				byte(rapid.IntRange(0, 3).Draw(t, "subnet")),
				byte(rapid.IntRange(0, 255).Draw(t, "host"))})
			return netip.PrefixFrom(a, rapid.IntRange(13, 32).Draw(t, "bits")).Masked()
		})
		reserved := []reservedNetwork{{prefix.Draw(t, "pool"), "pool"},
			{prefix.Draw(t, "host"), "host"}}
		tab := newTable()
		s := newSites(tab.remove, map[owner]*rights{})
		var running []*claim
		session := make(map[*claim]*ipSession)
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			switch n := rapid.IntRange(0, 5).Draw(t, "step"); {
			case n == 0 || len(running) == 0:
				user := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "user")
				networks := rapid.SliceOfN(prefix, 1, 4).Draw(t, "networks")
				ss := new(ipSession)
				c := quietClaim(user, func(p netip.Prefix) { tab.insert(p, ss) })
				session[c] = ss
				var replaced []*claim
				for _, old := range running {
					if old.owner.user == user && rapid.Bool().Draw(t, "replaces") {
						replaced = append(replaced, old)
					}
				}
				s.add(c, replaced)
				c.rights = &rights{networks: networks, assign: setOf(networks)}
				running = append(running, c)
			case n == 1:
				i := rapid.IntRange(0, len(running)-1).Draw(t, "end")
				s.remove(running[i])
				running = slices.Delete(running, i, i+1)
			case n == 2:
				s.assign(rapid.SampledFrom(running).Draw(t, "who"),
					rapid.SliceOfN(prefix, 0, 4).Draw(t, "assigned"))
			default:
				s.advertise(rapid.SampledFrom(running).Draw(t, "who"),
					capsule.Routes(rapid.SliceOfN(prefix, 0, 6).Draw(t, "advertised"), 0))
			}
			l := s.decide(reserved)
			var union netipx.IPSetBuilder
			seen := new(netipx.IPSet)
			for _, c := range running {
				advertised := setOfRoutes(c.advertised)
				for _, p := range c.granted.prefixes {
					if seen.OverlapsPrefix(p) || !advertised.ContainsPrefix(p) ||
						reserved[0].prefix.Overlaps(p) || reserved[1].prefix.Overlaps(p) {
						t.Fatalf("%s is granted %v, advertised %v", c.owner, p, c.advertised)
					}
					if to, ok := tab.lookup(p.Addr()); !ok || to != session[c] {
						t.Fatalf("%v is routed to %v", p, to)
					}
				}
				for _, a := range c.granted.assigned {
					if !a.IsSingleIP() || !c.rights.assign.ContainsPrefix(a) ||
						reserved[0].prefix.Overlaps(a) || reserved[1].prefix.Overlaps(a) {
						t.Fatalf("%s assigned %v", c.owner, a)
					}
				}
				if !setOf(c.rights.networks).Equal(unionOf(setOf(c.rights.networks),
					c.granted.networks)) {
					t.Fatalf("%s may have %v, is granted %v", c.owner, c.rights.networks,
						c.granted.prefixes)
				}
				union.AddSet(c.granted.networks)
				seen, _ = union.IPSet()
			}
			if !setOf(l.networks).Equal(seen) {
				t.Fatalf("the kernel gets %v, the sites have %v", l.networks, seen.Prefixes())
			}
			if n := tab.version.Load().Size(); n != len(l.networks) {
				t.Fatalf("the table has %d entries for %v", n, l.networks)
			}
		}
	})
}

// quietClaim returns a claim of a session of user that logs nothing.
func quietClaim(user string, route func(netip.Prefix)) *claim {
	c := newClaim(owner{user: user}, route)
	c.log = slog.New(slog.DiscardHandler)
	return c
}

// setOfRoutes returns the set of the addresses in routes.
func setOfRoutes(routes []capsule.Route) *netipx.IPSet {
	var b netipx.IPSetBuilder
	for _, r := range routes {
		b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
	}
	s, _ := b.IPSet()
	return s
}

// unionOf returns the set of the addresses in any of sets.
func unionOf(sets ...*netipx.IPSet) *netipx.IPSet {
	var b netipx.IPSetBuilder
	for _, s := range sets {
		b.AddSet(s)
	}
	s, _ := b.IPSet()
	return s
}

// TestSiteIsBounded checks the limits on the routes and the log lines that one
// site can cause.
func TestSiteIsBounded(t *testing.T) {
	everything := []netip.Prefix{netip.MustParsePrefix("8000::/1")}
	c := quietClaim("a", nil)
	c.rights = &rights{networks: everything, assign: setOf(everything)}
	a := netip.MustParseAddr("8000::1")
	for range 3000 {
		c.advertised = append(c.advertised, capsule.Route{Start: a, End: a.Next().Next().Next()})
		a = a.Next().Next().Next().Next().Next()
	}
	wide := capsule.Route{Start: netip.MustParseAddr("8000:1::1"),
		End: netip.MustParseAddr("ffff::ffff:ffff:ffff:fffe")}
	for name, advertised := range map[string][]capsule.Route{"many": c.advertised,
		"wide": append([]capsule.Route{wide}, c.advertised...)} {
		t.Run(name, func(t *testing.T) {
			c.advertised = advertised
			g := c.decide(nil, nil, routing.MaxRoutes)
			if len(g.prefixes) > maxSitePrefixes || len(g.routes) > maxSiteRanges ||
				len(g.prefixes) < 256 {
				t.Errorf("%d prefixes of %d ranges", len(g.prefixes), len(g.routes))
			}
			if len(g.refusals) == 0 || len(g.refusals) > maxRefusals+1 ||
				len(strings.Join(g.refusals, "; ")) > 1000 {
				t.Errorf("%d refusals: %q", len(g.refusals), g.refusals)
			}
		})
	}
	same := quietClaim("a", nil)
	same.rights = c.rights
	same.advertised = c.advertised[1000:1200]
	c.granted = c.decide(nil, nil, routing.MaxRoutes)
	if g := same.decide(nil, []*claim{c}, routing.MaxRoutes); len(g.prefixes)+
		len(c.granted.prefixes) > maxSitePrefixes {
		t.Errorf("two sessions of a site make %d prefixes", len(g.prefixes)+len(c.granted.prefixes))
	}
}
