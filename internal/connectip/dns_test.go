package connectip

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"masquevpn/capsule"
)

// DNS_ASSIGN and PREF64 capsules work in both directions, and each replaces the
// previous one.
func TestDNSAndPREF64(t *testing.T) {
	client, proxy := newPair(t, Config{}, Config{})
	corp := []capsule.DNSConfiguration{{
		Nameservers: []capsule.Nameserver{{Priority: 1,
			Addresses: []netip.Addr{proxyAddr4, proxyAddr6}}},
		InternalDomains: []string{"corp.example"},
		SearchDomains:   []string{"corp.example", "example"},
	}}
	wellKnown := []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")}
	for _, tc := range []struct {
		name     string
		from, to *end
	}{{"to the client", proxy, client}, {"to the proxy", client, proxy}} {
		t.Run(tc.name, func(t *testing.T) {
			for _, want := range [][]capsule.DNSConfiguration{corp, nil} {
				if err := tc.from.AssignDNS(want); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, <-tc.to.dns, cmpopts.EquateComparable(netip.Addr{}),
					cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
			for _, want := range [][]netip.Prefix{wellKnown, nil} {
				if err := tc.from.SendPREF64(want); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, <-tc.to.pref64, cmpopts.EquateComparable(netip.Prefix{}),
					cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
		})
	}
	if err := proxy.AssignDNS([]capsule.DNSConfiguration{{}}); err == nil {
		t.Error("a configuration without nameservers was sent")
	}
	if err := proxy.SendPREF64([]netip.Prefix{netip.MustParsePrefix("64:ff9b::/95")}); err == nil {
		t.Error("a prefix with a length that NAT64 does not allow was sent")
	}
}
