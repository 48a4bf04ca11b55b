package nat64

import (
	"net/netip"
	"slices"
	"testing"
)

// TestEmbed has the examples of RFC 6052 section 2.4, among others.
func TestEmbed(t *testing.T) {
	addr := netip.MustParseAddr("192.0.2.33")
	for prefix, want := range map[string]string{
		"2001:db8::/32":             "2001:db8:c000:221::",
		"2001:db8:100::/40":         "2001:db8:1c0:2:21::",
		"2001:db8:122::/48":         "2001:db8:122:c000:2:2100::",
		"2001:db8:122:300::/56":     "2001:db8:122:3c0:0:221::",
		"2001:db8:122:344::/64":     "2001:db8:122:344:c0:2:2100::",
		"2001:db8:122:344::/96":     "2001:db8:122:344::192.0.2.33",
		"64:ff9b::/96":              "64:ff9b::192.0.2.33",
		"2001:db8::/33":             "",
		"2001:db8::/128":            "",
		"10.0.0.0/8":                "",
		"2001:db8:0:0:100::/96":     "", // the reserved byte is not zero
		"2001:db8:1:2:ff00::1/96":   "",
		"2001:db8:122:344::1/64":    "2001:db8:122:344:c0:2:2100::", // host bits ignored
		"2001:db8:122:344:0:1::/96": "2001:db8:122:344:0:1:192.0.2.33",
	} {
		t.Run(prefix, func(t *testing.T) {
			got, ok := Embed(netip.MustParsePrefix(prefix), addr)
			if ok != (want != "") || ok && got != netip.MustParseAddr(want) {
				t.Errorf("got %v, %t, want %q", got, ok, want)
			}
		})
	}
	if _, ok := Embed(netip.MustParsePrefix("64:ff9b::/96"),
		netip.MustParseAddr("2001:db8::1")); ok {
		t.Error("Embed accepted an IPv6 address")
	}
	if _, ok := Embed(netip.Prefix{}, addr); ok {
		t.Error("Embed accepted the zero Prefix")
	}
}

func TestPrefixes(t *testing.T) {
	for _, tt := range []struct {
		name          string
		answers, want []string
	}{
		{"no answers", nil, nil},
		{"the well-known prefix", []string{"64:ff9b::192.0.0.170", "64:ff9b::192.0.0.171"},
			[]string{"64:ff9b::/96"}},
		{"one address", []string{"64:ff9b::192.0.0.171"}, []string{"64:ff9b::/96"}},
		{"another IPv4 address", []string{"64:ff9b::192.0.2.33"}, nil},
		{"two translators", []string{"64:ff9b::192.0.0.170", "2001:db8:122:344::192.0.0.170"},
			[]string{"64:ff9b::/96", "2001:db8:122:344::/96"}},
		{"/32", []string{"2001:db8:c000:aa::"}, []string{"2001:db8::/32"}},
		{"/40", []string{"2001:db8:1c0:0:aa::"}, []string{"2001:db8:100::/40"}},
		{"/48", []string{"2001:db8:122:c000:0:aa00::"}, []string{"2001:db8:122::/48"}},
		{"/56", []string{"2001:db8:122:3c0:0:aa::"}, []string{"2001:db8:122:300::/56"}},
		{"/64", []string{"2001:db8:122:344:c0:0:ab00::"}, []string{"2001:db8:122:344::/64"}},
		{"/64 with nonzero bits after the IPv4 address", []string{"2001:db8:122:344:c0:0:ab00:1"},
			[]string{"2001:db8:122:344::/64"}},
		{"the reserved byte is not zero", []string{"2001:db8:122:344:1c0:0:ab00::"}, nil},
		{"one well-known address twice", []string{"2001:db8:c000:aa::c000:aa"}, nil},
		{"both well-known addresses in one", []string{"2001:db8:c000:aa::c000:ab"}, nil},
		{"IPv4", []string{"192.0.0.170"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var answers []netip.Addr
			for _, a := range tt.answers {
				answers = append(answers, netip.MustParseAddr(a))
			}
			var want []netip.Prefix
			for _, p := range tt.want {
				want = append(want, netip.MustParsePrefix(p))
			}
			if got := Prefixes(answers); !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

// TestPrefixesOfEmbedded checks that Prefixes finds the prefix given to Embed.
func TestPrefixesOfEmbedded(t *testing.T) {
	for _, bits := range lengths {
		p := netip.PrefixFrom(netip.MustParseAddr("2001:db8:1234:5678::"), bits).Masked()
		for _, addr := range wellKnown {
			a, _ := Embed(p, addr)
			if got := Prefixes([]netip.Addr{a}); !slices.Equal(got, []netip.Prefix{p}) {
				t.Errorf("Prefixes of %v: got %v, want %v", a, got, p)
			}
		}
	}
}
