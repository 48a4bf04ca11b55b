package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"unicode"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
)

// names is a Resolver with the addresses of some names. For other names it
// fails as DNS does.
type names map[string][]string

func (n names) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	if _, limited := ctx.Deadline(); !limited || network != "ip" {
		return nil, errors.New("a lookup without a deadline, or of one family")
	}
	switch host {
	case "slow.example":
		return nil, &net.DNSError{Err: "i/o timeout", Name: host, IsTimeout: true}
	case "broken.example":
		return nil, &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
	}
	list, ok := n[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	var addrs []netip.Addr
	for _, s := range list {
		addrs = append(addrs, netip.MustParseAddr(s))
	}
	return addrs, nil
}

// scoped starts a proxy that advertises two networks, and can resolve names
// inside and outside of them.
func scoped(t *testing.T, change func(*Config)) *http3.ClientConn {
	return start(t, func(c *Config) {
		c.Pool6 = netip.MustParsePrefix("fd77::/64")
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("2001:db8::/32")}
		c.Deny = []netip.Prefix{netip.MustParsePrefix("192.0.2.128/25")}
		c.LocalNetworks = func() ([]netip.Prefix, error) { return nil, nil }
		c.Resolver = names{
			"target.example": {"192.0.2.7", "2001:db8::7", "192.0.2.9", "::ffff:192.0.2.7",
				"192.0.2.200", "198.51.100.1"},
			"v4.example":      {"192.0.2.7"},
			"denied.example":  {"192.0.2.200"},
			"outside.example": {"198.51.100.1", "fe80::1"},
			"nothing.example": {},
		}
		if change != nil {
			change(c)
		}
	})
}

// proxyStatus returns the error type in Proxy-Status, and the rcode if there is
// one.
func proxyStatus(t *testing.T, rsp *http.Response) (kind, rcode string) {
	t.Helper()
	list, err := httpsfv.UnmarshalList(rsp.Header["Proxy-Status"])
	if err != nil || len(list) != 1 {
		t.Fatalf("Proxy-Status %q: %v", rsp.Header["Proxy-Status"], err)
	}
	item := list[0].(httpsfv.Item)
	if item.Value != "localhost" {
		t.Errorf("Proxy-Status has the name %v", item.Value)
	}
	token, _ := item.Params.Get("error")
	if code, ok := item.Params.Get("rcode"); ok {
		rcode = code.(string)
	}
	return string(token.(httpsfv.Token)), rcode
}

// nextRoutes reads capsules until the next ROUTE_ADVERTISEMENT.
func nextRoutes(t *testing.T, r *capsule.Reader) []capsule.Route {
	t.Helper()
	for {
		c, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if a, ok := c.(*capsule.RouteAdvertisement); ok {
			return a.Routes
		}
	}
}

// route returns the route to a prefix or an address.
func route(s string, protocol uint8) capsule.Route {
	if !strings.Contains(s, "/") {
		a := netip.MustParseAddr(s)
		return capsule.Route{Start: a, End: a, Protocol: protocol}
	}
	return capsule.Routes([]netip.Prefix{netip.MustParsePrefix(s)}, protocol)[0]
}

// TestScopes checks the routes that are advertised for a scope.
func TestScopes(t *testing.T) {
	h3 := scoped(t, nil)
	const base = "/.well-known/masque/ip/"
	for path, want := range map[string][]capsule.Route{
		"*/17/": {route("10.77.0.1", 17), route("192.0.2.0/24", 17),
			route("2001:db8::/32", 17), route("fd77::1", 17)},
		"192.0.2.7/*/":         {route("192.0.2.7", 0)},
		"192.0.2.0%2F25/6/":    {route("192.0.2.0/25", 6)},
		"0.0.0.0%2F0/*/":       {route("10.77.0.1", 0), route("192.0.2.0/24", 0)},
		"2001%3Adb8%3A%3A/58/": {route("2001:db8::", 58)},
		"10.77.0.1/*/":         {route("10.77.0.1", 0)},
		"target.example/17/": {route("192.0.2.7", 17), route("192.0.2.9", 17),
			route("2001:db8::7", 17)},
		"v4.example/*/": {route("192.0.2.7", 0)},
	} {
		t.Run(path, func(t *testing.T) {
			rsp, str := request(t, h3, "CONNECT", "connect-ip", base+path, nil)
			if rsp.StatusCode != 200 {
				t.Fatalf("status %d, %v", rsp.StatusCode, rsp.Header)
			}
			if got := nextRoutes(t, reader(t, str)); !slices.Equal(got, want) {
				t.Errorf("advertised %v, want %v", got, want)
			}
		})
	}
}

func TestScopesRefused(t *testing.T) {
	h3 := scoped(t, nil)
	const base = "/.well-known/masque/ip/"
	for path, want := range map[string]struct {
		status      int
		kind, rcode string
	}{
		"198.51.100.1/*/":     {403, "destination_ip_prohibited", ""},
		"192.0.2.200/*/":      {403, "destination_ip_prohibited", ""},
		"192.0.2.128%2F25/*":  {400, "http_request_error", ""},
		"192.0.2.128%2F26/*/": {403, "destination_ip_prohibited", ""},
		"127.0.0.1/*/":        {403, "destination_ip_prohibited", ""},
		"10.77.0.9/*/":        {403, "destination_ip_prohibited", ""},
		"denied.example/*/":   {403, "destination_ip_prohibited", ""},
		"outside.example/*/":  {403, "destination_ip_prohibited", ""},
		"unknown.example/17/": {502, "dns_error", "NXDOMAIN"},
		"nothing.example/*/":  {502, "dns_error", "NXDOMAIN"},
		"broken.example/*/":   {502, "dns_error", ""},
		"slow.example/*/":     {504, "dns_timeout", ""},
	} {
		t.Run(path, func(t *testing.T) {
			rsp, _ := request(t, h3, "CONNECT", "connect-ip", base+path, nil)
			kind, rcode := proxyStatus(t, rsp)
			if rsp.StatusCode != want.status || kind != want.kind || rcode != want.rcode {
				t.Errorf("got %d, %s, %q, want %+v", rsp.StatusCode, kind, rcode, want)
			}
			if rsp.Header.Get("Capsule-Protocol") != "" {
				t.Error("an error has Capsule-Protocol")
			}
		})
	}
}

// TestManyAddressesOfOneName checks the limit on the routes for one name.
func TestManyAddressesOfOneName(t *testing.T) {
	many := names{}
	a := netip.MustParseAddr("192.0.2.0")
	for range 120 {
		many["many.example"] = append(many["many.example"], a.String())
		a = a.Next().Next() // no two addresses are adjacent
	}
	h3 := scoped(t, func(c *Config) { c.Resolver, c.Deny = many, nil })
	_, str := request(t, h3, "CONNECT", "connect-ip", "/.well-known/masque/ip/many.example/*/", nil)
	if got := nextRoutes(t, reader(t, str)); len(got) != maxResolved {
		t.Errorf("%d routes, want %d", len(got), maxResolved)
	}
}

// TestRoutesFollowAddresses checks that routes are withdrawn if the client gets
// no address of their family.
func TestRoutesFollowAddresses(t *testing.T) {
	// The IPv6 pool has two addresses for clients.
	h3 := scoped(t, func(c *Config) { c.Pool6 = netip.MustParsePrefix("fd77::/126") })
	ask := func(path string, wants ...string) ([]capsule.Address, *capsule.Reader) {
		t.Helper()
		_, str := request(t, h3, "CONNECT", "connect-ip", "/.well-known/masque/ip/"+path, nil)
		r := reader(t, str)
		nextRoutes(t, r)
		var c capsule.AddressRequest
		for i, s := range wants {
			c.Addresses = append(c.Addresses,
				capsule.Address{RequestID: uint64(i + 1), Prefix: netip.MustParsePrefix(s)})
		}
		if _, err := str.Write(c.Append(nil)); err != nil {
			t.Fatal(err)
		}
		x, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		return x.(*capsule.AddressAssign).Addresses, r
	}
	if got, _ := ask("*/*/", "::/128", "::/128", "0.0.0.0/32"); len(got) != 3 ||
		slices.ContainsFunc(got, capsule.Address.Refused) {
		t.Fatalf("assigned %v", got)
	}
	got, r := ask("target.example/17/", "0.0.0.0/32", "::/128")
	if len(got) != 2 || got[0].Refused() || !got[1].Refused() {
		t.Fatalf("assigned %v, want an IPv4 address only", got)
	}
	if got, want := nextRoutes(t, r),
		[]capsule.Route{route("192.0.2.7", 17), route("192.0.2.9", 17)}; !slices.Equal(got, want) {
		t.Errorf("advertised %v, want %v", got, want)
	}
	// A client that requests addresses of one family gets the routes of that
	// family.
	_, r = ask("target.example/*/", "0.0.0.0/32")
	if got, want := nextRoutes(t, r),
		[]capsule.Route{route("192.0.2.7", 0), route("192.0.2.9", 0)}; !slices.Equal(got, want) {
		t.Errorf("advertised %v, want %v", got, want)
	}
}

// resolver is a function as a Resolver.
type resolver func(ctx context.Context, host string) ([]netip.Addr, error)

func (f resolver) LookupNetIP(ctx context.Context, _, host string) ([]netip.Addr, error) {
	return f(ctx, host)
}

// TestResolvesAfterAuthentication checks that no name is resolved for a client
// without valid credentials.
func TestResolvesAfterAuthentication(t *testing.T) {
	h3 := scoped(t, func(c *Config) {
		c.Methods, c.Users = []string{MethodToken}, noUsers{}
		c.Resolver = resolver(func(_ context.Context, host string) ([]netip.Addr, error) {
			t.Errorf("%q was resolved", host)
			return nil, errors.New("unexpected")
		})
	})
	rsp, _ := request(t, h3, "CONNECT", "connect-ip",
		"/.well-known/masque/ip/target.example/*/", nil)
	if rsp.StatusCode != 401 {
		t.Errorf("status %d", rsp.StatusCode)
	}
}

// oneUser is the user alice with the token "secret".
type oneUser struct{}

func (oneUser) ByName(name string) (User, bool)    { return User{Name: "alice"}, name == "alice" }
func (oneUser) ByToken(token string) (User, bool)  { return User{Name: "alice"}, token == "secret" }
func (oneUser) Reserved(netip.Prefix, string) bool { return false }

// TestLookupsAreLimited checks the limit on concurrent lookups for one user.
func TestLookupsAreLimited(t *testing.T) {
	asked, answer := make(chan struct{}, maxLookups), make(chan struct{})
	h3 := scoped(t, func(c *Config) {
		c.Methods, c.Users = []string{MethodToken}, oneUser{}
		c.Resolver = resolver(func(ctx context.Context, _ string) ([]netip.Addr, error) {
			asked <- struct{}{}
			<-answer
			return []netip.Addr{netip.MustParseAddr("192.0.2.7")}, nil
		})
	})
	header := http.Header{"Authorization": {"Bearer secret"}}
	const path = "/.well-known/masque/ip/target.example/*/"
	var waiting []*http3.RequestStream
	for range maxLookupsOfUser {
		waiting = append(waiting, send(t, h3, "CONNECT", "connect-ip", path, header))
		<-asked
	}
	rsp, _ := request(t, h3, "CONNECT", "connect-ip", path, header)
	if kind, _ := proxyStatus(t, rsp); rsp.StatusCode != 503 || kind != "connection_limit_reached" {
		t.Errorf("status %d, %s", rsp.StatusCode, kind)
	}
	close(answer)
	for _, str := range waiting {
		if rsp, err := str.ReadResponse(); err != nil || rsp.StatusCode != 200 {
			t.Errorf("%v, %v", rsp, err)
		}
	}
}

// plainLog is a log handler that reports control characters, which could move
// the cursor of a terminal.
type plainLog struct {
	t     *testing.T
	lines *atomic.Int32
}

func (plainLog) Enabled(context.Context, slog.Level) bool { return true }

func (l plainLog) Handle(_ context.Context, r slog.Record) error {
	l.lines.Add(1)
	r.Attrs(func(a slog.Attr) bool {
		if s := a.Value.String(); strings.ContainsFunc(s, unicode.IsControl) {
			l.t.Errorf("%s: %s = %q", r.Message, a.Key, s)
		}
		return true
	})
	return nil
}

func (l plainLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l plainLog) WithGroup(string) slog.Handler      { return l }

// TestNamesInLogsAreEscaped checks that text from a request is escaped in the
// log.
func TestNamesInLogsAreEscaped(t *testing.T) {
	log := plainLog{t, new(atomic.Int32)}
	h3 := scoped(t, func(c *Config) { c.Logger = slog.New(log) })
	before := log.lines.Load()
	paths := []string{"evil%0d%0aline/*/", "evil%1b%5B31m/*/", "*/%0a/", "a%00b/*/",
		"192.0.2.1%2F%0a/*/", "%0a.example/*/"}
	for _, path := range paths {
		rsp, _ := request(t, h3, "CONNECT", "connect-ip", "/.well-known/masque/ip/"+path, nil)
		if rsp.StatusCode != 400 {
			t.Errorf("%s: status %d", path, rsp.StatusCode)
		}
	}
	if n := log.lines.Load() - before; int(n) != len(paths) {
		t.Errorf("%d lines logged for %d requests", n, len(paths))
	}
}
