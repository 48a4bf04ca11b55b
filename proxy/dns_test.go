package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
)

var corp = DNS{
	Servers: []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::53"),
		netip.MustParseAddr("192.0.2.53")},
	Search: []string{"corp.example"},
	NAT64:  []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96")},
}

// dualStack configures both families and corp.
func dualStack(c *Config) {
	c.Pool6, c.DNS = netip.MustParsePrefix("fd77::/64"), corp
}

// configuration returns the DNS_ASSIGN capsule for servers.
func configuration(domains, search []string, servers ...string) *capsule.DNSAssign {
	c := capsule.DNSConfiguration{InternalDomains: domains, SearchDomains: search}
	for i, s := range servers {
		c.Nameservers = append(c.Nameservers,
			capsule.Nameserver{Priority: uint16(i + 1),
				Addresses: []netip.Addr{netip.MustParseAddr(s)}})
	}
	return &capsule.DNSAssign{Configurations: []capsule.DNSConfiguration{c}}
}

// reader returns a Reader of the capsules on str, with a deadline.
func reader(t *testing.T, str *http3.RequestStream) *capsule.Reader {
	t.Helper()
	if err := str.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return capsule.NewReader(str, 1<<16)
}

// wantCapsules reads capsules and compares them with want.
func wantCapsules(t *testing.T, r *capsule.Reader, want ...capsule.Capsule) {
	t.Helper()
	for _, w := range want {
		got, err := r.Next()
		if err != nil {
			t.Fatalf("%v, want %v", err, w)
		}
		if diff := cmp.Diff(w, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}),
			cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	}
}

// TestDNSIsPushed checks that clients get DNS and NAT64 settings after the
// routes, and again after each change.
func TestDNSIsPushed(t *testing.T) {
	s := startServer(t, dualStack)
	_, h3 := s.dial(t, nil)
	_, str := request(t, h3, "CONNECT", "connect-ip", anyPath, nil)
	r := reader(t, str)
	everything := &capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}, 0)}
	wantCapsules(t, r, everything, configuration([]string{""}, corp.Search, "10.77.0.1", "fd77::53",
		"192.0.2.53"), &capsule.PREF64{Prefixes: corp.NAT64})
	if got := s.Sessions()[0].DNS; len(got.Servers) != 3 ||
		!slices.Equal(got.Domains, []string{"."}) || got.Applied {
		t.Errorf("status %+v", got)
	}

	for _, step := range []struct {
		dns  DNS
		want []capsule.Capsule
	}{
		{corp, nil}, // no change
		{DNS{Servers: corp.Servers[:1], Domains: []string{"corp.example"}, NAT64: corp.NAT64},
			[]capsule.Capsule{configuration([]string{"corp.example"}, nil, "10.77.0.1")}},
		{DNS{Servers: corp.Servers[:1], Domains: []string{"corp.example"}},
			[]capsule.Capsule{&capsule.PREF64{}}},
		{DNS{}, []capsule.Capsule{&capsule.DNSAssign{}}},
		{DNS{Servers: corp.Servers[1:2]},
			[]capsule.Capsule{configuration([]string{""}, nil, "fd77::53")}},
	} {
		if err := s.SetDNS(step.dns); err != nil {
			t.Fatal(err)
		}
		wantCapsules(t, r, step.want...)
	}
	if err := s.SetDNS(DNS{Search: []string{"corp.example"}}); err == nil {
		t.Error("domains without servers were accepted")
	}
	if err := s.SetDNS(DNS{}); err != nil {
		t.Fatal(err)
	}
	wantCapsules(t, r, &capsule.DNSAssign{})
}

// TestDNSFollowsScopeAndAddresses checks that a client gets no server outside
// the scope of its request or of a family without an address.
func TestDNSFollowsScopeAndAddresses(t *testing.T) {
	s := startServer(t, dualStack)
	_, h3 := s.dial(t, nil)
	for _, tc := range []struct {
		name, path string
		want       []capsule.Capsule
	}{
		{"target", "/.well-known/masque/ip/192.0.2.0%2F24/*/",
			[]capsule.Capsule{configuration([]string{""}, corp.Search, "192.0.2.53")}},
		{"UDP", "/.well-known/masque/ip/192.0.2.53/17/",
			[]capsule.Capsule{configuration([]string{""}, corp.Search, "192.0.2.53")}},
		{"TCP", "/.well-known/masque/ip/192.0.2.53/6/", nil},
		{"elsewhere", "/.well-known/masque/ip/198.51.100.0%2F24/*/", nil},
		{"NAT64", "/.well-known/masque/ip/64%3Aff9b%3A%3A%2F96/*/",
			[]capsule.Capsule{&capsule.PREF64{Prefixes: corp.NAT64}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rsp, str := request(t, h3, "CONNECT", "connect-ip", tc.path, nil)
			if rsp.StatusCode != http.StatusOK {
				t.Fatalf("status %d", rsp.StatusCode)
			}
			r := reader(t, str)
			nextRoutes(t, r)
			wantCapsules(t, r, tc.want...)
			// The next capsule is the answer to this request, not DNS.
			ask := &capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1,
				Prefix: netip.MustParsePrefix("0.0.0.0/32")}}}
			if _, err := str.Write(ask.Append(nil)); err != nil {
				t.Fatal(err)
			}
			if c, err := r.Next(); err != nil || c.Type() != capsule.TypeAddressAssign {
				t.Errorf("got %v, %v, want an assignment", c, err)
			}
			_ = str.Close()
		})
	}
	t.Run("IPv4 alone", func(t *testing.T) {
		_, str := request(t, h3, "CONNECT", "connect-ip", anyPath, nil)
		r := reader(t, str)
		nextRoutes(t, r)
		wantCapsules(t, r, configuration([]string{""}, corp.Search, "10.77.0.1", "fd77::53",
			"192.0.2.53"), &capsule.PREF64{Prefixes: corp.NAT64})
		ask := &capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1,
			Prefix: netip.MustParsePrefix("0.0.0.0/32")}}}
		if _, err := str.Write(ask.Append(nil)); err != nil {
			t.Fatal(err)
		}
		nextRoutes(t, r)
		wantCapsules(t, r, configuration([]string{""}, corp.Search, "10.77.0.1", "192.0.2.53"),
			&capsule.PREF64{})
	})
}

// TestWarnsOfUnreachableDNS checks that the log has one warning about each
// server that clients cannot reach.
func TestWarnsOfUnreachableDNS(t *testing.T) {
	var log bytes.Buffer
	startServer(t, func(c *Config) {
		dualStack(c)
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("198.51.100.0/24")}
		c.Deny = []netip.Prefix{netip.MustParsePrefix("198.51.100.128/25")}
		c.LocalNetworks = func() ([]netip.Prefix, error) {
			return []netip.Prefix{netip.MustParsePrefix("192.0.2.53/24")}, nil
		}
		c.DNS.Servers = append(slices.Clone(c.DNS.Servers), netip.MustParseAddr("198.51.100.129"),
			netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1"))
	})
	want := map[string]string{
		"10.77.0.1": "", "198.51.100.1": "",
		"fd77::53": "do not reach", "203.0.113.1": "do not reach", "64:ff9b::/96": "do not reach",
		"192.0.2.53": "may not reach", "198.51.100.129": "may not reach",
	}
	for server, reason := range want {
		t.Run(server, func(t *testing.T) {
			var lines []string
			for line := range strings.Lines(log.String()) {
				if strings.Contains(line, "="+server+"\n") {
					lines = append(lines, line)
				}
			}
			if reason == "" && len(lines) > 0 ||
				reason != "" && (len(lines) != 1 || !strings.Contains(lines[0], reason)) {
				t.Errorf("got %q, want a warning with %q", lines, reason)
			}
		})
	}
}

func TestDNSCheck(t *testing.T) {
	many := func(n int) (servers []netip.Addr, domains []string, nat64 []netip.Prefix) {
		for i := range n {
			servers = append(servers, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}))
			domains = append(domains,
				fmt.Sprintf("%s.%03d.example",
					strings.Repeat(strings.Repeat("a", 60)+".", 3)+strings.Repeat("b", 50), i))
			nat64 = append(nat64, netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01,
				byte(i)}), 32))
		}
		return servers, domains, nat64
	}
	servers, domains, nat64 := many(maxDomains + 1)
	one := servers[:1]
	for _, tc := range []struct {
		name string
		key  string // key in the error
		dns  DNS
	}{
		{"too many servers", "dns.servers", DNS{Servers: servers}},
		{"too many search domains", "dns.search", DNS{Servers: one, Search: domains}},
		{"too many domains", "dns.domains", DNS{Servers: one, Domains: domains}},
		{"too many NAT64 prefixes", "dns.nat64", DNS{NAT64: nat64}},
		{"domains without servers", "dns.servers", DNS{Domains: domains[:1]}},
		{"invalid server", "dns", DNS{Servers: []netip.Addr{{}}}},
		{"invalid search domain", "dns", DNS{Servers: one, Search: []string{"a b"}}},
		{"invalid NAT64 prefix", "dns.nat64",
			DNS{NAT64: []netip.Prefix{netip.MustParsePrefix("64:ff9b::/95")}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var e *Error
			if err := tc.dns.check(); !errors.As(err, &e) || e.Kind != KindUsage ||
				e.Key != tc.key {
				t.Errorf("got %v, want an error about %s", err, tc.key)
			}
		})
	}
	most := DNS{Servers: servers[:maxServers], Domains: domains[:maxDomains],
		Search: domains[:maxDomains], NAT64: nat64[:maxNAT64]}
	if err := most.check(); err != nil {
		t.Error(err)
	}
	// connect-ip-go accepts capsules of this length.
	longest := &capsule.DNSAssign{Configurations: most.configurations()}
	if n := len(longest.Append(nil)); n > 32<<10 {
		t.Errorf("the capsule has %d bytes", n)
	}
}
