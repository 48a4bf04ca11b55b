package proxy

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// reloadable is a proxy with one client. The test sends and receives its
// packets.
type reloadable struct {
	running
	t      *testing.T
	h3     *http3.ClientConn
	cfg    Config // next argument of Reload
	device *tuntest.Device
	str    *http3.RequestStream
	r      *capsule.Reader
	own    netip.Addr
}

func newReloadable(t *testing.T, change func(*Config)) *reloadable {
	t.Helper()
	x := &reloadable{t: t, device: tuntest.New(1400)}
	x.running = startServer(t, func(c *Config) {
		c.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		c.OpenDevice = func() (Device, error) { return x.device, nil }
		c.LocalNetworks = func() ([]netip.Prefix, error) { return nil, nil }
		if change != nil {
			change(c)
		}
		x.cfg = *c
	})
	_, x.h3 = x.dial(t, nil)
	rsp, str := request(t, x.h3, "CONNECT", "connect-ip", anyPath, asAlice)
	if rsp.StatusCode != 200 {
		t.Fatalf("status %d", rsp.StatusCode)
	}
	x.str, x.r = str, reader(t, str)
	nextRoutes(t, x.r)
	ask := capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1,
		Prefix: netip.MustParsePrefix("10.77.0.2/32")}}}
	if _, err := str.Write(ask.Append(nil)); err != nil {
		t.Fatal(err)
	}
	got, err := x.r.Next()
	if err != nil {
		t.Fatal(err)
	}
	x.own = got.(*capsule.AddressAssign).Addresses[0].Prefix.Addr()
	return x
}

// reload applies x.cfg. restart has the keys that need a restart.
func (x *reloadable) reload(restart ...string) {
	x.t.Helper()
	got, err := x.Reload(x.cfg)
	if err != nil || !slices.Equal(got, restart) {
		x.t.Errorf("reload: %v, %v, want %v", got, err, restart)
	}
}

// send sends an echo request into the tunnel.
func (x *reloadable) send(dst string, seq uint16) {
	x.t.Helper()
	pkt := ippacket.AppendEcho([]byte{0}, x.own, netip.MustParseAddr(dst), 64, true, 7, seq, nil)
	if err := x.str.SendDatagram(pkt); err != nil {
		x.t.Fatal(err)
	}
}

// passes checks that the proxy forwards a packet of the client.
func (x *reloadable) passes(dst string, seq uint16) {
	x.t.Helper()
	x.send(dst, seq)
	ctx, cancel := context.WithTimeout(x.t.Context(), 10*time.Second)
	defer cancel()
	pkt, err := x.device.Receive(ctx)
	if err != nil {
		x.t.Fatalf("packet %d to %s: %v", seq, dst, err)
	}
	p, err := ippacket.Parse(pkt)
	if err != nil {
		x.t.Fatal(err)
	}
	if _, _, got, _, ok := ippacket.ParseEcho(pkt, p); !ok || got != seq ||
		p.Dst != netip.MustParseAddr(dst) {
		x.t.Fatalf("got packet %d to %v, want %d to %s", got, p.Dst, seq, dst)
	}
}

// answered checks that a packet of the client is answered with Destination
// Unreachable of the given code.
func (x *reloadable) answered(dst string, code uint8) {
	x.t.Helper()
	x.send(dst, 0)
	ctx, cancel := context.WithTimeout(x.t.Context(), 10*time.Second)
	defer cancel()
	b, err := x.str.ReceiveDatagram(ctx)
	if err != nil {
		x.t.Fatalf("no answer about a packet to %s: %v", dst, err)
	}
	pkt := bytes.TrimPrefix(b, []byte{0})
	p, err := ippacket.Parse(pkt)
	if err != nil || !ippacket.IsICMPError(pkt, p) || pkt[p.HeaderLen] != 3 ||
		pkt[p.HeaderLen+1] != code {
		x.t.Fatalf("a packet to %s is answered with % x, %v; want code %d", dst, pkt, err, code)
	}
}

// TestReload checks that a reload changes the permissions of a running session
// and informs its client.
func TestReload(t *testing.T) {
	x := newReloadable(t, nil)
	x.passes("192.0.2.1", 1)
	x.answered("198.51.100.1", 0)
	// The network of the clients is not advertised.
	x.answered("10.77.0.3", 0)

	x.cfg.Advertise = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
		netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("10.77.0.0/24")}
	x.cfg.Deny = []netip.Prefix{netip.MustParsePrefix("192.0.2.128/25")}
	x.reload()
	if got, want := nextRoutes(t, x.r),
		capsule.Routes(x.cfg.Advertise, 0); !slices.Equal(got, want) {
		t.Errorf("advertised %v, want %v", got, want)
	}
	x.passes("192.0.2.1", 2)
	x.passes("198.51.100.1", 3)
	x.answered("192.0.2.129", 13)
	x.answered("10.77.0.3", 13)

	x.cfg.Deny, x.cfg.ClientToClient = nil, true
	x.reload()
	x.passes("192.0.2.129", 4)
	x.passes("10.77.0.3", 5)

	x.cfg.Advertise = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	x.reload()
	if got, want := nextRoutes(t, x.r),
		[]capsule.Route{route("10.77.0.1", 0),
			route("198.51.100.0/24", 0)}; !slices.Equal(got, want) {
		t.Errorf("advertised %v, want %v", got, want)
	}
	x.answered("192.0.2.1", 0)
	x.passes("198.51.100.1", 6)

	if s := x.Sessions(); len(s) != 1 ||
		!slices.Equal(s[0].Addresses, []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32")}) {
		t.Errorf("sessions %+v", s)
	}
}

// TestReloadLosesNothing checks that frequent reloads lose no packet that is
// allowed before and after each.
func TestReloadLosesNothing(t *testing.T) {
	x := newReloadable(t, nil)
	advertise := [2][]netip.Prefix{
		{netip.MustParsePrefix("192.0.2.0/24")},
		{netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("198.51.100.0/24")},
	}
	deny := [2][]netip.Prefix{nil, {netip.MustParsePrefix("192.0.2.128/25")}}
	stop, stopped := make(chan struct{}), make(chan struct{})
	cfg := x.cfg
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			cfg.Advertise, cfg.Deny, cfg.ClientToClient = advertise[i%2], deny[i%2], i%2 == 0
			if _, err := x.Reload(cfg); err != nil {
				t.Error(err)
			}
		}
	}()
	for seq := range uint16(500) {
		x.passes("192.0.2.1", seq)
	}
	close(stop)
	<-stopped
}

// TestReloadRefuses checks that a reload returns the keys that need a restart
// and keeps their values, and that an invalid configuration changes nothing.
func TestReloadRefuses(t *testing.T) {
	network := new(routingtest.Network)
	x := newReloadable(t, func(c *Config) {
		c.OpenNetwork = func(Device) (Network, error) { return network, nil }
	})
	good := x.cfg
	x.cfg.Name, x.cfg.Listen, x.cfg.Template = "other.example", []string{"127.0.0.1:1"},
		"https://other.example/x"
	x.cfg.Pool4, x.cfg.Pool6, x.cfg.Delegate4 = netip.MustParsePrefix("10.78.0.0/24"),
		netip.MustParsePrefix("fd78::/64"), 28
	x.cfg.Delegate6 = 80
	x.cfg.TUN.Name, x.cfg.TUN.MTU, x.cfg.TUN.Offload = "x", 1300, !x.cfg.TUN.Offload
	x.cfg.Masquerade, x.cfg.KernelHopLimit = true, true
	x.cfg.Methods, x.cfg.Users = []string{MethodToken}, noUsers{}
	x.reload("name", "listen", "template", "auth.methods", "tun.name", "tun.mtu", "tun.offload",
		"pool.ipv4", "pool.ipv6",
		"pool.delegate_ipv4", "pool.delegate_ipv6", "nat.masquerade", "forwarding.hop_limit")
	if s := x.Status(); s.Name != "localhost" || len(s.Listen) != 1 ||
		s.Listen[0] != "127.0.0.1:0" {
		t.Errorf("status %+v", s)
	}
	if slices.ContainsFunc(network.States(), func(s routing.State) bool {
		return len(s.Masquerade) > 0
	}) {
		t.Error("masquerading is on")
	}
	// Authentication is still off.
	rsp, str := request(t, x.h3, "CONNECT", "connect-ip", anyPath, nil)
	if rsp.StatusCode != 200 {
		t.Errorf("status %d", rsp.StatusCode)
	}
	a := &asker{t: t, str: str, r: reader(t, str)}
	a.want(a.ask("0.0.0.0/28"), "10.77.0.3/32")

	for key, change := range map[string]func(*Config){
		"routes":       func(c *Config) { c.MaxSessions = -1 },
		"pool":         func(c *Config) { c.Pool4 = netip.Prefix{} },
		"template":     func(c *Config) { c.Template = "x" },
		"dns.servers":  func(c *Config) { c.DNS = DNS{Search: []string{"corp.example"}} },
		"site[0].user": func(c *Config) { c.Sites = []Site{{}} },
	} {
		t.Run(key, func(t *testing.T) {
			x.cfg = good
			x.cfg.Advertise, x.cfg.Deny = nil, []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
			change(&x.cfg)
			_, err := x.Reload(x.cfg)
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindUsage {
				t.Errorf("got %v, want an error of KindUsage", err)
			}
			x.passes("192.0.2.1", 9)
		})
	}
}

// TestReloadLimits checks that new limits apply to new sessions only.
func TestReloadLimits(t *testing.T) {
	x := newReloadable(t, func(c *Config) {
		withUDP(echo(t), nil)(c)
		c.ConnectUDP = false
	})
	x.cfg.MaxSessions = 1
	x.reload()
	if rsp, _ := request(t, x.h3, "CONNECT", "connect-ip", anyPath, nil); rsp.StatusCode != 503 {
		t.Errorf("status %d above the new limit, want 503", rsp.StatusCode)
	}
	x.passes("192.0.2.1", 1)
	x.cfg.MaxSessions, x.cfg.ConnectUDP = 3, true
	x.reload()
	if rsp, _ := request(t, x.h3, "CONNECT", "connect-ip", anyPath, nil); rsp.StatusCode != 200 {
		t.Errorf("status %d below the new limit, want 200", rsp.StatusCode)
	}
	if rsp, _ := request(t, x.h3, "CONNECT", "connect-udp", udpPath+"192.0.2.7/53/",
		nil); rsp.StatusCode != 200 {
		t.Errorf("status %d for UDP proxying, want 200", rsp.StatusCode)
	}
}

// TestReloadEndsFlows checks that a UDP flow ends if clients may not reach its
// target any more.
func TestReloadEndsFlows(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"denied": func(c *Config) {
			c.Deny = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
		},
		"not advertised": func(c *Config) {
			c.Advertise = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var cfg Config
			s := startServer(t, withUDP(echo(t), func(c *Config) { cfg = *c }))
			_, h3 := s.dial(t, nil)
			f := openFlow(t, h3, nil)
			f.exchange(t, []byte("before"))
			if _, err := s.Reload(cfg); err != nil {
				t.Fatal(err)
			}
			f.exchange(t, []byte("nothing changed"))
			change(&cfg)
			if _, err := s.Reload(cfg); err != nil {
				t.Fatal(err)
			}
			f.awaitEnd(t)
		})
	}
}

// TestReloadBeforeRun checks that Reload works before Run.
func TestReloadBeforeRun(t *testing.T) {
	var cfg Config
	startServer(t, func(c *Config) { cfg = *c })
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Deny = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	if _, err := s.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if got := s.cfg().Deny; !slices.Equal(got, cfg.Deny) {
		t.Errorf("denied %v", got)
	}
}

// oneChanging has one user, alice, whose token is her name. Tests change her.
type oneChanging struct {
	mu    sync.Mutex
	alice User
	gone  bool
}

func (o *oneChanging) ByName(name string) (User, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.alice, name == "alice" && !o.gone
}

func (o *oneChanging) ByToken(token string) (User, bool) { return o.ByName(token) }
func (*oneChanging) Reserved(netip.Prefix, string) bool  { return false }

func (o *oneChanging) change(f func(*oneChanging)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(o)
}

// TestUsersChanged checks that sessions end if their user is removed or has new
// credentials, and continue otherwise.
func TestUsersChanged(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*oneChanging)
		want   error // reason of the end; nil: the session continues
	}{
		"gone":        {func(o *oneChanging) { o.gone = true }, errRevoked},
		"token":       {func(o *oneChanging) { o.alice.TokenHash = [32]byte{9} }, errRenewed},
		"certificate": {func(o *oneChanging) { o.alice.Certificate = [32]byte{9} }, errRenewed},
		"limits":      {func(o *oneChanging) { o.alice.Sessions = 1 }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			users := &oneChanging{alice: User{Name: "alice", TokenHash: [32]byte{1}}}
			s := startServer(t, func(c *Config) {
				c.Methods, c.Users = []string{MethodToken}, users
			})
			_, h3 := s.dial(t, nil)
			request(t, h3, "CONNECT", "connect-ip", anyPath,
				http.Header{"Authorization": {"Bearer alice"}})
			ss := s.sessions.list()[0].base()
			users.change(tc.change)
			s.UsersChanged()
			if tc.want == nil {
				if ss.ctx.Err() != nil {
					t.Errorf("the session ended with %v", context.Cause(ss.ctx))
				}
				return
			}
			<-ss.done
			if got := context.Cause(ss.ctx); got != tc.want {
				t.Errorf("the session ended with %v, want %v", got, tc.want)
			}
		})
	}
}

// TestUserChangesMeanwhile checks that a user who is removed while the proxy
// resolves the name in the request gets no session.
func TestUserChangesMeanwhile(t *testing.T) {
	users := &oneChanging{alice: User{Name: "alice"}}
	s := startServer(t, func(c *Config) {
		c.Methods, c.Users = []string{MethodToken}, users
		c.Resolver = resolver(func(context.Context, string) ([]netip.Addr, error) {
			users.change(func(o *oneChanging) { o.gone = true })
			return []netip.Addr{netip.MustParseAddr("192.0.2.7")}, nil
		})
	})
	_, h3 := s.dial(t, nil)
	rsp, _ := request(t, h3, "CONNECT", "connect-ip", "/.well-known/masque/ip/target.example/*/",
		http.Header{"Authorization": {"Bearer alice"}})
	if rsp.StatusCode != 401 || len(s.Sessions()) != 0 {
		t.Errorf("status %d, sessions %+v", rsp.StatusCode, s.Sessions())
	}
}

// disjoint returns n IPv4 networks, none of which are adjacent.
func disjoint(n int) []netip.Prefix {
	var out []netip.Prefix
	for i := range n {
		out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 15), byte(i >> 7),
			byte(i << 1)}), 32))
	}
	return out
}

// TestAdvertisedRoutes checks that New and Reload refuse more routes than
// clients accept, and count adjacent networks as one route.
func TestAdvertisedRoutes(t *testing.T) {
	const most = routing.MaxRoutes - 1 // the proxy's own address is another route
	for _, tc := range []struct {
		name      string
		advertise []netip.Prefix
		sent      int // advertised routes; 0: refused
	}{
		{"maximum", disjoint(most), routing.MaxRoutes},
		{"one more than the maximum", disjoint(most + 1), 0},
		{"adjacent networks", slices.Collect(func(yield func(netip.Prefix) bool) {
			for a, i := netip.MustParseAddr("192.0.0.0"), 0; i < 1<<15; a, i = a.Next(), i+1 {
				if !yield(netip.PrefixFrom(a, 32)) {
					return
				}
			}
		}), 2},
		{"a range of many prefixes",
			append(disjoint(most-10), slices.Collect(func(yield func(netip.Prefix) bool) {
				for b := 9; b <= 32 &&
					yield(netip.PrefixFrom(netip.AddrFrom4([4]byte{12}), b).Masked()); b++ {
				}
			})...), routing.MaxRoutes - 9},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x := newReloadable(t, nil)
			x.cfg.Advertise = tc.advertise
			_, err := x.Reload(x.cfg)
			if tc.sent == 0 {
				var e *Error
				if !errors.As(err, &e) || e.Kind != KindUsage ||
					e.Key != "routes.advertise" ||
					!strings.Contains(e.Reason, "16385") {
					t.Errorf("Reload: got %v, want a usage error about routes.advertise", err)
				}
				if _, err := New(x.cfg); !errors.As(err, &e) {
					t.Errorf("New: got %v", err)
				}
				x.passes("192.0.2.1", 9) // the routes are unchanged
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, str := request(t, x.h3, "CONNECT", "connect-ip", anyPath, nil)
			if got := nextRoutes(t,
				capsule.NewReader(str,
					routing.MaxRoutes*capsule.MaxRouteLen)); len(got) != tc.sent {
				t.Errorf("%d routes are advertised, want %d", len(got), tc.sent)
			}
		})
	}
}
