package client

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"testing"

	"masquevpn/internal/discovery"
	"masquevpn/internal/dnstest"
)

// nameserver starts a nameserver with the addresses in records, by name, and
// returns its address.
func nameserver(t *testing.T, records map[string][]string) netip.AddrPort {
	t.Helper()
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dnstest.Serve(t, socket, func(name string) (addrs []netip.Addr, err error) {
		for _, text := range records[name+"."] {
			addrs = append(addrs, netip.MustParseAddr(text))
		}
		if addrs == nil {
			err = dnstest.ErrNotFound
		}
		return addrs, err
	})
	return socket.LocalAddr().(*net.UDPAddr).AddrPort()
}

// On a network with NAT64 and without IPv4, the client tries the proxy's IPv4
// address through the translator first (RFC 7050).
func TestNAT64(t *testing.T) {
	translator := []string{"64:ff9b::192.0.0.170", "64:ff9b::192.0.0.171"}
	for name, tc := range map[string]struct {
		proxy      string
		records    map[string][]string
		ipv4, ipv6 bool // the host has a route of the family
		want       []string
	}{
		"an IPv4 address": {"192.0.2.33", map[string][]string{"ipv4only.arpa.": translator},
			false, true,
			[]string{"[64:ff9b::192.0.2.33]:443", "192.0.2.33:443"}},
		"with a port": {"192.0.2.33:4433", map[string][]string{"ipv4only.arpa.": translator},
			false, true,
			[]string{"[64:ff9b::192.0.2.33]:4433", "192.0.2.33:4433"}},
		"another prefix": {"192.0.2.33",
			map[string][]string{"ipv4only.arpa.": {"2001:db8:122:c000:0:aa00::"}}, false, true,
			[]string{"[2001:db8:122:c000:2:2100::]:443", "192.0.2.33:443"}},
		"a host with IPv4": {"192.0.2.33", map[string][]string{"ipv4only.arpa.": translator},
			true, true, []string{"192.0.2.33:443"}},
		"no translator": {"192.0.2.33", nil, false, true, []string{"192.0.2.33:443"}},
		"another IPv4 address": {"192.0.2.33",
			map[string][]string{"ipv4only.arpa.": {"64:ff9b::192.0.2.1"}}, false, true,
			[]string{"192.0.2.33:443"}},
		"an IPv6 address": {"[2001:db8::1]:443", map[string][]string{"ipv4only.arpa.": translator},
			false, true, []string{"[2001:db8::1]:443"}},
		"a name with an IPv4 address": {"vpn.example",
			map[string][]string{"ipv4only.arpa.": translator, "vpn.example.": {"192.0.2.33"}},
			false, true,
			[]string{"[64:ff9b::192.0.2.33]:443", "192.0.2.33:443"}},
		"a name with both": {"vpn.example",
			map[string][]string{"ipv4only.arpa.": translator,
				"vpn.example.": {"192.0.2.33", "2001:db8::1"}}, false, true,
			[]string{"[2001:db8::1]:443", "192.0.2.33:443"}},
	} {
		t.Run(name, func(t *testing.T) {
			to, err := parseProxy(tc.proxy, nil)
			if err != nil {
				t.Fatal(err)
			}
			d := newDialer(to, nil, "", nil, slog.New(slog.DiscardHandler))
			d.trusted = []netip.AddrPort{nameserver(t, tc.records)}
			d.target.query.Method = discovery.Addresses
			d.hasRoute = func(a netip.Addr) bool { return a.Is4() && tc.ipv4 || a.Is6() && tc.ipv6 }
			r, err := d.resolver.Resolve(t.Context(), d.target.query)
			if err != nil {
				t.Fatal(err)
			}
			d.translated(t.Context(), r)
			got := d.lastAddrs
			var want []netip.AddrPort
			for _, a := range tc.want {
				want = append(want, netip.MustParseAddrPort(a))
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}
