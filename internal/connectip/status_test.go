package connectip

import (
	"encoding/json"
	"maps"
	"net/netip"
	"testing"

	"masquevpn/capsule"
)

// SetDNS lists nameservers by priority, without duplicates and without those
// that answer only encrypted queries.
func TestSetDNS(t *testing.T) {
	addr := netip.MustParseAddr
	var s Status
	s.SetDNS([]capsule.DNSConfiguration{
		{
			Nameservers: []capsule.Nameserver{
				{Priority: 3, Addresses: []netip.Addr{addr("192.0.2.3")}, Port: 5353},
				{Priority: 1, Addresses: []netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")},
					AuthName: "a", ALPN: []string{"dot"}},
				{Priority: 2, Addresses: []netip.Addr{addr("192.0.2.2")}, AuthName: "b",
					ALPN: []string{"dot"}, NoDefaultALPN: true},
				{Priority: 2, Addresses: []netip.Addr{addr("2001:db8::1"), addr("2001:db8::2")},
					Port: 53},
			},
			InternalDomains: []string{"corp.example", ""},
			SearchDomains:   []string{"b.example", "a.example"},
		},
		{Nameservers: []capsule.Nameserver{{Priority: 1,
			Addresses: []netip.Addr{addr("192.0.2.4")}}}, InternalDomains: []string{"corp.example"},
			SearchDomains: []string{"a.example"}},
	}, []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")})
	const want = `{"servers":["192.0.2.1","2001:db8::1","2001:db8::2","192.0.2.3:5353",` +
		`"192.0.2.4"],"search":["b.example","a.example"],` +
		`"domains":["corp.example","."],"nat64":["64:ff9b::/96"],"applied":false}`
	if got, err := json.Marshal(s.DNS); err != nil || string(got) != want {
		t.Errorf("got  %s, %v\nwant %s", got, err, want)
	}
	s.SetDNS(nil, nil)
	const none = `{"servers":[],"search":[],"domains":[],"nat64":[],"applied":false}`
	if got, err := json.Marshal(s.DNS); err != nil || string(got) != none {
		t.Errorf("got  %s, %v\nwant %s", got, err, none)
	}
}

// SetTraffic always includes drops.too_big, because scripts read it.
func TestSetTraffic(t *testing.T) {
	var st Status
	s := new(Stats)
	st.SetTraffic(s)
	if want := map[string]uint64{"too_big": 0}; !maps.Equal(st.Drops, want) {
		t.Errorf("nothing dropped: %v", st.Drops)
	}
	s.Send.drops[DropTooBig].Add(2)
	s.Receive.drops[DropTooBig].Add(3)
	s.Receive.drops[DropSource].Add(1)
	st.SetTraffic(s)
	if want := map[string]uint64{"too_big": 5, "source": 1}; !maps.Equal(st.Drops, want) {
		t.Errorf("dropped: %v", st.Drops)
	}
}
