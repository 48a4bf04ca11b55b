package connectip

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"masquevpn/capsule"
)

// What is said about DNS and NAT64 arrives, in both directions, and the last
// word counts.
func TestDNSAndPREF64(t *testing.T) {
	client, proxy := newPair(t, Config{}, Config{})
	corp := []capsule.DNSConfiguration{{
		Nameservers: []capsule.Nameserver{{Priority: 1,
			Addresses: []netip.Addr{proxyAddr4, proxyAddr6}}},
		InternalDomains: []string{"corp.example"},
		SearchDomains:   []string{"corp.example", "example"},
	}}
	wellKnown := []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")}
	for _, way := range []struct {
		name     string
		from, to *end
	}{{"to the client", proxy, client}, {"to the proxy", client, proxy}} {
		t.Run(way.name, func(t *testing.T) {
			for _, want := range [][]capsule.DNSConfiguration{corp, nil} {
				if err := way.from.AssignDNS(want); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, <-way.to.dns, cmpopts.EquateComparable(netip.Addr{}),
					cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
			for _, want := range [][]netip.Prefix{wellKnown, nil} {
				if err := way.from.SendPREF64(want); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, <-way.to.pref64, cmpopts.EquateComparable(netip.Prefix{}),
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
		t.Error("a prefix of a length that NAT64 does not have was sent")
	}
}
