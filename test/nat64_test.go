package test

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"masquevpn/internal/dnstest"
	"masquevpn/internal/lab"
)

// A client on a network without IPv4 reaches a proxy that is configured by an
// IPv4 address, through the NAT64 translator of the network.
func TestProxyBehindTranslator(t *testing.T) {
	p := newPair(t, options{})
	ip := func(h *lab.Host, args string) {
		check(t, h.Command(p.ctx, "ip", strings.Fields(args)...).Run())
	}
	// The lab has no translator. The proxy has the address that a translator
	// would map to its IPv4 address.
	translated := netip.MustParseAddr("64:ff9b::203.0.113.5")
	ip(p.Proxy, "addr add "+translated.String()+"/128 dev eth0 nodad")
	ip(p.Router, "-6 route add 64:ff9b::/96 via 2001:db8:2::5")
	ip(p.Client, "-4 addr flush dev eth0")
	socket, err := p.Router.ListenPacket("udp", "[2001:db8:1::1]:53")
	check(t, err)
	dnstest.Serve(t, socket, func(name string) ([]netip.Addr, error) {
		if name == "ipv4only.arpa" {
			return []netip.Addr{netip.MustParseAddr("64:ff9b::192.0.0.170")}, nil
		}
		return nil, nil
	})
	r := &resolver{pair: p}
	r.setResolver("nameserver 2001:db8:1::1\n")
	file := p.invite("alice")
	text, err := os.ReadFile(file)
	check(t, err)
	byAddress := strings.Replace(string(text), "proxy = \""+lab.ProxyName+":443\"",
		"proxy = \"203.0.113.5\"", 1)
	byAddress = strings.Replace(byAddress, "[tls]", "[tls]\nserver_name = \""+lab.ProxyName+"\"", 1)
	if !strings.Contains(byAddress, "203.0.113.5") {
		t.Fatalf("the client's file is\n%s", text)
	}
	check(t, os.WriteFile(file, []byte(byAddress), 0o600))
	p.up(p.Client, file)
	if got := p.status(p.Client, "alice").Proxy.Endpoint; got != netip.AddrPortFrom(translated,
		443).String() {
		t.Errorf("the proxy is reached at %s, want port 443 of %v", got, translated)
	}
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.down(p.Client, "alice")
}
