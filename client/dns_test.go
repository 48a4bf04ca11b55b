package client

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"masquevpn/internal/connectip"
	"masquevpn/proxy"
)

// The status shows what the proxy says about DNS, and follows it; nothing is done to the host.
func TestDNSInStatus(t *testing.T) {
	f := startProxy(t, func(c *proxy.Config) {
		c.DNS = proxy.DNS{
			Servers: []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")},
			Search:  []string{"corp.example"}, NAT64: []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")},
		}
	})
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	awaitDNS(t, n, connectip.DNSStatus{
		Servers: []string{"10.77.0.1", "fd77::1"}, Search: []string{"corp.example"}, Domains: []string{"."},
		NAT64: []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")},
	})
	if err := f.SetDNS(proxy.DNS{Servers: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, Domains: []string{"corp.example"}}); err != nil {
		t.Fatal(err)
	}
	awaitDNS(t, n, connectip.DNSStatus{Servers: []string{"192.0.2.53"}, Search: []string{}, Domains: []string{"corp.example"}, NAT64: []netip.Prefix{}})
	if err := f.SetDNS(proxy.DNS{}); err != nil {
		t.Fatal(err)
	}
	awaitDNS(t, n, connectip.DNSStatus{Servers: []string{}, Search: []string{}, Domains: []string{}, NAT64: []netip.Prefix{}})
}

// awaitDNS waits until the status says want about DNS.
func awaitDNS(t *testing.T, n *near, want connectip.DNSStatus) {
	t.Helper()
	n.await(t, fmt.Sprintf("told %+v", want), func(s Status) bool { return reflect.DeepEqual(s.DNS, want) })
}
