package client

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"masquevpn/internal/ippacket"
	"masquevpn/internal/pki"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun"
	"masquevpn/tun/tuntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const proxyName = "proxy.example"

// installation holds the certificates of a proxy and of its user alice.
type installation struct {
	pkitest.Installation
	user tls.Certificate // alice's certificate
}

var newInstallation = sync.OnceValue(func() installation {
	in := pkitest.New(proxyName)
	user, err := in.Authority.Client("alice", time.Now(), time.Hour)
	must(err)
	return installation{in, pkitest.KeyPair(user)}
})

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// users has alice, whose token is "secret".
type users struct{ gone *atomic.Bool }

func (u users) alice() proxy.User {
	return proxy.User{Name: "alice", TokenHash: sha256.Sum256([]byte("secret"))}
}

func (u users) ByName(name string) (proxy.User, bool) {
	return u.alice(), name == "alice" && (u.gone == nil || !u.gone.Load())
}
func (u users) ByToken(token string) (proxy.User, bool) { return u.alice(), token == "secret" }
func (u users) Reserved(netip.Prefix, string) bool      { return false }

// testProxy is a proxy that runs in the test, with a device in memory.
type testProxy struct {
	*proxy.Server
	addr   string // host:port to dial
	device *tuntest.Device
}

// startProxy starts a proxy that ends with the test. change changes its
// configuration; nil means no change.
func startProxy(t *testing.T, change func(*proxy.Config)) *testProxy {
	t.Helper()
	in := newInstallation()
	f := &testProxy{device: tuntest.New(1400)}
	cfg := proxy.Config{
		Name: proxyName, Listen: []string{"127.0.0.1:0"},
		TLS:     &tls.Config{Certificates: []tls.Certificate{in.Proxy}, ClientCAs: in.Roots},
		Methods: []string{proxy.MethodToken, proxy.MethodMTLS}, Users: users{},
		Pool4: netip.MustParsePrefix("10.77.0.0/24"), Pool6: netip.MustParsePrefix("fd77::/64"),
		Advertise: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"),
			netip.MustParsePrefix("::/0")},
		OpenDevice: func() (proxy.Device, error) { return f.device, nil },
		OpenNetwork: func(proxy.Device) (proxy.Network, error) {
			return &routingtest.Network{}, nil
		},
		LocalNetworks: func() ([]netip.Prefix, error) { return nil, nil },
	}
	if change != nil {
		change(&cfg)
	}
	s, err := proxy.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.Server = s
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatalf("the proxy ended: %v", err)
	}
	f.addr = s.Addrs()[0].String()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the proxy ended with %v", err)
		}
	})
	return f
}

// testClient is a client that runs in the test, with a device in memory.
type testClient struct {
	*Client
	device  *tuntest.Device
	network *routingtest.Network
	done    chan struct{}
	err     error
	stop    context.CancelFunc
}

// startClient starts a client of f that ends with the test. change changes its
// configuration; nil means no change.
func startClient(t *testing.T, f *testProxy, change func(*Config)) *testClient {
	t.Helper()
	n := &testClient{device: tuntest.New(1400), network: &routingtest.Network{},
		done: make(chan struct{})}
	cfg := Config{
		Name: "test", Proxy: f.addr, Token: "secret",
		TLS:           &tls.Config{RootCAs: newInstallation().Roots, ServerName: proxyName},
		InstallRoutes: true, Reconnect: true,
		OpenDevice:  func() (Device, error) { return n.device, nil },
		OpenNetwork: func(Device) (Network, error) { return n.network, nil },
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Client = c
	ctx, cancel := context.WithCancel(t.Context())
	n.stop = cancel
	go func() {
		n.err = c.Run(ctx)
		close(n.done)
	}()
	t.Cleanup(func() {
		cancel()
		<-n.done
	})
	return n
}

// await waits until ok accepts the status. state completes the sentence "the
// client was not ..." of the failure.
func (n *testClient) await(t *testing.T, state string, ok func(Status) bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := n.Changed()
		s := n.Status()
		if ok(s) {
			return
		}
		select {
		case <-changed:
		case <-n.done:
			t.Fatalf("the client ended with %v before it was %s", n.err, state)
		case <-timeout:
			t.Fatalf("the client was not %s in time: %+v", state, s)
		}
	}
}

func (n *testClient) awaitConnected(t *testing.T) {
	t.Helper()
	n.await(t, "connected", func(s Status) bool { return s.State == StateConnected })
}

// failure waits until the client ends and returns its error.
func (n *testClient) failure(t *testing.T) *Error {
	t.Helper()
	select {
	case <-n.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("the client did not end: %+v", n.Status())
	}
	var e *Error
	if !errors.As(n.err, &e) {
		t.Fatalf("the client ended with %v, want an *Error", n.err)
	}
	return e
}

func TestConnects(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"token": nil,
		"certificate": func(c *Config) {
			c.Token, c.TLS.Certificates = "", []tls.Certificate{newInstallation().user}
		},
		"both": func(c *Config) { c.TLS.Certificates = []tls.Certificate{newInstallation().user} },
	} {
		t.Run(name, func(t *testing.T) {
			f := startProxy(t, nil)
			n := startClient(t, f, change)
			n.awaitConnected(t)
			want := []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32"),
				netip.MustParsePrefix("fd77::2/128")}
			s := n.Status()
			state := n.network.Last()
			if !slices.Equal(s.Addresses, want) || !slices.Equal(state.Addresses, want) {
				t.Errorf("addresses %v, in the kernel %v, want %v", s.Addresses,
					state.Addresses, want)
			}
			if all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"),
				netip.MustParsePrefix("::/0")}; !slices.Equal(state.Routes, all) {
				t.Errorf("routes in the kernel %v, want %v", state.Routes, all)
			}
			if s.Proxy.AuthenticatedAs != proxyName || s.Proxy.Endpoint != f.addr ||
				state.MTU < minMTU {
				t.Errorf("status %+v, MTU in the kernel %d", s, state.MTU)
			}
			carries(t, n, f, "10.77.0.2", "192.0.2.2")
			carries(t, n, f, "fd77::2", "2001:db8::2")
			if sessions := f.Sessions(); len(sessions) != 1 || sessions[0].User != "alice" ||
				!slices.Equal(sessions[0].Addresses, want) {
				t.Errorf("sessions at the proxy: %+v", sessions)
			}
			n.stop()
			<-n.done
			if n.err != nil || !n.network.Closed() {
				t.Errorf("ended with %v, network closed %t", n.err, n.network.Closed())
			}
		})
	}
}

// carries sends a packet in each direction between the address inside, of n,
// and the address beyond, which the proxy routes to its device.
func carries(t *testing.T, n *testClient, f *testProxy, inside, beyond string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	a, b := netip.MustParseAddr(inside), netip.MustParseAddr(beyond)
	n.device.Inject(ippacket.AppendEcho(nil, a, b, 64, true, 99, 1, []byte("up")))
	receive(t, ctx, f.device, a, b)
	f.device.Inject(ippacket.AppendEcho(nil, b, a, 64, false, 99, 1, []byte("down")))
	receive(t, ctx, n.device, b, a)
}

// receive waits for an echo of carries and skips other packets, such as probes.
func receive(t *testing.T, ctx context.Context, d *tuntest.Device, src, dst netip.Addr) {
	t.Helper()
	for {
		pkt, err := d.Receive(ctx)
		if err != nil {
			t.Fatalf("no packet from %v to %v: %v", src, dst, err)
		}
		p, err := ippacket.Parse(pkt)
		if err != nil {
			t.Fatal(err)
		}
		if _, id, _, _, ok := ippacket.ParseEcho(pkt, p); ok && id == 99 && p.Src == src &&
			p.Dst == dst {
			return
		}
	}
}

func TestFailures(t *testing.T) {
	f := startProxy(t, nil)
	other, otherCA, err := pki.NewAuthority("another CA", time.Now())
	must(err)
	otherCAs := x509.NewCertPool()
	otherCAs.AppendCertsFromPEM(otherCA.Cert)
	foreign, err := other.Client("alice", time.Now(), time.Hour)
	must(err)
	foreignCert := pkitest.KeyPair(foreign)
	for name, tc := range map[string]struct {
		change func(*Config)
		kind   Kind
		want   string // part of the error
	}{
		"wrong token": {func(c *Config) {
			c.Token = "guess"
		}, KindCredentials, "does not accept the credentials"},
		"no credentials": {func(c *Config) {
			c.Token = ""
		}, KindCredentials, "does not accept the credentials"},
		"foreign certificate": {func(c *Config) {
			c.TLS.Certificates = []tls.Certificate{foreignCert}
		}, KindCredentials, "client certificate"},
		"unknown CA": {func(c *Config) {
			c.TLS.RootCAs = otherCAs
		}, KindIdentity, "unknown authority"},
		"wrong name": {func(c *Config) {
			c.TLS.ServerName = "other.example"
		}, KindIdentity, "not for the name other.example, but for " + proxyName},
		"clock beyond validity": {func(c *Config) {
			c.TLS.Time = func() time.Time { return time.Now().Add(100 * 365 * 24 * time.Hour) }
		}, KindIdentity, "expired"},
		"no such host": {func(c *Config) {
			c.Proxy, c.Reconnect = "no-such-host.example:443", false
			c.Discovery.Nameservers = []netip.AddrPort{nameserver(t, nil)}
		}, KindUnreachable, "the name no-such-host.example has no address"},
		"closed port": {func(c *Config) {
			c.Proxy, c.Reconnect = "127.0.0.1:9", false
		}, KindUnreachable, "does not answer on UDP port 9"},
		"unknown path": {func(c *Config) {
			c.Proxy = "https://" + f.addr + "/other"
		}, KindUsage, "status 404"},
		"missing device": {func(c *Config) {
			c.OpenDevice = func() (Device, error) { return nil, os.ErrPermission }
		}, KindPrivileges, "permission"},
	} {
		t.Run(name, func(t *testing.T) {
			n := startClient(t, f, tc.change)
			e := n.failure(t)
			if e.Kind != tc.kind || !strings.Contains(e.Error(), tc.want) ||
				strings.Contains(e.Error(), "\n") {
				t.Errorf("got kind %d, %q, want kind %d and one line with %q", e.Kind, e, tc.kind,
					tc.want)
			}
			if name != "missing device" && !n.network.Closed() {
				t.Error("the network was not closed")
			}
			if s := n.Status(); s.State != StateFailed || s.Reason == "" {
				t.Errorf("status %+v", s)
			}
		})
	}
}

func TestNewRejects(t *testing.T) {
	one := func(prefix string) []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix(prefix)}
	}
	for _, tc := range []struct {
		name, key string
		cfg       Config
	}{
		{"no proxy", "proxy", Config{}},
		{"template without ipproto", "proxy", Config{Proxy: "https://p/{+target}"}},
		{"protocol for a template without ipproto", "proxy",
			Config{Proxy: "https://p/ip/{target}", IPProto: "17"}},
		{"target for a template without variables", "proxy",
			Config{Proxy: "https://p/ip", Target: "192.0.2.0/24"}},
		{"target with bits beyond its length", "scope.target",
			Config{Proxy: "p", Target: "192.0.2.1/24"}},
		{"protocol by name", "scope.ipproto", Config{Proxy: "p", IPProto: "tcp"}},
		{"MTU", "tun.mtu", Config{Proxy: "p", TUN: tun.Config{MTU: 9000}}},
		{"request with bits beyond its length", "addresses.request",
			Config{Proxy: "p", Request: one("10.0.0.1/8")}},
		{"network with bits beyond its length", "routes.advertise",
			Config{Proxy: "p", AdvertiseRoutes: one("10.0.0.1/8")}},
		{"all addresses as a network", "routes.advertise",
			Config{Proxy: "p", AdvertiseRoutes: one("0.0.0.0/0")}},
		{"network with a static address", "routes.advertise",
			Config{Proxy: "p", AdvertiseRoutes: one("10.1.0.0/24"), Static: one("10.1.0.9/32")}},
		{"network with a requested address", "routes.advertise",
			Config{Proxy: "p", AdvertiseRoutes: one("fd77::/64"), Request: one("fd77::9/128")}},
		{"network for the proxy", "routes.assign",
			Config{Proxy: "p", AssignPeer: one("10.1.0.0/24")}},
		{"loopback address for the proxy", "routes.assign",
			Config{Proxy: "p", AssignPeer: one("127.0.0.1/32")}},
		{"static address for the proxy", "routes.assign",
			Config{Proxy: "p", AssignPeer: one("10.1.0.9/32"), Static: one("10.1.0.9/32")}},
		{"negative delay", "reconnect.max_delay", Config{Proxy: "p", MaxDelay: -1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := New(tc.cfg)
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindUsage || e.Key != tc.key {
				t.Errorf("got %v, want a usage error about %s", err, tc.key)
			}
		})
	}
}

// A client that reconnects gets the same addresses, even if another client has
// given up lower ones.
func TestReconnectsWithTheSameAddresses(t *testing.T) {
	f := startProxy(t, nil)
	first, second := startClient(t, f, nil), (*testClient)(nil)
	first.awaitConnected(t)
	second = startClient(t, f, nil)
	second.awaitConnected(t)
	want := second.Status().Addresses
	if slices.Equal(first.Status().Addresses, want) {
		t.Fatalf("both clients have %v", want)
	}
	first.stop()
	<-first.done
	for _, s := range f.Sessions() {
		f.Kick(s.ID)
	}
	second.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
	if got := second.Status().Addresses; !slices.Equal(got, want) {
		t.Errorf("addresses %v after the reconnect, want %v", got, want)
	}
	carries(t, second, f, want[0].Addr().String(), "192.0.2.2")
}

func TestRevokedUser(t *testing.T) {
	var gone atomic.Bool
	f := startProxy(t, func(c *proxy.Config) {
		c.Users, c.Methods = users{&gone}, []string{proxy.MethodMTLS}
	})
	n := startClient(t, f, func(c *Config) {
		c.TLS.Certificates = []tls.Certificate{newInstallation().user}
	})
	n.awaitConnected(t)
	gone.Store(true)
	f.UsersChanged()
	if e := n.failure(t); e.Kind != KindCredentials {
		t.Errorf("got %v", e)
	}
}

func TestPoolExhausted(t *testing.T) {
	f := startProxy(t, func(c *proxy.Config) {
		// The pool has one address for clients.
		c.Pool4, c.Pool6 = netip.MustParsePrefix("10.77.0.0/30"), netip.Prefix{}
	})
	first := startClient(t, f, nil)
	first.awaitConnected(t)
	e := startClient(t, f, nil).failure(t)
	if e.Kind != KindRefused || !strings.Contains(e.Error(), "assigned no address") {
		t.Errorf("got %v", e)
	}
	carries(t, first, f, "10.77.0.2", "192.0.2.2")
}

func TestSessionLimit(t *testing.T) {
	f := startProxy(t, func(c *proxy.Config) { c.MaxSessionsPerUser = 1 })
	startClient(t, f, nil).awaitConnected(t)
	e := startClient(t, f, func(c *Config) { c.Reconnect = false }).failure(t)
	if e.Kind != KindFailure || !strings.Contains(e.Error(), "status 429") {
		t.Errorf("got %v", e)
	}
}

// The client installs only the accepted part of the advertised routes.
func TestSplitTunnel(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, func(c *Config) {
		c.Accept = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("2001:db8::/32")}
	})
	n.awaitConnected(t)
	if got := n.network.Last().Routes; !slices.Equal(got,
		[]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("2001:db8::/32")}) {
		t.Errorf("installed %v", got)
	}
}

// On a host without IPv6 the tunnel carries IPv4, and the status has a warning.
func TestHostWithoutIPv6(t *testing.T) {
	f := startProxy(t, nil)
	kernel := new(routingtest.Network)
	kernel.SetHeld(routing.ErrIPv6Disabled)
	n := startClient(t, f, func(c *Config) {
		c.OpenNetwork = func(Device) (Network, error) { return kernel, nil }
	})
	n.awaitConnected(t)
	want := []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32")}
	s := n.Status()
	if !slices.Equal(s.Addresses, want) || len(s.Routes) != 1 || !s.Routes[0].Start.Is4() {
		t.Errorf("the status has addresses %v and routes %v, want those of IPv4", s.Addresses,
			s.Routes)
	}
	if len(s.Warnings) != 1 || !strings.Contains(s.Warnings[0],
		"IPv6 that belongs in the tunnel is refused") {
		t.Errorf("the warnings are %q", s.Warnings)
	}
	// The state has IPv6 routes all the same: package routing makes them reject
	// packets.
	if got := kernel.Last().Routes; !slices.Contains(got, netip.MustParsePrefix("::/0")) {
		t.Errorf("routes %v, want ::/0 among them", got)
	}
	carries(t, n, f, "10.77.0.2", "192.0.2.2")
}

// Clients do not reach each other unless the proxy allows it.
func TestIsolation(t *testing.T) {
	f := startProxy(t, nil)
	a, b := startClient(t, f, nil), (*testClient)(nil)
	a.awaitConnected(t)
	b = startClient(t, f, nil)
	b.awaitConnected(t)
	from, to := a.Status().Addresses[0].Addr(), b.Status().Addresses[0].Addr()
	a.device.Inject(ippacket.AppendEcho(nil, from, to, 64, true, 99, 1, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		pkt, err := a.device.Receive(ctx)
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		p, err := ippacket.Parse(pkt)
		if err != nil {
			t.Fatal(err)
		}
		if q, ok := ippacket.Quoted(pkt, p); ok && q.Dst == to {
			if pkt[p.HeaderLen] != 3 || pkt[p.HeaderLen+1] != 13 {
				t.Errorf("got an ICMP error of type %d code %d, want 3 and 13", pkt[p.HeaderLen],
					pkt[p.HeaderLen+1])
			}
			return
		}
	}
}

// A proxy can advertise as many routes as package routing accepts.
func TestManyRoutes(t *testing.T) {
	var many []netip.Prefix
	for i := range routing.MaxRoutes - 2 { // room for the two addresses of the proxy
		many = append(many, netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0,
			byte(i >> 7), byte(i << 1)}), 64))
	}
	f := startProxy(t, func(c *proxy.Config) { c.Advertise = many })
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	if got := len(n.network.Last().Routes); got != routing.MaxRoutes {
		t.Errorf("%d routes are installed, want %d", got, routing.MaxRoutes)
	}
}

// New rejects a configuration whose request would be too large for a proxy.
func TestNewRejectsLargeRequests(t *testing.T) {
	for _, tc := range []struct {
		name, key string
		change    func(*Config)
	}{
		{"networks", "routes.advertise", func(c *Config) {
			for i := range 4000 {
				c.AdvertiseRoutes = append(c.AdvertiseRoutes,
					netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0,
						byte(i >> 7), byte(i << 1)}), 64))
			}
		}},
		{"addresses of the proxy", "routes.assign", func(c *Config) {
			for i := range 65 {
				c.AssignPeer = append(c.AssignPeer,
					netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 32))
			}
		}},
		{"addresses", "addresses.request", func(c *Config) {
			c.Request = slices.Repeat([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/32")}, 65)
		}},
		{"a token", "auth.token", func(c *Config) { c.Token = strings.Repeat("a", 9000) }},
		{"a template", "proxy", func(c *Config) {
			c.Proxy = "https://vpn.example/" + strings.Repeat("a", 5000)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Config{Name: "home", Proxy: "vpn.example"}
			tc.change(&c)
			_, err := New(c)
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindUsage ||
				e.Key != tc.key {
				t.Errorf("got %v, want a usage error about %s", err, tc.key)
			}
		})
	}
}
