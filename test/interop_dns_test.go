package test

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	foreign "github.com/quic-go/connect-ip-go"
	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/client"
	"masquevpn/internal/connectip"
	"masquevpn/proxy"
)

// DNS_ASSIGN and PREF64 (draft-ietf-masque-connect-ip-dns-06) between our
// endpoints and connect-ip-go.

var (
	wellKnown = netip.MustParsePrefix("64:ff9b::/96")
	nsp       = netip.MustParsePrefix("2001:db8:122::/48")
)

// connect-ip-go as the client receives the DNS configuration of our proxy, and
// its removal.
func TestForeignClientGetsDNS(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dns := proxy.DNS{
		Servers: []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")},
		Domains: []string{"corp.example"}, Search: []string{"a.corp.example", "corp.example"},
		NAT64: []netip.Prefix{wellKnown, nsp},
	}
	conn, s, _ := foreignClient(t, ctx, func(c *proxy.Config) { c.DNS = dns })
	got, err := conn.ReceiveDNSConfiguration(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []foreign.DNSConfiguration{{
		Nameservers: []foreign.DNSNameserver{
			{ServicePriority: 1, IPv4Addresses: dns.Servers[:1]},
			{ServicePriority: 2, IPv6Addresses: dns.Servers[1:]},
		},
		InternalDomains: dns.Domains, SearchDomains: dns.Search,
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	prefixes, err := conn.ReceivePREF64Configuration(ctx)
	if err != nil || !slices.Equal(prefixes, dns.NAT64) {
		t.Errorf("got %v, %v", prefixes, err)
	}
	if err := s.SetDNS(proxy.DNS{}); err != nil {
		t.Fatal(err)
	}
	if got, err := conn.ReceiveDNSConfiguration(ctx); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v, want none", got, err)
	}
	if got, err := conn.ReceivePREF64Configuration(ctx); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v, want none", got, err)
	}
}

// Our client reports the DNS configuration of connect-ip-go as the proxy, and
// its removal.
func TestForeignProxySendsDNS(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, c, _ := foreignProxy(t, ctx)
	awaitDNS := func(want connectip.DNSStatus) {
		t.Helper()
		for changed := c.Changed(); !reflect.DeepEqual(c.Status().DNS,
			want); changed = c.Changed() {
			select {
			case <-changed:
			case <-ctx.Done():
				t.Fatalf("got %+v, want %+v", c.Status().DNS, want)
			}
		}
	}
	if err := conn.SendDNSConfiguration([]foreign.DNSConfiguration{
		{
			Nameservers: []foreign.DNSNameserver{
				{
					ServicePriority:          2,
					IPv4Addresses:            []netip.Addr{netip.MustParseAddr("192.0.2.53")},
					IPv6Addresses:            []netip.Addr{netip.MustParseAddr("2001:db8::53")},
					AuthenticationDomainName: "dns.example",
					ServiceParameters: map[dnsmessage.SVCParamKey][]byte{
						dnsmessage.SVCParamALPN:    []byte("\x02h2\x03dot"),
						dnsmessage.SVCParamDOHPath: []byte("/dns-query{?dns}"),
						65280:                      []byte("private"),
					},
				},
				{ServicePriority: 1, IPv4Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.1")},
					ServiceParameters: map[dnsmessage.SVCParamKey][]byte{dnsmessage.SVCParamPort: {0x14, 0xe9}}},
				{
					ServicePriority: 3, AuthenticationDomainName: "doh.example",
					ServiceParameters: map[dnsmessage.SVCParamKey][]byte{
						dnsmessage.SVCParamALPN:          []byte("\x02h3"),
						dnsmessage.SVCParamNoDefaultALPN: nil,
						dnsmessage.SVCParamDOHPath:       []byte("/{?dns}"),
					},
				},
			},
			InternalDomains: []string{""},
		},
		{
			Nameservers: []foreign.DNSNameserver{{ServicePriority: 1,
				IPv6Addresses: []netip.Addr{netip.MustParseAddr("fd77::1")}}},
			InternalDomains: []string{"corp.example"}, SearchDomains: []string{"corp.example"},
		},
	}); err != nil {
		t.Fatal(err)
	}
	if err := conn.SendPREF64Configuration([]netip.Prefix{nsp, wellKnown}); err != nil {
		t.Fatal(err)
	}
	awaitDNS(connectip.DNSStatus{
		Servers: []string{"10.77.0.1:5353", "192.0.2.53", "2001:db8::53", "fd77::1"},
		Search:  []string{"corp.example"}, Domains: []string{".", "corp.example"},
		NAT64: []netip.Prefix{nsp, wellKnown},
	})
	if err := conn.SendDNSConfiguration(nil); err != nil {
		t.Fatal(err)
	}
	if err := conn.SendPREF64Configuration(nil); err != nil {
		t.Fatal(err)
	}
	awaitDNS(connectip.DNSStatus{Servers: []string{}, Search: []string{}, Domains: []string{},
		NAT64: []netip.Prefix{}})
	if s := c.Status(); s.State == client.StateFailed {
		t.Errorf("the client failed: %+v", s)
	}
}

// Our proxy ignores a DNS configuration that a client sends.
func TestForeignClientSendsDNS(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, _, _ := foreignClient(t, ctx, nil)
	if err := conn.SendDNSConfiguration([]foreign.DNSConfiguration{{
		Nameservers: []foreign.DNSNameserver{{ServicePriority: 1,
			IPv4Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.53")}}},
	}}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestAddresses([]netip.Prefix{any4}); err != nil {
		t.Fatal(err)
	}
	if assigned, err := conn.ReceiveAddressAssignment(ctx); err != nil || len(assigned) != 1 {
		t.Errorf("assigned %v, %v", assigned, err)
	}
}
