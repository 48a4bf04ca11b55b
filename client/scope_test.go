package client

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/proxy"
)

// knownNames is a proxy.Resolver that finds these names. Lookups of
// broken.example fail; no other name exists.
type knownNames map[string][]netip.Addr

func (k knownNames) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	if list, ok := k[host]; ok {
		return list, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: host != "broken.example"}
}

func withResolver(c *proxy.Config) {
	c.Resolver = knownNames{"target.example": {netip.MustParseAddr("192.0.2.2"),
		netip.MustParseAddr("2001:db8::2")}}
}

// A tunnel to one host for one protocol has routes to that host only. The
// status shows them with the protocol.
func TestScopedTunnel(t *testing.T) {
	f := startProxy(t, withResolver)
	n := startClient(t, f, func(c *Config) { c.Target, c.IPProto = "target.example", "17" })
	n.awaitConnected(t)
	v4, v6 := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	if got, want := n.network.Last().Routes,
		[]netip.Prefix{netip.PrefixFrom(v4, 32),
			netip.PrefixFrom(v6, 128)}; !slices.Equal(got, want) {
		t.Errorf("routes in the kernel %v, want %v", got, want)
	}
	want := []connectip.RouteStatus{
		connectip.RouteStatus(capsule.Route{Start: v4, End: v4, Protocol: 17}),
		connectip.RouteStatus(capsule.Route{Start: v6, End: v6, Protocol: 17}),
	}
	if got := n.Status().Routes; !slices.Equal(got, want) {
		t.Errorf("routes in the status %v, want %v", got, want)
	}
	carries(t, n, f, "10.77.0.2", "192.0.2.2") // ICMP passes with any protocol
	carries(t, n, f, "fd77::2", "2001:db8::2")
}

// The error tells refusals of a scope apart.
func TestScopeRefusedByTheProxy(t *testing.T) {
	f := startProxy(t, withResolver)
	for target, want := range map[string]struct {
		kind Kind
		text string
	}{
		"127.0.0.1":       {KindRefused, "does not allow this request"},
		"unknown.example": {KindRefused, "finds no address of the target's name"},
		"broken.example":  {KindFailure, "cannot resolve the target's name now"},
	} {
		t.Run(target, func(t *testing.T) {
			n := startClient(t, f, func(c *Config) {
				c.Target, c.Reconnect = target, want.kind == KindRefused
			})
			if e := n.failure(t); e.Kind != want.kind || !strings.Contains(e.Error(), want.text) ||
				strings.Contains(e.Error(), "\n") {
				t.Errorf("got kind %d, %q, want kind %d and %q", e.Kind, e, want.kind, want.text)
			}
		})
	}
}

// No field value makes proxyError panic, or return a response code without an
// error.
func FuzzProxyError(f *testing.F) {
	f.Add(`"vpn.example.org";error=dns_error;rcode="NXDOMAIN"`)
	f.Add(`a, (b c);error=x, "d";error="y";rcode=1`)
	f.Add(`"";error;rcode="0"`)
	f.Fuzz(func(t *testing.T, field string) {
		kind, rcode := proxyError(http.Header{"Proxy-Status": {field}})
		if kind == "" && rcode != "" {
			t.Errorf("%q has a response code %q without an error", field, rcode)
		}
	})
}
