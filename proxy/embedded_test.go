package proxy

import (
	"net/netip"
	"slices"
	"testing"
)

// TestEmbedding has the examples of RFC 6052 section 2.4, and prefixes that end
// before, in and after the skipped byte.
func TestEmbedding(t *testing.T) {
	for _, tc := range []struct{ below, prefix, want string }{
		{"2001:db8::/32", "192.0.2.33/32", "2001:db8:c000:221::/64"},
		{"2001:db8:100::/40", "192.0.2.33/32", "2001:db8:1c0:2:21::/80"},
		{"2001:db8:122::/48", "192.0.2.33/32", "2001:db8:122:c000:2:2100::/88"},
		{"2001:db8:122:300::/56", "192.0.2.33/32", "2001:db8:122:3c0:0:221::/96"},
		{"2001:db8:122:344::/64", "192.0.2.33/32", "2001:db8:122:344:c0:2:2100:0/104"},
		{"2001:db8:122:344::/96", "192.0.2.33/32", "2001:db8:122:344::c000:221/128"},
		{"64:ff9b::/96", "127.0.0.0/8", "64:ff9b::7f00:0/104"},
		{"64:ff9b::/96", "0.0.0.0/0", "64:ff9b::/96"},
		{"2001:db8:122::/48", "169.254.0.0/16", "2001:db8:122:a9fe::/64"},
		{"2001:db8:122::/48", "169.254.0.0/17", "2001:db8:122:a9fe::/73"},
		{"2001:db8:122:344::/64", "10.0.0.0/8", "2001:db8:122:344:a::/80"},
		{"2001:db8:122:344::/64", "0.0.0.0/0", "2001:db8:122:344::/64"},
	} {
		t.Run(tc.prefix+" under "+tc.below, func(t *testing.T) {
			e := embedding{netip.MustParsePrefix(tc.below), true, false}
			if got := e.embed(netip.MustParsePrefix(tc.prefix)); got.String() != tc.want {
				t.Errorf("got %v, want %s", got, tc.want)
			}
		})
	}
	sixToFour := embedding{netip.MustParsePrefix("2002::/16"), false, false}
	got := sixToFour.embed(netip.MustParsePrefix("192.0.2.33/32"))
	if got.String() != "2002:c000:221::/48" {
		t.Errorf("6to4: got %v, want 2002:c000:221::/48", got)
	}
}

// TestDeniedByOtherNames checks that IPv6 addresses that embed a denied IPv4
// address are denied.
func TestDeniedByOtherNames(t *testing.T) {
	h := newHub(t, func(c *Config) {
		c.Deny = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
		c.DNS = DNS{Servers: []netip.Addr{netip.MustParseAddr("192.0.2.53")},
			NAT64: []netip.Prefix{netip.MustParsePrefix("2001:db8:64::/48")}}
	})
	for _, tc := range []struct {
		addr   string
		denied bool
	}{
		{"203.0.113.7", true}, {"8.8.8.8", false},
		{"64:ff9b::203.0.113.7", true}, {"64:ff9b::a9fe:a9fe", true}, {"64:ff9b::192.0.2.1", true},
		{"64:ff9b::8.8.8.8", false},
		{"64:ff9b:1:cb00:71:700::", true}, {"64:ff9b:1:cb:0:7107::", true},
		{"64:ff9b:1:0:cb:71:700:0", true},
		{"64:ff9b:1::203.0.113.7", true}, {"64:ff9b:1::8.8.8.8", false},
		{"2001:db8:64:cb00:71:700::", true}, {"2001:db8:64:808:8:800::", false},
		{"::ffff:203.0.113.7", true}, {"::203.0.113.7", true}, {"::1", true},
		{"2002:cb00:7107::1", true}, {"2002:7f00:1::1", true}, {"2002:808:808::1", false},
	} {
		t.Run(tc.addr, func(t *testing.T) {
			a := netip.MustParseAddr(tc.addr)
			denied := h.access.deniedNow()
			for kind, list := range map[string][]netip.Prefix{"clients": denied.clients,
				"sites": denied.sites} {
				if got := slices.ContainsFunc(list, func(p netip.Prefix) bool {
					return p.Contains(a)
				}); got != tc.denied {
					t.Errorf("denied to %s: got %v, want %v", kind, got, tc.denied)
				}
			}
		})
	}
}
