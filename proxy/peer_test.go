package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
	"masquevpn/internal/pki/pkitest"
)

// peerB returns a peer without errors, for the domain a.example.
func peerB() Peer {
	return Peer{Domain: "b.example", Networks: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24")},
		Reach: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}}
}

func TestPeersConfig(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		key    string // "" for no error
		reason string
	}{
		{"valid", func(*Config) {}, "", ""},
		{"a domain twice", func(c *Config) {
			c.Peers = append(c.Peers, peerB())
			c.Peers[1].Networks = []netip.Prefix{netip.MustParsePrefix("10.3.0.0/24")}
		}, "peer[1].domain",
			`"b.example" has a [[peer]] with "a.example" already: write all of its networks there`},
		{"a domain twice, with another of ours", func(c *Config) {
			c.Federation.Domains = []string{"a.example", "a2.example"}
			c.Peers = append(c.Peers, peerB())
			c.Peers[1].Local = "a2.example"
			c.Peers[1].Networks = []netip.Prefix{netip.MustParsePrefix("10.3.0.0/24")}
		}, "", ""},
		{"networks of another peer", func(c *Config) {
			c.Peers = append(c.Peers, peerB())
			c.Peers[1].Domain = "c.example"
			c.Peers[1].Networks = []netip.Prefix{netip.MustParsePrefix("10.2.0.128/25")}
		}, "peer[1].networks", `10.2.0.128/25 overlaps 10.2.0.0/24, a network of the peer "b.example"`},
		{"networks of a site", func(c *Config) {
			c.Sites = []Site{{User: "s",
				Networks: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")}}}
		}, "peer[0].networks", `10.2.0.0/24 overlaps 10.2.0.0/16, a network of the site "s"`},
		{"the pool", func(c *Config) {
			c.Peers[0].Networks = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/25")}
		}, "peer[0].networks", `10.77.0.0/25 overlaps 10.77.0.0/24, the pool`},
		{"dnssec that is off", func(c *Config) { c.Peers[0].DNSSEC = true }, "peer[0].delegation",
			`"dnssec" has no effect when federation.dnssec is "off": set that to "use"`},
		{"accepts nobody", func(c *Config) { c.Peers[0].Policy = federation.Encrypted },
			"peer[0].policy", `the keys of the peer are missing: add pins, or write "trusted"`},
		{"pins alone", func(c *Config) {
			c.Peers[0].Policy, c.Peers[0].Pins = federation.Encrypted, make([][32]byte, 1)
		}, "", ""},
		{"everybody may connect", func(c *Config) {
			c.Methods, c.Users = []string{MethodNone}, nil
		}, "peer[0].domain", `nobody proves a domain when auth.methods is "none"`},
		{"local that is none of ours", func(c *Config) { c.Peers[0].Local = "x.example" },
			"peer[0].local", `"x.example" is not in federation.domains`},
		{"our own domain", func(c *Config) { c.Peers[0].Domain = "a.example" }, "peer[0].domain",
			`"a.example" is this proxy's own domain`},
		{"no domain of ours", func(c *Config) { c.Name, c.Federation.Domains = "192.0.2.1", nil },
			"federation.domains",
			`the domain that peers know is missing, and "192.0.2.1" is no domain name`},
		{"the name is the domain", func(c *Config) { c.Federation.Domains = nil }, "", ""},
		{"networks that are never behind a gateway", func(c *Config) {
			c.Peers[0].Networks = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/24")}
		}, "peer[0].networks", `169.254.0.0/24 overlaps 169.254.0.0/16, which is never behind a gateway`},
		{"nobody to ask", func(c *Config) { c.Federation.Resolver = nil }, "peer[0].delegation",
			"there is no resolver to ask for delegations"},
		{"too many peers", func(c *Config) { c.Peers = manyPeers(257, 1) }, "peer",
			"257 peers, and 256 are possible"},
		{"many peers", func(c *Config) { c.Peers = manyPeers(256, 1) }, "", ""},
		{"too many domains", func(c *Config) {
			for i := range 16 {
				c.Federation.Domains = append(c.Federation.Domains, fmt.Sprintf("a%d.example", i))
			}
		}, "federation.domains", "17 domains, and 16 are possible"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Config{Name: "vpn.example.org",
				TLS:     &tls.Config{Certificates: []tls.Certificate{pkitest.New("vpn.example.org").Proxy}},
				Methods: []string{MethodToken}, Users: userList{{Name: "s"}},
				Pool4: netip.MustParsePrefix("10.77.0.0/24")}
			c.Federation = Federation{Domains: []string{"a.example"},
				Resolver: new(discovery.Resolver)}
			c.Peers = []Peer{peerB()}
			c.Peers[0].WellKnown = true
			tc.change(&c)
			_, err := New(c)
			e, _ := errors.AsType[*Error](err)
			switch {
			case tc.key == "" && err != nil:
				t.Errorf("got %v, want no error", err)
			case tc.key != "" && (e == nil || e.Key != tc.key || e.Reason != tc.reason):
				t.Errorf("got %+v, want %s: %s", err, tc.key, tc.reason)
			}
		})
	}
}

// manyPeers returns n peers with networks of their own, each network below
// 100.64.0.0/10, in pairs with each of our domains a0.example and so on.
func manyPeers(n, domains int) []Peer {
	var list []Peer
	for i := range n {
		for j := range domains {
			p := peerB()
			p.Domain = fmt.Sprintf("b%d.example", i)
			if domains > 1 {
				p.Local = fmt.Sprintf("a%d.example", j)
			}
			k := i*domains + j
			p.Networks = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{100,
				64 + byte(k>>8), byte(k), 0}), 24)}
			list = append(list, p)
		}
	}
	return list
}
